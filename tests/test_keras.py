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


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow", "numpy"])
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


FIRST_CALLS = {
    # each direction is a call, and TensorFlow has threads of its own
    "tensorflow": """
model = keras.Sequential([keras.Input((6, 3)), keras.layers.Bidirectional(k.LSTM(5))])
model.predict(np.ones((4, 6, 3), 'float32'), verbose=0)
""",
    "jax": """
import jax
layer, other = k.LSTM(5, name="a"), k.LSTM(5, name="b", go_backwards=True)
both = jax.jit(jax.grad(lambda x: layer(x, training=True).sum() + other(x, training=True).sum()))
together(lambda: jax.block_until_ready(both(np.ones((4, 6, 3), 'float32'))))
""",
    "numpy": "together(lambda: k.GRU(5)(np.ones((4, 6, 3), 'float32')))",
    "torch": """
model = keras.Sequential([keras.Input((6, 3)), keras.layers.Bidirectional(k.LSTM(5))])
together(lambda: model.predict_on_batch(np.ones((4, 6, 3), 'float32')))
""",
}
TOGETHER = """
import threading, numpy as np, keras, fusedlstm.keras as k
failed = []
threading.excepthook = failed.append
def together(function):
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=lambda: (barrier.wait(), function())) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("backend", FIRST_CALLS)
def test_two_threads_make_the_first_call_of_a_process(backend: str) -> None:
    """Kernels are compiled by the first process, and loaded by the others."""
    code = f"{TOGETHER}\n{FIRST_CALLS[backend]}\nassert not failed, failed"
    for _ in range(3):
        done = run(backend, "-c", code)
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
