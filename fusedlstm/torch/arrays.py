"""Tensors as arrays of NumPy and CuPy over the same memory, and arrays as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMPY = {torch.float32: np.dtype("float32"), torch.float64: np.dtype("float64")}  # what kernels compute in
STRIDED = torch.strided


class Export:
    """A tensor on the host as NumPy imports it: ``numpy.from_dlpack(Export(tensor))``, to be read.

    The array keeps the storage, but not where it lies: whoever resizes the storage moves it.  `Tensor.numpy`
    would forbid that for good, and FSDP does it after each use of a weight; PyTorch's own DLPack takes
    three times as long.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        # a negative one has a mark that the numbers are meant with the other sign
        self.tensor = tensor.resolve_neg() if tensor.is_neg() else tensor

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def as_array(tensor: Tensor) -> Any:
    """The tensor's memory as a NumPy or CuPy array, to be read; the last axis is contiguous."""
    if not tensor.is_contiguous() and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.is_cuda:
        import cupy

        return cupy.asarray(tensor.detach().resolve_neg())
    return np.from_dlpack(Export(tensor))


def as_tensor(array: Any) -> Tensor:
    """A tensor over the memory of a NumPy or CuPy array."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.as_tensor(array, device="cuda")


def new_tensors(like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Any]]:
    """New tensors, and their memory to be written."""
    if like.is_cuda:
        tensors = [like.new_empty(shape) for shape in shapes]
        return tensors, [as_array(tensor) for tensor in tensors]
    dtype = NUMPY[like.dtype]
    arrays = [np.empty(shape, dtype) for shape in shapes]  # quicker than tensors
    return [torch.from_numpy(array) for array in arrays], arrays


@contextmanager
def on_stream(x: Tensor) -> Iterator[None]:
    """CuPy on PyTorch's current stream, if x lies on a GPU."""
    if x.is_cuda:
        import cupy

        from fusedlstm.kernels.cuda.launch import stream_at

        number, stream = x.device.index, torch.cuda.current_stream(x.device)
        with cupy.cuda.Device(number), stream_at(stream.cuda_stream, number):
            yield
    else:
        yield
