"""Compiled kernels on disk: shared by processes, never stale, never damaged, never those of somebody else."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba import types
from numba.core import config

from fusedlstm import folders
from fusedlstm.kernels.cpu import compile as compile_module
from fusedlstm.kernels.cpu.compile import c_function, entry_point, kept, source_digest, store, target

TESTS = Path(__file__).parent
PACKAGE = Path(compile_module.__file__).parent


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(script: str, *arguments: str, **environment: str) -> str:
    """What a fresh Python process prints, which must end well."""
    result = start(script, *arguments, **environment)
    output, errors = result.communicate(timeout=300)
    assert result.returncode == 0, errors
    return output


# --- Functions --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of kernels, not there yet."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return tmp_path / "fusedlstm"


def twice(x):  # type: ignore[no-untyped-def]
    return 2 * x


def store_nothing(x):  # type: ignore[no-untyped-def]
    pass


def loads() -> tuple[int, int]:
    """How often `twice` is loaded and compiled for a call of it, whose result is right."""
    function = kept(twice)
    assert function(21) == 42
    return sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values())


LOADED, COMPILED = (1, 0), (0, 1)


def files(folder: Path, ending: str = ".nb*") -> dict[str, int]:
    """When each file was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob(f"*{ending}")}


def test_functions_are_compiled_once_and_loaded_then(folder: Path) -> None:
    assert loads() == COMPILED
    before = files(folder)
    assert len(before) == 2
    assert loads() == LOADED
    assert files(folder) == before


def test_functions_for_python_and_for_c(folder: Path) -> None:
    for _ in range(2):
        assert entry_point(twice, types.int64)(4) == 8
        assert entry_point(twice, types.float64)(0.25) == 0.5
        made = c_function(store_nothing, types.void(types.int64))
        made.ctypes(1)
        assert made.address
    assert len(files(folder, ".nbc")) == 3


def test_names_tell_what_code_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> str:
        return compile_module.stamped(twice, types.int64).__qualname__

    names = [name(), compile_module.stamped(twice, types.float64).__qualname__]
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "source_digest", lambda: "another")
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(compile_module.numba, "__version__", "another")
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "target", lambda: (*target()[:2], "+another"))
        names.append(name())
    assert len(set(names)) == 5
    assert name() == names[0]


def test_the_digest_is_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {source_digest.__wrapped__()}
    read = Path.read_bytes
    for path in PACKAGE.glob("*.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda p, path=path: read(p) + (b" " if p == path else b""))
            found.add(source_digest.__wrapped__())
    assert len(found) == len(list(PACKAGE.glob("*.py"))) + 1


# --- Files that are no good -------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "one bit": lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
    "longer": lambda whole: whole + b" ",
    "text": lambda whole: b"This is not a kernel. " * 100,
    "pickle": lambda whole: pickle.dumps(["something else"]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_damaged_file_is_replaced(folder: Path, ending: str, damage: Callable[[bytes], bytes]) -> None:
    assert loads() == COMPILED
    (path,) = folder.glob(f"*{ending}")
    path.write_bytes(damage(path.read_bytes()))
    assert loads() == COMPILED
    assert loads() == LOADED


@pytest.mark.parametrize("content", [["something else"], None, {}, (1, 2, 3)])
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_whole_file_of_something_else_is_replaced(folder: Path, ending: str, content: Any) -> None:
    assert loads() == COMPILED
    (path,) = folder.glob(f"*{ending}")
    found = compile_module._Files(str(folder), "any", "stamp")
    with found._open_for_write(str(path)) as file:
        file.write(pickle.dumps(content))
    assert loads() == COMPILED
    assert loads() == LOADED


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_missing_file_is_written_again(folder: Path, ending: str) -> None:
    assert loads() == COMPILED
    (path,) = folder.glob(f"*{ending}")
    path.unlink()
    assert loads() == COMPILED
    assert loads() == LOADED


def test_the_file_of_another_function_under_its_name_is_not_used(folder: Path) -> None:
    """Their indices are compared with what is asked for."""
    entry_point(store_nothing, types.int64)
    others = {path.suffix: path.read_bytes() for path in folder.glob("*.nb*")}
    assert loads() == COMPILED
    for path in folder.glob("*twice*.nb*"):
        path.write_bytes(others[path.suffix])
    assert loads() == COMPILED
    assert loads() == LOADED


posix = pytest.mark.skipif(os.name != "posix", reason="elsewhere users are kept apart by their folders")


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_folder_that_others_may_write_to_is_not_trusted(folder: Path, mode: int) -> None:
    assert loads() == COMPILED
    folder.chmod(mode)
    before = files(folder)
    folders._place.cache_clear()
    assert loads() == COMPILED
    assert files(folder) == before
    other = store().place()
    assert other == folder.with_name(f"fusedlstm-{os.getuid()}")  # type: ignore[attr-defined]
    assert loads() == LOADED


@posix
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_file_that_others_may_write_to_is_not_trusted(folder: Path, ending: str) -> None:
    assert loads() == COMPILED
    (path,) = folder.glob(f"*{ending}")
    path.chmod(0o666)
    assert loads() == COMPILED
    assert path.stat().st_mode & 0o022 == 0
    assert loads() == LOADED


@posix
def test_a_file_of_another_user_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loads() == COMPILED
    others = {os.getuid() + 1}
    monkeypatch.setattr(folders, "_owners", lambda: others)
    monkeypatch.setattr(folders, "_is_closed", lambda folder: folder.is_dir())
    assert loads() == COMPILED


def test_a_mask_that_lets_groups_write_does_not_count(folder: Path) -> None:
    """As of many systems; what the user's group may write would not be trusted."""
    mask = os.umask(0)
    try:
        assert loads() == COMPILED
    finally:
        os.umask(mask)
    assert loads() == LOADED


def test_a_full_disk_costs_the_keeping_not_the_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    compile_module._say.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "write_whole", full)
        with pytest.warns(UserWarning, match="cannot be kept: .*No space left on device") as said:
            made = [loads(), loads()]
    assert len(said) == 1
    assert made == [COMPILED, COMPILED]
    assert loads() == COMPILED
    assert loads() == LOADED


def test_without_any_folder_kernels_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_refusal", lambda folder, mode: "Read-only file system")
    monkeypatch.setattr(folders, "_is_closed", lambda folder: False)
    folders._place.cache_clear()
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR") as said:
        made = [loads(), loads()]
    assert len(said) == 1
    assert made == [COMPILED, COMPILED]
    assert entry_point(twice, types.int64)(4) == 8
    assert c_function(store_nothing, types.void(types.int64)).address
    folders._place.cache_clear()


# --- Processes --------------------------------------------------------------------------------------------

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
from fusedlstm.kernels.cpu import compile

compile.source_digest = lambda: "anotherversion"
"""


def test_other_sources_use_other_entries(filled: Filled) -> None:
    """Machine code does not outlive what it was made of; the old entries do no harm."""
    folder, output, _ = filled
    before = files(folder)
    assert python(CHANGED + RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(folder)) == output
    after = files(folder)
    assert {path: after[path] for path in before} == before
    stamped = re.compile(r"(\w+)_[0-9a-f]{16}-")
    again = [path for path in after if path not in before]
    assert all(stamped.search(path) for path in again)
    names = [set(stamped.findall(" ".join(paths))) for paths in (before, again)]
    assert {name for name in names[0] if "rnn_relu" not in name} == names[1]  # which other tests have run


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


def test_damaged_files_of_a_layer_are_replaced(tmp_path: Path, filled: Filled) -> None:
    folder, output, _ = filled
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damages = list(DAMAGE.values())
    for n, path in enumerate(sorted(tmp_path.rglob("*.nb*"))):
        path.write_bytes(damages[n % len(damages)](path.read_bytes()))
    assert python(RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(tmp_path)) == output
    before = files(tmp_path)
    assert python(RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(tmp_path)) == output
    assert files(tmp_path) == before


FULL = """
import resource

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # larger files cannot be written
"""


@posix
def test_a_layer_runs_on_a_full_disk(tmp_path: Path, filled: Filled) -> None:
    process = start(FULL + RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(tmp_path))
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (0, filled[1]), errors
    assert errors.count("cannot be kept") == errors.count("UserWarning") >= 1
    assert not list(tmp_path.rglob("*.part"))
    assert python(RUN, "rnn_tanh", NUMBA_CACHE_DIR=str(tmp_path)) == filled[1]


# --- Read-only installations ------------------------------------------------------------------------------


def as_user(script: str, package: Path, **environment: str) -> tuple[str, str]:
    """What a process prints that may not write into the package, nor has a home."""
    drop: list[str] = []
    if os.getuid() == 0:
        rights = "-dac_override,-dac_read_search"
        drop = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    settings = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    settings |= {"HOME": "/proc/none", "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*drop, sys.executable, "-c", script],
        env=settings | environment,
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # that it takes long is said where it does
    said = [line for line in done.stderr.splitlines(True) if not line.startswith("compiling kernels, which")]
    return done.stdout, "".join(said)


def writable(folder: Path, yes: bool) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o755 if yes else 0o555) if path.is_dir() else 0o644 if yes else 0o444)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the package that may not be written to."""
    package = tmp_path_factory.mktemp("site") / "fusedlstm"
    bare = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(folders.__file__).parent, package, ignore=bare)
    if not (package / "kernels").exists():  # in a checkout it is beside
        shutil.copytree(PACKAGE.parent, package / "kernels", ignore=bare)
    writable(package, False)
    yield package
    writable(package, True)


LAYER = """
import fusedlstm, numpy as np
assert fusedlstm.__file__.startswith({package!r}), fusedlstm.__file__
from fusedlstm.kernels.cpu import engine
from numba.core.event import install_recorder
with install_recorder("numba:compile") as compiled:
    y, state = fusedlstm.RNN(2, 3, backend="cpu")(np.ones((4, 1, 2), "f"))
print(y.shape, len(compiled.buffer) > 0)
"""


@posix
def test_a_read_only_installation_without_a_home(installed: Path, tmp_path: Path) -> None:
    script = LAYER.format(package=str(installed))
    output, said = as_user(script, installed, TMPDIR=str(tmp_path))
    assert output == "(4, 1, 3) True\n"
    assert said.count("UserWarning") == 1
    place = tmp_path / f"fusedlstm-{os.getuid()}"
    assert f"They lie in {place} as long as that lasts" in said
    assert "set the environment variable NUMBA_CACHE_DIR to a folder" in said
    assert place.stat().st_mode & 0o777 == 0o700
    assert as_user(script, installed, TMPDIR=str(tmp_path)) == ("(4, 1, 3) False\n", "")  # nothing to keep
    info, _ = as_user(
        "from fusedlstm import info; print(info.caches_on_disk()[0])", installed, TMPDIR=str(tmp_path)
    )
    assert info.startswith(f"{place}, ")


@posix
def test_a_variable_makes_kernels_last(installed: Path, tmp_path: Path) -> None:
    script, chosen = LAYER.format(package=str(installed)), str(tmp_path / "chosen")
    assert as_user(script, installed, NUMBA_CACHE_DIR=chosen) == ("(4, 1, 3) True\n", "")
    assert as_user(script, installed, NUMBA_CACHE_DIR=chosen) == ("(4, 1, 3) False\n", "")


@posix
def test_kernels_that_came_with_a_read_only_installation(installed: Path, tmp_path: Path) -> None:
    """As in an image of a container, where a process of the build has compiled them."""
    image, script = tmp_path / "fusedlstm", LAYER.format(package=str(tmp_path / "fusedlstm"))
    shutil.copytree(installed, image)
    writable(image, True)
    assert as_user(script, image) == ("(4, 1, 3) True\n", "")
    writable(image, False)
    assert as_user(script, image) == ("(4, 1, 3) False\n", "")
    writable(image, True)
