"""From a cell to what the kernels walk through: its phases compiled, and tables of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.derive import MEAN, MOMENTS, MOVED_TRANSPOSED, PRODUCT, TRANSPOSED, VARIANCE, Expression
from fusedlstm.once import lazy, making, once
from fusedlstm.step import Operator, Phase, Step, Value

from . import phase
from .forward import LATE as LATE_INPUT
from .forward import RECURRENT, X
from .memory import OPERAND, OUTPUT, STATE
from .product import routines
from .records import INPUT, LATE, PHASE
from .records import PRODUCT as PRODUCT_ROW
from .spec import MOST_ROWS, Registers
from .tile import PLANES, tile_table

WIDTH = 4  # vectors that a tile should have at least, to hide the latency of its sums


class Program:
    """A cell on such numbers, with or without a projection, as the kernels run it.

    Attributes:
        cell, scalar, projected, precision: what it is of; the precision is that of products.
        registers: what kernels are compiled for.
        units: vectors of hidden units that a panel holds of each gate.
        panel: hidden units of a panel.
        input_order, recurrent_order, late_order: the places of the gates in the weights, in the order in
            which the products compute them.
        late_slots: the places of the late gates among the pre-activations.
        steps, adjoints: the phases of the step and of its adjoint.
        recurrent_slot: the first place among the pre-activations that the recurrent product computes.
        recurrent_rows: most rows of the tile of that product.
        means: how many there are.
        operands: the late gates whose operands are stored for them alone.
        ring: steps whose states are held if no tape is kept.
    """

    def __init__(self, cell: Cell, scalar: types.Float, projected: bool, precision: str = "float32") -> None:
        self.cell, self.scalar, self.projected, self.precision = cell, scalar, projected, precision
        self.registers = Registers(scalar, precision)
        recurrent, inputs = len(cell.recurrent_gates), len(cell.input_gates)
        self.units = max(1, WIDTH // max(recurrent, -(-inputs // 2)))
        self.panel = self.units * self.registers.lanes
        self.input_order = _places(cell.input_gates, cell.gates_with_input)
        self.recurrent_order = _places(cell.recurrent_gates, cell.gates_with_recurrent)
        self.late_order = _places(cell.late, cell.gates_with_recurrent)
        self.late_slots = np.array([self._slot(gate) for gate in cell.late], np.int64)
        self.recurrent_slot = self._slot(cell.recurrent_gates[0], "h") if recurrent else 0
        self.recurrent_rows = self.registers.rows(recurrent * self.units) if recurrent else MOST_ROWS
        self.steps = cell.step.phases()
        self.adjoints = cell.adjoint.phases(self._taped(), last=cell.states, added=cell.weights)
        self.means = phase.count(self.steps, "sum")
        self.operands = [str(gate) for gate in phase.operands(self.steps)]
        self._kept: list[Any] = []  # C functions and tables, as long as their addresses are in use
        # what all threads read, or a later phase, is not written at the next step in its place
        self.ring = 2 if cell.operand or len(self.steps) > 1 else 1

    def _taped(self) -> dict[Value, Expression]:
        """The means that a forward pass leaves on the tape."""
        return {Value("tape", n): node for n, node in enumerate(self.cell.step.means())}

    @lazy
    def tangents(self) -> tuple[Phase, ...]:
        """The phases of the tangent of the step."""
        with making:  # new expressions go into the graph of the cell
            return self._tangent.phases(self._taped())

    @lazy
    def _tangent(self) -> Step:
        with making:
            return self.cell.step.tangent(self.cell.moved, operands=self.operands)

    @lazy
    def adjoint_tangents(self) -> tuple[Phase, ...]:
        """The phases of the adjoint and its tangent; those gradients of learned vectors that nobody asks for
        are left out."""
        cell = self.cell
        values = [name for name in cell.arguments if name not in cell.weights]
        last = [prefix + name for prefix in ("", cell.moved) for name in cell.states]
        added = [cell.moved + name for name in cell.weights]
        with making:
            means = self._tangent.means(self._taped())
            known = self._taped() | {Value("moved tape", n): node for n, node in enumerate(means)}
            return cell.adjoint.tangent(cell.moved, values).phases(known, last, added)

    def tile(self, gates: int) -> int:
        """The address of the table of a panel's tile for so many gates."""
        return int(tile_table(self.scalar, "panel", gates * self.units, self.precision).ctypes.data)

    def groups(self, depth: int) -> int:
        """How many groups so many neighbours in k make."""
        return int(-(-depth // self.registers.group))

    def weights_bytes(self, width: int, depth: int) -> int:
        """Bytes of the weights of a panel so many vectors wide; of a plane, with width 1."""
        return int(width * (self.groups(depth) * self.registers.column + self.registers.tail))

    @lazy
    def routines(self) -> dict[str, int]:
        """The addresses of what is compiled for a precision only, by their names in a task."""
        kinds = {"planes": ("planes", PLANES), "plane": ("planes", 1)}
        kinds |= {"outer": ("outer", PLANES), "thin_outer": ("outer", 1)}
        tables = {name: tile_table(self.scalar, *kind, self.precision) for name, kind in kinds.items()}
        planes, outer = routines(self.scalar, self.precision)
        found = {f"{name}_tile": int(table.ctypes.data) for name, table in tables.items()}
        return found | {"rows_times_planes": planes.address, "add_outer": outer.address}

    def _slot(self, gate: str, part: str = "x") -> int:
        """The place of a gate, or of one part of a split one, among the pre-activations."""
        name = f"{gate}_{part}" if gate in self.cell.split else gate
        return self.cell.preactivations.index(name)

    @lazy
    def phase_table(self) -> np.ndarray:
        """The phases of a step as records.PHASE."""
        return self._forward_table(self.steps, phase.step_places(self.cell, self.steps), "")

    @lazy
    def tangent_table(self) -> np.ndarray:
        """The phases of the tangent of a step as records.PHASE."""
        places = phase.tangent_places(self.cell, self.tangents, self.operands)
        return self._forward_table(self.tangents, places, "_tangent")

    def _forward_table(self, cuts: tuple[Phase, ...], places: Any, kind: str) -> np.ndarray:
        rows, products, means = [], 0, 0
        for cut, address, here in zip(cuts, self._addresses(cuts, places, kind), self._products(cuts)):
            highest = [self.registers.rows(len(gates) * self.units) for gates, _ in here]
            most = min(highest, default=MOST_ROWS)
            sums = phase.count([cut], "sum")
            rows.append((address, products, len(here), most, means, sums, self._centers(cut)))
            products, means = products + len(here), means + sums
        return _table(rows, PHASE)

    @lazy
    def adjoint_table(self) -> np.ndarray:
        """The phases of the adjoint as records.PHASE."""
        places = phase.adjoint_places(self.cell, self.adjoints, self.projected)
        return self._backward_table(self.adjoints, places, "_adjoint")

    @lazy
    def adjoint_tangent_table(self) -> np.ndarray:
        """The phases of the adjoint and its tangent as records.PHASE."""
        places = phase.adjoint_tangent_places(self.cell, self.adjoint_tangents, self.projected)
        return self._backward_table(self.adjoint_tangents, places, "_adjoint_tangent")

    def _backward_table(self, cuts: tuple[Phase, ...], places: Any, kind: str) -> np.ndarray:
        rows, means = [], 0
        for cut, address in zip(cuts, self._addresses(cuts, places, kind)):
            sums = phase.count([cut], "sum")
            rows.append((address, 0, 0, 0, means, sums, self._centers(cut)))
            means += sums
        return _table(rows, PHASE)

    def _centers(self, cut: Phase) -> int:
        """The address of a table of the means of which a phase takes variances, -1 of a mean; 0 if empty."""
        centers, center = [], -1
        for operator in cut.operators:
            if operator.kind in MOMENTS:
                place = int(operator.result.name)
                center = place if operator.kind == MEAN else center
                centers.append(center if operator.kind == VARIANCE else -1)
        if not centers:
            return 0
        self._kept.append(table := np.array(centers, np.int64))
        return int(table.ctypes.data)

    def _products(self, cuts: tuple[Phase, ...]) -> list[list[tuple[tuple[str, ...], Operator | None]]]:
        """With which products each phase begins: their gates, and the operator if they are late."""
        gates = self.cell.recurrent_gates
        found: list[list[tuple[tuple[str, ...], Operator | None]]] = [[(gates, None)] if gates else []]
        for cut in cuts[:-1]:
            found.append([((o.gate,), o) for o in cut.operators if o.gate])
        return found

    def product_table(self, cuts: tuple[Phase, ...], recurrent: int, late: dict[str, int]) -> np.ndarray:
        """The products of a step or its tangent as records.PRODUCT, for tables of panels at these addresses:
        of the recurrent weights and, by gate, of late ones."""
        rows = []
        gate = self.panel * self.registers.size  # bytes of a gate in a row of a panel
        for gates, operator in (product for here in self._products(cuts) for product in here):
            slot, panels, where = self.recurrent_slot, recurrent, (0, 0, 0)
            if operator is not None:
                slot, panels = self._slot(operator.gate), late[operator.gate]
                where = (1, *self._source(operator.operand))
            rows.append((self.tile(len(gates)), slot * gate, panels, *where))
        return _table(rows, PRODUCT_ROW)

    def _source(self, operand: Value) -> tuple[int, int]:
        """Where a late gate's operand lies: the kind of place, and which."""
        if operand.role == "operand":
            return OPERAND, self.operands.index(str(operand.name))
        state = self.cell.states.index(str(operand.name).removeprefix(self.cell.moved))
        return (STATE, state - 1) if state else (OUTPUT, 0)

    def _late_sources(self) -> dict[str, tuple[int, int]]:
        """Where what each late gate multiplies lies."""
        operators = [o for cut in self.steps for o in cut.operators if o.kind == PRODUCT]
        return {o.gate: self._source(o.operand) for o in operators}

    def late_table(
        self, cuts: tuple[Phase, ...], weights: dict[str, int], moved: dict[str, int] | None = None
    ) -> np.ndarray:
        """The late gates in an adjoint as records.LATE, for tables of planes at these addresses: of weights,
        and of their tangents, 0 for those that are zero."""
        found = {(o.kind, o.gate): (n + 1, o) for n, cut in enumerate(cuts) for o in cut.operators}
        rows, sources = [], self._late_sources()
        for gate in self.cell.late:
            n, slot = self._multiplied(found.get((TRANSPOSED, gate)), gate)
            m, moved_slot = self._multiplied(found.get((MOVED_TRANSPOSED, gate)), gate)
            weight = 0 if moved is None else moved[gate]
            rows.append((n, slot, weights[gate], self._slot(gate), *sources[gate], m, moved_slot, weight))
        return _table(rows, LATE)

    def _multiplied(self, found: tuple[int, Operator] | None, gate: str) -> tuple[int, int]:
        """The phase that takes a product with transposed weights, and the slot that these multiply; -1 and
        the gate's own if there is none, since its gradient is zero."""
        if found is None:
            return -1, self._slot(gate)
        return found[0], self._slot(str(found[1].operand.name).removeprefix(self.cell.moved))

    def input_table(self, moved: dict[str, int]) -> np.ndarray:
        """What tangents of pre-activations begin with beside the product of the input's tangent, as
        records.INPUT: values times the tangents of weights, for tables of their panels at these addresses,
        by "ih", "hh" and gate."""
        rows = []
        count = len(self.input_order)
        if moved["ih"]:
            rows.append((*self._input_tile(count), 0, moved["ih"], X, 0))
        count = len(self.recurrent_order)
        if count and moved["hh"]:
            slot = self.recurrent_slot
            rows.append((*self._input_tile(count), slot, moved["hh"], RECURRENT, 0))
        for gate, (source, place) in self._late_sources().items():
            if moved[gate]:
                where = LATE_INPUT + source, place
                rows.append((*self._input_tile(1), self._slot(gate), moved[gate], *where))
        return _table(rows, INPUT)

    def _input_tile(self, gates: int) -> tuple[int, int]:
        return self.tile(gates), self.registers.rows(gates * self.units)

    def _addresses(self, cuts: tuple[Phase, ...], places: Any, kind: str) -> list[int]:
        """The addresses of phases as C functions."""
        cell, back = self.cell, "adjoint" in kind
        sides = [("", "")] + ([(cell.moved, " + moved_shift")] if back and "tangent" in kind else [])
        functions = []
        for n, cut in enumerate(cuts):
            more = phase.zeros(cell, [shift for _, shift in sides]) if back and cut is cuts[-1] else []
            beyond = [text for side in sides for text in phase.padding(cell, cut, *side)] if back else []
            text = phase.source(cut, places, self.registers, self.units, more, beyond)
            functions.append(phase.compiled(text, self.scalar, f"{cell.name}{kind}_{n}"))
        self._kept += functions
        return [function.address for function in functions]


def _places(gates: tuple[str, ...], among: tuple[str, ...]) -> np.ndarray:
    return np.array([among.index(gate) for gate in gates], np.int64)


def _table(rows: list[Any], record: Any) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, record.words)


@once
def program(cell: Cell, scalar: types.Float, projected: bool, precision: str = "float32") -> Program:
    """The same object for equal arguments."""
    return Program(cell, scalar, projected, precision)
