"""What work costs on a GPU, by least squares from plans that have been timed on it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fusedlstm.files import write_whole
from fusedlstm.kernels.cuda.plan import COSTS, FITTED

CLOCKS = 1700  # a microsecond, about; only a matter beside kinds of work that no plan was timed for


def fit(record: dict[str, Any]) -> str:
    """Put the costs into the file that plan.py reads, and say how well they fit.

    Raises:
        ValueError: if the record has too few plans.
    """
    timed = [answer for answer in record["answers"].values() if answer.get("us a step")]
    costs, fixed, misfit = solve(
        [answer["work"] for answer in timed], [answer["us a step"] for answer in timed]
    )
    known = json.loads(FITTED.read_text()) if FITTED.exists() else {}
    known[record["gpu"]] = costs
    write_whole(FITTED, (json.dumps(known, indent=1) + "\n").encode())
    said = ", ".join(f"{kind} {cost:.3g} ({COSTS[kind]:.3g} before)" for kind, cost in costs.items())
    return (
        f"{record['gpu']}: clocks {said}, {fixed:.0f} a step; {len(timed)} plans, half of them within "
        f"{np.median(misfit):.0%}, all within {max(misfit):.0%}"
    )


def solve(works: list[dict[str, float]], micros: list[float]) -> tuple[dict[str, float], float, np.ndarray]:
    """Costs of the kinds of work that there are, none below 0; clocks of a step beside; relative misfits."""
    kinds = [kind for kind in COSTS if any(work.get(kind) for work in works)]
    columns = np.array([[work[kind] for kind in kinds] + [1.0] for work in works])
    if len(columns) < columns.shape[1] + 1:
        raise ValueError(f"{len(columns)} timed plans are too few for {len(kinds)} kinds of work")
    wanted = CLOCKS * np.array(micros)
    weighted, used = columns / wanted[:, None], np.arange(columns.shape[1])
    while True:  # without those that would be negative, the most negative first
        scale = np.linalg.norm(weighted[:, used], axis=0)
        found = np.linalg.lstsq(weighted[:, used] / scale, np.ones(len(wanted)))[0] / scale
        if (found >= 0).all():
            break
        used = np.delete(used, np.argmin(found * scale))
    costs = np.zeros(columns.shape[1])
    costs[used] = found
    return dict(zip(kinds, costs.tolist())), float(costs[-1]), np.abs(columns @ costs / wanted - 1)
