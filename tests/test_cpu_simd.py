"""The functions of a cell over SIMD vectors, against NumPy in higher precision; loads and stores.

Errors are bounded in units in the last place of the result, or absolutely where results cancel.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numba import njit, types

from fusedlstm import math
from fusedlstm.kernels.cpu import simd
from fusedlstm.kernels.cpu.simd import address, keep, load, load_row, splat, store, store_row
from fusedlstm.kernels.cpu.spec import Registers, machine

SCALARS = {np.float32: types.float32, np.float64: types.float64}
DTYPES = pytest.mark.parametrize("dtype", SCALARS)
FUSED = machine().name in ("AVX-512", "AVX2", "NEON")  # has one instruction for a product and a sum


def _entry(function: Any, *signature: Any) -> Any:
    compiled = njit(error_model="numpy")(function)
    compiled.compile(signature)
    return compiled.overloads[signature].entry_point


def _jitable(function: Any) -> Any:
    """A lambda as compiled code may call it; what stands in simd.py already is so."""
    return simd.inlined(function) if function.__name__ == "<lambda>" else function


@cache
def on_vectors(function: Any, dtype: Any, arity: int) -> Callable[..., np.ndarray]:
    """`function` over the vectors of arrays (n,) of any length."""
    registers, function = Registers(SCALARS[dtype]), _jitable(function)

    def one(registers, x, out):
        for at in range(0, x.size * registers.size, registers.lanes * registers.size):
            store(function(load(registers, address(x) + at)), address(out) + at)

    def two(registers, x, y, out):
        for at in range(0, x.size * registers.size, registers.lanes * registers.size):
            result = function(load(registers, address(x) + at), load(registers, address(y) + at))
            store(result, address(out) + at)

    entry = _entry({1: one, 2: two}[arity], registers, *[registers.scalar[::1]] * (arity + 1))

    def call(*arrays: np.ndarray) -> np.ndarray:
        padding = np.zeros(-arrays[0].size % registers.lanes, dtype)
        given = [np.concatenate([array, padding]) for array in arrays]
        out = np.empty_like(given[0])
        entry(None, *given, out)
        return out[: arrays[0].size]

    return call


def special(dtype: Any) -> np.ndarray:
    """Zeros, infinities, NaN, and the smallest and largest numbers of either kind."""
    info = np.finfo(dtype)
    positive = [0.0, info.smallest_subnormal, info.tiny * 0.5, info.tiny, 1.0, info.max, np.inf]
    return np.array([*positive, *(-p for p in positive), np.nan], dtype)


def grid(dtype: Any) -> np.ndarray:
    """Dense where the functions bend, sparse over the whole range, and subnormal numbers."""
    info, generator = np.finfo(dtype), np.random.default_rng(1)
    wide = np.geomspace(float(info.tiny), float(info.max) / 2, 40_001)
    small = 2.0 ** generator.uniform(-40, 1, 40_000)
    subnormal = float(info.smallest_subnormal) * np.geomspace(1, 2**20, 1000).round()
    edge = 110 if dtype is np.float32 else 760  # beyond the range of exp
    steps = [np.linspace(0, end, 40_001) for end in (1, 12, edge)]
    positive = np.concatenate([*steps, wide, small, subnormal])
    return np.concatenate([positive, -positive]).astype(dtype)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    u = np.exp(-np.abs(x))
    return np.where(x < 0, u, 1) / (1 + u)


# name -> (definition, bound in ulps, bound on the absolute error in units of the type's epsilon);
# one of the bounds holds
BOUNDS: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "tanh": (np.tanh, 5, 0),
    "sigmoid": (_sigmoid, 3, 0),
    "hard_sigmoid": (lambda x: np.clip(x / 6 + np.longdouble(0.5), 0, 1), 0.5, 0.5),
    "relu": (lambda x: np.maximum(x, 0), 0, 0),
    "softplus": (lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), 3, 0),
    "exp": (np.exp, 1, 0),
    "log": (np.log, 2, 0),
    "erf": (lambda x: math.erf(x.astype(np.float64)).astype(np.longdouble), 3, 0),  # C's, good to an ulp
    "sqrt": (np.sqrt, 0.5001, 0),
    "absolute": (np.abs, 0, 0),
}
ONE = pytest.mark.parametrize("name", BOUNDS)


def test_every_function_is_tested() -> None:
    over_units = {"mean", "variance", "normalize"}  # of which there is nothing for a vector
    assert set(math.__all__) == {*BOUNDS, "minimum", "maximum", "where", *over_units}


@DTYPES
@ONE
def test_error_of_a_function(name: str, dtype: Any) -> None:
    """Subnormal results may be lost, as processors that flush them to zero do."""
    definition, ulps, epsilons = BOUNDS[name]
    x, info = grid(dtype), np.finfo(dtype)
    with np.errstate(all="ignore"):
        exact = definition(x.astype(np.longdouble))
        rounded = exact.astype(dtype)
        actual = on_vectors(getattr(simd, name), dtype, 1)(x)
        finite = np.isfinite(rounded)
        error = np.abs(actual.astype(np.longdouble) - exact)[finite]
        ulp = np.spacing(np.maximum(np.abs(rounded), info.tiny))[finite].astype(np.longdouble)
    assert np.array_equal(actual[~finite], rounded[~finite], equal_nan=True)
    lost = float(info.tiny)  # of tanh and sigmoid, whose products pass below the normal range
    floor = np.where(np.abs(exact[finite]) < 2 * lost / info.eps, lost, 0) if ulps else 0
    excess = error - np.maximum(np.maximum(ulps * ulp, epsilons * float(info.eps)), floor)
    worst = np.argmax(excess)
    assert excess[worst] <= 0, (x[finite][worst], actual[finite][worst], rounded[finite][worst])


@DTYPES
@ONE
def test_special_values(name: str, dtype: Any) -> None:
    """Infinity and NaN come out as NumPy gives them, in their own lanes."""
    definition, x = BOUNDS[name][0], special(dtype)
    with np.errstate(all="ignore"):
        expected = definition(x.astype(np.longdouble)).astype(dtype)
    actual = on_vectors(getattr(simd, name), dtype, 1)(x)
    if name == "tanh" and dtype is np.float32 and not FUSED:
        assert np.abs(actual[np.isinf(x)]) == pytest.approx(1, abs=5 * 2**-24)
        expected[np.abs(x) > 10] = actual[np.abs(x) > 10]
    info = np.finfo(dtype)
    np.testing.assert_allclose(actual, expected, rtol=4 * info.eps, atol=info.tiny)


@DTYPES
@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_minimum_and_maximum(name: str, dtype: Any) -> None:
    x, y = (part.ravel() for part in np.meshgrid(special(dtype), special(dtype)))
    function, expected = getattr(simd, name), getattr(np, name)
    assert np.array_equal(on_vectors(function, dtype, 2)(x, y), expected(x, y), equal_nan=True)
    for swapped in (lambda x: function(x, 0.5), lambda x: function(0.5, x)):
        assert np.array_equal(on_vectors(swapped, dtype, 1)(x), expected(x, dtype(0.5)), equal_nan=True)


# as generated code writes them: operators between vectors, and with numbers on either side
ARITHMETIC: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lambda x, y: x + y, lambda x: 2.5 + x),
    "sub": (lambda x, y: x - y, lambda x: 2.5 - x),
    "mul": (lambda x, y: x * y, lambda x: x * 2.5),
    "div": (lambda x, y: x / y, lambda x: x / 2.5),
    "inverse": (lambda x, y: y / x, lambda x: 2.5 / x),
}


@DTYPES
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str, dtype: Any) -> None:
    both, number = ARITHMETIC[name]
    values = np.concatenate([special(dtype), np.random.default_rng(1).normal(size=50).astype(dtype)])
    x, y = (part.ravel() for part in np.meshgrid(values, values))
    with np.errstate(all="ignore"):
        assert np.array_equal(on_vectors(both, dtype, 2)(x, y), both(x, y), equal_nan=True)
        assert np.array_equal(on_vectors(number, dtype, 1)(x), number(x).astype(dtype), equal_nan=True)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "and": lambda x, y: (x > 0.0) & (y < 1.0),
    "or": lambda x, y: (x > y) | (y < 0.5),
    "number": lambda x, y: 0.5 >= x,  # noqa: SIM300
    "not": lambda x, y: ~(x > y),
}


@DTYPES
@pytest.mark.parametrize("name", COMPARISONS)
def test_masks(name: str, dtype: Any) -> None:
    """NaN is unequal to everything, and neither larger nor smaller."""
    compare, where = COMPARISONS[name], simd.where
    condition = _jitable(compare)
    x, y = (part.ravel() for part in np.meshgrid(special(dtype), special(dtype)))
    actual = on_vectors(lambda x, y: where(condition(x, y), x, y), dtype, 2)(x, y)
    assert np.array_equal(actual, np.where(compare(x, y), x, y), equal_nan=True)


@DTYPES
def test_where_takes_numbers(dtype: Any) -> None:
    where, x = simd.where, special(dtype)
    first = on_vectors(lambda x: where(x > 0.0, 2.0, x), dtype, 1)(x)
    assert np.array_equal(first, np.where(x > 0, dtype(2), x), equal_nan=True)
    both = on_vectors(lambda x: where(x > 0.0, 1.0, 0.0), dtype, 1)(x)
    assert np.array_equal(both, (x > 0).astype(dtype))


@DTYPES
def test_full_like_and_keep(dtype: Any) -> None:
    full_like, lanes = simd.full_like, Registers(SCALARS[dtype]).lanes
    x = np.full(2 * lanes, np.nan, dtype)
    assert np.array_equal(on_vectors(lambda x: full_like(x, 1.5), dtype, 1)(x), np.full(2 * lanes, 1.5))
    kept = on_vectors(lambda x: keep(x, 2), dtype, 1)(x)
    assert np.array_equal(np.isnan(kept), np.arange(2 * lanes) % lanes < 2)
    assert not kept[2:lanes].any()


@DTYPES
def test_rows_are_loaded_and_stored_to_their_end(dtype: Any) -> None:
    """At any address; memory beyond a row is not written, and lanes beyond it are zero."""
    registers = Registers(SCALARS[dtype])
    lanes, size = registers.lanes, registers.size

    def copy(registers, source, to, valid, whole):
        vector = load_row(registers, source, valid)
        store(vector, whole)
        store_row(registers, vector, to, valid)

    entry = _entry(copy, registers, *[types.int64] * 4)
    guard = 0xAB
    for valid in range(1, lanes + 3):
        for shift in (0, size, size + 1):  # aligned, to a number, to nothing
            count = min(valid, lanes)
            row = np.arange(1, count + 1, dtype=dtype)
            source, target = (np.full(3 * lanes * size, guard, np.uint8) for _ in range(2))
            inside = slice(lanes * size + shift, lanes * size + shift + count * size)
            source[inside] = row.view(np.uint8)
            whole = np.full(lanes, np.nan, dtype)
            start = inside.start
            entry(None, source.ctypes.data + start, target.ctypes.data + start, valid, whole.ctypes.data)
            assert np.array_equal(target, source)
            assert np.array_equal(whole[:count], row)
            assert not whole[count:].any()


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected in another way")
@DTYPES
def test_a_row_may_end_with_its_page(dtype: Any) -> None:
    """Loads and stores of a part of a vector touch no other page."""
    registers = Registers(SCALARS[dtype])

    def copy(registers, source, to, valid):
        store_row(registers, load_row(registers, source, valid) + splat(registers, 1.0), to, valid)

    entry = _entry(copy, registers, *[types.int64] * 3)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(start + page, page, 0) == 0
    row = np.frombuffer(memory, dtype, page // registers.size)
    for valid in range(1, registers.lanes + 1):
        at = start + page - valid * registers.size
        entry(None, at, at, valid)
    lanes = registers.lanes
    assert np.array_equal(row[-lanes:], np.arange(1, lanes + 1))
    del row
    assert protect(start + page, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
