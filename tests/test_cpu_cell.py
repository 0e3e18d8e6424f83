"""A cell's step and adjoint on one vector in memory, against the cell's functions over NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checks import five_gates, name, other_operand, three_states, unused_state
from numba import njit, types

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels.cpu import cell as cpu_cell
from fusedlstm.kernels.cpu.cell import UPDATE, UPDATE_ADJOINT, update, update_adjoint
from fusedlstm.kernels.cpu.spec import Spec

CASES = [  # cell, projected
    (cells.gru, False),
    (three_states, False),
    (three_states, True),
    (five_gates, False),
    (other_operand, False),
    (unused_state, False),
]
SCALAR, DTYPE = types.float64, np.float64
GUARD = 3  # numbers after each row, NaN
SKIPPED = 2  # vectors before the one in question


def _entry(function: Any, spec: Spec, count: int) -> Any:
    signature = (spec, *[types.int64] * count)
    names = [f"a{n}" for n in range(count)]
    scope = {"function": function}
    exec(f"def run(spec, {', '.join(names)}):\n    function(spec, {', '.join(names)})", scope)
    compiled = njit(scope["run"])
    compiled.compile(signature)
    return compiled.overloads[signature].entry_point


class Memory:
    """Rows of random numbers, ending in NaN; of `valid` numbers, or of whole vectors."""

    def __init__(self, spec: Spec, valid: int) -> None:
        self.spec, self.valid = spec, valid
        self.generator = np.random.default_rng(valid)
        self.offset = SKIPPED * spec.lanes

    def rows(self, count: int, ends: bool = False) -> np.ndarray:
        """(count, numbers); if `ends`, there is nothing after the valid numbers."""
        made = np.full((count, self.offset + self.spec.lanes + GUARD), np.nan)
        valid = self.offset + (self.valid if ends else self.spec.lanes)
        made[:, :valid] = self.generator.uniform(0.1, 0.9, (count, valid))
        return made

    def gates(self, count: int) -> np.ndarray:
        return self.generator.uniform(-0.9, 0.9, (count, self.spec.lanes))

    def here(self, rows: np.ndarray) -> np.ndarray:
        """The valid numbers of the vector in question."""
        return rows[..., self.offset : self.offset + self.valid]


def same_but(rows: np.ndarray, before: np.ndarray, memory: Memory, count: int) -> None:
    """Nothing but `count` numbers of the vector in question was written."""
    changed = rows.copy()
    changed[:, memory.offset : memory.offset + count] = before[:, memory.offset : memory.offset + count]
    assert np.array_equal(changed, before, equal_nan=True)


def given(cell: Cell, memory: Memory, gates: Any, entering: Any, states: Any, vectors: Any) -> dict[str, Any]:
    """The arguments of the cell's functions."""
    values = dict(zip(cell.preactivations, gates[:, : memory.valid]))
    values[cell.states[0]] = memory.here(entering)[0]
    values |= dict(zip(cell.states[1:], memory.here(states)))
    values |= dict(zip(cell.weights, memory.here(vectors)))
    return {name: values[name] for name in cell.arguments}


@pytest.mark.parametrize(("cell", "projected"), CASES, ids=name)
def test_update(cell: Cell, projected: bool) -> None:
    spec = Spec(cell, SCALAR, projected)
    entry = _entry(update, spec, len(UPDATE) - 1)
    for valid in (1, spec.lanes - 1, spec.lanes, spec.lanes + 5):
        m = Memory(spec, min(valid, spec.lanes))
        gates, entering = m.gates(spec.inputs), m.rows(1, ends=True)
        states, new, vectors = m.rows(spec.further), m.rows(spec.further), m.rows(spec.learned)
        output = m.rows(1)
        before, new_before = output.copy(), new.copy()
        entry(
            0, gates.ctypes.data, gates.strides[0], entering.ctypes.data, states.ctypes.data,
            states.strides[0], new.ctypes.data, new.strides[0], output.ctypes.data, vectors.ctypes.data,
            vectors.strides[0], m.offset * spec.size, valid,
        )  # fmt: skip
        expected = cell.numpy.step(**given(cell, m, gates, entering, states, vectors))
        for actual, value in zip([m.here(output)[0], *m.here(new)], expected):
            np.testing.assert_allclose(actual, value, rtol=1e-14, atol=1e-15)  # sums may cancel
        same_but(output, before, m, m.valid)
        same_but(new, new_before, m, spec.lanes)


@pytest.mark.parametrize(("cell", "projected"), CASES, ids=name)
def test_update_adjoint(cell: Cell, projected: bool) -> None:
    """Lanes beyond the end of a row become zero, whatever they were; only learned vectors add up."""
    spec = Spec(cell, SCALAR, projected)
    entry = _entry(update_adjoint, spec, len(UPDATE_ADJOINT) - 1)
    for valid in (1, spec.lanes - 1, spec.lanes, spec.lanes + 5):
        m = Memory(spec, min(valid, spec.lanes))
        gates, entering, doutput = m.gates(spec.inputs), m.rows(1, ends=True), m.rows(1, ends=True)
        gates[:, m.valid :] = np.nan
        states, vectors, carried = m.rows(spec.further), m.rows(spec.learned), m.rows(1)
        dstates, dvectors = m.rows(spec.further), m.rows(spec.learned)
        from_input, from_output = (np.full((spec.gates, spec.lanes), np.nan) for _ in range(2))
        before = [part.copy() for part in (carried, dstates, dvectors)]
        entry(
            0, gates.ctypes.data, gates.strides[0], entering.ctypes.data, states.ctypes.data,
            states.strides[0], doutput.ctypes.data, carried.ctypes.data, dstates.ctypes.data,
            dstates.strides[0], from_input.ctypes.data, from_output.ctypes.data, vectors.ctypes.data,
            vectors.strides[0], dvectors.ctypes.data, m.offset * spec.size, valid,
        )  # fmt: skip
        seed = m.here(before[0])[0] + (0 if projected else m.here(doutput)[0])
        seeds = dict(zip(cell.seeds, [seed, *m.here(before[1])]))
        values = given(cell, m, gates, entering, states, vectors)
        expected = dict(zip(cell.arguments, cell.numpy.adjoint(**values, **seeds)))

        def close(actual: Any, value: Any) -> None:
            np.testing.assert_allclose(actual, np.broadcast_to(value, actual.shape), rtol=1e-13, atol=1e-15)

        for n, gate in enumerate(cell.input_gates):
            close(from_input[n, : m.valid], expected.get(f"{gate}_x", expected.get(gate)))
            assert not from_input[n, m.valid :].any()
        if cell.split:
            for n, gate in enumerate(cell.recurrent_gates):
                close(from_output[n, : m.valid], expected.get(f"{gate}_h", expected.get(gate)))
                assert not from_output[n, m.valid :].any()
        for n, state in enumerate(cell.states):
            if state in cell.arguments or state != cell.recurrent:  # else the product writes it
                close(m.here(carried)[0] if n == 0 else m.here(dstates)[n - 1], expected.get(state, 0))
        for n, vector in enumerate(cell.weights):
            close(m.here(dvectors)[n], m.here(before[2])[n] + expected[vector])
        for rows, old in zip((carried, dstates, dvectors), before):
            same_but(rows, old, m, spec.lanes)


def test_the_generated_module_can_be_read() -> None:
    """It is one text, shown in tracebacks, that Python runs."""
    text = cpu_cell.source(cells.peephole_lstm, projected=False)
    compile(text, "peephole_lstm", "exec")
    assert [line.split("(")[0] for line in text.splitlines() if line.startswith("def ")] == [
        "def step", "def adjoint", "def update", "def update_adjoint",
    ]  # fmt: skip
    assert "doutput + offset" in text
    assert "doutput + offset" not in cpu_cell.source(cells.lstm, projected=True)


@pytest.mark.parametrize("function", [update, update_adjoint])
def test_python_cannot_call_it(function: Any) -> None:
    with pytest.raises(NotImplementedError, match="compiled code"):
        function()
