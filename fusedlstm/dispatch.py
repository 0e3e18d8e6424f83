"""Which kernels run: "cpu", "cuda" or "reference".

An engine turns the weights of one direction of one layer into a :class:`Direction`, laid out as its
kernels want them; :mod:`fusedlstm.layers` stacks directions into layers.
"""

from __future__ import annotations

import importlib
import os
import reprlib
import sys
from importlib import metadata
from typing import Any, Protocol, cast

import numpy as np

from .cells import Cell
from .once import making
from .weights import Weights

States = tuple[Any, ...]

# of the products of a float32 layer, by backend
PRECISIONS_OF = {
    "cpu": ("float32", "bfloat16", "int8"),
    "cuda": ("float32", "tf32", "bfloat16", "float16"),
    "reference": ("float32",),
}
PRECISIONS = PRECISIONS_OF["cuda"]
# What a layer can be told of the machine that it runs on, the default first.
OPTIONS = {
    "backend": ("auto", "cpu", "cuda", "reference"),
    "precision": (*PRECISIONS, "int8"),
    "form": ("auto", "persistent", "stepwise"),  # of CUDA kernels
}

_ENGINES = {
    "cpu": ("fusedlstm.kernels.cpu.engine", "CPU"),
    "cuda": ("fusedlstm.kernels.cuda.engine", "CUDA"),
    "reference": ("fusedlstm.kernels.reference", "Reference"),
}
_NEEDED = {"cpu": ("numpy", "numba"), "cuda": ("numpy", "numba", "numba-cuda"), "reference": ("numpy",)}
INSTALL_CUDA = "in the checkout: pip install -e '.[cuda12]' or '.[cuda13]', for your driver's version of CUDA"
_loaded: dict[tuple[str, str, str], Engine] = {}

_ON_GPU = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


class Direction(Protocol):
    """One direction of one layer, ready to run.  P is the size of the output: proj_size or H.

    The arrays given are valid: shapes and types have been checked, no axis is empty, the last one is
    contiguous.
    `forward` and `backward` may be called from many threads at once.
    """

    def forward(
        self,
        x: Any,  # (T, B, I)
        initial: States | None,  # (B, P) for the output, (B, H) for other states; None is zero
        y: Any,  # (T, B, P), written; may be a slice of the last axis of a wider array
        final: States,  # shaped as the initial states, written
        lengths: Any | None,  # (B,) int64, 0 <= length <= T
        reset: Any | None,  # (T, B) bool
        reverse: bool,
        training: bool,
        # (T, B, H) each, written: the states but the output after each step, zero past the end; None, also in
        # the place of some, if they are not wanted
        states: States | None = None,
    ) -> Any:
        """Run all steps; the tape that `backward` takes if training, else None."""

    def backward(
        self,
        tape: Any,
        dy: Any,  # (T, B, P)
        dfinal: States | None,  # shaped as the final states; None is zero
        dx: Any | None,  # (T, B, I), written or added to; None if it is not wanted, which saves its product
        accumulate: bool,  # whether dx is added to
        dstates: States | None = None,  # (T, B, H) each, of the states but the output after each step
    ) -> tuple[States, Weights]:
        """The gradients of the initial states and of the weights.  A tape may be used again."""

    def explain(self, steps: int, batch: int, training: bool) -> dict[str, str]:
        """Which kernel, tile, threads and layout would run, and why."""


class TwiceDifferentiable(Direction, Protocol):
    """A direction whose kernels also compute tangents, of which second derivatives are made."""

    def tangent(
        self,
        tape: Any,  # of a forward pass
        x: Any | None,  # (T, B, I): tangents from here on; None is zero
        initial: States | None,
        weights: Weights,  # of which each may be None
        y: Any,  # (T, B, P), written
        final: States,  # written
        states: States | None = None,  # (T, B, H) each, written
    ) -> Any:
        """The tangent of that pass; what `backward_tangent` needs of it."""

    def backward_tangent(
        self,
        tape: Any,
        tangent: Any,
        dy: Any,  # (T, B, P): of the backward pass after it
        dfinal: States | None,
        dx: Any | None,  # (T, B, I), written; None if it is not wanted
        dstates: States | None = None,  # (T, B, H) each
    ) -> tuple[States, Weights]:
        """The tangents of what `backward` writes and returns, where dy and dfinal do not move."""


class Repeatable(Direction, Protocol):
    """A direction that can be bound to arrays."""

    def repeated(self, x: Any, y: Any, states: States) -> Any:
        """A forward pass over these arrays, as :meth:`Direction.forward` takes them, which `run()` runs.

        Again and again, over what they hold then; the final states take the place of the initial ones.
        That they are written to once before is part of it.
        """


class Engine(Protocol):
    """A set of kernels."""

    def prepare(self, cell: Cell, weights: Weights) -> Direction:
        """Lay out weights for the kernels; they are not modified afterwards."""


def check_options(**options: Any) -> None:
    """Refuse a value that is none of :data:`OPTIONS`.

    Raises:
        ValueError: for the first such value.
    """
    for name, value in options.items():
        if value not in OPTIONS[name]:
            raise ValueError(f"{name} must be one of {', '.join(OPTIONS[name])}, got {value!r}")


def check_projection(cell: Cell, weights: Weights) -> None:
    """Refuse a projection for a cell that cannot have one.

    Raises:
        ValueError: if there is one.
    """
    if weights.hr is not None and cell.unprojectable:
        raise ValueError(f"cell {cell.name} cannot have a projection: {cell.unprojectable}")


def taken(name: str, value: Any) -> Any:
    """The array `value` as one of NumPy or CuPy over the same memory; theirs are returned as they are.

    Any other array on a GPU becomes CuPy's, by DLPack or ``__cuda_array_interface__``; one on the host
    becomes NumPy's, by DLPack.  Of the two protocols DLPack comes first: with it the producer makes
    CuPy's current stream wait for the array, where the other one has the host wait.

    Raises:
        TypeError: if it is no array, or cannot be taken without a copy; it names the argument.
        ImportError: if it lies on a GPU and CuPy is not installed.
    """
    if _is_cupy(value):
        return value
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return value
    on_gpu = lies_on_gpu(value)
    by_dlpack = hasattr(value, "__dlpack_device__") and not isinstance(value, np.ndarray)
    if not by_dlpack and not on_gpu:
        raise TypeError(
            f"{name} must be a NumPy or CuPy array, got {type(value).__name__}, which has neither DLPack nor "
            "__cuda_array_interface__"
        )
    xp = _cupy() if on_gpu else np
    try:
        return xp.from_dlpack(value) if by_dlpack else xp.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}, a {type(value).__name__}, cannot be taken as an array: {error}") from error


def lies_on_gpu(value: Any) -> bool:
    """Whether `value` is an array in the memory of a GPU."""
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) in _ON_GPU


def on_host(name: str, value: Any) -> np.ndarray:
    """Anything like an array as one of NumPy; what lies on a GPU is copied, and waited for.

    A tensor of PyTorch is detached from its graph; its types of 8 and 16 bits, which NumPy lacks in part,
    become float32, which holds all their values.

    Raises:
        TypeError: if it is nothing like an array; it names the argument.
        ImportError: if it lies on a GPU and CuPy is not installed.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, which would be ignored; fill it first")
    torch = sys.modules.get("torch")  # no tensor without it
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            return np.asarray(value.float() if value.is_floating_point() and value.itemsize < 4 else value)
        return np.asarray(taken(name, value).get() if lies_on_gpu(value) else value)
    except (RuntimeError, TypeError, ValueError) as error:
        what = reprlib.repr(value) if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be an array or regular lists, got {what}: {error}") from error


def device_of(array: Any) -> Any:
    """The GPU that an array of CuPy lies on; None for one of NumPy."""
    return array.device if _is_cupy(array) else None


def elsewhere(device: Any) -> bool:
    """Whether `device` is a GPU, and not the current one, where CuPy would put new arrays."""
    return device is not None and bool(device != sys.modules["cupy"].cuda.Device())


def _is_cupy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "cupy"


def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except Exception as error:  # as when an engine is loaded
        raise ImportError(
            f"arrays on a GPU cannot be taken: {error}. They need CuPy: {INSTALL_CUDA}"
        ) from error


def backend_for(backend: str, x: Any) -> str:
    """The backend that takes the array x, or any that it can if x is None: "cpu", "cuda" or "reference".

    Raises:
        TypeError: if x does not lie where the backend's kernels run.
    """
    on_gpu = lies_on_gpu(x)
    if backend == "auto":
        return "cuda" if on_gpu else "cpu"
    if backend == "cuda" and x is not None and not on_gpu and not simulated():
        raise TypeError("backend 'cuda' takes CuPy arrays, got a NumPy array; use cupy.asarray")
    if backend != "cuda" and on_gpu:
        raise TypeError(f"backend {backend!r} takes NumPy arrays, got a CuPy array; use cupy.asnumpy")
    return backend


def simulated() -> bool:
    """Whether CUDA kernels run in Numba's simulator, on NumPy arrays."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def _explained(error: Exception, name: str) -> str:
    """Why an engine cannot be imported, what there is of the packages that it needs, and how to get them."""
    why = str(error).partition("\n")[0]  # lists of folders may follow
    if not isinstance(error, ImportError):
        why = f"{type(error).__name__}: {why}"
    there = ", ".join(f"{package} {_version(package)}" for package in _NEEDED[name])
    advice = f". It needs an NVIDIA GPU, numba-cuda and CuPy: {INSTALL_CUDA}" if name == "cuda" else ""
    return f"{why} (with {there}){advice}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


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
    wrong = [] if precision in PRECISIONS_OF[name] else [f"precision {precision!r}"]
    if name != "cuda" and form != "auto":
        wrong.append(f"form {form!r}")
    if wrong:
        able = ["cuda"]  # that have forms
        if precision not in PRECISIONS_OF[name]:
            able = [other for other, known in PRECISIONS_OF.items() if precision in known]
        raise ValueError(
            f"only {' and '.join(map(str.upper, able))} kernels have {' and '.join(wrong)}, but backend "
            f"{name!r} would run: give another backend or arrays of another kind, or leave this out"
        )
    options: dict[str, Any] = {} if name == "reference" else {"precision": precision}
    if name == "cuda":
        options["form"] = None if form == "auto" else form
    path, engine_class = _ENGINES[name]
    try:
        with making:  # no fork cuts the import in two
            module = importlib.import_module(path)
    except Exception as error:  # packages whose versions do not fit raise anything
        raise ImportError(f"backend {name!r} cannot be loaded: {_explained(error, name)}") from error
    made = cast(Engine, getattr(module, engine_class)(**options))
    return _loaded.setdefault(key, made)  # of two threads, the first
