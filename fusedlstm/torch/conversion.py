"""Models that exist: their modules become ours, in place, and PyTorch's again.

A module changes its class.  A class of the user's own stays what it is, and ours comes between it and
PyTorch's, in the order in which Python looks for methods: so what it inherits, and what it reaches by
``super()``, is ours.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, ClassVar, Generic, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import dispatch
from .arrays import NUMPY
from .cell_modules import GRUCell, LSTMCell, RNNCell, Single
from .hints import loops
from .modules import GRU, LSTM, RNN, Stack, TorchStack

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
    """What :func:`accelerate` did; prints as text.  Modules are named by their paths in the model.

    Attributes:
        replaced: the modules that our kernels run now, and what they are.
        skipped: the recurrent modules that were left as they are, and why.
        shared: further paths of modules, and the first one of each.
        hints: modules that call a cell in a loop over time, and what would take its place.
        kernels: what the first calls compile, unless it is kept on disk.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.skipped)} not"]
        for entries, text in (
            (self.replaced, "{}"),
            (self.skipped, "left, {}"),
            (self.shared, "the module {}"),
            (self.hints, "{}"),
        ):
            lines += [
                f"  {name or 'the model itself'}: {text.format(value)}" for name, value in entries.items()
            ]
        if self.kernels:
            lines.append(
                f"First calls compile {', '.join(self.kernels)}, which takes seconds where it is not kept on "
                "disk yet; warm_up(model) does it now"
            )
        return "\n".join(lines)


def accelerate(model: nn.Module, precision: str = "float32") -> Report:
    """Let our kernels run every ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and cell of a model, in place.

    The modules stay the objects that they are and change their class: parameters, hooks, settings and
    everything that refers to them go on working.  So do classes that inherit from PyTorch's, if they
    inherit ``forward`` too or call it by ``super()``.  :func:`restore` undoes it.

    Args:
        model: of which modules are to be changed.
        precision: of what products multiply, as for :class:`fusedlstm.Recurrent`: "bfloat16" for training
            and inference, "int8" for inference.  Parameters stay as they are, and so do results.  Modules
            that are accelerated already take it too.

    Raises:
        ValueError: for a precision that there is not.

    Example:
        >>> report = accelerate(nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5)))
        >>> report.replaced
        {'1': 'LSTM(4, 5)'}
    """
    dispatch.check_options(precision=precision)
    report = Report()
    kernels: dict[str, None] = {}
    for name, module in model.named_modules():
        if reason := _obstacle(module):
            report.skipped[name] = reason
        elif convert(module):
            report.replaced[name] = repr(module)
            kernels[_kernels(module)] = None
        if isinstance(module, (Stack, Single)):
            _set_precision(module, precision)
        if hint := loops(module):
            report.hints[name] = hint
    report.kernels.extend(kernels)
    report.shared.update(_shared(model, {*report.replaced, *report.skipped}))
    return report


def _set_precision(module: Any, precision: str) -> None:
    """Say so on the module, where it differs from what its class says."""
    module.__dict__.pop("fused_precision", None)
    if precision != module.fused_precision:
        module.__dict__["fused_precision"] = precision


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`accelerate`; the names of the modules that are PyTorch's again.

    Raises:
        TypeError: if a module has become another class since; then nothing is changed.
    """
    found = {}
    for name, module in model.named_modules():
        if _MARK in module.__dict__:
            theirs = _original(type(module), _is_parametrized(module))
            if theirs is None:
                what = f"{name or 'the model itself'} has become a {type(module).__name__}"
                raise TypeError(f"{what} since: undo that first")
            found[name] = module, theirs
    for module, theirs in found.values():
        del module.__dict__[_MARK]
        module.__dict__.pop("fused_precision", None)
        module.__class__ = theirs
    return list(found)


def convert(module: nn.Module) -> bool:
    """Let our kernels run a module, if they can; whether it has changed."""
    if not _is_pytorchs(module) or _obstacle(module):
        return False
    module.__class__ = _accelerated(type(module), _is_parametrized(module))
    module.__dict__[_MARK] = True
    return True


def _is_pytorchs(module: nn.Module) -> bool:
    return isinstance(module, tuple(_OURS)) and not isinstance(module, (Stack, Single))


def _is_parametrized(module: nn.Module) -> bool:
    """Whether its class is one that :mod:`torch.nn.utils.parametrize` has made."""
    cls = type(module)
    return parametrize.is_parametrized(module) and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"


def _kernels(module: Any) -> str:
    parameter = next(module.parameters())
    projected = " with a projection" if getattr(module, "proj_size", 0) else ""
    return f"{module.fused_cell.name} in {str(parameter.dtype).removeprefix('torch.')}{projected}"


def _shared(model: nn.Module, names: set[str]) -> Iterator[tuple[str, str]]:
    """Other paths of the modules with these names."""
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(module, name) != name and first[module] in names:
            yield name, first[module]


# --- Classes ---------------------------------------------------------------------------------------------


class _Between:
    """What comes between a class of PyTorch's and one of the user's, as which the modules are pickled.

    Not in front of it: Python gives an object another class only if both have the same first bases.
    """

    _original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        cls, *arguments = reduced[1]
        original = cls._original
        return (_new, (original, *arguments), *reduced[2:]) if cls is _made.get(original) else reduced


def _new(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """An empty module, as pickle makes it before it fills it."""
    cls = _subclass(original)
    return cls.__new__(cls, *arguments)


class _LSTM(_Between, TorchStack, nn.LSTM):
    pass


class _GRU(_Between, TorchStack, nn.GRU):
    fused_autocasts = GRU.fused_autocasts


class _RNN(_Between, TorchStack, nn.RNN):
    pass


class _LSTMCell(_Between, LSTMCell):
    pass


class _GRUCell(_Between, GRUCell):
    pass


class _RNNCell(_Between, RNNCell):
    pass


_BETWEEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: _LSTM,
    nn.GRU: _GRU,
    nn.RNN: _RNN,
    nn.LSTMCell: _LSTMCell,
    nn.GRUCell: _GRUCell,
    nn.RNNCell: _RNNCell,
}
_made: dict[type[nn.Module], type[nn.Module]] = {}  # of classes of the user's


def _accelerated(cls: type[nn.Module], parametrized: bool) -> type[nn.Module]:
    """What a class of PyTorch's, or one that inherits from it, becomes."""
    if parametrized:
        return _rebased(cls, _accelerated(cls.__bases__[0], False))
    return _OURS.get(cls) or _subclass(cls)


def _original(cls: type[nn.Module], parametrized: bool) -> type[nn.Module] | None:
    """What it was; none if it is something else."""
    if parametrized:
        base = _original(cls.__bases__[0], False)
        return None if base is None else _rebased(cls, base)
    return _THEIRS.get(cls) or vars(cls).get("_original")


def _rebased(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A class that :mod:`torch.nn.utils.parametrize` has made, made of another one.

    When the last parametrization goes, PyTorch gives a module the first base of its class.
    """
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    kind: Any = type(cls)
    return cast("type[nn.Module]", kind(f"Parametrized{base.__name__}", (base,), own))


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    made: Any = _made.get(cls)
    if made is None:
        own = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        bases = cls, _BETWEEN[_base(cls)]
        kind: Any = type(cls)
        _made[cls] = made = kind(cls.__name__, bases, own | {"_original": cls})
    return cast("type[nn.Module]", made)


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of PyTorch's that it is or inherits from."""
    return next(base for base in cls.__mro__ if base in _OURS)


# --- What stands in the way ------------------------------------------------------------------------------

# Which our forward does not call; who has one of their own means it to be called.
_PARTS = (
    "check_input", "check_hidden_size", "check_forward_args", "permute_hidden", "get_expected_hidden_size",
    "all_weights",
)  # fmt: skip


def _obstacle(module: Any) -> str | None:
    """Why a recurrent module cannot be run by our kernels, if it cannot."""
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name in {cls.__name__ for cls in _OURS}:
            return "it has been compiled by TorchScript: accelerate the model before torch.jit sees it"
        return None
    if not _is_pytorchs(module):
        return None
    cls = type(module).__bases__[0] if _is_parametrized(module) else type(module)
    if cls not in _OURS and (reason := _obstacle_in(cls)):
        return reason
    for name, parameter in module.named_parameters():
        if parameter.dtype not in NUMPY:
            return f"{name} is {parameter.dtype}, and the kernels compute in float32 or float64"
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            return f"{name} lies on {parameter.device}, and the kernels run on CPUs and CUDA devices"
    return None


def _obstacle_in(cls: type[nn.Module]) -> str | None:
    """Why ours cannot come between a class and PyTorch's."""
    classes = cls.__mro__[: cls.__mro__.index(_base(cls))]
    own = {name: value for each in reversed(classes) for name, value in vars(each).items()}
    if "forward" in own and not any(map(_calls_forward, own.values())):
        return f"{cls.__name__} has a forward of its own, which does not call super().forward"
    if changed := [name for name in _PARTS if name in own]:
        return f"{cls.__name__} has its own {changed[0]}, which our forward would not call"
    if any("__init_subclass__" in vars(each) for each in classes if each is not Generic):
        return f"{cls.__name__} has __init_subclass__, which another class would call"
    try:
        _subclass(cls)
    except TypeError as error:
        return f"{cls.__name__} cannot be inherited from: {error}"
    return None


def _calls_forward(value: Any) -> bool:
    """Whether a member of a class calls ``super().forward``."""
    value = getattr(value, "__func__", value)
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return isinstance(value, FunctionType) and {"super", "forward"} <= set(value.__code__.co_names)
