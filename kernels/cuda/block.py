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
        q = cuda.threadIdx.x + n * threads
        number, column = q % each, q // each
        output, row = cuda.blockIdx.x * each + number, cuda.blockIdx.y * batch + column
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
