"""Holds every built-in cell and option against the float64 reference, on the machine at hand.

Outputs, final states and all gradients are compared, in both precisions, at sizes that fill no tile
evenly.  ``fusedlstm check`` prints the result as a table.

A result may be the difference of two numbers that are almost the same.  Rounding these leaves an error that
is small beside them, but not beside what is left, so errors are not measured by the results alone, but also
by their terms.  How large these are shows in what an explicit loop in float32 loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from . import dispatch
from .cells import Cell
from .layers import BUILT_IN, Recurrent

# Relative error of the norm, for one step; rounding errors of T steps add up as their square root.
TOLERANCE = {"float32": 1e-6, "float64": 1e-13}
ROUNDING = float(np.finfo(np.float32).eps) / 2  # the relative error of rounding to float32, at most
NEIGHBOURS, DISTANCE = 4, 1e-3  # how many inputs near the given ones show what is lost, and how near
COMPILING = 60  # cases that take as long as compiling the kernels of one, roughly

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


# Of each kind one: the cells that are used most, in both precisions, and what has kernels of its own.  They
# are few, since nearly all the time of a first run goes to compiling kernels.
_OWN_KERNELS = ("projection", "recurrent dropout", "all of these")
_SHARED_KERNELS = tuple(option for option in OPTIONS if option not in _OWN_KERNELS)
REPRESENTATIVES = {
    ("lstm", "float32"): _SHARED_KERNELS,
    ("gru", "float64"): _SHARED_KERNELS,
    ("peephole_lstm", "float32"): ("projection", "all of these"),
    ("rnn_tanh", "float32"): ("recurrent dropout",),
}


# Any rounding shows in the gradients of gates that are all but closed.
ILL_CONDITIONED = {("slstm", "float32")}


def cases(every: bool = True) -> Iterator[Case]:
    """All of them, or those of :data:`REPRESENTATIVES`; those of one table entry after another."""
    for cell, option, dtype, sizes in product(BUILT_IN.values(), OPTIONS, TOLERANCE, SIZES):
        projects = "proj_size" in OPTIONS[option][0] and not cell.unprojectable
        if option == "projection" and not projects:
            continue  # the layer refuses it
        if projects and sizes[3] == 1:
            continue  # there is no smaller size
        if (cell.name, dtype) in ILL_CONDITIONED:
            continue
        if every or option in REPRESENTATIVES.get((cell.name, dtype), ()):
            yield Case(cell, option, dtype, sizes)


def costs(cases: Iterable[Case]) -> list[int]:
    """Roughly how long each takes if no kernels are compiled yet, where one that needs none takes 1."""
    compiled, found = set(), []
    for case in cases:
        settings = _settings(case)
        kernels = case.cell, case.dtype, settings.get("proj_size", 0) > 0, "recurrent_dropout" in settings
        found.append(1 if kernels in compiled else 1 + COMPILING)
        compiled.add(kernels)
    return found


def run(case: Case, backend: str = "cpu") -> Outcome:
    """Compare one case."""
    layer, reference = _layer(case, case.dtype, backend), _layer(case, "float64", "reference")
    reference.load_state_dict(layer.state_dict())
    arguments = _arguments(layer, case)
    expected, actual, terms = (
        _results(reference, arguments),
        _results(layer, arguments),
        _terms(case, arguments),
    )
    limit = TOLERANCE[case.dtype] * np.sqrt(case.sizes[0])
    errors = {name: error(actual[name], expected[name], terms[name]) for name in expected}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return Outcome(case, worst, errors[worst], limit)


def error(actual: np.ndarray, expected: np.ndarray, terms: float) -> float:
    """|actual - expected| beside |expected|, or beside the size of the terms where that is larger."""
    scale = max(float(np.linalg.norm(expected)), terms, float(np.finfo(np.float64).tiny))
    return float(np.linalg.norm(actual.astype(np.float64) - expected)) / scale


def _settings(case: Case) -> dict[str, Any]:
    """What the layer of a case is built with."""
    settings = dict(OPTIONS[case.option][0])
    if "proj_size" in settings:
        settings["proj_size"] = 0 if case.cell.unprojectable else case.sizes[3] // 2
    return settings


def _layer(case: Case, dtype: str, backend: str) -> Recurrent:
    _, _, inputs, hidden = case.sizes
    return Recurrent(case.cell, inputs, hidden, **_settings(case), dtype=dtype, backend=backend, seed=1)


def _terms(case: Case, arguments: _Arguments) -> dict[str, float]:
    """For each result the size of its terms: what an explicit loop in float32 loses of it, in roundings.

    That is the root mean square over a few inputs near the given ones, since one alone may be lucky.
    """
    random = np.random.default_rng(3)
    single, exact = _layer(case, "float32", "reference"), _layer(case, "float64", "reference")
    exact.load_state_dict(single.state_dict())

    def near(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(near, value))
        if value.dtype.kind != "f":
            return value
        return (value * (1 + DISTANCE * random.normal(size=value.shape))).astype(np.float32)

    squares: dict[str, float] = {}
    for _ in range(NEIGHBOURS):
        options = {name: near(value) for name, value in arguments.options.items()}
        given = _Arguments(near(arguments.x), options, near(arguments.dy), near(arguments.dstate))
        rounded = _results(single, given)
        for name, result in _results(exact, given).items():
            lost = float(np.linalg.norm(rounded[name] - result)) / ROUNDING
            squares[name] = squares.get(name, 0.0) + lost**2 / NEIGHBOURS
    return {name: float(np.sqrt(square)) for name, square in squares.items()}


class _Arguments(NamedTuple):
    """Of forward and backward, in the precision of the layer under test."""

    x: np.ndarray
    options: dict[str, Any]
    dy: np.ndarray
    dstate: tuple[np.ndarray, ...]


def _arguments(layer: Recurrent, case: Case) -> _Arguments:
    random, given = np.random.default_rng(2), OPTIONS[case.option][1]
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
        options["lengths"] = random.integers(0, steps + 1, batch)
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
    y, final, tape = layer.forward(give(arguments.x), **options, training=True, draw=0)
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
    cells = [name for name in BUILT_IN if any(name == cell for _, cell in worst)]
    options = [option for option in OPTIONS if any(option == tried for tried, _ in worst)]
    left = max(map(len, OPTIONS))
    lines = [" ".join([dtype.ljust(left), *(name.rjust(16) for name in cells)])]
    for option in options:
        entries = [_entry(worst.get((option, name))) for name in cells]
        lines.append(" ".join([option.ljust(left), *(entry.rjust(16) for entry in entries)]))
    return "\n".join(lines)


def _entry(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.2g}" if share <= 1 else f"FAILS {share:.3g}"
