"""What this machine has, and what the package makes of it; ``fusedlstm info`` prints it."""

from __future__ import annotations

import os
from importlib import metadata, util
from pathlib import Path

from .dispatch import INSTALL_CUDA
from .files import cuda_kernels

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
    """The folders of compiled kernels, and how many files are there."""
    from numba import njit

    from .benchmarks import machine
    from .kernels.cpu.forward import forward

    # Numba has a folder for each folder of sources that it compiles from; any function says which
    sources = (forward, caches_on_disk, machine.describe)
    folders = [Path(njit(cache=True)(function).stats.cache_path) for function in sources]
    return [
        *(_contents(folder, (".nbi", ".nbc"), "NUMBA_CACHE_DIR") for folder in folders),
        _contents(cuda_kernels(), (".ptx", ".cubin"), "FUSEDLSTM_CACHE"),
    ]


def _contents(folder: Path, endings: tuple[str, ...], variable: str) -> str:
    """How much lies in a folder that an environment variable can choose."""
    files = [file for file in folder.glob("*") if file.suffix in endings]
    size = sum(file.stat().st_size for file in files) / 2**20
    chosen = f" (set by {variable})" if os.environ.get(variable) else ""
    return f"{folder}{chosen}, {len(files)} files, {size:.1f} MiB"
