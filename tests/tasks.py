"""Records of a pass and of a thread for tests of what kernels are made of."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import njit, types

from fusedlstm.kernels.cpu.records import OWN, TASK, task_type

GUARD = 7  # numbers around an array: NaN, and at an odd place


def place(value: Any) -> int:
    """The address of an array; a number as it is."""
    return int(value.ctypes.data) if isinstance(value, np.ndarray) else int(value)


def record(places: dict[str, int], values: dict[str, Any]) -> np.ndarray:
    """The words of a record, of arrays their addresses; what is not given is no address that may be read."""
    words = np.full(len(places), 1, np.int64)
    for name, value in values.items():
        words[places[name]] = place(value)
    return words


def task(**values: Any) -> np.ndarray:
    """The record of a pass; keep it, and the arrays, as long as it is used."""
    return record(TASK, values)


def own(**values: Any) -> np.ndarray:
    """The record of a thread."""
    return record(OWN.fields, values)


def entry(function: Any, arguments: int, scalar: types.Float = types.float64) -> Any:
    """`function(task, ...)`, compiled, to be called with the words of a task and integers or arrays."""
    names = ", ".join(f"a{n}" for n in range(arguments))
    scope = {"function": function}
    exec(f"def run(task, {names}):\n    function(task, {names})", scope)
    signature = (task_type(scalar), *[types.int64] * arguments)
    compiled = njit(scope["run"])
    compiled.compile(signature)
    called = compiled.overloads[signature].entry_point
    return lambda task, *values: called(place(task), *map(place, values))


def c_entry(function: Any) -> Any:
    """A C function of integers, given by Numba or by its address."""
    address = getattr(function, "address", function)

    def call(*values: Any) -> None:
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(values))(address)(*map(place, values))

    return call


def guarded(shape: tuple[int, ...], dtype: Any, generator: np.random.Generator) -> tuple[Any, Any]:
    """An array of normal numbers that is no multiple of a vector from any boundary, and what it lies in."""
    around = np.full(int(np.prod(shape)) + 2 * GUARD, np.nan, dtype)
    inner = around[GUARD : around.size - GUARD].reshape(shape)
    inner[...] = generator.normal(size=shape)
    return inner, around
