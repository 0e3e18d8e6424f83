"""The memory of simulated lanes: bounds, what was never written, and races.

A race is two accesses of one place by different lanes, one of them a write, of which neither is ordered
before the other (PTX ISA, "Memory Consistency Model"); relaxed, acquire and release accesses do not race with
each other.  Order comes from block barriers, and between blocks from a release that an acquire has seen, with
a barrier of the block before the one and behind the other.  Warp barriers order nothing here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NOBODY, SEVERAL = -1, -2  # in place of a lane


class Fault(RuntimeError):
    """A kernel does what it must not do."""


class Clocks:
    """What each block knows of the others; times are numbers of a block's barriers.

    Attributes:
        seen: (blocks, blocks); what block c did before its time seen[b, c] is ordered before what block b
            does now; seen[b, b] is its own time.
    """

    def __init__(self, blocks: int) -> None:
        self.seen = np.zeros((blocks, blocks), np.int32)
        self._acquired = np.zeros_like(self.seen)  # holds from the next barrier on
        self._released: dict[int, np.ndarray] = {}  # by address

    def meet(self, blocks: np.ndarray) -> None:
        """The threads of these blocks are at a barrier."""
        self.seen[blocks] = np.maximum(self.seen[blocks], self._acquired[blocks])
        self.seen[blocks, blocks] += 1

    def release(self, block: int, address: int) -> None:
        self._released[address] = np.maximum(self._released.get(address, 0), self.seen[block])

    def acquire(self, block: int, address: int) -> None:
        if address in self._released:
            self._acquired[block] = np.maximum(self._acquired[block], self._released[address])


class Memory:
    """Bytes, and who touched them last.

    Args:
        content: the bytes.
        valid: which of them belong to an array; None for all.
        place: bytes of the smallest number that is stored, in which races are seen.
        observers: by how many blocks it may be read; 1 for shared memory, where each block has a part.
        clocks, block_of: the order of things, and the block of each lane.
        written: whether everything has a value before the launch.
    """

    def __init__(
        self,
        content: np.ndarray,
        valid: np.ndarray | None,
        place: int,
        observers: int,
        clocks: Clocks,
        block_of: np.ndarray,
        written: bool,
    ) -> None:
        self.content, self.valid, self.place = content, valid, place
        self.clocks, self.block_of = clocks, block_of
        self.own, self.needs_value = observers == 1, not written
        places = -(-len(content) // place)
        self.writer = np.full(places, NOBODY, np.int32)
        self.write_time = np.zeros(places, np.int32)
        self.write_strong = np.zeros(places, bool)
        # of weak reads by each block, then of strong ones
        self.reader = np.full((places, 2 * observers), NOBODY, np.int32)
        self.read_time = np.zeros((places, 2 * observers), np.int32)

    def load(self, lanes: np.ndarray, at: np.ndarray, dtype: Any, count: int, strong: bool) -> np.ndarray:
        """`count` numbers for each lane, (count, lanes), that begin at byte `at`."""
        dtype = np.dtype(dtype)
        places = self._places(lanes, at, dtype.itemsize * count, "load")
        self._race(lanes, places, strong, "read")
        if self.needs_value and (self.writer[places] == NOBODY).any():
            self._fault(lanes, (self.writer[places] == NOBODY).any(0), at, "load of what was never written")
        self._note_read(lanes, places, strong)
        return self.content.view(dtype)[at // dtype.itemsize + np.arange(count)[:, None]]

    def store(self, lanes: np.ndarray, at: np.ndarray, values: np.ndarray, strong: bool) -> None:
        """Numbers of each lane, (count, lanes), to byte `at` and those behind."""
        size = values.dtype.itemsize
        places = self._places(lanes, at, size * len(values), "store")
        self._race(lanes, places, strong, "write")
        self._race_with_readers(lanes, places, strong)
        self.writer[places] = lanes
        if not strong and (self.writer[places] != lanes).any():
            self._fault(lanes, (self.writer[places] != lanes).any(0), at, "store of two lanes at once")
        self.write_time[places] = self._time(lanes)
        self.write_strong[places] = strong
        self.content.view(values.dtype)[at // size + np.arange(len(values))[:, None]] = values

    def _places(self, lanes: np.ndarray, at: np.ndarray, size: int, what: str) -> np.ndarray:
        """(places, lanes) that an access touches; vectors are not so long that they jump over a gap."""
        self._fault(lanes, at % size != 0, at, f"misaligned {what} of {size} bytes")
        outside = (at < 0) | (at + size > len(self.content))
        self._fault(lanes, outside, at, f"{what} of {size} bytes far outside of memory")
        if self.valid is not None:
            outside = ~(self.valid[at] & self.valid[at + size - 1])
            self._fault(lanes, outside, at, f"{what} of {size} bytes outside of any array")
        return at // self.place + np.arange(-(-size // self.place))[:, None]

    def _race(self, lanes: np.ndarray, places: np.ndarray, strong: bool, what: str) -> None:
        """With the last write."""
        writer = self.writer[places]
        race = (writer != NOBODY) & (writer != lanes)
        if not race.any():
            return
        race &= self.write_time[places] >= self.clocks.seen[self.block_of[lanes], self.block_of[writer]]
        if strong:
            race &= ~self.write_strong[places]
        self._fault(lanes, race.any(0), places[0] * self.place, f"race of a {what} with a write")

    def _race_with_readers(self, lanes: np.ndarray, places: np.ndarray, strong: bool) -> None:
        """A strong write with weak reads, a weak one with all."""
        blocks = self.block_of[lanes]
        seen = self.clocks.seen[blocks, blocks][:, None] if self.own else self.clocks.seen[blocks]
        columns = seen.shape[1] * (1 if strong else 2)
        reader, time = self.reader[places, :columns], self.read_time[places, :columns]
        race = (reader != NOBODY) & (reader != lanes[:, None])
        if race.any():
            race &= time >= np.tile(seen, columns // seen.shape[1])
            self._fault(lanes, race.any((0, 2)), places[0] * self.place, "race of a write with a read")

    def _note_read(self, lanes: np.ndarray, places: np.ndarray, strong: bool) -> None:
        observers = self.reader.shape[1] // 2
        column = strong * observers + (0 if self.own else self.block_of[lanes])
        time = self._time(lanes)
        reader = self.reader[places, column]
        shared = (self.read_time[places, column] == time) & (reader != NOBODY) & (reader != lanes)
        self.reader[places, column], self.read_time[places, column] = lanes, time
        shared |= self.reader[places, column] != lanes
        if shared.any():
            column = np.broadcast_to(column, places.shape)
            self.reader[places[shared], column[shared]] = SEVERAL

    def _time(self, lanes: np.ndarray) -> np.ndarray:
        blocks = self.block_of[lanes]
        return self.clocks.seen[blocks, blocks]

    def _fault(self, lanes: np.ndarray, bad: np.ndarray, at: np.ndarray, what: str) -> None:
        if bad.any():
            first = int(np.argmax(bad))
            raise Fault(f"{what}, at byte {at[first]} by lane {lanes[first]} and {bad.sum() - 1} others")
