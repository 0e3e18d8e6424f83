"""A CUDA simulator whose blocks run at the same time: grid barriers, warp collectives, shuffled schedules.

Numba's simulator runs one block after the other, each CUDA thread an operating-system thread, so a
kernel whose blocks wait for each other cannot run, and values of a warp cannot be exchanged.  Here
each CUDA thread is a greenlet that runs until it reaches a barrier.  That gives:

* barriers of the block and the warp, memory that is polled, hence persistent kernels over many
  blocks, shuffles, and stand-ins for collectives such as mma.sync;
* divergence found: if live threads wait at different barriers, or all of them poll in vain, the run
  stops and says who waits where;
* races found: between barriers the threads run in an order drawn from a seed.  Code that lacks a
  barrier gives different results for different seeds.

Use it in a process that was started with NUMBA_ENABLE_CUDASIM=1.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.cuda.simulator import kernel as simulated
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule, FakeCUDAShared

PATIENCE = 1000  # rounds in which every thread only polls, before the run counts as stuck


class Lane(greenlet):
    """One CUDA thread.  `waits_at` names the barrier it has reached, None while it can run."""

    def __init__(
        self, run: Callable[[], None], block: int, block_index: Any, thread_index: Any, rank: int
    ) -> None:
        super().__init__(run)
        self.block, self.rank, self.warp = block, rank, (block, rank // 32)
        self.blockIdx, self.threadIdx = Dim3(*block_index), Dim3(*thread_index)
        self.waits_at: tuple[str, Any] | None = None
        self.value: Any = None

    def wait(self, barrier: tuple[str, Any]) -> None:
        self.waits_at = barrier
        self.parent.switch()


class Grid:
    """The threads of one launch."""

    def __init__(self, grid_dim: Any, block_dim: Any, dynamic_shared: int, seed: int) -> None:
        self.order = random.Random(seed)
        self.grid_dim, self.block_dim = grid_dim, block_dim
        self.shared = [FakeCUDAShared(dynamic_shared) for _ in np.ndindex(*grid_dim)]
        for memory in self.shared:
            memory._dynshared[:] = 0xFF - 256  # NaN
        self.lanes: list[Lane] = []
        self.members: dict[tuple[str, Any], list[Lane]] = {}
        self.results: dict[Any, Any] = {}

    def run(self, function: Callable[..., None], args: Any) -> None:
        for block, block_index in enumerate(np.ndindex(*self.grid_dim)):
            # x runs fastest, as on the device
            for rank, reversed_index in enumerate(np.ndindex(*self.block_dim[::-1])):
                lane = Lane(lambda: function(*args), block, block_index, reversed_index[::-1], rank)
                self.lanes.append(lane)
                for barrier in (("block", block), ("warp", lane.warp)):
                    self.members.setdefault(barrier, []).append(lane)
        idle = 0
        while live := [lane for lane in self.lanes if not lane.dead]:
            ready = [lane for lane in live if lane.waits_at is None]
            if ready:
                self.order.shuffle(ready)
                for lane in ready:
                    lane.switch()
            else:
                idle = 0 if self.release(live) else idle + 1
                if idle > PATIENCE:
                    self.stop(live, "threads poll what nobody writes")

    def release(self, live: list[Lane]) -> bool:
        """Open every barrier that all of its live members have reached; wake pollers only if none is."""
        opened = False
        for barrier in {lane.waits_at for lane in live}:
            assert barrier is not None
            if barrier[0] != "poll":
                members = [lane for lane in self.members[barrier] if not lane.dead]
                if all(lane.waits_at == barrier for lane in members):
                    opened = True
                    for lane in members:
                        lane.waits_at = None
        if not opened:
            pollers = [lane for lane in live if lane.waits_at == ("poll", 0)]
            if not pollers:
                self.stop(live, "threads wait at different barriers")
            for lane in pollers:
                lane.waits_at = None
        return opened

    def stop(self, live: list[Lane], why: str) -> None:
        where = sorted({f"{lane.waits_at} in block {lane.block}" for lane in live})
        raise RuntimeError(f"{why}: " + "; ".join(where[:6]))


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
        getcurrent().wait(("poll", 0))

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
def concurrent_blocks(seed: int = 0) -> Iterator[None]:
    """Inside, simulated kernels run all their blocks at once."""
    before = simulated.FakeCUDAKernel.__call__
    running: list[Module] = []

    def launch(self: Any, *args: Any) -> Any:
        if running:  # a device function
            return self.fn(*args)
        grid = Grid(self.grid_dim, self.block_dim, self.dynshared_size, seed)
        running.append(Module(grid))
        kernels = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("fusedlstm.kernels.cuda") or module.__dict__ is self.fn.__globals__
            if getattr(module, "cuda", None) is cuda
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
