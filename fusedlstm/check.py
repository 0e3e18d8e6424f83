"""Holds every built-in cell and option against the float64 reference, on the machine at hand.

Outputs, final states and all gradients are compared, in both precisions, at sizes that fill no tile
evenly.  ``fusedlstm check`` prints the result as a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import dispatch
from .cells import Cell
from .layers import BUILT_IN, Recurrent

# Relative error of the norm, for one step; rounding errors of T steps add up as their square root.
TOLERANCE = {"float32": 1e-6, "float64": 1e-13}

SIZES = (  # T, B, I, H
    (1, 1, 1, 1),
    (1, 7, 5, 17),
    (7, 13, 1, 33),
    (33, 1, 17, 65),
    (12, 8, 64, 128),
)

# What the layer is built with, and which arguments the call gets.
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "no bias": ({"bias": False}, ()),
    "batch first": ({"batch_first": True}, ()),
    "one sequence": ({}, ("unbatched", "state")),
    "initial state": ({}, ("state",)),
    "lengths": ({}, ("lengths",)),
    "reset": ({}, ("reset", "state")),
    "projection": ({"proj_size": 1}, ("state",)),
    "two layers, dropout": ({"num_layers": 2, "dropout": 0.25}, ()),
    "recurrent dropout": ({"recurrent_dropout": 0.25}, ("lengths", "reset", "state")),
    "bidirectional": ({"bidirectional": True}, ()),
    "all of these": (
        {"num_layers": 2, "dropout": 0.25, "bidirectional": True, "batch_first": True, "proj_size": 1},
        ("lengths", "reset", "state"),
    ),
}


class Case(NamedTuple):
    """One comparison."""

    cell: Cell
    option: str
    dtype: str
    sizes: tuple[int, int, int, int]  # T, B, I, H

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in zip("TBIH", self.sizes))
        return f"{self.cell.name}, {self.option}, {self.dtype}, {sizes}"


class Outcome(NamedTuple):
    """The result that is farthest from the reference, its error and what is allowed."""

    case: Case
    result: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN does not pass

    def __str__(self) -> str:
        return f"{self.case}: {self.result} has the relative error {self.error:.1e}, allowed {self.limit:.1e}"


def cases() -> Iterator[Case]:
    """All of them, those of one table entry after another."""
    for cell in BUILT_IN.values():
        for option in OPTIONS:
            if option == "projection" and cell.unprojectable:
                continue  # the layer refuses it
            for dtype in TOLERANCE:
                for sizes in SIZES:
                    yield Case(cell, option, dtype, sizes)


def run(case: Case, backend: str = "cpu") -> Outcome:
    """Compare one case."""
    settings, given = OPTIONS[case.option]
    settings = dict(settings)
    steps, _, inputs, hidden = case.sizes
    if "proj_size" in settings:
        settings["proj_size"] = 0 if case.cell.unprojectable else hidden // 2
    layer = Recurrent(case.cell, inputs, hidden, **settings, dtype=case.dtype, backend=backend, seed=1)
    reference = Recurrent(case.cell, inputs, hidden, **settings, dtype="float64", backend="reference", seed=1)
    reference.load_state_dict(layer.state_dict())
    arguments = _arguments(layer, case, given)
    expected = _results(reference, arguments)
    actual = _results(layer, arguments)
    limit = TOLERANCE[case.dtype] * np.sqrt(steps)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return Outcome(case, worst, errors[worst], limit)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|, where a norm below 0.1 counts as 0.1: a few small numbers may be
    left of larger ones that cancelled."""
    scale = max(np.linalg.norm(expected), 0.1)
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / scale)


class _Arguments(NamedTuple):
    """Of forward and backward, in the precision of the layer under test."""

    x: np.ndarray
    options: dict[str, Any]
    dy: np.ndarray
    dstate: tuple[np.ndarray, ...]


def _arguments(layer: Recurrent, case: Case, given: tuple[str, ...]) -> _Arguments:
    random = np.random.default_rng(2)
    steps, batch, inputs, hidden = case.sizes
    directions = 2 if layer.bidirectional else 1
    outputs = layer.proj_size or hidden
    axes: tuple[int, ...] = (batch, steps) if layer.batch_first else (steps, batch)
    middle: tuple[int, ...] = (batch,)
    if "unbatched" in given:
        axes, middle = (steps,), ()

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(layer.dtype)

    def states() -> tuple[np.ndarray, ...]:
        sizes = (outputs, *[hidden] * (len(case.cell.states) - 1))
        return tuple(normal(layer.num_layers * directions, *middle, size) for size in sizes)

    options: dict[str, Any] = {}
    if "state" in given:
        options["state"] = states()
    if "lengths" in given:
        options["lengths"] = random.integers(1, steps + 1, batch)
    if "reset" in given:
        options["reset"] = random.random(axes) < 0.2
    return _Arguments(normal(*axes, inputs), options, normal(*axes, directions * outputs), states())


def _results(layer: Recurrent, arguments: _Arguments) -> dict[str, np.ndarray]:
    """Everything that forward and backward compute, by name."""
    single = len(layer.cell.states) == 1

    def give(value: Any) -> Any:
        if isinstance(value, tuple):
            parts = tuple(map(give, value))
            return parts[0] if single else parts
        floats = value.dtype.kind == "f"
        return _to_device(value.astype(layer.dtype) if floats else value, layer.backend)

    options = {name: give(value) for name, value in arguments.options.items()}
    y, final, tape = layer.forward(give(arguments.x), **options, training=True)
    assert tape is not None
    dx, dinitial, gradients = tape.backward(give(arguments.dy), give(arguments.dstate))
    results = {"y": y, "dx": dx, **{f"gradient of {name}": g for name, g in gradients.items()}}
    for what, parts in (("final", final), ("gradient of initial", dinitial)):
        for name, part in zip(layer.cell.states, (parts,) if single else parts):
            results[f"{what} {name}"] = part
    return {name: value.get() if hasattr(value, "get") else value for name, value in results.items()}


def _to_device(array: np.ndarray, backend: str) -> Any:
    if backend != "cuda" or dispatch.simulated():
        return array
    import cupy

    return cupy.asarray(array)


def table(outcomes: list[Outcome], dtype: str) -> str:
    """The largest error of each cell and option as a share of what is allowed."""
    worst: dict[tuple[str, str], float] = {}
    for outcome in outcomes:
        if outcome.case.dtype == dtype:
            place = outcome.case.option, outcome.case.cell.name
            # NaN stays: it is not less than anything
            share = outcome.error / outcome.limit
            worst[place] = worst[place] if share <= worst.get(place, -1.0) else share
    left = max(map(len, OPTIONS))
    lines = [" ".join([dtype.ljust(left), *(name.rjust(13) for name in BUILT_IN)])]
    for option in OPTIONS:
        entries = [_entry(worst.get((option, name))) for name in BUILT_IN]
        lines.append(" ".join([option.ljust(left), *(entry.rjust(13) for entry in entries)]))
    return "\n".join(lines)


def _entry(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.2g}" if share <= 1 else f"FAILS {share:.3g}"
