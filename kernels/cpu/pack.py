"""Weights as the kernels read them.

* Panels, for the forward products: [panels][k][gates * units][lanes], the weights of some gates of the
  hidden units of a panel side by side for each k.
* Planes, for the gradients and the projection: [vectors][k][lanes], a column of vectors for each vector
  of results; k goes through the hidden units of one gate after the other.

What is padded is zero.  Weights may come in any layout: loops go along the memory of the two that there
are, rows (PyTorch's) and columns (Keras's) that are contiguous.
"""

from __future__ import annotations

from .memory import round_up
from .shares import share
from .simd import address, load_row, part, read, splat, store, transpose, write
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
