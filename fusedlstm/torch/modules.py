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
    as_computed,
    as_results,
    autocasting,
    check_input,
    check_lengths,
    check_marks,
    check_state,
    described,
    parameters_of,
)
from .export import Unquantized, as_leaf, export_packed, leaves_python, refuse_script
from .masks import TensorSteps
from .operators import apply_layer
from .prepared import forget
from .shapes import known_cells


class Stack(nn.Module):
    """What layers share; their parameters are named by `_all_weights`, for each direction of each layer.

    Call as ``torch.nn``'s layers, with four more arguments:

        lengths: (B,) integers from 0 to T, in any order and on any device: sequences end there.  Outputs past
            the end are zero, the final state is that at the end, and a reverse direction starts there.  That
            of a sequence without steps is the initial one.
        reset: (T, B), or (B, T) if batch_first, or (T,), booleans: where true, the state goes back to the
            initial one before that step.  A reverse direction goes back at the same boundary.
        mask: booleans, shaped as reset: where false, a step is left out, and hands the state on; its output
            is that of the step before, or what has been carried in.
        all_states: whether a third result is asked for: a tuple of the states after each step, the output
            first, (T, L*D, B, P) and (T, L*D, B, H), or without the axis B, zero past the end.
    """

    __prepare_scriptable__ = refuse_script
    qconfig = Unquantized()
    fused_cell: Cell  # what the kernels run
    heads = 1
    weight_dropout = 0.0
    fused_autocasts = True  # whether autocast gives its type to the results, on a CPU too
    fused_precision = "float32"  # of products, unless autocast or the weights say something else
    input_size: Any  # I; of Recurrent, None if the input is that of the gates
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]

    @property
    def first_cell(self) -> Cell:
        """What the kernels run in the first layer."""
        return self.fused_cell

    def forward(
        self,
        input: Tensor | PackedSequence,  # (T, B, I), (B, T, I) or (T, I)
        hx: Tensor | tuple[Tensor, ...] | None = None,  # (L*D, B, P), others (L*D, B, H)
        lengths: Tensor | Sequence[int] | None = None,  # (B,)
        reset: Tensor | None = None,  # (T, B), (B, T) or (T,)
        mask: Tensor | None = None,  # (T, B), (B, T) or (T,)
        all_states: bool | None = None,  # None is False, which traces would make a tensor of
    ) -> Any:
        """Output and final state, as ``torch.nn`` shapes them; and all states if asked for.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if not isinstance(input, Tensor):
            if isinstance(input, PackedSequence):
                if mask is not None or all_states:
                    raise ValueError("a PackedSequence has no mask and no all_states: pad it instead")
                return _run_packed(self, input, hx, lengths, reset)
            return as_leaf(self, input, hx, lengths=lengths, reset=reset, mask=mask, all_states=all_states)
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
            reset = check_marks(self, "reset", reset, input.shape[:-1], batched)
        if mask is not None:
            mask = check_marks(self, "mask", mask, input.shape[:-1], batched)
        all_states = False if all_states is None else all_states
        if type(all_states) is not bool:
            raise TypeError(f"all_states must be True or False, got {described(all_states)}")
        if mask is None or not x.size(0):
            y, final, every = _run(self, x, states, weights, lengths, reset, all_states)
        else:
            y, final, every = _run_masked(self, x, states, weights, lengths, reset, mask, all_states)
        if not batched:
            y, final, every = y.squeeze(1), [part.squeeze(1) for part in final], [p.squeeze(2) for p in every]
        elif self.batch_first:
            y = y.transpose(0, 1)
        end = tuple(final) if len(final) > 1 else final[0]
        return (y, end, tuple(every)) if all_states else (y, end)

    @property
    def features(self) -> int:
        """Of the input."""
        return int(self.input_size)


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
    all_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output (T, B, D*P), the final states and, if asked for, all states (T, L*D, B, size)."""
    directions, count = 2 if module.bidirectional else 1, len(module.fused_cell.states)
    results: list[list[Tensor]] = []
    every: list[list[Tensor]] = []
    given, autocasts = x.dtype, autocasting()
    for level, used in enumerate(weights):
        if len(weights) == 1:
            own = states
        else:
            own = [part[level * directions : (level + 1) * directions] for part in states]
        if level and module.dropout:
            x = nn.functional.dropout(x, module.dropout, module.training)
        cell = module.fused_cell if level else module.first_cell
        if module.training and module.weight_dropout:
            used = _dropped(used, module.weight_dropout, directions, 1 - cell.takes_gates)
        x, own, used, precision = as_computed(module, x, own, used, autocasts)
        x, *rest = apply_layer(
            x, own, used, lengths, reset, cell, directions, all_states, precision, module.heads
        )
        results.append(rest[:count])
        if all_states:
            every.append([torch.stack(x.chunk(directions, -1), 1), *rest[count:]])
    final = results[0] if len(results) == 1 else [torch.cat(parts) for parts in zip(*results)]
    states_of_all = [torch.cat(parts, 1) for parts in zip(*every)]
    autocasts = autocasts and (module.fused_autocasts or x.is_cuda)
    x, final = as_results(x, [*final, *states_of_all], given, autocasts)
    return x, final[:count], final[count:]


def _run_masked(
    module: Stack,
    x: Tensor,
    states: list[Tensor],
    weights: list[list[Tensor]],
    lengths: Tensor | None,
    reset: Tensor | None,
    mask: Tensor,
    all_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same, of steps of which some are left out."""
    marks = [None if part is None else part.to(x.device) for part in (lengths, reset)]
    steps, directions = TensorSteps(mask.to(x.device), *marks), 2 if module.bidirectional else 1
    y, final, every = _run(module, steps.front(x), states, weights, steps.lengths, steps.reset, all_states)

    def before(state: int, n: int) -> Tensor | None:
        return states[state][n] if states else None

    def spread(values: Sequence[Tensor], state: int, first: int) -> list[Tensor]:
        """What all steps show of the values (T, B, size) of places from `first` on."""
        return [
            steps.spread(value, n % directions == 1, before(state, n))
            for n, value in enumerate(values, first)
        ]

    last = (module.num_layers - 1) * directions
    shown = torch.cat(spread(y.chunk(directions, -1), 0, last), -1)
    ends = [
        torch.stack([steps.end(part, n % directions == 1, before(k, n)) for n, part in enumerate(parts)])
        for k, parts in enumerate(final)
    ]
    return shown, ends, [torch.stack(spread(parts.unbind(1), k, 0), 1) for k, parts in enumerate(every)]


def _dropped(weights: list[Tensor], rate: float, directions: int, place: int) -> list[Tensor]:
    """The weights of a layer with dropout of the recurrent ones, by their place in a direction."""
    each = len(weights) // directions
    return [
        nn.functional.dropout(weight, rate) if n % each == place else weight
        for n, weight in enumerate(weights)
    ]


def _run_packed(module: Stack, packed: PackedSequence, hx: Any, lengths: Any, reset: Any) -> Any:
    if lengths is not None or reset is not None:
        raise ValueError("a PackedSequence has lengths of its own, and cannot be reset: pad it instead")
    weights = _weights(module)
    if leaves_python():
        return _export_packed(module, packed, hx, weights)
    padded, ends = pad_packed_sequence(packed)
    check_input(module, padded, weights[0][0])
    states = [] if hx is None else check_state(module, hx, padded.shape[1], True, weights[0][0])
    y, final, _ = _run(module, padded, states, weights, ends, None, False)
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
    settings = (1 + module.bidirectional, module.heads, module.num_layers, module.dropout, module.training)
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
            ``torch.nn.LSTM``'s.  A projection needs a cell that does not read its own output.  With the
            input_size None the input is that of the gates, as in :class:`fusedlstm.Recurrent`.
        device, dtype: of the parameters.
        heads: blocks on the diagonal of the recurrent weights, which are (gates*H, H/heads) then.
        weight_dropout: probability with which, in training, an element of the recurrent weights is set to
            zero for a call; the others are divided by 1 - weight_dropout (Merity et al., 2017).

    A cell with noise runs in evaluation only, where it has none; for training take the layers on arrays.

    Raises:
        TypeError, ValueError: for an argument that is none of the above.
    """

    weight_dropout: float

    def __init__(
        self,
        cell: Cell,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        heads: int = 1,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # the arguments are looked at, and the parameters named and measured, where the array layers do it
        plan = layers.Recurrent(
            cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            heads=heads, weight_dropout=weight_dropout,
        )  # fmt: skip
        self.weight_dropout = plan.weight_dropout
        self.cell, self.input_size, self.hidden_size = cell, plan.input_size, plan.hidden_size
        self.num_layers, self.bias, self.batch_first = plan.num_layers, plan.bias, plan.batch_first
        self.dropout, self.bidirectional, self.proj_size = plan.dropout, plan.bidirectional, plan.proj_size
        self.heads = plan.heads
        self._make_known()
        self._all_weights = [storage.flatten(names) for names in plan._names]
        for name, shape in plan._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def fused_cell(self) -> Cell:  # type: ignore[override]
        if self.cell.noise and self.training:
            raise RuntimeError(
                f"the cell {self.cell.name} has noise, which modules do not draw: call eval(), or train a "
                "layer on arrays, fusedlstm.Recurrent"
            )
        return self.cell.inference

    @property
    def first_cell(self) -> Cell:
        cell = self.fused_cell
        return cell if self._of_gates is None else self._of_gates

    @property
    def features(self) -> int:
        if self.input_size is not None:
            return int(self.input_size)
        return (1 + self.bidirectional) * len(self.cell.gates_with_input) * self.hidden_size

    def _make_known(self) -> None:
        cell = self.cell.inference
        self._of_gates = None if self.input_size is not None else cells.gate_inputs(cell)
        known_cells.update({known.key: known for known in (cell, self._of_gates) if known is not None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = {"heads": 1, "weight_dropout": 0.0}  # pickles of before there were any
        super().__setstate__(defaults | state)  # type: ignore[no-untyped-call]
        self._make_known()

    def reset_parameters(self) -> None:
        """Draw all parameters evenly between -1 and 1, divided by the root of hidden_size, but for those
        vectors whose beginning the cell states."""
        bound = self.hidden_size**-0.5
        for names in self._all_weights:
            own = len(names) - len(self.cell.weights)
            vectors = dict(zip(names[own:], self.cell.weights))
            for name, parameter in zip(names, parameters_of(self, names)):
                beginning = self.cell.beginnings.get(vectors.get(name, ""))
                if beginning is None:
                    nn.init.uniform_(parameter, -bound, bound)
                else:
                    nn.init.constant_(parameter, beginning)

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
    "heads": 1,
    "weight_dropout": 0.0,
}
