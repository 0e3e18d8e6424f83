"""Gradients of gradients by kernels, against the layer replayed with PyTorch's operators in float64."""

from __future__ import annotations

from typing import Any

import checks
import numba
import numpy as np
import pytest
import torch
from torch import Tensor

import fusedlstm.torch as fused
from fusedlstm import cells, second_order

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}  # of the norm, for one step


class Case:
    """Both directions of a layer, random gradients of its results, and cotangents of the first gradients."""

    def __init__(
        self, cell: cells.Cell, sizes: tuple[int, int, int, int], dtype: Any, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        steps, batch, inputs, hidden = sizes
        module = fused.Recurrent(cell, inputs, hidden, bidirectional=True, dtype=dtype, **settings)
        self.weights = [parameter.detach() for parameter in module.parameters()]
        self.x = torch.randn(steps, batch, inputs, dtype=dtype)
        self.shape = fused._shape(self.x, self.weights, cell.key, 2)
        self.initial = [torch.randn(2, batch, size, dtype=dtype) for size in self.shape.sizes]
        self.grads = [torch.randn(size, dtype=dtype) for size in self.shape.results]
        self.seeds: list[Tensor | None] = [
            torch.randn_like(t) for t in (self.x, *self.initial, *self.weights)
        ]
        self.lengths = self.reset = None

    def cut(self) -> Case:
        """Give the sequences lengths and boundaries."""
        generator = np.random.default_rng(0)
        steps, batch, _ = self.x.shape
        self.lengths = generator.integers(1, steps + 1, batch)
        self.reset = generator.random((steps, batch)) < 0.3
        return self

    def check(self) -> None:
        masks = [None if mask is None else torch.from_numpy(mask) for mask in (self.lengths, self.reset)]
        (y, *_), _ = fused._run(self.x, self.initial, self.weights, *masks, self.shape.cell.key, 2, False)
        given = (self.grads, self.x, self.initial, self.weights, self.seeds)
        found = fused._run_second(given[0], y, *given[1:], self.lengths, self.reset, self.shape, True)
        exact = map(doubled, given)
        expected = fused._replay_second(*exact, self.lengths, self.reset, self.shape)
        for ours, right in zip(flat(found), flat(expected), strict=True):
            assert ours.dtype is self.x.dtype
            assert ours.shape == right.shape
            limit = (
                TOLERANCE[ours.dtype] * len(self.x) ** 0.5 * max(right.norm(), 0.01 * right.numel() ** 0.5)
            )
            assert (ours - right).norm() <= limit


def doubled(value: Any) -> Any:
    if isinstance(value, list):
        return [doubled(part) for part in value]
    return None if value is None else value.double()


def flat(results: Any) -> list[Tensor]:
    grads, x, initial, weights = results
    return [*grads, x, *initial, *weights]


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, checks.three_states], ids=checks.name)
def test_sequences_that_end_and_begin_anew(cell: cells.Cell) -> None:
    Case(cell, (7, 5, 3, 37), torch.float64).cut().check()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 2, 5, 16), (130, 5, 33, 33)], ids=str)
def test_sizes(sizes: tuple[int, int, int, int]) -> None:
    """One of a single step; one whose gates fill whole vectors; one of more rows than stay in cache."""
    Case(cells.lstm, sizes, torch.float64, bias=sizes[0] > 1).check()


@pytest.mark.parametrize("lengths", [[3, 0, 4, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("reset", [False, True])
def test_sequences_without_steps(lengths: list[int], reset: bool) -> None:
    case = Case(cells.lstm, (5, 4, 3, 9), torch.float64).cut()
    case.lengths = np.array(lengths)
    if not reset:
        case.reset = None
    case.check()


def test_projection() -> None:
    Case(checks.three_states, (6, 3, 4, 17), torch.float64, proj_size=5).cut().check()


def test_single_precision() -> None:
    Case(cells.lstm, (20, 6, 40, 50), torch.float32).check()


def test_cotangents_that_are_zero() -> None:
    """As in a gradient penalty, where only the gradient of the input matters."""
    case = Case(cells.gru, (5, 3, 4, 9), torch.float64)
    for kept in (0, 1, 3):
        given = case.seeds
        case.seeds = [seed if n == kept else None for n, seed in enumerate(given)]
        case.check()
        case.seeds = given


def test_boundaries_alone() -> None:
    """Without lengths the sequences are in order, but a step need not go on from the one before."""
    case = Case(cells.gru, (6, 3, 4, 9), torch.float64).cut()
    case.lengths = None
    case.check()


def test_weights_and_cotangents_that_are_not_contiguous() -> None:
    case = Case(cells.lstm, (5, 3, 4, 9), torch.float64)
    case.weights = [columns_first(weight) for weight in case.weights]
    case.seeds = [None if seed is None else columns_first(seed) for seed in case.seeds]
    case.check()


def columns_first(tensor: Tensor) -> Tensor:
    """The same numbers, in memory from the first axis to the last."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 16, 8), (70, 33, 150), (1100, 5, 67)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products(sizes: tuple[int, int, int], dtype: Any) -> None:
    """Of fewer and more rows than stay in cache, by widths that are no whole number of vectors."""
    rows, depth, columns = sizes
    tiles = second_order.products(numba.from_dtype(np.dtype(str(dtype).removeprefix("torch."))))
    source, weight = torch.randn(2, rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
    limit = 100 * rows**0.5 * depth * torch.finfo(dtype).eps
    for given in (weight, weight.T.contiguous().T, weight.repeat_interleave(2, 1)[:, ::2]):
        target = torch.ones(rows, columns, dtype=dtype)
        tiles.add(target, source[0], given)
        assert (target - 1 - source[0] @ weight).abs().max() <= limit
        planes = torch.from_numpy(tiles.pack(given).array).view(-1, depth, tiles.spec.lanes)
        laid_out = planes.transpose(0, 1).flatten(1)
        assert torch.equal(laid_out[:, :columns], weight)
        assert not laid_out[:, columns:].any()
    d, entering = torch.randn(2, rows, columns, dtype=dtype), torch.randint(0, rows, (rows,))
    values, moved = source[:, entering]
    for moves in (False, True):
        target = torch.full((columns, depth), torch.nan, dtype=dtype)
        tiles.outer(target, d, source[0], source[1] if moves else None, entering.numpy())
        expected = d[1].T @ values + moves * d[0].T @ moved
        assert (target - expected).abs().max() <= 100 * rows * torch.finfo(dtype).eps
