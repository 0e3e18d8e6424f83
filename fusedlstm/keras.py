"""Keras 3: layers with the arguments, weights and results of ``keras.layers``', run by our kernels.

:class:`LSTM`, :class:`GRU` and :class:`SimpleRNN` take the place of the layers of the same names;
:class:`Recurrent` runs any cell; :func:`accelerate` clones a model with its layers replaced by these.

Each is a layer of Keras whose run over time, and nothing else, is ours.  On the PyTorch backend it is the
operator of :mod:`fusedlstm.torch`; on JAX, TensorFlow and NumPy it is a call of the host, which
:mod:`fusedlstm.host` makes.  Sizes in the comments and docstrings:

    B  batch        I  features of the input
    T  time steps   H  units
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import keras
from keras import activations, layers, ops

from . import cells, host, math
from .cells import Cell
from .host import Run
from .weights import GATE_ORDERS

__all__ = ["GRU", "LSTM", "SimpleRNN"]

_BACKEND = keras.backend.backend()
_PACKAGE = "fusedlstm"  # under which the layers are registered in files


# --- Activations -----------------------------------------------------------------------------------------

# What Keras names and is element-wise, on the functions of a cell.
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "celu": lambda x: _elu(x),
    "elu": lambda x: _elu(x),
    "exponential": math.exp,
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
        if function in (getattr(activations, name), getattr(ops, name, None)):
            return name
    shown = getattr(function, "__name__", repr(function))
    raise ValueError(
        f"{argument} must be one of {', '.join(sorted(_ACTIVATIONS))}, which are computed for each unit by "
        f"itself, got {shown}. Write another one as a cell of your own and use fusedlstm.keras.Recurrent, or "
        "keep the layer of keras.layers"
    )


@cache
def _lstm(activation: str, gate: str) -> Cell:
    if (activation, gate) == ("tanh", "sigmoid"):
        return cells.lstm
    act, rec = _ACTIVATIONS[activation], _ACTIVATIONS[gate]

    def lstm(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
        c = rec(f) * c + rec(i) * act(g)
        return rec(o) * act(c), c

    return cells.cell(gates=cells.lstm.gates, states=cells.lstm.states)(lstm)


@cache
def _gru(activation: str, gate: str) -> Cell:
    if (activation, gate) == ("tanh", "sigmoid"):
        return cells.gru
    act, rec = _ACTIVATIONS[activation], _ACTIVATIONS[gate]

    def gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any) -> Any:
        n = act(n_x + rec(r) * n_h)
        return n + rec(z) * (h - n)

    return cells.cell(gates=cells.gru.gates, states=cells.gru.states, split=cells.gru.split)(gru)


@cache
def _rnn(activation: str) -> Cell:
    known = {"tanh": cells.rnn_tanh, "relu": cells.rnn_relu}
    if activation in known:
        return known[activation]
    act = _ACTIVATIONS[activation]

    def rnn(a: Any) -> Any:
        return act(a)

    return cells.cell(gates=cells.rnn_tanh.gates)(rnn)


# --- Layers ----------------------------------------------------------------------------------------------


class _Fused(layers.RNN):  # type: ignore[misc]
    """What the layers share: the run over time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _BACKEND not in _CORES:
            raise RuntimeError(
                f"fusedlstm.keras runs on the Keras backends {', '.join(_CORES)}, not on {_BACKEND!r}: set "
                "the environment variable KERAS_BACKEND before Keras is imported"
            )
        self._order = self._mathematics.gates  # refuses what has no kernels
        # XLA compiles no calls of the host from TensorFlow
        self.supports_jit = _BACKEND != "tensorflow"

    @property
    def use_cudnn(self) -> bool:
        """Never: our kernels run in its place, whatever was asked for."""
        return False

    @use_cudnn.setter
    def use_cudnn(self, value: Any) -> None:
        pass

    @property
    def _mathematics(self) -> Cell:
        """The cell of ours that computes what Keras's does."""
        raise NotImplementedError

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        """The last output (B, H), the outputs (B, T, H), and the final states (B, H), as Keras asks for them.

        Where only the last output is asked for, the outputs are that one.
        """
        mask = mask[0] if keras.tree.is_nested(mask) else mask
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        x = ops.cast(sequences, dtype)
        if training and self.cell.dropout:
            x = x * ops.cast(_one(self.cell.get_dropout_mask(sequences[:, 0])), dtype)[:, None]
        states = [ops.cast(state, dtype) for state in keras.tree.flatten(initial_state)]
        if self.stateful and _BACKEND == "torch":  # the layer writes to them before backward reads them
            states = [ops.copy(state) for state in states]
        run = Run(
            self._mathematics,
            self.go_backwards,
            self.return_sequences,
            self.zero_output_for_mask,
            _BACKEND == "jax",
            mask is not None,
        )
        mask = None if mask is None else ops.cast(mask, "bool")
        shown, *finals = _CORES[_BACKEND](run, bool(training), x, mask, states, self._weights(dtype))
        return (shown[:, -1] if self.return_sequences else shown), shown, finals

    def _weights(self, dtype: str) -> list[Any]:
        """The weights in our layout: (gates*H, I), (gates*H, H), both biases."""
        cell = self.cell
        kernels = [self._ordered(kernel, dtype) for kernel in (cell.kernel, cell.recurrent_kernel)]
        flat = [ops.transpose(kernel) for kernel in kernels]
        if cell.bias is not None:
            bias = self._ordered(cell.bias, dtype)
            flat += [bias[0], bias[1]] if len(bias.shape) == 2 else [bias, ops.zeros_like(bias)]
        return flat

    def _ordered(self, weight: Any, dtype: str) -> Any:
        """A weight with its gates, along the last axis, in our order."""
        weight = ops.cast(weight, dtype)
        theirs = GATE_ORDERS["keras"].get(_KINDS.get(type(self.cell), ""), self._order)
        if theirs == self._order:
            return weight
        parts = ops.split(weight, len(theirs), axis=-1)
        return ops.concatenate([parts[theirs.index(gate)] for gate in self._order], axis=-1)


def _one(masks: Any) -> Any:
    """The mask of dropout, or the first, where Keras draws one for each gate."""
    return masks[0] if isinstance(masks, list) else masks


_KINDS = {layers.LSTMCell: "lstm", layers.GRUCell: "gru"}


@keras.saving.register_keras_serializable(_PACKAGE)
class LSTM(_Fused, layers.LSTM):  # type: ignore[misc]
    """``keras.layers.LSTM`` with fused kernels."""

    @property
    def _mathematics(self) -> Cell:
        return _lstm(*_activation_names(self))


@keras.saving.register_keras_serializable(_PACKAGE)
class GRU(_Fused, layers.GRU):  # type: ignore[misc]
    """``keras.layers.GRU`` with fused kernels."""

    @property
    def _mathematics(self) -> Cell:
        if not self.reset_after:
            raise NotImplementedError("reset_after=False")
        return _gru(*_activation_names(self))


@keras.saving.register_keras_serializable(_PACKAGE)
class SimpleRNN(_Fused, layers.SimpleRNN):  # type: ignore[misc]
    """``keras.layers.SimpleRNN`` with fused kernels."""

    @property
    def _mathematics(self) -> Cell:
        return _rnn(_activation_name("activation", self.activation))


def _activation_names(layer: Any) -> tuple[str, str]:
    gate = _activation_name("recurrent_activation", layer.recurrent_activation)
    return _activation_name("activation", layer.activation), gate


# --- The run over time, on each backend ------------------------------------------------------------------


def _torch(run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]) -> list[Any]:
    """The operator of fusedlstm.torch; what host.Steps does with arrays is done with tensors here."""
    import torch

    from . import torch as adapter

    adapter._cells.setdefault(run.cell.key, run.cell)
    if run.backwards:
        x, mask = x.flip(1), None if mask is None else mask.flip(1)

    def operator(x: Any, lengths: Any) -> Any:
        states = [state.unsqueeze(0) for state in initial]
        y, *finals = adapter._apply(x.transpose(0, 1), states, weights, lengths, None, run.cell, 1)
        return y.transpose(0, 1), [final.squeeze(0) for final in finals]

    if mask is None:
        y, finals = operator(x, None)
        return [y if run.sequences else finals[0], *finals]
    counts, latest = mask.sum(1), mask.cumsum(1)[..., None] - 1
    empty, lengths = (counts == 0)[:, None], counts.clamp(min=1)
    ends_only = (mask == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).all()
    if not torch.compiler.is_compiling() and ends_only:
        y, finals = operator(x, lengths)
        if run.sequences and not run.zeros:
            y = torch.where(mask[..., None], y, finals[0][:, None])
    else:
        order = torch.argsort(~mask, dim=1, stable=True)[..., None]
        x = torch.take_along_dim(x, order, 1).masked_fill(empty[..., None], 0)
        y, finals = operator(x, lengths)
        finals = [torch.where(empty, state, final) for state, final in zip(initial, finals)]
        if run.sequences:
            y = torch.take_along_dim(y, latest.clamp(min=0), 1)
            y = y.masked_fill(~mask[..., None] if run.zeros else latest < 0, 0)
    if not run.sequences:
        y = finals[0].masked_fill(~mask[:, -1:] if run.zeros else empty, 0)
    return [y, *finals]


def _jax(run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]) -> list[Any]:
    """A callback.  JAX tells apart whether there will be a gradient, so `training` has no part in it."""
    return list(_jax_layer()(run, x, mask, initial, weights))


@cache
def _jax_layer() -> Any:
    import jax

    def like(*arrays: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]

    def call(run: Run, training: bool, x: Any, mask: Any, initial: Any, weights: Any) -> list[Any]:
        batch, steps, _ = x.shape
        shape = (batch, *((steps,) if run.sequences else ()), initial[0].shape[1])
        results = [jax.ShapeDtypeStruct(shape, x.dtype), *like(*initial), jax.ShapeDtypeStruct((), "int32")]
        flat = (x, *_present(mask), *initial, *weights)
        return list(jax.pure_callback(_forward(run, training), results, *flat, vmap_method="sequential"))

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def layer(run: Run, *arguments: Any) -> list[Any]:
        return call(run, False, *arguments)[:-1]

    def forward(run: Run, *arguments: Any) -> tuple[list[Any], Any]:
        *results, number = call(run, True, *arguments)
        return results, (number, *arguments)

    def backward(run: Run, kept: Any, gradients: list[Any]) -> tuple[Any, ...]:
        number, x, mask, initial, weights = kept
        flat = (number, x, *_present(mask), *initial, *weights, *gradients)
        results = like(x, *initial, *weights)
        dx, *rest = jax.pure_callback(_backward(run), results, *flat, vmap_method="sequential")
        return dx, None, rest[: len(initial)], rest[len(initial) :]

    layer.defvjp(forward, backward)
    return layer


def _tensorflow(
    run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]
) -> list[Any]:
    """A call of the host.  TensorFlow does not tell whether there will be a gradient, but `training` does."""
    import tensorflow as tf

    def call(function: Any, given: Sequence[Any], shapes: list[Any], *more: Any) -> list[Any]:
        results = tf.numpy_function(function, given, [x.dtype] * len(shapes) + list(more), stateful=False)
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
            return call(_backward(run), [number, *given, *gradients], shapes)

        return results, gradient

    return list(layer(x, *initial, *weights))


def _numpy(run: Run, training: bool, x: Any, mask: Any, initial: list[Any], weights: list[Any]) -> list[Any]:
    """There are no gradients."""
    return _forward(run, False)(x, *_present(mask), *initial, *weights)[:-1]


def _present(mask: Any) -> list[Any]:
    return [] if mask is None else [mask]


# one object for equal arguments, so that a framework does not trace again
@cache
def _forward(run: Run, training: bool) -> Callable[..., list[Any]]:
    return partial(host.forward, run, training)


@cache
def _backward(run: Run) -> Callable[..., list[Any]]:
    return partial(host.backward, run)


_CORES = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow, "numpy": _numpy}
