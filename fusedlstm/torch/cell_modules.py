"""The modules of cells: LSTMCell, GRUCell and RNNCell, one step of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import cells
from ..cells import Cell
from .arguments import (
    as_computed,
    as_results,
    autocasting,
    described,
    parameters_of,
    refuse_dtype,
)
from .export import Unquantized, as_leaf, refuse_script
from .modules import MODES, check_nonlinearity
from .operators import apply_layer, apply_step

_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Single(nn.RNNCellBase):
    """What cells share: one step of one layer; the parameters are PyTorch's."""

    __prepare_scriptable__ = refuse_script
    qconfig = Unquantized()
    fused_cell: Cell
    fused_precision = "float32"  # of products, unless autocast or the weights say something else

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # (B, I) or (I,); (B, H) or (H,) each
        """The new state, as ``torch.nn`` shapes it.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if not torch.compiler.is_compiling() and type(input) is Tensor:
            final = _quick_step(self, input, hx)
            if final is not None:
                return tuple(final) if len(final) > 1 else final[0]
        return _any_step(self, input, hx)


def _quick_step(module: Single, x: Tensor, hx: Any) -> list[Tensor] | None:
    """The new states, if all is as it mostly is: a batch and its states, where the parameters are our own."""
    own, names = module._parameters, module.fused_cell.states
    weights: list[Any] = [own.get(name) for name in (_CELL_WEIGHTS if module.bias else _CELL_WEIGHTS[:2])]
    states = [] if hx is None else [hx] if len(names) == 1 else hx
    if type(states) not in (list, tuple) or len(states) not in (0, len(names)):
        return None
    if module.fused_precision != "float32" or autocasting():
        return None
    shape = x.shape
    if len(shape) != 2 or shape[1] != module.input_size or x.dtype is not getattr(weights[0], "dtype", None):
        return None
    return apply_step(x, [*states], weights, module.fused_cell)


def _any_step(module: Single, input: Any, hx: Any) -> Any:
    """The result of `forward`, once all has been looked at."""
    if not isinstance(input, Tensor):
        return as_leaf(module, input, hx)
    if input.dim() not in (1, 2):
        raise ValueError(
            f"{type(module).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead"
        )
    if input.shape[-1] != module.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[-1]} expected {module.input_size}"
        )
    weights = parameters_of(module, _CELL_WEIGHTS if module.bias else _CELL_WEIGHTS[:2])
    if input.dtype is not weights[0].dtype:
        refuse_dtype(input, weights[0])
    batched = input.dim() == 2
    x = input.unsqueeze(0) if batched else input[None, None]
    states = [] if hx is None else _check_state(module, hx, x.shape[1], batched, weights[0])
    autocasts = autocasting()
    x, states, weights, precision = as_computed(module, x, states, weights, autocasts)
    y, *final = apply_layer(x, states, weights, None, None, module.fused_cell, 1, precision=precision)
    _, final = as_results(y, final, input.dtype, autocasts and y.is_cuda)
    final = [part.squeeze(0) if batched else part[0, 0] for part in final]
    return tuple(final) if len(final) > 1 else final[0]


def _check_state(module: Single, hx: Any, batch: int, batched: bool, weight: Tensor) -> list[Tensor]:
    """The states as (1, B, H) each."""
    names = module.fused_cell.states
    parts = (hx,) if len(names) == 1 else hx
    if not isinstance(parts, (tuple, list)) or len(parts) != len(names):
        raise TypeError(f"hx must be a tuple ({', '.join(names)}), got {described(hx)}")
    states = []
    for n, part in enumerate(parts):
        label = "hidden" if len(names) == 1 else f"hx[{n}]"
        if not isinstance(part, Tensor):
            raise TypeError(f"{label} must be a tensor, got {described(part)}")
        if part.dim() not in (1, 2):
            raise ValueError(
                f"{type(module).__name__}: Expected {label} to be 1D or 2D, got {part.dim()}D instead"
            )
        if part.dim() != 1 + batched:
            raise RuntimeError(
                f"{label} must have as many dimensions as input, {1 + batched}, got {part.dim()}"
            )
        if part.shape[-1] != module.hidden_size:
            raise RuntimeError(
                f"hidden{n} has inconsistent hidden_size: got {part.shape[-1]}, expected {module.hidden_size}"
            )
        if batched and part.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{n} batch size {part.shape[0]}")
        if part.dtype is not weight.dtype:
            refuse_dtype(part, weight, label)
        states.append(part.unsqueeze(0) if batched else part[None, None])
    return states


class LSTMCell(Single, nn.LSTMCell):
    """``torch.nn.LSTMCell`` with a fused kernel."""

    fused_cell = cells.lstm


class GRUCell(Single, nn.GRUCell):
    """``torch.nn.GRUCell`` with a fused kernel."""

    fused_cell = cells.gru


class RNNCell(Single, nn.RNNCell):
    """``torch.nn.RNNCell`` with a fused kernel."""

    @property
    def fused_cell(self) -> Cell:  # type: ignore[override]
        return MODES[f"RNN_{check_nonlinearity(self.nonlinearity).upper()}"]
