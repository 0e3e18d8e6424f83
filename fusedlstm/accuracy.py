"""What a precision of products costs, on a user's own data: of the whole, of each layer, and of each gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedlstm.kernels import reference

from . import dispatch, layers
from . import weights as storage
from .layers import Recurrent

PRECISIONS = dispatch.PRECISIONS_OF["cpu"][1:]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Relative errors of the norm of a layer with products in a precision; prints as text.

    Attributes:
        precision: of the products.
        output: error of the output.
        states: that of each final state, by name.
        layers: that of the output of each layer whose input is exact.
        gates: for each direction of each layer, that of what each gate's weights give, by gate, of exact
            inputs and states: which gate an error comes from.
    """

    precision: str
    output: float
    states: dict[str, float]
    layers: dict[str, float]
    gates: dict[str, dict[str, float]]

    def __str__(self) -> str:
        lines = [f"relative errors with products of {self.precision}:", f"  output: {self.output:.1e}"]
        lines += [f"  final state {name}: {error:.1e}" for name, error in self.states.items()]
        lines += [f"  {name} alone: {error:.1e}" for name, error in self.layers.items()]
        for place, gates in self.gates.items():
            each = ", ".join(f"{gate} {error:.1e}" for gate, error in gates.items())
            lines.append(f"  gates of {place}: {each}")
        return "\n".join(lines)

    __repr__ = __str__


def compare(
    layer: Recurrent,
    x: Any,
    state: Any = None,
    lengths: Any = None,
    reset: Any = None,
    *,
    precision: str = "int8",
) -> Comparison:
    """Run a layer with products of float32 and in a precision, on the CPU, and compare.

    Args:
        layer: a layer on arrays of float32; its own precision does not matter.
        x, state, lengths, reset: as it is called with.
        precision: "bfloat16" or "int8".

    Raises:
        TypeError, ValueError: for another layer or precision, and as the call would.

    Example:
        >>> compare(layers.LSTM(3, 5), np.ones((7, 2, 3), "float32")).output < 0.02
        True
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(
            f"layer must be a layer on arrays, such as fusedlstm.LSTM, got {type(layer).__name__}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if layer.dtype != np.float32:
        raise ValueError(f"layer must be of float32, got {layer.dtype}")
    given, batched = layer._input(dispatch.on_host("x", x))
    xp, (steps, batch, _) = layers._array_module(given), given.shape
    if not given.size:
        raise ValueError(f"x must have steps and sequences to compare, got the shape {x.shape}")
    initial: Any = [np.zeros((len(layer._places), batch, size), np.float32) for size in layer._sizes]
    if state is not None:
        initial = layer._state("state", state, batch, batched, xp)
    if lengths is not None:
        lengths = layers._lengths(lengths, steps, batch, batched, xp)
    if reset is not None:
        reset = layer._marks("reset", reset, steps, batch, batched, xp)
    exact, narrow = given, given
    finals: list[tuple[list[Any], list[Any]]] = []
    of_layers, of_gates = {}, {}
    for level in range(layer.num_layers):
        entering = [part[level * layer._directions :][: layer._directions] for part in initial]
        run = _Level(layer, level, entering, lengths, reset)
        y, final = run(exact, "float32")
        of_layers[f"layer {level}"] = _error(run(exact, precision)[0], y)
        of_gates.update(run.gates(exact, precision))
        narrow, found = run(narrow, precision)
        exact = y
        finals.append((found, final))
    states = {
        name: _error(*(np.stack([pair[side][n] for pair in finals]) for side in (0, 1)))
        for n, name in enumerate(layer.cell.states)
    }
    return Comparison(precision, _error(narrow, exact), states, of_layers, of_gates)


class _Level:
    """One layer of a stack, both directions of it."""

    def __init__(self, layer: Recurrent, level: int, initial: list[Any], lengths: Any, reset: Any) -> None:
        self.layer, self.level, self.initial = layer, level, initial
        self.lengths, self.reset = lengths, reset
        first = level * layer._directions
        self.weights = [place.weights for place in layer._places[first : first + layer._directions]]

    def __call__(self, x: np.ndarray, precision: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """The output (T, B, D*P) and the final states (D, B, P) and (D, B, H)."""
        engine, directions = dispatch.engine("cpu", precision=precision), self.layer._directions
        outputs = self.layer._sizes[0]
        y = np.empty((*x.shape[:2], directions * outputs), np.float32)
        final = [np.empty_like(part) for part in self.initial]
        for d, weights in enumerate(self.weights):
            here = y[..., d * outputs : (d + 1) * outputs]
            entering, leaving = (tuple(part[d] for part in states) for states in (self.initial, final))
            direction = engine.prepare(self.layer.cell, weights)
            direction.forward(x, entering, here, leaving, self.lengths, self.reset, d == 1, False)
        return y, final

    def gates(self, x: np.ndarray, precision: str) -> dict[str, dict[str, float]]:
        """The error of what each gate's weights give, by direction and gate."""
        cell, found = self.layer.cell, {}
        for d, weights in enumerate(self.weights):
            entering = tuple(part[d] for part in self.initial)
            options = (self.lengths, self.reset, d == 1)
            *_, tape = reference.forward(cell, weights, x, entering, *options)
            of_input, recurrent = reference.by_gate(cell, weights)
            errors = {}
            for gate in cell.gates:
                exact, difference = [], []
                if gate in of_input:
                    rows = x[tape.active]
                    exact.append(rows @ of_input[gate].T)
                    difference.append(_product(rows, of_input[gate], precision, 2) - exact[-1])
                if gate in recurrent:
                    rows = np.stack([step.operands[gate] for step in tape.steps])[tape.active]
                    exact.append(rows @ recurrent[gate].T)
                    difference.append(_product(rows, recurrent[gate], precision, 1) - exact[-1])
                errors[gate] = float(np.linalg.norm(sum(difference)) / max(np.linalg.norm(sum(exact)), 1e-30))
            found[f"layer {self.level}, reverse" if d else f"layer {self.level}"] = errors
        return found


def _product(rows: np.ndarray, weight: np.ndarray, precision: str, terms: int) -> np.ndarray:
    """Rows (N, K) times weights (H, K), of which integers have `terms` numbers for each of the rows."""
    first = rounded(rows, precision)
    if precision == "int8" and terms == 2:
        first = first + rounded(rows - first, precision)
    product: np.ndarray = first @ rounded(weight, precision).T
    return product


def rounded(rows: np.ndarray, precision: str) -> np.ndarray:
    """Rows as float32, as products in a precision see them: integers have a scale for each row."""
    if precision == "bfloat16":
        return storage.from_bfloat16_bits(storage.bfloat16_bits(rows))
    whole, scale = storage.integers(rows)
    found: np.ndarray = whole * scale[:, None]
    return found


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))
