"""The PyTorch module: among other operations, which share its threads and caches; one step; derived twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fusedlstm
from fusedlstm.benchmarks.cases import Case

torch = pytest.importorskip("torch")
fused = pytest.importorskip("fusedlstm.torch")


@pytest.fixture(params=["alone", "after others"])
def before(request: pytest.FixtureRequest, shape: Case) -> Callable[[], None] | None:
    """What runs before each call, and is not timed."""
    if request.param == "alone":
        return None
    x, signal = torch.randn(shape.steps, shape.batch, shape.inputs), torch.randn(16, 16, 256)
    linear = torch.nn.Linear(shape.inputs, shape.inputs)
    convolution = torch.nn.Conv1d(16, 16, 3)

    def others() -> None:
        with torch.no_grad():
            linear(x)
            convolution(signal)

    return others


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_among_other_operations(benchmark: Any, shape: Case, before: Any, mode: str) -> None:
    module = fused.LSTM(shape.inputs, shape.hidden)
    x = torch.randn(shape.steps, shape.batch, shape.inputs, requires_grad=mode == "train")

    def run() -> Any:
        with torch.set_grad_enabled(mode == "train"):
            y, _ = module(x)
        return torch.autograd.grad(y, [x, *module.parameters()], y) if mode == "train" else y

    results = benchmark.pedantic(run, setup=before, rounds=50, warmup_rounds=3)
    assert all(part.isfinite().all() for part in results)


@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("layer", ["arrays", "module"])
def test_one_step(benchmark: Any, layer: str, state: bool) -> None:
    """What the module adds to the layer for arrays: the shortest sequence of one row, without gradients."""
    x, *hidden = torch.randn(3, 1, 1, 64)
    if layer == "module":
        module, args = fused.LSTM(64, 64), (x, tuple(hidden))
    else:
        module, args = fusedlstm.LSTM(64, 64), (x.numpy(), tuple(part.numpy() for part in hidden))
    with torch.inference_mode():
        y, _ = benchmark(module, *args[: 1 + state])
    assert y.shape == (1, 1, 64)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "train"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("hidden", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("home", [torch.nn, fused], ids=["torch.nn", "fusedlstm"])
def test_one_step_of_a_cell(
    benchmark: Any, home: Any, kind: str, hidden: int, batch: int, gradients: bool
) -> None:
    """Beside PyTorch's: the reason for which `accelerate` leaves cells unless they are asked for."""
    cell = getattr(home, kind)(hidden, hidden)
    x, h, c = torch.randn(3, batch, hidden)
    hx, weights = (h, c) if kind == "LSTMCell" else h, list(cell.parameters())

    def run() -> Any:
        with torch.set_grad_enabled(gradients):
            final = cell(x, hx)
        y = final[0] if isinstance(final, tuple) else final
        return torch.autograd.grad(y, weights, h) if gradients else y

    benchmark(run)


@pytest.mark.parametrize("order", ["first", "second", "gradient penalty"])
def test_gradients_of_gradients(benchmark: Any, shape: Case, order: str) -> None:
    module = fused.LSTM(shape.inputs, shape.hidden)
    x = torch.randn(shape.steps, shape.batch, shape.inputs, requires_grad=True)
    wanted = [x, *module.parameters()]
    y, _ = module(x)
    dy = torch.randn_like(y, requires_grad=True)
    first = torch.autograd.grad(y, wanted, dy, create_graph=True)
    calls = {
        "first": (y, wanted, dy),
        "second": (first, [dy, *wanted], [torch.randn_like(part) for part in first]),
        "gradient penalty": (first[0], wanted[1:], torch.randn_like(x)),
    }
    outputs, inputs, seeds = calls[order]
    results = benchmark(torch.autograd.grad, outputs, inputs, seeds, retain_graph=True)
    assert all(part.isfinite().all() for part in results)
