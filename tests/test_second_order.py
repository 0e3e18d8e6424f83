"""Tangents of both passes on the CPU engine, which are gradients of gradients.

They are held against the layer replayed with PyTorch's operators in float64, which rounds alone tells
apart, and against finite differences of the reference, which share nothing with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checks import ALL, late_and_means, name, normalized_lstm, three_states
from test_cpu_engine import Case as Sizes
from test_cpu_engine import problem, several_threads
from torch import Tensor

import fusedlstm.torch as fused
from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.kernels.cpu.engine import CPU, CPUDirection
from fusedlstm.torch import passes
from fusedlstm.torch.replay import replay_second
from fusedlstm.torch.shapes import shape_of
from fusedlstm.weights import flatten, unflatten

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}  # of the norm, for one step


class Case:
    """Both directions of a layer, random gradients of its results, and cotangents of the first gradients."""

    def __init__(self, cell: Cell, sizes: tuple[int, int, int, int], dtype: Any, **settings: Any) -> None:
        torch.manual_seed(0)
        steps, batch, inputs, hidden = sizes
        module = fused.Recurrent(cell, inputs, hidden, bidirectional=True, dtype=dtype, **settings)
        self.weights = [parameter.detach() for parameter in module.parameters()]
        self.x = torch.randn(steps, batch, inputs, dtype=dtype)
        self.shape = shape_of(self.x, self.weights, cell.key, 2)
        self.initial = [torch.randn(2, batch, size, dtype=dtype) for size in self.shape.sizes]
        self.grads = [torch.randn(size, dtype=dtype) for size in self.shape.results]
        self.seeds: list[Tensor | None] = [
            torch.randn_like(t) for t in (self.x, *self.initial, *self.weights)
        ]
        self.lengths: Tensor | None = None
        self.reset: Tensor | None = None

    def cut(self) -> Case:
        """Give the sequences lengths and boundaries."""
        generator = np.random.default_rng(0)
        steps, batch, _ = self.x.shape
        self.lengths = torch.from_numpy(generator.integers(1, steps + 1, batch))
        self.reset = torch.from_numpy(generator.random((steps, batch)) < 0.3)
        return self

    def check(self) -> None:
        masks = self.lengths, self.reset
        more = (*masks, self.shape.cell.key, 2)
        y, *_, handle = passes.forward(self.x, self.initial, self.weights, *more, True)
        given = (self.grads, self.x, self.initial, self.weights, self.seeds)
        found = passes.backward_gradient(
            self.grads, handle, y, self.x, self.initial, self.weights, *more, False, self.seeds
        )
        expected = replay_second(*map(doubled, given), *masks, self.shape)
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


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("cell", ALL, ids=name)
def test_sequences_that_end_and_begin_anew(cell: Cell) -> None:
    Case(cell, (7, 5, 3, 37), torch.float64).cut().check()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 2, 5, 16), (130, 5, 33, 33)], ids=str)
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means], ids=name)
def test_sizes(cell: Cell, sizes: tuple[int, int, int, int]) -> None:
    """One of a single step; one whose gates fill whole vectors; one of more rows than stay in cache."""
    Case(cell, sizes, torch.float64, bias=sizes[0] > 1).check()


@pytest.mark.parametrize("lengths", [[3, 0, 4, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("reset", [False, True])
def test_sequences_without_steps(lengths: list[int], reset: bool) -> None:
    case = Case(cells.lstm, (5, 4, 3, 9), torch.float64).cut()
    case.lengths = torch.tensor(lengths)
    if not reset:
        case.reset = None
    case.check()


@pytest.mark.parametrize("cell", [three_states, normalized_lstm], ids=name)
def test_projection(cell: Cell) -> None:
    Case(cell, (6, 3, 4, 17), torch.float64, proj_size=5).cut().check()


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru_reset_before], ids=name)
def test_single_precision(cell: Cell) -> None:
    Case(cell, (20, 6, 40, 50), torch.float32).check()


@pytest.mark.parametrize("cell", [cells.gru, cells.lstm_output_from_memory, three_states], ids=name)
def test_cotangents_that_are_zero(cell: Cell) -> None:
    """As in a gradient penalty, where only the gradient of the input matters."""
    case = Case(cell, (5, 3, 4, 9), torch.float64)
    given = case.seeds
    for kept in range(len(given)):
        case.seeds = [seed if n == kept else None for n, seed in enumerate(given)]
        case.check()


def test_boundaries_alone() -> None:
    """Without lengths the sequences are in order, but a step need not go on from the one before."""
    case = Case(cells.gru, (6, 3, 4, 9), torch.float64).cut()
    case.lengths = None
    case.check()


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru_reset_before], ids=name)
def test_weights_and_cotangents_that_are_not_contiguous(cell: Cell) -> None:
    case = Case(cell, (5, 3, 4, 9), torch.float64)
    case.weights = [columns_first(weight) for weight in case.weights]
    case.seeds = [None if seed is None else columns_first(seed) for seed in case.seeds]
    case.check()


def columns_first(tensor: Tensor) -> Tensor:
    """The same numbers, in memory from the first axis to the last."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


# --- One direction, by itself -----------------------------------------------------------------------------


def second(made: CPUDirection, case: Sizes, dtype: Any = np.float64) -> list[np.ndarray]:
    """Tangents of outputs, final states and all gradients, along :func:`directions`; all was NaN before."""
    p = problem(made.program.cell, case, dtype)
    x, dy, v = (array.astype(dtype) for array in (p.x, p.dy, moved(p.x)))
    initial, dfinal = ([part.astype(dtype) for part in parts] for parts in (p.initial, p.dfinal))
    y, final = np.full_like(dy, np.nan), tuple(np.full_like(part, np.nan) for part in initial)
    tape = made.forward(x, tuple(initial), y, final, p.lengths, p.reset, case.reverse, True)
    states, dstates = (
        tuple(f * part.astype(dtype) for part in p.dstates) if case.every else () for f in (np.nan, 1)
    )
    along = unflatten(made.program.cell, [moved(part).astype(dtype) for part in flatten(p.weights)])
    ty, tfinal = np.full_like(y, np.nan), tuple(np.full_like(part, np.nan) for part in final)
    starts = tuple(moved(part).astype(dtype) for part in initial)
    tangent = made.tangent(tape, v, starts, along, ty, tfinal, states)
    tdx = np.full_like(x, np.nan)
    dinitial, grads = made.backward_tangent(tape, tangent, dy, tuple(dfinal), tdx, dstates)
    return [ty, *tfinal, *states, tdx, *dinitial, *flatten(grads)]


def moved(array: np.ndarray) -> np.ndarray:
    """A direction in which to move an array, always the same."""
    return np.random.default_rng(array.size).normal(size=array.shape)


def differences(cell: Cell, case: Sizes) -> list[np.ndarray]:
    """What :func:`second` should give, by finite differences of the reference."""
    p = problem(cell, case, np.float64)

    def at(shift: float) -> list[np.ndarray]:
        weights = unflatten(cell, [part + shift * moved(part) for part in flatten(p.weights)])
        initial = tuple(part + shift * moved(part) for part in p.initial)
        x = p.x + shift * moved(p.x)
        y, final, tape = reference.forward(cell, weights, x, initial, p.lengths, p.reset, case.reverse)
        states, dstates = (tape.states, p.dstates) if case.every else ((), ())
        dx, dinitial, grads = reference.backward(tape, p.dy, p.dfinal, dstates)
        return [y, *final, *states, dx, *dinitial, *flatten(grads)]

    h = 1e-5
    return [(high - low) / (2 * h) for high, low in zip(at(h), at(-h))]


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize(
    "options", [{}, {"padded": True, "reset": True, "reverse": True, "every": True}], ids=str
)
@pytest.mark.parametrize("cell", ALL, ids=name)
def test_tangents_are_finite_differences(cell: Cell, options: dict[str, bool]) -> None:
    case = Sizes(5, 4, 3, 6, bias=not options, **options)
    check_tangents(cell, case)


def check_tangents(cell: Cell, case: Sizes) -> None:
    made = CPU().prepare(cell, problem(cell, case, np.float64).weights)
    for found, right in zip(second(made, case), differences(cell, case), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means, three_states], ids=name)
def test_tangents_of_heads_and_of_gate_inputs(cell: Cell, heads: int) -> None:
    case = Sizes(4, 3, 2, 10, padded=True, reset=True, every=True, heads=heads)
    if heads > 1:
        check_tangents(cell, case)
    check_tangents(cells.gate_inputs(cell), case)


def test_the_gradient_of_the_input_may_be_left_out() -> None:
    """And the tangents of the input: None is zero."""
    cell, case = cells.gru_reset_before, Sizes(5, 4, 3, 6)
    p = problem(cell, case, np.float64)
    made = CPU().prepare(cell, p.weights)
    y, final = np.empty_like(p.dy), tuple(np.empty_like(part) for part in p.initial)
    tape = made.forward(p.x, p.initial, y, final, None, None, False, True)
    results = []
    for x, dx in ((None, None), (np.zeros_like(p.x), np.empty_like(p.x))):
        along = unflatten(cell, [moved(part) for part in flatten(p.weights)])
        tangent = made.tangent(tape, x, None, along, np.empty_like(y), final)
        dinitial, grads = made.backward_tangent(tape, tangent, p.dy, None, dx)
        results.append([*dinitial, *flatten(grads)])
    for without, zeros in zip(*results, strict=True):
        np.testing.assert_allclose(without, zeros, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("batch", [3, 20], ids=["each its own panels", "threads help each other"])
@pytest.mark.parametrize(
    ("cell", "proj", "heads"),
    [
        (cells.lstm, 20, 1),
        (cells.lstm_output_sees_cell, 0, 3),
        (normalized_lstm, 20, 1),
        (late_and_means, 0, 1),
        (cells.gate_inputs(late_and_means), 0, 5),
    ],
    ids=name,
)
def test_two_threads_give_the_bits_of_one(
    cell: Cell, proj: int, heads: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Sizes(8, batch, 9, 75, proj=proj, padded=True, reset=True, every=True, heads=heads)
    alone = second(CPU().prepare(cell, problem(cell, case, np.float64).weights), case)
    with several_threads(2, monkeypatch):
        made = CPU().prepare(cell, problem(cell, case, np.float64).weights)
        assert made.layer.plan(case.steps, case.batch).threads == 2
        for _ in range(10):
            for found, right in zip(second(made, case), alone, strict=True):
                assert np.array_equal(found, right)
