"""Which kernels run: "cpu", "cuda" or "reference".

An engine turns the weights of one direction of one layer into a :class:`Direction`, laid out as its
kernels want them; :mod:`fusedlstm.layers` stacks directions into layers.
"""

from __future__ import annotations

from typing import Any, Protocol

from .cells import Cell
from .weights import Weights

States = tuple[Any, ...]


class Direction(Protocol):
    """One direction of one layer, ready to run.  P is the size of the output: proj_size or H.

    The arrays given are valid: shapes and types have been checked, the last axis is contiguous.
    `forward` and `backward` may be called from many threads at once.
    """

    def forward(
        self,
        x: Any,  # (T, B, I)
        initial: States | None,  # (B, P) for the output, (B, H) for other states; None is zero
        y: Any,  # (T, B, P), written; may be a slice of the last axis of a wider array
        final: States,  # shaped as the initial states, written
        lengths: Any | None,  # (B,) int64, 1 <= length <= T
        reset: Any | None,  # (T, B) bool
        reverse: bool,
        training: bool,
    ) -> Any:
        """Run all steps; the tape that `backward` takes if training, else None."""

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, P)
        dfinal: States | None,  # shaped as the final states; None is zero
        dx: Any,  # (T, B, I), written or added to
        accumulate: bool,  # whether dx is added to
    ) -> tuple[States, Weights]:
        """The gradients of the initial states and of the weights.  A tape may be used again."""

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """Which kernel, tile, threads and layout would run, and why."""


class Engine(Protocol):
    """A set of kernels."""

    def prepare(self, cell: Cell, weights: Weights) -> Direction:
        """Lay out weights for the kernels; they are not modified afterwards."""
