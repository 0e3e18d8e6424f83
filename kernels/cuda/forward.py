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
from math import ceil
from typing import Any

import numpy as np
from numba import cuda

from fusedlstm.cells import Cell

from .plan import Plan
from .product import U, copy, functions, meet, starts_anew
from .scalar import element, update

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
    hidden, outputs = plan.outputs
    units, elements = plan.units, plan.elements
    batch, threads, real = plan.recurrent.batch, plan.threads, plan.recurrent.real
    gates, further, vectors = len(cell.gates), len(cell.states) - 1, len(cell.weights)
    inputs, split = len(cell.preactivations), len(cell.split)
    cells, owned = ceil(units * batch / threads), ceil(elements * batch / threads)  # of one thread
    persistent, projected = plan.form == "persistent", plan.projection is not None
    reads_output, operand = cell.reads_output, cell.operand

    recurrent = functions(plan.recurrent)
    hold, multiply, total, publish = recurrent
    _, multiply_hr, total_hr, publish_raw = functions(plan.projection) if plan.projection else recurrent
    second = plan.projection or plan.recurrent
    step_cell = update(cell, real).step

    number, exchanged = element(real), element(plan.recurrent.operand)
    per_block, per_block_hr = plan.recurrent.weights, second.weights
    kept, kept_hr = plan.recurrent.shared_weights, second.shared_weights
    shared_base = plan.partial // plan.recurrent.operand.itemsize
    shared_base_hr = shared_base + kept
    buffer, buffer_raw = plan.recurrent.depth * batch, second.depth * batch
    registers = max(1, plan.recurrent.held_weights * 4 // plan.recurrent.real_size)
    held_type = element(np.uint32) if plan.recurrent.tensor else number
    # sizes of local arrays, which must be names for Numba to see that they are constant
    all_states, all_gates = max(1, cells * further), cells * gates
    slots, outcome = inputs + 1 + further + vectors, 1 + further
    none = real(0)

    def kernel(
        fed: Any, bias: Any, learned: Any, lengths: Any, reset: Any,
        initial_output: Any, initial_states: Any, output: Any, states: Any, y: Any,
        pre: Any, entering: Any, entering_states: Any, raw: Any,
        exchange: Any, exchange_raw: Any, weights: Any, weights_hr: Any, arrivals: Any,
        first: Any, last: Any, reverse: Any, phase: Any,
    ) -> None:  # fmt: skip
        steps, rows = fed.shape[0], fed.shape[1]
        thread, block, group = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y
        groups, blocks = cuda.gridDim.y, cuda.gridDim.x
        partial = cuda.shared.array(0, number)
        resident = cuda.shared.array(0, exchanged)
        held = cuda.local.array(registers, held_type)
        carried = cuda.local.array(owned, number)  # the output, state 0
        state = cuda.local.array(all_states, number)
        prefetched = cuda.local.array(all_gates, number)
        values = cuda.local.array(slots, number)
        new = cuda.local.array(outcome, number)

        for n in range(owned):
            q = thread + n * threads
            p, b = block * elements + q % elements, group * batch + q // elements
            if q < elements * batch and p < outputs and b < rows:
                carried[U(n)] = output[b, p]
        for n in range(cells):
            q = thread + n * threads
            u, b = block * units + q % units, group * batch + q // units
            if q < units * batch and u < hidden and b < rows:
                for i in range(further):
                    state[U(n * further + i)] = states[i, b, u]
        if persistent:
            hold(weights, block * per_block, held)
            copy(weights, block * per_block, resident, shared_base, kept)
            if projected:
                copy(weights_hr, block * per_block_hr, resident, shared_base_hr, kept_hr)
        if first == 0 and (persistent or last == 0):
            for n in range(owned):
                q = thread + n * threads
                p, b = block * elements + q % elements, group * batch + q // elements
                if q < elements * batch and p < outputs and b < rows:
                    value = state[U(n * further + operand - 1)] if operand > 0 else carried[U(n)]
                    publish(exchange, group * buffer, p, q // elements, value)

        arrived = 0
        for step in range(first, last):
            t = steps - 1 - step if reverse else step
            following = t - 1 if reverse else t + 1
            here = ((step % 2) * groups + group) * buffer
            there = (((step + 1) % 2) * groups + group) * buffer
            if not projected or persistent or phase == 0:
                for n in range(cells):  # in flight while the blocks meet
                    q = thread + n * threads
                    u, b = block * units + q % units, group * batch + q // units
                    if q < units * batch and u < hidden and b < rows:
                        for g in range(gates):
                            prefetched[U(n * gates + g)] = fed[t, b, g * hidden + u]
                if persistent:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                    multiply(resident, shared_base, held, exchange, here, partial)
                else:
                    multiply(weights, block * per_block, held, exchange, here, partial)
                cuda.syncthreads()
                for n in range(cells):
                    q = thread + n * threads
                    unit, column = q % units, q // units
                    u, b = block * units + unit, group * batch + column
                    if q < units * batch and u < hidden and b < rows:
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
                        step_cell(values, new)
                        active = t < lengths[b]
                        if training:
                            for a in range(inputs):
                                pre[t, b, a, u] = values[U(a)]
                            for i in range(further):
                                entering_states[i, t, b, u] = values[U(inputs + 1 + i)]
                        for i in range(further):
                            after = new[U(1 + i)] if active else state[U(n * further + i)]
                            if resets and starts_anew(reset, following, b, lengths[b], reverse):
                                after = initial_states[i, b, u]
                            state[U(n * further + i)] = after
                            if i == operand - 1:
                                publish(exchange, there, u, column, after)
                        if projected:
                            publish_raw(exchange_raw, group * buffer_raw, u, column, new[U(0)])
                            if training:
                                raw[t, b, u] = new[U(0)]
                        else:
                            if training:
                                entering[t, b, u] = carried[U(n)]
                            y[t, b, u] = new[U(0)] if active else none
                            after = new[U(0)] if active else carried[U(n)]
                            if resets and starts_anew(reset, following, b, lengths[b], reverse):
                                after = initial_output[b, u]
                            carried[U(n)] = after
                            if operand == 0:
                                publish(exchange, there, u, column, after)
            if projected and (persistent or phase == 1):
                if persistent:
                    arrived += 1
                    meet(arrivals, group, np.uint64(arrived * blocks))
                    multiply_hr(resident, shared_base_hr, held, exchange_raw, group * buffer_raw, partial)
                else:
                    multiply_hr(
                        weights_hr, block * per_block_hr, held, exchange_raw, group * buffer_raw, partial
                    )
                cuda.syncthreads()
                for n in range(owned):
                    q = thread + n * threads
                    p, b = block * elements + q % elements, group * batch + q // elements
                    if q < elements * batch and p < outputs and b < rows:
                        value = total_hr(partial, q % elements, q // elements)
                        active = t < lengths[b]
                        if training:
                            entering[t, b, p] = carried[U(n)]
                        y[t, b, p] = value if active else none
                        after = value if active else carried[U(n)]
                        if resets and starts_anew(reset, following, b, lengths[b], reverse):
                            after = initial_output[b, p]
                        carried[U(n)] = after
                        publish(exchange, there, p, q // elements, after)

        for n in range(owned):
            q = thread + n * threads
            p, b = block * elements + q % elements, group * batch + q // elements
            if q < elements * batch and p < outputs and b < rows:
                output[b, p] = carried[U(n)]
        for n in range(cells):
            q = thread + n * threads
            u, b = block * units + q % units, group * batch + q // units
            if q < units * batch and u < hidden and b < rows:
                for i in range(further):
                    states[i, b, u] = state[U(n * further + i)]

    return kernel
