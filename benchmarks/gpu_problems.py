"""What is measured on a GPU, with which numbers, and what is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.kernels.cuda.plan import Precision
from fusedlstm.weights import Weights

from .cases import TOLERANCES

SHAPES = Path(__file__).parent / "shapes.json"
GROUPS = ("deepbench_train_lstm", "flashrnn", "gru", "deepbench_inference_lstm")  # the first matter most
FIRST = ((25, 16, 512), (25, 64, 1024), (25, 16, 2048), (150, 32, 256), (25, 128, 1024))  # T, B, H
GRU = ((25, 16, 512), (25, 64, 1024), (150, 32, 256), (50, 16, 1536))  # T, B, H = I
GRADIENTS = 5  # times as far off as outputs they may be, since they pass more roundings
STEPS = 25  # for which the tolerance of float32 is meant
CHECKED = 8  # rows of the batch whose results are checked


class Problem(NamedTuple):
    group: str
    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int

    @property
    def mathematics(self) -> Cell:
        cell: Cell = getattr(cells, self.cell)
        return cell

    @property
    def checked(self) -> tuple[str, int, int, int, int]:
        """What the checked results depend on: cell, T, rows, I and H."""
        return self.cell, self.steps, min(self.batch, CHECKED), self.inputs, self.hidden

    @property
    def rows(self) -> np.ndarray:
        """The rows of the batch that are checked: the first, the last and some between."""
        return np.linspace(0, self.batch - 1, min(self.batch, CHECKED)).astype(int)


def problems(groups: Sequence[str], tiny: bool = False) -> Iterator[Problem]:
    """The problems of some groups; if tiny, of each a single one of a few units."""
    shapes = json.loads(SHAPES.read_text())
    for group in groups:
        if group == "gru":
            rows = [Problem(group, "gru", *sizes[:2], sizes[2], sizes[2]) for sizes in GRU]
        else:
            rows = [Problem(group, row["cell"], *(row[key] for key in "TBIH")) for row in shapes[group]]
            rows.sort(key=lambda row: (row.steps, row.batch, row.hidden) not in FIRST)
        yield from ([rows[0]._replace(steps=2, batch=3, inputs=4, hidden=9)] if tiny else rows)


class Data(NamedTuple):
    """Arrays of one problem, float32 on the host."""

    weights: Weights
    x: np.ndarray  # (T, B, I)
    dy: np.ndarray  # (T, B, H)
    dy_checked: np.ndarray  # (T, B, H), zero but in the checked rows, so that these alone have gradients


def weights_of(cell: str, inputs: int, hidden: int) -> Weights:
    rng, bound = np.random.default_rng(0), hidden**-0.5
    rows = len(getattr(cells, cell).gates) * hidden

    def uniform(*shape: int) -> np.ndarray:
        drawn: np.ndarray = np.float32(bound) * (2 * rng.random(shape, np.float32) - 1)
        return drawn

    return Weights(uniform(rows, inputs), uniform(rows, hidden), uniform(rows), uniform(rows))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def data(problem: Problem) -> Data:
    cell, steps, rows, inputs, hidden = problem.checked
    x, dy = (normal(1, steps, problem.batch, inputs), normal(2, steps, problem.batch, hidden))
    x[:, problem.rows] = normal(3, steps, rows, inputs)
    dy[:, problem.rows] = normal(4, steps, rows, hidden)
    dy_checked = np.zeros_like(dy)
    dy_checked[:, problem.rows] = dy[:, problem.rows]
    return Data(weights_of(cell, inputs, hidden), x, dy, dy_checked)


def results(
    rows: Any, y: Any, dx: Any, gradients: Sequence[Any], matrix: Callable[..., Any]
) -> dict[str, Any]:
    """What is checked: some rows, and gradients of weights (ih, hh and biases) times a vector."""
    times = [matrix(normal(5, part.shape[1])) if part.ndim == 2 else None for part in gradients]
    named = zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), gradients, times)
    found = {name: part if vector is None else part @ vector for name, part, vector in named}
    return {"y": y[:, rows], "dx": dx[:, rows], **found}


def expected(cell: str, steps: int, rows: int, inputs: int, hidden: int) -> dict[str, np.ndarray]:
    """The checked results, by the reference in float64."""
    weights = weights_of(cell, inputs, hidden)
    exact = Weights._make([*(None if e is None else e.astype(np.float64) for e in weights[:5]), ()])
    x, dy = (normal(seed, steps, rows, size).astype(np.float64) for seed, size in ((3, inputs), (4, hidden)))
    zero = tuple(np.zeros((rows, hidden)) for _ in getattr(cells, cell).states)
    with threadpool_limits(1):
        y, _, tape = reference.forward(getattr(cells, cell), exact, x, zero)
        dx, _, grads = reference.backward(tape, dy, zero)
    return results(slice(None), y, dx, grads[:4], lambda vector: vector.astype(np.float64))


def check(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], precision: Precision
) -> dict[str, float]:
    """The relative error of each result.

    Raises:
        RuntimeError: if one is so large that a time would mean nothing.
    """
    errors = {}
    # rounding errors of many steps add up as their square root; those of tensor cores do not grow
    growth = max(1.0, len(wanted["y"]) / STEPS) ** 0.5 if precision == "float32" else 1.0
    if "inference" in found:  # which is another kernel
        wanted = wanted | {"inference": wanted["y"]}
    for name, right in wanted.items():
        off = np.asarray(found[name], np.float64) - right
        errors[name] = float(np.linalg.norm(off) / np.linalg.norm(right))
        limit = growth * TOLERANCES[precision] / (GRADIENTS if name in ("y", "inference") else 1)
        if not errors[name] <= limit:
            raise RuntimeError(f"{precision}: relative error of {name} {errors[name]:.1e} > {limit:.0e}")
    return errors
