"""Keras 3: layers with the arguments, weights and results of ``keras.layers``', run by our kernels.

:class:`LSTM`, :class:`GRU` and :class:`SimpleRNN` take the place of the layers of the same names;
:class:`Recurrent` runs any cell; :func:`accelerate` turns the layers inside a model into these.

Each is a layer of Keras whose run over time, and nothing else, is ours.  On the PyTorch backend it is the
operator of :mod:`fusedlstm.torch`; on JAX, TensorFlow and NumPy it is a call of the host, which
:mod:`fusedlstm.host` makes.  Sizes in the comments and docstrings:

    B  batch        I  features of the input
    T  time steps   H  units
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

from .frameworks import missing

try:
    import keras
except ImportError as error:
    raise missing(__name__, error) from error

from keras import activations, layers, ops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from . import cells, host, math
from . import weights as storage
from .cells import Cell
from .derive import compile_source
from .host import Run
from .once import once
from .weights import GATE_ORDERS, Weights

__all__ = ["GRU", "LSTM", "Recurrent", "RecurrentCell", "SimpleRNN", "accelerate", "restore"]

_BACKEND = keras.backend.backend()
_PACKAGE = "fusedlstm"  # under which the layers are registered in files


# --- Activations -----------------------------------------------------------------------------------------

# What Keras names and is element-wise, on the functions of a cell.
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "celu": lambda x: _elu(x),
    "elu": lambda x: _elu(x),
    "exponential": math.exp,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x * 0.5**0.5)),
    "hard_shrink": lambda x: math.where(math.absolute(x) > 0.5, x, 0.0),
    "hard_sigmoid": math.hard_sigmoid,
    "hard_silu": lambda x: x * math.hard_sigmoid(x),
    "hard_tanh": lambda x: _clip(x, -1.0, 1.0),
    "leaky_relu": lambda x: math.where(x > 0, x, 0.2 * x),
    "linear": lambda x: x,
    "log_sigmoid": lambda x: -math.softplus(-x),
    "mish": lambda x: x * math.tanh(math.softplus(x)),
    "relu": math.relu,
    "relu6": lambda x: math.minimum(math.relu(x), 6.0),
    "selu": lambda x: 1.0507009873554805 * math.where(x > 0, x, 1.6732632423543772 * _elu(x)),
    "sigmoid": math.sigmoid,
    "silu": lambda x: x * math.sigmoid(x),
    "soft_shrink": lambda x: math.where(x > 0.5, x - 0.5, math.where(x < -0.5, x + 0.5, 0.0)),
    "softplus": math.softplus,
    "softsign": lambda x: x / (1 + math.absolute(x)),
    "sparse_plus": lambda x: math.where(x < 1, 0.25 * _square(math.relu(x + 1)), x),
    "sparse_sigmoid": lambda x: _clip(0.5 * x + 0.5, 0.0, 1.0),
    "squareplus": lambda x: 0.5 * (x + math.sqrt(x * x + 4)),
    "tanh": math.tanh,
    "tanh_shrink": lambda x: x - math.tanh(x),
}


def _elu(x: Any) -> Any:
    return math.where(x > 0, x, math.exp(math.minimum(x, 0.0)) - 1)


def _clip(x: Any, low: float, high: float) -> Any:
    return math.minimum(math.maximum(x, low), high)


def _square(x: Any) -> Any:
    return x * x


def _activation_name(argument: str, function: Any) -> str:
    """The name under which Keras has an activation.

    Raises:
        ValueError: if kernels cannot compute it.
    """
    for name in _ACTIVATIONS:
        operation = getattr(ops, name, None) if name != "gelu" else None  # ops.gelu is an approximation
        if function in (getattr(activations, name), operation):
            return name
    shown = getattr(function, "__name__", repr(function))
    raise ValueError(
        f"{argument} must be one of {', '.join(sorted(_ACTIVATIONS))}, which are computed for each unit by "
        f"itself, got {shown}. Write another one as a cell of your own and use fusedlstm.keras.Recurrent, or "
        "keep the layer of keras.layers"
    )


@once
def _cell(kind: str, **activations: str) -> Cell:
    """A cell with its gates in Keras's order, and with activations by the names of functions of the cell."""
    standard: Cell = getattr(cells, kind)
    functions = {name: _ACTIVATIONS[chosen] for name, chosen in activations.items() if chosen != name}
    found = cells.with_functions(standard, **functions) if functions else standard
    gates = GATE_ORDERS["keras"].get(kind.removesuffix("_reset_before"), found.gates)
    return found if gates == found.gates else cells.with_gates(found, gates)


# --- Layers ----------------------------------------------------------------------------------------------


class _Fused(layers.RNN):  # type: ignore[misc]
    """What the layers share: the run over time."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the arguments of the layer of Keras that a class takes the place of."""
        super().__init_subclass__(**kwargs)
        if cls.__init__ is _Fused.__init__:
            cls.__signature__ = inspect.signature(cls.__bases__[-1])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _BACKEND not in _CORES:
            raise RuntimeError(
                f"fusedlstm.keras runs on the Keras backends {', '.join(_CORES)}, not on {_BACKEND!r}: set "
                "the environment variable KERAS_BACKEND before Keras is imported"
            )
        self._adopt(self._mathematics())

    def _mathematics(self) -> Cell:
        """The cell of ours that computes what Keras's does.

        Raises:
            ValueError: if there is none.
        """
        raise NotImplementedError

    def _adopt(self, cell: Cell) -> None:
        """Compute this cell from now on; for :func:`accelerate`, where a layer of Keras becomes this one."""
        self._fused_cell = cell
        self._kerass_jit: bool = self.supports_jit
        if _BACKEND == "tensorflow":
            self.supports_jit: bool = False  # XLA compiles no calls of the host there

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        """The last output (B, H), the outputs (B, T, H), and the final states (B, H), as Keras asks for them.

        Where only the last output is asked for, the outputs are that one; where all of them are, Keras has no
        use for the last one, and it is the final state, which a mask may set apart from it.  What is exported
        is Keras's own loop.
        """
        if _exported(sequences):
            first = mask[0] if keras.tree.is_nested(mask) else mask
            return super().inner_loop(sequences, initial_state, first, training)
        given = self._given_states(initial_state, sequences)
        mask = _given_mask(mask, sequences)
        cell, dtype = self._fused_cell, self._computes
        drops_state = training and self.cell.recurrent_dropout
        if sequences.shape[1] == 1 and not drops_state and _traced(sequences):
            # a single step has no loop to be fused, and compiled code is quicker than a call of the host
            return layers.RNN.inner_loop(self, sequences, given, mask, training)
        x, states = ops.cast(sequences, dtype), [ops.cast(state, dtype) for state in given]
        if self.stateful and _BACKEND == "torch":  # the layer writes to them before backward reads them
            states = [ops.copy(state) for state in states]
        if training and self.cell.dropout:
            x = x * _one_mask(self.cell.get_dropout_mask(sequences[:, 0]), dtype)[:, None]
        if drops_state:
            drops = _one_mask(self.cell.get_recurrent_dropout_mask(states[cell.operand]), dtype)
            states += [drops, drops * states[cell.operand]]
            cell = cells.recurrent_dropout(cell)
        shown, finals = self._run(cell, bool(training), x, mask, states)
        last = finals[0] if self.return_sequences else shown
        return last, shown, finals[: len(self._fused_cell.states)]

    def _given_states(self, given: Any, sequences: Any) -> list[Any]:
        """The initial states as (B, H) each; what may be broadcast is.

        Raises:
            ValueError: if there are more or fewer, or of another shape.
        """
        names, batch, units = self._fused_cell.states, sequences.shape[0], self.cell.units
        states = keras.tree.flatten(given)
        shapes = [tuple(state.shape) for state in states]
        rows = {1, None, batch} if batch is not None else None  # in a graph it may be known at the run only
        if len(states) != len(names) or any(
            len(shape) not in (1, 2)
            or shape[-1] != units
            or (len(shape) == 2 and rows is not None and shape[0] not in rows)
            for shape in shapes
        ):
            raise ValueError(
                f"initial_state must be {len(names)} state(s), {', '.join(names)}, of the shape "
                f"{(batch, units)}, got {', '.join(map(str, shapes))}"
            )
        return [
            ops.broadcast_to(state, (ops.shape(sequences)[0], units))
            if len(shape) == 1 or (shape[0] == 1 and batch != 1)
            else state
            for state, shape in zip(states, shapes)
        ]

    def _run(self, cell: Cell, training: bool, x: Any, mask: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """What is shown of the outputs, and the final states."""
        run = Run(
            cell,
            self.go_backwards,
            self.return_sequences,
            self.zero_output_for_mask,
            carries=_BACKEND in ("jax", "numpy") and not self.unroll,
            masked=mask is not None,
        )
        shown, *finals = _CORES[_BACKEND](run, training, x, mask, states, self._weights())
        return shown, finals

    @property
    def _computes(self) -> str:
        """What the kernels compute in; the results are cast to Keras's type."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def _weights(self) -> list[Any]:
        """As :func:`fusedlstm.weights.keras_views` takes them."""
        cell = self.cell
        bias = () if cell.bias is None else (cell.bias,)
        every = (cell.kernel, cell.recurrent_kernel, *bias, *getattr(cell, "vectors", ()))
        return [ops.cast(weight, self._computes) for weight in every]


def _given_mask(mask: Any, sequences: Any) -> Any:
    """The mask as booleans (B, T), or None.

    Raises:
        ValueError: if it has another shape.
    """
    mask = mask[0] if keras.tree.is_nested(mask) else mask
    if mask is None:
        return None
    if len(mask.shape) == 3 and mask.shape[-1] == 1:
        mask = ops.squeeze(mask, -1)
    expected = tuple(sequences.shape[:2])
    known = zip(tuple(mask.shape), expected)
    if len(mask.shape) != 2 or any(came != size for came, size in known if None not in (came, size)):
        raise ValueError(f"mask must have the shape {expected}, as the input has, got {tuple(mask.shape)}")
    return ops.cast(mask, "bool")


def _one_mask(masks: Any, dtype: str) -> Any:
    """The mask of dropout; where Keras draws one for each gate, the first."""
    return ops.cast(masks[0] if isinstance(masks, list) else masks, dtype)


@keras.saving.register_keras_serializable(_PACKAGE)
class LSTM(_Fused, layers.LSTM):  # type: ignore[misc]
    """``keras.layers.LSTM`` with fused kernels: the same arguments, weights, shapes and results.

    Example:
        >>> layer = LSTM(5, return_sequences=True)
        >>> layer(np.zeros((2, 7, 3))).shape
        (2, 7, 5)
    """

    def _mathematics(self) -> Cell:
        return _cell("lstm", **_activation_names(self))


@keras.saving.register_keras_serializable(_PACKAGE)
class GRU(_Fused, layers.GRU):  # type: ignore[misc]
    """``keras.layers.GRU`` with fused kernels, as :class:`LSTM` is ``keras.layers.LSTM``."""

    def _mathematics(self) -> Cell:
        return _cell("gru" if self.reset_after else "gru_reset_before", **_activation_names(self))


@keras.saving.register_keras_serializable(_PACKAGE)
class SimpleRNN(_Fused, layers.SimpleRNN):  # type: ignore[misc]
    """``keras.layers.SimpleRNN`` with fused kernels, as :class:`LSTM` is ``keras.layers.LSTM``."""

    def _mathematics(self) -> Cell:
        name = _activation_name("activation", self.activation)
        return cells.rnn_relu if name == "relu" else _cell("rnn_tanh", tanh=name)


def _activation_names(layer: Any) -> dict[str, str]:
    """Of a layer with gates, by the functions of its cell."""
    gate = _activation_name("recurrent_activation", layer.recurrent_activation)
    return {"tanh": _activation_name("activation", layer.activation), "sigmoid": gate}


# --- Any cell --------------------------------------------------------------------------------------------

_WEIGHTS = {"kernel": "glorot_uniform", "recurrent": "orthogonal", "bias": "zeros", "vector": "zeros"}
_KINDS = {
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}
_OPTIONS = [f"{weight}_{kind}" for weight in _WEIGHTS for kind in _KINDS]


@keras.saving.register_keras_serializable(_PACKAGE)
class RecurrentCell(DropoutRNNCell, layers.Layer):  # type: ignore[misc]
    """One step of any cell, in operations of Keras: what :class:`Recurrent` runs over time.

    Arguments are those of :class:`Recurrent`.
    """

    def __init__(
        self,
        cell: Cell,
        units: int,
        use_bias: bool = True,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = dict.fromkeys(_OPTIONS)
        given |= {f"{weight}_initializer": initializer for weight, initializer in _WEIGHTS.items()}
        given |= {name: kwargs.pop(name) for name in list(kwargs) if name in given}
        super().__init__(**kwargs)
        if not isinstance(cell, Cell):
            raise TypeError(f"cell must be what fusedlstm.cell made of a function, got {cell!r}")
        if single := (*cell.without_input, *cell.without_recurrent):
            raise ValueError(
                f"cell must have gates with input and recurrent weights, which share a bias in Keras, but in "
                f"{cell.name} {', '.join(map(repr, single))} lack one of them: use fusedlstm.Recurrent or "
                "fusedlstm.torch.Recurrent"
            )
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"units must be a positive integer, got {units!r}")
        for name, rate in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {rate!r}")
        if cell.noise:
            raise ValueError(f"the cell {cell.name} has noise, which layers of Keras do not draw")
        self.mathematics, self.units, self.use_bias = cell, units, use_bias and cell.biases
        self.dropout, self.recurrent_dropout, self.seed = dropout, recurrent_dropout, seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.state_size, self.output_size = [units] * len(cell.states), units
        for name, value in given.items():
            setattr(self, name, _kind(name).get(value))

    def build(self, input_shape: Any) -> None:
        """Make the weights, for inputs of this shape."""
        cell = self.mathematics
        rows, recurrent_rows = (
            len(gates) * self.units for gates in (cell.gates_with_input, cell.gates_with_recurrent)
        )
        self.kernel = self._add("kernel", "kernel", (input_shape[-1], rows))
        self.recurrent_kernel = self._add("recurrent", "recurrent_kernel", (self.units, recurrent_rows))
        self.bias = None
        if self.use_bias:
            self.bias = self._add("bias", "bias", (2, rows) if cell.split else (rows,))
        self.vectors = [self._add("vector", name, (self.units,)) for name in cell.weights]

    def _add(self, weight: str, name: str, shape: tuple[int, ...]) -> Any:
        options = {kind: getattr(self, f"{weight}_{kind}") for kind in _KINDS}
        if weight == "vector" and name in self.mathematics.beginnings:
            given, usual = options["initializer"], keras.initializers.get(_WEIGHTS["vector"])
            if keras.initializers.serialize(given) == keras.initializers.serialize(usual):
                options["initializer"] = keras.initializers.Constant(self.mathematics.beginnings[name])
        return self.add_weight(shape=shape, name=name, **options)

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        """The new output (B, H) and the new states."""
        cell, masks = self.mathematics, []
        if training and self.dropout:
            inputs = inputs * self.get_dropout_mask(inputs)
        if training and self.recurrent_dropout:
            masks = [self.get_recurrent_dropout_mask(states[cell.operand])]
        biases = [None, None] if self.bias is None else self.bias if cell.split else [self.bias, None]
        recurrent = ops.transpose(self.recurrent_kernel)
        weights = Weights(None, recurrent, None, biases[1], vectors=tuple(self.vectors))
        product = ops.matmul(inputs, self.kernel)
        if biases[0] is not None:
            product = product + biases[0]

        def linear(value: Any, weight: Any, bias: Any) -> Any:
            for mask in masks:
                value = value * mask
            result = ops.matmul(value, ops.transpose(weight))
            return result if bias is None else result + bias

        new = list(_step(cell)(**cell.step_arguments_of(product, states, weights, linear, ops.split)))
        return new[0], new

    def get_config(self) -> dict[str, Any]:
        """The arguments, as JSON can hold them."""
        names = ("units", "use_bias", "dropout", "recurrent_dropout", "seed")
        config = {name: getattr(self, name) for name in names}
        config |= {name: _kind(name).serialize(getattr(self, name)) for name in _OPTIONS}
        cell = {"name": self.mathematics.name, "key": self.mathematics.key}
        return {**super().get_config(), **config, "cell": cell}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RecurrentCell:
        """The cell that such arguments describe."""
        return cls(**{**config, "cell": _saved_cell(**config["cell"])})


def _kind(option: str) -> Any:
    """The module of Keras for an option."""
    return _KINDS[option.rpartition("_")[2]]


def _mean(x: Any) -> Any:
    return ops.broadcast_to(ops.mean(x, axis=-1, keepdims=True), ops.shape(x))


@once
def _step(cell: Cell) -> Callable[..., tuple[Any, ...]]:
    """The step of a cell in operations of Keras."""
    functions = {name: getattr(ops, name) for name in (*math.DERIVATIVES, "full_like")}
    functions["mean"] = _mean
    step = compile_source(cell.source, functions, f"<cell {cell.name} in Keras>").step
    return cast("Callable[..., tuple[Any, ...]]", step)


def _saved_cell(name: str, key: str) -> Cell:
    """The cell of a file, which is built in or among the custom objects."""
    cell = getattr(cells, name, None)
    if cell is None or cell.key != key:
        cell = keras.saving.get_registered_object(name)
    if cell is None:
        raise ValueError(
            f"the layer was saved with a cell of your own, {name}: "
            f"load it with custom_objects={{{name!r}: {name}}}"
        )
    if cell.key != key:
        raise ValueError(f"the layer was saved with another cell {name}: the names or the mathematics differ")
    return cast(Cell, cell)


@keras.saving.register_keras_serializable(_PACKAGE)
class Recurrent(_Fused):
    """A recurrent layer that runs any cell.

    Weights are named and shaped as in ``keras.layers.LSTM``, with the gates in the order of the cell, and the
    learned vectors of the cell after them.  A cell with split gates has a bias of two rows, of the input and
    of the recurrent product, as ``keras.layers.GRU`` does.

    Args:
        cell: what :func:`fusedlstm.cell` made of a function, or one of :mod:`fusedlstm.cells`.
        units: size of the output.
        use_bias, dropout, recurrent_dropout, seed: as for ``keras.layers.LSTM``.
        kernel_initializer, recurrent_initializer, bias_initializer, vector_initializer: likewise; the last is
            for the learned vectors.  The same with regularizer and constraint.
        kwargs: return_sequences, return_state, go_backwards, stateful and the like, as for
            ``keras.layers.RNN``.

    Example:
        >>> layer = Recurrent(cells.peephole_lstm, 5)
        >>> layer(np.zeros((2, 7, 3))).shape
        (2, 5)
    """

    def __init__(self, cell: Cell, units: int, **kwargs: Any) -> None:
        own = ("use_bias", "dropout", "recurrent_dropout", "seed", *_OPTIONS)
        given = {name: kwargs.pop(name) for name in own if name in kwargs}
        shared = {name: kwargs[name] for name in ("dtype", "trainable") if name in kwargs}
        super().__init__(RecurrentCell(cell, units, name="cell", **given, **shared), **kwargs)
        self.input_spec = layers.InputSpec(ndim=3)

    def _mathematics(self) -> Cell:
        return cast(Cell, self.cell.mathematics)

    def get_config(self) -> dict[str, Any]:
        """The arguments, as JSON can hold them."""
        return {**self.cell.get_config(), **super().get_config(), "cell": self.cell.get_config()["cell"]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recurrent:
        """The layer that such arguments describe."""
        return cls(**{**config, "cell": _saved_cell(**config["cell"])})


# --- Models that exist -----------------------------------------------------------------------------------

_OURS = {layers.LSTM: LSTM, layers.GRU: GRU, layers.SimpleRNN: SimpleRNN}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def accelerate(model: Any) -> Any:
    """Let our kernels run every LSTM, GRU and SimpleRNN layer of a model, in place; returns the model.

    It may be a model or layer of any kind, also a class of your own.  The layers stay the objects that they
    are and change their class: weights, optimizer, losses, metrics, wrappers and everything that refers to
    them go on working.  A warning names each recurrent layer that stays as it is, and why.  :func:`restore`
    undoes it.  For a model that keeps Keras's layers, accelerate ``keras.models.clone_model(model)``.

    Raises:
        TypeError: if it is no model or layer.

    Example:
        >>> model = keras.Sequential([keras.Input((7, 3)), layers.Bidirectional(layers.LSTM(5))])
        >>> accelerate(model).layers[0].forward_layer
        <LSTM name=forward_lstm, built=True>
    """
    found = _recurrent_layers(model)
    if not found:
        hint = "" if model.built else ": it is not built, so call it once, or build it, before"
        warnings.warn(f"the model {model.name} has no recurrent layers{hint}", stacklevel=2)
    for layer in found:
        if isinstance(layer, _Fused):
            continue
        if reason := _obstacle(layer):
            warnings.warn(f"the layer {layer.name} is left as it is: {reason}", stacklevel=2)
            continue
        ours = _OURS[type(layer)]
        cell = ours._mathematics(layer)
        _change_class(layer, ours)
        layer._adopt(cell)
    _forget_compiled(model)
    return model


def restore(model: Any) -> Any:
    """Put layers of ``keras.layers`` in the place of ours, in place; returns the model.

    What :func:`accelerate` did is undone, and layers that were ours from the start become Keras's too, with
    the same weights.  A warning names each layer that has no counterpart there.

    Raises:
        TypeError: if it is no model or layer.

    Example:
        >>> restore(keras.Sequential([keras.Input((7, 3)), LSTM(5)])).layers[0].__class__.__module__
        'keras.src.layers.rnn.lstm'
    """
    for layer in _recurrent_layers(model):
        if type(layer) in _THEIRS:
            _change_class(layer, _THEIRS[type(layer)])
            layer.supports_jit = layer._kerass_jit
        elif isinstance(layer, _Fused):
            warnings.warn(
                f"the layer {layer.name} is left as it is: keras.layers has no {type(layer).__name__}",
                stacklevel=2,
            )
    _forget_compiled(model)
    return model


def _recurrent_layers(model: Any) -> list[Any]:
    if not isinstance(model, layers.Layer):
        raise TypeError(f"model must be a model or layer of Keras, got {type(model).__name__}")
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.RNN)]


def _obstacle(layer: Any) -> str | None:
    """Why a recurrent layer of Keras cannot be run by our kernels, if it cannot."""
    if type(layer) in _OURS:
        try:
            _OURS[type(layer)]._mathematics(layer)
        except ValueError as error:
            return str(error)
        return None
    if isinstance(layer, tuple(_OURS)):
        return f"{type(layer).__name__} is a class of its own, which may do something else"
    return f"{type(layer).__name__} runs cells that are not ours"


def _change_class(layer: Any, new: type) -> None:
    object.__setattr__(layer, "__class__", new)  # Keras and its backends track what is set otherwise


def _forget_compiled(model: Any) -> None:
    """Compile anew what runs the layers of a model, at the next call."""
    for part in model._flatten_layers():
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None
            able = all(layer.supports_jit for layer in part._flatten_layers())
            if part.jit_compile and not able:
                part.jit_compile, part._jit_turned_off = False, True
            elif able and getattr(part, "_jit_turned_off", False):
                part.jit_compile, part._jit_turned_off = True, False


# --- The run over time, on each backend ------------------------------------------------------------------


def _torch(run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]) -> list[Any]:
    """The operator of fusedlstm.torch."""
    from .torch.masks import TensorSteps
    from .torch.operators import apply_layer
    from .torch.shapes import known_cells

    known_cells.setdefault(run.cell.key, run.cell)
    if run.backwards:
        x, mask = x.flip(1), None if mask is None else mask.flip(1)
    x, steps = x.transpose(0, 1), None
    if mask is not None:
        steps = TensorSteps(mask.transpose(0, 1))
        x = steps.front(x)
    states = [state.unsqueeze(0) for state in initial]
    flat = storage.flatten(storage.keras_views(run.cell, weights, _torch_zeros))
    lengths = None if steps is None else steps.lengths
    y, *finals = apply_layer(x, states, flat, lengths, None, run.cell, 1)
    finals = [final.squeeze(0) for final in finals]
    if not run.sequences:
        y = finals[0]
        if steps is not None:
            hidden = ~steps.mask[-1] if run.zeros else steps.lengths == 0
            y = y.masked_fill(hidden[:, None], 0)
        return [y, *finals]
    if steps is not None:
        y = steps.spread(y, False, None, run.zeros)
    return [y.transpose(0, 1), *finals]


def _torch_zeros(bias: Any) -> Any:
    """Zeros like the bias; the same tensor in every call, by which the adapter knows packed weights again."""
    import torch

    if torch.compiler.is_compiling():
        return torch.zeros_like(bias)
    return _kept_zeros(len(bias), bias.dtype, bias.device)


@once
def _kept_zeros(size: int, dtype: Any, device: Any) -> Any:
    import torch

    with torch.inference_mode(False):  # else it could not take part in a gradient later
        return torch.zeros(size, dtype=dtype, device=device)


def _jax(run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]) -> list[Any]:
    """A call of the host.  JAX itself tells whether there will be a gradient, so `training` says nothing."""
    import jax

    flat = (x, *_present(mask), *initial, *weights)
    if any(map(_traced, flat)):
        return list(_jax_layer()(run, x, mask, initial, weights))
    return [jax.numpy.asarray(result) for result in host.forward(run, False, *flat)[:-1]]


def _traced(array: Any) -> bool:
    """Whether JAX or TensorFlow looks what is done with the array, and does it later."""
    if _BACKEND == "jax":
        import jax

        return isinstance(array, jax.core.Tracer)
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


# Under which a function is traced in order to be run elsewhere, without Python.
_EXPORTERS = (
    "keras.src.export.",
    "tensorflow.python.saved_model.",
    "jax._src.export.",
    "jax.experimental.jax2tf.",
)


def _exported(array: Any) -> bool:
    """Whether what is done with the array is traced for a file or another program, without our kernels."""
    if _BACKEND == "torch":
        import torch

        jit: Any = torch.jit  # without types
        return torch.compiler.is_exporting() or jit.is_tracing()
    if not _traced(array):
        return False
    # TensorFlow and JAX do not tell what they trace for, but the exporter is among the callers
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_EXPORTERS):
            return True
        frame = frame.f_back
    return False


def _filled(gradient: Any) -> Any:
    """An array of JAX in the place of what stands for zeros."""
    import jax

    if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
        return jax.numpy.zeros(gradient.shape, gradient.dtype)
    return gradient


@once
def _jax_layer() -> Any:
    import jax

    from . import xla

    array: Any = jax.ShapeDtypeStruct  # its shape and type

    def like(*given: Any) -> list[Any]:
        return [array(part.shape, part.dtype) for part in given]

    def call(run: Run, training: bool, x: Any, mask: Any, initial: Any, weights: Any) -> list[Any]:
        batch, steps, _ = x.shape
        shape = (batch, *((steps,) if run.sequences else ()), initial[0].shape[1])
        results = [array(shape, x.dtype), *like(*initial), array((), "int32")]
        return xla.call(_forward(run, training), results, x, *_present(mask), *initial, *weights)

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def layer(run: Run, *arguments: Any) -> list[Any]:
        return call(run, False, *arguments)[:-1]

    def forward(run: Run, *arguments: Any) -> tuple[list[Any], Any]:
        wants_dx = arguments[0].perturbed
        arguments = jax.tree.map(lambda argument: argument.value, arguments)
        *results, number = call(run, True, *arguments)
        # an empty tuple or None, since what is kept may hold arrays alone
        return results, (() if wants_dx else None, number, *arguments)

    def backward(run: Run, kept: Any, gradients: list[Any]) -> tuple[Any, ...]:
        wants_dx, number, x, mask, initial, weights = kept
        wanted = [*([] if wants_dx is None else [x]), *initial, *weights]
        flat = (number, x, *_present(mask), *initial, *weights, *map(_filled, gradients))
        found = xla.call(_backward(run, wants_dx is not None), like(*wanted), *flat)
        dx = None if wants_dx is None else found.pop(0)
        return dx, None, found[: len(initial)], found[len(initial) :]

    layer.defvjp(forward, backward, symbolic_zeros=True)
    return layer


def _tensorflow(
    run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]
) -> list[Any]:
    """A call of the host.  TensorFlow does not tell whether there will be a gradient, but `training` does."""
    import tensorflow as tf

    def call(function: Any, given: Sequence[Any], shapes: list[Any], *more: Any) -> list[Any]:
        if tf.executing_eagerly():
            return [tf.convert_to_tensor(result) for result in function(*given)]
        types = [x.dtype] * len(shapes) + list(more)
        results = tf.numpy_function(function, given, types, stateful=False, name=host.NAME)
        for result, shape in zip(results, shapes):
            result.set_shape(shape)
        return list(results)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def layer(x: Any, *rest: Any) -> Any:
        shown = x.shape[: 1 + run.sequences] + initial[0].shape[1:]
        given = [x, *_present(mask), *rest]
        states = [state.shape for state in initial]
        *results, number = call(_forward(run, training), given, [shown, *states], tf.int32)

        def gradient(*gradients: Any) -> list[Any]:
            shapes = [part.shape for part in (x, *rest)]
            return call(_backward(run, True), [number, *given, *gradients], shapes)

        return results, gradient

    return list(layer(x, *initial, *weights))


def _numpy(run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]) -> list[Any]:
    """There are no gradients."""
    return host.forward(run, False, x, *_present(mask), *initial, *weights)[:-1]


def _present(mask: Any) -> list[Any]:
    return [] if mask is None else [mask]


# one object for equal arguments, so that a framework does not trace again
@once
def _forward(run: Run, training: bool) -> Callable[..., list[Any]]:
    return partial(host.forward, run, training)


@once
def _backward(run: Run, wants_dx: bool) -> Callable[..., list[Any]]:
    return partial(host.backward, run, wants_dx)


_CORES = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow, "numpy": _numpy}
