"""What a layer must compute, said again in PyTorch: one sequence, one segment, one step at a time.

Shares with the package the text of a cell's step and nothing else: no time loop, no adjoint (autograd
differentiates), no schedule (sequences are cut to their lengths and at their resets before anything runs).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedlstm import Recurrent
from fusedlstm.cells import Cell
from fusedlstm.derive import compile_source

_FUNCTIONS: dict[str, Any] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: torch.clamp(x / 6 + 0.5, 0, 1),
    "relu": torch.relu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "exp": torch.exp,
    "erf": torch.erf,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "absolute": torch.abs,
    "minimum": lambda x, y: torch.minimum(*torch.broadcast_tensors(*map(_tensor, (x, y)))),
    "maximum": lambda x, y: torch.maximum(*torch.broadcast_tensors(*map(_tensor, (x, y)))),
    "where": lambda c, x, y: torch.where(c, _tensor(x), _tensor(y)),
    "full_like": torch.full_like,
    "mean": lambda x: x.mean().expand_as(x),  # of one row
}


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


class Result(NamedTuple):
    y: np.ndarray  # (T, B, D*P)
    final: tuple[np.ndarray, ...]  # (L*D, B, P) and (L*D, B, H)
    states: tuple[np.ndarray, ...]  # (T, L*D, B, P) and (T, L*D, B, H)
    dx: np.ndarray
    dinitial: tuple[np.ndarray, ...]
    grads: dict[str, np.ndarray]


def run(
    layer: Recurrent,
    x: np.ndarray,  # (T, B, I)
    initial: tuple[np.ndarray, ...],  # (L*D, B, P) and (L*D, B, H)
    dy: np.ndarray,  # (T, B, D*P)
    dfinal: tuple[np.ndarray, ...],
    lengths: np.ndarray | None = None,  # (B,)
    reset: np.ndarray | None = None,  # (T, B)
    masks: list[np.ndarray] | None = None,  # (T, B, D*P) for each layer but the last
    recurrent_masks: list[np.ndarray] | None = None,  # (B, H) for each direction of each layer
    mask: np.ndarray | None = None,  # (T, B), which steps count
    dstates: tuple[np.ndarray, ...] | None = None,  # (T, L*D, B, P) and (T, L*D, B, H)
) -> Result:
    """Outputs and gradients of a layer in float64, whatever the precision of the layer."""
    weights = {name: _leaf(array) for name, array in layer.state_dict().items()}
    x0, initial0 = _leaf(x), tuple(_leaf(part) for part in initial)
    steps, batch, _ = x.shape
    ends = np.full(batch, steps) if lengths is None else lengths
    marks = np.zeros((steps, batch), bool) if reset is None else reset
    counts = np.ones((steps, batch), bool) if mask is None else mask
    directions = 2 if layer.bidirectional else 1
    values, finals, every = x0, [], []
    for level in range(layer.num_layers):
        outputs = []
        for d in range(directions):
            suffix = f"_l{level}" + ("_reverse" if d else "")
            own = {name.removesuffix(suffix): w for name, w in weights.items() if name.endswith(suffix)}
            start = tuple(part[level * directions + d] for part in initial0)
            drops = recurrent_masks[level * directions + d] if recurrent_masks else None
            given = values
            if layer.input_size is None and level == 0:
                given = values.chunk(directions, -1)[d]
            states, end = _direction(layer.cell, own, given, start, ends, marks, counts, d == 1, drops)
            outputs.append(states[0])
            every.append(states)
            finals.append(end)
        values = torch.cat(outputs, -1)
        if masks and level < layer.num_layers - 1:
            values = values * torch.tensor(masks[level])
    final = tuple(torch.stack(parts) for parts in zip(*finals))
    states = tuple(torch.stack(parts, 1) for parts in zip(*every))
    loss = (values * _leaf(dy)).sum() + sum((f * _leaf(d)).sum() for f, d in zip(final, dfinal))
    loss = loss + sum((s * _leaf(d)).sum() for s, d in zip(states, dstates or ()))
    loss.backward()
    return Result(
        _numpy(values),
        tuple(map(_numpy, final)),
        tuple(map(_numpy, states)),
        _gradient(x0),
        tuple(map(_gradient, initial0)),
        {name: _gradient(w) for name, w in weights.items()},
    )


def _direction(
    cell: Cell,
    weights: dict[str, Tensor],
    x: Tensor,  # (T, B, I)
    initial: tuple[Tensor, ...],  # (B, size) each
    ends: np.ndarray,
    marks: np.ndarray,
    counts: np.ndarray,
    reverse: bool,
    mask: np.ndarray | None,  # (B, H)
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The states after each step, (T, B, size) each, zero past the ends, and the final ones."""
    step = compile_source(cell.source, _FUNCTIONS, cell.name).step
    rows, finals = [], []
    for b in range(x.shape[1]):
        dropout = torch.ones(()) if mask is None else torch.tensor(mask[b])
        every = [tuple(torch.zeros_like(part[b]) for part in initial)] * x.shape[0]
        cuts = [0, *(t for t in range(1, ends[b]) if marks[t, b]), int(ends[b])]
        segments = [range(start, end) for start, end in pairwise(cuts)]
        for segment in reversed(segments) if reverse else segments:
            states = [part[b] for part in initial]
            for t in reversed(segment) if reverse else segment:
                if counts[t, b]:
                    states = _step(cell, step, weights, x[t, b], states, dropout)
                every[t] = tuple(states)
        rows.append([torch.stack(parts) for parts in zip(*every)])
        finals.append(states)
    states = tuple(torch.stack(parts, 1) for parts in zip(*rows))
    return states, tuple(torch.stack(parts) for parts in zip(*finals))


def _step(
    cell: Cell, step: Any, weights: dict[str, Tensor], x: Tensor, states: list[Tensor], dropout: Tensor
) -> list[Tensor]:
    def product(gate: str, which: str, value: Tensor) -> Tensor:
        """Of a row with the weights of a gate, plus their bias; zero of a gate without such weights."""
        own = [
            g
            for g in cell.gates
            if g not in (cell.without_input if which == "ih" else cell.without_recurrent)
        ]
        if gate not in own:
            return torch.zeros(())
        n, count = own.index(gate), len(own)
        if f"weight_{which}" not in weights:  # it is given the product
            return value.chunk(count)[n]
        found = _blocks(weights[f"weight_{which}"].chunk(count)[n], value)
        return found + weights[f"bias_{which}"].chunk(count)[n] if f"bias_{which}" in weights else found

    given: dict[str, Any] = dict(zip(cell.states, states)) | {name: weights[name] for name in cell.weights}
    for gate in cell.gates:
        from_x = product(gate, "ih", x)
        if gate in cell.late:
            given[gate] = lambda value, gate=gate, a=from_x: a + product(gate, "hh", dropout * value)
        else:
            from_h = product(gate, "hh", dropout * states[cell.operand])
            given |= {f"{gate}_x": from_x, f"{gate}_h": from_h, gate: from_x + from_h}
    new = list(step(*(given[name] for name in cell.arguments)))
    if "weight_hr" in weights:
        new[0] = weights["weight_hr"] @ new[0]
    return new


def _blocks(weight: Tensor, value: Tensor) -> Tensor:
    """The product of a matrix, or of the blocks on its diagonal, which lie below each other, with a row."""
    heads = len(value) // weight.shape[1]
    return torch.cat([block @ part for block, part in zip(weight.chunk(heads), value.chunk(heads))])


def _leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array, np.float64), requires_grad=True)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _gradient(tensor: Tensor) -> np.ndarray:
    return np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
