"""The functions that a cell may use, each with its derivative.

Called with NumPy arrays or numbers they compute; called with the symbols of
:mod:`fusedlstm.derive` they record.  The processors have their own versions under the same
names: ``kernels/cpu/simd.py`` and ``kernels/cuda/scalar.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf as _erf_of_number
from typing import Any

import numpy as np

__all__ = [
    "absolute",
    "erf",
    "exp",
    "hard_sigmoid",
    "log",
    "maximum",
    "mean",
    "minimum",
    "normalize",
    "relu",
    "sigmoid",
    "softplus",
    "sqrt",
    "tanh",
    "variance",
    "where",
]

# name -> (number of arguments, derivatives); the derivatives take the arguments, then the
# result, and return one factor per argument, None for an argument without a derivative.
DERIVATIVES: dict[str, tuple[int, Callable[..., tuple[Any, ...]]]] = {}


def _function(derivatives: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        name, count = compute.__name__, compute.__code__.co_argcount
        DERIVATIVES[name] = (count, derivatives)

        def call(*args: Any) -> Any:
            if len(args) != count:
                raise TypeError(f"{name}() takes {count} argument(s), got {len(args)}")
            for arg in args:
                if record := getattr(arg, "record", None):
                    return record(name, args)
            return compute(*args)

        call.__name__ = call.__qualname__ = name
        call.__doc__ = compute.__doc__
        return call

    return register


def _where_derivatives(condition: Any, x: Any, y: Any, result: Any) -> tuple[Any, ...]:
    return None, where(condition, 1.0, 0.0), where(condition, 0.0, 1.0)


@_function(_where_derivatives)
def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, y elsewhere; the condition is a comparison."""
    return np.where(condition, x, y)


def _log_one_plus_exp(x: Any) -> Any:
    with np.errstate(invalid="ignore"):  # NaN comes out as NaN, which needs no warning
        return np.logaddexp(0, x)


def _step(x: Any) -> Any:
    return where(x > 0, 1.0, 0.0)


@_function(lambda x, y: (1 - y * y,))
def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return np.tanh(x)


@_function(lambda x, y: (y * (1 - y),))
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-_log_one_plus_exp(-x))


@_function(lambda x, y: (where((y > 0) & (y < 1), 1 / 6, 0.0),))
def hard_sigmoid(x: Any) -> Any:
    """x / 6 + 1 / 2, cut to [0, 1], as PyTorch and Keras define it."""
    return np.clip(x / 6 + 0.5, 0, 1)


@_function(lambda x, y: (_step(x),))
def relu(x: Any) -> Any:
    """max(x, 0); NaN stays NaN."""
    return np.maximum(x, 0)


@_function(lambda x, y: (sigmoid(x),))
def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without overflow."""
    return _log_one_plus_exp(x)


@_function(lambda x, y: (y,))
def exp(x: Any) -> Any:
    """Exponential function."""
    return np.exp(x)


@_function(lambda x, y: (1 / x,))
def log(x: Any) -> Any:
    """Natural logarithm."""
    return np.log(x)


@_function(lambda x, y: (exp(-x * x) * 1.1283791670955126,))  # 2 / sqrt(pi)
def erf(x: Any) -> Any:
    """Error function, 2 / sqrt(pi) times the integral of exp(-t * t) from 0 to x."""
    return np.vectorize(_erf_of_number, otypes=[np.result_type(x)])(x)


@_function(lambda x, y: (0.5 / y,))
def sqrt(x: Any) -> Any:
    """Square root."""
    return np.sqrt(x)


@_function(lambda x, y: (where(x > 0, 1.0, where(x < 0, -1.0, 0.0)),))
def absolute(x: Any) -> Any:
    """``|x|``; the derivative at 0 is 0."""
    return np.abs(x)


@_function(lambda x, y, m: (where(x <= y, 1.0, 0.0), where(x <= y, 0.0, 1.0)))
def minimum(x: Any, y: Any) -> Any:
    """The smaller of two values, NaN if either is; the derivative of a tie goes to the first."""
    return np.minimum(x, y)


@_function(lambda x, y, m: (where(x >= y, 1.0, 0.0), where(x >= y, 0.0, 1.0)))
def maximum(x: Any, y: Any) -> Any:
    """The larger of two values, NaN if either is; the derivative of a tie goes to the first."""
    return np.maximum(x, y)


def mean(*values: Any) -> Any:
    """The mean over the hidden units of a row, for every unit of it; of several values, of all together."""
    for value in values:
        if record := getattr(value, "record", None):
            return record("mean", values)
    together = sum(values) / len(values)
    return np.broadcast_to(np.mean(together, -1, keepdims=True), np.shape(together))


def variance(*values: Any) -> Any:
    """The variance over the hidden units of a row, for every unit of it; of several values, of all together.

    It is the mean of the squares of what is left without the mean, as layer normalization takes it.
    """
    for value in values:
        if record := getattr(value, "record", None):
            return record("variance", values)
    center = mean(*values)
    return mean(*((value - center) * (value - center) for value in values))


def normalize(*values: Any, eps: float = 1e-5) -> Any:
    """Values less their mean over the hidden units of a row, over the root of their variance plus `eps`.

    Several values are normalized together, by one mean and one variance, and come as a list.  Gains and
    shifts are the cell's own: ``gain * normalize(x) + shift`` with learned vectors.

    Source: Ba, Kiros and Hinton, "Layer normalization" (2016).
    """
    center, scale = mean(*values), 1 / sqrt(variance(*values) + eps)
    normalized = [(value - center) * scale for value in values]
    return normalized[0] if len(values) == 1 else normalized


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
