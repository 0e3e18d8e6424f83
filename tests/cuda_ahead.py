"""Which kernels the tests on a GPU launch, found out on the host, and compiled on all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any
from unittest import mock

import cuda_options
import numpy as np
from cuda_cases import Case, actual, arrays

from fusedlstm.kernels.cuda import engine
from fusedlstm.kernels.cuda.plan import Device
from fusedlstm.kernels.cuda.resources import compile_ahead

Kernel = tuple[Any, ...]  # the arguments of launch.kernel


def kernels(given: Any, device: Device) -> set[Kernel]:
    """What the test of a Case, or of an option of the layers by its name, launches on a device."""
    if isinstance(given, Case):
        short = replace(given, steps=1)  # how many there are makes no difference
        return _asked_for(lambda: actual(short, arrays(short)), device)
    make, options = cuda_options.OPTIONS[given]
    return _asked_for(lambda: cuda_options.results(make(backend="cuda"), options, np), device)


def _asked_for(run: Callable[[], Any], device: Device) -> set[Kernel]:
    """The kernels that `run` asks for; arrays are NumPy's, and nothing is launched."""
    found: set[Kernel] = set()

    def record(*kernel: Any) -> Callable[..., None]:
        found.add(kernel)
        return lambda *arguments: None

    host = {"array_module": lambda: np, "current_device": lambda: device, "kernel": record}
    with (
        mock.patch.multiple(engine, **host),
        mock.patch("cuda_cases.array_module", return_value=np),
        mock.patch.dict(os.environ, NUMBA_ENABLE_CUDASIM="1"),
        np.errstate(all="ignore"),
    ):
        try:
            run()
        except ValueError:  # a form that cannot run at these sizes, which the test expects
            found.clear()
    return found


def compile_all(wanted: Iterable[Kernel], processes: int) -> None:
    """Put kernels into the cache on disk.  What fails is left to its test, which tells why."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(compile_ahead, *kernel) for kernel in wanted])
