"""Recurrent layers with fused kernels: LSTM, GRU, RNN, and cells of your own.

Importing this package imports NumPy and nothing else; the kernels' compiler comes with the first call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    # A checkout, whose kernels and benchmarks lie beside this folder.  So it need not be installed, and
    # `python -m benchmarks.gpu` there finds them also where another copy is installed.
    __path__.append(os.path.dirname(__path__[0]))
    if not os.path.isdir(os.path.join(__path__[-1], "kernels", "cpu")):
        raise ImportError(
            f"the kernels of fusedlstm are missing: they lie neither in {__path__[0]} nor beside it. In a "
            "clone of the repository, run: pip install -e ."
        )

from . import cells, math
from .cells import Cell, cell
from .layers import GRU, LSTM, RNN, Recurrent, explain, load

if TYPE_CHECKING:
    from .accuracy import Comparison, compare
    from .kernels.cpu.team import get_num_threads, set_num_threads

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "Comparison",
    "Recurrent",
    "cell",
    "cells",
    "compare",
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
    if name in ("Comparison", "compare"):
        from . import accuracy

        return getattr(accuracy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
