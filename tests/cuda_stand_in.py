"""A GPU that is not there: what the package uses of CuPy and cuBLAS, with kernels whose PTX is executed.

Arrays are NumPy's.  A launch gets the addresses of its arguments, as the driver does, and runs in memory of
its own, in which every array that the kernel is given lies by itself, with nothing around it.  Streams order
nothing, since every call is over when it returns; graphs keep the arguments that they were captured with.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ptx_instructions import to_bfloat16, to_tf32
from ptx_machine import Machine
from ptx_memory import Memory
from ptx_program import Program, parse

from fusedlstm.kernels.cuda import launch as launching
from fusedlstm.kernels.cuda.plan import Device as Properties
from fusedlstm.kernels.cuda.resources import without_gpu

BASE = 1 << 32  # the address of the first byte of global memory
GAP = 4096  # bytes around each array that belong to none

properties = Properties("no GPU", (9, 0), 6, 227 * 1024)
seed: int | None = None  # of the order in which warps run
broken: Callable[[str], str] = lambda text: text  # noqa: E731  what is done to the PTX before it runs
executed = 0  # instructions of all launches so far, each of all lanes that run it at once


class Array(np.ndarray):
    """An array of CuPy."""

    __module__ = "cupy"
    alive: ClassVar[weakref.WeakValueDictionary[int, Array]] = weakref.WeakValueDictionary()  # by id

    def __array_finalize__(self, parent: Any) -> None:
        Array.alive[id(self)] = self

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Device:
        return Device()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.__array_interface__

    def get(self) -> np.ndarray:
        return self.view(np.ndarray).copy()


# --- Launches ---------------------------------------------------------------------------------------------


_texts: dict[str, str] = {}  # PTX, by the file with the machine code
_assembled = launching.cached_cubin


def cached_cubin(ptx: Path, capability: tuple[int, int]) -> Path:
    """That of launch.py, but here the PTX is kept in mind, which is what runs."""
    path = _assembled(ptx, capability)
    _texts[str(path)] = ptx.read_text()
    return path


class Function:
    """A kernel."""

    loaded: ClassVar[list[Function]] = []

    def __init__(self, cubin: str) -> None:
        self._text, self._program, self._broken = _texts[cubin], None, None
        self.max_dynamic_shared_size_bytes = 48 * 1024
        Function.loaded.append(self)
        self.kernel = types.SimpleNamespace(ptr=len(Function.loaded))

    @property
    def program(self) -> Program:
        if self._program is None or self._broken is not broken:
            self._program, self._broken = parse(broken(self._text)), broken
        return self._program


class RawModule:
    def __init__(self, *, path: str) -> None:
        self._path = path

    def get_function(self, name: str) -> Function:
        return Function(self._path)


class Launch:
    """A kernel with its arguments, as the driver takes them."""

    def __init__(self, function: int, *how: int) -> None:
        self.function = Function.loaded[function - 1]
        *grid, depth, self.threads, height, thickness, self.shared, _, addresses = how
        assert (depth, height, thickness) == (1, 1, 1)
        self.grid = (grid[0], grid[1])
        pointers = (ctypes.POINTER(ctypes.c_int64) * self.function.program.parameters).from_address(addresses)
        self.arguments = np.array([pointer[0] for pointer in pointers])
        if self.shared > min(self.function.max_dynamic_shared_size_bytes, properties.shared):
            raise RuntimeError(f"invalid argument: {self.shared} bytes of shared memory")

    def run(self) -> None:
        global executed
        arrays = _given(self.arguments)
        content, valid, places = _placed(arrays.values())
        arguments = self.arguments.copy()
        for n, array in arrays.items():
            arguments[n] = BASE + places[id(array)].flat[0]
        for array in arrays.values():
            _elements(content, places[id(array)], array.dtype)[...] = array
        program = self.function.program
        memory = lambda clocks, block_of: Memory(  # noqa: E731
            content, valid, program.stores("global"), len(clocks.seen), clocks, block_of, written=True
        )
        machine = Machine(program, self.grid, self.threads, self.shared, memory, BASE, arguments, seed)
        machine.run()
        executed += machine.executed
        for array in arrays.values():
            array[...] = _elements(content, places[id(array)], array.dtype)


def _given(arguments: np.ndarray) -> dict[int, Array]:
    """The arrays among the arguments, by the place of their address; launch.py says how they are passed."""
    found = {}
    alive = [array for array in list(Array.alive.values()) if array.size]
    for n, number in enumerate(arguments):
        for array in alive:
            if number == array.ctypes.data:
                numbers = (array.size, array.itemsize, number, *array.shape, *array.strides)
                if np.array_equal(arguments[n - 2 : n + 1 + 2 * array.ndim], numbers):
                    found[n] = array
                    break
    return found


def _placed(arrays: Any) -> tuple[np.ndarray, np.ndarray, dict[int, Any]]:
    """Memory for arrays, which of its bytes belong to one, and where the elements of each begin.

    Those that share memory do so there.
    """
    offsets = {id(array): _offsets(array) for array in arrays}
    places, end, last = {}, GAP, -1
    for array in sorted(arrays, key=lambda array: array.ctypes.data):
        begins = array.ctypes.data
        if begins >= last:  # it shares no memory with those before
            start, first = -(-(end + GAP) // 512) * 512, begins
        places[id(array)] = start + begins - first + offsets[id(array)]
        last = max(last, begins + int(offsets[id(array)].max()) + array.itemsize)
        end = start + last - first
    content = np.full(-(-(end + GAP) // 512) * 512, 0xAB, np.uint8)
    valid = np.zeros(len(content), bool)
    for array in arrays:
        for byte in range(array.itemsize):
            valid[places[id(array)] + byte] = True
    return content, valid, places


def _offsets(array: np.ndarray) -> np.ndarray:
    """Of each element from the first, in bytes."""
    parts = [stride * np.arange(size) for size, stride in zip(array.shape, array.strides)]
    result = np.zeros(array.shape, np.int64)
    for axis, part in enumerate(parts):
        result += part.reshape(-1, *[1] * (array.ndim - 1 - axis))
    return result


class _Elements:
    """The elements of an array in other memory."""

    def __init__(self, content: np.ndarray, index: np.ndarray) -> None:
        self._content, self._index = content, index

    def __setitem__(self, key: Any, values: np.ndarray) -> None:
        self._content[self._index] = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._content[self._index]


def _elements(content: np.ndarray, places: np.ndarray, dtype: np.dtype) -> Any:
    return _Elements(content.view(dtype), places // dtype.itemsize)


def launch_kernel(function: int, *how: int) -> None:
    *rest, extra = how
    assert extra == 0
    get_current_stream().take(Launch(function, *rest))


def launch_cooperative_kernel(function: int, *how: int) -> None:
    launch = Launch(function, *how)
    if launch.grid[0] * launch.grid[1] > properties.multiprocessors:
        raise RuntimeError(f"{launch.grid} blocks are too many for a cooperative launch")
    get_current_stream().take(launch)


# --- Streams, graphs, events and devices ------------------------------------------------------------------


class Graph:
    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def launch(self, stream: Stream) -> None:
        for launch in self.launches:
            stream.take(launch)


class Stream(AbstractContextManager["Stream"]):
    current = threading.local()
    ptr = 1

    def __init__(self, non_blocking: bool = False) -> None:
        self._captured: list[Launch] | None = None

    @staticmethod
    def from_external(stream: Any) -> Stream:
        return Stream()

    def take(self, launch: Launch) -> None:
        if self._captured is None:
            launch.run()
        else:
            self._captured.append(launch)

    def begin_capture(self, mode: int) -> None:
        self._captured = []

    def end_capture(self) -> Graph:
        captured, self._captured = self._captured, None
        assert captured is not None
        return Graph(captured)

    def is_capturing(self) -> bool:
        return self._captured is not None

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> Stream:
        self._before = get_current_stream()
        Stream.current.stream = self
        return self

    def __exit__(self, *_: Any) -> None:
        Stream.current.stream = self._before


def get_current_stream() -> Stream:
    if not hasattr(Stream.current, "stream"):
        Stream.current.stream = Stream()
    stream: Stream = Stream.current.stream
    return stream


class Event:
    time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


class Device(AbstractContextManager["Device"]):
    id = 0

    def __init__(self, number: int = 0) -> None:
        self.id = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def device_properties(number: int) -> dict[str, Any]:
    return {
        "name": properties.name.encode(),
        "major": properties.capability[0], "minor": properties.capability[1],
        "multiProcessorCount": properties.multiprocessors, "sharedMemPerBlockOptin": properties.shared,
        "cooperativeLaunch": int(properties.cooperative),
    }  # fmt: skip


# --- cuBLAS, and kernels of CuPy's own --------------------------------------------------------------------


def gemm_ex(
    handle: int, transposed_a: int, transposed_b: int, m: int, n: int, k: int,
    alpha: int, a: int, kind_a: int, stride_a: int, b: int, kind_b: int, stride_b: int,
    beta: int, c: int, kind_c: int, stride_c: int, computation: int, algorithm: int,
) -> None:  # fmt: skip
    """cublasGemmEx, of matrices by columns: C = A B, in float32 of rounded factors."""
    assert (kind_c, kind_a, stride_c) == (0, kind_b, m)
    rounded = computation == 77  # to TF32

    def matrix(address: int, kind: int, rows: int, columns: int, transposed: int, stride: int) -> np.ndarray:
        outer, inner = (rows, columns) if transposed else (columns, rows)
        size = 4 if kind == 0 else 2
        memory = (ctypes.c_uint8 * (size * (stride * (outer - 1) + inner))).from_address(address)
        words = np.frombuffer(memory, f"u{size}")
        whole = np.lib.stride_tricks.as_strided(words, (outer, inner), (size * stride, size)).copy()
        if kind == 0:
            values = (to_tf32(whole.view(np.float32)) if rounded else whole).view(np.float32)
        elif kind == 2:
            values = whole.view(np.float16).astype(np.float32)
        else:
            values = (whole.astype(np.uint32) << 16).view(np.float32)
        return values if transposed else values.T

    left = matrix(a, kind_a, m, k, transposed_a, stride_a)
    right = matrix(b, kind_b, k, n, transposed_b, stride_b)
    memory = (ctypes.c_float * (m * n)).from_address(c)
    np.frombuffer(memory, np.float32).reshape(n, m)[...] = (left.astype(np.float64) @ right).T


class ElementwiseKernel:
    """The one that gemm.py has; its code is C++, which nobody compiles here."""

    def __init__(self, takes: str, gives: str, code: str, name: str) -> None:
        assert name == "fusedlstm_bfloat16"

    def __call__(self, bits: Array) -> Array:
        return to_bfloat16(bits.view(np.float32)).view(Array)


# --- The module -------------------------------------------------------------------------------------------

_MAKERS = (
    "array", "asarray", "ascontiguousarray", "empty", "zeros", "ones", "full", "empty_like", "zeros_like",
    "full_like", "ones_like", "arange", "where", "concatenate", "stack",
)  # fmt: skip


def _making_arrays(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda *args, **options: np.asanyarray(function(*args, **options)).view(Array)


def modules() -> dict[str, Any]:
    """What `import cupy` and cuBLAS find, by name."""
    cupy: Any = types.ModuleType("cupy")
    cupy.__version__, cupy.ndarray = "a stand-in", Array
    for name in _MAKERS:
        setattr(cupy, name, _making_arrays(getattr(np, name)))
    cupy.copyto = np.copyto
    cupy.asnumpy = lambda array: array.get()
    cupy.RawModule, cupy.ElementwiseKernel = RawModule, ElementwiseKernel
    runtime = types.SimpleNamespace(
        CUDARuntimeError=OSError, getDeviceCount=lambda: 1, getDeviceProperties=device_properties,
        runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000, streamCaptureModeThreadLocal=1,
    )  # fmt: skip
    driver = types.SimpleNamespace(
        launchKernel=launch_kernel, launchCooperativeKernel=launch_cooperative_kernel
    )
    cupy.cuda = types.SimpleNamespace(
        Device=Device, Stream=Stream, Event=Event, get_current_stream=get_current_stream, runtime=runtime,
        driver=driver, device=types.SimpleNamespace(get_cublas_handle=lambda: 0),
        get_elapsed_time=lambda begin, end: 1000 * (end.time - begin.time),
    )  # fmt: skip
    cublas: Any = types.ModuleType("cupy_backends.cuda.libs.cublas")
    cublas.gemmEx = gemm_ex
    parents = ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs")
    found = {"cupy": cupy, cublas.__name__: cublas, **{name: types.ModuleType(name) for name in parents}}
    found[parents[-1]].cublas = cublas
    return found


_for_good = ExitStack()  # of what holds to the end of the process


def install() -> None:
    """In a process that has nothing else to import as CuPy, and no GPU that the compiler could ask."""
    sys.modules.update(modules())
    launching.cached_cubin = cached_cubin
    _for_good.enter_context(without_gpu(properties.capability))
