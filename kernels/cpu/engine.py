"""The CPU engine: weights laid out for the kernels, and the choice of threads and chunks."""

from __future__ import annotations

import os
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.dispatch import States
from fusedlstm.weights import Weights

from . import team
from .backward import backward, space, workspace
from .forward import forward
from .memory import LINE, layout
from .pack import pack_panels, pack_planes
from .spec import Spec

# Buffers that nothing initialises are filled with NaN, to find out who reads them.
POISON = bool(os.environ.get("FUSEDLSTM_POISON"))

CHUNK_ROWS = 64  # rows of input that are projected at once: enough for full tiles, and still in cache
BACKWARD_ROWS = 128  # rows after which the gradients of the weights are added to


def empty_bytes(count: int) -> np.ndarray:
    """Memory in which `count` bytes from the first cache line on may be used; under test, NaN."""
    memory = np.empty(count + LINE, np.uint8)
    if POISON:
        memory.fill(0xFF)
    return memory


def empty(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """An array (count,) that begins with a cache line."""
    memory = empty_bytes(count * dtype.itemsize)
    start = -memory.ctypes.data % LINE
    return memory[start : start + count * dtype.itemsize].view(dtype)


class Sequences(NamedTuple):
    """See memory.py."""

    order: np.ndarray  # (B,) int64
    lengths: np.ndarray  # (B,) int64
    first: np.ndarray  # (T + 1,) int64


@lru_cache(maxsize=64)
def _equal_lengths(steps: int, batch: int) -> Sequences:
    return Sequences(
        np.arange(batch), np.full(batch, steps, np.int64), np.arange(0, steps * batch + 1, batch)
    )


def sequences(steps: int, batch: int, lengths: np.ndarray | None) -> Sequences:
    """The order of rows and the number of rows before each step."""
    if lengths is None:
        return _equal_lengths(steps, batch)
    order = np.argsort(-lengths, kind="stable")
    running = np.searchsorted(np.sort(-lengths), -np.arange(1, steps + 1), side="right")
    return Sequences(order, lengths[order], np.concatenate([[0], np.cumsum(running)]).astype(np.int64))


NO_RESET = np.zeros((0, 0), bool)
INT, FLAG, INTS, BYTES = types.int64, types.boolean, types.int64[::1], types.uint8[::1]
ONLY = np.zeros(1, np.int64)


class Kernels(NamedTuple):
    """The compiled kernels of a spec, called without Numba's look at the types of their arguments."""

    forward: Any
    backward: Any
    pack_panels: Any
    pack_planes: Any


@cache
def kernels(spec: Spec) -> Kernels:
    """Compile, or load from Numba's cache."""
    vector, matrix, cube = spec.scalar[::1], types.Array(spec.scalar, 2, "A"), types.Array(spec.scalar, 3, "A")
    states = types.UniTuple(matrix, spec.states + 1)
    sequences = (INTS, INTS, INTS, types.Array(FLAG, 2, "A"), FLAG)
    grads = types.Tuple((matrix, matrix, vector, vector, matrix))
    return Kernels(
        _entry(forward, INT, INT, INT, spec, cube, cube, states, FLAG, states, types.UniTuple(INT, 5),
               *sequences, BYTES, INT, INT, FLAG),
        _entry(backward, INT, INT, INT, spec, cube, cube, cube, cube, FLAG, states, FLAG, states,
               types.UniTuple(INT, 4), types.UniTuple(INTS, 3), grads, matrix, *sequences, BYTES, BYTES,
               INT, INT),
        _entry(pack_panels, INT, INT, spec, matrix, INTS, INT),
        _entry(pack_planes, INT, INT, spec, matrix, INTS, INT, INT),
    )  # fmt: skip


def _entry(function: Any, *signature: Any) -> Any:
    function.compile(signature)
    return function.overloads[signature].entry_point


class Tape(NamedTuple):
    """What the backward pass needs of a forward pass."""

    x: np.ndarray  # (T, B, I)
    y: np.ndarray  # (T, B, P)
    sequences: Sequences
    reset: np.ndarray  # (T, B) or NO_RESET
    reverse: bool
    memory: np.ndarray  # see memory.Layout


class CPUDirection:
    """One direction of one layer on the CPU; see dispatch.Direction."""

    def __init__(self, cell: Cell, weights: Weights) -> None:
        self.cell, self.weights = cell, weights
        self.dtype = weights.ih.dtype
        self.hidden = weights.ih.shape[0] // len(cell.gates)
        self.outputs = weights.hh.shape[1]
        scalar = types.float32 if self.dtype == np.float32 else types.float64
        self.spec = Spec(cell, scalar, weights.hr is not None)
        self._kernels = kernels(self.spec)
        self._input_gates = np.array([cell.gates.index(gate) for gate in cell.input_gates])
        self._recurrent_gates = np.array([cell.gates.index(gate) for gate in cell.recurrent_gates])
        self._padded = -(-self.hidden // self.spec.panel) * self.spec.panel
        self._bias, self._vectors = self._pack_bias(), self._pack_vectors()
        self._packed = (
            self._panels(weights.ih, self._input_gates),
            self._panels(weights.hh, self._recurrent_gates),
            self._bias,
            self._vectors,
            self._planes(weights.hr.T, ONLY, 1) if weights.hr is not None else np.empty(0),
        )
        self._addresses = tuple(array.ctypes.data for array in self._packed)

    @cached_property
    def _transposed(self) -> tuple[np.ndarray, ...]:
        weights, panel = self.weights, self.spec.panel
        return (
            self._planes(weights.ih, self._input_gates, panel),
            self._planes(weights.hh, self._recurrent_gates, panel),
            self._vectors,
            self._planes(weights.hr, ONLY, 1) if weights.hr is not None else np.empty(0),
        )

    def _panels(self, weight: np.ndarray, gates: np.ndarray) -> np.ndarray:
        packed = empty(self._padded * self.spec.gates * weight.shape[1], self.dtype)
        threads, address = self._team(1.0)
        self._kernels.pack_panels(address, threads, self.spec, weight, gates, packed.ctypes.data)
        return packed

    def _planes(self, weight: np.ndarray, gates: np.ndarray, panel: int) -> np.ndarray:
        weight = np.ascontiguousarray(weight)
        depth = -(-weight.shape[0] // gates.size // panel) * panel * gates.size
        packed = empty(depth * -(-weight.shape[1] // self.spec.lanes) * self.spec.lanes, self.dtype)
        threads, address = self._team(1.0)
        self._kernels.pack_planes(address, threads, self.spec, weight, gates, panel, packed.ctypes.data)
        return packed

    def _pack_bias(self) -> np.ndarray:
        cell, spec, weights = self.cell, self.spec, self.weights
        packed = empty(spec.inputs * self._padded, self.dtype)
        packed.fill(0)
        if weights.bias_ih is None:
            return packed
        by_panel = packed.reshape(-1, spec.inputs, spec.panel)
        from_input = dict(zip(cell.gates, weights.bias_ih.reshape(-1, self.hidden)))
        from_output = dict(zip(cell.gates, weights.bias_hh.reshape(-1, self.hidden)))
        values = {gate: from_input[gate] + from_output[gate] for gate in cell.plain}
        values |= {f"{gate}_x": from_input[gate] for gate in cell.split}
        values |= {f"{gate}_h": from_output[gate] for gate in cell.split}
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

    def forward(
        self,
        x: np.ndarray,
        initial: States | None,
        y: np.ndarray,
        final: States,
        lengths: np.ndarray | None,
        reset: np.ndarray | None,
        reverse: bool,
        training: bool,
    ) -> Tape | None:
        steps, batch, _ = x.shape
        order = sequences(steps, batch, lengths)
        chunk = max(1, min(steps, CHUNK_ROWS // batch))
        rows = int(order.first[-1]) if training else batch
        gate_rows = rows if training else chunk * batch
        size = layout(self.spec, self.hidden, self.outputs, batch, rows, gate_rows).end
        memory = empty_bytes(size)
        threads, address = self._team(1.0)
        reset = NO_RESET if reset is None else reset
        self._kernels.forward(
            address, threads, 100, self.spec, x, y, final if initial is None else initial,
            initial is not None, final, self._addresses, *order, reset, reverse, memory, self.hidden, chunk,
            training,
        )  # fmt: skip
        return Tape(x, y, order, reset, reverse, memory) if training else None

    def backward(
        self, tape: Tape, dy: np.ndarray, dfinal: States | None, dx: np.ndarray, accumulate: bool
    ) -> tuple[States, Weights]:
        x, y, order, reset, reverse, memory = tape
        steps, batch, _ = x.shape
        chunk = max(1, min(steps, BACKWARD_ROWS // batch))
        threads, address = self._team(1.0)
        rows = int(order.first[-1])
        parts = layout(self.spec, self.hidden, self.outputs, batch, rows, rows)
        work = workspace(self.spec, 0, parts, batch, chunk * batch)
        space_size = space(self.spec, 0, chunk * batch, batch).end
        scratch = empty_bytes(work.threads + threads * space_size)
        states = [(batch, self.outputs)] + [(batch, self.hidden)] * self.spec.states
        dinitial = tuple(np.empty(shape, self.dtype) for shape in states)
        weights = self.weights
        bias_ih, bias_hh = (np.empty(len(weights.ih), self.dtype) for _ in range(2))
        hr = np.empty((0, 0) if weights.hr is None else weights.hr.shape, self.dtype)
        grads = (np.empty_like(weights.ih), np.empty_like(weights.hh), bias_ih, bias_hh, hr)
        vectors = np.empty((self.spec.vectors, self.hidden), self.dtype)
        addresses = tuple(array.ctypes.data for array in self._transposed)
        self._kernels.backward(
            address, threads, 100, self.spec, x, y, dy, dx, accumulate,
            dinitial if dfinal is None else dfinal, dfinal is not None, dinitial, addresses,
            (self._input_gates, self._recurrent_gates, ONLY), grads, vectors, *order, reset, reverse, memory,
            scratch, self.hidden, chunk,
        )  # fmt: skip
        ih, hh, bias_ih, bias_hh, hr = grads
        if weights.bias_ih is None:
            bias_ih = bias_hh = None
        return dinitial, Weights(ih, hh, bias_ih, bias_hh, None if weights.hr is None else hr, tuple(vectors))

    def _team(self, work: float) -> tuple[int, int]:
        threads = team.get_num_threads()
        return threads, team.current().address if threads > 1 else 0
