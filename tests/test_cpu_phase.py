"""Phases on SIMD vectors in memory, against their code over NumPy arrays: where what is read and written."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from checks import (
    five_gates,
    independent,
    late_and_means,
    late_of_output,
    name,
    normalized_lstm,
    other_operand,
    three_states,
    unused_state,
)
from numba import types
from tasks import GUARD, c_entry, own, task

import fusedlstm.math
from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.derive import compile_source
from fusedlstm.kernels.cpu import phase
from fusedlstm.kernels.cpu.program import Program
from fusedlstm.kernels.cpu.records import OWN, PHASE, TASK
from fusedlstm.math import DERIVATIVES
from fusedlstm.step import Phase, Value

CASES = [  # cell, projected
    (cells.gru, False),
    (three_states, False),
    (three_states, True),
    (five_gates, False),
    (other_operand, False),
    (unused_state, False),
    (cells.gru_reset_before, False),
    (late_of_output, False),
    (normalized_lstm, True),
    (late_and_means, False),
    (independent, False),
]
SCALAR = types.float64
ROWS, PANELS = 4, 3
FIRST, LAST = 1, 3  # the rows, and
LOW, HIGH = 1, 3  # the panels that are computed
MOST = 24  # of means, and of what is kept


@cache
def program(cell: Cell, projected: bool) -> Program:
    return Program(cell, SCALAR, projected)


def compiled(code: str) -> Any:
    """The code of a phase over NumPy arrays."""
    functions = {name: getattr(fusedlstm.math, name) for name in DERIVATIVES}
    functions |= {"full_like": np.full_like, "vector_mean": vector_mean}
    return compile_source(code, functions, "phase").phase


def vector_mean(x: np.ndarray, lanes: int) -> np.ndarray:
    """Over the units of each vector, of which the last may have fewer, (ROWS, H)."""
    cuts = np.arange(0, x.shape[1], lanes)
    counts = np.diff([*cuts, x.shape[1]])
    return np.repeat(np.add.reduceat(x, cuts, 1) / counts, counts, 1)


class Memory:
    """What the phases of a pass work on: one piece of memory, NaN but for blocks of random numbers in it.

    Attributes:
        blocks: the places of the numbers of each, by the name of the record's entry that has its address.
        reads, writes: the places of a value, (ROWS, units); some units more where whole vectors are written.
    """

    def __init__(self, made: Program, hidden: int) -> None:
        self.made, self.cell, self.hidden, self.padded = made, made.cell, hidden, PANELS * made.panel
        self.random = np.random.default_rng(hidden)
        self.memory = np.full(GUARD, np.nan)
        self.blocks: dict[str, np.ndarray] = {}
        self.reads: dict[Value, np.ndarray] = {}
        self.writes: dict[Value, np.ndarray] = {}
        cell, slots, further = self.cell, len(self.cell.preactivations), len(self.cell.states) - 1
        gates = self.add("gates", PANELS, ROWS, slots, made.panel)
        states = self.add("states", further, ROWS + 2, self.padded)
        vectors = self.add("vectors", len(cell.weights), self.padded)
        kept, vectors_of_a_row = self.add("kept", MOST, ROWS, self.padded), PANELS * made.units
        partials = self.add("partials", MOST, vectors_of_a_row, ROWS)
        means, taped = self.add("means", MOST, ROWS), self.add("taped_means", MOST, ROWS)
        # rows of outputs lie anywhere, and end with the last unit
        output = self.add("outputs", ROWS, hidden)[self.random.permutation(ROWS)]
        self.leaving = self.add("leaving outputs", ROWS, hidden)[self.random.permutation(ROWS)]
        order = self.random.permutation(ROWS + 2)[:ROWS]
        self.tables = {
            "entering": self.addresses(output[:, 0]),
            "leaving": self.addresses(self.leaving[:, 0]),
            "offsets": order * np.int64(8 * self.padded),
        }
        for n, slot in enumerate(cell.preactivations):
            self.reads[Value("given", slot)] = gates[:, :, n].swapaxes(0, 1).reshape(ROWS, -1)
        for n, state in enumerate(cell.states):
            self.reads[Value("given", state)] = states[n - 1][order] if n else output
        for n, vector in enumerate(cell.weights):
            self.reads[Value("given", vector)] = np.tile(vectors[n], (ROWS, 1))
        for n in range(MOST):
            self.reads[Value("kept", n)] = self.writes[Value("kept", n)] = kept[n]
            self.reads[Value("mean", n)] = np.tile(means[n][:, None], self.padded)
            self.reads[Value("tape", n)] = np.tile(taped[n][:, None], self.padded)
            self.writes[Value("sum", n)] = partials[n].T

    def add(self, name: str, *shape: int) -> np.ndarray:
        """The places of a block."""
        count = int(np.prod(shape))
        places = self.memory.size + np.arange(count).reshape(shape)
        numbers = self.random.uniform(0.1, 0.9, count)
        self.memory = np.concatenate([self.memory, numbers, np.full(GUARD, np.nan)])
        self.blocks[name] = places
        return places

    def addresses(self, places: np.ndarray) -> np.ndarray:
        """Not yet of the memory, which still grows: relative to its beginning."""
        return places * np.int64(8)

    def records(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the pass and of the thread; and what they name."""
        row, slots, start = self.padded * 8, len(self.cell.preactivations), self.memory.ctypes.data
        self.tables |= {name: self.tables[name] + start for name in ("entering", "leaving")}
        sizes = {
            "hidden": self.hidden, "width": row, "gates_row": slots * self.made.panel * 8,
            "gates_panel": ROWS * slots * self.made.panel * 8, "states_plane": (ROWS + 2) * row,
            "operands_plane": ROWS * row, "kept_plane": ROWS * row, "means_plane": ROWS * 8,
            "taped_means_plane": ROWS * 8, "mean_row": ROWS * 8,
            "partials_plane": PANELS * self.made.units * ROWS * 8,
            "d_row": slots * row, "carried_row": row,
        }  # fmt: skip
        blocks = {
            name: start + 8 * int(places.flat[0]) for name, places in self.blocks.items() if places.size
        }
        values = sizes | blocks | self.tables
        return (
            task(**{name: value for name, value in values.items() if name in TASK}),
            own(**{name: value for name, value in values.items() if name in OWN.fields}),
        )

    def read(self, value: Value) -> Any:
        if value.role == "lanes":
            return self.made.registers.lanes
        return self.memory[self.reads[value][:, : self.hidden]]

    def expected(self, cut: Phase) -> list[np.ndarray]:
        """What a phase stores, (ROWS, H)."""
        stored = compiled(cut.code)(*map(self.read, cut.takes))
        return [np.broadcast_to(array, (ROWS, self.hidden)) for array in stored]

    def run(self, cut: Phase, address: int) -> None:
        """Call a phase for some rows and panels; all it should write is right, and it writes nothing else."""
        expected, before = dict(zip(cut.stores, self.expected(cut))), self.memory.copy()
        words = self.records()
        c_entry(address)(*words, LOW, HIGH, FIRST, LAST)
        changed = self.memory.copy()
        for value, array in expected.items():
            places = self.check(value, array, before)
            changed[places] = before[places]
        for places in self.more():
            changed[places] = before[places]
        assert np.array_equal(changed, before, equal_nan=True)

    def columns(self, end: int) -> slice:
        return slice(LOW * self.made.panel, min(HIGH * self.made.panel, end))

    def check(self, value: Value, array: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Compare what a phase has written; all places that it may write."""
        places = self.writes[value]
        if value.role == "sum":
            units = self.made.units
            vectors = slice(LOW * units, min(HIGH * units, -(-self.hidden // self.made.registers.lanes)))
            cuts = np.arange(0, self.hidden, self.made.registers.lanes)
            sums = np.add.reduceat(array[FIRST:LAST], cuts, 1)[:, vectors]
            close(self.memory[places[FIRST:LAST, vectors]], sums)
            return places[FIRST:LAST, vectors]
        here = self.columns(self.hidden)
        close(self.memory[places[FIRST:LAST, here]], array[FIRST:LAST, here])
        lanes = self.made.registers.lanes  # whole vectors are written where rows are padded
        return places[FIRST:LAST, self.columns(-(-self.hidden // lanes) * lanes)]

    def more(self) -> list[np.ndarray]:
        """Places that the phase has to write, whatever it stores; compared here."""
        return []


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-14)  # sums may cancel


class StepMemory(Memory):
    """Of a step."""

    def __init__(self, made: Program, hidden: int) -> None:
        super().__init__(made, hidden)
        output, *states = made.cell.states
        here = self.add("here", len(states), ROWS + 2, self.padded)
        operands = self.add("operand_rows", len(made.operands), ROWS, self.padded)
        self.writes[Value("result", output)] = self.leaving
        self.writes |= {Value("result", name): here[n, :ROWS] for n, name in enumerate(states)}
        self.writes |= {Value("operand", gate): operands[n] for n, gate in enumerate(made.operands)}
        self.reads |= {value: places for value, places in self.writes.items() if value.role != "sum"}
        self.reads |= {Value("product", gate): self.reads[Value("given", gate)] for gate in made.cell.late}


class AdjointMemory(Memory):
    """Of an adjoint: the gradients of states stand where those of new states stood."""

    def __init__(self, made: Program, hidden: int) -> None:
        super().__init__(made, hidden)
        cell, slots = made.cell, len(made.cell.preactivations)
        carried, d_states = (
            self.add("carried", ROWS, self.padded),
            self.add("d_states", MOST, ROWS, self.padded),
        )
        d = self.d = self.add("d", ROWS, slots, self.padded)
        learned = self.add("d_learned", len(cell.weights), self.padded)
        products = self.add("products_of_late", len(cell.late), ROWS, self.padded)
        self.further = [carried, *d_states]
        for n, (state, seed) in enumerate(zip(cell.states, cell.seeds)):
            self.reads[Value("given", seed)] = self.writes[Value("result", state)] = self.further[n]
        for n, slot in enumerate(cell.preactivations):
            self.reads[Value("result", slot)] = self.writes[Value("result", slot)] = d[:, n]
        for n, vector in enumerate(cell.weights):
            self.writes[Value("result", vector)] = np.tile(learned[n], (ROWS, 1))
        for n, gate in enumerate(cell.late):
            self.reads[Value("product", gate)] = products[n]

    def read(self, value: Value) -> np.ndarray:
        found = super().read(value)
        if value == Value("given", self.cell.seeds[0]) and not self.made.projected:
            found = found + self.memory[self.leaving]  # the gradient of the output of this step
        return found

    def check(self, value: Value, array: np.ndarray, before: np.ndarray) -> np.ndarray:
        if value.role == "result" and value.name in self.cell.weights:  # is added up
            places = self.writes[value][0]
            here = self.columns(self.hidden)
            close(self.memory[places[here]], before[places[here]] + array[FIRST:LAST, here].sum(0))
            return places[self.columns(self.padded)]
        places = super().check(value, array, before)
        if value.role == "result":  # lanes beyond the end are zero, whatever they were
            beyond = self.writes[value][FIRST:LAST, self.hidden : self.columns(self.padded).stop]
            slot = value.name in self.cell.preactivations
            lanes = self.made.registers.lanes
            most = beyond.shape[1] if slot else -self.hidden % lanes
            assert not self.memory[beyond[:, :most]].any()
            return self.writes[value][FIRST:LAST, self.columns(self.padded)] if slot else places
        return places


class LastMemory(AdjointMemory):
    """Of the last phase of an adjoint, which also clears the gradients of states that are not read."""

    def more(self) -> list[np.ndarray]:
        cell, found = self.cell, []
        for n, state in enumerate(cell.states):
            if state not in cell.arguments and (state != cell.recurrent or not cell.recurrent_gates):
                lanes = self.made.registers.lanes
                places = self.further[n][FIRST:LAST, self.columns(-(-self.hidden // lanes) * lanes)]
                assert not self.memory[places].any()
                found.append(places)
        return found


def sizes(made: Program) -> list[int]:
    """Hidden units that end in the last panel: after one lane, within a vector, with one, with the panel."""
    panel, lanes = made.panel, made.registers.lanes
    return sorted({2 * panel + 1, 2 * panel + lanes - 1, 2 * panel + lanes, 3 * panel - 1, 3 * panel})


@pytest.mark.parametrize(("cell", "projected"), CASES, ids=name)
def test_phases_of_a_step(cell: Cell, projected: bool) -> None:
    made = program(cell, projected)
    assert len(made.phase_table) == len(made.steps)
    for hidden in sizes(made):
        for cut, row in zip(made.steps, made.phase_table):
            StepMemory(made, hidden).run(cut, int(row[PHASE.fields["address"]]))


@pytest.mark.parametrize(("cell", "projected"), CASES, ids=name)
def test_phases_of_an_adjoint(cell: Cell, projected: bool) -> None:
    """Lanes beyond the end of a row become zero, whatever they were; only learned vectors add up."""
    made = program(cell, projected)
    for hidden in sizes(made):
        for cut, row in zip(made.adjoints, made.adjoint_table):
            kind = LastMemory if cut is made.adjoints[-1] else AdjointMemory
            kind(made, hidden).run(cut, int(row[PHASE.fields["address"]]))


def test_the_generated_module_can_be_read() -> None:
    """It is one text, shown in tracebacks, that Python runs."""
    made = program(cells.peephole_lstm, False)
    texts = {}
    for projected in (False, True):
        places = phase.adjoint_places(made.cell, made.adjoints, projected)
        texts[projected] = phase.source(made.adjoints[0], places, made.registers, made.units)
        compile(texts[projected], "peephole_lstm", "exec")
    functions = [line.split("(")[0] for line in texts[False].splitlines() if line.startswith("def ")]
    assert functions == ["def phase", "def body"]
    assert "leaving" in texts[False]  # what is before a projection has no gradient of its own
    assert "leaving" not in texts[True]


def test_equal_phases_are_compiled_once() -> None:
    """Of a cell with a projection only the last phase of the adjoint differs, and where seeds are read."""
    plain, projected = program(three_states, False), Program(three_states, SCALAR, True)
    assert np.array_equal(plain.phase_table, projected.phase_table)
    assert not np.array_equal(plain.adjoint_table, projected.adjoint_table)
