"""The forward kernel: one template for both forms and all options.

Persistent, one launch runs all steps: weights stay in shared memory and registers, states in
registers, and the blocks exchange vectors once a step, twice with a projection or a late gate.  Stepwise, a
launch runs one step, or what is before or behind the second exchange.

Each step: the product of the weights with the exchanged output of the step before, the cell, and
the new output handed to the other blocks.  A second product may be within a step: that of the projection
with the cell's output, or that of a late gate between two phases of the cell.  A block must not overwrite
what another still reads: buffers take turns, and all blocks meet after each half of them
(`Plan.barrier_every`); in between, numbers are polled.  Stepwise, the end of a launch is the meeting.
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

# The arguments of the kernel: name -> what launch.py makes a type of.  T steps, B rows of the batch,
# G gates with input weights, H hidden units, P elements of the output, A pre-activations, S further states,
# V learned vectors, N numbers of a unit that its cell is computed with.
ARGUMENTS = {
    "fed": "real 3",  # (T, B, G*H) input product, gates in the order of cell.input_gates
    "bias": "real 2",  # (A, H) added to the pre-activations
    "learned": "real 2",  # (V, H)
    "lengths": "int64 1",  # (B,)
    "reset": "bool 2",  # (T, B)
    "initial_output": "real 2",  # (B, P)
    "initial_states": "real 3",  # (S, B, H)
    "output": "real 2",  # (B, P) before the first step, then after the last; state 0
    "states": "real 3",  # (S, B, H) likewise
    "y": "real 3 strided",  # (T, B, P) written
    "pre": "real 4",  # (T, B, A, H) written if training; may be the memory of `fed`
    "entering": "real 3",  # (T, B, P) written if training: the output that a step reads
    "entering_states": "real 4",  # (S, T, B, H) written if training
    "inner": "real 3",  # (T, B, H) written if training: what the product within a step multiplies
    "between": "real 3",  # (N, B, H) stepwise with a late gate: written in phase 0, read in phase 1
    "exchange": "operand 1",  # plan.buffers of them
    "exchange_inner": "operand 1",  # likewise
    "weights": "operand 1",  # packed
    "weights_inner": "operand 1",  # packed
    "arrivals": "uint64 1",  # zeros, one for each block of the batch
    "first": "int64",  # steps from first up to last; stepwise, 0 to 0 publishes the initial output
    "last": "int64",
    "reverse": "int64",
    "phase": "int64",  # stepwise with a product within a step: 0 what is before it, 1 it and the rest
}


def build(cell: Cell, plan: Plan, resets: bool, training: bool) -> Callable[..., None]:
    """The kernel as a Python function, for Numba to compile."""
    hidden, units, real = plan.outputs[0], plan.units, plan.recurrent.real
    gates, further, vectors = len(cell.input_gates), len(cell.states) - 1, len(cell.weights)
    inputs, (first_recurrent, end_recurrent) = len(cell.preactivations), recurrent_slots(cell)
    persistent, whole = plan.form == "persistent", plan.inner is None
    projected, late = plan.projection is not None, plan.late is not None
    polling, barrier_every, buffers = plan.polling, plan.barrier_every, plan.buffers
    reads_output, operand = cell.reads_output, cell.operand

    own = owned_units(plan)
    cells, unit_of = own
    own_elements = owned_elements(plan)
    owned, element_of = own_elements
    load_states, store_states = transfer(own, further)
    unit_times, element_times = times(own, resets), times(own_elements, resets)
    recurrent, inner_product = products(plan)
    keep, multiply, total, publish, withdraw = recurrent
    keep_inner, multiply_inner, total_inner, publish_inner, withdraw_inner = inner_product
    numbers = phases(cell, backward=False)
    slots, results, (late_operand, late_slot) = numbers.slots, numbers.results, numbers.late
    run = phase_functions(cell, real, backward=False)
    first_phase, last_phase = run[0], run[-1]  # the same one without a late gate
    inner_slot = late_operand if late else results
    take_over, hand_on = handed_on(slots)

    number, exchanged, flag = element(real), element(plan.recurrent.operand), element(np.bool_)
    held_type = element(np.uint32) if plan.recurrent.tensor else number
    # sizes of local arrays, which must be names for Numba to see that they are constant
    registers = max(1, plan.recurrent.held_weights * 4 // plan.recurrent.real_size)
    same = inputs + vectors  # numbers of a cell that do not change
    all_states, all_gates, all_fixed = max(1, cells * further), cells * gates, cells * same
    # a cell's numbers take the place of those of the one before, if none is needed later
    each = slots if late and persistent else 0
    all_values = max(slots, cells * each)
    none = real(0)

    @device
    def look_up(bias: Any, learned: Any, rows: Any, fixed: Any) -> None:
        """Load what is the same at every step."""
        for n in range(cells):
            mine, _, _, u, _ = unit_of(n, rows)
            if mine:
                for a in range(inputs):
                    fixed[U(n * same + a)] = bias[a, u]
                for i in range(vectors):
                    fixed[U(n * same + inputs + i)] = learned[i, u]

    @device
    def fetch(fed: Any, t: Any, rows: Any, prefetched: Any) -> None:
        """Load the input product of a step; whatever used it here would wait for it."""
        for n in range(cells):
            mine, _, _, u, b = unit_of(n, rows)
            if mine:
                for a in range(gates):
                    prefetched[U(n * gates + a)] = fed[t, b, U(a * hidden + u)]

    @device
    def gather(
        n: Any, unit: Any, column: Any, at: Any,
        fixed: Any, prefetched: Any, partial: Any, carried: Any, state: Any, values: Any,
    ) -> None:  # fmt: skip
        """Put together what the cell computes a unit of, in `values` from place `at` on."""
        for a in range(inputs):
            value = fixed[U(n * same + a)]
            if a < gates:
                value += prefetched[U(n * gates + a)]
            if first_recurrent <= a < end_recurrent:
                value += total(partial, (a - first_recurrent) * units + unit, column)
            values[U(at + a)] = value
        if reads_output:
            values[U(at + inputs)] = carried[U(n)]
        for i in range(further):
            values[U(at + inputs + 1 + i)] = state[U(n * further + i)]
        for i in range(vectors):
            values[U(at + inputs + 1 + further + i)] = fixed[U(n * same + inputs + i)]

    @device
    def advance(
        n: Any, at: Any, u: Any, b: Any, active: Any, anew: Any, values: Any, initial_states: Any, state: Any
    ) -> None:
        """The further states of a unit, after a step."""
        for i in range(further):
            after = values[U(at + results + 1 + i)] if active else state[U(n * further + i)]
            if anew:
                after = initial_states[i, b, u]
            state[U(n * further + i)] = after

    @device
    def carry(
        n: Any, p: Any, b: Any, active: Any, anew: Any, value: Any, initial_output: Any, carried: Any
    ) -> None:
        """What the next step reads of an element of the output."""
        after = value if active else carried[U(n)]
        if anew:
            after = initial_output[b, p]
        carried[U(n)] = after

    @device
    def put_out(t: Any, p: Any, b: Any, active: Any, value: Any, entered: Any, y: Any, entering: Any) -> None:
        """An element of the output of a step, and of the output that the step has read."""
        y[t, b, p] = value if active else none
        if training:
            entering[t, b, p] = entered

    @device
    def multiplied(n: Any, carried: Any, state: Any) -> Any:
        """The state that the recurrent weights multiply."""
        return state[U(n * further + operand - 1)] if operand > 0 else carried[U(n)]

    @device
    def finish(
        n: Any, at: Any, column: Any, u: Any, b: Any, t: Any, there: Any, active: Any, anew: Any,
        values: Any, carried: Any, state: Any, initial_output: Any, initial_states: Any,
        exchange: Any, y: Any, entering: Any,
    ) -> None:  # fmt: skip
        """After the last phase of a unit: its states, and what others wait for before what is stored."""
        advance(n, at, u, b, active, anew, values, initial_states, state)
        if not projected:
            value, entered = values[U(at + results)], carried[U(n)]
            carry(n, u, b, active, anew, value, initial_output, carried)
            publish(exchange, there, u, column, multiplied(n, carried, state))
            put_out(t, u, b, active, value, entered, y, entering)

    @device
    def note(t: Any, u: Any, b: Any, at: Any, values: Any, pre: Any, entering_states: Any) -> None:
        """What a step has read of a unit, for the backward pass; of a late gate, the part that is there."""
        for a in range(inputs):
            pre[t, b, a, u] = values[U(at + a)]
        for i in range(further):
            entering_states[i, t, b, u] = values[U(at + inputs + 1 + i)]

    @device
    def make_ready(half: Any, group: Any, groups: Any, rows: Any, exchange: Any, exchange_inner: Any) -> None:
        """Withdraw what this block has published in one half of the buffers."""
        for buffer in range(half * barrier_every, (half + 1) * barrier_every):
            here = buffer * groups + group
            for n in range(owned):
                mine, _, column, p, _ = element_of(n, rows)
                if mine:
                    withdraw(exchange, here, p, column)
            if not whole:
                for n in range(cells):
                    mine, _, column, u, _ = unit_of(n, rows)
                    if mine:
                        withdraw_inner(exchange_inner, here, u, column)

    def kernel(
        fed: Any, bias: Any, learned: Any, lengths: Any, reset: Any,
        initial_output: Any, initial_states: Any, output: Any, states: Any, y: Any,
        pre: Any, entering: Any, entering_states: Any, inner: Any, between: Any,
        exchange: Any, exchange_inner: Any, weights: Any, weights_inner: Any, arrivals: Any,
        first: Any, last: Any, reverse: Any, phase: Any,
    ) -> None:  # fmt: skip
        steps, rows = fed.shape[0], fed.shape[1]
        group, groups, blocks = cuda.blockIdx.y, cuda.gridDim.y, cuda.gridDim.x
        partial = cuda.shared.array(0, number)
        resident = cuda.shared.array(0, exchanged)
        held = cuda.local.array(registers, held_type)
        carried = cuda.local.array(owned, number)  # the output, state 0
        state = cuda.local.array(all_states, number)
        fixed = cuda.local.array(all_fixed, number)
        prefetched = cuda.local.array(all_gates, number)
        active = cuda.local.array(cells, flag)  # the unit's sequence has this step
        anew = cuda.local.array(cells, flag)  # and begins with the initial state at the next
        active_output = cuda.local.array(owned, flag)  # likewise with a projection, of elements
        anew_output = cuda.local.array(owned, flag)
        values = cuda.local.array(all_values, number)

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                carried[U(n)] = output[b, p]
        load_states(states, rows, state)
        look_up(bias, learned, rows, fixed)
        if persistent:
            keep(weights, resident, held)
            if not whole:
                keep_inner(weights_inner, resident, held)
        if polling:
            make_ready(0, group, groups, rows, exchange, exchange_inner)
        if first == 0 and (persistent or last == 0):
            for n in range(owned):
                mine, _, column, p, b = element_of(n, rows)
                if mine:
                    publish(exchange, group, p, column, multiplied(n, carried, state))

        arrived = 0
        for step in range(first, last):
            t = steps - 1 - step if reverse else step
            following = t - 1 if reverse else t + 1
            now = np.uint64(t)  # for indices
            here, there = (step % buffers) * groups + group, ((step + 1) % buffers) * groups + group
            to_cell = whole or persistent or phase == 0
            to_inner = not whole and (persistent or phase == 1)
            # in flight while the blocks meet
            if to_cell:
                fetch(fed, now, rows, prefetched)
            if to_inner if late else to_cell:
                unit_times(t, following, rows, lengths, reset, reverse, active, anew)
            if projected and to_inner:
                element_times(t, following, rows, lengths, reset, reverse, active_output, anew_output)
            if persistent:
                if step % barrier_every == 0:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                    if polling:
                        half = (step // barrier_every + 1) % 2
                        make_ready(half, group, groups, rows, exchange, exchange_inner)
                else:
                    cuda.syncthreads()  # the partial sums are read
            # others wait for what is published; what is stored beside it comes after
            if to_cell:
                multiply(weights, resident, held, exchange, here, partial)
                cuda.syncthreads()
                for n in range(cells):
                    mine, unit, column, u, b = unit_of(n, rows)
                    if mine:
                        at = n * each
                        gather(n, unit, column, at, fixed, prefetched, partial, carried, state, values)
                        first_phase(values, at)
                        if not whole:
                            publish_inner(exchange_inner, here, u, column, values[U(at + inner_slot)])
                            if training:
                                inner[now, b, u] = values[U(at + inner_slot)]
                        if not late:
                            finish(
                                n, at, column, u, b, now, there, active[U(n)], anew[U(n)],
                                values, carried, state, initial_output, initial_states,
                                exchange, y, entering,
                            )  # fmt: skip
                        if training:
                            note(now, u, b, at, values, pre, entering_states)
                        if late and not persistent:
                            hand_on(values, b, u, between)
            if to_inner:
                if polling:
                    cuda.syncthreads()
                elif persistent:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                multiply_inner(weights_inner, resident, held, exchange_inner, here, partial)
                cuda.syncthreads()
                if late:
                    for n in range(cells):
                        mine, unit, column, u, b = unit_of(n, rows)
                        if mine:
                            at = n * each
                            if not persistent:
                                take_over(between, b, u, values)
                            values[U(at + late_slot)] += total_inner(partial, unit, column)
                            last_phase(values, at)
                            finish(
                                n, at, column, u, b, now, there, active[U(n)], anew[U(n)],
                                values, carried, state, initial_output, initial_states,
                                exchange, y, entering,
                            )  # fmt: skip
                            if training:
                                pre[now, b, late_slot, u] = values[U(at + late_slot)]
                if projected:
                    for n in range(owned):
                        mine, row, column, p, b = element_of(n, rows)
                        if mine:
                            value, entered = total_inner(partial, row, column), carried[U(n)]
                            lives, renewed = active_output[U(n)], anew_output[U(n)]
                            carry(n, p, b, lives, renewed, value, initial_output, carried)
                            publish(exchange, there, p, column, carried[U(n)])
                            put_out(now, p, b, lives, value, entered, y, entering)

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                output[b, p] = carried[U(n)]
        store_states(state, rows, states)

    return kernel
