"""How passes are run: threads, chunks of steps and the order of rows, which follow from sizes alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.once import lazy, once

from . import team
from .heads import Span, spans
from .memory import round_up, stored_bytes
from .phase import count
from .product import GROUP
from .program import program
from .records import OWN, PANEL, TASK
from .team import LINE
from .tile import PLANES
from .work import launcher

FORWARD_ROWS = 64  # rows of input that are projected at once: enough for full tiles, and still in cache
# Rows after which the gradients of the weights are added to.  More rows read and write these large
# matrices less often; fewer keep the gradients of the gates, so many bytes a row, in cache.
BACKWARD_ROWS = 512
BACKWARD_BYTES = 8 << 20

# What a thread does in a microsecond, and what the meeting of threads costs, roughly: all that is asked
# of these figures is to tell sequences that several threads make faster from those that they slow down.
FLOPS, BYTES = 100e3, 80e3
BARRIER, START = 0.3, 5.0

MOST_PLANS = 256  # that are kept for one cell and size


HEADER = 8 * len(TASK)  # bytes of the record of a pass, at the beginning of its memory
ONLY = np.zeros(1, np.int64)  # the order of the gates of what has no gates


class Sequences(NamedTuple):
    """Which sequences run at which step; rows are sequences in descending order of length."""

    order: np.ndarray  # (B,) int64: the sequence of each row
    lengths: np.ndarray  # (B,) int64: by row
    first: np.ndarray  # (T + 1,) int64: how many rows come before each step; (0,) if all lengths are equal

    @property
    def rows(self) -> int:
        """All rows of all steps."""
        return int(self.lengths.sum())


def sequences(steps: int, batch: int, lengths: np.ndarray | None) -> Sequences:
    """The order of rows, and the number of rows before each step."""
    if lengths is None:
        return Sequences(np.arange(batch), np.full(batch, steps, np.int64), np.zeros(0, np.int64))
    order = np.argsort(-lengths, kind="stable")
    running = np.searchsorted(-lengths[order], -np.arange(1, steps + 1), side="right")
    return Sequences(order, lengths[order], np.concatenate([[0], np.cumsum(running)]).astype(np.int64))


class Plan(NamedTuple):
    """How a batch of sequences of a size is run."""

    threads: int
    most: int  # threads that could be used when the plan was made; 0 if one is best in any case
    patience: int  # microseconds for which to wait for the others
    chunk: int  # steps whose inputs are projected at once
    forward: Task  # without a tape
    order: Sequences  # if all lengths are equal


class Task(NamedTuple):
    """The record of a pass, but for what a call gives; see records.py."""

    words: np.ndarray  # int64
    nbytes: int  # of its memory


class Layer:
    """What directions of layers of one cell and size have in common, whatever their weights.

    Attributes:
        program: the cell as the kernels run it.
        inputs, hidden, outputs: sizes I, H and P.
        heads: blocks of the recurrent weights.
        padded: hidden units of whole panels.
    """

    def __init__(
        self,
        cell: Cell,
        scalar: types.Float,
        sizes: tuple[int, int, int],
        projected: bool,
        heads: int,
        precision: str,
    ) -> None:
        self.program = program(cell, scalar, projected, precision)
        self.inputs, self.hidden, self.outputs = sizes
        self.heads = heads
        self.padded = round_up(self.hidden, self.program.panel)
        self._plans: dict[tuple[int, int], Plan] = {}
        self.forward_task = lru_cache(MOST_PLANS)(self._forward_task)
        self.backward_task = lru_cache(MOST_PLANS)(self._backward_task)

    def step_time(self, batch: int) -> float:
        """Roughly the microseconds that one thread takes for a step of the recurrence."""
        program = self.program
        columns = self.outputs // self.heads
        weights = self.hidden * columns * (len(program.cell.gates_with_recurrent) + program.projected)
        operand = program.registers.operand
        reading = weights * (operand.weight or program.registers.size) / BYTES
        return float(max(2 * weights * batch / (FLOPS * operand.rate), reading))

    def plan(self, steps: int, batch: int) -> Plan:
        """The plan for sequences of `steps` steps, or fewer."""
        plan = self._plans.get((steps, batch))
        # how many threads may be used is asked only where several are worth while
        if plan is None or (plan.most and plan.most != team.get_num_threads()):
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[steps, batch] = plan = self._make_plan(steps, batch)
        return plan

    def _make_plan(self, steps: int, batch: int) -> Plan:
        program = self.program
        rate = FLOPS * program.registers.operand.rate
        rows = 0 if program.cell.takes_gates else len(program.input_order) * self.hidden
        project = 2 * rows * self.inputs * batch / rate
        alone = steps * (self.step_time(batch) + project)
        meetings = START + steps * BARRIER * (len(program.steps) + program.projected)
        panels = self.padded // program.panel
        most = team.get_num_threads() if panels > 1 and meetings < alone / 2 else 0
        threads = min(max(most, 1), panels)
        chunk = max(1, min(steps, FORWARD_ROWS // batch))
        task = self.forward_task(steps, batch, None, chunk, threads)
        order = sequences(steps, batch, None)
        return Plan(threads, most, int(min(alone / 2, 1000)), chunk, task, order)

    def backward_chunk(self, steps: int, batch: int) -> int:
        """The steps after which the gradients of the weights are added to; chunks are equal in size."""
        row: int = self.padded * len(self.program.cell.gates) * self.program.registers.size
        rows = min(BACKWARD_ROWS, BACKWARD_BYTES // row, max(row // 8, 64))
        chunks = -(-steps // max(1, rows // batch))
        return -(-steps // chunks)

    def _forward_task(
        self, steps: int, batch: int, taped: int | None, chunk: int, threads: int, tangents: bool = False
    ) -> Task:
        """A forward pass; `taped` is the number of rows of all steps if a tape is kept.

        A pass of tangents keeps one, laid out as that of the values.
        """
        program = self.program
        cuts = program.tangents if tangents else program.steps
        words, fields = self._common(
            steps, batch, chunk, program.tangent_table if tangents else program.phase_table
        )
        rows = program.ring * batch if taped is None else taped
        gate_rows = batch * chunk if taped is None else taped
        self._lay_out_memory(fields, batch, rows, gate_rows, count(cuts, "kept"))
        fields |= {"taped": int(taped is not None), "tangents": int(tangents)}
        if program.projected:
            fields |= program.routines
        fields["input_tile"] = program.tile(len(program.input_order))
        fields["input_rows"] = program.registers.rows(len(program.input_order) * program.units)
        end = fields["memory_end"]
        products = 1 + len(program.late_order)
        inputs = batch * chunk * (2 + products if tangents else 1)
        stored = 0 if program.cell.takes_gates else batch * chunk
        space = self._thread_space(fields, batch, inputs, products, program.means, 0, stored)
        fields["at_more_inputs"] = fields["at_inputs"] + batch * chunk * 8
        fields["queues"], fields["thread_space"] = end, end + threads * LINE
        fields["memory_end"] = end + threads * (LINE + space)
        return _filled(words, fields, fields["memory_end"])

    def _backward_task(
        self, steps: int, batch: int, rows: int, chunk: int, threads: int, tangents: bool = False
    ) -> Task:
        """A backward pass after a forward pass with so many rows in all steps; or its tangent."""
        program = self.program
        cuts = program.adjoint_tangents if tangents else program.adjoints
        words, fields = self._common(
            steps, batch, chunk, program.adjoint_tangent_table if tangents else program.adjoint_table
        )
        self._lay_out_memory(fields, batch, rows, rows, 0)
        fields |= {"taped": 1, "tangents": int(tangents), **program.routines}
        self._lay_out_scratch(fields, batch, batch * chunk, count(cuts, "kept"), count(cuts, "sum"))
        end = fields["scratch_end"]
        if tangents:  # the same once more
            fields["moved_shift"] = end - fields["carried"]
            end += fields["moved_shift"]
        # rows of the gradient of the output are stored like those of a product
        space = self._thread_space(fields, batch, 0, 1, count(cuts, "sum"), batch * chunk)
        fields["d_queues"], fields["d_thread_space"] = end, end + 2 * threads * LINE
        fields["scratch_end"] = end + threads * (2 * LINE + space)
        return _filled(words, fields, fields["scratch_end"])

    def _common(
        self, steps: int, batch: int, chunk: int, phases: np.ndarray
    ) -> tuple[np.ndarray, dict[str, int]]:
        """What both passes have in common; the record, and what is yet to be written to it."""
        program, cell = self.program, self.program.cell
        size, vector = program.registers.size, program.registers.lanes * program.registers.size
        panels, gate = self.padded // program.panel, program.units * vector
        slots, mean = len(cell.preactivations), round_up(batch, program.registers.lanes) * size
        fields = {
            "steps": steps, "batch": batch, "chunk": chunk,
            "inputs": self.inputs, "hidden": self.hidden, "outputs": self.outputs,
            "units": program.units, "panel": program.panel, "panels": panels,
            "slots": slots, "input_slots": len(program.input_order), "takes_gates": int(cell.takes_gates),
            "further": len(cell.states) - 1, "learned": len(cell.weights), "operand": cell.operand,
            "ring": program.ring, "projected": int(program.projected), "late": len(cell.late),
            "recurrent_slot": program.recurrent_slot, "recurrent_slots": len(program.recurrent_order),
            "heads": self.heads, "spans": len(self.spans),
            "recurrent_rows": program.recurrent_rows, "reads_operand": int(cell.reads_operand),
            "phase_table": phases.ctypes.data, "phases": len(phases),
            "launch": launcher().address,
            "input_order": program.input_order.ctypes.data,
            "input_gates": 0 if cell.takes_gates else len(program.input_order),
            "recurrent_order": program.recurrent_order.ctypes.data,
            "recurrent_gates": len(program.recurrent_order),
            "late_order": program.late_order.ctypes.data, "no_order": ONLY.ctypes.data,
            "gate": gate, "gates_row": slots * gate, "width": panels * gate,
            "output_width": round_up(self.outputs, program.panel) * size,
            "kept_plane": batch * panels * gate,
            "mean_row": mean, "means_plane": mean, "partials_plane": panels * program.units * mean,
            "input_depth": program.groups(self.inputs),
            "input_panel": program.weights_bytes(len(program.input_order) * program.units, self.inputs),
        }  # fmt: skip
        return np.zeros(len(TASK), np.int64), fields

    @lazy
    def panel_spans(self) -> list[Span]:
        """The panels of the recurrent weights, and the columns that they meet."""
        return spans(self.hidden, self.heads, self.program.panel, self.program.registers.group)

    @lazy
    def spans(self) -> list[Span]:
        """The vectors of what the recurrent weights multiply, and the units that they meet."""
        registers = self.program.registers
        return spans(self.hidden, self.heads, registers.lanes, registers.group)

    def panel_table(self, array: np.ndarray, gates: int, columns: int, recurrent: bool = True) -> np.ndarray:
        """Panels of so many gates as records.PANEL, where `array` has them; none if it is empty.

        Args:
            columns: of all weights.
            recurrent: whether they are cut into heads.
        """
        program, rows = self.program, []
        cut = [Span(0, self.padded // program.panel, 0, columns, 0)]
        if recurrent and self.heads > 1:
            cut = self.panel_spans
        place = int(array.ctypes.data)
        for span in cut if array.size else ():
            for _ in range(span.low, span.high):
                rows.append((place, span.begin * self._value, program.groups(span.depth)))
                place += program.weights_bytes(gates * program.units, span.depth)
        return np.array(rows, np.int64).reshape(-1, PANEL.words)

    def planes_table(self, array: np.ndarray, depth: int, columns: int, gates: int = 0) -> np.ndarray:
        """Planes as records.PLANES_OF, where `array` has them; none if it is empty.

        Args:
            depth: how many numbers a plane meets, if it meets all.
            columns: of all weights.
            gates: if they are cut into heads, so that a plane meets some units of each of these.
        """
        program, place, rows = self.program, int(array.ctypes.data), []
        if not array.size:
            return np.zeros(0, np.int64)
        if not gates or self.heads == 1:
            vectors = -(-columns // program.registers.lanes)
            return np.array([(0, vectors, place, 0, program.groups(depth), 1, 0)], np.int64)
        for span in self.spans:
            plane = gates * program.weights_bytes(1, span.depth)
            where = place - span.low * plane, span.begin * self._value
            meets = program.groups(span.depth), gates, self.padded * self._value
            rows.append((span.low, span.high, *where, *meets))
            place += (span.high - span.low) * plane
        return np.array(rows, np.int64)

    @property
    def _value(self) -> int:
        """Bytes of a value of a row as products multiply it."""
        return int(self.program.registers.value or self.program.registers.size)

    def _lay_out_memory(
        self, fields: dict[str, int], batch: int, rows: int, gate_rows: int, kept: int
    ) -> None:
        """Where what is where in the memory of a forward pass that keeps so many rows of states and of gates.

        The output that enters first (B, P); the other states (S, B + rows, H), first the initial ones; what
        late gates multiply (operands, rows, H); the output before its projection (rows, H); means (means,
        rows); pre-activations (panels, gate_rows, slots * panel); then what no other pass reads: what a phase
        hands on (kept, B, H), and sums over the units of a vector (means, vectors, B).
        """
        program, width = self.program, fields["width"]
        mean = round_up(rows, program.registers.lanes) * program.registers.size
        fields["states_plane"], fields["operands_plane"] = (batch + rows) * width, rows * width
        fields["taped_means_plane"], fields["gates_panel"] = mean, gate_rows * fields["gates_row"]
        _place_in_turn(
            fields, HEADER + 32 * (1 + fields["further"]), "memory_end",
            initial=batch * fields["output_width"],
            states=fields["further"] * fields["states_plane"],
            operands=len(program.operands) * fields["operands_plane"],
            raw=rows * width if program.projected else 0,
            means=program.means * mean,
            gates=fields["panels"] * fields["gates_panel"],
            kept=kept * fields["kept_plane"],
            partials=program.means * fields["partials_plane"],
        )  # fmt: skip

    def _lay_out_scratch(
        self, fields: dict[str, int], batch: int, chunk_rows: int, kept: int, means: int
    ) -> None:
        """Where what is where in the memory of a backward pass.

        Gradients: of the output (B, P), carried from step to step; of the output before its projection
        (B, H); of the other states (S, B, H); of the initial output and the other initial states; of the
        learned vectors (V, H).  What a phase hands on (kept, B, H); products with the weights of late gates
        (late, B, H); sums over the units of a vector (means, vectors, B).  Gradients of the gates (rows of a
        chunk, slots, H), the same once more as products multiply them, if that is something else, and of the
        output, if it is projected (rows of a chunk, P).
        """
        program, registers, width = self.program, self.program.registers, fields["width"]
        # a line more than the row needs, so that the rows of a column do not fall on the same cache set
        fields["d_row"] = round_up(width * fields["slots"], LINE) + LINE
        fields["d_stored_slot"] = width // registers.size * registers.value
        fields["d_stored_row"] = round_up(fields["d_stored_slot"] * fields["slots"], LINE) + LINE
        states = fields["further"] * fields["kept_plane"]
        _place_in_turn(
            fields, HEADER + 32 * (1 + fields["further"]), "scratch_end",
            carried=batch * fields["output_width"], d_raw=batch * width, d_states=states,
            d_initial=batch * fields["output_width"], d_initial_states=states,
            d_learned=fields["learned"] * width,
            d_kept=kept * fields["kept_plane"],
            products_of_late=fields["late"] * fields["kept_plane"],
            d_partials=means * fields["partials_plane"],
            d=chunk_rows * fields["d_row"],
            d_stored=chunk_rows * fields["d_stored_row"] if registers.value else 0,
            d_outputs=chunk_rows * fields["output_width"] if program.projected else 0,
        )  # fmt: skip
        if not registers.value:
            fields |= {"d_stored": fields["d"], "d_stored_row": fields["d_row"], "d_stored_slot": width}

    def _thread_space(
        self,
        fields: dict[str, int],
        batch: int,
        inputs: int,
        products: int,
        means: int,
        chunk_rows: int,
        input_rows: int = 0,
    ) -> int:
        """Where what is where in the space of a thread, and its size: its record, tables of row addresses,
        the means of a step, room for tiles, and rows as products multiply them: those of the input, or later
        those of the products of a step."""
        registers = self.program.registers
        vector = registers.lanes * registers.size
        row = batch * 8
        size = _place_in_turn(
            fields, round_up(8 * OWN.words, LINE), "thread_bytes",
            at_inputs=inputs * 8, at_entering=row, at_leaving=row, at_projected=row, at_offsets=row,
            at_operands=products * row, at_p_entering=row, at_means=means * fields["mean_row"],
            at_scratch=registers.rows(PLANES) * PLANES * vector,
            at_first=chunk_rows * 8, at_second=chunk_rows * 8, at_third=chunk_rows * 8,
            at_values=chunk_rows * PLANES * vector, at_stored=self._stored(batch * products, input_rows),
            at_pairs=self._pairs(chunk_rows), at_rest=input_rows * 8,
        )  # fmt: skip
        return size

    def _pairs(self, rows: int) -> int:
        """Bytes of the groups of rows of gradients that a piece of the weights' gradients is made of."""
        program, registers = self.program, self.program.registers
        if registers.group == 1:
            return 0
        gates = max(len(program.input_order), len(program.recurrent_order), 1)
        units = max(gates * GROUP * program.panel, self.outputs + registers.lanes)
        return int(program.groups(rows) * units * registers.size)

    def _stored(self, rows: int, input_rows: int) -> int:
        """Bytes of stored rows of products, or of the input."""
        registers = self.program.registers
        if not registers.value:
            return 0
        of_products = rows * stored_bytes(registers, max(self.hidden, self.outputs))
        terms = 2 if registers.integer else 1
        return int(max(of_products, terms * input_rows * stored_bytes(registers, self.inputs)))


def _place_in_turn(fields: dict[str, int], start: int, end: str, **sizes: int) -> int:
    """Give each its place, at the start of a cache line; the place after the last, which `end` is given."""
    place = int(round_up(start, LINE))
    for name, size in sizes.items():
        fields[name] = place
        place = int(round_up(place + size, LINE))
    fields[end] = place
    return place


def _filled(words: np.ndarray, fields: dict[str, int], nbytes: int) -> Task:
    for name, value in fields.items():
        words[TASK[name]] = value
    return Task(words, nbytes)


@once
def layer(
    cell: Cell,
    dtype: np.dtype[Any],
    inputs: int,
    hidden: int,
    outputs: int,
    projected: bool,
    heads: int,
    precision: str = "float32",
) -> Layer:
    """The same object for equal arguments."""
    scalar = types.float32 if dtype == np.float32 else types.float64
    return Layer(cell, scalar, (inputs, hidden, outputs), projected, heads, precision)


def threads_for(work: float) -> tuple[int, int, int]:
    """How many threads do `work` microseconds of work without barriers best, their team, and the
    microseconds for which to wait for them."""
    threads = team.get_num_threads() if work > 10 * START else 1
    return threads, team.current().address if threads > 1 else 0, int(min(work / 2, 1000))
