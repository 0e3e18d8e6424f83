"""The mathematics of ONNX's recurrent operators: their attributes, and for every combination a cell.

Source: the operators LSTM, GRU and RNN of opsets 7, 14 and 22.  Where the standard leaves something open:

-   `activation_alpha` and `activation_beta` hold values for the activations that take one, in their order, as
    ONNX Runtime reads them.  A list with one value for every activation is taken if it says the same, and is
    refused if it does not.
-   A value that is left out is the default of the operator of the same name, of ThresholdedRelu too.  Affine
    and ScaledTanh are no operators any more and have none.
-   `clip` bounds what the gates give to their activations, not the cell state on its way through h, as in
    ONNX Runtime and OpenVINO.
-   `input_forget` makes the forget gate one minus the input gate, as in ONNX Runtime; its rows of the weights
    are not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from .. import cells, math
from ..cells import Cell
from ..derive import Graph
from ..once import once
from ..weights import GATE_ORDERS

__all__ = ["Activation", "Attributes", "Form", "cell", "cell_of", "form_of"]

DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}  # and how many they are


def _leaky_relu(x: Any, alpha: float = 0.01) -> Any:
    return math.where(x < 0, alpha * x, x)


def _thresholded_relu(x: Any, alpha: float = 1.0) -> Any:
    return math.where(x < alpha, 0.0, x)


def _hard_sigmoid(x: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return _bounded(alpha * x + beta, 0.0, 1.0)


def _elu(x: Any, alpha: float = 1.0) -> Any:
    half = math.tanh(0.5 * math.minimum(x, 0.0))  # of which exp(x) - 1 follows without cancellation
    return math.where(x < 0, (2 * alpha) * (half / (1 - half)), x)


def _affine(x: Any, alpha: float, beta: float) -> Any:
    return alpha * x + beta


def _scaled_tanh(x: Any, alpha: float, beta: float) -> Any:
    return alpha * math.tanh(beta * x)


def _softsign(x: Any) -> Any:
    return x / (1 + math.absolute(x))


def _bounded(x: Any, low: float, high: float) -> Any:
    return math.minimum(math.maximum(x, low), high)


# All that the standard lists; the further arguments of a function are those that it takes of alpha and beta.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Relu": math.relu,
    "Tanh": math.tanh,
    "Sigmoid": math.sigmoid,
    "Affine": _affine,
    "LeakyRelu": _leaky_relu,
    "ThresholdedRelu": _thresholded_relu,
    "ScaledTanh": _scaled_tanh,
    "HardSigmoid": _hard_sigmoid,
    "Elu": _elu,
    "Softsign": _softsign,
    "Softplus": math.softplus,
}
_BY_LOWER_CASE = {name.lower(): name for name in FUNCTIONS}  # files differ in how they write them


class Activation(NamedTuple):
    """An activation function with its values of alpha and beta, those that it takes."""

    name: str
    values: tuple[float, ...] = ()

    def __call__(self, x: Any) -> Any:
        return FUNCTIONS[self.name](x, *self.values)

    def named(self) -> dict[str, float]:
        """The values of alpha and beta, those that it takes."""
        return dict(zip(_parameters(self.name), self.values))


def _parameters(name: str) -> dict[str, Any]:
    """What an activation takes of alpha and beta, with the defaults."""
    taken = inspect.signature(FUNCTIONS[name]).parameters
    return {key: taken[key].default for key in ("alpha", "beta") if key in taken}


@dataclass(frozen=True)
class Form:
    """What one direction of a node computes at a step.

    Attributes:
        operator: "LSTM", "GRU" or "RNN".
        activations: f, g and h of an LSTM, f and g of a GRU, f of an RNN, as the standard names them.
        clip: the bound of what the gates give to their activations, or None.
        peepholes: whether an LSTM has the input P.
        input_forget, linear_before_reset: the attributes, of LSTM and of GRU.
    """

    operator: str
    activations: tuple[Activation, ...]
    clip: float | None = None
    peepholes: bool = False
    input_forget: bool = False
    linear_before_reset: bool = False

    @property
    def gates(self) -> tuple[str, ...]:
        """The gates by our names, in the order in which W and R have their rows."""
        return GATE_ORDERS["onnx"][self.operator.lower()]

    def function(self, n: int) -> Callable[[Any], Any]:
        """Activation n of a gate, which `clip` bounds the argument of."""
        activation, clip = self.activations[n], self.clip
        return lambda x: activation(x if clip is None else _bounded(x, -clip, clip))


# --- Cells ------------------------------------------------------------------------------------------------

DEFAULTS = {
    name: tuple(map(Activation, names))
    for name, names in {
        "LSTM": ("Sigmoid", "Tanh", "Tanh"),
        "GRU": ("Sigmoid", "Tanh"),
        "RNN": ("Tanh",),
    }.items()
}
_STANDARD = {
    Form("LSTM", DEFAULTS["LSTM"]): cells.lstm,
    Form("LSTM", DEFAULTS["LSTM"], peepholes=True): cells.peephole_lstm,
    Form("GRU", DEFAULTS["GRU"]): cells.gru_reset_before,
    Form("GRU", DEFAULTS["GRU"], linear_before_reset=True): cells.gru,
    Form("RNN", DEFAULTS["RNN"]): cells.rnn_tanh,
    Form("RNN", (Activation("Relu"),)): cells.rnn_relu,
}
_FORMS = {made.key: form for form, made in _STANDARD.items()}  # also of cells made below, when they are made
# its gate is the forget gate, and the input gate of the form: weights change their sign
_FORMS[cells.coupled_lstm.key] = Form("LSTM", DEFAULTS["LSTM"], input_forget=True)


def form_of(cell: Cell) -> Form | None:
    """The operator and the attributes that compute what a cell does; None if there are none."""
    return _FORMS.get(cell.key)


def cell_of(form: Form) -> Cell:
    """The cell that computes what a node does: one of :mod:`fusedlstm.cells` if there is one, else made here.

    Its gates have the names and the order of ours, and peepholes are the learned vectors ``p_i``, ``p_f``,
    ``p_o``.  With `input_forget` there is no gate ``f``.
    """
    return _STANDARD.get(form) or _made(form)


@once
def _made(form: Form) -> Cell:
    made = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[form.operator](form)
    made._made = cell_of, (form,)
    _FORMS[made.key] = form
    return made


def _lstm(form: Form) -> Cell:
    f, g, h = form.function(0), form.function(1), form.activations[2]
    gates = ("i", "g", "o") if form.input_forget else ("i", "f", "g", "o")
    vectors = tuple(f"p_{gate}" for gate in gates if gate != "g") if form.peepholes else ()

    def onnx_lstm(c: Any, **given: Any) -> Any:
        def seen(gate: str, state: Any) -> Any:
            return given[gate] + given[f"p_{gate}"] * state if vectors else given[gate]

        i = f(seen("i", c))
        keep = 1 - i if form.input_forget else f(seen("f", c))
        new = keep * c + i * g(given["g"])
        return f(seen("o", new)) * h(new), new

    return Cell(_taking(onnx_lstm, (*gates, "c", *vectors)), gates, ("h", "c"), weights=vectors)


def _gru(form: Form) -> Cell:
    f, g = form.function(0), form.function(1)
    f_number, g_number = (function(Graph().symbol("x")).number for function in (f, g))  # if it is constant
    kinds: dict[str, Any] = {}
    if form.linear_before_reset:
        kinds = {"split": ("n",)}
    elif g_number is None:  # else nothing depends on the product
        kinds = {"late": ("n",)}

    def onnx_gru(r: Any, z: Any, h: Any, **given: Any) -> Any:
        if "split" in kinds:
            n = given["n_x"] + f(r) * given["n_h"]
        elif "late" in kinds:
            n = given["n"](h - h if f_number == 0 else f(r) * h)  # a product is of a value, not of a number
        else:
            n = given["n"]
        new = g(n)
        return new + f(z) * (h - new)

    parts = ("n_x", "n_h") if form.linear_before_reset else ("n",)
    return Cell(_taking(onnx_gru, ("r", "z", *parts, "h")), ("r", "z", "n"), ("h",), **kinds)


def _rnn(form: Form) -> Cell:
    def onnx_rnn(a: Any) -> Any:
        return form.function(0)(a)

    return Cell(onnx_rnn, ("a",), ("h",))


def _taking(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """A function with arguments of these names, as a cell matches them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


# --- Attributes -------------------------------------------------------------------------------------------

_COMMON = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "layout")
_NAMES = {"LSTM": (*_COMMON, "input_forget"), "GRU": (*_COMMON, "linear_before_reset"), "RNN": _COMMON}


@dataclass(frozen=True)
class Attributes:
    """What the attributes of a node say.

    Attributes:
        operator: "LSTM", "GRU" or "RNN".
        direction: "forward", "reverse" or "bidirectional".
        layout: 1 if X, Y and the states have the batch as their first axis, else 0.
        hidden_size: H if it is given.
        forms: of each direction.
    """

    operator: str
    direction: str
    layout: int
    hidden_size: int | None
    forms: tuple[Form, ...]

    @classmethod
    def read(cls, operator: str, given: Mapping[str, Any], peepholes: bool = False) -> Attributes:
        """Check attributes by name, None for one that is left out; `peepholes` says whether there is P.

        Raises:
            ValueError: for an attribute that the operator does not have, or a value that it cannot have.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in _NAMES[operator]:
                raise ValueError(
                    f"{operator} has no attribute {name!r}; it has {', '.join(_NAMES[operator])}"
                )
        direction = given.get("direction", "forward")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        count = DIRECTIONS[direction]
        options: dict[str, Any] = {
            "clip": _clip(given.get("clip")),
            "peepholes": peepholes,
            "input_forget": bool(_integer(given, "input_forget", 0, 1)),
            "linear_before_reset": bool(_integer(given, "linear_before_reset", 0, 1)),
        }
        chosen = _activations(operator, count, given)
        size = len(chosen) // count
        forms = tuple(Form(operator, chosen[d * size : (d + 1) * size], **options) for d in range(count))
        hidden = _integer(given, "hidden_size", 1, 2**31 - 1) if "hidden_size" in given else None
        return cls(operator, direction, _integer(given, "layout", 0, 1), hidden, forms)


def _integer(given: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = given.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    """A value as the standard holds it, in float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise ValueError(f"{name} must hold numbers, got {value!r}")
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    if not isfinite(number):
        raise ValueError(f"{name} must hold finite numbers, got {float(value)!r}")
    return number


def _clip(value: Any) -> float | None:
    if value is None or (isinstance(value, (float, np.floating)) and value == np.inf):
        return None
    clip = _number("clip", value)
    if clip <= 0:
        raise ValueError(f"clip must be positive, got {clip!r}")
    return clip


def _listed(given: Mapping[str, Any], name: str) -> list[Any]:
    values = given.get(name, ())
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return list(values)


def _activations(operator: str, directions: int, given: Mapping[str, Any]) -> tuple[Activation, ...]:
    """The activations of all directions."""
    expected = len(DEFAULTS[operator]) * directions
    names = [_activation_name(name) for name in _listed(given, "activations")]
    if not names:
        names = [activation.name for activation in DEFAULTS[operator]] * directions
    values = {
        kind: _values(kind, names, [_number(key, value) for value in _listed(given, key)])
        for kind, key in (("alpha", "activation_alpha"), ("beta", "activation_beta"))
    }
    chosen = []
    for n, name in enumerate(names):
        chosen.append(Activation(name, tuple(values[kind][n] for kind in _parameters(name))))
    if operator == "RNN" and directions == 1 and len(chosen) == 2 and chosen[0] == chosen[1]:
        chosen.pop()  # the standard's own default has two, whatever the direction
    if len(chosen) != expected:
        raise ValueError(f"activations must be {expected} of {operator}, got {', '.join(names)}")
    return tuple(chosen)


def _activation_name(name: Any) -> str:
    if not isinstance(name, str) or name.lower() not in _BY_LOWER_CASE:
        raise ValueError(f"activations must be among {', '.join(FUNCTIONS)}, got {name!r}")
    return _BY_LOWER_CASE[name.lower()]


def _values(kind: str, names: Sequence[str], given: Sequence[float]) -> dict[int, float]:
    """alpha or beta by the number of the activation that takes it."""
    takers = [n for n, name in enumerate(names) if kind in _parameters(name)]
    if len(given) > len(takers) and (
        len(given) != len(names) or any(given[n] != given[k] for k, n in enumerate(takers))
    ):
        raise ValueError(
            f"activation_{kind} has {len(given)} values for {len(takers)} of {', '.join(names)} that take "
            "one, which can be read in two ways"
        )
    found = {}
    for k, n in enumerate(takers):
        value = given[k] if k < len(given) else _parameters(names[n])[kind]
        if value is inspect.Parameter.empty:
            raise ValueError(f"activation_{kind} lacks the value of {names[n]}, which has no default")
        found[n] = _number(f"activation_{kind}", value)
    return found


def cell(
    operator: str,
    *,
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    clip: float | None = None,
    peepholes: bool = False,
    input_forget: bool = False,
    linear_before_reset: bool = False,
) -> Cell:
    """The cell of a node "LSTM", "GRU" or "RNN" with these attributes, of one direction.

    Raises:
        ValueError: for an attribute that the operator does not have, or a value that it cannot have.

    Example:
        >>> cell("GRU", activations=["HardSigmoid", "Softsign"], clip=3.0)
        <fusedlstm cell onnx_gru: gates ('r', 'z', 'n'), states ('h',)>
    """
    if operator not in DEFAULTS:
        raise ValueError(f"operator must be one of {', '.join(DEFAULTS)}, got {operator!r}")
    if peepholes and operator != "LSTM":
        raise ValueError(f"{operator} has no peepholes")
    given = {
        "activations": activations,
        "activation_alpha": activation_alpha,
        "activation_beta": activation_beta,
        "clip": clip,
        "input_forget": int(input_forget) or None,
        "linear_before_reset": int(linear_before_reset) or None,
    }
    return cell_of(Attributes.read(operator, given, peepholes).forms[0])
