"""The PyTorch modules against those of ``torch.nn``, and against their definition where PyTorch has none."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import checks
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fusedlstm
import fusedlstm.torch as fused
from fusedlstm import cells
from fusedlstm.torch import passes, prepared, records

KINDS = ("LSTM", "GRU", "RNN")
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 7


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pair(kind: str, *args: Any, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """PyTorch's module and ours, built from the same seed."""
    modules = []
    for home in (nn, fused):
        torch.manual_seed(1)
        modules.append(getattr(home, kind)(*(args or (INPUTS, HIDDEN)), **settings))
    return modules[0], modules[1]


def leaves(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    parts = (result.data,) if isinstance(result, nn.utils.rnn.PackedSequence) else result
    return [leaf for part in parts for leaf in leaves(part)]


def assert_same(actual: Any, expected: Any) -> None:
    pairs = list(itertools.zip_longest(leaves(actual), leaves(expected)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **TOLERANCE.get(ours.dtype, {}))


def gradients(module: nn.Module, run: Callable[[], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results of `run`, and gradients of a loss in which every result has a part."""
    results = leaves(run())
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (r * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() + r.square().sum()
        for r in results
    )
    return [*results, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]


def state(kind: str, rows: int, batch: int, dtype: torch.dtype, outputs: int = HIDDEN) -> Any:
    sizes = (outputs, HIDDEN) if kind == "LSTM" else (outputs,)
    parts = tuple(torch.randn(rows, batch, size, dtype=dtype, requires_grad=True) for size in sizes)
    return parts if kind == "LSTM" else parts[0]


# --- The drop-in --------------------------------------------------------------------------------------


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "relu", "projected"])
def test_layers_are_pytorchs(
    kind: str, num_layers: int, bidirectional: bool, bias: bool, batch_first: bool, dtype: torch.dtype
) -> None:
    outputs = HIDDEN
    settings: dict[str, Any] = {
        "num_layers": num_layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first,
    }  # fmt: skip
    if kind == "relu":
        kind, settings["nonlinearity"] = "RNN", "relu"
    elif kind == "projected":
        kind, outputs = "LSTM", 2
        settings["proj_size"] = outputs
    theirs, ours = pair(kind, dtype=dtype, **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert repr(ours) == repr(theirs)
    shape = (BATCH, STEPS) if settings["batch_first"] else (STEPS, BATCH)
    x = torch.randn(*shape, INPUTS, dtype=dtype, requires_grad=True)
    rows = settings["num_layers"] * (1 + settings["bidirectional"])
    hx = state(kind, rows, BATCH, dtype, outputs)
    for given in (None, hx):
        inputs = [x, *([] if given is None else leaves(given))]
        expected = gradients(theirs, lambda: theirs(x, given), inputs)  # noqa: B023
        assert_same(gradients(ours, lambda: ours(x, given), inputs), expected)  # noqa: B023
        with torch.no_grad():
            assert_same(ours(x, given), leaves(theirs(x, given)))
    one = x.detach()[0] if settings["batch_first"] else x.detach()[:, 0]
    assert_same(ours(one), theirs(one))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell", "relu"])
def test_cells_are_pytorchs(kind: str, bias: bool) -> None:
    settings: dict[str, Any] = {"bias": bias, "dtype": torch.float64}
    if kind == "relu":
        kind, settings["nonlinearity"] = "RNNCell", "relu"
    theirs, ours = pair(kind, **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for shape in ((BATCH,), ()):
        x = torch.randn(*shape, INPUTS, dtype=torch.float64, requires_grad=True)
        h, c = torch.randn(2, *shape, HIDDEN, dtype=torch.float64).requires_grad_().unbind()
        for hx in (None, (h, c) if kind == "LSTMCell" else h):
            inputs = [x, *([] if hx is None else leaves(hx))]
            expected = gradients(theirs, lambda: theirs(x, hx), inputs)  # noqa: B023
            assert_same(gradients(ours, lambda: ours(x, hx), inputs), expected)  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_both_ways(kind: str) -> None:
    theirs = getattr(nn, kind)(INPUTS, HIDDEN, 2)
    ours = getattr(fused, kind)(INPUTS, HIDDEN, 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert_same(ours(x), theirs(x))
    getattr(nn, kind)(INPUTS, HIDDEN, 2).load_state_dict(ours.state_dict(), strict=True)


def test_dropout_is_pytorchs() -> None:
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 3, dropout=0.5, bidirectional=True, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(gradients(module, lambda: module(x), []))  # noqa: B023
    assert_same(results[1], results[0])
    assert_same(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_pytorchs(kind: str, enforce_sorted: bool) -> None:
    theirs, ours = pair(kind, INPUTS, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    lengths = [5, 4, 1] if enforce_sorted else [1, 5, 4]
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)

    def pack() -> Any:
        return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)

    for hx in (None, state(kind, 4, BATCH, torch.float64)):
        expected, actual = (
            gradients(m, lambda: m(pack(), hx), [x])  # noqa: B023
            for m in (theirs, ours)
        )
        assert_same(actual, expected)
    y, _ = ours(pack())
    reference, _ = theirs(pack())
    assert all(torch.equal(a, b) for a, b in zip(y[1:], reference[1:]) if a is not None)
    assert_same(pad_packed_sequence(y)[0], pad_packed_sequence(reference)[0])


def test_lengths_are_those_of_a_packed_sequence() -> None:
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(BATCH, STEPS, INPUTS, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 5, 3])

    def packed() -> Any:
        y, final = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(y, batch_first=True)[0], final

    expected = gradients(theirs, packed, [x])
    for given in (lengths, lengths.to(torch.int32), [2, 5, 3]):
        assert_same(gradients(ours, lambda: ours(x, lengths=given), [x]), expected)  # noqa: B023


@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_is_a_new_sequence(bidirectional: bool) -> None:
    theirs, ours = pair("GRU", INPUTS, HIDDEN, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(STEPS, 1, INPUTS, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([False, False, True, False, False])

    def two() -> Any:
        return torch.cat([theirs(x[:2])[0], theirs(x[2:])[0]])

    expected = gradients(theirs, two, [x])
    assert_same(gradients(ours, lambda: ours(x, reset=reset[:, None])[0], [x]), expected)
    assert_same(ours(x[:, 0], reset=reset)[0], two()[:, 0])


@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_none(kind: str, given: bool) -> None:
    theirs, ours = pair(kind, INPUTS, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(STEPS, 0, INPUTS, dtype=torch.float64, requires_grad=True)
    hx = state(kind, 4, 0, torch.float64) if given else None
    inputs = [x, *(leaves(hx) if given else [])]
    expected = gradients(theirs, lambda: theirs(x, hx), inputs)
    assert_same(gradients(ours, lambda: ours(x, hx), inputs), expected)
    reset = torch.zeros(STEPS, 0, dtype=torch.bool)
    assert_same(gradients(ours, lambda: ours(x, hx, lengths=[], reset=reset), inputs), expected)
    (dx,) = torch.autograd.grad(ours(x, hx)[0].sum(), x, create_graph=True)
    assert not any(part.any() for part in torch.autograd.grad(dx.sum(), list(ours.parameters())))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_batch_of_none_in_a_cell(kind: str) -> None:
    theirs, ours = pair(kind, dtype=torch.float64)
    x = torch.randn(0, INPUTS, dtype=torch.float64, requires_grad=True)
    assert_same(gradients(ours, lambda: ours(x), [x]), gradients(theirs, lambda: theirs(x), [x]))


@pytest.mark.parametrize("shape", [(0, 2, INPUTS), (0, 0, INPUTS), (0, INPUTS)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_are_refused_as_by_pytorch(kind: str, shape: tuple[int, ...]) -> None:
    for module in pair(kind):
        with pytest.raises(RuntimeError):
            module(torch.zeros(shape))


@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.gru_reset_before], ids=checks.name)
def test_sequences_without_steps(cell: fusedlstm.Cell, bidirectional: bool, lengths: list[int]) -> None:
    """Their outputs are zero, their state stays the initial one, and they touch nothing else."""
    ours = fused.Recurrent(cell, INPUTS, HIDDEN, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for n in (n for n, length in enumerate(lengths) if not length):
        x[:, n] = torch.nan
    x.requires_grad_()
    hx = [
        torch.randn(1 + bidirectional, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
        for _ in cell.states
    ]

    def run() -> Any:
        return ours(x, tuple(hx) if len(hx) > 1 else hx[0], lengths=lengths)

    def alone() -> Any:
        """Each sequence by itself."""
        ys, finals = [], []
        for n, length in enumerate(lengths):
            own = [part[:, n : n + 1] for part in hx]
            y, final = x.new_zeros(0, 1, (1 + bidirectional) * HIDDEN), own
            if length:
                y, final = ours(x[:length, n : n + 1], tuple(own) if len(own) > 1 else own[0])
            ys.append(torch.cat([y, y.new_zeros(STEPS - length, *y.shape[1:])]))
            finals.append(leaves(tuple(final) if isinstance(final, list) else final))
        return torch.cat(ys, 1), tuple(torch.cat(parts, 1) for parts in zip(*finals))

    inputs = [x, *hx]
    found, expected = (outcome(ours, call, inputs) for call in (run, alone))
    assert_same(found, expected)


def outcome(module: nn.Module, run: Callable[[], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results of `run`, and their gradients, zero where nothing depends on it."""
    results = leaves(run())
    loss = sum(part.square().sum() + part.sum() for part in results)
    wanted = [*inputs, *module.parameters()]
    return [*results, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


@pytest.mark.parametrize("layout", ["transposed", "expanded", "stepped", "one feature"])
def test_any_layout_of_memory(layout: str) -> None:
    inputs = 1 if layout == "one feature" else INPUTS
    theirs, ours = pair("LSTM", inputs, HIDDEN)
    x = {
        "transposed": lambda: torch.randn(INPUTS, BATCH, STEPS).permute(2, 1, 0),
        "expanded": lambda: torch.randn(1, 1, INPUTS).expand(STEPS, BATCH, INPUTS),
        "stepped": lambda: torch.randn(STEPS, BATCH, 2 * INPUTS)[..., ::2],
        "one feature": lambda: torch.randn(STEPS, BATCH, 3)[..., 1:2],
    }[layout]()
    for run in (theirs, ours):
        run.zero_grad()
        run(x)[0].sum().backward()  # whose gradient is an expanded number
    assert_same(ours(x), theirs(x))
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


@pytest.mark.parametrize("cell", checks.ALL, ids=checks.name)
def test_any_cell_is_the_array_layer(cell: fusedlstm.Cell) -> None:
    proj = 3 if cell in checks.PROJECTED else 0
    module = fused.Recurrent(cell, INPUTS, HIDDEN, 2, bidirectional=True, proj_size=proj, dtype=torch.float64)
    array = fusedlstm.Recurrent(
        cell, INPUTS, HIDDEN, 2, bidirectional=True, proj_size=proj, dtype="float64", backend="reference"
    )
    array.load_state_dict({name: p.detach() for name, p in module.named_parameters()})
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    y, final = module(x)
    y_array, final_array, tape = array.forward(x.detach().numpy(), training=True)
    assert_same([y, *leaves(final)], [torch.from_numpy(np.array(a)) for a in np_leaves(y_array, final_array)])
    dy = torch.randn_like(y)
    dx, _, grads = tape.backward(dy.numpy())
    found = torch.autograd.grad(y, [x, *module.parameters()], dy, materialize_grads=True)
    expected = [dx, *(grads[name] for name, _ in module.named_parameters())]
    assert_same(found, [torch.from_numpy(np.array(a)) for a in expected])


def test_a_layer_of_a_single_parameter() -> None:
    """Without recurrent weights, biases and learned vectors, which the second parameter would be."""

    @fusedlstm.cell(gates=("a",), without_recurrent=("a",))
    def leaky(a: Any, h: Any) -> Any:
        return 0.5 * h + 0.25 * a * a

    module = fused.Recurrent(leaky, 2, 3, bias=False, dtype=torch.float64)
    assert [name for name, _ in module.named_parameters()] == ["weight_ih_l0"]
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight_ih_l0": weight}, (x,))[0]

    assert torch.autograd.gradcheck(run, (x, module.weight_ih_l0))
    assert torch.autograd.gradgradcheck(run, (x, module.weight_ih_l0))
    before = module(x)[0]
    with torch.no_grad():
        module.weight_ih_l0.mul_(2.0)  # in place: what was packed is out of date
    assert not torch.allclose(module(x)[0], before)
    assert_same(module(x)[0], run(x, module.weight_ih_l0.detach().clone()))


def np_leaves(y: np.ndarray, final: Any) -> list[np.ndarray]:
    return [y, *(final if isinstance(final, tuple) else (final,))]


# --- Autograd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "cell",
    [cells.lstm, cells.gru, cells.peephole_lstm, checks.three_states, cells.gru_reset_before],
    ids=checks.name,
)
def test_gradients_of_gradients(cell: fusedlstm.Cell, bidirectional: bool) -> None:
    module = fused.Recurrent(cell, 2, 3, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    rows = 1 + bidirectional
    hx = tuple(torch.randn(rows, 2, 3, dtype=torch.float64, requires_grad=True) for _ in cell.states)
    names = [name for name, _ in module.named_parameters()]
    reset = torch.tensor([[False, False], [False, True], [True, False], [False, False]])

    def run(x: Tensor, *rest: Tensor) -> Any:
        states, weights = rest[: len(hx)], dict(zip(names, rest[len(hx) :]))
        options = {"lengths": torch.tensor([4, 3]), "reset": reset}
        given = states if len(states) > 1 else states[0]
        return tuple(leaves(torch.func.functional_call(module, weights, (x, given), options)))

    inputs = (x, *hx, *module.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_gradient_penalty_is_pytorchs() -> None:
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 2, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        results.append(
            torch.autograd.grad((dx.norm() - 1) ** 2, [x, *module.parameters()], allow_unused=True)
        )
    kept = [n for n, part in enumerate(results[0]) if part is not None]
    assert_same([results[1][n] for n in kept], [results[0][n] for n in kept])


def test_third_derivatives() -> None:
    """Those of the second, which are replayed."""
    theirs, ours = pair("LSTM", 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        value = module(x)[0].square().sum()
        for _ in range(3):
            (dx,) = torch.autograd.grad(value, x, create_graph=True)
            value = dx.square().sum()
        results.append([dx, *torch.autograd.grad(value, list(module.parameters()), allow_unused=True)])
    kept = [n for n, part in enumerate(results[0]) if part is not None]
    assert_same([results[1][n] for n in kept], [results[0][n] for n in kept])


def test_input_without_gradient() -> None:
    _, ours = pair("LSTM", INPUTS, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    expected, found = (
        torch.autograd.grad(ours(given)[0].square().sum(), list(ours.parameters()))
        for given in (x.clone().requires_grad_(), x)
    )
    assert_same(found, expected)


def test_gradients_of_samples() -> None:
    theirs, ours = pair("LSTM", dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    samples = torch.randn(6, STEPS, INPUTS, dtype=torch.float64)

    def loss(parameters: Any, sample: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (sample,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for n, sample in enumerate(samples):
        expected = torch.autograd.grad(theirs(sample)[0].square().sum(), list(theirs.parameters()))
        assert_same([found[name][n] for name in parameters], expected)


def test_vmap_over_weights_and_sequences() -> None:
    models = [fused.GRU(INPUTS, HIDDEN) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = torch.randn(3, STEPS, BATCH, INPUTS)
    run = torch.func.vmap(lambda p, x: torch.func.functional_call(models[0], p, (x,)))
    assert_same(run(parameters, x)[0], torch.stack([m(part)[0] for m, part in zip(models, x)]))


def test_second_derivative_by_transforms() -> None:
    theirs, ours = pair("GRU", 2, 3, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64)
    found = torch.func.jacrev(torch.func.jacrev(lambda x: ours(x)[0].square().sum()))(x)
    expected = torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x)
    assert_same(found, expected)


def test_backward_twice_and_in_eval_mode() -> None:
    theirs, ours = pair("LSTM", dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    loss = ours.eval()(x)[0].square().sum()
    expected = torch.autograd.grad(theirs(x)[0].square().sum(), x)
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, x, retain_graph=True), expected)


@pytest.mark.parametrize("what", ["input", "output", "weight"])
def test_changed_before_backward_is_an_error(what: str) -> None:
    ours = fused.LSTM(INPUTS, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUTS) * torch.ones((), requires_grad=True)
    y, _ = ours(x)
    loss = y.sum()
    with torch.no_grad():
        {"input": x, "output": y, "weight": ours.weight_hh_l0}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_tensors_may_be_moved() -> None:
    """Then what the kernels kept is gone, and is computed again."""
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = gradients(ours, lambda: ours(x), [x])
    assert_same(found, gradients(theirs, lambda: theirs(x), [x]))


def test_checkpointing() -> None:
    theirs, ours = pair("GRU", dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    run = torch.utils.checkpoint.checkpoint
    found = gradients(ours, lambda: run(ours, x, use_reentrant=False), [x])
    assert_same(found, gradients(theirs, lambda: theirs(x), [x]))


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_for_backward_is_freed(frozen: bool) -> None:
    gc.collect()
    ours = fused.LSTM(INPUTS, HIDDEN, 2).requires_grad_(not frozen)
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    before = len(records._records)
    results = [ours(x)[0].sum() for _ in range(3)]
    assert len(records._records) == before + 6
    del results
    gc.collect()
    assert len(records._records) == before
    number = len(prepared._packed)
    del ours
    assert len(prepared._packed) == number - 2


# --- Between forward and backward ---------------------------------------------------------------------


def swap(tensor: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Give a tensor other data, which no counter tells."""
    tensor.data = torch.randn(shape, dtype=dtype)


SWAPS: dict[str, Callable[[nn.Module, Tensor, list[Tensor], Tensor], Any]] = {
    "a smaller input": lambda m, x, hx, y: swap(x, 1, 1, INPUTS),
    "a larger input": lambda m, x, hx, y: swap(x, STEPS + 1, BATCH, INPUTS),
    "an input of another type": lambda m, x, hx, y: swap(x, *x.shape, dtype=torch.float64),
    "a smaller state": lambda m, x, hx, y: swap(hx[1], 2, 1, HIDDEN),
    "larger weights": lambda m, x, hx, y: swap(m.weight_hh_l0, 4 * HIDDEN + 4, HIDDEN + 1),
    "larger weights in reverse": lambda m, x, hx, y: swap(m.weight_hh_l0_reverse, 999, HIDDEN),
    "a smaller bias": lambda m, x, hx, y: swap(m.bias_ih_l0_reverse, 1),
    "double": lambda m, x, hx, y: m.double(),
    "half": lambda m, x, hx, y: m.half(),
    "all of another type": lambda m, x, hx, y: [
        swap(part, *part.shape, dtype=torch.float64) for part in (x, *hx, y, *m.parameters())
    ],
}


@pytest.mark.parametrize("wanted", ["all", "weights"])
@pytest.mark.parametrize("name", SWAPS)
def test_other_data_before_backward_is_refused(name: str, wanted: str) -> None:
    """Kernels would read, and write gradients, beyond what there is."""
    ours = fused.LSTM(INPUTS, HIDDEN, bidirectional=True)
    x, *hx = torch.randn(STEPS, BATCH, INPUTS), *torch.randn(2, 2, BATCH, HIDDEN).unbind()
    for part in (x, *hx):
        part.requires_grad_(wanted == "all")
    y, _ = ours(x, tuple(hx))
    loss = y.sum()
    SWAPS[name](ours, x, hx, y)
    with pytest.raises(RuntimeError, match=r"other data between|must have the shape|must be torch.float"):
        loss.backward()


def test_other_data_before_the_second_backward_is_refused() -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
    swap(x, 1, 1, INPUTS)
    with pytest.raises(RuntimeError, match="other data between forward and backward"):
        dx.sum().backward()


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru_reset_before], ids=checks.name)
def test_weights_that_moved_before_backward(cell: fusedlstm.Cell) -> None:
    """As under FSDP, which frees them after forward, and allocates them anew for backward."""
    ours = fused.Recurrent(cell, INPUTS, HIDDEN, bidirectional=True)
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    expected = gradients(ours, lambda: ours(x), [x])

    def run() -> Any:
        results = ours(x)
        weights = list(ours.parameters())
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(weights)):
            for weight in weights:
                weight.untyped_storage().resize_(0)
            others = [torch.full_like(copy, torch.nan) for copy in kept]  # in the memory that became free
            for weight, copy in zip(weights, kept):
                weight.untyped_storage().resize_(copy.nbytes)
                weight.copy_(copy)
            del others
        return results

    assert_same(gradients(ours, run, [x]), expected)


def test_lengths_and_reset_may_be_written_after_the_call() -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN, 2), torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)

    def run(write: bool) -> Any:
        lengths, reset = torch.tensor([2, 5, 3]), torch.zeros(STEPS, BATCH, dtype=torch.bool)
        reset[2] = True
        y, _ = ours(x, lengths=lengths, reset=reset)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        if write:
            lengths.fill_(1)
            reset.fill_(False)
        return [y, dx, *torch.autograd.grad(dx.square().sum(), list(ours.parameters()), allow_unused=True)]

    kept = [n for n, part in enumerate(run(False)) if part is not None]
    assert_same([run(True)[n] for n in kept], [run(False)[n] for n in kept])


@pytest.mark.parametrize("operator", [False, True])
def test_lengths_and_reset_may_be_written_during_the_call(
    operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, here before each direction: the kernels would read beyond the arrays."""
    ours, x = (
        fused.LSTM(INPUTS, HIDDEN, 1 if operator else 2, bidirectional=True),
        torch.randn(STEPS, 2, INPUTS),
    )
    lengths, reset = torch.tensor([2, 5]), torch.zeros(STEPS, 2, dtype=torch.bool)
    reset[1] = True
    weights = [weight.detach() for weight in ours.parameters()]

    def run() -> Any:
        if operator:
            return torch.ops.fusedlstm.layer(x, [], weights, lengths, reset, cells.lstm.key, 2, False)[:-1]
        return ours(x, lengths=lengths, reset=reset)

    with torch.no_grad():
        expected = run()
        direction = passes.direction_of

        def write(*args: Any) -> Any:
            lengths.fill_(1 << 40)
            reset.fill_(False)
            return direction(*args)

        monkeypatch.setattr(passes, "direction_of", write)
        assert_same(run(), expected)


# --- Memory that is PyTorch's -------------------------------------------------------------------------


def test_storages_can_be_resized_after_a_call() -> None:
    """`Tensor.numpy` forbids it for good."""
    ours, x = fused.LSTM(INPUTS, HIDDEN, 2), torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    hx = torch.randn(2, 2, BATCH, HIDDEN).unbind()
    lengths, reset = torch.tensor([2, 5, 3]), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    dy = torch.randn(STEPS, BATCH, HIDDEN, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x, hx, lengths=lengths, reset=reset)[0], x, dy, create_graph=True)
    seed = torch.randn_like(dx)
    torch.autograd.grad(dx, [dy, *ours.parameters()], seed, allow_unused=True)
    weights = [weight.detach() for weight in ours.parameters()]
    torch.ops.fusedlstm.layer(x, [], weights[:4], lengths, reset, cells.lstm.key, 1, False)
    for part in (x, *hx, lengths, reset, dy, seed, *weights):
        storage = part.untyped_storage()
        assert storage.resizable()
        storage.resize_(0)


FREED = ["input", "state", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", FREED)
def test_memory_that_was_freed_is_refused(name: str, called: bool) -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    hx = tuple(torch.randn(1, BATCH, HIDDEN) for _ in range(2))
    with torch.no_grad():
        if called:
            ours(x, hx)
        freed = {"input": x, "state": hx[1]}.get(name)
        freed = getattr(ours, name) if freed is None else freed
        freed.untyped_storage().resize_(0)
        label = {"state": "initial state c"}.get(name, name.removesuffix("_l0"))
        with pytest.raises(RuntimeError, match=f"{label} has no memory"):
            ours(x, hx)


def test_memory_that_was_freed_before_backward_is_refused() -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    y, _ = ours(x)
    ours.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight_hh has no memory"):
        y.sum().backward()


def test_tensors_with_the_mark_of_the_other_sign() -> None:
    theirs, ours = pair("LSTM", dtype=torch.float64)
    x = torch._neg_view(torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)).requires_grad_()
    assert x.is_neg()
    assert_same(gradients(ours, lambda: ours(x), [x]), gradients(theirs, lambda: theirs(x), [x]))
    results = []
    for module in (theirs, ours):
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, module.weight_hh_l0]))
    assert_same(results[1], results[0])


# --- Compiled -----------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(2 * HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, final = self.layer(torch.sin(x) * 2)
        return self.head(torch.relu(y)).square().mean() + sum(part.sum() for part in leaves(final))


@pytest.mark.parametrize(("kind", "backend"), [("LSTM", "aot_eager"), ("GRU", "inductor")])
def test_compiled_in_one_graph(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    theirs, ours = map(Model, pair(kind, INPUTS, HIDDEN, 2, bidirectional=True))
    ours.load_state_dict(theirs.state_dict())
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for steps in (STEPS, STEPS + 1):
        x = torch.randn(steps, BATCH, INPUTS, requires_grad=True)
        expected = gradients(theirs, lambda: theirs(x), [x])  # noqa: B023
        assert_same(gradients(ours, lambda: compiled(x), [x]), expected)  # noqa: B023
        with torch.no_grad():
            assert_same(compiled(x), expected[0])


def test_compiled_before_anything_else_has_run() -> None:
    """A new process, for a cell that no other test has used."""
    program = """
import torch, fusedlstm.torch as fused
from fusedlstm.cells import coupled_lstm
for layer in (fused.Recurrent(coupled_lstm, 2, 3), fused.RNN(2, 3)):
    x = torch.randn(4, 2, 2, requires_grad=True)
    y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x)[0])
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=170)


def test_operators_keep_the_rules() -> None:
    ours = fused.LSTM(2, 3, bidirectional=True)
    x = torch.randn(4, 2, 2, requires_grad=True)
    states = [torch.randn(2, 2, 3, requires_grad=True) for _ in range(2)]
    args = (x, states, list(ours.parameters()), torch.tensor([4, 2]), None, cells.lstm.key, 2, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fusedlstm.layer.default, args, test_utils=tests)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(nn.RNNBase, "reset_parameters", lambda self: None)  # random numbers need a driver
    with FakeTensorMode(), torch.set_grad_enabled(device == "cpu"):  # autograd needs a driver for the other
        ours = fused.LSTM(INPUTS, HIDDEN, 2, proj_size=2, bidirectional=True, device=device)
        x = torch.empty(STEPS, BATCH, INPUTS, device=device, requires_grad=True)
        y, (h, c) = ours(x, lengths=torch.empty(BATCH, dtype=torch.int64, device=device))
        assert [part.shape for part in (y, h, c)] == [(STEPS, BATCH, 4), (4, BATCH, 2), (4, BATCH, HIDDEN)]
        assert {part.device.type for part in (y, h, c)} == {device}
        if device == "cpu":
            y.sum().backward()
            assert all(p.grad.shape == p.shape for p in (x, *ours.parameters()))


# --- A stale layout is impossible ---------------------------------------------------------------------


def swap_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def swap_data_and_back_to_the_same_place(weight: nn.Parameter) -> None:
    for _ in range(8):  # the allocator gives freed memory again
        weight.data = torch.randn(weight.shape)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "add_": lambda w: w.detach().add_(1),
    "copy_": lambda w: w.detach().copy_(torch.randn(w.shape)),
    "one entry": lambda w: w.detach()[-1].fill_(3),
    "swap .data": swap_data,
    "swap .data often": swap_data_and_back_to_the_same_place,
    "write to .data": lambda w: w.data.mul_(2),
    "one entry of .data": lambda w: w.data.view(-1)[w.numel() // 2].fill_(5.0),
    "init on .data": lambda w: nn.init.normal_(w.data),
    "by NumPy": lambda w: np.multiply(w.detach().numpy(), 2, out=w.detach().numpy()),
    "in inference mode": lambda w: torch.inference_mode()(lambda: w.mul_(2))(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: str) -> None:
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 2)
    x = torch.randn(STEPS, BATCH, INPUTS)
    for name in list(dict(ours.named_parameters())):
        with torch.no_grad():
            ours(x)
        CHANGES[change](getattr(ours, name))
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            assert_same(ours(x), theirs(x))
        assert_same(ours(x), theirs(x))


def test_the_same_memory_in_another_shape_is_seen() -> None:
    theirs, ours = pair("RNN", HIDDEN, HIDDEN)
    x = torch.randn(STEPS, BATCH, HIDDEN)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        ours(x)
        for module in (theirs, ours):
            getattr(module, name).data = getattr(module, name).data.t()
        assert_same(ours(x), theirs(x))


def test_views_of_the_same_memory_of_other_shapes_are_told_apart() -> None:
    whole, hh = torch.randn(8, HIDDEN), torch.randn(HIDDEN, HIDDEN)
    for inputs in (8, 4):
        weights = {"weight_ih_l0": whole[:inputs].t(), "weight_hh_l0": hh}
        x = torch.randn(STEPS, BATCH, inputs)
        theirs, ours = pair("RNN", inputs, HIDDEN, bias=False)
        found, expected = (torch.func.functional_call(module, weights, x) for module in (ours, theirs))
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_ih_l0", (4 * HIDDEN, INPUTS + 1)),
        ("weight_hh_l0", (4, 1)),
        ("weight_hh_l0_reverse", (4 * HIDDEN, HIDDEN + 1)),
        ("weight_ih_l0_reverse", (4 * HIDDEN + 4, INPUTS)),
        ("bias_hh_l0", (3,)),
    ],
)
def test_weights_of_a_wrong_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """Kernels would read beyond them."""
    ours, x = fused.LSTM(INPUTS, HIDDEN, bidirectional=True), torch.randn(STEPS, BATCH, INPUTS)
    ours(x)
    with pytest.raises(RuntimeError, match=r"must have the shape \("):
        torch.func.functional_call(ours, {name: torch.randn(shape)}, x)
    cell = fused.LSTMCell(INPUTS, HIDDEN)
    own = name.partition("_l0")[0]
    with pytest.raises(RuntimeError, match=r"must have the shape \("):
        torch.func.functional_call(cell, {own: torch.randn(shape)}, x[0])


WEIGHTS = ("weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_ih_l0_reverse", "bias_hh_l0_reverse")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_another_type_are_refused(name: str, dtype: torch.dtype) -> None:
    """Kernels would take their bits for those of the first one's type."""
    ours, x = fused.LSTM(INPUTS, HIDDEN, bidirectional=True), torch.randn(STEPS, BATCH, INPUTS)
    ours(x)
    what = name.replace("_l0", "")
    with pytest.raises(RuntimeError, match=f"{what} must be torch.float32, .*{dtype}"):
        torch.func.functional_call(ours, {name: getattr(ours, name).detach().to(dtype)}, x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16], ids=str)
def test_a_direction_of_another_type_is_refused(dtype: torch.dtype) -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN, bidirectional=True), torch.randn(STEPS, BATCH, INPUTS)
    back = {name: p.detach().to(dtype) for name, p in ours.named_parameters() if "reverse" in name}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"weight_ih_reverse must be torch.float32, .*{dtype}"):
            torch.func.functional_call(ours, back, x)
        if dtype is torch.float64:  # such a direction has been laid out
            own = list(back.values())
            torch.ops.fusedlstm.layer(x.double(), [], own, None, None, cells.lstm.key, 1, False)


def test_weights_of_another_type_in_the_same_memory_are_refused() -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN).requires_grad_(False), torch.randn(STEPS, BATCH, INPUTS)
    ours(x)
    ours.bias_hh_l0.data = ours.bias_hh_l0.data.view(torch.int32)
    with pytest.raises(RuntimeError, match=r"bias_hh must be torch.float32.*int32"):
        ours(x)


def test_a_part_of_weights_in_the_same_memory_is_refused() -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    for name in ("bias_hh_l0", "weight_hh_l0"):
        ours(x)
        whole = getattr(ours, name).data
        getattr(ours, name).data = whole[:3]
        with pytest.raises(RuntimeError, match=r"must have the shape"):
            ours(x)
        getattr(ours, name).data = whole


def test_weights_elsewhere_are_refused() -> None:
    ours, x = fused.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    elsewhere = {"weight_hh_l0": torch.empty(4 * HIDDEN, HIDDEN, device="meta")}
    with pytest.raises(RuntimeError, match=r"weight_hh must lie on cpu.*meta"):
        torch.func.functional_call(ours, elsewhere, x)
    with pytest.raises(RuntimeError, match="meta"):
        ours(x.to("meta"))


@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell", "GRUCell", "RNNCell"])
def test_states_that_fit_the_module_but_not_its_weights_are_refused(kind: str) -> None:
    """Kernels would write beyond the rows of the state."""
    ours, single = getattr(fused, kind)(INPUTS, 100), kind.endswith("Cell")
    small = dict(getattr(nn, kind)(INPUTS, HIDDEN).named_parameters())
    x, h = torch.ones(BATCH, INPUTS), torch.ones(BATCH, 100)
    if not single:
        x, h = x[None], h[None]
    hx = (h, h) if "LSTM" in kind else h
    with pytest.raises(RuntimeError, match=r"initial state h must have the shape \(1, 3, 7\).*\(1, 3, 100\)"):
        torch.func.functional_call(ours, small, (x, hx))
    ours = getattr(fused, kind)(INPUTS, HIDDEN)
    ours.hidden_size = 100
    with pytest.raises(RuntimeError, match=r"initial state h must have the shape \(1, 3, 7\).*\(1, 3, 100\)"):
        ours(x, hx)


@pytest.mark.parametrize("setting", [{"num_layers": 3}, {"num_layers": 1}, {"bidirectional": False}])
def test_settings_that_do_not_fit_the_weights_are_refused(setting: dict[str, Any]) -> None:
    ours = fused.GRU(HIDDEN, HIDDEN, 2, bidirectional=True)
    for name, value in setting.items():
        setattr(ours, name, value)
    with pytest.raises(RuntimeError, match="do not fit the weights"):
        ours(torch.ones(STEPS, BATCH, HIDDEN))


def test_large_weights_written_unseen_by_counters() -> None:
    theirs, ours = pair("LSTM", 300, 300)
    x = torch.randn(2, 1, 300)
    with torch.no_grad():
        ours(x)
        ours.weight_ih_l0.data.mul_(2)
        theirs.weight_ih_l0.mul_(2)
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("told", [False, True])
def test_one_entry_of_large_weights_written_unseen_by_counters(told: bool) -> None:
    """Seen by itself where there is so much to compute that all weights are looked at."""
    theirs, ours = pair("LSTM", 300, 300)
    x = torch.randn(2 if told else 64, 16, 300)
    with torch.no_grad():
        for value in (3.0, -3.0):
            ours(x)
            for module in (ours, theirs):
                module.weight_hh_l0.data[77, 133] = value
            if told:
                ours.flatten_parameters()
            assert_same(ours(x), theirs(x))


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        theirs, ours = pair("LSTM")
        x = torch.randn(STEPS, BATCH, INPUTS)
        for _ in range(2):
            assert_same(ours(x), theirs(x))
            for module in (theirs, ours):
                module.weight_hh_l0.mul_(2)


def test_weights_without_counters_and_bits_are_never_the_same() -> None:
    with torch.inference_mode():
        weights = [torch.ones(2, 2)]
    assert prepared._stamp(None, weights, 1) != prepared._stamp(None, weights, 1)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers(optimizer: Any) -> None:
    theirs, ours = pair("LSTM", dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for module in (theirs, ours):
        steps = optimizer(module.parameters(), lr=0.1)
        for _ in range(5):
            steps.zero_grad()
            module(x)[0].square().sum().backward()
            steps.step()
    assert_same(list(ours.parameters()), list(theirs.parameters()))


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    pack = prepared._pack
    monkeypatch.setattr(prepared, "_pack", lambda *args: made.append(1) or pack(*args))
    ours = fused.LSTM(INPUTS, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUTS)
    for _ in range(3):
        ours(x)[0].sum().backward()
        with torch.no_grad():
            ours(x)
    assert len(made) == 1


def test_parametrized_weights() -> None:
    theirs, ours = pair("LSTM", dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        parametrizations.weight_norm(module, "weight_hh_l0")
        steps = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            steps.zero_grad()
            module(x)[0].square().sum().backward()
            steps.step()
        results.append([module(x)[0], *module.parameters()])
    assert_same(results[1], results[0])


def test_weight_drop() -> None:
    """AWD-LSTM: the recurrent weights are a plain tensor, made before each call."""
    ours = fused.LSTM(INPUTS, HIDDEN, dtype=torch.float64)
    raw = nn.Parameter(ours.weight_hh_l0.detach().clone())
    del ours.weight_hh_l0
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for scale in (1.0, 0.5):
        ours.weight_hh_l0 = raw * scale
        reference = nn.LSTM(INPUTS, HIDDEN, dtype=torch.float64)
        reference.load_state_dict({**ours.state_dict(), "weight_hh_l0": raw.detach() * scale})
        y, _ = ours(x)
        assert_same(y, reference(x)[0])
        expected = torch.autograd.grad(reference(x)[0].sum(), reference.weight_hh_l0)[0] * scale
        assert_same(torch.autograd.grad(y.sum(), raw), [expected])


# --- A module like others -----------------------------------------------------------------------------


def test_copies_and_files() -> None:
    ours = fused.LSTM(INPUTS, HIDDEN, 2, bidirectional=True)
    x = torch.randn(STEPS, BATCH, INPUTS)
    expected = ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
        copy.deepcopy(ours).double().float(),
        copy.deepcopy(ours).to("cpu"),
    ):
        assert_same(other(x), expected)
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert_same(ours(x), expected)


def test_a_cell_of_ones_own_can_be_pickled() -> None:
    ours = fused.Recurrent(cells.peephole_lstm, INPUTS, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert_same(pickle.loads(pickle.dumps(ours))(x), ours(x))
    assert repr(fused.Recurrent(cells.gru, 2, 3, 2, bidirectional=True)) == (
        "Recurrent(gru, 2, 3, num_layers=2, bidirectional=True)"
    )


def test_hooks_and_flatten_parameters() -> None:
    ours = fused.GRU(INPUTS, HIDDEN)
    seen = []
    ours.register_forward_hook(lambda module, args, result: seen.append(result[0].shape))
    ours.flatten_parameters()
    ours(torch.randn(STEPS, BATCH, INPUTS))
    assert seen == [(STEPS, BATCH, HIDDEN)]


@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_types_are_pytorchs(kind: str, given: torch.dtype) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(BATCH, INPUTS) if kind.endswith("Cell") else torch.randn(STEPS, BATCH, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = leaves(theirs(x.to(given))), leaves(ours(x.to(given)))
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    for ours_part, exact in zip(found, leaves(theirs(x.to(given).float()))):
        torch.testing.assert_close(ours_part.float(), exact, rtol=1e-2, atol=1e-2)
    sum(part.float().sum() for part in found).backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_states_of_any_type(given: torch.dtype) -> None:
    theirs, ours = pair("LSTM")
    x, h, c = torch.randn(STEPS, BATCH, INPUTS), *torch.randn(2, 1, BATCH, HIDDEN).unbind()
    exact = leaves(theirs(x, (h.to(given).float(), c)))
    with torch.autocast("cpu", torch.bfloat16):
        found = leaves(ours(x, (h.to(given), c)))
    for part, right in zip(found, exact):
        torch.testing.assert_close(part.float(), right, rtol=1e-2, atol=1e-2)


def test_weights_of_low_precision() -> None:
    theirs, ours = pair("LSTM", dtype=torch.bfloat16)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.bfloat16)
    y, _ = ours(x)
    torch.testing.assert_close(y, theirs.float()(x.float())[0].bfloat16(), rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert ours.weight_hh_l0.grad.dtype is torch.bfloat16


# --- Threads and processes ----------------------------------------------------------------------------


def test_runs_on_pytorchs_threads() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert fusedlstm.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_many_threads_at_once() -> None:
    theirs, ours = pair("LSTM", 8, 64)
    inputs = [torch.randn(20, 2, 8) for _ in range(4)]
    expected = [theirs(x)[0].detach() for x in inputs]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(10):
            y, _ = ours(inputs[n])
            if not torch.allclose(y, expected[n], atol=1e-5):
                wrong.append(n)
            torch.autograd.grad(y.sum(), ours.weight_hh_l0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Encoded(torch.utils.data.Dataset[Tensor]):
    """Sequences that an LSTM has seen in the process that loads them."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.x = layer, torch.randn(8, STEPS, INPUTS)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> Tensor:
        return self.layer(self.x[n])[0].detach()


def test_in_workers_of_a_data_loader() -> None:
    data = Encoded(fused.LSTM(INPUTS, 32))
    expected = torch.stack([data[n] for n in range(8)])  # and so the parent has run kernels before it forks
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert_same(torch.cat(list(loader)), expected)


# --- Models that exist --------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, INPUTS)
        self.encoder = nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True)
        self.decoder = nn.ModuleDict({"gru": nn.GRU(2 * HIDDEN, 3), "step": nn.LSTMCell(3, 3)})
        self.shared = self.encoder

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.encoder(self.embed(tokens))
        y, _ = self.decoder["gru"](y)
        return self.decoder["step"](y[-1])[0]


class OwnLSTM(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_accelerate_and_restore() -> None:
    model = Tagger()
    model.own, model.half = OwnLSTM(2, 3), nn.GRU(2, 3, dtype=torch.bfloat16)
    steps = torch.optim.Adam(model.parameters())
    before, texts = [id(p) for p in model.parameters()], repr(model)
    tokens = torch.randint(11, (STEPS, BATCH))
    expected = model(tokens)
    report = fused.accelerate(model, cells=True)
    assert list(report.replaced) == ["encoder", "decoder.gru", "decoder.step"]
    assert list(report.skipped) == ["own", "half"]
    assert "OwnLSTM" in report.skipped["own"]
    assert "bfloat16" in report.skipped["half"]
    assert "3 replaced, 2 not" in str(report)
    assert type(model.encoder) is fused.LSTM
    assert model.shared is model.encoder
    assert [id(p) for p in model.parameters()] == before
    assert_same(model(tokens), expected)
    assert not fused.accelerate(model, cells=True).replaced
    model(tokens).sum().backward()
    steps.step()
    changed = model(tokens)
    assert fused.restore(model) == list(report.replaced)
    assert type(model.encoder) is nn.LSTM
    assert repr(model) == texts
    assert_same(model(tokens), changed)
    assert fused.restore(model) == []


def test_restore_changes_nothing_where_a_module_has_become_another_class() -> None:
    model = nn.Sequential(nn.LSTM(2, 3), nn.GRU(3, 2))
    fused.accelerate(model)
    model[1].__class__ = type("Other", (fused.GRU,), {})
    with pytest.raises(TypeError, match=r"^1 has become a Other since: undo that first"):
        fused.restore(model)
    assert type(model[0]) is fused.LSTM
    model[1].__class__ = fused.GRU
    assert fused.restore(model) == ["0", "1"]


def test_accelerate_takes_the_model_itself() -> None:
    model = nn.GRU(2, 3)
    assert str(fused.accelerate(model)).startswith("1 replaced, 0 not\n  the model itself: GRU(2, 3)\n")
    assert type(model) is fused.GRU
    assert fused.restore(fused.LSTM(2, 3)) == []  # it never was PyTorch's


# --- Bad input ----------------------------------------------------------------------------------------

X = torch.zeros(2, 2, 4)
BAD: dict[str, tuple[type[Exception], str, Callable[[Any], Any]]] = {
    "dimensions": (ValueError, r"2D or 3D, got 4D", lambda m: m(torch.zeros(2, 2, 2, 4))),
    "features": (RuntimeError, r"Expected 4, got 5", lambda m: m(torch.zeros(2, 2, 5))),
    "dtype": (ValueError, r"float64.*float32", lambda m: m(X.double())),
    "no steps": (RuntimeError, r"one time step", lambda m: m(torch.zeros(0, 2, 4))),
    "state of one": (
        TypeError,
        r"tuple \(h, c\), got a tensor",
        lambda m: m(X, torch.zeros(1)),
    ),
    "state size": (
        RuntimeError,
        r"hidden\[1\] size \(1, 2, 7\), got \(1, 2, 6\)",
        lambda m: m(X, (torch.zeros(1, 2, 7), torch.zeros(1, 2, 6))),
    ),
    "state dtype": (
        ValueError,
        r"hidden\[0\] dtype",
        lambda m: m(X, (torch.zeros(1, 2, 7).double(), torch.zeros(1, 2, 7))),
    ),
    "lengths shape": (
        ValueError,
        r"lengths.*\(2,\).*\(3,\)",
        lambda m: m(X, lengths=[1, 2, 2]),
    ),
    "lengths range": (
        ValueError,
        r"from 0 to 2, got -1 to 3",
        lambda m: m(X, lengths=[-1, 3]),
    ),
    "lengths dtype": (TypeError, r"integers", lambda m: m(X, lengths=[1.0, 2.0])),
    "lengths unbatched": (ValueError, r"batch axis", lambda m: m(torch.zeros(2, 4), lengths=[1])),
    "reset dtype": (TypeError, r"booleans", lambda m: m(X, reset=torch.zeros(2, 2))),
    "reset shape": (
        ValueError,
        r"\(2, 3\).*\(3, 2\)",
        lambda m: m(torch.zeros(2, 3, 4), reset=torch.zeros(3, 2, dtype=torch.bool)),
    ),
    "packed lengths": (
        ValueError,
        r"PackedSequence",
        lambda m: m(pack_sequence([torch.zeros(2, 4)]), lengths=[2]),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call(fused.LSTM(4, 7))


@pytest.mark.parametrize(
    ("hx", "message"), [((None, None), r"hx\[0\] .*got None"), (3, r"\(h, c\), got int")]
)
def test_bad_state_of_a_cell(hx: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fused.LSTMCell(4, 7)(X[0], hx)


def test_bad_cell() -> None:
    with pytest.raises(TypeError, match="cell must be made with"):
        fused.Recurrent(torch.tanh, 2, 3)
    with pytest.raises(ValueError, match="reads its own output"):
        fused.Recurrent(cells.gru, 2, 3, proj_size=2)


# --- The operators, which exported programs call ------------------------------------------------------


def layer_arguments() -> dict[str, Any]:
    """Of the operator of both directions."""
    weights = [weight.detach() for weight in fused.LSTM(INPUTS, HIDDEN, bidirectional=True).parameters()]
    return {
        "x": torch.randn(STEPS, BATCH, INPUTS),
        "initial": list(torch.randn(2, 2, BATCH, HIDDEN).unbind()),
        "weights": weights,
        "lengths": torch.full((BATCH,), STEPS),
        "reset": torch.zeros(STEPS, BATCH, dtype=torch.bool),
        "cell": cells.lstm.key,
        "directions": 2,
        "training": True,
    }


def other(name: str, n: int, tensor: Tensor) -> dict[str, Any]:
    """The arguments with another tensor in one of the lists."""
    entries = list(layer_arguments()[name])
    entries[n] = tensor
    return {name: entries}


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "input of a row": (RuntimeError, r"input must have 3 dim", {"x": torch.zeros(BATCH, INPUTS)}),
    "input without steps": (RuntimeError, r"one time step", {"x": torch.zeros(0, BATCH, INPUTS)}),
    "input features": (RuntimeError, r"weight_ih must have the sh", {"x": torch.zeros(STEPS, BATCH, 9)}),
    "input type": (RuntimeError, r"float64", {"x": torch.zeros(STEPS, BATCH, INPUTS).double()}),
    "one state": (RuntimeError, r"initial must have the states h, c", {"initial": [torch.zeros(2, 3, 7)]}),
    "state of one row": (RuntimeError, r"state c.*\(2, 3, 7\)", other("initial", 1, torch.zeros(2, 1, 7))),
    "state of a direction": (RuntimeError, r"state h.*\(2, 3", other("initial", 0, torch.zeros(1, 3, 7))),
    "state type": (RuntimeError, r"state h.*int32", other("initial", 0, torch.zeros(2, 3, 7).int())),
    "no weights": (ValueError, r"weights must be one matrix", {"weights": []}),
    "a weight less": (ValueError, r"weights must be", {"weights": layer_arguments()["weights"][1:]}),
    "weight of one axis": (RuntimeError, r"matrices of weights 2", other("weights", 1, torch.zeros(28))),
    "weight rows": (RuntimeError, r"weight_hh must", other("weights", 1, torch.zeros(4, 7))),
    "no units": (RuntimeError, r"weight_ih must have rows", other("weights", 0, torch.zeros(0, 4))),
    "weight in reverse": (RuntimeError, r"weight_hh.*must", other("weights", 5, torch.zeros(28, 9))),
    "bias": (RuntimeError, r"bias_hh must", other("weights", 3, torch.zeros(1))),
    "bias type": (RuntimeError, r"bias_hh.*float64", other("weights", 3, torch.zeros(28).double())),
    "lengths shape": (ValueError, r"lengths.*\(3,\).*\(9,\)", {"lengths": torch.full((9,), 4)}),
    "one length": (ValueError, r"lengths.*\(3,\).*\(1,\)", {"lengths": torch.tensor([4])}),
    "lengths range": (ValueError, r"from 0 to 5, got 1 to 6", {"lengths": torch.tensor([1, 6, 2])}),
    "lengths negative": (ValueError, r"from 0 to 5, got -1 to 2", {"lengths": torch.tensor([1, -1, 2])}),
    "lengths type": (TypeError, r"lengths must be integers", {"lengths": torch.ones(3)}),
    "reset shape": (ValueError, r"reset.*\(5, 3\)", {"reset": torch.zeros(1, 1, dtype=torch.bool)}),
    "reset type": (TypeError, r"reset must be booleans", {"reset": torch.zeros(STEPS, BATCH)}),
    "cell": (ValueError, r"cell must be the key", {"cell": "nothing"}),
    "directions": (ValueError, r"1 or 2 directions", {"directions": 3}),
    "no directions": (ValueError, r"1 or 2 directions", {"directions": 0}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_operator_refuses(case: str) -> None:
    error, message, changed = REFUSED[case]
    torch.ops.fusedlstm.layer(**layer_arguments())
    with pytest.raises(error, match=message):
        torch.ops.fusedlstm.layer(**layer_arguments() | changed)


@pytest.mark.parametrize("case", [name for name in REFUSED if name != "input without steps"])
def test_operator_of_backward_refuses(case: str) -> None:
    """Without the record of a forward pass, which is then run again."""
    error, message, changed = REFUSED[case]
    given = layer_arguments()
    del given["training"]
    results = [torch.zeros(STEPS, BATCH, 2 * HIDDEN), *given["initial"]]
    rest = {"grads": results, "handle": torch.zeros(1, dtype=torch.int64), "y": results[0]}
    torch.ops.fusedlstm.layer_backward(**rest, **given)
    with pytest.raises(error, match=f"{message}|y must have the shape"):
        torch.ops.fusedlstm.layer_backward(**rest, **given | changed)


BACKWARD: dict[str, tuple[str, Callable[[list[Tensor], Tensor, Tensor], dict[str, Any]]]] = {
    "a gradient less": (r"grads must be those of 3", lambda g, h, y: {"grads": g[:-1]}),
    "gradient shape": (r"grads\[1\] must.*\(2, 3, 7\)", lambda g, h, y: {"grads": [g[0], g[1][:1], g[2]]}),
    "gradient type": (r"grads\[0\].*float64", lambda g, h, y: {"grads": [g[0].double(), *g[1:]]}),
    "output shape": (r"y must have the shape", lambda g, h, y: {"y": y[:1]}),
    "no handle": (r"handle must have the shape", lambda g, h, y: {"handle": h[:0]}),
    "another pass": (
        r"other data.*T=6, B=1, I=2, H=3, P=3.*T=5, B=3, I=4, H=7, P=7",
        lambda g, h, y: {"handle": another_handle()},
    ),
}


def another_handle() -> Tensor:
    weights = [weight.detach() for weight in fused.GRU(2, 3).parameters()]
    x = torch.zeros(6, 1, 2)
    return torch.ops.fusedlstm.layer(x, [], weights, None, None, cells.gru.key, 1, True)[-1]


@pytest.mark.parametrize("case", BACKWARD)
def test_operator_of_backward_refuses_what_forward_did_not_give(case: str) -> None:
    message, change = BACKWARD[case]
    given = layer_arguments()
    y, *finals, handle = torch.ops.fusedlstm.layer(**given)
    del given["training"]
    grads = [torch.zeros_like(part) for part in (y, *finals)]
    rest = {"grads": grads, "handle": handle, "y": y}
    torch.ops.fusedlstm.layer_backward(**rest, **given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedlstm.layer_backward(**rest | change(grads, handle, y), **given)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("input", lambda x, h: (x.to_sparse(),)),
        ("input", lambda x, h: (x[:, 0].to_sparse_csr(),)),
        ("hx", lambda x, h: (x, h.to_sparse())),
        ("lengths", lambda x, h: (x, None, torch.tensor([1, 2]).to_sparse())),
        ("lengths", lambda x, h: (x, None, torch.tensor([1, 2], device="meta"))),
        ("reset", lambda x, h: (x, None, None, torch.ones(4, 2, dtype=torch.bool).to_sparse())),
        ("reset", lambda x, h: (x, None, None, torch.ones(4, 2, dtype=torch.bool, device="meta"))),
    ],
)
def test_tensors_without_numbers_in_a_row_are_refused_by_name(name: str, arguments: Any) -> None:
    """Also where there are several layers, whose states are cut out of the whole."""
    module = fused.GRU(3, 5, 2)
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor"):
        module(*arguments(torch.ones(4, 2, 3), torch.ones(2, 2, 5)))


def test_sparse_gradients_and_weights_are_refused_by_name() -> None:
    module = fused.GRU(3, 5)
    y, _ = module(torch.ones(4, 2, 3))
    with pytest.raises(TypeError, match=r"grads\[0\] must be a dense tensor"):
        y.backward(torch.ones_like(y).to_sparse())
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach().to_sparse())
    with pytest.raises(TypeError, match="weight_ih must be a dense tensor"):
        module(torch.ones(4, 2, 3))


def test_lengths_of_numpy_may_lie_in_any_order_of_bytes_and_steps() -> None:
    module, x = fused.GRU(3, 5), torch.ones(4, 2, 3)
    expected = module(x, lengths=[3, 1])
    for lengths in (np.array([3, 1], ">i8"), np.array([1, 3])[::-1]):
        assert_same(module(x, lengths=lengths), expected)


@pytest.mark.parametrize(
    "lengths", [[2**70, 1], "ab", [None, 1], np.ma.masked_array([1, 2], [0, 1])], ids=str
)
def test_lengths_that_are_no_integers_are_refused_by_name(lengths: Any) -> None:
    with pytest.raises(TypeError, match="lengths must be"):
        fused.GRU(3, 5)(torch.ones(4, 2, 3), lengths=lengths)
