"""The element-wise code of a step's phases, on SIMD vectors in memory.

A phase is a C function of its own, called through its address for as many panels and rows as are at hand:
of a cell nothing else is compiled.  Its code is that of :class:`fusedlstm.step.Phase`, in loops over panels,
rows and the vectors of a panel, between loads and stores.  Where a row ends within a vector (`valid` lanes
are left), no memory beyond it is touched.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from numba import types

from fusedlstm.derive import compile_source
from fusedlstm.math import DERIVATIVES
from fusedlstm.once import once
from fusedlstm.step import Phase, Value

from . import simd
from .compile import c_function
from .memory import sequence_of, time_of
from .records import OWN, task_type
from .simd import OPTIONS, inlined
from .spec import Registers

if TYPE_CHECKING:
    from fusedlstm.cells import Cell


class _Places(NamedTuple):
    """How the code of a pass reads values and writes them: texts in which {value} is what is written.

    Other values are added up over the rows, to what is at a place.
    """

    reads: dict[Value, str]
    writes: dict[Value, str]
    added: Mapping[Value, str] = {}


# Names in these texts are those of records.py: what a pass or a thread is given.
_ROW = "row * width + column"
_OF_A_ROW = {"row", "at", "noise"}
_NOISE = (
    "uniforms(registers, column // SIZE, time_of(task, step, row), sequence_of(task, row), noise_draw, "
    "noise_key_0, noise_key_1)"
)


def _load(place: str) -> str:
    return f"load(registers, {place})"


def _entry(what: str, n: int, plane: str) -> str:
    """Row `row` of entry n of one of several arrays of rows, `plane` bytes apart."""
    return f"{what} + {n} * {plane} + {_ROW}"


def _number(what: str, n: int, plane: str) -> str:
    return f"splat(registers, read(registers, {what} + {n} * {plane} + row * SIZE))"


def _common(cuts: Sequence[Phase]) -> _Places:
    """What is alike in all passes."""
    reads, writes = {}, {}
    for n in range(count(cuts, "kept")):
        reads[Value("kept", n)] = _load(_entry("kept", n, "kept_plane"))
        writes[Value("kept", n)] = f"store({{value}}, {_entry('kept', n, 'kept_plane')})"
    for n in range(count(cuts, "sum")):
        reads[Value("mean", n)] = _number("means", n, "means_plane")
        place = f"partials + {n} * partials_plane + (p * UNITS + unit) * mean_row + row * SIZE"
        writes[Value("sum", n)] = f"write_sum(registers, {{value}}, {place}, lanes)"
    reads[Value("lanes", 0)] = "lanes"
    return _Places(reads, writes)


def _arguments(
    cell: Cell, prefix: str = "", shift: str = "", entering: str = "entering", vectors: str = "vectors"
) -> dict[Value, str]:
    """How the arguments of a step are read, or their tangents, or the values in a pass of tangents."""
    reads = {}
    for n, name in enumerate(cell.preactivations):
        reads[Value("given", prefix + name)] = _load(f"at + {n} * GATE{shift}")
    output, *states = cell.states
    row = f"read_int({entering} + row * 8) + column"
    reads[Value("given", prefix + output)] = f"load_row(registers, {row}, valid)"
    for n, name in enumerate(states):
        place = f"states + {n} * states_plane + read_int(offsets + row * 8) + column{shift}"
        reads[Value("given", prefix + name)] = _load(place)
    for n, name in enumerate(cell.weights):
        reads[Value("given", prefix + name)] = _load(f"{vectors} + {n} * width + column")
    return reads | {Value("given", name): f"noise[{n}]" for n, name in enumerate(cell.noise)}


def _values(cell: Cell) -> dict[Value, str]:
    """How the values are read in a pass of tangents: from the memory of their own pass."""
    return _arguments(cell, shift=" + shift", entering="p_entering")


def _tangents(cell: Cell) -> dict[Value, str]:
    """How tangents are read.  Of a learned vector that does not move there are zeros."""
    return _arguments(cell, prefix=cell.moved, vectors="moved_vectors")


def count(phases: Sequence[Phase], role: str) -> int:
    """How many different values of a role the phases store."""
    return sum(value.role == role for phase in phases for value in phase.stores)


def operands(phases: Sequence[Phase]) -> list[str | int]:
    """The gates whose products are applied to values that are stored for that."""
    return [value.name for phase in phases for value in phase.stores if value.role == "operand"]


def _step_results(cell: Cell, operands: Sequence[str | int], prefix: str = "") -> _Places:
    """Where the new states go, and what late gates multiply."""
    reads, writes = {}, {}
    output, *states = cell.states
    place = "read_int(leaving + row * 8) + column"
    reads[Value("result", prefix + output)] = f"load_row(registers, {place}, valid)"
    writes[Value("result", prefix + output)] = f"store_row(registers, {{value}}, {place}, valid)"
    for n, name in enumerate(states):
        place = f"here + {n} * states_plane + {_ROW}"
        reads[Value("result", prefix + name)] = _load(place)
        writes[Value("result", prefix + name)] = f"store({{value}}, {place})"
    for n, gate in enumerate(operands):
        place = _entry("operand_rows", n, "operands_plane")
        reads[Value("operand", gate)] = _load(place)
        writes[Value("operand", gate)] = f"store({{value}}, {place})"
    return _Places(reads, writes)


def step_places(cell: Cell, cuts: Sequence[Phase]) -> _Places:
    """Of a step."""
    common, results = _common(cuts), _step_results(cell, operands(cuts))
    reads = common.reads | _arguments(cell) | results.reads
    reads |= {Value("product", gate): reads[Value("given", gate)] for gate in cell.late}
    return _Places(reads, common.writes | results.writes)


def tangent_places(cell: Cell, cuts: Sequence[Phase], operands: Sequence[str | int]) -> _Places:
    """Of the tangent of a step; the operands of late gates in the order of the step's own."""
    common, results = _common(cuts), _step_results(cell, operands, cell.moved)
    reads = common.reads | _values(cell) | _tangents(cell) | results.reads
    reads |= {Value("moved", gate): reads[Value("given", cell.moved + gate)] for gate in cell.late}
    for n in range(len(cell.step.means())):
        reads[Value("tape", n)] = _number("taped_means + shift", n, "taped_means_plane")
    return _Places(reads, common.writes | results.writes)


def _gradients(cell: Cell, prefix: str = "", shift: str = "") -> _Places:
    """Where gradients are read and written: of new states, of states, gates and learned vectors."""
    reads, writes, added = {}, {}, {}
    carried = f"carried + row * carried_row + column{shift}"
    output, *states = cell.seeds
    reads[Value("given", prefix + output)] = _load(carried)
    # lanes beyond the row's end meet weights of zero, and must not be infinite or NaN
    writes[Value("result", prefix + cell.states[0])] = f"store(keep({{value}}, valid), {carried})"
    for n, name in enumerate(states):
        place = f"{_entry('d_states', n, 'kept_plane')}{shift}"
        reads[Value("given", prefix + name)] = _load(place)
        writes[Value("result", prefix + cell.states[n + 1])] = f"store(keep({{value}}, valid), {place})"
    for n, name in enumerate(cell.preactivations):
        place = f"d + {n} * width + row * d_row + column{shift}"
        reads[Value("result", prefix + name)] = _load(place)
        writes[Value("result", prefix + name)] = f"store(keep({{value}}, valid), {place})"
    for n, name in enumerate(cell.weights):
        added[Value("result", prefix + name)] = f"d_learned + {n} * width + column"
    for n, gate in enumerate(cell.late):
        place = f"{_entry('products_of_late', n, 'kept_plane')}{shift}"
        reads[Value("moved" if prefix else "product", gate)] = _load(place)
    return _Places(reads, writes, added)


def _add_dy(cell: Cell, places: _Places) -> None:
    """To the gradient of the output that is carried from the next step, that of the step's own output."""
    seed = Value("given", cell.seeds[0])
    dy = "load_row(registers, read_int(leaving + row * 8) + column, valid)"
    places.reads[seed] = f"{places.reads[seed]} + {dy}"


def adjoint_places(cell: Cell, cuts: Sequence[Phase], projected: bool) -> _Places:
    """Of the adjoint of a step."""
    common, gradients = _common(cuts), _gradients(cell)
    reads, writes = common.reads | _arguments(cell) | gradients.reads, common.writes | gradients.writes
    places = _Places(reads, writes, gradients.added)
    for n in range(len(cell.step.means())):
        places.reads[Value("tape", n)] = _number("taped_means", n, "taped_means_plane")
    if not projected:  # else what is before the projection
        _add_dy(cell, places)
    return places


def adjoint_tangent_places(cell: Cell, cuts: Sequence[Phase], projected: bool) -> _Places:
    """Of the adjoint of a step and its tangent."""
    common, values = _common(cuts), _gradients(cell)
    moved = _gradients(cell, cell.moved, " + moved_shift")
    reads = common.reads | _values(cell) | _tangents(cell) | values.reads | moved.reads
    places = _Places(reads, common.writes | values.writes | moved.writes, {**values.added, **moved.added})
    for n in range(len(cell.step.means())):
        places.reads[Value("tape", n)] = _number("taped_means + shift", n, "taped_means_plane")
        places.reads[Value("moved tape", n)] = _number("taped_means", n, "taped_means_plane")
    if not projected:
        _add_dy(cell, places)
    return places


def zeros(cell: Cell, shifts: Sequence[str]) -> list[str]:
    """What the last phase of an adjoint writes beside its results: the gradients of states that are not read.

    That of what the recurrent weights multiply is written by the product with them.
    """
    multiplied = cell.recurrent if cell.recurrent_gates else None
    unread = [name for name in cell.states if name not in cell.arguments and name != multiplied]
    places = ["carried + row * carried_row + column"]
    places += [_entry("d_states", n, "kept_plane") for n in range(len(cell.states) - 1)]
    found = [place for name, place in zip(cell.states, places) if name in unread]
    return [f"store(splat(registers, 0.0), {place}{shift})" for shift in shifts for place in found]


def padding(cell: Cell, cut: Phase, prefix: str, shift: str) -> list[str]:
    """What a phase of an adjoint writes for units that only fill a panel: zero, since products read them."""
    slots = [n for n, name in enumerate(cell.preactivations) if Value("result", prefix + name) in cut.stores]
    place = "d + {} * width + row * d_row + column{}"
    return [f"store(splat(registers, 0.0), {place.format(n, shift)})" for n in slots]


def source(
    phase: Phase,
    places: _Places,
    registers: Registers,
    units: int,
    more: Sequence[str] = (),  # done after all else for each vector
    beyond: Sequence[str] = (),  # done for the vectors of a panel that are beyond the hidden units
) -> str:
    """The generated module of a phase."""
    reads = [places.reads[value] for value in phase.takes]
    added = {f"new[{n}]": places.added[v] for n, v in enumerate(phase.stores) if v in places.added}
    writes = [
        places.writes[v].format(value=f"new[{n}]")
        for n, v in enumerate(phase.stores)
        if v not in places.added
    ]
    lines = ["    registers = task.registers"]
    used = {word for text in (*reads, *writes, *added.values(), *more, *beyond) for word in _words(text)}
    if "noise" in used:
        used |= {*_words(_NOISE)}
    for name in sorted(used | {"hidden", "gates", "gates_panel", "gates_row"}):
        if name in OWN.fields:
            lines.append(f"    {name} = own.{name}")
        elif name in task_type(registers.scalar).fields:
            lines.append(f"    {name} = task.{name}")
    lines += [
        "    for p in range(low, high):",
        "        for unit in range(UNITS):",
        "            column = (p * UNITS + unit) * VECTOR",
        f"            valid = hidden - (p * UNITS + unit) * {registers.lanes}",
        f"            lanes = min(valid, {registers.lanes})",
    ]
    inner = ["at = gates + p * gates_panel + row * gates_row + unit * VECTOR"]
    if "noise" in used:
        inner.append(f"noise = {_NOISE}")
    once = [f"sum_{n} = load(registers, {place})" for n, place in enumerate(added.values())]
    for n, text in enumerate(reads):  # what all rows share is read once
        (inner if _OF_A_ROW & {*_words(text)} else once).append(f"a{n} = {text}")
    inner.append(f"new = phase({', '.join(f'a{n}' for n in range(len(reads)))})")
    inner += [*writes, *(f"sum_{n} = sum_{n} + {value}" for n, value in enumerate(added))]
    last = [f"store(sum_{n}, {place})" for n, place in enumerate(added.values())]
    lines += [
        "            if valid > 0:",
        *_indented(4, once),
        "                for row in range(first, last):",
    ]
    lines += [*_indented(5, (*inner, *more)), *_indented(4, last)]
    if beyond and units > 1:
        lines += [
            "            else:",
            "                for row in range(first, last):",
            *_indented(5, beyond),
        ]
    constants = {"SIZE": registers.size, "VECTOR": registers.lanes * registers.size, "UNITS": units}
    constants["GATE"] = units * constants["VECTOR"]
    header = "\n".join(f"{name} = {value}" for name, value in constants.items())
    body = "\n".join(lines)
    return f"{header}\n\n\n{phase.code}\n\ndef body(task, own, low, high, first, last):\n{body}\n"


def _indented(level: int, lines: Sequence[str]) -> list[str]:
    return [f"{'    ' * level}{line}" for line in lines]


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in f"{text} ":
        if character.isalnum() or character == "_":
            word += character
        elif word:
            yield word
            word = ""


def run_phase(task, own, low, high, first, last):  # type: ignore[no-untyped-def]
    """The panels low to high of the rows first to last of a step, on one thread."""
    body(task, own, low, high, first, last)  # type: ignore[name-defined]  # noqa: F821


@once
def compiled(text: str, scalar: types.Float, name: str) -> Any:
    """The C function of a generated module; keep it as long as it may be called."""
    task = task_type(scalar)
    scope = globals() | {"body": _body(text, f"<fusedlstm {name}>")}
    function = FunctionType(run_phase.__code__, scope, f"{run_phase.__name__}_{name}")
    return c_function(function, types.void(task, OWN, *[types.int64] * 4), f"{task} {text}", **OPTIONS)


def _body(text: str, filename: str) -> Any:
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names = [*DERIVATIVES, "full_like", "load", "load_row", "store", "store_row", "keep", "splat", "read"]
    names += ["read_int", "write_sum", "vector_mean"]
    namespace = {name: getattr(simd, name) for name in (*names, "uniforms")}
    namespace |= {"time_of": time_of, "sequence_of": sequence_of, "__name__": __name__}
    module: Any = compile_source(text, namespace, filename)
    module.phase = inlined(module.phase)
    return inlined(module.body)
