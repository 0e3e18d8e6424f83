"""Every cell, as mathematics, once.

A cell is a function from gate pre-activations and previous states to new states, for one hidden
unit.  From it follow the NumPy reference, the SIMD and CUDA kernels, and the backward pass.
"""

from __future__ import annotations

import hashlib
import inspect
import keyword
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

from . import math
from .derive import CellError, Graph, compile_source, differentiate, source, trace
from .math import relu as _relu
from .math import sigmoid, tanh, where
from .once import lazy, once

__all__ = [
    "Cell",
    "CellError",
    "cell",
    "coupled_lstm",
    "gru",
    "gru_reset_before",
    "lstm",
    "peephole_lstm",
    "recurrent_dropout",
    "rnn_relu",
    "rnn_tanh",
    "with_functions",
    "with_gates",
]

# names of the layers' own parameters, and of what generated code calls besides the functions of math
_RESERVED = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh", "full_like")


class Cell:
    """What :func:`cell` makes of a function; see there.

    Attributes:
        name: name of the function.
        gates: names of the gates, in the order of the rows of the weights.
        states: names of the states; the first is the output.
        split: the gates that arrive as two arguments, ``n_x`` and ``n_h``.
        weights: names of the learned vectors of length hidden.
        recurrent: the state that the recurrent weights multiply at the next step.
        arguments: pre-activations, then states and learned vectors in use, as the generated code
            takes them.
        function: the mathematics.
        constants: the keyword-only arguments, and their values.
        seeds: names of the gradients of the new states, which the derived adjoint takes.
        source: the generated code of the step and of its adjoint.
        key: a text that is equal for equal mathematics; names files in the cache.
        half: the cell that is run twice for one step, if a step takes two recurrent products.
    """

    half: Cell | None = None
    _without_dropout: Cell | None = None  # of what recurrent_dropout made

    def __init__(
        self,
        function: Callable[..., Any],
        gates: Sequence[str],
        states: Sequence[str],
        split: Sequence[str],
        weights: Sequence[str],
        recurrent: str | None,
    ) -> None:
        if not isinstance(function, FunctionType):
            raise CellError(f"a cell is made of a function, got {function!r}")
        self.function: Callable[..., Any] = function
        self.name = function.__name__
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.gates, self.states = _names("gates", gates), _names("states", states)
        self.split, self.weights = _names("split", split, empty=True), _names("weights", weights, empty=True)
        for name in self.split:
            if name not in self.gates:
                raise CellError(f"split names {name!r}, which is not a gate; the gates are {self.gates}")
        self.recurrent = self.states[0] if recurrent is None else recurrent
        if self.recurrent not in self.states:
            raise CellError(f"recurrent is {recurrent!r}, which is not a state; the states are {self.states}")
        self._check_names()
        self.constants = self._match_arguments()
        self._derive()

    def __repr__(self) -> str:
        return f"<fusedlstm cell {self.name}: gates {self.gates}, states {self.states}>"

    def __reduce__(self) -> Any:
        """Pickled by its name, as functions are."""
        if self._without_dropout is not None:
            return recurrent_dropout, (self._without_dropout,)
        return self.function.__qualname__

    @property
    def plain(self) -> tuple[str, ...]:
        """The gates whose input and recurrent products are added before the cell sees them."""
        return tuple(g for g in self.gates if g not in self.split)

    @property
    def preactivations(self) -> tuple[str, ...]:
        """Input parts of split gates, plain gates, recurrent parts of split gates: the input product
        fills the front, the recurrent product the back, each without a gap."""
        return (*(f"{g}_x" for g in self.split), *self.plain, *(f"{g}_h" for g in self.split))

    @property
    def input_gates(self) -> tuple[str, ...]:
        """The gates in the order in which the input product computes them."""
        return (*self.split, *self.plain)

    @property
    def recurrent_gates(self) -> tuple[str, ...]:
        """The gates in the order in which the recurrent product computes them."""
        return (*self.plain, *self.split)

    @property
    def reads_output(self) -> bool:
        """Whether the cell takes the previous output itself, beside its product with the weights."""
        return self.states[0] in self.arguments

    @property
    def operand(self) -> int:
        """The place among the states of that which the recurrent weights multiply."""
        return self.states.index(self.recurrent)

    @property
    def reads_operand(self) -> bool:
        """Whether the cell takes the previous value of that state itself."""
        return self.recurrent in self.arguments

    def step_arguments(
        self,
        products: Iterable[Iterable[Any]],  # that of the input and the recurrent one, (B, H) for each gate
        states: Iterable[Any],  # (B, H) each
        vectors: Iterable[Any],  # the learned vectors, (H,) each
    ) -> dict[str, Any]:
        """What a step takes, by name and in its order: in a split gate both parts, else their sum."""
        values = dict(zip(self.states, states)) | dict(zip(self.weights, vectors))
        for gate, x, h in zip(self.gates, *products):
            values |= {f"{gate}_x": x, f"{gate}_h": h} if gate in self.split else {gate: x + h}
        return {name: values[name] for name in self.arguments}

    @property
    def unprojectable(self) -> str:
        """Why the output cannot be projected; empty if it can."""
        if self.reads_output:
            return f"it reads its own output {self.states[0]!r}, which has another size then"
        if self.operand:
            return f"the recurrent weights multiply {self.recurrent!r}, not the output"
        return ""

    @lazy
    def numpy(self) -> Any:
        """The generated functions `step` and `adjoint` over NumPy arrays."""
        import numpy as np

        functions = {name: getattr(math, name) for name in math.DERIVATIVES}
        return compile_source(self.source, {**functions, "full_like": np.full_like}, f"<cell {self.name}>")

    def _check_names(self) -> None:
        names = [*self.preactivations, *self.states, *self.weights]
        names += [f"d{state}" for state in self.states]
        for name in names:
            if names.count(name) > 1:
                raise CellError(f"cell {self.name}: the name {name!r} is used twice among {names}")
            if name in (*math.DERIVATIVES, *_RESERVED) or (name[0] == "v" and name[1:].isdigit()):
                raise CellError(f"cell {self.name}: the name {name!r} is reserved; choose another")

    def _match_arguments(self) -> dict[str, float]:
        known = (*self.preactivations, *self.states, *self.weights)
        taken, constants = [], {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                if not isinstance(parameter.default, (int, float)):
                    raise CellError(
                        f"cell {self.name}: the constant {name!r} needs a number as its default, "
                        f"got {parameter.default!r}"
                    )
                constants[name] = parameter.default
            elif parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or name not in known:
                hint = f"; gate {name!r} is split: take {name}_x and {name}_h" if name in self.split else ""
                raise CellError(
                    f"cell {self.name}: the argument {name!r} is none of {', '.join(known)}{hint}. "
                    "Constants go behind a * with a default"
                )
            else:
                taken.append(name)
        for name in self.preactivations:
            if name not in taken:
                raise CellError(f"cell {self.name}: gate argument {name!r} is declared but not taken")
        for name in self.weights:
            if name not in taken:
                raise CellError(f"cell {self.name}: learned vector {name!r} is declared but not taken")
        self.arguments = tuple(name for name in known if name in taken)
        return constants

    def _derive(self) -> None:
        graph = Graph()
        results = trace(self.function, self.arguments, self.constants, graph)
        if len(results) != len(self.states):
            raise CellError(
                f"cell {self.name} returns {len(results)} value(s) but declares {len(self.states)} "
                f"state(s): return {', '.join(self.states)}, in this order"
            )
        inputs = [graph.symbol(name) for name in self.arguments]
        self.seeds = tuple(f"d{name}" for name in self.states)
        gradients = differentiate(results, [graph.symbol(name) for name in self.seeds], inputs)
        header = (
            f"# Cell {self.name!r}, derived by fusedlstm: the step, and its adjoint, which takes the\n"
            "# gradients of the new states and returns those of the arguments.\n\n"
        )
        step = source("step", self.arguments, results)
        adjoint = source("adjoint", (*self.arguments, *self.seeds), gradients)
        self.source = f"{header}{step}\n\n{adjoint}"
        other = (self.recurrent,) if self.operand else ()
        shape = repr((self.name, self.gates, self.states, self.split, self.weights, *other))
        self.key = f"{self.name}_{hashlib.sha256((shape + self.source).encode()).hexdigest()[:16]}"


def _names(what: str, names: Sequence[str], empty: bool = False) -> tuple[str, ...]:
    if isinstance(names, str):
        raise CellError(f"{what} must be a tuple of names, got the text {names!r}; write ({names!r},)")
    if not isinstance(names, (tuple, list)):
        raise CellError(f"{what} must be a tuple of names, in which they have an order, got {names!r}")
    names = tuple(names)
    if not names and not empty:
        raise CellError(f"{what} must name at least one")
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise CellError(f"{what}: {name!r} is not a name that an argument can have")
    return names


def cell(
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    *,
    split: Sequence[str] = (),
    weights: Sequence[str] = (),
    recurrent: str | None = None,
) -> Callable[[Callable[..., Any]], Cell]:
    """Make a recurrent cell of a function that states its mathematics.

    Arguments are matched by name.  A gate arrives as its pre-activation: input product plus
    recurrent product plus biases.  A state arrives as its value at the previous step.  The function
    returns the new states in the declared order; the first is the output of the layer.  Keyword-only
    arguments with defaults are constants.

    Args:
        gates: names of the gates, in the order in which the weights stack them.
        states: names of the states, the output first.
        split: gates that arrive in two parts, ``n_x`` from the input and ``n_h`` from the recurrent
            product.
        weights: names of learned vectors of length hidden, peepholes for instance.
        recurrent: the state that the recurrent weights multiply at the next step; by default the output.

    Raises:
        CellError: if the function cannot become a kernel; the message says what to change.

    Example:
        >>> @cell(gates=("i", "f", "g", "o"), states=("h", "c"))
        ... def lstm(i, f, g, o, c):
        ...     c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        ...     return sigmoid(o) * tanh(c), c
    """
    if callable(gates):
        raise CellError("write @cell(gates=(...), states=(...)): a cell needs the names of its gates")
    return lambda function: Cell(function, gates, states, split, weights, recurrent)


class _TwoProducts(Cell):
    """A cell whose step takes two products with the recurrent weights, one after the other.

    Such a step is two of another cell, `half`, which has three states of its own: ``operand``, what the
    weights multiply next, which starts as the output does; ``update``, which it hands on from its first
    half to its second; and ``phase``, 0 in the first and 1 in the second.  All gates are computed in both
    halves.  :func:`fusedlstm.directions.prepare` makes the steps.
    """

    OWN = ("operand", "update", "phase")

    def __init__(self, half: Cell) -> None:
        self.half, self.function, self.name, self.key = half, half.function, half.name, f"{half.key}_twice"
        self.__doc__, self.__module__ = half.__doc__, half.__module__
        self.gates, self.split, self.weights = half.gates, half.split, half.weights
        self.states = tuple(name for name in half.states if name not in self.OWN)
        self.recurrent, self.constants, self.arguments = self.states[0], half.constants, half.arguments
        self.seeds, self.source = half.seeds, half.source


def with_functions(cell: Cell, **functions: Callable[..., Any]) -> Cell:
    """`cell` with other functions in place of those that its mathematics calls by these names.

    Args:
        cell: what :func:`cell` made of a function, or one of this module.
        functions: by the global name under which the function of the cell calls them.

    Raises:
        CellError: if the cell calls nothing by such a name.

    Example:
        >>> with_functions(lstm, sigmoid=math.hard_sigmoid)
        <fusedlstm cell lstm: gates ('i', 'f', 'g', 'o'), states ('h', 'c')>
    """
    given: Any = cell.function
    for name in functions:
        if name not in given.__code__.co_names:
            raise CellError(f"cell {cell.name} calls nothing by the name {name!r}")
    made = FunctionType(
        given.__code__, given.__globals__ | functions, given.__name__, given.__defaults__, given.__closure__
    )
    for name in ("__kwdefaults__", "__doc__", "__module__", "__qualname__"):
        setattr(made, name, getattr(given, name))
    return _rebuilt(cell, made, cell.gates)


def with_gates(cell: Cell, gates: Sequence[str]) -> Cell:
    """`cell` with its gates in another order, in which the weights then stack them.

    Raises:
        CellError: if `gates` are not those of the cell.

    Example:
        >>> with_gates(gru, ("z", "r", "n")).gates
        ('z', 'r', 'n')
    """
    if sorted(gates) != sorted(cell.gates):
        raise CellError(f"the gates of cell {cell.name} are {cell.gates}, got {tuple(gates)}")
    return _rebuilt(cell, cell.function, gates)


def _rebuilt(cell: Cell, function: Callable[..., Any], gates: Sequence[str]) -> Cell:
    if cell.half is not None:
        return _TwoProducts(_rebuilt(cell.half, function, gates))
    return Cell(function, gates, cell.states, cell.split, cell.weights, cell.recurrent)


@once
def recurrent_dropout(cell: Cell) -> Cell:
    """A cell with dropout of what the recurrent weights multiply, one mask for all steps.

    It has two states more, ``dropout_mask`` and ``dropped``: the mask, which stays as it is, and the
    state that the recurrent weights of `cell` multiply (the output, as a rule) times the mask.  Who
    runs it gives both as initial states; :class:`fusedlstm.directions.RecurrentDropout` does.  What the
    cell itself reads of its states is not masked, as in Keras.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks" (NIPS 2016), with the same mask for all gates; Keras draws one for each gate.
    """
    if cell.half is not None:
        dropped: Cell = _TwoProducts(recurrent_dropout(cell.half))
    else:

        def function(dropout_mask: Any, **arguments: Any) -> Any:
            results = cell.function(**arguments)
            new = results if isinstance(results, (tuple, list)) else (results,)
            return (*new, dropout_mask, dropout_mask * new[cell.operand])

        function.__name__, function.__doc__ = f"{cell.name}_recurrent_dropout", cell.__doc__
        mask = inspect.Parameter("dropout_mask", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taken = inspect.signature(cell.function).parameters.values()
        function.__signature__ = inspect.Signature([mask, *taken])  # type: ignore[attr-defined]
        states = (*cell.states, "dropout_mask", "dropped")
        dropped = Cell(function, cell.gates, states, cell.split, cell.weights, "dropped")
    dropped._without_dropout = cell
    return dropped


@cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def lstm(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
    """Long short-term memory with a forget gate (Gers et al., 2000), as in ``torch.nn.LSTM``."""
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), weights=("p_i", "p_f", "p_o"))
def peephole_lstm(i: Any, f: Any, g: Any, o: Any, c: Any, p_i: Any, p_f: Any, p_o: Any) -> Any:
    """LSTM whose gates look at the cell state (Gers et al., 2002), as in ONNX's LSTM with P."""
    new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * tanh(g)
    return sigmoid(o + p_o * new) * tanh(new), new


@cell(gates=("f", "g", "o"), states=("h", "c"))
def coupled_lstm(f: Any, g: Any, o: Any, c: Any) -> Any:
    """LSTM whose input gate is one minus its forget gate (Greff et al., 2017, variant CIFG)."""
    keep = sigmoid(f)
    c = keep * c + (1 - keep) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell(gates=("r", "z", "n"), split=("n",))
def gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any) -> Any:
    """Gated recurrent unit that resets after the product, as in ``torch.nn.GRU`` and cuDNN."""
    n = tanh(n_x + sigmoid(r) * n_h)
    return n + sigmoid(z) * (h - n)


@_TwoProducts
@cell(gates=("r", "z", "n"), states=("h", "operand", "update", "phase"), recurrent="operand")
def gru_reset_before(r: Any, z: Any, n: Any, h: Any, update: Any, phase: Any) -> Any:
    """Gated recurrent unit that resets before the product (Cho et al., 2014), as in Keras with
    ``reset_after=False`` and ONNX with ``linear_before_reset=0``.

    The first half of a step finds the gates r and z from h, the second n from r * h.
    """
    first, n = phase < 0.5, tanh(n)
    new = where(first, h, n + update * (h - n))
    return new, where(first, sigmoid(r) * h, new), sigmoid(z), where(first, 1.0, 0.0)


@cell(gates=("a",))
def rnn_tanh(a: Any) -> Any:
    """Elman's network with tanh (Elman, 1990), as in ``torch.nn.RNN``."""
    return tanh(a)


@cell(gates=("a",))
def rnn_relu(a: Any) -> Any:
    """Elman's network with a rectifier (Le et al., 2015), ``torch.nn.RNN(nonlinearity="relu")``."""
    return _relu(a)
