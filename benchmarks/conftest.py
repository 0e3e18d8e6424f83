"""For the pytest-benchmark suites: few and quick shapes, each result checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fusedlstm.benchmarks.cases import Case, check, expected, make_data
from fusedlstm.benchmarks.contenders import FusedLSTM
from fusedlstm.benchmarks.machine import cores

SHAPES = [Case(500, 1, 64, 64), Case(25, 1, 512, 512), Case(25, 16, 512, 512), Case(100, 64, 128, 128)]
CELLS = ("lstm", "gru", "peephole_lstm")


@pytest.fixture(params=SHAPES, ids=lambda case: case.sizes.replace("=", "").replace(" ", "-"))
def shape(request: pytest.FixtureRequest) -> Case:
    case: Case = request.param
    return case


@pytest.fixture(params=CELLS)
def case(request: pytest.FixtureRequest, shape: Case) -> Case:
    return replace(shape, cell=request.param)


@pytest.fixture
def checked() -> Callable[[Case], Callable[[], Any]]:
    """A function from a case to the call to time."""

    def prepare(case: Case) -> Callable[[], Any]:
        data = make_data(case)
        call: Callable[[], Any]
        call, read = FusedLSTM(cores()).prepare(case, data)
        check(case, read(call()), expected(case, data))
        return call

    return prepare
