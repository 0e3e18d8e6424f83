"""PyTorch's own samples of its recurrent modules, run on ours."""

from __future__ import annotations

from typing import Any

import checks
import hypothesis
import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import fusedlstm.torch as fused

# That import loads a profile of PyTorch's, with which every test that is collected later would be run.
hypothesis.settings.load_profile("fusedlstm")

KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
INFOS: dict[str, ModuleInfo] = {
    info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in KINDS
}


def test_the_profile_of_hypothesis_is_ours() -> None:
    assert hypothesis.settings.get_current_profile_name() == "fusedlstm"


def samples(kind: str, dtype: torch.dtype, training: bool = True, **options: Any) -> list[Any]:
    info = INFOS[kind]
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training, **options
    )
    assert found
    return list(found)


def modules(kind: str, sample: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """PyTorch's module and ours with the same weights."""
    made = []
    for home in (torch.nn, fused):
        torch.manual_seed(0)
        arguments = sample.constructor_input
        made.append(getattr(home, kind)(*arguments.args, **arguments.kwargs, dtype=dtype))
    return made[0], made[1]


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in leaves(part)]


def outputs(module: torch.nn.Module, args: tuple[Any, ...]) -> list[torch.Tensor]:
    return leaves(module(*args))


def results(module: torch.nn.Module, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Outputs, and gradients of a loss in which each has a part."""
    found = outputs(module, args)
    wanted = [t for t in leaves(args) if t.requires_grad]
    loss = sum(part.square().sum() for part in found)
    return [*found, *torch.autograd.grad(loss, [*wanted, *module.parameters()], retain_graph=True)]


def packed_options(kind: str) -> dict[str, Any]:
    return {"with_packed_sequence": True} if kind in ("GRU", "RNN") else {}


def doubled(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, tuple) and not isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return tuple(map(doubled, value))
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return None if value is None else value.double()


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind: str) -> None:
    for sample in samples(kind, torch.float64, **packed_options(kind)):
        theirs, ours = modules(kind, sample, torch.float64)
        args = sample.forward_input.args
        torch.testing.assert_close(results(ours, args), results(theirs, args))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_in_single_precision(kind: str) -> None:
    """Against PyTorch in float64.

    The samples saturate many gates, where 1 - y*y keeps few digits: PyTorch's own results in float32 are up
    to 2e-5 off the right ones, and ours 3e-5, of the norm.
    """
    torch.manual_seed(0)
    for sample in samples(kind, torch.float32, **packed_options(kind)):
        theirs, ours = modules(kind, sample, torch.float32)
        args = sample.forward_input.args
        exact = results(theirs.double(), doubled(args))
        for found, right in zip(results(ours, args), exact, strict=True):
            assert checks.error(found.detach().numpy(), right.detach().numpy()) <= 5e-5


def check_gradients(kind: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    flat, names = leaves(args), [name for name, _ in module.named_parameters()]

    def run(*tensors: torch.Tensor) -> Any:
        x, *states = tensors[: len(flat)]
        hx = tuple(states) if kind.startswith("LSTM") else (*states, None)[0]
        weights = dict(zip(names, tensors[len(flat) :]))
        return tuple(leaves(torch.func.functional_call(module, weights, (x, hx) if states else (x,))))

    inputs = (*flat, *module.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_gradients(kind: str) -> None:
    for sample in samples(kind, torch.float64)[::3]:
        check_gradients(kind, modules(kind, sample, torch.float64)[1], sample.forward_input.args)


@pytest.mark.parametrize("kind", KINDS)
def test_what_pytorch_refuses_is_refused(kind: str) -> None:
    info = INFOS[kind]
    found = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    for error in found:
        arguments, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        ours = getattr(fused, kind)
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(*arguments.args, **arguments.kwargs)
        else:
            module = ours(*arguments.args, **{"dtype": torch.float64, **arguments.kwargs})
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*given.args, **given.kwargs)
