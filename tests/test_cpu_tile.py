"""Register tiles against NumPy: every layout, number of rows and depth, and nothing beyond the operands."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numba import njit, types

from fusedlstm import cells
from fusedlstm.kernels.cpu import tile
from fusedlstm.kernels.cpu.shares import share
from fusedlstm.kernels.cpu.spec import MOST_ROWS, Spec, machine
from fusedlstm.kernels.cpu.tile import ARGUMENTS, PLANES, Tile, rows_times_planes, tile_table

SCALARS = {np.float32: types.float32, np.float64: types.float64}
DTYPES = pytest.mark.parametrize("dtype", SCALARS)
DEPTHS = [*range(10), 31, 130]
WIDTHS = {"panel": (3, 4, 5, 7, 17), "planes": (PLANES, 1), "outer": (PLANES, 1)}  # 17: more than registers
GUARD = 7  # numbers around each operand: NaN, and at an odd place


def guarded(shape: tuple[int, ...], dtype: Any, generator: np.random.Generator) -> tuple[Any, Any]:
    """An array of normal numbers that is no multiple of a vector from any boundary, and what it lies in."""
    around = np.full(int(np.prod(shape)) + 2 * GUARD, np.nan, dtype)
    inner = around[GUARD : around.size - GUARD].reshape(shape)
    inner[...] = generator.normal(size=shape)
    return inner, around


def call(made: Tile, rows: int, *arguments: int) -> None:
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * ARGUMENTS)
    kind(int(tile._addresses(made)[rows - 1]))(*arguments)


@DTYPES
@pytest.mark.parametrize(("layout", "width"), [(k, w) for k, widths in WIDTHS.items() for w in widths])
def test_a_tile_is_a_product(layout: str, width: int, dtype: Any) -> None:
    """Added to sums of its own, or to the same for all rows; the operands may lie anywhere."""
    made = Tile(SCALARS[dtype], layout, width)
    size, numbers = made.size, width * made.lanes
    for rows in range(1, made.rows(width) + 1):
        for depth in DEPTHS:
            generator = np.random.default_rng([rows, depth])
            shared = bool((rows + depth) % 2)
            source, _ = guarded((rows, numbers + 3), dtype, generator)
            target, around = guarded((rows, numbers + 5), dtype, generator)
            before = around.copy()
            b, _ = guarded((depth, width, made.lanes), dtype, generator)
            if layout == "outer":
                a, _ = guarded((depth, rows), dtype, generator)
                given, a_stride, a = a.ctypes.data, a.strides[0], a.T
            else:  # rows in any order, and not at their beginning
                a, _ = guarded((rows, depth + 2), dtype, generator)
                a[:, :2] = np.nan
                order = generator.permutation(rows)
                table = a.ctypes.data + order * a.strides[0]
                given, a_stride, a = table.ctypes.data, 2 * size, a[order, 2:]
            if layout == "planes":
                planes, _ = guarded((width, depth + 1, made.lanes), dtype, generator)
                planes[:, depth:] = np.nan
                weights, b_stride, b = planes, planes.strides[0], planes[:, :depth].transpose(1, 0, 2)
            else:
                weights, b_stride = b, 0
            call(
                made, rows, source.ctypes.data, 0 if shared else source.strides[0], target.ctypes.data,
                target.strides[0], given, a_stride, weights.ctypes.data, b_stride, depth,
            )  # fmt: skip
            sums = source[:1, :numbers] if shared else source[:, :numbers]
            product = a.astype(float) @ b.reshape(depth, numbers).astype(float)
            limit = np.finfo(dtype).eps * (depth + 1) * 8
            np.testing.assert_allclose(target[:, :numbers], sums + product, rtol=0, atol=limit)
            target[:, :numbers] = before[GUARD : before.size - GUARD].reshape(target.shape)[:, :numbers]
            assert np.array_equal(around, before, equal_nan=True)


@DTYPES
def test_a_tile_may_overwrite_its_sums(dtype: Any) -> None:
    made = Tile(SCALARS[dtype], "panel", 4)
    rows, numbers = made.rows(4), 4 * made.lanes
    generator = np.random.default_rng(1)
    sums, a, b = (generator.normal(size=s).astype(dtype) for s in ((rows, numbers), (rows, 9), (9, numbers)))
    expected = sums + a @ b
    table = a.ctypes.data + np.arange(rows) * a.strides[0]
    place, stride = sums.ctypes.data, sums.strides[0]
    call(made, rows, place, stride, place, stride, table.ctypes.data, 0, b.ctypes.data, 0, 9)
    np.testing.assert_allclose(sums, expected, atol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("width", range(1, 40))
def test_a_tile_fits_the_registers(width: int) -> None:
    rows = Tile(types.float32, "panel", width).rows(width)
    assert 1 <= rows <= MOST_ROWS
    assert rows == 1 or rows * width + width + 1 <= machine().registers


def test_shares_are_whole_and_equal() -> None:
    for count in range(20):
        for parts in range(1, 9):
            ranges = [share(count, part, parts) for part in range(parts)]
            assert [n for low, high in ranges for n in range(low, high)] == list(range(count))
            assert max(high - low for low, high in ranges) <= -(-count // parts)


@DTYPES
@pytest.mark.parametrize("accumulate", [False, True])
def test_rows_times_planes(accumulate: bool, dtype: Any) -> None:
    """Any number of rows, any share of the vectors, and outputs that end within a vector."""
    spec = Spec(cells.rnn_tanh, SCALARS[dtype], False)
    kind = [spec, *[types.int64] * 8, types.boolean, types.int64]
    compiled = njit(
        lambda spec, count, rows, b, depth, low, high, out, length, accumulate, scratch: rows_times_planes(
            spec, count, rows, b, depth, low, high, out, length, accumulate, scratch
        )
    )
    compiled.compile(tuple(kind))
    entry = compiled.overloads[tuple(kind)].entry_point
    table = tile_table(spec)
    for count, length, depth in ((1, 1, 1), (5, 2 * spec.lanes + 1, 7), (19, 6 * spec.lanes, 5), (8, 3, 40)):
        vectors = -(-length // spec.lanes)
        generator = np.random.default_rng(length)
        for low, high in ((0, vectors), (0, vectors // 2), (vectors // 2, vectors)):
            a, _ = guarded((count, depth), dtype, generator)
            planes, _ = guarded((vectors, depth, spec.lanes), dtype, generator)
            out, around = guarded((count, length + 2), dtype, generator)
            before = around.copy()
            rows, places = (m.ctypes.data + np.arange(count)[::-1] * np.int64(m.strides[0]) for m in (a, out))
            scratch = np.full(MOST_ROWS * PLANES * spec.lanes, np.nan, dtype)
            entry(
                table.ctypes.data, count, rows.ctypes.data, planes.ctypes.data, depth, low, high,
                places.ctypes.data, length, accumulate, scratch.ctypes.data,
            )  # fmt: skip
            expected = before.copy()
            inner = expected[GUARD : expected.size - GUARD].reshape(out.shape)
            here = slice(low * spec.lanes, min(high * spec.lanes, length))
            product = a @ planes.transpose(1, 0, 2).reshape(depth, -1)[:, here]
            inner[:, here] = product + (inner[:, here] if accumulate else 0)
            np.testing.assert_allclose(around, expected, atol=200 * np.finfo(dtype).eps)
