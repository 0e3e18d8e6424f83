"""PyTorch: modules with the arguments, parameters and results of ``torch.nn``'s, run by our kernels.

:class:`LSTM`, :class:`GRU`, :class:`RNN` and their cells take the place of the modules of the same names;
:class:`Recurrent` runs any cell; :func:`accelerate` turns the modules inside a model into these.

One layer of a stack, both directions of it, is one operator, ``fusedlstm::layer``, and its gradient is
another, ``fusedlstm::layer_backward``; stacking and dropout are PyTorch's.  Gradients of gradients and
tangents replay the layer with PyTorch's own operators; graphs that leave Python get PyTorch's own layers.

From what a user calls down to what the kernels are given:

    conversion, patching    models that exist, and those that other code builds; `hints`: loops over cells
    warmup                  kernels compiled ahead
    modules, cell_modules   layers and cells; `arguments`: what they are given
    operators               one layer as PyTorch sees it: autograd, transforms, compiled graphs
    passes                  ... by the kernels; `records`: what a pass keeps for backward
    replay                  ... by PyTorch's operators, step by step
    export                  ... by PyTorch's layers, in traces and in ONNX
    checks                  what kernels may be given, by the sizes of `shapes`
    prepared                weights as the kernels want them
    arrays                  tensors as arrays
"""

from __future__ import annotations

from ..frameworks import missing

try:
    from .cell_modules import GRUCell, LSTMCell, RNNCell
except ImportError as error:
    raise missing(__name__, error) from error

from .conversion import Report, accelerate, restore
from .modules import GRU, LSTM, RNN, Recurrent
from .patching import patch, patched, unpatch
from .warmup import warm_up

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Report",
    "accelerate",
    "patch",
    "patched",
    "restore",
    "unpatch",
    "warm_up",
]

for _name in __all__:  # where users find them, and pickles look for them
    globals()[_name].__module__ = __name__
