"""Models that exist, models that other code builds, and what is said about them."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from test_torch import BATCH, HIDDEN, INPUTS, STEPS, assert_same, outcome, pair
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, rnn

import fusedlstm.torch as fused
from fusedlstm import cells
from fusedlstm.torch import conversion, hints


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- Classes of the user's own ------------------------------------------------------------------------


class Padded(ABC, nn.RNNBase):
    """As in pytorch-forecasting: helpers, and a forward around the inherited one."""

    @abstractmethod
    def zeros(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
        y, final = super().forward(packed, hx=self.zeros(x) if hx is None else hx)
        return rnn.pad_packed_sequence(y, batch_first=self.batch_first)[0], final


class PaddedLSTM(Padded, nn.LSTM):
    def zeros(self, x: Tensor) -> Any:
        return (x.new_zeros(self.num_layers, BATCH, self.hidden_size),) * 2


class PaddedGRU(Padded, nn.GRU):
    def zeros(self, x: Tensor) -> Any:
        return x.new_zeros(self.num_layers, BATCH, self.hidden_size)


class Inherited(nn.LSTM):
    """Nothing of its own but names, which must not get into our way."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.cell, self._run, self._weights = nn.Linear(2, 2), 1, 2


class Explicit(nn.GRU):
    def forward(self, *args: Any) -> Any:
        y, h = super(Explicit, self).forward(*args)  # noqa: UP008 (also the old way)
        return 2 * y, h


T = TypeVar("T")


class Parametric(nn.RNN, Generic[T]):
    def forward(self, x: Tensor) -> Any:
        return self._through(x)

    def _through(self, x: Tensor) -> Any:
        return super().forward(x)


class OwnCell(nn.LSTMCell):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        h, c = super().forward(x, hx)
        return torch.tanh(h), c


OWN: dict[str, Callable[[], nn.Module]] = {
    "padded LSTM": lambda: PaddedLSTM(INPUTS, HIDDEN, 2),
    "padded GRU": lambda: PaddedGRU(INPUTS, HIDDEN),
    "inherited": lambda: Inherited(INPUTS, HIDDEN, bidirectional=True),
    "explicit": lambda: Explicit(INPUTS, HIDDEN),
    "generic": lambda: Parametric(INPUTS, HIDDEN, nonlinearity="relu"),
    "cell": lambda: OwnCell(INPUTS, HIDDEN),
}


def example(module: nn.Module) -> Tensor:
    shape = (BATCH, INPUTS) if isinstance(module, nn.RNNCellBase) else (STEPS, BATCH, INPUTS)
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("name", OWN)
def test_classes_of_ones_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = OWN[name]()
    cls, text, x = type(module), repr(module), example(module)
    expected = outcome(module, lambda: module(x), [])
    report = fused.accelerate(nn.Sequential(module), cells=True)
    assert list(report.replaced) == ["0"]
    assert report.replaced["0"] == text
    assert isinstance(module, cls)
    assert_same(outcome(module, lambda: module(x), []), expected)
    with monkeypatch.context() as patch:  # by our kernels
        patch.setattr("fusedlstm.torch.operators.passes", None)
        with pytest.raises(AttributeError):
            module(x)
    assert not fused.accelerate(module, cells=True).replaced
    assert fused.restore(module) == [""]
    assert type(module) is cls
    assert_same(outcome(module, lambda: module(x), []), expected)


@pytest.mark.parametrize("name", ["padded LSTM", "padded GRU"])
def test_lengths_of_a_class_of_ones_own(name: str) -> None:
    module, lengths = OWN[name](), torch.tensor([2, 5, 3])
    x = example(module)
    expected = outcome(module, lambda: module(x, lengths=lengths), [x])
    fused.accelerate(module, cells=True)
    assert_same(outcome(module, lambda: module(x, lengths=lengths), [x]), expected)


@pytest.mark.parametrize("name", OWN)
def test_copies_and_files_of_classes_of_ones_own(name: str) -> None:
    module = OWN[name]()
    fused.accelerate(module, cells=True)
    x = example(module)
    expected, file = module(x), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert type(other) is type(module)
        assert_same(other(x), expected)
        assert fused.restore(other) == [""]
        assert_same(other(x), expected)


class Replaced(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Permuted(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


class Registered(nn.GRU):
    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        cls.known.append(cls)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Replaced, "Replaced has a forward of its own, which does not call super"),
        (Permuted, "Permuted has its own permute_hidden"),
        (Registered, "Registered has __init_subclass__"),
    ],
)
def test_classes_that_are_left(cls: type[nn.Module], reason: str) -> None:
    model = nn.Sequential(cls(INPUTS, HIDDEN))
    report = fused.accelerate(model, cells=True)
    assert report.skipped["0"].startswith(reason)
    assert not report.replaced
    assert type(model[0]) is cls
    assert f"  0: left, {reason}" in str(report)
    assert Registered.known == []


def test_our_own_modules_and_what_inherits_from_them_are_not_reported() -> None:
    class Own(fused.LSTMCell):
        pass

    report = fused.accelerate(nn.Sequential(fused.LSTM(2, 3), Own(2, 3), fused.Recurrent(cells.gru, 2, 3)))
    assert (report.replaced, report.skipped) == ({}, {})


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_are_left_unless_they_are_asked_for(kind: str) -> None:
    model = nn.Sequential(nn.LSTM(2, 3), getattr(nn, kind)(2, 3))
    report = fused.accelerate(model)
    assert (list(report.replaced), list(report.skipped)) == (["0"], ["1"])
    assert "accelerate(model, cells=True)" in report.skipped["1"]
    assert "isinstance(module, torch.nn.LSTM)" in str(report)
    with fused.patched():
        assert type(getattr(nn, kind)(2, 3)) is getattr(nn, kind)
    assert list(fused.accelerate(model, cells=True).replaced) == ["1"]
    assert type(model[1]) is getattr(fused, kind)


# --- Modules in other states --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.LSTM, Inherited])
@pytest.mark.parametrize("first", ["parametrized", "accelerated"])
def test_parametrized_modules(cls: type[nn.Module], first: str) -> None:
    module, x = cls(INPUTS, HIDDEN, 2), torch.randn(STEPS, BATCH, INPUTS)
    if first == "accelerated":
        fused.accelerate(module, cells=True)
    parametrizations.weight_norm(module, "weight_hh_l0")
    parametrizations.spectral_norm(module.eval(), "weight_ih_l1")
    if first == "parametrized":
        expected = outcome(module, lambda: module(x), [])
        assert list(fused.accelerate(module, cells=True).replaced) == [""]
        assert_same(outcome(module, lambda: module(x), []), expected)
    expected = module(x)
    if first == "accelerated":  # else PyTorch's cannot be copied either, once it has been called
        assert_same(copy.deepcopy(module)(x), expected)
    name = type(module).__name__
    assert name == f"Parametrized{cls.__name__}"
    assert fused.restore(module) == [""]
    assert (type(module).__name__, type(module).__bases__) == (name, (cls,))
    assert_same(module(x), expected)
    fused.accelerate(module, cells=True)
    for weight in ("weight_hh_l0", "weight_ih_l1"):
        parametrize.remove_parametrizations(module, weight)
    assert isinstance(module, (fused.LSTM, conversion._Between))
    assert_same(module(x), expected)
    assert fused.restore(module) == [""]
    assert type(module) is cls
    assert_same(module(x), expected)


def test_modules_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True))
        cell, x = nn.GRUCell(INPUTS, HIDDEN), torch.empty(STEPS, BATCH, INPUTS, requires_grad=True)
    expected = [part.shape for part in leaves_of(model(x))]
    assert list(fused.accelerate(model, cells=True).replaced) == ["0"]
    assert list(fused.accelerate(cell, cells=True).replaced) == [""]
    found = leaves_of(model(x))
    assert [part.shape for part in found] == expected
    assert {part.device.type for part in found} == {"meta"}
    found[0].sum().backward()
    assert model[0].weight_hh_l0.grad.shape == model[0].weight_hh_l0.shape
    assert cell(x[0]).shape == (BATCH, HIDDEN)
    with pytest.raises(RuntimeError, match=r"weight_ih must have the shape|input.size"):
        model(torch.empty(STEPS, BATCH, INPUTS + 1, device="meta"))
    real = nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True)
    model[0].load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert_same(model(x), real(x))


def leaves_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves_of(part)]


def test_shared_modules_are_named_by_all_their_paths() -> None:
    shared = nn.LSTM(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(2, 2)})
    model["d"] = model["c"]
    report = fused.accelerate(model, cells=True)
    assert (list(report.replaced), report.shared) == (["a"], {"b.0": "a"})
    assert "  b.0: the module a" in str(report)
    assert fused.restore(model) == ["a"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_modules_of_torchscript_are_named() -> None:
    inner = nn.Sequential(nn.LSTM(INPUTS, HIDDEN))
    model = nn.ModuleDict({"script": torch.jit.script(inner), "mine": nn.GRU(2, 3)})
    report = fused.accelerate(model, cells=True)
    assert list(report.replaced) == ["mine"]
    assert list(report.skipped) == ["script.0"]
    assert "TorchScript" in report.skipped["script.0"]


def test_pruned_modules() -> None:
    theirs, ours = pair("LSTM")
    x = torch.randn(STEPS, BATCH, INPUTS)
    steps = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (theirs, ours)]
    for name in ("weight_ih_l0", "weight_hh_l0"):
        for module in (theirs, ours):
            prune.l1_unstructured(module, name, amount=0.5)
    for _ in range(3):
        for module, step in zip((theirs, ours), steps):
            step.zero_grad()
            module(x)[0].square().sum().backward()
            step.step()
        assert_same(ours(x), theirs(x))
    assert (ours.weight_hh_l0 == 0).sum() == (ours.weight_hh_l0.numel() + 1) // 2
    model = nn.Sequential(theirs)
    expected = model(x)
    assert list(fused.accelerate(model, cells=True).replaced) == ["0"]
    assert_same(model(x), expected)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.remove(theirs, name)
    assert_same(model(x), expected)


def test_fx_refuses_to_trace_a_forward_around_the_inherited_one() -> None:
    """It would be run twice: in the graph, and in the leaf that stands for the module."""
    model = nn.Sequential(Explicit(INPUTS, HIDDEN))
    fused.accelerate(model, cells=True)
    with pytest.raises(TypeError, match=r"cannot trace inside the forward of Explicit.*is_leaf_module"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.GRU)

    graph, x = torch.fx.GraphModule(model, Tracer().trace(model)), torch.randn(STEPS, BATCH, INPUTS)
    assert_same(graph(x), model(x))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_are_exported_for_any_batch(kind: str) -> None:
    theirs, ours = pair(kind)
    program = torch.export.export(
        ours, (torch.randn(BATCH, INPUTS),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert "fusedlstm.layer" in str(program.graph)
    x = torch.randn(2 * BATCH, INPUTS)
    assert_same(program.module()(x), theirs(x))


# --- Single steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["input", "state", "weight", "gradient of another type"])
def test_a_step_whose_tensors_were_given_other_data_is_refused(change: str) -> None:
    ours, x = fused.LSTMCell(INPUTS, HIDDEN), torch.randn(BATCH, INPUTS, requires_grad=True)
    h, c = torch.randn(2, BATCH, HIDDEN).unbind()
    h, _ = ours(x, (h, c))
    if change == "input":
        x.data = torch.randn(1, INPUTS)
    elif change == "state":
        c.data = torch.randn(1, HIDDEN)
    elif change == "weight":
        ours.weight_hh.data = torch.randn(HIDDEN, HIDDEN)
    else:
        ours.double()
    with pytest.raises(RuntimeError, match=r"other data between|must have the shape|must be torch.float"):
        h.sum().backward()


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_derivatives_of_steps(kind: str) -> None:
    _, ours = pair(kind, 2, 3, dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]
    states = 2 if kind == "LSTMCell" else 1
    x, *hx = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (2, *[3] * states))

    def run(x: Tensor, *rest: Tensor) -> Any:
        weights = dict(zip(names, rest[states:]))
        given = rest[:states] if states > 1 else rest[0]
        return torch.func.functional_call(ours, weights, (x, given))

    assert torch.autograd.gradcheck(run, (x, *hx, *ours.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *hx, *ours.parameters()), fast_mode=True)


def test_a_step_backward_twice_with_moved_weights_and_in_place() -> None:
    theirs, ours = pair("GRUCell")
    x = torch.randn(BATCH, INPUTS, requires_grad=True)
    results = []
    for module in (theirs, ours):
        h = module(x)
        first = torch.autograd.grad(h.sum(), list(module.parameters()), retain_graph=True)
        module.weight_hh.data = module.weight_hh.data.clone()  # the same numbers in another place
        results.append([*first, *torch.autograd.grad(h.sum(), [x, *module.parameters()])])
    assert_same(results[1], results[0])
    h = ours(x)
    with torch.no_grad():
        ours.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantization_says_that_it_leaves_ours() -> None:
    model = nn.Sequential(nn.LSTM(INPUTS, HIDDEN), nn.GRUCell(2, 3))
    assert not hasattr(fused.LSTM(2, 3), "qconfig")
    fused.accelerate(model, cells=True)
    with pytest.warns(UserWarning, match=r"quantization leaves LSTM\(4, 7\) .*restore\(model\)") as said:
        found = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRUCell})
    assert any("leaves GRUCell(2, 3)" in str(one.message) for one in said)
    assert type(found[0]) is fused.LSTM
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert_same(found[0](x), model[0](x))
    fused.restore(found)
    quantized = torch.ao.quantization.quantize_dynamic(found, {nn.LSTM})
    assert "quantized" in type(quantized[0]).__module__


# --- Models that other code builds --------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.own, self.step = nn.LSTM(2, 3), Inherited(3, 3), nn.GRUCell(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.own(self.layer(x)[0])[0].repeat(1, 1, 2)[-1])


@pytest.fixture
def unpatched() -> Iterator[None]:
    yield
    fused.unpatch()


@pytest.mark.usefixtures("unpatched")
def test_models_that_are_built_inside() -> None:
    before = [vars(base).copy() for base in (nn.RNNBase, nn.RNNCellBase)]
    torch.manual_seed(3)
    theirs = Model()
    with fused.patched(cells=True):
        torch.manual_seed(3)
        ours = Model()
        low = nn.GRU(2, 3, dtype=torch.bfloat16)
        with fused.patched(cells=True):
            pass
        assert type(nn.RNN(2, 3)) is fused.RNN
    assert [vars(base) for base in (nn.RNNBase, nn.RNNCellBase)] == before
    assert [type(part) for part in (ours.layer, ours.step)] == [fused.LSTM, fused.GRUCell]
    assert isinstance(ours.own, (Inherited, fused.modules.Stack))
    assert isinstance(ours.own.cell, nn.Linear)
    assert type(low) is type(nn.GRU(2, 3)) is nn.GRU
    x = torch.randn(4, 2, 2)
    assert_same(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert fused.restore(ours) == ["layer", "own", "step"]


@pytest.mark.usefixtures("unpatched")
def test_models_that_are_loaded_inside() -> None:
    theirs, file = Model(), io.BytesIO()
    torch.save(theirs, file)
    for load in (lambda: torch.load(file, weights_only=False), lambda: copy.deepcopy(theirs)):
        file.seek(0)
        with fused.patched(cells=True):
            ours = load()
        assert [type(part) for part in (ours.layer, ours.step)] == [fused.LSTM, fused.GRUCell]
        x = torch.randn(4, 2, 2)
        assert_same(ours(x), theirs(x))


@pytest.mark.usefixtures("unpatched")
def test_patching_holds_until_it_is_undone() -> None:
    fused.patch(cells=True)
    fused.patch(cells=True)
    with fused.patched(cells=True):
        pass
    assert type(nn.LSTM(2, 3)) is fused.LSTM
    fused.unpatch()
    fused.unpatch()
    assert type(nn.LSTM(2, 3)) is nn.LSTM
    with pytest.raises(ValueError, match="stop"), fused.patched(cells=True):
        raise ValueError("stop")
    assert type(nn.LSTM(2, 3)) is nn.LSTM


# --- What is said -------------------------------------------------------------------------------------


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.deep = nn.LSTMCell(2, 3), nn.ModuleList([nn.GRUCell(3, 3)])
        self.once, self.head = nn.RNNCell(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], 3)
        for part in x:
            h, c = self.step(part, (h, c))
            h = self.head(self.deep[0](h))
        return self.once(h)


def test_loops_over_cells_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Loop())
    report = fused.accelerate(model, cells=True)
    assert list(report.hints) == ["1"]
    assert "self.deep, self.step step by step" in report.hints["1"]
    assert "Recurrent" in report.hints["1"]
    assert "  1: calls self.deep" in str(report)
    assert hints.loops(nn.LSTMCell(2, 3)) is None


def test_what_first_calls_compile_is_said() -> None:
    model = nn.Sequential(nn.LSTM(2, 3, proj_size=1), nn.LSTM(1, 2), nn.LSTM(2, 2), nn.RNNCell(2, 2).double())
    report = fused.accelerate(model, cells=True)
    assert report.kernels == ["lstm in float32 with a projection", "lstm in float32", "rnn_tanh in float64"]
    assert "warm_up(model)" in str(report)
    assert str(fused.accelerate(nn.Linear(2, 2), cells=True)) == "0 replaced, 0 not"


def test_warm_up_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlstm import ahead

    made, compile_cell = [], ahead.compile_cell
    monkeypatch.setattr(ahead, "compile_cell", lambda *args: made.append(args) or compile_cell(*args))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), fused.GRU(4, 3), nn.LSTM(2, 3))
    model[1].eval()
    seen = []
    model.register_forward_hook(lambda module, args, result: seen.append(module.training))
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    model.__class__ = type(
        "Short", (nn.Sequential,), {"forward": lambda self, x: self[2](self[1](self[0](x)))}
    )
    assert fused.warm_up(model, torch.randn(5, 4)) > 0
    assert made == [(cells.gru, "float32", False)]
    assert seen == [False]
    assert [module.training for module in model] == [True, False, True, True]
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert not torch.equal(random, torch.get_rng_state())  # by the example alone
    assert all(part.grad is None for part in model.parameters())
    for given in ((torch.randn(5, 4),), {"x": torch.randn(5, 4)}, None):
        fused.warm_up(model, given)


def test_long_compiling_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from fusedlstm.kernels.cpu.compile import _Patience

    patience = _Patience()
    with caplog.at_level(logging.WARNING, "fusedlstm"):
        with patience:
            pass
        assert not caplog.records
        patience.LIMIT = 0.0
        for _ in range(2):
            with patience, patience:
                pass
    (record,) = caplog.records
    assert "fusedlstm compile" in record.getMessage()
