"""The backward kernel: one template for both forms and all options.

It walks the steps of the forward pass backwards.  Each step: the product of the weights with the
exchanged gate gradients of the step before completes the gradient of the output, the cell's derived
adjoint turns it into the gate gradients of this step, and these are handed to the other blocks.
Between two phases of the adjoint, the gradient of a late gate is exchanged and multiplied by its weights.
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

from .block import handed_on, owned_elements, owned_units, times, transfer
from .phases import phases, recurrent_slots
from .plan import Plan
from .product import U, meet, products
from .scalar import device, element, phase_functions

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
    "between": "real 3",  # (N, B, H) stepwise with a late gate: written in phase 0, read in phase 1
    "exchange": "operand 1",  # plan.buffers of them
    "exchange_inner": "operand 1",  # likewise
    "weights": "operand 1",  # packed
    "weights_inner": "operand 1",  # packed
    "arrivals": "uint64 1",  # zeros, one for each block of the batch
    "first": "int64",  # steps from first up to last, T + 1 of them
    "last": "int64",
    "reverse": "int64",
    "phase": "int64",  # stepwise with a product within a step: 0 what is before it, 1 it and the rest
}


def build(cell: Cell, plan: Plan, resets: bool, training: bool) -> Callable[..., None]:
    """The kernel as a Python function, for Numba to compile; a backward pass is always training."""
    hidden, real = plan.outputs[0], plan.recurrent.real
    further, vectors = len(cell.states) - 1, len(cell.weights)
    inputs, (first_recurrent, end_recurrent) = len(cell.preactivations), recurrent_slots(cell)
    persistent, whole = plan.form == "persistent", plan.inner is None
    projected, late = plan.projection is not None, plan.late is not None
    polling, barrier_every, buffers = plan.polling, plan.barrier_every, plan.buffers
    operand = cell.operand

    own = owned_units(plan)
    cells, unit_of = own
    own_elements = owned_elements(plan)
    owned, element_of = own_elements
    unit_times, element_times = times(own, resets), times(own_elements, resets)
    load_states, store_states = transfer(own, further)
    load_learned, store_learned = transfer(own, vectors)
    recurrent, inner_product = products(plan)
    keep, multiply, total, publish, withdraw = recurrent
    keep_inner, multiply_inner, total_inner, publish_inner, withdraw_inner = inner_product
    numbers = phases(cell, backward=True)
    slots, results, (late_gradient, late_product) = numbers.slots, numbers.results, numbers.late
    run = phase_functions(cell, real, backward=True)
    first_phase, last_phase = run[0], run[-1]  # the same one without a late gate
    take_over, hand_on = handed_on(slots)

    number, exchanged, flag = element(real), element(plan.recurrent.operand), element(np.bool_)
    held_type = element(np.uint32) if plan.recurrent.tensor else number
    # sizes of local arrays, which must be names for Numba to see that they are constant
    registers = max(1, plan.recurrent.held_weights * 4 // plan.recurrent.real_size)
    all_states, all_vectors = max(1, cells * further), max(1, cells * vectors)
    # a cell's numbers take the place of those of the one before, if none is needed later
    each = slots if late and persistent else 0
    all_values = max(slots, cells * each)
    seeds = inputs + 1 + further + vectors  # where they begin
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
    def gather(n: Any, at: Any, prefetched: Any, carried: Any, state: Any, values: Any) -> None:
        """Put together what the adjoint of a unit takes, in `values` from place `at` on; with a projection,
        the gradient of the output is still to come."""
        there = n * taken
        for a in range(inputs):
            values[U(at + a)] = prefetched[U(there + a)]
        for i in range(further + vectors):
            values[U(at + inputs + 1 + i)] = prefetched[U(there + inputs + i)]
        for i in range(further):
            values[U(at + seeds + 1 + i)] = state[U(n * further + i)]
        if not projected:
            values[U(at + inputs)] = prefetched[U(there + inputs + further + vectors)]
            values[U(at + seeds)] = carried[U(n)] + prefetched[U(there + inputs + further + vectors + 1)]

    @device
    def retreat(
        n: Any, at: Any, u: Any, b: Any, active: Any, anew: Any, values: Any,
        carried: Any, state: Any, learning: Any, total_states: Any,
    ) -> None:  # fmt: skip
        """The gradients of the states of a unit before a step, and of its learned vectors."""
        gradients = at + results + inputs
        if active and not projected:
            carried[U(n)] = values[U(gradients)]
        for i in range(further):
            value = values[U(gradients + 1 + i)] if active else state[U(n * further + i)]
            if anew:
                total_states[i, b, u] += value
                value = none
            state[U(n * further + i)] = value
        for i in range(vectors):
            if active:
                learning[U(n * vectors + i)] += values[U(gradients + 1 + further + i)]

    @device
    def make_ready(half: Any, group: Any, groups: Any, rows: Any, exchange: Any, exchange_inner: Any) -> None:
        """Withdraw what this block has published in one half of the buffers."""
        for buffer in range(half * barrier_every, (half + 1) * barrier_every):
            here = buffer * groups + group
            for n in range(cells):
                mine, _, column, u, _ = unit_of(n, rows)
                if mine:
                    for g in range(end_recurrent - first_recurrent):
                        withdraw(exchange, here, g * hidden + u, column)
            if not whole:  # the units are the elements without a projection
                for n in range(owned):
                    mine, _, column, p, _ = element_of(n, rows)
                    if mine:
                        withdraw_inner(exchange_inner, here, p, column)

    def kernel(
        pre: Any, entering: Any, entering_states: Any, learned: Any, lengths: Any, reset: Any,
        dy: Any, doutput: Any, dstates: Any, total_output: Any, total_states: Any, dlearned: Any,
        d: Any, dprojected: Any, between: Any,
        exchange: Any, exchange_inner: Any, weights: Any, weights_inner: Any, arrivals: Any,
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
        values = cuda.local.array(all_values, number)
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
            if not whole:
                keep_inner(weights_inner, resident, held)

        if polling:
            make_ready(0, group, groups, rows, exchange, exchange_inner)

        arrived = 0
        for step in range(first, last):
            t = step if reverse else steps - 1 - step
            later = t - 1 if reverse else t + 1
            now = np.uint64(t) if step < steps else np.uint64(0)  # for indices
            here, there = (step % buffers) * groups + group, ((step + 1) % buffers) * groups + group
            to_product = whole or persistent or phase == 0
            to_cell = step < steps and (whole or persistent or phase == 1)
            to_late = late and step < steps and to_product
            # in flight while the blocks meet
            if to_late if late else to_cell:
                fetch(pre, entering, entering_states, learned, dy, now, rows, prefetched)
            if to_late or to_cell:
                unit_times(t, t, rows, lengths, reset, reverse, active, anew)
            if to_product:
                element_times(t, later, rows, lengths, reset, reverse, active_output, anew_output)
                if projected and step < steps:
                    fetch_output(dy, now, rows, arriving)
            if persistent:
                if step % barrier_every == 0:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                    if polling:
                        half = (step // barrier_every + 1) % 2
                        make_ready(half, group, groups, rows, exchange, exchange_inner)
                else:
                    cuda.syncthreads()  # the partial sums are read
            if to_product:
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
                            publish_inner(exchange_inner, here, p, column, value)
                            dprojected[now, b, p] = value
            if to_late:
                for n in range(cells):
                    mine, _, column, u, b = unit_of(n, rows)
                    if mine:
                        at = n * each
                        gather(n, at, prefetched, carried, state, values)
                        first_phase(values, at)
                        value = values[U(at + late_gradient)] if active[U(n)] else none
                        publish_inner(exchange_inner, here, u, column, value)
                        if not persistent:
                            hand_on(values, b, u, between)
            if to_cell:
                if not whole:
                    if polling:
                        cuda.syncthreads()
                    elif persistent:
                        arrived += 1
                        meet(arrivals, group, np.uint64(arrived * blocks))
                    multiply_inner(weights_inner, resident, held, exchange_inner, here, partial)
                    cuda.syncthreads()
                for n in range(cells):
                    mine, unit, column, u, b = unit_of(n, rows)
                    if mine:
                        at, lives = n * each, active[U(n)]
                        if late and not persistent:
                            take_over(between, b, u, values)
                        if late:
                            values[U(at + late_product)] = total_inner(partial, unit, column)
                        else:
                            gather(n, at, prefetched, carried, state, values)
                            if projected:
                                values[U(at + seeds)] = total_inner(partial, unit, column)
                        last_phase(values, at)
                        if not lives:
                            for a in range(inputs):
                                values[U(at + results + a)] = none
                        # others wait for what is published; what is stored beside it comes after
                        for a in range(first_recurrent, end_recurrent):
                            value = values[U(at + results + a)]
                            publish(exchange, there, (a - first_recurrent) * hidden + u, column, value)
                        for a in range(inputs):
                            d[now, b, a, u] = values[U(at + results + a)]
                        retreat(
                            n, at, u, b, lives, anew[U(n)], values, carried, state, learning, total_states
                        )

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                doutput[b, p] = carried[U(n)]
        store_states(state, rows, dstates)
        store_learned(learning, rows, dlearned)

    return kernel
