"""The reference time loop: against PyTorch's layers, the oracle and finite differences, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checks import ALL, name

from fusedlstm import Recurrent, cells
from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.weights import Weights, fill, names, shapes

SIZES = [(1, 1, 1, 1), (7, 13, 3, 17), (5, 7, 1, 33), (3, 2, 4, 1)]  # T, B, I, H
TORCH: list[tuple[Cell, type[torch.nn.RNNBase], dict[str, Any]]] = [
    (cells.lstm, torch.nn.LSTM, {}),
    (cells.lstm, torch.nn.LSTM, {"proj_size": 3}),
    (cells.gru, torch.nn.GRU, {}),
    (cells.rnn_tanh, torch.nn.RNN, {}),
    (cells.rnn_relu, torch.nn.RNN, {"nonlinearity": "relu"}),
]


def weights_of(module: torch.nn.RNNBase, cell: Cell, reverse: bool) -> Weights:
    entries = names(cell, 0, reverse, module.bias, module.proj_size > 0)
    return fill(entries, lambda name: getattr(module, name).detach().numpy())


def gradients_of(module: torch.nn.RNNBase, cell: Cell, reverse: bool) -> Weights:
    entries = names(cell, 0, reverse, module.bias, module.proj_size > 0)
    return fill(entries, lambda name: getattr(module, name).grad.numpy())


def assert_equal(actual: Any, expected: Any, what: str) -> None:
    assert np.linalg.norm(actual - expected) <= 1e-13 * max(1.0, np.linalg.norm(expected)), what


def assert_equal_weights(actual: Weights, expected: Weights) -> None:
    for field, a, e in zip(Weights._fields[:5], actual, expected):
        assert (a is None) == (e is None)
        if e is not None:
            assert_equal(a, e, field)


@pytest.mark.parametrize("size", SIZES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize(("cell", "kind", "options"), TORCH, ids=name)
def test_both_directions_are_pytorch(
    cell: Cell,
    kind: type[torch.nn.RNNBase],
    options: dict[str, Any],
    padded: bool,
    bias: bool,
    size: tuple[int, int, int, int],
) -> None:
    steps, batch, inputs, hidden = size
    if options.get("proj_size", 0) >= hidden:
        options = {**options, "proj_size": 0}
    torch.manual_seed(1)
    module = kind(inputs, hidden, bias=bias, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(steps, batch, inputs, dtype=torch.float64, requires_grad=True)
    lengths = np.random.default_rng(1).integers(1, steps + 1, batch) if padded else np.full(batch, steps)
    lengths[0] = steps  # PyTorch cuts the output to the longest
    widths = [module.proj_size or hidden, hidden][: 2 if cell is cells.lstm else 1]
    initial = [torch.randn(2, batch, w, dtype=torch.float64, requires_grad=True) for w in widths]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, final = module(packed, tuple(initial) if len(initial) > 1 else initial[0])
    y = torch.nn.utils.rnn.pad_packed_sequence(output)[0]
    final = final if len(initial) > 1 else (final,)
    dy, dfinal = torch.randn_like(y), [torch.randn_like(part) for part in final]
    ((y * dy).sum() + sum((f * d).sum() for f, d in zip(final, dfinal))).backward()

    dx = np.zeros(x.shape)
    for d in range(2):
        here = slice(d * widths[0], (d + 1) * widths[0])
        ours, states, tape = reference.forward(
            cell,
            weights_of(module, cell, d == 1),
            x.detach().numpy(),
            tuple(part[d].detach().numpy() for part in initial),
            lengths if padded else None,
            reverse=d == 1,
        )
        assert_equal(ours, y[..., here].detach().numpy(), "y")
        for state, part in zip(states, final):
            assert_equal(state, part[d].detach().numpy(), "final")
        back = reference.backward(tape, dy[..., here].numpy(), tuple(part[d].numpy() for part in dfinal))
        dx += back[0]
        for gradient, part in zip(back[1], initial):
            assert_equal(gradient, part.grad[d].numpy(), "dinitial")
        assert_equal_weights(back[2], gradients_of(module, cell, d == 1))
    assert_equal(dx, x.grad.numpy(), "dx")


def problem(cell: Cell, proj: int) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    steps, batch, inputs, hidden = 6, 3, 2, 4
    entries = shapes(cell, inputs, hidden, True, proj)
    widths = [proj or hidden, *[hidden] * (len(cell.states) - 1)]
    return {
        "weights": Weights(*(_normal(generator, shape) for shape in entries)),
        "x": generator.normal(size=(steps, batch, inputs)),
        "initial": tuple(generator.normal(size=(batch, width)) for width in widths),
        "lengths": np.array([6, 1, 4]),
        "reset": generator.random((steps, batch)) < 0.3,
        "dy": generator.normal(size=(steps, batch, widths[0])),
        "dfinal": tuple(generator.normal(size=(batch, width)) for width in widths),
    }


def _normal(generator: np.random.Generator, shape: Any) -> Any:
    if shape is None:
        return None
    if shape and isinstance(shape[0], tuple):
        return tuple(_normal(generator, part) for part in shape)
    return generator.normal(size=shape) if shape else ()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", ALL, ids=name)
def test_gradients_are_finite_differences(cell: Cell, reverse: bool) -> None:
    given = problem(cell, proj=0 if cell.unprojectable else 3)

    def run(**changed: Any) -> Any:
        p = given | changed
        return reference.forward(cell, p["weights"], p["x"], p["initial"], p["lengths"], p["reset"], reverse)

    def loss(**changed: Any) -> float:
        y, final, _ = run(**changed)
        return float((y * given["dy"]).sum() + sum((f * d).sum() for f, d in zip(final, given["dfinal"])))

    dx, dinitial, grads = reference.backward(run()[2], given["dy"], given["dfinal"])
    h, generator = 1e-5, np.random.default_rng(5)

    def check(gradient: Any, value: Any, change: Any, what: str) -> None:
        """The slope along a random direction."""
        direction = generator.normal(size=value.shape)
        slope = (loss(**change(value + h * direction)) - loss(**change(value - h * direction))) / (2 * h)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=2e-6, abs=2e-6), what

    check(dx, given["x"], lambda v: {"x": v}, "x")
    for n, part in enumerate(given["initial"]):
        check(dinitial[n], part, lambda v, n=n: {"initial": _put(given["initial"], n, v)}, f"initial {n}")
    weights = given["weights"]
    for field in Weights._fields[:5]:
        value = getattr(weights, field)
        if value is not None:
            check(
                getattr(grads, field),
                value,
                lambda v, field=field: {"weights": weights._replace(**{field: v})},
                field,
            )
    for n, part in enumerate(weights.vectors):
        check(
            grads.vectors[n],
            part,
            lambda v, n=n: {"weights": weights._replace(vectors=_put(weights.vectors, n, v))},
            f"vector {n}",
        )


def _put(parts: tuple[Any, ...], n: int, value: Any) -> tuple[Any, ...]:
    return (*parts[:n], value, *parts[n + 1 :])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_padding_is_not_read(reverse: bool) -> None:
    """NaN past the end of a sequence reaches no result."""
    given = problem(cells.lstm, proj=3)
    past = np.arange(6)[:, None] >= given["lengths"]
    given["x"][past] = np.nan
    given["dy"][past] = np.nan
    y, final, tape = reference.forward(
        cells.lstm, given["weights"], given["x"], given["initial"], given["lengths"], given["reset"], reverse
    )
    assert np.array_equal(y[past], np.zeros_like(y[past]))
    dx, dinitial, grads = reference.backward(tape, given["dy"], given["dfinal"])
    assert np.array_equal(dx[past], np.zeros_like(dx[past]))
    entries = [part for part in grads[:5] if part is not None]
    assert all(np.isfinite(part).all() for part in (y, *final, dx, *dinitial, *entries, *grads.vectors))


def test_a_reset_starts_anew() -> None:
    """A sequence with a boundary is two sequences, in either direction."""
    layer = Recurrent(cells.lstm, 2, 3, dtype="float64", seed=1)
    weights = layer._places[0].weights
    generator = np.random.default_rng(1)
    x, initial = generator.normal(size=(7, 1, 2)), tuple(generator.normal(size=(2, 1, 3)))
    reset = np.zeros((7, 1), bool)
    reset[[0, 4]] = True
    for reverse in (False, True):
        y, final, _ = reference.forward(cells.lstm, weights, x, initial, reset=reset, reverse=reverse)
        first, first_end, _ = reference.forward(cells.lstm, weights, x[:4], initial, reverse=reverse)
        second, second_end, _ = reference.forward(cells.lstm, weights, x[4:], initial, reverse=reverse)
        assert np.array_equal(y, np.concatenate([first, second]))
        assert np.array_equal(final, first_end if reverse else second_end)


def test_the_gradient_of_the_input_may_be_left_out() -> None:
    given = problem(cells.lstm, proj=0)
    direction = reference.Reference().prepare(cells.lstm, given["weights"])
    y, final = np.empty((6, 3, 4)), (np.empty((3, 4)), np.empty((3, 4)))
    tape = direction.forward(given["x"], None, y, final, None, None, False, True)
    dx = np.empty_like(given["x"])
    results = [direction.backward(tape, given["dy"], None, wanted, False) for wanted in (dx, None)]
    assert np.array_equal(results[0][1].ih, results[1][1].ih)
