"""Processors of several kinds, and constants of kernels."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import five_gates, other_operand, three_states, unused_state
from numba import njit, types

from fusedlstm import cells
from fusedlstm.kernels.cpu import spec as spec_module
from fusedlstm.kernels.cpu.compile import target
from fusedlstm.kernels.cpu.spec import Machine, Named, Registers, Spec, machine

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


def test_constants_of_a_cell() -> None:
    lanes = machine().bits // 32
    found = Spec(cells.lstm, types.float32, False)
    assert (found.gates, found.inputs, found.splits, found.units, found.width) == (4, 4, 0, 1, 4)
    assert (found.lanes, found.size, found.panel, found.further, found.learned) == (lanes, 4, lanes, 1, 0)
    found = Spec(three_states, types.float64, True)
    assert (found.gates, found.inputs, found.splits, found.units, found.width) == (2, 3, 1, 2, 4)
    assert (found.lanes, found.size, found.panel) == (lanes // 2, 8, lanes)
    assert (found.further, found.learned, found.reads_operand, found.projected) == (2, 1, False, True)
    assert Spec(five_gates, types.float32, False).reads_operand
    assert (found.operand, Spec(other_operand, types.float32, False).operand) == (0, 2)
    assert Spec(unused_state, types.float32, False).units == 4


def test_compiled_code_reads_the_constants() -> None:
    spec = Spec(cells.gru, types.float64, False)
    names = spec.constants
    scope: dict[str, Any] = {}
    exec(f"def read(spec): return ({', '.join(f'spec.{name}' for name in names)})", scope)
    read = njit(scope["read"])
    read.compile((spec,))
    values = read.overloads[(spec,)].entry_point(0)
    assert values == tuple(getattr(spec, name) for name in names)


def test_types_are_equal_by_what_they_are_for() -> None:
    spec = Spec(cells.lstm, types.float32, False)
    assert spec is Spec(cells.lstm, types.float32, False)
    others = [
        Spec(cells.lstm, types.float64, False),
        Spec(cells.lstm, types.float32, True),
        Spec(cells.coupled_lstm, types.float32, False),
        Registers(types.float32),
    ]
    assert len({spec, *others}) == 5


def test_types_are_pickled_by_name() -> None:
    spec = Spec(cells.lstm, types.float32, False)
    assert pickle.loads(pickle.dumps(spec)) is spec
    stranger = object.__new__(Spec)
    stranger.name = "Spec(of another process)"
    read = pickle.loads(pickle.dumps(stranger))
    assert read == stranger
    assert read != spec
    assert "Spec(of another process)" not in Named._known
