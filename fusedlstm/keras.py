"""Keras 3: layers with the arguments, weights and results of ``keras.layers``', run by our kernels.

:class:`LSTM`, :class:`GRU` and :class:`SimpleRNN` take the place of the layers of the same names.  Each is a
layer of Keras whose run over time, and nothing else, is ours.  Sizes in the comments and docstrings:

    B  batch        I  features of the input
    T  time steps   H  units
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from . import cells
from .cells import Cell
from .weights import GATE_ORDERS

__all__ = ["GRU", "LSTM", "SimpleRNN"]

_BACKEND = keras.backend.backend()
_PACKAGE = "fusedlstm"  # under which layers are registered in files


class _Fused(layers.RNN):
    """What the layers share: the run over time."""

    @property
    def _mathematics(self) -> Cell:
        """The cell of ours that computes what Keras's does."""
        raise NotImplementedError

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        """The last output (B, H), all outputs (B, T, H), and the final states (B, H) each."""
        self._refuse(mask, training)
        x = sequences
        states = list(keras.tree.flatten(initial_state))
        if self.stateful:  # what is kept is written before backward reads it
            states = [ops.copy(state) for state in states]
        if self.go_backwards:
            x = ops.flip(x, axis=1)
        y, finals = _run_torch(x, states, self._weights(), self._mathematics)
        return finals[0], y, finals

    def _refuse(self, mask: Any, training: bool) -> None:
        """What has no kernels yet."""
        name = type(self).__name__
        if _BACKEND != "torch":
            raise NotImplementedError(f"{name}: the backend {_BACKEND!r} is not supported yet; use 'torch'")
        if mask is not None:
            raise NotImplementedError(f"{name}: masks are not supported yet")
        if training and (self.dropout or self.recurrent_dropout):
            raise NotImplementedError(f"{name}: dropout is not supported yet")
        gate = getattr(self, "recurrent_activation", keras.activations.sigmoid)
        if self.activation is not keras.activations.tanh or gate is not keras.activations.sigmoid:
            raise NotImplementedError(f"{name}: activations but tanh and sigmoid are not supported yet")
        if not getattr(self.cell, "reset_after", True):
            raise NotImplementedError(f"{name}: reset_after=False is not supported yet")

    def _weights(self) -> list[Any]:
        """The weights of the cell in the layout of ours: (gates*H, I), (gates*H, H), and two biases."""
        cell = self.cell
        kernels = [ops.transpose(self._ordered(kernel)) for kernel in (cell.kernel, cell.recurrent_kernel)]
        if cell.bias is None:
            return kernels
        bias = self._ordered(cell.bias)
        if len(bias.shape) == 2:
            return [*kernels, bias[0], bias[1]]
        return [*kernels, bias, ops.zeros_like(bias)]

    def _ordered(self, weight: Any) -> Any:
        """A weight with its gates, along the last axis, in the order of our cell."""
        ours = self._mathematics.gates
        theirs = GATE_ORDERS["keras"].get(self._mathematics.name, ours)
        weight = ops.convert_to_tensor(weight)
        if theirs == ours:
            return weight
        parts = ops.split(weight, len(ours), axis=-1)
        return ops.concatenate([parts[theirs.index(gate)] for gate in ours], axis=-1)


@keras.saving.register_keras_serializable(_PACKAGE)
class LSTM(_Fused, layers.LSTM):
    """``keras.layers.LSTM`` with fused kernels."""

    @property
    def _mathematics(self) -> Cell:
        return cells.lstm


@keras.saving.register_keras_serializable(_PACKAGE)
class GRU(_Fused, layers.GRU):
    """``keras.layers.GRU`` with fused kernels."""

    @property
    def _mathematics(self) -> Cell:
        return cells.gru


@keras.saving.register_keras_serializable(_PACKAGE)
class SimpleRNN(_Fused, layers.SimpleRNN):
    """``keras.layers.SimpleRNN`` with fused kernels."""

    @property
    def _mathematics(self) -> Cell:
        return cells.rnn_tanh


def _run_torch(x: Any, initial: list[Any], weights: list[Any], cell: Cell) -> Any:
    from . import torch as adapter

    adapter._cells.setdefault(cell.key, cell)
    states = [state.unsqueeze(0) for state in initial]
    y, *finals = adapter._apply(x.transpose(0, 1), states, weights, None, None, cell, 1)
    return y.transpose(0, 1), [final.squeeze(0) for final in finals]
