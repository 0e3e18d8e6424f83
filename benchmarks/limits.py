# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="call-arg,no-any-return,untyped-decorator"
"""What the processor could do at best, measured on the spot, and the bound that follows for a case.

Measured by kernels that do nothing else: multiply-adds in registers, reads of a buffer that fits in L1, L2,
L3 or in memory alone, and barriers of the thread team; on one thread, and on several at once.

The bound of a case is a roofline over its matrix products.  A product of `rows` rows with n x k weights
takes the longer of

* 2 * rows * n * k operations at the multiply-add rate of all threads, and
* reading the n x k weights once: as much as each level of cache can hold at the rate of that level, since a
  kernel that goes through its weights there and back finds there what it read last, the rest from memory.

The recurrent product runs T times with B rows; the product with the input runs once, with T * B rows.  It is
the recurrent weights that are read again and again, each thread its own share of them; in a single step the
input weights are read beside them.  Training has each product three times: forward, for the gradient of what
enters, and for the gradient of the weights, which is one product over all steps.  From 4 rows on the
multiply-adds usually decide, below the reads.  Nothing else is counted, neither the cell's functions nor
barriers, so 100% is out of reach.

Run as a program, with numbers of threads, this module prints the limits as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fusedlstm.kernels.cpu.compile import kept
from fusedlstm.kernels.cpu.simd import Vector, call_ir, splat_ir
from fusedlstm.kernels.cpu.spec import machine
from fusedlstm.kernels.cpu.team import barrier, current, fork, set_num_threads

from .cases import DTYPES, Case
from .machine import cache_sizes, cores

INT64 = ir.IntType(64)
STREAM = 8  # vectors that the reading loop loads in a turn, each into a register of its own
FITS = 0.75  # of a cache may be weights; the rest is for states, inputs and outputs
SECONDS = 0.03  # a measurement takes
REPEATS = 7  # of which the best counts: nothing but a disturbance makes a kernel slower than it can be


def _loop(
    builder: ir.IRBuilder, count: ir.Value, start: list[ir.Value], turn: Callable[..., list[ir.Value]]
) -> list[ir.Value]:
    """`values = turn(i, values)` for i in range(count), from the values `start`; count is at least 1."""
    before, body = builder.block, builder.append_basic_block("loop")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(INT64)
    i.add_incoming(ir.Constant(INT64, 0), before)
    phis = [builder.phi(value.type) for value in start]
    for phi, value in zip(phis, start):
        phi.add_incoming(value, before)
    values = turn(i, phis)
    after = builder.add(i, ir.Constant(INT64, 1))
    for phi, value in zip([i, *phis], [after, *values]):
        phi.add_incoming(value, builder.block)
    done = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", after, count), body, done)
    builder.position_at_end(done)
    return values


def _first_lane(builder: ir.IRBuilder, vectors: list[ir.Value], add: Callable[..., ir.Value]) -> ir.Value:
    total = vectors[0]
    for vector in vectors[1:]:
        total = add(total, vector)
    return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))


def chains() -> int:
    """How many independent multiply-adds are in flight: three quarters of the registers hold sums."""
    return machine().registers * 3 // 4


@intrinsic
def multiply_adds(typingctx: Any, x: Any, turns: Any) -> Any:
    """`turns` multiply-adds in each of `chains()` registers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = Vector(x, machine().bits // x.bitwidth)
        factor = splat_ir(builder, args[0], vector.lanes)

        def turn(_: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            return [call_ir(builder, f"llvm.fma.{vector.suffix}", vector.ir, s, factor, factor) for s in sums]

        sums = _loop(builder, args[1], [factor] * chains(), turn)
        return _first_lane(builder, sums, builder.fadd)

    return x(x, types.int64), codegen


@intrinsic
def read_stream(typingctx: Any, address: Any, turns: Any, seed: Any) -> Any:
    """Read `turns` times STREAM vectors from an address on; what it returns depends on all of them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, turns, seed = args
        lanes = machine().bits // 64
        vector = ir.VectorType(INT64, lanes)
        base = builder.inttoptr(start, vector.as_pointer())

        def turn(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            first = builder.mul(i, ir.Constant(INT64, STREAM))
            places = [builder.gep(base, [builder.add(first, ir.Constant(INT64, n))]) for n in range(STREAM)]
            return [builder.xor(s, builder.load(place, align=8)) for s, place in zip(sums, places)]

        sums = _loop(builder, turns, [splat_ir(builder, seed, lanes)] * STREAM, turn)
        return _first_lane(builder, sums, builder.xor)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _address(typingctx: Any, array: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.create_struct_proxy(array)(context, builder, args[0]).data, INT64)

    return types.int64(array), codegen


# Each writes how many threads ran, since a team may have fewer to spare, and what keeps its work alive.


@njit(error_model="numpy")
def _multiply_add_work(thread, threads, sync, x, turns, out):
    out[8 * thread] = multiply_adds(x, turns)
    out[8 * thread + 1] = threads


@njit(error_model="numpy")
def _read_work(thread, threads, sync, buffer, turns, passes, out):
    total = np.int64(0)
    for _ in range(passes):
        total = read_stream(_address(buffer) + thread * buffer.strides[0], turns, total)
    out[8 * thread] = total
    out[8 * thread + 1] = threads


@njit(error_model="numpy")
def _barrier_work(thread, threads, sync, count, out):
    for _ in range(count):
        barrier(sync, threads)
    out[8 * thread + 1] = threads


@kept
def _run_multiply_adds(team, threads, x, turns, out):
    fork(team, threads, _multiply_add_work, (x, turns, out), 10_000)


@kept
def _run_reads(team, threads, buffer, turns, passes, out):
    fork(team, threads, _read_work, (buffer, turns, passes, out), 10_000)


@kept
def _run_barriers(team, threads, count, out):
    fork(team, threads, _barrier_work, (count, out), 10_000)


def _best_rate(threads: int, run: Callable[[int, np.ndarray], None]) -> float:
    """Repetitions a second of `run(repetitions, out)`, on `threads` threads."""
    out = np.zeros(8 * threads)
    repetitions, best = 1, 0.0
    counted = 0
    while counted < REPEATS:
        start = time.perf_counter()
        run(repetitions, out)
        seconds = time.perf_counter() - start
        if seconds < SECONDS / 2:
            repetitions = max(2 * repetitions, int(repetitions * 0.7 * SECONDS / seconds))
            continue
        counted += 1
        if out[1] == threads:
            best = max(best, repetitions / seconds)
    if not best:
        raise RuntimeError(f"{threads} threads were asked for, but never ran together")
    return best


def _team(threads: int) -> int:
    return current().address if threads > 1 else 0


def multiply_add_rate(dtype: str, threads: int) -> float:
    """Operations a second, a multiply-add being two, of all threads together."""
    x = np.dtype(dtype).type(1)
    turns = 1000
    rate = _best_rate(threads, lambda n, out: _run_multiply_adds(_team(threads), threads, x, n * turns, out))
    return rate * turns * threads * 2 * chains() * (machine().bits // 8 // x.nbytes)


def _aligned_ones(rows: int, columns: int) -> np.ndarray:
    """Rows that begin with a page; a vector that straddles two cache lines costs two reads."""
    page = 4096 // 8
    width = -(-columns // page) * page
    memory = np.ones(rows * width + page, np.int64)
    start = -memory.ctypes.data % 4096 // 8
    return memory[start : start + rows * width].reshape(rows, width)[:, :columns]


def read_bandwidth(bytes_per_thread: int, threads: int) -> float:
    """Bytes a second of all threads together, each of which reads a buffer of its own again and again."""
    turn = STREAM * machine().bits // 8
    turns = bytes_per_thread // turn
    buffer = _aligned_ones(threads, turns * turn // 8)
    rate = _best_rate(threads, lambda n, out: _run_reads(_team(threads), threads, buffer, turns, n, out))
    return rate * threads * turns * turn


def barrier_latency(threads: int) -> float:
    """Seconds that a barrier takes; a thread alone does not wait."""
    if threads == 1:
        return 0.0
    return 1 / _best_rate(threads, lambda n, out: _run_barriers(_team(threads), threads, n, out))


def buffer_sizes(threads: int) -> dict[str, int]:
    """Bytes of a thread's buffer for each level: well inside it, and well outside the one before."""
    size = cache_sizes()
    return {
        "L1": size["L1"] // 2,
        "L2": size["L2"] // 2,
        "L3": max(size["L2"], min(4 * size["L2"], size["L3"] // (2 * threads))),
        "memory": max(4 * size["L3"], 256 << 20) // threads,
    }


def measure(counts: Sequence[int]) -> dict[str, Any]:
    """The limits for each of some numbers of threads, as in the schema of results."""
    set_num_threads(max(counts))
    return {
        "registers": f"{machine().name}, {machine().registers} of {machine().bits} bits",
        "multiply_add": {dtype: {str(n): multiply_add_rate(dtype, n) for n in counts} for dtype in DTYPES},
        "read": {
            level: {str(n): read_bandwidth(buffer_sizes(n)[level], n) for n in counts}
            for level in buffer_sizes(1)
        },
        "barrier": {str(n): barrier_latency(n) for n in counts},
    }


def measure_apart(counts: Sequence[int]) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", __name__, *map(str, counts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    limits: dict[str, Any] = json.loads(done.stdout)
    return limits


def best_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The better of two measurements of each limit: the higher rate, the shorter barrier."""

    def better(one: Any, other: Any, choose: Callable[[float, float], float] = max) -> Any:
        if isinstance(one, dict):
            return {key: better(one[key], other[key], choose) for key in one}
        return choose(one, other)

    rates = {name: better(first[name], second[name]) for name in ("multiply_add", "read")}
    return {**first, **rates, "barrier": better(first["barrier"], second["barrier"], min)}


class Bound(NamedTuple):
    """The least time that a case can take."""

    seconds: float
    name: str  # of what decides: "FMA", or the level that is read
    operations: int
    bytes: int  # of weights that are read


def bound(case: Case, limits: dict[str, Any]) -> Bound:
    """The bound of a case by the model of this module."""
    threads = str(case.threads)
    rate = limits["multiply_add"][case.dtype][threads]
    size = np.dtype(case.dtype).itemsize
    rows = len(case.mathematics.gates) * case.hidden
    spent = {"FMA": 0.0}
    operations = bytes_ = 0
    for layer in range(case.layers):
        inputs = case.hidden if layer else case.inputs
        resident = rows * case.hidden * size
        if case.steps == 1:
            resident = case.layers * rows * (inputs + case.hidden) * size
        level = level_of(resident, case.threads)
        once = (1, case.steps * case.batch)
        products = [(*once, inputs), (case.steps, case.batch, case.hidden)]  # times, rows, columns
        if case.mode == "train":
            products += [*products, (*once, inputs), (*once, case.hidden)]
        for times, count, columns in products:
            work, weights = 2 * count * rows * columns, rows * columns * size
            computing = work / rate
            reading = weights * seconds_of_a_byte(resident, limits["read"], case.threads)
            name = "FMA" if computing >= reading else level
            spent[name] = spent.get(name, 0) + times * max(computing, reading)
            operations, bytes_ = operations + times * work, bytes_ + times * weights
    return Bound(sum(spent.values()), max(spent, key=spent.__getitem__), operations, bytes_)


def seconds_of_a_byte(resident: int, rates: dict[str, Any], threads: int) -> float:
    """The least time to read one of so many bytes of weights, again and again.

    A sweep that goes there and back finds in each level of cache what that can hold.
    """
    sizes, seconds, left = cache_sizes(), 0.0, 1.0
    for level, size in (("L1", threads * sizes["L1"]), ("L2", threads * sizes["L2"]), ("L3", sizes["L3"])):
        part = min(left, size / resident)
        seconds, left = seconds + part / rates[level][str(threads)], left - part
    return seconds + left / rates["memory"][str(threads)]


def level_of(weights: int, threads: int) -> str:
    """The level that holds so many bytes of weights, of which each thread has a share."""
    sizes = cache_sizes()
    for level, share in (("L1", weights / threads), ("L2", weights / threads), ("L3", weights)):
        if share <= FITS * sizes[level]:
            return level
    return "memory"


if __name__ == "__main__":
    given = [int(count) for count in sys.argv[1:]]
    print(json.dumps(measure(given or sorted({1, cores()})), indent=1))
