"""Whole sequences, forward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fusedlstm.benchmarks.cases import Case
from fusedlstm.benchmarks.machine import cores


def test_forward(benchmark: Any, checked: Any, case: Case) -> None:
    benchmark(checked(case))


@pytest.fixture(params=[0, 1, 2], ids=["no others", "one other a core", "two others a core"])
def others(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes that compute beside us."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(request.param * cores())]
    yield
    for process in processes:
        process.kill()
        process.wait()


def test_on_busy_cores(benchmark: Any, checked: Any, shape: Case, others: None) -> None:
    benchmark(checked(shape))
