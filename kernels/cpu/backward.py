"""The backward pass: gradients of the input, the initial states and the weights, in one parallel region.

A thread owns the same panels of hidden units as in the forward pass.  At each step, last to first, it
goes through the phases of the cell's adjoint for its panels; after each the threads meet once.  Between two
phases a thread multiplies gradients of late gates by its columns of their weights, and after the last one
those of all other gates by its columns of the recurrent weights, which gives what it needs itself for
the step before.

After each chunk of steps, while the gradients of the gates are still in cache, their products with
inputs and outputs are added to the gradients of the weights, in the layout in which the caller wants
them; each thread fills the rows of its own panels, so that no sums cross threads and the bits do not
depend on timing.
"""

from __future__ import annotations

from .forward import PHASE_BYTES, start_threads, take_place
from .memory import (
    fill_zero,
    get_rows,
    note_all_operands,
    note_entering,
    note_late_operands,
    note_rows,
    note_uniform,
    rows_before,
    rows_of_state,
    set_rows,
    starts_anew,
    state_at_step,
    store_rows,
    take_means,
    zero_padding,
)
from .product import GROUP, add_rows, call_add_outer, call_rows_times_planes
from .records import LATE, PLANES_OF, address_of, late_at, own_at, phase_at
from .shares import Shares, close_queues, each, share
from .simd import (
    inlined,
    load,
    load_row,
    part,
    read,
    read_int,
    splat,
    store,
    store_row,
    store_values,
    write,
)
from .team import LINE, barrier
from .tile import PLANES
from .work import call_phase

DX_ROWS = 64  # rows of the gradient of the input that are one, at most
LATE_BYTES, PLANES_BYTES = 8 * LATE.words, 8 * PLANES_OF.words


@part
def multiply_planes(task, own, count, weights, low, high, length, accumulate):
    """Vectors low to high of the product of the rows of table `first` with planes, to those of `second`.

    The rows are stored as products multiply them.
    """
    for n in range(task.spans):
        call_rows_times_planes(
            task.rows_times_planes,
            (address_of(task), count, own.first, weights + n * PLANES_BYTES, low, high, own.second, length,
             accumulate, own.scratch),
        )  # fmt: skip


@part
def multiply_moved(
    task, own, source, row, moved_source, count, weights, moved_weights, target, width, low, high, length,
    accumulate,
):  # fmt: skip
    """The tangent of a product: of moved rows with the weights, and of rows with the moved weights."""
    note_uniform(moved_source, row, count, own.first)
    note_uniform(target, width, count, own.second)
    multiply_planes(task, own, count, weights, low, high, length, accumulate)
    if moved_weights != 0:
        note_uniform(source, row, count, own.first)
        multiply_planes(task, own, count, moved_weights, low, high, length, 1)


@part
def start_anew(task, step, active, low, high, stride, carried, initial):
    """Where a step starts from the initial state, add the gradient to that of the initial state.

    For the vectors low to high of the rows at `carried`, which then carry nothing on.
    """
    registers = task.registers
    vector = registers.lanes * registers.size
    for row in range(active):
        if starts_anew(task, step, row):
            for place in range(row * stride + low * vector, row * stride + high * vector, vector):
                store(load(registers, initial + place) + load(registers, carried + place), initial + place)
                store(splat(registers, 0.0), carried + place)


@part
def add_state_gradients(task, own, step, active):
    """Add the gradients of the further states after a step to those that are carried."""
    registers = task.registers
    vector = registers.lanes * registers.size
    for n in range(task.further):
        for row in range(active):
            source = state_at_step(task, n, step, row)
            carried = task.d_states + n * task.kept_plane + row * task.width
            for v in range(own.low_vector, own.high_vector if source != 0 else 0):
                given = load_row(registers, source + v * vector, task.hidden - v * registers.lanes)
                store(load(registers, carried + v * vector) + given, carried + v * vector)


@part
def unproject(task, own, here, active, sync):
    """The gradient of the output of a step before its projection: of what is carried plus dy."""
    registers = task.registers
    vector = registers.lanes * registers.size
    d_outputs = task.d_outputs + here * task.output_width
    for row in range(active):
        for v in range(own.low_output, own.high_output):
            left = task.outputs - v * registers.lanes
            dy = load_row(registers, read_int(own.leaving + row * 8) + v * vector, left)
            place = row * task.output_width + v * vector
            store(dy + load(registers, task.carried + place), d_outputs + place)
            if task.tangents:
                moved = load(registers, task.carried + task.moved_shift + place)
                store(moved, d_outputs + task.moved_shift + place)
    barrier(sync, own.threads)
    note_uniform(d_outputs, task.output_width, active, own.first)
    note_uniform(task.d_raw, task.width, active, own.second)
    if registers.value > 0:
        store_rows(task, active, own.first, task.outputs, own.stored, 0)
    low, high = own.low_vector, own.high_vector
    multiply_planes(task, own, active, task.projection, low, high, task.hidden, 0)
    if task.tangents:
        multiply_moved(
            task, own, d_outputs, task.output_width, d_outputs + task.moved_shift, active, task.projection,
            task.moved_projection, task.d_raw + task.moved_shift, task.width, low, high, task.hidden, 0,
        )  # fmt: skip


@part
def multiply_late(task, own, n, active):
    """What phase n of the adjoint is given: products with the transposed weights of late gates."""
    length = task.width // task.registers.size
    low, high = own.low_vector, own.high_vector
    for k in range(task.late):
        late = late_at(task.late_table + k * LATE_BYTES)
        source, target = own.d_stored + late.from_slot * task.d_stored_slot, task.products_of_late
        target += k * task.kept_plane
        if late.phase == n:
            note_uniform(source, task.d_stored_row, active, own.first)
            note_uniform(target, task.width, active, own.second)
            multiply_planes(task, own, active, late.weights, low, high, length, 0)
        if late.moved_phase == n and task.tangents:
            moved = own.d + task.moved_shift + late.moved_from_slot * task.width
            multiply_moved(
                task, own, source, task.d_row, moved, active, late.weights, late.moved_weights,
                target + task.moved_shift, task.width, low, high, length, 0,
            )  # fmt: skip


@part
def multiply_recurrent(task, own, active):
    """The gradient of what the recurrent weights multiplied at a step."""
    if task.recurrent_slots == 0:
        return
    target = task.carried
    if task.operand > 0:
        target = task.d_states + (task.operand - 1) * task.batch * task.width
    source = own.d_stored + task.recurrent_slot * task.d_stored_slot
    length = task.output_width // task.registers.size
    note_uniform(source, task.d_stored_row, active, own.first)
    note_uniform(target, task.output_width, active, own.second)
    low, high = own.low_output, own.high_output
    multiply_planes(task, own, active, task.recurrent_weights, low, high, length, task.reads_operand)
    if task.tangents:
        multiply_moved(
            task, own, source, task.d_row, source + task.moved_shift, active, task.recurrent_weights,
            task.moved_recurrent_weights, target + task.moved_shift, task.output_width, low, high, length,
            task.reads_operand,
        )  # fmt: skip


@part
def store_gradients(task, own, active):
    """Store a thread's own gradients of the gates at a step as products multiply them."""
    registers = task.registers
    for slot in range(task.slots):
        for row in range(active):
            source = own.d + row * task.d_row + slot * task.width
            target = own.d_stored + row * task.d_stored_row + slot * task.d_stored_slot
            for k in range(own.low * task.panel, own.high * task.panel, registers.lanes):
                values = load(registers, source + k * registers.size)
                store_values(registers, values, target + k * registers.value)


@inlined
def step_back(task, own, step, base, sync):
    """The gradients of the gates at a step, and of the states that entered it."""
    before = rows_before(task, step)
    active = rows_before(task, step + 1) - before
    note_entering(task, own, step, active)
    note_rows(task, task.dy, task.dy_time, task.dy_row, step, step + 1, own.leaving)
    if task.every_state != 0:
        add_state_gradients(task, own, step, active)
    if task.projected:
        unproject(task, own, before - base, active, sync)
    own.gates, own.step = task.gates + before * task.gates_row, step
    own.here = task.states + (task.batch + before) * task.width
    own.operand_rows = task.operands + before * task.width
    own.taped_means = task.means + before * task.registers.size
    own.d = task.d + (before - base) * task.d_row
    own.d_stored = task.d_stored + (before - base) * task.d_stored_row
    for n in range(task.phases):
        phase = phase_at(task.phase_table + n * PHASE_BYTES)
        multiply_late(task, own, n, active)
        call_phase(phase.address, (address_of(task), address_of(own), own.low, own.high, 0, active))
        if task.registers.value > 0:
            store_gradients(task, own, active)
        barrier(sync, own.threads)
        take_means(task, task.d_partials, phase.mean, phase.means, phase.centers, own.means)
    multiply_recurrent(task, own, active)
    # empty sequences, the last rows, start with the others, and hand on the gradient of their final state
    starting = task.batch if step == 0 else active
    for side in range(1 + task.tangents):
        shift = side * task.moved_shift
        start_anew(
            task, step, starting, own.low_output, own.high_output, task.output_width, task.carried + shift,
            task.d_initial + shift,
        )  # fmt: skip
        for n in range(task.further):
            place = n * task.kept_plane + shift
            start_anew(
                task, step, starting, own.low_vector, own.high_vector, task.width, task.d_states + place,
                task.d_initial_states + place,
            )  # fmt: skip


@inlined
def add_panels(piece, task, own, start, end, first):
    """Add to the gradients of the input weights, the recurrent weights, or a late gate's, of some panels.

    The tangent of such a gradient is of two products: that of the values' gradients with tangents, and that
    of the tangents of the gradients with values.
    """
    kinds = 2 + task.late
    kind, low = piece % kinds, piece // kinds * GROUP
    high = min(low + GROUP, task.panels)
    count = rows_before(task, end) - rows_before(task, start)
    columns, slot, heads = task.inputs, 0, 1
    gates, gate_count = task.input_order, task.input_gates
    weight, stride, bias = task.d_ih, task.d_ih_row, task.d_bias_ih
    if kind > 0:
        weight, stride, bias = task.d_hh, task.d_hh_row, task.d_bias_hh
        columns, slot, heads = task.outputs, task.recurrent_slot, task.heads
        gates, gate_count = task.recurrent_order, task.recurrent_gates
    if kind > 1:
        late = late_at(task.late_table + (kind - 2) * LATE_BYTES)
        columns, slot = task.hidden, late.slot
        gates, gate_count = task.late_order + (kind - 2) * 8, 1
    if gate_count > 0:
        d = task.d + slot * task.width
        for side in range(1 - task.tangents, 2):  # of the rows: tangents, values
            primal = side == 0
            if kind == 0:
                if primal:
                    note_rows(task, task.p_x, task.p_x_time, task.p_x_row, start, end, own.third)
                elif task.x != 0:
                    note_rows(task, task.x, task.x_time, task.x_row, start, end, own.third)
                else:
                    continue
            elif kind == 1:
                note_all_operands(task, own, start, end, primal, own.third)
            else:
                note_late_operands(task, start, end, late.source, late.place, primal, own.third)
            moved = d + task.moved_shift if primal else d
            # of each head that the panels have units of
            size, end_unit = task.hidden // heads, min(high * task.panel, task.hidden)
            for head in range(low * task.panel // size, (end_unit - 1) // size + 1):
                call_add_outer(
                    task.add_outer,
                    (address_of(task), moved, task.d_row, task.width, count, low, high, gates, gate_count,
                     task.panel, task.hidden, head * size, (head + 1) * size, own.third,
                     head * size * task.registers.size, columns // heads, weight, stride,
                     first if side == 1 - task.tangents else 0, own.values, own.scratch, own.pairs),
                )  # fmt: skip
        d += task.tangents * task.moved_shift
        add_rows(task, d, task.d_row, task.width, count, low, high, gates, gate_count, bias, first)


@inlined
def add_weight_gradients(task, own, shares, start, end):
    """Add what the steps from start to end give to the gradients of the weights."""
    first = 1 if end == task.steps else 0
    base = rows_before(task, start)
    count = rows_before(task, end) - base
    pieces = (2 + task.late) * -(-task.panels // GROUP)
    each(shares, pieces, False, add_panels, (task, own, start, end, first))
    for side in range(1 - task.tangents, 2 if task.projected else 0):
        raw, d_outputs = task.raw, task.d_outputs
        if side == 0:
            raw, d_outputs = raw + task.shift, d_outputs + task.moved_shift
        note_uniform(raw + base * task.width, task.width, count, own.first)
        call_add_outer(
            task.add_outer,
            (address_of(task), d_outputs, task.output_width, 0, count, own.low_output, own.high_output,
             task.no_order, 1, task.registers.lanes, task.outputs, 0, task.outputs, own.first, 0, task.hidden,
             task.d_hr, task.d_hr_row, first if side == 1 - task.tangents else 0, own.values, own.scratch,
             own.pairs),
        )  # fmt: skip


@inlined
def write_block(piece, task, own, count, row_parts):
    """Some rows and columns of the gradient of the input."""
    first, last = share(count, piece % row_parts, row_parts)
    low = piece // row_parts * PLANES
    high = min(low + PLANES, -(-task.inputs // task.registers.lanes))
    to = own.second + first * 8
    for side in range(
        1 + task.tangents
    ):  # of the gradients of gates: of a pass of tangents these first, then the values
        rows, weights, accumulate = own.first + first * 8, task.input_weights, task.accumulate
        if side == 1:
            rows, weights, accumulate = own.third + first * 8, task.moved_input_weights, 1
        if weights != 0:
            call_rows_times_planes(
                task.rows_times_planes,
                (address_of(task), last - first, rows, weights, low, high, to, task.inputs, accumulate,
                 own.scratch),
            )  # fmt: skip


@inlined
def write_gates(piece, task, own, count, row_parts):
    """Some rows of the gradient of an input that is that of the gates."""
    registers = task.registers
    vector = registers.lanes * registers.size
    first, last = share(count, piece, row_parts)
    for row in range(first, last):
        source, to = read_int(own.first + row * 8), read_int(own.second + row * 8)
        for slot in range(task.input_slots):
            column = read_int(task.input_order + slot * 8) * task.hidden * registers.size
            for v in range(-(-task.hidden // registers.lanes)):
                place, valid = to + column + v * vector, task.hidden - v * registers.lanes
                value = load(registers, source + slot * task.width + v * vector)
                if task.accumulate:
                    value = value + load_row(registers, place, valid)
                store_row(registers, value, place, valid)


@inlined
def write_dx(task, own, shares, start, end):
    """The gradient of the input of the steps from start to end."""
    count = rows_before(task, end) - rows_before(task, start)
    moved = task.tangents * task.moved_shift
    if task.takes_gates:
        note_uniform(task.d + moved, task.d_row, count, own.first)
    else:
        note_uniform(task.d_stored + moved, task.d_stored_row, count, own.first)
    note_uniform(task.d, task.d_row, count, own.third)
    note_rows(task, task.dx, task.dx_time, task.dx_row, start, end, own.second)
    row_parts, columns = -(-count // DX_ROWS), -(-task.inputs // (PLANES * task.registers.lanes))
    if task.takes_gates:
        each(shares, row_parts, False, write_gates, (task, own, count, row_parts))
    else:
        each(shares, row_parts * columns, False, write_block, (task, own, count, row_parts))


def backward_work(thread, threads, sync, task):
    """What each thread does; see :func:`backward`."""
    own = own_at(task.d_thread_space + thread * task.thread_bytes)
    take_place(task, own, thread, threads)
    own.kept, own.partials = task.d_kept, task.d_partials
    own.carried, own.carried_row = task.carried, task.output_width
    if task.projected:
        own.carried, own.carried_row = task.d_raw, task.width
    for end in range(task.steps, 0, -task.chunk):
        start = max(end - task.chunk, 0)
        base = rows_before(task, start)
        for step in range(end - 1, start - 1, -1):
            step_back(task, own, step, base, sync)
        add_weight_gradients(task, own, Shares(thread, threads, task.d_queues), start, end)
        if task.dx != 0:
            # queues of their own, so that nobody has to wait in between
            write_dx(task, own, Shares(thread, threads, task.d_queues + threads * LINE), start, end)
        barrier(sync, threads)


@part
def set_final(task):
    """Begin with the gradients of the final states, or with zero."""
    registers = task.registers
    for side in range(1 + task.tangents):
        shift = side * task.moved_shift
        fill_zero(registers, task.carried + shift, task.d_kept + shift)
    if task.states_given:
        for n in range(task.further + 1):
            target, width, columns = rows_of_state(task, n, task.carried, task.d_states, task.kept_plane)
            array, stride = read_int(task.states_in + n * 16), read_int(task.states_in + n * 16 + 8)
            set_rows(task, array, stride, columns, target, width)


@part
def get_initial(task):
    """Copy the gradients of the initial states and of the learned vectors, or their tangents."""
    registers, shift = task.registers, task.tangents * task.moved_shift
    for n in range(task.further + 1):
        source, width, columns = rows_of_state(
            task, n, task.d_initial, task.d_initial_states, task.kept_plane
        )
        array, stride = read_int(task.states_out + n * 16), read_int(task.states_out + n * 16 + 8)
        get_rows(task, source + shift, width, array, stride, columns)
    for n in range(task.learned):
        for k in range(0, task.hidden * registers.size, registers.size):
            value = read(registers, task.d_learned + n * task.width + k)
            write(registers, value, task.d_vectors + n * task.d_vectors_row + k)


def backward(team, threads, patience, work, task):
    """Run a sequence's backward pass: writes dx, the gradients of the initial states and of the weights.

    Arguments as of :func:`forward.forward`.
    """
    set_final(task)
    if task.dx != 0 and not task.accumulate:
        zero_padding(task, task.dx, task.dx_time, task.dx_row, task.inputs)
    close_queues(task.d_queues, 2 * threads)
    start_threads(task, team, threads, patience, work)
    get_initial(task)
