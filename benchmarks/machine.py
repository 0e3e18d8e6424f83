"""What a result depends on besides the code: processor, caches, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

FEATURES = ("avx512_bf16", "avx512f", "avx2", "fma", "sse4.2", "amx-tile", "neon", "sve", "bf16")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """How many threads were running or waiting to, on average over a minute; None where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@cache
def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches that a core sees, "L1" to "L3".

    What the system does not tell is taken to be 32 KiB, 512 KiB and 8 MiB.
    """
    sizes = {"L1": 32 << 10, "L2": 512 << 10, "L3": 8 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and f"L{level}" in sizes:
            sizes[f"L{level}"] = int(size.removesuffix("K")) << 10
    if sys.platform == "darwin":
        for name, key in (("L1", "hw.l1dcachesize"), ("L2", "hw.l2cachesize"), ("L3", "hw.l3cachesize")):
            if (text := _output("sysctl", "-n", key)) and int(text):
                sizes[name] = int(text)
    return sizes


def processor() -> str:
    """The processor's name."""
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


@cache
def gpu() -> str | None:
    """The name of the first NVIDIA GPU, if there is one."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return names[0] if names else None


def describe() -> dict[str, Any]:
    """The machine, for the record."""
    import llvmlite.binding as llvm
    from numba.core.codegen import get_host_cpu_features

    found = get_host_cpu_features().split(",")
    return {
        "processor": processor(),
        "architecture": llvm.get_host_cpu_name(),
        "features": [name for name in FEATURES if {f"+{name}", f"+{name.replace('_', '')}"} & {*found}],
        "cores": cores(),
        "load": load(),
        "caches": cache_sizes(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of the source, with "+" if it has been changed since; None outside a repository."""
    folder = str(Path(__file__).parent)
    name = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    if not name:
        return None
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return name + ("+" if changed else "")


def _output(*command: str) -> str:
    """What a command prints, nothing if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
