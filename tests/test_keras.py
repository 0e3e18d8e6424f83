"""Keras: our layers against those of Keras, on each of its backends.

Keras chooses its backend when it is imported, so these tests run in processes of their own; their reports are
shown here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(backend: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_layers_on_a_backend(backend: str) -> None:
    """Every option and layer against Keras's; see keras_cases.py."""
    done = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "keras_cases.py"))
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"


def test_numpy_runs_forward() -> None:
    code = (
        "import numpy as np, fusedlstm.keras as k\n"
        "x = np.ones((2, 4, 3), 'float32')\n"
        "layer = k.LSTM(5, return_state=True)\n"
        "assert [part.shape for part in layer(x)] == [(2, 5)] * 3\n"
        "before = layer(x)[0]\n"
        "layer.cell.kernel.value[0, 0] += 1\n"  # the layer has no way to know but to look
        "assert (layer(x)[0] != before).any()\n"
    )
    done = run("numpy", "-c", code)
    assert done.returncode == 0, done.stderr


def test_another_backend_is_refused() -> None:
    """Whether or not it is installed."""
    code = (
        "import keras\nkeras.backend.backend = lambda: 'openvino'\nimport fusedlstm.keras as k\nk.LSTM(5)\n"
    )
    done = run("numpy", "-c", code)
    assert (
        "fusedlstm.keras runs on the Keras backends torch, jax, tensorflow, numpy, not on 'openvino'"
        in done.stderr
    )
