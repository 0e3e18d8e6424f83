"""What modules are given: in which type, and of which kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import STRIDED

autocasting = torch._C._is_any_autocast_enabled


def as_lengths(lengths: Any) -> Tensor:
    """Lengths of any kind as a tensor, whose shape and type have not been looked at."""
    if isinstance(lengths, Tensor):
        refuse_without_numbers("lengths", lengths)
        return lengths
    if isinstance(lengths, np.ma.MaskedArray):
        raise TypeError("lengths must be an array without a mask, which would be ignored; fill it first")
    try:
        if isinstance(lengths, np.ndarray):  # PyTorch takes no negative strides and no swapped bytes
            lengths = np.array(lengths, lengths.dtype.newbyteorder("="), subok=False)
        return torch.as_tensor(lengths)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"lengths must be integers, got {described(lengths)}: {error}") from error


def refuse_without_numbers(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be read as it lies in memory."""
    if tensor.layout is not STRIDED or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"{name} must be a dense tensor that has memory, got {tensor.dtype} as {tensor.layout} on "
            f"{tensor.device}"
        )


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """What these attributes are; a parametrization or a hook may have put anything there."""
    own, found = module._parameters, []
    for name in names:  # a loop can be traced
        parameter = own.get(name)  # quicker
        found.append(getattr(module, name) if parameter is None else parameter)
    return found


def refuse_dtype(value: Tensor, weight: Tensor, label: str = "input") -> None:
    """Refuse an argument of another type than the weights have, but under autocast."""
    if not autocasting():
        raise ValueError(
            f"RNN {label} dtype ({value.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert {label}: {label}.to({weight.dtype}), or convert model: model.to({value.dtype})"
        )


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    entries = f" of {len(value)} entries" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{entries}"


def converted(
    x: Tensor, states: list[Tensor], weights: list[Tensor], autocasts: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All in the precision in which kernels compute: that of the weights, but float32 at least.

    What autocast would not convert, or without it has another type than the weights, stays, to be refused.
    """
    given = weights[0].dtype
    dtype = torch.promote_types(given, torch.float32)

    def convert(part: Tensor) -> Tensor:
        fits = part.dtype.is_floating_point if autocasts else part.dtype is given
        return part.to(dtype) if fits else part

    return convert(x), [convert(part) for part in states], [convert(weight) for weight in weights]


def as_results(
    y: Tensor, final: list[Tensor], given: torch.dtype, autocasts: bool
) -> tuple[Tensor, list[Tensor]]:
    """Results of the type of the input, or of autocast's."""
    if y.dtype is torch.float64:
        return y, final
    if autocasts and torch.is_autocast_enabled(y.device.type):
        given = torch.get_autocast_dtype(y.device.type)
    return (y, final) if y.dtype is given else (y.to(given), [part.to(given) for part in final])
