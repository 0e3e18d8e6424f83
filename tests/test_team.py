# mypy: allow-untyped-defs
"""Thread teams: right results whichever team runs, however many threads call, alone or at once."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from fusedlstm.kernels.cpu import team

CORES = team._default_threads()
MODULUS = 1_000_003


@njit(error_model="numpy")
def ring(thread, threads, sync, phases, values, ran):
    """Each thread mixes its number with its neighbours', which they wrote in the phase before."""
    left, right = (thread - 1) % threads, (thread + 1) % threads
    for phase in range(phases):
        old, new = values[phase % 2], values[1 - phase % 2]
        new[thread] = (3 * old[left] + 5 * old[thread] + 7 * old[right] + phase) % MODULUS
        team.barrier(sync, threads)
    ran[thread] = threads


@njit(nogil=True, error_model="numpy")
def run_ring(address, threads, patience, phases, values, ran):
    team.fork(address, threads, ring, (phases, values, ran), patience)


def check_ring(address: int, threads: int, phases: int, patience: int = team.PATIENCE_US) -> int:
    """Run a ring on a team, hold it against NumPy, and give the number of threads that ran."""
    values = np.full((2, threads), -1)
    values[0] = np.arange(threads)
    ran = np.zeros(threads, np.int64)
    run_ring(address, threads, patience, phases, values, ran)
    running = int(ran[0])
    assert 1 <= running <= threads
    np.testing.assert_array_equal(ran, np.where(np.arange(threads) < running, running, 0))
    expected = np.arange(running)
    for phase in range(phases):
        expected = (3 * np.roll(expected, 1) + 5 * expected + 7 * np.roll(expected, -1) + phase) % MODULUS
    np.testing.assert_array_equal(values[phases % 2, :running], expected)
    return running


def python(script: str, *arguments: str, **environment: str) -> str:
    """What a Python process prints, which must end well and soon, and complain of nothing."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "GOMP_"))}
    settings |= {"PYTHONPATH": str(Path(__file__).parent), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(script), *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("compiling kernels")] == []
    return done.stdout.strip()


@pytest.fixture(scope="module")
def own() -> Any:
    ours = team.Own(3)
    yield ours
    ours.dissolve()


@pytest.fixture(scope="module")
def openmp() -> team.OpenMP:
    """The OpenMP team that PyTorch brings."""
    import torch  # noqa: F401

    team._find_runtime()
    assert team._runtime is not None
    return team._runtime


@pytest.fixture(params=["own", "openmp"])
def any_team(request: pytest.FixtureRequest) -> team.Team:
    return request.getfixturevalue(request.param)


# --- Results ---------------------------------------------------------------------------------------------


def test_one_thread_needs_no_team() -> None:
    assert check_ring(0, 1, 10) == 1
    assert check_ring(team.ALONE.address, 4, 10) == 1


def test_every_thread_sees_what_its_neighbours_wrote(any_team: team.Team) -> None:
    for threads in (2, 3):
        assert check_ring(any_team.address, threads, 20_000, patience=10**6) == threads


def test_more_threads_than_cores(any_team: team.Team) -> None:
    check_ring(any_team.address, 4 * CORES, 300)
    wide = team.Own(4 * CORES)
    assert check_ring(wide.address, 4 * CORES, 300, patience=10**6) == 4 * CORES
    wide.dissolve()


def test_a_team_never_gives_more_threads_than_asked_for(any_team: team.Team) -> None:
    assert check_ring(any_team.address, 2, 50, patience=10**6) == 2
    assert check_ring(any_team.address, 3, 50, patience=10**6) == 3


class Pair(NamedTuple):
    array: Any
    scalar: Any


@njit(error_model="numpy")
def store_mixed(thread, threads, sync, flag, pair, out, small):
    out[thread] = pair.array[thread] * pair.scalar + (small if flag else 0)


@njit(error_model="numpy")
def store_alignment(thread, threads, sync, out):
    out[thread] = sync % 64 if threads > 1 else 0


@njit(error_model="numpy")
def meet(thread, threads, sync):
    team.barrier(sync, threads)


@njit
def run_mixed(address, threads, flag, pair, out, small):
    team.fork(address, threads, store_mixed, (flag, pair, out, small), 10**6)
    team.fork(address, threads, meet, (), 10**6)


@njit
def run_alignment(address, threads, out):
    team.fork(address, threads, store_alignment, (out,), 10**6)


def test_arguments_of_any_type(any_team: team.Team) -> None:
    out = np.full(3, np.nan)
    array = np.arange(6.0)[::2]
    run_mixed(any_team.address, 3, True, Pair(array, 2.5), out, np.float32(0.25))
    np.testing.assert_array_equal(out, array * 2.5 + 0.25)


def test_the_barrier_begins_a_cache_line(any_team: team.Team) -> None:
    out = np.full(3, -1)
    run_alignment(any_team.address, 3, out)
    np.testing.assert_array_equal(out, 0)


# --- Errors ----------------------------------------------------------------------------------------------


@njit
def fail(thread, threads, sync, who):
    if thread == who:
        raise ValueError("wrong")
    for _ in range(3):
        team.barrier(sync, threads)


@njit(nogil=True)
def run_fail(address, threads, who):
    team.fork(address, threads, fail, (who,), 10**6)


@njit
def give(thread, threads, sync):
    return thread


@njit
def run_give(address, threads):
    team.fork(address, threads, give, ())


@pytest.mark.parametrize("who", [0, 1, 2])
def test_an_error_in_one_thread_ends_the_region(any_team: team.Team, who: int) -> None:
    with pytest.raises(RuntimeError, match="parallel kernel"):
        run_fail(any_team.address, 3, who)
    assert check_ring(any_team.address, 3, 100, patience=10**6) == 3


def test_an_error_of_the_only_thread_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="wrong"):
        run_fail(0, 1, 0)


def test_a_kernel_returns_nothing() -> None:
    with pytest.raises(TypingError, match="must return nothing"):
        run_give(0, 1)


# --- Fewer threads than asked for ------------------------------------------------------------------------


def test_a_busy_team_leaves_the_caller_alone(own: team.Own) -> None:
    busy = own._block[team.BUSY // 8 :]
    busy[0] = 1
    try:
        assert check_ring(own.address, 3, 100) == 1
    finally:
        busy[0] = 0
    assert check_ring(own.address, 3, 100, patience=10**6) == 3


def test_late_workers_find_the_region_closed(own: team.Own) -> None:
    for patience in (0, 1, 10, 100) * 5:
        time.sleep(0.02)  # all workers sleep
        check_ring(own.address, 3, 200, patience)


def test_an_absent_worker_leaves_its_number_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    absent = "fusedlstm-1"
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: None if self.name == absent else start(self))
        short = team.Own(3)
    assert check_ring(short.address, 3, 1000, patience=10**6) == 2
    late = next(thread for thread in short._threads if thread.name == absent)
    late.start()
    assert check_ring(short.address, 3, 1000, patience=10**6) == 3
    short.dissolve()


def test_threads_that_cannot_be_started_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.warns(UserWarning, match="only 1 of 3 threads"):
            short = team.Own(3)
    assert check_ring(short.address, 3, 10) == 1


def test_a_dissolved_team_leaves_the_caller_alone() -> None:
    gone = team.Own(3)
    assert check_ring(gone.address, 3, 10, patience=10**6) == 3
    gone.dissolve()
    assert not any(thread.is_alive() for thread in gone._threads)
    assert check_ring(gone.address, 3, 10) == 1


def test_a_team_grows_in_place() -> None:
    """Who was given its address before can go on with it; nobody is started twice, nothing is left over."""
    grown = team.Own(2)
    address = grown.address
    assert check_ring(address, 6, 100, patience=10**6) == 2
    before = grown._threads[:]
    grown.grow(4)
    assert grown._threads[:1] == before
    assert len(grown._threads) == 3
    assert grown.address == address
    assert check_ring(address, 6, 1000, patience=10**6) == 4
    grown.dissolve()
    assert not any(thread.is_alive() for thread in grown._threads)


def test_a_team_grows_while_others_use_it() -> None:
    grown, done = team.Own(2), threading.Event()

    def call() -> set[int]:
        ran = set()
        while not done.is_set():
            ran.add(check_ring(grown.address, 5, 20, patience=1000))
        return ran

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(call) for _ in range(3)]
        for size in (3, 4, 5):
            grown.grow(size)
            time.sleep(0.05)
        done.set()
        ran = set().union(*(caller.result() for caller in callers))
    assert ran <= {1, 2, 3, 4, 5}
    assert check_ring(grown.address, 5, 100, patience=10**6) == 5
    grown.dissolve()


def test_numbers_of_threads_up_and_down_leave_no_old_teams() -> None:
    printed = python(
        """
        import threading
        from test_team import check_ring, team
        for threads in (2, 3, 2, 5, 4, 6, 1, 6):
            team.set_num_threads(threads)
            assert check_ring(team.current().address, threads, 50, 10**6) == threads
        print(threading.active_count(), type(team.current()).__name__)
        """
    )
    assert printed == "6 Own"


def test_openmp_under_a_thread_limit() -> None:
    printed = python(
        """
        import torch
        from test_team import check_ring, team
        print(check_ring(team.current().address, 4, 100), check_ring(team.current().address, 2, 100))
        """,
        OMP_THREAD_LIMIT="1",
    )
    assert printed == "1 1"


# --- Many callers ----------------------------------------------------------------------------------------


def test_eight_python_threads_at_once(any_team: team.Team) -> None:
    def call(seed: int) -> list[int]:
        return [check_ring(any_team.address, 2 + (seed + k) % 2, 20 + k % 7) for k in range(100)]

    with ThreadPoolExecutor(8) as pool:
        ran = [n for counts in pool.map(call, range(8)) for n in counts]
    assert len(ran) == 800
    assert max(ran) > 1


def test_the_team_may_change_while_others_use_it() -> None:
    printed = python(
        """
        import threading
        from test_team import check_ring, team
        check_ring(team.current().address, 2, 1)
        done = threading.Event()
        errors = []
        def call():
            while not done.is_set():
                try:
                    check_ring(team.current().address, team.get_num_threads(), 20)
                except BaseException as error:
                    errors.append(error)
        callers = [threading.Thread(target=call) for _ in range(4)]
        [caller.start() for caller in callers]
        for threads in (2, 3, 5, 1, 4, 7):
            team.set_num_threads(threads)
            check_ring(team.current().address, threads, 100)
        import torch
        torch.rand(300, 300) @ torch.rand(300, 300)
        check_ring(team.current().address, 2, 100)
        done.set()
        [caller.join() for caller in callers]
        print(errors, type(team.current()).__name__)
        """
    )
    assert printed == "[] OpenMP"


# --- Which team ------------------------------------------------------------------------------------------


def test_one_thread_starts_nothing_and_looks_for_nothing() -> None:
    printed = python(
        """
        import threading
        from test_team import check_ring, team
        team._loaded_libraries = None
        team.set_num_threads(1)
        check_ring(0, team.get_num_threads(), 10)
        print(threading.active_count(), team.describe())
        """
    )
    assert printed == "1 1 thread"


def test_our_own_team_where_there_is_no_openmp() -> None:
    printed = python(
        """
        import threading
        from test_team import check_ring, team
        print(team.get_num_threads(), team.describe())
        print(check_ring(team.current().address, 3, 1000, 10**6), threading.active_count())
        """,
        OMP_NUM_THREADS="3,2",
    )
    assert printed == "3 3 threads of our own team\n3 3"


def test_torch_lends_its_team_and_sets_its_size() -> None:
    printed = python(
        """
        import os
        from test_team import check_ring, team
        check_ring(team.current().address, 3, 10)
        import torch
        torch.set_num_threads(3)
        count = lambda: len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
        torch.ones(10**6).sum()
        before = count()
        print(check_ring(team.current().address, team.get_num_threads(), 1000), count() - before)
        print(team.describe())
        torch.set_num_threads(2)
        print(check_ring(team.current().address, team.get_num_threads(), 100), torch.ones(10**6).sum().item())
        team.set_num_threads(3)
        print(check_ring(team.current().address, team.get_num_threads(), 100), torch.get_num_threads())
        """,
        OMP_NUM_THREADS="2",
    )
    ran, described, resized, ours = printed.splitlines()
    assert ran == "3 0"
    assert described.startswith("3 threads of lib")
    assert described.endswith(", loaded by torch")
    assert resized == "2 1000000.0"
    assert ours == "3 2"


LIBIOMP5 = glob.glob(os.path.join(sys.prefix, "lib", "libiomp5.*"))


@pytest.mark.skipif(not LIBIOMP5, reason="needs Intel's OpenMP: pip install intel-openmp")
@pytest.mark.parametrize("entry", ["GOMP_parallel", "__kmpc_fork_call"])
def test_intel_openmp(entry: str) -> None:
    printed = python(
        """
        import ctypes, sys
        from test_team import check_ring, team
        ctypes.CDLL(sys.argv[1])
        borrowed = team.current()
        if sys.argv[2] == "__kmpc_fork_call":
            borrowed._use_kmpc()
        print(type(borrowed).__name__, team.describe().split()[3])
        print([check_ring(borrowed.address, threads, 1000) for threads in (2, 4, 3)])
        """,
        LIBIOMP5[0],
        entry,
        OMP_NUM_THREADS="2",
    )
    assert printed == "OpenMP libiomp5,\n[2, 4, 3]"


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_requested", None)
    monkeypatch.setattr(team, "_runtime", None)
    team.set_num_threads(5)
    assert team.get_num_threads() == 5
    for beyond in (0, -1, 10**6):
        with pytest.raises(ValueError, match=f"threads must be from 1 to 4096, not {beyond}"):
            team.set_num_threads(beyond)
    for wrong in (2.0, "2", None, True):
        with pytest.raises(TypeError, match="threads must be an integer"):
            team.set_num_threads(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("setting", "threads"), [("3", 3), ("4,2", 4), ("", CORES)])
def test_omp_num_threads(monkeypatch: pytest.MonkeyPatch, setting: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert team._default_threads.__wrapped__() == threads


@pytest.mark.parametrize("setting", ["0", "-1", "many"])
def test_omp_num_threads_must_be_a_number(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS must be a positive integer"):
        team._default_threads.__wrapped__()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, team.MOST_THREADS),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, team.MOST_THREADS),
        ({}, team.MOST_THREADS),
        ({"own": "0::/a/b\n", "a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}, 1),
        ({"own": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ({"own": "0::/a\n", "cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ({"own": "0::/a\n", "b/cpu.max": "100000 100000\n"}, team.MOST_THREADS),
        ({"own": "0::/outside/what/is/mounted\n", "cpu.max": "200000 100000\n"}, 2),
        (
            {
                "own": "7:cpuset:/x\n3:cpu,cpuacct:/a\n1:name=systemd:/x\n0::/y\n",
                "cpu/a/cpu.cfs_quota_us": "150000\n",
                "cpu/a/cpu.cfs_period_us": "100000\n",
                "cpu/x/cpu.cfs_quota_us": "50000\n",
                "cpu/x/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
    ],
)
def test_the_quota_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(team, "CGROUP", tmp_path)
    monkeypatch.setattr(team, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert team._container_cores() == cores
    assert 1 <= team._default_threads.__wrapped__() <= max(1, cores)


# --- Processes -------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

FORK = """
    import os, signal, sys
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
    from test_team import check_ring, team
    if sys.argv[1] == "torch":
        import torch
        torch.set_num_threads(3)
        torch.ones(10**6).sum()
    threads = team.get_num_threads()
    print(check_ring(team.current().address, threads, 1000, 10**6), flush=True)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            ran = check_ring(team.current().address, threads, 1000, 10**6)
            print(ran, type(team.current()).__name__, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    print(check_ring(team.current().address, threads, 1000, 10**6))
"""


@needs_fork
@pytest.mark.parametrize("loaded", ["nothing", "torch"])
def test_a_forked_child_builds_a_team_of_its_own(loaded: str) -> None:
    assert python(FORK, loaded, OMP_NUM_THREADS="3").splitlines() == ["3", "3 Own", "3 Own", "3"]


@pytest.mark.parametrize("caller", ["none", "daemon"])
@pytest.mark.parametrize("loaded", ["nothing", "torch"])
def test_the_process_ends(caller: str, loaded: str) -> None:
    """With workers spinning or asleep, and with a daemon thread that keeps the team at work."""
    printed = python(
        """
        import sys, threading, time
        from test_team import check_ring, team
        if sys.argv[1] == "torch":
            import torch
        def call():
            while True:
                check_ring(team.current().address, 3, 1000)
        check_ring(team.current().address, 3, 10)
        if sys.argv[2] == "daemon":
            threading.Thread(target=call, daemon=True).start()
            time.sleep(0.2)
        print("end")
        """,
        loaded,
        caller,
        OMP_NUM_THREADS="3",
    )
    assert printed == "end"


MODULE = """
import numpy as np
from numba import njit
from fusedlstm.kernels.cpu import team

@njit
def work(thread, threads, sync, out):
    out[thread] = 1
    team.barrier(sync, threads)
    out[thread] += out.sum()

@njit(nogil=True, cache=True)
def entry(address, threads, out):
    team.fork(address, threads, work, (out,), 10**6)

def call():
    out = np.zeros(4)
    entry(team.current().address, 4, out)
"""


@pytest.mark.parametrize("loaded", ["nothing", "torch"])
def test_kernels_come_from_the_disk_in_a_second_process(tmp_path: Path, loaded: str) -> None:
    (tmp_path / "kernel.py").write_text(MODULE)
    script = """
        import sys
        if sys.argv[1] == "torch":
            import torch
        sys.path.insert(0, sys.argv[2])
        import kernel
        kernel.call()
        print(sum(kernel.entry.stats.cache_misses.values()))
    """
    cache = str(tmp_path / "cache")
    first = python(script, loaded, str(tmp_path), NUMBA_CACHE_DIR=cache, OMP_NUM_THREADS="4")
    written = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.nb?")}
    second = python(script, loaded, str(tmp_path), NUMBA_CACHE_DIR=cache, OMP_NUM_THREADS="4")
    assert (first, second) == ("1", "0")
    assert written == {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.nb?")}
