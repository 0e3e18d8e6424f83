"""From a plan to a launch: compiling, caching on disk, shared memory, streams and graphs.

On a GPU, Numba compiles the kernel to PTX and nvJitLink assembles it; both are kept on disk.  CuPy loads and
launches it.  In a simulator, Numba runs the Python function on NumPy arrays.
"""

from __future__ import annotations

import atexit
import hashlib
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np
from numba import cuda
from numba.cuda import types

from fusedlstm.cells import Cell
from fusedlstm.dispatch import INSTALL_CUDA
from fusedlstm.files import write_whole
from fusedlstm.folders import cuda_kernels, is_private, warn
from fusedlstm.once import fork_lock, once

from . import backward, forward
from .phases import phases
from .plan import Device, Plan
from .ptx import SIMULATED
from .scalar import element

# What a simulated kernel runs on.  Numba's own simulator runs one block after the other, its threads
# cannot exchange values; a simulator that can, puts another device here.
SIMULATED_DEVICE = Device("Numba's simulator", (0, 0), 1, 1 << 20, threads=8, cooperative=False, warps=False)
simulated_device = SIMULATED_DEVICE

_simulating = fork_lock()  # simulators run one kernel at a time

# the code that is imported, also if its files change while it runs
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
_GRAPHS = 16  # that a kernel keeps
_NODES = 4096  # launches in one of them, at most; more are launched one by one


class Kernel(Protocol):
    """The kernel of a plan, ready to be launched."""

    def __call__(self, grid: tuple[int, int], arrays: Sequence[Any], runs: Sequence[Any]) -> None:
        """Launch once for each of `runs`, the last four arguments of the kernel."""


def array_module() -> Any:
    """NumPy in a simulator, else CuPy.

    Raises:
        ImportError: if CuPy is not installed.
        RuntimeError: if there is no GPU, or no driver.
    """
    if SIMULATED:
        return np
    try:
        import cupy
    except Exception as error:  # of versions that do not fit, anything
        raise ImportError(f"backend 'cuda' needs CuPy: {INSTALL_CUDA} ({error})") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"backend 'cuda' needs an NVIDIA GPU and its driver: {error}. nvidia-smi shows whether they work"
        ) from error
    if not count:
        raise RuntimeError("backend 'cuda' needs an NVIDIA GPU; the driver finds none")
    return cupy


class _Stream(NamedTuple):
    """A stream of another library, by CUDA's protocol of streams."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address  # the version of the protocol


def stream_at(address: int, device: int) -> Any:
    """CuPy's object for a stream of another library on a device, which becomes the current one in `with`."""
    cupy = array_module()
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Stream(address))
    return cupy.cuda.ExternalStream(address, device)  # before CuPy 14, which deprecates it


def current_device() -> Device:
    """The current device of CuPy, or the simulated one."""
    return simulated_device if SIMULATED else _device(array_module().cuda.Device().id)


@once
def _device(number: int) -> Device:
    runtime = array_module().cuda.runtime
    properties = runtime.getDeviceProperties(number)
    return Device(
        properties["name"].decode(),
        (properties["major"], properties["minor"]),
        properties["multiProcessorCount"],
        properties["sharedMemPerBlockOptin"],
        cooperative=bool(properties["cooperativeLaunch"]),
    )


@once
def kernel(cell: Cell, plan: Plan, resets: bool, training: bool, capability: tuple[int, int]) -> Kernel:
    """The kernel of a plan, compiled or taken from the cache on disk."""
    if SIMULATED:
        return _Simulated(build(cell, plan, resets, training), plan)
    return _Compiled(cached_ptx(cell, plan, resets, training, target(capability)), plan, capability)


def target(capability: tuple[int, int]) -> tuple[int, int]:
    """The compute capability to compile for; its PTX is assembled for newer GPUs too.

    For 10.0 and later NVVM has another LLVM inside, which leaves loops over registers rolled; the
    kernels use nothing that is newer than 9.0.
    """
    return min(capability, (9, 0))


def build(cell: Cell, plan: Plan, resets: bool, training: bool) -> Callable[..., None]:
    """The Python function of a plan."""
    template = backward.build if plan.backward else forward.build
    return template(cell, plan, resets, training)


class _Simulated:
    """A kernel in a simulator.

    Its arrays are said to lie on the device.  Numba would copy others there and back, which it refuses
    where they are slices, and which would part those that share memory.
    """

    def __init__(self, function: Callable[..., None], plan: Plan) -> None:
        self._function, self._threads, self._shared = cuda.jit(function), plan.threads, plan.shared

    def __call__(self, grid: tuple[int, int], arrays: Sequence[Any], runs: Sequence[Any]) -> None:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        there = [FakeCUDAArray(array) for array in arrays]
        with _simulating:
            for run in runs:
                self._function[grid, self._threads, 0, self._shared](*there, *run)


def signature(plan: Plan) -> tuple[Any, ...]:
    """The Numba types of the arguments of a plan's kernel."""
    product = plan.recurrent
    scalars = {"real": product.real, "operand": product.operand}
    result: list[Any] = []
    for text in (backward if plan.backward else forward).ARGUMENTS.values():
        name, *shape = text.split()
        if not shape:
            result.append(types.int64)
        else:
            item = element(scalars.get(name, name))
            result.append(types.Array(item, int(shape[0]), "A" if "strided" in shape else "C"))
    return tuple(result)


@contextmanager
def _advised() -> Iterator[None]:
    """Without NVVM, libdevice or nvJitLink, the error says where they come from."""
    from cuda.pathfinder import DynamicLibNotFoundError  # type: ignore[import-untyped]

    try:
        yield
    except DynamicLibNotFoundError as error:
        what = str(error).partition("\n")[0]  # lists of folders follow
        raise RuntimeError(
            f"kernels cannot be compiled: {what}. {INSTALL_CUDA}; or set CUDA_HOME to a toolkit of CUDA"
        ) from error


def compile_ptx(cell: Cell, plan: Plan, resets: bool, training: bool, capability: tuple[int, int]) -> str:
    """The PTX of a plan's kernel.  Needs no GPU."""
    with _advised():
        ptx, _ = cuda.compile(
            build(cell, plan, resets, training),
            types.void(*signature(plan)),
            cc=capability,
            output="ptx",
            device=False,
            abi="numba",
        )
    text = ptx if isinstance(ptx, str) else ptx.decode()
    # vector loads from shared memory need its beginning on 16 bytes
    text = re.sub(r"(\.extern \.shared) \.align \d+", r"\1 .align 16", text)
    # one block has all registers; Numba's launch_bounds do not reach PTX in every version
    bounds = f".maxntid {plan.threads}, 1, 1\n.minnctapersm 1\n"
    return re.sub(r"(\.visible \.entry [^{]*\))\s*{", rf"\1\n{bounds}{{", text)


def cached_ptx(cell: Cell, plan: Plan, resets: bool, training: bool, capability: tuple[int, int]) -> Path:
    """The file with the PTX of a plan's kernel; compiled if it is not there."""
    import numba_cuda  # type: ignore[import-untyped]  # not needed in a simulator

    compilers = [numba.__version__, numba_cuda.__version__]
    made_of = [cell.key, phases(cell, plan.backward), replace(plan, why="")]
    state = [_SOURCES.hexdigest(), *compilers, *made_of, resets, training, capability]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()
    stem = f"{cell.name}_{digest[:24]}"
    return _kept(stem, ".ptx", lambda: compile_ptx(cell, plan, resets, training, capability).encode())


def cached_cubin(ptx: Path, capability: tuple[int, int]) -> Path:
    """The file with the machine code of a kernel for a GPU; assembled if it is not there.

    The driver could assemble PTX too, but may be older than the compiler and not know its version of PTX;
    machine code of the same major version of CUDA it takes.
    """
    suffix = f".sm_{capability[0]}{capability[1]}.cubin"
    return _kept(ptx.stem, suffix, lambda: assemble(ptx.read_text(), capability))


def _kept(stem: str, suffix: str, make: Callable[[], bytes]) -> Path:
    """The file with what `make` gives; it is called unless one is there, whole, that nobody else has written.

    The digest of its content stands in its name, since CuPy and others read the file itself.
    """
    store = cuda_kernels()
    for folder in store.folders():
        for path in folder.glob(f"{stem}.*{suffix}"):
            if is_private(path.stat()) and path.name == _name(stem, suffix, path.read_bytes()):
                return path
    content = make()
    name, folder = _name(stem, suffix, content), store.place() or _own_folder()
    try:
        write_whole(folder / name, content, 0o644)
    except OSError as error:
        warn(f"a compiled kernel cannot be kept: {error}")
        folder = _own_folder()
        write_whole(folder / name, content, 0o644)
    return folder / name


def _name(stem: str, suffix: str, content: bytes) -> str:
    return f"{stem}.{hashlib.sha256(content).hexdigest()[:16]}{suffix}"


@once
def _own_folder() -> Path:
    """A folder for what this process alone uses; gone with it."""
    folder = tempfile.TemporaryDirectory(prefix="fusedlstm-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def assemble(ptx: str, capability: tuple[int, int]) -> bytes:
    """Machine code from PTX, by nvJitLink.  Needs no GPU.

    Raises:
        RuntimeError: if nvJitLink refuses the PTX, with its reasons.
    """
    from cuda.bindings import nvjitlink  # type: ignore[import-untyped]

    text = ptx.encode() + b"\0"
    with _advised():
        link = nvjitlink.create(1, [f"-arch=sm_{capability[0]}{capability[1]}"])
    try:
        nvjitlink.add_data(link, nvjitlink.InputType.PTX, text, len(text), "kernel")
        nvjitlink.complete(link)
        code = bytearray(nvjitlink.get_linked_cubin_size(link))
        nvjitlink.get_linked_cubin(link, code)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(link))
        nvjitlink.get_error_log(link, log)
        reasons = log.rstrip(b"\0").decode(errors="replace").strip()
        raise RuntimeError(f"nvJitLink {nvjitlink.version()} cannot assemble a kernel: {reasons}") from error
    finally:
        nvjitlink.destroy(link)
    return bytes(code)


class Loaded:
    """A kernel for GPUs of one capability, which CuPy loads, and launches on its current stream.

    The driver is called directly: to convert the arguments of one launch, of which there are two hundred,
    takes CuPy's kernel objects longer than some of our kernels run.
    """

    def __init__(
        self,
        ptx: Path,
        capability: tuple[int, int],
        threads: int,
        shared: int = 0,
        cooperative: bool = False,
    ) -> None:
        self._cupy = array_module()
        match = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx.read_text(), re.DOTALL)
        if match is None:
            raise RuntimeError(f"no kernel in {ptx}; delete this file")
        self._parameters = match[2].count(".param")
        self._function = self._cupy.RawModule(path=str(cached_cubin(ptx, capability))).get_function(match[1])
        self._threads, self._shared, self._cooperative = threads, shared, cooperative
        self._prepared: set[int] = set()  # devices

    def prepare(self, arrays: Sequence[Any], numbers: int) -> np.ndarray:
        """The arguments of a launch, of which the last `numbers` are still to be filled in.

        Loads the kernel on the current device.
        """
        device = self._cupy.cuda.Device().id
        if device not in self._prepared:
            self._function.max_dynamic_shared_size_bytes = self._shared
            self._prepared.add(device)
        flat = [number for array in arrays for number in _flattened(array)]
        if len(flat) + numbers != self._parameters:
            raise RuntimeError(
                f"this version of numba-cuda passes arrays to kernels in another way: the kernel takes "
                f"{self._parameters} numbers, {len(flat) + numbers} were prepared"
            )
        return np.array(flat + [0] * numbers, np.int64)

    def __call__(self, grid: tuple[int, int], arguments: np.ndarray) -> None:
        driver, stream = self._cupy.cuda.driver, self._cupy.cuda.get_current_stream()
        addresses = arguments.ctypes.data + arguments.itemsize * np.arange(len(arguments))
        launch = (
            self._function.kernel.ptr, *grid, 1, self._threads, 1, 1, self._shared, stream.ptr,
            addresses.ctypes.data,
        )  # fmt: skip
        if self._cooperative:
            driver.launchCooperativeKernel(*launch)
        else:
            driver.launchKernel(*launch, 0)


class _Compiled:
    """A kernel on a GPU."""

    def __init__(self, ptx: Path, plan: Plan, capability: tuple[int, int]) -> None:
        self._cupy = array_module()
        self._loaded = Loaded(ptx, capability, plan.threads, plan.shared, plan.form == "persistent")
        self._graphs: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, grid: tuple[int, int], arrays: Sequence[Any], runs: Sequence[Any]) -> None:
        if self._cupy.cuda.get_current_stream().is_capturing():
            raise RuntimeError(
                "the layers cannot be captured into a CUDA graph: memory that they use would be given to "
                "others before the graph is launched"
            )
        arguments = self._loaded.prepare(arrays, len(runs[0]))
        if 1 < len(runs) <= _NODES:
            self._replay(grid, arguments, runs)
        else:
            self._launch(grid, arguments, runs)

    def _launch(self, grid: tuple[int, int], arguments: np.ndarray, runs: Sequence[Any]) -> None:
        for run in runs:
            arguments[-len(run) :] = run
            self._loaded(grid, arguments)

    def _replay(self, grid: tuple[int, int], arguments: np.ndarray, runs: Sequence[Any]) -> None:
        """Launch many runs as one graph.

        A graph holds the addresses of its arrays.  CuPy's memory pool gives the same ones again to the
        next call with the same sizes, so graphs are kept under them.  The thread that launches one has taken
        it out, since no other may launch it at the same time.
        """
        key = (self._cupy.cuda.Device().id, grid, arguments.tobytes(), tuple(runs))
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = self._captured(grid, arguments, runs)
        graph.launch(self._cupy.cuda.get_current_stream())
        self._graphs[key] = graph
        if len(self._graphs) > _GRAPHS:
            self._graphs.popitem(last=False)

    def _captured(self, grid: tuple[int, int], arguments: np.ndarray, runs: Sequence[Any]) -> Any:
        with self._cupy.cuda.Stream(non_blocking=True) as stream:
            # other threads may allocate meanwhile
            stream.begin_capture(self._cupy.cuda.runtime.streamCaptureModeThreadLocal)
            try:
                self._launch(grid, arguments, runs)
            finally:
                graph = stream.end_capture()
        return graph


def _flattened(array: Any) -> tuple[int, ...]:
    """An array as Numba passes it to a kernel: memory info, parent, size, item size, address, shape
    and strides."""
    return (0, 0, array.size, array.itemsize, array.data.ptr, *array.shape, *array.strides)
