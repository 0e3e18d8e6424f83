"""Every cell, as mathematics, once.

A cell is a function from gate pre-activations and previous states to new states, for one hidden
unit.  From it follow the NumPy reference, the SIMD and CUDA kernels, and the backward pass.
"""

from __future__ import annotations

import hashlib
import inspect
import keyword
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

from . import math
from .derive import TRANSPOSED, CellError, Graph, LateGate, compile_source, function_name, reachable, trace
from .math import exp, maximum, minimum, normalize, sigmoid, softplus, tanh, where
from .math import relu as _relu
from .once import lazy, once
from .step import Step

if TYPE_CHECKING:
    from .weights import Weights

__all__ = [
    "Cell",
    "CellError",
    "cell",
    "coupled_lstm",
    "gate_inputs",
    "gru",
    "gru_reset_before",
    "ind_rnn",
    "layer_norm_gru",
    "layer_norm_lstm",
    "layer_norm_sum_gru",
    "layer_norm_sum_lstm",
    "li_gru",
    "lstm",
    "lstm_output_from_memory",
    "lstm_output_sees_cell",
    "minimal_gated",
    "peephole_lstm",
    "recurrent_dropout",
    "recurrent_dropout_of_gates",
    "rnn_relu",
    "rnn_tanh",
    "slstm",
    "with_constants",
    "with_functions",
    "with_gates",
    "zoneout",
]

# names of the layers' own parameters, and of what generated code calls besides the functions of math
MOST_NOISE = 4  # words of a random counter
_RESERVED = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh", "full_like", "mean", "vector_mean")


class Cell:
    """What :func:`cell` makes of a function; see there.

    Attributes:
        name: name of the function.
        gates: names of the gates, in the order of the rows of the weights.
        states: names of the states; the first is the output.
        split: the gates that arrive as two arguments, ``n_x`` and ``n_h``.
        weights: names of the learned vectors of length hidden.
        beginnings: by name of a learned vector, the number that all its entries begin with, if it has one.
        biases: whether the gates of a layer may have biases of their own.
        recurrent: the state that the recurrent weights multiply at the next step.
        late: the gates that arrive as functions, of what their recurrent weights multiply.
        without_input: the gates without input weights.
        without_recurrent: the gates without recurrent weights.
        noise: names of the random numbers.
        arguments: pre-activations, then states and learned vectors in use, as the generated code
            takes them; the noise follows.
        function: the mathematics.
        constants: the keyword-only arguments, and their values.
        seeds: names of the gradients of the new states, which the derived adjoint takes.
        step, adjoint: as expressions.
        takes_gates: whether the input is that of the gates itself: see :func:`gate_inputs`.
        source: the generated code of the step and of its adjoint.
        key: a text that is equal for equal mathematics; names files in the cache.
    """

    _made: tuple[Callable[..., Cell], tuple[Any, ...]] | None = None  # how, if not of a function alone
    takes_gates: bool = False  # made by gate_inputs

    def __init__(
        self,
        function: Callable[..., Any],
        gates: Sequence[str],
        states: Sequence[str],
        *,
        split: Sequence[str] = (),
        weights: Sequence[str] | Mapping[str, float] = (),
        recurrent: str | None = None,
        late: Sequence[str] = (),
        without_input: Sequence[str] = (),
        without_recurrent: Sequence[str] = (),
        biases: bool = True,
        noise: Sequence[str] = (),
    ) -> None:
        if not isinstance(function, FunctionType):
            raise CellError(f"a cell is made of a function, got {function!r}")
        self.function: Callable[..., Any] = function
        self.name = function.__name__
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.gates, self.states = _names("gates", gates), _names("states", states)
        self.beginnings: dict[str, float] = {}
        if isinstance(weights, Mapping):
            self.beginnings, weights = _beginnings(weights), tuple(weights)
        self.weights = _names("weights", weights, empty=True)
        if type(biases) is not bool:
            raise CellError(f"biases must be True or False, got {biases!r}")
        self.biases = biases
        self.split, self.late = self._some("split", split), self._some("late", late)
        self.without_input = self._some("without_input", without_input)
        self.without_recurrent = self._some("without_recurrent", without_recurrent)
        self.noise = _names("noise", noise, empty=True)
        if len(self.noise) > MOST_NOISE:
            raise CellError(f"noise must name at most {MOST_NOISE} numbers, got {len(self.noise)}")
        self.recurrent = self.states[0] if recurrent is None else recurrent
        if self.recurrent not in self.states:
            raise CellError(f"recurrent is {recurrent!r}, which is not a state; the states are {self.states}")
        self._check_gates()
        self._check_names()
        self.constants = self._match_arguments()
        self._derive()

    def _some(self, what: str, names: Sequence[str]) -> tuple[str, ...]:
        """Gates of some kind, in the order of the gates."""
        chosen = _names(what, names, empty=True)
        for name in chosen:
            if name not in self.gates:
                raise CellError(f"{what} names {name!r}, which is not a gate; the gates are {self.gates}")
        return tuple(gate for gate in self.gates if gate in chosen)

    def _check_gates(self) -> None:
        """Refuse a gate that is of two kinds which exclude each other."""
        for one, other, why in (
            ("late", "split", "a late gate has one part, which is complete when it is called"),
            ("late", "without_recurrent", "a late gate is what its recurrent weights give"),
            ("split", "without_input", "a split gate has a part of the input"),
            ("split", "without_recurrent", "a split gate has a part of the recurrent weights"),
            ("without_input", "without_recurrent", "nothing is left of it"),
        ):
            for gate in self.gates:
                if gate in getattr(self, one) and gate in getattr(self, other):
                    raise CellError(f"gate {gate!r} is named in {one} and in {other}: {why}")
        if not self.gates_with_input:
            raise CellError("without_input names all gates: one at least must see the input")

    def __repr__(self) -> str:
        return f"<fusedlstm cell {self.name}: gates {self.gates}, states {self.states}>"

    def __reduce__(self) -> Any:
        """Pickled by its name, as functions are."""
        return self.function.__qualname__ if self._made is None else self._made

    @lazy
    def inference(self) -> Cell:
        """The cell that runs outside of training: with None in the place of its noise."""
        return without_noise(self) if self.noise else self

    @property
    def gates_with_input(self) -> tuple[str, ...]:
        """The gates that have rows in ``weight_ih`` and ``bias_ih``, in their order."""
        return tuple(g for g in self.gates if g not in self.without_input)

    @property
    def gates_with_recurrent(self) -> tuple[str, ...]:
        """The gates that have rows in ``weight_hh`` and ``bias_hh``, in their order."""
        return tuple(g for g in self.gates if g not in self.without_recurrent)

    @property
    def plain(self) -> tuple[str, ...]:
        """The gates whose input and recurrent products are added before the cell sees them."""
        special = (*self.split, *self.late, *self.without_input, *self.without_recurrent)
        return tuple(g for g in self.gates if g not in special)

    @property
    def preactivations(self) -> tuple[str, ...]:
        """The parts of gates in an order in which the input product fills the front and the recurrent
        product a stretch, each without a gap; late gates stand by themselves."""
        return (
            *self._late_with_input,
            *self.without_recurrent,
            *(f"{g}_x" for g in self.split),
            *self.plain,
            *(f"{g}_h" for g in self.split),
            *(g for g in self.without_input if g not in self.late),
            *(g for g in self.late if g in self.without_input),
        )

    @property
    def _late_with_input(self) -> tuple[str, ...]:
        return tuple(g for g in self.late if g not in self.without_input)

    @property
    def input_gates(self) -> tuple[str, ...]:
        """The gates in the order in which the input product computes them."""
        return (*self._late_with_input, *self.without_recurrent, *self.split, *self.plain)

    @property
    def recurrent_gates(self) -> tuple[str, ...]:
        """The gates in the order in which the recurrent product computes them; late ones are not of it."""
        return (*self.plain, *self.split, *(g for g in self.without_input if g not in self.late))

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
        from_input: Mapping[str, Any],  # by gate: its product with the input, (B, H)
        from_output: Mapping[str, Any],  # by gate that is not late: its recurrent product, (B, H)
        states: Iterable[Any],  # (B, H) each
        vectors: Iterable[Any],  # the learned vectors, (H,) each
        multiply: Callable[[str, Any], Any],  # a late gate's recurrent product with (B, H)
    ) -> dict[str, Any]:
        """What a step takes, by name and in its order: in a split gate both parts, else their sum, and in a
        late gate a function."""
        values = dict(zip(self.states, states)) | dict(zip(self.weights, vectors))
        for gate in self.gates:
            if gate in self.split:
                values |= {f"{gate}_x": from_input[gate], f"{gate}_h": from_output[gate]}
            elif gate in self.late:
                values[gate] = partial(_late_gate, gate, from_input.get(gate), multiply)
            else:
                parts = [part[gate] for part in (from_input, from_output) if gate in part]
                values[gate] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return {name: values[name] for name in self.arguments}

    def step_arguments_of(
        self,
        from_input: Any,  # (B, rows of weight_ih): the product of the input, with its biases
        states: Sequence[Any],  # (B, H) each
        weights: Weights,
        linear: Callable[[Any, Any, Any], Any],  # (v, weight, bias or None): v @ weight.T + bias
        chunk: Callable[[Any, int, int], Sequence[Any]],  # an array in so many parts along an axis
    ) -> dict[str, Any]:
        """:meth:`step_arguments` in any framework, from its product and its way to cut."""
        names = self.gates_with_recurrent
        hh, bias_hh, operand = weights.hh, weights.bias_hh, states[self.operand]
        by_input = dict(zip(self.gates_with_input, chunk(from_input, len(self.gates_with_input), -1)))
        by_gate: dict[str, tuple[Any, Any]] = {}
        if self.late:
            biases = [None] * len(names) if bias_hh is None else chunk(bias_hh, len(names), 0)
            by_gate = dict(zip(names, zip(chunk(hh, len(names), 0), biases)))

        def multiply(gate: str, value: Any) -> Any:
            return linear(value, *by_gate[gate])

        by_output = {
            gate: multiply(gate, operand) for gate in names if gate in by_gate and gate not in self.late
        }
        if names and not self.late:
            by_output = dict(zip(names, chunk(linear(operand, hh, bias_hh), len(names), -1)))
        return self.step_arguments(by_input, by_output, states, weights.vectors, multiply)

    def hidden_size(self, weights: Weights) -> int:
        """H of the weights of a layer."""
        if weights.ih is not None:
            return int(weights.ih.shape[0]) // len(self.gates_with_input)
        if weights.hh is not None:
            return int(weights.hh.shape[0]) // len(self.gates_with_recurrent)
        return int(weights.vectors[0].shape[0])

    def input_size(self, weights: Weights) -> int:
        """I of the weights of a layer."""
        if weights.ih is None:
            return len(self.gates_with_input) * self.hidden_size(weights)
        return int(weights.ih.shape[1])

    @property
    def unprojectable(self) -> str:
        """Why the output cannot be projected; empty if it can."""
        if self.reads_output:
            return f"it reads its own output {self.states[0]!r}, which has another size then"
        if self.takes_gates:
            return "its gates are given their inputs: put a linear layer behind it instead"
        if self.operand:
            return f"the recurrent weights multiply {self.recurrent!r}, not the output"
        if not self.gates_with_recurrent:
            return "it has no recurrent weights: put a linear layer behind it instead"
        if self.late:
            return (
                f"the recurrent weights of its late gate {self.late[0]!r} multiply values of the hidden units"
            )
        return ""

    @lazy
    def moved(self) -> str:
        """What the names of tangents begin with, and no other name."""
        prefix = "t_"
        while any(name.startswith(prefix) for name in (*self.arguments, *self.states, *self.seeds)):
            prefix += "_"
        return prefix

    @lazy
    def numpy(self) -> Any:
        """The generated functions `step` and `adjoint` over NumPy arrays."""
        import numpy as np

        functions = {name: getattr(math, name) for name in (*math.DERIVATIVES, "mean")}
        return compile_source(self.source, {**functions, "full_like": np.full_like}, f"<cell {self.name}>")

    def _check_names(self) -> None:
        names = [*self.preactivations, *self.states, *self.weights, *self.noise]
        names += [f"d{state}" for state in self.states]
        names += [function_name(f"{TRANSPOSED}:{gate}") for gate in self.late]
        for name in names:
            if names.count(name) > 1:
                raise CellError(f"cell {self.name}: the name {name!r} is used twice among {names}")
            if name in (*math.DERIVATIVES, *_RESERVED) or (name[0] == "v" and name[1:].isdigit()):
                raise CellError(f"cell {self.name}: the name {name!r} is reserved; choose another")

    def _match_arguments(self) -> dict[str, float]:
        known = (*self.preactivations, *self.states, *self.weights, *self.noise)
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
                raise CellError(
                    f"cell {self.name}: the argument {name!r} is none of {', '.join(known)}"
                    f"{self._hint(name)}. Constants go behind a * with a default"
                )
            else:
                taken.append(name)
        for name in self.preactivations:
            if name not in taken:
                remedy = ""
                if name not in self.gates:
                    gate = name[:-2]
                    remedy = (
                        f": take both {gate}_x and {gate}_h, or leave {gate!r} out of split and take {gate}"
                    )
                raise CellError(f"cell {self.name}: gate argument {name!r} is declared but not taken{remedy}")
        for name in self.weights:
            if name not in taken:
                raise CellError(f"cell {self.name}: learned vector {name!r} is declared but not taken")
        for name in self.noise:
            if name not in taken:
                raise CellError(f"cell {self.name}: noise {name!r} is declared but not taken")
        self.arguments = tuple(name for name in known if name in taken and name not in self.noise)
        return constants

    def _hint(self, name: str) -> str:
        """What may be meant by an argument that is none."""
        if name in self.split:
            return f"; gate {name!r} is split: take {name}_x and {name}_h"
        if name in ("x", "input", "inputs"):
            return (
                "; the input is in the gates already, each with its product of the input: for that part of "
                "a gate g by itself name it in split=(...) and take g_x"
            )
        return ""

    def _derive(self) -> None:
        graph = Graph()
        given: dict[str, Any] = {
            name: LateGate(name, graph) if name in self.late else graph.symbol(name)
            for name in (*self.arguments, *self.noise)
        }
        results = trace(self.function, given, self.constants)
        if len(results) != len(self.states):
            raise CellError(
                f"cell {self.name} returns {len(results)} value(s) but declares {len(self.states)} "
                f"state(s): return {', '.join(self.states)}, in this order"
            )
        for name in self.late:
            if given[name].value is None:
                raise CellError(
                    f"cell {self.name}: the late gate {name!r} is not called; call it with what its "
                    f"recurrent weights multiply, {name}(...), or leave it out of late"
                )
        late = {name: given.pop(name).value for name in self.late}
        used = {node.index for node in reachable(results)}
        for name, value in late.items():
            if value.index not in used:
                raise CellError(
                    f"cell {self.name}: nothing depends on what the late gate {name!r} gives; use it, or "
                    "leave the gate out"
                )
        self.step = Step(graph, given, dict(zip(self.states, results)), late, noise=self.noise)
        self.seeds = tuple(f"d{name}" for name in self.states)
        self.adjoint = self.step.adjoint(self.arguments, self.seeds)
        header = (
            f"# Cell {self.name!r}, derived by fusedlstm: the step, and its adjoint, which takes the\n"
            "# gradients of the new states and returns those of the arguments.\n\n"
        )
        step = self.step.code("step", (*self.arguments, *self.noise))
        transposed = [function_name(f"{TRANSPOSED}:{gate}") for gate in self.late]
        taken = (*self.arguments, *self.noise, *self.seeds)
        adjoint = self.adjoint.code("adjoint", taken, transposed)
        self.source = f"{header}{step}\n\n{adjoint}"
        shape = repr((self.name, self.gates, self.states, self.split, self.weights, *self._more_shape()))
        self.key = f"{self.name}_{hashlib.sha256((shape + self.source).encode()).hexdigest()[:16]}"
        if self.noise:
            self.inference  # noqa: B018 refused here if at all

    def _more_shape(self) -> list[Any]:
        """What tells cells with equal code apart, beside what every cell has."""
        more: list[Any] = [self.recurrent] if self.operand else []
        for what in ("late", "without_input", "without_recurrent", "noise"):
            if names := getattr(self, what):
                more.append((what, names))
        return more if self.biases else [*more, "without biases"]


def _late_gate(gate: str, own: Any, multiply: Callable[[str, Any], Any], operand: Any) -> Any:
    product = multiply(gate, operand)
    return product if own is None else own + product


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


def _beginnings(weights: Mapping[str, float | None]) -> dict[str, float]:
    """Of learned vectors, what those begin with that do not say None."""
    for name, value in weights.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise CellError(
                f"weights: the learned vector {name!r} begins with a number or None, got {value!r}"
            )
    return {name: float(value) for name, value in weights.items() if value is not None}


def cell(
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    *,
    split: Sequence[str] = (),
    weights: Sequence[str] | Mapping[str, float] = (),
    recurrent: str | None = None,
    late: Sequence[str] = (),
    without_input: Sequence[str] = (),
    without_recurrent: Sequence[str] = (),
    biases: bool = True,
    noise: Sequence[str] = (),
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
        weights: names of learned vectors of length hidden, peepholes for instance; or a dictionary of these
            names and of the number that all entries of such a vector begin with, 1 for a gain, say, or None
            for numbers drawn as those of the matrices.
        recurrent: the state that the recurrent weights multiply at the next step; by default the output.
        late: gates whose recurrent weights multiply a value of this step: such a gate arrives as a
            function and is called once, ``n(v)`` being its part of the input, its biases and the product
            of its recurrent weights with v.  Not with a projection.
        without_input: gates that do not see the input; they have no rows in ``weight_ih`` and ``bias_ih``.
        without_recurrent: gates that see nothing but the input; they have no rows in ``weight_hh`` and
            ``bias_hh``.
        biases: False for a cell whose gates never have biases, since it adds learned vectors of its own
            where they belong, behind a normalization for instance.
        noise: names of at most four random numbers, uniform in [0, 1), which are drawn anew in training for
            each step, sequence and hidden unit.  At inference they are None, and the cell returns what it
            does without them, the expectation as a rule.

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
    return lambda function: Cell(
        function,
        gates,
        states,
        split=split,
        weights=weights,
        recurrent=recurrent,
        late=late,
        without_input=without_input,
        without_recurrent=without_recurrent,
        biases=biases,
        noise=noise,
    )


def with_constants(cell: Cell, **constants: float) -> Cell:
    """`cell` with other values of its constants, its keyword-only arguments.

    Raises:
        CellError: if the cell has no such constant.

    Example:
        >>> with_constants(layer_norm_lstm, eps=1e-3).constants
        {'eps': 0.001}
    """
    for name in constants:
        if name not in cell.constants:
            known = ", ".join(cell.constants) or "none"
            raise CellError(f"cell {cell.name} has no constant {name!r}; its constants are {known}")
    function = _copied(cell.function, cell.function.__globals__)
    function.__kwdefaults__ = cell.constants | constants
    made = _rebuilt(cell, function, cell.gates)
    made._made = _with_constants, (cell, constants)
    return made


def _with_constants(cell: Cell, constants: dict[str, float]) -> Cell:
    return with_constants(cell, **constants)


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
    return _rebuilt(cell, _copied(given, given.__globals__ | functions), cell.gates)


def _copied(function: Any, scope: dict[str, Any]) -> Any:
    """A function with other globals."""
    made = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    for name in ("__kwdefaults__", "__doc__", "__module__", "__qualname__"):
        setattr(made, name, getattr(function, name))
    return made


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


def _rebuilt(cell: Cell, function: Callable[..., Any], gates: Sequence[str], **changed: Any) -> Cell:
    """`cell` of another function, other gates, or with other arguments of :func:`cell`."""
    kept = ("states", "split", "recurrent", "late", "without_input", "without_recurrent", "biases", "noise")
    given = {name: getattr(cell, name) for name in kept}
    given["weights"] = {name: cell.beginnings.get(name) for name in cell.weights}
    return Cell(function, gates, **(given | changed))


@once
def zoneout(cell: Cell, *rates: float) -> Cell:
    """A cell whose states, in training, keep each number of the step before with some probability.

    For each step, sequence and unit it is drawn anew; at inference the state is the expectation of that.
    What a state's new value is made of does not see what other states keep.

    Args:
        cell: any cell.
        rates: the probability for each state, in their order, less than 1.

    Source: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations" (2017).
    """
    kept = {state: rate for state, rate in zip(cell.states, rates, strict=True) if rate}
    unread = [state for state in kept if state not in cell.arguments]

    def function(**arguments: Any) -> Any:
        drawn = {state: arguments.pop(f"zoneout_{state}") for state in kept}
        old = {state: arguments[state] for state in kept}
        for state in unread:
            del arguments[state]
        new = dict(zip(cell.states, _as_tuple(cell.function(**arguments))))
        for state, rate in kept.items():
            if drawn[state] is None:
                new[state] = rate * old[state] + (1 - rate) * new[state]
            else:
                new[state] = where(drawn[state] < rate, old[state], new[state])
        return tuple(new.values())

    taken = inspect.signature(cell.function).parameters.values()
    names = [*unread, *(f"zoneout_{state}" for state in kept)]
    _describe(function, f"{cell.name}_zoneout", cell, [*map(_parameter, names), *taken])
    noise = (*cell.noise, *(f"zoneout_{state}" for state in kept))
    made = _rebuilt(cell, function, cell.gates, noise=noise)
    made._made = zoneout, (cell, *rates)
    return made


def _parameter(name: str) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    """What a cell's function returns, also if it is one value."""
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


@once
def recurrent_dropout_of_gates(cell: Cell) -> Cell:
    """A cell with dropout of what the recurrent weights multiply, one mask for each gate, for all steps.

    It has a state more for each gate with recurrent weights, ``dropout_mask_`` and its name: the mask, which
    stays as it is.  All these gates are late, since each multiplies something else; a split gate is two, of
    which one has the rows of the input weights and the other those of the recurrent weights.
    """
    operand = cell.recurrent
    parts = {gate: f"{gate}_h" if gate in cell.split else gate for gate in cell.gates_with_recurrent}

    def function(**arguments: Any) -> Any:
        masks = [arguments.pop(f"dropout_mask_{gate}") for gate in parts]
        value = arguments[operand] if cell.reads_operand else arguments.pop(operand)
        for (gate, part), mask in zip(parts.items(), masks):
            late = partial(_masked, arguments[part], mask)
            arguments[part] = late if gate in cell.late else late(value)
        return (*_as_tuple(cell.function(**arguments)), *masks)

    masks = tuple(f"dropout_mask_{gate}" for gate in parts)
    more = masks if cell.reads_operand else (*masks, operand)
    taken = inspect.signature(cell.function).parameters.values()
    _describe(function, f"{cell.name}_dropout_of_gates", cell, [*map(_parameter, more), *taken])
    gates: list[str] = []
    for gate in cell.gates:
        gates += [f"{gate}_x", f"{gate}_h"] if gate in cell.split else [gate]
    made = _rebuilt(
        cell, function, gates,
        states=(*cell.states, *masks), split=(), late=tuple(parts.values()),
        without_input=(*cell.without_input, *(f"{gate}_h" for gate in cell.split)),
        without_recurrent=(*cell.without_recurrent, *(f"{gate}_x" for gate in cell.split)),
    )  # fmt: skip
    made._made = recurrent_dropout_of_gates, (cell,)
    return made


@once
def recurrent_dropout(cell: Cell) -> Cell:
    """A cell with dropout of what the recurrent weights multiply, one mask for all steps.

    It has two states more, ``dropout_mask`` and ``dropped``: the mask, which stays as it is, and the
    state that the recurrent weights of `cell` multiply (the output, as a rule) times the mask.  The
    caller gives both as initial states; :class:`fusedlstm.directions.RecurrentDropout` does.  What a late
    gate multiplies is masked too; what the cell itself reads of its states is not, as in Keras.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks" (NIPS 2016), with the same mask for all gates; with one for each, as Keras draws them, see
    :func:`recurrent_dropout_of_gates`.
    """

    def function(dropout_mask: Any, **arguments: Any) -> Any:
        for gate in cell.late:
            arguments[gate] = partial(_masked, arguments[gate], dropout_mask)
        new = _as_tuple(cell.function(**arguments))
        return (*new, dropout_mask, dropout_mask * new[cell.operand])

    taken = inspect.signature(cell.function).parameters.values()
    _describe(function, f"{cell.name}_recurrent_dropout", cell, [_parameter("dropout_mask"), *taken])
    states = (*cell.states, "dropout_mask", "dropped")
    dropped = _rebuilt(cell, function, cell.gates, states=states, recurrent="dropped")
    dropped._made = recurrent_dropout, (cell,)
    return dropped


@once
def without_noise(cell: Cell) -> Cell:
    """The cell that runs outside of training: with None in the place of its noise.

    Raises:
        CellError: if it computes with None.
    """

    def function(**arguments: Any) -> Any:
        return cell.function(**arguments, **dict.fromkeys(cell.noise))

    taken = inspect.signature(cell.function).parameters
    _describe(function, cell.name, cell, [taken[name] for name in taken if name not in cell.noise])
    try:
        made = _rebuilt(cell, function, cell.gates, noise=())
    except CellError as error:
        raise CellError(f"at inference noise is None, and the cell must do without: {error}") from error
    made._made = without_noise, (cell,)
    return made


def _describe(function: Any, name: str, cell: Cell, parameters: Iterable[inspect.Parameter]) -> None:
    """Give a function made of a cell's what a cell reads of a function."""
    function.__name__, function.__doc__, function.__module__ = name, cell.__doc__, cell.__module__
    function.__signature__ = inspect.Signature([*parameters])


@once
def gate_inputs(cell: Cell) -> Cell:
    """`cell` for layers whose input is what the gates get of it, so that there is no product with it.

    The input is (T, B, gates * H), of the gates that have input weights in `cell`, in their order; there are
    no ``weight_ih`` and ``bias_ih``.

    Raises:
        CellError: if nothing that is learned is left.
    """
    if not cell.gates_with_recurrent and not cell.weights:
        raise CellError(
            f"cell {cell.name} has neither recurrent weights nor learned vectors: without input weights "
            "nothing in it is learned"
        )
    made = object.__new__(Cell)
    vars(made).update(vars(cell), takes_gates=True, key=f"{cell.key}_of_gates")
    made._made = gate_inputs, (cell,)
    return made


def _masked(gate: Callable[[Any], Any], mask: Any, operand: Any) -> Any:
    return gate(mask * operand)


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


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), late=("o",))
def lstm_output_sees_cell(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
    """LSTM whose output gate sees the new cell state in place of the previous output, by a full matrix."""
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o(c)) * tanh(c), c


@cell(gates=("i", "f", "g", "o", "m"), states=("h", "c"), late=("m",), without_input=("o", "m"))
def lstm_output_from_memory(i: Any, f: Any, g: Any, o: Any, m: Any, c: Any) -> Any:
    """LSTM whose output gate is a matrix on [new cell state, previous output], without the input.

    The recurrent weights of ``o`` multiply the previous output, those of ``m`` the new cell state.
    """
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o + m(c)) * tanh(c), c


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


@cell(gates=("r", "z", "n"), late=("n",))
def gru_reset_before(r: Any, z: Any, n: Any, h: Any) -> Any:
    """Gated recurrent unit that resets before the product (Cho et al., 2014), as in Keras with
    ``reset_after=False`` and ONNX with ``linear_before_reset=0``."""
    new = tanh(n(sigmoid(r) * h))
    return new + sigmoid(z) * (h - new)


@cell(gates=("f", "n"), late=("n",))
def minimal_gated(f: Any, n: Any, h: Any) -> Any:
    """Minimal gated unit, whose one gate both forgets and resets (Zhou et al., 2016)."""
    f = sigmoid(f)
    return h + f * (tanh(n(f * h)) - h)


@cell(gates=("a", "z"))
def li_gru(a: Any, z: Any, h: Any) -> Any:
    """Light gated recurrent unit, without a reset and with a rectifier (Ravanelli et al., 2018).

    Its batch normalization of the input products is left out, and so is its candidate's dropout.
    """
    new = _relu(a)
    return new + sigmoid(z) * (h - new)


@cell(gates=("a",), weights=("u",), without_recurrent=("a",))
def ind_rnn(a: Any, h: Any, u: Any) -> Any:
    """Independently recurrent network, in which a unit sees no other unit's past (Li et al., 2018)."""
    return _relu(a + u * h)


@cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def slstm(i: Any, f: Any, z: Any, o: Any, c: Any, n: Any, m: Any) -> Any:
    """LSTM with an exponential input gate, a normalizer state and a stabilizer state (Beck et al., 2024)."""
    kept = m - softplus(-f)
    m = where(n == 0, i, maximum(i, kept))
    keep, let_in = exp(minimum(kept - m, 0)), exp(i - m)
    c, n = keep * c + let_in * tanh(z), keep * n + let_in
    return sigmoid(o) * c / n, c, n, m


@cell(
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    split=("i", "f", "g", "o"),
    weights={f"gain_{gate}_{part}": 1.0 for part in "xh" for gate in "ifgo"}
    | {f"shift_{gate}": 0.0 for gate in "ifgo"}
    | {"gain_c": 1.0, "shift_c": 0.0},
    biases=False,
)
def layer_norm_lstm(
    i_x: Any, f_x: Any, g_x: Any, o_x: Any, i_h: Any, f_h: Any, g_h: Any, o_h: Any, c: Any,
    gain_i_x: Any, gain_f_x: Any, gain_g_x: Any, gain_o_x: Any,
    gain_i_h: Any, gain_f_h: Any, gain_g_h: Any, gain_o_h: Any,
    shift_i: Any, shift_f: Any, shift_g: Any, shift_o: Any, gain_c: Any, shift_c: Any, *, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """LSTM with layer normalization of the input products, of the recurrent products and of what is shown of
    the cell state (Ba et al., 2016), as in haste."""
    i_x, f_x, g_x, o_x = normalize(i_x, f_x, g_x, o_x, eps=eps)
    i_h, f_h, g_h, o_h = normalize(i_h, f_h, g_h, o_h, eps=eps)
    i = gain_i_x * i_x + gain_i_h * i_h + shift_i
    f = gain_f_x * f_x + gain_f_h * f_h + shift_f
    g = gain_g_x * g_x + gain_g_h * g_h + shift_g
    o = gain_o_x * o_x + gain_o_h * o_h + shift_o
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(gain_c * normalize(c, eps=eps) + shift_c), c


@cell(
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    weights={f"gain_{gate}": 1.0 for gate in "ifgoc"} | {f"shift_{gate}": 0.0 for gate in "ifgoc"},
    biases=False,
)
def layer_norm_sum_lstm(
    i: Any, f: Any, g: Any, o: Any, c: Any,
    gain_i: Any, gain_f: Any, gain_g: Any, gain_o: Any, gain_c: Any,
    shift_i: Any, shift_f: Any, shift_g: Any, shift_o: Any, shift_c: Any, *, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """LSTM with layer normalization of each gate's sum of products, and of the cell state that is handed on,
    as in ``tf.contrib.rnn.LayerNormBasicLSTMCell``."""
    i, f = gain_i * normalize(i, eps=eps) + shift_i, gain_f * normalize(f, eps=eps) + shift_f
    g, o = gain_g * normalize(g, eps=eps) + shift_g, gain_o * normalize(o, eps=eps) + shift_o
    c = gain_c * normalize(sigmoid(f) * c + sigmoid(i) * tanh(g), eps=eps) + shift_c
    return sigmoid(o) * tanh(c), c


@cell(
    gates=("r", "z", "n"),
    split=("r", "z", "n"),
    weights={f"gain_{gate}_{part}": 1.0 for part in "xh" for gate in "rzn"}
    | {"shift_r": 0.0, "shift_z": 0.0, "shift_n_x": 0.0, "shift_n_h": 0.0},
    biases=False,
)
def layer_norm_gru(
    r_x: Any, z_x: Any, n_x: Any, r_h: Any, z_h: Any, n_h: Any, h: Any,
    gain_r_x: Any, gain_z_x: Any, gain_n_x: Any, gain_r_h: Any, gain_z_h: Any, gain_n_h: Any,
    shift_r: Any, shift_z: Any, shift_n_x: Any, shift_n_h: Any, *, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """GRU with layer normalization of the input products and of the recurrent products (Ba et al., 2016), as
    in haste."""
    r_x, z_x, n_x = normalize(r_x, z_x, n_x, eps=eps)
    r_h, z_h, n_h = normalize(r_h, z_h, n_h, eps=eps)
    r = sigmoid(gain_r_x * r_x + gain_r_h * r_h + shift_r)
    z = sigmoid(gain_z_x * z_x + gain_z_h * z_h + shift_z)
    n = tanh(gain_n_x * n_x + shift_n_x + r * (gain_n_h * n_h + shift_n_h))
    return n + z * (h - n)


@cell(
    gates=("r", "z", "n"),
    split=("n",),
    weights={f"gain_{gate}": 1.0 for gate in "rzn"} | {f"shift_{gate}": 0.0 for gate in "rzn"},
    biases=False,
)
def layer_norm_sum_gru(
    r: Any, z: Any, n_x: Any, n_h: Any, h: Any,
    gain_r: Any, gain_z: Any, gain_n: Any, shift_r: Any, shift_z: Any, shift_n: Any, *, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """GRU with layer normalization of what each gate's activation is applied to."""
    r = sigmoid(gain_r * normalize(r, eps=eps) + shift_r)
    z = sigmoid(gain_z * normalize(z, eps=eps) + shift_z)
    n = tanh(gain_n * normalize(n_x + r * n_h, eps=eps) + shift_n)
    return n + z * (h - n)


@cell(gates=("a",))
def rnn_tanh(a: Any) -> Any:
    """Elman's network with tanh (Elman, 1990), as in ``torch.nn.RNN``."""
    return tanh(a)


@cell(gates=("a",))
def rnn_relu(a: Any) -> Any:
    """Elman's network with a rectifier (Le et al., 2015), ``torch.nn.RNN(nonlinearity="relu")``."""
    return _relu(a)
