"""Processors of several kinds, and constants of kernels."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit, types
from numba.core.errors import TypingError

from fusedlstm.kernels.cpu import spec as spec_module
from fusedlstm.kernels.cpu.compile import target
from fusedlstm.kernels.cpu.records import OWN, Record, address_of, record_at, task_type
from fusedlstm.kernels.cpu.spec import MOST_ROWS, Machine, Named, Registers, machine
from fusedlstm.kernels.cpu.tile import Tile

TESTS = Path(__file__).parent

SSE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"
AVX2 = f"{SSE},+avx,+avx2,+fma,+bmi,+bmi2,+f16c"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"
KINDS = {  # Numba's name for a processor, its features, what tiles are cut for
    "AVX-512": ("skylake-avx512", AVX512, Machine("AVX-512", 512, 32)),
    "AVX2": ("haswell", AVX2, Machine("AVX2", 256, 16)),
    "SSE": ("nehalem", SSE, Machine("SSE", 128, 16)),
}
X86 = pytest.mark.skipif(spec_module.platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone")


def python(script: str, *arguments: str, **environment: str) -> str:
    """What a fresh Python process prints, which must end well."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Processors -----------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The machine of a processor and its features, as LLVM names them, and of an architecture."""

    def machine_of(processor: str, features: str, architecture: str = "x86_64") -> Machine:
        triple, *_ = target()
        monkeypatch.setattr(spec_module, "target", lambda: (triple, processor, features))
        monkeypatch.setattr(spec_module.platform, "machine", lambda: architecture)
        machine.cache_clear()
        return machine()

    yield machine_of
    machine.cache_clear()


@X86
@pytest.mark.parametrize(
    ("processor", "features", "expected"),
    [
        *KINDS.values(),
        ("haswell", "", KINDS["AVX2"][2]),
        ("x86-64-v4", "", KINDS["AVX-512"][2]),
        ("skylake-avx512", "-avx512f", KINDS["AVX2"][2]),
        ("haswell", "-fma", KINDS["SSE"][2]),
        ("sandybridge", "", KINDS["SSE"][2]),
        ("x86-64", "", KINDS["SSE"][2]),
        ("x86-64", AVX512, KINDS["AVX-512"][2]),
    ],
)
def test_the_widest_registers(pretend: Any, processor: str, features: str, expected: Machine) -> None:
    assert pretend(processor, features) == expected
    assert pretend(processor, features, "AMD64") == expected


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("aarch64", Machine("NEON", 128, 32)),
        ("arm64", Machine("NEON", 128, 32)),
        ("riscv64", Machine("128 bits", 128, 16)),
    ],
)
def test_other_architectures(pretend: Any, architecture: str, expected: Machine) -> None:
    assert pretend("generic", "", architecture) == expected


KIND = """
import sys
import numpy as np
from fusedlstm import cells
from fusedlstm.kernels.cpu.spec import machine
from test_cpu_engine import SIZES, check

assert tuple(machine()) == eval(sys.argv[1]), machine()
for case in SIZES:
    check(cells.lstm, case, np.float32)
"""


@X86
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != machine().name])
def test_kernels_for_another_processor(kind: str) -> None:
    """Forward and backward are right; AVX-512 cannot be tried where there is none."""
    processor, features, expected = KINDS[kind]
    if expected.bits > machine().bits:
        pytest.skip(f"this processor has no {kind}")
    python(KIND, repr(tuple(expected)), NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)


ASSEMBLY = """
from numba import types
from numba import njit
from fusedlstm.kernels.cpu.spec import machine
from fusedlstm.kernels.cpu.tile import Tile, write_addresses

print(machine().bits)

signature = (Tile(types.float32, "panel", 4), types.int64)
compiled = njit(write_addresses)
compiled.compile(signature)
print(compiled.inspect_asm(signature))
"""


@X86
def test_no_calls_in_a_tile() -> None:
    """A processor without multiply-add instructions multiplies and adds; it calls no fma() for each lane."""
    processor, features, _ = KINDS["SSE"]
    text = python(ASSEMBLY, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)
    assert "mulps" in text
    assert "fma" not in text


HASWELL, NEHALEM = {"NUMBA_CPU_NAME": "haswell"}, {"NUMBA_CPU_NAME": "nehalem"}


@X86
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"NUMBA_ENABLE_AVX": "0"},
        HASWELL,
        HASWELL | {"NUMBA_CPU_FEATURES": ""},
        NEHALEM | {"NUMBA_CPU_FEATURES": ""},
        {"NUMBA_CPU_FEATURES": "-avx512f"},
        {"NUMBA_CPU_NAME": "generic"},
    ],
    ids=str,
)
def test_tiles_are_cut_for_the_registers_that_numba_uses(settings: dict[str, str]) -> None:
    bits, assembly = python(ASSEMBLY, **settings).split("\n", 1)
    registers = {128: "xmm", 256: "ymm", 512: "zmm"}
    assert max(bits for bits, name in registers.items() if name in assembly) == int(bits)


def test_a_processor_whose_features_llvm_does_not_know() -> None:
    """As of Apple's with an older LLVM: neither kernels nor the record of a benchmark need them."""
    script = """
import llvmlite.binding as llvm

def unknown():
    raise RuntimeError("getHostCPUFeatures failed.")

llvm.get_host_cpu_features = unknown
from fusedlstm.benchmarks.machine import describe
from fusedlstm.kernels.cpu.spec import machine

print(machine().bits in (128, 256, 512), describe()["features"])
"""
    assert python(script) == "True []\n"


# --- What a kernel is compiled for ----------------------------------------------------------


@pytest.mark.parametrize("scalar", [types.float32, types.float64], ids=str)
def test_registers_of_a_precision(scalar: types.Float) -> None:
    found = Registers(scalar)
    assert found.size == scalar.bitwidth // 8
    assert found.lanes * scalar.bitwidth == machine().bits


@pytest.mark.parametrize("width", range(1, 40))
def test_a_tile_is_as_high_as_registers_allow(width: int) -> None:
    """Its sums, a column of weights and a broadcast value are all in registers."""

    def needed(rows: int) -> int:
        return rows * width + width + 1

    rows = Registers(types.float32).rows(width)
    assert 1 <= rows <= MOST_ROWS
    assert rows == 1 or needed(rows) <= machine().registers
    assert rows == MOST_ROWS or needed(rows + 1) > machine().registers


def test_compiled_code_reads_the_constants() -> None:
    registers = Registers(types.float64)
    read = njit(lambda registers: (registers.size, registers.lanes))
    read.compile((registers,))
    assert read.overloads[(registers,)].entry_point(0) == (8, machine().bits // 64)


def test_types_are_equal_by_what_they_are_for() -> None:
    single, double = Registers(types.float32), Registers(types.float64)
    assert single is Registers(types.float32)
    assert task_type(types.float32) is task_type(types.float32)
    assert Record("a", "x y", True, single) is Record("a", "x y", True, single)
    others = [
        single,
        double,
        task_type(types.float32),
        task_type(types.float64),
        Record("a", "x y", True, single),
        Record("a", "x y", False, single),
        Record("a", "x y", True, double),
        Record("a", "y x", True, single),
        Record("b", "x y", True, single),
        Tile(types.float32, "panel", 3),
        Tile(types.float32, "planes", 3),
    ]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("made", [Registers(types.float32), task_type(types.float32), OWN], ids=str)
def test_types_are_pickled_by_name(made: Named) -> None:
    assert pickle.loads(pickle.dumps(made)) is made
    stranger = object.__new__(type(made))
    stranger.name = "type of another process"
    read = pickle.loads(pickle.dumps(stranger))
    assert read == stranger
    assert read != made
    assert stranger.name not in Named._known


def test_records_are_read_and_written_by_name() -> None:
    """Fields that a record does not have are refused when the code is compiled."""
    made = Record("test", "first second third", constant=False)
    at = record_at(made)

    @njit
    def move(address):
        record = at(address)
        record.third = record.first + record.second
        return address_of(record)

    words = np.array([5, 7, -1])
    assert move(words.ctypes.data) == words.ctypes.data
    assert words.tolist() == [5, 7, 12]
    with pytest.raises(TypingError, match="fourth"):
        njit(lambda record: record.fourth).compile((made,))
