"""Whole sequences, forward and backward: gradients of the input, the initial state and all weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusedlstm.benchmarks.cases import Case


def test_forward_and_backward(benchmark: Any, checked: Any, case: Case) -> None:
    benchmark(checked(replace(case, mode="train")))
