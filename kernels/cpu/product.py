"""Products of many rows, cut into register tiles; C functions of their own, which kernels call.

Numba optimises a function anew in every function that calls it, so what is large and called in several
places is compiled once and called through its address.
"""

from __future__ import annotations

from typing import Any

from numba import types

from fusedlstm.once import once

from .compile import c_function
from .records import planes_at, task_type
from .shares import share
from .simd import OPTIONS, inlined, load, load_row, part, read_int, splat, store, store_group, store_row
from .tile import PLANES, outer_rows, plane_rows, tile_product
from .work import calling

GROUP = 4  # panels whose weights' gradients are a piece of the work


def rows_times_planes(task, count, a_rows, b, low, high, out_rows, out_length, accumulate, scratch):
    """The vectors low to high of `out = a @ b`, or of `out += a @ b`, of those that `b` has.

    `a_rows` and `out_rows` are the addresses of tables of `count` row addresses, `b` that of a
    records.PLANES_OF; `scratch` has room for a tile.
    """
    registers = task.registers
    vector = registers.lanes * registers.size
    planes = planes_at(b)
    low, high = max(low, planes.low), min(high, planes.high)
    stretch, stride = planes.depth * registers.column + registers.tail, PLANES * vector
    plane = planes.stretches * stretch
    blocks = -(-count // plane_rows(registers))
    for block in range(blocks):
        first, last = share(count, block, blocks)
        a = a_rows + first * 8
        v = low
        while v < high:
            wide = min(PLANES, high - v)
            for row in range(first, last):
                out = read_int(out_rows + row * 8)
                for n in range(wide):
                    start = splat(registers, 0.0)
                    if accumulate:
                        left = out_length - (v + n) * registers.lanes
                        start = load_row(registers, out + (v + n) * vector, left)
                    store(start, scratch + (row - first) * stride + n * vector)
            width, tile = 1, task.plane_tile
            if wide == PLANES:
                width, tile = PLANES, task.planes_tile
            for n in range(0, wide, width):
                sums, weights = scratch + n * vector, planes.weights + (v + n) * plane
                for k in range(planes.stretches):
                    tile_product(
                        tile, last - first, sums, stride, sums, stride, a, planes.shift + k * planes.step,
                        weights + k * stretch, plane, planes.depth,
                    )  # fmt: skip
            for row in range(first, last):
                out = read_int(out_rows + row * 8)
                for n in range(wide):
                    value = load(registers, scratch + (row - first) * stride + n * vector)
                    left = out_length - (v + n) * registers.lanes
                    store_row(registers, value, out + (v + n) * vector, left)
            v += wide


def add_outer(
    task, d, d_stride, d_slot, count, low, high, gates, gate_count, panel, hidden, begin_unit, end_unit,
    rows, shift, columns, target, stride, first, values, scratch, pairs,
):  # fmt: skip
    """Add `d.T @ values` to the rows of a weight gradient of the panels low to high, of the units from
    `begin_unit` to `end_unit`.

    `d` is the address of (count, gates, H), with rows `d_stride` and gates `d_slot` bytes apart; `rows` that
    of the table of the `count` rows of values, which begin `shift` bytes behind these addresses; `gates` that
    of the places of the gates in `target`, whose rows are `stride` bytes apart; if `first`, the target is
    written.  `values` and `pairs` have room for what of the values and of `d` is multiplied at once.
    """
    registers = task.registers
    lanes, size = registers.lanes, registers.size
    vector = lanes * size
    low, high = max(low, begin_unit // panel), min(high, -(-end_unit // panel))
    groups = -(-count // registers.group)
    if registers.group > 1:
        pair_rows(registers, d, d_stride, d_slot, count, low, high, gate_count, panel, pairs)
    column = 0
    while column < columns:
        wide, tile = 1, task.thin_outer_tile
        if columns - column > (PLANES - 1) * lanes:
            wide, tile = PLANES, task.outer_tile
        pack_columns(registers, count, rows, shift, column, columns, wide, values)
        whole = columns - column >= wide * lanes
        for p in range(low, high):
            start = max(p * panel, begin_unit)
            units = min((p + 1) * panel, end_unit) - start
            blocks = -(-units // outer_rows(registers))
            for gate in range(gate_count):
                for block in range(blocks):
                    begin, end = share(units, block, blocks)
                    begin, end = start + begin, start + end
                    a, a_stride = d + gate * d_slot + begin * size, d_stride
                    if registers.group > 1:
                        place = (gate * (high - low) + p - low) * groups * panel + begin - p * panel
                        a, a_stride = pairs + place * size, panel * size
                    row = read_int(gates + gate * 8) * hidden + begin
                    to = target + row * stride + column * size
                    sums, sums_stride = to, stride
                    if not whole:
                        sums, sums_stride = scratch, wide * vector
                    if first or not whole:
                        clear(registers, end - begin, wide, sums, sums_stride)
                    tile_product(
                        tile, end - begin, sums, sums_stride, sums, sums_stride, a, a_stride, values, 0,
                        groups,
                    )  # fmt: skip
                    if not whole:
                        add_tile(registers, end - begin, wide, scratch, to, stride, columns - column, first)
        column += wide * lanes


@inlined
def pair_rows(registers, d, d_stride, d_slot, count, low, high, gate_count, panel, pairs):
    """Lay out the rows of some panels in groups, [gates][panels][groups][units]."""
    size = registers.size
    vector = registers.lanes * size
    for gate in range(gate_count):
        for p in range(low, high):
            for n in range(0, count, registers.group):
                for place in range(0, panel * size, vector):
                    source = d + gate * d_slot + p * panel * size + n * d_stride + place
                    first = load(registers, source)
                    second = load(registers, source + d_stride) if n + 1 < count else splat(registers, 0.0)
                    store_group(registers, first, second, first, second, pairs)
                    pairs += vector


@inlined
def pack_columns(registers, count, rows, shift, column, columns, wide, values):
    """Lay out some vectors of columns of rows next to each other, in groups of rows."""
    vector = registers.lanes * registers.size
    if registers.group > 1:
        for n in range(0, count, registers.group):
            for v in range(wide):
                left = columns - column - v * registers.lanes
                place = shift + column * registers.size + v * vector
                first = load_row(registers, read_int(rows + n * 8) + place, left)
                second = splat(registers, 0.0)
                if n + 1 < count:
                    second = load_row(registers, read_int(rows + (n + 1) * 8) + place, left)
                store_group(registers, first, second, first, second, values)
                values += vector
        return
    for n in range(count):
        source = read_int(rows + n * 8) + shift + column * registers.size
        for v in range(wide):
            left = columns - column - v * registers.lanes
            store(load_row(registers, source + v * vector, left), values + (n * wide + v) * vector)


@inlined
def clear(registers, rows, wide, target, stride):
    for row in range(rows):
        for v in range(wide):
            store(splat(registers, 0.0), target + row * stride + v * registers.lanes * registers.size)


@inlined
def add_tile(registers, rows, wide, source, target, stride, left, first):
    """Add a tile to rows of which `left` numbers are left, or write it if `first`."""
    vector = registers.lanes * registers.size
    for row in range(rows):
        for v in range(wide):
            valid = left - v * registers.lanes
            if valid > 0:
                value = load(registers, source + (row * wide + v) * vector)
                place = target + row * stride + v * vector
                if not first:
                    value = value + load_row(registers, place, valid)
                store_row(registers, value, place, valid)


@part
def add_rows(task, d, d_stride, d_slot, count, low, high, gates, gate_count, target, first):
    """Add the sum of the rows of `d`, as in :func:`add_outer`, to a bias gradient."""
    registers = task.registers
    vector = registers.lanes * registers.size
    for gate in range(gate_count):
        for place in range(low * task.panel, min(high * task.panel, task.hidden), registers.lanes):
            valid = task.hidden - place
            to = target + (read_int(gates + gate * 8) * task.hidden + place) * registers.size
            total = splat(registers, 0.0)
            if not first:
                total = load_row(registers, to, valid)
            column = d + gate * d_slot + place // registers.lanes * vector
            for n in range(count):
                total = total + load(registers, column + n * d_stride)
            store_row(registers, total, to, valid)


PLANES_ARGUMENTS, OUTER_ARGUMENTS = 10, 22
call_rows_times_planes, call_add_outer = calling(PLANES_ARGUMENTS), calling(OUTER_ARGUMENTS)


@once
def routines(scalar: types.Float, precision: str = "float32") -> tuple[Any, Any]:
    """The compiled `rows_times_planes` and `add_outer`; keep them as long as their addresses are used."""
    task = task_type(scalar, precision)
    planes, outer = (
        c_function(function, types.void(task, *[types.int64] * (count - 1)), **OPTIONS)
        for function, count in ((rows_times_planes, PLANES_ARGUMENTS), (add_outer, OUTER_ARGUMENTS))
    )
    return planes, outer
