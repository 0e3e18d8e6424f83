"""What nothing can be faster than on a GPU: launches, barriers of a grid, copies and products alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from fusedlstm.dispatch import PRECISIONS
from fusedlstm.kernels.cuda import launch, ptx
from fusedlstm.kernels.cuda.gemm import matmul
from fusedlstm.kernels.cuda.product import meet
from fusedlstm.kernels.cuda.ptx import SIMULATED

from .gpu_contenders import milliseconds
from .gpu_problems import normal

BARRIERS, EXCHANGES = 1000, 200

load_one = ptx.load_relaxed(1)


def _barriers(arrivals: Any, count: Any) -> None:
    for n in range(count):
        meet(arrivals, 0, np.uint64((n + 1) * cuda.gridDim.x))


def _exchanges(numbers: Any, count: Any) -> None:
    """Each block publishes a number and waits for those of all others, `count` times."""
    blocks, thread = cuda.gridDim.x, cuda.threadIdx.x
    for n in range(count):
        if thread == 0:
            ptx.store_relaxed(numbers, n * blocks + cuda.blockIdx.x, np.float32(n))
        if thread < blocks:
            while ptx.is_erased(load_one(numbers, n * blocks + thread)[0]):
                cuda.nanosleep(np.uint32(20))
        cuda.syncthreads()


class _Alone:
    """A kernel (memory, count) that does one thing `count` times, without shared memory."""

    def __init__(self, function: Any, element: Any, erased: bool) -> None:
        device = launch.current_device()
        self._threads, self._erased = device.threads, erased
        self._dtype = np.dtype(str(element))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{function.__name__}.ptx")
            code, _ = cuda.compile(
                function,
                types.void(element[::1], types.int64),
                cc=launch.target(device.capability),
                device=False,
                abi="numba",
            )
            path.write_text(code if isinstance(code, str) else code.decode())
            self._kernel = launch.Loaded(path, device.capability, device.threads, cooperative=True)
            self._kernel.prepare([launch.array_module().zeros(1, self._dtype)], 1)  # loads it

    def each(self, blocks: int, count: int) -> float:
        """Microseconds of one of `count` times."""
        return 1000 * (self.timed(blocks, count)["median"] - self.timed(blocks, 0)["median"]) / count

    def timed(self, blocks: int, count: int) -> dict[str, float]:
        memory = launch.array_module().zeros(blocks * max(1, count), self._dtype)
        arguments = self._kernel.prepare([memory], 1)
        arguments[-1] = count

        def once() -> None:
            memory.view(np.uint8).fill(0xFF if self._erased else 0)
            self._kernel((blocks, 1), arguments)

        found = milliseconds(once)
        assert found is not None
        return found


def floors(tiny: bool = False) -> dict[str, Any]:
    """Milliseconds of an empty launch, and microseconds of a barrier and of an exchange of one number by the
    number of blocks that meet; bytes per second of a copy, and operations per second of a product in each
    precision."""
    device = launch.current_device()
    if SIMULATED:
        if device.cooperative:
            cuda.jit(_barriers)[3, device.threads](np.zeros(1, np.uint64), 3)
            cuda.jit(_exchanges)[3, device.threads](np.full(9, -1, np.int32).view(np.float32), 3)
        return {"launch": None, "barrier": {}, "exchange": {}, "copy": None, "product": {}}
    barriers, exchanges = (2, 2) if tiny else (BARRIERS, EXCHANGES)
    meeting, exchange = _Alone(_barriers, types.uint64, False), _Alone(_exchanges, types.float32, True)
    counts = sorted({16, 64, 128, device.multiprocessors} & set(range(device.multiprocessors + 1)))
    return {
        "launch": meeting.timed(1, 0),
        "barrier": {n: meeting.each(n, barriers) for n in counts},
        "exchange": {n: exchange.each(n, exchanges) for n in counts},
        **_rates(256 if tiny else 8192),
    }


def _rates(size: int) -> dict[str, Any]:
    xp = launch.array_module()
    source = xp.ones(4 * size**2, np.float32)
    target = xp.empty_like(source)
    copied = milliseconds(lambda: xp.copyto(target, source))
    a = xp.asarray(normal(0, size, size))
    products = {name: milliseconds(lambda name=name: matmul(a, a, name, xp)) for name in PRECISIONS}  # type: ignore[misc]
    return {
        "copy": 2 * source.nbytes / (copied["median"] / 1000) if copied else None,
        "product": {n: 2 * size**3 / (found["median"] / 1000) for n, found in products.items() if found},
    }
