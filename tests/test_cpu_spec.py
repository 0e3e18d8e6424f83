"""Processors of several kinds, constants of kernels, and the cache of compiled code on disk."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import five_gates, other_operand, three_states, unused_state
from numba import njit, types
from numba.core import config

from fusedlstm import cells
from fusedlstm.kernels.cpu import spec as spec_module
from fusedlstm.kernels.cpu.spec import Machine, Named, Registers, Spec, machine, source_digest

TESTS = Path(__file__).parent
PACKAGE = Path(spec_module.__file__).parent

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
    result = start(script, *arguments, **environment)
    output, errors = result.communicate(timeout=300)
    assert result.returncode == 0, errors
    return output


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- Processors -----------------------------------------------------------------------------


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def pretend(text: str | None, architecture: str = "x86_64") -> Machine:
        monkeypatch.setattr(config, "CPU_FEATURES", text)
        monkeypatch.setattr(spec_module.platform, "machine", lambda: architecture)
        machine.cache_clear()
        return machine()

    yield pretend
    machine.cache_clear()


@pytest.mark.parametrize(
    ("text", "architecture", "expected"),
    [
        *((text, "x86_64", expected) for _, text, expected in KINDS.values()),
        ("+avx,+avx2,-fma", "x86_64", Machine("SSE", 128, 16)),
        ("+avx2,+fma,-avx512f", "AMD64", Machine("AVX2", 256, 16)),
        ("+neon", "aarch64", Machine("NEON", 128, 32)),
        ("+neon", "arm64", Machine("NEON", 128, 32)),
        ("", "x86_64", Machine("SSE", 128, 16)),
        ("", "riscv64", Machine("128 bits", 128, 16)),
    ],
)
def test_the_widest_registers(features: Any, text: str, architecture: str, expected: Machine) -> None:
    assert features(text, architecture) == expected


def test_the_processor_at_hand(features: Any) -> None:
    assert features(None, spec_module.platform.machine()).bits in (128, 256, 512)


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


FMA = """
from numba import types
from numba import njit
from fusedlstm.kernels.cpu.tile import Tile, write_addresses

signature = (Tile(types.float32, "panel", 4), types.int64)
compiled = njit(write_addresses)
compiled.compile(signature)
print(compiled.inspect_asm(signature))
"""


@X86
def test_no_calls_in_a_tile() -> None:
    """A processor without multiply-add instructions multiplies and adds; it calls no fma() for each lane."""
    processor, features, _ = KINDS["SSE"]
    text = python(FMA, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)
    assert "mulps" in text
    assert "fma" not in text


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


# --- The cache on disk ----------------------------------------------------------------------

RUN = """
import sys, time
import numpy as np
from fusedlstm import cells
from fusedlstm.kernels.cpu import engine
from fusedlstm.weights import Weights

for name in sys.argv[1:]:
    cell = getattr(cells, name)
    generator = np.random.default_rng(1)
    weights = Weights(*(generator.normal(size=(len(cell.gates) * 5, n)) for n in (3, 5)))
    made = engine.CPU().prepare(cell, weights)
    final = tuple(np.empty((2, 5)) for _ in cell.states)
    y = np.empty((4, 2, 5))
    made.forward(generator.normal(size=(4, 2, 3)), None, y, final, None, None, False, False)
    print(repr(y.sum()))
"""


def files(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.nb*")}


Filled = tuple[Path, str, list[str]]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A cache that three processes filled at the same time, what each printed, and the files they saved."""
    folder = tmp_path_factory.mktemp("cache")
    environment = {"NUMBA_CACHE_DIR": str(folder), "NUMBA_DEBUG_CACHE": "1"}
    running = [start(RUN, "rnn_tanh", **environment) for _ in range(3)]
    ends = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ends
    lines = [line for output, _ in ends for line in output.splitlines()]
    printed = {line for line in lines if not line.startswith("[cache]")}
    assert len(printed) == 1
    return folder, printed.pop() + "\n", [line for line in lines if line.startswith("[cache] data saved")]


def test_a_kernel_is_compiled_by_one_of_the_processes_that_start_with_it(filled: Filled) -> None:
    stamped = [line for line in filled[2] if re.search(r"_[0-9a-f]{16}-", line)]
    assert any("forward" in line for line in stamped)
    assert len(stamped) == len(set(stamped))


def test_concurrent_first_runs_do_not_corrupt_the_cache(filled: Filled) -> None:
    """A later process needs to compile nothing, and finds the same."""
    folder, output, _ = filled
    before = files(folder)
    assert before
    assert python(RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(folder)) == output
    assert files(folder) == before


def test_the_cache_of_other_cells_does_no_harm(filled: Filled) -> None:
    """A process finds what one with other cells left, adds its own, and both stay."""
    folder, output, _ = filled
    other = python(RUN, "rnn_relu", NUMBA_CACHE_DIR=str(folder))
    before = files(folder)
    assert python(RUN, "rnn_tanh", "rnn_relu", NUMBA_CACHE_DIR=str(folder)) == output + other
    assert python(RUN, "rnn_relu", "rnn_tanh", NUMBA_CACHE_DIR=str(folder)) == other + output
    assert files(folder) == before


CHANGED = """
from fusedlstm.kernels.cpu import spec

spec.source_digest = lambda: "anotherversion"
"""


def test_other_sources_use_other_entries(filled: Filled) -> None:
    """Machine code does not outlive what it was made of; the old entries do no harm."""
    folder, output, _ = filled
    before = files(folder)
    assert python(CHANGED + RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(folder)) == output
    after = files(folder)
    assert {path: after[path] for path in before} == before
    stamped = re.compile(r"(\w+)_[0-9a-f]{16}-")  # all but the team's, which use no other module
    again = [path for path in after if path not in before]
    assert all(stamped.search(path) for path in again)
    names = [set(stamped.findall(" ".join(paths))) for paths in (before, again)]
    assert names[0] == names[1]


MEET = """
import time
from pathlib import Path
from numba.core.caching import IndexDataCacheFile

me, other = {me!r}, {other!r}
save_index, save_data = IndexDataCacheFile._save_index, IndexDataCacheFile._save_data


def note(path, what):
    Path(f"{{path}}.{{what}}").touch()


def wait(path, what):
    end = time.monotonic() + 1
    while not Path(f"{{path}}.{{what}}").exists() and time.monotonic() < end:
        time.sleep(0.01)


def slow_index(self, overloads):  # both have read the index; the second is the last to write it
    path = self._index_path
    note(path, "read by " + me)
    wait(path, "read by " + other)
    if me == "second":
        wait(path, "written by " + other)
    save_index(self, overloads)
    note(path, "written by " + me)


def slow_data(self, name, data):  # the first is the last to write the code
    if me == "first":
        wait(self._index_path, "data of " + other)
    save_data(self, name, data)
    note(self._index_path, "data of " + me)


IndexDataCacheFile._save_index, IndexDataCacheFile._save_data = slow_index, slow_data
"""


def test_processes_that_save_different_cells_at_once(tmp_path: Path, filled: Filled) -> None:
    """However their reading and writing of the cache's files falls, no cell gets the code of another."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = start(MEET.format(me="first", other="second") + RUN, "rnn_tanh", **cache)
    second = start(MEET.format(me="second", other="first") + RUN, "rnn_relu", **cache)
    ends = [process.communicate(timeout=300) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ends
    for cell, (output, _) in zip(("rnn_tanh", "rnn_relu"), ends):
        assert python(RUN, cell, **cache) == output


def test_the_digest_is_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {source_digest.__wrapped__()}
    read = Path.read_bytes
    for path in PACKAGE.glob("*.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda p, path=path: read(p) + (b" " if p == path else b""))
            found.add(source_digest.__wrapped__())
    assert len(found) == len(list(PACKAGE.glob("*.py"))) + 1
