"""Arrays of any library: real ones on the host, and on GPUs as far as a stand-in for CuPy tells."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import fusedlstm
from fusedlstm import LSTM, dispatch

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(4, 2, 3)).astype(np.float32)
H = GENERATOR.normal(size=(1, 2, 5)).astype(np.float32)
RESET = GENERATOR.random((4, 2)) < 0.4
LENGTHS = np.array([4, 2])


class GPU:
    """A device of CuPy, which is the current one inside `with`."""

    current: ClassVar[list[int]] = [0]

    def __init__(self, number: int | None = None) -> None:
        self.id = self.current[-1] if number is None else number

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, GPU) and self.id == other.id

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<GPU {self.id}>"

    def __enter__(self) -> None:
        self.current.append(self.id)

    def __exit__(self, *error: Any) -> None:
        self.current.pop()


class Array(np.ndarray):
    """An array of CuPy."""

    __module__ = "cupy"
    gpu: GPU
    device = property(lambda self: self.gpu)
    data = property(lambda self: types.SimpleNamespace(ptr=self.ctypes.data))
    __cuda_array_interface__ = property(lambda self: self.__array_interface__)

    def __array_finalize__(self, parent: Any) -> None:
        self.gpu = parent.gpu if isinstance(parent, Array) else GPU()

    def get(self) -> np.ndarray:
        return self.view(np.ndarray)


class ByInterface:
    """An array on a GPU of a library that has __cuda_array_interface__, as Numba's."""

    def __init__(self, array: np.ndarray, device: int = 0) -> None:
        self.array, self.on, self.shape = array, device, array.shape

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.array.__array_interface__, "version": 3}


class ByDLPack(ByInterface):
    """One that has DLPack as well, as PyTorch's and JAX's."""

    asked: str | None = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.on)

    def __dlpack__(self, **options: Any) -> Any:
        self.asked = options["stream"]
        return self.array


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module like CuPy, and the reference as the engine for its arrays."""

    def made(function: Any) -> Any:
        return lambda *args, **options: function(*args, **options).view(Array)

    def asarray(value: Any, *args: Any) -> Any:
        if isinstance(value, Array):
            return value
        if isinstance(value, ByInterface):
            with GPU(value.on):
                return value.array.view(Array)
        return np.asarray(value, *args).view(Array)

    def from_dlpack(value: Any) -> Any:
        with GPU(value.__dlpack_device__()[1]):
            return value.__dlpack__(stream="the current one").view(Array)

    module: Any = types.ModuleType("cupy")
    module.asarray, module.from_dlpack = asarray, from_dlpack
    for function in ("array", "empty", "zeros"):
        setattr(module, function, made(getattr(np, function)))
    stream = types.SimpleNamespace(synchronize=lambda: None)
    module.cuda = types.SimpleNamespace(Device=GPU, get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(dispatch._loaded, ("cuda", "float32", "auto"), dispatch.engine("reference", X))
    yield module
    assert GPU.current == [0]


def run(layer: LSTM, of: Any) -> list[Any]:
    """Both passes with every kind of argument, each made by `of`."""
    y, state, tape = layer.forward(of(X), (of(H), of(H)), of(LENGTHS), of(RESET), training=True)
    assert tape is not None
    dx, dstate, grads = tape.backward(of(np.ones_like(y)), (of(H), of(H)))
    return [y, *state, dx, *dstate, *grads.values()]


def expected() -> list[np.ndarray]:
    return run(LSTM(3, 5, backend="reference", seed=1), np.asarray)


# --- On the host ------------------------------------------------------------------------------------------


def dlpack_of(array: np.ndarray) -> Any:
    """An array of some library that has DLPack and nothing else."""
    return types.SimpleNamespace(__dlpack__=array.__dlpack__, __dlpack_device__=array.__dlpack_device__)


@pytest.mark.parametrize("of", [torch.tensor, dlpack_of], ids=["torch", "dlpack"])
def test_arrays_on_the_host_are_taken(of: Any) -> None:
    def converted(array: np.ndarray) -> Any:
        return array if array is LENGTHS or array is RESET else of(array)

    for found, wanted in zip(run(LSTM(3, 5, backend="reference", seed=1), converted), expected()):
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, wanted)


def test_nothing_is_copied_and_read_only_memory_will_do() -> None:
    tensor = torch.tensor(X)
    assert np.shares_memory(dispatch.taken("x", tensor), tensor.numpy())
    locked = X.copy()
    locked.flags.writeable = False
    y, _ = LSTM(3, 5, seed=1)(dlpack_of(locked))
    np.testing.assert_array_equal(y, LSTM(3, 5, seed=1)(X)[0])


def test_jax_arrays_are_taken() -> None:
    jax = pytest.importorskip("jax.numpy")
    np.testing.assert_array_equal(LSTM(3, 5, seed=1)(jax.asarray(X))[0], LSTM(3, 5, seed=1)(X)[0])


# --- On a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("kind", [ByInterface, ByDLPack])
def test_arrays_on_a_gpu_are_taken_and_results_lie_beside_them(cupy: Any, kind: Any, device: int) -> None:
    found = run(LSTM(3, 5, seed=1), lambda array: kind(np.asarray(array), device))
    for result, wanted in zip(found, expected()):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-6)
    for result in found[:6]:  # the gradients of weights are what the engine makes
        assert isinstance(result, Array)
        assert result.device == GPU(device)


def test_dlpack_comes_first_and_no_memory_is_copied(cupy: Any) -> None:
    both, one = ByDLPack(X), ByInterface(X)
    assert np.shares_memory(dispatch.taken("x", both), X)
    assert both.asked == "the current one"
    assert np.shares_memory(dispatch.taken("x", one), X)
    array = cupy.asarray(X)
    assert dispatch.taken("x", array) is array


def test_explain_takes_them_as_well(cupy: Any) -> None:
    assert "since x is a CuPy array" in str(fusedlstm.explain(LSTM(3, 5), ByDLPack(X, 1)))


def test_weights_are_copied_from_any_gpu() -> None:
    layer, source = LSTM(3, 5), LSTM(3, 5, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", types.SimpleNamespace(asarray=lambda v: v.array.view(Array)))
        layer.load_state_dict({name: ByInterface(array) for name, array in source.state_dict().items()})
    for name, array in source.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], array)


# --- Bad input --------------------------------------------------------------------------------------------


def test_arrays_of_several_devices_are_refused(cupy: Any) -> None:
    layer, x = LSTM(3, 5), ByDLPack(X, 1)
    with pytest.raises(ValueError, match=r"c in state must lie on the device of x, <GPU 1>, got <GPU 0>"):
        layer(x, (ByDLPack(H, 1), ByDLPack(H, 0)))
    with pytest.raises(ValueError, match="reset must lie on the device of x"):
        layer(x, reset=ByDLPack(RESET, 0))
    tape = layer.forward(x, training=True)[2]
    assert tape is not None
    with pytest.raises(ValueError, match="dy must lie on the device of x, <GPU 1>, got <GPU 0>"):
        tape.backward(ByDLPack(np.ones((4, 2, 5), np.float32), 0))


def test_arrays_of_host_and_gpu_are_refused(cupy: Any) -> None:
    with pytest.raises(TypeError, match="reset must be a NumPy array, as x is, got ByDLPack"):
        LSTM(3, 5)(X, reset=ByDLPack(RESET))
    with pytest.raises(TypeError, match="h in state must be a CuPy array, as x is, got Tensor"):
        LSTM(3, 5)(ByDLPack(X), (torch.tensor(H), torch.tensor(H)))
    with pytest.raises(TypeError, match="backend 'cpu' takes NumPy arrays, got a CuPy array"):
        LSTM(3, 5, backend="cpu")(ByDLPack(X))


def test_what_cannot_be_taken_is_named(cupy: Any) -> None:
    with pytest.raises(TypeError, match=r"x, a Tensor, cannot be taken as an array: .*requires? grad"):
        LSTM(3, 5)(torch.tensor(X, requires_grad=True))
    with pytest.raises(
        TypeError, match="dy must be a NumPy or CuPy array, got list, which has neither DLPack"
    ):
        LSTM(3, 5, backend="reference").forward(X, training=True)[2].backward([1.0])  # type: ignore[union-attr]
    broken = ByDLPack(X)
    broken.__class__ = type("Broken", (ByDLPack,), {"__dlpack__": lambda self, **options: 1 / 0})
    with pytest.raises(ZeroDivisionError):  # an error of the producer's own is not hidden
        LSTM(3, 5)(broken)


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"arrays on a GPU cannot be taken: .*pip install -e '.\[cuda12"):
        LSTM(3, 5)(ByInterface(X))
