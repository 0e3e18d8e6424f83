"""Models that exist: their modules become ours, in place, and PyTorch's again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from .arrays import NUMPY
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_MARK = "_fusedlstm_accelerated"


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; prints as text.

    Attributes:
        replaced: names of the modules that our kernels run now, and what they are.
        skipped: names of the recurrent modules that were left as they are, and why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.skipped)} not"]
        lines += [f"  {name or 'the model itself'}: {text}" for name, text in self.replaced.items()]
        lines += [f"  {name or 'the model itself'}: left, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Let our kernels run every ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and cell of a model, in place.

    The modules stay the objects that they are and change their class: parameters, hooks, settings and
    everything that refers to them go on working.  :func:`restore` undoes it.

    Example:
        >>> print(accelerate(nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5))))
        1 replaced, 0 not
          1: LSTM(4, 5)
    """
    report = Report()
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_OURS)) or type(module) in _THEIRS:
            continue
        if reason := _obstacle(module):
            report.skipped[name] = reason
        else:
            module.__class__ = _OURS[cast("type[nn.Module]", type(module))]
            module.__dict__[_MARK] = True
            report.replaced[name] = repr(module)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`accelerate`; the names of the modules that are PyTorch's again.

    Raises:
        TypeError: if a module has become another class since; then nothing is changed.
    """
    marked = {name: module for name, module in model.named_modules() if _MARK in module.__dict__}
    for name, module in marked.items():
        if type(module) not in _THEIRS:
            raise TypeError(
                f"{name or 'the model itself'} has become a {type(module).__name__} since: undo that first, "
                "a parametrization with torch.nn.utils.parametrize.remove_parametrizations"
            )
    for module in marked.values():
        del module.__dict__[_MARK]
        module.__class__ = _THEIRS[cast("type[nn.Module]", type(module))]
    return list(marked)


def _obstacle(module: Any) -> str | None:
    """Why a recurrent module cannot be run by our kernels, if it cannot."""
    if type(module) not in _OURS:
        return f"{type(module).__name__} is a class of its own, which may do something else"
    for name, parameter in module.named_parameters():
        if parameter.dtype not in NUMPY:
            return f"{name} is {parameter.dtype}, and the kernels compute in float32 or float64"
        if parameter.device.type not in ("cpu", "cuda"):
            return f"{name} lies on {parameter.device}, and the kernels run on CPUs and CUDA devices"
    return None
