"""A cell's step and adjoint on SIMD vectors in memory.

The cell's generated code is wrapped in loads and stores, for one vector of hidden units of one batch
row.  Where a row ends within the vector (`valid` lanes are left), no memory beyond it is touched.
"""

from __future__ import annotations

import linecache
from typing import TYPE_CHECKING, Any

from numba.extending import overload

from fusedlstm.derive import compile_source
from fusedlstm.math import DERIVATIVES
from fusedlstm.once import once

from . import simd
from .simd import OPTIONS, inlined

if TYPE_CHECKING:
    from fusedlstm.cells import Cell


def source(cell: Cell, projected: bool) -> str:
    """The generated module: the cell's step and adjoint, and what loads and stores around them."""
    return "\n\n".join([cell.source, _update(cell), _update_adjoint(cell, projected)])


def _places(cell: Cell) -> dict[str, str]:
    """Where each argument of the cell is read."""
    places = {}
    for n, name in enumerate(cell.preactivations):
        places[name] = f"load(spec, gates + {n} * gate_stride)"
    places[cell.states[0]] = "load_row(spec, entering + offset, valid)"
    for n, name in enumerate(cell.states[1:]):
        places[name] = f"load(spec, states + {n} * states_stride + offset)"
    for n, name in enumerate(cell.weights):
        places[name] = f"load(spec, vectors + {n} * vectors_stride + offset)"
    return {name: places[name] for name in cell.arguments}


def _value(name: str) -> str:
    """The local name of an argument of the cell, which none of `update` and `update_adjoint` has."""
    return f"v_{name}"


def _load_arguments(cell: Cell) -> list[str]:
    return [f"    {_value(name)} = {place}" for name, place in _places(cell).items()]


def _update(cell: Cell) -> str:
    lines = _load_arguments(cell)
    lines.append(f"    new = step({', '.join(map(_value, cell.arguments))})")
    lines.append("    store_row(spec, new[0], output + offset, valid)")
    for n in range(len(cell.states) - 1):
        lines.append(f"    store(new[{n + 1}], new_states + {n} * new_stride + offset)")
    return f"def update({', '.join(UPDATE)}):\n" + "\n".join(lines) + "\n"


def _update_adjoint(cell: Cell, projected: bool) -> str:
    lines = _load_arguments(cell)
    output, *others = seeds = [_value(name) for name in cell.seeds]
    lines.append(f"    {output} = load(spec, carried + offset)")
    if not projected:
        lines.append(f"    {output} = {output} + load_row(spec, doutput + offset, valid)")
    for n, name in enumerate(others):
        lines.append(f"    {name} = load(spec, dstates + {n} * dstates_stride + offset)")
    gradients = [f"g_{name}" for name in cell.arguments]
    given = [*map(_value, cell.arguments), *seeds]
    lines.append(f"    {', '.join(gradients)}, = adjoint({', '.join(given)})")
    # lanes beyond the row's end meet weights of zero, and must not be infinite or NaN
    for buffer, gates, part in (
        ("from_input", cell.input_gates, "x"),
        ("from_output", cell.recurrent_gates, "h"),
    ):
        if buffer == "from_output" and not cell.split:
            continue
        for n, gate in enumerate(gates):
            name = f"g_{gate}_{part}" if gate in cell.split else f"g_{gate}"
            lines.append(f"    store(keep({name}, valid), {buffer} + {n} * gate_stride)")
    for n, name in enumerate(cell.states):
        place = f"dstates + {n - 1} * dstates_stride" if n else "carried"
        if name in cell.arguments:
            lines.append(f"    store(keep(g_{name}, valid), {place} + offset)")
        elif name != cell.recurrent:  # which the product with the recurrent weights writes
            lines.append(f"    store(full_like({output}, 0.0), {place} + offset)")
    for n, name in enumerate(cell.weights):
        place = f"dvectors + {n} * vectors_stride + offset"
        lines.append(f"    store(load(spec, {place}) + g_{name}, {place})")
    return f"def update_adjoint({', '.join(UPDATE_ADJOINT)}):\n" + "\n".join(lines) + "\n"


# The arguments of `update` and `update_adjoint`: addresses, strides in bytes, and the lanes that are left.
UPDATE = (
    *("spec", "gates", "gate_stride", "entering", "states", "states_stride", "new_states", "new_stride"),
    *("output", "vectors", "vectors_stride", "offset", "valid"),
)
UPDATE_ADJOINT = (
    *("spec", "gates", "gate_stride", "entering", "states", "states_stride", "doutput", "carried"),
    *("dstates", "dstates_stride", "from_input", "from_output", "vectors", "vectors_stride", "dvectors"),
    *("offset", "valid"),
)


@once
def _compiled(cell: Cell, projected: bool) -> Any:
    return simd_module(source(cell, projected), f"<fusedlstm kernel {cell.key}>", __name__)


def simd_module(text: str, filename: str, stands_in: str) -> Any:
    """Generated code, for SIMD vectors, as a module whose `step` and `adjoint` are inlined.

    Args:
        text: the code, which calls functions of :mod:`fusedlstm.math` and of the module ``simd``.
        filename: under which tracebacks show it.
        stands_in: the name of a module that Numba's cache on disk can import.
    """
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names = [*DERIVATIVES, "full_like", "load", "load_row", "store", "store_row", "keep"]
    namespace = {name: getattr(simd, name) for name in names} | {"__name__": stands_in}
    module: Any = compile_source(text, namespace, filename)
    module.step, module.adjoint = inlined(module.step), inlined(module.adjoint)
    return module


def update(*args: Any) -> None:
    """One step for one vector of hidden units; the arguments are addresses, strides in bytes."""
    raise NotImplementedError("works in compiled code only")


def update_adjoint(*args: Any) -> None:
    """The gradient of :func:`update`: those of the gates, the states and the learned vectors."""
    raise NotImplementedError("works in compiled code only")


def _overload(function: Any, arguments: tuple[str, ...]) -> None:
    name = function.__name__
    scope = {
        "__name__": __name__,
        "implementation": lambda spec: getattr(_compiled(spec.cell, spec.projected), name),
    }
    exec(f"def chosen({', '.join(arguments)}):\n    return implementation(spec)", scope)
    overload(function, jit_options={"forceinline": True, **OPTIONS})(scope["chosen"])


_overload(update, UPDATE)
_overload(update_adjoint, UPDATE_ADJOINT)
