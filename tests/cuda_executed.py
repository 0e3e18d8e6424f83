"""The CUDA engine on a GPU that is not there, whose kernels are compiled PTX: cuda_stand_in.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cuda_stand_in
import pytest

from fusedlstm.kernels.cuda import engine, gemm, launch
from fusedlstm.kernels.cuda.plan import Device
from fusedlstm.kernels.cuda.resources import without_gpu


@contextmanager
def executed(
    device: Device, seed: int | None = None, broken: Callable[[str], str] | None = None
) -> Iterator[Any]:
    """Inside, backend "cuda" runs on `device`, and CuPy is the module that this gives.

    Args:
        seed: of the order in which warps run; None for the same pace of all.
        broken: what is done to the PTX of each kernel before it runs.
    """
    modules = cuda_stand_in.modules()
    with pytest.MonkeyPatch.context() as patch, without_gpu(launch.target(device.capability)):
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(cuda_stand_in, "properties", device)
        patch.setattr(cuda_stand_in, "seed", seed)
        patch.setattr(cuda_stand_in, "broken", broken or cuda_stand_in.broken)
        patch.setattr(engine, "current_device", lambda: device)
        patch.setattr(launch, "cached_cubin", cuda_stand_in.cached_cubin)
        try:
            yield modules["cupy"]
        finally:
            gemm.cublas.cache_clear()
            launch.kernel.cache_clear()
