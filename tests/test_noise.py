"""Noise in cells, and what layers make of it and of masks: zoneout, dropout of weights and of each gate."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import assert_close, late_and_means, name, other_operand
from test_cpu_engine import several_threads
from test_second_order import moved
from torch import Tensor
from torch.nn.functional import linear

import fusedlstm
import fusedlstm.torch as fused
from fusedlstm import GRU, LSTM, Recurrent, cell, cells
from fusedlstm.cells import Cell, CellError
from fusedlstm.kernels import reference
from fusedlstm.kernels.cpu.engine import CPU
from fusedlstm.kernels.random import dropout_mask, noise_key, philox, uniforms
from fusedlstm.math import exp, tanh, where
from fusedlstm.weights import Weights, fill, flatten, shapes, unflatten

STEPS, BATCH, INPUTS, HIDDEN = 5, 6, 3, 19
ENDS = np.array([5, 2, 0, 4, 5, 1])
DRAW = 3


@cell(gates=("a", "b"), states=("h", "s"), late=("b",), noise=("u", "v"))
def noisy(a: Any, b: Any, h: Any, s: Any, u: Any, v: Any) -> Any:
    """Noise on both sides of a product, in values and in a condition."""
    if u is None:
        return b(0.5 * tanh(a)), h + s
    h = tanh(a + exp(-2 * u)) + 0.25 * h
    return where(v < 0.25, h, tanh(b(h * u))), 0.5 * s + v * h


# --- Numbers ----------------------------------------------------------------------------------------------


def test_numbers_are_those_of_their_counter() -> None:
    found = uniforms(np.arange(5), 7, np.array([[2], [4]]), (11, 13, 2**32 + 3), np.dtype(np.float64))
    for unit in range(5):
        for n, sequence in enumerate((2, 4)):
            words = philox(*map(np.uint64, (unit, 7, sequence, 3, 11, 13)))
            assert [part[n, unit] for part in found] == [(int(word) >> 8) / 2**24 for word in words]
    single = uniforms(np.arange(5), 7, np.array([[2], [4]]), (11, 13, 3), np.dtype(np.float32))
    assert all(np.array_equal(*pair) for pair in zip(found, single))


def test_numbers_are_even() -> None:
    count = 40_000
    for part in uniforms(np.arange(count), 0, 0, (1, 2, 3), np.dtype(np.float32)):
        assert (part >= 0).all()
        assert (part < 1).all()
        assert np.histogram(part, 20, (0, 1))[0] == pytest.approx(count / 20, rel=0.1)


def test_directions_have_keys_of_their_own() -> None:
    key = np.uint64(5), np.uint64(6)
    assert len({noise_key(key, place) for place in range(100)}) == 100


# --- In the kernels ---------------------------------------------------------------------------------------


def problem(cell: Cell, dtype: Any = np.float64, hidden: int = HIDDEN) -> tuple[Weights, Any, Any, Any, Any]:
    """Weights, x, initial states, dy and gradients of final states."""
    generator = np.random.default_rng(1)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return generator.normal(size=shape).astype(dtype) * 0.5

    weights = fill(shapes(cell, INPUTS, hidden, True, 0), lambda shape: shape and normal(shape))
    initial, dfinal = (tuple(normal((BATCH, hidden)) for _ in cell.states) for _ in range(2))
    return weights, normal((STEPS, BATCH, INPUTS)), initial, normal((STEPS, BATCH, hidden)), dfinal


def results(
    direction: Any, cell: Cell, reverse: bool, dtype: Any = np.float64, hidden: int = HIDDEN
) -> list[np.ndarray]:
    """Outputs, final states and gradients of a direction with noise."""
    _, x, initial, dy, dfinal = problem(cell, dtype, hidden)
    y, final, dx = np.empty_like(dy), tuple(np.empty_like(s) for s in initial), np.empty_like(x)
    reset = np.random.default_rng(2).random((STEPS, BATCH)) < 0.25
    tape = direction.forward(x, initial, y, final, ENDS, reset, reverse, True, noise=(17, 19, DRAW))
    dinitial, grads = direction.backward(tape, dy, dfinal, dx, False)
    return [y, *final, dx, *dinitial, *flatten(grads)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_draw_what_the_reference_draws(reverse: bool, dtype: Any) -> None:
    weights = problem(noisy, dtype)[0]
    found = results(CPU().prepare(noisy, weights), noisy, reverse, dtype)
    double = fill(weights, lambda weight: None if weight is None else weight.astype(np.float64))
    for one, other in zip(found, results(reference.Direction(noisy, double), noisy, reverse), strict=True):
        assert_close(one, other, STEPS, gradient=True)


@pytest.mark.parametrize("cell", [noisy, cells.zoneout(cells.lstm, 0.3, 0.1)], ids=name)
def test_threads_draw_the_same(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = problem(cell, hidden=75)[0]
    alone = results(CPU().prepare(cell, weights), cell, True, hidden=75)
    with several_threads(2, monkeypatch):
        direction = CPU().prepare(cell, weights)
        assert direction.layer.plan(STEPS, BATCH).threads == 2
        for _ in range(5):
            assert all(map(np.array_equal, results(direction, cell, True, hidden=75), alone))


@pytest.mark.parametrize("cell", [noisy, cells.zoneout(cells.gru, 0.3)], ids=name)
def test_second_derivatives_with_noise(cell: Cell) -> None:
    """The tangents of all results along a direction, by finite differences of the reference."""
    weights, x, initial, dy, dfinal = problem(cell)
    direction = CPU().prepare(cell, weights)
    y, final = np.empty_like(dy), tuple(np.empty_like(s) for s in initial)
    tape = direction.forward(x, initial, y, final, None, None, False, True, noise=(17, 19, DRAW))
    along = unflatten(cell, [moved(part) for part in flatten(weights)])
    ty, tfinal, tdx = np.empty_like(y), tuple(np.empty_like(s) for s in final), np.empty_like(x)
    tangent = direction.tangent(tape, moved(x), tuple(map(moved, initial)), along, ty, tfinal)
    dinitial, grads = direction.backward_tangent(tape, tangent, dy, dfinal, tdx)

    def at(shift: float) -> list[np.ndarray]:
        own = unflatten(cell, [part + shift * moved(part) for part in flatten(weights)])
        begun = tuple(part + shift * moved(part) for part in initial)
        y, final, tape = reference.forward(cell, own, x + shift * moved(x), begun, noise=(17, 19, DRAW))
        dx, dinitial, grads = reference.backward(tape, dy, dfinal)
        return [y, *final, dx, *dinitial, *flatten(grads)]

    h = 2e-6
    found = [ty, *tfinal, tdx, *dinitial, *flatten(grads)]
    for part, high, low in zip(found, at(h), at(-h), strict=True):
        np.testing.assert_allclose(part, (high - low) / (2 * h), rtol=1e-6, atol=1e-6)


# --- The language -----------------------------------------------------------------------------------------


def test_a_cell_with_noise() -> None:
    assert (noisy.noise, noisy.arguments) == (("u", "v"), ("b", "a", "h", "s"))
    assert (noisy.inference.noise, noisy.inference.name, noisy.inference.states) == ((), "noisy", ("h", "s"))
    assert noisy.inference is noisy.inference
    assert cells.lstm.inference is cells.lstm
    assert pickle.loads(pickle.dumps(noisy.inference)) is noisy.inference
    assert cell(("a",), noise=("u",))(lambda a, u: a).key != cell(("a",))(lambda a: a).key


@pytest.mark.parametrize(
    ("function", "noise", "message"),
    [
        (lambda a, u: a + u, ("u",), "at inference noise is None.*add is applied to None"),
        (lambda a: a, ("u",), "noise 'u' is declared but not taken"),
        (lambda a, h: a, ("h",), "the name 'h' is used twice"),
        (lambda a, t, u, v, w, x: a, tuple("tuvwx"), "noise must name at most 4 numbers, got 5"),
        (lambda a, u: a, "u", "noise must be a tuple of names"),
    ],
)
def test_noise_that_is_refused(function: Any, noise: Any, message: str) -> None:
    with pytest.raises(CellError, match=message):
        cell(("a",), noise=noise)(function)


# --- Layers, against PyTorch ------------------------------------------------------------------------------

Step = Callable[..., list[Tensor]]  # of weights, x, states, the time and the direction


def check(layer: Recurrent, step: Step) -> None:
    """Training and gradients of a layer of both directions are those of a loop over `step`."""
    generator = np.random.default_rng(1)
    x, dy = generator.normal(size=(STEPS, BATCH, INPUTS)), generator.normal(size=(STEPS, BATCH, 2 * HIDDEN))
    count = len(layer.cell.states)
    initial, dfinal = ([generator.normal(size=(2, BATCH, HIDDEN)) for _ in range(count)] for _ in range(2))
    state, dstate = (parts[0] if count == 1 else tuple(parts) for parts in (initial, dfinal))
    y, final, tape = layer.forward(x, state, ENDS, training=True, draw=DRAW)
    assert tape is not None
    dx, dinitial, grads = tape.backward(dy, dstate)
    weights = {key: torch.tensor(array, requires_grad=True) for key, array in layer.state_dict().items()}
    leaf, begun = torch.tensor(x, requires_grad=True), [torch.tensor(s, requires_grad=True) for s in initial]
    outputs, finals = [], []
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        own = {key.removesuffix(suffix): w for key, w in weights.items() if key.endswith(suffix)}
        states, rows = [part[d] for part in begun], [leaf[0]] * STEPS
        for t in range(STEPS)[:: -1 if d else 1]:
            runs = torch.from_numpy(t < ENDS)[:, None]
            new = step(own, leaf[t], states, t, d)
            rows[t] = torch.where(runs, new[0], torch.zeros_like(new[0]))
            states = [torch.where(runs, *pair) for pair in zip(new, states)]
        outputs.append(torch.stack(rows))
        finals.append(states)
    right, ends = torch.cat(outputs, -1), [torch.stack(parts) for parts in zip(*finals)]
    loss = (right * torch.tensor(dy)).sum() + sum((f * torch.tensor(d)).sum() for f, d in zip(ends, dfinal))
    gradients = torch.autograd.grad(loss, [leaf, *begun, *weights.values()])
    found = [y, *(final if count > 1 else [final]), dx, *(dinitial if count > 1 else [dinitial])]
    expected = [right.detach(), *(end.detach() for end in ends), *gradients]
    for one, other in zip([*found, *grads.values()], expected, strict=True):
        assert_close(one, other, STEPS, gradient=True)


def lstm(raw: Tensor, c: Tensor) -> list[Tensor]:
    i, f, g, o = raw.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def make(backend: str, layer: Any = LSTM, **options: Any) -> Any:
    return layer(INPUTS, HIDDEN, bidirectional=True, dtype="float64", backend=backend, seed=1, **options)


@pytest.mark.parametrize("rates", [(0.3, 0.6), (0.0, 0.5), 0.25], ids=str)
def test_zoneout_is_pytorch(backend: str, rates: Any) -> None:
    layer = make(backend, zoneout=rates)
    each = rates if isinstance(rates, tuple) else (rates, rates)

    def step(w: dict[str, Tensor], x: Tensor, states: list[Tensor], t: int, d: int) -> list[Tensor]:
        raw = linear(x, w["weight_ih"], w["bias_ih"]) + linear(states[0], w["weight_hh"], w["bias_hh"])
        noise = (*noise_key(layer._key, d), DRAW)
        drawn = iter(uniforms(np.arange(HIDDEN), t, np.arange(BATCH)[:, None], noise, np.dtype(np.float64)))
        return [
            torch.where(torch.tensor(next(drawn) < rate), old, new) if rate else new
            for new, old, rate in zip(lstm(raw, states[1]), states, each)
        ]

    check(layer, step)


def test_zoneout_at_inference_is_the_expectation(backend: str) -> None:
    layer, plain = (GRU(3, 7, backend=backend, dtype="float64", seed=1, zoneout=rate) for rate in (0.3, 0.0))
    generator = np.random.default_rng(1)
    x, h = generator.normal(size=(1, 4, 3)), generator.normal(size=(1, 4, 7))
    np.testing.assert_allclose(layer(x, h)[1], 0.3 * h + 0.7 * plain(x, h)[1], rtol=1e-13)
    drawn = np.mean([layer.forward(x, h, training=True)[1] for _ in range(2000)], 0)
    np.testing.assert_allclose(drawn, layer(x, h)[1], atol=0.1)


@pytest.mark.parametrize("cell", [cells.slstm, other_operand, late_and_means], ids=name)
def test_zoneout_of_any_cell(cell: Cell) -> None:
    """As the reference has it."""
    rates = [0.5 / n for n in range(1, 1 + len(cell.states))]
    x, found = np.random.default_rng(1).normal(size=(4, 5, 3)), []
    for backend in ("cpu", "reference"):
        y, final, tape = make(backend, _of(cell), zoneout=rates).forward(x, training=True, draw=1)
        found.append([y, *final, *tape.backward(np.ones_like(y))[2].values()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 4, gradient=True)


def _of(cell: Cell) -> Any:
    return lambda *sizes, **options: Recurrent(cell, *sizes, **options)


def test_dropout_of_weights_is_pytorch(backend: str) -> None:
    layer = make(backend, weight_dropout=0.4)
    masks = [
        torch.tensor(dropout_mask((4 * HIDDEN, HIDDEN), 0.4, layer._key, DRAW, 3 + d, np.float64))
        for d in range(2)
    ]
    assert 0.3 < float((masks[0] == 0).double().mean()) < 0.5

    def step(w: dict[str, Tensor], x: Tensor, states: list[Tensor], t: int, d: int) -> list[Tensor]:
        kept = w["weight_hh"] * masks[d]
        raw = linear(x, w["weight_ih"], w["bias_ih"]) + linear(states[0], kept, w["bias_hh"])
        return lstm(raw, states[1])

    check(layer, step)
    x = np.random.default_rng(1).normal(size=(3, 2, INPUTS))
    assert np.array_equal(layer(x)[0], make(backend)(x)[0])  # in training only


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_dropout_of_each_gate_is_pytorch(backend: str, kind: Any) -> None:
    layer = make(backend, kind, recurrent_dropout=0.4, recurrent_dropout_of_gates=True)
    gates = len(layer.cell.gates)
    masks = [
        torch.tensor(dropout_mask((gates, BATCH, HIDDEN), 0.4, layer._key, DRAW, 1 + d, np.float64))
        for d in range(2)
    ]

    def step(w: dict[str, Tensor], x: Tensor, states: list[Tensor], t: int, d: int) -> list[Tensor]:
        from_x = linear(x, w["weight_ih"], w["bias_ih"])
        weights, biases = w["weight_hh"].chunk(gates), w["bias_hh"].chunk(gates)
        from_h = torch.cat(
            [linear(mask * states[0], *own) for mask, *own in zip(masks[d], weights, biases)], 1
        )
        if kind is LSTM:
            return lstm(from_x + from_h, states[1])
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
        z, n = (z_x + z_h).sigmoid(), (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
        return [z * states[0] + (1 - z) * n]

    check(layer, step)


@pytest.mark.parametrize("cell", [cells.gru_reset_before, other_operand, late_and_means], ids=name)
def test_equal_masks_of_gates_are_one_mask(cell: Cell) -> None:
    """The rewritten cell runs the same weights."""
    one, each = cells.recurrent_dropout(cell), cells.recurrent_dropout_of_gates(cell)
    assert shapes(one, 3, 5, True, 0) == shapes(each, 3, 5, True, 0) == shapes(cell, 3, 5, True, 0)
    weights, x, initial, dy, _ = problem(cell)
    mask = dropout_mask((BATCH, HIDDEN), 0.5, (np.uint64(1), np.uint64(2)), 3, 4, np.float64)
    more = {one: (mask, mask * initial[cell.operand]), each: (mask,) * len(cell.gates_with_recurrent)}
    outputs = []
    for made, states in more.items():
        y, final = np.empty_like(dy), tuple(np.empty_like(mask) for _ in made.states)
        CPU().prepare(made, weights).forward(x, (*initial, *states), y, final, None, None, False, False)
        outputs.append([y, *final[: len(cell.states)]])
    for first, second in zip(*outputs):
        assert_close(first, second, STEPS)
    assert pickle.loads(pickle.dumps(each)) is each


OPTIONS: dict[str, Any] = {
    "zoneout": (0.2, 0.1), "weight_dropout": 0.3, "recurrent_dropout": 0.4,
    "recurrent_dropout_of_gates": True, "dropout": 0.5, "num_layers": 2,
}  # fmt: skip


def test_a_seed_gives_the_same_numbers_again() -> None:
    x, found = np.random.default_rng(1).normal(size=(4, 5, INPUTS)), []
    for _ in range(2):
        layer = make("cpu", **OPTIONS)
        y, _, tape = layer.forward(x, training=True)
        assert np.array_equal(layer.forward(x, training=True, draw=tape.draw)[0], y)
        assert not np.array_equal(layer.forward(x, training=True)[0], y)
        found.append([y, *tape.backward(np.ones_like(y))[2].values()])
    assert all(map(np.array_equal, *found))


def test_layers_are_saved_pickled_and_explained(tmp_path: Path) -> None:
    layer, x = make("cpu", **OPTIONS), np.random.default_rng(1).normal(size=(4, 5, INPUTS))
    layer.save(tmp_path / "layer.safetensors")
    loaded, pickled = fusedlstm.load(tmp_path / "layer.safetensors"), pickle.loads(pickle.dumps(layer))
    for other in (loaded, pickled):
        assert {key: getattr(other, key) for key in OPTIONS} == OPTIONS
        assert np.array_equal(other(x)[0], layer(x)[0])
    y = layer.forward(x, training=True, draw=DRAW)[0]
    assert np.array_equal(pickled.forward(x, training=True, draw=DRAW)[0], y)
    assert "zoneout=(0.2, 0.1)" in repr(layer)
    assert "cell lstm_zoneout" in str(fusedlstm.explain(layer, x))
    assert "lstm_zoneout_dropout_of_gates" in str(fusedlstm.explain(layer, x, training=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoneout": (0.1,)}, r"zoneout must be a number or one for each state \(h, c\), got \(0.1,\)"),
        ({"zoneout": (0.1, 1)}, "zoneout must be less than 1, at which no state changes"),
        ({"zoneout": (0.1, 2)}, "zoneout must be between 0 and 1, got 2"),
        ({"zoneout": 0.1, "proj_size": 2}, "zoneout must be 0 for the output with proj_size, got 0.1"),
        ({"weight_dropout": -1}, "weight_dropout must be between 0 and 1, got -1"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTM(3, 5, **options)


def test_a_cell_without_recurrent_weights_has_none_to_drop() -> None:
    with pytest.raises(ValueError, match="weight_dropout must be 0 with the cell ind_rnn, which has no"):
        Recurrent(cells.ind_rnn, 3, 5, weight_dropout=0.5)


def test_cuda_has_no_noise() -> None:
    from fusedlstm.kernels.cuda.phases import unsupported

    assert "noise" in unsupported(noisy)
    assert not unsupported(cells.zoneout(cells.lstm, 0.1, 0.1).inference)


# --- In PyTorch -------------------------------------------------------------------------------------------


def test_modules_drop_recurrent_weights() -> None:
    """As PyTorch would with the same masks, in training only."""
    module = fused.Recurrent(cells.lstm, 3, 5, num_layers=2, bidirectional=True, weight_dropout=0.5)
    plain = fused.Recurrent(cells.lstm, 3, 5, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 3)
    torch.manual_seed(1)
    y, _ = module(x)
    y.sum().backward()
    torch.manual_seed(1)
    dropped, masks = {}, {}
    for key, parameter in module.named_parameters():
        if key.startswith("weight_hh"):
            masks[key] = torch.nn.functional.dropout(torch.ones_like(parameter), 0.5)
        dropped[key] = (parameter.detach() * masks.get(key, 1)).requires_grad_()
    right, _ = torch.func.functional_call(plain, dropped, (x,))
    right.sum().backward()
    torch.testing.assert_close(y, right, rtol=0, atol=0)
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, dropped[key].grad * masks.get(key, 1), rtol=0, atol=0)
    assert "weight_dropout=0.5" in repr(module)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.eval()(x)[0], plain(x)[0], rtol=0, atol=0)


def test_modules_run_cells_with_noise_in_evaluation_only() -> None:
    zoned = cells.zoneout(cells.lstm, 0.1, 0.1)
    module = fused.Recurrent(zoned, 3, 5)
    x = torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match="cell lstm_zoneout has noise, which modules do not draw"):
        module(x)
    y, _ = module.eval()(x)
    layer = Recurrent(cells.lstm, 3, 5, zoneout=0.1)
    layer.load_state_dict(module.state_dict())
    assert_close(y.detach().numpy(), layer(x.numpy())[0], 4)


def test_vectors_of_modules_begin_as_cells_say() -> None:
    state = fused.Recurrent(cells.layer_norm_gru, 3, 5, num_layers=2).state_dict()
    assert all((value == 1).all() for key, value in state.items() if key.startswith("gain"))
    assert all((value == 0).all() for key, value in state.items() if key.startswith("shift"))
    assert all(value.std() > 0.05 for key, value in state.items() if key.startswith("weight"))
