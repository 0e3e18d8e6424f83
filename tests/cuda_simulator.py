"""A CUDA simulator whose blocks run at the same time: grid barriers, warp collectives, shuffled schedules.

Numba's simulator runs one block after the other, each CUDA thread an operating-system thread, so a
kernel whose blocks wait for each other cannot run, and values of a warp cannot be exchanged.  Here
each CUDA thread is a greenlet that runs until it reaches a barrier.  That gives:

* barriers of the block and the warp, memory that is polled, hence persistent kernels over many
  blocks, shuffles, and stand-ins for collectives such as mma.sync;
* divergence found: if live threads wait at different barriers, or poll what nobody writes, the run
  stops and says who waits where;
* races found: a seed decides which threads are ahead of others, as far as barriers let them.  Code
  that lacks a barrier gives different results for different seeds.

Use it in a process that was started with NUMBA_ENABLE_CUDASIM=1.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.cuda.simulator import kernel as simulated
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule, FakeCUDAShared

POLL = ("poll", 0)  # where a thread waits that has read memory in vain
PATIENCE = 100  # rounds in which all threads that can run only poll, before the launch counts as stuck


class Stuck(RuntimeError):
    """The threads of a launch cannot go on."""


class Lane(greenlet):
    """One CUDA thread.  `waits_at` names the barrier it has reached, None while it can run."""

    def __init__(
        self, run: Callable[[], None], place: int, block: int, block_index: Any, thread_index: Any, rank: int
    ) -> None:
        super().__init__(run)
        self.gr_context = copy_context()  # NumPy's error state
        self.place, self.block, self.rank, self.warp = place, block, rank, (block, rank // 32)
        self.blockIdx, self.threadIdx = Dim3(*block_index), Dim3(*thread_index)
        self.waits_at: tuple[str, Any] | None = None
        self.value: Any = None

    def wait(self, barrier: tuple[str, Any]) -> None:
        self.waits_at = barrier
        self.parent.switch()


class Grid:
    """The threads of one launch.

    The thread with the highest priority runs until it reaches a barrier that others have not; now
    and then priorities are drawn anew.  So some blocks, and some threads of a block, are far ahead
    of others, as far as barriers let them.  A straggler runs only when no other can.
    """

    def __init__(
        self, grid_dim: Any, block_dim: Any, dynamic_shared: int, seed: int, straggler: int | None
    ) -> None:
        self.random, self.straggler = random.Random(seed), straggler
        self.grid_dim, self.block_dim = grid_dim, block_dim
        self.shared = [FakeCUDAShared(dynamic_shared) for _ in np.ndindex(*grid_dim)]
        for memory in self.shared:
            memory._dynshared[:] = -1  # NaN
        self.lanes: list[Lane] = []
        self.members: dict[tuple[str, Any], list[Lane]] = {}
        self.results: dict[Any, Any] = {}
        self.ready: list[tuple[float, int]] = []  # a heap: priority, and place among the lanes
        self.polling: list[int] = []  # lanes that may run once another has

    def run(self, function: Callable[..., None], args: Any) -> None:
        for block, block_index in enumerate(np.ndindex(*self.grid_dim)):
            # x runs fastest, as on the device
            for rank, reversed_index in enumerate(np.ndindex(*self.block_dim[::-1])):
                place, thread_index = len(self.lanes), reversed_index[::-1]
                lane = Lane(lambda: function(*args), place, block, block_index, thread_index, rank)
                self.lanes.append(lane)
                for barrier in (("block", block), ("warp", lane.warp)):
                    self.members.setdefault(barrier, []).append(lane)
        self.draw_priorities()
        self.wake(range(len(self.lanes)))
        patience = PATIENCE
        while self.ready or (self.polling and patience):
            if not self.ready:
                patience -= 1
                self.wake_pollers()
            lane = self.lanes[heapq.heappop(self.ready)[1]]
            lane.waits_at = None
            lane.switch()
            if lane.waits_at == POLL:
                self.polling.append(lane.place)
                continue
            patience = PATIENCE
            self.wake_pollers()
            for barrier in [lane.waits_at] if lane.waits_at else [("block", lane.block), ("warp", lane.warp)]:
                self.open_if_complete(barrier)
            if self.random.random() < 0.02:
                self.draw_priorities()
        if live := [lane for lane in self.lanes if not lane.dead]:
            where = sorted({f"at {lane.waits_at} in block {lane.block}" for lane in live})
            raise Stuck("threads wait for what does not come: " + "; ".join(where[:6]))

    def draw_priorities(self) -> None:
        speed = [self.random.random() for _ in self.shared]
        self.priority = [speed[lane.block] + 0.3 * self.random.random() for lane in self.lanes]
        if self.straggler is not None:
            self.priority[self.straggler] = math.inf
        self.ready = [(self.priority[place], place) for _, place in self.ready]
        heapq.heapify(self.ready)

    def wake(self, places: Iterable[int]) -> None:
        for place in places:
            heapq.heappush(self.ready, (self.priority[place], place))

    def wake_pollers(self) -> None:
        self.wake(self.polling)
        self.polling = []

    def open_if_complete(self, barrier: tuple[str, Any]) -> None:
        """Let all members of a barrier go on if all that live have reached it."""
        waiting = [lane for lane in self.members[barrier] if not lane.dead]
        if all(lane.waits_at == barrier for lane in waiting):
            for lane in waiting:
                lane.waits_at = None
            self.wake(lane.place for lane in waiting)


class Module(FakeCUDAModule):
    """What a kernel sees as `cuda`."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid.grid_dim, grid.block_dim, 0)
        self._grid = grid

    threadIdx = property(lambda self: getcurrent().threadIdx)
    blockIdx = property(lambda self: getcurrent().blockIdx)
    laneid = property(lambda self: getcurrent().rank % 32)
    shared = property(lambda self: self._grid.shared[getcurrent().block])

    def syncthreads(self) -> None:
        getcurrent().wait(("block", getcurrent().block))

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        getcurrent().wait(("warp", getcurrent().warp))

    def nanosleep(self, nanoseconds: int) -> None:
        getcurrent().wait(POLL)

    def collective(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Every lane of the warp gives `value`; each gets its entry of combine(values)."""
        me, results = getcurrent(), self._grid.results
        me.value = value
        self.syncwarp()
        if me.warp not in results:
            results[me.warp] = combine([lane.value for lane in self._grid.members["warp", me.warp]])
        result = results[me.warp][me.rank % 32]
        self.syncwarp()
        results.pop(me.warp, None)
        return result

    def shfl_xor_sync(self, mask: int, value: Any, bits: int) -> Any:
        return self.collective(value, lambda values: [values[n ^ bits] for n in range(len(values))])


@contextmanager
def concurrent_blocks(seed: int = 0, straggler: int | None = None) -> Iterator[None]:
    """Inside, simulated kernels run all their blocks at once; `straggler` is the number of a thread."""
    before = simulated.FakeCUDAKernel.__call__
    running: list[Module] = []

    def launch(self: Any, *args: Any) -> Any:
        if running:  # a device function
            return self.fn(*args)
        args = [getattr(arg, "_ary", arg) for arg in args]  # arrays as such, which are faster
        grid = Grid(self.grid_dim, self.block_dim, self.dynshared_size, seed, straggler)
        running.append(Module(grid))
        kernels = [
            module
            for name, module in list(sys.modules.items())
            if (name.startswith("fusedlstm.kernels.cuda") or module.__dict__ is self.fn.__globals__)
            and getattr(module, "cuda", None) is cuda
        ]
        for module in kernels:
            module.cuda = running[0]  # type: ignore[attr-defined]
        try:
            with np.errstate(all="ignore"):
                grid.run(self.fn, args)
        finally:
            for module in kernels:
                module.cuda = cuda  # type: ignore[attr-defined]
            running.clear()
        return None

    simulated.FakeCUDAKernel.__call__ = launch
    try:
        yield
    finally:
        simulated.FakeCUDAKernel.__call__ = before
