"""What a kernel needs of a multiprocessor, told by NVIDIA's assembler, without a GPU.

`ptxas` comes with the CUDA toolkit, or from the package index: pip install nvidia-cuda-nvcc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numba.cuda.dispatcher

from fusedlstm.cells import Cell

from .launch import cached_cubin, cached_ptx, target
from .plan import Device, Plan

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory of a block
DEVICES = {
    "sm_75": Device("T4", (7, 5), 40, 65536),
    "sm_80": Device("A100", (8, 0), 108, 166912),
    "sm_90": Device("H200", (9, 0), 132, 232448),
    "sm_100": Device("B200", (10, 0), 148, 232448),
}
REGISTERS = 65536  # of a multiprocessor


class Resources(NamedTuple):
    """What one thread needs, and how often a kernel's PTX uses tensor cores."""

    registers: int
    stack: int  # bytes
    spills: int  # bytes
    tensor: int  # mma.sync instructions
    calls: int  # functions that were not inlined


@contextmanager
def without_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Numba asks the current device for its compute capability when a kernel calls a device function."""
    device = SimpleNamespace(compute_capability=capability)
    with mock.patch.object(numba.cuda.dispatcher, "get_current_device", return_value=device):
        yield


def compile_ahead(cell: Cell, plan: Plan, resets: bool, training: bool, capability: tuple[int, int]) -> None:
    """Put a kernel into the cache on disk; processes without a GPU can do it, many at once."""
    with without_gpu(target(capability)):
        ptx = cached_ptx(cell, plan, resets, training, target(capability))
    cached_cubin(ptx, capability)


def ptx_of(cell: Cell, plan: Plan, capability: tuple[int, int], resets: bool = True) -> str:
    """The PTX of a plan's kernel in training, compiled or from the cache on disk."""
    with without_gpu(capability):
        return cached_ptx(cell, plan, resets, True, capability).read_text()


def resources(ptx: str, architecture: str) -> Resources:
    """Assemble PTX for an architecture such as "sm_90".

    Raises:
        FileNotFoundError: if there is no ptxas.
        subprocess.CalledProcessError: if it refuses the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [_ptxas(), "-v", f"-arch={architecture}", str(source), "-o", str(target)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, said))

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    tensor, calls = ptx.count("mma.sync"), len(re.findall(r"\bcall\b", ptx))
    return Resources(number(r"Used (\d+) registers"), number(r"(\d+) bytes stack"), spills, tensor, calls)


def _ptxas() -> str:
    packaged = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/ptxas")
    found = next((str(path) for path in packaged), None) or shutil.which("ptxas")
    if found is None:
        raise FileNotFoundError("ptxas is not installed: pip install nvidia-cuda-nvcc")
    return found
