"""How passes are run: threads, chunks of steps and the order of rows, which follow from sizes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.once import once

from . import team
from .memory import layout, state_rows
from .spec import Spec
from .tile import tile_table

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


class Sequences(NamedTuple):
    """See memory.Sequences."""

    order: np.ndarray  # (B,) int64
    lengths: np.ndarray  # (B,) int64
    first: np.ndarray  # (T + 1,) int64, or (0,) if all lengths are equal

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
    size: int  # bytes of the memory of a forward pass without a tape
    order: Sequences  # if all lengths are equal


class Layer:
    """What directions of layers of one cell and size have in common, whatever their weights.

    Attributes:
        spec: the compile-time parameters.
        tiles: the address of the tiles.
        inputs, hidden, outputs: sizes I, H and P.
        padded: hidden units of whole panels.
        input_gates, recurrent_gates: the places of the gates, in the order of the products.
    """

    def __init__(self, cell: Cell, scalar: types.Float, sizes: tuple[int, int, int], projected: bool) -> None:
        self.spec = Spec(cell, scalar, projected)
        self._table = tile_table(self.spec)  # keeps the memory
        self.tiles = self._table.ctypes.data
        self.inputs, self.hidden, self.outputs = sizes
        self.padded = -(-self.hidden // self.spec.panel) * self.spec.panel
        self.input_gates = np.array([cell.gates.index(gate) for gate in cell.input_gates])
        self.recurrent_gates = np.array([cell.gates.index(gate) for gate in cell.recurrent_gates])
        self._plans: dict[tuple[int, int], Plan] = {}

    def step_time(self, batch: int) -> float:
        """Roughly the microseconds that one thread takes for a step of the recurrence."""
        spec = self.spec
        weights = self.hidden * self.outputs * (spec.gates + spec.projected)
        return float(max(2 * weights * batch / FLOPS, weights * spec.size / BYTES))

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
        spec = self.spec
        project = 2 * spec.gates * self.hidden * self.inputs * batch / FLOPS
        alone = steps * (self.step_time(batch) + project)
        meetings = START + steps * BARRIER * (1 + spec.projected)
        panels = self.padded // spec.panel
        most = team.get_num_threads() if panels > 1 and meetings < alone / 2 else 0
        threads = min(max(most, 1), panels)
        chunk = max(1, min(steps, FORWARD_ROWS // batch))
        rows = state_rows(spec, batch)
        size = layout(spec, self.hidden, self.outputs, batch, rows, chunk * batch).end
        return Plan(threads, most, int(min(alone / 2, 1000)), chunk, size, sequences(steps, batch, None))

    def backward_chunk(self, steps: int, batch: int) -> int:
        """The steps after which the gradients of the weights are added to; chunks are equal in size."""
        row: int = self.padded * self.spec.gates * self.spec.size
        rows = min(BACKWARD_ROWS, BACKWARD_BYTES // row, max(row // 8, 64))
        chunks = -(-steps // max(1, rows // batch))
        return -(-steps // chunks)


@once
def layer(cell: Cell, dtype: np.dtype[Any], inputs: int, hidden: int, outputs: int, projected: bool) -> Layer:
    """The same object for equal arguments."""
    scalar = types.float32 if dtype == np.float32 else types.float64
    return Layer(cell, scalar, (inputs, hidden, outputs), projected)


def threads_for(work: float) -> tuple[int, int, int]:
    """How many threads do `work` microseconds of work without barriers best, their team, and the
    microseconds for which to wait for them."""
    threads = team.get_num_threads() if work > 10 * START else 1
    return threads, team.current().address if threads > 1 else 0, int(min(work / 2, 1000))
