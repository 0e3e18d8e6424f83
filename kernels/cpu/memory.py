"""Where the kernels keep what: the memory of a pass, the order of its rows, tables of addresses.

Sequences are sorted by descending length, so that those that run at a step are the first rows, and
padding costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .simd import address, inlined, part, read, splat, store, write, write_int
from .team import LINE
from .tile import PLANES, plane_rows


@inlined
def round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


@inlined
def aligned(array):
    """The first address in an array at which a cache line begins."""
    return round_up(address(array), LINE)


class Sequences(NamedTuple):
    """Which sequences run at which step; rows are sequences in descending order of length."""

    order: Any  # (B,) int64: the sequence of each row
    lengths: Any  # (B,) int64: by row
    first: Any  # (T + 1,) int64: how many rows come before each step; (0,) if all lengths are equal
    reset: Any  # (T, B) bool, or (0, 0)
    reverse: Any  # bool


@inlined
def rows_before(sequences, step):
    """How many rows all steps before this one have together."""
    return sequences.first[step] if sequences.first.size > 0 else step * sequences.order.size


@inlined
def time_of(sequences, step, row):
    """The time, an index of the input, at which a row's sequence is at a step."""
    return sequences.lengths[row] - 1 - step if sequences.reverse else step


@inlined
def starts_anew(sequences, step, row):
    """Whether the state goes back to the initial one before this step."""
    if step == 0:
        return True
    if sequences.reset.size == 0:
        return False
    time = time_of(sequences, step, row) + (1 if sequences.reverse else 0)
    return sequences.reset[time, sequences.order[row]]


@inlined
def row_address(array, sequences, step, row):
    """The address of a row of an array (T, B, ...) at a step."""
    time = time_of(sequences, step, row)
    return address(array) + time * array.strides[0] + sequences.order[row] * array.strides[1]


@part
def note_rows(array, start, end, sequences, table):
    """Write the row addresses of an array (T, B, ...) for some steps to a table."""
    for step in range(start, end):
        for row in range(rows_before(sequences, step + 1) - rows_before(sequences, step)):
            write_int(row_address(array, sequences, step, row), table)
            table += 8


@inlined
def note_entering(step, active, y, sequences, memory, parts, table):
    """Write the addresses of the outputs that enter a step to a table."""
    for row in range(active):
        if starts_anew(sequences, step, row):
            write_int(memory + parts.initial + row * parts.output_width, table + row * 8)
        else:
            write_int(row_address(y, sequences, step - 1, row), table + row * 8)


@inlined
def first_row(spec, step, taped, sequences):
    """Where the rows of the other states after a step begin in Layout.states."""
    if taped:
        return rows_before(sequences, step)
    # two steps take turns if a state is read by all threads while the next one is written
    return step % 2 * sequences.order.size if spec.operand > 0 else 0


@inlined
def state_rows(spec, batch):
    """The rows of Layout.states if no tape is kept."""
    return 2 * batch if spec.operand > 0 else batch


@part
def zero_padding(array, sequences):
    """Zero in an array (T, B, ...) what lies beyond the end of a sequence."""
    if sequences.first.size == 0:
        return
    for row in range(sequences.order.size):
        array[sequences.lengths[row] :, sequences.order[row]] = 0


class Layout(NamedTuple):
    """Where the parts of the memory of a forward pass begin, in bytes, and the lengths of its rows.

    With S other states and N rows: all rows of all steps if a tape is kept, else as in state_rows.
    """

    initial: int  # (B, P): the initial output
    initial_states: int  # (S, B, H)
    states: int  # (S, N, H): the other states after each step
    raw: int  # (N, H): the output before its projection
    gates: int  # (panels, rows of a chunk, or N, inputs * panel): pre-activations
    end: int
    width: int  # bytes of a row of H, padded to whole panels
    output_width: int  # bytes of a row of P, likewise
    rows: int  # N
    gate_rows: int


@part
def layout(spec, hidden, outputs, batch, rows, gate_rows):
    """The memory of a forward pass; `rows` and `gate_rows` as in Layout."""
    width = round_up(hidden, spec.panel) * spec.size
    output_width = round_up(outputs, spec.panel) * spec.size
    initial_states = batch * output_width
    states = initial_states + spec.further * batch * width
    raw = states + spec.further * rows * width
    gates = raw + (rows * width if spec.projected else 0)
    end = gates + gate_rows * width * spec.inputs
    return Layout(0, initial_states, states, raw, gates, end, width, output_width, rows, gate_rows)


class Tables(NamedTuple):
    """Row addresses, 8 bytes each, that a thread notes for the tiles, and scratch space for one tile."""

    inputs: int  # of x, for all rows of a chunk
    entering: int  # of the output that enters a step
    leaving: int  # of the output that leaves it
    raw: int  # of the output before its projection
    states: int  # of the first state that enters a step
    strides: int  # from one entering state to the next
    operands: int  # of what the recurrent weights multiply; `entering` if that is the output
    scratch: int
    end: int


@inlined
def tables(spec, start, chunk_rows, batch):
    """The tables of one thread."""
    entering = start + chunk_rows * 8
    row = batch * 8
    scratch = round_up(entering + 6 * row, LINE)
    end = round_up(scratch + plane_rows(spec) * PLANES * spec.lanes * spec.size, LINE)
    return Tables(
        start,
        entering,
        entering + row,
        entering + 2 * row,
        entering + 3 * row,
        entering + 4 * row,
        entering + (5 * row if spec.operand > 0 else 0),
        scratch,
        end,
    )


@inlined
def note_states(spec, step, active, sequences, memory, parts, taped, table):
    """Note where each row finds the states, beside the output, that enter a step."""
    before = first_row(spec, step - 1, taped, sequences) if step > 0 else 0
    for row in range(active):
        anew = starts_anew(sequences, step, row)
        states = parts.initial_states if anew else parts.states + before * parts.width
        write_int(memory + states + row * parts.width, table.states + row * 8)
        write_int((sequences.order.size if anew else parts.rows) * parts.width, table.strides + row * 8)


@inlined
def note_operands(spec, step, active, y, sequences, memory, parts, taped, table):
    """Write the addresses of what the recurrent weights multiply at a step to a table."""
    if spec.operand == 0:
        note_entering(step, active, y, sequences, memory, parts, table)
    else:
        before = first_row(spec, step - 1, taped, sequences) if step > 0 else 0
        for row in range(active):
            if starts_anew(sequences, step, row):
                place = parts.initial_states + ((spec.operand - 1) * sequences.order.size + row) * parts.width
            else:
                place = parts.states + ((spec.operand - 1) * parts.rows + before + row) * parts.width
            write_int(memory + place, table + row * 8)


@part
def set_rows(spec, source, sequences, target, width):
    """Copy a state (B, n), rows in order, to padded rows of `width` bytes."""
    for row in range(sequences.order.size):
        for k in range(source.shape[1]):
            write(spec, source[sequences.order[row], k], target + row * width + k * spec.size)


@part
def get_rows(spec, source, sequences, target, width):
    """Copy padded rows of `width` bytes to a state (B, n)."""
    for row in range(sequences.order.size):
        for k in range(target.shape[1]):
            target[sequences.order[row], k] = read(spec, source + row * width + k * spec.size)


@part
def fill_zero(spec, start, end):
    """Zero whole vectors from one address to another."""
    for place in range(start, end, spec.lanes * spec.size):
        store(splat(spec, 0.0), place)
