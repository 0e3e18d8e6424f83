"""Which kernel runs, in which tiles: everything that is fixed when a kernel is compiled.

A block owns some outputs (hidden units with all their gates, or elements of the projection) for
some rows of the batch.  Its products are `Product`s: packed weights times the vectors that all
blocks exchange.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product as pairs
from math import ceil, gcd
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusedlstm.cells import Cell
from fusedlstm.once import lazy

from . import ptx
from .phases import phases

Precision = Literal["float32", "float64", "tf32", "bfloat16", "float16"]
Form = Literal["persistent", "stepwise"]

PRECISIONS: tuple[Precision, ...] = ("float32", "float64", "tf32", "bfloat16", "float16")
TENSOR_CORES = ("tf32", "bfloat16", "float16")  # precisions that run on mma.sync
_OPERAND = {"tf32": "uint32", "bfloat16": "uint16", "float16": "uint16"}
_ROUND = {"tf32": ptx.tf32_bits, "bfloat16": ptx.bfloat16_bits, "float16": ptx.float16_bits}

ROWS = 4  # rows of a thread's tile where no tensor core is used
TILES = 8  # most tensor-core tiles that one warp accumulates
HELD = 96  # registers of a thread that may hold weights
UNROLLED = {True: 64, False: 128}  # most multiplications for them, with and without tensor cores: the
# compiler unrolls no longer loops
FETCHED = 64  # registers of a thread for vectors that are on their way
REGISTERS = 144  # for weights, vectors and sums on tensor cores
STATE = 40  # registers of a thread for the gates and states of its cells
# About what work takes a multiprocessor, in clocks: a byte of shared memory and of the second-level cache, a
# trip to that cache, and a multiplication.
COSTS = {"shared": 1 / 128, "cache": 1 / 32, "trip": 300.0, "float32": 1 / 128, "float64": 1 / 64,
         "tf32": 1 / 512, "bfloat16": 1 / 1024, "float16": 1 / 1024}  # fmt: skip
FITTED = Path(__file__).with_name("costs.json")  # name of a device -> its costs, by `benchmarks.gpu --fit`
BARRIER_EVERY = 8  # steps; between them, blocks poll the numbers that they exchange


@dataclass(frozen=True)
class Device:
    """What the choice depends on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int  # bytes of shared memory that one block can have
    threads: int = 256  # of a block
    cooperative: bool = True  # blocks of one launch can wait for each other
    warps: bool = True  # threads of a warp can exchange values


@dataclass(frozen=True)
class Product:
    """out[row, b] = sum over k of weights[row, k] * vectors[k, b], by one block.

    The columns k are cut into `parts`; a part is one thread's, or one warp's on tensor cores, and is
    worked off in `steps`.  The partial sums of the parts meet in shared memory.
    """

    precision: Precision
    groups: int  # gates that an output needs
    units: int  # outputs of the block
    size: int  # columns of the weights
    batch: int  # rows of the batch
    threads: int
    shuffles: bool = True  # threads of a warp can exchange values
    resident: bool = True  # weights stay on the chip; else they are read at every step, which takes registers
    held: int = 0  # steps of each part whose weights stay in registers

    @property
    def tensor(self) -> bool:
        return self.precision in TENSOR_CORES

    @property
    def real(self) -> Any:
        """The type of sums and states."""
        return np.float64 if self.precision == "float64" else np.float32

    @property
    def real_size(self) -> int:
        """Bytes of it."""
        return 8 if self.precision == "float64" else 4

    @property
    def operand(self) -> np.dtype[Any]:
        """The type of packed weights and exchanged vectors."""
        return np.dtype(_OPERAND.get(self.precision, self.precision))

    @property
    def width(self) -> int:
        """Columns of the batch in a thread's tile."""
        return gcd(self.batch, 4)

    @property
    def per_word(self) -> int:
        return 4 // self.operand.itemsize

    @lazy
    def rows(self) -> int:
        """Rows of the packed weights: row g * units + u is gate g of output u, the rest is zero."""
        rows = self.groups * self.units
        if self.tensor:
            return 16 * ceil(rows / 16)
        tiles = ceil(rows / ROWS)
        if tiles * (self.batch // self.width) < 32:  # lanes that share a tile must be a power of two
            tiles = 1 << (tiles - 1).bit_length()
        return ROWS * tiles

    @property
    def row_tiles(self) -> int:
        return self.rows // (16 if self.tensor else ROWS)

    @property
    def tiles(self) -> int:
        """Tiles of the result: of a thread, or of a warp."""
        return self.row_tiles * (self.batch // 8 if self.tensor else self.batch // self.width)

    @lazy
    def shares(self) -> int:
        """Warps, or threads, among which the tiles of one part are dealt out."""
        if not self.tensor:
            return self.tiles
        columns = self.batch // 8
        # 0 if the rows are too many for one warp
        splits = (n for n in range(1, columns + 1) if columns % n == 0 and self.tiles <= n * TILES)
        return next(splits, 0)

    @property
    def column_tiles(self) -> int:
        """Tiles of a warp along the batch, on tensor cores."""
        return self.batch // 8 // self.shares

    @property
    def accumulators(self) -> int:
        """Of each tile of a warp, in turn: an mma.sync waits for the one before it on the same sums."""
        return max(1, 4 // (self.row_tiles * self.column_tiles)) if self.tensor else 1

    @property
    def workers(self) -> int:
        return self.threads // 32 if self.tensor else self.threads

    @property
    def parts(self) -> int:
        return self.workers // self.shares

    @property
    def step(self) -> int:
        """Columns of one step."""
        return 16 * self.per_word if self.tensor else 1

    @property
    def steps(self) -> int:
        """Steps of one part."""
        return ceil(self.size / (self.step * self.parts))

    @property
    def depth(self) -> int:
        """Columns of the packed weights: the size, rounded up with zeros."""
        return self.parts * self.steps * self.step

    @property
    def buffer(self) -> int:
        """Numbers of the vectors that a block of the batch exchanges."""
        return self.depth * self.batch

    @property
    def lanes(self) -> int:
        """Threads of a warp that work on different parts of one tile, and add their sums."""
        if self.tensor or self.tiles >= 32 or not self.shuffles:
            return 1
        return min(32, self.threads) // self.tiles

    @property
    def sums(self) -> int:
        """Partial sums that meet in shared memory."""
        return max(1, self.parts // self.lanes)

    @property
    def stride(self) -> int:
        """Distance of two rows of the batch in the partial sums; units more than the rows, so that
        neighbouring threads read different banks."""
        return self.rows + self.units

    @property
    def partial(self) -> int:
        """Numbers of the partial sums."""
        return self.sums * self.batch * self.stride

    @property
    def step_weights(self) -> int:
        """Packed weights of one step of one part."""
        return self.rows * self.step

    @property
    def weights(self) -> int:
        """Packed weights of a block."""
        return self.rows * self.depth

    @property
    def shared_weights(self) -> int:
        """Those of them that lie in shared memory if they stay on the chip; they come first."""
        return self.parts * (self.steps - self.held) * self.step_weights

    @property
    def held_weights(self) -> int:
        """Registers that `held` steps take."""
        return self.held * (self.row_tiles * 8 if self.tensor else ROWS) * self.real_size // 4

    @property
    def fits(self) -> bool:
        """Whether the tiles can be dealt out to the threads."""
        return 1 <= self.shares <= self.workers and (not self.tensor or self.workers % self.shares == 0)

    def together(self, steps: int) -> int:
        """Of some steps, those whose vectors are on their way at once; a divisor if a large one is there."""
        # registers that a step takes, and those that there are
        if self.tensor:
            sums = 4 * self.row_tiles * self.column_tiles * self.accumulators
            vectors, weights = 4 * self.column_tiles, 8 * self.row_tiles
            free = REGISTERS - sums - self.held_weights
        else:
            vectors = weights = self.real_size  # of up to four numbers
            free = FETCHED
        if self.resident:
            weights = 0
        most = max(1, min(FETCHED // vectors, free // (vectors + weights)))
        even = max(n for n in range(1, most + 1) if steps % n == 0)
        return even if 2 * even > most else ceil(steps / ceil(steps / most))

    def pack(self, xp: Any, weights: Any, blocks: int) -> Any:
        """Weights (groups, outputs, size) in the order of use, (blocks * weights,) of `operand`."""
        groups, outputs, size = weights.shape
        wide = xp.zeros((groups, blocks * self.units, self.depth), weights.dtype)
        wide[:, :outputs, :size] = weights
        per_block = xp.zeros((blocks, self.rows, self.depth), weights.dtype)
        tiled = wide.reshape(groups, blocks, self.units, self.depth).transpose(1, 0, 2, 3)
        per_block[:, : groups * self.units] = tiled.reshape(blocks, groups * self.units, self.depth)
        row, column = self.order()
        packed = per_block[:, xp.asarray(row), xp.asarray(column)]
        if self.tensor:
            return _ROUND[self.precision](packed).ravel()
        return packed.ravel()

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each packed weight."""
        parts, steps = np.arange(self.parts)[:, None], np.arange(self.steps)
        number = parts * self.steps + np.broadcast_to(steps, (self.parts, self.steps))
        # what stays in registers comes last
        number = np.concatenate([number[:, self.held :].ravel(), number[:, : self.held].ravel()])
        if not self.tensor:
            row, column = np.broadcast_arrays(np.arange(self.rows), number[:, None])
            return row.ravel(), column.ravel()
        # for each step, tile, half of the step and lane: the four words a0..a3 of mma.sync
        axes = (len(number), self.row_tiles, 2, 32, 4, self.per_word)
        step, tile, half, lane, word, part = np.indices(axes, sparse=True)
        row = 16 * tile + lane // 4 + 8 * (word % 2)
        column = (16 * number[step] + 4 * (lane % 4) + 2 * half + word // 2) * self.per_word + part
        row, column = np.broadcast_arrays(row, column)
        return row.ravel(), column.ravel()


@dataclass(frozen=True)
class Plan:
    """One kernel, and how it is launched."""

    form: Form
    backward: bool
    recurrent: Product  # forward: outputs are units; backward: elements of the output
    projection: Product | None
    late: Product | None  # of a late gate: outputs are units; never beside a projection
    outputs: tuple[int, int]  # number of hidden units, and of elements of the output
    blocks: int  # along the units
    why: str
    barrier_every: int = 1  # persistent: steps; if more than one, what is exchanged is polled

    @property
    def polling(self) -> bool:
        return self.barrier_every > 1

    @property
    def buffers(self) -> int:
        """Exchange buffers: one half is read while the other is written or made ready."""
        return 2 * self.barrier_every

    @property
    def units(self) -> int:
        """Hidden units of a block."""
        if self.projection is not None and self.backward:
            return self.projection.units
        return self.recurrent.units

    @property
    def elements(self) -> int:
        """Elements of the output of a block."""
        if self.projection is None:
            return self.units
        return self.recurrent.units if self.backward else self.projection.units

    @property
    def inner(self) -> Product | None:
        """The product within a step, of what is computed behind the recurrent one."""
        return self.projection or self.late

    @property
    def products(self) -> tuple[Product, ...]:
        return (self.recurrent,) if self.inner is None else (self.recurrent, self.inner)

    @property
    def threads(self) -> int:
        return self.recurrent.threads

    @property
    def partial(self) -> int:
        """Bytes of the partial sums, a multiple of a vector load."""
        size = max(p.partial for p in self.products)
        return 16 * ceil(size * self.recurrent.real_size / 16)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        weights = sum(p.shared_weights * p.operand.itemsize for p in self.products)
        return self.partial + (weights if self.form == "persistent" else 0)

    def grid(self, batch: int) -> tuple[int, int]:
        return self.blocks, ceil(batch / self.recurrent.batch)


def choose(
    device: Device,
    cell: Cell,
    precision: Precision,
    hidden: int,
    proj: int,
    batch: int,
    backward: bool,
    form: Form | None = None,
    barrier_every: int = BARRIER_EVERY,
) -> Plan:
    """The plan for a pass; `form` forces one.

    The backward pass of float16 is in bfloat16: gradients of 1e-8 are common, float16 has none below 6e-8.

    Raises:
        ValueError: if the forced form, or the precision, cannot run on the device.
    """
    if precision in TENSOR_CORES and (device.capability < (8, 0) or not device.warps):
        raise ValueError(
            f"precision {precision!r} needs a GPU of compute capability 8.0 or later, got {device.name} "
            f"({device.capability[0]}.{device.capability[1]}); use precision 'float32'"
        )
    if backward and precision == "float16":
        precision = "bfloat16"
    sizes = (cell, hidden, proj, batch, backward, precision)
    reason = "no tile keeps all weights on the chip with all blocks at work at once"
    if not device.cooperative:
        reason = f"blocks cannot wait for each other on {device.name}"
    elif form != "stepwise" and (plans := persistent(device, *sizes)):
        return replace(plans[0], barrier_every=barrier_every)
    if form == "persistent":
        raise ValueError(f"form 'persistent' cannot run with H={hidden}, B={batch}: {reason}")
    return _stepwise(device, *sizes, why="asked for" if form else reason)


def persistent(device: Device, *sizes: Any) -> list[Plan]:
    """The plans whose blocks are all resident, with their weights; that with the shortest step comes first.

    `sizes` are cell, hidden, proj, batch, backward and precision.
    """
    plans = []
    for plan in _candidates(device, "persistent", *sizes):
        columns = plan.grid(sizes[3])[1]
        if plan.blocks * columns > device.multiprocessors:
            continue
        for held in _held(plan):
            kept = replace(plan, recurrent=replace(plan.recurrent, held=held))
            if kept.shared <= device.shared:
                where = "shared memory and registers" if held else "shared memory"
                why = f"{kept.blocks} x {columns} blocks keep all weights in {where}"
                plans.append(replace(kept, why=why))
                break
    return sorted(plans, key=lambda plan: _clocks(plan, device, sizes[3]))


def _clocks(plan: Plan, device: Device, batch: int) -> tuple[float, int]:
    """About what a step takes, which ranks plans and no more; of equal ones, fewer blocks are better."""
    costs = costs_of(device.name)
    clocks = sum(costs[kind] * amount for kind, amount in work(plan, device, batch).items())
    return clocks, plan.blocks * plan.grid(batch)[1]


def work(plan: Plan, device: Device, batch: int) -> dict[str, float]:
    """What a multiprocessor does in a step, by the names of COSTS."""
    amounts = dict.fromkeys(COSTS, 0.0)
    for product in plan.products:
        size = product.operand.itemsize
        amounts["shared" if plan.form == "persistent" else "cache"] += product.shared_weights * size
        amounts["cache"] += product.buffer * size
        amounts[product.precision] += product.rows * product.buffer
        parts = (product.held, product.steps - product.held)
        amounts["trip"] += sum(ceil(steps / product.together(steps)) for steps in parts)
    times = ceil(plan.blocks * plan.grid(batch)[1] / device.multiprocessors)
    return {kind: times * amount for kind, amount in amounts.items()}


@lru_cache(maxsize=8)
def costs_of(device: str) -> dict[str, float]:
    """COSTS, or in their place what has been measured on a device of that name."""
    fitted: dict[str, dict[str, float]] = json.loads(FITTED.read_text()) if FITTED.exists() else {}
    return COSTS | fitted.get(device, {})


def _held(plan: Plan) -> Iterator[int]:
    """From no step in registers to as many as they take; beside what several cells keep meanwhile, none."""
    several = plan.late is not None and plan.units * plan.recurrent.batch > plan.threads
    for held in range(1 if several else plan.recurrent.steps + 1):
        product = replace(plan.recurrent, held=held)
        each = 2 * product.tiles // product.shares if product.tensor else ROWS * product.width
        if product.held_weights <= HELD and held * each <= UNROLLED[product.tensor]:
            yield held


def _stepwise(device: Device, *sizes: Any, why: str) -> Plan:
    """The plan with the shortest step."""
    plans = list(_candidates(device, "stepwise", *sizes))
    if not plans:
        raise ValueError(f"no tile for {sizes} on {device.name}")
    return replace(min(plans, key=lambda plan: _clocks(plan, device, sizes[3])), why=why)


def _candidates(
    device: Device,
    form: Form,
    cell: Cell,
    hidden: int,
    proj: int,
    batch: int,
    backward: bool,
    precision: Precision,
) -> Iterator[Plan]:
    """Plans whose tiles fit the threads."""
    tensor = precision in TENSOR_CORES
    outputs, gates = proj or hidden, len(cell.recurrent_gates)
    cuts = phases(cell, backward).cuts
    state = len(cell.gates) + len(cell.states) + len(cell.weights)
    if form == "persistent" and len(cuts) > 1:  # what is kept meanwhile, and where it goes
        state += len({*cuts[0].stores, *cuts[1].takes}) + 1
    for columns, units in pairs(_columns(batch, tensor, device.threads), range(1, min(hidden, 64) + 1)):
        blocks = ceil(hidden / units)
        elements = ceil(outputs / blocks) if proj else units
        rows, size = (elements, gates * hidden) if backward else (gates * units, outputs)
        groups = 1 if backward else gates
        rest = (columns, device.threads, device.warps, form == "persistent")
        recurrent = Product(precision, groups, rows // groups, size, *rest)
        projection = late = None
        if proj:
            one, depth = (units, proj) if backward else (elements, hidden)
            projection = Product(precision, 1, one, depth, *rest)
        if len(cuts) > 1:
            late = Product(precision, 1, units, hidden, *rest)
        plan = Plan(form, backward, recurrent, projection, late, (hidden, outputs), blocks, "")
        registers = ceil(units * columns / device.threads) * state * recurrent.real_size // 4
        fits = all(p.fits for p in plan.products) and plan.partial <= device.shared
        if fits and (registers <= STATE or units == 1):
            yield plan


def _columns(batch: int, tensor: bool, threads: int) -> list[int]:
    """Rows of the batch that a block may take."""
    if tensor:
        whole = 8 * ceil(batch / 8)
        return [n for n in (8, 16, 32, 64, 128) if n < whole] + ([whole] if whole <= 128 else [])
    whole, most = 1 << (batch - 1).bit_length(), 4 if threads < 64 else 32
    return [min(whole, most)] + [n for n in (64, 128) if most < n <= whole and threads >= 64]
