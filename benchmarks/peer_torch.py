"""PyTorch: its layers, its cells, and the Python loop that a cell of one's own takes there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

from fusedlstm.derive import compile_source

from .cases import Case, Data, as_state, name_results
from .contender import (
    Contender,
    Prepared,
    Results,
    Unsupported,
    any_step,
    as_parts,
    cell_functions,
    layer_weights,
    stepping,
)


class Torch(Contender):
    """``torch.nn.LSTM`` and its like."""

    name, title = "torch", "PyTorch"
    modules: ClassVar[tuple[str, ...]] = ("torch",)
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    cells: ClassVar[tuple[str, ...] | None] = ("lstm", "gru", "rnn_tanh", "rnn_relu")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.torch: Any = importlib.import_module("torch")
        self.torch.set_num_threads(threads)
        self.layers: Any = self.torch.nn

    def tensor(self, array: Any, requires_grad: bool = False) -> Any:
        """An array as a tensor of the kind that the layers take."""
        return self.torch.tensor(array, requires_grad=requires_grad)

    def module(self, case: Case) -> Any:
        """A layer without its weights."""
        nn, dtype = self.layers, getattr(self.torch, case.dtype)
        if case.cell.startswith("rnn"):
            nonlinearity = case.cell.removeprefix("rnn_")
            return nn.RNN(case.inputs, case.hidden, case.layers, nonlinearity=nonlinearity, dtype=dtype)
        return {"lstm": nn.LSTM, "gru": nn.GRU}[case.cell](case.inputs, case.hidden, case.layers, dtype=dtype)

    def prepare(self, case: Case, data: Data) -> Prepared:
        layer = self.module(case).train(case.mode == "train")  # else cuDNN keeps what gradients need
        layer.load_state_dict({name: self.tensor(array) for name, array in data.weights.items()})
        return self.prepare_module(case, data, layer, dict(layer.named_parameters()))

    def prepare_module(
        self, case: Case, data: Data, layer: Callable[..., Any], parameters: dict[str, Any]
    ) -> Prepared:
        """For a function like a layer of PyTorch: `layer(x, state)` gives outputs and the final state."""
        torch = self.torch
        training = case.mode == "train"
        x = self.tensor(data.x, requires_grad=training)
        states = tuple(self.tensor(part, requires_grad=training) for part in data.state)
        seeds = [self.tensor(part) for part in (data.dy, *data.dstate)]
        inputs = [x, *states, *parameters.values()]

        def forward() -> Any:
            with torch.inference_mode():
                return layer(x)

        def step(state: Any) -> Any:
            with torch.inference_mode():
                return layer(x, state)

        def train() -> Any:
            y, final = layer(x, as_state(states))
            outputs = [y, *(final if isinstance(final, tuple) else (final,))]
            dx, *rest = torch.autograd.grad(outputs, inputs, seeds)
            split = len(states)
            return y, final, (dx, tuple(rest[:split]), dict(zip(parameters, rest[split:])))

        calls = {"forward": forward, "train": train, "step": stepping(step, as_state(states))}
        return Prepared(calls[case.mode], lambda result: name_results(case, *_detached(result)))


def _detached(values: Any) -> Any:
    """Nested tensors without their history, on the host, of a type that NumPy has."""
    if isinstance(values, tuple):
        return tuple(_detached(value) for value in values)
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    values = values.detach().cpu()
    return values.float() if values.dtype.itemsize < 4 else values


class FusedTorch(Torch):
    """The layers of this package for PyTorch."""

    name, title = "fusedlstm-torch", "fusedlstm.torch"
    modules, packages = ("torch", "fusedlstm.torch"), ("fusedlstm", "torch")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.layers = importlib.import_module("fusedlstm.torch")


class TorchCell(Torch):
    """``torch.nn.LSTMCell`` and its like, for single steps."""

    name, title = "torch-cell", "PyTorch cell"
    modes = ("step",)

    def prepare(self, case: Case, data: Data) -> Prepared:
        if case.layers > 1:
            raise Unsupported("no stack of layers")
        torch, nn = self.torch, self.torch.nn
        dtype = getattr(torch, case.dtype)
        kinds = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
        if case.cell in kinds:
            cell = kinds[case.cell](case.inputs, case.hidden, dtype=dtype)
        else:
            cell = nn.RNNCell(case.inputs, case.hidden, True, case.cell.removeprefix("rnn_"), dtype=dtype)
        cell.load_state_dict(
            {name.removesuffix("_l0"): torch.tensor(array) for name, array in data.weights.items()}
        )
        x = torch.tensor(data.x[0])

        def step(state: Any) -> Any:
            with torch.inference_mode():
                final = cell(x, state)
                return final[0] if isinstance(final, tuple) else final, final

        def read(result: Any) -> Results:
            y, final = result
            return name_results(
                case, y[None], [part[None] for part in (final if len(data.state) > 1 else [final])]
            )

        return Prepared(stepping(step, as_state(tuple(torch.tensor(part[0]) for part in data.state))), read)


class TorchLoop(Torch):
    """What users write for a cell that PyTorch lacks: a Python loop over the steps, any cell."""

    name, title = "torch-loop", "PyTorch, Python loop"
    cells = None

    def prepare(self, case: Case, data: Data) -> Prepared:
        torch = self.torch
        parameters = {
            name: torch.tensor(array, requires_grad=case.mode == "train")
            for name, array in data.weights.items()
        }
        cell = case.mathematics
        step = compile_source(cell.source, cell_functions(torch, torch), f"<{cell.name} in PyTorch>").step
        layers = layer_weights(case, parameters)

        def run(x: Any, state: Any = None) -> tuple[Any, Any]:
            given = as_parts(state, len(cell.states))
            finals = []
            for n, weights in enumerate(layers):
                shape = (case.batch, case.hidden)
                states = [x.new_zeros(shape) if part is None else part[n] for part in given]
                products = x @ weights.ih.T + weights.bias_ih
                outputs = []
                for t in range(case.steps):
                    states = any_step(cell, step, weights, products[t], states)
                    outputs.append(states[0])
                x = torch.stack(outputs)
                finals.append(states)
            return x, as_state(tuple(torch.stack(parts) for parts in zip(*finals)))

        return self.prepare_module(case, data, run, parameters)
