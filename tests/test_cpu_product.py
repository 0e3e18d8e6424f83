"""Products of many rows against NumPy: any number of rows and columns, and nothing beyond the results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import types
from tasks import GUARD, c_entry, entry, guarded, task

from fusedlstm.kernels.cpu.product import add_rows, routines
from fusedlstm.kernels.cpu.spec import MOST_ROWS, Registers
from fusedlstm.kernels.cpu.tile import PLANES, tile_table

SCALARS = {np.float32: types.float32, np.float64: types.float64}
DTYPES = pytest.mark.parametrize("dtype", SCALARS)


def record(scalar: types.Float, **fields: Any) -> np.ndarray:
    kinds = {"planes": ("planes", PLANES), "plane": ("planes", 1)}
    kinds |= {"outer": ("outer", PLANES), "thin_outer": ("outer", 1)}
    return task(**{f"{name}_tile": tile_table(scalar, *kind) for name, kind in kinds.items()}, **fields)


def table(rows: np.ndarray) -> np.ndarray:
    """The addresses of the rows, last to first."""
    return rows.ctypes.data + np.arange(len(rows))[::-1] * np.int64(rows.strides[0])


@DTYPES
@pytest.mark.parametrize("accumulate", [0, 1])
def test_rows_times_planes(accumulate: int, dtype: Any) -> None:
    """Any number of rows, any share of the vectors, and outputs that end within a vector."""
    scalar, lanes = SCALARS[dtype], Registers(SCALARS[dtype]).lanes
    multiply, words = c_entry(routines(scalar)[0]), record(scalar)
    for count, length, depth in ((1, 1, 1), (5, 2 * lanes + 1, 7), (19, 6 * lanes, 5), (8, 3, 40)):
        vectors = -(-length // lanes)
        generator = np.random.default_rng(length)
        for low, high in ((0, vectors), (0, vectors // 2), (vectors // 2, vectors)):
            a, _ = guarded((count, depth), dtype, generator)
            planes, _ = guarded((vectors, depth, lanes), dtype, generator)
            out, around = guarded((count, length + 2), dtype, generator)
            before = around.copy()
            scratch = np.full(MOST_ROWS * PLANES * lanes, np.nan, dtype)
            b = np.array([(0, vectors, planes.ctypes.data, 0, depth, 1, 0)])
            multiply(words, count, table(a), b, low, high, table(out), length, accumulate, scratch)
            expected = before.copy()
            inner = expected[GUARD : expected.size - GUARD].reshape(out.shape)
            here = slice(low * lanes, min(high * lanes, length))
            product = a @ planes.transpose(1, 0, 2).reshape(depth, -1)[:, here]
            inner[:, here] = product + (inner[:, here] if accumulate else 0)
            np.testing.assert_allclose(around, expected, atol=200 * np.finfo(dtype).eps)


CASES = [  # rows, panels, hidden units in all, columns, vectors of a panel
    (1, 1, 1, 1, 1),
    (9, 2, 21, 33, 1),
    (130, 3, 70, 5, 2),
    (4, 2, 40, 150, 2),
]


def gradients(
    case: tuple[int, ...], dtype: Any, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """The gradients of three gates of five, (count, gates, padded), NaN where no unit is; and their order."""
    count, panels, hidden, _, units = case
    panel = units * Registers(SCALARS[dtype]).lanes
    hidden = min(hidden, panels * panel)
    d, _ = guarded((count, 3, panels * panel), dtype, generator)
    d[..., hidden:] = np.nan
    order = np.array([4, 0, 3])
    return d, order, np.arange(5 * hidden).reshape(5, hidden)[order], panel, hidden


@DTYPES
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_outer(case: tuple[int, ...], first: int, dtype: Any) -> None:
    """The rows of the panels in question and no others, in columns that end within a vector."""
    scalar, generator = SCALARS[dtype], np.random.default_rng(case)
    count, panels, _, columns, _ = case
    lanes = Registers(scalar).lanes
    add, words = c_entry(routines(scalar)[1]), record(scalar)
    d, order, units, panel, hidden = gradients(case, dtype, generator)
    values, _ = guarded((count, columns), dtype, generator)
    for low, high in ((0, panels), (panels - 1, panels)):
        target, around = guarded((5 * hidden, columns + 3), dtype, generator)
        here = units[:, low * panel : high * panel]
        if first:
            target[here.ravel(), :columns] = np.nan
        expected = around.copy()
        inner = expected[GUARD : expected.size - GUARD].reshape(target.shape)
        own = d[:, :, low * panel : min(high * panel, hidden)]
        product = np.einsum("ngu,nc->guc", own.astype(float), values[::-1].astype(float))
        inner[here, :columns] = product if first else inner[here, :columns] + product
        space = np.full(count * PLANES * lanes, np.nan, dtype)
        scratch = np.full(MOST_ROWS * PLANES * lanes, np.nan, dtype)
        add(
            words, d, d.strides[0], d.strides[1], count, low, high, order, 3, panel, hidden, 0, hidden,
            table(values), 0, columns, target, target.strides[0], first, space, scratch, 0,
        )  # fmt: skip
        np.testing.assert_allclose(around, expected, rtol=0, atol=20 * count * np.finfo(dtype).eps)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_rows(case: tuple[int, ...], dtype: Any) -> None:
    """The gradients of biases, of the same rows."""
    scalar, generator = SCALARS[dtype], np.random.default_rng(case)
    count, panels = case[:2]
    add = entry(add_rows, 10, scalar)
    d, order, units, panel, hidden = gradients(case, dtype, generator)
    words = record(scalar, panel=panel, hidden=hidden)
    for low, high in ((0, panels), (panels - 1, panels)):
        for first in (0, 1):
            target, around = guarded((5 * hidden,), dtype, generator)
            here = units[:, low * panel : high * panel]
            if first:
                target[here] = np.nan
            expected = around.copy()
            total = d[:, :, low * panel : min(high * panel, hidden)].astype(float).sum(0)
            expected[GUARD + here] = total if first else expected[GUARD + here] + total
            add(words, d, d.strides[0], d.strides[1], count, low, high, order, 3, target, first)
            np.testing.assert_allclose(around, expected, rtol=0, atol=10 * count * np.finfo(dtype).eps)
