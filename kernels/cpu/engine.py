"""The CPU engine: weights laid out for the kernels, and the choice of threads and chunks."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.dispatch import States
from fusedlstm.weights import Weights

from . import team
from .forward import forward
from .memory import LINE, layout
from .pack import pack_panels, pack_planes
from .spec import Spec, machine

# Buffers that nothing initialises are filled with NaN, to find out who reads them.
POISON = bool(os.environ.get("FUSEDLSTM_POISON"))

CHUNK_ROWS = 64  # rows of input that are projected at once: enough for full tiles, and still in cache


def empty(count: int, dtype: Any) -> np.ndarray:
    """An array that begins with a cache line; under test, full of NaN."""
    dtype = np.dtype(dtype)
    raw = np.empty(count * dtype.itemsize + LINE, np.uint8)
    if POISON:
        raw.fill(0xFF)
    start = -raw.ctypes.data % LINE
    return raw[start : start + count * dtype.itemsize].view(dtype)


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


class Kernels(NamedTuple):
    """The compiled kernels of a spec, called without Numba's look at the types of their arguments."""

    forward: Any
    pack_panels: Any
    pack_planes: Any


@cache
def kernels(spec: Spec) -> Kernels:
    """Compile, or load from Numba's cache."""
    matrix, cube = types.Array(spec.scalar, 2, "A"), types.Array(spec.scalar, 3, "A")
    states = types.UniTuple(matrix, spec.states + 1)
    sequences = (INTS, INTS, INTS, types.Array(FLAG, 2, "A"), FLAG)
    return Kernels(
        _entry(forward, INT, INT, INT, spec, cube, cube, states, FLAG, states, types.UniTuple(INT, 5),
               *sequences, BYTES, INT, INT, FLAG),
        _entry(pack_panels, INT, INT, spec, matrix, INTS, INT),
        _entry(pack_planes, INT, INT, spec, matrix, INTS, INT, INT),
    )  # fmt: skip


def _entry(function: Any, *signature: Any) -> Any:
    function.compile(signature)
    return function.overloads[signature].entry_point


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
        self._packed = self._pack()

    def _pack(self) -> tuple[int, ...]:
        cell, spec, weights = self.cell, self.spec, self.weights
        padded = -(-self.hidden // spec.panel) * spec.panel
        self._keep = []

        def panels(weight: np.ndarray, order: tuple[str, ...]) -> int:
            packed = empty(weight.shape[1] * padded * spec.gates, self.dtype)
            gates = np.array([cell.gates.index(gate) for gate in order])
            self._kernels.pack_panels(0, 1, spec, np.ascontiguousarray(weight), gates, packed.ctypes.data)
            self._keep.append(packed)
            return packed.ctypes.data

        def planes(weight: np.ndarray) -> int:
            packed = empty(weight.shape[0] * -(-weight.shape[1] // spec.lanes) * spec.lanes, self.dtype)
            self._kernels.pack_planes(0, 1, spec, np.ascontiguousarray(weight), np.zeros(1, np.int64), 1, packed.ctypes.data)
            self._keep.append(packed)
            return packed.ctypes.data

        bias = empty(spec.inputs * padded, self.dtype)
        bias.fill(0)
        by_panel = bias.reshape(-1, spec.inputs, spec.panel)
        if weights.bias_ih is not None:
            ih = weights.bias_ih.reshape(-1, self.hidden)
            hh = weights.bias_hh.reshape(-1, self.hidden)
            for n, name in enumerate(cell.preactivations):
                row = np.zeros(padded, self.dtype)
                if name in cell.gates:
                    row[: self.hidden] = ih[cell.gates.index(name)] + hh[cell.gates.index(name)]
                else:
                    row[: self.hidden] = (ih if name.endswith("_x") else hh)[cell.gates.index(name[:-2])]
                by_panel[:, n] = row.reshape(-1, spec.panel)
        vectors = empty(len(weights.vectors) * padded, self.dtype)
        vectors.fill(0)
        for n, v in enumerate(weights.vectors):
            vectors[n * padded : n * padded + self.hidden] = v
        self._keep += [bias, vectors]
        return (
            panels(weights.ih, cell.input_gates),
            panels(weights.hh, cell.recurrent_gates),
            bias.ctypes.data,
            vectors.ctypes.data,
            planes(weights.hr.T) if weights.hr is not None else 0,
        )

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
    ) -> Any:
        steps, batch, _ = x.shape
        threads = self.threads(steps, batch)
        order = sequences(steps, batch, lengths)
        chunk = max(1, min(steps, CHUNK_ROWS // batch))
        rows = int(order.first[-1]) if training else batch
        gate_rows = rows if training else chunk * batch
        memory = np.empty(
            layout(self.spec, self.hidden, self.outputs, batch, rows, gate_rows).end, np.uint8
        )
        if POISON:
            memory.fill(0xFF)
        address = team.current().address if threads > 1 else 0
        self._kernels.forward(
            address, threads, 100, self.spec, x, y, final if initial is None else initial,
            initial is not None, final, self._packed, order.order, order.lengths, order.first,
            NO_RESET if reset is None else reset, reverse, memory, self.hidden, chunk, training,
        )  # fmt: skip
        return None

    def threads(self, steps: int, batch: int) -> int:
        return team.get_num_threads()

