"""Directions made of other directions, for what engines do not know of.

They take and return the states of the user's cell, and run another cell that has further states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from .cells import Cell
from .dispatch import Direction, Engine, States
from .weights import Weights, fill


def half_states(cell: Cell, given: Sequence[Any], operand: Any, zero: Any) -> tuple[Any, ...]:
    """The states with which the half of a cell of two products starts, in its order.

    Args:
        cell: whose `half` is meant.
        given: its own states, (B, H) each.
        operand: what the recurrent weights multiply first, (B, H).
        zero: zeros (B, H), for what one half of a step hands on to the other.
    """
    half = cast(Cell, cell.half)
    named = dict(zip(cell.states, given)) | {"operand": operand, "update": zero, "phase": zero}
    return tuple([named[name] for name in half.states])


def half_reset(reset: Any) -> Any:
    """Boundaries of half steps, (2T, B), of those of steps, (T, B)."""
    halves = np.zeros_like(reset, shape=(2 * len(reset), reset.shape[1]))
    halves[::2] = reset
    return halves


def second_halves(reverse: bool) -> slice:
    """The half steps that have the outputs of the steps."""
    return slice(0 if reverse else 1, None, 2)


def prepare(engine: Engine, cell: Cell, weights: Weights) -> Direction:
    """A direction of any cell, with the weights laid out for the engine's kernels."""
    if cell.half is None:
        return engine.prepare(cell, weights)
    return TwoProducts(cell, cell.half, engine.prepare(cell.half, weights))


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
    direction: Direction  # what `prepare` made of cells.recurrent_dropout(cell), with the same weights
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
    ) -> Any:
        mask = self.mask
        if initial is None:
            initial = (np.zeros_like(mask),) * len(final)
        initial = (*initial, mask, mask * initial[self.cell.operand])
        ignored = np.empty_like(mask), np.empty_like(mask)
        return self.direction.forward(x, initial, y, (*final, *ignored), lengths, reset, reverse, training)

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, H)
        dfinal: States | None,
        dx: Any | None,  # (T, B, I)
        accumulate: bool,
    ) -> tuple[States, Weights]:
        if dfinal is not None:
            dfinal = (*dfinal, np.zeros_like(self.mask), np.zeros_like(self.mask))
        (*dinitial, _, dmasked), grads = self.direction.backward(tape, dy, dfinal, dx, accumulate)
        dinitial[self.cell.operand] += self.mask * dmasked
        return tuple(dinitial), grads

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return self.direction.explain(steps, batch, training)


class TwoProducts(NamedTuple):
    """A direction whose steps take two recurrent products: each is two steps of half of it.

    The product of the input is computed in both.
    """

    cell: Cell
    half: Cell
    direction: Direction  # of the half

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
    ) -> Any:
        steps, batch, _ = x.shape
        halves = np.empty_like(y, shape=(2 * steps, batch, y.shape[2]))
        given = tuple(map(np.zeros_like, final)) if initial is None else initial
        tape = self.direction.forward(
            np.repeat(x, 2, axis=0),
            self._states(given, given[0]),
            halves,
            self._states(final, np.empty_like(final[0])),
            None if lengths is None else 2 * lengths,
            None if reset is None else half_reset(reset),
            reverse,
            training,
        )
        y[...] = halves[second_halves(reverse)]
        return (tape, reverse) if training else None

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, H)
        dfinal: States | None,
        dx: Any | None,  # (T, B, I)
        accumulate: bool,
    ) -> tuple[States, Weights]:
        inner, reverse = tape
        steps, batch, _ = dy.shape
        dhalves = np.zeros_like(dy, shape=(2 * steps, batch, dy.shape[2]))
        dhalves[second_halves(reverse)] = dy
        if dfinal is not None:
            dfinal = self._states(dfinal, np.zeros_like(dfinal[0]))
        twice = None if dx is None else np.empty_like(dx, shape=(2 * steps, batch, dx.shape[2]))
        states, grads = self.direction.backward(inner, dhalves, dfinal, twice, False)
        if dx is not None and twice is not None:
            here = twice[::2] + twice[1::2]
            dx[...] = dx + here if accumulate else here
        found = dict(zip(self.half.states, states))
        output, *others = (found[name] for name in self.cell.states)
        return (output + found["operand"], *others), grads

    def _states(self, given: States, operand: Any) -> States:
        return half_states(self.cell, given, operand, np.zeros_like(operand))

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        said = self.direction.explain(2 * steps, batch, training)
        return said | {"products": "two with the recurrent weights a step, which is run as two"}
