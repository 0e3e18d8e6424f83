"""The explicit time loop in NumPy: the truth that every kernel is held against.

One direction of one layer, in the precision of its arguments, without any cleverness.  The step is
the cell's own function; the gradient of a step is the cell's derived adjoint.  :class:`Reference`
gives these functions the interface of an engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fusedlstm.cells import Cell
from fusedlstm.weights import Weights


class Tape(NamedTuple):
    """What :func:`backward` needs of a forward pass."""

    cell: Cell
    weights: Weights
    x: np.ndarray  # (T, B, I)
    arguments: list[dict[str, np.ndarray]]  # for each t: what the cell was given, (B, H) each
    operands: np.ndarray  # (T, B, P), what the recurrent weights multiplied at each step
    raw: np.ndarray  # (T, B, H), the output before its projection
    active: np.ndarray  # (T, B)
    boundary: np.ndarray  # (T, B)
    order: range


def schedule(
    steps: int, batch: int, lengths: np.ndarray | None, reset: np.ndarray | None, reverse: bool
) -> tuple[np.ndarray, np.ndarray, range]:
    """Which steps count, before which the state goes back to the initial one, and their order.

    `reset[t]` marks a boundary between t-1 and t: a forward pass starts anew at t, a reverse pass
    at t-1.
    """
    times = np.arange(steps)[:, None]
    active = times < (np.full(batch, steps) if lengths is None else lengths)
    boundary = np.zeros((steps, batch), bool)
    if reset is not None:
        boundary = np.concatenate([reset[1:], boundary[:1]]) if reverse else reset.copy()
    # what lies beyond the end of a sequence does not touch its state
    return active, boundary & active, range(steps)[:: -1 if reverse else 1]


def forward(
    cell: Cell,
    weights: Weights,
    x: np.ndarray,  # (T, B, I)
    initial: tuple[np.ndarray, ...],  # (B, P) for the output, (B, H) for other states
    lengths: np.ndarray | None = None,  # (B,)
    reset: np.ndarray | None = None,  # (T, B)
    reverse: bool = False,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], Tape]:
    """Outputs (T, B, P), final states shaped as the initial ones, and the tape."""
    steps, batch, _ = x.shape
    active, boundary, order = schedule(steps, batch, lengths, reset, reverse)
    hidden = weights.ih.shape[0] // len(cell.gates)
    y = np.zeros((steps, *initial[0].shape), x.dtype)
    operands, raw = np.zeros_like(y), np.zeros((steps, batch, hidden), x.dtype)
    arguments: list[dict[str, np.ndarray]] = [{} for _ in range(steps)]
    states = initial
    for t in order:
        states = tuple(np.where(boundary[t, :, None], s0, s) for s0, s in zip(initial, states))
        operands[t] = states[cell.operand]
        arguments[t] = given = _arguments(cell, weights, x[t], states)
        results = cell.function(**given, **cell.constants)
        new = list(results) if isinstance(results, (tuple, list)) else [results]
        raw[t] = new[0]
        if weights.hr is not None:
            new[0] = raw[t] @ weights.hr.T
        states = tuple(np.where(active[t, :, None], n, s) for n, s in zip(new, states))
        y[t] = np.where(active[t, :, None], new[0], 0)
    return y, states, Tape(cell, weights, x, arguments, operands, raw, active, boundary, order)


def _arguments(
    cell: Cell, weights: Weights, x: np.ndarray, states: tuple[np.ndarray, ...]
) -> dict[str, np.ndarray]:
    from_input, from_output = x @ weights.ih.T, states[cell.operand] @ weights.hh.T
    if weights.bias_ih is not None:
        from_input, from_output = from_input + weights.bias_ih, from_output + weights.bias_hh
    by_gate = (np.split(product, len(cell.gates), axis=-1) for product in (from_input, from_output))
    return cell.step_arguments(by_gate, states, weights.vectors)


def backward(
    tape: Tape,
    dy: np.ndarray,  # (T, B, P)
    dfinal: tuple[np.ndarray, ...],  # shaped as the final states
) -> tuple[np.ndarray, tuple[np.ndarray, ...], Weights]:
    """Gradients of x, of the initial states and of the weights."""
    cell, weights = tape.cell, tape.weights
    total = [np.zeros_like(d) for d in dfinal]  # of the initial states, from every boundary
    dx = np.zeros_like(tape.x)
    grads = Weights(*(_zeros_like(entry) for entry in weights))
    dstates = list(dfinal)
    for t in reversed(tape.order):
        active = tape.active[t, :, None]
        dnew = [np.where(active, d, 0) for d in dstates]
        passed = [np.where(active, 0, d) for d in dstates]
        dnew[0] = dnew[0] + np.where(active, dy[t], 0)
        if weights.hr is not None:
            grads.hr[...] += dnew[0].T @ np.where(active, tape.raw[t], 0)
            dnew[0] = dnew[0] @ weights.hr
        gradients = cell.numpy.adjoint(**tape.arguments[t], **dict(zip(cell.seeds, dnew)))
        # a row that is past its end has no gradient, whatever its values are
        d = dict(zip(cell.arguments, (np.where(active, g, 0) for g in gradients)))
        d_input = np.concatenate([d.get(f"{g}_x", d.get(g)) for g in cell.gates], axis=-1)
        d_output = np.concatenate([d.get(f"{g}_h", d.get(g)) for g in cell.gates], axis=-1)
        dx[t] = d_input @ weights.ih
        grads.ih[...] += d_input.T @ np.where(active, tape.x[t], 0)
        grads.hh[...] += d_output.T @ tape.operands[t]
        if weights.bias_ih is not None:
            grads.bias_ih[...] += d_input.sum(0)
            grads.bias_hh[...] += d_output.sum(0)
        for name, vector in zip(cell.weights, grads.vectors):
            vector += d[name].sum(0)
        dstates = [p + d.get(name, 0) for name, p in zip(cell.states, passed)]
        dstates[cell.operand] = dstates[cell.operand] + d_output @ weights.hh
        boundary = tape.boundary[t, :, None]
        total = [s + np.where(boundary, d, 0) for s, d in zip(total, dstates)]
        dstates = [np.where(boundary, 0, d) for d in dstates]
    return dx, tuple(s + d for s, d in zip(total, dstates)), grads


def _zeros_like(entry: Any) -> Any:
    if isinstance(entry, tuple):
        return tuple(_zeros_like(part) for part in entry)
    return None if entry is None else np.zeros_like(entry)


class Direction(NamedTuple):
    """One direction of one layer; see :class:`fusedlstm.dispatch.Direction`."""

    cell: Cell
    weights: Weights

    def forward(
        self,
        x: np.ndarray,  # (T, B, I)
        initial: tuple[np.ndarray, ...] | None,
        y: np.ndarray,  # (T, B, P)
        final: tuple[np.ndarray, ...],
        lengths: np.ndarray | None,  # (B,)
        reset: np.ndarray | None,  # (T, B)
        reverse: bool,
        training: bool,
    ) -> Tape | None:
        if initial is None:
            initial = tuple(np.zeros_like(state) for state in final)
        y[...], states, tape = forward(self.cell, self.weights, x, initial, lengths, reset, reverse)
        for target, state in zip(final, states):
            target[...] = state
        return tape if training else None

    def backward(
        self,
        tape: Tape,
        dy: np.ndarray,  # (T, B, P)
        dfinal: tuple[np.ndarray, ...] | None,
        dx: np.ndarray | None,  # (T, B, I)
        accumulate: bool,
    ) -> tuple[tuple[np.ndarray, ...], Weights]:
        if dfinal is None:
            outputs, hidden = tape.operands[0], tape.raw[0]
            dfinal = tuple(np.zeros_like(hidden if n else outputs) for n in range(len(self.cell.states)))
        here, dinitial, grads = backward(tape, dy, dfinal)
        if dx is not None:
            dx[...] = dx + here if accumulate else here
        return dinitial, grads

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return {"kernel": "explicit time loop in NumPy, for checking"}


class Reference:
    """The engine for backend="reference"."""

    def prepare(self, cell: Cell, weights: Weights) -> Direction:
        return Direction(cell, weights)
