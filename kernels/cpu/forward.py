"""The forward pass: a whole sequence in one parallel region.

A thread owns some panels of hidden units, with all their gates, for the entire sequence, so its share
of the weights stays in its own cache.  It projects the inputs of a chunk of steps for its panels, then
walks through the steps of the chunk, and through the phases of a step: products, the element-wise code
while the sums are at hand, one barrier.  A thread that is done before the others takes panels of theirs; see
shares.py.
"""

from __future__ import annotations

from .memory import (
    EVERY_BYTES,
    OUTPUT,
    STATE,
    fill_zero,
    first_row,
    note_all_operands,
    note_entering,
    note_late_operands,
    note_operands,
    note_rows,
    note_uniform,
    rows_before,
    rows_of_state,
    sequence_of,
    set_rows,
    state_at_step,
    store_rows,
    stored_bytes,
    take_means,
    time_of,
    zero_padding,
)
from .product import call_rows_times_planes
from .records import (
    INPUT,
    PANEL,
    PHASE,
    PRODUCT,
    address_of,
    every_at,
    input_at,
    own_at,
    panel_at,
    phase_at,
    product_at,
)
from .shares import Shares, close_queues, each, share
from .simd import inlined, load, load_row, part, read, read_int, store, store_row, write, write_int
from .team import barrier
from .tile import tile_product
from .work import call_launch, call_phase

PHASE_BYTES, PRODUCT_BYTES, INPUT_BYTES, PANEL_BYTES = (
    8 * record.words for record in (PHASE, PRODUCT, INPUT, PANEL)
)
X, RECURRENT, LATE = 0, 1, 2  # the values that products before the steps of a pass of tangents multiply


@inlined
def project_inputs(piece, task, own, cut, count, gates):
    """Pre-activations of a panel, or of a part of its rows, from the input: bias + x @ weights."""
    registers = task.registers
    vector = registers.lanes * registers.size
    p = piece // cut
    weights = task.input_weights + p * task.input_panel
    bias = task.bias + p * task.gates_row
    gates = gates + p * task.gates_panel
    blocks = blocks_of(count, task.input_rows)
    low, high = share(blocks, piece % cut, cut)
    for block in range(low, high):
        first, last = share(count, block, blocks)
        start = 0  # of what has no part of the input, and starts from its bias
        if task.x != 0 and task.takes_gates:
            start = task.input_slots * task.gate
            take_gates(task, own, p, first, last, bias, gates)
        elif task.x != 0:
            start = task.input_slots * task.gate
            tile_product(
                task.input_tile, last - first, bias, 0, gates + first * task.gates_row, task.gates_row,
                own.inputs + first * 8, 0, weights, 0, task.input_depth,
            )  # fmt: skip
            if registers.integer:  # what rounding has left: of the input it would be most of the error
                sums = gates + first * task.gates_row
                tile_product(
                    task.input_tile, last - first, sums, task.gates_row, sums, task.gates_row,
                    own.rest + first * 8, 0, weights, 0, task.input_depth,
                )  # fmt: skip
        for place in range(start, task.gates_row, vector):
            value = load(registers, bias + place)
            for row in range(first, last):
                store(value, gates + row * task.gates_row + place)
        for n in range(task.more_inputs):
            add_input(task, own, p, n, first, last, count, gates)


@part
def take_gates(task, own, p, first, last, bias, gates):
    """Pre-activations of some rows of a panel from inputs that are those of the gates: bias + x."""
    registers = task.registers
    vector = registers.lanes * registers.size
    for slot in range(task.input_slots):
        for unit in range(task.units):
            v, place = p * task.units + unit, slot * task.gate + unit * vector
            column = read_int(task.input_order + slot * 8) * task.hidden * registers.size + v * vector
            start, valid = load(registers, bias + place), task.hidden - v * registers.lanes
            for row in range(first, last):
                value = start
                if valid > 0:
                    value = start + load_row(registers, read_int(own.inputs + row * 8) + column, valid)
                store(value, gates + row * task.gates_row + place)


@part
def add_input(task, own, p, n, first, last, count, gates):
    """Add another product to the pre-activations of some rows, of values with weights that move."""
    given = input_at(task.input_table + n * INPUT_BYTES)
    panel = panel_at(given.panels + p * PANEL_BYTES)
    blocks = -(-(last - first) // given.rows)
    for block in range(blocks):
        low, high = share(last - first, block, blocks)
        sums = gates + (first + low) * task.gates_row + given.slot * task.gate
        tile_product(
            given.tile, high - low, sums, task.gates_row, sums, task.gates_row,
            own.more_inputs + (n * count + first + low) * 8, panel.shift, panel.weights, 0, panel.depth,
        )  # fmt: skip


@part
def note_inputs(task, own, start, end, count):
    """Note where the rows are that the products before the steps from start to end multiply."""
    if task.x != 0:
        note_rows(task, task.x, task.x_time, task.x_row, start, end, own.inputs)
        if task.registers.value > 0 and not task.takes_gates:
            store_rows(task, count, own.inputs, task.inputs, own.stored, own.rest)
    for n in range(task.more_inputs):
        given, table = input_at(task.input_table + n * INPUT_BYTES), own.more_inputs + n * count * 8
        if given.source == X:
            note_rows(task, task.p_x, task.p_x_time, task.p_x_row, start, end, table)
        elif given.source == RECURRENT:
            note_all_operands(task, own, start, end, True, table)
        else:
            note_late_operands(task, start, end, given.source - LATE, given.place, True, table)


@inlined
def note_step(task, own, step, active, here, gates):
    """Note where each row finds what enters a step, and where it puts its output."""
    note_entering(task, own, step, active)
    if task.projected:
        note_rows(task, task.y, task.y_time, task.y_row, step, step + 1, own.projected)
        note_uniform(task.raw + here * task.width, task.width, active, own.leaving)
    else:
        note_rows(task, task.y, task.y_time, task.y_row, step, step + 1, own.leaving)
    own.gates = gates
    own.here = task.states + (task.batch + here) * task.width
    own.operand_rows = task.operands + here * task.width
    own.taped_means = task.means + here * task.registers.size
    for n in range(task.products):
        product, rows = product_at(task.product_table + n * PRODUCT_BYTES), own.operands + n * task.batch * 8
        if not product.late:
            note_operands(task, own, active, own.entering, 0, rows)
        elif product.source == OUTPUT:
            for row in range(active):
                write_int(read_int(own.leaving + row * 8), rows + row * 8)
        else:
            start = own.operand_rows + product.place * task.operands_plane
            if product.source == STATE:
                start = own.here + product.place * task.states_plane
            note_uniform(start, task.width, active, rows)


@inlined
def store_operands(task, own, phase, active):
    """Store what the products of a phase multiply; each thread for itself, in its own cache."""
    if task.registers.value > 0:
        to = own.stored
        for n in range(phase.product, phase.product + phase.products):
            product = product_at(task.product_table + n * PRODUCT_BYTES)
            columns = task.hidden if product.late else task.outputs
            store_rows(task, active, own.operands + n * task.batch * 8, columns, to, 0)
            to += active * stored_bytes(task.registers, columns)


@inlined
def multiply(task, own, phase, p, first, last):
    """Add the products of a phase to the pre-activations of some rows of a panel."""
    target = own.gates + p * task.gates_panel + first * task.gates_row
    for n in range(phase.product, phase.product + phase.products):
        product = product_at(task.product_table + n * PRODUCT_BYTES)
        panel, sums = panel_at(product.panels + p * PANEL_BYTES), target + product.offset
        tile_product(
            product.tile, last - first, sums, task.gates_row, sums, task.gates_row,
            own.operands + (n * task.batch + first) * 8, panel.shift, panel.weights, 0, panel.depth,
        )  # fmt: skip


@inlined
def blocks_of(active, most):
    """How many blocks of at most so many rows there are."""
    return 1 if 0 < active <= most else -(-active // most)


@inlined
def run_panel(piece, task, own, cut, active, phase):
    """A phase of a panel, or of a part of its rows: the products, and the code on their sums."""
    p = piece // cut
    blocks = blocks_of(active, phase.rows)
    low, high = share(blocks, piece % cut, cut)
    for block in range(low, high):
        first, last = share(active, block, blocks)
        multiply(task, own, phase, p, first, last)
    if low < high:
        first, last = share(active, low, blocks)[0], share(active, high - 1, blocks)[1]
        call_phase(phase.address, (address_of(task), address_of(own), p, p + 1, first, last))


@inlined
def run_own_panels(task, own, active, phase, backwards):
    """A phase of all panels of a thread."""
    blocks = blocks_of(active, phase.rows)
    for n in range(own.low, own.high if phase.products > 0 else own.low):
        p = own.low + own.high - 1 - n if backwards else n
        for block in range(blocks):
            first, last = share(active, block, blocks)
            multiply(task, own, phase, p, first, last)
        if blocks > 1:  # while the sums are in the first cache
            call_phase(phase.address, (address_of(task), address_of(own), p, p + 1, 0, active))
    if blocks <= 1 or phase.products == 0:
        call_phase(phase.address, (address_of(task), address_of(own), own.low, own.high, 0, active))


@part
def tape_means(task, own, phase, before, active):
    """Write the means of a phase to the tape, with `before` rows in front of them."""
    registers = task.registers
    for n in range(phase.mean, phase.mean + phase.means):
        to = task.means + n * task.taped_means_plane + before * registers.size
        for row in range(active):
            value = read(registers, own.means + n * task.means_plane + row * registers.size)
            write(registers, value, to + row * registers.size)


@part
def write_states(task, own, step, active):
    """Copy the further states after a step to where they are wanted, while they are in a thread's cache."""
    registers = task.registers
    vector = registers.lanes * registers.size
    for n in range(task.further):
        for row in range(active):
            source = own.here + n * task.states_plane + row * task.width
            to = state_at_step(task, n, step, row)
            for v in range(own.low_vector, own.high_vector if to != 0 else 0):
                value = load(registers, source + v * vector)
                store_row(registers, value, to + v * vector, task.hidden - v * registers.lanes)


@part
def take_place(task, own, thread, threads):
    """What is one thread's own."""
    lanes = task.registers.lanes
    own.thread, own.threads = thread, threads
    own.low, own.high = share(task.panels, thread, threads)
    vectors = -(-task.hidden // lanes)
    own.low_vector, own.high_vector = own.low * task.units, min(own.high * task.units, vectors)
    own.low_output, own.high_output = own.low_vector, own.high_vector
    if task.projected:
        own.low_output, own.high_output = share(-(-task.outputs // lanes), thread, threads)
    start = address_of(own)
    own.inputs, own.entering, own.leaving = (
        start + task.at_inputs,
        start + task.at_entering,
        start + task.at_leaving,
    )
    own.projected, own.offsets = start + task.at_projected, start + task.at_offsets
    own.operands, own.means, own.scratch = (
        start + task.at_operands,
        start + task.at_means,
        start + task.at_scratch,
    )
    own.first, own.second, own.third = start + task.at_first, start + task.at_second, start + task.at_third
    own.values, own.more_inputs = start + task.at_values, start + task.at_more_inputs
    own.p_entering = start + task.at_p_entering
    own.stored, own.pairs, own.rest = start + task.at_stored, start + task.at_pairs, start + task.at_rest


def forward_work(thread, threads, sync, task):
    """What each thread does; see :func:`forward`."""
    own = own_at(task.thread_space + thread * task.thread_bytes)
    take_place(task, own, thread, threads)
    own.kept, own.partials = task.kept, task.partials
    # where there is much to do at a step, panels are cut in two, and threads help each other
    together = threads > 1 and task.batch > task.recurrent_rows
    shares, cut = Shares(thread, threads, task.queues if together else 0), 2 if together else 1
    for start in range(0, task.steps, task.chunk):
        end = min(start + task.chunk, task.steps)
        base = rows_before(task, start)
        gates = task.gates + (base * task.gates_row if task.taped else 0)
        count = rows_before(task, end) - base
        note_inputs(task, own, start, end, count)
        each(shares, task.panels * cut, False, project_inputs, (task, own, cut, count, gates))
        if together:
            barrier(sync, threads)
        for step in range(start, end):
            before = rows_before(task, step)
            active = rows_before(task, step + 1) - before
            note_step(
                task, own, step, active, first_row(task, step), gates + (before - base) * task.gates_row
            )
            for n in range(task.phases):
                phase = phase_at(task.phase_table + n * PHASE_BYTES)
                # there and back, so that a step begins with the weights that the one before left in cache
                backwards = step % 2 == 1
                store_operands(task, own, phase, active)
                if together:
                    each(shares, task.panels * cut, backwards, run_panel, (task, own, cut, active, phase))
                else:
                    run_own_panels(task, own, active, phase, backwards)
                barrier(sync, threads)
                if phase.means > 0:
                    take_means(task, task.partials, phase.mean, phase.means, phase.centers, own.means)
                    if task.taped and thread == 0:
                        tape_means(task, own, phase, before, active)
            if task.every_state != 0:
                write_states(task, own, step, active)
            if task.projected:
                if task.registers.value > 0:
                    store_rows(task, active, own.leaving, task.hidden, own.stored, 0)
                call_rows_times_planes(
                    task.rows_times_planes,
                    (address_of(task), active, own.leaving, task.projection, own.low_output, own.high_output,
                     own.projected, task.outputs, 0, own.scratch),
                )  # fmt: skip
                if task.moved_projection != 0:
                    note_uniform(task.raw + task.shift + before * task.width, task.width, active, own.leaving)
                    call_rows_times_planes(
                        task.rows_times_planes,
                        (address_of(task), active, own.leaving, task.moved_projection, own.low_output,
                         own.high_output, own.projected, task.outputs, 1, own.scratch),
                    )  # fmt: skip
                barrier(sync, threads)


@inlined
def start_threads(task, team, threads, patience, work):
    """Call the C function `work` with the task on several threads of a team, as :func:`team.fork` does."""
    call_launch(task.launch, (team, threads, patience, work, address_of(task)))


@part
def set_initial(task):
    """Copy the initial states, padded with zeros; if none are given, all are zero."""
    registers = task.registers
    for n in range(task.further + 1):
        target, width, columns = rows_of_state(task, n, task.initial, task.states, task.states_plane)
        fill_zero(registers, target, target + task.batch * width)
        if task.states_given:
            array, stride = read_int(task.states_in + n * 16), read_int(task.states_in + n * 16 + 8)
            set_rows(task, array, stride, columns, target, width)


@part
def get_final(task):
    """Copy the states after each sequence's last step; of an empty one, the initial states."""
    registers = task.registers
    for row in range(task.batch):
        sequence, last = sequence_of(task, row), read_int(task.lengths + row * 8) - 1
        output, place = task.initial + row * task.output_width, row
        if last >= 0:
            output = task.y + time_of(task, last, row) * task.y_time + sequence * task.y_row
            place = task.batch + first_row(task, last) + row
        for n in range(task.further + 1):
            array, stride = read_int(task.states_out + n * 16), read_int(task.states_out + n * 16 + 8)
            source, columns = output, task.outputs
            if n > 0:
                source, columns = task.states + (n - 1) * task.states_plane + place * task.width, task.hidden
            for k in range(0, columns * registers.size, registers.size):
                write(registers, read(registers, source + k), array + sequence * stride + k)


def forward(team, threads, patience, work, task):
    """Run a sequence in one direction: writes y and the final states, and the tape.

    Args:
        team: address of a team of threads.
        threads: how many to use at most.
        patience: microseconds for which to wait for them.
        work: address of forward_work, compiled.
        task: the record.
    """
    set_initial(task)
    close_queues(task.queues, threads)
    start_threads(task, team, threads, patience, work)
    zero_padding(task, task.y, task.y_time, task.y_row, task.outputs)
    for n in range(task.further if task.every_state != 0 else 0):
        every = every_at(task.every_state + n * EVERY_BYTES)
        if every.array != 0:
            zero_padding(task, every.array, every.time, every.row, task.hidden)
    get_final(task)
