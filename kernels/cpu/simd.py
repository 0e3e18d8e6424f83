"""SIMD vectors as a Numba type, and the functions of fusedlstm.math over them.

LLVM does not vectorise a cell's step by itself; written on vectors, the same function becomes
straight-line SIMD code.  A vector has the lanes of one register of the processor at hand; wider
ones are split by LLVM.  Memory is addressed by integers.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_jitable, register_model

from .compile import Part

INT64, INT32 = ir.IntType(64), ir.IntType(32)

# Without reference counts, since all memory belongs to who calls a kernel, and as in C when dividing by 0.
OPTIONS: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}
# For what only other compiled code calls: nothing that Python or C could call is made.
INNER = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": Part}


def part(function: Any) -> Any:
    """A function that compiled code calls."""
    return register_jitable(**INNER)(function)


def inlined(function: Any) -> Any:
    """A function that becomes a part of the compiled code that calls it."""
    return register_jitable(forceinline=True, **INNER)(function)


def _on_vectors(function: Any) -> Any:
    """Like `numba.extending.overload`, inlined."""
    return overload(function, jit_options={"forceinline": True, **INNER})


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no type for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BFLOAT = _BFloat()


class Vector(types.Type):
    """A register of `lanes` floating-point numbers."""

    def __init__(self, scalar: types.Float, lanes: int) -> None:
        self.scalar, self.lanes = scalar, lanes
        super().__init__(f"Vector({scalar} x {lanes})")

    @property
    def ir(self) -> Any:
        return ir.VectorType(ir.FloatType() if self.scalar is types.float32 else ir.DoubleType(), self.lanes)

    @property
    def bits(self) -> Any:
        return ir.VectorType(ir.IntType(self.scalar.bitwidth), self.lanes)

    @property
    def suffix(self) -> str:
        """How LLVM's intrinsics name this type."""
        return f"v{self.lanes}f{self.scalar.bitwidth}"


class Mask(types.Type):
    """The result of a comparison of vectors, a bit for each lane."""

    def __init__(self, vector: Vector) -> None:
        self.vector = vector
        super().__init__(f"Mask({vector})")

    @property
    def ir(self) -> Any:
        return ir.VectorType(ir.IntType(1), self.vector.lanes)


@register_model(Vector)
@register_model(Mask)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


def splat_ir(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A vector that holds `value` in every lane."""
    vector = ir.VectorType(value.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def call_ir(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """A call of one of LLVM's intrinsics."""
    signature_ = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature_, name), args)


def _as_vector(context: Any, builder: ir.IRBuilder, type_: Any, value: Any, vector: Vector) -> ir.Value:
    if isinstance(type_, Vector):
        return value
    return splat_ir(builder, context.cast(builder, value, type_, vector.scalar), vector.lanes)


def _vector_of(args: tuple[Any, ...]) -> Vector | None:
    """The vector type among the arguments, if all others are that type or numbers."""
    vectors = {arg for arg in args if isinstance(arg, Vector)}
    numbers = all(isinstance(arg, (Vector, types.Number)) for arg in args)
    return vectors.pop() if numbers and len(vectors) == 1 else None


def _operator(op: Any, emit: Any, result: Any = lambda vector: vector) -> None:
    @infer_global(op)
    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            vector = _vector_of(args)
            return vector and signature(result(vector), *args)

    for left, right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):

        @lower_builtin(op, left, right)
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = _vector_of(sig.args)
            assert vector is not None
            return emit(
                builder, *(_as_vector(context, builder, t, v, vector) for t, v in zip(sig.args, args))
            )


# "contract" lets LLVM fuse a product and a sum, and nothing else
_operator(operator.add, lambda builder, x, y: builder.fadd(x, y, flags=("contract",)))
_operator(operator.sub, lambda builder, x, y: builder.fsub(x, y, flags=("contract",)))
_operator(operator.mul, lambda builder, x, y: builder.fmul(x, y, flags=("contract",)))
_operator(operator.truediv, lambda builder, x, y: builder.fdiv(x, y))


def _comparison(op: Any, symbol: str, ordered: bool = True) -> None:
    def emit(builder: Any, x: Any, y: Any) -> Any:
        return (builder.fcmp_ordered if ordered else builder.fcmp_unordered)(symbol, x, y)

    _operator(op, emit, Mask)


for _op, _symbol in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
    _comparison(_op, _symbol)
_comparison(operator.eq, "==")
_comparison(operator.ne, "!=", ordered=False)


def _logic(op: Any, name: str) -> None:
    @infer_global(op)
    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            same = all(isinstance(arg, Mask) and arg == args[0] for arg in args)
            return signature(args[0], *args) if same else None

    @lower_builtin(op, *[Mask] * (1 if name == "not_" else 2))
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, name)(*args)


_logic(operator.and_, "and_")
_logic(operator.or_, "or_")
_logic(operator.invert, "not_")


# --- memory ---------------------------------------------------------------------------------


def _pointer(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    return builder.inttoptr(address, type_.as_pointer())


def _first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """The mask of the first `count` lanes."""
    numbers = ir.Constant(ir.VectorType(INT64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, splat_ir(builder, count, lanes))


@intrinsic
def load(typingctx: Any, spec: Any, address: Any) -> Any:
    """The vector at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[1], spec.vector.ir), align=spec.scalar.bitwidth // 8)

    return spec.vector(spec, types.int64), codegen


@intrinsic
def load_part(typingctx: Any, spec: Any, address: Any, count: Any) -> Any:
    """The first `count` lanes of a vector from an address, zero in the others; reads no further."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = spec.vector
        pointer = _pointer(builder, args[1], vector.ir)
        return call_ir(
            builder,
            f"llvm.masked.load.{vector.suffix}.p0",
            vector.ir,
            pointer,
            ir.Constant(ir.IntType(32), spec.scalar.bitwidth // 8),
            _first_lanes(builder, args[2], vector.lanes),
            ir.Constant(vector.ir, None),
        )

    return spec.vector(spec, types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, vector: Any, address: Any) -> Any:
    """Write a vector to an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[0], _pointer(builder, args[1], vector.ir), align=vector.scalar.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(vector, types.int64), codegen


@intrinsic
def store_part(typingctx: Any, vector: Any, address: Any, count: Any) -> Any:
    """Write the first `count` lanes of a vector to an address, and no further."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        call_ir(
            builder,
            f"llvm.masked.store.{vector.suffix}.p0",
            ir.VoidType(),
            args[0],
            _pointer(builder, args[1], vector.ir),
            ir.Constant(ir.IntType(32), vector.scalar.bitwidth // 8),
            _first_lanes(builder, args[2], vector.lanes),
        )
        return context.get_dummy_value()

    return types.void(vector, types.int64, types.int64), codegen


@inlined
def load_row(spec, address, valid):
    """A vector of a row of which `valid` lanes, at least one, are left."""
    if valid >= spec.lanes:
        return load(spec, address)
    return load_part(spec, address, valid)


@inlined
def store_row(spec, vector, address, valid):
    """Write a vector to a row of which `valid` lanes, at least one, are left."""
    if valid >= spec.lanes:
        store(vector, address)
    else:
        store_part(vector, address, valid)


@intrinsic
def transpose(
    typingctx: Any, spec: Any, source: Any, source_stride: Any, target: Any, target_stride: Any
) -> Any:
    """Write a square of `lanes` times `lanes` numbers transposed; strides are in bytes from row to row."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector, lanes, align = spec.vector.ir, spec.lanes, spec.scalar.bitwidth // 8

        def rows(start: Any, stride: Any) -> list[Any]:
            places = [builder.add(start, builder.mul(stride, INT64(n))) for n in range(lanes)]
            return [_pointer(builder, place, vector) for place in places]

        square = [builder.load(pointer, align=align) for pointer in rows(*args[1:3])]
        for size in [1 << n for n in range(lanes.bit_length() - 1)]:
            # of each pair of rows, the blocks of `size` lanes that lie across the diagonal change places
            kept = [n if not n & size else n - size + lanes for n in range(lanes)]
            moved = [n + size if not n & size else n + lanes for n in range(lanes)]
            for n in [n for n in range(lanes) if not n & size]:
                pair = square[n], square[n + size]
                for row, lanes_of in ((n, kept), (n + size, moved)):
                    order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), lanes_of)
                    square[row] = builder.shuffle_vector(*pair, order)
        for row, pointer in zip(square, rows(*args[3:])):
            builder.store(row, pointer, align=align)
        return context.get_dummy_value()

    return types.void(spec, *[types.int64] * 4), codegen


@intrinsic
def keep(typingctx: Any, vector: Any, count: Any) -> Any:
    """A vector with zero in all but its first `count` lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        mask = _first_lanes(builder, args[1], vector.lanes)
        return builder.select(mask, args[0], ir.Constant(vector.ir, None))

    return vector(vector, types.int64), codegen


@intrinsic
def sum_lanes(typingctx: Any, vector: Any) -> Any:
    """The sum of the lanes of a vector, in pairs."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, lanes = args[0], vector.lanes
        undefined = ir.Constant(vector.ir, ir.Undefined)
        while lanes > 1:
            lanes //= 2
            order = [*range(lanes, 2 * lanes), *[0] * (vector.lanes - lanes)]
            upper = builder.shuffle_vector(
                total, undefined, ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), order)
            )
            total = builder.fadd(total, upper)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return vector.scalar(vector), codegen


@inlined
def write_sum(registers, vector, address, lanes):
    """Write the sum of the first `lanes` lanes."""
    write(registers, sum_lanes(keep(vector, lanes)), address)


@intrinsic
def splat(typingctx: Any, spec: Any, value: Any) -> Any:
    """A vector that holds `value` in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _as_vector(context, builder, sig.args[1], args[1], spec.vector)

    return spec.vector(spec, value), codegen


@intrinsic
def read(typingctx: Any, spec: Any, address: Any) -> Any:
    """The number at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[1], spec.vector.ir.element))

    return spec.scalar(spec, types.int64), codegen


@intrinsic
def write(typingctx: Any, spec: Any, value: Any, address: Any) -> Any:
    """Write a number to an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[2], spec.vector.ir.element))
        return context.get_dummy_value()

    return types.void(spec, spec.scalar, types.int64), codegen


@intrinsic
def read_int(typingctx: Any, address: Any) -> Any:
    """The 64-bit integer at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], INT64))

    return types.int64(types.int64), codegen


@intrinsic
def read_byte(typingctx: Any, address: Any) -> Any:
    """The byte at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = builder.load(_pointer(builder, args[0], ir.IntType(8)))
        return builder.zext(byte, INT64)

    return types.int64(types.int64), codegen


@intrinsic
def write_zero(typingctx: Any, spec: Any, address: Any) -> Any:
    """Write the number 0 to an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = spec.vector.ir.element
        builder.store(ir.Constant(element, 0.0), _pointer(builder, args[1], element))
        return context.get_dummy_value()

    return types.void(spec, types.int64), codegen


@intrinsic
def write_int(typingctx: Any, value: Any, address: Any) -> Any:
    """Write a 64-bit integer to an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[0], _pointer(builder, args[1], INT64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """The address of the first element of an array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        view = context.make_array(array)(context, builder, args[0])
        return builder.ptrtoint(view.data, INT64)

    return types.int64(array), codegen


# --- narrow numbers -------------------------------------------------------------------------

# Added to a float32 that is small enough, it leaves the nearest integer in the lowest bits.
_INTEGER = 1.5 * 2**23


def _whole(builder: ir.IRBuilder, x: ir.Value, registers: Any) -> ir.Value:
    """The nearest integers of the lanes as 32 bits, of which the lower 16 are meant."""
    shift = ir.Constant(x.type, [_INTEGER] * registers.lanes)
    return builder.bitcast(builder.fadd(x, shift), ir.VectorType(INT32, registers.lanes))


def _bfloat16_bits(builder: ir.IRBuilder, x: ir.Value, registers: Any) -> ir.Value:
    """The lanes rounded to bfloat16, to even where two are equally near, in the lower 16 of 32 bits."""
    kind = ir.VectorType(INT32, registers.lanes)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(kind, [value] * registers.lanes)

    bits = builder.bitcast(x, kind)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    return builder.select(builder.fcmp_unordered("uno", x, x), constant(0x7FC0), rounded)


@intrinsic
def store_values(typingctx: Any, registers: Any, vector: Any, address: Any) -> Any:
    """Write the lanes of a vector, neighbours in k, as values of a row; integers have their scale already.

    Where weights are signed and values are not, 128 is added to them.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, lanes, value = args[1], registers.lanes, registers.value
        if not value:  # rows are read where they are, and nobody comes here
            return context.get_dummy_value()
        if registers.operand.instruction == "dpbf16ps":
            narrow = builder.fptrunc(x, ir.VectorType(BFLOAT, lanes))
        elif not registers.integer:
            bits = _bfloat16_bits(builder, x, registers)
            narrow = builder.shl(bits, ir.Constant(bits.type, [16] * lanes))
        else:
            bits = _whole(builder, x, registers)
            if value == 1:
                bits = builder.xor(bits, ir.Constant(bits.type, [128] * lanes))
            narrow = builder.trunc(bits, ir.VectorType(ir.IntType(8 * value), lanes))
        builder.store(narrow, _pointer(builder, args[2], narrow.type), align=value)
        return context.get_dummy_value()

    return types.void(registers, registers.vector, types.int64), codegen


@intrinsic
def store_group(typingctx: Any, registers: Any, a: Any, b: Any, c: Any, d: Any, address: Any) -> Any:
    """Write a vector of weights for a group, whose neighbours in k are a, b, c and d, or a and b alone."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if registers.group == 1:  # numbers as they are, and nobody comes here
            return context.get_dummy_value()
        narrow = _whole if registers.integer else _bfloat16_bits
        lanes, width = registers.lanes, 8 * registers.operand.weight
        kind = ir.VectorType(INT32, lanes)
        total: Any = ir.Constant(kind, None)
        for n, x in enumerate(args[1 : 1 + registers.group]):
            low = builder.and_(narrow(builder, x, registers), ir.Constant(kind, [(1 << width) - 1] * lanes))
            low = builder.shl(low, ir.Constant(kind, [n * width] * lanes))
            total = builder.or_(total, low)
        if width * registers.group < 32:
            total = builder.trunc(total, ir.VectorType(ir.IntType(width * registers.group), lanes))
        builder.store(total, _pointer(builder, args[5], total.type), align=registers.operand.weight)
        return context.get_dummy_value()

    vector = registers.vector
    return types.void(registers, vector, vector, vector, vector, types.int64), codegen


@intrinsic
def store_whole(typingctx: Any, vector: Any, address: Any) -> Any:
    """Write the lanes, which are whole numbers, as integers of 32 bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = builder.fptosi(args[0], vector.bits)
        builder.store(whole, _pointer(builder, args[1], vector.bits), align=4)
        return context.get_dummy_value()

    return types.void(vector, types.int64), codegen


@intrinsic
def round_whole(typingctx: Any, vector: Any) -> Any:
    """The nearest integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_ir(builder, f"llvm.rint.{vector.suffix}", vector.ir, args[0])

    return vector(vector), codegen


@intrinsic
def larger(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger magnitude in each lane; NaN counts as larger than infinity."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        sign = ir.Constant(x.bits, [(1 << (x.scalar.bitwidth - 1)) - 1] * x.lanes)
        a, b = (builder.and_(builder.bitcast(arg, x.bits), sign) for arg in args)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), x.ir)

    return x(x, x), codegen


@intrinsic
def largest_lane(typingctx: Any, x: Any) -> Any:
    """The largest lane of a vector of magnitudes; NaN counts as larger than infinity."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], x.bits)
        most = call_ir(
            builder, f"llvm.vector.reduce.umax.v{x.lanes}i{x.scalar.bitwidth}", x.bits.element, bits
        )
        return builder.bitcast(most, x.ir.element)

    return x.scalar(x), codegen


# --- the functions of fusedlstm.math --------------------------------------------------------


@intrinsic
def where(typingctx: Any, condition: Any, x: Any, y: Any) -> Any:
    """x in the lanes where the condition holds, y in the others; either may be a number."""
    vector = condition.vector

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        arms = (_as_vector(context, builder, t, v, vector) for t, v in zip(sig.args[1:], args[1:]))
        return builder.select(args[0], *arms)

    return vector(condition, x, y), codegen


@intrinsic
def full_like(typingctx: Any, x: Any, value: Any) -> Any:
    """A vector of the type of x that holds `value` in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _as_vector(context, builder, sig.args[1], args[1], x)

    return x(x, value), codegen


@inlined
def vector_mean(x, lanes):
    """A vector that holds the mean of the first `lanes` lanes in all."""
    return full_like(x, sum_lanes(keep(x, lanes))) * (1.0 / lanes)


@intrinsic
def sqrt(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_ir(builder, f"llvm.sqrt.{x.suffix}", x.ir, args[0])

    return x(x), codegen


@intrinsic
def absolute(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_ir(builder, f"llvm.fabs.{x.suffix}", x.ir, args[0])

    return x(x), codegen


def _bits_operation(emit: Any) -> Any:
    """An intrinsic that works on the bits of a vector."""

    @intrinsic
    def operation(typingctx: Any, x: Any) -> Any:
        mantissa, bias = (23, 127) if x.scalar is types.float32 else (52, 1023)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def constant(value: int) -> ir.Constant:
                return ir.Constant(x.bits, [value] * x.lanes)

            return emit(builder, x, builder.bitcast(args[0], x.bits), constant, mantissa, bias)

        return x(x), codegen

    return operation


def _power_of_two_ir(builder: Any, x: Any, bits: Any, constant: Any, mantissa: int, bias: int) -> Any:
    return builder.bitcast(builder.shl(builder.add(bits, constant(bias)), constant(mantissa)), x.ir)


def _fraction_ir(builder: Any, x: Any, bits: Any, constant: Any, mantissa: int, bias: int) -> Any:
    low = builder.and_(bits, constant((1 << mantissa) - 1))
    return builder.bitcast(builder.or_(low, constant(bias << mantissa)), x.ir)


def _exponent_ir(builder: Any, x: Any, bits: Any, constant: Any, mantissa: int, bias: int) -> Any:
    return builder.sitofp(builder.sub(builder.lshr(bits, constant(mantissa)), constant(bias)), x.ir)


# 2**n, given n plus the number that shifts its bits to the low end of the mantissa
_power_of_two = _bits_operation(_power_of_two_ir)
# m and n of x = m * 2**n with 1 <= m < 2, for x > 0
_fraction = _bits_operation(_fraction_ir)
_exponent = _bits_operation(_exponent_ir)


def _stub(name: str) -> Any:
    def function(*args: Any) -> Any:
        raise NotImplementedError(f"{name} works on vectors in compiled code only")

    function.__name__ = name
    return function


tanh, sigmoid, hard_sigmoid, relu, softplus, exp, log, erf, minimum, maximum = map(
    _stub, ["tanh", "sigmoid", "hard_sigmoid", "relu", "softplus", "exp", "log", "erf", "minimum", "maximum"]
)
_expm1_reduced, _log1p_ratio = map(_stub, ("_expm1_reduced", "_log1p_ratio"))

LOG2_E = 1.4426950408889634
SQRT_2 = 1.4142135623730951


def _is_single(x: Any) -> bool:
    return isinstance(x, Vector) and x.scalar is types.float32


@_on_vectors(_expm1_reduced)
def _expm1_reduced_vector(r):
    """exp(r) - 1 for |r| <= ln(2) / 2: a polynomial good to the last bits of its type."""
    if _is_single(r):  # S. Moshier's Cephes library, expf

        def single(r):
            p = r * 1.9875691500e-4 + 1.3981999507e-3
            p = p * r + 8.3334519073e-3
            p = p * r + 4.1665795894e-2
            p = p * r + 1.6666665459e-1
            p = p * r + 5.0000001201e-1
            return p * (r * r) + r

        return single

    def double(r):  # Taylor's series, to the 13th power
        p = r * 1.6059043836821613e-10 + 2.08767569878681e-09
        p = p * r + 2.505210838544172e-08
        p = p * r + 2.755731922398589e-07
        p = p * r + 2.7557319223985893e-06
        p = p * r + 2.48015873015873e-05
        p = p * r + 1.984126984126984e-04
        p = p * r + 1.388888888888889e-03
        p = p * r + 8.333333333333333e-03
        p = p * r + 4.1666666666666664e-02
        p = p * r + 1.6666666666666666e-01
        p = p * r + 0.5
        return p * (r * r) + r

    return double


@_on_vectors(exp)
def _exp_vector(x):
    shift, high, low, least, most = _exp_constants(x)

    def vector(x):
        x = where(x < least, least, where(x > most, most, x))
        n = (x * LOG2_E + shift) - shift
        r = (x - n * high) - n * low
        # in two factors, so that results beyond the normal range come out right
        half = (n * 0.5 + shift) - shift
        p = _expm1_reduced(r) + 1.0
        return p * _power_of_two(half + shift) * _power_of_two((n - half) + shift)

    return vector


def _exp_constants(x: Any) -> tuple[float, float, float, float, float]:
    """The rounding shift, ln(2) in two parts, and the range beyond which exp is 0 or infinite."""
    if _is_single(x):
        return 1.5 * 2**23, 0.693359375, -2.12194440e-4, -104.0, 89.0
    return 1.5 * 2**52, 6.93145751953125e-1, 1.42860682030941723212e-6, -746.0, 710.0


@_on_vectors(sigmoid)
def _sigmoid_vector(x):
    shift, high, low, _, _ = _exp_constants(x)
    # the power of two is infinite at the upper end, and the result 0
    least, most = (-87.0, 88.6) if _is_single(x) else (-708.0, 709.7)

    def vector(x):
        x = where(x > -least, -least, where(x < -most, -most, x))
        t = x * -LOG2_E + shift
        n = t - shift
        r = (n * -high - x) - n * low
        return 1.0 / ((_expm1_reduced(r) + 1.0) * _power_of_two(t) + 1.0)

    return vector


@_on_vectors(tanh)
def _tanh_vector(x):
    if _is_single(x):  # a rational approximation, good to float32 rounding, as in Eigen

        def single(x):  # cut where it is exactly 1, if products and sums are fused
            x = where(x > 7.99881172180175781, 7.99881172180175781, x)
            x = where(x < -7.99881172180175781, -7.99881172180175781, x)
            s = x * x
            p = s * -2.76076847742355e-16 + 2.00018790482477e-13
            p = p * s + -8.60467152213735e-11
            p = p * s + 5.12229709037114e-08
            p = p * s + 1.48572235717979e-05
            p = p * s + 6.37261928875436e-04
            p = p * s + 4.89352455891786e-03
            q = s * 1.19825839466702e-06 + 1.18534705686654e-04
            q = q * s + 2.26843463243900e-03
            q = q * s + 4.89352518554385e-03
            return x * p / q

        return single

    shift, high, low, _, _ = _exp_constants(x)

    def double(x):  # -m / (m + 2), m = exp(-2|x|) - 1
        a = absolute(x)
        a = where(a > 20.0, 20.0, a) * -2.0
        t = a * LOG2_E + shift
        n = t - shift
        r = (a - n * high) - n * low
        scale = _power_of_two(t)
        m = _expm1_reduced(r) * scale + (scale - 1.0)
        y = m / (m + 2.0)
        return where(x < 0.0, y, y * -1.0)

    return double


@_on_vectors(_log1p_ratio)
def _log1p_ratio_vector(s, terms):
    """log((1 + s) / (1 - s)) by its series, 2 (s + s**3/3 + s**5/5 + ...)."""

    def vector(s, terms):
        square = s * s
        p = square * 0.0
        for k in range(terms, 0, -1):
            p = (p + 1.0 / (2 * k + 1)) * square
        return (s * p + s) * 2.0

    return vector


@_on_vectors(log)
def _log_vector(x):
    single = _is_single(x)
    terms = 5 if single else 11
    tiny, scaled = (1.1754944e-38, 24.0) if single else (2.2250738585072014e-308, 53.0)

    def vector(x):
        small = x < tiny  # subnormal: scale up first
        y = where(small, x * 2.0**scaled, x)
        m, n = _fraction(y), _exponent(y)
        upper = m > SQRT_2
        m, n = where(upper, m * 0.5, m), where(upper, n + 1.0, n)
        n = where(small, n - scaled, n)
        f = m - 1.0
        result = n * 1.42860682030941723212e-6 + _log1p_ratio(f / (f + 2.0), terms)
        result = n * 6.93145751953125e-1 + result
        result = where(x < 0.0, x * 0.0 / (x * 0.0), result)
        result = where(x == 0.0, -1.0 / absolute(x), result)
        return where((x + x == x) | (x != x), where(x == 0.0, result, where(x < 0.0, result, x)), result)

    return vector


@_on_vectors(softplus)
def _softplus_vector(x):
    terms = 8 if _is_single(x) else 17

    def vector(x):
        u = exp(absolute(x) * -1.0)
        return where(x < 0.0, 0.0, x) + _log1p_ratio(u / (u + 2.0), terms)

    return vector


@_on_vectors(erf)
def _erf_vector(x):
    if _is_single(x):  # N. Juffa's erff, https://stackoverflow.com/q/35148198

        def single(x):
            s = x * x
            p = s * -5.96761703e-4 + 4.99119423e-3
            p = p * s + -2.67681349e-2
            p = p * s + 1.12819925e-1
            p = p * s + -3.76125336e-1
            p = p * s + 1.28379166e-1
            t = absolute(x)
            t = where(t > 4.0, 4.0, t)  # from where on it is 1
            q = t * -1.72853470e-5 + 3.83197126e-4
            q = q * (t * t) + (t * -3.88396438e-3 + 2.42546219e-2)
            q = q * t + -1.06777877e-1
            q = q * t + -6.34846687e-1
            q = q * t + -1.28717512e-1
            q = 1.0 - exp(q * t - t)
            return where(t > 0.927734375, where(x < 0.0, q * -1.0, q), p * x + x)

        return single

    def double(x):  # W. J. Cody, "Rational Chebyshev approximations for the error function" (1969)
        t = absolute(x)
        t = where(t > 6.0, 6.0, t)  # from where on it is 1
        small = t <= 0.46875
        s = t * t
        n = s * 1.85777706184603153e-1 + 3.16112374387056560
        n = n * s + 1.13864154151050156e2
        n = n * s + 3.77485237685302021e2
        n = n * s + 3.20937758913846947e3
        d = s + 2.36012909523441209e1
        d = d * s + 2.44024637934444173e2
        d = d * s + 1.28261652607737228e3
        d = d * s + 2.84423683343917062e3
        p = t * 2.15311535474403846e-8 + 5.64188496988670089e-1
        p = p * t + 8.88314979438837594
        p = p * t + 6.61191906371416295e1
        p = p * t + 2.98635138197400131e2
        p = p * t + 8.81952221241769090e2
        p = p * t + 1.71204761263407058e3
        p = p * t + 2.05107837782607147e3
        p = p * t + 1.23033935479799725e3
        q = t + 1.57449261107098347e1
        q = q * t + 1.17693950891312499e2
        q = q * t + 5.37181101862009858e2
        q = q * t + 1.62138957456669019e3
        q = q * t + 3.29079923573345963e3
        q = q * t + 4.36261909014324716e3
        q = q * t + 3.43936767414372164e3
        q = q * t + 1.23033935480374942e3
        ratio = where(small, n, p) / where(small, d, q)
        y = where(small, ratio * t, 1.0 - ratio * exp(s * -1.0))
        return where(x < 0.0, y * -1.0, where(x == 0.0, x, y))

    return double


@_on_vectors(relu)
def _relu_vector(x):
    return lambda x: where(x < 0.0, 0.0, x)


@_on_vectors(hard_sigmoid)
def _hard_sigmoid_vector(x):
    def vector(x):
        y = x / 6.0 + 0.5
        return where(y < 0.0, 0.0, where(y > 1.0, 1.0, y))

    return vector


@_on_vectors(minimum)
def _minimum_vector(x, y):
    if isinstance(x, Vector):
        return lambda x, y: where((x <= y) | (x != x), x, y)
    return lambda x, y: where(x <= y, x, y)  # a number of a cell is never NaN


@_on_vectors(maximum)
def _maximum_vector(x, y):
    if isinstance(x, Vector):
        return lambda x, y: where((x >= y) | (x != x), x, y)
    return lambda x, y: where(x >= y, x, y)
