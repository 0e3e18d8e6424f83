"""From arrays to the record of a pass: what Python calls, compiled for the types of its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from fusedlstm.once import once

from .backward import backward, backward_work
from .compile import c_function, entry_point
from .forward import forward, forward_work
from .memory import round_up
from .records import (
    CALL_FIELDS,
    MEMORY_FIELDS,
    SCRATCH_FIELDS,
    TASK,
    TASK_FIELDS,
    WEIGHT_FIELDS,
    Record,
    record_at,
    task_type,
)
from .simd import OPTIONS, address, inlined, write_int
from .team import LINE
from .work import calling

_WRITABLE = Record("writable task", TASK_FIELDS, constant=False)  # until its pass begins
_writable_at = record_at(_WRITABLE)
_call_pass = calling(5)


def _range(fields: str) -> tuple[int, int]:
    """The places of neighbours in the record of a pass."""
    names = fields.split()
    return TASK[names[0]], TASK[names[-1]] + 1


WORDS = len(TASK)
FIRST_WEIGHT = _range(WEIGHT_FIELDS)[0]
MEMORY, SCRATCH = _range(MEMORY_FIELDS), _range(SCRATCH_FIELDS)
assert _range(CALL_FIELDS)[0] == 0


@inlined
def aligned(array):
    """The first address in an array at which a cache line begins."""
    return round_up(address(array), LINE)


@inlined
def begin(plan, weights, memory, scratch, sequences, states_in, given, states_out, start):
    """Write the record of a pass at `start`, but for its arrays."""
    for n in range(WORDS):
        write_int(plan[n], start + n * 8)
    for n in range(weights.size):
        write_int(weights[n], start + (FIRST_WEIGHT + n) * 8)
    for n in range(MEMORY[0], MEMORY[1]):
        write_int(plan[n] + memory, start + n * 8)
    for n in range(SCRATCH[0], SCRATCH[1]):
        write_int(plan[n] + scratch, start + n * 8)
    task = _writable_at(start)
    order, lengths, first, reset, reverse = sequences
    task.order, task.lengths = address(order), address(lengths)
    task.first = address(first) if first.size > 0 else 0
    task.reset = address(reset) if reset.size > 0 else 0
    task.reset_time, task.reset_row = reset.strides
    task.reverse, task.states_given = int(reverse), int(given)
    task.accumulate = 0
    task.states_in = start + WORDS * 8
    task.states_out = task.states_in + len(states_in) * 16
    for n in range(len(states_in)):
        write_int(address(states_in[n]), task.states_in + n * 16)
        write_int(states_in[n].strides[0], task.states_in + n * 16 + 8)
        write_int(address(states_out[n]), task.states_out + n * 16)
        write_int(states_out[n].strides[0], task.states_out + n * 16 + 8)
    return task


@inlined
def set_arrays(task, x, given, y):
    """Where the input and the output are; without an input it counts as zero."""
    task.x, task.x_time, task.x_row = address(x) if given else 0, x.strides[0], x.strides[1]
    task.y, task.y_time, task.y_row = address(y), y.strides[0], y.strides[1]


@inlined
def set_seeds(task, dy, dx, wanted):
    """Where the gradient of the output is, and where that of the input goes."""
    task.dy, task.dy_time, task.dy_row = address(dy), dy.strides[0], dy.strides[1]
    task.dx, task.dx_time, task.dx_row = address(dx) if wanted else 0, dx.strides[0], dx.strides[1]


def enter_forward(
    team,  # address of a team of threads
    threads,  # how many to use at most
    patience,  # microseconds for which to wait for them
    whole,  # address of forward.forward
    work,  # address of forward.forward_work
    plan,  # plan.Task.words
    weights,  # the record's WEIGHT_FIELDS
    x,  # (T, B, I)
    y,  # (T, B, P), written
    initial,  # (B, P) and (B, H)s; any such arrays if not given
    given,  # whether initial states are given
    final,  # (B, P) and (B, H)s, written
    order,  # as in plan.Sequences
    lengths,
    first,
    reset,  # (T, B), or (0, 0)
    reverse,
    memory,  # bytes
):
    """Run a sequence in one direction."""
    start = aligned(memory)
    task = begin(
        plan, weights, start, 0, (order, lengths, first, reset, reverse), initial, given, final, start
    )
    set_arrays(task, x, True, y)
    _call_pass(whole, (team, threads, patience, work, start))


def enter_again(team, threads, patience, whole, work, start):
    """Run a pass whose record has been written, by an entry that is not this one."""
    _call_pass(whole, (team, threads, patience, work, start))


def enter_backward(
    team,
    threads,
    patience,
    whole,  # address of backward.backward
    work,  # address of backward.backward_work
    plan,
    weights,
    x,
    y,
    dy,  # (T, B, P)
    dx,  # (T, B, I), written or added to; any such array if not wanted
    wanted,  # whether dx is computed
    accumulate,  # whether dx is added to
    dfinal,  # (B, P) and (B, H)s; any such arrays if not given
    given,  # whether gradients of the final states are given
    dinitial,  # (B, P) and (B, H)s, written
    ih,  # gradients of the weights, written
    hh,
    bias_ih,
    bias_hh,
    hr,
    vectors,  # (V, H)
    order,
    lengths,
    first,
    reset,
    reverse,
    memory,  # bytes: what the forward pass left
    scratch,  # bytes
):
    """Run the backward pass of a sequence in one direction."""
    start = aligned(scratch)
    sequences = order, lengths, first, reset, reverse
    task = begin(plan, weights, aligned(memory), start, sequences, dfinal, given, dinitial, start)
    set_arrays(task, x, True, y)
    set_seeds(task, dy, dx, wanted)
    task.accumulate = int(accumulate)
    set_gradients(task, ih, hh, bias_ih, bias_hh, hr, vectors)
    _call_pass(whole, (team, threads, patience, work, start))


@inlined
def set_gradients(task, ih, hh, bias_ih, bias_hh, hr, vectors):
    """Where the gradients of the weights go."""
    task.d_ih, task.d_ih_row, task.d_bias_ih = address(ih), ih.strides[0], address(bias_ih)
    task.d_hh, task.d_hh_row, task.d_bias_hh = address(hh), hh.strides[0], address(bias_hh)
    task.d_hr, task.d_hr_row = address(hr), hr.strides[0]
    task.d_vectors, task.d_vectors_row = address(vectors), vectors.strides[0]


def enter_tangent(
    team,
    threads,
    patience,
    whole,
    work,
    plan,
    weights,
    x,  # (T, B, I), tangents; any such array if they are zero
    moves,  # whether x is given
    y,  # (T, B, P), written
    initial,  # tangents of the initial states
    given,
    final,  # those of the final states, written
    p_x,  # (T, B, I): the values, as the forward pass had them
    p_y,  # (T, B, P)
    order,
    lengths,
    first,
    reset,
    reverse,
    p_memory,  # bytes: what the forward pass left
    memory,  # bytes
):
    """Run the tangent of a forward pass."""
    start = aligned(memory)
    task = begin(
        plan, weights, start, 0, (order, lengths, first, reset, reverse), initial, given, final, start
    )
    set_arrays(task, x, moves, y)
    set_values(task, p_x, p_y, aligned(p_memory) - start)
    _call_pass(whole, (team, threads, patience, work, start))


@inlined
def set_values(task, x, y, shift):
    """Where the values are in a pass of tangents."""
    task.p_x, task.p_x_time, task.p_x_row = address(x), x.strides[0], x.strides[1]
    task.p_y, task.p_y_time, task.p_y_row = address(y), y.strides[0], y.strides[1]
    task.shift = shift


def enter_adjoint_tangent(
    team,
    threads,
    patience,
    whole,
    work,
    plan,
    weights,
    x,  # (T, B, I), tangents; any such array if they are zero
    moves,  # whether x is given
    y,  # (T, B, P), tangents
    p_x,  # (T, B, I): the values
    p_y,  # (T, B, P)
    dy,  # (T, B, P): of the values' backward pass
    dx,  # (T, B, I): the tangent of its dx, written; any such array if not wanted
    wanted,
    dfinal,  # (B, P) and (B, H)s: of the values' backward pass
    given,
    dinitial,  # and all that follows: tangents, written
    ih,
    hh,
    bias_ih,
    bias_hh,
    hr,
    vectors,
    order,
    lengths,
    first,
    reset,
    reverse,
    p_memory,  # bytes: what the forward pass left
    memory,  # bytes: what its tangent left
    scratch,  # bytes
):
    """Run the tangent of a backward pass."""
    start = aligned(scratch)
    sequences = order, lengths, first, reset, reverse
    task = begin(plan, weights, aligned(memory), start, sequences, dfinal, given, dinitial, start)
    set_arrays(task, x, moves, y)
    set_values(task, p_x, p_y, aligned(p_memory) - aligned(memory))
    set_seeds(task, dy, dx, wanted)
    set_gradients(task, ih, hh, bias_ih, bias_hh, hr, vectors)
    _call_pass(whole, (team, threads, patience, work, start))


class Pass(NamedTuple):
    """A compiled pass; keep it as long as it may run."""

    entry: Any  # called without Numba's look at the types of its arguments
    functions: tuple[Any, Any]
    whole: int  # addresses of the functions
    work: int


INT, FLAG, INTS = types.int64, types.boolean, types.int64[::1]
SEQUENCES = (INTS, INTS, INTS, types.Array(FLAG, 2, "A"), FLAG)
BYTES = types.uint8[::1]
HEAD = (INT, INT, INT, INT, INT, INTS, INTS)


def _functions(whole: Any, work: Any, scalar: types.Float, precision: str) -> tuple[Any, Any]:
    task = task_type(scalar, precision)
    return (
        c_function(whole, types.void(INT, INT, INT, INT, task), **OPTIONS),
        c_function(work, types.void(INT, INT, INT, task), **OPTIONS),
    )


def _pass(entry: Any, functions: tuple[Any, Any]) -> Pass:
    return Pass(entry, functions, *(function.address for function in functions))


@once
def _forward_functions(scalar: types.Float, precision: str = "float32") -> tuple[Any, Any]:
    return _functions(forward, forward_work, scalar, precision)


@once
def _backward_functions(scalar: types.Float, precision: str = "float32") -> tuple[Any, Any]:
    return _functions(backward, backward_work, scalar, precision)


@once
def forward_pass(scalar: types.Float, states: int, precision: str = "float32") -> Pass:
    """Compile, or load from Numba's cache; for cells with so many states."""
    return _pass(_forward_entry(scalar, states), _forward_functions(scalar, precision))


@once
def _forward_entry(scalar: types.Float, states: int) -> Any:
    cube, matrices = types.Array(scalar, 3, "A"), types.UniTuple(types.Array(scalar, 2, "A"), states)
    signature = (*HEAD, cube, cube, matrices, FLAG, matrices, *SEQUENCES, BYTES)
    return entry_point(enter_forward, *signature)


@once
def again_pass() -> Any:
    """Compile, or load from Numba's cache."""
    return entry_point(enter_again, *[INT] * 6)


@once
def backward_pass(scalar: types.Float, states: int, precision: str = "float32") -> Pass:
    """Compile, or load from Numba's cache; for cells with so many states."""
    return _pass(_backward_entry(scalar, states), _backward_functions(scalar, precision))


@once
def _backward_entry(scalar: types.Float, states: int) -> Any:
    vector, matrix, cube = scalar[::1], types.Array(scalar, 2, "A"), types.Array(scalar, 3, "A")
    matrices = types.UniTuple(matrix, states)
    arrays = (cube, cube, cube, cube, FLAG, FLAG, matrices, FLAG, matrices)
    gradients = (matrix, matrix, vector, vector, matrix, matrix)
    signature = (*HEAD, *arrays, *gradients, *SEQUENCES, BYTES, BYTES)
    return entry_point(enter_backward, *signature)


@once
def tangent_pass(scalar: types.Float, states: int) -> Pass:
    """Compile, or load from Numba's cache; for cells with so many states."""
    cube, matrices = types.Array(scalar, 3, "A"), types.UniTuple(types.Array(scalar, 2, "A"), states)
    arrays = (cube, FLAG, cube, matrices, FLAG, matrices, cube, cube)
    signature = (*HEAD, *arrays, *SEQUENCES, BYTES, BYTES)
    return _pass(entry_point(enter_tangent, *signature), _forward_functions(scalar))


@once
def adjoint_tangent_pass(scalar: types.Float, states: int) -> Pass:
    """Compile, or load from Numba's cache; for cells with so many states."""
    vector, matrix, cube = scalar[::1], types.Array(scalar, 2, "A"), types.Array(scalar, 3, "A")
    matrices = types.UniTuple(matrix, states)
    arrays = (cube, FLAG, cube, cube, cube, cube, cube, FLAG, matrices, FLAG, matrices)
    gradients = (matrix, matrix, vector, vector, matrix, matrix)
    signature = (*HEAD, *arrays, *gradients, *SEQUENCES, BYTES, BYTES, BYTES)
    return _pass(entry_point(enter_adjoint_tangent, *signature), _backward_functions(scalar))
