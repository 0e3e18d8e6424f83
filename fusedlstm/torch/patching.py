"""Models that other code builds or loads: modules become ours as soon as PyTorch has made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from ..once import fork_lock
from .conversion import convert

_lock = fork_lock()
_theirs: list[tuple[type[nn.Module], str, Any]] = []  # what classes had in the places of ours; None: nothing


def patch(*, cells: bool = False) -> None:
    """From now on let our kernels run every recurrent module of PyTorch's that is built or loaded.

    As :func:`accelerate` does to the modules of a model, with the same `cells`; :func:`restore` undoes it for
    a model.  It holds for the whole process, until :func:`unpatch`; patching twice is patching once.
    """
    with _lock:
        if _theirs:
            return
        for base in (nn.RNNBase, nn.RNNCellBase):
            for name in ("__init__", "__setstate__"):
                _theirs.append((base, name, vars(base).get(name)))
                setattr(base, name, _converting(getattr(base, name), cells))


def unpatch() -> None:
    """Undo :func:`patch`; modules that have been made meanwhile stay as they are."""
    with _lock:
        for base, name, function in _theirs:
            if function is None:
                delattr(base, name)
            else:
                setattr(base, name, function)
        _theirs.clear()


@contextmanager
def patched(*, cells: bool = False) -> Iterator[None]:
    """:func:`patch` for what is built or loaded inside.

    For models that are built in a ``fit()`` or from a checkpoint:

        >>> with patched():
        ...     model = nn.Sequential(nn.LSTM(3, 5))
        >>> type(model[0]).__module__
        'fusedlstm.torch'
    """
    before = bool(_theirs)
    patch(cells=cells)
    try:
        yield
    finally:
        if not before:
            unpatch()


def _converting(function: Callable[..., None], cells: bool) -> Callable[..., None]:
    """What fills a module, and then converts it."""

    @wraps(function)
    def fill(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        function(self, *args, **kwargs)
        convert(self, cells=cells)

    return fill
