"""The backward kernel: one template for both forms and all options.

It walks the steps of the forward pass backwards.  Each step: the product of the weights with the
exchanged gate gradients of the step before completes the gradient of the output, the cell's derived
adjoint turns it into the gate gradients of this step, and these are handed to the other blocks.
One more step than the forward pass has leaves the gradient of the initial output.  Gradients of
weights and input are single products afterwards; see engine.py.

Forms, blocks and exchange buffers are as in forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from fusedlstm.cells import Cell

from .block import owned_elements, owned_units, times, transfer
from .plan import Plan
from .product import U, meet, products
from .scalar import device, element, update

# As in forward.py.
ARGUMENTS = {
    "pre": "real 4",  # (T, B, A, H)
    "entering": "real 3",  # (T, B, P)
    "entering_states": "real 4",  # (S, T, B, H)
    "learned": "real 2",  # (V, H)
    "lengths": "int64 1",  # (B,)
    "reset": "bool 2",  # (T, B)
    "dy": "real 3 strided",  # (T, B, P)
    "doutput": "real 2",  # (B, P) gradient of the final output before, of the initial one after
    "dstates": "real 3",  # (S, B, H) likewise
    "total_output": "real 2",  # (B, P) added to: what resets send to the initial output
    "total_states": "real 3",  # (S, B, H) likewise
    "dlearned": "real 3",  # (V, B, H) added to
    "d": "real 4",  # (T, B, A, H) written: gradients of the pre-activations
    "dprojected": "real 3",  # (T, B, P) written with a projection: gradient of its result
    "exchange": "operand 1",  # plan.buffers of them
    "exchange_projected": "operand 1",  # likewise
    "weights": "operand 1",  # packed
    "weights_hr": "operand 1",  # packed
    "arrivals": "uint64 1",  # zeros, one for each block of the batch
    "first": "int64",  # steps from first up to last, T + 1 of them
    "last": "int64",
    "reverse": "int64",
    "phase": "int64",  # stepwise with a projection: 0 the projection's result, 1 the cell
}


def build(cell: Cell, plan: Plan, resets: bool, training: bool) -> Callable[..., None]:
    """The kernel as a Python function, for Numba to compile; a backward pass is always training."""
    hidden, real = plan.outputs[0], plan.recurrent.real
    further, vectors = len(cell.states) - 1, len(cell.weights)
    inputs, split = len(cell.preactivations), len(cell.split)
    persistent, projected = plan.form == "persistent", plan.projection is not None
    polling, barrier_every, buffers = plan.polling, plan.barrier_every, plan.buffers
    operand = cell.operand

    own = owned_units(plan)
    cells, unit_of = own
    own_elements = owned_elements(plan)
    owned, element_of = own_elements
    unit_times, element_times = times(own, resets), times(own_elements, resets)
    load_states, store_states = transfer(own, further)
    load_learned, store_learned = transfer(own, vectors)
    recurrent, projection = products(plan)
    keep, multiply, total, publish, withdraw = recurrent
    keep_hr, multiply_hr, total_hr, publish_hr, withdraw_hr = projection
    adjoint = update(cell, real).adjoint

    number, exchanged, flag = element(real), element(plan.recurrent.operand), element(np.bool_)
    held_type = element(np.uint32) if plan.recurrent.tensor else number
    # sizes of local arrays, which must be names for Numba to see that they are constant
    registers = max(1, plan.recurrent.held_weights * 4 // plan.recurrent.real_size)
    all_states, all_vectors = max(1, cells * further), max(1, cells * vectors)
    slots, outcome = inputs + 1 + further + vectors, 1 + further
    taken = inputs + further + vectors + 2  # numbers of a cell that are prefetched
    all_taken = cells * taken
    none = real(0)

    @device
    def fetch(
        pre: Any, entering: Any, entering_states: Any, learned: Any, dy: Any,
        t: Any, rows: Any, prefetched: Any,
    ) -> None:  # fmt: skip
        """Load what the forward pass has left of a step, learned vectors, and the gradient of the output."""
        for n in range(cells):
            mine, _, _, u, b = unit_of(n, rows)
            if mine:
                at = n * taken
                for a in range(inputs):
                    prefetched[U(at + a)] = pre[t, b, a, u]
                for i in range(further):
                    prefetched[U(at + inputs + i)] = entering_states[i, t, b, u]
                for i in range(vectors):
                    prefetched[U(at + inputs + further + i)] = learned[i, u]
                if not projected:
                    prefetched[U(at + inputs + further + vectors)] = entering[t, b, u]
                    prefetched[U(at + inputs + further + vectors + 1)] = dy[t, b, u]

    @device
    def fetch_output(dy: Any, t: Any, rows: Any, arriving: Any) -> None:
        """With a projection: load the gradient of the output."""
        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                arriving[U(n)] = dy[t, b, p]

    @device
    def complete(
        n: Any, p: Any, b: Any, anew: Any, product: Any,
        carried: Any, state: Any, total_output: Any, total_states: Any,
    ) -> None:  # fmt: skip
        """Add the product to the gradient of what it multiplied; a reset gives all to the initial state."""
        value = carried[U(n)] if operand > 0 else carried[U(n)] + product
        if anew:
            total_output[b, p] += value
            value = none
        carried[U(n)] = value
        if operand > 0:
            value = state[U(n * further + operand - 1)] + product
            if anew:
                total_states[operand - 1, b, p] += value
                value = none
            state[U(n * further + operand - 1)] = value

    @device
    def gather(n: Any, prefetched: Any, carried: Any, state: Any, values: Any, seeds: Any) -> None:
        """Put together what the adjoint of a unit takes; with a projection, seeds[0] is its gradient."""
        at = n * taken
        for a in range(inputs):
            values[U(a)] = prefetched[U(at + a)]
        for i in range(further + vectors):
            values[U(inputs + 1 + i)] = prefetched[U(at + inputs + i)]
        for i in range(further):
            seeds[U(1 + i)] = state[U(n * further + i)]
        if not projected:
            values[U(inputs)] = prefetched[U(at + inputs + further + vectors)]
            seeds[U(0)] = carried[U(n)] + prefetched[U(at + inputs + further + vectors + 1)]

    @device
    def retreat(
        n: Any, u: Any, b: Any, active: Any, anew: Any, gradients: Any,
        carried: Any, state: Any, learning: Any, total_states: Any,
    ) -> None:  # fmt: skip
        """The gradients of the states of a unit before a step, and of its learned vectors."""
        if active and not projected:
            carried[U(n)] = gradients[U(inputs)]
        for i in range(further):
            value = gradients[U(inputs + 1 + i)] if active else state[U(n * further + i)]
            if anew:
                total_states[i, b, u] += value
                value = none
            state[U(n * further + i)] = value
        for i in range(vectors):
            if active:
                learning[U(n * vectors + i)] += gradients[U(inputs + 1 + further + i)]

    @device
    def make_ready(
        half: Any, group: Any, groups: Any, rows: Any, exchange: Any, exchange_projected: Any
    ) -> None:
        """Withdraw what this block has published in one half of the buffers."""
        for buffer in range(half * barrier_every, (half + 1) * barrier_every):
            here = buffer * groups + group
            for n in range(cells):
                mine, _, column, u, _ = unit_of(n, rows)
                if mine:
                    for g in range(inputs - split):
                        withdraw(exchange, here, g * hidden + u, column)
            if projected:
                for n in range(owned):
                    mine, _, column, p, _ = element_of(n, rows)
                    if mine:
                        withdraw_hr(exchange_projected, here, p, column)

    def kernel(
        pre: Any, entering: Any, entering_states: Any, learned: Any, lengths: Any, reset: Any,
        dy: Any, doutput: Any, dstates: Any, total_output: Any, total_states: Any, dlearned: Any,
        d: Any, dprojected: Any,
        exchange: Any, exchange_projected: Any, weights: Any, weights_hr: Any, arrivals: Any,
        first: Any, last: Any, reverse: Any, phase: Any,
    ) -> None:  # fmt: skip
        steps, rows = dy.shape[0], dy.shape[1]
        group, groups, blocks = cuda.blockIdx.y, cuda.gridDim.y, cuda.gridDim.x
        partial = cuda.shared.array(0, number)
        resident = cuda.shared.array(0, exchanged)
        held = cuda.local.array(registers, held_type)
        carried = cuda.local.array(owned, number)  # gradient of the output, state 0
        state = cuda.local.array(all_states, number)  # of the other states
        learning = cuda.local.array(all_vectors, number)
        prefetched = cuda.local.array(all_taken, number)
        arriving = cuda.local.array(owned, number)
        values = cuda.local.array(slots, number)
        gradients = cuda.local.array(slots, number)
        seeds = cuda.local.array(outcome, number)
        active = cuda.local.array(cells, flag)  # the unit's sequence has this step
        anew = cuda.local.array(cells, flag)  # and begins it with the initial state
        active_output = cuda.local.array(owned, flag)  # likewise of elements; anew at the step after
        anew_output = cuda.local.array(owned, flag)

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                carried[U(n)] = doutput[b, p]
        load_states(dstates, rows, state)
        load_learned(dlearned, rows, learning)
        if persistent:
            keep(weights, resident, held)
            if projected:
                keep_hr(weights_hr, resident, held)

        if polling:
            make_ready(0, group, groups, rows, exchange, exchange_projected)

        arrived = 0
        for step in range(first, last):
            t = step if reverse else steps - 1 - step
            later = t - 1 if reverse else t + 1
            now = np.uint64(t) if step < steps else np.uint64(0)  # for indices
            here, there = (step % buffers) * groups + group, ((step + 1) % buffers) * groups + group
            to_cell = step < steps and (not projected or persistent or phase == 1)
            # in flight while the blocks meet
            if to_cell:
                fetch(pre, entering, entering_states, learned, dy, now, rows, prefetched)
                unit_times(t, t, rows, lengths, reset, reverse, active, anew)
            if not projected or persistent or phase == 0:
                element_times(t, later, rows, lengths, reset, reverse, active_output, anew_output)
                if projected and step < steps:
                    fetch_output(dy, now, rows, arriving)
            if persistent:
                if step % barrier_every == 0:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                    if polling:
                        half = (step // barrier_every + 1) % 2
                        make_ready(half, group, groups, rows, exchange, exchange_projected)
                else:
                    cuda.syncthreads()  # the partial sums are read
            if not projected or persistent or phase == 0:
                if step > 0:
                    multiply(weights, resident, held, exchange, here, partial)
                    cuda.syncthreads()
                    for n in range(owned):
                        mine, row, column, p, b = element_of(n, rows)
                        if mine:
                            product = total(partial, row, column)
                            renewed = anew_output[U(n)]
                            complete(n, p, b, renewed, product, carried, state, total_output, total_states)
                if projected and step < steps:
                    for n in range(owned):
                        mine, _, column, p, b = element_of(n, rows)
                        if mine:
                            value = none
                            if active_output[U(n)]:
                                value = carried[U(n)] + arriving[U(n)]
                                carried[U(n)] = none
                            publish_hr(exchange_projected, here, p, column, value)
                            dprojected[now, b, p] = value
            if to_cell:
                if projected:
                    if polling:
                        cuda.syncthreads()
                    elif persistent:
                        arrived += 1
                        meet(arrivals, group, np.uint64(arrived * blocks))
                    multiply_hr(weights_hr, resident, held, exchange_projected, here, partial)
                    cuda.syncthreads()
                for n in range(cells):
                    mine, unit, column, u, b = unit_of(n, rows)
                    if mine:
                        lives = active[U(n)]
                        gather(n, prefetched, carried, state, values, seeds)
                        if projected:
                            seeds[U(0)] = total_hr(partial, unit, column)
                        adjoint(values, seeds, gradients)
                        for a in range(inputs):
                            values[U(a)] = gradients[U(a)] if lives else none
                        # others wait for what is published; what is stored beside it comes after
                        for a in range(split, inputs):
                            publish(exchange, there, (a - split) * hidden + u, column, values[U(a)])
                        for a in range(inputs):
                            d[now, b, a, u] = values[U(a)]
                        retreat(n, u, b, lives, anew[U(n)], gradients, carried, state, learning, total_states)

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                doutput[b, p] = carried[U(n)]
        store_states(state, rows, dstates)
        store_learned(learning, rows, dlearned)

    return kernel
