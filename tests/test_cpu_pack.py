"""Weights as the kernels read them, against the layouts written with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import types

from fusedlstm.kernels.cpu import engine, team
from fusedlstm.kernels.cpu.spec import Registers

DTYPES = pytest.mark.parametrize("scalar", [types.float32, types.float64], ids=str)
SIZES = [(1, 1, 1), (4, 17, 5), (3, 33, 40), (2, 64, 3), (1, 100, 31)]  # gates, hidden, columns
GUARD = 9


def packed(pack: engine.Kernel, threads: int, size: int, dtype: Any, *arguments: Any) -> np.ndarray:
    """What a kernel writes, all of it and nothing beyond."""
    around = np.full(size + 2 * GUARD, np.nan, dtype)
    target = around[GUARD : GUARD + size]
    address = team.current().address if threads > 1 else 0
    pack.entry(address, threads, 1000, pack.address, None, *arguments, target.ctypes.data)
    assert np.isnan(around[:GUARD]).all()
    assert np.isnan(around[GUARD + size :]).all()
    return target


def apart(matrix: np.ndarray) -> np.ndarray:
    """The matrix with its rows apart; what is between them must not be read."""
    return np.pad(matrix, ((0, 0), (0, 3)), constant_values=np.nan)[:, : matrix.shape[1]]


def layouts(matrix: np.ndarray) -> list[np.ndarray]:
    """The matrix with contiguous rows, with contiguous columns, and with neither."""
    return [apart(matrix), apart(matrix.T).T, np.repeat(matrix, 2, 1)[:, ::2]]


def orders(gates: int) -> list[np.ndarray]:
    """All gates in some order, and some of them, as the products of a cell need them."""
    order = np.random.default_rng(gates).permutation(gates)
    return [order, order[: max(gates // 2, 1)]]


def by_gate(weight: np.ndarray, gates: int, order: np.ndarray, padded: int) -> np.ndarray:
    """(gates, padded, columns), the gates in the given order."""
    split = weight.reshape(gates, -1, weight.shape[1])[order]
    return np.pad(split, ((0, 0), (0, padded - split.shape[1]), (0, 0)))


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("units", [1, 2, 4])
def test_panels(units: int, threads: int, scalar: types.Float) -> None:
    """[panels][k][gates * units][lanes]"""
    lanes, dtype = Registers(scalar).lanes, np.dtype(str(scalar))
    pack, _ = engine.packers(scalar)
    for gates, hidden, depth in SIZES:
        weight = np.random.default_rng(hidden).normal(size=(gates * hidden, depth)).astype(dtype)
        panels = -(-hidden // (units * lanes))
        for order in orders(gates):
            expected = by_gate(weight, gates, order, panels * units * lanes)
            expected = expected.reshape(-1, panels, units, lanes, depth).transpose(1, 4, 0, 2, 3)
            for given in layouts(weight):
                found = packed(pack, threads, expected.size, dtype, given, order, hidden, units)
                assert np.array_equal(found.reshape(expected.shape), expected)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_planes(threads: int, scalar: types.Float) -> None:
    """[vectors][gates][padded][lanes]"""
    lanes, dtype = Registers(scalar).lanes, np.dtype(str(scalar))
    _, pack = engine.packers(scalar)
    for gates, hidden, columns in SIZES:
        weight = np.random.default_rng(hidden).normal(size=(gates * hidden, columns)).astype(dtype)
        vectors = -(-columns // lanes)
        wide = np.pad(weight, ((0, 0), (0, vectors * lanes - columns)))
        for order in orders(gates):
            for padded in (hidden, -(-hidden // lanes) * lanes, hidden + 3 * lanes):
                expected = by_gate(wide, gates, order, padded).reshape(-1, padded, vectors, lanes)
                expected = expected.transpose(2, 0, 1, 3)
                for given in layouts(weight):
                    found = packed(pack, threads, expected.size, dtype, given, order, hidden, padded)
                    assert np.array_equal(found.reshape(expected.shape), expected)


@DTYPES
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (300, 5), (16, 32), (64, 256), (140, 333)])
def test_transposed(shape: tuple[int, int], threads: int, scalar: types.Float) -> None:
    dtype, kernel = np.dtype(str(scalar)), engine.transposer(scalar)
    rows, columns = shape
    source = apart(np.random.default_rng(rows).normal(size=shape).astype(dtype))
    around = np.full((columns, rows + GUARD), np.nan, dtype)
    address = team.current().address if threads > 1 else 0
    kernel.entry(address, threads, 1000, kernel.address, None, source, around[:, :rows])
    assert np.array_equal(around[:, :rows], source.T)
    assert np.isnan(around[:, rows:]).all()
