"""What every kernel is made of: the product with packed weights, and the barrier of a grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from . import ptx
from .plan import ROWS, Plan, Product
from .scalar import device, element

U = np.uint32  # Numba guards a signed index against being negative
LOOP = 4  # steps in a loop that compilers unroll

_MMA = {"tf32": ptx.mma_tf32, "bfloat16": ptx.mma_bfloat16, "float16": ptx.mma_float16}
_CONVERT = {"tf32": ptx.to_tf32, "bfloat16": ptx.to_bfloat16, "float16": ptx.to_float16}


class Functions(NamedTuple):
    """A product as device functions.

    Vectors that blocks exchange lie in a flat array of numbered buffers: one for each block of the batch, and
    of these some that take turns.  A buffer that is polled is all bits one where nothing is published yet.
    """

    keep: Any  # (weights, resident, held): bring those of the block to shared memory and registers
    multiply: Any  # (weights, resident, held, vectors, buffer, partial): every thread, its partial sums
    total: Any  # (partial, row, column): one element of the result, after a block barrier
    publish: Any  # (vectors, buffer, k, column, value): hand one number to the other blocks
    withdraw: Any  # (vectors, buffer, k, column): nothing is published there


def products(plan: Plan) -> tuple[Functions, Functions]:
    """Compile the recurrent product and that within a step; without one, the recurrent one again."""
    first = plan.partial // plan.recurrent.operand.itemsize  # behind the partial sums
    recurrent = _functions(plan, plan.recurrent, first)
    if plan.inner is None:
        return recurrent, recurrent
    return recurrent, _functions(plan, plan.inner, first + plan.recurrent.shared_weights)


def _functions(plan: Plan, product: Product, shared_base: int) -> Functions:
    """Compile a product whose weights begin at `shared_base` in shared memory, if they are kept there."""
    sums, batch, stride = product.sums, product.batch, product.stride
    per_block, kept, size = product.weights, product.shared_weights, product.buffer
    real, persistent = product.real, plan.form == "persistent"
    multiply_from, hold = (_tensor if product.tensor else _plain)(product, plan.polling)

    @device
    def keep(weights: Any, resident: Any, held: Any) -> None:
        hold(weights, cuda.blockIdx.x * per_block, held)
        copy(weights, cuda.blockIdx.x * per_block, resident, shared_base, kept)

    @device
    def multiply(weights: Any, resident: Any, held: Any, vectors: Any, buffer: Any, partial: Any) -> None:
        if persistent:
            multiply_from(resident, shared_base, held, vectors, buffer * size, partial)
        else:
            multiply_from(weights, cuda.blockIdx.x * per_block, held, vectors, buffer * size, partial)

    @device
    def total(partial: Any, row: Any, column: Any) -> Any:
        result = real(0)
        for n in range(sums):
            result += partial[U((n * batch + column) * stride + row)]
        return result

    return Functions(keep, multiply, total, *_published(product, plan.polling))


def _published(product: Product, polling: bool) -> tuple[Any, Any]:
    """The functions publish and withdraw."""
    size, real = product.buffer, product.real
    # from one k to the next, and from one row of the batch
    along, across = (1, product.depth) if product.tensor else (product.batch, 1)
    if product.tensor:
        convert = _CONVERT[product.precision]  # whose only NaN is positive
    else:

        @device
        def convert(value: Any) -> Any:
            return real(np.nan) if polling and ptx.is_erased(value) else value

    @device
    def publish(vectors: Any, buffer: Any, k: Any, column: Any, value: Any) -> None:
        at = buffer * size + k * along + column * across
        if polling:
            ptx.store_relaxed(vectors, at, convert(value))
        else:
            vectors[at] = convert(value)

    @device
    def withdraw(vectors: Any, buffer: Any, k: Any, column: Any) -> None:
        ptx.erase(vectors, buffer * size + k * along + column * across)

    return publish, withdraw


def _fetch(product: Product, polling: bool) -> Any:
    """(vectors, start, fetched, count): the vectors of `count` steps, all on their way at once."""
    if product.tensor:
        numbers, tiles = 4, product.column_tiles
        step, tile = 16 * product.per_word, 8 * product.depth
        load = ptx.load_words_relaxed if polling else ptx.load_words
    else:
        numbers, tiles, step, tile = product.width, 1, product.batch, 0
        load = (ptx.load_relaxed if polling else ptx.load)(product.width)
    halves, tensor = product.per_word == 2, product.tensor

    @device
    def look(vectors: Any, start: Any, fetched: Any, i: Any) -> None:
        found = load(vectors, start + i // tiles * step + i % tiles * tile)
        for n in range(numbers):
            fetched[U(i * numbers + n)] = found[n]

    @device
    def absent(fetched: Any, i: Any) -> Any:
        """Whether one of the numbers is all ones, which nothing published is."""
        if halves:
            # the sign of a half is only set if the half plus one is zero
            found = U(0)
            for n in range(numbers):
                word = fetched[U(i * numbers + n)]
                found |= U(~word - U(0x00010001)) & word
            return found & U(0x80008000) != U(0)
        missing = False
        for n in range(numbers):
            missing = missing or ptx.is_erased(fetched[U(i * numbers + n)])
        return missing

    @device
    def fetch(vectors: Any, start: Any, fetched: Any, count: Any) -> None:
        # in short loops, as below
        for i in range(0, count * tiles, LOOP):
            for n in range(LOOP):
                if i + n < count * tiles:
                    look(vectors, start, fetched, i + n)
        waiting = polling
        while waiting:
            waiting = False
            for i in range(0, count * tiles, LOOP):
                for n in range(LOOP):
                    if i + n < count * tiles and absent(fetched, i + n):
                        look(vectors, start, fetched, i + n)
                        waiting = True
            if waiting:
                cuda.nanosleep(U(20))
        if tensor:
            cuda.syncwarp()  # mma.sync wants all lanes, which may have parted before

    return fetch


def _in_groups(product: Product, steps: int, fetch: Any, apply: Any) -> Any:
    """(sums, weights, base, held, vectors, start, fetched): work off some steps."""
    group = product.together(steps)
    rest = steps % group
    whole = steps - rest
    step = 16 * product.per_word if product.tensor else product.batch
    apply_group, apply_rest = _repeated(apply, 0, group), _repeated(apply, 0, rest)

    @device
    def run(sums: Any, weights: Any, base: Any, held: Any, vectors: Any, start: Any, fetched: Any) -> None:
        for j in range(0, whole, group):
            fetch(vectors, start + j * step, fetched, group)
            apply_group(sums, weights, base, held, j, fetched)
        if rest:
            fetch(vectors, start + whole * step, fetched, rest)
            apply_rest(sums, weights, base, held, whole, fetched)

    return run


def _repeated(apply: Any, first: int, count: int) -> Any:
    """(sums, weights, base, held, j, fetched): apply to `count` of the steps that are fetched.

    In short loops: registers have no indices, and the compiler unrolls no long loop.
    """
    if count > LOOP:
        half = count // 2
        one, other = _repeated(apply, first, half), _repeated(apply, first + half, count - half)

        @device
        def run(sums: Any, weights: Any, base: Any, held: Any, j: Any, fetched: Any) -> None:
            one(sums, weights, base, held, j, fetched)
            other(sums, weights, base, held, j, fetched)
    else:

        @device
        def run(sums: Any, weights: Any, base: Any, held: Any, j: Any, fetched: Any) -> None:
            for i in range(first, first + count):
                apply(sums, weights, base, held, j + i, fetched, i)

    return run


def _plain(product: Product, polling: bool) -> tuple[Any, Any]:
    """A tile of ROWS rows and `width` columns a thread, one column of the weights a step."""
    rows, batch, width, stride = product.rows, product.batch, product.width, product.stride
    tiles, row_tiles, parts, steps = product.tiles, product.row_tiles, product.parts, product.steps
    lanes, held_steps, tile_size = product.lanes, product.held, ROWS * product.width
    streamed, first_held = steps - held_steps, product.shared_weights
    doublings = lanes.bit_length() - 1
    all_fetched = width * max(product.together(held_steps), product.together(streamed))
    number, zero = element(product.real), product.real(0)
    load_weights = ptx.load(ROWS)

    @device
    def hold(weights: Any, base: Any, held: Any) -> None:
        part, tile = cuda.threadIdx.x // tiles, cuda.threadIdx.x % tiles
        if part < parts:
            row = ROWS * (tile % row_tiles)
            for j in range(held_steps):
                four = load_weights(weights, base + first_held + (part * held_steps + j) * rows + row)
                for r in range(ROWS):
                    held[U(ROWS * j + r)] = four[r]

    @device
    def add_held(sums: Any, weights: Any, base: Any, held: Any, j: Any, fetched: Any, i: Any) -> None:
        for r in range(ROWS):
            for n in range(width):
                sums[U(r * width + n)] += held[U(ROWS * j + r)] * fetched[U(i * width + n)]

    @device
    def add(sums: Any, weights: Any, base: Any, held: Any, j: Any, fetched: Any, i: Any) -> None:
        four = load_weights(weights, base + j * rows)
        for r in range(ROWS):
            for n in range(width):
                sums[U(r * width + n)] += four[r] * fetched[U(i * width + n)]

    fetch = _fetch(product, polling)
    from_registers = _in_groups(product, held_steps, fetch, add_held)
    from_memory = _in_groups(product, streamed, fetch, add)

    @device
    def multiply(weights: Any, weights_base: Any, held: Any, vectors: Any, base: Any, partial: Any) -> None:
        part, tile = cuda.threadIdx.x // tiles, cuda.threadIdx.x % tiles
        row, column = ROWS * (tile % row_tiles), width * (tile // row_tiles)
        sums = cuda.local.array(tile_size, number)
        fetched = cuda.local.array(all_fetched, number)
        for n in range(tile_size):
            sums[U(n)] = zero
        if part < parts:
            start = base + part * steps * batch + column
            weights_base += part * streamed * rows + row
            from_registers(sums, weights, weights_base, held, vectors, start, fetched)
            start += held_steps * batch
            from_memory(sums, weights, weights_base, held, vectors, start, fetched)
        # lanes of a warp that share a tile add their sums; the number of lanes is a power of two
        for n in range(tile_size):
            for i in range(doublings):
                sums[U(n)] += cuda.shfl_xor_sync(0xFFFFFFFF, sums[U(n)], tiles << i)
        if part < parts and part % lanes == 0:
            at = (part // lanes * batch + column) * stride + row
            for r in range(ROWS):
                for n in range(width):
                    partial[U(at + n * stride + r)] = sums[U(r * width + n)]

    return multiply, hold


def _tensor(product: Product, polling: bool) -> tuple[Any, Any]:
    """Some of the 16 x 8 tiles a warp, 16 words of each vector a step: one 16-byte load feeds two
    mma.sync, whose columns of the weights are packed in the same order."""
    batch, stride, depth = product.batch, product.stride, product.depth
    row_tiles, shares, steps, held_steps = product.row_tiles, product.shares, product.steps, product.held
    column_tiles, per_word, per_tile = product.column_tiles, product.per_word, 128 * product.per_word
    streamed, first_held = steps - held_steps, product.shared_weights
    accumulators, tiles = product.accumulators, row_tiles * column_tiles
    all_sums, tile_sums = 4 * tiles * accumulators, 4 * tiles
    all_fetched = 4 * column_tiles * max(product.together(held_steps), product.together(streamed))
    mma, zero = _MMA[product.precision], np.float32(0)
    single, word = element(np.float32), element(np.uint32)

    @device
    def hold(weights: Any, base: Any, held: Any) -> None:
        lane, part = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32 // shares
        for j in range(held_steps):
            for n in range(2 * row_tiles):
                at = (part * held_steps + j) * 2 * row_tiles + n
                words = ptx.load_words(weights, base + first_held + at * per_tile + 4 * per_word * lane)
                for i in range(4):
                    held[U((2 * row_tiles * j + n) * 4 + i)] = words[i]

    @device
    def multiply_tile(
        sums: Any, m: Any, half: Any, a0: Any, a1: Any, a2: Any, a3: Any, b: Any, i: Any
    ) -> None:
        for n in range(column_tiles):
            at = 4 * ((2 * i + half) % accumulators * tiles + m * column_tiles + n)
            b_at = 4 * (i * column_tiles + n) + 2 * half
            d0, d1, d2, d3 = mma(
                a0, a1, a2, a3, b[U(b_at)], b[U(b_at + 1)],
                sums[U(at)], sums[U(at + 1)], sums[U(at + 2)], sums[U(at + 3)],
            )  # fmt: skip
            sums[U(at)], sums[U(at + 1)], sums[U(at + 2)], sums[U(at + 3)] = d0, d1, d2, d3

    @device
    def add_held(sums: Any, weights: Any, base: Any, held: Any, j: Any, b: Any, i: Any) -> None:
        for m in range(row_tiles):
            for half in range(2):
                at = 4 * ((row_tiles * j + m) * 2 + half)
                a0, a1, a2, a3 = held[U(at)], held[U(at + 1)], held[U(at + 2)], held[U(at + 3)]
                multiply_tile(sums, m, half, a0, a1, a2, a3, b, i)

    @device
    def add(sums: Any, weights: Any, base: Any, held: Any, j: Any, b: Any, i: Any) -> None:
        for m in range(row_tiles):
            for half in range(2):
                a = ptx.load_words(weights, base + (2 * (row_tiles * j + m) + half) * per_tile)
                multiply_tile(sums, m, half, a[0], a[1], a[2], a[3], b, i)

    fetch = _fetch(product, polling)
    from_registers = _in_groups(product, held_steps, fetch, add_held)
    from_memory = _in_groups(product, streamed, fetch, add)

    @device
    def multiply(weights: Any, weights_base: Any, held: Any, vectors: Any, base: Any, partial: Any) -> None:
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        share, part = warp % shares, warp // shares
        group, place = lane // 4, lane % 4
        sums = cuda.local.array(all_sums, single)
        b = cuda.local.array(all_fetched, word)
        for n in range(all_sums):
            sums[U(n)] = zero
        first = share * column_tiles * 8
        start = base + (first + group) * depth + (16 * part * steps + 4 * place) * per_word
        weights_base += part * streamed * 2 * row_tiles * per_tile + 4 * per_word * lane
        from_registers(sums, weights, weights_base, held, vectors, start, b)
        start += 16 * held_steps * per_word
        from_memory(sums, weights, weights_base, held, vectors, start, b)
        for n in range(accumulators - 1):
            for i in range(tile_sums):
                sums[U(i)] += sums[U((n + 1) * tile_sums + i)]
        at = (part * batch + first + 2 * place) * stride + group
        for m in range(row_tiles):
            for n in range(column_tiles):
                for i in range(4):
                    where = at + (8 * n + i % 2) * stride + 16 * m + 8 * (i // 2)
                    partial[U(where)] = sums[U(4 * (m * column_tiles + n) + i)]

    return multiply, hold


@device
def copy(source: Any, start: Any, target: Any, target_start: Any, count: Any) -> None:
    """Copy to shared memory by all threads of a block, 16 bytes at a time."""
    width = 16 // source.itemsize
    for i in range(width * cuda.threadIdx.x, count, width * cuda.blockDim.x):
        w0, w1, w2, w3 = ptx.load_words(source, start + i)
        ptx.store_words(target, target_start + i, w0, w1, w2, w3)


@device
def meet(arrivals: Any, group: Any, expected: Any) -> None:
    """Wait for the other blocks of a group: what they wrote before, this block reads after.

    `expected` counts the arrivals since the launch.  Their order follows from the release and acquire
    of one thread and the block barriers around them (PTX ISA, memory consistency model, causality
    order).
    """
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        ptx.add_release(arrivals, group, np.uint64(1))
        while ptx.load_acquire(arrivals, group) < expected:
            cuda.nanosleep(U(20))
    cuda.syncthreads()
