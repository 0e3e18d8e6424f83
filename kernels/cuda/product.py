"""What every kernel is made of: the product with packed weights, and the barrier of a grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from . import ptx
from .plan import ROWS, Plan, Product
from .scalar import device, element

U = np.uint32  # Numba guards a signed index against being negative

_MMA = {"tf32": ptx.mma_tf32, "bfloat16": ptx.mma_bfloat16, "float16": ptx.mma_float16}
_CONVERT = {"tf32": ptx.to_tf32, "bfloat16": ptx.to_bfloat16, "float16": ptx.to_float16}


class Functions(NamedTuple):
    """A product as device functions.

    Vectors that blocks exchange lie in a flat array of numbered buffers: one for each block of the batch, or
    two that take turns.
    """

    keep: Any  # (weights, resident, held): bring those of the block to shared memory and registers
    multiply: Any  # (weights, resident, held, vectors, buffer, partial): every thread, its partial sums
    total: Any  # (partial, row, column): one element of the result, after a block barrier
    publish: Any  # (vectors, buffer, k, column, value): hand one number to the other blocks


def products(plan: Plan) -> tuple[Functions, Functions]:
    """Compile the recurrent product and that of the projection; without one, the recurrent one again."""
    persistent = plan.form == "persistent"
    first = plan.partial // plan.recurrent.operand.itemsize  # behind the partial sums
    recurrent = _functions(plan.recurrent, persistent, first)
    if plan.projection is None:
        return recurrent, recurrent
    return recurrent, _functions(plan.projection, persistent, first + plan.recurrent.shared_weights)


def _functions(product: Product, persistent: bool, shared_base: int) -> Functions:
    """Compile a product whose weights begin at `shared_base` in shared memory, if they are kept there."""
    sums, batch, stride = product.sums, product.batch, product.stride
    per_block, kept, size = product.weights, product.shared_weights, product.buffer
    real = product.real
    multiply_from, hold = _tensor(product) if product.tensor else _plain(product)

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

    return Functions(keep, multiply, total, _publish(product))


def _publish(product: Product) -> Any:
    batch, depth, size = product.batch, product.depth, product.buffer
    if product.tensor:
        convert = _CONVERT[product.precision]

        @device
        def publish(vectors: Any, buffer: Any, k: Any, column: Any, value: Any) -> None:
            vectors[buffer * size + column * depth + k] = convert(value)
    else:

        @device
        def publish(vectors: Any, buffer: Any, k: Any, column: Any, value: Any) -> None:
            vectors[buffer * size + k * batch + column] = value

    return publish


def _plain(product: Product) -> tuple[Any, Any]:
    """A tile of ROWS rows and `width` columns a thread, one column of the weights a step."""
    rows, batch, width, stride = product.rows, product.batch, product.width, product.stride
    tiles, row_tiles, parts, steps = product.tiles, product.row_tiles, product.parts, product.steps
    lanes, held_steps, tile_size = product.lanes, product.held, ROWS * product.width
    streamed, first_held = steps - held_steps, product.shared_weights
    ahead, doublings = product.ahead, lanes.bit_length() - 1
    all_fetched = ahead * width
    number, zero = element(product.real), product.real(0)
    load_weights, load_vectors = ptx.load(ROWS), ptx.load(width)

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
    def add(sums: Any, four: Any, fetched: Any, i: Any) -> None:
        for r in range(ROWS):
            for n in range(width):
                sums[U(r * width + n)] += four[r] * fetched[U(i * width + n)]

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
            for j in range(held_steps):
                vector = load_vectors(vectors, start + j * batch)
                for r in range(ROWS):
                    for n in range(width):
                        sums[U(r * width + n)] += held[U(ROWS * j + r)] * vector[n]
            start += held_steps * batch
            weights_base += part * streamed * rows + row
            for j in range(0, streamed - streamed % ahead, ahead):
                for i in range(ahead):
                    vector = load_vectors(vectors, start + (j + i) * batch)
                    for n in range(width):
                        fetched[U(i * width + n)] = vector[n]
                for i in range(ahead):
                    four = load_weights(weights, weights_base + (j + i) * rows)
                    add(sums, four, fetched, i)
            for j in range(streamed - streamed % ahead, streamed):
                vector = load_vectors(vectors, start + j * batch)
                for n in range(width):
                    fetched[U(n)] = vector[n]
                add(sums, load_weights(weights, weights_base + j * rows), fetched, 0)
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


def _tensor(product: Product) -> tuple[Any, Any]:
    """Some of the 16 x 8 tiles a warp, 16 words of each vector a step: one 16-byte load feeds two
    mma.sync, whose columns of the weights are packed in the same order."""
    batch, stride, depth = product.batch, product.stride, product.depth
    row_tiles, shares, steps, held_steps = product.row_tiles, product.shares, product.steps, product.held
    column_tiles = batch // 8 // shares
    per_word, per_tile = product.per_word, 128 * product.per_word
    streamed, first_held = steps - held_steps, product.shared_weights
    ahead = product.ahead
    all_sums, all_fetched = 4 * row_tiles * column_tiles, 4 * column_tiles * ahead  # of one thread
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
    def add(sums: Any, m: Any, half: Any, a0: Any, a1: Any, a2: Any, a3: Any, b: Any, j: Any) -> None:
        for n in range(column_tiles):
            at = 4 * (m * column_tiles + n)
            d0, d1, d2, d3 = mma(
                a0,
                a1,
                a2,
                a3,
                b[U(4 * (j * column_tiles + n) + 2 * half)],
                b[U(4 * (j * column_tiles + n) + 2 * half + 1)],
                sums[U(at)],
                sums[U(at + 1)],
                sums[U(at + 2)],
                sums[U(at + 3)],
            )
            sums[U(at)], sums[U(at + 1)], sums[U(at + 2)], sums[U(at + 3)] = d0, d1, d2, d3

    @device
    def multiply_step(sums: Any, weights: Any, base: Any, b: Any, j: Any) -> None:
        for m in range(row_tiles):
            for half in range(2):
                a = ptx.load_words(weights, base + (2 * m + half) * per_tile)
                add(sums, m, half, a[0], a[1], a[2], a[3], b, j)

    @device
    def fetch(vectors: Any, start: Any, b: Any, j: Any) -> None:
        for n in range(column_tiles):
            words = ptx.load_words(vectors, start + n * 8 * depth)
            for i in range(4):
                b[U(4 * (j * column_tiles + n) + i)] = words[i]

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
        for j in range(held_steps):
            fetch(vectors, start + 16 * j * per_word, b, 0)
            for m in range(row_tiles):
                for half in range(2):
                    at = 4 * ((row_tiles * j + m) * 2 + half)
                    add(sums, m, half, held[U(at)], held[U(at + 1)], held[U(at + 2)], held[U(at + 3)], b, 0)
        start += 16 * held_steps * per_word
        for j in range(0, streamed - streamed % ahead, ahead):
            for i in range(ahead):
                fetch(vectors, start + 16 * (j + i) * per_word, b, i)
            for i in range(ahead):
                multiply_step(sums, weights, weights_base + (j + i) * 2 * row_tiles * per_tile, b, i)
        for j in range(streamed - streamed % ahead, streamed):
            fetch(vectors, start + 16 * j * per_word, b, 0)
            multiply_step(sums, weights, weights_base + j * 2 * row_tiles * per_tile, b, 0)
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


@device
def starts_anew(reset: Any, t: Any, b: Any, length: Any, reverse: Any) -> Any:
    """Whether step t of a row begins with the initial state although it is not the first step.

    reset[t] marks a boundary between t-1 and t.
    """
    boundary = t + 1 if reverse else t
    return 0 <= t < length and 0 < boundary < reset.shape[0] and reset[boundary, b]
