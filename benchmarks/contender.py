"""Who is compared: what a contender is, and what several of them need.

A contender is prepared for a case with its data and gives a call to time, and a way to read what the call
returned; reading is not timed.  Arrays are converted to the contender's own kind beforehand, and each
contender may have them in the layout that it likes best.  Every module of a framework is imported when its
contender is made, in a process of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fusedlstm import weights as storage
from fusedlstm.cells import Cell
from fusedlstm.math import DERIVATIVES

from .cases import MODES, Case, Data

Results = dict[str, np.ndarray]


class Prepared(NamedTuple):
    """A contender that is ready for a case."""

    call: Callable[[], Any]  # what is timed; returns when all is computed
    read: Callable[[Any], Results]  # from what the first call returned to results by name


class Unsupported(Exception):
    """The contender has no such thing; the message says what."""


class Contender:
    """One of those who are compared.

    Attributes:
        name: on the command line and in results.
        title: in tables and pictures.
        modules: what must be importable.
        packages: the distributions whose versions are recorded.
        modes, cells, dtypes: what it can do; None for everything.
        tolerance: the relative error up to which its results count as right; None for that of the dtype.
        environment: variables to set before its process starts.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    modes: ClassVar[tuple[str, ...]] = MODES
    cells: ClassVar[tuple[str, ...] | None] = None
    dtypes: ClassVar[tuple[str, ...] | None] = None
    tolerance: ClassVar[float | None] = None
    environment: ClassVar[Mapping[str, str]] = {}

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @classmethod
    def missing(cls) -> str | None:
        """What it lacks to run here, if anything.

        Whether modules can be imported is found without importing more than the packages that hold them.
        """
        try:
            found = all(importlib.util.find_spec(module) is not None for module in cls.modules)
        except ImportError:
            found = False
        return None if found else ", ".join(cls.modules)

    @classmethod
    def installed(cls) -> bool:
        """Whether it can run here."""
        return cls.missing() is None

    @classmethod
    def versions(cls) -> dict[str, str]:
        """The versions of its packages."""
        return {package: metadata.version(package) for package in cls.packages}

    @classmethod
    def refuse(cls, case: Case) -> None:
        """Raises Unsupported for a case that this contender has nothing for."""
        for what, value, known in (
            ("mode", case.mode, cls.modes),
            ("cell", case.cell, cls.cells),
            ("dtype", case.dtype, cls.dtypes),
        ):
            if known is not None and value not in known:
                raise Unsupported(f"no {what} {value}")

    def prepare(self, case: Case, data: Data) -> Prepared:
        """Get ready for a case."""
        raise NotImplementedError


def stepping(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], Any]:
    """Calls of `step`, each with the state that the one before returned."""

    def call() -> Any:
        nonlocal state
        result = step(state)
        state = result[1]
        return result

    return call


def layer_call(
    layer: Any, mode: str, x: Any, state: Any, dy: Any, dstate: Any
) -> Callable[[], tuple[Any, ...]]:
    """What is timed of a layer for arrays, in a mode; the arrays are of the layer's own kind."""

    def train() -> tuple[Any, ...]:
        y, final, tape = layer.forward(x, state, training=True)
        return y, final, tape.backward(dy, dstate)

    calls: dict[str, Callable[[], tuple[Any, ...]]] = {
        "forward": lambda: layer(x),
        "train": train,
        "step": stepping(lambda state: layer(x, state), state),
    }
    return calls[mode]


def layer_weights(case: Case, parameters: Mapping[str, Any]) -> list[storage.Weights]:
    """Parameters by name, as the weights of each layer."""
    cell = case.mathematics
    names = [storage.names(cell, n, reverse=False, bias=True, projected=False) for n in range(case.layers)]
    return [storage.fill(layer, parameters.__getitem__) for layer in names]


def as_parts(state: Any, count: int) -> tuple[Any, ...]:
    """A state as a tuple of `count`, of None if there is no state."""
    if state is None:
        return (None,) * count
    return tuple(state) if count > 1 else (state,)


def cell_functions(module: Any, activations: Any) -> dict[str, Callable[..., Any]]:
    """What a cell may use, in the module of a framework; a function that it lacks is missing here."""
    elsewhere = {"absolute": "abs"}
    found = {
        name: getattr(activations, name, None) or getattr(module, elsewhere.get(name, name), None)
        for name in DERIVATIVES
    }
    found["mean"] = lambda x: module.broadcast_to(x.mean(-1, keepdims=True), x.shape)
    return {name: function for name, function in found.items() if function is not None}


def any_step(
    cell: Cell, step: Callable[..., Any], weights: storage.Weights, product: Any, states: Any
) -> list[Any]:
    """One step of any cell in any framework; `product` is that of the input with its weights and bias."""

    def linear(value: Any, weight: Any, bias: Any) -> Any:
        return value @ weight.T + bias

    new = step(**cell.step_arguments_of(product, states, weights, linear, _chunk))
    return list(new) if isinstance(new, tuple) else [new]


def _chunk(array: Any, count: int, axis: int) -> list[Any]:
    """The array in `count` parts along its first or last axis."""
    size = array.shape[axis] // count
    parts = [slice(n * size, (n + 1) * size) for n in range(count)]
    return [array[part] if axis == 0 else array[..., part] for part in parts]
