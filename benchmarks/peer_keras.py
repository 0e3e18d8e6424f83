"""Keras: its layers on each of its backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fusedlstm.weights import GATE_ORDERS, Weights

from .cases import Case, Data, name_results
from .contender import Contender, Prepared, Results, layer_weights, stepping


class Arrays(NamedTuple):
    """The data of a case in the arrays of a backend, batch first; states are a list for each layer."""

    x: Any  # (B, T, I)
    states: list[list[Any]]  # (B, H) each
    dy: Any  # (B, T, H)
    dstates: list[list[Any]]

    @property
    def seeds(self) -> list[Any]:
        """The gradients of the outputs and of all final states."""
        return [self.dy, *(part for layer in self.dstates for part in layer)]


def flat(layers: list[list[Any]]) -> list[Any]:
    """The parts of all layers."""
    return [part for layer in layers for part in layer]


class Keras(Contender):
    """``keras.layers.LSTM`` and its like."""

    modules: ClassVar[tuple[str, ...]] = ("keras",)
    cells: ClassVar[tuple[str, ...] | None] = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    layers: ClassVar[str] = "keras.layers"  # the module that has the layers

    def array(self, values: np.ndarray) -> Any:
        """An array of the backend."""
        raise NotImplementedError

    def functions(self, layers: list[Any], arrays: Arrays) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        """forward(states) gives outputs and final states; train() these, and the gradients of the input,
        the initial states and the weights of all layers."""
        raise NotImplementedError

    def prepare(self, case: Case, data: Data) -> Prepared:
        def per_layer(state: tuple[np.ndarray, ...]) -> list[list[Any]]:
            return [[self.array(part[n]) for part in state] for n in range(case.layers)]

        def batch_first(values: np.ndarray) -> Any:
            return self.array(np.ascontiguousarray(values.swapaxes(0, 1)))

        arrays = Arrays(
            batch_first(data.x), per_layer(data.state), batch_first(data.dy), per_layer(data.dstate)
        )
        forward, train = self.functions(build_layers(self.layers, case, data), arrays)
        calls = {
            "forward": lambda: forward(None),
            "train": train,
            "step": stepping(forward, arrays.states),
        }
        return Prepared(calls[case.mode], lambda result: read_results(case, *result))


def build_layers(module: str, case: Case, data: Data) -> list[Any]:
    """The layers of a module, Keras's or ours, with the weights of a case."""
    source: Any = importlib.import_module(module)
    kinds = {"lstm": source.LSTM, "gru": source.GRU}
    layers = []
    for weights in layer_weights(case, data.weights):
        options = {"return_sequences": True, "return_state": True, "dtype": case.dtype}
        if case.cell in kinds:
            layer = kinds[case.cell](case.hidden, **options)
        else:
            layer = source.SimpleRNN(case.hidden, case.cell.removeprefix("rnn_"), **options)
        layer.build((case.batch, case.steps, weights.ih.shape[1]))
        layer.set_weights(to_keras(case, weights))
        layers.append(layer)
    return layers


def run_layers(layers: list[Any], x: Any, states: Any) -> tuple[Any, list[list[Any]]]:
    """Outputs and the final states of each layer."""
    finals = []
    for n, layer in enumerate(layers):
        x, *final = layer(x, initial_state=None if states is None else states[n])
        finals.append(final)
    return x, finals


def reorder(case: Case, array: np.ndarray, back: bool = False) -> np.ndarray:
    """The gates along the first axis, from our order to Keras's, or back."""
    ours = case.mathematics.gates
    theirs = GATE_ORDERS["keras"].get(case.cell, ours)
    parts = np.split(array, len(ours))
    places = [theirs.index(gate) for gate in ours] if back else [ours.index(gate) for gate in theirs]
    return np.concatenate([parts[place] for place in places])


def to_keras(case: Case, weights: Weights) -> list[np.ndarray]:
    """Kernel (I, gates*H), recurrent kernel (H, gates*H), bias; a GRU has both biases, others their sum."""
    ih, hh, bias_ih, bias_hh = (reorder(case, array) for array in weights[:4])
    return [ih.T, hh.T, np.stack([bias_ih, bias_hh]) if case.cell == "gru" else bias_ih + bias_hh]


def read_results(case: Case, y: Any, finals: Any, gradients: Any = None) -> Results:
    """Results by name; the gradient of a single bias is that of both of ours."""

    def time_first(array: Any) -> np.ndarray:
        return np.swapaxes(np.asarray(array), 0, 1)

    def stacked(layers: Any) -> list[np.ndarray]:
        return [np.stack([np.asarray(part) for part in parts]) for parts in zip(*layers)]

    if gradients is None:
        return name_results(case, time_first(y), stacked(finals))
    dx, dstates, dweights = gradients
    named: dict[str, np.ndarray] = {}
    for n in range(case.layers):
        ih, hh, bias = (np.asarray(gradient) for gradient in dweights[3 * n : 3 * n + 3])
        bias_ih, bias_hh = bias if case.cell == "gru" else (bias, bias)
        entries = {"weight_ih": ih.T, "weight_hh": hh.T, "bias_ih": bias_ih, "bias_hh": bias_hh}
        named |= {f"{name}_l{n}": reorder(case, array, back=True) for name, array in entries.items()}
    return name_results(case, time_first(y), stacked(finals), (time_first(dx), stacked(dstates), named))


class KerasTensorFlow(Keras):
    """Keras on TensorFlow, compiled by ``tf.function``."""

    name, title = "keras-tensorflow", "Keras + TensorFlow"
    modules = ("keras", "tensorflow")
    environment: ClassVar[Mapping[str, str]] = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

    @classmethod
    def versions(cls) -> dict[str, str]:
        distributions = metadata.packages_distributions()["tensorflow"]
        return {name: metadata.version(name) for name in ("keras", *sorted(set(distributions)))}

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.tf: Any = importlib.import_module("tensorflow")
        self.tf.config.threading.set_intra_op_parallelism_threads(threads)

    def array(self, values: np.ndarray) -> Any:
        return self.tf.constant(values)

    def functions(self, layers: list[Any], arrays: Arrays) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        tf = self.tf

        @tf.function  # type: ignore[untyped-decorator]
        def run(x: Any, states: Any) -> Any:
            return run_layers(layers, x, states)

        @tf.function  # type: ignore[untyped-decorator]
        def train(x: Any, states: Any) -> Any:
            weights = [weight.value for layer in layers for weight in layer.trainable_variables]
            with tf.GradientTape() as tape:
                tape.watch([x, states])
                y, finals = run_layers(layers, x, states)
                outputs = [y, *flat(finals)]
            return y, finals, tape.gradient(outputs, [x, states, weights], arrays.seeds)

        return lambda states: run(arrays.x, states), lambda: train(arrays.x, arrays.states)


class KerasJax(Keras):
    """Keras on JAX, compiled by ``jax.jit``; it computes in float32, whatever the dtype."""

    name, title = "keras-jax", "Keras + JAX"
    modules, packages = ("keras", "jax"), ("keras", "jax", "jaxlib")
    dtypes = ("float32",)
    environment: ClassVar[Mapping[str, str]] = {"KERAS_BACKEND": "jax"}

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.jax: Any = importlib.import_module("jax")

    def array(self, values: np.ndarray) -> Any:
        return self.jax.numpy.asarray(values)

    def functions(self, layers: list[Any], arrays: Arrays) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        jax = self.jax
        weights = [[weight.value for weight in layer.trainable_variables] for layer in layers]
        fixed = [[weight.value for weight in layer.non_trainable_variables] for layer in layers]

        @jax.jit  # type: ignore[untyped-decorator]
        def run(x: Any, states: Any, weights: Any) -> Any:
            finals = []
            for n, layer in enumerate(layers):
                given = None if states is None else states[n]
                (x, *final), _ = layer.stateless_call(weights[n], fixed[n], x, initial_state=given)
                finals.append(final)
            return x, finals

        @jax.jit  # type: ignore[untyped-decorator]
        def train(x: Any, states: Any, weights: Any) -> Any:
            (y, finals), pull = jax.vjp(run, x, states, weights)
            dx, dstates, dweights = pull((arrays.dy, arrays.dstates))
            return y, finals, (dx, dstates, flat(dweights))

        ready = jax.block_until_ready
        return (
            lambda states: ready(run(arrays.x, states, weights)),
            lambda: ready(train(arrays.x, arrays.states, weights)),
        )


class KerasTorch(Keras):
    """Keras on PyTorch."""

    name, title = "keras-torch", "Keras + PyTorch"
    modules, packages = ("keras", "torch"), ("keras", "torch")
    environment: ClassVar[Mapping[str, str]] = {"KERAS_BACKEND": "torch"}

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.torch: Any = importlib.import_module("torch")
        self.torch.set_num_threads(threads)

    def array(self, values: np.ndarray) -> Any:
        return self.torch.tensor(values)

    def functions(self, layers: list[Any], arrays: Arrays) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        torch = self.torch
        weights = [weight.value for layer in layers for weight in layer.trainable_variables]

        def run(states: Any) -> Any:
            with torch.inference_mode():
                return run_layers(layers, arrays.x, states)

        def train() -> Any:
            inputs = [part.requires_grad_() for part in (arrays.x, *flat(arrays.states))]
            y, finals = run_layers(layers, arrays.x, arrays.states)
            dx, *rest = torch.autograd.grad([y, *flat(finals)], [*inputs, *weights], arrays.seeds)
            states = iter(rest)
            dstates = [[next(states) for _ in layer] for layer in arrays.states]
            detached = [[part.detach() for part in layer] for layer in finals]
            return y.detach(), detached, (dx, dstates, list(states))

        return run, train


class FusedKerasTensorFlow(KerasTensorFlow):
    """Our layers in Keras on TensorFlow."""

    name, title = "fusedlstm-keras-tensorflow", "fusedlstm in Keras + TensorFlow"
    layers = "fusedlstm.keras"


class FusedKerasJax(KerasJax):
    """Our layers in Keras on JAX."""

    name, title = "fusedlstm-keras-jax", "fusedlstm in Keras + JAX"
    layers = "fusedlstm.keras"


class FusedKerasTorch(KerasTorch):
    """Our layers in Keras on PyTorch."""

    name, title = "fusedlstm-keras-torch", "fusedlstm in Keras + PyTorch"
    layers = "fusedlstm.keras"
