"""The CPU engine: weights laid out for the kernels, and the choice of threads and chunks."""

from __future__ import annotations

import os
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.dispatch import States, check_projection
from fusedlstm.weights import Weights

from . import memory, pack, team
from .backward import Given, Gradients, Transposed, Workspace, backward, backward_work, space, workspace
from .forward import Packed, forward, forward_work
from .memory import LINE, layout, state_rows
from .spec import Registers, Spec, entry_point, machine
from .tile import panel_rows, tile_table
from .work import Compiled, compiled

# Buffers that nothing initialises are filled with NaN, to find out who reads them.
POISON = bool(os.environ.get("FUSEDLSTM_POISON"))

FORWARD_ROWS = 64  # rows of input that are projected at once: enough for full tiles, and still in cache
# Rows after which the gradients of the weights are added to.  More rows read and write these large
# matrices less often; fewer keep the gradients of the gates, so many bytes a row, in cache.
BACKWARD_ROWS = 512
BACKWARD_BYTES = 8 << 20

# What a thread does in a microsecond, and what the meeting of threads costs, roughly: all that is asked
# of these figures is to tell sequences that several threads make faster from those that they slow down.
FLOPS, BYTES = 100e3, 80e3
BARRIER, START = 0.3, 5.0


def empty_bytes(count: int) -> np.ndarray:
    """Memory in which `count` bytes from the first cache line on may be used; under test, NaN."""
    raw = np.empty(count + LINE, np.uint8)
    if POISON:
        raw.fill(0xFF)
    return raw


def empty(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """An array (count,) that begins with a cache line."""
    raw = empty_bytes(count * dtype.itemsize)
    start = -raw.ctypes.data % LINE
    return raw[start : start + count * dtype.itemsize].view(dtype)


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


# --- Compiled kernels -----------------------------------------------------------------------


class Kernel(NamedTuple):
    """A compiled kernel."""

    entry: Any  # called without Numba's look at the types of its arguments
    work: Compiled  # its parallel part
    address: int  # of the parallel part


INT, FLAG, INTS = types.int64, types.boolean, types.int64[::1]
MEMORY = types.uint8[::1]
SEQUENCES = (INTS, INTS, INTS, types.Array(FLAG, 2, "A"), FLAG)


def _kernel(entry: Any, work: Any, captured: types.BaseTuple, *signature: Any) -> Kernel:
    part = compiled(work, captured)
    return Kernel(entry_point(entry, INT, INT, INT, part.type, *signature), part, part.address)


def _arrays(spec: Spec) -> tuple[Any, Any, Any, Any]:
    """The types of a vector, a matrix, an array (T, B, ...) and the states."""
    matrix = types.Array(spec.scalar, 2, "A")
    return spec.scalar[::1], matrix, types.Array(spec.scalar, 3, "A"), types.UniTuple(matrix, spec.states + 1)


def _ints(names: Any) -> types.Type:
    return types.NamedUniTuple(INT, len(names._fields), names)


@cache
def forward_kernel(spec: Spec) -> Kernel:
    """Compile, or load from Numba's cache."""
    _, _, cube, states = _arrays(spec)
    rows = types.NamedTuple(SEQUENCES, memory.Sequences)
    captured = types.Tuple(
        (spec, cube, cube, _ints(Packed), rows, INT, _ints(memory.Layout), INT, INT, FLAG, INT, INT)
    )
    return _kernel(
        forward, forward_work, captured, spec, cube, cube, states, FLAG, states, types.UniTuple(INT, 5),
        *SEQUENCES, MEMORY, INT, INT, FLAG,
    )  # fmt: skip


@cache
def backward_kernel(spec: Spec) -> Kernel:
    """Compile, or load from Numba's cache."""
    vector, matrix, cube, states = _arrays(spec)
    rows = types.NamedTuple(SEQUENCES, memory.Sequences)
    grads = (matrix, matrix, vector, vector, matrix)
    orders = types.UniTuple(INTS, 3)
    captured = types.NamedTuple(
        (spec, cube, cube, cube, cube, FLAG, FLAG, _ints(Transposed), orders,
         types.NamedTuple(grads, Gradients), rows, INT, _ints(memory.Layout), _ints(Workspace), INT, INT,
         INT),
        Given,
    )  # fmt: skip
    return _kernel(
        backward, backward_work, captured, spec, cube, cube, cube, cube, FLAG, FLAG, states, FLAG, states,
        types.UniTuple(INT, 4), orders, types.Tuple(grads), matrix, *SEQUENCES, MEMORY, MEMORY, INT, INT,
    )  # fmt: skip


@cache
def packers(scalar: types.Float) -> tuple[Kernel, Kernel]:
    """The compiled `pack_panels` and `pack_planes`."""
    captured = (Registers(scalar), types.Array(scalar, 2, "A"), INTS, INT, INT)
    panels, planes = (
        _kernel(entry, work, types.Tuple(captured), *captured)
        for entry, work in ((pack.pack_panels, pack.panels_work), (pack.pack_planes, pack.planes_work))
    )
    return panels, planes


@cache
def transposer(scalar: types.Float) -> Kernel:
    """The compiled :func:`pack.write_transposed`."""
    matrix = types.Array(scalar, 2, "A")
    captured = (Registers(scalar), matrix, matrix)
    return _kernel(pack.write_transposed, pack.transposed_work, types.Tuple(captured), *captured)


def write_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source.T``, several times as fast; the rows of both are contiguous."""
    kernel = transposer(types.float32 if source.dtype == np.float32 else types.float64)
    threads, address, patience = _team(source.nbytes / 8e3)
    kernel.entry(address, threads, patience, kernel.address, None, source, target)


# --- The engine -----------------------------------------------------------------------------


class Tape(NamedTuple):
    """What the backward pass needs of a forward pass."""

    x: np.ndarray  # (T, B, I)
    y: np.ndarray  # (T, B, P)
    sequences: Sequences
    reset: np.ndarray  # (T, B) or NO_RESET
    reverse: bool
    memory: np.ndarray  # see memory.Layout


NO_RESET = np.zeros((0, 0), bool)
ONLY = np.zeros(1, np.int64)  # the order of the gates of what has no gates
NOTHING = np.zeros((0, 0))


class Plan(NamedTuple):
    """How a batch of sequences of a size is run."""

    threads: int
    most: int  # threads that could be used when the plan was made; 0 if one is best in any case
    patience: int  # microseconds for which to wait for the others
    chunk: int  # steps whose inputs are projected at once
    size: int  # bytes of the memory of a forward pass without a tape
    order: Sequences  # if all lengths are equal


class CPUDirection:
    """One direction of one layer on the CPU; see dispatch.Direction."""

    def __init__(self, cell: Cell, weights: Weights) -> None:
        check_projection(cell, weights)
        self.cell, self.weights = cell, weights
        self.dtype = weights.ih.dtype
        self.hidden = weights.ih.shape[0] // len(cell.gates)
        self.outputs, self.inputs = weights.hh.shape[1], weights.ih.shape[1]
        scalar = types.float32 if self.dtype == np.float32 else types.float64
        self.spec = Spec(cell, scalar, weights.hr is not None)
        self._forward = forward_kernel(self.spec)
        self._tiles = tile_table(self.spec).ctypes.data
        self._input_gates = np.array([cell.gates.index(gate) for gate in cell.input_gates])
        self._recurrent_gates = np.array([cell.gates.index(gate) for gate in cell.recurrent_gates])
        self._padded = -(-self.hidden // self.spec.panel) * self.spec.panel
        self._bias, self._vectors = self._pack_bias(), self._pack_vectors()
        self._panels = (
            self._pack_panels(weights.ih, self._input_gates),
            self._pack_panels(weights.hh, self._recurrent_gates),
            self._bias,
            self._vectors,
            NOTHING if weights.hr is None else self._pack_planes(weights.hr.T, ONLY, self.hidden),
        )
        self._panel_addresses = tuple(array.ctypes.data for array in self._panels)
        self._plans: dict[tuple[int, int], Plan] = {}

    @cached_property
    def _input_planes(self) -> np.ndarray:
        return self._pack_planes(self.weights.ih, self._input_gates, self.spec.panel)

    @cached_property
    def _planes(self) -> tuple[np.ndarray, ...]:
        weights, panel = self.weights, self.spec.panel
        return (
            self._pack_planes(weights.hh, self._recurrent_gates, panel),
            self._vectors,
            NOTHING if weights.hr is None else self._pack_planes(weights.hr, ONLY, self.outputs),
        )

    def lay_out_for_backward(self) -> None:
        """Do now what the first backward pass would; from then on the weights' memory is not read."""
        self._input_planes, self._planes  # noqa: B018

    def _pack_panels(self, weight: np.ndarray, gates: np.ndarray) -> np.ndarray:
        packed = empty(self._padded * self.spec.gates * weight.shape[1], self.dtype)
        kernel, _ = packers(self.spec.scalar)
        threads, address, patience = _team(weight.nbytes / 4e3)
        args = (None, weight, gates, self.spec.units, packed.ctypes.data)
        kernel.entry(address, threads, patience, kernel.address, *args)
        return packed

    def _pack_planes(self, weight: np.ndarray, gates: np.ndarray, panel: int) -> np.ndarray:
        depth = -(-weight.shape[0] // gates.size // panel) * panel * gates.size
        packed = empty(depth * -(-weight.shape[1] // self.spec.lanes) * self.spec.lanes, self.dtype)
        _, kernel = packers(self.spec.scalar)
        threads, address, patience = _team(weight.nbytes / 8e3)
        args = (None, weight, gates, panel, packed.ctypes.data)
        kernel.entry(address, threads, patience, kernel.address, *args)
        return packed

    def _pack_bias(self) -> np.ndarray:
        cell, spec, weights = self.cell, self.spec, self.weights
        packed = empty(spec.inputs * self._padded, self.dtype)
        packed.fill(0)
        if weights.bias_ih is None:
            return packed
        from_input = dict(zip(cell.gates, weights.bias_ih.reshape(-1, self.hidden)))
        from_output = dict(zip(cell.gates, weights.bias_hh.reshape(-1, self.hidden)))
        values = {gate: from_input[gate] + from_output[gate] for gate in cell.plain}
        values |= {f"{gate}_x": from_input[gate] for gate in cell.split}
        values |= {f"{gate}_h": from_output[gate] for gate in cell.split}
        by_panel = packed.reshape(-1, spec.inputs, spec.panel)
        for n, name in enumerate(cell.preactivations):
            row = np.zeros(self._padded, self.dtype)
            row[: self.hidden] = values[name]
            by_panel[:, n] = row.reshape(-1, spec.panel)
        return packed

    def _pack_vectors(self) -> np.ndarray:
        packed = empty(len(self.weights.vectors) * self._padded, self.dtype)
        packed.fill(0)
        for row, vector in zip(packed.reshape(-1, self._padded), self.weights.vectors):
            row[: self.hidden] = vector
        return packed

    def step_time(self, batch: int) -> float:
        """Roughly the microseconds that one thread takes for a step of the recurrence."""
        weights = (
            self.spec.gates * self.hidden * self.outputs + self.hidden * self.outputs * self.spec.projected
        )
        return float(max(2 * weights * batch / FLOPS, weights * self.dtype.itemsize / BYTES))

    def _plan(self, steps: int, batch: int) -> Plan:
        plan = self._plans.get((steps, batch))
        # how many threads may be used is asked only where several are worth while
        if plan is None or (plan.most and plan.most != team.get_num_threads()):
            if len(self._plans) >= 256:
                self._plans.clear()
            self._plans[steps, batch] = plan = self._make_plan(steps, batch)
        return plan

    def _make_plan(self, steps: int, batch: int) -> Plan:
        step = self.step_time(batch)
        project = 2 * self.spec.gates * self.hidden * self.inputs * batch / FLOPS
        alone = steps * (step + project)
        meetings = START + steps * BARRIER * (1 + self.spec.projected)
        panels = self._padded // self.spec.panel
        most = team.get_num_threads() if panels > 1 and meetings < alone / 2 else 0
        threads = min(max(most, 1), panels)
        chunk = max(1, min(steps, FORWARD_ROWS // batch))
        rows = state_rows(self.spec, batch)
        size = layout(self.spec, self.hidden, self.outputs, batch, rows, chunk * batch).end
        return Plan(threads, most, int(min(alone / 2, 1000)), chunk, size, sequences(steps, batch, None))

    def _backward_chunk(self, steps: int, batch: int) -> int:
        """The steps after which the gradients of the weights are added to; chunks are equal in size."""
        row: int = self._padded * self.spec.gates * self.spec.size
        rows = min(BACKWARD_ROWS, BACKWARD_BYTES // row, max(row // 8, 64))
        chunks = -(-steps // max(1, rows // batch))
        return -(-steps // chunks)

    def forward(
        self,
        x: np.ndarray,  # (T, B, I)
        initial: States | None,
        y: np.ndarray,  # (T, B, P)
        final: States,
        lengths: np.ndarray | None,  # (B,)
        reset: np.ndarray | None,  # (T, B)
        reverse: bool,
        training: bool,
    ) -> Tape | None:
        """See dispatch.Direction."""
        steps, batch, _ = x.shape
        threads, _, patience, chunk, size, order = self._plan(steps, batch)
        if lengths is not None:
            order = sequences(steps, batch, lengths)
        if training:
            rows = order.rows
            size = layout(self.spec, self.hidden, self.outputs, batch, rows, rows).end
        kept = empty_bytes(size)
        if reset is None:
            reset = NO_RESET
        self._forward.entry(
            team.current().address if threads > 1 else 0, threads, patience, self._forward.address,
            self._tiles, x, y, final if initial is None else initial, initial is not None, final,
            self._panel_addresses, *order, reset, reverse, kept, self.hidden, chunk, training,
        )  # fmt: skip
        return Tape(x, y, order, reset, reverse, kept) if training else None

    def backward(
        self,
        tape: Tape,
        dy: np.ndarray,  # (T, B, P)
        dfinal: States | None,
        dx: np.ndarray | None,  # (T, B, I)
        accumulate: bool,
    ) -> tuple[States, Weights]:
        """See dispatch.Direction."""
        spec, dtype, weights = self.spec, self.dtype, self.weights
        x, y, order, reset, reverse, kept = tape
        steps, batch, _ = x.shape
        threads, _, patience, *_ = self._plan(steps, batch)
        chunk = self._backward_chunk(steps, batch)
        rows = order.rows
        parts = layout(spec, self.hidden, self.outputs, batch, rows, rows)
        room = workspace(spec, 0, parts, batch, chunk * batch)
        scratch = empty_bytes(room.threads + threads * space(spec, 0, chunk * batch, batch).end)
        sizes = [self.outputs] + [self.hidden] * spec.states
        dinitial = tuple(np.empty((batch, size), dtype) for size in sizes)
        ih, hh = np.empty(weights.ih.shape, dtype), np.empty(weights.hh.shape, dtype)
        bias_ih, bias_hh = np.empty(len(ih), dtype), np.empty(len(ih), dtype)
        hr = np.empty(NOTHING.shape if weights.hr is None else weights.hr.shape, dtype)
        dvectors = np.empty((spec.vectors, self.hidden), dtype)
        kernel = backward_kernel(spec)
        kernel.entry(
            team.current().address if threads > 1 else 0, threads, patience, kernel.address, self._tiles,
            x, y, dy, x if dx is None else dx, dx is not None, accumulate,
            dinitial if dfinal is None else dfinal, dfinal is not None, dinitial,
            (0 if dx is None else self._input_planes.ctypes.data, *(p.ctypes.data for p in self._planes)),
            (self._input_gates, self._recurrent_gates, ONLY), (ih, hh, bias_ih, bias_hh, hr), dvectors,
            *order, reset, reverse, kept, scratch, self.hidden, chunk,
        )  # fmt: skip
        grads = Weights(ih, hh, bias_ih, bias_hh, hr, tuple(dvectors))
        if weights.bias_ih is None:
            grads = grads._replace(bias_ih=None, bias_hh=None)
        return dinitial, grads if weights.hr is not None else grads._replace(hr=None)

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """See dispatch.Direction."""
        spec, rows = self.spec, panel_rows(self.spec)
        threads, _, _, chunk, *_ = self._plan(steps, batch)
        step = self.step_time(batch)
        why = f"of {team.describe()}; a step takes one thread about {step:.1f} us, a barrier {BARRIER} us"
        computes = 2 * batch / FLOPS > self.dtype.itemsize / BYTES
        size = (self._panels[0].nbytes + self._panels[1].nbytes) / 1e6
        return {
            "kernel": f"fused forward{' and backward' if training else ''}, cell {self.cell.name}",
            "tile": f"{rows} rows x {spec.width} vectors of {spec.lanes} {self.dtype} ({machine().name})",
            "threads": f"{threads} {why}",
            "layout": f"weights in panels of {spec.panel} hidden units with all their gates, {size:.1f} MB",
            "chunk": f"the input of {chunk} steps is projected at once",
            "bound": f"{'multiply-adds' if computes else 'reading the weights'}, at batch {batch}",
        }


def _team(work: float) -> tuple[int, int, int]:
    """How many threads do `work` microseconds of work without barriers best, their team, and the
    microseconds for which to wait for them."""
    threads = team.get_num_threads() if work > 10 * START else 1
    return threads, team.current().address if threads > 1 else 0, int(min(work / 2, 1000))


class CPU:
    """See dispatch.Engine."""

    def prepare(self, cell: Cell, weights: Weights) -> CPUDirection:
        """See dispatch.Engine."""
        return CPUDirection(cell, weights)
