"""What instructions compute, for arrays of lanes: PTX ISA, "Instruction Set".

Here are those that read and write registers of their own lane and nothing else, and what mma.sync computes;
the others are in ptx_machine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numba import vectorize
from numba.extending import intrinsic

# PTX ISA, "Fundamental Types"
TYPES = {
    "pred": "bool", "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2",
    "u32": "u4", "s32": "i4", "b32": "u4", "u64": "u8", "s64": "i8", "b64": "u8", "f32": "f4", "f64": "f8",
}  # fmt: skip
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
REALS = ("f32", "f64")
NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # the only one that instructions of .f32 give


class Meaning(NamedTuple):
    result: str  # its type
    sources: tuple[str, ...]
    function: Callable[..., Any]


# --- Arithmetic -------------------------------------------------------------------------------------------


@intrinsic
def _fused(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    return a(a, b, c), lambda context, builder, sig, args: builder.fma(*args)


@vectorize(["f4(f4,f4,f4)", "f8(f8,f8,f8)"])
def fma(a, b, c):  # type: ignore[no-untyped-def]
    """Rounded once."""
    return _fused(a, b, c)


def _single(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on .f32, whose NaN has no payload."""

    def canonical(*sources: Any) -> Any:
        result = np.asarray(function(*sources), np.float32)
        wrong = result != result
        return np.where(wrong, NAN, result) if wrong.any() else result

    return canonical


def _flushed(x: Any) -> Any:
    """.ftz: 0 with its sign in place of a subnormal number."""
    return np.where(np.abs(x) < np.finfo(x.dtype).smallest_normal, np.copysign(x.dtype.type(0), x), x)


def _approximate(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """.approx.ftz.f32, of which the ISA bounds the error; here it is rounded right."""
    return _single(lambda x: _flushed(function(_flushed(x).astype(np.float64)).astype(np.float32)))


def _upper_half(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """.approx.ftz.f64, which looks at the upper 32 bits of its operand and gives no more of the result."""

    def halved(x: Any) -> Any:
        return _flushed((x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64))

    return lambda x: halved(np.asarray(function(halved(np.asarray(x)))))


def _directed(exact: tuple[Any, Any], towards: float) -> Any:
    """A sum that is given as a number and the error of its rounding, rounded to .f32 in one direction; that
    of 0 is rounding to it."""
    value, error = exact
    goal = np.float32(towards)
    result = value.astype(np.float32)
    if towards == 0:
        beyond = (np.abs(result) > np.abs(value)) | ((result == value) & (error * np.sign(value) < 0))
    else:
        beyond = (result > value) | ((result == value) & (error < 0))
    return np.where(beyond, np.nextafter(result, goal), result)


def _sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The sum of two numbers, and the error of its rounding (Knuth's TwoSum)."""
    result = a + b
    part = result - a
    return result, (a - (result - part)) + (b - part)


def _wide(*sources: Any) -> Iterator[Any]:
    return (np.asarray(source, np.float64) for source in sources)


def _add_rz(a: Any, b: Any) -> Any:
    return _directed(_sum(*_wide(a, b)), 0)


def _fma_rm(a: Any, b: Any, c: Any) -> Any:
    a, b, c = _wide(a, b, c)
    return _directed(_sum(a * b, c), -np.inf)  # the product of two of .f32 is exact


def _divide(a: Any, b: Any) -> Any:
    """Towards zero."""
    if np.any(b == 0):
        raise ZeroDivisionError("division by 0, whose result is not specified")
    return (a - np.fmod(a, b)) // b


def _high(a: Any, b: Any) -> Any:
    """The upper half of a product, of 64-bit integers by the school's method."""
    if a.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        return (a.astype(wide) * np.asarray(b).astype(wide) >> (8 * a.itemsize)).astype(a.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.view(np.uint64), np.asarray(b).view(np.uint64)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    result = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        result = result - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return result.view(a.dtype)


def _shift(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """By as many bits as a number has at most: NumPy shifts further ones out as well."""
    return lambda a, count: function(a, np.minimum(count, 8 * a.itemsize).astype(a.dtype))


def _insert(a: Any, b: Any, start: Any, length: Any) -> Any:
    """bfi: the lowest `length` bits of a in place of those of b from `start` on."""
    one, bits = b.dtype.type(1), 8 * b.itemsize
    start, length = (np.minimum(part & np.uint32(255), bits).astype(b.dtype) for part in (start, length))
    mask = np.where(length == bits, ~b.dtype.type(0), (one << length) - one) << start
    return (b & ~mask) | ((a << start) & mask)


# --- Conversions ------------------------------------------------------------------------------------------


def _to_integer(kind: str, rounding: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The nearest integer that there is; 0 of NaN."""
    limits = np.iinfo(TYPES[kind])

    def convert(x: Any) -> Any:
        whole = rounding(np.asarray(x, np.float64))
        inside = np.clip(np.nan_to_num(whole, nan=0.0), float(limits.min), float(limits.max))
        result = np.where(np.abs(inside) < 2.0**62, inside, 0).astype(TYPES[kind])
        result = np.where(inside >= float(limits.max), np.array(limits.max, TYPES[kind]), result)
        return np.where(inside <= float(limits.min), np.array(limits.min, TYPES[kind]), result)

    return convert


def to_bfloat16(x: Any) -> Any:
    """cvt.rn.bf16.f32: 7 bits of mantissa, ties to even."""
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), rounded)


def to_float16(x: Any) -> Any:
    """cvt.rn.f16.f32."""
    return np.where(x != x, np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_tf32(x: Any) -> Any:
    """cvt.rna.tf32.f32: 10 bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)
    return np.where(x != x, np.uint32(0x7FFFFFFF), rounded)


def _saturated(x: Any) -> Any:
    """cvt.sat.f32.f32: between 0 and 1; +0 of NaN."""
    return np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0))


# --- All of them ------------------------------------------------------------------------------------------

_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                "ge": np.greater_equal}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # names for unsigned numbers


def _same(x: Any) -> Any:
    return x


def _integers() -> Iterator[tuple[str, Meaning]]:
    for kind in INTEGERS:
        two, three = (kind, kind), (kind, kind, kind)
        for name, function in (
            ("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply), ("mul.hi", _high),
            ("div", _divide), ("rem", np.fmod), ("min", np.minimum), ("max", np.maximum),
        ):  # fmt: skip
            yield f"{name}.{kind}", Meaning(kind, two, function)
        yield f"mad.lo.{kind}", Meaning(kind, three, lambda a, b, c: a * b + c)
        if wider := WIDER.get(kind):
            wide = np.dtype(TYPES[wider])
            yield f"mul.wide.{kind}", Meaning(wider, two, lambda a, b, w=wide: np.multiply(a, b, dtype=w))
            meaning = lambda a, b, c, w=wide: np.multiply(a, b, dtype=w) + c  # noqa: E731
            yield f"mad.wide.{kind}", Meaning(wider, (*two, wider), meaning)
        if kind[0] == "s":
            yield f"neg.{kind}", Meaning(kind, (kind,), np.negative)
            yield f"abs.{kind}", Meaning(kind, (kind,), np.abs)
        yield f"shr.{kind}", Meaning(kind, (kind, "u32"), _shift(np.right_shift))
        for name, function in _COMPARISONS.items():
            yield f"setp.{name}.{kind}", Meaning("pred", two, function)
    for (name, like), kind in product(_UNSIGNED.items(), ("u16", "u32", "u64")):
        yield f"setp.{name}.{kind}", Meaning("pred", (kind, kind), _COMPARISONS[like])


def _bits() -> Iterator[tuple[str, Meaning]]:
    for kind in ("b16", "b32", "b64", "pred"):
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            yield f"{name}.{kind}", Meaning(kind, (kind, kind), function)
        yield f"not.{kind}", Meaning(kind, (kind,), np.invert)
        if kind != "pred":
            yield f"shl.{kind}", Meaning(kind, (kind, "u32"), _shift(np.left_shift))
            yield f"shr.{kind}", Meaning(kind, (kind, "u32"), _shift(np.right_shift))
            for name in ("eq", "ne"):
                yield f"setp.{name}.{kind}", Meaning("pred", (kind, kind), _COMPARISONS[name])
    for kind in ("b32", "b64"):
        yield f"bfi.{kind}", Meaning(kind, (kind, kind, "u32", "u32"), _insert)


def _reals() -> Iterator[tuple[str, Meaning]]:
    for kind in REALS:
        one = _single if kind == "f32" else _same
        two = (kind, kind)
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            for rounding in ("", ".rn"):
                yield f"{name}{rounding}.{kind}", Meaning(kind, two, one(function))
        yield f"fma.rn.{kind}", Meaning(kind, (*two, kind), one(fma))
        yield f"div.rn.{kind}", Meaning(kind, two, one(np.divide))
        yield f"rcp.rn.{kind}", Meaning(kind, (kind,), one(lambda x: x.dtype.type(1) / x))
        yield f"sqrt.rn.{kind}", Meaning(kind, (kind,), one(np.sqrt))
        yield f"min.{kind}", Meaning(kind, two, one(np.fmin))
        yield f"max.{kind}", Meaning(kind, two, one(np.fmax))
        yield f"neg.{kind}", Meaning(kind, (kind,), np.negative)
        yield f"abs.{kind}", Meaning(kind, (kind,), np.abs)
        yield f"copysign.{kind}", Meaning(kind, two, lambda sign, size: np.copysign(size, sign))
        for name, function in _COMPARISONS.items():
            # NaN is unequal to nothing, and anything else with "u"
            ordered = lambda a, b, f=function: f(a, b) & (a == a) & (b == b)  # noqa: E731
            unordered = lambda a, b, f=function: f(a, b) | (a != a) | (b != b)  # noqa: E731
            yield f"setp.{name}.{kind}", Meaning("pred", two, ordered)
            yield f"setp.{name}u.{kind}", Meaning("pred", two, unordered)
        yield f"setp.num.{kind}", Meaning("pred", two, lambda a, b: (a == a) & (b == b))
        yield f"setp.nan.{kind}", Meaning("pred", two, lambda a, b: (a != a) | (b != b))
    for name, function in (("rcp", lambda x: 1 / x), ("ex2", np.exp2), ("lg2", np.log2)):
        yield f"{name}.approx.ftz.f32", Meaning("f32", ("f32",), _approximate(function))
    yield "rcp.approx.ftz.f64", Meaning("f64", ("f64",), _upper_half(lambda x: 1 / x))
    yield "rsqrt.approx.ftz.f64", Meaning("f64", ("f64",), _upper_half(lambda x: 1 / np.sqrt(x)))
    yield "add.rz.f32", Meaning("f32", ("f32", "f32"), _single(_add_rz))
    yield "fma.rm.f32", Meaning("f32", ("f32", "f32", "f32"), _single(_fma_rm))


def _moves() -> Iterator[tuple[str, Meaning]]:
    for kind in TYPES:
        yield f"mov.{kind}", Meaning(kind, (kind,), _same)
        yield f"selp.{kind}", Meaning(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
    for way in ("cvta.to.global.u64", "cvta.global.u64", "cvta.to.shared.u64"):
        yield way, Meaning("u64", ("u64",), _same)
    whole = [kind for kind in TYPES if kind != "pred" and kind not in REALS and kind[0] != "b"]
    for to, of in product(whole, whole):
        yield f"cvt.{to}.{of}", Meaning(to, (of,), lambda x, d=TYPES[to]: x.astype(d))
    for to, of in product(REALS, whole):
        yield f"cvt.rn.{to}.{of}", Meaning(to, (of,), lambda x, d=TYPES[to]: x.astype(d))
    for of in REALS:
        yield f"cvt.rni.{of}.{of}", Meaning(of, (of,), np.rint)
        for kind in ("s32", "u32", "s64", "u64"):
            yield f"cvt.rni.{kind}.{of}", Meaning(kind, (of,), _to_integer(kind, np.rint))
            yield f"cvt.rzi.{kind}.{of}", Meaning(kind, (of,), _to_integer(kind, np.trunc))
    yield "cvt.f64.f32", Meaning("f64", ("f32",), lambda x: x.astype(np.float64))
    yield "cvt.rn.f32.f64", Meaning("f32", ("f64",), _single(lambda x: x.astype(np.float32)))
    yield "cvt.sat.f32.f32", Meaning("f32", ("f32",), _saturated)
    yield "cvt.rn.bf16.f32", Meaning("b16", ("f32",), to_bfloat16)
    yield "cvt.rn.f16.f32", Meaning("b16", ("f32",), to_float16)
    yield "cvt.rna.tf32.f32", Meaning("b32", ("f32",), to_tf32)


MEANINGS: dict[str, Meaning] = dict([*_integers(), *_bits(), *_reals(), *_moves()])


# --- mma.sync ---------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """D[16, 8] = A[16, k] B[k, 8] + C; where element i of a lane's fragment lies: row and column, (32, i)."""

    a: tuple[np.ndarray, np.ndarray]
    b: tuple[np.ndarray, np.ndarray]
    numbers: Callable[[np.ndarray], np.ndarray]  # words (..., n) as the numbers in them


def _fragments(per_word: int, numbers: Callable[[np.ndarray], np.ndarray]) -> Shape:
    """PTX ISA, "Matrix Fragments for mma.m16n8k8" (.tf32), one number a word, and "Matrix Fragments for
    mma.m16n8k16 with floating point type", two."""
    lane = np.arange(32)[:, None]
    group, place = lane >> 2, lane % 4
    i = np.arange(4 * per_word)
    if per_word == 1:
        row, column = group + 8 * ((i == 1) | (i == 3)), place + 4 * (i >= 2)
        b = place + 4 * np.arange(2), group + 0 * np.arange(2)
    else:
        row = group + 8 * ~((i < 2) | ((i >= 4) & (i < 6)))
        column = place * 2 + (i & 1) + 8 * (i >= 4)
        j = np.arange(4)
        b = place * 2 + (j & 1) + 8 * (j >= 2), group + 0 * j
    return Shape((row, column), b, numbers)


def _from_tf32(words: np.ndarray) -> np.ndarray:
    """The lower 13 bits are not looked at."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def _from_bfloat16(words: np.ndarray) -> np.ndarray:
    return (_halves(words).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _from_float16(words: np.ndarray) -> np.ndarray:
    return _halves(words).view(np.float16).astype(np.float32)


def _halves(words: np.ndarray) -> np.ndarray:
    """The lower half of a word is the first."""
    return np.ascontiguousarray(words).view(np.uint16)


MMA = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": _fragments(1, _from_tf32),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": _fragments(2, _from_bfloat16),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": _fragments(2, _from_float16),
}


def multiply(shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of warps: words of A (W, 32, 4) and B (W, 32, 2), and C (W, 32, 4), to D (W, 32, 4)."""
    warps, depth = len(a), 4 * shape.a[1].shape[1] // 2
    left, right = np.empty((warps, 16, depth)), np.empty((warps, depth, 8))
    left[:, shape.a[0], shape.a[1]] = shape.numbers(a)
    right[:, shape.b[0], shape.b[1]] = shape.numbers(b)
    lane, i = np.arange(32)[:, None], np.arange(4)
    row, column = (lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)
    d = (left @ right)[:, row, column] + c
    return np.where(d != d, NAN, d.astype(np.float32))
