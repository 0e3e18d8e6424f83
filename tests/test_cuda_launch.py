"""How kernels are launched, with a stand-in for CuPy: what can be seen without a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from fusedlstm import cells
from fusedlstm.kernels.cuda import backward, forward, launch
from fusedlstm.kernels.cuda.plan import Plan, choose
from fusedlstm.kernels.cuda.resources import DEVICES, without_gpu


def array(address: int, dimensions: int) -> Any:
    """What a kernel's argument needs of a CuPy array."""
    ones = (1,) * dimensions
    return SimpleNamespace(size=1, itemsize=4, data=SimpleNamespace(ptr=address), shape=ones, strides=ones)


def arguments(plan: Plan, address: int = 4096) -> list[Any]:
    """The arrays of a plan's kernel."""
    kinds = (backward if plan.backward else forward).ARGUMENTS.values()
    return [array(address, int(kind.split()[1])) for kind in kinds if " " in kind]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    module = mock.MagicMock()
    module.cuda.Device.return_value.id = 0
    module.cuda.Stream.return_value.__enter__.return_value = module.cuda.Stream.return_value
    monkeypatch.setattr(launch, "array_module", lambda: module)
    return module


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return choose(DEVICES["sm_90"], cells.lstm, "float32", 512, 0, 16, request.param, "stepwise")


def compiled(plan: Plan) -> launch._Compiled:
    with without_gpu((7, 5)):
        return launch._Compiled(launch.cached_ptx(cells.lstm, plan, True, True, (7, 5)), plan)


RUNS = [(0, 1, 0, 0), (1, 2, 0, 0)]


def test_a_kernel_gets_as_many_numbers_as_it_takes(plan: Plan, cupy: mock.MagicMock) -> None:
    """Numba's way to pass arrays, which launch.py follows, is that of the compiled kernel."""
    kernel, grid = compiled(plan), plan.grid(16)
    kernel(plan, grid, arguments(plan), RUNS[:1])
    function = cupy.RawModule.return_value.get_function.return_value
    ((where, threads, numbers), options) = function.call_args
    assert (where, threads) == ((*grid, 1), (plan.threads, 1, 1))
    assert options == {"shared_mem": plan.shared}
    assert function.max_dynamic_shared_size_bytes == plan.shared
    assert numbers[-4:] == RUNS[0]
    with pytest.raises(RuntimeError, match="passes arrays to kernels in another way"):
        kernel(plan, grid, arguments(plan)[1:], RUNS[:1])


def test_many_runs_are_one_graph_as_long_as_the_arrays_stay(plan: Plan, cupy: mock.MagicMock) -> None:
    kernel, grid = compiled(plan), plan.grid(16)
    function = cupy.RawModule.return_value.get_function.return_value
    stream = cupy.cuda.Stream.return_value
    for address, captured in ((4096, 1), (4096, 1), (8192, 2), (4096, 2)):
        kernel(plan, grid, arguments(plan, address), RUNS)
        assert stream.end_capture.call_count == captured
        assert function.call_count == captured * len(RUNS)
    assert stream.end_capture.return_value.launch.call_count == 4


def test_graphs_are_not_kept_for_ever(plan: Plan, cupy: mock.MagicMock) -> None:
    kernel = compiled(plan)
    for address in range(2 * launch._GRAPHS):
        kernel(plan, plan.grid(16), arguments(plan, address), RUNS)
    assert len(kernel._graphs) == launch._GRAPHS


def test_a_persistent_kernel_is_launched_cooperatively(cupy: mock.MagicMock) -> None:
    for form in ("persistent", "stepwise"):
        plan = choose(DEVICES["sm_90"], cells.lstm, "float32", 512, 0, 16, False, form)  # type: ignore[arg-type]
        compiled(plan)
        assert cupy.RawModule.call_args.kwargs["enable_cooperative_groups"] == (form == "persistent")


def test_missing_cupy_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install 'fusedlstm\[cuda12\]'"):
        launch.array_module()


def test_a_missing_driver_or_gpu_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(
        CUDARuntimeError=OSError, getDeviceCount=mock.Mock(side_effect=OSError("no driver"))
    )
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU and its driver: no driver"):
        launch.array_module()
    runtime.getDeviceCount = lambda: 0
    with pytest.raises(RuntimeError, match="the driver finds none"):
        launch.array_module()
    runtime.getDeviceCount = lambda: 1
    assert launch.array_module() is cupy
