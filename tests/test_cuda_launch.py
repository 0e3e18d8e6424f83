"""How kernels are launched, with a stand-in for CuPy: what can be seen without a GPU."""

from __future__ import annotations

import ast
import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cuda_stand_in
import cupy_api
import pytest

from fusedlstm import cells, folders
from fusedlstm.kernels.cuda import backward, engine, forward, launch
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


class Driver:
    """Reads the arguments of a launch as the driver does; 8 bytes each."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], list[int]]] = []  # how, and with which numbers
        self.parameters = 0  # of the kernel
        self.cooperative = False

    def launchKernel(self, *how: int) -> None:
        *how_, addresses, extra = how
        assert extra == 0
        self._launch(how_, addresses)
        self.cooperative = False

    def launchCooperativeKernel(self, *how: int) -> None:
        *how_, addresses = how
        self._launch(how_, addresses)
        self.cooperative = True

    def _launch(self, how: list[int], addresses: int) -> None:
        pointers = (ctypes.POINTER(ctypes.c_int64) * self.parameters).from_address(addresses)
        self.launches.append((tuple(how), [pointer[0] for pointer in pointers]))


FUNCTION, STREAM = 11, 12


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    module = mock.MagicMock()
    module.cuda.Device.return_value.id = 0
    module.cuda.Stream.return_value.__enter__.return_value = module.cuda.Stream.return_value
    module.cuda.driver = Driver()
    module.cuda.get_current_stream.return_value.ptr = STREAM
    module.cuda.get_current_stream.return_value.is_capturing.return_value = False
    module.RawModule.return_value.get_function.return_value.kernel.ptr = FUNCTION
    monkeypatch.setattr(launch, "array_module", lambda: module)
    return module


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return choose(DEVICES["sm_90"], cells.lstm, "float32", 512, 0, 16, request.param, "stepwise")


def compiled(plan: Plan) -> launch._Compiled:
    with without_gpu((7, 5)):
        kernel = launch._Compiled(launch.cached_ptx(cells.lstm, plan, True, True, (7, 5)), plan, (7, 5))
    launch.array_module().cuda.driver.parameters = kernel._loaded._parameters
    return kernel


def test_kernels_are_kept_where_the_user_says(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "compile_ptx", lambda *arguments: "")
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path / "a" / "b"))
    assert launch.cached_ptx(cells.lstm, plan, True, True, (7, 5)).parent == tmp_path / "a" / "b"
    monkeypatch.delenv("FUSEDLSTM_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kept = launch.cached_ptx(cells.lstm, plan, True, True, (7, 5))
    assert kept.parent == tmp_path / ".cache" / "fusedlstm"
    assert kept.exists()


RUNS = [(0, 1, 0, 0), (1, 2, 0, 0)]


def test_a_kernel_gets_as_many_numbers_as_it_takes(plan: Plan, cupy: mock.MagicMock) -> None:
    """Numba's way to pass arrays, which launch.py follows, is that of the compiled kernel."""
    kernel, grid = compiled(plan), plan.grid(16)
    arrays = arguments(plan)
    kernel(grid, arrays, RUNS[:1])
    ((how, numbers),) = cupy.cuda.driver.launches
    assert how == (FUNCTION, *grid, 1, plan.threads, 1, 1, plan.shared, STREAM)
    flat = [number for array in arrays for number in launch._flattened(array)]
    assert numbers == [*flat, *RUNS[0]]
    assert cupy.RawModule.return_value.get_function.return_value.max_dynamic_shared_size_bytes == plan.shared
    with pytest.raises(RuntimeError, match="passes arrays to kernels in another way"):
        kernel(grid, arguments(plan)[1:], RUNS[:1])


def test_many_runs_are_one_graph_as_long_as_the_arrays_stay(plan: Plan, cupy: mock.MagicMock) -> None:
    kernel, grid = compiled(plan), plan.grid(16)
    stream = cupy.cuda.Stream.return_value
    for address, captured in ((4096, 1), (4096, 1), (8192, 2), (4096, 2)):
        kernel(grid, arguments(plan, address), RUNS)
        assert stream.end_capture.call_count == captured
        assert len(cupy.cuda.driver.launches) == captured * len(RUNS)
    assert stream.end_capture.return_value.launch.call_count == 4


def test_graphs_are_not_kept_for_ever(plan: Plan, cupy: mock.MagicMock) -> None:
    kernel = compiled(plan)
    for address in range(2 * launch._GRAPHS):
        kernel(plan.grid(16), arguments(plan, address), RUNS)
    assert len(kernel._graphs) == launch._GRAPHS


def test_very_many_runs_are_launched_one_by_one(
    plan: Plan, cupy: mock.MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_NODES", 3)
    runs = [(n, n + 1, 0, 0) for n in range(4)]
    compiled(plan)(plan.grid(16), arguments(plan), runs)
    assert [tuple(numbers[-4:]) for _, numbers in cupy.cuda.driver.launches] == runs
    assert not cupy.cuda.Stream.called


def test_a_capture_by_the_caller_is_refused(plan: Plan, cupy: mock.MagicMock) -> None:
    kernel = compiled(plan)
    cupy.cuda.get_current_stream.return_value.is_capturing.return_value = True
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        kernel(plan.grid(16), arguments(plan), RUNS)
    assert not cupy.cuda.driver.launches


def test_a_persistent_kernel_is_launched_cooperatively(cupy: mock.MagicMock) -> None:
    for form in ("persistent", "stepwise"):
        plan = choose(DEVICES["sm_90"], cells.lstm, "float32", 512, 0, 16, False, form)  # type: ignore[arg-type]
        compiled(plan)(plan.grid(16), arguments(plan), RUNS[:1])
        assert cupy.cuda.driver.cooperative == (form == "persistent")


def test_a_graph_is_launched_by_one_thread_at_a_time(plan: Plan, cupy: mock.MagicMock) -> None:
    """Who comes while another launches it makes a graph of its own; one of them is kept."""
    kernel, grid = compiled(plan), plan.grid(16)
    graphs = [mock.MagicMock(), mock.MagicMock()]
    stream = cupy.cuda.Stream.return_value
    stream.end_capture.side_effect = graphs
    graphs[0].launch.side_effect = lambda stream: kernel(grid, arguments(plan, 4096), RUNS)
    kernel(grid, arguments(plan, 4096), RUNS)
    assert [graph.launch.call_count for graph in graphs] == [1, 1]
    graphs[0].launch.side_effect = None
    kernel(grid, arguments(plan, 4096), RUNS)
    assert stream.end_capture.call_count == 2
    assert sum(graph.launch.call_count for graph in graphs) == 3


@pytest.mark.parametrize("compiler", ["numba", "numba_cuda"])
def test_kernels_are_compiled_once_by_a_version_of_the_compiler(
    compiler: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ptx = mock.Mock(return_value="")
    monkeypatch.setattr(launch, "compile_ptx", compile_ptx)
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path))
    options = (cells.lstm, plan, True, True, (7, 5))
    before = launch.cached_ptx(*options)
    assert launch.cached_ptx(*options) == before
    assert compile_ptx.call_count == 1
    monkeypatch.setattr(f"{compiler}.__version__", "another")
    assert launch.cached_ptx(*options) != before
    assert compile_ptx.call_count == 2


def test_kernels_are_assembled_once_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path))
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(".version 7.0\n.target sm_75\n.address_size 64\n.visible .entry nothing() { ret; }\n")
    cubin = launch.cached_cubin(ptx, (9, 0))
    assert cubin.name.startswith("kernel.")
    assert cubin.name.endswith(".sm_90.cubin")
    assert cubin.read_bytes().startswith(b"\x7fELF")
    assert launch.cached_cubin(ptx, (10, 0)) != cubin
    monkeypatch.setattr(launch, "assemble", None)
    assert launch.cached_cubin(ptx, (9, 0)) == cubin


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan) -> Any:
    """A kernel on disk: the folder, what gives its file, and how often it has been compiled."""
    compile_ptx = mock.Mock(return_value="a kernel")
    monkeypatch.setattr(launch, "compile_ptx", compile_ptx)
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path / "kernels"))
    ask = lambda: launch.cached_ptx(cells.lstm, plan, True, True, (7, 5))  # noqa: E731
    ask()
    return SimpleNamespace(folder=tmp_path / "kernels", ask=ask, compile=compile_ptx)


@pytest.mark.parametrize("damaged", [b"", b"a ker", b"a kernfl", b"a kernel "])
def test_a_damaged_file_is_replaced(kept: Any, damaged: bytes) -> None:
    path = kept.ask()
    path.write_bytes(damaged)
    assert kept.ask().read_text() == "a kernel"
    assert kept.compile.call_count == 2
    kept.ask()
    assert kept.compile.call_count == 2


@pytest.mark.skipif(os.name != "posix", reason="elsewhere users are kept apart by their folders")
def test_a_file_or_a_folder_that_others_may_write_to_is_not_trusted(kept: Any) -> None:
    kept.ask().chmod(0o666)
    assert kept.ask().stat().st_mode & 0o022 == 0
    assert kept.compile.call_count == 2
    kept.folder.chmod(0o777)
    folders._place.cache_clear()
    with pytest.warns(UserWarning, match=r"other users may write to it.*FUSEDLSTM_CACHE"):
        elsewhere = kept.ask()
    assert elsewhere.parent != kept.folder
    assert kept.compile.call_count == 3
    elsewhere.unlink()


def test_a_full_disk_costs_the_keeping_not_the_call(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = launch.write_whole

    def full(path: Path, *arguments: Any) -> None:
        if path.parent == kept.folder:
            raise OSError(28, "No space left on device")
        write(path, *arguments)

    kept.ask().unlink()
    monkeypatch.setattr(launch, "write_whole", full)
    with pytest.warns(UserWarning, match="cannot be kept: .*No space left on device"):
        path = kept.ask()
    assert path.read_text() == "a kernel"
    assert path.parent == launch._own_folder()


def test_without_any_folder_a_process_has_its_own(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLSTM_CACHE", "/proc/none")
    monkeypatch.setattr(folders, "_temporary", lambda: ())
    folders._place.cache_clear()
    with pytest.warns(UserWarning, match="Each process compiles its own"):
        assert kept.ask().parent == launch._own_folder()
    folders._place.cache_clear()


def test_what_cannot_be_assembled_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"nvJitLink .* cannot assemble a kernel: .*nonsense"):
        launch.assemble(".version 7.0\n.target sm_75\n.address_size 64\nnonsense\n", (9, 0))


def test_missing_cupy_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[cuda12\]'"):
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


def test_cupy_that_does_not_import_is_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cupy.py").write_text("raise AttributeError('numpy has no attribute of that name')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(ImportError, match=r"needs CuPy: .*\(numpy has no attribute of that name\)"):
        launch.array_module()


def test_missing_cublas_is_said_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "array_module", lambda: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    monkeypatch.setitem(sys.modules, "cupy_backends", None)
    with pytest.raises(ImportError, match=r"backend 'cuda' needs cuBLAS: .*pip install -e '.\[cuda12\]'"):
        engine.CUDA()


def test_a_missing_compiler_is_an_error_that_says_where_it_comes_from(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuda.bindings import nvjitlink
    from cuda.pathfinder import DynamicLibNotFoundError

    missing = mock.Mock(side_effect=DynamicLibNotFoundError("Failure finding libnvvm\n  listdir(/usr)"))
    advice = r"cannot be compiled: Failure finding libnvvm\. .*'.\[cuda13\]'.*or set CUDA_HOME to a toolkit"
    monkeypatch.setattr(launch.cuda, "compile", missing)
    with pytest.raises(RuntimeError, match=advice):
        launch.compile_ptx(cells.lstm, plan, True, True, (7, 5))
    monkeypatch.setattr(nvjitlink, "create", missing)
    with pytest.raises(RuntimeError, match=advice):
        launch.assemble("", (9, 0))


def test_streams_of_others_are_taken_by_the_protocol_that_cupy_has(cupy: mock.MagicMock) -> None:
    """CuPy 14 deprecates ExternalStream, which is all that CuPy 13 has."""
    stream = launch.stream_at(1234, 1)
    assert stream is cupy.cuda.Stream.from_external.return_value
    (given,) = cupy.cuda.Stream.from_external.call_args.args
    assert given.__cuda_stream__() == (0, 1234)
    assert not cupy.cuda.ExternalStream.called
    del cupy.cuda.Stream.from_external
    assert launch.stream_at(1234, 1) is cupy.cuda.ExternalStream.return_value
    assert cupy.cuda.ExternalStream.call_args.args == (1234, 1)


# --- CuPy's interface ---------------------------------------------------------------------------------------

MODULE = {"cupy", "xp", "self._cupy", "self.xp", "array_module()", "launch.array_module()"}


def used_names(path: Path) -> set[str]:
    """What a file takes from CuPy, as "cuda.Stream"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
            if ast.unparse(node) in MODULE and not (isinstance(node, ast.Name) and parts[0] == "__name__"):
                found.add(".".join(parts))
    return found


@pytest.mark.parametrize("file", ["kernels/cuda/engine.py", "kernels/cuda/gemm.py", "kernels/cuda/launch.py"])
def test_all_that_is_used_of_cupy_is_held_against_it(file: str) -> None:
    """By cupy_api.py, wherever CuPy is; of the longest names, objects that others have returned follow."""
    used = used_names(Path(__file__).parents[1] / file)
    assert used
    for name in used:
        whole = name.split(".")
        prefixes = {".".join(whole[: n + 1]) for n in range(len(whole))}
        known = {known for known in cupy_api.USED if known in prefixes or known.startswith(f"{name}.")}
        assert known, name


def test_the_stand_in_takes_what_cupy_is_given() -> None:
    stand_in = cuda_stand_in.modules()["cupy"]
    missing = [text.partition(" ")[0] for text in cupy_api.differences(stand_in) if "takes" not in text]
    # the others are not used by what runs on it
    assert sorted(missing) == ["cuda.ExternalStream:", "cuda.graph.Graph.launch:", "from_dlpack:"]


def test_a_cupy_that_has_changed_is_noticed() -> None:
    def launchKernel(f: int, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None: ...

    changed = cuda_stand_in.modules()["cupy"]
    before = cupy_api.differences(changed)
    changed.cuda.driver.launchKernel = launchKernel
    del changed.cuda.Stream
    after = cupy_api.differences(changed)
    assert any(text.startswith("cuda.driver.launchKernel takes ['f', 'grid', 'block']") for text in after)
    assert any(text.startswith("cuda.Stream:") for text in set(after) - set(before))
