"""Whole sequences, forward."""

from __future__ import annotations

from typing import Any

from fusedlstm.benchmarks.cases import Case


def test_forward(benchmark: Any, checked: Any, case: Case) -> None:
    benchmark(checked(case))
