"""What kernels may be given: they work on addresses, so that anything else would be a crash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import weights as storage
from ..cells import Cell
from .arrays import NUMPY, STRIDED, as_array
from .records import Given, Record
from .shapes import Shape, Sizes

_Named = tuple[str, Tensor, Sequence[int]]  # an argument, and the shape that it must have


def check_forward(x: Tensor, initial: list[Tensor], weights: list[Tensor], shape: Shape) -> None:
    """Refuse an input and states that do not fit the weights, which are looked at in `direction_of`.

    Raises:
        RuntimeError, TypeError: for the first that does not fit; it names the argument.
    """
    if not shape.steps:
        raise RuntimeError(f"input must have one time step at least, got the shape {tuple(x.shape)}")
    dtype = x.dtype
    # what `check_tensors` would find, in little time
    fits = dtype in NUMPY and x.layout is STRIDED and x.is_cpu and x.data_ptr() != 0
    if initial:
        for part in initial:
            fits = fits and part.dtype is dtype and part.layout is STRIDED
            fits = fits and part.is_cpu and part.data_ptr() != 0
        fits = fits and [part.shape for part in initial] == shape.states
    if not fits:
        check_tensors(named_inputs(x, initial, weights, shape), x)


def fits_step(x: Tensor, initial: Sequence[Tensor], shape: Shape) -> bool:
    """Whether an input (B, I) and states (B, size) are dense, on the host, and fit the weights of a cell."""
    dtype = x.dtype
    fits = dtype in NUMPY and x.layout is STRIDED and x.is_cpu and x.data_ptr() != 0
    for part, (_, *size) in zip(initial, shape.states):
        fits = fits and part.dtype is dtype and part.layout is STRIDED and [*part.shape] == size
        fits = fits and part.is_cpu and part.data_ptr() != 0
    return fits


def check_backward(
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    shape: Shape,
    every: bool,
    record: Record | None,
) -> None:
    """Refuse arguments that do not fit each other, or the forward pass.

    Raises:
        RuntimeError, TypeError: for the first that does not fit; it names the argument.
    """
    now, results = Given(shape, len(initial), every, x.dtype, x.device), shape.results_with(every)
    if record is not None and record.given != now:
        raise RuntimeError(
            "input, states or weights have been given other data between forward and backward: there were "
            f"{record.given}; there are {now}"
        )
    tensors = [y, *grads, x, *initial, *weights]
    _, each = _expected(shape.cell, len(weights) // shape.directions, shape.layer)
    shapes = [
        results[0],
        *results,
        shape.input,
        *(shape.states if initial else ()),
        *each * shape.directions,
    ]
    fits = x.dtype in NUMPY and [tensor.shape for tensor in tensors] == shapes  # as above
    for tensor in tensors:
        fits = fits and tensor.dtype is x.dtype and tensor.layout is STRIDED
        fits = fits and tensor.is_cpu and tensor.data_ptr() != 0
    if not fits:
        check_tensors([*named_inputs(x, initial, weights, shape), *_named_results(y, grads, results)], x)


def check_shapes(named: Iterable[_Named]) -> None:
    """Refuse tensors of another shape than is said; whatever else they are.

    Raises:
        RuntimeError: for the first; it names the argument.
    """
    for name, tensor, shape in named:
        if tensor.shape != tuple(shape):
            raise RuntimeError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_tensors(named: Iterable[_Named], like: Tensor) -> None:
    """Refuse tensors of another shape than is said, or of another type or device than `like`.

    Raises:
        RuntimeError, TypeError: for the first; it names the argument.
    """
    for name, tensor, shape in named:
        check_shapes([(name, tensor, shape)])
        if tensor.dtype is not like.dtype:
            raise RuntimeError(f"{name} must be {like.dtype}, as what it goes with, got {tensor.dtype}")
        if tensor.dtype not in NUMPY:
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if tensor.device != like.device:
            raise RuntimeError(f"{name} must lie on {like.device}, as what it goes with, got {tensor.device}")
        if not (tensor.is_cpu or tensor.is_cuda or tensor.is_meta):
            raise RuntimeError(f"{name} lies on {tensor.device}, and kernels run on CPUs and CUDA devices")
        if tensor.layout is not STRIDED:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
        if tensor.numel() and not tensor.data_ptr() and not tensor.is_meta:
            raise RuntimeError(f"{name} has no memory: its storage has been freed, or not been allocated yet")


def named_inputs(x: Tensor, initial: list[Tensor], weights: Sequence[Tensor], shape: Shape) -> list[_Named]:
    """What a layer is given."""
    if len(initial) not in (0, len(shape.states)):
        names = ", ".join(shape.cell.states)
        raise RuntimeError(f"initial must have the states {names}, or none, got {len(initial)}")
    each = len(weights) // shape.directions
    labels = [f"initial state {name}" for name in shape.cell.states]
    return [
        ("input", x, shape.input),
        *zip(labels, initial, shape.states),
        *named_weights(shape.cell, weights[:each], shape.layer, 0),
        *(named_weights(shape.cell, weights[each:], shape.layer, 1) if shape.directions == 2 else ()),
    ]


def named_weights(cell: Cell, weights: Sequence[Tensor], sizes: Sizes, d: int) -> list[_Named]:
    """The weights of direction d."""
    names, shapes = _expected(cell, len(weights), sizes)
    return [(name + d * "_reverse", weight, shape) for name, weight, shape in zip(names, weights, shapes)]


@lru_cache(1024)
def _expected(cell: Cell, number: int, sizes: Sizes) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and shapes of the weights of one direction."""
    own, (inputs, hidden, outputs, heads) = storage.unflatten(cell, [True] * number), sizes
    bias, proj = (own.bias_ih or own.bias_hh) is not None, 0 if own.hr is None else outputs
    names = storage.flatten(storage.names(cell, 0, False, bias, proj > 0))
    shapes = storage.flatten(storage.shapes(cell, inputs, hidden, bias, proj, heads))
    return [name.removesuffix("_l0") for name in names], shapes


def _named_results(y: Tensor, grads: list[Tensor], expected: list[tuple[int, ...]]) -> list[_Named]:
    """The output of a layer, and the gradients of all its results."""
    if len(grads) != len(expected):
        raise RuntimeError(f"grads must be those of {len(expected)} results, got {len(grads)}")
    named = [(f"grads[{n}]", grad, shape) for n, (grad, shape) in enumerate(zip(grads, expected))]
    return [("y", y, expected[0]), *named]


def _host_lengths(lengths: Tensor | None, shape: Shape) -> np.ndarray | None:
    """A copy on the host, which nobody else writes once it has been checked."""
    if lengths is None:
        return None
    if not is_integral(lengths):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (shape.batch,):
        raise ValueError(f"lengths must have the shape ({shape.batch},), got {tuple(lengths.shape)}")
    host: np.ndarray = lengths.to("cpu", torch.int64, copy=True).contiguous().numpy()
    check_range(host, shape.steps)
    return host


def check_range(lengths: np.ndarray, steps: int) -> None:
    if lengths.size and (lengths.min() < 0 or lengths.max() > steps):
        raise ValueError(f"lengths must be from 0 to {steps}, got {lengths.min()} to {lengths.max()}")


def _flags(reset: Tensor | None, shape: Shape, device: torch.device | str) -> Tensor | None:
    """A copy of reset on a device."""
    if reset is None:
        return None
    if reset.dtype is not torch.bool:
        raise TypeError(f"reset must be booleans, got {reset.dtype}")
    if reset.shape != (shape.steps, shape.batch):
        expected = (shape.steps, shape.batch)
        raise ValueError(f"reset must have the shape {expected}, got {tuple(reset.shape)}")
    return reset.to(device, copy=True).contiguous()


def is_integral(values: Tensor) -> bool:
    dtype = values.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def as_masks(lengths: Tensor | None, reset: Tensor | None, x: Tensor, shape: Shape) -> tuple[Any, Any]:
    """lengths and reset as the kernels take them, in memory that nobody else writes."""
    host, flags = _host_lengths(lengths, shape), _flags(reset, shape, x.device)
    marks = None if flags is None else as_array(flags)
    if x.is_cuda and host is not None:
        import cupy

        return cupy.asarray(host), marks
    return host, marks
