"""Register tiles against NumPy: every layout, number of rows and depth, and nothing beyond the operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import types
from tasks import GUARD, c_entry, guarded

from fusedlstm.kernels.cpu.spec import MOST_ROWS, Registers, machine
from fusedlstm.kernels.cpu.tile import ARGUMENTS, PLANES, Tile, tile_table

SCALARS = {np.float32: types.float32, np.float64: types.float64}
DTYPES = pytest.mark.parametrize("dtype", SCALARS)
DEPTHS = [*range(10), 31, 130]
WIDTHS = {"panel": (3, 4, 5, 7, 17), "planes": (PLANES, 1), "outer": (PLANES, 1)}  # 17: more than registers


def call(made: Tile, rows: int, *arguments: int) -> None:
    assert len(arguments) == ARGUMENTS
    c_entry(int(tile_table(made.scalar, made.layout, made.width)[rows - 1]))(*arguments)


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


@DTYPES
def test_a_table_names_a_function_for_each_number_of_rows(dtype: Any) -> None:
    """Once: every later caller gets the same."""
    most = Registers(SCALARS[dtype]).rows(4)
    table = tile_table(SCALARS[dtype], "panel", 4)
    assert len(set(table[:most])) == most
    assert table[:most].all()
    assert not table[most:].any()
    assert tile_table(SCALARS[dtype], "panel", 4) is table
