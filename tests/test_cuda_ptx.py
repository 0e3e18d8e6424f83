"""The stand-ins of kernels/cuda/ptx.py against the PTX ISA, and the packing that follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedlstm.kernels.cuda import plan, ptx
from fusedlstm.kernels.cuda.plan import Product

# PTX ISA, "Matrix Fragments for mma.m16n8k8" (.tf32): where element i of a lane's fragment lies


def tf32_a(lane: int, i: int) -> tuple[int, int]:
    group, place = lane >> 2, lane % 4
    return group if i in (0, 2) else group + 8, place if i in (0, 1) else place + 4


def tf32_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 if i == 0 else lane % 4 + 4, lane >> 2


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" (.f16, .bf16)


def half_a(lane: int, i: int) -> tuple[int, int]:
    group, place = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = place * 2 + (i & 1) if i < 4 else place * 2 + (i & 1) + 8
    return row, column


def half_b(lane: int, i: int) -> tuple[int, int]:
    place = lane % 4
    return place * 2 + (i & 1) if i < 2 else place * 2 + (i & 1) + 8, lane >> 2


# both: the accumulators


def accumulator(lane: int, i: int) -> tuple[int, int]:
    group, place = lane >> 2, lane % 4
    return group if i < 2 else group + 8, place * 2 + (i & 1)


def words_of(values: list[float], kind: str) -> list[Any]:
    """Registers of a fragment: a register holds one tf32, or two halves, the first in the low bits."""
    array = np.array(values, np.float32)
    if kind == "tf32":
        return list(array.view(np.uint32))
    halves = ptx.float16_bits(array) if kind == "float16" else ptx.bfloat16_bits(array)
    return [np.uint32(low) | np.uint32(high) << np.uint32(16) for low, high in halves.reshape(-1, 2)]


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_mma_stand_in_follows_the_fragment_layouts(kind: str) -> None:
    rng = np.random.default_rng(0)
    depth = 8 if kind == "tf32" else 16
    # few bits, so that every precision holds them exactly
    a, b, c = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    at_a, at_b = (tf32_a, tf32_b) if kind == "tf32" else (half_a, half_b)
    lanes = []
    for lane in range(32):
        fragment_a = [a[at_a(lane, i)] for i in range(a.size // 32)]
        fragment_b = [b[at_b(lane, i)] for i in range(b.size // 32)]
        lanes.append(
            (
                *words_of(fragment_a, kind),
                *words_of(fragment_b, kind),
                *(c[accumulator(lane, i)] for i in range(4)),
            )
        )
    unpack = {"tf32": ptx._from_tf32, "bfloat16": ptx._from_bfloat16, "float16": ptx._from_float16}[kind]
    found, wanted = ptx.multiply_fragments(lanes, unpack), a @ b + c
    for lane in range(32):
        for i in range(4):
            assert found[lane][i] == wanted[accumulator(lane, i)]


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -1.0, 65504.0, 1e-8], np.float32)
FLOATS = st.lists(st.floats(width=32), min_size=1, max_size=20).map(lambda x: np.array(x, np.float32))


def bits_of_torch(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


@given(FLOATS)
def test_half_conversions_are_those_of_pytorch(values: np.ndarray) -> None:
    values = np.concatenate([values, SPECIAL])
    number = values == values
    for convert, dtype in ((ptx.bfloat16_bits, torch.bfloat16), (ptx.float16_bits, torch.float16)):
        with np.errstate(over="ignore"):
            found = convert(values)
        np.testing.assert_array_equal(found[number], bits_of_torch(values, dtype)[number])
        back = torch.from_numpy(found.view(np.int16)).view(dtype).float().numpy()
        assert np.isnan(back[~number]).all()


@given(FLOATS)
def test_tf32_conversion_rounds_to_ten_bits_ties_away_from_zero(values: np.ndarray) -> None:
    """cvt.rna.tf32.f32, by arithmetic instead of bits."""
    values = np.concatenate([values, SPECIAL])
    found = ptx.tf32_bits(values).view(np.float32)
    ordinary = np.isfinite(values) & (np.abs(values) < 3e38)
    x = values[ordinary].astype(np.float64)
    exponent = np.maximum(np.frexp(np.abs(x))[1], -125)  # subnormal numbers have a fixed exponent
    scaled = np.ldexp(np.abs(x), 11 - exponent)
    wanted = np.copysign(np.ldexp(np.floor(scaled + 0.5), exponent - 11), x)
    np.testing.assert_array_equal(found[ordinary], wanted)
    assert np.isnan(found[np.isnan(values)]).all()
    assert np.isinf(found[np.isinf(values)]).all()


@given(
    precision=st.sampled_from(plan.PRECISIONS),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.integers(1, 3)),
    batch=st.sampled_from([8, 16, 32]),
    held=st.integers(0, 2),
)
def test_packing_holds_each_weight_once(precision: Any, sizes: Any, batch: int, held: int) -> None:
    groups, units, size, blocks = sizes
    threads = 64
    product = Product(precision, groups, units, size, batch, threads)
    if not product.fits:
        return
    product = replace(product, held=min(held, product.steps))
    row, column = product.order()
    assert len(row) == product.weights
    cells = set(zip(row.tolist(), column.tolist()))
    assert cells == {(r, c) for r in range(product.rows) for c in range(product.depth)}
    assert product.depth >= size
    weights = np.random.default_rng(0).integers(1, 100, (groups, blocks * units - 1 or 1, size))
    packed = product.pack(np, weights.astype(product.real), blocks)
    assert packed.dtype == product.operand
    assert packed.size == blocks * product.weights
    assert np.count_nonzero(packed) == weights.size
