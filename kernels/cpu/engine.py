"""The CPU engine: weights laid out for the kernels, and their calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.dispatch import States, check_projection
from fusedlstm.kernels import POISON
from fusedlstm.once import lazy, once
from fusedlstm.weights import Weights

from . import memory, pack, plan, team
from .backward import Given, Gradients, Transposed, Workspace, backward, backward_work, space, workspace
from .compile import entry_point
from .forward import Packed, forward, forward_work
from .memory import layout
from .plan import BARRIER, BYTES, FLOPS, Sequences, sequences, threads_for
from .spec import Registers, Spec, machine
from .team import LINE
from .tile import panel_rows
from .work import Compiled, compiled


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


# --- Compiled kernels -----------------------------------------------------------------------


class Kernel(NamedTuple):
    """A compiled kernel."""

    entry: Any  # called without Numba's look at the types of its arguments
    work: Compiled  # its parallel part
    address: int  # of the parallel part


INT, FLAG, INTS = types.int64, types.boolean, types.int64[::1]
MEMORY = types.uint8[::1]
SEQUENCES = (INTS, INTS, INTS, types.Array(FLAG, 2, "A"), FLAG)


def compile_kernel(entry: Any, work: Any, captured: types.BaseTuple, *signature: Any) -> Kernel:
    """Compile, or load from Numba's cache; the work is given what is captured."""
    part = compiled(work, captured)
    return Kernel(entry_point(entry, INT, INT, INT, part.type, *signature), part, part.address)


def _arrays(spec: Spec) -> tuple[Any, Any, Any, Any]:
    """The types of a vector, a matrix, an array (T, B, ...) and the states."""
    matrix = types.Array(spec.scalar, 2, "A")
    cube, states = types.Array(spec.scalar, 3, "A"), types.UniTuple(matrix, 1 + spec.further)
    return spec.scalar[::1], matrix, cube, states


def _ints(names: Any) -> types.Type:
    return types.NamedUniTuple(INT, len(names._fields), names)


@once
def forward_kernel(spec: Spec) -> Kernel:
    """Compile, or load from Numba's cache."""
    _, _, cube, states = _arrays(spec)
    rows = types.NamedTuple(SEQUENCES, memory.Sequences)
    captured = types.Tuple(
        (spec, cube, cube, _ints(Packed), rows, INT, _ints(memory.Layout), INT, INT, FLAG, INT, INT)
    )
    return compile_kernel(
        forward, forward_work, captured, spec, cube, cube, states, FLAG, states, types.UniTuple(INT, 5),
        *SEQUENCES, MEMORY, INT, INT, FLAG,
    )  # fmt: skip


@once
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
    return compile_kernel(
        backward, backward_work, captured, spec, cube, cube, cube, cube, FLAG, FLAG, states, FLAG, states,
        types.UniTuple(INT, 4), orders, types.Tuple(grads), matrix, *SEQUENCES, MEMORY, MEMORY, INT, INT,
    )  # fmt: skip


@once
def packers(scalar: types.Float) -> tuple[Kernel, Kernel]:
    """The compiled `pack_panels` and `pack_planes`."""
    captured = (Registers(scalar), types.Array(scalar, 2, "A"), INTS, INT, INT)
    panels, planes = (
        compile_kernel(entry, work, types.Tuple(captured), *captured)
        for entry, work in ((pack.pack_panels, pack.panels_work), (pack.pack_planes, pack.planes_work))
    )
    return panels, planes


@once
def transposer(scalar: types.Float) -> Kernel:
    """The compiled :func:`pack.write_transposed`."""
    matrix = types.Array(scalar, 2, "A")
    captured = (Registers(scalar), matrix, matrix)
    return compile_kernel(pack.write_transposed, pack.transposed_work, types.Tuple(captured), *captured)


def write_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source.T``, several times as fast; the rows of both are contiguous."""
    kernel = transposer(types.float32 if source.dtype == np.float32 else types.float64)
    threads, address, patience = threads_for(source.nbytes / 8e3)
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


class CPUDirection:
    """One direction of one layer on the CPU; see dispatch.Direction."""

    def __init__(self, cell: Cell, weights: Weights) -> None:
        check_projection(cell, weights)
        self.weights, self.dtype = weights, weights.ih.dtype
        (rows, inputs), (_, outputs) = weights.ih.shape, weights.hh.shape
        hidden = rows // len(cell.gates)
        self.layer = plan.layer(cell, self.dtype, inputs, hidden, outputs, weights.hr is not None)
        self.spec = self.layer.spec
        self._forward = forward_kernel(self.spec)  # looked up now, which takes longer than a call should
        self._vectors = self._pack_vectors()
        self._panels = (
            self._pack_panels(weights.ih, self.layer.input_gates),
            self._pack_panels(weights.hh, self.layer.recurrent_gates),
            self._pack_bias(),
            self._vectors,
            NOTHING if weights.hr is None else self._pack_planes(weights.hr.T, ONLY, hidden),
        )
        self._panel_addresses = tuple(array.ctypes.data for array in self._panels)

    @property
    def nbytes(self) -> int:
        """Bytes of what has been laid out."""
        made = vars(self)  # planes are made when they are first needed
        planes = (made.get("_input_planes", NOTHING), *made.get("_planes", ()))
        return sum(array.nbytes for array in (*self._panels, *planes))

    @lazy
    def _input_planes(self) -> np.ndarray:
        return self._pack_planes(self.weights.ih, self.layer.input_gates, self.spec.panel)

    @lazy
    def _planes(self) -> tuple[np.ndarray, ...]:
        weights, panel = self.weights, self.spec.panel
        return (
            self._pack_planes(weights.hh, self.layer.recurrent_gates, panel),
            self._vectors,
            NOTHING if weights.hr is None else self._pack_planes(weights.hr, ONLY, self.layer.outputs),
        )

    def lay_out_for_backward(self) -> None:
        """Do now what the first backward pass would; from then on the weights' memory is not read."""
        self._input_planes, self._planes  # noqa: B018

    def _pack_panels(self, weight: np.ndarray, gates: np.ndarray) -> np.ndarray:
        packed = empty(self.layer.padded * self.spec.gates * weight.shape[1], self.dtype)
        kernel, _ = packers(self.spec.scalar)
        threads, address, patience = threads_for(weight.nbytes / 4e3)
        args = (None, weight, gates, self.spec.units, packed.ctypes.data)
        kernel.entry(address, threads, patience, kernel.address, *args)
        return packed

    def _pack_planes(self, weight: np.ndarray, gates: np.ndarray, panel: int) -> np.ndarray:
        depth = -(-weight.shape[0] // gates.size // panel) * panel * gates.size
        packed = empty(depth * -(-weight.shape[1] // self.spec.lanes) * self.spec.lanes, self.dtype)
        _, kernel = packers(self.spec.scalar)
        threads, address, patience = threads_for(weight.nbytes / 8e3)
        args = (None, weight, gates, panel, packed.ctypes.data)
        kernel.entry(address, threads, patience, kernel.address, *args)
        return packed

    def _pack_bias(self) -> np.ndarray:
        layer, spec, weights = self.layer, self.spec, self.weights
        by_gate = spec.gates, layer.hidden
        packed = empty(spec.inputs * layer.padded, self.dtype)
        rows = np.zeros((spec.inputs, layer.padded), self.dtype)  # of the pre-activations
        if weights.bias_ih is not None:
            of_input, of_output = weights.bias_ih.reshape(by_gate), weights.bias_hh.reshape(by_gate)
            rows[: spec.gates, : layer.hidden] = of_input[layer.input_gates]
            rows[spec.splits :, : layer.hidden] += of_output[layer.recurrent_gates]
        by_panel = packed.reshape(-1, spec.inputs, spec.panel)
        by_panel[...] = rows.reshape(spec.inputs, -1, spec.panel).swapaxes(0, 1)
        return packed

    def _pack_vectors(self) -> np.ndarray:
        padded = self.layer.padded
        packed = empty(len(self.weights.vectors) * padded, self.dtype)
        packed.fill(0)
        for row, vector in zip(packed.reshape(-1, padded), self.weights.vectors):
            row[: self.layer.hidden] = vector
        return packed

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
        spec, layer, (steps, batch, _) = self.spec, self.layer, x.shape
        threads, _, patience, chunk, size, order = layer.plan(steps, batch)
        if lengths is not None:
            order = sequences(steps, batch, lengths)
        if training:
            rows = order.rows
            size = layout(spec, layer.hidden, layer.outputs, batch, rows, rows).end
        kept = empty_bytes(size)
        if reset is None:
            reset = NO_RESET
        self._forward.entry(
            team.current().address if threads > 1 else 0, threads, patience, self._forward.address,
            layer.tiles, x, y, final if initial is None else initial, initial is not None, final,
            self._panel_addresses, *order, reset, reverse, kept, layer.hidden, chunk, training,
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
        spec, layer, dtype, weights = self.spec, self.layer, self.dtype, self.weights
        x, y, order, reset, reverse, kept = tape
        steps, batch, _ = x.shape
        threads, _, patience, *_ = layer.plan(steps, batch)
        chunk = layer.backward_chunk(steps, batch)
        rows = order.rows
        parts = layout(spec, layer.hidden, layer.outputs, batch, rows, rows)
        room = workspace(spec, 0, parts, batch, chunk * batch)
        scratch = empty_bytes(room.threads + threads * space(spec, 0, chunk * batch, batch).end)
        sizes = [layer.outputs] + [layer.hidden] * spec.further
        dinitial = tuple(np.empty((batch, size), dtype) for size in sizes)
        ih, hh = np.empty(weights.ih.shape, dtype), np.empty(weights.hh.shape, dtype)
        bias_ih, bias_hh = np.empty(len(ih), dtype), np.empty(len(ih), dtype)
        hr = np.empty(NOTHING.shape if weights.hr is None else weights.hr.shape, dtype)
        dvectors = np.empty((spec.learned, layer.hidden), dtype)
        kernel = backward_kernel(spec)
        kernel.entry(
            team.current().address if threads > 1 else 0, threads, patience, kernel.address, layer.tiles,
            x, y, dy, x if dx is None else dx, dx is not None, accumulate,
            dinitial if dfinal is None else dfinal, dfinal is not None, dinitial,
            (0 if dx is None else self._input_planes.ctypes.data, *(p.ctypes.data for p in self._planes)),
            (layer.input_gates, layer.recurrent_gates, ONLY), (ih, hh, bias_ih, bias_hh, hr), dvectors,
            *order, reset, reverse, kept, scratch, layer.hidden, chunk,
        )  # fmt: skip
        grads = Weights(ih, hh, bias_ih, bias_hh, hr, tuple(dvectors))
        if weights.bias_ih is None:
            grads = grads._replace(bias_ih=None, bias_hh=None)
        return dinitial, grads if weights.hr is not None else grads._replace(hr=None)

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """See dispatch.Direction."""
        spec, rows = self.spec, panel_rows(self.spec)
        threads, _, _, chunk, *_ = self.layer.plan(steps, batch)
        step = self.layer.step_time(batch)
        why = f"of {team.describe()}; a step takes one thread about {step:.1f} us, a barrier {BARRIER} us"
        computes = 2 * batch / FLOPS > self.dtype.itemsize / BYTES
        size = (self._panels[0].nbytes + self._panels[1].nbytes) / 1e6
        return {
            "kernel": f"fused forward{' and backward' if training else ''}, cell {spec.cell.name}",
            "tile": f"{rows} rows x {spec.width} vectors of {spec.lanes} {self.dtype} ({machine().name})",
            "threads": f"{threads} {why}",
            "layout": f"weights in panels of {spec.panel} hidden units with all their gates, {size:.1f} MB",
            "chunk": f"the input of {chunk} steps is projected at once",
            "bound": f"{'multiply-adds' if computes else 'reading the weights'}, at batch {batch}",
        }


class CPU:
    """See dispatch.Engine."""

    def prepare(self, cell: Cell, weights: Weights) -> CPUDirection:
        """See dispatch.Engine."""
        return CPUDirection(cell, weights)
