"""Kernels compiled before a model is used."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import ahead
from .arrays import NUMPY
from .cell_modules import Single
from .modules import Stack


def warm_up(model: nn.Module, input: Any = None) -> float:
    """Compile the kernels of all our modules in a model, forward and backward; the seconds that it took.

    Without it the first call and the first ``backward()`` compile, where nothing is kept on disk.

    Args:
        input: what the model is called with once, in eval mode and without gradients: a tuple of arguments,
            a mapping of keyword arguments, or the only argument.  For models on a GPU, whose kernels are
            compiled in calls only.
    """
    start = time.perf_counter()
    for module in model.modules():
        if isinstance(module, (Stack, Single)):
            for dtype in {part.dtype for part in module.parameters() if part.device.type != "cuda"}:
                projected = bool(getattr(module, "proj_size", 0))
                precision = str(NUMPY[torch.promote_types(dtype, torch.float32)])
                ahead.compile_cell(module.fused_cell, precision, projected)
    if input is not None:
        _call_once(model, input)
    return time.perf_counter() - start


def _call_once(model: nn.Module, input: Any) -> None:
    """Call a model, and leave it as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(input, Mapping):
                model(**input)
            else:
                model(*(input if isinstance(input, tuple) else (input,)))
    finally:
        for module, mode in training.items():
            module.training = mode
