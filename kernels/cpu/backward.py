"""The backward pass: gradients of the input, the initial states and the weights, in one parallel region.

A thread owns the same panels of hidden units as in the forward pass.  At each step, last to first, it
applies the cell's adjoint to its panels, meets the others at a barrier, and multiplies the gradients of
all gates by its columns of the recurrent weights, which gives what it needs itself for the step before.

After each chunk of steps, while the gradients of the gates are still in cache, their products with
inputs and outputs are added to the gradients of the weights, in the layout in which the caller wants
them; each thread fills the rows of its own panels, so that no sums cross threads and the bits do not
depend on timing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .cell import update_adjoint
from .memory import (
    Sequences,
    aligned,
    fill_zero,
    get_rows,
    layout,
    note_entering,
    note_operands,
    note_rows,
    note_states,
    round_up,
    rows_before,
    set_rows,
    starts_anew,
    tables,
    zero_padding,
)
from .shares import Shares, close_queues, each, share
from .simd import address, inlined, load, load_row, part, read, read_int, splat, store, store_row, write_int
from .team import LINE, barrier
from .tile import PLANES, outer_product, plane_rows, rows_times_planes, thin_outer_product
from .work import captured, run_with

GROUP = 4  # panels whose weights' gradients are a piece of the work
DX_ROWS = 64  # rows of the gradient of the input that are one, at most


class Transposed(NamedTuple):
    """Weights as the backward pass reads them, at addresses; see pack.py."""

    inputs: Any  # planes of the input weights
    recurrent: Any  # planes of the recurrent weights
    vectors: Any  # (V, H), padded
    projection: Any  # planes of the transposed projection


class Gradients(NamedTuple):
    """The gradients of the weights, shaped as the weights."""

    ih: Any  # (gates*H, I)
    hh: Any  # (gates*H, P)
    bias_ih: Any  # (gates*H,)
    bias_hh: Any  # (gates*H,)
    hr: Any  # (P, H)


class Workspace(NamedTuple):
    """Where the parts of the memory of a backward pass are; rows are padded."""

    carried: int  # (B, P): gradient of the output, carried from step to step
    raw: int  # (B, H): gradient of the output before its projection
    states: int  # (S, B, H): gradients of the other states
    initial: int  # (B, P): gradient of the initial output
    initial_states: int  # (S, B, H)
    vectors: int  # (V, H)
    from_input: int  # (chunk rows, panels, gates, panel): gradients of the gates
    from_output: int  # the same for the recurrent product, if there are split gates
    outputs: int  # (chunk rows, P): gradient of the output, if it is projected
    threads: int  # the space of each thread
    gates_width: int  # bytes of a row of from_input


@part
def workspace(spec, start, parts, batch, chunk_rows):
    """The memory of a backward pass, but for the space of its threads."""
    raw = start + batch * parts.output_width
    states = raw + batch * parts.width
    initial = states + spec.further * batch * parts.width
    initial_states = initial + batch * parts.output_width
    vectors = initial_states + spec.further * batch * parts.width
    from_input = round_up(vectors + spec.learned * parts.width, LINE)
    # a line more than the row needs, so that the rows of a column do not fall on the same cache set
    gates_width = round_up(parts.width * spec.gates, LINE) + LINE
    from_output = from_input + (chunk_rows * gates_width if spec.splits > 0 else 0)
    outputs = from_output + chunk_rows * gates_width
    threads = round_up(outputs + (chunk_rows * parts.output_width if spec.projected else 0), LINE)
    return Workspace(
        start, raw, states, initial, initial_states, vectors, from_input, from_output, outputs, threads,
        gates_width,
    )  # fmt: skip


class Space(NamedTuple):
    """The space of one thread."""

    first: int  # tables of row addresses for a chunk
    second: int
    values: int  # (chunk rows, PLANES vectors): a packed block of columns
    step: int  # the tables of a step, and scratch; see memory.Tables
    end: int


@inlined
def space(spec, start, chunk_rows, batch):
    """The space of one thread."""
    second = start + chunk_rows * 8
    values = round_up(second + chunk_rows * 8, LINE)
    step = values + chunk_rows * PLANES * spec.lanes * spec.size
    return Space(start, second, values, step, tables(spec, step, 0, batch).end)


@inlined
def note_uniform(start, stride, count, table):
    """Write `count` addresses at equal distances to a table."""
    for n in range(count):
        write_int(start + n * stride, table + n * 8)


@part
def add_outer(
    spec, d, d_stride, count, low, high, gates, panel, hidden, rows, columns, target, first, values, scratch
):
    """Add `d.T @ values` to the rows of a weight gradient that belong to the panels low to high.

    `d` is the address of (count, panels, gates, panel), `rows` that of the table of the `count` rows of
    values; `gates` maps the gates to their places in `target`; if `first`, the target is written.
    """
    lanes, size = spec.lanes, spec.size
    vector = lanes * size
    base, stride = address(target), target.strides[0]
    column = 0
    while column < columns:
        wide = PLANES if columns - column > (PLANES - 1) * lanes else 1
        for n in range(count):
            source = read_int(rows + n * 8) + column * size
            for v in range(wide):
                value = load_row(spec, source + v * vector, columns - column - v * lanes)
                store(value, values + (n * wide + v) * vector)
        whole = columns - column >= wide * lanes
        for p in range(low, high):
            units = min(panel, hidden - p * panel)
            blocks = -(-units // plane_rows(spec))
            for gate in range(gates.size):
                for block in range(blocks):
                    begin, end = share(units, block, blocks)
                    a = d + ((p * gates.size + gate) * panel + begin) * size
                    to = base + (gates[gate] * hidden + p * panel + begin) * stride + column * size
                    if whole:
                        add_outer_tile(spec, wide, end - begin, to, stride, a, d_stride, values, count, first)
                    else:
                        add_outer_tile(
                            spec, wide, end - begin, scratch, wide * vector, a, d_stride, values, count, True
                        )
                        for row in range(end - begin):
                            for v in range(wide):
                                left = columns - column - v * lanes
                                value = load(spec, scratch + (row * wide + v) * vector)
                                place = to + row * stride + v * vector
                                if not first:
                                    value = value + load_row(spec, place, left)
                                store_row(spec, value, place, left)
        column += wide * lanes


@inlined
def add_outer_tile(spec, wide, rows, target, stride, a, a_stride, values, count, first):
    """A tile of :func:`add_outer`."""
    if first:
        for row in range(rows):
            for v in range(wide):
                store(splat(spec, 0.0), target + row * stride + v * spec.lanes * spec.size)
    if wide == PLANES:
        outer_product(spec, rows, target, stride, target, stride, a, a_stride, values, 0, count)
    else:
        thin_outer_product(spec, rows, target, stride, target, stride, a, a_stride, values, 0, count)


@part
def add_rows(spec, d, d_stride, count, low, high, gates, hidden, target, first):
    """Add the sum of the rows of `d`, as in :func:`add_outer`, to a bias gradient."""
    vector = spec.lanes * spec.size
    for p in range(low, high):
        for gate in range(gates.size):
            for unit in range(spec.units):
                valid = hidden - p * spec.panel - unit * spec.lanes
                if valid <= 0:
                    continue
                place = address(target) + (gates[gate] * hidden + hidden - valid) * spec.size
                total = splat(spec, 0.0)
                if not first:
                    total = load_row(spec, place, valid)
                column = d + ((p * gates.size + gate) * spec.units + unit) * vector
                for n in range(count):
                    total = total + load(spec, column + n * d_stride)
                store_row(spec, total, place, valid)


@part
def start_anew(spec, step, active, low, high, stride, sequences, carried, initial):
    """Where a step starts from the initial state, add the gradient to that of the initial state.

    For the vectors low to high of the rows at `carried`, which then carry nothing on.
    """
    vector = spec.lanes * spec.size
    for row in range(active):
        if starts_anew(sequences, step, row):
            for place in range(row * stride + low * vector, row * stride + high * vector, vector):
                store(load(spec, initial + place) + load(spec, carried + place), initial + place)
                store(splat(spec, 0.0), carried + place)


@part
def adjoint_panel(spec, p, active, batch, hidden, weights, gates, parts, work, d_input, d_output, table):
    """The cell's adjoint at one step for the hidden units of panel p."""
    vector = spec.lanes * spec.size
    gate_stride = spec.units * vector
    for row in range(active):
        carried, width = (work.raw, parts.width) if spec.projected else (work.carried, parts.output_width)
        for unit in range(spec.units):
            valid = hidden - p * spec.panel - unit * spec.lanes
            column = p * spec.gates * gate_stride + row * work.gates_width + unit * vector
            if valid <= 0:  # padding, which the products read with weights of zero
                for gate in range(spec.gates):
                    store(splat(spec, 0.0), d_input + column + gate * gate_stride)
                    store(splat(spec, 0.0), d_output + column + gate * gate_stride)
            else:
                update_adjoint(
                    spec,
                    gates + row * spec.inputs * gate_stride + unit * vector,
                    gate_stride,
                    read_int(table.entering + row * 8),
                    read_int(table.states + row * 8),
                    read_int(table.strides + row * 8),
                    read_int(table.leaving + row * 8),
                    carried + row * width,
                    work.states + row * parts.width,
                    batch * parts.width,
                    d_input + column,
                    d_output + column,
                    weights.vectors,
                    parts.width,
                    work.vectors,
                    (p * spec.panel + unit * spec.lanes) * spec.size,
                    valid,
                )


@inlined
def add_dy(spec, active, outputs, low, high, work, parts, target, table):
    """The gradient of the projected output: what is carried plus dy, for the vectors low to high."""
    vector = spec.lanes * spec.size
    for row in range(active):
        for v in range(low, high):
            dy = load_row(spec, read_int(table.leaving + row * 8) + v * vector, outputs - v * spec.lanes)
            place = row * parts.output_width + v * vector
            store(dy + load(spec, work.carried + place), target + place)


class Given(NamedTuple):
    """What the threads are given; the arguments of :func:`backward`, and where things are."""

    spec: Any
    x: Any
    y: Any
    dy: Any
    dx: Any
    wanted: Any
    accumulate: Any
    weights: Any  # Transposed
    orders: Any
    grads: Any  # Gradients
    sequences: Any  # Sequences
    memory: Any  # address
    parts: Any  # Layout
    work: Any  # Workspace
    hidden: Any
    chunk: Any
    queues: Any  # addresses of two sets of queues, see shares.py


class Own(NamedTuple):
    """What is one thread's own at each step: panels of hidden units, and vectors of the output."""

    low: int
    high: int
    low_output: int
    high_output: int


@inlined
def own_of(given, thread, threads):
    """What is one thread's own."""
    spec = given.spec
    panels = round_up(given.hidden, spec.panel) // spec.panel
    low, high = share(panels, thread, threads)
    output_vectors = -(-given.y.shape[2] // spec.lanes)
    if spec.projected:
        low_output, high_output = share(output_vectors, thread, threads)
    else:
        low_output, high_output = low * spec.units, min(high * spec.units, output_vectors)
    return Own(low, high, low_output, high_output)


@inlined
def unproject(given, mine, own, table, here, active, sync, threads):
    """The gradient of the output of a step before its projection."""
    spec, parts, work, hidden, outputs = given.spec, given.parts, given.work, given.hidden, given.y.shape[2]
    d_outputs = work.outputs + here * parts.output_width
    add_dy(spec, active, outputs, mine.low_output, mine.high_output, work, parts, d_outputs, table)
    barrier(sync, threads)
    note_uniform(d_outputs, parts.output_width, active, own.first)
    note_uniform(work.raw, parts.width, active, own.second)
    low, high = mine.low * spec.units, min(mine.high * spec.units, -(-hidden // spec.lanes))
    rows_times_planes(
        spec, active, own.first, given.weights.projection, outputs, low, high, own.second, hidden, False,
        table.scratch,
    )  # fmt: skip


@inlined
def step_back(given, mine, own, table, step, base, sync, threads):
    """The gradients of the gates at a step, and of the states that entered it."""
    spec, sequences, parts, work, hidden = given.spec, given.sequences, given.parts, given.work, given.hidden
    batch, panels = given.x.shape[1], round_up(hidden, spec.panel) // spec.panel
    depth, stride = panels * spec.gates * spec.panel, spec.inputs * spec.panel * spec.size
    here = rows_before(sequences, step) - base
    active = rows_before(sequences, step + 1) - rows_before(sequences, step)
    note_entering(step, active, given.y, sequences, given.memory, parts, table.entering)
    note_states(spec, step, active, sequences, given.memory, parts, True, table)
    note_rows(given.dy, step, step + 1, sequences, table.leaving)
    if spec.projected:
        unproject(given, mine, own, table, here, active, sync, threads)
    d_input = work.from_input + here * work.gates_width
    d_output = work.from_output + here * work.gates_width
    for p in range(mine.low, mine.high):
        gates = given.memory + parts.gates + (p * parts.gate_rows + rows_before(sequences, step)) * stride
        adjoint_panel(
            spec, p, active, batch, hidden, given.weights, gates, parts, work, d_input, d_output, table
        )
    barrier(sync, threads)
    d_operand = work.carried
    if spec.operand > 0:
        d_operand = work.states + (spec.operand - 1) * batch * parts.width
    note_uniform(d_output, work.gates_width, active, own.first)
    note_uniform(d_operand, parts.output_width, active, own.second)
    rows_times_planes(
        spec, active, own.first, given.weights.recurrent, depth, mine.low_output, mine.high_output,
        own.second, parts.output_width // spec.size, spec.reads_operand, table.scratch,
    )  # fmt: skip
    # empty sequences, the last rows, start with the others, and hand on the gradient of their final state
    starting = batch if step == 0 else active
    start_anew(
        spec, step, starting, mine.low_output, mine.high_output, parts.output_width, sequences, work.carried,
        work.initial,
    )  # fmt: skip
    for n in range(spec.further):
        plane = n * batch * parts.width
        start_anew(
            spec, step, starting, mine.low * spec.units, mine.high * spec.units, parts.width, sequences,
            work.states + plane, work.initial_states + plane,
        )  # fmt: skip


@inlined
def add_panels(piece, given, own, scratch, count, first):
    """Add to the gradients of the input weights, or of the recurrent weights, of some panels."""
    spec, work, grads, hidden = given.spec, given.work, given.grads, given.hidden
    low = piece // 2 * GROUP
    high = min(low + GROUP, round_up(hidden, spec.panel) // spec.panel)
    if piece % 2 == 0:
        gates = given.orders[0]
        add_outer(
            spec, work.from_input, work.gates_width, count, low, high, gates, spec.panel, hidden, own.first,
            given.x.shape[2], grads.ih, first, own.values, scratch,
        )  # fmt: skip
        add_rows(
            spec, work.from_input, work.gates_width, count, low, high, gates, hidden, grads.bias_ih, first
        )
    else:
        gates = given.orders[1]
        add_outer(
            spec, work.from_output, work.gates_width, count, low, high, gates, spec.panel, hidden, own.second,
            given.y.shape[2], grads.hh, first, own.values, scratch,
        )  # fmt: skip
        add_rows(
            spec, work.from_output, work.gates_width, count, low, high, gates, hidden, grads.bias_hh, first
        )


@inlined
def add_weight_gradients(given, mine, shares, own, table, start, end):
    """Add what the steps from start to end give to the gradients of the weights."""
    spec, sequences, parts, work, hidden = given.spec, given.sequences, given.parts, given.work, given.hidden
    first = end == given.x.shape[0]
    base = rows_before(sequences, start)
    count = rows_before(sequences, end) - base
    note_rows(given.x, start, end, sequences, own.first)
    for step in range(start, end):
        place = own.second + (rows_before(sequences, step) - base) * 8
        active = rows_before(sequences, step + 1) - rows_before(sequences, step)
        note_operands(spec, step, active, given.y, sequences, given.memory, parts, True, place)
    groups = -(-hidden // (GROUP * spec.panel))
    each(shares, 2 * groups, False, add_panels, (given, own, table.scratch, count, first))
    if spec.projected:
        note_uniform(given.memory + parts.raw + base * parts.width, parts.width, count, own.first)
        add_outer(
            spec, work.outputs, parts.output_width, count, mine.low_output, mine.high_output, given.orders[2],
            spec.lanes, given.y.shape[2], own.first, hidden, given.grads.hr, first, own.values, table.scratch,
        )  # fmt: skip


@inlined
def write_block(piece, given, own, scratch, count, row_parts):
    """Some rows and columns of the gradient of the input."""
    spec, inputs = given.spec, given.x.shape[2]
    depth = round_up(given.hidden, spec.panel) * spec.gates
    first, last = share(count, piece % row_parts, row_parts)
    low = piece // row_parts * PLANES
    high = min(low + PLANES, -(-inputs // spec.lanes))
    rows_times_planes(
        spec, last - first, own.first + first * 8, given.weights.inputs, depth, low, high,
        own.second + first * 8, inputs, given.accumulate, scratch,
    )  # fmt: skip


@inlined
def write_dx(given, shares, own, table, start, end):
    """The gradient of the input of the steps from start to end."""
    spec, sequences, work = given.spec, given.sequences, given.work
    count = rows_before(sequences, end) - rows_before(sequences, start)
    note_uniform(work.from_input, work.gates_width, count, own.first)
    note_rows(given.dx, start, end, sequences, own.second)
    row_parts, columns = -(-count // DX_ROWS), -(-given.x.shape[2] // (PLANES * spec.lanes))
    each(shares, row_parts * columns, False, write_block, (given, own, table.scratch, count, row_parts))


def backward_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`backward`."""
    given = captured(arguments)
    spec, steps, batch = given.spec, given.x.shape[0], given.x.shape[1]
    mine = own_of(given, thread, threads)
    own = space(spec, given.work.threads, batch * given.chunk, batch)
    own = space(spec, given.work.threads + thread * (own.end - own.first), batch * given.chunk, batch)
    table = tables(spec, own.step, 0, batch)
    for end in range(steps, 0, -given.chunk):
        start = max(end - given.chunk, 0)
        base = rows_before(given.sequences, start)
        for step in range(end - 1, start - 1, -1):
            step_back(given, mine, own, table, step, base, sync, threads)
        add_weight_gradients(given, mine, Shares(thread, threads, given.queues), own, table, start, end)
        if given.wanted:
            # queues of their own, so that nobody has to wait in between
            queues = given.queues + threads * LINE
            write_dx(given, Shares(thread, threads, queues), own, table, start, end)
        barrier(sync, threads)


def backward(
    team,  # address of a team of threads
    threads,  # how many to use at most
    patience,  # microseconds for which to wait for them
    work,  # backward_work, compiled
    spec,
    x,  # (T, B, I)
    y,  # (T, B, P)
    dy,  # (T, B, P)
    dx,  # (T, B, I); any such array if not wanted
    wanted,  # whether dx is computed
    accumulate,  # whether dx is added to
    dfinal,  # (B, P) and (B, H)s; any arrays if not given
    given,  # whether gradients of the final states are given
    dinitial,  # (B, P) and (B, H)s
    packed,  # addresses, as in Transposed
    orders,  # the gates in the order of the input product, of the recurrent product, and 0
    grads,  # as in Gradients but for the vectors
    dvectors,  # (V, H)
    order,  # as in Sequences
    lengths,
    first,
    reset,
    reverse,
    memory,  # the tape: what forward left
    scratch,  # bytes, as in Workspace
    hidden,
    chunk,  # steps after which the gradients of the weights are added to
):
    """Run a sequence's backward pass: writes dx, the gradients of the initial states and of the weights."""
    sequences = Sequences(order, lengths, first, reset, reverse)
    steps, batch = x.shape[0], x.shape[1]
    rows = rows_before(sequences, steps)
    parts = layout(spec, hidden, y.shape[2], batch, rows, rows)
    start = aligned(scratch)
    room = workspace(spec, start, parts, batch, batch * chunk)
    fill_zero(spec, start, room.from_input)
    if given:
        set_rows(spec, dfinal[0], sequences, room.carried, parts.output_width)
        for n in range(spec.further):
            set_rows(spec, dfinal[n + 1], sequences, room.states + n * batch * parts.width, parts.width)
    if wanted and not accumulate:
        zero_padding(dx, sequences)
    lines = np.empty((2 * threads + 1) * LINE, np.uint8)
    queues = aligned(lines)
    close_queues(queues, 2 * threads)
    weights = Transposed(packed[0], packed[1], packed[2], packed[3])
    args = Given(
        spec, x, y, dy, dx, wanted, accumulate, weights, orders,
        Gradients(grads[0], grads[1], grads[2], grads[3], grads[4]), sequences, aligned(memory), parts, room,
        hidden, chunk, queues,
    )  # fmt: skip
    run_with(team, threads, patience, work, args, lines)
    get_rows(spec, room.initial, sequences, dinitial[0], parts.output_width)
    for n in range(spec.further):
        get_rows(spec, room.initial_states + n * batch * parts.width, sequences, dinitial[n + 1], parts.width)
    for n in range(spec.learned):
        for k in range(hidden):
            dvectors[n, k] = read(spec, room.vectors + n * parts.width + k * spec.size)
