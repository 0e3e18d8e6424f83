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
    mean,
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


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), weights=("s_i", "s_f", "s_g", "s_o", "s_c"))
def normalized_lstm(
    i: Any, f: Any, g: Any, o: Any, c: Any, s_i: Any, s_f: Any, s_g: Any, s_o: Any, s_c: Any
) -> Any:
    """Means of means: gates and the new state are normalized over the units of a row."""

    def normalized(x: Any) -> Any:
        moved = x - mean(x)
        return moved / sqrt(mean(moved * moved) + 0.01)

    c = sigmoid(s_f * normalized(f)) * c + sigmoid(s_i * normalized(i)) * tanh(s_g * normalized(g))
    return sigmoid(s_o * normalized(o)) * tanh(s_c * normalized(c)), c


@cell(gates=("a", "b"), weights=("u",), without_recurrent=("a", "b"))
def independent(a: Any, b: Any, h: Any, u: Any) -> Any:
    """No recurrent weights at all: a unit sees its own past by a learned vector."""
    return sigmoid(b) * h + tanh(a + u * h)


@cell(gates=("a", "b", "n"), states=("h", "s"), late=("n",), without_recurrent=("a",), without_input=("b",))
def late_of_output(a: Any, b: Any, n: Any, s: Any) -> Any:
    """A late gate multiplies the new output itself; beside it every kind of gate but a split one."""
    h = tanh(a + b * s)
    return h, 0.5 * s + tanh(n(h)) * (1 - b)


@cell(
    gates=("r", "z", "n", "m", "k"), states=("h", "s", "t"), late=("n", "m"), weights=("p",),
    without_input=("m",), split=("k",), recurrent="s",
)  # fmt: skip
def late_and_means(r: Any, z: Any, n: Any, m: Any, k_x: Any, k_h: Any, h: Any, s: Any, t: Any, p: Any) -> Any:
    """Late gates one after the other, with means before, between and behind them; three kinds of operands."""
    first = tanh(n(sigmoid(r) * h + mean(s)))
    scale = mean(first * first)
    second = m(first * p + scale)
    t = 0.5 * t - sigmoid(k_x) * mean(second * k_h)
    return first + sigmoid(z) * (h - first) * scale, tanh(second) - s * scale, t


@cell(gates=("n", "a"), states=("h", "s"), late=("n",))
def late_without_gradient(n: Any, a: Any, h: Any) -> Any:
    """A late gate decides alone, so that its gradient is zero; a result is a number, a state not read."""
    return where(n(tanh(a)) > 0.125, 0.5 * tanh(a), 0.25 * h), 1.5


@cell(gates=("a", "n", "m"), states=("h", "c"), late=("n", "m"), weights=("w",))
def tangents_alike(a: Any, n: Any, m: Any, h: Any, c: Any, w: Any) -> Any:
    """What late gates multiply is no result, but its tangent is that of one; or a learned vector alone."""
    c = tanh(a) + 0.5 * c
    return tanh(n(c + 1.0)) * h + 0.125 * m(2 * w), c


OWN = (
    one_gate,
    three_states,
    five_gates,
    unused_state,
    other_operand,
    normalized_lstm,
    independent,
    late_of_output,
    late_and_means,
    late_without_gradient,
    tangents_alike,
)
BUILT_IN = tuple(layers.BUILT_IN.values())
# Where values hardly differ, normalization magnifies what rounding has changed: by less with a larger eps.
# And slstm divides by a state, which may be anything here.  test_built_in_cells.py has them as they are.
ALL = (
    *(
        cells.with_constants(cell, eps=0.01) if "eps" in cell.constants else cell
        for cell in BUILT_IN
        if cell is not cells.slstm
    ),
    *OWN,
)


def _sees_units(cell: cells.Cell) -> bool:
    """Whether a step has more than one phase, or gates that lack a product."""
    return bool(cell.step.means() or cell.late or cell.without_input or cell.without_recurrent)


# those of one phase, all of whose gates have both products
PLAIN = tuple(value for value in ALL if not _sees_units(value))
PROJECTED = (cells.lstm, three_states)  # cells that are tried with a projection


def name(value: Any) -> str:
    """The id of a parameter in pytest: of a cell its name."""
    return getattr(value, "name", None) or str(value)
