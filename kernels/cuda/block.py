"""What the kernels share: which outputs each thread of a block owns, and the states of these."""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

from numba import cuda

from .plan import Plan
from .product import U
from .scalar import device


class Owned(NamedTuple):
    """Hidden units or elements of the output, for the block's rows of the batch, dealt out to its threads."""

    most: int  # of one thread
    place: Any  # (n, rows): whether the thread has an n-th one in a batch of so many rows; then its number
    # and row within the block, and its number in the layer and row of the batch


def owned_units(plan: Plan) -> Owned:
    """The hidden units of a block."""
    return _owned(plan, plan.units, plan.outputs[0])


def owned_elements(plan: Plan) -> Owned:
    """The elements of the output of a block; without a projection, its hidden units."""
    return _owned(plan, plan.elements, plan.outputs[1])


def _owned(plan: Plan, each: int, outputs: int) -> Owned:
    batch, threads = plan.recurrent.batch, plan.threads

    @device
    def place(n: Any, rows: Any) -> Any:
        # unsigned, and 32 bits: that takes fewer registers
        q = U(cuda.threadIdx.x + n * threads)
        number, column = U(q % U(each)), U(q // U(each))
        output, row = U(cuda.blockIdx.x * each + number), U(cuda.blockIdx.y * batch + column)
        # `and` and `&` compile to code that takes more registers, which some kernels do not have
        mine = not (q >= each * batch or output >= outputs or row >= rows)
        return mine, number, column, output, row

    return Owned(ceil(each * batch / threads), place)


class Transfer(NamedTuple):
    """Numbers of each unit, between memory (S, B, H) and registers, those of one unit after another."""

    load: Any  # (source, rows, target)
    store: Any  # (source, rows, target)


def transfer(units: Owned, numbers: int) -> Transfer:
    """For some `numbers` of each unit."""
    most, place = units

    @device
    def load(source: Any, rows: Any, target: Any) -> None:
        for n in range(most):
            mine, _, _, u, b = place(n, rows)
            if mine:
                for i in range(numbers):
                    target[U(n * numbers + i)] = source[i, b, u]

    @device
    def store(source: Any, rows: Any, target: Any) -> None:
        for n in range(most):
            mine, _, _, u, b = place(n, rows)
            if mine:
                for i in range(numbers):
                    target[i, b, u] = source[U(n * numbers + i)]

    return Transfer(load, store)


def handed_on(numbers: int) -> Transfer:
    """For some `numbers` of one unit: (memory, row of the batch, unit, registers)."""

    @device
    def load(source: Any, b: Any, u: Any, target: Any) -> None:
        for i in range(numbers):
            target[U(i)] = source[i, b, u]

    @device
    def store(source: Any, b: Any, u: Any, target: Any) -> None:
        for i in range(numbers):
            target[i, b, u] = source[U(i)]

    return Transfer(load, store)


def times(own: Owned, resets: bool) -> Any:
    """(t, start, rows, lengths, reset, reverse, active, anew): of each one that the thread has, whether its
    sequence has step t, and whether it begins step `start` with the initial state."""
    most, place = own

    @device
    def look_up(
        t: Any, start: Any, rows: Any, lengths: Any, reset: Any, reverse: Any, active: Any, anew: Any
    ) -> None:
        for n in range(most):
            mine, _, _, _, b = place(n, rows)
            if mine:
                active[U(n)] = t < lengths[b]
                anew[U(n)] = resets and starts_anew(reset, start, b, lengths[b], reverse)

    return look_up


@device
def starts_anew(reset: Any, t: Any, b: Any, length: Any, reverse: Any) -> Any:
    """Whether step t of a row begins with the initial state although it is not the first step.

    reset[t] marks a boundary between t-1 and t.
    """
    boundary = t + 1 if reverse else t
    return 0 <= t < length and 0 < boundary < reset.shape[0] and reset[boundary, b]
