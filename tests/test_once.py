"""What is made once: one object for all threads, and nothing half made in a forked child."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fusedlstm
from fusedlstm import host, layers, once
from fusedlstm.kernels.cpu import team
from fusedlstm.once import lazy

PACKAGE = Path(fusedlstm.__file__).parent
ROOMS = [PACKAGE, Path(team.__file__).parents[1]]
LOCKS = {"making": once.making, "weights": layers._replacing, "tables": host._keeping, "team": team._lock}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `count` threads get that call `work` at the same time."""
    start = threading.Barrier(count)

    def call(_: int) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def child(work: Callable[[], bool]) -> bool:
    """What `work` gives in a forked child, which must end soon."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1] == 0


# --- once ------------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_are_given_the_same_object() -> None:
    calls = []

    @once.once
    def slow(number: int) -> object:
        calls.append(number)
        time.sleep(0.05)
        return object()

    assert len(set(map(id, at_once(8, lambda: slow(1))))) == 1
    assert slow(2) is not slow(1)
    assert calls == [1, 2]


def test_arguments_by_name_and_what_forgets() -> None:
    @once.once
    def made(number: int, *, other: int = 0) -> object:
        """What it says."""
        return object()

    assert made(1, other=2) is made(1, other=2)
    assert made(1) is not made(1, other=2)
    before = made(1)
    made.cache_clear()
    assert made(1) is not before
    assert (made.__name__, made.__doc__) == ("made", "What it says.")


def test_what_could_not_be_made_is_tried_again() -> None:
    results = iter([None, object()])

    @once.once
    def made() -> object:
        result = next(results)
        if result is None:
            raise ValueError("not yet")
        return result

    with pytest.raises(ValueError, match="not yet"):
        made()
    assert made() is made()


def test_one_may_ask_for_another() -> None:
    @once.once
    def inner() -> object:
        return object()

    @once.once
    def outer() -> tuple[object, object]:
        return inner(), inner()

    assert outer() == (inner(), inner())


# --- lazy ------------------------------------------------------------------------------------------------


class Slow:
    @lazy
    def value(self) -> object:
        time.sleep(0.05)
        return object()


def test_a_lazy_value_is_made_when_it_is_asked_for_and_stays() -> None:
    slow = Slow()
    assert not vars(slow)
    assert slow.value is slow.value
    assert isinstance(Slow.value, lazy)


def test_all_threads_see_one_lazy_value() -> None:
    slow = Slow()
    assert len(set(map(id, at_once(4, lambda: slow.value)))) == 1


# --- forks -----------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("name", LOCKS)
def test_a_child_finds_no_lock_held(name: str) -> None:
    lock, held = LOCKS[name], threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            time.sleep(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert child(lambda: lock.acquire(timeout=1))
    holder.join()
    assert lock.acquire(timeout=1)
    lock.release()


@needs_fork
def test_a_fork_waits_until_a_thing_is_made() -> None:
    begun = threading.Event()

    @once.once
    def slow() -> int:
        begun.set()
        time.sleep(0.2)
        return os.getpid()

    maker = threading.Thread(target=slow)
    maker.start()
    begun.wait()
    parent = os.getpid()
    assert child(lambda: slow() == parent)
    maker.join()


@needs_fork
def test_a_fork_by_who_makes_something() -> None:
    @once.once
    def forking() -> bool:
        return child(lambda: other() == 1)

    @once.once
    def other() -> int:
        return 1

    assert forking()
    assert other() == 1


def test_there_is_no_other_way_to_make_things_once() -> None:
    """Each of these lets two threads make two, or is held for ever in a child that is forked meanwhile."""
    other = re.compile(r"\bcached_property\b|import .*\bcache\b|functools\.cache\b|\bR?Lock\(")
    found = [
        f"{path.name}: {line}"
        for room in ROOMS
        for path in room.rglob("*.py")
        if path.name != "once.py"
        for line in path.read_text().splitlines()
        if other.search(line)
    ]
    assert found == []
