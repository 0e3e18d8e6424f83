"""What a precision of products costs, on a user's own data: of the whole, of each layer, and of each gate."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
        plain, other = (_alone(layer, level, kind) for kind in ("float32", precision))
        y, final = _run(plain, exact, entering, lengths, reset)
        of_layers[f"layer {level}"] = _error(_run(other, exact, entering, lengths, reset)[0], y)
        for d, errors in enumerate(_gates(plain, exact, entering, lengths, reset, precision)):
            of_gates[f"layer {level}, reverse" if d else f"layer {level}"] = errors
        narrow, found = _run(other, narrow, entering, lengths, reset)
        exact = y
        finals.append((found, final))
    states = {
        name: _error(*(np.stack([pair[side][n] for pair in finals]) for side in (0, 1)))
        for n, name in enumerate(layer.cell.states)
    }
    return Comparison(precision, _error(narrow, exact), states, of_layers, of_gates)


def _alone(layer: Recurrent, level: int, precision: str) -> Recurrent:
    """One layer of a stack, both directions of it, with products in a precision."""
    settings = layer._settings() | {
        "input_size": layer._width if level else layer.input_size,
        "num_layers": 1,
        "dropout": 0.0,
        "batch_first": False,
        "backend": "cpu",
        "precision": precision,
    }
    own = slice(level * layer._directions, (level + 1) * layer._directions)
    arrays = {
        re.sub(r"_l\d+(_reverse)?$", r"_l0\1", name): array
        for names, place in zip(layer._names[own], layer._places[own])
        for name, array in zip(storage.flatten(names), storage.flatten(place.weights))
    }
    return layers._rebuilt(Recurrent, layer.cell, settings, arrays)


def _run(
    layer: Recurrent, x: np.ndarray, initial: list[Any], lengths: Any, reset: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output (T, B, D*P) and the final states (D, B, P) and (D, B, H)."""
    y, final = layer(x, tuple(initial) if len(initial) > 1 else initial[0], lengths, reset)
    return y, list(final) if len(initial) > 1 else [final]


def _gates(
    layer: Recurrent, x: np.ndarray, initial: list[Any], lengths: Any, reset: Any, precision: str
) -> Iterator[dict[str, float]]:
    """For each direction of a layer the error of what each gate's weights give, by gate."""
    cell = layer._cell(0)
    for d, place in enumerate(layer._places):
        entering = tuple(part[d] for part in initial)
        fed = layer._fed(x, d)
        *_, tape = reference.forward(cell, place.weights, fed, entering, lengths, reset, d == 1)
        of_input, recurrent = reference.by_gate(cell, place.weights)
        errors = {}
        for gate in cell.gates:
            exact, difference = [], []
            if gate in of_input:
                rows = fed[tape.active]
                exact.append(rows @ of_input[gate].T)
                difference.append(_product(rows, of_input[gate], precision, 2) - exact[-1])
            if gate in recurrent:
                rows = np.stack([step.operands[gate] for step in tape.steps])[tape.active]
                exact.append(rows @ recurrent[gate].T)
                difference.append(_product(rows, recurrent[gate], precision, 1) - exact[-1])
            errors[gate] = float(np.linalg.norm(sum(difference)) / max(np.linalg.norm(sum(exact)), 1e-30))
        yield errors


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
