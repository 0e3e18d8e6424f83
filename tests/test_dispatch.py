"""Which engine runs, and what is said when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fusedlstm import LSTM, cells, dispatch
from fusedlstm.kernels.reference import Reference
from fusedlstm.weights import Weights

HOST = np.zeros((2, 1, 3), np.float32)


class Device:
    """An array on a GPU, as far as the choice of an engine goes."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}


def test_auto_follows_the_array() -> None:
    assert dispatch.backend_for("auto", HOST) == "cpu"
    assert dispatch.backend_for("auto", Device()) == "cuda"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_arrays_on_a_gpu_are_refused_by_other_backends(backend: str) -> None:
    assert dispatch.backend_for(backend, HOST) == backend
    with pytest.raises(TypeError, match=f"backend '{backend}' takes NumPy arrays, got a CuPy array"):
        dispatch.backend_for(backend, Device())


def test_cuda_takes_numpy_arrays_in_the_simulator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    with pytest.raises(TypeError, match="backend 'cuda' takes CuPy arrays, got a NumPy array"):
        dispatch.backend_for("cuda", HOST)
    with pytest.raises(TypeError, match="takes CuPy arrays"):
        LSTM(3, 4, backend="cuda")(HOST)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert dispatch.backend_for("cuda", HOST) == "cuda"


def test_an_engine_is_made_once() -> None:
    engine = dispatch.engine("reference", HOST)
    assert isinstance(engine, Reference)
    assert dispatch.engine("reference", HOST) is engine


def test_an_engine_that_cannot_be_imported_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._ENGINES, "cuda", ("fusedlstm.no_such_engine", "CUDA"))
    monkeypatch.setattr(dispatch, "_loaded", {})
    with pytest.raises(ImportError, match=r"'cuda' cannot be loaded: No module.*pip install -e '.\[cuda12"):
        dispatch.engine("cuda", Device())


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_packages_that_do_not_fit_are_said_with_their_versions(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They raise anything when they are imported; lists of folders, which some add, are left out."""
    (tmp_path / "broken_engine.py").write_text(f"raise {error.__name__}('no row_stack\\n  /usr/lib')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(dispatch._ENGINES, "cuda", ("broken_engine", "CUDA"))
    monkeypatch.setattr(dispatch, "_loaded", {})
    with pytest.raises(ImportError) as caught:
        dispatch.engine("cuda", Device())
    said = str(caught.value)
    assert (
        f"backend 'cuda' cannot be loaded: {error.__name__}: no row_stack (with numpy {np.__version__}"
        in said
    )
    assert f"numba-cuda {metadata.version('numba-cuda')})" in said
    assert "pip install -e '.[cuda12]'" in said
    assert isinstance(caught.value.__cause__, error)


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._ENGINES, "cpu", ("fusedlstm.no_such_engine", "CPU"))
    monkeypatch.setitem(dispatch._NEEDED, "cpu", ("numpy", "no-such-package"))
    monkeypatch.setattr(dispatch, "_loaded", {})
    with pytest.raises(ImportError, match=r"no-such-package missing\)$"):
        dispatch.engine("cpu", HOST)


@pytest.mark.parametrize("simulator", ["0", "1"])
def test_numbas_own_cuda_is_not_taken_for_numba_cuda(simulator: str) -> None:
    """It is what `numba.cuda` is where numba-cuda is missing, or lies on PYTHONPATH alone."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'NumbaCuda' not in type(f).__name__]\n"
        "from fusedlstm import dispatch; dispatch.engine('cuda')"
    )
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": simulator}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (
        "ImportError: backend 'cuda' cannot be loaded: numba.cuda is the one that comes with" in done.stderr
    )


def test_an_engine_can_be_had_before_there_is_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    monkeypatch.setitem(dispatch._ENGINES, "cuda", ("builtins", "dict"))
    monkeypatch.setattr(dispatch, "_loaded", {})
    assert dispatch.engine("cuda") == {"precision": "float32", "form": None}
    assert dispatch.engine("auto") is dispatch.engine("cpu")


def test_missing_cupy_is_said_with_one_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(dispatch, "_loaded", {})
    with pytest.raises(ImportError, match=r"^backend 'cuda' needs CuPy: .*: pip install") as caught:
        dispatch.engine("cuda", Device())
    assert str(caught.value).count("pip install") == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options_of_cuda_kernels_are_refused_elsewhere(backend: str) -> None:
    with pytest.raises(ValueError, match=f"CUDA kernels have precision 'tf32', but backend '{backend}'"):
        dispatch.engine(backend, HOST, "tf32")
    with pytest.raises(ValueError, match=f"CUDA kernels have form 'stepwise', but backend '{backend}'"):
        dispatch.engine(backend, HOST, form="stepwise")
    with pytest.raises(ValueError, match="have precision 'tf32' and form 'stepwise', but"):
        dispatch.engine(backend, HOST, "tf32", "stepwise")


def test_precisions_are_refused_where_there_are_no_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    with pytest.raises(ValueError, match="only CPU kernels have precision 'int8', but backend 'cuda'"):
        dispatch.engine("cuda", HOST, "int8")
    with pytest.raises(ValueError, match="only CPU and CUDA kernels have precision 'bfloat16', but backend"):
        dispatch.engine("reference", HOST, "bfloat16")


def test_a_projection_of_a_cell_that_reads_its_output_is_refused() -> None:
    hr, nothing = np.zeros((2, 3)), np.zeros((0, 0))
    with pytest.raises(ValueError, match="cell gru cannot have a projection: it reads its own output 'h'"):
        dispatch.engine("cpu", HOST).prepare(cells.gru, Weights(nothing, nothing, hr=hr))
    dispatch.check_projection(cells.gru, Weights(nothing, nothing))
    dispatch.check_projection(cells.lstm, Weights(nothing, nothing, hr=hr))


def test_importing_the_package_imports_numpy_only() -> None:
    heavy = ("numba", "llvmlite", "safetensors", "tqdm", "sympy", "torch", "cupy")
    code = f"import fusedlstm, sys; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_pytorch_module_imports_no_compiler() -> None:
    code = "import fusedlstm.torch, sys; assert not {'numba', 'llvmlite', 'cupy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_offers_what_it_says() -> None:
    import fusedlstm

    for name in fusedlstm.__all__:
        assert getattr(fusedlstm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = fusedlstm.missing
