"""One step through the Python call, state in and out."""

from __future__ import annotations

from typing import Any

import pytest

from fusedlstm.benchmarks.cases import Case

from .conftest import CELLS


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [64, 256, 512])
def test_step(benchmark: Any, checked: Any, hidden: int, cell: str) -> None:
    benchmark(checked(Case(1, 1, hidden, hidden, cell, mode="step")))
