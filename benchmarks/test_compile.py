"""What a fresh process pays: importing, and the first calls with and without kernels on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FIRST_CALLS = """
import numpy as np, fusedlstm
layer = fusedlstm.LSTM(8, 16, seed=1)
y, state, tape = layer.forward(np.ones((3, 2, 8), np.float32), training=True)
tape.backward(y)
"""


def run(code: str, cache: Path) -> None:
    """Run Python code in a process of its own, its kernels in the folder `cache`."""
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NUMBA_CACHE_DIR": str(cache)}, check=True
    )


@pytest.mark.parametrize("module", ["numpy", "fusedlstm"])
def test_import(benchmark: Any, tmp_path: Path, module: str) -> None:
    benchmark.pedantic(run, (f"import {module}", tmp_path), rounds=5, warmup_rounds=1)


def test_first_process(benchmark: Any, tmp_path: Path) -> None:
    benchmark.pedantic(run, (FIRST_CALLS, tmp_path), rounds=1)


def test_second_process(benchmark: Any, tmp_path: Path) -> None:
    run(FIRST_CALLS, tmp_path)
    benchmark.pedantic(run, (FIRST_CALLS, tmp_path), rounds=5)
