"""What this machine has, and what the package makes of it; ``fusedlstm info`` prints it."""

from __future__ import annotations

import os
from importlib import metadata, util
from pathlib import Path

from .dispatch import INSTALL_CUDA
from .folders import Store, cuda_kernels

PACKAGES = (
    "numpy", "numba", "llvmlite", "safetensors", "numba-cuda", "cupy", "cupy-cuda12x", "cupy-cuda13x",
    "torch", "keras", "onnx",
)  # fmt: skip


def facts() -> dict[str, str]:
    """What there is to say, by subject."""
    from .benchmarks import machine
    from .kernels.cpu import spec, team

    here, registers = machine.describe(), spec.machine()
    caches = (f"{name} {size >> 10:,} KiB" for name, size in here["caches"].items())
    return {
        "fusedlstm": f"{metadata.version('fusedlstm')} in {Path(__file__).parent}",
        "Python": f"{here['python']} on {here['system']}",
        "packages": packages(),
        "processor": f"{here['processor']} ({here['architecture']}), {here['cores']} cores at hand",
        "features": ", ".join(here["features"]),
        "caches": ", ".join(caches),
        "registers": f"{registers.name}: {registers.registers} of {registers.bits} bits",
        "threads": team.describe(),
        "GPU": gpu(),
        "kernel cache": "\n".join(caches_on_disk()),
    }


def packages() -> str:
    """The versions of the packages that matter here, if they are installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def gpu() -> str:
    """The GPUs that kernels can run on, or what is missing."""
    wanted = {"numba-cuda": "numba_cuda", "CuPy": "cupy"}
    missing = [name for name, module in wanted.items() if util.find_spec(module) is None]
    if missing:
        return f"not used: {' and '.join(missing)} not installed; {INSTALL_CUDA}"
    try:
        import cupy

        runtime = cupy.cuda.runtime
        devices = [runtime.getDeviceProperties(n) for n in range(runtime.getDeviceCount())]
    except Exception as error:  # CuPy's own errors, and those of a driver that is missing or too old
        return f"not used: CuPy finds none: {error}"
    return ", ".join(
        f"{device['name'].decode()} (compute capability {device['major']}.{device['minor']})"
        for device in devices
    )


def caches_on_disk() -> list[str]:
    """The folders of compiled kernels, for the CPU and for GPUs, and how many files are there."""
    from .kernels.cpu.compile import store

    return [_contents(store(), (".nbi", ".nbc")), _contents(cuda_kernels(), (".ptx", ".cubin"))]


def _contents(store: Store, endings: tuple[str, ...]) -> str:
    """How much lies in the folder that kernels are put in, which an environment variable can choose."""
    folder = store.place()
    if folder is None:
        return f"none that can be written; {store.variable} may name one"
    files = [file for file in folder.glob("*") if file.suffix in endings]
    size = sum(file.stat().st_size for file in files) / 2**20
    chosen = f" (set by {store.variable})" if os.environ.get(store.variable) else ""
    return f"{folder}{chosen}, {len(files)} files, {size:.1f} MiB"
