"""The modules of layers: LSTM, GRU and RNN, which PyTorch has, and Recurrent for any cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import cells, layers
from .. import weights as storage
from ..cells import Cell
from .arguments import (
    as_results,
    autocasting,
    check_input,
    check_lengths,
    check_reset,
    check_state,
    converted,
    parameters_of,
    precision_of,
)
from .arrays import NUMPY
from .export import Unquantized, as_leaf, export_packed, leaves_python, refuse_script
from .operators import apply_layer
from .prepared import forget
from .shapes import known_cells


class Stack(nn.Module):
    """What layers share; their parameters are named by `_all_weights`, for each direction of each layer.

    Call as ``torch.nn``'s layers, with two more arguments:

        lengths: (B,) integers from 0 to T, in any order and on any device: sequences end there.  Outputs past
            the end are zero, the final state is that at the end, and a reverse direction starts there.  That
            of a sequence without steps is the initial one.
        reset: (T, B), or (B, T) if batch_first, or (T,), booleans: where true, the state goes back to the
            initial one before that step.  A reverse direction goes back at the same boundary.
    """

    __prepare_scriptable__ = refuse_script
    qconfig = Unquantized()
    fused_cell: Cell  # what the kernels run
    fused_autocasts = True  # whether autocast gives its type to the results, on a CPU too
    fused_precision = "float32"  # of products, unless autocast or the weights say something else
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]

    def forward(
        self,
        input: Tensor | PackedSequence,  # (T, B, I), (B, T, I) or (T, I)
        hx: Tensor | tuple[Tensor, ...] | None = None,  # (L*D, B, P), others (L*D, B, H)
        lengths: Tensor | Sequence[int] | None = None,  # (B,)
        reset: Tensor | None = None,  # (T, B), (B, T) or (T,)
    ) -> Any:
        """Output and final state, as ``torch.nn`` shapes them.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if not isinstance(input, Tensor):
            if isinstance(input, PackedSequence):
                return _run_packed(self, input, hx, lengths, reset)
            return as_leaf(self, input, hx, lengths=lengths, reset=reset)
        weights = _weights(self)
        weight = weights[0][0]
        check_input(self, input, weight)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        states = [] if hx is None else check_state(self, hx, x.size(1), batched, weight)
        if lengths is not None:
            lengths = check_lengths(lengths, x.size(1), batched)
        if reset is not None:
            reset = check_reset(self, reset, input.shape[:-1], batched)
        y, final = _run(self, x, states, weights, lengths, reset)
        if not batched:
            y, final = y.squeeze(1), [part.squeeze(1) for part in final]
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, tuple(final) if len(final) > 1 else final[0]


def _weights(module: Stack) -> list[list[Tensor]]:
    """Of each layer, those of both directions one after the other."""
    names = module._all_weights
    if len(names) != module.num_layers * (2 if module.bidirectional else 1):
        raise RuntimeError(
            f"num_layers={module.num_layers} and bidirectional={module.bidirectional} do not fit the weights "
            f"that this {type(module).__name__} was made with, of {len(names)} layers and directions"
        )
    if module.bidirectional:
        names = [there + back for there, back in zip(names[::2], names[1::2])]
    return [parameters_of(module, own) for own in names]


def _run(
    module: Stack,
    x: Tensor,
    states: list[Tensor],
    weights: list[list[Tensor]],
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The output (T, B, D*P) and the final states of all layers."""
    directions = 2 if module.bidirectional else 1
    cell, results = module.fused_cell, []
    given, autocasts = x.dtype, autocasting()
    for level, used in enumerate(weights):
        if len(weights) == 1:
            own = states
        else:
            own = [part[level * directions : (level + 1) * directions] for part in states]
        if level and module.dropout:
            x = nn.functional.dropout(x, module.dropout, module.training)
        precision = module.fused_precision
        if autocasts or x.dtype is not used[0].dtype or x.dtype not in NUMPY:
            precision = precision_of(module, x, used[0])
            x, own, used = converted(x, own, used, autocasts)
        x, *final = apply_layer(x, own, used, lengths, reset, cell, directions, precision)
        results.append(final)
    final = results[0] if len(results) == 1 else [torch.cat(parts) for parts in zip(*results)]
    return as_results(x, final, given, autocasts and (module.fused_autocasts or x.is_cuda))


def _run_packed(module: Stack, packed: PackedSequence, hx: Any, lengths: Any, reset: Any) -> Any:
    if lengths is not None or reset is not None:
        raise ValueError("a PackedSequence has lengths of its own, and cannot be reset: pad it instead")
    weights = _weights(module)
    if leaves_python():
        return _export_packed(module, packed, hx, weights)
    padded, ends = pad_packed_sequence(packed)
    check_input(module, padded, weights[0][0])
    states = [] if hx is None else check_state(module, hx, padded.shape[1], True, weights[0][0])
    y, final = _run(module, padded, states, weights, ends, None)
    order = packed.sorted_indices
    if order is not None:
        y, ends = y.index_select(1, order), ends[order.cpu()]
    data = pack_padded_sequence(y, ends).data
    output = PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)
    return output, tuple(final) if len(final) > 1 else final[0]


def _export_packed(module: Stack, packed: PackedSequence, hx: Any, weights: list[list[Tensor]]) -> Any:
    """What `_run_packed` returns; for ONNX nothing may come between packing and the layers."""
    check_input(module, packed.data, weights[0][0])
    batch = int(packed.batch_sizes[0])
    states = [] if hx is None else check_state(module, hx, batch, True, weights[0][0])
    flat = [weight for level in weights for weight in level]
    settings = (1 + module.bidirectional, module.num_layers, module.dropout, module.training)
    data, *final = export_packed(packed, states, flat, module.fused_cell, *settings)
    return packed._replace(data=data), tuple(final) if len(final) > 1 else final[0]


MODES = {"LSTM": cells.lstm, "GRU": cells.gru, "RNN_TANH": cells.rnn_tanh, "RNN_RELU": cells.rnn_relu}


class TorchStack(Stack, nn.RNNBase):
    """A layer that PyTorch has: its parameters, settings and texts are PyTorch's own."""

    @property
    def fused_cell(self) -> Cell:  # type: ignore[override]
        return MODES[self.mode]

    def flatten_parameters(self) -> None:
        """Lay out the weights anew at the next call.

        Not needed but after a write to few entries of large weights that PyTorch does not see, through
        ``.data`` or NumPy: the layout that the kernels keep follows all else by itself.
        """
        for names in self._all_weights:
            forget(parameters_of(self, names))


class LSTM(TorchStack):
    """``torch.nn.LSTM`` with fused kernels: the same arguments, parameters, shapes and results.

    See :class:`torch.nn.LSTM`, and :meth:`forward` for `lengths` and `reset`.

    Example:
        >>> lstm = LSTM(3, 5)
        >>> y, (h, c) = lstm(torch.zeros(7, 2, 3), lengths=[7, 4])
        >>> y.shape, h.shape, c.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.RNNBase.__init__(
            self, "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype,
        )  # fmt: skip


class GRU(TorchStack):
    """``torch.nn.GRU`` with fused kernels, as :class:`LSTM` is ``torch.nn.LSTM``."""

    fused_autocasts = False  # as PyTorch's

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.RNNBase.__init__(
            self, "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype,
        )  # fmt: skip


class RNN(TorchStack):
    """``torch.nn.RNN`` with fused kernels, as :class:`LSTM` is ``torch.nn.LSTM``."""

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        mode = f"RNN_{check_nonlinearity(nonlinearity).upper()}"
        nn.RNNBase.__init__(
            self, mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


def check_nonlinearity(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
    return nonlinearity


class Recurrent(Stack):
    """A stack of recurrent layers that run any cell.

    Parameters are named as in ``torch.nn.LSTM``, and the learned vectors of the cell likewise (``p_i_l0``).

    Args:
        cell: what :func:`fusedlstm.cell` made of a function, or one of :mod:`fusedlstm.cells`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size: as
            ``torch.nn.LSTM``'s.  A projection needs a cell that does not read its own output.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for an argument that is none of the above.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        # the arguments are looked at, and the parameters named and measured, where the array layers do it
        plan = layers.Recurrent(
            cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        )
        if plan.input_size is None:
            raise TypeError("input_size must be an integer, got None")
        known_cells[cell.key] = cell
        self.cell, self.input_size, self.hidden_size = cell, plan.input_size, plan.hidden_size
        self.num_layers, self.bias, self.batch_first = plan.num_layers, plan.bias, plan.batch_first
        self.dropout, self.bidirectional, self.proj_size = plan.dropout, plan.bidirectional, plan.proj_size
        self._all_weights = [storage.flatten(names) for names in plan._names]
        for name, shape in plan._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def fused_cell(self) -> Cell:  # type: ignore[override]
        return self.cell

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        known_cells[self.cell.key] = self.cell

    def reset_parameters(self) -> None:
        """Draw all parameters evenly between -1 and 1, divided by the root of hidden_size."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        shown = [self.cell.name, str(self.input_size), str(self.hidden_size)]
        for name, default in _DEFAULTS.items():
            if (value := getattr(self, name)) != default:
                shown.append(f"{name}={value}")
        return ", ".join(shown)


_DEFAULTS = {
    "proj_size": 0,
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
}
