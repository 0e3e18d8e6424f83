"""Where kernels keep what: parts of memory, and which rows run when, against the reference's schedule."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from checks import other_operand, three_states
from hypothesis import given
from numba import njit, types

from fusedlstm import cells
from fusedlstm.kernels.cpu import engine, memory, plan
from fusedlstm.kernels.cpu.memory import Layout, Sequences, layout, rows_before, starts_anew, time_of
from fusedlstm.kernels.cpu.spec import Registers, Spec
from fusedlstm.kernels.cpu.team import LINE
from fusedlstm.kernels.reference import schedule

SEQUENCES = types.NamedTuple(engine.SEQUENCES, Sequences)
CUBE, MATRIX = types.Array(types.float64, 3, "A"), types.Array(types.float64, 2, "A")


def sequences(steps: int, batch: int, lengths: Any = None, reset: Any = None, reverse: bool = False) -> Any:
    order = plan.sequences(steps, batch, lengths)
    return Sequences(*order, engine.NO_RESET if reset is None else reset, reverse)


def _entry(function: Any, *signature: Any) -> Any:
    compiled = njit(function)
    compiled.compile(signature)
    return compiled.overloads[signature].entry_point


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_round_up(multiple: int) -> None:
    for n in range(200):
        assert memory.round_up(n, multiple) == -(-n // multiple) * multiple


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
        for row in range(rows_before(found, step + 1) - rows_before(found, step)):
            time, sequence = time_of(found, step, row), found.order[row]
            times[sequence].append(time)
            assert starts_anew(found, step, row) == (step == 0 or boundary[time, sequence])
    assert times == [[t for t in order if active[t, b]] for b in range(batch)]
    assert rows_before(found, steps) == active.sum()


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, three_states], ids=lambda cell: cell.name)
@pytest.mark.parametrize("projected", [False, True])
def test_parts_of_memory_follow_each_other(cell: Any, projected: bool) -> None:
    spec = Spec(cell, types.float32, projected)
    hidden, outputs, batch, rows, gate_rows = 33, 7 if projected else 33, 5, 11, 20
    parts = layout(spec, hidden, outputs, batch, rows, gate_rows)
    assert isinstance(parts, Layout)
    assert parts.width % (spec.panel * spec.size) == 0
    assert 0 <= parts.width - hidden * spec.size < spec.panel * spec.size
    assert 0 <= parts.output_width - outputs * spec.size < spec.panel * spec.size
    panels = -(-hidden // spec.panel)
    sizes = [
        batch * parts.output_width,
        spec.further * batch * parts.width,
        spec.further * rows * parts.width,
        projected * rows * parts.width,
        panels * gate_rows * spec.inputs * spec.panel * spec.size,
    ]
    assert [parts[0], *np.cumsum(sizes)] == [0, *parts[1:6]]


def test_tables_do_not_overlap() -> None:
    spec, other = Spec(cells.lstm, types.float64, True), Spec(other_operand, types.float64, False)
    for chunk_rows, batch in ((0, 3), (40, 7)):
        table = memory.tables(spec, 1000 * LINE, chunk_rows, batch)
        assert table.inputs == 1000 * LINE
        assert table.entering == table.inputs + 8 * chunk_rows
        starts = [table.entering, table.leaving, table.raw, table.states, table.strides]
        assert np.array_equal(np.diff(starts), [8 * batch] * 4)
        assert table.operands == table.entering
        assert memory.tables(other, table.inputs, chunk_rows, batch).operands == table.strides + 8 * batch
        assert table.scratch >= table.strides + 2 * 8 * batch
        assert table.scratch % LINE == 0
        tile = memory.plane_rows(spec) * memory.PLANES * spec.lanes * spec.size
        assert table.end - table.scratch >= tile
        assert table.end % LINE == 0


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_addresses_of_rows(reverse: bool) -> None:
    """Of arrays with any strides; from the output of the step before, or the initial one."""
    spec = Spec(cells.lstm, types.float64, False)
    parts = layout(spec, 5, 3, 4, 4, 4)
    kind = types.NamedUniTuple(types.int64, len(parts), Layout)
    note = _entry(
        lambda array, start, end, sequences, table: memory.note_rows(array, start, end, sequences, table),
        CUBE, types.int64, types.int64, SEQUENCES, types.int64,
    )  # fmt: skip
    enter = _entry(
        lambda step, active, y, sequences, start, parts, table: memory.note_entering(
            step, active, y, sequences, start, parts, table
        ),
        types.int64, types.int64, CUBE, SEQUENCES, types.int64, kind, types.int64,
    )  # fmt: skip
    y = np.zeros((4, 6, 9)).swapaxes(0, 1)[..., 2:5]  # (6, 4, 3)
    lengths = np.array([2, 6, 1, 4])
    reset = np.random.default_rng(1).random((6, 4)) < 0.5
    found = sequences(6, 4, lengths, reset, reverse)
    table = np.full(30, -1)
    note(y, 1, 5, found, table.ctypes.data)
    expected = [
        y[time_of(found, step, row) :, found.order[row] :].ctypes.data
        for step in range(1, 5)
        for row in range((lengths > step).sum())
    ]
    assert np.array_equal(table, expected + [-1] * (30 - len(expected)))
    for step in range(6):
        active, start = int((lengths > step).sum()), 1 << 20
        table = np.full(4, -1)
        enter(step, active, y, found, start, parts, table.ctypes.data)
        for row in range(active):
            if starts_anew(found, step, row):
                assert table[row] == start + row * parts.output_width
            else:
                time = time_of(found, step - 1, row)
                assert table[row] == y[time:, found.order[row] :].ctypes.data
        assert (table[active:] == -1).all()


def test_states_are_kept_in_padded_rows() -> None:
    """In the order of the rows; what lies between the rows is not touched."""
    registers = Registers(types.float64)
    common = (registers, MATRIX, SEQUENCES)
    put = _entry(
        lambda spec, source, sequences, target, width: memory.set_rows(
            spec, source, sequences, target, width
        ),
        *common, types.int64, types.int64,
    )  # fmt: skip
    get = _entry(
        lambda spec, source, sequences, target, width: memory.get_rows(
            spec, source, sequences, target, width
        ),
        registers, types.int64, SEQUENCES, MATRIX, types.int64,
    )  # fmt: skip
    found = sequences(9, 4, np.array([2, 9, 1, 9]))
    state = np.random.default_rng(1).normal(size=(5, 8)).T[::2]  # (4, 5)
    rows = np.full((4, 8), -1.0)
    put(None, state, found, rows.ctypes.data, rows.strides[0])
    assert np.array_equal(rows[:, :5], state[[1, 3, 0, 2]])
    assert (rows[:, 5:] == -1).all()
    back = np.full((4, 10), np.nan)[:, ::2]
    get(None, rows.ctypes.data, found, back, rows.strides[0])
    assert np.array_equal(back, state)


def test_zeros() -> None:
    registers = Registers(types.float64)
    fill = _entry(
        lambda spec, start, end: memory.fill_zero(spec, start, end), registers, types.int64, types.int64
    )
    pad = _entry(lambda array, sequences: memory.zero_padding(array, sequences), CUBE, SEQUENCES)
    numbers = np.ones(5 * registers.lanes)
    start, end = registers.lanes, 3 * registers.lanes
    fill(None, numbers[start:].ctypes.data, numbers[end:].ctypes.data)
    assert np.array_equal(numbers == 0, (np.arange(numbers.size) >= start) & (np.arange(numbers.size) < end))
    for lengths in (None, np.array([2, 4, 1])):
        array = np.full((4, 3, 6), np.nan)
        pad(array[..., 1:3], sequences(4, 3, lengths))
        past = np.zeros((4, 3), bool) if lengths is None else np.arange(4)[:, None] >= lengths
        assert np.isnan(array[~past]).all()
        assert (array[past][:, 1:3] == 0).all()
        assert np.isnan(array[..., [0, 3, 4, 5]]).all()


def test_a_line_begins_in_an_array() -> None:
    begin = _entry(lambda array: memory.aligned(array), types.uint8[::1])
    for shift in range(LINE):
        array = np.zeros(3 * LINE, np.uint8)[shift:]
        assert begin(array) % LINE == 0
        assert 0 <= begin(array) - array.ctypes.data < LINE
