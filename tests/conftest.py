"""Fixtures: the backends at hand, and buffers full of NaN.  What is run, in which order, in which process."""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["FUSEDLSTM_POISON"] = "1"  # the CPU engine fills its workspaces with NaN

import numpy as np
import pytest

from fusedlstm import layers

BACKENDS = ["reference", "cpu"]
ONE_BY_ONE = "test_cuda_executed.py"  # whose tests share nothing but time
LONGEST = (
    *("cuda_simulated", "cpu_engine", "torch", "layers", "keras", "benchmarks", "cuda_compile"),
    "cuda_first",
)

with suppress(ImportError):  # tests on a GPU do without
    import hypothesis

    hypothesis.settings.register_profile(
        "fusedlstm",
        deadline=None,  # the first example compiles
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("fusedlstm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guarded", type=int, default=0, metavar="N", help="N random cases of each group in guarded memory"
    )
    parser.addoption(
        "--thorough", action="store_true", help="all cases of the tests of which a sample is run otherwise"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A crash ends the run, and is named."""
    if hasattr(config.option, "maxworkerrestart"):  # there are no workers without pytest-xdist
        config.option.maxworkerrestart = config.option.maxworkerrestart or "0"


def only_gpu(config: pytest.Config) -> bool:
    """Whether the tests on a GPU are asked for, and no others: pytest -m gpu."""
    return bool(config.option.markexpr == "gpu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests on a GPU are found without what other tests need, which that machine may lack."""
    if not only_gpu(config) or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.gpu\n" not in collection_path.read_text() or None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file, and the kernels that it compiles, in one process; tests on a GPU one by one, as are others
    that compile each their own."""
    from xdist.scheduler import LoadFileScheduling, LoadScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return nodeid if file.endswith(ONE_BY_ONE) else file

    if only_gpu(config):
        config.option.maxschedchunk = 1
        return LoadScheduling(config, log)
    config.option.loadscopereorder = False  # by their number, which does not tell how long tests take
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --thorough, samples of large tests; the longest first, so that none runs alone at the end."""
    if not config.option.thorough and (left_out := _beyond_samples(items)):
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def _beyond_samples(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases of tests marked `sampled` that are not in their samples: the same ones in every run."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    beyond: set[pytest.Item] = set()
    for cases in groups.values():
        marker = cases[0].get_closest_marker("sampled")
        assert marker is not None
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.partition("[")[2].encode()))
        beyond.update(cases[math.ceil(len(cases) * marker.args[0]) :])
    return beyond


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where one of the first tests fails, all would, and none of them is run."""
    report: Any = yield
    if report.failed and item.get_closest_marker("first"):
        item.session.shouldfail = f"{item.name} failed, as all that follow would"
    return report


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
