"""ONNX: its recurrent operators run by our kernels, layers from files, and layers into files."""

from __future__ import annotations

try:
    import onnx  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fusedlstm.onnx cannot be imported: {error}. It needs onnx: pip install onnx, or in the checkout "
        "pip install -e '.[onnx]'"
    ) from error

from .backend import Backend
from .cells import cell
from .nodes import RecurrentNodes
from .operators import operators
from .read import layers
from .write import export, to_model

__all__ = ["Backend", "RecurrentNodes", "cell", "export", "layers", "operators", "to_model"]
