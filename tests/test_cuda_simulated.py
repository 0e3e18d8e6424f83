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
from cuda_options import OPTIONS

HERE = Path(__file__).parent


def run_pytest(
    *arguments: str, program: tuple[str, ...] = ("-m", "pytest"), **variables: str
) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own."""
    command = [sys.executable, *program, "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=HERE.parent, env=environment | variables, capture_output=True, text=True
    )


@pytest.mark.parametrize("file", ["cuda_simulated.py", "cuda_numba_simulator.py"])
def test_kernels_in_a_simulator(file: str, request: pytest.FixtureRequest) -> None:
    """Every kernel form, cell and option against the reference; see the file."""
    thorough = ["--thorough"] if request.config.option.thorough else []
    done = run_pytest(f"tests/{file}", *thorough, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_the_layers_in_numbas_simulator(name: str) -> None:
    """As a user starts it, in a process of its own: NumPy arrays, and nothing but the variable is set."""
    command = [sys.executable, str(HERE / "cuda_options.py"), name]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tests_on_a_gpu_are_ready() -> None:
    """Those that do not take minutes in the simulator."""
    names = "test_there_is or first_kernels or results_lie"
    done = run_pytest("tests", "-m", "gpu", "-k", names, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert "5 passed" in done.stdout


ABSENT = (
    *("torch", "keras", "jax", "tensorflow", "hypothesis", "expecttest", "jsonschema", "sympy", "greenlet"),
    *("xdist", "pytest_benchmark", "safetensors", "filelock", "threadpoolctl", "tqdm", "cupy"),
)
ALONE = f"""
import sys

sys.modules.update(dict.fromkeys({ABSENT}))
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_tests_on_a_gpu_are_found_where_nothing_else_is_installed() -> None:
    """With NumPy, Numba and pytest alone.  Without a GPU the first fails, and none is tried in vain."""
    options = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = run_pytest("tests", "-m", "gpu", program=("-c", ALONE), **options)
    assert "test_there_is_a_gpu_that_computes failed, as all that follow would" in done.stdout, done.stdout
    assert "backend 'cuda' needs CuPy: in the checkout: pip install" in done.stdout
    assert "1 failed in" in done.stdout
