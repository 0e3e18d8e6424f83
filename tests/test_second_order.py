"""Gradients of gradients by kernels, against the layer replayed with PyTorch's operators in float64."""

from __future__ import annotations

from typing import Any

import checks
import numpy as np
import pytest
import torch
from torch import Tensor

import fusedlstm.torch as fused
from fusedlstm import cells

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
