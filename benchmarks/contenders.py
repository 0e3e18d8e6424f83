"""The list of contenders, ours first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .cases import Case, Data, as_state, name_results, recurrent
from .contender import Contender, Prepared, layer_call
from .peer_cuda import CuDNN, FlashRNN, FusedCUDA, Haste, in_precisions
from .peer_jax import JaxScan
from .peer_keras import (
    FusedKerasJax,
    FusedKerasTensorFlow,
    FusedKerasTorch,
    KerasJax,
    KerasTensorFlow,
    KerasTorch,
)
from .peer_onnx import OnnxRuntime, OpenVINO
from .peer_torch import FusedTorch, Torch, TorchCell, TorchLoop


class FusedLSTM(Contender):
    """The layers of this package on NumPy arrays."""

    name, title = "fusedlstm", "fusedlstm"
    packages: ClassVar[tuple[str, ...]] = ("fusedlstm", "numba", "llvmlite", "numpy")
    backend: ClassVar[str] = "cpu"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        from fusedlstm.kernels.cpu.team import set_num_threads

        set_num_threads(threads)

    def prepare(self, case: Case, data: Data) -> Prepared:
        layer = recurrent(case, dtype=case.dtype, backend=self.backend)
        layer.load_state_dict(data.weights)
        state, dstate = as_state(data.state), as_state(data.dstate)
        call = layer_call(layer, case.mode, data.x, state, data.dy, dstate)
        return Prepared(call, lambda result: name_results(case, *result))


class FusedStepper(FusedLSTM):
    """Steps of this package over buffers that stay."""

    name, title = "fusedlstm-stepper", "fusedlstm, stepper"
    modes = ("step",)

    def prepare(self, case: Case, data: Data) -> Prepared:
        layer = recurrent(case, dtype=case.dtype)
        layer.load_state_dict(data.weights)
        step = layer.stepper(case.batch, case.steps)
        for ours, given in zip(step.state, data.state):
            ours[...] = given
        return Prepared(
            lambda: (step(data.x), as_state(step.state)), lambda result: name_results(case, *result)
        )


class NumPy(FusedLSTM):
    """The reference: an explicit time loop in NumPy."""

    name, title = "numpy", "NumPy loop"
    packages = ("numpy",)
    backend = "reference"


_ALL: tuple[type[Contender], ...] = (
    FusedLSTM,
    FusedStepper,
    FusedTorch,
    *in_precisions(FusedCUDA),
    FusedKerasTorch,
    FusedKerasJax,
    FusedKerasTensorFlow,
    Torch,
    *in_precisions(CuDNN),
    Haste,
    *in_precisions(FlashRNN, ("float32", "bfloat16", "float16")),
    TorchCell,
    OnnxRuntime,
    OpenVINO,
    KerasTensorFlow,
    KerasJax,
    KerasTorch,
    JaxScan,
    TorchLoop,
    NumPy,
)
CONTENDERS = {contender.name: contender for contender in _ALL}
OURS = tuple(name for name in CONTENDERS if name.startswith("fusedlstm"))


def best_peer(seconds: Mapping[str, float]) -> str | None:
    """The fastest of the others."""
    return min((name for name in seconds if name not in OURS), key=seconds.__getitem__, default=None)


def absent() -> dict[str, list[str]]:
    """The contenders that cannot run here, by what they lack."""
    lacking: dict[str, list[str]] = {}
    for name, contender in CONTENDERS.items():
        if what := contender.missing():
            lacking.setdefault(what, []).append(name)
    return lacking


def choose(names: str | None) -> list[type[Contender]]:
    """The contenders of a list "name,name,...", or all that are installed.

    Raises:
        ValueError: for a name that is unknown, or one whose packages are not installed.
    """
    if names is None:
        return [contender for contender in CONTENDERS.values() if contender.installed()]
    chosen = []
    for name in (part.strip() for part in names.split(",")):
        if name not in CONTENDERS:
            raise ValueError(f"there is no contender {name!r}; there are {', '.join(CONTENDERS)}")
        contender = CONTENDERS[name]
        if not contender.installed():
            raise ValueError(f"contender {name!r} needs {contender.missing()}")
        chosen.append(contender)
    return chosen
