"""Single large products: of the input, and for the gradients of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusedlstm.dispatch import INSTALL_CUDA
from fusedlstm.once import once

from . import ptx
from .plan import TENSOR_CORES, Precision

# cudaDataType and cublasComputeType_t (cuBLAS library documentation, 2.1.1 and 2.3)
_R_32F, _COMPUTE_32F = 0, 68
_OPERANDS = {"tf32": (0, 77), "float16": (2, 68), "bfloat16": (14, 68)}  # type, computation


@once
def cublas() -> Any:
    """CuPy's interface to cuBLAS.

    Raises:
        ImportError: if there is no cuBLAS, which CuPy finds out with the first product.
    """
    try:
        from cupy_backends.cuda.libs import cublas as library
    except ImportError as error:
        raise ImportError(f"backend 'cuda' needs cuBLAS: {INSTALL_CUDA} ({error})") from error
    return library


def matmul(a: Any, b: Any, precision: Precision, xp: Any) -> Any:
    """a (M, K) times b (K, N), each with one contiguous axis; sums and result in float32 or float64."""
    if precision not in TENSOR_CORES:
        return a @ b
    if xp is np:
        return rounded(a, precision) @ rounded(b, precision)
    return _gemm(a, b, precision, xp)


def rounded(values: Any, precision: Precision) -> Any:
    """float32 after a conversion to the precision of a tensor core's operands and back."""
    if precision == "float16":
        return values.astype(np.float16).astype(np.float32)
    if precision == "bfloat16":
        return (ptx.bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)
    return ptx.tf32_bits(values).view(np.float32)


def _gemm(a: Any, b: Any, precision: Precision, xp: Any) -> Any:
    """By cuBLAS, which sees a row-major matrix as its transpose: C^T = B^T A^T."""
    kind, computation = _OPERANDS[precision]
    narrow: Callable[[Any], Any] = (lambda x: x) if precision == "tf32" else _narrow(precision, xp)
    (rows, depth), columns = a.shape, b.shape[1]
    result = xp.empty((rows, columns), np.float32)
    (b, transposed_b, stride_b), (a, transposed_a, stride_a) = _laid_out(narrow(b)), _laid_out(narrow(a))
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    cublas().gemmEx(
        xp.cuda.device.get_cublas_handle(), transposed_b, transposed_a, columns, rows, depth,
        one.ctypes.data, b.data.ptr, kind, stride_b, a.data.ptr, kind, stride_a,
        zero.ctypes.data, result.data.ptr, _R_32F, columns, computation, -1,
    )  # fmt: skip
    return result


def _laid_out(matrix: Any) -> tuple[Any, int, int]:
    """The matrix, whether cuBLAS has to transpose it, and the distance of its rows or columns."""
    for transposed in range(2):
        outer, inner = matrix.strides[:: -1 if transposed else 1]
        if inner == matrix.itemsize and outer >= inner:
            # a single row may have any distance to the next
            return matrix, transposed, max(outer // inner, matrix.shape[1 - transposed])
    raise ValueError(f"a matrix needs one contiguous axis, got strides {matrix.strides}")


@once
def _narrow(precision: Precision, xp: Any) -> Callable[[Any], Any]:
    if precision == "float16":
        return lambda x: x.astype(np.float16)
    kernel = xp.ElementwiseKernel(
        "uint32 bits",
        "uint16 rounded",
        "rounded = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
        "fusedlstm_bfloat16",
    )
    return lambda x: kernel(x.view(np.uint32))
