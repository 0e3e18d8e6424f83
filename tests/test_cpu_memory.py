"""Where kernels keep what: parts of memory, and which rows run when, against the reference's schedule."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from checks import late_and_means, name, three_states
from hypothesis import given
from numba import njit, types
from tasks import entry, task

from fusedlstm import cells
from fusedlstm.kernels.cpu import memory, plan
from fusedlstm.kernels.cpu.entry import aligned
from fusedlstm.kernels.cpu.memory import OPERAND, OUTPUT, STATE
from fusedlstm.kernels.cpu.records import OWN, TASK
from fusedlstm.kernels.cpu.simd import part
from fusedlstm.kernels.cpu.spec import Registers
from fusedlstm.kernels.cpu.team import LINE
from fusedlstm.kernels.reference import schedule

LANES = Registers(types.float64).lanes


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads and writes numbers is called from Python."""
    word = ctypes.c_int64.from_address
    monkeypatch.setattr(memory, "read_int", lambda address: word(address).value)
    monkeypatch.setattr(memory, "read_byte", lambda address: ctypes.c_uint8.from_address(address).value)
    monkeypatch.setattr(memory, "write_int", lambda value, address: setattr(word(address), "value", value))


def sequences(
    steps: int, batch: int, lengths: Any = None, reset: Any = None, reverse: bool = False, **more: Any
) -> Any:
    """The part of a task that says which rows run when; and more of it."""
    order = plan.sequences(steps, batch, lengths)
    marks = np.zeros((1, 1), bool) if reset is None else reset
    return SimpleNamespace(
        kept=(order, marks), sequence=order.order, steps=steps, batch=batch, reverse=int(reverse),
        order=order.order.ctypes.data, lengths=order.lengths.ctypes.data,
        first=order.first.ctypes.data if order.first.size else 0,
        reset=0 if reset is None else marks.ctypes.data,
        reset_time=marks.strides[0], reset_row=marks.strides[1], **more,
    )  # fmt: skip


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_round_up(multiple: int) -> None:
    for n in range(200):
        assert memory.round_up(n, multiple) == -(-n // multiple) * multiple


@pytest.mark.usefixtures("in_python")
@given(
    steps=st.integers(1, 6),
    batch=st.integers(1, 5),
    options=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 1000),
)
def test_which_rows_run_when(steps: int, batch: int, options: Any, seed: int) -> None:
    """The rows of a step are those that the reference calls active, at its times, with its boundaries."""
    generator = np.random.default_rng(seed)
    padded, marked, reverse = options
    lengths = generator.integers(1, steps + 1, batch) if padded else None
    reset = generator.random((steps, batch)) < 0.5 if marked else None
    active, boundary, order = schedule(steps, batch, lengths, reset, reverse)
    found = sequences(steps, batch, lengths, reset, reverse)
    times: list[list[int]] = [[] for _ in range(batch)]
    for step in range(steps):
        for row in range(memory.rows_before(found, step + 1) - memory.rows_before(found, step)):
            time, sequence = memory.time_of(found, step, row), memory.sequence_of(found, row)
            times[sequence].append(time)
            assert memory.starts_anew(found, step, row) == (step == 0 or boundary[time, sequence])
    assert times == [[t for t in order if active[t, b]] for b in range(batch)]
    assert memory.rows_before(found, steps) == active.sum()


# --- The parts of memory ----------------------------------------------------------------------------------


def fields(made: plan.Task) -> dict[str, int]:
    return {name: int(made.words[place]) for name, place in TASK.items()}


def ranges(found: dict[str, int], sizes: dict[str, int]) -> None:
    """Parts begin with a cache line each, in this order, and do not overlap."""
    names = [part for part in sizes if sizes[part] or part == [*sizes][-1]]
    for one, after in pairwise(names):
        assert found[one] % LINE == 0, one
        assert found[one] + sizes[one] <= found[after], (one, after)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("cell", "proj"), [(cells.lstm, 0), (cells.gru, 0), (three_states, 7), (late_and_means, 0)], ids=name
)
@pytest.mark.parametrize("tangents", [False, True], ids=["values", "tangents"])
def test_parts_of_memory_do_not_overlap(cell: Any, proj: int, tangents: bool, threads: int) -> None:
    """Of a forward pass that keeps a tape, of one that keeps none, and of a backward pass."""
    steps, batch, rows, hidden, chunk = 4, 5, 11, 33, 3
    made = plan.layer(cell, np.dtype(np.float32), 6, hidden, proj or hidden, proj > 0, 1)
    program, further = made.program, len(cell.states) - 1
    size, means = program.registers.size, len(cell.step.means())
    for taped in (rows, None):
        if taped is None and tangents:
            continue
        found = fields(made.forward_task(steps, batch, taped, chunk, threads, tangents))
        kept_rows = program.ring * batch if taped is None else rows
        gate_rows = batch * chunk if taped is None else rows
        assert found["width"] == made.padded * size
        assert found["states_plane"] == (batch + kept_rows) * found["width"]
        assert 0 <= found["output_width"] - (proj or hidden) * size < program.panel * size
        total = found["memory_end"]
        ranges(found, {
            "initial": batch * found["output_width"],
            "states": further * found["states_plane"],
            "operands": len(program.operands) * kept_rows * found["width"],
            "raw": (proj > 0) * kept_rows * found["width"],
            "means": means * kept_rows * size,
            "gates": made.padded * gate_rows * len(cell.preactivations) * size,
            "partials": means * found["panels"] * program.units * batch * size,
            "queues": threads * LINE,
            "thread_space": threads * found["thread_bytes"],
            "memory_end": 0,
        })  # fmt: skip
        assert found["initial"] >= plan.HEADER + 32 * (1 + further)
        assert total == made.forward_task(steps, batch, taped, chunk, threads, tangents).nbytes
    task = made.backward_task(steps, batch, rows, chunk, threads, tangents)
    found = fields(task)
    both = found["moved_shift"] if tangents else 0
    ranges(found, {
        "carried": batch * found["output_width"],
        "d_raw": batch * found["width"],
        "d_states": further * batch * found["width"],
        "d_initial": batch * found["output_width"],
        "d_initial_states": further * batch * found["width"],
        "d_learned": len(cell.weights) * found["width"],
        "products_of_late": len(cell.late) * batch * found["width"],
        "d_partials": 0,
        "d": batch * chunk * len(cell.preactivations) * found["width"],
        "d_outputs": (proj > 0) * batch * chunk * found["output_width"] + both,
        "d_queues": 2 * threads * LINE,
        "d_thread_space": threads * found["thread_bytes"],
        "scratch_end": 0,
    })  # fmt: skip
    assert found["scratch_end"] == task.nbytes
    assert found["d_row"] > len(cell.preactivations) * found["width"]
    if tangents:  # all gradients once more, behind these
        assert found["d_queues"] >= found["carried"] + 2 * found["moved_shift"]


def test_the_space_of_a_thread_does_not_overlap() -> None:
    made = plan.layer(late_and_means, np.dtype(np.float64), 6, 33, 33, False, 1)
    batch, chunk, vector, row = 7, 3, LANES * 8, 7 * 8
    found = fields(made.forward_task(4, batch, 20, chunk, 2, True))
    ranges(found, {
        "at_inputs": batch * chunk * 8 * 5,  # and of values: x, the recurrent product and two late gates
        "at_entering": row, "at_leaving": row, "at_projected": row, "at_offsets": row,
        "at_operands": 3 * row, "at_p_entering": row, "at_means": 2 * row,
        "at_scratch": made.program.registers.rows(4) * 4 * vector, "thread_bytes": 0,
    })  # fmt: skip
    assert found["at_inputs"] >= 8 * OWN.words
    assert found["at_more_inputs"] == found["at_inputs"] + batch * chunk * 8
    found = fields(made.backward_task(4, batch, 20, chunk, 2))
    tables = batch * chunk * 8
    ranges(found, {
        "at_first": tables, "at_second": tables, "at_third": tables,
        "at_values": batch * chunk * 4 * vector, "thread_bytes": 0,
    })  # fmt: skip


# --- Tables of addresses ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_python")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("taped", [0, 1])
def test_addresses_of_rows(reverse: bool, taped: int) -> None:
    """Of arrays with any strides; from the output of the step before, or the initial one; of other states."""
    y = np.zeros((4, 6, 9)).swapaxes(0, 1)[..., 2:5]  # (6, 4, 3)
    lengths = np.array([2, 6, 1, 4])
    reset = np.random.default_rng(1).random((6, 4)) < 0.5
    start, width, output_width, plane = 1 << 20, 128, 64, 1 << 12
    found = sequences(
        6, 4, lengths, reset, reverse, taped=taped, ring=2, initial=start, output_width=output_width,
        y=y.ctypes.data, y_time=y.strides[0], y_row=y.strides[1], tangents=0, width=width, operand=2,
        states=1 << 30, states_plane=plane,
    )  # fmt: skip
    table = np.full(30, -1)
    memory.note_rows(found, y.ctypes.data, y.strides[0], y.strides[1], 1, 5, table.ctypes.data)
    expected = [
        y[memory.time_of(found, step, row) :, found.sequence[row] :].ctypes.data
        for step in range(1, 5)
        for row in range((lengths > step).sum())
    ]
    assert np.array_equal(table, expected + [-1] * (30 - len(expected)))
    before = 4  # rows of states: first the initial ones, then those of the last step, or of all steps
    for step in range(6):
        active = int((lengths > step).sum())
        entering, offsets, operands = np.full((3, 4), -1)
        own = SimpleNamespace(entering=entering.ctypes.data, offsets=offsets.ctypes.data)
        memory.note_entering(found, own, step, active)
        memory.note_operands(found, own, active, own.entering, 0, operands.ctypes.data)
        for row in range(active):
            if memory.starts_anew(found, step, row):
                assert entering[row] == start + row * output_width
                assert offsets[row] == row * width
            else:
                time = memory.time_of(found, step - 1, row)
                assert entering[row] == y[time:, found.sequence[row] :].ctypes.data
                assert offsets[row] == (before + row) * width
            assert operands[row] == found.states + plane + offsets[row]
        found.operand = 0
        memory.note_operands(found, own, active, own.entering, 0, operands.ctypes.data)
        found.operand = 2
        assert np.array_equal(operands, entering)
        assert (entering[active:] == -1).all()
        assert (offsets[active:] == -1).all()
        here = int((lengths[:, None] > np.arange(step)).sum()) if taped else step % 2 * 4
        assert memory.first_row(found, step) == here
        before = 4 + here


@pytest.mark.usefixtures("in_python")
@pytest.mark.parametrize("primal", [False, True], ids=["own", "values"])
def test_addresses_of_what_late_gates_multiplied(primal: bool) -> None:
    """The output of a step, one of the other states after it, or what was stored for the gate alone."""
    y, p_y = np.zeros((2, 5, 3, 7))
    found = sequences(
        5, 3, np.array([5, 2, 4]), taped=1, y=y.ctypes.data, y_time=y.strides[0], y_row=y.strides[1],
        p_y=p_y.ctypes.data, p_y_time=p_y.strides[0], p_y_row=p_y.strides[1], shift=1 << 40, width=128,
        states=1 << 20, states_plane=1 << 12, operands=1 << 25, operands_plane=1 << 14,
    )  # fmt: skip
    rows, shift = [3, 3, 2, 2, 1], (1 << 40) * primal
    first, count = rows[0] + rows[1], rows[2] + rows[3]
    for source, place in ((OUTPUT, 0), (STATE, 1), (OPERAND, 2)):
        table = np.full(count + 1, -1)
        memory.note_late_operands(found, 2, 4, source, place, primal, table.ctypes.data)
        expected = [(1 << 20) + (1 << 12) + (3 + first + n) * 128 + shift for n in range(count)]
        if source == OPERAND:
            expected = [(1 << 25) + 2 * (1 << 14) + (first + n) * 128 + shift for n in range(count)]
        if source == OUTPUT:
            array = p_y if primal else y
            expected = [array[t, b:].ctypes.data for t in (2, 3) for b in (0, 2)]
        assert table.tolist() == [*expected, -1]


# --- Numbers ----------------------------------------------------------------------------------------------


def test_states_are_kept_in_padded_rows() -> None:
    """In the order of the rows; what lies between the rows is not touched."""
    put, get = entry(memory.set_rows, 5), entry(memory.get_rows, 5)
    order = np.array([1, 3, 0, 2])
    words = task(batch=4, order=order)
    state = np.random.default_rng(1).normal(size=(4, 7))
    rows = np.full((4, 8), -1.0)
    put(words, state[:, 1:], state.strides[0], 5, rows, rows.strides[0])
    assert np.array_equal(rows[:, :5], state[order, 1:6])
    assert (rows[:, 5:] == -1).all()
    back = np.full((4, 10), np.nan)
    get(words, rows, rows.strides[0], back[:, 2:], back.strides[0], 5)
    assert np.array_equal(back[:, 2:7], state[:, 1:6])
    assert np.isnan(back[:, [0, 1, 7, 8, 9]]).all()


def test_zeros() -> None:
    fill = entry(part(lambda task, start, end: memory.fill_zero(task.registers, start, end)), 2)
    pad = entry(memory.zero_padding, 4)
    numbers = np.ones(5 * LANES)
    fill(task(), numbers[LANES:], numbers[3 * LANES :])
    places = np.arange(numbers.size)
    assert np.array_equal(numbers == 0, (places >= LANES) & (places < 3 * LANES))
    for lengths in (None, np.array([2, 4, 1])):
        order = plan.sequences(4, 3, lengths)
        array = np.full((4, 3, 6), np.nan)
        first = order.first if order.first.size else 0
        words = task(steps=4, batch=3, order=order.order, lengths=order.lengths, first=first)
        pad(words, array[..., 1:], array.strides[0], array.strides[1], 2)
        past = np.zeros((4, 3), bool) if lengths is None else np.arange(4)[:, None] >= lengths
        assert np.isnan(array[~past]).all()
        assert (array[past][:, 1:3] == 0).all()
        assert np.isnan(array[..., [0, 3, 4, 5]]).all()


def test_means_are_of_all_vectors() -> None:
    """Of the second and the third of four; a mean has whole vectors of rows, whatever the batch."""
    take, hidden, row = entry(memory.take_means, 5), 4 * LANES + 5, 2 * LANES
    partials = np.random.default_rng(1).normal(size=(4, 8, row))
    partials[:, 5:] = np.nan  # vectors beyond the hidden units
    target = np.full((4, row), np.nan)
    words = task(hidden=hidden, mean_row=row * 8, means_plane=row * 8, partials_plane=partials[0].nbytes)
    take(words, partials, 1, 2, np.full(2, -1), target)
    np.testing.assert_allclose(target[1:3], partials[1:3, :5].sum(1) / hidden, rtol=1e-14)
    assert np.isnan(target[[0, 3]]).all()


@pytest.mark.parametrize("hidden", [1, LANES - 1, LANES, 4 * LANES + 1])
def test_variances_are_of_all_vectors(hidden: int) -> None:
    """Also where the mean is large, and two variances are of one mean."""
    take, row = entry(memory.take_means, 5), LANES
    values = np.random.default_rng(1).normal(1e6, 1, (hidden, row))
    cuts = np.split(values, range(LANES, hidden, LANES))
    sums = [cut.sum(0) for cut in cuts]
    squares = [((cut - cut.mean(0)) ** 2).sum(0) for cut in cuts]
    partials, target = np.array([sums, sums, squares, squares]), np.full((4, row), np.nan)
    words = task(hidden=hidden, mean_row=row * 8, means_plane=row * 8, partials_plane=partials[0].nbytes)
    take(words, partials, 1, 3, np.array([-1, 1, 1]), target)
    np.testing.assert_allclose(target[1], values.mean(0), rtol=1e-15)
    np.testing.assert_allclose(target[2], values.var(0), rtol=1e-9, atol=1e-12)
    assert np.array_equal(target[2], target[3])


def test_a_line_begins_in_an_array() -> None:
    begin = njit(lambda array: aligned(array))
    for shift in range(LINE):
        array = np.zeros(3 * LINE, np.uint8)[shift:]
        assert begin(array) % LINE == 0
        assert 0 <= begin(array) - array.ctypes.data < LINE
