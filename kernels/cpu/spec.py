"""What kernels are compiled for: the precision and the processor's registers; and how they are kept."""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, register_model, unbox

from fusedlstm.once import once

from .compile import target
from .simd import Vector

MOST_ROWS = 8  # of a tile of vectors
MATRIX_ROWS = 16  # of a tile of two-dimensional registers


class Machine(NamedTuple):
    """The register file that tiles are cut for."""

    name: str
    bits: int  # of a register
    registers: int


@once
def machine() -> Machine:
    """The widest registers that Numba uses, here or on the processor of NUMBA_CPU_NAME and the like."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return Machine("NEON", 128, 32)
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return Machine("128 bits", 128, 16)
    code = _multiply_add(*target())
    if "zmm" in code:
        return Machine("AVX-512", 512, 32)
    if "ymm" in code and "vfmadd" in code:
        return Machine("AVX2", 256, 16)
    return Machine("SSE", 128, 16)


def _multiply_add(triple: str, processor: str, features: str) -> str:
    """The code of a multiply-add of 512 bits, which shows what LLVM makes of the names of a processor."""
    vector = ir.VectorType(ir.FloatType(), 16)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(vector, [vector]), "multiply_add")
    builder = ir.IRBuilder(function.append_basic_block())
    (x,) = function.args
    fused = ir.Function(module, ir.FunctionType(vector, [vector] * 3), "llvm.fmuladd.v16f32")
    builder.ret(builder.call(fused, [x, x, x]))
    return _assembly(str(module), triple, processor, features)


def _assembly(text: str, triple: str, processor: str, features: str) -> str:
    """What LLVM makes of a module for a processor."""
    made = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=2)
    return str(made.emit_assembly(llvm.parse_assembly(text)))


class Operand(NamedTuple):
    """What products multiply, and by which instruction.

    Of narrow numbers, `group` neighbours in k share a lane, and rows are stored anew as such numbers.
    Integers have a scale for each row, and one for each lane of weights.
    """

    instruction: str
    group: int = 1
    weight: int = 0  # bytes of a weight; 0 for those of the layer's numbers
    value: int = 0  # bytes of a stored value of a row; 0 if rows are read where they are
    rate: int = 1  # products in the time of one of float32, roughly
    matrix: str = ""  # the instruction for many rows, of two-dimensional registers, if there are such

    @property
    def integer(self) -> bool:
        """Whether it is a small integer."""
        return self.weight == 1


EXACT = Operand("multiply-add")
BFLOAT16 = Operand("dpbf16ps", group=2, weight=2, value=2, rate=2)
WIDENED = Operand("multiply-add of widened bfloat16", group=2, weight=2, value=4)
UINT8 = Operand("vpdpbusd", group=4, weight=1, value=1, rate=4)
# What is as above for few rows, and for many a product of two-dimensional registers (AMX).
BFLOAT16_TILES = BFLOAT16._replace(rate=7, matrix="tdpbf16ps")
UINT8_TILES = UINT8._replace(rate=14, matrix="tdpbusd")
INT16 = Operand("pmaddwd", group=2, weight=1, value=2)  # exact, where pmaddubsw would saturate


@once
def operand(precision: str) -> Operand:
    """What the products of a float32 layer multiply in a precision of products."""
    narrow = {"bfloat16": (BFLOAT16_TILES, BFLOAT16, WIDENED), "int8": (UINT8_TILES, UINT8, INT16)}
    if precision not in narrow:
        return EXACT
    fastest, fast, slow = narrow[precision]
    if not _can_multiply(fast):
        return slow
    feature = "+amx-bf16" if precision == "bfloat16" else "+amx-int8"
    return fastest if feature in target()[2].split(",") and _may_use_matrices() else fast


@once
def _may_use_matrices() -> bool:
    """Ask Linux for the two-dimensional registers, which it saves only for processes that want them."""
    if sys.platform != "linux" or machine().bits != 512:
        return False
    arch_prctl, request, data_of_tiles = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, data_of_tiles) == 0)


def _can_multiply(fast: Operand) -> bool:
    """Whether the processor has an instruction for such products in its widest registers.

    LLVM ends the process if it is asked for an instruction that is not there.  So it is asked for something
    else, for which it takes one that comes with it if there is one.
    """
    if machine().bits == 128:
        return False
    if fast == BFLOAT16:
        return machine().bits == 512 and "vcvtneps2bf16" in _assembly(_ROUNDING, *target())
    lines = _assembly(_sum_of_pairs(machine().bits // 32), *target()).splitlines()
    register = "%zmm" if machine().bits == 512 else "%ymm"
    return any("vpdpwssd" in line and register in line for line in lines)


_ROUNDING = """
define <16 x bfloat> @rounding(<16 x float> %x) {
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  ret <16 x bfloat> %y
}
"""


def _sum_of_pairs(lanes: int) -> str:
    """Code that adds products of 16 bits in pairs."""
    even, odd = (", ".join(f"i32 {n}" for n in range(first, 2 * lanes, 2)) for first in (0, 1))
    words, products, sums = f"<{2 * lanes} x i16>", f"<{2 * lanes} x i32>", f"<{lanes} x i32>"
    return f"""
define {sums} @sum_of_pairs({sums} %total, {words} %x, {words} %y) {{
  %a = sext {words} %x to {products}
  %b = sext {words} %y to {products}
  %c = mul {products} %a, %b
  %d = shufflevector {products} %c, {products} undef, {sums} <{even}>
  %e = shufflevector {products} %c, {products} undef, {sums} <{odd}>
  %f = add {sums} %d, %e
  %g = add {sums} %f, %total
  ret {sums} %g
}}
"""


class Named(types.Type):
    """A type that Numba's index on disk keeps as a name alone, since it holds what does not pickle."""

    _known: ClassVar[WeakValueDictionary[str, Named]] = WeakValueDictionary()

    def __init__(self, name: str) -> None:
        super().__init__(f"{type(self).__name__}({name})")
        self._known.setdefault(self.name, self)

    def __reduce__(self) -> Any:
        return _named, (type(self), self.name)


def _named(kind: type[Named], name: str) -> Named:
    """The type of that name of this process, else a stand-in to compare with, since it is of another."""
    if name in Named._known:
        return Named._known[name]
    stand_in = object.__new__(kind)
    stand_in.name = name
    return stand_in


class Registers(Named):
    """What code is compiled for: the numbers, what products multiply, and the registers.

    Passed to compiled code as an argument without a value.

    Attributes:
        scalar: float32 or float64.
        operand: what products multiply.
        size: bytes of a number.
        lanes: numbers in a register.
        group: neighbours in k that share a lane of weights.
        column: bytes of a vector of weights for a group.
        tail: bytes behind the weights of a vector: what sums of integers start from, and their scales.
        value: bytes of a stored value of a row; 0 if rows are read where they are.
        integer: whether integers are multiplied.
    """

    constants: tuple[str, ...] = ("size", "lanes", "group", "column", "tail", "value", "integer")

    def __init__(self, scalar: types.Float, precision: str = "float32", name: str = "") -> None:
        self.scalar = scalar
        self.operand = operand(precision)
        self.size, self.lanes = scalar.bitwidth // 8, machine().bits // scalar.bitwidth
        self.group, self.value, self.integer = self.operand.group, self.operand.value, self.operand.integer
        self.column = self.lanes * self.group * (self.operand.weight or self.size)
        self.tail = 2 * self.lanes * self.size if self.integer else 0
        self.vector = Vector(scalar, self.lanes)
        super().__init__(f"{name}, {scalar}, {self.operand}, {machine()}")

    def rows(self, width: int) -> int:
        """Rows of a tile `width` vectors wide."""
        return MATRIX_ROWS if self.operand.matrix else self.vector_rows(width)

    def vector_rows(self, width: int) -> int:
        """Rows of a tile of vectors: its sums, a column of weights and a broadcast value share the
        registers."""
        return max(1, min(MOST_ROWS, (machine().registers - 1) // width - 1))


register_model(Registers)(models.OpaqueModel)


@unbox(Registers)
def _unbox_registers(typ: Any, obj: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


@infer_getattr
class _Constants(AttributeTemplate):  # type: ignore[misc]
    key = Registers

    def generic_resolve(self, registers: Registers, name: str) -> Any:
        return _constant_type(registers, name) if name in registers.constants else None


def _constant_type(registers: Registers, name: str) -> Any:
    return types.boolean if isinstance(getattr(registers, name), bool) else types.int64


@lower_getattr_generic(Registers)
def _get_constant(context: Any, builder: Any, registers: Registers, value: Any, name: str) -> Any:
    return context.get_constant(_constant_type(registers, name), getattr(registers, name))
