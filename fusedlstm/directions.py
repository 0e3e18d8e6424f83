"""Directions made of other directions, for what engines do not know of.

They take and return the states of the user's cell, and run another cell that has further states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .cells import Cell
from .dispatch import Direction, States
from .weights import Weights, fill


class Nothing(NamedTuple):
    """A direction over no steps or no sequences, whatever its engine: the state stays as it is."""

    weights: Weights

    def forward(
        self,
        x: Any,  # (T, B, I), of which T or B is 0
        initial: States | None,  # (B, P) for the output, (B, H) for other states
        y: Any,  # (T, B, P)
        final: States,
        lengths: Any | None,  # (B,)
        reset: Any | None,  # (T, B)
        reverse: bool,
        training: bool,
        states: States | None = None,  # (T, B, H) each
    ) -> Any:
        for target, state in zip(final, (0,) * len(final) if initial is None else initial):
            target[...] = state
        return [part.shape for part in final] if training else None

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, P)
        dfinal: States | None,
        dx: Any | None,  # (T, B, I)
        accumulate: bool,
        dstates: States | None = None,  # (T, B, H) each
    ) -> tuple[States, Weights]:
        def zeros(shape: Any) -> Any:
            return np.zeros_like(dy, shape=shape)  # where dy lies

        dinitial = map(zeros, tape) if dfinal is None else (part.copy() for part in dfinal)
        return tuple(dinitial), fill(self.weights, lambda weight: zeros(weight.shape))

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return {"kernel": f"none: there are {steps} steps of {batch} sequences"}


class RecurrentDropout(NamedTuple):
    """A direction in which the recurrent weights multiply a state times a mask; see dispatch.Direction."""

    cell: Cell  # without dropout
    direction: Direction  # what an engine made of cells.recurrent_dropout(cell), with the same weights
    mask: Any  # (B, H)

    def forward(
        self,
        x: Any,  # (T, B, I)
        initial: States | None,  # (B, H) each
        y: Any,  # (T, B, H)
        final: States,
        lengths: Any | None,  # (B,)
        reset: Any | None,  # (T, B)
        reverse: bool,
        training: bool,
        states: States | None = None,  # (T, B, H) each
    ) -> Any:
        mask = self.mask
        if initial is None:
            initial = (np.zeros_like(mask),) * len(final)
        initial = (*initial, mask, mask * initial[self.cell.operand])
        final = (*final, np.empty_like(mask), np.empty_like(mask))
        if states is not None:
            states = (*states, None, None)
        return self.direction.forward(x, initial, y, final, lengths, reset, reverse, training, states)

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, H)
        dfinal: States | None,
        dx: Any | None,  # (T, B, I)
        accumulate: bool,
        dstates: States | None = None,  # (T, B, H) each
    ) -> tuple[States, Weights]:
        if dfinal is not None:
            dfinal = (*dfinal, np.zeros_like(self.mask), np.zeros_like(self.mask))
        if dstates is not None:
            dstates = (*dstates, None, None)
        (*dinitial, _, dmasked), grads = self.direction.backward(tape, dy, dfinal, dx, accumulate, dstates)
        dinitial[self.cell.operand] += self.mask * dmasked
        return tuple(dinitial), grads

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return self.direction.explain(steps, batch, training)
