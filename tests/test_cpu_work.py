"""Parallel parts of kernels: compiled apart, given a tuple, run on the threads of a team."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numba import njit, types
from numba.core.errors import NumbaTypeError, TypingError

from fusedlstm.kernels.cpu import team
from fusedlstm.kernels.cpu.simd import address, read_int, write_int
from fusedlstm.kernels.cpu.team import barrier
from fusedlstm.kernels.cpu.work import Captured, Compiled, Work, captured, compiled, run

INT = types.int64


class Pair(NamedTuple):
    low: Any
    high: Any


ARGUMENTS = types.Tuple((types.int64[::1], types.boolean, types.NamedUniTuple(INT, 2, Pair), types.float32))


def note(thread, threads, sync, arguments):
    """Each thread writes what it was given to a row of its own, then counts how many did before the
    barrier."""
    rows, flag, pair, number = captured(arguments)
    place = address(rows) + thread * 64
    write_int(thread + 1, place)
    write_int(pair.low if flag else pair.high, place + 8)
    write_int(np.int64(number * 2), place + 16)
    barrier(sync, threads)
    seen = 0
    for other in range(threads):
        seen += read_int(address(rows) + other * 64) == other + 1
    write_int(seen, place + 24)
    write_int(threads, place + 32)


@pytest.fixture(scope="module")
def made() -> Compiled:
    return compiled(note, ARGUMENTS)


@pytest.fixture(scope="module")
def entry(made: Compiled) -> Any:
    def call(team, threads, patience, work, rows, flag, low, high, number):
        run(team, threads, patience, work, (rows, flag, Pair(low, high), np.float32(number)))

    signature = (INT, INT, INT, made.type, types.int64[::1], types.boolean, INT, INT, types.float64)
    function = njit(call, nogil=True)
    function.compile(signature)
    return function.overloads[signature].entry_point


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 6])
def test_every_thread_gets_the_arguments(made: Compiled, entry: Any, threads: int, flag: bool) -> None:
    """All threads that run meet at a barrier; there are as many as each was told."""
    for _ in range(20):
        rows = np.zeros((threads, 8), np.int64)
        home = team.current().address if threads > 1 else 0
        entry(home, threads, 1000, made.address, rows.reshape(-1), flag, 5, 2**40, 1.5)
        running = rows[0, 4]
        assert 1 <= running <= threads
        came = rows[:running]
        assert np.array_equal(came[:, 0], np.arange(running) + 1)
        assert (came[:, 1] == (5 if flag else 2**40)).all()
        assert (came[:, 2] == 3).all()
        assert (came[:, 3:5] == running).all()
        assert not rows[running:].any()


def test_no_team_is_one_thread(made: Compiled, entry: Any) -> None:
    rows = np.zeros((4, 8), np.int64)
    entry(0, 4, 1000, made.address, rows.reshape(-1), True, 1, 2, 0.0)
    assert rows[0].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert not rows[1:].any()


def test_arguments_of_other_types_are_refused(made: Compiled) -> None:
    """Else the parallel part would read memory that is laid out in another way."""

    def wrong(work, rows):
        run(0, 1, 0, work, (rows, 1, 2))

    with pytest.raises((TypingError, NumbaTypeError), match="the work takes"):
        njit(wrong).compile((made.type, types.int64[::1]))


def test_types_tell_arguments_apart() -> None:
    other = types.Tuple((INT,))
    assert Work(ARGUMENTS) == Work(ARGUMENTS)
    assert len({Work(ARGUMENTS), Work(other), Captured(ARGUMENTS), Captured(other)}) == 4


def test_addresses_stay_where_they_are(made: Compiled) -> None:
    assert made.address == made.addresses.ctypes.data
    assert made.addresses[1] == made.function.address
    assert made.addresses.all()
