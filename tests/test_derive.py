"""Derived steps and adjoints: against SymPy, against finite differences, and as text."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
import pytest
import sympy
from checks import ALL, late_and_means, name, unused_state

import fusedlstm.math
from fusedlstm import cell
from fusedlstm.cells import Cell, lstm
from fusedlstm.derive import CellError, Graph, compile_source, differentiate
from fusedlstm.math import DERIVATIVES, exp, log, maximum, relu, sqrt, tanh, where


class Greater(sympy.Function):
    """x > y, without SymPy's search for an answer."""

    nargs = 2


class Select(sympy.Function):
    """x where the condition holds, else y: SymPy's Piecewise without its search for simplifications."""

    nargs = 3

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        condition, x, y = self.args
        return Select(condition, x.diff(symbol), y.diff(symbol))


SYMPY: dict[str, Any] = {
    "tanh": sympy.tanh,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "hard_sigmoid": lambda x: Select(Greater(x, -3), Select(Greater(3, x), x / 6 + 0.5, 1), 0),
    "relu": lambda x: Select(Greater(x, 0), x, 0),
    "softplus": lambda x: sympy.log(1 + sympy.exp(x)),
    "exp": sympy.exp,
    "erf": sympy.erf,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "absolute": lambda x: Select(Greater(x, 0), x, -x),
    "minimum": lambda x, y: Select(Greater(y, x), x, y),
    "maximum": lambda x, y: Select(Greater(x, y), x, y),
    "where": Select,
    "full_like": lambda like, value: sympy.Float(value),
}


# cells whose step is one of numbers, and those whose hidden units see each other
ELEMENTWISE = [cell for cell in ALL if not cell.late and not cell.step.means()]
OF_ROWS = [cell for cell in ALL if cell not in ELEMENTWISE]
FUNCTIONS = {name: getattr(fusedlstm.math, name) for name in (*DERIVATIVES, "mean")} | {
    "full_like": np.full_like
}


def points(cell: Cell, shape: Any = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(len(cell.arguments))
    return {name: generator.normal(0, 1.5, shape) for name in (*cell.arguments, *cell.seeds)}


def inputs(cell: Cell, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [values[name] for name in cell.arguments]


class Rows:
    """A step of some rows, whose late gates are products; and what these were given and gave."""

    def __init__(self, cell: Cell, units: int = 6) -> None:
        self.cell, self.generator = cell, np.random.default_rng(5)
        self.values = points(cell, (4, units))
        self.weights = {gate: self.generator.normal(0, 0.5, (units, units)) for gate in cell.late}
        self.operands: dict[str, np.ndarray] = {}
        self.products: dict[str, np.ndarray] = {}

    def given(self, values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> dict[str, Any]:
        """The arguments of the step: late gates, whose values are their own parts, as functions."""

        def late(gate: str) -> Any:
            def call(operand: np.ndarray) -> np.ndarray:
                self.operands[gate] = operand
                self.products[gate] = values[gate] + operand @ weights[gate].T
                return self.products[gate]

            return call

        return {name: late(name) if name in self.cell.late else values[name] for name in self.cell.arguments}

    def step(self, values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(self.cell.numpy.step(**self.given(values, weights)))

    def adjoint(self) -> dict[str, np.ndarray]:
        """The gradients of the arguments; of a late gate that of its pre-activation."""
        self.step(self.values, self.weights)
        transposed = {f"{gate}_transposed": lambda d, w=w: d @ w for gate, w in self.weights.items()}
        values = self.values | self.products
        return dict(zip(self.cell.arguments, self.cell.numpy.adjoint(**values, **transposed)))


@pytest.mark.parametrize("cell", ALL, ids=name)
def test_step_is_the_function(cell: Cell) -> None:
    rows = Rows(cell)
    given = rows.given(rows.values, rows.weights)
    results = cell.function(**given, **cell.constants)
    results = results if isinstance(results, tuple) else (results,)
    for derived, result in zip(cell.numpy.step(**given), results):
        assert derived == pytest.approx(np.broadcast_to(result, derived.shape), rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("cell", ELEMENTWISE, ids=name)
def test_adjoint_is_what_sympy_derives(cell: Cell) -> None:
    values = points(cell)
    symbols = {name: sympy.Symbol(name, real=True) for name in values}
    with sympy.evaluate(False):  # or it ponders on every comparison
        step = compile_source(cell.source, SYMPY, cell.name).step
        results = step(*(symbols[name] for name in cell.arguments))
        loss = sum(symbols[seed] * result for seed, result in zip(cell.seeds, results))
    adjoint = cell.numpy.adjoint(**values)
    modules = [{"Select": np.where, "Greater": np.greater, "erf": erf}, "numpy"]
    for argument, gradient in zip(cell.arguments, adjoint):
        derivative = sympy.lambdify(list(symbols.values()), sympy.diff(loss, symbols[argument]), modules)
        expected = np.broadcast_to(derivative(*values.values()), gradient.shape)
        assert gradient == pytest.approx(expected, rel=1e-11, abs=1e-11), argument


@pytest.mark.parametrize("cell", ELEMENTWISE, ids=name)
def test_adjoint_is_what_finite_differences_give(cell: Cell) -> None:
    values = points(cell)

    def loss(argument: str, shift: float) -> np.ndarray:
        moved = values | {argument: values[argument] + shift}
        return sum(values[s] * r for s, r in zip(cell.seeds, cell.numpy.step(*inputs(cell, moved))))

    h = 1e-5
    for argument, gradient in zip(cell.arguments, cell.numpy.adjoint(**values)):
        slope = (loss(argument, h) - loss(argument, -h)) / (2 * h)
        assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-7), argument


@pytest.mark.parametrize("cell", OF_ROWS, ids=name)
def test_adjoint_of_rows_is_what_finite_differences_give(cell: Cell) -> None:
    """Along random directions, of arguments and of the weights of late gates."""
    rows = Rows(cell)
    gradients = rows.adjoint()
    by_weight = {gate: gradients[gate].T @ rows.operands[gate] for gate in cell.late}

    def loss(values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> float:
        return float(sum((rows.values[s] * r).sum() for s, r in zip(cell.seeds, rows.step(values, weights))))

    h = 1e-5
    for among, found in ((rows.values, gradients), (rows.weights, by_weight)):
        for what, gradient in found.items():
            for _ in range(3):
                direction = rows.generator.normal(size=gradient.shape)
                sides = []
                for shift in (h, -h):
                    moved = among | {what: among[what] + shift * direction}
                    sides.append(
                        loss(*((moved, rows.weights) if among is rows.values else (rows.values, moved)))
                    )
                slope = (sides[0] - sides[1]) / (2 * h)
                assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-7), what


@pytest.mark.parametrize("cell", ALL, ids=name)
def test_tangents_are_the_transpose_of_the_adjoint(cell: Cell) -> None:
    """<seeds, J directions> = <J^T seeds, directions>, and the adjoint is held against others above."""
    rows = Rows(cell)
    gradients = rows.adjoint()
    tangent = cell.step.tangent(cell.moved)
    functions = [f"{gate}_moved" for gate in cell.late]
    text = tangent.code("tangent", tangent.given, functions)
    directions = {name: rows.generator.normal(size=(4, 6)) for name in cell.arguments}
    turns = {gate: rows.generator.normal(size=(6, 6)) for gate in cell.late}
    moved = {
        f"{gate}_moved": lambda d, operand, gate=gate: (
            directions[gate] + d @ rows.weights[gate].T + operand @ turns[gate].T
        )
        for gate in cell.late
    }
    values = rows.values | rows.products | {cell.moved + name: d for name, d in directions.items()}
    given = {name: values[name] for name in tangent.given}
    along = compile_source(text, FUNCTIONS, "<tangent>").tangent(**given, **moved)
    forward = sum((rows.values[name] * part).sum() for name, part in zip(cell.seeds, along))
    back = sum((directions[name] * gradients[name]).sum() for name in cell.arguments)
    back += sum((turns[gate] * (gradients[gate].T @ rows.operands[gate])).sum() for gate in cell.late)
    assert forward == pytest.approx(back, rel=1e-12)


def test_a_number_beside_late_gates_is_like_a_value() -> None:
    """The first argument of generated code may be a function."""

    @cell(gates=("n",), states=("h", "s"), late=("n",))
    def with_number(n: Any, h: Any) -> Any:
        return tanh(n(h)), 1.5

    rows = Rows(with_number)
    _, number = rows.step(rows.values, rows.weights)
    assert np.array_equal(number, np.full((4, 6), 1.5))
    assert np.array_equal(unused_state.numpy.step(np.zeros(3))[1], np.full(3, 1.5))


def test_source_of_late_gates_can_be_read() -> None:
    """The step calls them, the adjoint is given what they gave."""
    step, adjoint = late_and_means.source.split("def ")[1:]
    assert step.count(" = n(") == step.count(" = m(") == 1
    assert step.count(" = mean(") == 3
    assert adjoint.count(" = n_transposed(") == adjoint.count(" = m_transposed(") == 1
    assert adjoint.split("\n")[0].endswith("n_transposed, m_transposed):")


def test_source_is_readable_and_short() -> None:
    step, adjoint = lstm.source.split("def ")[1:]
    assert step.startswith("step(i, f, g, o, c):\n    v0 = sigmoid(f)\n    v1 = v0 * c\n")
    assert adjoint.startswith("adjoint(i, f, g, o, c, dh, dc):")
    for function in ("sigmoid", "tanh"):  # not computed again for the gradient
        assert adjoint.count(function) == step.count(function)


def test_equal_expressions_are_computed_once() -> None:
    @cell(gates=("a", "b"))
    def twice(a: Any, b: Any) -> Any:
        return tanh(a + b) * tanh(a + b)

    assert twice.source.split("def ")[1].count("tanh") == 1


def test_constants_are_folded_and_neutral_elements_dropped() -> None:
    @cell(gates=("a",))
    def plain(a: Any, *, scale: float = 0.5) -> Any:
        return (0.0 + a * 1) / 1 - 0 + 0 * tanh(a) + (2 * scale - 1) * a

    assert "return (a,)" in plain.source


@pytest.mark.parametrize(
    ("function", "at"),
    [
        (lambda a: where(a > 0, sqrt(a), 0.0), -2.0),  # NaN behind the condition
        (lambda a: where(a > 0, log(a), 0.0), 0.0),  # infinity
        (lambda a: relu(a) * exp(a), -1000.0),
    ],
)
def test_a_masked_gradient_is_zero(function: Any, at: float) -> None:
    masked = cell(gates=("a",))(function)
    with np.errstate(all="ignore"):
        (gradient,) = masked.numpy.adjoint(np.array([at]), np.array([3.0]))
    assert gradient == 0


def test_powers() -> None:
    graph = Graph()
    a = graph.symbol("a")
    for exponent in range(1, 17):
        (slope,) = differentiate([a**exponent], [graph.constant(1.0)], [a])
        assert _value(a**exponent, 1.1) == pytest.approx(1.1**exponent)
        assert _value(slope, 1.1) == pytest.approx(exponent * 1.1 ** (exponent - 1))
    assert _value(a**0.5, 4.0) == 2


def _value(expression: Any, a: float) -> float:
    """Evaluate the graph, which the text of a cell does otherwise."""
    from fusedlstm import math
    from fusedlstm.derive import source

    functions = {name: getattr(math, name) for name in math.DERIVATIVES} | {"full_like": np.full_like}
    (result,) = compile_source(source("f", ["a"], [expression]), functions, "f").f(np.array([a]))
    return float(result[0])


def test_a_value_of_another_cell_is_refused() -> None:
    stray = Graph().symbol("stray")
    with pytest.raises(CellError, match="another cell"):
        cell(gates=("a",))(lambda a: a + stray)


def test_many_values_that_are_used_twice_take_no_longer() -> None:
    """Whether a comparison is known is not asked of the values that are compared."""

    def deep(a: Any) -> Any:
        for _ in range(60):
            a = a * a - a
        return maximum(a, 0.0)

    assert cell(gates=("a",))(deep).source.count("\n") < 10 * 60


def test_what_depends_on_constants_alone_is_worked_out() -> None:
    @cell(gates=("a",))
    def with_constants(a: Any, h: Any, *, k: float = 0.0) -> Any:
        zero = k * h
        gain = where((zero + 1 > 0) & ~(zero > 0), 2.0, k)
        return tanh(a) * gain + tanh(zero) + where((zero > 1) | (zero == 0), h, a)

    assert "where" not in with_constants.source
    a, h = np.array([0.3]), np.array([-0.7])
    assert np.allclose(with_constants.numpy.step(a, h), 2 * np.tanh(a) + h, rtol=1e-15)
    assert np.allclose(
        with_constants.numpy.adjoint(a, h, np.ones(1)), [2 * (1 - np.tanh(a) ** 2), [1.0]], rtol=1e-15
    )
