"""The explicit time loop in NumPy: the truth that every kernel is held against.

One direction of one layer, in the precision of its arguments, without any cleverness.  The step is
the cell's own function; the gradient of a step is the cell's derived adjoint.  :class:`Reference`
gives these functions the interface of an engine.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fusedlstm.cells import Cell
from fusedlstm.derive import TRANSPOSED, function_name
from fusedlstm.weights import Weights

from .random import Noise, uniforms


class Taped(NamedTuple):
    """What :func:`backward` needs of one step."""

    arguments: dict[
        str, np.ndarray
    ]  # what the cell was given; of a late gate what its call gave; (B, H) each
    operands: dict[str, np.ndarray]  # by gate, what its recurrent weights multiplied, (B, P)


class Tape(NamedTuple):
    """What :func:`backward` needs of a forward pass."""

    cell: Cell
    weights: Weights
    x: np.ndarray  # (T, B, I)
    steps: list[Taped]  # for each t
    raw: np.ndarray  # (T, B, H), the output before its projection
    states: tuple[np.ndarray, ...]  # (T, B, H) each, the states but the output after each step
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
    noise: Noise | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], Tape]:
    """Outputs (T, B, P), final states shaped as the initial ones, and the tape."""
    steps, batch, _ = x.shape
    active, boundary, order = schedule(steps, batch, lengths, reset, reverse)
    hidden = cell.hidden_size(weights)
    y = np.zeros((steps, *initial[0].shape), x.dtype)
    raw = np.zeros((steps, batch, hidden), x.dtype)
    every = tuple(np.zeros((steps, *state.shape), x.dtype) for state in initial[1:])
    tapes = [Taped({}, {}) for _ in range(steps)]
    states = initial
    for t in order:
        states = tuple(np.where(boundary[t, :, None], s0, s) for s0, s in zip(initial, states))
        given = _arguments(cell, weights, x[t], states, tapes[t])
        if noise is not None:
            drawn = uniforms(np.arange(hidden), t, np.arange(batch)[:, None], noise, x.dtype)
            noises = dict(zip(cell.noise, drawn))
            given |= noises
            tapes[t].arguments.update(noises)
        results = cell.function(**given, **cell.constants)
        new = list(results) if isinstance(results, (tuple, list)) else [results]
        raw[t] = new[0]
        if weights.hr is not None:
            new[0] = raw[t] @ weights.hr.T
        states = tuple(np.where(active[t, :, None], n, s) for n, s in zip(new, states))
        for target, state in zip((y, *every), new):
            target[t] = np.where(active[t, :, None], state, 0)
    return y, states, Tape(cell, weights, x, tapes, raw, every, active, boundary, order)


def _arguments(
    cell: Cell, weights: Weights, x: np.ndarray, states: tuple[np.ndarray, ...], tape: Taped
) -> dict[str, Any]:
    """What the function of the cell takes at a step; what backward needs of it is noted on the tape."""
    input_weights, recurrent_weights = by_gate(cell, weights)
    from_input = {gate: x @ weight.T for gate, weight in input_weights.items()}
    if cell.takes_gates:
        from_input = dict(zip(cell.gates_with_input, np.split(x, len(cell.gates_with_input), -1)))
    from_output, bias_hh = {}, {}
    if weights.bias_ih is not None:
        for gate, bias in zip(cell.gates_with_input, np.split(weights.bias_ih, len(from_input))):
            from_input[gate] = from_input[gate] + bias
    if weights.bias_hh is not None:
        parts = np.split(weights.bias_hh, len(recurrent_weights))
        bias_hh = dict(zip(cell.gates_with_recurrent, parts))

    def multiply(gate: str, operand: np.ndarray) -> Any:
        tape.operands[gate] = operand
        return operand @ recurrent_weights[gate].T + bias_hh.get(gate, 0)

    for gate in recurrent_weights:
        if gate not in cell.late:
            from_output[gate] = multiply(gate, states[cell.operand])
    given = cell.step_arguments(from_input, from_output, states, weights.vectors, multiply)
    tape.arguments.update(given)
    for gate in cell.late:
        given[gate] = partial(_noting, given[gate], gate, tape.arguments)
    return given


def _noting(function: Any, gate: str, arguments: dict[str, np.ndarray], operand: np.ndarray) -> Any:
    arguments[gate] = value = function(operand)
    return value


def by_gate(cell: Cell, weights: Weights) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The input weights (H, I) and the recurrent weights (H, P), with zeros between heads, of each gate that
    has them."""
    ih, hh = cell.gates_with_input, cell.gates_with_recurrent
    columns = cell.hidden_size(weights) if weights.hr is None else len(weights.hr)
    recurrent = {}
    if hh:
        recurrent = {g: block_diagonal(w, columns) for g, w in zip(hh, np.split(weights.hh, len(hh)))}
    return {} if weights.ih is None else dict(zip(ih, np.split(weights.ih, len(ih)))), recurrent


def block_diagonal(weight: np.ndarray, columns: int) -> np.ndarray:
    """(H, columns / heads) as (H, columns), with zeros between the heads."""
    heads = columns // weight.shape[1]
    if heads == 1:
        return weight
    blocks = np.zeros((heads, len(weight) // heads, heads, weight.shape[1]), weight.dtype)
    for n, block in enumerate(np.split(weight, heads)):
        blocks[n, :, n] = block
    return blocks.reshape(len(weight), columns)


def diagonal_blocks(weight: np.ndarray, width: int) -> np.ndarray:
    """What :func:`block_diagonal` made the matrix of; what lies between the heads is lost."""
    heads = weight.shape[1] // width
    blocks = weight.reshape(heads, -1, heads, width)
    return np.concatenate([blocks[n, :, n] for n in range(heads)])


def backward(
    tape: Tape,
    dy: np.ndarray,  # (T, B, P)
    dfinal: tuple[np.ndarray, ...],  # shaped as the final states
    dstates: tuple[np.ndarray | None, ...] = (),  # (T, B, H) each, of the states but the output at each step
) -> tuple[np.ndarray, tuple[np.ndarray, ...], Weights]:
    """Gradients of x, of the initial states and of the weights."""
    cell, weights = tape.cell, tape.weights
    total = [np.zeros_like(d) for d in dfinal]  # of the initial states, from every boundary
    dx = np.zeros_like(tape.x)
    grads = Weights(*(_zeros_like(entry) for entry in weights))
    input_weights, recurrent_weights = by_gate(cell, weights)
    transposed = {
        function_name(f"{TRANSPOSED}:{gate}"): partial(_times, recurrent_weights[gate]) for gate in cell.late
    }
    dafter = list(dfinal)
    for t in reversed(tape.order):
        active = tape.active[t, :, None]
        dnew = [np.where(active, d, 0) for d in dafter]
        passed = [np.where(active, 0, d) for d in dafter]
        for n, given in enumerate((dy, *dstates)):
            if given is not None:
                dnew[n] = dnew[n] + np.where(active, given[t], 0)
        if weights.hr is not None:
            grads.hr[...] += dnew[0].T @ np.where(active, tape.raw[t], 0)
            dnew[0] = dnew[0] @ weights.hr
        arguments, operands = tape.steps[t]
        gradients = cell.numpy.adjoint(**arguments, **dict(zip(cell.seeds, dnew)), **transposed)
        # a row that is past its end has no gradient, whatever its values are
        d = dict(zip(cell.arguments, (np.where(active, g, 0) for g in gradients)))
        x = np.where(active, tape.x[t], 0)
        if cell.takes_gates:
            dx[t] = np.concatenate([d[f"{g}_x" if g in cell.split else g] for g in cell.gates_with_input], -1)
        for n, (gate, weight) in enumerate(input_weights.items()):
            part = d[f"{gate}_x" if gate in cell.split else gate]
            dx[t] += part @ weight
            _part(grads.ih, n, len(input_weights))[...] += part.T @ x
            if weights.bias_ih is not None:
                _part(grads.bias_ih, n, len(input_weights))[...] += part.sum(0)
        dafter = [p + d.get(name, 0) for name, p in zip(cell.states, passed)]
        for n, (gate, weight) in enumerate(recurrent_weights.items()):
            part = d[f"{gate}_h" if gate in cell.split else gate]
            if gate not in cell.late:
                dafter[cell.operand] = dafter[cell.operand] + part @ weight
            target = _part(grads.hh, n, len(recurrent_weights))
            target += diagonal_blocks(part.T @ np.where(active, operands[gate], 0), target.shape[1])
            if weights.bias_hh is not None:
                _part(grads.bias_hh, n, len(recurrent_weights))[...] += part.sum(0)
        for name, vector in zip(cell.weights, grads.vectors):
            vector += d[name].sum(0)
        boundary = tape.boundary[t, :, None]
        total = [s + np.where(boundary, d, 0) for s, d in zip(total, dafter)]
        dafter = [np.where(boundary, 0, d) for d in dafter]
    return dx, tuple(s + d for s, d in zip(total, dafter)), grads


def _times(weight: np.ndarray, d: np.ndarray) -> Any:
    return d @ weight


def _part(stacked: np.ndarray, n: int, count: int) -> np.ndarray:
    """The rows of gate n of `count` gates."""
    return np.split(stacked, count)[n]


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
        states: tuple[np.ndarray | None, ...] | None = None,  # (T, B, H) each
        noise: Noise | None = None,
    ) -> Tape | None:
        if initial is None:
            initial = tuple(np.zeros_like(state) for state in final)
        y[...], end, tape = forward(self.cell, self.weights, x, initial, lengths, reset, reverse, noise)
        for target, state in zip((*final, *(states or ())), (*end, *tape.states)):
            if target is not None:
                target[...] = state
        return tape if training else None

    def backward(
        self,
        tape: Tape,
        dy: np.ndarray,  # (T, B, P)
        dfinal: tuple[np.ndarray, ...] | None,
        dx: np.ndarray | None,  # (T, B, I)
        accumulate: bool,
        dstates: tuple[np.ndarray | None, ...] | None = None,  # (T, B, H) each
    ) -> tuple[tuple[np.ndarray, ...], Weights]:
        if dfinal is None:
            hidden = tape.raw[0]
            outputs = hidden if self.weights.hr is None else hidden[:, : len(self.weights.hr)]
            dfinal = tuple(np.zeros_like(hidden if n else outputs) for n in range(len(self.cell.states)))
        here, dinitial, grads = backward(tape, dy, dfinal, dstates or ())
        if dx is not None:
            dx[...] = dx + here if accumulate else here
        return dinitial, grads

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        return {"kernel": "explicit time loop in NumPy, for checking"}


class Reference:
    """The engine for backend="reference"."""

    def prepare(self, cell: Cell, weights: Weights) -> Direction:
        return Direction(cell, weights)
