"""Block-diagonal recurrent weights: which numbers meet which, for the layouts of :mod:`pack`.

The H hidden units are cut into heads, equal in size, and a unit's recurrent weights see its own head alone:
they are (gates * H, H / heads).  A panel of units multiplies the columns of the heads that it has units of, a
vector of columns the units likewise; where those are of two heads or more, the weights of one for the others
are zero.  With one head everything meets everything.

Narrow numbers are multiplied in groups (see spec.Operand), which rows are cut into from their beginning.  So
weights are laid out from where the group begins in which a head does, with zeros up to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Neighbours that meet the same ones, all from number `start` to `stop`.

    They are panels of units, which meet columns, or vectors of columns, which meet units.  Their weights are
    laid out from number `begin` on.
    """

    low: int
    high: int
    start: int
    stop: int
    begin: int

    @property
    def depth(self) -> int:
        """How many numbers weights are laid out for."""
        return self.stop - self.begin


def spans(hidden: int, heads: int, width: int, group: int) -> list[Span]:
    """Of panels or vectors of so many units or columns, those that follow each other and meet the same.

    Args:
        group: how many numbers are multiplied at once.
    """
    size, found = hidden // heads, list[Span]()
    for n, first in enumerate(range(0, hidden, width)):
        last = min(first + width, hidden) - 1
        start, stop = first // size * size, (last // size + 1) * size
        if found and found[-1][2:4] == (start, stop):
            found[-1] = found[-1]._replace(high=n + 1)
        else:
            found.append(Span(n, n + 1, start, stop, start // group * group))
    return found


def numbers(found: list[Span], width: int) -> int:
    """How many a gate's weights take when they are laid out, for spans of panels or vectors of a width."""
    return width * sum((span.high - span.low) * span.depth for span in found)


def panels_of(
    weight: np.ndarray, gates: np.ndarray, hidden: int, panel: int, found: list[Span], target: np.ndarray
) -> None:
    """Write some gates of `weight` (all gates * H, H / heads): [k][gates][panel] for each panel."""
    by_gate, size, place = weight.reshape(-1, hidden, weight.shape[1])[gates], weight.shape[1], 0
    for span in found:
        for p in range(span.low, span.high):
            shape = (span.depth, len(gates), panel)
            here = target[place : place + np.prod(shape)].reshape(shape)
            here[...] = 0
            for start in range(span.start, span.stop, size):
                low, high = max(start, p * panel), min(start + size, (p + 1) * panel)
                columns = slice(start - span.begin, start - span.begin + size)
                here[columns, :, low - p * panel : high - p * panel] = by_gate[:, low:high].transpose(2, 0, 1)
            place += here.size


def planes_of(
    weight: np.ndarray, gates: np.ndarray, hidden: int, lanes: int, found: list[Span], target: np.ndarray
) -> None:
    """Write some gates of `weight` (all gates * H, H / heads): [gates][units][lanes] for each vector."""
    by_gate, size, place = weight.reshape(-1, hidden, weight.shape[1])[gates], weight.shape[1], 0
    for span in found:
        begin, end = span.low * lanes, span.high * lanes
        columns = np.zeros((len(gates), span.depth, end - begin), weight.dtype)
        for start in range(span.start, span.stop, size):
            low, high = max(start, begin), min(start + size, end)
            units = slice(start - span.begin, start - span.begin + size)
            own = by_gate[:, start : start + size, low - start : high - start]
            columns[:, units, low - begin : high - begin] = own
        vectors = columns.reshape(*columns.shape[:2], -1, lanes).transpose(2, 0, 1, 3)
        target[place : place + columns.size].reshape(vectors.shape)[...] = vectors
        place += columns.size
