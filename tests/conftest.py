"""Fixtures: the backends at hand, and buffers full of NaN."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["FUSEDLSTM_POISON"] = "1"  # the CPU engine fills its workspaces with NaN

import hypothesis
import numpy as np
import pytest

from fusedlstm import layers

BACKENDS = ["reference", "cpu"]
LONGEST = ("cuda_simulated", "cpu_engine", "torch", "layers", "keras", "benchmarks", "cuda_compile")

hypothesis.settings.register_profile(
    "fusedlstm",
    deadline=None,  # the first example compiles
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fusedlstm")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file, and the kernels that it compiles, in one process."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by their number, which does not tell how long tests take
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that none runs alone at the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A number of threads that a test has set ends with it."""
    yield
    if team := sys.modules.get("fusedlstm.kernels.cpu.team"):
        team._requested = team._team = None


class _Poisoned:
    """NumPy, but what is not initialised is NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(shape: Any, dtype: Any = float) -> np.ndarray:
        return np.full(shape, np.nan, dtype)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers allocate for their engines to fill is full of NaN."""
    monkeypatch.setattr(layers, "np", _Poisoned())
