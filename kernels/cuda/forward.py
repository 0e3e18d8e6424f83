"""The forward kernel: one template for both forms and all options.

Persistent, one launch runs all steps: weights stay in shared memory and registers, states in
registers, and the blocks meet once a step (twice with a projection).  Stepwise, a launch runs one
step, or one of its two phases with a projection; the end of the launch is the meeting.

Each step: the product of the weights with the exchanged output of the step before, the cell, and
the new output handed to the other blocks.  Two exchange buffers take turns, so that a fast block
does not overwrite what a slow one still reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from fusedlstm.cells import Cell

from .block import owned_elements, owned_units, transfer
from .plan import Plan
from .product import U, meet, products, starts_anew
from .scalar import device, element, update

# The arguments of the kernel: name -> what launch.py makes a type of.  T steps, B rows of the batch,
# G gates, H hidden units, P elements of the output, A pre-activations, S further states, V learned
# vectors.
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
    "raw": "real 3",  # (T, B, H) written if training with a projection: the output before it
    "exchange": "operand 1",  # two buffers
    "exchange_raw": "operand 1",
    "weights": "operand 1",  # packed
    "weights_hr": "operand 1",  # packed
    "arrivals": "uint64 1",  # zeros, one for each block of the batch
    "first": "int64",  # steps from first up to last; stepwise, 0 to 0 publishes the initial output
    "last": "int64",
    "reverse": "int64",
    "phase": "int64",  # stepwise with a projection: 0 the cell, 1 the projection
}


def build(cell: Cell, plan: Plan, resets: bool, training: bool) -> Callable[..., None]:
    """The kernel as a Python function, for Numba to compile."""
    hidden, units, real = plan.outputs[0], plan.units, plan.recurrent.real
    gates, further, vectors = len(cell.gates), len(cell.states) - 1, len(cell.weights)
    inputs, split = len(cell.preactivations), len(cell.split)
    persistent, projected = plan.form == "persistent", plan.projection is not None
    reads_output, operand = cell.reads_output, cell.operand

    own = owned_units(plan)
    cells, unit_of = own
    owned, element_of = owned_elements(plan)
    load_states, store_states = transfer(own, further)
    (keep, multiply, total, publish), (keep_hr, multiply_hr, total_hr, publish_raw) = products(plan)
    step_cell = update(cell, real).step

    number, exchanged = element(real), element(plan.recurrent.operand)
    held_type = element(np.uint32) if plan.recurrent.tensor else number
    # sizes of local arrays, which must be names for Numba to see that they are constant
    registers = max(1, plan.recurrent.held_weights * 4 // plan.recurrent.real_size)
    all_states, all_gates = max(1, cells * further), cells * gates
    slots, outcome = inputs + 1 + further + vectors, 1 + further
    none = real(0)

    @device
    def fetch(fed: Any, t: Any, rows: Any, prefetched: Any) -> None:
        """Load the input product of a step."""
        for n in range(cells):
            mine, _, _, u, b = unit_of(n, rows)
            if mine:
                for g in range(gates):
                    prefetched[U(n * gates + g)] = fed[t, b, g * hidden + u]

    @device
    def gather(
        n: Any, unit: Any, column: Any, u: Any,
        bias: Any, learned: Any, prefetched: Any, partial: Any, carried: Any, state: Any, values: Any,
    ) -> None:  # fmt: skip
        """Put together what the cell computes a unit of."""
        for a in range(inputs):
            value = bias[a, u]
            if a < gates:
                value += prefetched[U(n * gates + a)]
            if a >= split:
                value += total(partial, (a - split) * units + unit, column)
            values[U(a)] = value
        if reads_output:
            values[U(inputs)] = carried[U(n)]
        for i in range(further):
            values[U(inputs + 1 + i)] = state[U(n * further + i)]
        for i in range(vectors):
            values[U(inputs + 1 + further + i)] = learned[i, u]

    @device
    def advance(
        n: Any, u: Any, b: Any, active: Any, anew: Any, new: Any, initial_states: Any, state: Any
    ) -> None:
        """The further states of a unit, after a step."""
        for i in range(further):
            after = new[U(1 + i)] if active else state[U(n * further + i)]
            if anew:
                after = initial_states[i, b, u]
            state[U(n * further + i)] = after

    @device
    def put_out(
        n: Any, t: Any, p: Any, b: Any, active: Any, anew: Any,
        value: Any, initial_output: Any, carried: Any, y: Any, entering: Any,
    ) -> None:  # fmt: skip
        """An element of the output of a step, and what the next step reads of it."""
        if training:
            entering[t, b, p] = carried[U(n)]
        y[t, b, p] = value if active else none
        after = value if active else carried[U(n)]
        if anew:
            after = initial_output[b, p]
        carried[U(n)] = after

    @device
    def multiplied(n: Any, carried: Any, state: Any) -> Any:
        """The state that the recurrent weights multiply."""
        return state[U(n * further + operand - 1)] if operand > 0 else carried[U(n)]

    def kernel(
        fed: Any, bias: Any, learned: Any, lengths: Any, reset: Any,
        initial_output: Any, initial_states: Any, output: Any, states: Any, y: Any,
        pre: Any, entering: Any, entering_states: Any, raw: Any,
        exchange: Any, exchange_raw: Any, weights: Any, weights_hr: Any, arrivals: Any,
        first: Any, last: Any, reverse: Any, phase: Any,
    ) -> None:  # fmt: skip
        steps, rows = fed.shape[0], fed.shape[1]
        group, groups, blocks = cuda.blockIdx.y, cuda.gridDim.y, cuda.gridDim.x
        partial = cuda.shared.array(0, number)
        resident = cuda.shared.array(0, exchanged)
        held = cuda.local.array(registers, held_type)
        carried = cuda.local.array(owned, number)  # the output, state 0
        state = cuda.local.array(all_states, number)
        prefetched = cuda.local.array(all_gates, number)
        values = cuda.local.array(slots, number)
        new = cuda.local.array(outcome, number)

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                carried[U(n)] = output[b, p]
        load_states(states, rows, state)
        if persistent:
            keep(weights, resident, held)
            if projected:
                keep_hr(weights_hr, resident, held)
        if first == 0 and (persistent or last == 0):
            for n in range(owned):
                mine, _, column, p, b = element_of(n, rows)
                if mine:
                    publish(exchange, group, p, column, multiplied(n, carried, state))

        arrived = 0
        for step in range(first, last):
            t = steps - 1 - step if reverse else step
            following = t - 1 if reverse else t + 1
            here, there = (step % 2) * groups + group, ((step + 1) % 2) * groups + group
            if not projected or persistent or phase == 0:
                fetch(fed, t, rows, prefetched)  # in flight while the blocks meet
                if persistent:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                multiply(weights, resident, held, exchange, here, partial)
                cuda.syncthreads()
                for n in range(cells):
                    mine, unit, column, u, b = unit_of(n, rows)
                    if mine:
                        gather(n, unit, column, u, bias, learned, prefetched, partial, carried, state, values)
                        step_cell(values, new)
                        active = t < lengths[b]
                        anew = resets and starts_anew(reset, following, b, lengths[b], reverse)
                        if training:
                            for a in range(inputs):
                                pre[t, b, a, u] = values[U(a)]
                            for i in range(further):
                                entering_states[i, t, b, u] = values[U(inputs + 1 + i)]
                        advance(n, u, b, active, anew, new, initial_states, state)
                        if projected:
                            publish_raw(exchange_raw, group, u, column, new[U(0)])
                            if training:
                                raw[t, b, u] = new[U(0)]
                        else:
                            put_out(n, t, u, b, active, anew, new[U(0)], initial_output, carried, y, entering)
                            publish(exchange, there, u, column, multiplied(n, carried, state))
            if projected and (persistent or phase == 1):
                if persistent:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                multiply_hr(weights_hr, resident, held, exchange_raw, group, partial)
                cuda.syncthreads()
                for n in range(owned):
                    mine, row, column, p, b = element_of(n, rows)
                    if mine:
                        value = total_hr(partial, row, column)
                        active = t < lengths[b]
                        anew = resets and starts_anew(reset, following, b, lengths[b], reverse)
                        put_out(n, t, p, b, active, anew, value, initial_output, carried, y, entering)
                        publish(exchange, there, p, column, carried[U(n)])

        for n in range(owned):
            mine, _, _, p, b = element_of(n, rows)
            if mine:
                output[b, p] = carried[U(n)]
        store_states(state, rows, states)

    return kernel
