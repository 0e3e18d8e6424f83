"""Directions made of other directions, for what engines do not know of.

They take and return the states of the user's cell, and run another cell that has further states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fusedlstm.kernels.random import Noise

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


class Noisy(NamedTuple):
    """A direction whose cell has noise, with that of one call; see dispatch.Direction."""

    direction: Any  # whose engine draws it
    noise: Noise

    def forward(self, *arguments: Any) -> Any:
        return self.direction.forward(*arguments, noise=self.noise)

    def backward(self, *arguments: Any) -> tuple[States, Weights]:
        states, weights = self.direction.backward(*arguments)
        return states, weights

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        says: dict[str, str] = self.direction.explain(steps, batch, training)
        return says


class WeightDropout(NamedTuple):
    """A direction some of whose recurrent weights are dropped in one call; see dispatch.Direction.

    Source: Merity et al., "Regularizing and optimizing LSTM language models" (2017), after DropConnect.
    """

    direction: Direction  # with the weights times the mask
    mask: Any  # shaped as the recurrent weights

    def forward(self, *arguments: Any) -> Any:
        return self.direction.forward(*arguments)

    def backward(self, *arguments: Any) -> tuple[States, Weights]:
        states, weights = self.direction.backward(*arguments)
        return states, weights._replace(hh=weights.hh * self.mask)

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return self.direction.explain(steps, batch, training)


class RecurrentDropout(NamedTuple):
    """A direction in which the recurrent weights multiply a state times a mask; see dispatch.Direction."""

    cell: Cell  # without dropout
    # what an engine made, with the same weights, of cells.recurrent_dropout(cell), or with several masks of
    # cells.recurrent_dropout_of_gates(cell)
    direction: Direction
    masks: tuple[Any, ...]  # (B, H) each
    shared: bool  # whether one mask is that of all gates

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
        mask = self.masks[0]
        if initial is None:
            initial = (np.zeros_like(mask),) * len(final)
        more = (mask, mask * initial[self.cell.operand]) if self.shared else self.masks
        initial, final = (*initial, *more), (*final, *(np.empty_like(mask) for _ in more))
        if states is not None:
            states = (*states, *(None,) * len(more))
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
            more = 2 if self.shared else len(self.masks)
            dfinal = (*dfinal, *(np.zeros_like(self.masks[0]) for _ in range(more)))
        if dstates is not None:
            dstates = (*dstates, *(None,) * (2 if self.shared else len(self.masks)))
        dstarts, grads = self.direction.backward(tape, dy, dfinal, dx, accumulate, dstates)
        dinitial = [*dstarts[: len(self.cell.states)]]
        if self.shared:
            dinitial[self.cell.operand] += self.masks[0] * dstarts[-1]
        return tuple(dinitial), grads

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return self.direction.explain(steps, batch, training)
