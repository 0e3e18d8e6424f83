"""Recurrent layers with fused kernels: LSTM, GRU, RNN, and cells of your own.

Importing this package imports NumPy and nothing else; the kernels' compiler comes with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import cells, math
from .cells import Cell, cell
from .layers import GRU, LSTM, RNN, Recurrent, explain, load

if TYPE_CHECKING:
    from .kernels.cpu.team import get_num_threads, set_num_threads

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "Recurrent",
    "cell",
    "cells",
    "explain",
    "get_num_threads",
    "load",
    "math",
    "set_num_threads",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("get_num_threads", "set_num_threads"):
        from .kernels.cpu import team

        return getattr(team, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
