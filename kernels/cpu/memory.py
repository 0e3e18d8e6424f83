"""Where the kernels find the rows of a step: the order of the sequences, and tables of addresses.

Sequences are sorted by descending length, so that those that run at a step are the first rows, and
padding costs nothing.
"""

from __future__ import annotations

from .records import EVERY, every_at
from .simd import (
    inlined,
    larger,
    largest_lane,
    load,
    load_row,
    part,
    read,
    read_byte,
    read_int,
    round_whole,
    splat,
    store,
    store_values,
    write,
    write_int,
    write_zero,
)
from .team import LINE

OUTPUT, STATE, OPERAND = 0, 1, 2  # where a late gate finds what its weights multiply, after a step
EVERY_BYTES = 8 * EVERY.words

INTEGERS = 127.0  # the largest that a row is scaled to
REST = 254.0  # times larger is what half of the last place is scaled by
LARGEST = 3.4028234e38  # float32
MOST_FACTOR = 2.0**126  # so that neither it nor one over it is infinite, or less than normal


@inlined
def round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


@inlined
def rows_before(task, step):
    """How many rows all steps before this one have together."""
    return read_int(task.first + step * 8) if task.first != 0 else step * task.batch


@inlined
def sequence_of(task, row):
    """The sequence that a row belongs to."""
    return read_int(task.order + row * 8)


@inlined
def time_of(task, step, row):
    """The time, an index of the input, at which a row's sequence is at a step."""
    return read_int(task.lengths + row * 8) - 1 - step if task.reverse else step


@inlined
def starts_anew(task, step, row):
    """Whether the state goes back to the initial one before this step."""
    if step == 0:
        return True
    if task.reset == 0:
        return False
    time = time_of(task, step, row) + (1 if task.reverse else 0)
    return read_byte(task.reset + time * task.reset_time + sequence_of(task, row) * task.reset_row) != 0


@inlined
def first_row(task, step):
    """Where the rows after a step begin among those of the states and operands."""
    # a ring of 1 or 2 steps: a division would take longer
    return rows_before(task, step) if task.taped else (step & (task.ring - 1)) * task.batch


@inlined
def note_rows(task, array, time_stride, row_stride, start, end, table):
    """Write the row addresses of an array (T, B, ...) for some steps to a table."""
    for step in range(start, end):
        for row in range(rows_before(task, step + 1) - rows_before(task, step)):
            place = time_of(task, step, row) * time_stride + sequence_of(task, row) * row_stride
            write_int(array + place, table)
            table += 8


@part
def note_uniform(start, stride, count, table):
    """Write `count` addresses at equal distances to a table."""
    for n in range(count):
        write_int(start + n * stride, table + n * 8)


@inlined
def note_outputs(task, step, active, initial, y, time_stride, row_stride, table):
    """Write the addresses of the outputs that enter a step, initial or in `y` (T, B, P), to a table."""
    for row in range(active):
        if starts_anew(task, step, row):
            write_int(initial + row * task.output_width, table + row * 8)
        else:
            place = time_of(task, step - 1, row) * time_stride + sequence_of(task, row) * row_stride
            write_int(y + place, table + row * 8)


@inlined
def note_entering(task, own, step, active):
    """Note where the outputs and the other states are that enter a step."""
    note_outputs(task, step, active, task.initial, task.y, task.y_time, task.y_row, own.entering)
    if task.tangents:
        initial = task.initial + task.shift
        note_outputs(task, step, active, initial, task.p_y, task.p_y_time, task.p_y_row, own.p_entering)
    before = task.batch + (first_row(task, step - 1) if step > 0 else 0)
    for row in range(active):
        place = row if starts_anew(task, step, row) else before + row
        write_int(place * task.width, own.offsets + row * 8)


@inlined
def note_operands(task, own, active, entering, shift, table):
    """Write the addresses of what the recurrent weights multiply at a step; outputs as in `entering`."""
    for row in range(active):
        if task.operand == 0:
            write_int(read_int(entering + row * 8), table + row * 8)
        else:
            state = task.states + shift + (task.operand - 1) * task.states_plane
            write_int(state + read_int(own.offsets + row * 8), table + row * 8)


@part
def note_all_operands(task, own, start, end, primal, table):
    """Write the addresses of what the recurrent weights multiply at some steps to a table.

    Of a pass of tangents, those of the values if `primal`.
    """
    for step in range(start, end):
        active = rows_before(task, step + 1) - rows_before(task, step)
        note_entering(task, own, step, active)
        if primal:
            note_operands(task, own, active, own.p_entering, task.shift, table)
        else:
            note_operands(task, own, active, own.entering, 0, table)
        table += active * 8


@part
def note_late_operands(task, start, end, source, place, primal, table):
    """Write the addresses of what a late gate's weights multiplied at some steps to a table."""
    first, last = rows_before(task, start), rows_before(task, end)
    shift = task.shift if primal else 0
    if source == OUTPUT:
        if primal:
            note_rows(task, task.p_y, task.p_y_time, task.p_y_row, start, end, table)
        else:
            note_rows(task, task.y, task.y_time, task.y_row, start, end, table)
    elif source == STATE:
        at = task.states + shift + place * task.states_plane + (task.batch + first) * task.width
        note_uniform(at, task.width, last - first, table)
    else:
        at = task.operands + shift + place * task.operands_plane + first * task.width
        note_uniform(at, task.width, last - first, table)


@inlined
def stored_bytes(registers, columns):
    """Bytes of a stored row: a line with the scale at its end, then whole lines of values."""
    return LINE + round_up(columns * registers.value, LINE)


@part
def store_rows(task, count, table, columns, target, rest):
    """Store rows as products multiply them; their addresses take the place of the old ones in the table.

    An integer row has the scale that its largest number needs: NaN if that is NaN or infinite, so that
    all products of the row are NaN.  If `rest` is the address of another table and not 0, what rounding to
    integers has left is stored as rows of their own, behind the others.
    """
    registers = task.registers
    lanes, size, value = registers.lanes, registers.size, registers.value
    stride = stored_bytes(registers, columns)
    for row in range(count):
        source, to = read_int(table + row * 8), target + row * stride + LINE
        further, factor, scale = 0, 1.0, 1.0
        if registers.integer:
            magnitude = splat(registers, 0.0)
            for k in range(0, columns, lanes):
                magnitude = larger(magnitude, load_row(registers, source + k * size, columns - k))
            most = largest_lane(magnitude)
            factor = min(INTEGERS / most, MOST_FACTOR)
            scale = 1.0 / factor if most <= LARGEST else most - most
            write(registers, scale, to - size)
            if rest != 0:
                further = to + count * stride
                write(registers, scale / REST, further - size)
                write_int(further, rest + row * 8)
        factors, scales = splat(registers, factor), splat(registers, scale)
        for k in range(0, columns, lanes):
            values = load_row(registers, source + k * size, columns - k)
            if registers.integer:
                scaled = values * factors
                if further != 0:
                    left = (values - round_whole(scaled) * scales) * factors
                    store_values(registers, left * REST, further + k * value)
                values = scaled
            store_values(registers, values, to + k * value)
        write_int(to, table + row * 8)


@part
def zero_padding(task, array, time_stride, row_stride, columns):
    """Zero in an array (T, B, columns) what lies beyond the end of a sequence."""
    if task.first == 0:
        return
    registers = task.registers
    for row in range(task.batch):
        for time in range(read_int(task.lengths + row * 8), task.steps):
            start = array + time * time_stride + sequence_of(task, row) * row_stride
            for k in range(columns):
                write_zero(registers, start + k * registers.size)


@part
def take_means(task, partials, mean, means, centers, target):
    """Write the means and variances of a phase, of which so many begin at `mean`.

    A mean is the sum of all vectors of a row in their order, over the number of units.  A variance is that
    of the squares of what differs from the mean over a vector, to which comes how far that mean lies from
    the mean over all (Chan, Golub and LeVeque, 1983); which that is, the table `centers` says, and -1 of a
    mean.  Each thread does so for itself, which costs less than to wait for another.
    """
    registers = task.registers
    lanes, vectors = registers.lanes, -(-task.hidden // registers.lanes)
    for n in range(mean, mean + means):
        center = read_int(centers + (n - mean) * 8)
        for place in range(0, task.mean_row, lanes * registers.size):
            start = partials + n * task.partials_plane + place
            total = load(registers, start)
            for v in range(1, vectors):
                total = total + load(registers, start + v * task.mean_row)
            if center >= 0:
                whole = load(registers, target + center * task.means_plane + place)
                start = partials + center * task.partials_plane + place
                for v in range(vectors):
                    count = min(lanes, task.hidden - v * lanes)
                    moved = load(registers, start + v * task.mean_row) / count - whole
                    total = total + moved * moved * count
            store(total / task.hidden, target + n * task.means_plane + place)


@part
def set_rows(task, source, stride, columns, target, width):
    """Copy a state (B, columns), rows in order, to padded rows of `width` bytes."""
    registers = task.registers
    for row in range(task.batch):
        start = source + sequence_of(task, row) * stride
        for k in range(columns):
            value = read(registers, start + k * registers.size)
            write(registers, value, target + row * width + k * registers.size)


@part
def get_rows(task, source, width, target, stride, columns):
    """Copy padded rows of `width` bytes to a state (B, columns)."""
    registers = task.registers
    for row in range(task.batch):
        start = target + sequence_of(task, row) * stride
        for k in range(columns):
            value = read(registers, source + row * width + k * registers.size)
            write(registers, value, start + k * registers.size)


@inlined
def state_at_step(task, n, step, row):
    """Where further state n of a row is written after a step, or its gradient read; 0 if nowhere."""
    every = every_at(task.every_state + n * EVERY_BYTES)
    if every.array == 0:
        return 0
    return every.array + time_of(task, step, row) * every.time + sequence_of(task, row) * every.row


@inlined
def rows_of_state(task, n, output, states, plane):
    """Where the rows of state n begin, their bytes, and their numbers; the output comes first, by itself."""
    if n == 0:
        return output, task.output_width, task.outputs
    return states + (n - 1) * plane, task.width, task.hidden


@part
def fill_zero(registers, start, end):
    """Zero whole vectors from one address to another."""
    for place in range(start, end, registers.lanes * registers.size):
        store(splat(registers, 0.0), place)
