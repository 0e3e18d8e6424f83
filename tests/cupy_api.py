"""What the CUDA engine and its benchmarks use of CuPy: names, and the parameters that they give.

`python tests/cupy_api.py` holds it against the CuPy that is installed, for which it needs no GPU; .ci/run
does so with the newest one.  test_cuda_launch.py holds it against the sources, so that nothing is used that
is not here.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

# Of CuPy 14.2.0: the parameters that are given; None for what is no function.
USED: dict[str, tuple[str, ...] | None] = {
    "__version__": None,
    "ndarray": None,
    "array": ("obj", "dtype"),
    "asarray": ("a", "dtype"),
    "ascontiguousarray": ("a",),
    "asnumpy": ("a",),
    "from_dlpack": ("array",),
    "empty": ("shape", "dtype"),
    "empty_like": ("prototype",),
    "zeros": ("shape", "dtype"),
    "ones": ("shape", "dtype"),
    "full": ("shape", "fill_value", "dtype"),
    "arange": ("start",),
    "where": ("condition", "x", "y"),
    "concatenate": ("tup",),
    "copyto": ("dst", "src"),
    "RawModule": ("path",),
    "RawModule.get_function": ("name",),
    "ElementwiseKernel": ("in_params", "out_params", "operation", "name"),
    "cuda.Device": ("device",),
    "cuda.Device.id": None,
    "cuda.Device.synchronize": (),
    "cuda.Event": (),
    "cuda.Event.record": (),
    "cuda.Event.synchronize": (),
    "cuda.get_elapsed_time": ("start_event", "end_event"),
    "cuda.Stream": ("non_blocking",),
    "cuda.Stream.from_external": ("obj",),
    "cuda.Stream.begin_capture": ("mode",),
    "cuda.Stream.end_capture": (),
    "cuda.Stream.is_capturing": (),
    "cuda.Stream.synchronize": (),
    "cuda.ExternalStream": ("ptr", "device_id"),
    "cuda.graph.Graph.launch": ("stream",),
    "cuda.get_current_stream": (),
    "cuda.device.get_cublas_handle": (),
    "cuda.driver.launchKernel": (
        "f", "grid_dim_x", "grid_dim_y", "grid_dim_z", "block_dim_x", "block_dim_y", "block_dim_z",
        "shared_mem_bytes", "stream", "kernel_params", "extra",
    ),
    "cuda.driver.launchCooperativeKernel": (
        "f", "grid_dim_x", "grid_dim_y", "grid_dim_z", "block_dim_x", "block_dim_y", "block_dim_z",
        "shared_mem_bytes", "stream", "kernel_params",
    ),
    "cuda.runtime.CUDARuntimeError": None,
    "cuda.runtime.getDeviceCount": (),
    "cuda.runtime.getDeviceProperties": ("device",),
    "cuda.runtime.driverGetVersion": (),
    "cuda.runtime.runtimeGetVersion": (),
    "cuda.runtime.streamCaptureModeThreadLocal": None,
}  # fmt: skip
# where the order matters, these begin the list of parameters
BY_PLACE = {name for name in USED if name.startswith(("cuda.driver", "ElementwiseKernel"))}


def parameters(function: Any) -> list[str]:
    """Of a function in Python, or by the first line of its documentation of one in Cython."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        listed = re.search(r"\((.*?)\)", (function.__doc__ or "").partition("\n\n")[0], re.DOTALL)
        parts = [part.partition("=")[0].split() for part in listed[1].split(",")] if listed else []
        return [part[-1] for part in parts if part]


def differences(cupy: Any) -> list[str]:
    """What is not as it is used."""
    found = []
    for name, wanted in USED.items():
        value = cupy
        try:
            for part in name.split("."):
                value = getattr(value, part)
        except AttributeError as error:
            found.append(f"{name}: {error}")
            continue
        if not wanted:
            continue
        there = [part for part in parameters(value) if part not in ("self", "cls")]
        if not set(wanted) <= set(there) or (name in BY_PLACE and there[: len(wanted)] != list(wanted)):
            found.append(f"{name} takes {there}, used with {list(wanted)}")
    return found


if __name__ == "__main__":
    module = importlib.import_module("cupy")
    changed = differences(module)
    print(f"CuPy {module.__version__}:", *(changed or ["as it is used"]), sep="\n  ")
    sys.exit(bool(changed))
