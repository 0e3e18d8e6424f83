"""The forward pass: a whole sequence in one parallel region.

A thread owns some panels of hidden units, with all their gates, for the entire sequence, so its share
of the weights stays in its own cache.  It projects the inputs of a chunk of steps for its panels, then
walks through the steps of the chunk: recurrent product, cell update while the sums are at hand, one
barrier.  Whoever is done before the others takes panels of theirs; see shares.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .cell import update
from .memory import (
    Sequences,
    aligned,
    fill_zero,
    first_row,
    layout,
    note_entering,
    note_operands,
    note_rows,
    note_states,
    round_up,
    row_address,
    rows_before,
    set_rows,
    state_rows,
    tables,
    zero_padding,
)
from .shares import Shares, close_queues, each, share
from .simd import inlined, load, part, read, read_int, store, write_int
from .team import LINE, barrier
from .tile import panel_product, panel_rows, rows_times_planes
from .work import captured, run_with


class Packed(NamedTuple):
    """Weights as the forward pass reads them, at addresses; see pack.py."""

    inputs: Any  # panels of the input weights
    recurrent: Any  # panels of the recurrent weights
    bias: Any  # (panels, inputs * panel)
    vectors: Any  # (V, H), padded
    projection: Any  # planes of the projection


@inlined
def project_inputs(piece, spec, cut, rows, count, depth, packed, gates, parts):
    """Pre-activations of a panel, or of a part of its rows, from the input: bias + x @ weights."""
    vector = spec.lanes * spec.size
    stride = spec.inputs * spec.units * vector
    p = piece // cut
    weights = packed.inputs + p * depth * spec.width * vector
    bias = packed.bias + p * spec.inputs * spec.units * vector
    gates = gates + p * parts.gate_rows * stride
    blocks = -(-count // panel_rows(spec))
    low, high = share(blocks, piece % cut, cut)
    for block in range(low, high):
        first, last = share(count, block, blocks)
        target = gates + first * stride
        panel_product(spec, last - first, bias, 0, target, stride, rows + first * 8, 0, weights, 0, depth)
        # the recurrent parts of split gates start from a bias of their own
        for v in range(spec.width, spec.inputs * spec.units):
            start = load(spec, bias + v * vector)
            for row in range(first, last):
                store(start, gates + row * stride + v * vector)


@inlined
def note_step(spec, step, active, here, y, sequences, memory, parts, taped, table):
    """Note where each row finds what enters a step, and where it puts its output."""
    note_entering(step, active, y, sequences, memory, parts, table.entering)
    note_states(spec, step, active, sequences, memory, parts, taped, table)
    if spec.operand > 0:
        note_operands(spec, step, active, y, sequences, memory, parts, taped, table.operands)
    note_rows(y, step, step + 1, sequences, table.leaving)
    for row in range(active):
        write_int(memory + parts.raw + (here + row) * parts.width, table.raw + row * 8)


@inlined
def step_panel(piece, spec, cut, active, here, hidden, outputs, packed, gates, memory, parts, table):
    """One step of a panel of hidden units, or of a part of its rows: the recurrent product, and the cell
    on its sums."""
    vector = spec.lanes * spec.size
    gate_stride = spec.units * vector
    stride = spec.inputs * gate_stride
    p = piece // cut
    gates = gates + p * parts.gate_rows * stride
    weights = packed.recurrent + p * outputs * spec.width * vector
    to = table.raw if spec.projected else table.leaving
    offset, left = p * spec.panel * spec.size, hidden - p * spec.panel
    new_states, new_stride = memory + parts.states + here * parts.width, parts.rows * parts.width
    blocks = -(-active // panel_rows(spec))
    low, high = share(blocks, piece % cut, cut)
    for block in range(low, high):
        first, last = share(active, block, blocks)
        sums = gates + first * stride + spec.splits * gate_stride
        panel_product(
            spec, last - first, sums, stride, sums, stride, table.operands + first * 8, 0, weights, 0, outputs
        )
        for row in range(first, last):
            for unit in range(spec.units):
                valid = left - unit * spec.lanes
                if valid > 0:
                    update(
                        spec,
                        gates + row * stride + unit * vector,
                        gate_stride,
                        read_int(table.entering + row * 8),
                        read_int(table.states + row * 8),
                        read_int(table.strides + row * 8),
                        new_states + row * parts.width,
                        new_stride,
                        read_int(to + row * 8),
                        packed.vectors,
                        parts.width,
                        offset + unit * vector,
                        valid,
                    )


def forward_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`forward`."""
    spec, x, y, packed, sequences, memory, parts, hidden, chunk, taped, queues, space = captured(arguments)
    steps, batch, depth = x.shape
    outputs = y.shape[2]
    # where there is much to do at a step, panels are cut in two, and threads help each other
    together = threads > 1 and batch > panel_rows(spec)
    shares, cut = Shares(thread, threads, queues if together else 0), 2 if together else 1
    pieces = round_up(hidden, spec.panel) // spec.panel * cut
    low_output, high_output = share(-(-outputs // spec.lanes), thread, threads)
    stride = spec.inputs * spec.panel * spec.size
    table = tables(spec, space + thread * tables(spec, 0, batch * chunk, batch).end, batch * chunk, batch)
    for start in range(0, steps, chunk):
        end = min(start + chunk, steps)
        base = rows_before(sequences, start)
        gates = memory + parts.gates + (base * stride if taped else 0)
        note_rows(x, start, end, sequences, table.inputs)
        count = rows_before(sequences, end) - base
        each(
            shares, pieces, False, project_inputs,
            (spec, cut, table.inputs, count, depth, packed, gates, parts),
        )  # fmt: skip
        if together:
            barrier(sync, threads)
        for step in range(start, end):
            active = rows_before(sequences, step + 1) - rows_before(sequences, step)
            here = first_row(spec, step, taped, sequences)
            sums = gates + (rows_before(sequences, step) - base) * stride
            note_step(spec, step, active, here, y, sequences, memory, parts, taped, table)
            # there and back, so that a step begins with the weights that the one before left in cache
            each(
                shares, pieces, step % 2 == 1, step_panel,
                (spec, cut, active, here, hidden, outputs, packed, sums, memory, parts, table),
            )  # fmt: skip
            barrier(sync, threads)
            if spec.projected:
                rows_times_planes(
                    spec, active, table.raw, packed.projection, hidden, low_output, high_output,
                    table.leaving, outputs, False, table.scratch,
                )  # fmt: skip
                barrier(sync, threads)


@part
def set_initial(spec, initial, given, sequences, memory, parts):
    """Copy the initial states, padded with zeros; if none are given, all are zero."""
    fill_zero(spec, memory + parts.initial, memory + parts.states)
    if given:
        set_rows(spec, initial[0], sequences, memory + parts.initial, parts.output_width)
        for n in range(spec.further):
            start = memory + parts.initial_states + n * sequences.order.size * parts.width
            set_rows(spec, initial[n + 1], sequences, start, parts.width)


@part
def get_final(spec, y, final, sequences, memory, parts, taped):
    """Copy the states after each sequence's last step; of an empty one, the initial states."""
    batch = sequences.order.size
    for row in range(batch):
        sequence, last = sequences.order[row], sequences.lengths[row] - 1
        if last < 0:
            output = memory + parts.initial + row * parts.output_width
            states, stride = memory + parts.initial_states + row * parts.width, batch * parts.width
        else:
            output = row_address(y, sequences, last, row)
            place = first_row(spec, last, taped, sequences) + row
            states, stride = memory + parts.states + place * parts.width, parts.rows * parts.width
        for k in range(y.shape[2]):
            final[0][sequence, k] = read(spec, output + k * spec.size)
        for n in range(spec.further):
            for k in range(final[n + 1].shape[1]):
                final[n + 1][sequence, k] = read(spec, states + n * stride + k * spec.size)


def forward(
    team,  # address of a team of threads
    threads,  # how many to use at most
    patience,  # microseconds for which to wait for them
    work,  # forward_work, compiled
    spec,
    x,  # (T, B, I)
    y,  # (T, B, P)
    initial,  # (B, P) and (B, H)s; any arrays if not given
    given,  # whether initial states are given
    final,  # (B, P) and (B, H)s
    packed,  # addresses, as in Packed
    order,  # as in Sequences
    lengths,
    first,
    reset,
    reverse,
    memory,  # bytes, as in Layout
    hidden,
    chunk,  # steps whose inputs are projected at once
    taped,  # whether backward is to follow
):
    """Run a sequence in one direction: writes y and the final states, and the tape into `memory`."""
    sequences = Sequences(order, lengths, first, reset, reverse)
    batch, steps = x.shape[1], x.shape[0]
    rows = rows_before(sequences, steps) if taped else state_rows(spec, batch)
    gate_rows = rows_before(sequences, steps) if taped else batch * chunk
    parts = layout(spec, hidden, y.shape[2], batch, rows, gate_rows)
    start = aligned(memory)
    set_initial(spec, initial, given, sequences, start, parts)
    # for each thread a queue, and tables
    space = np.empty(threads * (LINE + tables(spec, 0, batch * chunk, batch).end) + LINE, np.uint8)
    queues = aligned(space)
    close_queues(queues, threads)
    weights = Packed(packed[0], packed[1], packed[2], packed[3], packed[4])
    args = (
        spec, x, y, weights, sequences, start, parts, hidden, chunk, taped, queues, queues + threads * LINE
    )  # fmt: skip
    run_with(team, threads, patience, work, args, space)
    zero_padding(y, sequences)
    get_final(spec, y, final, sequences, start, parts, taped)
