"""What @cell accepts and refuses, and what a cell says of itself."""

from __future__ import annotations

import ast
import inspect
import math as python_math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import (
    ALL,
    BUILT_IN,
    five_gates,
    late_and_means,
    late_of_output,
    name,
    one_gate,
    other_operand,
    three_states,
)

from fusedlstm import cell, cells
from fusedlstm.cells import Cell, CellError
from fusedlstm.math import maximum, mean, relu, sigmoid, tanh, where

FUNCTIONS = (
    "absolute, erf, exp, hard_sigmoid, log, maximum, minimum, relu, sigmoid, softplus, sqrt, tanh, where"
)


def define(function: Any, gates: Any = ("a",), states: Any = ("h",), **options: Any) -> Cell:
    return cell(gates, states, **options)(function)


# --- The built-in cells, against the formulas of their sources --------------------------------------------


def values(cell: Cell) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {name: generator.normal(size=7) for name in cell.arguments}


def s(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_lstm() -> None:
    v = values(cells.lstm)
    c = s(v["f"]) * v["c"] + s(v["i"]) * np.tanh(v["g"])
    assert np.allclose(cells.lstm.numpy.step(**v), [s(v["o"]) * np.tanh(c), c], rtol=1e-14)


def test_peephole_lstm() -> None:
    v = values(cells.peephole_lstm)
    i, f = s(v["i"] + v["p_i"] * v["c"]), s(v["f"] + v["p_f"] * v["c"])
    c = f * v["c"] + i * np.tanh(v["g"])
    h = s(v["o"] + v["p_o"] * c) * np.tanh(c)
    assert np.allclose(cells.peephole_lstm.numpy.step(**v), [h, c], rtol=1e-14)


def test_coupled_lstm() -> None:
    v = values(cells.coupled_lstm)
    c = s(v["f"]) * v["c"] + (1 - s(v["f"])) * np.tanh(v["g"])
    assert np.allclose(cells.coupled_lstm.numpy.step(**v), [s(v["o"]) * np.tanh(c), c], rtol=1e-14)


def test_gru() -> None:
    v = values(cells.gru)
    r, z = s(v["r"]), s(v["z"])
    n = np.tanh(v["n_x"] + r * v["n_h"])
    assert np.allclose(cells.gru.numpy.step(**v), [(1 - z) * n + z * v["h"]], rtol=1e-13)


def test_gru_reset_before() -> None:
    v = values(cells.gru_reset_before)
    r, z = s(v["r"]), s(v["z"])
    n = np.tanh(v["n"] + 0.5 * r * v["h"])
    given = v | {"n": lambda operand: v["n"] + 0.5 * operand}
    assert np.allclose(cells.gru_reset_before.numpy.step(**given), [(1 - z) * n + z * v["h"]], rtol=1e-13)


def test_lstm_output_sees_cell() -> None:
    v = values(cells.lstm_output_sees_cell)
    c = s(v["f"]) * v["c"] + s(v["i"]) * np.tanh(v["g"])
    h = s(v["o"] + 0.5 * c) * np.tanh(c)
    given = v | {"o": lambda operand: v["o"] + 0.5 * operand}
    assert np.allclose(cells.lstm_output_sees_cell.numpy.step(**given), [h, c], rtol=1e-14)


def test_lstm_output_from_memory() -> None:
    """The output gate has a product with the new cell state, and one with the previous output."""
    cell, v = cells.lstm_output_from_memory, values(cells.lstm_output_from_memory)
    c = s(v["f"]) * v["c"] + s(v["i"]) * np.tanh(v["g"])
    h = s(v["o"] + 0.5 * c) * np.tanh(c)
    assert np.allclose(cell.numpy.step(**v | {"m": lambda operand: 0.5 * operand}), [h, c], rtol=1e-14)
    assert cell.gates_with_input == ("i", "f", "g")
    assert cell.gates_with_recurrent == cell.gates


def test_rnn() -> None:
    a = np.linspace(-2, 2, 9)
    assert np.array_equal(cells.rnn_tanh.numpy.step(a), [np.tanh(a)])
    assert np.array_equal(cells.rnn_relu.numpy.step(a), [np.maximum(a, 0)])


# --- Cells made of others ---------------------------------------------------------------------------------


def test_with_functions() -> None:
    made, v = cells.with_functions(cells.lstm, tanh=relu, sigmoid=lambda x: x), values(cells.lstm)
    c = v["f"] * v["c"] + v["i"] * np.maximum(v["g"], 0)
    assert np.allclose(made.numpy.step(**v), [v["o"] * np.maximum(c, 0), c], rtol=1e-14)
    assert made.key != cells.lstm.key
    assert made.__doc__ == cells.lstm.__doc__
    assert cells.with_functions(cells.lstm, tanh=tanh).key == cells.lstm.key
    with pytest.raises(CellError, match="calls nothing by the name 'relu'"):
        cells.with_functions(cells.lstm, relu=relu)


def test_with_functions_keeps_constants_and_closures() -> None:
    scale = 3.0

    def leaky(a: Any, h: Any, *, keep: float = 0.5) -> Any:
        return keep * h + scale * tanh(a)

    made = cells.with_functions(define(leaky), tanh=lambda x: x)
    assert made.numpy.step(2.0, 10.0) == (11.0,)


def test_with_functions_of_a_cell_with_a_late_gate() -> None:
    made = cells.with_functions(cells.gru_reset_before, tanh=relu)
    assert (made.states, made.late) == (("h",), ("n",))
    assert "relu" in made.source
    assert "tanh" not in made.source


def test_with_gates() -> None:
    made = cells.with_gates(cells.gru, ("z", "r", "n"))
    assert made.gates == ("z", "r", "n")
    assert made.split == ("n",)
    v = values(cells.gru)
    assert np.array_equal(made.numpy.step(**v), cells.gru.numpy.step(**v))
    late = cells.with_gates(late_and_means, ("k", "m", "n", "r", "z"))
    assert (late.late, late.without_input, late.split) == (("m", "n"), ("m",), ("k",))
    assert (late.recurrent, late.weights, late.states) == ("s", ("p",), late_and_means.states)
    with pytest.raises(CellError, match="the gates of cell gru are"):
        cells.with_gates(cells.gru, ("z", "r"))


def test_with_constants() -> None:
    made = cells.with_constants(cells.layer_norm_lstm, eps=1e-3)
    assert (made.constants, cells.layer_norm_lstm.constants) == ({"eps": 1e-3}, {"eps": 1e-5})
    assert (made.beginnings, made.biases) == (cells.layer_norm_lstm.beginnings, False)
    assert "0.001" in made.source
    assert pickle.loads(pickle.dumps(made)).key == made.key
    with pytest.raises(CellError, match="cell lstm has no constant 'eps'; its constants are none"):
        cells.with_constants(cells.lstm, eps=1)


def test_learned_vectors_begin_with_numbers() -> None:
    made = define(lambda a, u, v, w: a * u + v * w, weights={"u": 1, "v": None, "w": 0.5})
    assert (made.weights, made.beginnings) == (("u", "v", "w"), {"u": 1.0, "w": 0.5})
    assert made.key == define(lambda a, u, v, w: a * u + v * w, weights=("u", "v", "w")).key
    with pytest.raises(CellError, match="learned vector 'u' begins with a number or None, got 'one'"):
        define(lambda a, u: a * u, weights={"u": "one"})


def test_a_cell_may_do_without_biases() -> None:
    made = define(lambda a: a, biases=False)
    assert made.key != define(lambda a: a).key
    with pytest.raises(CellError, match="biases must be True or False, got 0"):
        define(lambda a: a, biases=0)


# --- What a cell says of itself ---------------------------------------------------------------------------


def test_preactivations_of_split_gates_stand_at_the_ends() -> None:
    assert five_gates.preactivations == ("p_x", "t_x", "q", "r", "s", "p_h", "t_h")
    assert five_gates.input_gates == ("p", "t", "q", "r", "s")
    assert five_gates.recurrent_gates == ("q", "r", "s", "p", "t")
    assert five_gates.plain == ("q", "r", "s")


def test_arguments_are_those_in_use_in_a_fixed_order() -> None:
    assert three_states.arguments == ("b_x", "output", "b_h", "s", "m", "n")
    assert three_states.constants == {"keep": 0.9}
    assert cells.lstm.arguments == ("i", "f", "g", "o", "c")


def test_preactivations_of_gates_with_one_product_and_of_late_ones() -> None:
    """What the input product gives is at the front, what the recurrent product gives one stretch."""
    assert late_of_output.preactivations == ("n", "a", "b")
    assert (late_of_output.input_gates, late_of_output.recurrent_gates) == (("n", "a"), ("b",))
    assert late_of_output.gates_with_input == ("a", "n")
    assert late_of_output.gates_with_recurrent == ("b", "n")
    assert late_and_means.preactivations == ("n", "k_x", "r", "z", "k_h", "m")
    assert late_and_means.input_gates == ("n", "k", "r", "z")
    assert late_and_means.recurrent_gates == ("r", "z", "k")
    assert late_and_means.plain == ("r", "z")
    for made in ALL:
        parts = made.preactivations
        by_input = [f"{gate}_x" if gate in made.split else gate for gate in made.input_gates]
        by_output = [f"{gate}_h" if gate in made.split else gate for gate in made.recurrent_gates]
        assert list(parts[: len(by_input)]) == by_input
        first = parts.index(by_output[0]) if by_output else 0
        assert list(parts[first : first + len(by_output)]) == by_output
        assert {*by_input, *by_output, *made.late} == {*parts}


def test_why_an_output_cannot_be_projected() -> None:
    reasons = {cell.name: cell.unprojectable for cell in ALL}
    assert not reasons["lstm"]
    assert not reasons["normalized_lstm"]
    assert "reads its own output 'h'" in reasons["gru_reset_before"]
    assert "late gate 'o' multiply values of the hidden units" in reasons["lstm_output_sees_cell"]
    states = {"states": ("h", "s"), "recurrent": "s"}
    assert "multiply 's', not the output" in define(lambda a, s: (a, s), **states).unprojectable
    assert "no recurrent weights" in define(lambda a: a, without_recurrent=("a",)).unprojectable


def test_arguments_of_a_step_from_its_products() -> None:
    given = other_operand.step_arguments({"a": 1, "b": 2}, {"a": 10, "b": 20}, (100, 200, 300), (4,), None)
    assert list(given.items()) == [
        ("b_x", 2), ("a", 11), ("b_h", 20), ("h", 100), ("c", 200), ("s", 300), ("w", 4)
    ]  # fmt: skip
    products = [dict(zip("ifgo", part)) for part in ((1, 2, 3, 4), (10, 20, 30, 40))]
    given = cells.lstm.step_arguments(*products, (100, 200), (), None)
    assert list(given.items()) == [("i", 11), ("f", 22), ("g", 33), ("o", 44), ("c", 200)]


def test_arguments_of_a_step_with_late_gates() -> None:
    """Functions; of gates with one product that alone."""

    def multiply(gate: str, value: int) -> int:
        return {"n": 3, "o": 5, "m": 7}[gate] * value

    given = late_of_output.step_arguments({"a": 1, "n": 2}, {"b": 10}, (100, 200), (), multiply)
    assert (given["a"], given["b"], given["s"]) == (1, 10, 200)
    assert given["n"](4) == 2 + 3 * 4
    own = {"i": 1, "f": 2, "g": 3}
    products = {"i": 10, "f": 20, "g": 30, "o": 40}
    given = cells.lstm_output_from_memory.step_arguments(own, products, (100, 200), (), multiply)
    assert (given["o"], given["i"], given["m"](4)) == (40, 11, 28)


def test_reads_output() -> None:
    assert cells.gru.reads_output
    assert one_gate.reads_output
    assert not cells.lstm.reads_output
    assert not three_states.reads_output


def test_the_state_that_the_recurrent_weights_multiply() -> None:
    assert (late_and_means.recurrent, late_and_means.operand, late_and_means.reads_operand) == ("s", 1, True)
    assert (cells.gru.recurrent, cells.gru.operand, cells.gru.reads_operand) == ("h", 0, True)
    assert (other_operand.recurrent, other_operand.operand, other_operand.reads_operand) == ("s", 2, True)
    keys = {define(lambda a, h: (a, h), states=("h", "s"), recurrent=r).key for r in (None, "h", "s")}
    assert len(keys) == 2


def test_recurrent_dropout() -> None:
    dropped = cells.recurrent_dropout(cells.gru)
    v = values(dropped)
    h, mask, product = dropped.numpy.step(**v)
    assert np.array_equal(h, cells.gru.numpy.step(**{name: v[name] for name in cells.gru.arguments})[0])
    assert np.array_equal(mask, v["dropout_mask"])
    assert np.array_equal(product, mask * h)
    assert (dropped.recurrent, dropped.reads_operand) == ("dropped", False)
    assert (dropped.gates, dropped.split) == (cells.gru.gates, cells.gru.split)
    assert cells.recurrent_dropout(cells.gru) is dropped
    assert pickle.loads(pickle.dumps(dropped)) is dropped
    assert cells.recurrent_dropout(other_operand).constants == other_operand.constants
    normalized = cells.recurrent_dropout(cells.layer_norm_gru)
    assert (normalized.biases, normalized.beginnings) == (False, cells.layer_norm_gru.beginnings)


def test_recurrent_dropout_of_a_late_gate() -> None:
    """What it multiplies is masked too; what the cell reads is not."""
    dropped, v = cells.recurrent_dropout(cells.gru_reset_before), values(cells.gru_reset_before)
    mask = np.array([0, 2, 2, 0, 2, 0, 2.0])
    operands = []

    def product(operand: np.ndarray) -> np.ndarray:
        operands.append(operand)
        return v["n"] + 0.5 * operand

    h, _, product_mask = dropped.numpy.step(**v | {"n": product, "dropout_mask": mask})
    assert np.allclose(operands, [mask * s(v["r"]) * v["h"]], rtol=1e-14)
    new = np.tanh(v["n"] + 0.5 * operands[0])
    assert np.allclose(h, new + s(v["z"]) * (v["h"] - new), rtol=1e-14)
    assert np.array_equal(product_mask, mask * h)
    assert (dropped.late, dropped.without_input) == (("n",), ())


def test_key_is_of_the_mathematics() -> None:
    def clipped(a: Any, *, clip: float = 1.0) -> Any:
        return where(a > clip, clip, a)

    def renamed(a: Any, *, limit: float = 1.0) -> Any:
        high = a > limit
        return where(high, limit, a)

    renamed.__name__ = "clipped"
    key = define(clipped).key
    assert key.startswith("clipped_")
    assert define(renamed).key == key

    def other(a: Any, *, clip: float = 2.0) -> Any:
        return where(a > clip, clip, a)

    other.__name__ = "clipped"
    assert define(other).key != key
    clipped.__name__ = "renamed"
    assert define(clipped).key != key


def test_key_tells_kinds_of_gates_apart() -> None:
    """Also where the code is the same."""

    def same(a: Any, b: Any, h: Any) -> Any:
        return a + b * h

    kinds: list[dict[str, Any]] = [
        {}, {"without_input": ("b",)}, {"without_recurrent": ("b",)}, {"without_recurrent": ("a", "b")},
        {"without_input": ("a",)},
    ]  # fmt: skip
    assert len({define(same, ("a", "b"), **kind).key for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("cell", BUILT_IN, ids=name)
def test_built_in_cells_are_described(cell: Cell) -> None:
    assert len(cell.__doc__ or "") > 20
    assert repr(cell) == f"<fusedlstm cell {cell.name}: gates {cell.gates}, states {cell.states}>"


def test_arithmetic_that_is_accepted() -> None:
    def everything(a: Any, h: Any) -> Any:
        b = +a - -h + 2 / (1 + abs(a)) - 1 + np.float32(0.5) * h**3 - (2 - a) / 4
        return where((a <= h) | ~(b >= 0) & (a != 0), b, a**2)

    a, h = np.array([0.3, -2.0, 1.0]), np.array([0.1, 0.5, 1.5])
    b = a + h + 2 / (1 + abs(a)) - 1 + 0.5 * h**3 - (2 - a) / 4
    expected = np.where((a <= h) | (b < 0) & (a != 0), b, a**2)
    assert np.allclose(define(everything).numpy.step(a, h), [expected], rtol=1e-14)


# --- What is refused, where it is defined -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a: sin(a), rf"name 'sin' is not defined.*functions of fusedlstm.math: {FUNCTIONS}"),  # noqa: F821
        (lambda a: np.tanh(a), rf"does not support ufuncs.*functions of fusedlstm.math: {FUNCTIONS}"),
        (lambda a: python_math.tanh(a), rf"plain numbers.*functions of fusedlstm.math: {FUNCTIONS}"),
        (lambda a: float(a), "plain numbers"),
        (lambda a: a.tanh(), rf"no attribute 'tanh'.*functions of fusedlstm.math: {FUNCTIONS}"),
        (lambda a: a if a > 0 else 0, r"branches on a value.*use where\(condition, x, y\)"),
        (lambda a: min(a, 1), "branches on a value.*minimum"),
        (lambda a: where(a > 0 and a < 1, a, 0), "branches on a value.*&"),
        (lambda a: where(0 < a < 1, a, 0), "branches on a value.*chained comparison"),
        (lambda a: a[0], "not subscriptable"),
        (lambda a: sum(a), "not iterable"),
        (lambda a: a % 2, "unsupported operand"),
        (lambda a: a**-1, r"\*\* takes the constants 1 to 16 and 0.5 here, got -1"),
        (lambda a: a**a, r"\*\* takes the constants"),
        (lambda a: a * 1j, "applied to 1j; use arguments, constants and numbers"),
        (lambda a: a * "x", "applied to 'x'"),
        (lambda a: a + np.ones(3), "only 0-dimensional arrays|only length-1 arrays"),
        (lambda a: a / 0, "divides by zero"),
        (lambda a: 1 / 0, "division by zero"),
        (lambda a: a * float("nan"), "nan is used as a number"),
        (lambda a: maximum(a, float("-inf")), "-inf is used as a number"),
        (lambda a: (a > 0) * a, r"comparison is used as a number in \*; write where"),
        (lambda a: tanh(a > 0), r"comparison is used as a number in tanh\(\)"),
        (lambda a: where(a > 0, a > 1, 1), r"comparison is used as a number in where\(\)"),
        (lambda a: a > 0, "comparison is used as a number in result 1"),
        (lambda a: where(a, a, 1), "first argument of where.* must be a comparison"),
        (lambda a: where(~a, a, 1), "combine comparisons only"),
        (lambda a: where((a > 0) & a, a, 1), "combine comparisons only"),
        (lambda a: tanh(a, a), r"tanh\(\) takes 1 argument\(s\), got 2"),
        (lambda a: a**2.5, r"got 2.5; write 1 / x\*\*n for x\*\*-n"),
        (lambda a: None, "cell <lambda> returns nothing; it must return the new states"),
        (lambda a: {"a": a}, "result of <lambda>"),
        (lambda a: a - mean(3.0 + 0 * a), "what is the same for all hidden units of a row: it is that value"),
        (lambda a: mean(mean(a)), "mean.. is taken of what is the same"),
        (lambda a: mean(2 * mean(a) - 1), "mean.. is taken of what is the same"),
        (lambda a: mean(a > 0), r"comparison is used as a number in mean\(\)"),
    ],
)
def test_mathematics_that_cannot_become_a_kernel(function: Any, message: str) -> None:
    with pytest.raises(CellError, match=message):
        define(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, n: a, "the late gate 'n' is not called; call it with what its recurrent weights multiply"),
        (
            lambda a, n: n(a) + n(a),
            "the late gate 'n' is called twice; a second product needs a gate of its own",
        ),
        (lambda a, n: a + n, r"the gate 'n' is late, a function: call it .*such as n\(sigmoid\(r\) \* h\)"),
        (lambda a, n: n * a, "the gate 'n' is late, a function"),
        (lambda a, n: where(a > 0, a, n), "the gate 'n' is late, a function"),
        (lambda a, n: where(a > n, a, 1.0), "the gate 'n' is late, a function"),
        (lambda a, n: -n, "the gate 'n' is late, a function"),
        (lambda a, n: where(n > 0, a, 0.0), "the gate 'n' is late, a function"),
        (lambda a, n: tanh(n), "the gate 'n' is late, a function"),
        (lambda a, n: maximum(n, 0.0), "the gate 'n' is late, a function"),
        (lambda a, n: mean(n), "the gate 'n' is late, a function"),
        (lambda a, n: n, "the gate 'n' is late, a function"),
        (
            lambda a, n: n(1.0),
            "the late gate 'n' is called with 1.0; call it with the value that its recurrent",
        ),
        (lambda a, n: n(0 * a), "the late gate 'n' is called with"),
        (lambda a, n: n(n), "the late gate 'n' is called with"),
        (lambda a, n: n(), "missing 1 required positional argument"),
        (lambda a, n: n(a, a), "takes 2 positional arguments but 3 were given"),
        (lambda a, n: n(a > 0), r"comparison is used as a number in n\(\)"),
        (lambda a, n: (n(a), a)[1], "nothing depends on what the late gate 'n' gives; use it, or leave"),
        (lambda a, n: a + 0 * n(a), "nothing depends on what the late gate 'n' gives"),
    ],
)
def test_late_gates_that_cannot_become_a_kernel(function: Any, message: str) -> None:
    with pytest.raises(CellError, match=message):
        define(function, gates=("a", "n"), late=("n",))


def two_results(a: Any) -> Any:
    return a, a


def no_default(a: Any, *, k: float) -> Any:
    return a * k


def text_default(a: Any, *, k: str = "x") -> Any:
    return a


def positional_default(a: Any, k: float = 3) -> Any:
    return a * k


def stars(*a: Any) -> Any:
    return a


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (two_results, {}, r"returns 2 value\(s\) but declares 1 state\(s\): return h, in this order"),
        (lambda a: a, {"states": ("h", "c")}, r"returns 1 value\(s\) but declares 2 .*return h, c"),
        (lambda b: b, {}, "the argument 'b' is none of a, h"),
        (lambda h: h, {}, "gate argument 'a' is declared but not taken"),
        (lambda a: a, {"weights": ("w",)}, "learned vector 'w' is declared but not taken"),
        (no_default, {}, "the constant 'k' needs a number as its default"),
        (text_default, {}, "the constant 'k' needs a number as its default, got 'x'"),
        (positional_default, {}, r"'k' is none of a, h. Constants go behind a \*"),
        (stars, {}, "'a' is none of"),
        (lambda a: a, {"split": ("a",)}, "gate 'a' is split: take a_x and a_h"),
        (lambda a_x: a_x, {"split": ("a",)}, "'a_h' is declared but not taken"),
        (
            lambda a_h: a_h,
            {"split": ("a",)},
            "'a_x' is declared but not taken: take both a_x and a_h, or leave",
        ),
        (lambda a, x: a, {}, "'x' is none of a, h; the input is in the gates already.*name it in split"),
        (lambda a, inputs: a, {}, "the input is in the gates already"),
        (lambda a: a, {"late": ("b",)}, r"late names 'b', which is not a gate; the gates are \('a',\)"),
        (lambda a: a, {"late": "a"}, "late must be a tuple of names"),
        (lambda a: a, {"without_input": ("b",)}, "without_input names 'b', which is not a gate"),
        (lambda a: a, {"without_input": ("a",)}, "without_input names all gates: one at least must see the"),
        (
            lambda a: a,
            {"late": ("a",), "split": ("a",)},
            "gate 'a' is named in late and in split: a late gate",
        ),
        (
            lambda a: a,
            {"late": ("a",), "without_recurrent": ("a",)},
            "is named in late and in without_recurrent",
        ),
        (lambda a: a, {"split": ("a",), "without_input": ("a",)}, "is named in split and in without_input"),
        (lambda a: a, {"split": ("a",), "without_recurrent": ("a",)}, "in split and in without_recurrent"),
        (lambda a: a, {"without_input": ("a",), "without_recurrent": ("a",)}, "nothing is left of it"),
        (
            lambda n, n_transposed: n,
            {"gates": ("n",), "late": ("n",), "weights": ("n_transposed",)},
            "'n_transposed' is used twice",
        ),
        (lambda mean: mean, {"gates": ("mean",)}, "'mean' is reserved"),
        (lambda a: a, {"split": ("b",)}, r"split names 'b', which is not a gate; the gates are \('a',\)"),
        (lambda a: a, {"recurrent": "c"}, r"recurrent is 'c', which is not a state; the states are \('h',\)"),
        (lambda a: a, {"gates": "a"}, r"gates must be a tuple of names, got the text 'a'; write \('a',\)"),
        (lambda h: h, {"gates": ()}, "gates must name at least one"),
        (lambda a: (), {"states": ()}, "states must name at least one"),
        (lambda a: a, {"gates": ("1a",)}, "'1a' is not a name"),
        (lambda a: a, {"gates": ("if",)}, "'if' is not a name"),
        (lambda a: a, {"gates": (1,)}, "1 is not a name"),
        (lambda a: a, {"gates": ("a", "a")}, "'a' is used twice"),
        (lambda a: a, {"states": ("a",)}, "'a' is used twice"),
        (lambda dh: dh, {"gates": ("dh",)}, "'dh' is used twice"),
        (lambda tanh: tanh, {"gates": ("tanh",)}, "'tanh' is reserved"),
        (lambda v1: v1, {"gates": ("v1",)}, "'v1' is reserved"),
        (lambda a, weight_ih: a, {"weights": ("weight_ih",)}, "'weight_ih' is reserved"),
        (lambda a, bias_hh: a, {"weights": ("bias_hh",)}, "'bias_hh' is reserved"),
    ],
)
def test_declarations_that_do_not_fit(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CellError, match=message):
        define(function, **options)


@pytest.mark.parametrize("function", [5, "a", print, Cell], ids=str)
def test_what_is_no_function(function: Any) -> None:
    with pytest.raises(CellError, match="a cell is made of a function, got"):
        define(function)


def test_the_decorator_needs_its_parentheses() -> None:
    with pytest.raises(CellError, match=r"write @cell\(gates="):
        cell(two_results)  # type: ignore[arg-type]


def test_names_have_an_order() -> None:
    with pytest.raises(
        CellError, match=r"gates must be a tuple of names, in which they have an order, got \{"
    ):
        define(lambda a, b: a + b, gates={"a", "b"})


def test_a_cell_error_is_a_type_error() -> None:
    assert issubclass(CellError, TypeError)


def test_definition_in_the_readme_is_the_built_in_lstm() -> None:
    @cell(gates=("i", "f", "g", "o"), states=("h", "c"))
    def lstm(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    assert lstm.key == cells.lstm.key


def test_the_page_of_the_cells_quotes_them() -> None:
    """docs/cells.md shows every cell as it stands in the code, but for annotations and docstrings."""
    page = (Path(__file__).parent.parent / "docs" / "cells.md").read_text(encoding="utf-8")
    quoted = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        quoted |= {node.name: node for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)}
    module = ast.parse(inspect.getsource(cells))
    defined = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    built_in = [entry for entry in cells.__all__ if isinstance(getattr(cells, entry), Cell)]
    assert {entry: bare(quoted[entry]) for entry in built_in} == {
        entry: bare(defined[entry]) for entry in built_in
    }


def test_the_page_of_the_cells_runs() -> None:
    """Its blocks, one after the other, give the built-in cells."""
    page = (Path(__file__).parent.parent / "docs" / "cells.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)
    for made in BUILT_IN:
        assert scope[made.name].key == made.key
        assert scope[made.name].beginnings == made.beginnings


def bare(function: ast.FunctionDef) -> str:
    """A function without annotations, docstring and private names."""
    function.returns = None
    for argument in (*function.args.args, *function.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(function):
        function.body = function.body[1:]
    function.decorator_list = [node for node in function.decorator_list if isinstance(node, ast.Call)]
    return ast.unparse(function).replace("_relu(", "relu(")
