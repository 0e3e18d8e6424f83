"""The functions that a cell may use: values, derivatives, the ends of the range, NaN."""

from __future__ import annotations

import math as python_math
from typing import Any

import numpy as np
import pytest

from fusedlstm import math
from fusedlstm.math import DERIVATIVES

# name -> (definition for one number, points without kinks)
ONE = {
    "tanh": (python_math.tanh, [-30.0, -1.3, -1e-9, 0.0, 0.2, 5.0]),
    "sigmoid": (lambda x: 1 / (1 + python_math.exp(-x)), [-30.0, -1.3, 0.0, 0.2, 5.0]),
    "hard_sigmoid": (lambda x: min(max(x / 6 + 0.5, 0), 1), [-4.0, -2.9, 0.0, 0.7, 2.9, 3.5]),
    "relu": (lambda x: max(x, 0.0), [-2.0, -1e-3, 1e-3, 4.0]),
    "softplus": (lambda x: python_math.log1p(python_math.exp(x)), [-30.0, -1.0, 0.0, 3.0, 40.0]),
    "exp": (python_math.exp, [-30.0, -1.0, 0.0, 3.0]),
    "log": (python_math.log, [1e-3, 0.7, 1.0, 30.0]),
    "sqrt": (python_math.sqrt, [1e-3, 0.7, 1.0, 30.0]),
    "erf": (python_math.erf, [-7.0, -1.3, -1e-9, 0.0, 0.2, 3.0]),
    "absolute": (abs, [-3.0, -0.2, 0.3, 7.0]),
}
TWO = {"minimum": min, "maximum": max}
PAIRS = [(-1.0, 2.0), (3.0, 0.5), (0.1, 0.2)]


def test_every_function_is_tested() -> None:
    over_units = {"mean", "variance", "normalize"}
    assert set(math.__all__) == {*ONE, *TWO, "where", *over_units} == {*DERIVATIVES, *over_units}


def test_mean_is_that_of_a_row() -> None:
    x = np.arange(12.0).reshape(2, 2, 3)
    found = math.mean(x)
    assert found.shape == x.shape
    assert found[..., 0].tolist() == found[..., 2].tolist() == [[1, 4], [7, 10]]


def test_moments_of_several_values_are_those_of_all_together() -> None:
    x, y = np.random.default_rng(1).normal(3, 2, (2, 4, 5))
    both = np.concatenate([x, y], -1)
    for function, expected in ((math.mean, both.mean(-1)), (math.variance, both.var(-1))):
        found = function(x, y)
        assert found.shape == x.shape
        np.testing.assert_allclose(found, np.tile(expected[:, None], 5), rtol=1e-14)
    np.testing.assert_allclose(math.variance(x)[:, 1], x.var(-1), rtol=1e-14)


def test_normalize() -> None:
    x, y = np.random.default_rng(1).normal(3, 2, (2, 4, 5))
    (one,) = [math.normalize(x)]
    np.testing.assert_allclose(
        one, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    )
    both = np.concatenate(math.normalize(x, y, eps=0.5), -1)
    np.testing.assert_allclose(both.mean(-1), 0, atol=1e-14)
    variance = np.concatenate([x, y], -1).var(-1)
    np.testing.assert_allclose(both.var(-1), variance / (variance + 0.5), rtol=1e-13)


@pytest.mark.parametrize("name", ONE)
def test_value_and_derivative(name: str) -> None:
    function, (definition, points) = getattr(math, name), ONE[name]
    x = np.array(points)
    assert function(x) == pytest.approx([definition(p) for p in points], rel=1e-14, abs=1e-300)
    h = 1e-6 * np.maximum(np.abs(x), 1e-3)
    (derivative,) = DERIVATIVES[name][1](x, function(x))
    assert derivative == pytest.approx((function(x + h) - function(x - h)) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", TWO)
def test_value_and_derivatives_of_two_arguments(name: str) -> None:
    function, h = getattr(math, name), 1e-6
    for x, y in PAIRS:
        assert function(x, y) == TWO[name](x, y)
        dx, dy = DERIVATIVES[name][1](x, y, function(x, y))
        assert dx == pytest.approx((function(x + h, y) - function(x - h, y)) / (2 * h))
        assert dy == pytest.approx((function(x, y + h) - function(x, y - h)) / (2 * h))


def test_the_derivative_of_a_tie_goes_to_the_first() -> None:
    for name in TWO:
        assert DERIVATIVES[name][1](2.0, 2.0, 2.0) == (1.0, 0.0)


def test_where() -> None:
    x = np.array([-1.0, 2.0])
    assert np.array_equal(math.where(x > 0, x, 10.0), [10.0, 2.0])
    condition, dx, dy = DERIVATIVES["where"][1](x > 0, x, 10.0, None)
    assert condition is None
    assert np.array_equal(dx, [0, 1])
    assert np.array_equal(dy, [1, 0])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("tanh", -1.0, 1.0),
        ("sigmoid", 0.0, 1.0),
        ("hard_sigmoid", 0.0, 1.0),
        ("relu", 0.0, np.inf),
        ("softplus", 0.0, np.inf),
        ("exp", 0.0, np.inf),
        ("absolute", np.inf, np.inf),
    ],
)
def test_infinity_and_nan(name: str, low: float, high: float) -> None:
    with np.errstate(over="raise", divide="raise"):
        result = getattr(math, name)(np.array([-np.inf, np.inf, np.nan]))
    assert np.array_equal(result, [low, high, np.nan], equal_nan=True)


@pytest.mark.parametrize("name", TWO)
def test_nan_in_either_argument(name: str) -> None:
    assert np.isnan(getattr(math, name)([1.0, np.nan], [np.nan, 1.0])).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_precision_is_kept(name: str, dtype: Any) -> None:
    x = np.array([0.5, 0.7], dtype)
    assert getattr(math, name)(*[x] * DERIVATIVES[name][0]).dtype == dtype


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(TypeError, match=r"tanh\(\) takes 1 argument\(s\), got 2"):
        math.tanh(1.0, 2.0)
