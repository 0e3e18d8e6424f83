"""Contenders on a GPU, with stand-ins: the CPU for the GPU, the reference for our kernels."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_arrays import cupy  # noqa: F401

from fusedlstm import dispatch
from fusedlstm.benchmarks import contenders, peer_cuda
from fusedlstm.benchmarks.cases import Case, WrongResult, check, expected, make_data
from fusedlstm.benchmarks.contender import Unsupported
from fusedlstm.benchmarks.peer_cuda import CuDNN, FlashRNN, FusedCUDA, Haste, in_precisions

CASE = Case(3, 2, 4, 5)
MODES = ("forward", "train", "step")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """PyTorch's CPU in place of the GPU; the list grows whenever the GPU is waited for."""
    waits: list[str] = []
    monkeypatch.setattr(CuDNN, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    # PyTorch's test utilities, which other tests import, forbid to change its settings
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        yield waits


def run(contender: type[Any], case: Case) -> float:
    """The error of the first call."""
    prepared = contender(1).prepare(case, make_data(case))
    results = prepared.read(prepared.call())
    return check(case, results, expected(case, make_data(case)), contender.tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", in_precisions(CuDNN), ids=lambda contender: contender.name)
def test_cudnn(contender: type[CuDNN], mode: str, on_cpu: list[str]) -> None:
    case = Case(1 if mode == "step" else 3, 2, 4, 5, mode=mode)
    error = run(contender, case)
    assert (error > 1e-5) == (contender.precision in ("bfloat16", "float16"))
    assert on_cpu == ["wait"]
    assert torch.backends.cudnn.allow_tf32 == (contender.precision == "tf32")


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_in_training_mode_if_it_trains(
    mode: str, on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    class LSTM(torch.nn.LSTM):
        def forward(self, *arguments: Any) -> Any:
            modes.append(self.training)
            return super().forward(*arguments)

    monkeypatch.setattr(torch.nn, "LSTM", LSTM)
    run(CuDNN, Case(1 if mode == "step" else 3, 2, 4, 5, mode=mode))
    assert modes == [mode == "train"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", in_precisions(FusedCUDA), ids=lambda contender: contender.name)
def test_ours(contender: type[FusedCUDA], mode: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    reference = dispatch.engine("reference", np.zeros(1))
    monkeypatch.setitem(dispatch._loaded, ("cuda", contender.precision, "auto"), reference)
    assert run(contender, Case(1 if mode == "step" else 3, 2, 4, 5, "peephole_lstm", mode=mode)) < 1e-5


def test_haste(on_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class LSTM(torch.nn.LSTM):
        def from_native_weights(self, *weights: Any) -> None:
            with torch.no_grad():
                for parameter, weight in zip(self.parameters(), weights):
                    parameter.copy_(weight)

    monkeypatch.setitem(sys.modules, "haste_pytorch", types.SimpleNamespace(LSTM=LSTM, GRU=None))
    assert run(Haste, CASE) < 1e-5
    with pytest.raises(Unsupported, match="no stack of layers"):
        run(Haste, Case(3, 2, 4, 5, layers=2))


def flashrnn(
    products: torch.Tensor,  # (B, T, G, 1, H)
    kernels: torch.Tensor,  # (G, 1, H, H)
    biases: torch.Tensor,  # (G, 1, H), or (4, 1, H)
    states: torch.Tensor | None,  # (S, B, 1, 1, H)
    function: str,
    backend: str,
    dtype: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashRNN's function with one head, as its documentation and its own PyTorch version define it."""
    assert (backend, dtype) == ("cuda_fused", "float32")
    gates, count = products[:, :, :, 0], {"lstm": 2, "gru": 1}[function]
    if states is None:
        states = products.new_zeros(count, len(products), 1, 1, products.shape[-1])
    state, outputs = list(states[:, :, 0, 0]), []
    for x in gates.unbind(1):
        h = torch.einsum("gjk,bk->gbj", kernels[:, 0], state[0])
        b = biases
        if function == "lstm":
            i, f, g, o = (x[:, n] + h[n] + b[n] for n in range(4))
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = [o.sigmoid() * c.tanh(), c]
        else:
            r, z = (x[:, n] + h[n + 1] + b[n + 1] for n in range(2))
            n = (x[:, 2] + b[3] + r.sigmoid() * (h[0] + b[0])).tanh()
            state = [z.sigmoid() * state[0] + (1 - z.sigmoid()) * n]
        outputs.append(torch.stack(state))
    found = torch.stack(outputs, 2).unsqueeze(-2)  # (S, B, T, 1, H)
    return found, found[:, :, -1:]


@pytest.mark.parametrize("mode", FlashRNN.modes)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_flashrnn(cell: str, mode: str, on_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashrnn", types.SimpleNamespace(flashrnn=flashrnn))
    assert run(FlashRNN, Case(3, 2, 4, 5, cell, mode=mode)) < 1e-5
    assert on_cpu == ["wait"]
    with pytest.raises(Unsupported, match="no stack of layers"):
        run(FlashRNN, Case(3, 2, 4, 5, cell, layers=2, mode=mode))


def test_a_contender_may_be_less_exact_but_not_wrong() -> None:
    right = expected(CASE, make_data(CASE))
    off = {name: array * 1.05 for name, array in right.items()}
    with pytest.raises(WrongResult):
        check(CASE, off, right)
    assert check(CASE, off, right, 0.1) == pytest.approx(0.05)
    with pytest.raises(WrongResult):
        check(CASE, off, right, 0.01)


def test_without_a_gpu_they_are_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_cuda, "gpu", lambda: None)
    monkeypatch.setattr(CuDNN, "modules", ("torch",))
    assert CuDNN not in contenders.choose(None)
    (reason,) = [what for what, names in contenders.absent().items() if "cudnn-tf32" in names]
    assert reason.startswith("an NVIDIA GPU")
    with pytest.raises(ValueError, match="contender 'cudnn' needs an NVIDIA GPU"):
        contenders.choose("cudnn")
    monkeypatch.setattr(CuDNN, "modules", ("no_such_module",))
    with pytest.raises(ValueError, match="contender 'cudnn' needs no_such_module"):
        contenders.choose("cudnn")


def test_with_a_gpu_they_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_cuda, "gpu", lambda: "NVIDIA H200")
    names = [contender.name for contender in contenders.choose(None)]
    assert {"cudnn", "cudnn-tf32", "cudnn-bfloat16", "cudnn-float16"} < set(names)
    assert CuDNN.versions()["GPU"] == "NVIDIA H200"
    assert "fusedlstm-cuda-tf32" in contenders.OURS
    assert "cudnn" not in contenders.OURS
