"""The CPU engine: weights laid out for the kernels, and their calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from fusedlstm.cells import Cell
from fusedlstm.dispatch import States, check_projection
from fusedlstm.kernels import POISON
from fusedlstm.kernels.random import Noise
from fusedlstm.once import lazy, once
from fusedlstm.weights import Weights, flatten

from . import heads, pack, plan, team
from .compile import entry_point
from .entry import adjoint_tangent_pass, again_pass, backward_pass, forward_pass, tangent_pass
from .memory import round_up
from .plan import BARRIER, BYTES, FLOPS, ONLY, Sequences, sequences, threads_for
from .records import EVERY, WEIGHT_FIELDS
from .spec import WIDENED, Operand, Registers, machine
from .team import LINE
from .tile import FEW
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


def compile_kernel(entry: Any, work: Any, captured: types.BaseTuple, *signature: Any) -> Kernel:
    """Compile, or load from Numba's cache; the work is given what is captured."""
    part = compiled(work, captured)
    return Kernel(entry_point(entry, INT, INT, INT, part.type, *signature), part, part.address)


@once
def packers(scalar: types.Float) -> tuple[Kernel, Kernel]:
    """The compiled `pack_panels` and `pack_planes`."""
    captured = (Registers(scalar), types.Array(scalar, 2, "A"), INTS, INT, INT, INT)
    panels, planes = (
        compile_kernel(entry, work, types.Tuple(captured), *captured)
        for entry, work in ((pack.pack_panels, pack.panels_work), (pack.pack_planes, pack.planes_work))
    )
    return panels, planes


@once
def narrower(scalar: types.Float, precision: str) -> Kernel:
    """The compiled :func:`pack.narrow`."""
    captured = (Registers(scalar, precision), INT, INT, INT, INT, INT)
    return compile_kernel(pack.narrow, pack.narrow_work, types.Tuple(captured), *captured)


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

    x: np.ndarray | None  # (T, B, I); None is zero, of tangents
    y: np.ndarray  # (T, B, P)
    sequences: Sequences
    reset: np.ndarray  # (T, B) or NO_RESET
    reverse: bool
    memory: np.ndarray  # see plan.Layer
    noise: Noise | None = None


class Tangent(NamedTuple):
    """What the tangent of the backward pass needs of the tangent of the forward pass."""

    tape: Tape  # of tangents
    packed: Packed  # the tangents of the weights


NO_RESET = np.zeros((0, 0), bool)
NOTHING = np.zeros((0, 0))


class Packed:
    """Weights laid out for the kernels, each when it is first needed; empty for what there is not."""

    def __init__(self, layer: plan.Layer, weights: Weights) -> None:
        self.layer, self.program, self.weights = layer, layer.program, weights
        self.dtype = np.dtype(layer.program.scalar.name)

    @property
    def nbytes(self) -> int:
        """Bytes of what has been laid out."""
        made = [value for value in vars(self).values() if isinstance(value, (np.ndarray, list))]
        arrays = [array for value in made for array in (value if isinstance(value, list) else [value])]
        return sum(array.nbytes for array in arrays)

    @lazy
    def input_panels(self) -> np.ndarray:
        return self._panels(self.weights.ih, self.program.input_order)

    @lazy
    def recurrent_panels(self) -> np.ndarray:
        return self._recurrent_panels(self.program.recurrent_order)

    @lazy
    def late_panels(self) -> list[np.ndarray]:
        return [self._recurrent_panels(order) for order in _singly(self.program.late_order)]

    @lazy
    def projection(self) -> np.ndarray:
        hr, hidden = self.weights.hr, self.layer.hidden
        return NOTHING if hr is None else self._planes(hr.T, ONLY, hidden, hidden)

    @lazy
    def input_planes(self) -> np.ndarray:
        return self._planes(self.weights.ih, self.program.input_order, self.layer.hidden, self.layer.padded)

    @lazy
    def recurrent_planes(self) -> np.ndarray:
        return self._recurrent_planes(self.program.recurrent_order)

    @lazy
    def late_planes(self) -> list[np.ndarray]:
        return [self._recurrent_planes(order) for order in _singly(self.program.late_order)]

    @lazy
    def transposed_projection(self) -> np.ndarray:
        return self._planes(self.weights.hr, ONLY, self.layer.outputs, self.layer.outputs)

    def _recurrent_panels(self, gates: np.ndarray) -> np.ndarray:
        layer, weight, panel = self.layer, self.weights.hh, self.program.panel
        if layer.heads == 1 or weight is None or not gates.size:
            return self._panels(weight, gates)
        packed = empty(gates.size * heads.numbers(layer.panel_spans, panel), self.dtype)
        heads.panels_of(weight, gates, layer.hidden, panel, layer.panel_spans, packed)
        blocks = [(span.high - span.low, span.depth) for span in layer.panel_spans]
        return self._narrowed(packed, gates.size * self.program.units, blocks)

    def _recurrent_planes(self, gates: np.ndarray) -> np.ndarray:
        layer, weight, lanes = self.layer, self.weights.hh, self.program.registers.lanes
        if layer.heads == 1 or weight is None or not gates.size:
            return self._planes(weight, gates, layer.hidden, layer.padded)
        packed = empty(gates.size * heads.numbers(layer.spans, lanes), self.dtype)
        heads.planes_of(weight, gates, layer.hidden, lanes, layer.spans, packed)
        blocks = [((span.high - span.low) * gates.size, span.depth) for span in layer.spans]
        return self._narrowed(packed, 1, blocks)

    def panel_tables(self) -> dict[str, np.ndarray]:
        """The panels of weights by "ih", "hh" and late gate, as records.PANEL."""
        layer, program = self.layer, self.program
        late = zip(program.cell.late, self.late_panels)
        return {
            "ih": layer.panel_table(self.input_panels, len(program.input_order), layer.inputs, False),
            "hh": layer.panel_table(self.recurrent_panels, len(program.recurrent_order), layer.outputs),
        } | {gate: layer.panel_table(array, 1, layer.hidden) for gate, array in late}

    def planes_tables(self) -> dict[str, np.ndarray]:
        """The planes of weights by "hh", "hr" and late gate, as records.PLANES_OF."""
        layer, program = self.layer, self.program
        gates, late = len(program.recurrent_order), zip(program.cell.late, self.late_planes)
        return {
            "hh": layer.planes_table(self.recurrent_planes, gates * layer.padded, layer.outputs, gates),
            "hr": layer.planes_table(self.transposed_projection, layer.outputs, layer.hidden),
        } | {gate: layer.planes_table(array, layer.padded, layer.hidden, 1) for gate, array in late}

    @lazy
    def input_table(self) -> np.ndarray:
        """The planes of the weights of the input, as records.PLANES_OF."""
        depth = len(self.program.input_order) * self.layer.padded
        return self.layer.planes_table(self.input_planes, depth, self.layer.inputs)

    @lazy
    def projection_table(self) -> np.ndarray:
        """The planes of the projection, as records.PLANES_OF."""
        return self.layer.planes_table(self.projection, self.layer.hidden, self.layer.outputs)

    def _panels(self, weight: np.ndarray | None, gates: np.ndarray) -> np.ndarray:
        if weight is None or not gates.size:
            return NOTHING
        packed = empty(self.layer.padded * gates.size * weight.shape[1], self.dtype)
        kernel, _ = packers(self.program.scalar)
        threads, address, patience = threads_for(weight.nbytes / 4e3)
        args = (None, weight, gates, self.layer.hidden, self.program.units, packed.ctypes.data)
        kernel.entry(address, threads, patience, kernel.address, *args)
        panels = self.layer.padded // self.program.panel
        return self._narrowed(packed, gates.size * self.program.units, [(panels, weight.shape[1])])

    def _planes(self, weight: np.ndarray | None, gates: np.ndarray, rows: int, padded: int) -> np.ndarray:
        """The given gates of a matrix, so many rows each, as planes."""
        if weight is None or not gates.size:
            return NOTHING
        lanes = self.program.registers.lanes
        packed = empty(padded * gates.size * -(-weight.shape[1] // lanes) * lanes, self.dtype)
        _, kernel = packers(self.program.scalar)
        threads, address, patience = threads_for(weight.nbytes / 8e3)
        args = (None, weight, gates, rows, padded, packed.ctypes.data)
        kernel.entry(address, threads, patience, kernel.address, *args)
        return self._narrowed(packed, 1, [(-(-weight.shape[1] // lanes), padded * gates.size)])

    def _narrowed(self, packed: np.ndarray, width: int, blocks: list[tuple[int, int]]) -> np.ndarray:
        """Panels, or planes of width 1, of what products multiply.

        Args:
            packed: (panels, depth, width, lanes) for each block, which follow each other.
            blocks: panels and depth of each.
        """
        program = self.program
        if program.registers.group == 1:
            return packed
        sizes = [panels * program.weights_bytes(width, depth) for panels, depth in blocks]
        narrow = empty(sum(sizes), np.dtype(np.uint8))
        kernel = narrower(program.scalar, program.precision)
        source, target = packed.ctypes.data, narrow.ctypes.data
        for (panels, depth), size in zip(blocks, sizes):
            nbytes = panels * depth * width * program.registers.lanes * packed.itemsize
            threads, address, patience = threads_for(nbytes / 4e3)
            args = (None, source, panels, depth, width, target)
            kernel.entry(address, threads, patience, kernel.address, *args)
            source, target = source + nbytes, target + size
        return narrow

    @lazy
    def bias(self) -> np.ndarray:
        """What pre-activations start from, (panels, slots, panel)."""
        layer, program, weights = self.layer, self.program, self.weights
        slots = len(program.cell.preactivations)
        packed = empty(slots * layer.padded, self.dtype)
        rows = np.zeros((slots, layer.padded), self.dtype)
        of_units = rows[:, : layer.hidden]
        if weights.bias_ih is not None:
            of_input = weights.bias_ih.reshape(-1, layer.hidden)
            of_units[: len(of_input)] = of_input[program.input_order]
        if weights.bias_hh is not None:
            of_output = weights.bias_hh.reshape(-1, layer.hidden)
            first, size = program.recurrent_slot, len(program.recurrent_order)
            of_units[first : first + size] += of_output[program.recurrent_order]
            of_units[program.late_slots] += of_output[program.late_order]
        by_panel = packed.reshape(-1, slots, program.panel)
        by_panel[...] = rows.reshape(slots, -1, program.panel).swapaxes(0, 1)
        return packed

    @lazy
    def vectors(self) -> np.ndarray:
        """The learned vectors (V, H), padded; zero where there is none."""
        padded = self.layer.padded
        packed = empty(len(self.weights.vectors) * padded, self.dtype)
        packed.fill(0)
        for row, vector in zip(packed.reshape(-1, padded), self.weights.vectors):
            if vector is not None:
                row[: self.layer.hidden] = vector
        return packed


class Repeated:
    """A forward pass over arrays that stay, whose record has been written."""

    __slots__ = ("_arguments", "_entry", "_kept", "_threads")

    def __init__(self, threads: int, arguments: tuple[int, ...], kept: tuple[Any, ...]) -> None:
        self._threads, self._arguments = threads, arguments
        self._kept = kept  # whose addresses are in the record
        self._entry = again_pass()

    def run(self) -> None:
        """Run the pass over what the arrays hold now."""
        self._entry(team.current().address if self._threads > 1 else 0, *self._arguments)


class CPUDirection:
    """One direction of one layer on the CPU, with products in a precision; see dispatch.Direction."""

    def __init__(self, cell: Cell, weights: Weights, precision: str = "float32") -> None:
        check_projection(cell, weights)
        self.weights, self.dtype = weights, flatten(weights)[0].dtype
        _check_precision(precision, weights)
        hidden, inputs = cell.hidden_size(weights), cell.input_size(weights)
        projected = weights.hr is not None
        outputs = len(weights.hr) if projected else hidden
        blocks = 1 if weights.hh is None else outputs // weights.hh.shape[1]
        self.layer = layer = plan.layer(
            cell, self.dtype, inputs, hidden, outputs, projected, blocks, precision
        )
        self.program = program = layer.program
        self.packed = packed = Packed(layer, weights)
        # looked up now, which takes a while
        self._forward = forward_pass(program.scalar, len(cell.states), precision)
        self._panels = packed.panel_tables()
        self._products = program.product_table(program.steps, *_recurrent(self._panels, cell))
        self._words = _words(
            product_table=self._products, products=len(self._products), input_weights=packed.input_panels,
            bias=packed.bias, vectors=packed.vectors, projection=packed.projection_table,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of what has been laid out."""
        return self.packed.nbytes

    @lazy
    def _exact(self) -> CPUDirection:
        """The same with products of float32, which takes the same tapes."""
        return self if self.program.precision == "float32" else CPUDirection(self.program.cell, self.weights)

    @property
    def _trained(self) -> CPUDirection:
        """What runs the backward pass: where bfloat16 is but a format of storage, that of float32."""
        return self._exact if self.program.registers.operand is WIDENED else self

    def lay_out_for_backward(self) -> None:
        """Do now what the first backward pass would; from then on the weights' memory is not read."""
        if self._trained is not self:
            return self._trained.lay_out_for_backward()
        self.packed.input_table  # noqa: B018
        self._backward_words  # noqa: B018

    @lazy
    def _backward_words(self) -> tuple[np.ndarray, Any]:
        """The weights of the backward pass but for those of the input; and the tables that they name."""
        program, planes = self.program, self.packed.planes_tables()
        recurrent, gates = _recurrent(planes, program.cell)
        late = program.late_table(program.adjoints, gates)
        words = _words(
            late_table=late, recurrent_weights=recurrent, vectors=self.packed.vectors,
            projection=planes["hr"],
        )  # fmt: skip
        return words, (planes, late)

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
        states: States | None = None,  # (T, B, H) each
        noise: Noise | None = None,
    ) -> Tape | None:
        """See dispatch.Direction."""
        layer, (steps, batch, _) = self.layer, x.shape
        if training and self.program.precision == "int8":
            raise ValueError("precision 'int8' is for inference; train in 'float32' or 'bfloat16'")
        threads, _, patience, chunk, task, order = layer.plan(steps, batch)
        if lengths is not None:
            order = sequences(steps, batch, lengths)
        if training:
            task = layer.forward_task(steps, batch, order.rows, chunk, threads)
        memory = empty_bytes(task.nbytes)
        if reset is None:
            reset = NO_RESET
        words = self._words if noise is None else _with_noise(self._words, noise)
        if states is not None:
            table = _every(states)
            words = _with(words, every_state=table)
        entry, _, whole, work = self._forward
        entry(
            team.current().address if threads > 1 else 0, threads, patience, whole, work, task.words,
            words, x, y, final if initial is None else initial, initial is not None, final, *order,
            reset, reverse, memory,
        )  # fmt: skip
        return Tape(x, y, order, reset, reverse, memory, noise) if training else None

    def repeated(
        self,
        x: np.ndarray,  # (T, B, I)
        y: np.ndarray,  # (T, B, P), written
        states: States,  # in the place of the initial ones come the final ones
    ) -> Repeated:
        """See dispatch.Repeatable."""
        threads, _, patience, _, task, order = self.layer.plan(*x.shape[:2])
        memory = empty_bytes(task.nbytes)
        entry, _, whole, work = self._forward
        arguments = team.current().address if threads > 1 else 0, threads, patience, whole, work
        entry(
            *arguments, task.words, self._words, x, y, states, True, states, *order, NO_RESET, False, memory
        )
        start = round_up(memory.ctypes.data, LINE)
        return Repeated(threads, (threads, patience, whole, work, start), (self, memory, x, y, states, order))

    def backward(
        self,
        tape: Tape,
        dy: np.ndarray,  # (T, B, P)
        dfinal: States | None,
        dx: np.ndarray | None,  # (T, B, I)
        accumulate: bool,
        dstates: States | None = None,  # (T, B, H) each
    ) -> tuple[States, Weights]:
        """See dispatch.Direction."""
        if self._trained is not self:
            return self._trained.backward(tape, dy, dfinal, dx, accumulate, dstates)
        layer, program = self.layer, self.program
        x, y, order, reset, reverse, memory, noise = tape
        assert x is not None
        steps, batch, _ = x.shape
        threads, _, patience, *_ = layer.plan(steps, batch)
        chunk = layer.backward_chunk(steps, batch)
        task = layer.backward_task(steps, batch, order.rows, chunk, threads)
        scratch = empty_bytes(task.nbytes)
        dinitial, gradients = self._empty_gradients(batch)
        words = self._backward_words[0]
        if noise is not None:
            words = _with_noise(words, noise)
        if dx is not None:
            words = _with(words, input_weights=self.packed.input_table)
        if dstates is not None:
            table = _every(dstates)
            words = _with(words, every_state=table)
        entry, _, whole, work = backward_pass(program.scalar, len(dinitial), program.precision)
        entry(
            team.current().address if threads > 1 else 0, threads, patience, whole, work, task.words, words,
            x, y, dy, x if dx is None else dx, dx is not None, accumulate,
            dinitial if dfinal is None else dfinal, dfinal is not None, dinitial, *gradients, *order, reset,
            reverse, memory, scratch,
        )  # fmt: skip
        return dinitial, self._as_weights(*gradients)

    def _empty_gradients(self, batch: int) -> tuple[States, list[np.ndarray]]:
        """Arrays for the gradients of the initial states and of the weights, those of vectors in one."""
        layer, dtype, weights = self.layer, self.dtype, self.weights
        sizes = [layer.outputs] + [layer.hidden] * (len(self.program.cell.states) - 1)
        ih, hh, hr = (
            np.empty((0, 0) if weight is None else weight.shape, dtype)
            for weight in (weights.ih, weights.hh, weights.hr)
        )
        biases = [np.empty(len(ih), dtype), np.empty(len(hh), dtype)]
        vectors = np.empty((len(weights.vectors), layer.hidden), dtype)
        return tuple(np.empty((batch, size), dtype) for size in sizes), [ih, hh, *biases, hr, vectors]

    def _as_weights(self, *gradients: np.ndarray) -> Weights:
        *own, vectors = gradients
        there = [None if given is None else array for given, array in zip(self.weights, own)]
        return Weights._make([*there, tuple(vectors)])

    def tangent(
        self,
        tape: Tape,  # of the values' forward pass
        x: np.ndarray | None,  # (T, B, I): tangents from here on; None is zero
        initial: States | None,
        weights: Weights,  # of which each may be None
        y: np.ndarray,  # (T, B, P), written
        final: States,  # written
        states: States | None = None,  # (T, B, H) each, written
    ) -> Tangent:
        """The tangent of a forward pass, and what :meth:`backward_tangent` needs of it.

        Second derivatives have products of float32, whatever the precision of the first.
        """
        if self._exact is not self:
            return self._exact.tangent(tape, x, initial, weights, y, final, states)
        moved = Packed(self.layer, weights)
        layer, program, cell = self.layer, self.program, self.program.cell
        p_x, p_y, order, reset, reverse, p_memory, noise = tape
        assert p_x is not None
        steps, batch, _ = p_x.shape
        threads, _, patience, chunk, *_ = layer.plan(steps, batch)
        task = layer.forward_task(steps, batch, order.rows, chunk, threads, tangents=True)
        memory = empty_bytes(task.nbytes)
        packed = self.packed
        products = program.product_table(program.tangents, *_recurrent(self._panels, cell))
        panels = moved.panel_tables()
        inputs = program.input_table({name: _address(table) for name, table in panels.items()})
        table = _every(states or ())
        words = _words(
            every_state=table, product_table=products, products=len(products), input_table=inputs,
            more_inputs=len(inputs), input_weights=packed.input_panels, bias=moved.bias,
            vectors=packed.vectors, projection=packed.projection_table, moved_vectors=moved.vectors,
            moved_projection=moved.projection_table,
        )  # fmt: skip
        if noise is not None:
            words = _with_noise(words, noise)
        entry, _, whole, work = tangent_pass(program.scalar, len(final))
        entry(
            team.current().address if threads > 1 else 0, threads, patience, whole, work, task.words, words,
            p_x if x is None else x, x is not None, y, final if initial is None else initial,
            initial is not None, final, p_x, p_y, *order, reset, reverse, p_memory, memory,
        )  # fmt: skip
        return Tangent(Tape(x, y, order, reset, reverse, memory), moved)

    def backward_tangent(
        self,
        tape: Tape,  # of the values' forward pass
        tangent: Tangent,  # of it
        dy: np.ndarray,  # (T, B, P): of the values' backward pass
        dfinal: States | None,
        dx: np.ndarray | None,  # (T, B, I): the tangent of its dx, written; None if not wanted
        dstates: States | None = None,  # (T, B, H) each: of the values' backward pass
    ) -> tuple[States, Weights]:
        """The tangents of what :meth:`backward` gives, where dy and dfinal do not move."""
        if self._exact is not self:
            return self._exact.backward_tangent(tape, tangent, dy, dfinal, dx, dstates)
        layer, program, cell = self.layer, self.program, self.program.cell
        p_x, p_y, order, reset, reverse, p_memory, noise = tape
        (x, y, _, _, _, memory, _), moved = tangent
        assert p_x is not None
        steps, batch, _ = p_x.shape
        threads, _, patience, *_ = layer.plan(steps, batch)
        chunk = layer.backward_chunk(steps, batch)
        task = layer.backward_task(steps, batch, order.rows, chunk, threads, tangents=True)
        scratch = empty_bytes(task.nbytes)
        dinitial, gradients = self._empty_gradients(batch)
        packed = self.packed
        planes, moved_planes = packed.planes_tables(), moved.planes_tables()
        (recurrent, gates), (moved_recurrent, moved_gates) = (
            _recurrent(tables, cell) for tables in (planes, moved_planes)
        )
        late = program.late_table(program.adjoint_tangents, gates, moved_gates)
        table = _every(dstates or ())
        words = _words(
            every_state=table, late_table=late, recurrent_weights=recurrent, vectors=packed.vectors,
            projection=planes["hr"], moved_recurrent_weights=moved_recurrent, moved_vectors=moved.vectors,
            moved_projection=moved_planes["hr"],
            input_weights=0 if dx is None else packed.input_table,
            moved_input_weights=0 if dx is None else moved.input_table,
        )  # fmt: skip
        if noise is not None:
            words = _with_noise(words, noise)
        entry, _, whole, work = adjoint_tangent_pass(program.scalar, len(dinitial))
        entry(
            team.current().address if threads > 1 else 0, threads, patience, whole, work, task.words, words,
            p_x if x is None else x, x is not None, y, p_x, p_y, dy, p_x if dx is None else dx,
            dx is not None, dinitial if dfinal is None else dfinal, dfinal is not None, dinitial, *gradients,
            *order, reset, reverse, p_memory, memory, scratch,
        )  # fmt: skip
        return dinitial, self._as_weights(*gradients)

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """See dispatch.Direction."""
        program = self.program
        lanes = program.registers.lanes
        threads, _, _, chunk, *_ = self.layer.plan(steps, batch)
        step = self.layer.step_time(batch)
        why = f"of {team.describe()}; a step takes one thread about {step:.1f} us, a barrier {BARRIER} us"
        operand = program.registers.operand
        computes = 2 * batch / (FLOPS * operand.rate) > (operand.weight or self.dtype.itemsize) / BYTES
        panels = (self.packed.input_panels, self.packed.recurrent_panels, *self.packed.late_panels)
        size = sum(array.nbytes for array in panels) / 1e6
        width = len(program.recurrent_order) * program.units
        heads_of = f", recurrent ones in {self.layer.heads} heads" if self.layer.heads > 1 else ""
        taken = "taken" if program.cell.takes_gates else "projected"
        back = f", {len(program.adjoints)} backward" if training else ""
        return {
            "kernel": f"fused forward{' and backward' if training else ''}, cell {program.cell.name}",
            "phases": f"{len(program.steps)} a step{back}",
            "tile": f"{program.recurrent_rows} rows x {width} vectors of {lanes} {self.dtype} "
            f"({machine().name})",
            "products": _describe_products(program.precision, operand),
            "threads": f"{threads} {why}",
            "layout": f"weights in panels of {program.panel} hidden units with all their gates, "
            f"{size:.1f} MB{heads_of}",
            "chunk": f"the input of {chunk} steps is {taken} at once",
            "bound": f"{'multiply-adds' if computes else 'reading the weights'}, at batch {batch}",
        }


MOST_INTEGERS = 1 << 17  # products of integers in a sum, which then cannot exceed 32 bits


def _check_precision(precision: str, weights: Weights) -> None:
    """Refuse what there are no products of."""
    dtype = flatten(weights)[0].dtype
    if precision != "float32" and dtype != np.float32:
        raise ValueError(f"precision {precision!r} needs weights of float32, got {dtype}")
    matrices = (weight for weight in (weights.ih, weights.hh, weights.hr) if weight is not None)
    depth = max((weight.shape[1] for weight in matrices), default=0)
    if precision == "int8" and depth > MOST_INTEGERS:
        raise ValueError(f"precision 'int8' takes at most {MOST_INTEGERS} inputs or units, got {depth}")


def _describe_products(precision: str, operand: Operand) -> str:
    """What is multiplied, and how."""
    if precision == "float32":
        return "of the layer's own numbers"
    if operand is WIDENED:
        return (
            "bfloat16 is what weights are stored as, and rows rounded to; this processor has no instruction "
            "for it, so that they are widened to float32 in registers"
        )
    how = f"by {operand.instruction}"
    if operand.matrix:
        how += f", and by {operand.matrix} from {FEW + 1} rows on"
    if precision == "int8":
        return f"integers of 8 bits with a scale for each row of weights and of values, {how}"
    return f"bfloat16, {how}; sums are float32"


def _address(array: np.ndarray) -> int:
    """Of the first element; 0 if there is none."""
    return int(array.ctypes.data) if array.size else 0


WEIGHTS = {name: n for n, name in enumerate(WEIGHT_FIELDS.split())}


def _words(**values: np.ndarray | int) -> np.ndarray:
    """The part of a pass's record that names weights; of arrays their addresses."""
    words = np.zeros(len(WEIGHTS), np.int64)
    for name, value in values.items():
        words[WEIGHTS[name]] = value if isinstance(value, int) else _address(value)
    return words


def _with_noise(words: np.ndarray, noise: Noise) -> np.ndarray:
    """The words that name weights, and those of the noise."""
    words = words.copy()
    words[WEIGHTS["noise_key_0"] : WEIGHTS["noise_draw"] + 1] = noise
    return words


def _with(words: np.ndarray, **values: np.ndarray) -> np.ndarray:
    """That part with other arrays in some places."""
    words = words.copy()
    for name, value in values.items():
        words[WEIGHTS[name]] = _address(value)
    return words


def _every(states: States) -> np.ndarray:
    """Where the values of further states at each step lie, or their gradients, as records.EVERY."""
    rows = [(0, 0, 0) if array is None else (array.ctypes.data, *array.strides[:2]) for array in states]
    return np.array(rows, np.int64).reshape(-1, EVERY.words)


def _recurrent(tables: dict[str, np.ndarray], cell: Cell) -> tuple[int, dict[str, int]]:
    """The addresses of the tables of the recurrent weights, and of those of late gates."""
    return _address(tables["hh"]), {gate: _address(tables[gate]) for gate in cell.late}


def _singly(order: np.ndarray) -> list[np.ndarray]:
    return [order[n : n + 1] for n in range(order.size)]


class CPU:
    """See dispatch.Engine.

    Args:
        precision: of products in float32 layers: "float32", "bfloat16" or "int8".
    """

    def __init__(self, precision: str = "float32") -> None:
        self.precision = precision

    def prepare(self, cell: Cell, weights: Weights) -> CPUDirection:
        """See dispatch.Engine."""
        return CPUDirection(cell, weights, self.precision)
