"""Weights as the kernels read them.

* Panels, for the forward products: [panels][k][gates * units][lanes], the weights of all gates of the
  hidden units of a panel side by side for each k.
* Planes, for the gradients and the projection: [vectors][k][lanes], a column of vectors for each vector
  of results.

What is padded is zero.
"""

from __future__ import annotations

from .memory import round_up
from .shares import share
from .simd import address, load_row, splat, store, write
from .work import captured, run


def panels_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`pack_panels`."""
    registers, weight, gates, units, target = captured(arguments)
    hidden, depth = weight.shape[0] // gates.size, weight.shape[1]
    lanes, width = registers.lanes, gates.size * units
    vector = lanes * registers.size
    low, high = share(round_up(hidden, units * lanes) // (units * lanes), thread, threads)
    for p in range(low, high):
        for n in range(width):
            start = target + (p * depth * width + n) * vector
            first = (p * units + n % units) * lanes
            row = gates[n // units] * hidden + first
            for k in range(depth):
                to = start + k * width * vector
                store(splat(registers, 0.0), to)
                for lane in range(min(lanes, hidden - first)):
                    write(registers, weight[row + lane, k], to + lane * registers.size)


def pack_panels(team, threads, patience, work, registers, weight, gates, units, target):
    """Lay out `weight` (gates*H, K), with the gates in the given order, as panels."""
    run(team, threads, patience, work, (registers, weight, gates, units, target))


def planes_work(thread, threads, sync, arguments):
    """What each thread does; see :func:`pack_planes`."""
    registers, weight, gates, panel, target = captured(arguments)
    hidden, columns = weight.shape[0] // gates.size, weight.shape[1]
    vector = registers.lanes * registers.size
    depth = gates.size * round_up(hidden, panel)
    low, high = share(-(-columns // registers.lanes), thread, threads)
    source, stride = address(weight), weight.strides[0]
    for v in range(low, high):
        to = target + v * depth * vector
        for p in range(round_up(hidden, panel) // panel):
            for n in range(gates.size):
                for unit in range(p * panel, (p + 1) * panel):
                    row = splat(registers, 0.0)
                    if unit < hidden:
                        at = source + (gates[n] * hidden + unit) * stride + v * vector
                        row = load_row(registers, at, columns - v * registers.lanes)
                    store(row, to)
                    to += vector


def pack_planes(team, threads, patience, work, registers, weight, gates, panel, target):
    """Lay out `weight` (gates*H, columns) as planes, its rows in the order [panels][gates][panel]."""
    run(team, threads, patience, work, (registers, weight, gates, panel, target))
