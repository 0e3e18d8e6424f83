"""Products of bfloat16 and int8 in modules of PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fusedlstm.torch as fused
from fusedlstm.torch import accelerate, restore

WITHIN = {"bfloat16": 5e-3, "int8": 8e-3}


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.LSTM(40, 48, num_layers=2, bidirectional=True)


@pytest.mark.parametrize("precision", WITHIN)
def test_accelerate_in_a_precision(precision: str) -> None:
    lstm, x = model(), torch.randn(20, 3, 40)
    expected = lstm(x)[0].detach()
    report = accelerate(lstm, precision=precision)
    assert list(report.replaced) == [""]
    with torch.no_grad():
        y = lstm(x)[0]
        assert y.dtype is torch.float32
        assert 1e-4 < error(y, expected) < WITHIN[precision]
        assert torch.equal(copy.deepcopy(lstm)(x)[0], y)
        assert torch.equal(pickle.loads(pickle.dumps(lstm))(x)[0], y)
        assert all(parameter.dtype is torch.float32 for parameter in lstm.parameters())
        accelerate(lstm)  # as without
        assert error(lstm(x)[0], expected) < 1e-6
        accelerate(lstm, precision=precision)
    restore(lstm)
    assert type(lstm) is nn.LSTM
    assert "fused_precision" not in vars(lstm)


def test_training_in_bfloat16() -> None:
    ours, theirs = model(), model()
    accelerate(ours, precision="bfloat16")
    x = torch.randn(20, 3, 40)
    for module in (ours, theirs):
        module(x)[0].square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert mine.grad is not None
        assert other.grad is not None
        assert 1e-4 < error(mine.grad, other.grad) < 2e-2, name


def test_training_in_int8_is_refused() -> None:
    lstm = model()
    accelerate(lstm, precision="int8")
    with pytest.raises(ValueError, match="precision 'int8' is for inference; train in 'float32' or"):
        lstm(torch.randn(5, 1, 40))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("precision", WITHIN)
def test_cells(precision: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    cell, x = kind(40, 48), torch.randn(3, 40)
    with torch.no_grad():
        expected = cell(x)
        accelerate(cell, precision=precision, cells=True)
        found = cell(x)
    expected, found = (value[0] if isinstance(value, tuple) else value for value in (expected, found))
    assert 1e-4 < error(found, expected) < WITHIN[precision]


def test_autocast_and_weights_of_bfloat16_multiply_bfloat16() -> None:
    lstm, x = fused.LSTM(40, 48), torch.randn(20, 3, 40)
    inside = fused.LSTM(40, 48)
    inside.load_state_dict(lstm.state_dict())
    accelerate(inside, precision="bfloat16")
    with torch.no_grad():
        exact, wanted = lstm(x)[0], inside(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(lstm(x)[0], wanted.bfloat16())
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(lstm(x)[0], exact.half())
        narrow = copy.deepcopy(lstm).bfloat16()
        assert error(narrow(x.bfloat16())[0], exact) < 2e-2


def test_the_graph_of_a_compiled_module_keeps_the_precision() -> None:
    lstm, x = fused.LSTM(40, 48), torch.randn(20, 3, 40)
    accelerate(lstm, precision="int8")
    with torch.no_grad():
        compiled = torch.compile(lstm, backend="eager")
        assert torch.equal(compiled(x)[0], lstm(x)[0])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of float32, .*, got 'int4'"):
        accelerate(nn.LSTM(1, 1), precision="int4")
