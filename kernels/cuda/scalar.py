"""The functions that a cell may use, for the scalars of a CUDA thread, and the phases of a cell.

float32 stays float32: Numba would compute `1.0 - x` in float64, so every constant of the generated
code is cast.  Accuracy is that of CUDA's math library, without its fast variants; only the division
of a float32 sigmoid may be one unit in the last place off.
"""

from __future__ import annotations

import ast
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from fusedlstm.cells import Cell
from fusedlstm.derive import compile_source
from fusedlstm.math import DERIVATIVES, erf

from . import ptx
from .phases import phases
from .ptx import SIMULATED

# In a simulator a scalar is NumPy's, and NumPy keeps its precision.
_LIBRARY: Any = np if SIMULATED else math


def device(function: Any) -> Any:
    """A function that kernels call; always inlined, so that its arrays can live in registers."""
    if SIMULATED:
        return cuda.jit(device=True)(function)
    return cuda.jit(device=True, forceinline=True)(function)


def element(dtype: Any) -> Any:
    """The Numba type of a NumPy type."""
    name = np.dtype(dtype).name
    return types.boolean if name == "bool" else getattr(types, name)  # Numba 0.61 has no types.bool


def functions(real: Any) -> dict[str, Any]:
    """The functions of :mod:`fusedlstm.math` by name; `real` is np.float32 or np.float64."""
    zero, half, one, six = real(0), real(0.5), real(1), real(6)
    exp, log, log1p = device_library("exp"), device_library("log"), device_library("log1p")
    sqrt, tanh, erf = device_library("sqrt"), device_library("tanh"), device_library("erf")

    # a division takes branches for divisors near 0; that of a sigmoid is 1 or more
    reciprocal = ptx.reciprocal if real is np.float32 else device(lambda x: one / x)

    def sigmoid(x: Any) -> Any:
        return reciprocal(one + exp(-x))

    def absolute(x: Any) -> Any:
        return abs(x)

    # In each comparison below, NaN takes the way that returns it.

    def relu(x: Any) -> Any:
        return zero if x <= zero else x

    def hard_sigmoid(x: Any) -> Any:
        y = x / six + half
        y = zero if y <= zero else y
        return one if y >= one else y

    def softplus(x: Any) -> Any:
        return (zero if x <= zero else x) + log1p(exp(-abs(x)))

    def minimum(x: Any, y: Any) -> Any:
        return x if x <= y or x != x else y

    def maximum(x: Any, y: Any) -> Any:
        return x if x >= y or x != x else y

    def where(condition: Any, x: Any, y: Any) -> Any:
        return x if condition else y

    own = [sigmoid, absolute, relu, hard_sigmoid, softplus, minimum, maximum, where]
    table = {function.__name__: device(function) for function in own}
    table |= {"exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh, "erf": erf}
    assert table.keys() == DERIVATIVES.keys()
    return table


def device_library(name: str) -> Any:
    """A function of CUDA's math library, of NumPy in a simulator."""
    return erf if SIMULATED and name == "erf" else getattr(_LIBRARY, name)  # NumPy has none


def phase_functions(cell: Cell, real: Any, backward: bool) -> list[Any]:
    """The phases of a cell's step, or of its adjoint, as functions (values, at) for scalars of type `real`.

    They take the numbers of a unit, which lie in `values` from place `at` on, and put there what they store.
    """
    cuts, places, _ = phases(cell, backward)
    stored = {value for cut in cuts for value in cut.stores}
    # the gradient of what the cell does not take
    unused = [n for value, n in places.items() if value.role == "result" and value not in stored]
    compiled = []
    for cut in cuts:
        given = [f"values[U(at + {places[value]})]" for value in cut.takes]
        lines = [f"    new = phase({', '.join(given)})"]
        lines += [f"    values[U(at + {places[value]})] = new[{n}]" for n, value in enumerate(cut.stores)]
        if cut is cuts[-1]:
            lines += [f"    values[U(at + {n})] = 0.0" for n in unused]
        text = "\n".join([cut.code, "def run(values, at):", *lines])
        cast = ast.unparse(ast.fix_missing_locations(_CastConstants().visit(ast.parse(text))))
        # unsigned: Numba guards a signed index against being negative
        namespace = {**functions(real), "real": real, "full_like": device(_full_like), "U": np.uint32}
        module: Any = compile_source(cast, namespace, f"<CUDA phase of {cell.name}>")
        module.phase = device(module.phase)
        compiled.append(device(module.run))
    return compiled


def _full_like(x: Any, value: Any) -> Any:
    return value


class _CastConstants(ast.NodeTransformer):
    """`1.0` becomes `real(1.0)`."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        name = ast.Name("real", ast.Load())
        return ast.Call(name, [node], []) if isinstance(node.value, float) else node
