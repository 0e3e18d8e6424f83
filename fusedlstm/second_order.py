# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="call-arg,var-annotated"
"""Gradients of gradients of one direction of one layer, on the CPU.

The first backward pass computes g = J^T dy, with J the derivative of the outputs with respect to the input,
the initial state and the weights: call these w.  Given cotangents v of g, the second computes the gradient
of <v, g> = <J v, dy>.  With respect to dy that is J v, the tangent of the outputs as w moves along v.  With
respect to w it is the tangent of J^T dy along v.  So two sweeps do it, and no graph is recorded:

* forward in time, values with their tangents.  The outputs are known, and so all pre-activations are one
  product of all rows; that of a step is with the tangent of the output alone;
* backward in time, gradients with their tangents, and then those of the weights and the input.

Both are made of the register tiles of the engine.  The element-wise part is derived from the cell: reverse
mode gives the adjoint, forward mode the tangents of the step and of the adjoint.
(Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.)

Rows are the steps of the sequences, in the order of the steps, longer sequences first; there is none for
padding.  With N of them, states have B more in front, the initial ones, and `entering` names the row of the
state that enters each step.  Sizes as in :mod:`fusedlstm.torch`, and:

    G  gates     K  pre-activations     S  states beside the output     V  learned vectors
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from fusedlstm.kernels.cpu import engine, plan, team
from fusedlstm.kernels.cpu.backward import add_outer, note_uniform
from fusedlstm.kernels.cpu.cell import simd_module
from fusedlstm.kernels.cpu.memory import aligned, round_up
from fusedlstm.kernels.cpu.pack import pack_vectors
from fusedlstm.kernels.cpu.shares import share
from fusedlstm.kernels.cpu.simd import OPTIONS, address, inlined, part, write_int
from fusedlstm.kernels.cpu.spec import Spec
from fusedlstm.kernels.cpu.team import LINE, barrier
from fusedlstm.kernels.cpu.tile import PLANES, plane_rows, rows_times_planes, tile_table
from fusedlstm.kernels.cpu.work import captured, run_with

from . import derive
from .cells import Cell, rnn_tanh
from .derive import Graph, differentiate, tangents, trace
from .once import once
from .torch import Export
from .weights import Weights

ONLY = engine.ONLY
OUTER_ROWS = plan.BACKWARD_ROWS  # rows whose gates stay in cache
OUTER_BLOCK = OUTER_ROWS * PLANES  # vectors of these rows that are laid out together
OUTER_PANEL = 24  # rows of a weight's gradient that a thread takes together: whole tiles, of whatever height

# --- The element-wise part, derived from the cell --------------------------------------------------------


def derived(cell: Cell) -> str:
    """Code of `step` and `adjoint`, which take and return values and then their tangents."""
    graph = Graph()
    results = trace(cell.function, cell.arguments, cell.constants, graph)
    names, seeds = cell.arguments, cell.seeds
    inputs, d_results = [graph.symbol(name) for name in names], [graph.symbol(name) for name in seeds]
    moved = [[graph.symbol(name) for name in _moved(cell, part)] for part in (names, seeds)]
    gradients = differentiate(results, d_results, inputs)
    step = [*results, *tangents(results, inputs, moved[0])]
    adjoint = [*gradients, *tangents(gradients, [*inputs, *d_results], [*moved[0], *moved[1]])]
    both = (*names, *seeds)
    step_source = derive.source("step", (*names, *_moved(cell, names)), step)
    return f"{step_source}\n\n" + derive.source("adjoint", (*both, *_moved(cell, both)), adjoint)


def _moved(cell: Cell, names: Sequence[str]) -> list[str]:
    """Names of tangents, which no argument of the cell has."""
    prefix = "t_"
    while any(name.startswith(prefix) for name in (*cell.arguments, *cell.seeds)):
        prefix += "_"
    return [prefix + name for name in names]


class Places(NamedTuple):
    """Where values lie, or their tangents."""

    gates: Any  # (N, K, H), in padded rows: pre-activations, and later their gradients
    outputs: Any  # (B + N, P)
    states: Any  # (S, B + N, H)
    raw: Any  # (N, H): outputs before their projection
    vectors: Any  # (V, H)
    d_outputs: Any  # (B + N, P): gradients, which sum up until a step is reached
    d_states: Any  # (S, B + N, H)
    d_raw: Any  # (N, H)
    d_vectors: Any  # (V, H): sums over all rows; tangents only


class Planes(NamedTuple):
    """Weights as the sweeps read them, at addresses; those that are called moved are tangents, 0 if zero."""

    recurrent: Any = 0  # (G, vectors of H, P)
    transposed: Any = 0  # (vectors of P, G*H)
    moved_transposed: Any = 0
    project: Any = 0  # (vectors of P, H)
    moved_project: Any = 0
    unproject: Any = 0  # (vectors of H, P)
    moved_unproject: Any = 0


class Sizes(NamedTuple):
    """What the sweeps need to know beside places."""

    batch: Any  # B
    rows: Any  # N
    hidden: Any  # H
    outputs: Any  # P
    stride: Any  # bytes of a row of gates


UPDATE = ("spec", "at", "moved", "sizes", "n", "entering", "offset", "valid")
_HEAD = (
    "    width = sizes.hidden * spec.size\n"
    "    leaving, rows = sizes.batch + n, sizes.batch + sizes.rows\n"
)  # fmt: skip


def _arguments(cell: Cell) -> dict[str, str]:
    """Where each argument of the cell lies."""
    places = {name: _gate(k) for k, name in enumerate(cell.preactivations)}
    places[cell.states[0]] = "outputs + entering * width"
    places |= {name: f"states + ({k} * rows + entering) * width" for k, name in enumerate(cell.states[1:])}
    places |= {name: f"vectors + {k} * width" for k, name in enumerate(cell.weights)}
    return {name: places[name] for name in cell.arguments}


def _gate(k: int) -> str:
    return f"gates + n * sizes.stride + {k} * width"


def _locals(names: Sequence[str]) -> str:
    """Values, then tangents, by names that no argument of `update` has."""
    return ", ".join([f"v_{name}" for name in names] + [f"t_{name}" for name in names])


def _load(places: dict[str, str]) -> list[str]:
    return [
        f"    {kind}_{name} = load_row(spec, {side}.{place} + offset, valid)"
        for name, place in places.items()
        for side, kind in (("at", "v"), ("moved", "t"))
    ]


def _store(value: str, place: str) -> str:
    return f"    store_row(spec, {value}, {place} + offset, valid)"


def _add(value: str, place: str) -> str:
    return _store(f"load_row(spec, {place} + offset, valid) + {value}", place)


def _update(cell: Cell, projected: bool) -> str:
    """The step at a vector of hidden units of a row."""
    names, count = cell.arguments, len(cell.states)
    lines = _load(_arguments(cell))
    lines.append(f"    new = step({_locals(names)})")
    if projected:
        lines += [_store("new[0]", "at.raw + n * width"), _store(f"new[{count}]", "moved.raw + n * width")]
    else:  # the output itself is known
        lines.append(_store(f"new[{count}]", "moved.outputs + leaving * width"))
    for k in range(count - 1):
        place = f"states + ({k} * rows + leaving) * width"
        lines += [
            _store(f"new[{k + 1}]", f"at.{place}"),
            _store(f"new[{count + k + 1}]", f"moved.{place}"),
        ]
    return f"def update({', '.join(UPDATE)}):\n{_HEAD}" + "\n".join(lines) + "\n"


def _update_adjoint(cell: Cell, projected: bool) -> str:
    """The gradient of `update`."""
    names, seeds = cell.arguments, cell.seeds
    output = "d_raw + n * width" if projected else "d_outputs + leaving * width"
    others = {name: f"d_states + ({k} * rows + leaving) * width" for k, name in enumerate(seeds[1:])}
    lines = _load(_arguments(cell) | {seeds[0]: output} | others)
    lines.append(f"    d = adjoint({_locals([*names, *seeds])})")
    value = {name: f"d[{k}]" for k, name in enumerate(names)}
    tangent = {name: f"d[{len(names) + k}]" for k, name in enumerate(names)}
    for k, name in enumerate(cell.preactivations):
        lines.append(_store(value[name], f"at.{_gate(k)}"))
        lines.append(_store(tangent[name], f"moved.{_gate(k)}"))
    entering = {cell.states[0]: "d_outputs + entering * width"}
    entering |= {
        name: f"d_states + ({k} * rows + entering) * width" for k, name in enumerate(cell.states[1:])
    }
    for name, place in entering.items():
        if name in names:
            lines += [_add(value[name], f"at.{place}"), _add(tangent[name], f"moved.{place}")]
    for k, name in enumerate(cell.weights):
        lines.append(_add(tangent[name], f"moved.d_vectors + {k} * width"))
    return f"def update_adjoint({', '.join(UPDATE)}):\n{_HEAD}" + "\n".join(lines) + "\n"


@once
def _source(cell: Cell, projected: bool) -> str:
    return "\n\n".join([derived(cell), _update(cell, projected), _update_adjoint(cell, projected)])


@once
def _module(cell: Cell, projected: bool) -> Any:
    return simd_module(_source(cell, projected), f"<fusedlstm second order {cell.key}>", __name__)


def update(*args: Any) -> None:
    """A step and its tangent, for one vector of hidden units of one row."""
    raise NotImplementedError("works in compiled code only")


def update_adjoint(*args: Any) -> None:
    """The gradient of a step and its tangent, likewise."""
    raise NotImplementedError("works in compiled code only")


@overload(update, jit_options={"forceinline": True, **OPTIONS})
def _(spec, at, moved, sizes, n, entering, offset, valid):
    return _module(spec.cell, spec.projected).update


@overload(update_adjoint, jit_options={"forceinline": True, **OPTIONS})
def _(spec, at, moved, sizes, n, entering, offset, valid):
    return _module(spec.cell, spec.projected).update_adjoint


# --- Products --------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """The space of one thread: tables of row addresses, a packed block of columns, and room for a tile."""

    source: int
    target: int
    values: int
    scratch: int
    end: int


@part
def space(spec, start, rows, vectors):
    vector = spec.lanes * spec.size
    target = start + rows * 8
    values = round_up(target + rows * 8, LINE)
    scratch = values + vectors * vector
    end = round_up(scratch + plane_rows(spec) * PLANES * vector, LINE)
    return Space(start, target, values, scratch, end)


@part
def vectors_of(spec, length):
    return -(-length // spec.lanes)


@part
def add_rows_times_planes(spec, count, weights, depth, low, high, length, own):
    """Add `source @ weights` to `target`, for `count` rows and the vectors low to high of their columns."""
    for v in range(low, high, PLANES):  # so that a block of the weights stays in cache
        rows_times_planes(
            spec, count, own.source, weights, depth, v, min(v + PLANES, high), own.target, length, True,
            own.scratch,
        )  # fmt: skip


@inlined
def note_entering(start, width, entering, first, last, table):
    """Write the addresses of the rows of `width` bytes that enter the rows first to last to a table."""
    for n in range(first, last):
        write_int(start + entering[n] * width, table + (n - first) * 8)


@part
def pack_vector(spec, weight, v, plane):
    """Lay out a vector of columns of a matrix (m, n) as a plane (m,)."""
    along, across = weight.strides
    valid = min(spec.lanes, weight.shape[1] - v * spec.lanes)
    start = address(weight) + v * spec.lanes * across
    pack_vectors(spec, start, across, along, valid, weight.shape[0], plane, spec.lanes * spec.size)


def product_work(thread, threads, sync, arguments):
    """Add (N, m) @ (m, n) to (N, n); a thread takes some of the columns.

    The planes of these are not kept: they stay in cache while all rows are multiplied by them.
    """
    spec, source, width, weight, target, target_width, rows, start = captured(arguments)
    depth, length = weight.shape
    own = space(spec, start + thread * space(spec, 0, rows, PLANES * depth).end, rows, PLANES * depth)
    note_uniform(source, width, rows, own.source)
    note_uniform(target, target_width, rows, own.target)
    low, high = share(vectors_of(spec, length), thread, threads)
    plane = depth * spec.lanes * spec.size
    for first in range(low, high, PLANES):
        last = min(first + PLANES, high)
        for v in range(first, last):
            pack_vector(spec, weight, v, own.values + (v - first) * plane)
        rows_times_planes(
            spec, rows, own.source, own.values - first * plane, depth, first, last, own.target, length, True,
            own.scratch,
        )  # fmt: skip


def outer_work(thread, threads, sync, arguments):
    """Write the tangent of the product of (N, m) transposed and (N, n) to (m, n); a thread takes some rows.

    That is values by tangents and tangents by values, the latter alone where `low` is 1.
    """
    spec, d, source, entering, low, target, start = captured(arguments)
    own = space(spec, start + thread * space(spec, 0, OUTER_ROWS, OUTER_BLOCK).end, OUTER_ROWS, OUTER_BLOCK)
    length, columns = target.shape
    low_panel, high_panel = share(-(-length // OUTER_PANEL), thread, threads)
    for side in range(low, 2):
        rows = source.start + (1 - side) * source.side
        for begin in range(0, entering.size, OUTER_ROWS):
            end, first = min(begin + OUTER_ROWS, entering.size), side == low and begin == 0
            note_entering(rows, source.row, entering, begin, end, own.source)
            add_outer(
                spec, d.start + side * d.side + begin * d.row, d.row, end - begin, low_panel, high_panel,
                ONLY, OUTER_PANEL, length, own.source, columns, target, first, own.values, own.scratch,
            )  # fmt: skip


def product(team, threads, patience, work, spec, source, width, weight, target, target_width, rows):
    """Run `product_work`."""
    memory = np.empty(threads * space(spec, 0, rows, PLANES * len(weight)).end + LINE, np.uint8)
    args = (spec, source, width, weight, target, target_width, rows, aligned(memory))
    run_with(team, threads, patience, work, args, memory)


def outer(team, threads, patience, work, spec, d, source, entering, low, target):
    """Run `outer_work`."""
    memory = np.empty(threads * space(spec, 0, OUTER_ROWS, OUTER_BLOCK).end + LINE, np.uint8)
    args = (spec, d, source, entering, low, target, aligned(memory))
    run_with(team, threads, patience, work, args, memory)


INT, INTS = types.int64, types.int64[::1]


class Sides(NamedTuple):
    """Where the rows of values lie, and those of their tangents."""

    start: Any
    side: Any  # bytes from the values to the tangents
    row: Any  # bytes from row to row


class Packed(NamedTuple):
    """A matrix as planes."""

    array: np.ndarray  # keeps the memory
    address: int


class Products:
    """Products of matrices by the tiles of the engine, which for a layer's shapes are quicker than BLAS."""

    def __init__(self, scalar: types.Float) -> None:
        self.spec = spec = Spec(rnn_tanh, scalar, False)  # of any cell; products know nothing of it
        self._table = tile_table(spec).ctypes.data
        matrix = types.Array(scalar, 2, "A")
        _, self._pack = engine.packers(scalar)
        self._product = kernel(product, product_work, (spec, INT, INT, matrix, *[INT] * 3))
        sides = types.NamedUniTuple(INT, len(Sides._fields), Sides)
        self._outer = kernel(outer, outer_work, (spec, sides, sides, INTS, INT, matrix))

    def pack(self, weight: Tensor) -> Packed:  # (m, n)
        """For products from the left with a matrix (..., m)."""
        matrix = np.from_dlpack(Export(weight))
        planes = engine.empty(len(matrix) * round_up(matrix.shape[1], self.spec.lanes), matrix.dtype)
        place = planes.ctypes.data
        self._pack.entry(*self._team(matrix.size), self._pack.address, None, matrix, ONLY, len(matrix), place)
        return Packed(planes, place)

    def add(
        self,
        target: Tensor,  # (N, n)
        source: Tensor,  # (N, m)
        weight: Tensor,  # (m, n), quickest if its rows or its columns are contiguous
    ) -> None:
        """target += source @ weight"""
        rows, matrix = len(source), np.from_dlpack(Export(weight))
        self._product.entry(
            *self._team(rows * matrix.size / 32), self._product.address, self._table, *_memory(source),
            matrix, *_memory(target), rows,
        )  # fmt: skip

    def outer(
        self,
        target: Tensor,  # (m, n)
        d: Tensor,  # (2, N, m): values, and after them their tangents
        source: Tensor,  # (..., n)
        moved: Tensor | None,  # (..., n): its tangent, with rows as far from each other; None is zero
        entering: np.ndarray,  # (N,): the rows of both
    ) -> None:
        """target = tangent of d.T @ source"""
        if not len(entering):  # then no row writes to it
            target.zero_()
            return
        result = np.from_dlpack(Export(target))
        self._outer.entry(
            *self._team(len(entering) * target.numel() / 32), self._outer.address, self._table,
            _sides(d[0], d[1]), _sides(source, moved), entering, int(moved is None), result,
        )  # fmt: skip

    def _team(self, work: float) -> tuple[int, int, int]:
        """What an entry is told of the threads that pay for an amount of work."""
        threads = team.get_num_threads() if work > 1 << 16 else 1
        return team.current().address if threads > 1 else 0, threads, team.PATIENCE_US


products = once(Products)


def kernel(entry: Any, work: Any, arguments: tuple[Any, ...]) -> engine.Kernel:
    """Compile, or load from Numba's cache."""
    return engine.compile_kernel(entry, work, types.Tuple((*arguments, INT)), *arguments)


def _memory(matrix: Tensor) -> tuple[int, int]:
    """Its address, and the bytes from row to row."""
    return matrix.data_ptr(), matrix.stride(0) * matrix.element_size()


def _sides(values: Tensor, moved: Tensor | None) -> Sides:  # (rows, n) both
    start, row = _memory(values)
    return Sides(start, 0 if moved is None else moved.data_ptr() - start, row)


# --- The two sweeps --------------------------------------------------------------------------------------


def forward_work(thread, threads, sync, arguments):
    """Add to the tangents of the pre-activations what comes from those of the outputs; fill all states."""
    spec, first, entering, at, moved, planes, sizes, start = captured(arguments)
    batch, hidden, outputs, size = sizes.batch, sizes.hidden, sizes.outputs, spec.size
    vector = spec.lanes * size
    low, high = share(vectors_of(spec, hidden), thread, threads)
    low_output, high_output = share(vectors_of(spec, outputs), thread, threads)
    own = space(spec, start + thread * space(spec, 0, 2 * batch, 0).end, 2 * batch, 0)
    for step in range(first.size - 1):
        begin, end = first[step], first[step + 1]
        count = end - begin
        note_entering(moved.outputs, outputs * size, entering, begin, end, own.source)
        for gate in range(spec.gates):
            row = begin * sizes.stride + (spec.splits + gate) * hidden * size
            note_uniform(moved.gates + row, sizes.stride, count, own.target)
            weights = planes.recurrent + gate * vectors_of(spec, hidden) * outputs * vector
            add_rows_times_planes(spec, count, weights, outputs, low, high, hidden, own)
        for n in range(begin, end):
            for u in range(low, high):
                update(spec, at, moved, sizes, n, entering[n], u * vector, hidden - u * spec.lanes)
        barrier(sync, threads)
        if spec.projected:
            note_uniform(moved.outputs + (batch + begin) * outputs * size, outputs * size, count, own.target)
            note_uniform(moved.raw + begin * hidden * size, hidden * size, count, own.source)
            add_rows_times_planes(spec, count, planes.project, hidden, low_output, high_output, outputs, own)
            if planes.moved_project != 0:
                note_uniform(at.raw + begin * hidden * size, hidden * size, count, own.source)
                add_rows_times_planes(
                    spec, count, planes.moved_project, hidden, low_output, high_output, outputs, own
                )
            barrier(sync, threads)


def backward_work(thread, threads, sync, arguments):
    """The gradients of all pre-activations and states, and their tangents."""
    spec, first, entering, at, moved, planes, sizes, start = captured(arguments)
    batch, hidden, outputs, size = sizes.batch, sizes.hidden, sizes.outputs, spec.size
    vector, depth = spec.lanes * size, spec.gates * hidden
    low, high = share(vectors_of(spec, hidden), thread, threads)
    low_output, high_output = low, high
    if spec.projected:
        low_output, high_output = share(vectors_of(spec, outputs), thread, threads)
    own = space(spec, start + thread * space(spec, 0, 2 * batch, 0).end, 2 * batch, 0)
    for step in range(first.size - 2, -1, -1):
        begin, end = first[step], first[step + 1]
        count = end - begin
        second = count * 8  # where the tangents begin in the tables
        if spec.projected:
            leaving, width = (batch + begin) * outputs * size, outputs * size
            note_uniform(at.d_outputs + leaving, width, count, own.source)
            note_uniform(moved.d_outputs + leaving, width, count, own.source + second)
            note_uniform(at.d_raw + begin * hidden * size, hidden * size, count, own.target)
            note_uniform(moved.d_raw + begin * hidden * size, hidden * size, count, own.target + second)
            add_rows_times_planes(spec, 2 * count, planes.unproject, outputs, low, high, hidden, own)
            if planes.moved_unproject != 0:
                note_uniform(moved.d_raw + begin * hidden * size, hidden * size, count, own.target)
                add_rows_times_planes(spec, count, planes.moved_unproject, outputs, low, high, hidden, own)
        for n in range(begin, end):
            for u in range(low, high):
                update_adjoint(spec, at, moved, sizes, n, entering[n], u * vector, hidden - u * spec.lanes)
        barrier(sync, threads)
        row = begin * sizes.stride + spec.splits * hidden * size
        note_uniform(at.gates + row, sizes.stride, count, own.source)
        note_uniform(moved.gates + row, sizes.stride, count, own.source + second)
        note_entering(at.d_outputs, outputs * size, entering, begin, end, own.target)
        note_entering(moved.d_outputs, outputs * size, entering, begin, end, own.target + second)
        add_rows_times_planes(
            spec, 2 * count, planes.transposed, depth, low_output, high_output, outputs, own
        )
        if planes.moved_transposed != 0:
            note_entering(moved.d_outputs, outputs * size, entering, begin, end, own.target)
            add_rows_times_planes(
                spec, count, planes.moved_transposed, depth, low_output, high_output, outputs, own
            )
        if spec.projected:
            barrier(sync, threads)


def sweep(team, threads, patience, work, spec, first, entering, at, moved, planes, sizes):
    """Run `forward_work` or `backward_work`."""
    memory = np.empty(threads * space(spec, 0, 2 * sizes.batch, 0).end + LINE, np.uint8)
    args = (spec, first, entering, at, moved, planes, sizes, aligned(memory))
    run_with(team, threads, patience, work, args, memory)


@once
def sweeps(spec: Spec) -> tuple[engine.Kernel, engine.Kernel]:
    """Forward and backward."""
    digest = hashlib.sha256(_source(spec.cell, spec.projected).encode()).hexdigest()[:16]
    tuples = (types.NamedUniTuple(INT, len(t._fields), t) for t in (Places, Places, Planes, Sizes))
    arguments = (spec, INTS, INTS, *tuples)

    def named(work: Any) -> Any:
        """Numba's cache tells by the name what has been generated differently."""
        return FunctionType(work.__code__, work.__globals__, f"{work.__name__}_{digest}")

    return kernel(sweep, named(forward_work), arguments), kernel(sweep, named(backward_work), arguments)


# --- Rows --------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows of the steps of the sequences."""

    places: Tensor | None  # (N,): of the rows among all times and sequences; None if they are these
    entering: np.ndarray  # (N,): the row of the state that enters each
    first: np.ndarray  # (T + 1,): the number of rows before each step
    order: Tensor | None  # (B,): sequences in descending order of length; None if they are
    last: Any  # an index of B rows: of the states after the last step of each of these
    batch: int  # B

    def enter(self, states: Tensor) -> Tensor:  # (B + N, n)
        """The rows (N, n) that enter the steps."""
        return states[: len(self.entering)] if self.order is None else states[torch.from_numpy(self.entering)]

    def take(self, array: Tensor) -> Tensor:  # (T, B, n)
        """The rows (N, n) of an array."""
        flat = array.reshape(-1, array.shape[-1])
        return flat if self.places is None else flat.index_select(0, self.places)

    def put(self, rows: Tensor, steps: int) -> Tensor:  # (N, n)
        """The array (T, B, n) of these rows, zero in the padding."""
        if self.places is None:
            return rows.reshape(steps, -1, rows.shape[-1])
        flat = rows.new_zeros((steps * self.batch, rows.shape[-1]))
        return flat.index_copy_(0, self.places, rows).view(steps, -1, rows.shape[-1])

    def sort(self, states: Tensor) -> Tensor:  # (B, n)
        """States in the order of the rows."""
        return states if self.order is None else states[self.order]

    def unsort(self, states: Tensor) -> Tensor:  # (B, n)
        """States in the order in which they were given."""
        return states if self.order is None else states[self.order.argsort()]


def make_rows(
    steps: int, batch: int, lengths: np.ndarray | None, reset: np.ndarray | None, reverse: bool
) -> Rows:
    """The rows of sequences of these lengths (B,), with boundaries (T, B), in one direction."""
    if lengths is None and reset is None:
        count = steps * batch
        places = torch.arange(count).view(steps, batch).flip(0).flatten() if reverse else None
        final = slice(count, count + batch)
        return Rows(places, np.arange(count), np.arange(0, count + 1, batch), None, final, batch)
    ends = np.full(batch, steps) if lengths is None else lengths
    order = np.argsort(-ends, kind="stable")
    ends = ends[order]
    active = np.arange(steps)[:, None] < ends
    step, row = active.nonzero()
    first = np.concatenate([[0], active.sum(1).cumsum()])
    time = ends[row] - 1 - step if reverse else step
    anew = step == 0
    if reset is not None:  # a pass in reverse starts anew on the other side of a boundary
        anew |= reset[np.where(anew, 0, time + reverse), order[row]]
    entering = np.where(anew, row, batch + first[step - 1] + row)
    last = torch.from_numpy(np.where(ends == 0, 0, batch + first[ends - 1]) + np.arange(batch))
    places = None if lengths is None and not reverse else torch.from_numpy(time * batch + order[row])
    return Rows(places, entering, first, torch.from_numpy(order), last, batch)


# --- The gradient of the first backward pass -------------------------------------------------------------


class Second(NamedTuple):
    """Gradients with respect to all that the first backward pass depends on."""

    dy: Tensor  # (T, B, P)
    dfinal: list[Tensor]  # (B, P) and (B, H)s
    x: Tensor | None  # (T, B, I), if it is wanted
    initial: list[Tensor]  # (B, P) and (B, H)s
    weights: Weights


def second_backward(
    cell: Cell,
    x: Tensor,  # (T, B, I)
    y: Tensor,  # (T, B, P), the output
    initial: Sequence[Tensor | None],  # (B, P) and (B, H)s; None is zero
    weights: Weights,
    dy: Tensor,  # (T, B, P)
    dfinal: Sequence[Tensor],  # (B, P) and (B, H)s
    moved_x: Tensor | None,  # the cotangents of the first gradients, shaped as these; None is zero
    moved_initial: Sequence[Tensor | None],
    moved_weights: Weights,
    lengths: np.ndarray | None,  # (B,)
    reset: np.ndarray | None,  # (T, B)
    reverse: bool,
    wants_x: bool,
) -> Second:
    """The gradient of the first backward pass, of one direction of one layer.

    The recurrent weights multiply the output; cells in which they multiply another state have to be replayed.
    """
    steps, batch, _ = x.shape
    rows = make_rows(steps, batch, lengths, reset, reverse)
    run = _Pass(cell, weights, moved_weights, rows, x, moved_x)
    run.outputs[0, batch:] = rows.take(y)
    for side, given in enumerate((initial, moved_initial)):
        for target, state in zip((run.outputs[side], *run.states[side]), given):
            if state is not None:
                target[:batch] = rows.sort(state)
    run.d_outputs[0, batch:] = rows.take(dy)
    for target, state in zip((run.d_outputs[0], *run.d_states[0]), dfinal):
        target[rows.last] += rows.sort(state)
    run.project()
    run.sweep()
    dweights, dx = run.weight_gradients(), run.input_gradient() if wants_x else None
    return Second(
        rows.put(run.outputs[1, batch:], steps),
        [rows.unsort(part[rows.last]) for part in (run.outputs[1], *run.states[1])],
        None if dx is None else rows.put(dx, steps),
        [rows.unsort(part[:batch]) for part in (run.d_outputs[1], *run.d_states[1])],
        dweights,
    )


class _Pass:
    """The buffers of one second backward pass, see `Places`: values, and after them their tangents."""

    def __init__(
        self, cell: Cell, weights: Weights, moved: Weights, rows: Rows, x: Tensor, moved_x: Tensor | None
    ) -> None:
        scalar = types.float32 if x.dtype is torch.float32 else types.float64
        self.spec = spec = Spec(cell, scalar, weights.hr is not None)
        self.tiles, self.rows = products(scalar), rows
        self.own, self.moved = _by_product(cell, weights), _by_product(cell, moved)
        self.x = rows.take(x.resolve_neg()).contiguous()
        self.moved_x = None if moved_x is None else rows.take(moved_x.resolve_neg()).contiguous()
        self.hidden, self.wide = weights.ih.shape[0] // spec.gates, weights.ih.shape[0]
        number = len(rows.entering)
        count = rows.batch + number
        self.outputs = x.new_zeros(2, count, weights.hh.shape[1])
        self.states = x.new_zeros(2, spec.further, count, self.hidden)
        self.raw = x.new_zeros(2, number if spec.projected else 0, self.hidden)
        # a line more than a row needs, so that the rows of a column do not fall on the same cache set
        width = spec.inputs * self.hidden
        self.gates = x.new_empty(2, number, width + LINE // spec.size)[..., :width]
        self.vectors = x.new_zeros(2, spec.learned, self.hidden)
        for side, own in enumerate((self.own, self.moved)):
            self.gates[side] = self._bias(own)
            for target, vector in zip(self.vectors[side], own.vectors):
                if vector is not None:
                    target.copy_(vector)
        self.d_outputs, self.d_states, self.d_raw = map(
            torch.zeros_like, (self.outputs, self.states, self.raw)
        )
        self.d_vectors = x.new_zeros(spec.learned, self.hidden)

    def _bias(self, weights: Weights) -> Tensor:
        """The biases of all pre-activations."""
        total = self.outputs.new_zeros(self.gates.shape[-1])
        for target, bias in zip(self.products(total), (weights.bias_ih, weights.bias_hh)):
            if bias is not None:
                target += bias
        return total

    def products(self, gates: Tensor) -> tuple[Tensor, Tensor]:  # (..., K*H)
        """What the input product fills of the gates, and what the recurrent one does."""
        return gates[..., : self.wide], gates[..., -self.wide :]

    def project(self) -> None:
        """Fill the gates, and their tangents but for what comes from the tangents of the outputs."""
        own, moved = self.own, self.moved
        from_input, from_output = self.products(self.gates)
        entering = self.rows.enter(self.outputs[0])
        terms = (
            (from_input[0], self.x, own.ih),
            (from_input[1], self.x, moved.ih),
            (from_input[1], self.moved_x, own.ih),
            (from_output[0], entering, own.hh),
            (from_output[1], entering, moved.hh),
        )
        for begin in range(0, len(entering), OUTER_ROWS):  # whose gates stay in cache
            chunk = slice(begin, begin + OUTER_ROWS)
            for target, source, weight in terms:
                if source is not None and weight is not None:
                    self.tiles.add(target[chunk], source[chunk], weight.T)

    def sweep(self) -> None:
        """Forward and backward through time."""
        own, moved, (forward, backward) = self.own, self.moved, sweeps(self.spec)
        # each gate begins with a vector of its own
        by_gate = own.hh.unflatten(0, (self.spec.gates, -1))  # type: ignore[no-untyped-call]
        if missing := -self.hidden % self.spec.lanes:
            by_gate = torch.nn.functional.pad(by_gate, (0, 0, 0, missing))

        def pack(weight: Tensor | None) -> Packed | None:
            return None if weight is None else self.tiles.pack(weight)

        def transposed(weight: Tensor | None) -> Packed | None:
            return None if weight is None else self.tiles.pack(weight.T)

        self._run(
            forward, recurrent=transposed(by_gate.flatten(0, 1)), project=transposed(own.hr),
            moved_project=transposed(moved.hr),
        )  # fmt: skip
        self._run(
            backward, transposed=pack(own.hh), moved_transposed=pack(moved.hh),
            unproject=pack(own.hr), moved_unproject=pack(moved.hr),
        )  # fmt: skip

    def _run(self, kernel: engine.Kernel, **packed: Packed | None) -> None:
        planes = Planes(**{name: part.address for name, part in packed.items() if part is not None})
        at, along = (
            Places(
                *(getattr(self, name)[side].data_ptr() for name in Places._fields[:-1]),
                self.d_vectors.data_ptr(),
            )
            for side in (0, 1)
        )
        rows, threads = self.rows, self._threads()
        _, stride = _memory(self.gates[0])
        sizes = Sizes(rows.batch, len(rows.entering), self.hidden, self.outputs.shape[-1], stride)
        kernel.entry(
            team.current().address if threads > 1 else 0, threads, team.PATIENCE_US, kernel.address,
            tile_table(self.spec).ctypes.data, rows.first, rows.entering, at, along, planes, sizes,
        )  # fmt: skip

    def _threads(self) -> int:
        """As many as pay, which meet once a step."""
        steps, weights = len(self.rows.first) - 1, self.own.hh.numel()
        work = len(self.rows.entering) * weights / plan.FLOPS + steps * weights * self.spec.size / plan.BYTES
        if self.hidden <= self.spec.lanes or plan.START + steps * plan.BARRIER > work / 2:
            return 1
        return int(team.get_num_threads())

    def weight_gradients(self) -> Weights:
        """From the gradients of the gates, which have taken the place of these."""
        own, outer, rows = self.own, self.tiles.outer, self.rows
        new = self.outputs.new_empty
        gradients = Weights(new(own.ih.shape), new(own.hh.shape), vectors=tuple(self.d_vectors))
        d_input, d_output = self.products(self.gates)
        every = np.arange(len(rows.entering))
        outer(gradients.ih, d_input, self.x, self.moved_x, every)
        outer(gradients.hh, d_output, *self.outputs, rows.entering)
        if own.bias_ih is not None:
            gradients = gradients._replace(bias_ih=d_input[1].sum(0), bias_hh=d_output[1].sum(0))
        if own.hr is not None:
            gradients = gradients._replace(hr=new(own.hr.shape))
            outer(gradients.hr, self.d_outputs[:, rows.batch :], *self.raw, every)
        return _by_product(self.spec.cell, gradients, back=True)

    def input_gradient(self) -> Tensor:  # (N, I)
        """From the gradients of the gates."""
        d, moved_d = self.products(self.gates)[0]
        dx: Tensor = d.new_zeros(len(d), self.own.ih.shape[1])
        self.tiles.add(dx, moved_d, self.own.ih)
        if self.moved.ih is not None:
            self.tiles.add(dx, d, self.moved.ih)
        return dx


def _by_product(cell: Cell, weights: Weights, back: bool = False) -> Weights:
    """Weights whose gates are in the order of the products; or back from there."""
    if not cell.split:
        return weights

    def reorder(entry: Tensor | None, gates: tuple[str, ...]) -> Tensor | None:
        if entry is None:
            return None
        here, there = (gates, cell.gates) if back else (cell.gates, gates)
        by_gate = entry.unflatten(0, (len(gates), -1))  # type: ignore[no-untyped-call]
        ordered: Tensor = by_gate[[here.index(gate) for gate in there]].flatten(0, 1)
        return ordered

    inputs, recurrent = cell.input_gates, cell.recurrent_gates
    return Weights(
        reorder(weights.ih, inputs), reorder(weights.hh, recurrent), reorder(weights.bias_ih, inputs),
        reorder(weights.bias_hh, recurrent), weights.hr, weights.vectors,
    )  # fmt: skip
