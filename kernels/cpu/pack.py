"""Weights as the kernels read them.

* Panels, for the forward products: [panels][k][gates * units][lanes], the weights of some gates of the
  hidden units of a panel side by side for each k.
* Planes, for the gradients and the projection: [vectors][k][lanes], a column of vectors for each vector
  of results; k goes through the hidden units of one gate after the other.

Narrow weights (see spec.Operand) are made of these, [panels][group of k][gates * units][lanes][k of a group],
and planes likewise; behind a panel of integers is what their sums start from, [gates * units][lanes], and
their scales, likewise.

What is padded is zero.  Weights may come in any layout: loops go along the memory of the two that there
are, rows (PyTorch's) and columns (Keras's) that are contiguous.
"""

from __future__ import annotations

from .memory import INTEGERS, LARGEST, MOST_FACTOR, round_up
from .shares import share
from .simd import (
    address,
    inlined,
    larger,
    load,
    load_row,
    minimum,
    part,
    read,
    round_whole,
    splat,
    store,
    store_group,
    store_whole,
    transpose,
    where,
    write,
)
from .work import captured, run

SIDE = 128  # rows and columns that are transposed in turn: few enough pages to be found quickly


@part
def pack_vectors(registers, source, across, along, valid, count, target, stride):
    """Write `count` vectors, `stride` bytes apart, of `valid` numbers each and zeros after them.

    Number n of vector k lies at `source + n * across + k * along`.
    """
    lanes, size = registers.lanes, registers.size
    if across == size:
        for k in range(count):
            store(load_row(registers, source + k * along, valid), target + k * stride)
        return
    squares = count // lanes if along == size and valid == lanes else 0
    for k in range(0, squares * lanes, lanes):
        transpose(registers, source + k * size, across, target + k * stride, stride)
    for k in range(squares * lanes, count):
        store(splat(registers, 0.0), target + k * stride)
        for n in range(valid):
            write(registers, read(registers, source + n * across + k * along), target + k * stride + n * size)


def panels_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`pack_panels`."""
    registers, weight, gates, hidden, units, target = captured(arguments)
    depth = weight.shape[1]
    across, along = weight.strides
    lanes, width = registers.lanes, gates.size * units
    vector = lanes * registers.size
    low, high = share(round_up(hidden, units * lanes) // (units * lanes), thread, threads)
    most = lanes if across == registers.size else depth  # how many k in turn
    for k in range(0, depth, most):
        for n in range(width):
            for p in range(low, high):
                first = (p * units + n % units) * lanes
                source = address(weight) + (gates[n // units] * hidden + first) * across + k * along
                valid = max(min(lanes, hidden - first), 0)
                to = target + ((p * depth + k) * width + n) * vector
                pack_vectors(
                    registers, source, across, along, valid, min(most, depth - k), to, width * vector
                )


def pack_panels(team, threads, patience, work, registers, weight, gates, hidden, units, target):
    """Lay out the given gates, in their order, of `weight` (all gates * hidden, K) as panels."""
    run(team, threads, patience, work, (registers, weight, gates, hidden, units, target))


def planes_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`pack_planes`."""
    registers, weight, gates, hidden, padded, target = captured(arguments)
    columns = weight.shape[1]
    along, across = weight.strides
    lanes = registers.lanes
    vector = lanes * registers.size
    low, high = share(-(-columns // lanes), thread, threads)
    most = high - low if across == registers.size else 1  # how many v in turn
    for start in range(low, high, max(most, 1)):
        for n in range(gates.size):
            for v in range(start, start + most):
                source = address(weight) + gates[n] * hidden * along + v * lanes * across
                to = target + (v * gates.size + n) * padded * vector
                pack_vectors(
                    registers, source, across, along, min(lanes, columns - v * lanes), hidden, to, vector
                )
                for unit in range(hidden, padded):
                    store(splat(registers, 0.0), to + unit * vector)


def pack_planes(team, threads, patience, work, registers, weight, gates, hidden, padded, target):
    """Lay out the given gates of `weight` (all gates * hidden, columns) as [vectors][gates][padded]."""
    run(team, threads, patience, work, (registers, weight, gates, hidden, padded, target))


@inlined
def vector_at(registers, source, stride, k, depth):
    """Vector k of `depth`; zero beyond."""
    return load(registers, source + k * stride) if k < depth else splat(registers, 0.0)


@part
def narrow_vector(registers, source, source_stride, depth, target, target_stride):
    """Make narrow weights of one vector's column."""
    for k in range(0, depth, registers.group):
        a, b, c, d = (
            vector_at(registers, source, source_stride, k, depth),
            vector_at(registers, source, source_stride, k + 1, depth),
            vector_at(registers, source, source_stride, k + 2, depth),
            vector_at(registers, source, source_stride, k + 3, depth),
        )
        store_group(registers, a, b, c, d, target + k // registers.group * target_stride)


@part
def scale_vector(registers, source, stride, depth, tail, tail_stride):
    """Scale one vector's column to integers, in place, and write what is behind it.

    A lane that has NaN or infinity has the scale NaN.
    """
    most, total = splat(registers, 0.0), splat(registers, 0.0)
    for k in range(depth):
        most = larger(most, load(registers, source + k * stride))
    factor = minimum(INTEGERS / most, MOST_FACTOR)
    store(where(most <= LARGEST, 1.0 / factor, most - most), tail + tail_stride)
    for k in range(depth):
        value = round_whole(load(registers, source + k * stride) * factor)
        value = where(most <= LARGEST, value, 0.0)
        total = total + value
        store(value, source + k * stride)
    # values that have no sign have 128 more than they mean
    store_whole(total * (-128.0 if registers.value == 1 else 0.0), tail)


def narrow_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`narrow`."""
    registers, source, panels, depth, width, target = captured(arguments)
    vector, groups = registers.lanes * registers.size, -(-depth // registers.group)
    row = width * registers.column
    panel = groups * row + width * registers.tail
    low, high = share(panels, thread, threads)
    for p in range(low, high):
        for n in range(width):
            column, to = source + (p * depth * width + n) * vector, target + p * panel
            if registers.integer:
                tail = to + groups * row + n * vector
                scale_vector(registers, column, width * vector, depth, tail, width * vector)
            narrow_vector(registers, column, width * vector, depth, to + n * registers.column, row)


def narrow(team, threads, patience, work, registers, source, panels, depth, width, target):
    """Make narrow weights of panels [panels][depth][width][lanes], which are lost; of planes with width 1."""
    run(team, threads, patience, work, (registers, source, panels, depth, width, target))


def transposed_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`write_transposed`."""
    registers, source, target = captured(arguments)
    rows, columns = source.shape
    down = -(-rows // SIDE)
    low, high = share(down * -(-columns // SIDE), thread, threads)
    for block in range(low, high):
        row, column = block % down * SIDE, block // down * SIDE
        transpose_block(
            registers, source, target, row, min(row + SIDE, rows), column, min(column + SIDE, columns)
        )


@part
def transpose_block(registers, source, target, row, row_end, column, column_end):
    """What lies in these rows and columns of the source."""
    lanes, size = registers.lanes, registers.size
    whole_rows = row + (row_end - row) // lanes * lanes
    whole_columns = column + (column_end - column) // lanes * lanes
    for c in range(column, whole_columns, lanes):
        for r in range(row, whole_rows, lanes):
            at = address(source) + r * source.strides[0] + c * size
            to = address(target) + c * target.strides[0] + r * size
            transpose(registers, at, source.strides[0], to, target.strides[0])
    for c in range(column, column_end):
        for r in range(whole_rows if c < whole_columns else row, row_end):
            target[c, r] = source[r, c]


def write_transposed(team, threads, patience, work, registers, source, target):
    """Write `source` (rows, columns), whose rows are contiguous, to `target` (columns, rows) likewise."""
    run(team, threads, patience, work, (registers, source, target))
