"""What the threads of a pass are given: records of 64-bit integers in memory, by name.

Numba takes a function's arguments apart, so that large tuples cost more to compile than what is done with
them.  A record is one address; its entries are read where they are used.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic, lower_setattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from fusedlstm.once import once

from .simd import INT64
from .spec import Named, Registers

# Of one pass, the same for all threads and steps.  Sizes as in plan.py; addresses, and strides in bytes.
CALL_FIELDS = """
    x x_time x_row  y y_time y_row  dy dy_time dy_row  dx dx_time dx_row
    order lengths first reset reset_time reset_row reverse
    states_given states_in states_out accumulate
    p_x p_x_time p_x_row  p_y p_y_time p_y_row  shift
    d_ih d_ih_row d_bias_ih d_hh d_hh_row d_bias_hh d_hr d_hr_row d_vectors d_vectors_row
"""
WEIGHT_FIELDS = """
    product_table products late_table  input_table more_inputs
    input_weights bias recurrent_weights vectors projection
    moved_input_weights moved_recurrent_weights moved_vectors moved_projection
    noise_key_0 noise_key_1 noise_draw
    every_state
"""
# Offsets from the memory of the forward pass and from the scratch memory of the backward pass, to which the
# addresses of these are added.
MEMORY_FIELDS = "initial states operands raw means gates kept partials queues thread_space memory_end"
SCRATCH_FIELDS = """
    carried d_raw d_states d_initial d_initial_states d_learned d_kept products_of_late d_partials d d_stored
    d_outputs
    d_queues d_thread_space scratch_end
"""
PLAN_FIELDS = """
    steps batch inputs hidden outputs chunk taped
    units panel panels slots input_slots further learned operand ring projected
    takes_gates late recurrent_slot recurrent_slots reads_operand  heads spans
    phase_table phases  input_tile input_rows recurrent_rows
    planes_tile plane_tile outer_tile thin_outer_tile  rows_times_planes add_outer launch
    input_order input_gates recurrent_order recurrent_gates late_order no_order
    gate gates_row gates_panel width output_width states_plane operands_plane kept_plane
    mean_row means_plane taped_means_plane partials_plane  d_row thread_bytes  tangents moved_shift
    at_inputs at_entering at_leaving at_projected at_offsets at_operands at_means at_scratch
    at_first at_second at_third at_values  at_more_inputs at_p_entering
    at_stored input_depth input_panel  at_pairs at_rest d_stored_row d_stored_slot
"""
TASK_FIELDS = " ".join([CALL_FIELDS, WEIGHT_FIELDS, MEMORY_FIELDS, SCRATCH_FIELDS, PLAN_FIELDS])
# Of one thread: where things are at a step, and its own space.
OWN_FIELDS = """
    thread threads low high low_vector high_vector low_output high_output
    inputs entering leaving projected offsets operands means scratch  first second third values
    gates here operand_rows taped_means carried carried_row d kept partials step
    more_inputs p_entering stored rest  d_stored pairs
"""


class Record(Named):
    """The address of a record with these fields; reading one that is constant may be moved anywhere.

    A record may tell the registers that code is compiled for: its entry ``registers``.
    """

    def __init__(self, name: str, fields: str, constant: bool, registers: Registers | None = None) -> None:
        self.fields = {field: n for n, field in enumerate(fields.split())}
        self.constant, self.registers = constant, registers
        super().__init__(f"{name}, {' '.join(self.fields)}, {constant}, {registers}")

    @property
    def words(self) -> int:
        """How many words it has."""
        return len(self.fields)

    def place(self, field: str) -> int:
        """Bytes from the address to a field."""
        return 8 * self.fields[field]


TASK = {field: n for n, field in enumerate(TASK_FIELDS.split())}  # places in the record of a pass


@once
def task_type(scalar: types.Float, precision: str = "float32") -> Record:
    """The record of a pass on such numbers, with products in a precision."""
    return Record("task", TASK_FIELDS, True, Registers(scalar, precision))


OWN = Record("own", OWN_FIELDS, constant=False)
PHASE = Record("phase", "address product products rows mean means centers", constant=True)
PRODUCT = Record("product", "tile offset panels late source place", constant=True)
# Of a panel: its weights, bytes from the beginning of a row to what they multiply, and how many groups.
PANEL = Record("panel", "weights shift depth", constant=True)
# Of the planes of the vectors from `low` to `high`: where those of vector 0 would be; bytes from the start
# of a row to what they multiply; how many groups that is, and in how many stretches, so many bytes apart.
PLANES_OF = Record("planes", "low high weights shift depth stretches step", constant=True)
LATE = Record(
    "late",
    "phase from_slot weights slot source place moved_phase moved_from_slot moved_weights",
    constant=True,
)
INPUT = Record("input", "tile rows slot panels source place", constant=True)
# Of one state, where its values after each step go, or their gradients come from; an array of 0 is none.
EVERY = Record("every", "array time row", constant=True)


@register_model(Record)
class _RecordModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, INT64)


@unbox(Record)
def _unbox_record(typ: Any, obj: Any, c: Any) -> NativeValue:
    return c.unbox(types.int64, obj)


@infer_getattr
class _Fields(AttributeTemplate):  # type: ignore[misc]
    key = Record

    def generic_resolve(self, record: Record, name: str) -> Any:
        if name == "registers":
            return record.registers
        return types.int64 if name in record.fields else None


def _pointer(builder: Any, record: Record, value: Any, name: str) -> Any:
    place = builder.add(value, ir.Constant(INT64, record.place(name)))
    return builder.inttoptr(place, INT64.as_pointer())


@lower_getattr_generic(Record)
def _get_field(context: Any, builder: Any, record: Record, value: Any, name: str) -> Any:
    if name == "registers":
        return context.get_dummy_value()
    load = builder.load(_pointer(builder, record, value, name))
    if record.constant:
        load.set_metadata("invariant.load", builder.module.add_metadata([]))
    return load


@lower_setattr_generic(Record)
def _set_field(context: Any, builder: Any, sig: Any, args: Any, name: str) -> None:
    builder.store(args[1], _pointer(builder, sig.args[0], args[0], name))


def record_at(record: Record) -> Any:
    """A function of compiled code that takes an address for a record."""

    @intrinsic
    def at(typingctx: Any, address: Any) -> Any:
        return record(types.int64), lambda context, builder, sig, args: args[0]

    return at


own_at, phase_at, product_at, late_at, input_at, every_at, panel_at, planes_at = map(
    record_at, (OWN, PHASE, PRODUCT, LATE, INPUT, EVERY, PANEL, PLANES_OF)
)


@intrinsic
def address_of(typingctx: Any, record: Any) -> Any:
    """The address of a record."""
    return types.int64(record), lambda context, builder, sig, args: args[0]
