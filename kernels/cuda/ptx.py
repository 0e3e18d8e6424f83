"""Every instruction that Numba has no name for, and nothing else.

Each is an LLVM or inline PTX function on a GPU.  In a simulator it is the Python function beside
it, which computes what the PTX ISA says that the instruction computes.  Sections of
the PTX ISA are named by title, since their numbers change.  Arrays are one-dimensional; an index
counts elements of the array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, cuda
from numba.cuda import types

from fusedlstm.once import once

SIMULATED = bool(config.ENABLE_CUDASIM)

if "numba_cuda" not in str(cuda.__file__):
    raise ImportError(
        "numba.cuda is the one that comes with Numba: numba-cuda is not installed, or not by pip into the "
        "packages of this Python, where it takes its place"
    )


@contextmanager
def _row_stack() -> Iterator[None]:
    """Inside, NumPy has row_stack, which was another name of vstack and is gone from NumPy 2.5.

    numba-cuda registers an implementation of it when it is imported, and fails if there is none.  So does
    0.30.4, the newest one, and a fix was declined (issue 907 of numba-cuda).
    """
    if hasattr(np, "row_stack"):
        yield
        return
    vars(np)["row_stack"] = np.vstack
    try:
        yield
    finally:
        del vars(np)["row_stack"]


if not SIMULATED:
    with _row_stack():
        from numba.cuda.extending import intrinsic
        from numba.cuda.np.arrayobj import make_array

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _instruction(stand_in: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Take the function as a Numba intrinsic, or its stand-in where kernels are simulated."""
    return lambda function: stand_in if SIMULATED else intrinsic(function)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(make_array(array_type)(context, builder, value=array).data, [index])


def _vector(
    context: Any, builder: Any, sig: Any, args: Any, element: Any, count: int, align: int
) -> list[Any]:
    address = _address(context, builder, sig.args[0], *args)
    pointer = ir.VectorType(element, count).as_pointer(address.type.addrspace)
    vector = builder.load(builder.bitcast(address, pointer), align=align)
    return [builder.extract_element(vector, ir.Constant(I32, n)) for n in range(count)]


@once
def load(width: int) -> Any:
    """The function (array, index) -> `width` consecutive elements; index is a multiple of width.

    PTX ISA, ld.v2 and ld.v4, whose vectors have up to 16 bytes: as much is promised of an array's beginning.
    """

    def stand_in(array: Any, index: int) -> tuple[Any, ...]:
        return tuple(array[index : index + width])

    @_instruction(stand_in)
    def instruction(typingctx: Any, array: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            element = context.get_value_type(array.dtype)
            align = min(16, width * array.dtype.bitwidth // 8)
            parts = _vector(context, builder, sig, args, element, width, align)
            return context.make_tuple(builder, sig.return_type, parts)

        return types.UniTuple(array.dtype, width)(array, types.int64), codegen

    return instruction


def _strong_load(context: Any, builder: Any, address: Any, element: Any, kind: str, count: int) -> list[Any]:
    """`count` elements by ld.relaxed.gpu, each as if it were alone.

    PTX ISA, ld; Memory Consistency Model, Vector Data-types.
    """
    results = ", ".join(f"${n}" for n in range(count))
    vector = f".v{count}.{kind} {{{results}}}" if count > 1 else f".{kind} {results}"
    letter = {"f32": "f", "f64": "d", "b32": "r"}[kind]
    function = ir.FunctionType(ir.LiteralStructType([element] * count) if count > 1 else element, [I64])
    text, constraint = f"ld.relaxed.gpu.global{vector}, [${count}];", f"={letter}," * count + "l,~{memory}"
    asm = ir.InlineAsm(function, text, constraint, side_effect=True)
    loaded = builder.call(asm, [builder.ptrtoint(address, I64)])
    return [builder.extract_value(loaded, n) for n in range(count)] if count > 1 else [loaded]


@once
def load_relaxed(width: int) -> Any:
    """As `load`, of floating-point numbers that another block may be writing: each is the old or the new one.

    PTX ISA, ld.relaxed.gpu.
    """

    def stand_in(array: Any, index: int) -> tuple[Any, ...]:
        return tuple(array[index : index + width])

    @_instruction(stand_in)
    def instruction(typingctx: Any, array: Any, index: Any) -> Any:
        bits = array.dtype.bitwidth
        most = min(width, 128 // bits)  # of one instruction

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            element = context.get_value_type(array.dtype)
            start, parts = _address(context, builder, sig.args[0], *args), []
            for n in range(0, width, most):
                address = builder.gep(start, [ir.Constant(I64, n)])
                parts += _strong_load(context, builder, address, element, f"f{bits}", most)
            return context.make_tuple(builder, sig.return_type, parts)

        return types.UniTuple(array.dtype, width)(array, types.int64), codegen

    return instruction


def _words(array: Any, index: int) -> tuple[Any, ...]:
    count = 16 // array.dtype.itemsize
    return tuple(np.ascontiguousarray(array[index : index + count]).view(np.uint32))


@_instruction(_words)
def load_words(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen bytes as four 32-bit words; index is a multiple of 16 bytes.

    PTX ISA, ld.v4.b32.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, sig.return_type, _vector(context, builder, sig, args, I32, 4, 16))

    return types.UniTuple(types.uint32, 4)(array, types.int64), codegen


@_instruction(_words)
def load_words_relaxed(typingctx: Any, array: Any, index: Any) -> Any:
    """As `load_words`, of numbers that another block may be writing: each is the old or the new one.

    PTX ISA, ld.relaxed.gpu.v4.b32.  Of 16-bit numbers the memory model does not say that two in one word are
    whole; the hardware stores each with a byte mask.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args)
        parts = _strong_load(context, builder, address, I32, "b32", 4)
        return context.make_tuple(builder, sig.return_type, parts)

    return types.UniTuple(types.uint32, 4)(array, types.int64), codegen


def _store_words(array: Any, index: int, w0: Any, w1: Any, w2: Any, w3: Any) -> None:
    array[index : index + 16 // array.dtype.itemsize] = np.array([w0, w1, w2, w3]).view(array.dtype)


@_instruction(_store_words)
def store_words(typingctx: Any, array: Any, index: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """The reverse of load_words.  PTX ISA, st.v4.b32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args[:2])
        vector: Any = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
        for n, word in enumerate(args[2:]):
            vector = builder.insert_element(vector, word, ir.Constant(I32, n))
        pointer = vector.type.as_pointer(address.type.addrspace)
        builder.store(vector, builder.bitcast(address, pointer), align=16)
        return context.get_dummy_value()

    return types.void(array, types.int64, *[types.uint32] * 4), codegen


def _add(array: Any, index: int, value: int) -> None:
    array[index] += value


@_instruction(_add)
def add_release(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value, after everything that this thread, or one that it has met at a block
    barrier, has written.

    PTX ISA, red.release.gpu; Memory Consistency Model, Release Patterns.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = builder.ptrtoint(_address(context, builder, sig.args[0], *args[:2]), I64)
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        text = "red.release.gpu.global.add.u64 [$0], $1;"
        builder.call(ir.InlineAsm(kind, text, "l,l,~{memory}", side_effect=True), [address, args[2]])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), codegen


def _read(array: Any, index: int) -> Any:
    return array[index]


@_instruction(_read)
def load_acquire(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index], before everything that this thread, or one that it meets at a block barrier,
    reads from now on.

    PTX ISA, ld.acquire.gpu; Memory Consistency Model, Acquire Patterns.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = builder.ptrtoint(_address(context, builder, sig.args[0], *args), I64)
        kind = ir.FunctionType(I64, [I64])
        text = "ld.acquire.gpu.global.u64 $0, [$1];"
        return builder.call(ir.InlineAsm(kind, text, "=l,l,~{memory}", side_effect=True), [address])

    return types.uint64(array, types.int64), codegen


def _write(array: Any, index: int, value: Any) -> None:
    array[index] = value


@_instruction(_write)
def store_relaxed(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, for blocks that may be reading it.

    PTX ISA, st.relaxed.gpu.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = builder.ptrtoint(_address(context, builder, sig.args[0], *args[:2]), I64)
        real, bits = isinstance(array.dtype, types.Float), array.dtype.bitwidth
        letter = {16: "h", 32: "f" if real else "r", 64: "d"}[bits]
        text = f"st.relaxed.gpu.global.{'f' if real else 'b'}{bits} [$0], $1;"
        kind = ir.FunctionType(ir.VoidType(), [I64, args[2].type])
        asm = ir.InlineAsm(kind, text, f"l,{letter},~{{memory}}", side_effect=True)
        builder.call(asm, [address, args[2]])
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), codegen


def _erase(array: Any, index: int) -> None:
    array[index : index + 1].view(np.uint8)[:] = 0xFF


@_instruction(_erase)
def erase(typingctx: Any, array: Any, index: Any) -> Any:
    """Set all bits of array[index], which makes it a NaN that no instruction gives.

    PTX ISA, st; cvt, add and the like for the NaN that they give.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(array.dtype.bitwidth)
        address = _address(context, builder, sig.args[0], *args)
        builder.store(ir.Constant(integer, -1), builder.bitcast(address, integer.as_pointer()))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


def _is_erased(value: Any) -> bool:
    return bool(value.tobytes() == b"\xff" * value.itemsize)


@_instruction(_is_erased)
def is_erased(typingctx: Any, value: Any) -> Any:
    """Whether all bits of a number are set.  PTX ISA, setp.eq."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(value.bitwidth)
        return builder.icmp_unsigned("==", builder.bitcast(args[0], integer), ir.Constant(integer, -1))

    return types.boolean(value), codegen


@_instruction(lambda x: x.dtype.type(1) / x)
def reciprocal(typingctx: Any, x: Any) -> Any:
    """1 / x within one unit in the last place, 0 where that is denormal.  PTX ISA, rcp.approx.ftz.f32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(F32, [F32])
        return builder.call(ir.InlineAsm(kind, "rcp.approx.ftz.f32 $0, $1;", "=f,f", side_effect=False), args)

    return types.float32(types.float32), codegen


def _convert(text: str, result: Any, llvm: Any, constraint: str) -> Callable[..., Any]:
    def instruction(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(llvm, [F32])
            return builder.call(ir.InlineAsm(kind, text, constraint, side_effect=False), args)

        return result(types.float32), codegen

    return instruction


def tf32_bits(values: Any) -> Any:
    """float32 as TF32 bit patterns: 10 bits of mantissa, ties away from zero.

    Takes NumPy and CuPy arrays and NumPy numbers.
    """
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)) * (values == values) + (
        values != values
    ) * np.uint32(0x7FFFE000)


def bfloat16_bits(values: Any) -> Any:
    """float32 as bfloat16 bit patterns: 7 bits of mantissa, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return (rounded * (values == values) + (values != values) * np.uint32(0x7FFF)).astype(np.uint16)


def float16_bits(values: Any) -> Any:
    """float32 as float16 bit patterns, ties to even."""
    bits = values.astype(np.float16).view(np.uint16)
    return bits * (values == values) + (values != values) * np.uint16(0x7FFF)


# PTX ISA, cvt
to_tf32 = _instruction(tf32_bits)(_convert("cvt.rna.tf32.f32 $0, $1;", types.uint32, I32, "=r,f"))
to_bfloat16 = _instruction(bfloat16_bits)(_convert("cvt.rn.bf16.f32 $0, $1;", types.uint16, I16, "=h,f"))
to_float16 = _instruction(float16_bits)(_convert("cvt.rn.f16.f32 $0, $1;", types.uint16, I16, "=h,f"))


def _from_tf32(words: Any) -> Any:
    return words.view(np.float32)[..., None]


def _from_bfloat16(words: Any) -> Any:
    halves = words.view(np.uint16).reshape(*words.shape, 2)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _from_float16(words: Any) -> Any:
    return words.view(np.float16).reshape(*words.shape, 2).astype(np.float32)


def multiply_fragments(lanes: list[Any], unpack: Callable[[Any], Any]) -> Any:
    """What one warp's mma.sync computes: (32, 4) results of 32 lanes' (a0..a3, b0, b1, c0..c3).

    Fragments are laid out as in the PTX ISA, "Matrix Fragments for mma.m16n8k8" (.tf32) and "Matrix
    Fragments for mma.m16n8k16 with floating point type": a word holds one value of TF32 or two
    neighbours along k.
    """
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    words = unpack(np.array([given[:6] for given in lanes], np.uint32))  # (32, 6, values a word)
    per_word = words.shape[-1]
    a, b = np.empty((16, 8 * per_word), np.float32), np.empty((8 * per_word, 8), np.float32)
    c = np.empty((16, 8), np.float32)
    for half in range(2):
        for n in range(per_word):
            k = (place + 4 * half) * per_word + n
            a[group, k], a[group + 8, k] = words[:, 2 * half, n], words[:, 2 * half + 1, n]
            b[k, group] = words[:, 4 + half, n]
    for n in range(4):
        c[group + 8 * (n // 2), 2 * place + n % 2] = [given[6 + n] for given in lanes]
    d = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
    return np.stack([d[group + 8 * (n // 2), 2 * place + n % 2] for n in range(4)], axis=1)


def _mma(shape: str, kind: str, unpack: Callable[[Any], Any]) -> Any:
    text = (
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )

    def stand_in(*operands: Any) -> Any:
        return cuda.collective(operands, lambda lanes: multiply_fragments(lanes, unpack))

    @_instruction(stand_in)
    def instruction(  # type: ignore[no-untyped-def]
        typingctx, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.LiteralStructType([F32] * 4), [I32] * 6 + [F32] * 4)
            call = ir.InlineAsm(kind, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=False)
            # convergent: not to be moved to where a part of the warp may go
            results = builder.call(call, args, attrs=("convergent",))
            parts = [builder.extract_value(results, n) for n in range(4)]
            return context.make_tuple(builder, sig.return_type, parts)

        return types.UniTuple(types.float32, 4)(*[types.uint32] * 6, *[types.float32] * 4), codegen

    return instruction


# One warp: D[16, 8] = A[16, k] @ B[k, 8] + C, sums in float32.  PTX ISA, mma.sync
mma_tf32 = _mma("m16n8k8", "tf32", _from_tf32)
mma_bfloat16 = _mma("m16n8k16", "bf16", _from_bfloat16)
mma_float16 = _mma("m16n8k16", "f16", _from_float16)
