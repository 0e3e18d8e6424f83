"""What nothing can be faster than on a GPU: launches, barriers of a grid, copies and products alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from fusedlstm.dispatch import PRECISIONS
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.gemm import matmul
from fusedlstm.kernels.cuda.product import meet
from fusedlstm.kernels.cuda.ptx import SIMULATED

from .gpu_contenders import milliseconds
from .gpu_problems import normal

BARRIERS = 1000


def _barriers(arrivals: Any, count: Any) -> None:
    for n in range(count):
        meet(arrivals, 0, np.uint64((n + 1) * cuda.gridDim.x))


def floors() -> dict[str, Any]:
    """Milliseconds of an empty launch, and microseconds of a barrier by the number of blocks that meet; bytes
    per second of a copy, and operations per second of a product in each precision."""
    device = launch.current_device()
    if SIMULATED:
        if device.cooperative:
            cuda.jit(_barriers)[3, device.threads](np.zeros(1, np.uint64), 3)
        return {"launch": None, "barrier": {}, "copy": None, "product": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "barriers.ptx")
        ptx, _ = cuda.compile(
            _barriers,
            types.void(types.uint64[::1], types.int64),
            cc=launch.target(device.capability),
            device=False,
            abi="numba",
        )
        path.write_text(ptx if isinstance(ptx, str) else ptx.decode())
        kernel = launch.Loaded(path, device.capability, device.threads, cooperative=True)
        kernel.prepare([launch.array_module().zeros(1, np.uint64)], 1)  # loads it

    def timed(blocks: int, count: int) -> dict[str, float]:
        arrivals = launch.array_module().zeros(1, np.uint64)
        arguments = kernel.prepare([arrivals], 1)
        arguments[-1] = count

        def once() -> None:
            arrivals.fill(0)
            kernel((blocks, 1), arguments)

        found = milliseconds(once)
        assert found is not None
        return found

    empty = timed(1, 0)
    counts = sorted({16, 64, 128, device.multiprocessors} & set(range(device.multiprocessors + 1)))
    barrier = {n: 1000 * (timed(n, BARRIERS)["median"] - timed(n, 0)["median"]) / BARRIERS for n in counts}
    return {"launch": empty, "barrier": barrier, **_rates()}


def _rates() -> dict[str, Any]:
    xp, size = launch.array_module(), 8192
    source = xp.ones(1 << 28, np.float32)
    target = xp.empty_like(source)
    copied = milliseconds(lambda: xp.copyto(target, source))
    a = xp.asarray(normal(0, size, size))
    products = {name: milliseconds(lambda name=name: matmul(a, a, name, xp)) for name in PRECISIONS}  # type: ignore[misc]
    return {
        "copy": 2 * source.nbytes / (copied["median"] / 1000) if copied else None,
        "product": {n: 2 * size**3 / (found["median"] / 1000) for n, found in products.items() if found},
    }
