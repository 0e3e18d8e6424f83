"""Which thread does which part of the work between two barriers.

Each thread has its own share of the pieces, whose weights stay in its cache.  Cores are rarely equally
fast: some are of another kind, some are held up by others.  So where pieces are large, a thread that has
finished its own share takes pieces of the others', and none waits at the barrier for longer than a piece
takes.  Pieces do not depend on the thread that computes them, nor do the bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .simd import inlined, write_int
from .team import LINE, add, store

TAKEN = 1 << 40  # more than there are pieces: a queue out of which nothing can be taken


class Shares(NamedTuple):
    """How the threads of a region divide their work."""

    thread: Any
    threads: Any
    queues: Any  # address of a cache line for each thread; 0 if each does its own share alone


@inlined
def share(count, part, parts):
    """The beginning and end of one of several parts, as equal as can be, of `count` things."""
    if parts == 1:  # a division takes as long as a small product
        return 0, count
    return count * part // parts, count * (part + 1) // parts


@inlined
def close_queues(queues, threads):
    """Prepare the queues: nothing is taken from a share before its owner has begun with it."""
    for thread in range(threads):
        write_int(TAKEN, queues + thread * LINE)


@inlined
def each(shares, pieces, backwards, do, arguments):
    """Call `do(piece, *arguments)` for each of the pieces, on all threads together.

    A thread goes through its own share first, from either end, and closes its queue when nothing is left.
    Barriers must stand before and after if there are queues: a share may only be begun anew when nobody takes
    pieces of it any more.
    """
    for turn in range(shares.threads if shares.queues != 0 else 1):
        owner = (shares.thread + turn) % shares.threads
        low, high = share(pieces, owner, shares.threads)
        queue = shares.queues + owner * LINE
        n = low
        if shares.queues != 0:
            if turn == 0:
                store(queue, 0)
            n = low + add(queue, 1)
        while n < high:
            do(low + high - 1 - n if backwards else n, *arguments)
            n = n + 1 if shares.queues == 0 else low + add(queue, 1)
        if turn == 0 and shares.queues != 0:
            store(queue, TAKEN)
