"""Which kernels run: "cpu", "cuda" or "reference".

An engine turns the weights of one direction of one layer into a :class:`Direction`, laid out as its
kernels want them; :mod:`fusedlstm.layers` stacks directions into layers.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol, cast

from .cells import Cell
from .weights import Weights

States = tuple[Any, ...]

BACKENDS = ("auto", "cpu", "cuda", "reference")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # of the products of a float32 layer
FORMS = ("auto", "persistent", "stepwise")  # of CUDA kernels

_ENGINES = {
    "cpu": ("fusedlstm.kernels.cpu.engine", "CPU"),
    "cuda": ("fusedlstm.kernels.cuda.engine", "CUDA"),
    "reference": ("fusedlstm.kernels.reference", "Reference"),
}
_HINTS = {
    "cuda": ". It needs an NVIDIA GPU, numba-cuda and CuPy, for the driver's version of CUDA: "
    "pip install 'fusedlstm[cuda12]' or 'fusedlstm[cuda13]'"
}
_loaded: dict[tuple[str, str, str], Engine] = {}


class Direction(Protocol):
    """One direction of one layer, ready to run.  P is the size of the output: proj_size or H.

    The arrays given are valid: shapes and types have been checked, the last axis is contiguous.
    `forward` and `backward` may be called from many threads at once.
    """

    def forward(
        self,
        x: Any,  # (T, B, I)
        initial: States | None,  # (B, P) for the output, (B, H) for other states; None is zero
        y: Any,  # (T, B, P), written; may be a slice of the last axis of a wider array
        final: States,  # shaped as the initial states, written
        lengths: Any | None,  # (B,) int64, 1 <= length <= T
        reset: Any | None,  # (T, B) bool
        reverse: bool,
        training: bool,
    ) -> Any:
        """Run all steps; the tape that `backward` takes if training, else None."""

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, P)
        dfinal: States | None,  # shaped as the final states; None is zero
        dx: Any,  # (T, B, I), written or added to
        accumulate: bool,  # whether dx is added to
    ) -> tuple[States, Weights]:
        """The gradients of the initial states and of the weights.  A tape may be used again."""

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """Which kernel, tile, threads and layout would run, and why."""


class Engine(Protocol):
    """A set of kernels."""

    def prepare(self, cell: Cell, weights: Weights) -> Direction:
        """Lay out weights for the kernels; they are not modified afterwards."""


def check_projection(cell: Cell, weights: Weights) -> None:
    """Refuse a projection for a cell that reads its own output, which has another size then.

    Raises:
        ValueError: if there is one.
    """
    if weights.hr is not None and cell.reads_output:
        raise ValueError(f"cell {cell.name} reads its own output, so it cannot have a projection")


def backend_for(backend: str, x: Any) -> str:
    """The backend that takes the array x: "cpu", "cuda" or "reference".

    Raises:
        TypeError: if x does not lie where the backend's kernels run.
    """
    device = hasattr(x, "__cuda_array_interface__")
    if backend == "auto":
        return "cuda" if device else "cpu"
    if backend == "cuda" and not device and not simulated():
        raise TypeError("backend 'cuda' takes CuPy arrays, got a NumPy array; use cupy.asarray")
    if backend != "cuda" and device:
        raise TypeError(f"backend {backend!r} takes NumPy arrays, got a CuPy array; use cupy.asnumpy")
    return backend


def simulated() -> bool:
    """Whether CUDA kernels run in Numba's simulator, on NumPy arrays."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def engine(backend: str, x: Any = None, precision: str = "float32", form: str = "auto") -> Engine:
    """The engine of a backend, loaded when it is first needed; "auto" picks by where x lies.

    Raises:
        ImportError: if the backend needs a package that is not installed.
        RuntimeError: if it needs a GPU that is not there.
        ValueError: if it has no kernels of that precision or form.
    """
    name = backend_for(backend, x)
    key = (name, precision, form)
    if key in _loaded:
        return _loaded[key]
    options: dict[str, Any] = {}
    if name == "cuda":
        options = {"precision": precision, "form": None if form == "auto" else form}
    elif (precision, form) != ("float32", "auto"):
        raise ValueError(
            f"precision {precision!r} and form {form!r} are for CUDA kernels, but backend {name!r} would "
            "run: give CuPy arrays, or leave both at their defaults"
        )
    module, engine_class = _ENGINES[name]
    try:
        made = cast(Engine, getattr(importlib.import_module(module), engine_class)(**options))
    except ImportError as error:
        raise ImportError(f"backend {name!r} cannot be loaded: {error}{_HINTS.get(name, '')}") from error
    return _loaded.setdefault(key, made)  # of two threads, the first
