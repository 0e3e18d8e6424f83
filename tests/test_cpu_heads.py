"""Block-diagonal weights laid out: what panels and vectors of columns meet, and with which numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fusedlstm.kernels.cpu.heads import Span, numbers, panels_of, planes_of, spans
from fusedlstm.kernels.reference import block_diagonal

SIZES = [(16, 2, 8), (20, 5, 8), (34, 2, 8), (33, 33, 16), (48, 3, 16), (7, 1, 4)]  # H, heads, width


def test_heads_that_share_a_panel() -> None:
    assert spans(24, 2, 8) == [Span(0, 1, 0, 12), Span(1, 2, 0, 24), Span(2, 3, 12, 24)]
    assert spans(32, 2, 8) == [Span(0, 2, 0, 16), Span(2, 4, 16, 32)]
    assert spans(20, 1, 8) == [Span(0, 3, 0, 20)]


@pytest.mark.parametrize(("hidden", "heads", "width"), SIZES)
def test_panels_and_planes_hold_the_blocks(hidden: int, heads: int, width: int) -> None:
    random, order = np.random.default_rng(hidden), np.array([2, 0])
    weight = random.normal(size=(3 * hidden, hidden // heads))
    dense = np.stack([block_diagonal(part, hidden) for part in np.split(weight, 3)])[order]  # (gates, H, H)
    panels, planes = (np.full(2 * numbers(hidden, heads, width), np.nan) for _ in range(2))
    panels_of(weight, order, hidden, width, panels)
    planes_of(weight, order, hidden, width, planes)
    place = 0
    for span in spans(hidden, heads, width):
        for n in range(span.low, span.high):
            here = slice(n * width, min((n + 1) * width, hidden))
            count, depth = here.stop - here.start, span.stop - span.start
            end = place + 2 * depth * width
            panel = panels[place:end].reshape(depth, 2, width)
            np.testing.assert_array_equal(
                panel[..., :count], dense[:, here, span.start : span.stop].transpose(2, 0, 1)
            )
            plane = planes[place:end].reshape(2, depth, width)
            np.testing.assert_array_equal(plane[..., :count], dense[:, span.start : span.stop, here])
            assert not panel[..., count:].any()
            assert not plane[..., count:].any()
            place = end
    assert place == panels.size == planes.size
