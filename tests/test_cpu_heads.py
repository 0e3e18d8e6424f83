"""Block-diagonal weights laid out: what panels and vectors of columns meet, and with which numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fusedlstm.kernels.cpu.heads import Span, numbers, panels_of, planes_of, spans
from fusedlstm.kernels.reference import block_diagonal

SIZES = [(16, 2, 8), (20, 5, 8), (34, 2, 8), (33, 33, 16), (48, 3, 16), (7, 1, 4)]  # H, heads, width


def test_heads_that_share_a_panel() -> None:
    assert spans(24, 2, 8, 1) == [Span(0, 1, 0, 12, 0), Span(1, 2, 0, 24, 0), Span(2, 3, 12, 24, 12)]
    assert spans(32, 2, 8, 1) == [Span(0, 2, 0, 16, 0), Span(2, 4, 16, 32, 16)]
    assert spans(20, 1, 8, 1) == [Span(0, 3, 0, 20, 0)]


def test_weights_of_a_head_that_begins_within_a_group_begin_with_that_group() -> None:
    assert spans(20, 2, 10, 4) == [Span(0, 1, 0, 10, 0), Span(1, 2, 10, 20, 8)]
    assert spans(20, 2, 10, 4)[1].depth == 12


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("hidden", "heads", "width"), SIZES)
def test_panels_and_planes_hold_the_blocks(hidden: int, heads: int, width: int, group: int) -> None:
    random, order = np.random.default_rng(hidden), np.array([2, 0])
    weight = random.normal(size=(3 * hidden, hidden // heads))
    dense = np.stack([block_diagonal(part, hidden) for part in np.split(weight, 3)])[order]  # (gates, H, H)
    found = spans(hidden, heads, width, group)
    panels, planes = (np.full(2 * numbers(found, width), np.nan) for _ in range(2))
    panels_of(weight, order, hidden, width, found, panels)
    planes_of(weight, order, hidden, width, found, planes)
    place = 0
    for span in found:
        for n in range(span.low, span.high):
            here = slice(n * width, min((n + 1) * width, hidden))
            count, depth, skipped = here.stop - here.start, span.depth, span.start - span.begin
            end = place + 2 * depth * width
            panel = panels[place:end].reshape(depth, 2, width)
            np.testing.assert_array_equal(
                panel[skipped:, :, :count], dense[:, here, span.start : span.stop].transpose(2, 0, 1)
            )
            plane = planes[place:end].reshape(2, depth, width)
            np.testing.assert_array_equal(plane[:, skipped:, :count], dense[:, span.start : span.stop, here])
            for beyond in (panel[..., count:], panel[:skipped], plane[..., count:], plane[:, :skipped]):
                assert not beyond.any()
            place = end
    assert place == panels.size == planes.size
