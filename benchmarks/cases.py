"""What is benchmarked: the shapes, their data, and the float64 reference that results are held against."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from fusedlstm.cells import Cell
from fusedlstm.layers import BUILT_IN, Recurrent

MODES = ("forward", "train", "step")
DTYPES = ("float32", "float64")

# The relative error of the norm up to which a result counts as right.  It tells wrong results from right
# ones, whatever the arithmetic of a contender; the error itself is in the record.
TOLERANCES = {"float32": 1e-4, "float64": 1e-11, "tf32": 1e-2, "bfloat16": 1e-1, "float16": 5e-2}


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Attributes:
        steps, batch, inputs, hidden: T, B, I and H.
        cell: a name in :mod:`fusedlstm.cells`.
        layers: how many are stacked.
        mode: "forward": outputs and final state from no initial state; "train": forward and backward,
            with the gradients of the input, the initial state and all weights; "step": one time step,
            whose state enters the next call.
        dtype: of all arrays.
        threads: for each contender.
    """

    steps: int
    batch: int
    inputs: int
    hidden: int
    cell: str = "lstm"
    layers: int = 1
    mode: str = "forward"
    dtype: str = "float32"
    threads: int = 1

    @property
    def mathematics(self) -> Cell:
        """The definition of the cell."""
        return BUILT_IN[self.cell]

    @property
    def sizes(self) -> str:
        """For instance "T=25 B=4 I=512 H=512"."""
        text = f"T={self.steps} B={self.batch} I={self.inputs} H={self.hidden}"
        return text if self.layers == 1 else f"{text} L={self.layers}"

    def __str__(self) -> str:
        return f"{self.cell} {self.mode} {self.dtype} {self.sizes} threads={self.threads}"

    def to_json(self) -> dict[str, Any]:
        """The case as plain values."""
        return asdict(self)


@cache
def shape_sets() -> dict[str, list[dict[str, Any]]]:
    """The named sets of shapes.json."""
    text = files(__package__).joinpath("shapes.json").read_text(encoding="utf-8")
    return {name: rows for name, rows in json.loads(text).items() if isinstance(rows, list)}


def cases_of_set(name: str) -> list[Case]:
    """The cases of a set, or of "all" of them, in forward mode.

    Raises:
        ValueError: if there is no such set.
    """
    names = list(shape_sets()) if name == "all" else [name]
    if not set(names) <= set(shape_sets()):
        raise ValueError(f"there is no set {name!r}; there are {', '.join(shape_sets())} and all")
    rows = [row for name in names for row in shape_sets()[name]]
    return unique(
        Case(row["T"], row["B"], row["I"], row["H"], row["cell"], row.get("layers", 1)) for row in rows
    )


def parse_shapes(text: str, cell: str = "lstm") -> list[Case]:
    """Cases from "T,B,I,H;T,B,I,H;...".

    Raises:
        ValueError: for anything else.
    """
    cases = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        sizes = part.split(",")
        if len(sizes) != 4 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"a shape is four positive numbers T,B,I,H, got {part!r}")
        steps, batch, inputs, hidden = map(int, sizes)
        cases.append(Case(steps, batch, inputs, hidden, cell))
    return unique(cases)


def in_mode(cases: Iterable[Case], mode: str, dtype: str = "float32", threads: int = 1) -> list[Case]:
    """The cases in another mode, precision and number of threads; a step has T = 1."""
    return unique(
        replace(case, mode=mode, dtype=dtype, threads=threads, steps=1 if mode == "step" else case.steps)
        for case in cases
    )


def unique(cases: Iterable[Case]) -> list[Case]:
    """Each case once, where it came first."""
    return list(dict.fromkeys(cases))


class Data(NamedTuple):
    """What enters a case; S states, each (layers, B, H)."""

    weights: dict[str, np.ndarray]  # by PyTorch's names
    x: np.ndarray  # (T, B, I)
    state: tuple[np.ndarray, ...]
    dy: np.ndarray  # (T, B, H)
    dstate: tuple[np.ndarray, ...]


def make_data(case: Case, seed: int = 0) -> Data:
    """The same numbers in every process: weights as PyTorch draws them, all else normal."""
    generator = np.random.default_rng(seed)
    dtype = np.dtype(case.dtype)
    layer = recurrent(case, dtype=dtype, seed=seed)
    states = len(case.mathematics.states)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=dtype.type)

    def state() -> tuple[np.ndarray, ...]:
        return tuple(normal(case.layers, case.batch, case.hidden) for _ in range(states))

    return Data(
        dict(layer.state_dict()),
        normal(case.steps, case.batch, case.inputs),
        state(),
        normal(case.steps, case.batch, case.hidden),
        state(),
    )


def recurrent(case: Case, **options: Any) -> Recurrent:
    """A layer of this package of the sizes of a case."""
    return Recurrent(case.mathematics, case.inputs, case.hidden, case.layers, **options)


def expected(case: Case, data: Data) -> dict[str, np.ndarray]:
    """The right results, by the float64 reference; named as :func:`name_results` does."""
    layer = recurrent(case, dtype="float64", backend="reference")
    layer.load_state_dict(data.weights)
    x, dy = data.x.astype(np.float64), data.dy.astype(np.float64)
    state, dstate = (tuple(part.astype(np.float64) for part in s) for s in (data.state, data.dstate))
    if case.mode != "train":
        return name_results(case, *layer(x, None if case.mode == "forward" else as_state(state)))
    y, final, tape = layer.forward(x, as_state(state), training=True)
    assert tape is not None
    return name_results(case, y, final, tape.backward(dy, as_state(dstate)))


def as_state(parts: tuple[Any, ...]) -> Any:
    """A state as the layers take and give it."""
    return parts[0] if len(parts) == 1 else parts


def name_results(
    case: Case, y: Any, state: Any, gradients: tuple[Any, Any, dict[str, Any]] | None = None
) -> dict[str, np.ndarray]:
    """Results by name: "y", the final states, and for gradients "dx", "d" and the state, "d" and the weight.

    `state` and the gradients are as the layers of this package give them.
    """
    names = case.mathematics.states
    states = state if isinstance(state, (tuple, list)) else (state,)
    results = {"y": y, **dict(zip(names, states))}
    if gradients is not None:
        dx, dstate, weights = gradients
        dstates = dstate if isinstance(dstate, (tuple, list)) else (dstate,)
        results |= {"dx": dx, **{f"d{name}": part for name, part in zip(names, dstates)}}
        results |= {f"d{name}": gradient for name, gradient in weights.items()}
    return {name: np.asarray(value) for name, value in results.items()}


class WrongResult(Exception):
    """A contender's result is not that of the reference."""


def check(
    case: Case, results: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float | None = None
) -> float:
    """The largest relative error of any result; by default the tolerance is that of the case's dtype.

    Raises:
        WrongResult: if one is missing, misshapen, or further off than the tolerance.
    """
    worst = 0.0
    tolerance = TOLERANCES[case.dtype] if tolerance is None else tolerance
    for name, reference in right.items():
        if name not in results:
            raise WrongResult(f"{name} is missing")
        got = results[name]
        if got.shape != reference.shape:
            raise WrongResult(f"{name} has the shape {got.shape}, expected {reference.shape}")
        scale = np.linalg.norm(reference) or 1.0
        error = float(np.linalg.norm(got.astype(np.float64) - reference) / scale)
        if not error <= tolerance:
            raise WrongResult(f"{name} has the relative error {error:.1e}")
        worst = max(worst, error)
    return worst
