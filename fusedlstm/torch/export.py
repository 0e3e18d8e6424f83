"""What records calls instead of running them.

Graphs that leave Python, TorchScript's and ONNX's, are given PyTorch's layers; ``torch.fx`` is given a leaf.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import cells
from .. import weights as storage
from ..cells import Cell
from .arguments import described

_PYTORCHS: dict[str, Any] = {
    cells.lstm.key: torch.lstm,
    cells.gru.key: torch.gru,
    cells.rnn_tanh.key: torch.rnn_tanh,
    cells.rnn_relu.key: torch.rnn_relu,
}
_RESTORE = "restore(model) gives back PyTorch's modules in the place of those that accelerate has changed"
# As PyTorch does for its own modules: the checks of sizes are not part of the graph.
warnings.filterwarnings("ignore", category=TracerWarning, module=r"fusedlstm\.torch")


def leaves_python() -> bool:
    """Whether TorchScript or ONNX records what is called; they have PyTorch's operators only."""
    return torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export()


def export_layer(
    x: Tensor,  # (T, B, I)
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: Cell,
    directions: int,
    heads: int,
    every: bool,
) -> list[Tensor]:
    """What `apply_layer` returns."""
    if every:
        raise RuntimeError(
            "all_states cannot be recorded by torch.jit.trace and torch.onnx.export, since PyTorch's layers "
            f"have no such results: take the output alone; {_RESTORE}"
        )
    if reset is not None:
        raise RuntimeError(
            "reset cannot be recorded by torch.jit.trace and torch.onnx.export, since PyTorch's layers have "
            f"no such argument: call the layer on each piece of the sequence; {_RESTORE}"
        )
    if lengths is None:
        return _export_layers((x,), x.shape[1], initial, weights, cell, directions, heads)
    if torch._C._get_tracing_state() is None:
        raise RuntimeError(
            "lengths cannot be recorded by torch.onnx.export(dynamo=True), which has no packed sequences: "
            f"use dynamo=False; {_RESTORE}"
        )
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    y, *final = export_packed(packed, initial, weights, cell, directions, heads)
    padded, _ = pad_packed_sequence(packed._replace(data=y), total_length=x.shape[0])
    return [padded, *final]


def export_packed(packed: PackedSequence, initial: list[Tensor], *rest: Any) -> list[Tensor]:
    """The data of the output, and the final states; `rest` as `_export_layers` takes it."""
    data, sizes, order, back = packed

    def select(states: list[Tensor], indices: Tensor | None) -> list[Tensor]:
        return states if indices is None else [part.index_select(1, indices) for part in states]

    y, *final = _export_layers((data, sizes), sizes[0], select(initial, order), *rest)
    return [y, *select(final, back)]


def _export_layers(
    source: tuple[Tensor, ...],  # the input (T, B, I), or data and batch sizes of packed sequences
    batch: Any,
    initial: list[Tensor],  # (L*D, B, size)
    weights: list[Tensor],  # of both directions of each layer
    cell: Cell,
    directions: int,
    heads: int,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
) -> list[Tensor]:
    """The output and the final states, by the operator of PyTorch's module of the kind."""
    if cell.key not in _PYTORCHS:
        raise no_operator(cell)
    if heads > 1:
        raise RuntimeError(f"TorchScript and ONNX have no operator for a layer with heads; {_RESTORE}")
    rows, (ih, hh) = num_layers * directions, weights[:2]
    sizes = (hh.shape[1], ih.shape[0] // len(cell.gates_with_input))[: len(cell.states)]
    states = initial or [source[0].new_zeros((rows, batch, size)) for size in sizes]
    bias = storage.unflatten(cell, weights[: len(weights) // rows]).bias_ih is not None
    hx = states if len(states) > 1 else states[0]
    layout = (False,) if len(source) == 1 else ()  # not batch_first
    settings = (bias, num_layers, dropout, training, directions == 2, *layout)
    return list(_PYTORCHS[cell.key](*source, hx, weights, *settings))


def no_operator(cell: Cell) -> RuntimeError:
    if cell.key in _PYTORCHS:
        return RuntimeError(
            "ONNX has no operator fusedlstm::layer: give torch.onnx.export the model, not a program that "
            f"torch.export has made of it; {_RESTORE}"
        )
    return RuntimeError(
        f"TorchScript and ONNX have no operator for the cell {cell.name!r}: for them, write it as a module "
        f"of PyTorch's operators, or put an LSTM, a GRU or an RNN in its place; {_RESTORE}"
    )


def refuse_script(module: nn.Module) -> None:
    raise RuntimeError(
        f"torch.jit.script cannot compile {module}: {_RESTORE}; or use torch.jit.trace, or put a module of "
        "torch.nn with the same state_dict in its place"
    )


class Unquantized:
    """The attribute `qconfig`, which quantization gives to modules before it looks for those that it knows.

    Ours are none of these, and would be left in silence.
    """

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("there has been no quantization") from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__["qconfig"] = value
        warnings.warn(f"quantization leaves {module} as it is; {_RESTORE}", UserWarning, stacklevel=3)

    def __delete__(self, module: nn.Module) -> None:
        del module.__dict__["qconfig"]


def as_leaf(module: nn.Module, input: Any, hx: Any, **settings: Any) -> Any:
    """A call that torch.fx records as one node, as it does for the modules of ``torch.nn``.

    Raises:
        TypeError: if the input is no stand-in of torch.fx, so that it should have been a tensor, or if there
            is nothing around the module.
    """
    if not isinstance(input, torch.fx.Proxy):
        raise TypeError(f"input must be a tensor, got {described(input)}")
    if not type(module).forward.__module__.startswith("fusedlstm."):
        raise TypeError(
            f"torch.fx cannot trace inside the forward of {type(module).__name__}, which calls the inherited "
            "one: give it a tracer for which that class is a leaf (is_leaf_module)"
        )
    target = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not target:
        raise TypeError(f"torch.fx cannot trace inside {module}: trace a module that calls it")
    given = {"hx": hx, **settings}
    kwargs = {name: value for name, value in given.items() if value is not None}
    return input.tracer.create_proxy("call_module", target, (input,), kwargs)
