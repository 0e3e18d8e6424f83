"""One direction of one layer on the CUDA engine against the float64 reference.

Runs in a simulator on NumPy arrays, and on a GPU on CuPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from checks import ALL, error

from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.kernels.cuda.engine import CUDA
from fusedlstm.kernels.cuda.launch import array_module
from fusedlstm.kernels.cuda.phases import unsupported
from fusedlstm.kernels.cuda.plan import BARRIER_EVERY
from fusedlstm.weights import Weights, flatten
from fusedlstm.weights import shapes as weight_shapes

RUN = tuple(cell for cell in ALL if not unsupported(cell))  # the cells that the engine has kernels for

# Relative error of the norm; float32 and float64 for one step, of T steps sqrt(T) times as much.
TOLERANCE = {"float32": 1e-6, "float64": 1e-13, "tf32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Case:
    """What is run; the fields after the sizes are options."""

    cell: Cell
    steps: int
    batch: int
    inputs: int
    hidden: int
    proj: int = 0
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    reverse: bool = False
    initial: bool = True
    strided: bool = False  # y and dy are slices of wider arrays
    accumulate: bool = False
    precision: str = "float32"
    form: str | None = None
    barrier_every: int = BARRIER_EVERY
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the defaults, as the id of a test."""
        given = [self.cell.name, f"T{self.steps}-B{self.batch}-I{self.inputs}-H{self.hidden}"]
        for option in fields(self)[5:]:
            value = getattr(self, option.name)
            if value == option.default:
                continue
            if isinstance(value, bool):
                given.append(option.name if value else f"no-{option.name}")
            else:
                given.append(value if isinstance(value, str) else f"{option.name}{value}")
        return "-".join(given)


@dataclass
class Arrays:
    """Inputs of a case, in the dtype of the layer."""

    weights: Weights
    x: np.ndarray  # (T, B, I)
    initial: tuple[np.ndarray, ...] | None  # (B, P), then (B, H)
    lengths: np.ndarray | None  # (B,)
    reset: np.ndarray | None  # (T, B)
    dy: np.ndarray  # (T, B, P)
    dfinal: tuple[np.ndarray, ...]
    dx: np.ndarray  # (T, B, I), what is added to


def arrays(case: Case) -> Arrays:
    rng = np.random.default_rng(case.seed)
    dtype = np.float64 if case.precision == "float64" else np.float32
    hidden, outputs = case.hidden, case.proj or case.hidden
    shapes = weight_shapes(case.cell, case.inputs, hidden, case.bias, case.proj)

    def uniform(*shape: int) -> np.ndarray:
        # bounded: where a gate saturates, rounding errors of its derivative are relatively large
        return rng.uniform(-1, 1, shape).astype(dtype)

    def weight(*shape: int) -> np.ndarray:
        return (uniform(*shape) * shape[-1] ** -0.5).astype(dtype)

    weights = Weights(
        weight(*shapes.ih),
        weight(*shapes.hh) if shapes.hh else None,
        uniform(*shapes.bias_ih) if case.bias else None,
        uniform(*shapes.bias_hh) if shapes.bias_hh else None,
        weight(*shapes.hr) if case.proj else None,
        tuple(uniform(hidden) for _ in case.cell.weights),
    )
    states = [(case.batch, hidden if n else outputs) for n in range(len(case.cell.states))]
    return Arrays(
        weights,
        uniform(case.steps, case.batch, case.inputs),
        tuple(uniform(*shape) / 2 for shape in states) if case.initial else None,
        rng.integers(0, case.steps + 1, case.batch) if case.lengths else None,
        rng.random((case.steps, case.batch)) < 0.4 if case.reset else None,
        uniform(case.steps, case.batch, outputs),
        tuple(uniform(*shape) for shape in states),
        uniform(case.steps, case.batch, case.inputs),
    )


def expected(case: Case, given: Arrays) -> dict[str, np.ndarray]:
    """All results, by the reference in float64."""

    def exact(part: Any) -> Any:
        if isinstance(part, Weights):
            return Weights(*(exact(entry) for entry in part))
        if isinstance(part, tuple):
            return tuple(exact(entry) for entry in part)
        return None if part is None else part.astype(np.float64)

    initial = given.initial or tuple(np.zeros_like(d) for d in given.dfinal)
    y, final, tape = reference.forward(
        case.cell, exact(given.weights), exact(given.x), exact(initial), given.lengths, given.reset,
        case.reverse,
    )  # fmt: skip
    dx, dinitial, grads = reference.backward(tape, exact(given.dy), exact(given.dfinal))
    return _named(y, final, dx + given.dx if case.accumulate else dx, dinitial, grads)


def actual(case: Case, given: Arrays) -> dict[str, Any]:
    """All results, by the CUDA engine; what it has to write holds NaN before."""
    xp = array_module()
    direction = CUDA(
        "float32" if case.precision == "float64" else case.precision,  # type: ignore[arg-type]
        case.form,  # type: ignore[arg-type]
        case.barrier_every,
    ).prepare(case.cell, given.weights)

    def moved(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(moved(entry) for entry in part)
        return None if part is None else xp.asarray(part)

    x, dtype = moved(given.x), given.x.dtype
    y, dy = xp.full(given.dy.shape, np.nan, dtype), moved(given.dy)
    if case.strided:
        y = xp.full((*given.dy.shape[:2], 2 * given.dy.shape[2]), np.nan, dtype)[..., given.dy.shape[2] :]
        dy = xp.concatenate([dy, dy], axis=2)[..., : given.dy.shape[2]]
    final = tuple(xp.full(d.shape, np.nan, dtype) for d in given.dfinal)
    args = (moved(given.initial), y, final, moved(given.lengths), moved(given.reset), case.reverse)
    tape = direction.forward(x, *args, True)
    dx = moved(given.dx).copy() if case.accumulate else xp.full(x.shape, np.nan, dtype)
    dinitial, grads = direction.backward(tape, dy, moved(given.dfinal), dx, case.accumulate)
    results = _named(y, final, dx, dinitial, grads)
    if xp is not np:
        results = {name: xp.asnumpy(result) for name, result in results.items()}
    return results


def _named(y: Any, final: Any, dx: Any, dinitial: Any, grads: Weights) -> dict[str, Any]:
    named = {"y": y, "dx": dx}
    named |= {f"final {n}": state for n, state in enumerate(final)}
    named |= {f"dinitial {n}": state for n, state in enumerate(dinitial)}
    return named | {f"gradient {n}": entry for n, entry in enumerate(flatten(grads))}


def check(case: Case) -> None:
    """Assert that every result is within the tolerance of the precision."""
    given = arrays(case)
    wanted, found = expected(case, given), actual(case, given)
    assert wanted.keys() == found.keys()
    limit = TOLERANCE[case.precision]
    if case.precision in ("float32", "float64"):
        limit *= np.sqrt(case.steps)
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= limit}
    assert not wrong, f"relative errors over {limit:.1e}: {wrong}"
