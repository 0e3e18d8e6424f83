"""CUDA kernels in simulators.

Numba decides when it is imported whether it simulates, so these tests run in processes of their own;
their reports are shown here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["cuda_simulated.py", "cuda_numba_simulator.py"])
def test_kernels_in_a_simulator(file: str) -> None:
    """Every kernel form, cell and option against the reference; see the file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
