"""What modules are given: in which type, and of which kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import NUMPY, STRIDED
from .checks import is_integral

if TYPE_CHECKING:
    from .modules import Stack

autocasting = torch._C._is_any_autocast_enabled


def check_input(module: Stack, x: Tensor, weight: Tensor) -> None:
    if x.layout is not STRIDED:
        raise TypeError(f"input must be a dense tensor, got {x.layout}")
    shape = x.shape
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{type(module).__name__}: Expected input to be 2D or 3D, got {len(shape)}D instead, with the "
            f"shape {tuple(shape)}"
        )
    if shape[-1] != module.features:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.features}, got {shape[-1]} "
            f"in the shape {tuple(shape)}"
        )
    if x.dtype is not weight.dtype:
        refuse_dtype(x, weight)


def check_state(module: Stack, hx: Any, batch: int, batched: bool, weight: Tensor) -> list[Tensor]:
    """The states as (L*D, B, size) each."""
    names = module.fused_cell.states
    parts = (hx,) if len(names) == 1 else hx
    if not isinstance(parts, (tuple, list)) or len(parts) != len(names):
        raise TypeError(f"hx must be a tuple ({', '.join(names)}), got {described(hx)}")
    rows = module.num_layers * (2 if module.bidirectional else 1)
    leading, size = (rows, batch) if batched else (rows,), module.proj_size or module.hidden_size
    shape, others, dtype = (*leading, size), (*leading, module.hidden_size), weight.dtype
    for n, part in enumerate(parts):
        fits = isinstance(part, Tensor) and part.shape == shape and part.dtype is dtype
        if not fits or part.layout is not STRIDED:
            label = "hx" if len(names) == 1 else f"hidden[{n}]"
            if not isinstance(part, Tensor):
                raise TypeError(f"{label} must be a tensor, got {described(part)}")
            if part.layout is not STRIDED:
                raise TypeError(f"{label} must be a dense tensor, got {part.layout}")
            if part.shape != shape:
                raise RuntimeError(f"Expected {label} size {shape}, got {tuple(part.shape)}")
            refuse_dtype(part, weight, label)
        shape = others
    return list(parts) if batched else [part.unsqueeze(1) for part in parts]


def check_lengths(lengths: Any, batch: int, batched: bool) -> Tensor:
    """A copy of lengths as (B,), on the host."""
    if not batched:
        raise ValueError("lengths needs an input with a batch axis; cut one sequence to its length instead")
    given = _as_lengths(lengths)
    if given.numel() and not is_integral(given):
        raise TypeError(f"lengths must be integers, got {given.dtype}")
    if given.shape != (batch,):
        raise ValueError(
            f"lengths must have the shape ({batch},), one for each sequence, got {tuple(given.shape)}"
        )
    return given.to("cpu", torch.int64, copy=True)


def check_marks(module: Stack, name: str, marks: Any, shape: torch.Size, batched: bool) -> Tensor:
    """A copy of reset or mask as (T, B)."""
    if not isinstance(marks, Tensor) or marks.dtype is not torch.bool:
        raise TypeError(f"{name} must be a tensor of booleans, got {described(marks)}")
    _refuse_without_numbers(name, marks)
    if marks.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)}, as input without its features, got "
            f"{tuple(marks.shape)}"
        )
    own = marks.clone()
    if not batched:
        return own.unsqueeze(1)
    return own.transpose(0, 1) if module.batch_first else own


def _as_lengths(lengths: Any) -> Tensor:
    """Lengths of any kind as a tensor, whose shape and type have not been looked at."""
    if isinstance(lengths, Tensor):
        _refuse_without_numbers("lengths", lengths)
        return lengths
    if isinstance(lengths, np.ma.MaskedArray):
        raise TypeError("lengths must be an array without a mask, which would be ignored; fill it first")
    try:
        if isinstance(lengths, np.ndarray):  # PyTorch takes no negative strides and no swapped bytes
            lengths = np.array(lengths, lengths.dtype.newbyteorder("="), subok=False)
        return torch.as_tensor(lengths)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"lengths must be integers, got {described(lengths)}: {error}") from error


def _refuse_without_numbers(name: str, tensor: Tensor) -> None:
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


def as_computed(
    module: Any, x: Tensor, states: list[Tensor], weights: list[Tensor], autocasts: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], str]:
    """All in the type in which kernels compute, that of the weights, but float32 at least; and in which
    precision products are.

    What autocast would not convert, or without it has another type than the weights, stays, to be refused.
    """
    given = weights[0].dtype
    if not autocasts and x.dtype is given and given in NUMPY:
        return x, states, weights, module.fused_precision
    precision = _precision_of(module, x, weights[0])
    dtype = torch.promote_types(given, torch.float32)

    def convert(part: Tensor) -> Tensor:
        fits = part.dtype.is_floating_point if autocasts else part.dtype is given
        return part.to(dtype) if fits else part

    return convert(x), [convert(part) for part in states], [convert(weight) for weight in weights], precision


def _precision_of(module: Any, x: Tensor, weight: Tensor) -> str:
    """In which precision the products of a module are: its own; on a CPU also that of autocast, or of the
    weights, where that is bfloat16."""
    own: str = module.fused_precision
    if own == "float32" and x.device.type == "cpu" and x.dtype is not torch.float64:
        if weight.dtype is torch.bfloat16:
            return "bfloat16"
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16:
            return "bfloat16"
    return own


def as_results(
    y: Tensor, final: list[Tensor], given: torch.dtype, autocasts: bool
) -> tuple[Tensor, list[Tensor]]:
    """Results of the type of the input, or of autocast's."""
    if y.dtype is torch.float64:
        return y, final
    if autocasts and torch.is_autocast_enabled(y.device.type):
        given = torch.get_autocast_dtype(y.device.type)
    return (y, final) if y.dtype is given else (y.to(given), [part.to(given) for part in final])
