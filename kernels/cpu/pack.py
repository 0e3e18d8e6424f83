"""Weights as the kernels read them.

* Panels, for the forward products: [panels][k][gates * units][lanes], the weights of all gates of the
  hidden units of a panel side by side for each k.
* Planes, for the gradients and the projection: [vectors][k][lanes], a column of vectors for each vector
  of results.

What is padded is zero.
"""

from __future__ import annotations

from numba import njit

from .memory import round_up
from .simd import address, load_row, splat, store, write
from .team import fork
from .tile import share


@njit(error_model="numpy")
def _panels_work(thread, threads, sync, spec, weight, gates, hidden, target):
    depth = weight.shape[1]
    vector = spec.lanes * spec.size
    low, high = share(round_up(hidden, spec.panel) // spec.panel, thread, threads)
    for p in range(low, high):
        for n in range(spec.gates):
            for unit in range(spec.units):
                start = target + (p * depth * spec.width + n * spec.units + unit) * vector
                first = p * spec.panel + unit * spec.lanes
                for k in range(depth):
                    to = start + k * spec.width * vector
                    store(splat(spec, 0.0), to)
                    for lane in range(min(spec.lanes, hidden - first)):
                        row = gates[n] * hidden + first + lane
                        write(spec, weight[row, k], to + lane * spec.size)


@njit(nogil=True, cache=True, error_model="numpy")
def pack_panels(team, threads, spec, weight, gates, target):
    """Lay out `weight` (gates*H, K), with the gates in the given order, as panels."""
    fork(team, threads, _panels_work, (spec, weight, gates, weight.shape[0] // spec.gates, target))


@njit(error_model="numpy")
def _planes_work(thread, threads, sync, spec, weight, gates, hidden, panel, target):
    columns = weight.shape[1]
    vector = spec.lanes * spec.size
    depth = gates.size * round_up(hidden, panel)
    low, high = share(-(-columns // spec.lanes), thread, threads)
    source, stride = address(weight), weight.strides[0]
    for v in range(low, high):
        to = target + v * depth * vector
        for p in range(round_up(hidden, panel) // panel):
            for n in range(gates.size):
                for unit in range(p * panel, (p + 1) * panel):
                    row = splat(spec, 0.0)
                    if unit < hidden:
                        at = source + (gates[n] * hidden + unit) * stride + v * vector
                        row = load_row(spec, at, columns - v * spec.lanes)
                    store(row, to)
                    to += vector


@njit(nogil=True, cache=True, error_model="numpy")
def pack_planes(team, threads, spec, weight, gates, panel, target):
    """Lay out `weight` (gates*H, columns) as planes, its rows in the order [panels][gates][panel]."""
    args = (spec, weight, gates, weight.shape[0] // gates.size, panel, target)
    fork(team, threads, _planes_work, args)
