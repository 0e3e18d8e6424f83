# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="call-arg,var-annotated"
"""A team of threads that runs one Numba function together, with a spin barrier between its phases.

In a kernel:

    @njit
    def work(thread, threads, sync, x, y):      # thread = 0 ... threads - 1; returns nothing
        ...
        barrier(sync, threads)                  # all threads meet here, any number of times
        ...

    @njit(nogil=True, cache=True)
    def entry(team, threads, x, y):
        fork(team, threads, work, (x, y))       # on 1 to `threads` threads; returns when all are done

and around it, in Python, `entry(current().address, get_num_threads(), x, y)`.

Two pools of threads in one process ruin each other: the idle threads of one spin for a while on the
cores that the other needs.  So a kernel runs on the OpenMP team that the process already has (that of
PyTorch, scikit-learn or MKL), and on a team of our own only where there is none, or in a forked child,
where GNU OpenMP hangs.  Whichever team it is, fewer threads may come than were asked for; each kernel is
told how many run.

Everything that native code must know about a team stands in its control block, an array of 64-bit words
whose address is given at run time, so that compiled kernels can be cached on disk.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaTypeError
from numba.extending import intrinsic

from fusedlstm.once import fork_lock, once

from .compile import entry_point, kept

__all__ = ["ALONE", "Team", "barrier", "current", "describe", "fork", "get_num_threads", "set_num_threads"]

LINE = 64  # bytes of a cache line: what different threads write is kept on different lines

# The region: what the threads of one `fork` share.  It stands on the stack of the thread that forks.
ARRIVED, PHASE = 0, LINE  # of the barrier: arrivals at the present phase, and the number of phases done
FUNCTION, ARGUMENTS, TEAM, WANTED, CORE, FAILED = (2 * LINE + 8 * n for n in range(6))
REGION_BYTES = 3 * LINE

# The control block of any team, of an OpenMP team (addresses of functions), and of our own.
KIND = 0
THREAD_NUM, NUM_THREADS, MAX_THREADS, FORK, LOCATION, GLOBAL_NUM, PUSH_NUM = (8 + 8 * n for n in range(7))
WORKERS, SPINS_PER_US, CALLER_CORE = 8, 16, 24
BUSY = LINE  # held by the thread that runs a region on the team
DOOR = 2 * LINE  # generation << 32 | wanted threads << 16 | joined workers; none is wanted once it is shut
START, REGION = 3 * LINE, 3 * LINE + 8  # generation << 16 | threads that run
FINISHED = 4 * LINE  # workers that are done
DESKS = 5 * LINE  # a line for each worker:
ASLEEP, LOCK = 0, 8  # whether it sleeps, and the lock on which it does

GOMP, KMPC, OWN = 1, 2, 3  # kinds
LEAVE = -1  # at the door: the team is dissolved

YIELD_AFTER = 1000  # spins, after which an idle worker offers its core to others: some 20 microseconds
SLEEP_AFTER = 5000  # after which a thread that waits for others of its region sleeps for a moment
OFFER_EVERY = 200  # spins, in which a caller that waits for sleepers does so
IDLE_YIELDS = 10_000  # after which an idle worker of our own team sleeps: some milliseconds
MOST_THREADS = 4096
CPU_SET_BYTES = 128  # of glibc's cpu_set_t
PATIENCE_US = 100  # for which workers that are late are waited for, unless `fork` is told otherwise


# --- What Numba lacks: atomic operations, calls through an address, C functions -------------------------

_I64 = ir.IntType(64)
_C = {"i32": ir.IntType(32), "i64": _I64, "void": ir.VoidType()}

if sys.platform == "win32":
    _yield_core = types.ExternalFunction("SwitchToThread", types.int32())
    _sleep = types.ExternalFunction("Sleep", types.void(types.uint32))
else:
    _yield_core = types.ExternalFunction("sched_yield", types.int32())
    _sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
# Python's own lock: a semaphore on every platform, which needs neither the GIL nor its owner to release.
_acquire_lock = types.ExternalFunction("PyThread_acquire_lock", types.int32(types.int64, types.int32))
_release_lock = types.ExternalFunction("PyThread_release_lock", types.void(types.int64))


def _word(builder, address):
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def _load(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(_word(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(typingctx, address, value):
    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], _word(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _read_modify_write(operation):
    @intrinsic
    def atomic(typingctx, address, value):
        def codegen(context, builder, sig, args):
            return builder.atomic_rmw(operation, _word(builder, args[0]), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return atomic


add, _exchange = _read_modify_write("add"), _read_modify_write("xchg")


@intrinsic
def _replace(typingctx, address, old, new):
    """Put `new` where `old` stands; whether it stood there."""

    def codegen(context, builder, sig, args):
        result = builder.cmpxchg(_word(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that this is a spin loop."""

    def codegen(context, builder, sig, args):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            name, operands = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            name, operands = "llvm.aarch64.hint", [ir.Constant(_C["i32"], 1)]  # yield
        else:
            return context.get_dummy_value()
        function = ir.FunctionType(_C["void"], [o.type for o in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), operands)
        return context.get_dummy_value()

    return types.void(), codegen


def _call(result, *parameters, variadic=False):
    """A call of the C function at an address, with 64-bit integers cut to the types given."""

    @intrinsic
    def call(typingctx, address, arguments):
        def codegen(context, builder, sig, args):
            values = cgutils.unpack_tuple(builder, args[1])
            values = [builder.trunc(v, _C[p]) if p == "i32" else v for v, p in zip(values, parameters)]
            function = ir.FunctionType(_C[result], [_C[p] for p in parameters], var_arg=variadic)
            value = builder.call(builder.inttoptr(args[0], function.as_pointer()), values)
            return context.get_dummy_value() if result == "void" else builder.sext(value, _I64)

        returned = types.void if result == "void" else types.int64
        return returned(types.int64, types.UniTuple(types.int64, len(parameters))), codegen

    return call


_call_query = _call("i32")  # int omp_get_thread_num(void) and its like
_call_global_num = _call("i32", "i64")
_call_push_num = _call("void", "i64", "i32", "i32")
_call_gomp_parallel = _call("void", "i64", "i64", "i32", "i32")
_call_kmpc_fork = _call("void", "i64", "i32", "i64", "i64", variadic=True)
_call_function = _call("void", "i64", "i64", "i64")


def _c_function(count):
    """The address of `void f(int64 x count)`, which calls `function(*its arguments, *captured)`.

    The last argument is a region, which gives the address of the captured tuple.
    """

    @intrinsic
    def c_function(typingctx, function, captured):
        arguments = (types.int64,) * count + captured.types
        inner = typingctx.resolve_function_type(function, arguments, {})
        if inner is None or inner.return_type != types.none:
            raise NumbaTypeError(f"{function} must return nothing")

        def codegen(context, builder, sig, args):
            compiled = function.dispatcher.overloads[inner.args]
            context.active_code_library.add_linking_library(compiled.library)
            name = f"{compiled.fndesc.mangled_name}.c{count}"
            wrapper = builder.module.globals.get(name)
            if wrapper is None:
                wrapper = ir.Function(builder.module, ir.FunctionType(_C["void"], [_I64] * count), name)
                wrapper.linkage = "internal"
                body = ir.IRBuilder(wrapper.append_basic_block("entry"))
                values, region = list(wrapper.args), wrapper.args[-1]
                if captured.types:
                    at = body.load(_word(body, body.add(region, ir.Constant(_I64, ARGUMENTS))))
                    pointer = body.inttoptr(at, context.get_value_type(captured).as_pointer())
                    values += cgutils.unpack_tuple(body, body.load(pointer))
                status, _ = context.call_internal_no_propagate(body, compiled.fndesc, inner, values)
                with body.if_then(status.is_error):
                    failed = _word(body, body.add(region, ir.Constant(_I64, FAILED)))
                    body.store_atomic(ir.Constant(_I64, 1), failed, "seq_cst", 8)
                body.ret_void()
            return builder.ptrtoint(wrapper, _I64)

        return types.int64(function, captured), codegen

    return c_function


_c_function_1, _c_function_3 = _c_function(1), _c_function(3)


@intrinsic
def _on_stack(typingctx, value):
    """The address of a copy of `value` in the present stack frame."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(cgutils.alloca_once_value(builder, args[0]), _I64)

    return types.int64(value), codegen


@intrinsic
def _new_region(typingctx):
    """The address of a zeroed region in the present stack frame, at the start of a cache line."""

    def codegen(context, builder, sig, args):
        region = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), REGION_BYTES))
        region.align = LINE
        cgutils.memset(builder, region, ir.Constant(_I64, REGION_BYTES), 0)
        return builder.ptrtoint(region, _I64)

    return types.int64(), codegen


# --- In kernels ------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _wait(spins):
    """One turn of a loop that waits for another thread of the region.

    Where others use the cores, that thread may have none.  It is given ours if we sleep: to yield would keep
    both waiting for as long as the others may run, at each barrier anew.
    """
    if spins < SLEEP_AFTER:
        _pause()
    else:
        _sleep(1)
    return spins + 1


@njit(error_model="numpy")
def _idle(spins):
    """One turn of a loop that waits for the next region, which may come soon."""
    if spins < YIELD_AFTER:
        _pause()
    else:
        _yield_core()
    return spins + 1


@njit(error_model="numpy")
def barrier(sync, threads):
    """Wait until all `threads` of the region are here; what they wrote before is then seen by all.

    If a thread has failed nobody waits any more, and `fork` raises.
    """
    if threads == 1:
        return
    phase = _load(sync + PHASE)
    if add(sync + ARRIVED, 1) == threads - 1:
        store(sync + ARRIVED, 0)
        store(sync + PHASE, phase + 1)
        return
    spins = 0
    while _load(sync + PHASE) == phase:
        spins = _wait(spins)
        if spins > SLEEP_AFTER and _load(sync + FAILED):
            return


if sys.platform == "linux":
    _core = types.ExternalFunction("sched_getcpu", types.int32())
    _get_affinity = types.ExternalFunction(
        "sched_getaffinity", types.int32(types.int32, types.int64, types.int64)
    )
    _set_affinity = types.ExternalFunction(
        "sched_setaffinity", types.int32(types.int32, types.int64, types.int64)
    )

    @njit(error_model="numpy")
    def _step_aside(core):
        """Move to another core if we are on `core`, that of the thread that forked.

        Some schedulers, of virtual machines above all, wake a worker on the core that woke it, where it
        would wait for milliseconds until the other is preempted, with other cores idle.
        """
        if _core() != core:
            return
        allowed = np.zeros(CPU_SET_BYTES // 8, np.uint64)
        if _get_affinity(0, CPU_SET_BYTES, allowed.ctypes.data) < 0:
            return
        others = allowed.copy()
        others[core // 64] &= ~(np.uint64(1) << np.uint64(core % 64))
        if _set_affinity(0, CPU_SET_BYTES, others.ctypes.data) == 0:  # unless there is no other
            _set_affinity(0, CPU_SET_BYTES, allowed.ctypes.data)
        others[0] = allowed[0]  # Numba frees an array after its last use, also where its address is in use

else:

    @njit
    def _core():
        return -1

    @njit
    def _step_aside(core):
        pass


@njit(error_model="numpy")
def _openmp_member(region):
    """What each thread of an OpenMP team runs."""
    team = _load(region + TEAM)
    thread = _call_query(_load(team + THREAD_NUM), ())
    threads = min(_call_query(_load(team + NUM_THREADS), ()), _load(region + WANTED))
    if thread < threads:
        if thread > 0:
            _step_aside(_load(region + CORE))
        _call_function(_load(region + FUNCTION), (thread, threads, region))


@njit(error_model="numpy")
def _kmpc_member(global_thread, thread, region):
    _openmp_member(region)


@njit(error_model="numpy")
def _run_openmp(team, threads, region):
    store(region + CORE, _core())
    # Ask for the whole team, since GNU OpenMP ends the threads that a smaller one has no use for.
    size = max(threads, _call_query(_load(team + MAX_THREADS), ()))
    if _load(team + KIND) == GOMP:
        _call_gomp_parallel(_load(team + FORK), (_c_function_1(_openmp_member, ()), region, size, 0))
    else:
        location = _load(team + LOCATION)
        caller = _call_global_num(_load(team + GLOBAL_NUM), (location,))
        _call_push_num(_load(team + PUSH_NUM), (location, caller, size))
        member = _c_function_3(_kmpc_member, ())
        _call_kmpc_fork(_load(team + FORK), (location, 1, member, region))


@njit(error_model="numpy")
def _wake(team, workers):
    for worker in range(workers):
        desk = team + DESKS + worker * LINE
        if _load(desk + ASLEEP) and _replace(desk + ASLEEP, 1, 0):
            _release_lock(_load(desk + LOCK))


@njit(error_model="numpy")
def _run_own(team, threads, region, patience):
    """Run a region on our own team, unless it is busy; whether it was run."""
    if not _replace(team + BUSY, 0, 1):
        return False
    wanted = min(threads, _load(team + WORKERS) + 1)
    generation = ((_load(team + DOOR) >> 32) + 1) & 0x7FFFFFFF
    store(team + REGION, region)
    store(team + CALLER_CORE, _core())
    store(team + FINISHED, 0)
    _exchange(team + DOOR, generation << 32 | wanted << 16)
    _wake(team, wanted - 1)
    spins = patience * _load(team + SPINS_PER_US)
    while spins > 0 and (_load(team + DOOR) & 0xFFFF) < wanted - 1:
        spins -= 1
        if spins % OFFER_EVERY == 0:  # to a worker that was woken on this core
            _yield_core()
        else:
            _pause()
    joined = _exchange(team + DOOR, generation << 32) & 0xFFFF
    store(team + START, generation << 16 | (joined + 1))
    _call_function(_load(region + FUNCTION), (0, joined + 1, region))
    spins = 0
    while _load(team + FINISHED) < joined:
        spins = _wait(spins)
    store(team + BUSY, 0)
    return True


@kept
def _run(team, threads, region, patience):
    """Run a region on a team; false if it has no thread to spare."""
    if _load(team + KIND) == OWN:
        return _run_own(team, threads, region, patience)
    _run_openmp(team, threads, region)
    return True


@njit(error_model="numpy", forceinline=True)  # passing `work` to a real call would make kernels uncacheable
def fork(team, threads, work, args, patience=PATIENCE_US):
    """Call `work(thread, running, sync, *args)` on `running` threads at once, 1 <= running <= threads.

    `team` is the address of a team, 0 for none.  `patience` is the time in microseconds for which
    threads that sleep are waited for: about half of what the work takes is best.  An error in `work`
    is raised as it is when one thread runs, else as RuntimeError.
    """
    if threads > 1 and team != 0:
        region = _new_region()
        store(region + FUNCTION, _c_function_3(work, args))
        store(region + ARGUMENTS, _on_stack(args))
        store(region + TEAM, team)
        store(region + WANTED, threads)
        if _run(team, threads, region, patience):
            if _load(region + FAILED):
                raise RuntimeError("an error in a parallel kernel; run it with one thread to see which")
            return
    work(0, 1, 0, *args)


# --- Teams -----------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _take_part(team, worker, wanted, ticket, generation):
    spins = 0
    while _load(team + START) >> 16 != generation:
        spins = _wait(spins)
    threads = _load(team + START) & 0xFFFF
    region = _load(team + REGION)
    # A full team keeps its numbers, so that each thread finds its share of the weights in its cache.
    thread = worker if threads == wanted else ticket
    _call_function(_load(region + FUNCTION), (thread, threads, region))
    add(team + FINISHED, 1)


def _serve(team, worker):
    """The life of worker 1, 2, ... of our own team."""
    desk = team + DESKS + (worker - 1) * LINE
    idle = 0
    while True:
        door = _load(team + DOOR)
        wanted = door >> 16 & 0xFFFF
        if door == LEAVE:
            return
        if worker < wanted:
            _step_aside(_load(team + CALLER_CORE))
            if _replace(team + DOOR, door, door + 1):
                _take_part(team, worker, wanted, (door & 0xFFFF) + 1, door >> 32)
            idle = 0
        elif idle < YIELD_AFTER + IDLE_YIELDS:
            idle = _idle(idle)
        else:
            # Each looks after writing (a store alone would not order the two): the thread that opens the
            # door sees us asleep, or we see that it is open.
            _exchange(desk + ASLEEP, 1)
            if _load(team + DOOR) == door or not _replace(desk + ASLEEP, 1, 0):
                _acquire_lock(_load(desk + LOCK), 1)
            idle = 0


def _dissolve(team):
    """Send the workers home, unless the team is busy.  It stays busy: later callers run alone."""
    if not _replace(team + BUSY, 0, 1):
        return False
    _exchange(team + DOOR, LEAVE)
    _wake(team, _load(team + WORKERS))
    return True


def _spin(count):
    for _ in range(count):
        _pause()


class Native(NamedTuple):
    """The compiled functions of our own team."""

    serve: Any
    dissolve: Any
    spin: Any


@once
def _native() -> Native:
    one = types.int64
    return Native(entry_point(_serve, one, one), entry_point(_dissolve, one), entry_point(_spin, one))


def _spins_per_us() -> int:
    count, times = 10_000, []
    spin = _native().spin
    for _ in range(3):
        start = time.perf_counter()
        spin(count)
        times.append(time.perf_counter() - start)
    return max(1, round(count / (min(times) * 1e6)))


class Team:
    """Threads that can be asked to run a kernel.  `address` is what :func:`fork` takes."""

    def __init__(self, name: str, words: int = 0) -> None:
        self.name = name
        self._memory = np.zeros(words + LINE // 8, np.int64)
        start = -self._memory.ctypes.data % LINE // 8
        self._block = self._memory[start : start + words]
        self.address = self._block.ctypes.data if words else 0

    def _set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._block[globals()[name] // 8] = value


ALONE = Team("no team")


class Location(ctypes.Structure):
    """`ident_t` of LLVM's OpenMP: where in the source a region stands."""

    _fields_ = (
        ("reserved_1", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("reserved_2", ctypes.c_int32),
        ("reserved_3", ctypes.c_int32),
        ("source", ctypes.c_char_p),
    )


class OpenMP(Team):
    """The team of an OpenMP runtime that is loaded in this process, from the file `path`."""

    def __init__(self, path: str) -> None:
        super().__init__(_describe_library(path), LINE // 8)
        self.path = path
        self._library = ctypes.PyDLL(path)  # whose functions keep the GIL: they are short
        self.max_threads = self._library.omp_get_max_threads
        self._set(
            THREAD_NUM=self._symbol("omp_get_thread_num"),
            NUM_THREADS=self._symbol("omp_get_num_threads"),
            MAX_THREADS=self._symbol("omp_get_max_threads"),
        )
        if hasattr(self._library, "GOMP_parallel"):
            self._set(KIND=GOMP, FORK=self._symbol("GOMP_parallel"))
        else:
            self._use_kmpc()

    def _use_kmpc(self) -> None:
        self._location = Location(flags=2, source=b";unknown;unknown;0;0;;")
        self._set(
            KIND=KMPC,
            FORK=self._symbol("__kmpc_fork_call"),
            GLOBAL_NUM=self._symbol("__kmpc_global_thread_num"),
            PUSH_NUM=self._symbol("__kmpc_push_num_threads"),
            LOCATION=ctypes.addressof(self._location),
        )

    def _symbol(self, name: str) -> int:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0


_allocate_lock = ctypes.pythonapi.PyThread_allocate_lock
_allocate_lock.restype = ctypes.c_void_p


class Own(Team):
    """A team of our own: the calling thread and `size - 1` Python threads in a native loop.

    It grows in place: its address stays valid for every caller that has it, and no thread is started twice.
    """

    def __init__(self, size: int) -> None:
        super().__init__("our own team", (DESKS + (MOST_THREADS - 1) * LINE) // 8)  # untouched memory is free
        self.size = 1
        self._threads: list[threading.Thread] = []
        self._set(KIND=OWN, SPINS_PER_US=_spins_per_us())
        self.grow(size)

    def grow(self, size: int) -> None:
        """Have so many threads from now on, also for regions of others that begin meanwhile."""
        try:
            for worker in range(len(self._threads) + 1, size):
                self._start(worker)
        except RuntimeError as error:
            started = len(self._threads) + 1
            warnings.warn(f"only {started} of {size} threads could be started: {error}", stacklevel=4)
        self.size = size
        self._set(WORKERS=len(self._threads))

    def _start(self, worker: int) -> None:
        lock = _allocate_lock()
        ctypes.pythonapi.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
        self._block[(DESKS + (worker - 1) * LINE + LOCK) // 8] = lock
        thread = threading.Thread(
            target=_native().serve, args=(self.address, worker), name=f"fusedlstm-{worker}", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def dissolve(self) -> None:
        """End the workers, within a second if a region still runs."""
        for _ in range(100):
            if _native().dissolve(self.address):
                break
            time.sleep(0.01)
        for thread in self._threads:
            thread.join(1)


# --- Which team, and how many threads ----------------------------------------------------------------------

_requested: int | None = None  # by set_num_threads
_modules = 0  # how many had been imported when the team was chosen
_runtime: OpenMP | None = None
_runtimes: list[OpenMP] = []  # that were found, since kernels may still have their addresses
_own: Own | None = None
_team: Team | None = None
_forked = False  # from a process whose OpenMP threads did not come along
_lock = fork_lock()


def current() -> Team:
    """The team to run on now; it is started if need be.

    Ask only for a kernel that is worth several threads: one thread needs no team, 0 is its address.
    """
    if _team is None or len(sys.modules) != _modules:
        return _choose()
    return _team


def set_num_threads(threads: int) -> None:
    """Use up to `threads` threads from now on, whatever OpenMP's own setting is.

    Where the team is borrowed from PyTorch, `torch.set_num_threads` is better: it keeps the sizes equal,
    while GNU OpenMP starts and ends threads each time that a team of another size is asked for.
    """
    global _requested, _team
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
        raise TypeError(f"threads must be an integer, not {type(threads).__name__}")
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {MOST_THREADS}, not {threads}")
    with _lock:
        _requested, _team = int(threads), None


def get_num_threads() -> int:
    """How many threads a kernel may use.

    What :func:`set_num_threads` was given; else what the OpenMP runtime of this process would use, which
    is what `torch.set_num_threads` sets; else OMP_NUM_THREADS; else the cores that the process may use.
    """
    if _requested is not None:
        return _requested
    if len(sys.modules) != _modules:
        _find_runtime()
    return _runtime.max_threads() if _runtime else _default_threads()


def describe() -> str:
    """The team that :func:`current` would give, in words."""
    threads = get_num_threads()
    if threads == 1:
        return "1 thread"
    _find_runtime()
    return f"{threads} threads of {_runtime.name if _runtime and not _forked else 'our own team'}"


def _choose() -> Team:
    global _own, _team
    with _lock:
        _find_runtime()
        threads = _requested or _default_threads()
        if _runtime and not _forked:
            _team = _runtime
        elif threads == 1:
            _team = ALONE
        else:
            if _own is None:
                _own = Own(threads)
            elif _own.size < threads:
                _own.grow(threads)
            _team = _own
        return _team


def _find_runtime() -> None:
    global _modules, _runtime, _team
    with _lock:
        if _modules == (count := len(sys.modules)):
            return
        paths = [p for p in dict.fromkeys(_loaded_libraries()) if OPENMP.fullmatch(os.path.basename(p))]
        paths.sort(key=lambda path: "torch" not in path)  # the one that will be busy next to us
        if paths and (_runtime is None or _runtime.path != paths[0]):
            _runtime, _team = OpenMP(paths[0]), None
            _runtimes.append(_runtime)
        _modules = count


OPENMP = re.compile(r"(libgomp|libi?omp5?|libiomp5md|libomp140)\b.*\.(so[.\d]*|dylib|dll)")


def _loaded_libraries() -> Iterator[str]:
    """The files of the libraries that are loaded in this process (on Windows, of those in question)."""
    if sys.platform == "win32":
        for name in ("libiomp5md.dll", "libomp.dll", "libomp140.x86_64.dll"):
            if ctypes.windll.kernel32.GetModuleHandleW(name):
                yield name
    elif sys.platform == "darwin":
        system = ctypes.CDLL(None)
        system._dyld_get_image_name.restype = ctypes.c_char_p
        for n in range(system._dyld_image_count()):
            yield os.fsdecode(system._dyld_get_image_name(n))
    else:
        with open("/proc/self/maps") as maps:
            for line in maps:
                _, *path = line.rstrip("\n").split(maxsplit=5)[4:]
                yield from path


def _describe_library(path: str) -> str:
    """For instance "libgomp, loaded by torch"."""
    name = os.path.basename(path).split(".")[0].split("-")[0]
    package = re.search(r"(?:site|dist)-packages[/\\]([^/\\]+?)(?:\.libs)?[/\\]", path)
    return f"{name}, loaded by {package[1]}" if package else f"{name}, loaded from {path}"


@once
def _default_threads() -> int:
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if setting:
        if not setting.isdecimal() or int(setting) == 0:
            raise ValueError(f"OMP_NUM_THREADS must be a positive integer, not {setting!r}")
        return min(int(setting), MOST_THREADS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_container_cores())))


CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _container_cores() -> float:
    """How many cores' worth of time this process may use, which the affinity does not show.

    Of its control group and those above: in a container the outermost is the container's own.
    """
    return min([_quota(group) for group in _control_groups()], default=MOST_THREADS)


def _control_groups() -> Iterator[Path]:
    """The folders of the control group that this process is in and of those above, of versions 2 and 1."""
    own = {"": "/", "cpu": "/"}
    with suppress(OSError):  # where there are none
        for line in OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own.update(dict.fromkeys(controllers.split(","), path))
    for controller in ("", "cpu"):
        yield (group := CGROUP / controller)
        for name in Path(own[controller]).parts[1:]:
            yield (group := group / name)


def _quota(group: Path) -> float:
    """The cores' worth of time of a control group."""
    try:
        if (group / "cpu.max").exists():  # version 2
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
    except OSError:
        return MOST_THREADS
    limited = quota.strip() not in ("max", "-1")
    return int(quota) / int(period) if limited else MOST_THREADS


def _after_fork() -> None:
    global _forked, _own, _team
    _forked, _own, _team = True, None, None
    _default_threads.cache_clear()


@atexit.register
def _dissolve_own() -> None:
    if _own is not None:
        _own.dissolve()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
