"""One direction on the CPU engine against the reference in float64: every output, state and gradient."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from checks import (
    ALL,
    assert_close,
    error,
    five_gates,
    late_and_means,
    late_of_output,
    name,
    normalized_lstm,
    one_gate,
    other_operand,
    three_states,
)
from hypothesis import given

import fusedlstm
from fusedlstm import cell, cells
from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.kernels.cpu import plan
from fusedlstm.kernels.cpu.engine import CPU, LINE, POISON, CPUDirection, empty, empty_bytes
from fusedlstm.math import maximum, minimum, sigmoid, tanh, where
from fusedlstm.weights import Weights, shapes

BOTH = [np.float32, np.float64]
LATE = (cells.gru_reset_before, cells.lstm_output_sees_cell, late_of_output, late_and_means, normalized_lstm)


@cell(gates=("a", "b", "c", "d", "e", "f", "g"), states=("h", "s", "t", "u"), weights=("v", "w"))
def seven_gates(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, s: Any, t: Any, u: Any, v: Any, w: Any
) -> Any:
    """Every comparison, numbers first, and a panel wider than the tile of most processors."""
    low = where((a <= b) | (c >= 0.5) | (d == 0.25), tanh(a), where(e != f, -0.5 * g, 1.0))
    new_s = minimum(2.0, maximum(-2.0, 0.5 * s + v * low))
    new_t = where((a < b) & ~(c > d), t + 0.125, 0.5 * t - w * e)
    new_u = sigmoid(f) * u + (1 - h) * tanh(g) / (2 + new_s * new_s)
    return tanh(new_u + new_t) * sigmoid(d), new_s, new_t, new_u


class Case(NamedTuple):
    """Sizes and options of one direction."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    proj: int = 0
    bias: bool = True
    initial: bool = True
    dfinal: bool = True
    padded: bool = False
    reset: bool = False
    reverse: bool = False
    accumulate: bool = False
    batch_first: bool = False  # arrays (B, T, ...), seen as (T, B, ...)
    wide: bool = False  # y, dy, dx and all states are slices of the last axis of wider arrays
    every: bool = False  # all states are asked for, and have gradients
    seed: int = 1
    heads: int = 1

    def __str__(self) -> str:
        options = [field for field in self._fields[8:-2] if getattr(self, field)]
        proj = f"-P{self.proj}" if self.proj else ""
        heads = f"-{self.heads} heads" if self.heads > 1 else ""
        return "-".join(
            [f"T{self.steps}-B{self.batch}-I{self.inputs}-H{self.hidden}{proj}{heads}"]
            + ([] if self.bias else ["no_bias"])
            + options
        )


class Problem(NamedTuple):
    """The arguments of a case, random, in float64 but rounded to the precision of the kernel."""

    weights: Weights
    x: np.ndarray  # (T, B, I)
    initial: tuple[np.ndarray, ...]
    lengths: np.ndarray | None
    reset: np.ndarray | None
    dy: np.ndarray  # (T, B, P)
    dfinal: tuple[np.ndarray, ...]
    dx: np.ndarray  # (T, B, I): what dx is added to
    dstates: tuple[np.ndarray, ...]  # (T, B, H) each


def problem(cell: Cell, case: Case, dtype: Any) -> Problem:
    generator = np.random.default_rng(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * generator.normal(size=shape)).astype(dtype).astype(np.float64)

    T, B, inputs, hidden = case[:4]
    if cell.takes_gates:
        inputs = len(cell.gates_with_input) * hidden
    ih, hh, bias_ih, bias_hh, hr, vectors = shapes(cell, inputs, hidden, case.bias, case.proj, case.heads)
    sizes = [case.proj or hidden, *[hidden] * (len(cell.states) - 1)]
    weights = Weights(
        normal(*ih, scale=inputs**-0.5) if ih else None,
        normal(*hh, scale=0.7 * hh[1] ** -0.5) if hh else None,
        normal(*bias_ih) if bias_ih else None,
        normal(*bias_hh) if bias_hh else None,
        normal(*hr, scale=hidden**-0.5) if hr else None,
        tuple(normal(*shape) for shape in vectors),
    )
    states = [tuple(normal(B, size, scale=float(given)) for size in sizes) for given in case[6:8]]
    lengths = generator.integers(1, max(2, T), B) if case.padded else None  # often none is T long
    reset = generator.random((T, B)) < 0.3 if case.reset else None
    dx = normal(T, B, inputs, scale=float(case.accumulate))
    x, dy = normal(T, B, inputs), normal(T, B, sizes[0])
    dstates = tuple(normal(T, B, hidden) for _ in sizes[1:])
    return Problem(weights, x, states[0], lengths, reset, dy, states[1], dx, dstates)


def cast(weights: Weights, dtype: Any) -> Weights:
    single = [None if w is None else w.astype(dtype) for w in weights[:5]]
    return Weights(*single, tuple(v.astype(dtype) for v in weights.vectors))


class Buffer:
    """An array (T, B, n), contiguous or not, in memory full of a number that must stay."""

    GUARD = -77.0

    def __init__(self, values: np.ndarray, case: Case, dtype: Any) -> None:
        steps, batch, size = values.shape
        pad = 5 if case.wide else 0
        shape = (batch, steps) if case.batch_first else (steps, batch)
        self.whole = np.full((*shape, pad + size + pad), self.GUARD, dtype)
        here = self.whole.swapaxes(0, 1) if case.batch_first else self.whole
        self.array = here[..., pad : pad + size]
        self.array[...] = values

    def is_guarded(self) -> bool:
        pad = (self.whole.shape[-1] - self.array.shape[-1]) // 2
        ends = np.concatenate([self.whole[..., :pad], self.whole[..., pad + self.array.shape[-1] :]], -1)
        return bool((ends == self.GUARD).all())


@cache
def direction(cell: Cell, case: Case, dtype: Any) -> CPUDirection:
    return CPU().prepare(cell, cast(problem(cell, case, dtype).weights, dtype))


Results = dict[str, np.ndarray]


def named(y: Any, final: Any, dx: Any, dinitial: Any, grads: Weights, states: Any = ()) -> Results:
    arrays = {"y": y, "dx": dx} | {f"states {n}": array for n, array in enumerate(states)}
    for n, (end, start) in enumerate(zip(final, dinitial)):
        arrays |= {f"final {n}": end, f"dinitial {n}": start}
    arrays |= {f: a for f, a in zip(Weights._fields[:5], grads) if a is not None}
    return arrays | {f"vector {n}": array for n, array in enumerate(grads.vectors)}


def run(
    cell: Cell, case: Case, dtype: Any, backward_twice: bool = False, made: CPUDirection | None = None
) -> Results:
    """What the engine computes; all that it writes to is full of NaN before."""
    p = problem(cell, case, dtype)
    made = made or direction(cell, case, dtype)
    x, dy, dx = (Buffer(values, case, dtype) for values in (p.x, p.dy, p.dx))
    y = Buffer(np.full_like(p.dy, np.nan), case, dtype)
    if not case.accumulate:
        dx.array[...] = np.nan
    initial = tuple(state.astype(dtype) for state in p.initial) if case.initial else None
    final = tuple(np.full(state.shape, np.nan, dtype) for state in p.initial)
    options = (p.lengths, p.reset, case.reverse)
    every, dstates = (
        [Buffer(fill * values, case, dtype) for values in p.dstates if case.every] for fill in (np.nan, 1)
    )
    states, dafter = (
        tuple(buffer.array for buffer in buffers) if case.every else None for buffers in (every, dstates)
    )
    tape = made.forward(x.array, initial, y.array, final, *options, True, states)
    again, ends = np.full_like(y.array, np.nan), tuple(np.full_like(state, np.nan) for state in final)
    assert made.forward(x.array, initial, again, ends, *options, False) is None
    for ours, theirs in zip((again, *ends), (y.array, *final)):
        assert np.array_equal(ours, theirs)
    if states:
        others = tuple(np.full_like(array, np.nan) for array in states)
        made.forward(x.array, initial, again, ends, *options, False, others)
        assert all(map(np.array_equal, others, states))
    dfinal = tuple(d.astype(dtype) for d in p.dfinal) if case.dfinal else None
    if backward_twice:
        made.backward(tape, dy.array * 3, dfinal, np.zeros_like(dx.array), False, dafter)
    dinitial, grads = made.backward(tape, dy.array, dfinal, dx.array, case.accumulate, dafter)
    assert all(buffer.is_guarded() for buffer in (x, y, dy, dx, *every, *dstates))
    results = named(y.array, final, dx.array, dinitial, grads, states or ())
    dinitial, grads = made.backward(tape, dy.array, dfinal, None, False, dafter)
    without = named(y.array, final, dx.array, dinitial, grads, states or ())
    assert all(np.array_equal(results[what], without[what], equal_nan=True) for what in results)
    return results


def expected(cell: Cell, case: Case, dtype: Any) -> Results:
    p = problem(cell, case, dtype)
    y, final, tape = reference.forward(
        cell, p.weights, p.x, p.initial, p.lengths, p.reset, reverse=case.reverse
    )
    dx, dinitial, grads = reference.backward(tape, p.dy, p.dfinal, p.dstates if case.every else ())
    return named(y, final, p.dx + dx, dinitial, grads, tape.states if case.every else ())


def check(cell: Cell, case: Case, dtype: Any, **options: Any) -> None:
    actual, wanted = run(cell, case, dtype, **options), expected(cell, case, dtype)
    assert actual.keys() == wanted.keys()
    for what, array in actual.items():
        gradient = what != "y" and not what.startswith(("final", "states"))
        assert_close(array, wanted[what], case.steps, what, gradient)


PLAIN = Case(7, 5, 3, 17)
SIZES = [
    Case(1, 1, 1, 1),
    PLAIN,
    Case(6, 13, 1, 33, padded=True, reset=True, reverse=True, accumulate=True, batch_first=True, every=True),
    Case(9, 7, 20, 64, padded=True, reset=True, bias=False, wide=True, every=True),
]


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("cell", [*ALL, seven_gates], ids=name)
def test_every_cell(cell: Cell, case: Case) -> None:
    check(cell, case, np.float64)


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize(
    "cell", [cells.lstm, cells.gru, cells.lstm_output_from_memory, late_and_means, normalized_lstm], ids=name
)
def test_float32(cell: Cell, case: Case) -> None:
    check(cell, case, np.float32)


HEADS = [(16, 16), (33, 3), (34, 2), (64, 4), (75, 5)]  # H, heads
GIVEN = (cells.gate_inputs(cells.lstm), cells.gate_inputs(late_and_means), cells.gate_inputs(five_gates))


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("case", SIZES[1:], ids=str)
@pytest.mark.parametrize(("hidden", "heads"), HEADS)
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means], ids=name)
def test_heads(cell: Cell, hidden: int, heads: int, case: Case) -> None:
    check(cell, case._replace(hidden=hidden, heads=heads), np.float64)


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("cell", GIVEN, ids=name)
def test_gate_inputs(cell: Cell, case: Case) -> None:
    """Their gradient is written, or added to what is there."""
    check(cell, case, np.float64)
    check(cell, case._replace(accumulate=not case.accumulate, heads=case.hidden), np.float32)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("proj", [1, 5, 16])
@pytest.mark.parametrize("case", SIZES[1:], ids=str)
def test_projection(case: Case, proj: int, dtype: Any) -> None:
    check(cells.lstm, case._replace(proj=proj), dtype)


@pytest.mark.parametrize("case", SIZES[1:], ids=str)
@pytest.mark.parametrize("cell", [three_states, normalized_lstm], ids=name)
def test_projection_of_other_cells(cell: Cell, case: Case) -> None:
    """One whose gate is split; one of several phases."""
    check(cell, case._replace(proj=4), np.float64)


@given(
    cell=st.sampled_from([cells.lstm, cells.gru, three_states, one_gate, five_gates, other_operand, *LATE]),
    sizes=st.tuples(*[st.integers(1, most) for most in (40, 24, 40, 70)]),
    flags=st.tuples(*[st.booleans()] * 10),
    proj=st.sampled_from([0, 0, 1, 6]),
    seed=st.integers(0, 2**31),
)
def test_the_option_space(cell: Cell, sizes: Any, flags: Any, proj: int, seed: int) -> None:
    case = Case(*sizes, proj if cell in (cells.lstm, three_states) else 0, *flags, seed=seed)
    made = CPU().prepare(cell, problem(cell, case, np.float64).weights)  # not kept
    check(cell, case, np.float64, made=made)


LONG = [
    Case(300, 3, 4, 20),
    Case(300, 1, 2, 9, padded=True, reset=True, reverse=True, accumulate=True),
    Case(150, 9, 5, 35, padded=True, reset=True),
    Case(4, 200, 6, 18, padded=True, reset=True, accumulate=True),  # a step has more rows than a chunk
]


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, five_gates, other_operand, *LATE], ids=name)
def test_several_chunks(cell: Cell, case: Case) -> None:
    check(cell, case, np.float64)


def test_several_chunks_with_a_projection() -> None:
    check(cells.lstm, LONG[2]._replace(proj=7), np.float64)


@pytest.mark.parametrize("case", [*SIZES, *LONG, Case(40, 2, 70, 100)], ids=str)
@pytest.mark.parametrize("cell", [cells.peephole_lstm, cells.gru, late_and_means], ids=name)
def test_weights_whose_columns_are_contiguous_and_are_gone_before_backward(cell: Cell, case: Case) -> None:
    p = problem(cell, case, np.float64)
    columns = [None if w is None else np.asfortranarray(w) for w in p.weights[:5]]
    vectors = tuple(vector.copy() for vector in p.weights.vectors)
    made = CPUDirection(cell, Weights(*columns, vectors))
    made.lay_out_for_backward()
    for array in (*columns, *vectors):
        if array is not None:
            array[...] = np.nan
    final, y = tuple(np.empty_like(part) for part in p.initial), np.empty_like(p.dy)
    tape = made.forward(p.x, p.initial, y, final, p.lengths, p.reset, case.reverse, True)
    _, found = made.backward(tape, p.dy, p.dfinal, None, False)
    wanted = expected(cell, case._replace(accumulate=False, every=False), np.float64)
    assert_close(y, wanted["y"], case.steps, "y", False)
    for what, array in zip(Weights._fields[:5], found):
        if array is not None:
            assert_close(array, wanted[what], case.steps, what, True)


@pytest.mark.parametrize("cell", [cells.lstm, five_gates, late_and_means], ids=name)
def test_a_tape_is_used_twice(cell: Cell) -> None:
    check(cell, SIZES[3], np.float64, backward_twice=True)


@contextmanager
def several_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So many threads, even where several are not worth while; plans made before are forgotten, and after."""
    with monkeypatch.context() as patch:
        for figure, value in (("START", 0.0), ("BARRIER", 0.0), ("FLOPS", 100.0)):
            patch.setattr(plan, figure, value)
        plan.layer.cache_clear()
        fusedlstm.set_num_threads(threads)
        yield
    plan.layer.cache_clear()


# Several tiles of rows, and panels that threads share; or so few rows that each has panels of its own.
SHARED = Case(8, 20, 9, 75, padded=True, reset=True)
APART = Case(30, 3, 9, 75, padded=True, reset=True)


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("case", [SHARED, APART], ids=str)
@pytest.mark.parametrize(
    ("cell", "proj"),
    [
        (cells.lstm, 0),
        (cells.lstm, 20),
        (other_operand, 0),
        (cells.lstm_output_sees_cell, 0),
        (late_of_output, 0),
        (late_and_means, 0),
        (normalized_lstm, 20),
    ],
    ids=name,
)
def test_any_number_of_threads(
    cell: Cell, proj: int, case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where several are not worth while; the bits are the same."""
    check_threads(cell, case._replace(proj=proj), threads, monkeypatch)


@pytest.mark.parametrize(("cell", "proj"), [(cells.lstm, 0), (cells.lstm, 20), (late_and_means, 0)], ids=name)
def test_several_chunks_on_two_threads(cell: Cell, proj: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass too: gradients of gates are read until the next chunk may write its own."""
    case = Case(40, 20, 9, 75, proj=proj)
    made = direction(cell, case, np.float64)
    assert made.layer.backward_chunk(case.steps, case.batch) < case.steps
    check_threads(cell, case, 2, monkeypatch)


def check_threads(cell: Cell, case: Case, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = problem(cell, case, np.float64).weights
    fusedlstm.set_num_threads(1)
    alone = run(cell, case, np.float64, made=CPU().prepare(cell, weights))
    check(cell, case, np.float64)
    with several_threads(threads, monkeypatch):
        made = CPU().prepare(cell, weights)
        panels = made.layer.padded // made.program.panel
        assert made.layer.plan(case.steps, case.batch).threads == min(threads, panels)
        for _ in range(5):
            for what, array in run(cell, case, np.float64, made=made).items():
                assert np.array_equal(array, alone[what]), what


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", [cells.lstm, seven_gates, late_and_means, normalized_lstm], ids=name)
def test_gradients_are_finite_differences(cell: Cell, reverse: bool) -> None:
    """Along random directions in x, the initial states and every weight at once."""
    case = Case(6, 3, 2, 4, padded=True, reset=True, reverse=reverse)
    p, results = problem(cell, case, np.float64), run(cell, case, np.float64)
    results = {what: array for what, array in results.items() if what != "y" and "final" not in what}
    generator = np.random.default_rng(2)
    slopes = {what: generator.normal(size=array.shape) for what, array in results.items()}

    def loss(shift: float) -> float:
        moved = [
            None if w is None else w + shift * slopes[field]
            for field, w in zip(Weights._fields[:5], p.weights)
        ]
        vectors = [v + shift * slopes[f"vector {n}"] for n, v in enumerate(p.weights.vectors)]
        initial = tuple(s + shift * slopes[f"dinitial {n}"] for n, s in enumerate(p.initial))
        y, final = np.empty_like(p.dy), tuple(np.empty_like(s) for s in initial)
        made = CPU().prepare(cell, Weights(*moved, tuple(vectors)))
        made.forward(p.x + shift * slopes["dx"], initial, y, final, p.lengths, p.reset, reverse, False)
        return float((y * p.dy).sum() + sum((f * d).sum() for f, d in zip(final, p.dfinal)))

    h = 1e-6
    slope = (loss(h) - loss(-h)) / (2 * h)
    assert sum((results[what] * slopes[what]).sum() for what in results) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means], ids=name)
def test_nan_and_infinity_stay_in_their_row(cell: Cell, dtype: Any, value: float) -> None:
    """The others keep their bits, in forward and in backward."""
    case = Case(9, 14, 3, 17)
    p, made = problem(cell, case, dtype), direction(cell, case, dtype)
    spoilt = p.x.copy()
    spoilt[2, 5, 1] = value
    found = []
    for x in (p.x, spoilt):
        x, y, dx = x.astype(dtype), np.empty(p.dy.shape, dtype), np.empty(p.x.shape, dtype)
        final = tuple(np.empty(s.shape, dtype) for s in p.initial)
        tape = made.forward(x, None, y, final, None, None, False, True)
        dinitial, _ = made.backward(tape, p.dy.astype(dtype), None, dx, False)
        found.append((y, *(f[None] for f in final), dx, *(d[None] for d in dinitial)))
    others = np.arange(14) != 5
    for clean, dirty in zip(*found):
        assert np.array_equal(clean[:, others], dirty[:, others])
    y = found[1][0][:, 5]
    assert np.array_equal(y[:2], found[0][0][:2, 5])
    if np.isnan(value):
        assert np.isnan(y[2:]).all()


def peak(made: CPUDirection, x: np.ndarray, y: np.ndarray, final: Any, options: Any = (None, None)) -> int:
    """The most bytes that a forward pass without a tape holds at once."""
    made.forward(x, None, y, final, *options, False, False)
    tracemalloc.start()
    made.forward(x, None, y, final, *options, False, False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_memory_does_not_grow_with_time() -> None:
    """A forward pass without a tape needs as much for 100,000 steps as for 100."""
    most = {}
    for steps in (100, 100_000):
        case = Case(steps, 2, 1, 3)
        made = direction(cells.lstm, case, np.float32)
        x, y = np.zeros((steps, 2, 1), np.float32), np.empty((steps, 2, 3), np.float32)
        final = tuple(np.empty((2, 3), np.float32) for _ in range(2))
        most[steps] = peak(made, x, y, final)
        # what it takes to know which sequences run: a few numbers a step
        most[-steps] = peak(made, x, y, final, (np.array([steps, 7]), None))
    assert most[100_000] <= most[100] + 1000
    assert most[-100_000] <= 40 * 100_000


def test_plans_do_not_pile_up() -> None:
    made = direction(cells.lstm, PLAIN, np.float64)
    final = tuple(np.empty((1, PLAIN.hidden)) for _ in range(2))
    for steps in range(1, 700):
        x, y = np.zeros((steps, 1, PLAIN.inputs)), np.empty((steps, 1, PLAIN.hidden))
        made.forward(x, None, y, final, None, None, False, False)
    assert len(made.layer._plans) <= plan.MOST_PLANS


def test_workspaces_are_full_of_nan_under_test() -> None:
    """Else the tests of this file do not show what reads memory that nothing wrote."""
    assert POISON
    array = empty(33, np.dtype(np.float32))
    assert array.ctypes.data % LINE == 0
    assert np.isnan(array).all()
    assert (empty_bytes(5) == 0xFF).all()


@pytest.mark.parametrize("lengths", [None, [3, 9, 1, 9, 4]])
def test_sequences_are_sorted_by_length(lengths: list[int] | None) -> None:
    given = None if lengths is None else np.array(lengths)
    found = plan.sequences(9, 5, given)
    sizes = np.full(5, 9) if given is None else given
    assert np.array_equal(found.lengths, sizes[found.order])
    assert sorted(found.order) == list(range(5))
    assert (np.diff(found.lengths) <= 0).all()
    assert found.rows == sizes.sum()
    if given is not None:
        running = [(sizes > step).sum() for step in range(9)]
        assert np.array_equal(np.diff(found.first), running)


def test_explain() -> None:
    text = direction(cells.lstm, PLAIN, np.float64).explain(7, 5, training=True)
    assert set(text) == {"kernel", "phases", "tile", "products", "threads", "layout", "chunk", "bound"}
    assert "lstm" in text["kernel"]
    assert "backward" in text["kernel"]
    assert text["phases"] == "1 a step, 1 backward"
    assert "float64" in text["tile"]
    text = direction(late_and_means, PLAIN, np.float64).explain(7, 5, training=False)
    assert text["phases"] == "6 a step"


def test_the_comparison_can_fail() -> None:
    """A wrong bit in the gradients is seen."""
    array = run(cells.lstm, PLAIN, np.float64)["hh"]
    wrong = array.copy()
    wrong[3, 2] += 1e-9
    assert error(wrong, array) > 1e-13 * np.sqrt(PLAIN.steps)
