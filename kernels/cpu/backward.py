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

from .cell import update_adjoint
from .memory import (
    LINE,
    Sequences,
    aligned,
    fill_zero,
    get_rows,
    layout,
    note_entering,
    note_rows,
    note_states,
    round_up,
    rows_before,
    set_rows,
    starts_anew,
    tables,
    zero_padding,
)
from .simd import address, inlined, load, load_row, part, read, read_int, splat, store, store_row, write_int
from .team import barrier
from .tile import PLANES, outer_product, plane_rows, rows_times_planes, share, thin_outer_product
from .work import captured, run


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
    initial = states + spec.states * batch * parts.width
    initial_states = initial + batch * parts.output_width
    vectors = initial_states + spec.states * batch * parts.width
    from_input = round_up(vectors + spec.vectors * parts.width, LINE)
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


def backward_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`backward`."""
    (
        spec, x, y, dy, dx, accumulate, weights, orders, grads, sequences, memory, parts, work, hidden, chunk
    ) = captured(arguments)  # fmt: skip
    steps, batch, inputs = x.shape
    outputs = y.shape[2]
    chunk_rows = batch * chunk
    panels = round_up(hidden, spec.panel) // spec.panel
    low, high = share(panels, thread, threads)
    low_input, high_input = share(-(-inputs // spec.lanes), thread, threads)
    output_vectors = -(-outputs // spec.lanes)
    if spec.projected:
        low_output, high_output = share(output_vectors, thread, threads)
    else:
        low_output, high_output = low * spec.units, min(high * spec.units, output_vectors)
    depth = panels * spec.gates * spec.panel
    stride = spec.inputs * spec.panel * spec.size
    own = space(spec, work.threads, chunk_rows, batch)
    own = space(spec, work.threads + thread * (own.end - own.first), chunk_rows, batch)
    table = tables(spec, own.step, 0, batch)
    input_gates, recurrent_gates, only = orders
    ends = range(steps, 0, -chunk)
    for end in ends:
        start, first = max(end - chunk, 0), end == steps
        base = rows_before(sequences, start)
        count = rows_before(sequences, end) - base
        for step in range(end - 1, start - 1, -1):
            here = rows_before(sequences, step) - base
            active = rows_before(sequences, step + 1) - rows_before(sequences, step)
            note_entering(step, active, y, sequences, memory, parts, table.entering)
            note_states(step, active, sequences, memory, parts, True, table)
            note_rows(dy, step, step + 1, sequences, table.leaving)
            if spec.projected:
                d_outputs = work.outputs + here * parts.output_width
                add_dy(spec, active, outputs, low_output, high_output, work, parts, d_outputs, table)
                barrier(sync, threads)
                note_uniform(d_outputs, parts.output_width, active, own.first)
                note_uniform(work.raw, parts.width, active, own.second)
                low_hidden, high_hidden = low * spec.units, min(high * spec.units, -(-hidden // spec.lanes))
                rows_times_planes(
                    spec, active, own.first, weights.projection, outputs, low_hidden, high_hidden, own.second,
                    hidden, False, table.scratch,
                )  # fmt: skip
            d_input = work.from_input + here * work.gates_width
            d_output = work.from_output + here * work.gates_width
            for p in range(low, high):
                gates = memory + parts.gates + (p * parts.gate_rows + rows_before(sequences, step)) * stride
                adjoint_panel(
                    spec, p, active, batch, hidden, weights, gates, parts, work, d_input, d_output, table
                )
            barrier(sync, threads)
            note_uniform(d_output, work.gates_width, active, own.first)
            note_uniform(work.carried, parts.output_width, active, own.second)
            rows_times_planes(
                spec, active, own.first, weights.recurrent, depth, low_output, high_output, own.second,
                parts.output_width // spec.size, spec.reads_output, table.scratch,
            )  # fmt: skip
            start_anew(
                spec, step, active, low_output, high_output, parts.output_width, sequences, work.carried,
                work.initial,
            )  # fmt: skip
            for n in range(spec.states):
                plane = n * batch * parts.width
                start_anew(
                    spec, step, active, low * spec.units, high * spec.units, parts.width, sequences,
                    work.states + plane, work.initial_states + plane,
                )  # fmt: skip

        note_rows(x, start, end, sequences, own.first)
        add_outer(
            spec, work.from_input, work.gates_width, count, low, high, input_gates, spec.panel, hidden,
            own.first, inputs, grads.ih, first, own.values, table.scratch,
        )  # fmt: skip
        add_rows(
            spec,
            work.from_input,
            work.gates_width,
            count,
            low,
            high,
            input_gates,
            hidden,
            grads.bias_ih,
            first,
        )
        for step in range(start, end):
            place = own.first + (rows_before(sequences, step) - base) * 8
            active = rows_before(sequences, step + 1) - rows_before(sequences, step)
            note_entering(step, active, y, sequences, memory, parts, place)
        add_outer(
            spec, work.from_output, work.gates_width, count, low, high, recurrent_gates, spec.panel, hidden,
            own.first, outputs, grads.hh, first, own.values, table.scratch,
        )  # fmt: skip
        add_rows(
            spec, work.from_output, work.gates_width, count, low, high, recurrent_gates, hidden,
            grads.bias_hh, first,
        )  # fmt: skip
        if spec.projected:
            note_uniform(memory + parts.raw + base * parts.width, parts.width, count, own.first)
            add_outer(
                spec, work.outputs, parts.output_width, count, low_output, high_output, only, spec.lanes,
                outputs, own.first, hidden, grads.hr, first, own.values, table.scratch,
            )  # fmt: skip
        note_uniform(work.from_input, work.gates_width, count, own.first)
        note_rows(dx, start, end, sequences, own.second)
        rows_times_planes(
            spec, count, own.first, weights.inputs, depth, low_input, high_input, own.second, inputs,
            accumulate, table.scratch,
        )  # fmt: skip
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
    dx,  # (T, B, I)
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
        for n in range(spec.states):
            set_rows(spec, dfinal[n + 1], sequences, room.states + n * batch * parts.width, parts.width)
    if not accumulate:
        zero_padding(dx, sequences)
    weights = Transposed(packed[0], packed[1], packed[2], packed[3])
    args = (
        spec, x, y, dy, dx, accumulate, weights, orders,
        Gradients(grads[0], grads[1], grads[2], grads[3], grads[4]), sequences, aligned(memory), parts, room,
        hidden, chunk,
    )  # fmt: skip
    run(team, threads, patience, work, args)
    get_rows(spec, room.initial, sequences, dinitial[0], parts.output_width)
    for n in range(spec.states):
        get_rows(spec, room.initial_states + n * batch * parts.width, sequences, dinitial[n + 1], parts.width)
    for n in range(spec.vectors):
        for k in range(hidden):
            dvectors[n, k] = read(spec, room.vectors + n * parts.width + k * spec.size)
