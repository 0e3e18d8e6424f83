"""What to install where a front end is imported without its framework."""

from __future__ import annotations

CPU_ONLY = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
_INSTALL = {
    "torch": f"pip install 'torch>=2.13'; for CPUs alone, which is far smaller: {CPU_ONLY}",
    "keras": "pip install 'keras>=3.10', and one of PyTorch, JAX and TensorFlow, which KERAS_BACKEND names",
    "jax": "pip install jax",
    "tensorflow": "pip install tensorflow; or set KERAS_BACKEND to torch, jax or numpy before the import",
}


def missing(front_end: str, error: ImportError) -> ImportError:
    """The error to raise where a front end cannot be imported: what to install, if that is all it takes."""
    advice = _INSTALL.get((error.name or "").partition(".")[0])
    if not isinstance(error, ModuleNotFoundError) or advice is None:
        return error
    return ImportError(f"{front_end} needs {error.name}, which is not installed: {advice}", name=error.name)
