"""Shares of the work: every piece is done once, by any thread, and a slow thread is helped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from fusedlstm.kernels.cpu import team
from fusedlstm.kernels.cpu.entry import aligned
from fusedlstm.kernels.cpu.shares import LINE, Shares, close_queues, each, share
from fusedlstm.kernels.cpu.team import barrier, fork

ROUNDS = 50


@pytest.mark.parametrize("count", [0, 1, 2, 5, 41, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_are_equal_and_cover_all(count: int, parts: int) -> None:
    ranges = [share(count, part, parts) for part in range(parts)]
    assert [begin for begin, _ in ranges] == [0] + [end for _, end in ranges[:-1]]
    assert ranges[-1][1] == count
    sizes = [end - begin for begin, end in ranges]
    assert max(sizes) - min(sizes) <= 1


@njit
def hold_up(thread, delay):
    """Make the first thread slow."""
    if thread == 0:
        for _ in range(delay):
            team._pause()


@njit
def note(piece, who, order, taken, thread, delay):
    """Note who does a piece, and when."""
    hold_up(thread, delay)
    who[piece] += thread + 1
    order[thread, taken[thread]] = piece
    taken[thread] += 1


@njit
def work(thread, threads, sync, queues, pieces, backwards, delay, who, order, taken):
    shares = Shares(thread, threads, queues)
    for n in range(ROUNDS):
        hold_up(thread, delay)
        each(shares, pieces[n], backwards, note, (who[n], order[n], taken[n], thread, delay))
        barrier(sync, threads)


@njit(nogil=True)
def run(home, threads, helped, pieces, backwards, delay, who, order, taken):
    space = np.empty((threads + 1) * LINE, np.uint8)
    queues = aligned(space) if helped else 0
    if helped:
        close_queues(queues, threads)
    fork(home, threads, work, (queues, pieces, backwards, delay, who, order, taken), 100_000)


def done(threads: int, pieces: Any, helped: bool, backwards: bool = False, delay: int = 0) -> Any:
    """Who did each piece (1, 2, ...), the order in which each thread did its own, and how many.

    There are so many pieces in each round, or one number for all.
    """
    pieces = np.broadcast_to(pieces, ROUNDS).copy()
    who = np.zeros((ROUNDS, pieces.max()), np.int64)
    order = np.full((ROUNDS, threads, pieces.max()), -1)
    taken = np.zeros((ROUNDS, threads), np.int64)
    home = team.current().address if threads > 1 else 0
    run(home, threads, helped, pieces, backwards, delay, who, order, taken)
    return who, order, taken


def done_by_two(pieces: int, helped: bool, **options: Any) -> Any:
    """The same with two threads that both came, which on a busy machine can take a few tries."""
    for _ in range(100):
        who, order, taken = done(2, pieces, helped, **options)
        if taken[:, 1].any():
            return who, order, taken
    pytest.fail("the second thread never came")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("pieces", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_piece_is_done_once(threads: int, pieces: int, backwards: bool) -> None:
    who, order, taken = done(threads, pieces, True, backwards)
    assert (taken.sum(1) == pieces).all()
    for n in range(ROUNDS):
        did = order[n][order[n] >= 0]
        assert sorted(did) == list(range(pieces))
        for thread in range(threads):
            assert (who[n, order[n, thread, : taken[n, thread]]] == thread + 1).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_without_queues_each_does_its_own_share_in_order(backwards: bool) -> None:
    _, order, _ = done_by_two(7, False, backwards=backwards)
    for n in range(ROUNDS):
        for thread in range(2):
            low, high = share(7, thread, 2)
            own = list(range(low, high))
            assert list(order[n, thread, : high - low]) == (own[::-1] if backwards else own)


def test_another_number_of_pieces_each_time() -> None:
    """What is left of a queue must not look like one that has been begun."""
    pieces = np.random.default_rng(0).choice([1, 2, 9, 40], ROUNDS)
    for delay in (0, 5_000):
        who, _, taken = done_by_two(pieces, True, delay=delay)
        assert (taken.sum(1) == pieces).all()
        for n in range(ROUNDS):
            assert (who[n, : pieces[n]] > 0).all()
            assert (who[n, pieces[n] :] == 0).all()


def test_a_slow_thread_is_helped() -> None:
    """It would do 32 of 64 pieces; each takes it far longer than the other."""
    for _ in range(100):  # on a busy machine both may run in turn, and never together
        _, _, taken = done_by_two(64, True, delay=20_000)
        if taken[:, 0].sum() < taken[:, 1].sum():
            return
    pytest.fail("each thread always did its own share alone")
