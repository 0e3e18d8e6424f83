"""What looks at calls instead of values: traces, exporters, and forward-mode derivatives."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_torch import BATCH, HIDDEN, INPUTS, KINDS, STEPS, assert_same, leaves, pair
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedlstm.torch as fused
from fusedlstm import cells

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "deep": ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "deep GRU": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "projected": ("LSTM", {"num_layers": 2, "proj_size": 2}),
    **{kind: (kind, {}) for kind in CELLS},
}
EXPORTED = [name for name in SETTINGS if name != "projected"]  # ONNX has no projection
NO_OPERATOR = r"no operator for the cell 'peephole_lstm'.*restore\(model\)"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def example(kind: str) -> tuple[Tensor, Tensor]:
    """Two inputs of one shape."""
    shape = (BATCH, INPUTS) if kind.endswith("Cell") else (STEPS, BATCH, INPUTS)
    return torch.randn(shape), torch.randn(shape)


class Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, lengths=lengths)


class Packed(nn.Module):
    def __init__(self, layer: nn.Module, enforce_sorted: bool) -> None:
        super().__init__()
        self.layer, self.enforce_sorted = layer, enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        y, final = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted))
        return pad_packed_sequence(y)[0], final


class Headed(nn.Module):
    """A layer within a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(torch.relu(y if isinstance(self.layer, nn.RNNCellBase) else y[0]))


class Stepped(nn.Module):
    """A cell that is given its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.layer(x, h) + 1


# --- Traces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["training", "no_grad", "inference", "frozen"])
@pytest.mark.parametrize("name", SETTINGS)
def test_traces_depend_on_the_input(name: str, how: str) -> None:
    kind, settings = SETTINGS[name]
    theirs, ours = pair(kind, **settings)
    ours.requires_grad_(how != "frozen")
    x, other = example(kind)
    ours(x)
    with torch.set_grad_enabled(how != "no_grad"), torch.inference_mode(how == "inference"):
        traced = torch.jit.trace(ours, x, check_trace=False)
        assert_same(traced(other), theirs(other))
    if not kind.endswith("Cell"):
        assert_same(traced(torch.cat([other, other])), theirs(torch.cat([other, other])))


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_packed_sequences_are_traced(kind: str) -> None:
    theirs, ours = pair(kind, INPUTS, HIDDEN, 2, bidirectional=True)
    x, other = example(kind)
    expected = Packed(theirs, False)(other, torch.tensor([2, 5, 1]))
    for model in (Masked(ours), Packed(ours, False)):
        traced = torch.jit.trace(model, (x, torch.tensor([5, 3, 4])))
        assert_same(traced(other, torch.tensor([2, 5, 1])), expected)


def test_traced_models_can_be_saved_and_trained() -> None:
    theirs, ours = pair("LSTM")
    x, other = example("LSTM")
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, x), file)
    file.seek(0)
    traced = torch.jit.load(file)
    results = []
    for module in (traced, theirs):
        module(other)[0].square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    assert_same(*results)


def test_dropout_and_parametrizations_are_traced() -> None:
    ours = parametrizations.weight_norm(fused.GRU(INPUTS, HIDDEN, 2, dropout=0.5), "weight_hh_l0")
    x, other = example("GRU")
    results = []
    for module in (torch.jit.trace(ours, x, check_trace=False), ours):
        torch.manual_seed(3)
        results.append(module(other))
    assert_same(*results)


def test_traces_warn_no_more_than_pytorchs() -> None:
    """In a process of its own, since pytest has filters of its own."""
    program = """
import warnings, torch
import fusedlstm.torch as fused
with warnings.catch_warnings(record=True) as found:
    torch.jit.trace(fused.LSTM(2, 3), torch.randn(4, 2, 2))
    torch.jit.trace(fused.GRUCell(2, 3), torch.randn(2, 2))
assert not [w for w in found if issubclass(w.category, torch.jit.TracerWarning)], found
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=170)


def test_what_pytorch_does_not_have_is_not_traced() -> None:
    own, ours = fused.Recurrent(cells.peephole_lstm, INPUTS, HIDDEN), fused.LSTM(INPUTS, HIDDEN)
    x, _ = example("LSTM")
    lengths, reset = torch.tensor([5, 3, 2]), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    with torch.no_grad():
        own(x)
        for model, args in ((own, x), (Masked(own), (x, lengths)), (Packed(own, True), (x, lengths))):
            with pytest.raises(RuntimeError, match=NO_OPERATOR):
                torch.jit.trace(model, args)
        with pytest.raises(RuntimeError, match=r"reset cannot be recorded.*restore\(model\)"):
            torch.jit.trace(lambda x: ours(x, reset=reset), x)


def test_a_recurrent_of_pytorchs_cells_is_traced() -> None:
    ours = fused.Recurrent(cells.gru, INPUTS, HIDDEN, bidirectional=True)
    x, other = example("GRU")
    assert_same(torch.jit.trace(ours, x)(other), ours(other))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_make_fx_depends_on_the_input(kind: str, pre_dispatch: bool) -> None:
    theirs, ours = pair(kind)
    ours.requires_grad_(False)
    x, other = example(kind)
    traced = make_fx(lambda x: ours(x)[0], pre_dispatch=pre_dispatch)(x)
    assert_same(traced(other), theirs(other)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict: bool) -> None:
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 2, bidirectional=True)
    x, other = example("LSTM")
    dims = ({0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")},)
    program = torch.export.export(ours, (x,), dynamic_shapes=dims, strict=strict)
    assert "fusedlstm.layer" in str(program.graph)
    other = torch.cat([other, other])
    assert_same(program.module()(other), theirs(other))


def test_symbolic_traces_have_the_module_as_a_node() -> None:
    """As PyTorch's."""
    x, _ = example("LSTM")
    for model, args in (
        (Headed(fused.LSTM(INPUTS, HIDDEN)), (x,)),
        (Headed(fused.GRUCell(INPUTS, HIDDEN)), (x[0],)),
        (Stepped(fused.GRUCell(INPUTS, HIDDEN)), (x[0], torch.randn(BATCH, HIDDEN))),
    ):
        traced = torch.fx.symbolic_trace(model)
        assert "layer" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert_same(traced(*args), model(*args))
    with pytest.raises(TypeError, match="trace a module that calls it"):
        torch.fx.symbolic_trace(fused.LSTM(INPUTS, HIDDEN))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_an_input_must_be_a_tensor(kind: str) -> None:
    with pytest.raises(TypeError, match="input must be a tensor, got int"):
        getattr(fused, kind)(INPUTS, HIDDEN)(3)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_scripts_name_the_way(kind: str) -> None:
    model = nn.Sequential(getattr(nn, kind)(INPUTS, HIDDEN))
    fused.accelerate(model, cells=True)
    with pytest.raises(RuntimeError, match=rf"cannot compile {kind}\(4, 7\).*restore\(model\)"):
        torch.jit.script(model)
    fused.restore(model)
    torch.jit.script(model)


# --- ONNX ---------------------------------------------------------------------------------------------


def exported(model: nn.Module, args: tuple[Tensor, ...], dynamo: bool, **options: Any) -> onnx.ModelProto:
    if dynamo:
        program = torch.onnx.export(model, args, dynamo=True, verbose=False, **options)
        return program.model_proto
    file = io.BytesIO()
    torch.onnx.export(model, args, file, dynamo=False, **options)
    return onnx.load_from_string(file.getvalue())


def run(model: onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = {place.name: x.numpy() for place, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(result)) for result in session.run(None, given)]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type in KINDS]


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_accelerated_models_are_exported_as_pytorchs(name: str, dynamo: bool) -> None:
    kind, settings = SETTINGS[name]
    model = getattr(nn, kind)(INPUTS, HIDDEN, **settings).eval()
    x, other = example(kind)
    expected = leaves(model(other))
    fused.accelerate(model, cells=True)
    graph = exported(model, (x,), dynamo)
    assert_same(run(graph, other), expected)
    if not (dynamo and kind.startswith("RNN")):  # there, an RNN is unrolled, PyTorch's too
        assert operators(graph) == [kind.removesuffix("Cell")] * settings.get("num_layers", 1)


@pytest.mark.parametrize("dynamo", [False, True])
def test_states_are_exported(dynamo: bool) -> None:
    theirs, ours = pair("LSTM", INPUTS, HIDDEN, 2, bidirectional=True)
    x, other = example("LSTM")
    hx = torch.randn(2, 4, BATCH, HIDDEN).unbind()
    graph = exported(ours, (x, hx), dynamo)
    assert_same(run(graph, other, *hx), leaves(theirs(other, hx)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_steps_and_rows_is_exported(kind: str) -> None:
    theirs, ours = pair(kind)
    x, other = example(kind)
    graph = exported(ours, (x,), False, input_names=["x"], dynamic_axes={"x": {0: "steps", 1: "batch"}})
    other = torch.cat([other, other]).repeat(1, 2, 1)
    assert_same(run(graph, other), leaves(theirs(other)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_lengths_and_packed_sequences_are_exported(kind: str) -> None:
    theirs, ours = pair(kind, INPUTS, HIDDEN, 2, bidirectional=True)
    x, other = example(kind)
    lengths, others = torch.tensor([5, 4, 4]), torch.tensor([5, 3, 1])
    expected = leaves(Packed(theirs, True)(other, others))
    for model in (Masked(ours), Packed(ours, True), Packed(ours, False)):
        graph = exported(model, (x, lengths), False)
        assert operators(graph) == [kind, kind]
        assert_same(run(graph, other, others), expected)


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_pytorch_does_not_have_is_not_exported(dynamo: bool) -> None:
    x, _ = example("LSTM")
    own = Headed(fused.Recurrent(cells.peephole_lstm, INPUTS, HIDDEN))
    with pytest.raises(Exception, match=f"(?s){NO_OPERATOR}"):
        exported(own, (x,), dynamo)
    ours, reset = fused.LSTM(INPUTS, HIDDEN), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    with pytest.raises(Exception, match=r"(?s)reset cannot be recorded"):
        exported(ours, (x, None, None, reset), dynamo)


def test_what_dynamo_cannot_export_names_the_way() -> None:
    x, _ = example("LSTM")
    ours = fused.LSTM(INPUTS, HIDDEN)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"(?s)lengths cannot.*use dynamo=False"):
        exported(Masked(ours), (x, torch.tensor([5, 3, 2])), True)
    program = torch.export.export(ours, (x,))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"(?s)the model, not a program"):
        torch.onnx.export(program, dynamo=True, verbose=False)


# --- Forward-mode derivatives -------------------------------------------------------------------------

MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: fused.LSTM(2, 3, bidirectional=True),
    "projected": lambda: fused.LSTM(2, 3, 2, proj_size=2),
    "GRU": lambda: fused.GRU(2, 3, 2, batch_first=True),
    "RNN": lambda: fused.RNN(2, 3, nonlinearity="relu"),
    "peephole": lambda: fused.Recurrent(cells.peephole_lstm, 2, 3, bidirectional=True),
    "two products": lambda: fused.Recurrent(cells.gru_reset_before, 2, 3, bidirectional=True),
    **{kind: lambda kind=kind: getattr(fused, kind)(2, 3) for kind in CELLS},  # type: ignore[misc]
}


def small(name: str) -> tuple[nn.Module, Tensor]:
    shape = (2, 2) if name in CELLS else (4, 2, 2)
    return MODELS[name]().double(), torch.randn(shape, dtype=torch.float64)


def tangent(result: Any) -> Tensor:
    found = forward_ad.unpack_dual(leaves(result)[0]).tangent
    assert found is not None
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tangents(name: str, masked: bool) -> None:
    """With respect to the input and all weights, with gradients recorded or not."""
    module, x = small(name)
    options: dict[str, Any] = {}
    if masked and name not in CELLS:
        if name == "GRU":
            x = x.transpose(0, 1).contiguous()
        reset = torch.arange(8).reshape(x.shape[:2]) % 3 == 0
        options = {"lengths": torch.tensor([4, 2]), "reset": reset}
    names = [key for key, _ in module.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Any:
        return tuple(leaves(torch.func.functional_call(module, dict(zip(names, weights)), (x,), options)))

    inputs = [x.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(
        call, inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )
    seeds = [torch.randn_like(part) for part in inputs]
    found = torch.func.jvp(call, tuple(inputs), tuple(seeds))[1]
    assert_same(found, torch.autograd.functional.jvp(call, tuple(inputs), tuple(seeds))[1])


@pytest.mark.parametrize("name", MODELS)
def test_tangents_of_frozen_modules(name: str) -> None:
    module, x = small(name)
    module.requires_grad_(False)
    seed = torch.randn_like(x)
    expected = torch.autograd.functional.jvp(lambda x: leaves(module(x))[0], x, seed)[1]
    with forward_ad.dual_level():
        assert_same(tangent(module(forward_ad.make_dual(x, seed))), expected)


def test_tangents_of_states() -> None:
    module, x = small("LSTM")
    hx, seeds = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64)
    expected = torch.autograd.functional.jvp(lambda h, c: module(x, (h, c))[0], tuple(hx), tuple(seeds))[1]
    with forward_ad.dual_level(), torch.no_grad():
        given = tuple(map(forward_ad.make_dual, hx, seeds))
        assert_same(tangent(module(x, given)), expected)


def test_without_tangents_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = small("LSTM")
    expected = torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)
    monkeypatch.setattr("fusedlstm.torch.operators.replay", None)
    with forward_ad.dual_level():
        assert_same(torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0), expected)


def test_second_derivatives_by_any_mode() -> None:
    module, x = small("LSTM")
    lengths, reset = torch.tensor([4, 2]), torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0]], dtype=torch.bool)

    def value(x: Tensor) -> Tensor:
        return module(x, lengths=lengths, reset=reset)[0].square().sum()

    expected = torch.autograd.functional.hessian(value, x)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            assert_same(outer(inner(value))(x), expected)
    assert_same(torch.func.hessian(value)(x), expected)


def test_tangents_of_gradients_recorded_before() -> None:
    module, x = small("GRU")
    x.requires_grad_()
    y, _ = module(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    seed, seed_x = torch.randn_like(y), torch.randn_like(x)
    expected = torch.autograd.grad(y, x, seed, retain_graph=True)
    expected_second = torch.autograd.grad(dx, x, seed_x, retain_graph=True)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.zeros_like(y), seed)
        assert_same(tangent(torch.autograd.grad(y, x, dy, retain_graph=True)), expected)
        ddx = forward_ad.make_dual(torch.zeros_like(x), seed_x)
        assert_same(tangent(torch.autograd.grad(dx, x, ddx)), expected_second)


def test_tangents_of_samples() -> None:
    module, x = small("LSTM")
    samples, seeds = torch.randn(2, 3, *x.shape, dtype=torch.float64)
    lengths = torch.tensor([[4, 2], [1, 3], [4, 4]])

    def call(x: Tensor, seed: Tensor, lengths: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: module(x, lengths=lengths)[0], (x,), (seed,))[1]

    expected = torch.stack([call(*entry) for entry in zip(samples, seeds, lengths)])
    assert_same(torch.func.vmap(call)(samples, seeds, lengths), expected)
    with pytest.raises(ValueError, match="lengths must be from"):
        torch.func.vmap(call)(samples, seeds, lengths + 1)


def test_tangents_of_a_linearized_a_checkpointed_and_a_compiled_layer() -> None:
    module, x = small("LSTM")
    seed = torch.randn_like(x)

    def call(x: Tensor) -> Tensor:
        return module(x)[0]

    expected = torch.func.jvp(call, (x,), (seed,))[1]
    assert_same(torch.func.linearize(call, x)[1](seed), expected)
    run = torch.utils.checkpoint.checkpoint
    assert_same(torch.func.jvp(lambda x: run(call, x, use_reentrant=False), (x,), (seed,))[1], expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, seed: torch.func.jvp(call, (x,), (seed,))[1], backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(compiled(x, seed), expected)


def test_operators_refuse_tangents() -> None:
    module, x = small("LSTM")
    program = torch.export.export(module.requires_grad_(False), (x,)).module()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: program(x)[0], (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            program(dual)
