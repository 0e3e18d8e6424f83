"""How tests compare, and the cells that they run beside the built-in ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedlstm import cell, cells, layers
from fusedlstm.math import (
    absolute,
    erf,
    exp,
    hard_sigmoid,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)

# Relative error of the norm, for one step; rounding errors of T steps add up as their square root.
TOLERANCE = {np.dtype("float32"): 1e-6, np.dtype("float64"): 1e-13}
GRADIENT_TOLERANCE = {np.dtype("float32"): 1e-5, np.dtype("float64"): 1e-13}


def error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected|, where numbers are taken to be of the size 0.01 at least."""
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = max(np.linalg.norm(expected), 0.01 * np.sqrt(max(expected.size, 1)))
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / scale)


def assert_close(actual: Any, expected: Any, steps: int, what: str = "", gradient: bool = False) -> None:
    """Compare with a result in float64 of `steps` time steps; NaN is never close."""
    limit = (GRADIENT_TOLERANCE if gradient else TOLERANCE)[actual.dtype] * np.sqrt(steps)
    found = error(actual, expected)
    assert found <= limit, f"{what}: relative error {found:.2e} > {limit:.2e}"


# --- Cells of a user's own, chosen to be awkward ----------------------------------------------------------


@cell(gates=("u",))
def one_gate(u: Any, h: Any) -> Any:
    """Reads its output; a leaky integrator."""
    return 0.75 * h + 0.25 * tanh(u)


@cell(gates=("output", "b"), states=("h", "s", "m"), split=("b",), weights=("n",))
def three_states(output: Any, b_x: Any, b_h: Any, s: Any, m: Any, n: Any, *, keep: float = 0.9) -> Any:
    """Three states, one of them a running maximum, a split gate, a learned vector and a constant.

    Two names are those of arguments of generated code.
    """
    s = keep * s + n * tanh(output + b_x) * sigmoid(b_h)
    m = maximum(m * keep, absolute(s))
    return s / (1 + m), s, m


@cell(gates=("p", "q", "r", "s", "t"), states=("h", "c"), split=("p", "t"))
def five_gates(p_x: Any, p_h: Any, q: Any, r: Any, s: Any, t_x: Any, t_h: Any, h: Any, c: Any) -> Any:
    """Every function that a cell may use."""
    c = hard_sigmoid(q) * c + softplus(r) * tanh(p_x - p_h) / (1 + exp(-absolute(s)))
    c = minimum(maximum(c, -3.0), 3.0)
    z = where((t_x > 0) & ~(t_h > 0.5), relu(t_x), log(1 + t_h**2) - sqrt(1 + s * s))
    return sigmoid(z) * tanh(c) + 0.125 * erf(h), c


@cell(gates=("g",), states=("h", "k"))
def unused_state(g: Any) -> Any:
    """Reads no state at all, and a result is a number."""
    return tanh(g), 1.5


@cell(gates=("a", "b"), states=("h", "c", "s"), split=("b",), weights=("w",), recurrent="s")
def other_operand(a: Any, b_x: Any, b_h: Any, h: Any, c: Any, s: Any, w: Any) -> Any:
    """The recurrent weights multiply a state that is not the output, and that is not the first of them."""
    c = sigmoid(a) * c + w * tanh(b_x + s * b_h)
    return tanh(c) + 0.25 * h, c, tanh(c * a) - 0.5 * s


OWN = (one_gate, three_states, five_gates, unused_state, other_operand)
# those that engines run as they are
BUILT_IN = tuple(value for value in layers.BUILT_IN.values() if value.half is None)
ALL = (*BUILT_IN, *OWN)
PROJECTED = (cells.lstm, three_states)  # the cells that are tried with a projection


def name(value: Any) -> str:
    """The id of a parameter in pytest: of a cell its name."""
    return getattr(value, "name", None) or str(value)
