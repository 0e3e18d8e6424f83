"""PyTorch: all states, masks for each step, heads and gate inputs: the oracle, and finite differences."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from checks import assert_close, late_and_means, name, other_operand, three_states

import fusedlstm
import fusedlstm.torch as fused
from fusedlstm import cells
from fusedlstm.cells import Cell

CELLS = (cells.lstm, cells.gru, three_states, other_operand, late_and_means)
OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False, "heads": 3},
    {"input_size": None, "bidirectional": True, "num_layers": 2, "heads": 2},
]


def tensor(array: Any) -> Any:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).requires_grad_()


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("marks", [(), ("lengths", "reset", "mask")], ids=["all steps", "some"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_modules_are_the_oracle(cell: Cell, options: dict[str, Any], marks: Any, dtype: str) -> None:
    random, (steps, batch, hidden) = np.random.default_rng(1), (6, 5, 18)
    settings = {"input_size": 3, "hidden_size": hidden, **options}
    layer = fusedlstm.Recurrent(cell, **settings, dtype=dtype, seed=1)
    module = fused.Recurrent(cell, **settings, dtype=getattr(torch, dtype))
    module.load_state_dict({key: tensor(value) for key, value in layer.state_dict().items()})

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(dtype)

    rows, sizes = len(layer._places), layer._sizes
    x, dy = normal(steps, batch, layer._features), normal(steps, batch, layer._width)
    initial, dfinal = ([normal(rows, batch, size) for size in sizes] for _ in range(2))
    dstates = [normal(steps, rows, batch, size) for size in sizes]
    lengths, reset, mask = (
        values if what in marks else None
        for what, values in (
            ("lengths", random.integers(0, steps + 1, batch)),
            ("reset", random.random((steps, batch)) < 0.3),
            ("mask", random.random((steps, batch)) < 0.6),
        )
    )

    def axes(array: Any) -> Any:
        return None if array is None else array.swapaxes(0, 1) if layer.batch_first else array

    given, hx = leaf(axes(x)), tuple(map(leaf, initial))
    y, end, states = module(
        given,
        hx if len(hx) > 1 else hx[0],
        tensor(lengths),
        tensor(axes(reset)),
        mask=tensor(axes(mask)),
        all_states=True,
    )
    final = end if isinstance(end, tuple) else (end,)
    seeds = [tensor(axes(dy)), *map(tensor, dfinal), *map(tensor, dstates)]
    found = torch.autograd.grad([y, *final, *states], [given, *hx, *module.parameters()], seeds)
    right = oracle.run(
        layer, x, tuple(initial), dy, tuple(dfinal), lengths, reset, mask=mask, dstates=tuple(dstates)
    )
    depth = steps * layer.num_layers
    expected = [axes(right.y), *right.final, *right.states]
    for a, b in zip([y, *final, *states], expected, strict=True):
        assert_close(a.detach().numpy(), b, depth)
    gradients = [axes(right.dx), *right.dinitial, *right.grads.values()]
    for a, b in zip(found, gradients, strict=True):
        assert_close(a.numpy(), b, depth, gradient=True)
    with torch.no_grad():
        for a, b in zip(module(given, mask=tensor(axes(mask))), module(given, mask=tensor(axes(mask)))):
            assert a[0].equal(b[0])


@pytest.mark.parametrize("options", [{"heads": 2}, {"input_size": None, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means], ids=name)
def test_gradients_of_gradients_are_finite_differences(cell: Cell, options: dict[str, Any]) -> None:
    """Of all results, with a mask, lengths and boundaries."""
    torch.manual_seed(1)
    module = fused.Recurrent(cell, **{"input_size": 2, "hidden_size": 4, **options}, dtype=torch.float64)
    x = torch.randn(4, 2, module.features, dtype=torch.float64, requires_grad=True)
    mask, reset = torch.rand(4, 2) < 0.7, torch.rand(4, 2) < 0.3
    weights = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    names = [key for key, _ in module.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, weights))
        options = {"mask": mask, "reset": reset, "lengths": [4, 3], "all_states": True}
        y, end, states = torch.func.functional_call(module, given, (x,), options)
        return (y, *(end if isinstance(end, tuple) else (end,)), *states)

    assert torch.autograd.gradgradcheck(run, (x, *weights), atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_transforms_and_compiled_graphs(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module = fused.Recurrent(
        cells.lstm, **{"input_size": 3, "hidden_size": 6, **options}, dtype=torch.float64
    )
    x, mask = torch.randn(5, 4, module.features, dtype=torch.float64), torch.rand(5, 4) < 0.7

    def run(x: torch.Tensor) -> torch.Tensor:
        y, (h, c), states = module(x, mask=mask, all_states=True)
        return torch.cat([part.flatten() for part in (y, h, c, *states)])

    expected = run(x)
    assert torch.compile(run, backend="aot_eager", fullgraph=True)(x).equal(expected)
    assert torch.vmap(run)(x[None])[0].equal(expected)
    tangent = torch.randn_like(x)
    moved = torch.func.jvp(run, (x,), (tangent,))[1]
    step = 1e-6 * tangent
    torch.testing.assert_close(moved, (run(x + step) - run(x - step)) / 2e-6, atol=1e-6, rtol=1e-6)


def test_heads_and_gate_inputs_are_pickled_and_shown() -> None:
    module = fused.Recurrent(cells.lstm, None, 6, heads=3)
    copy = pickle.loads(pickle.dumps(module))
    assert repr(copy) == repr(module) == "Recurrent(lstm, None, 6, heads=3)"
    assert copy.weight_hh_l0.shape == (24, 2)
    x = torch.randn(3, 2, 24)
    assert copy(x)[0].equal(module(x)[0])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mask": torch.ones(4, 2)}, TypeError, "mask must be a tensor of booleans"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask must have the shape \(4, 2\)"),
        ({"all_states": 1}, TypeError, "all_states must be True or False"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused.LSTM(3, 5)(torch.zeros(4, 2, 3), **given)


def test_other_inputs_of_gates_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Expected 24, got 23"):
        fused.Recurrent(cells.lstm, None, 6)(torch.zeros(4, 2, 23))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of heads 4, got 6"):
        fused.Recurrent(cells.lstm, 3, 6, heads=4)
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 3)])
    with pytest.raises(ValueError, match="a PackedSequence has no mask and no all_states"):
        fused.LSTM(3, 5)(packed, all_states=True)


@pytest.mark.parametrize("columns", [1, 2, 3, 12])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_recurrent_matrix_that_looks_like_other_heads_is_refused(heads: int, columns: int) -> None:
    module = fused.Recurrent(cells.lstm, 3, 6, heads=heads)
    if columns == 6 // heads:
        columns = 6
    wrong = {"weight_hh_l0": torch.zeros(24, columns)}
    with pytest.raises(RuntimeError, match=rf"^weight_hh must have the shape \(24, {6 // heads}\), got"):
        torch.func.functional_call(module, wrong, (torch.zeros(2, 1, 3),))


def test_tangents_refuse_it_too() -> None:
    module, x = fused.LSTM(3, 6), torch.zeros(2, 1, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight_hh_l0": torch.zeros(24, 3)}, (x,))[0]  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match=r"^weight_hh must have the shape \(24, 6\), got \(24, 3\)"):
        torch.func.jvp(run, (x,), (x,))


@pytest.mark.parametrize("columns", [1, 2, 3, 12])
def test_a_recurrent_matrix_of_a_cell_that_looks_like_heads_is_refused(columns: int) -> None:
    wrong = {"weight_hh": torch.zeros(24, columns)}
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"^weight_hh must have the shape \(24, 6\), got"),
    ):
        torch.func.functional_call(fused.LSTMCell(3, 6), wrong, (torch.zeros(1, 3),))


@pytest.mark.parametrize(
    "text", ["{} float32", "{} int4 1", "{} float32 0", "{} float32 -1", "{} float32 1 1"]
)
def test_the_operator_refuses_other_texts(text: str) -> None:
    weights = [parameter.detach() for parameter in fused.LSTM(3, 6).parameters()]
    with pytest.raises(ValueError, match=r"^cell must be the key of a cell"):
        torch.ops.fusedlstm.layer(
            torch.zeros(2, 1, 3), [], weights, None, None, text.format(cells.lstm.key), 1, False
        )


def test_heads_are_not_recorded() -> None:
    module = fused.Recurrent(cells.lstm, 3, 6, heads=2)

    def packed(x: torch.Tensor) -> torch.Tensor:
        sequences = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2]))
        return module(sequences)[1][0]  # type: ignore[no-any-return]

    for run in (module, packed):
        with pytest.raises(RuntimeError, match="have no operator for a layer with heads"):
            torch.jit.trace(run, torch.zeros(2, 1, 3), check_trace=False)


@pytest.mark.parametrize("inputs", [3, None])
def test_dropout_of_recurrent_weights_is_that_of_the_recurrent_matrix(inputs: int | None) -> None:
    """Which has another place among the weights where the first layer has no input weights."""
    module = fused.Recurrent(cells.lstm, inputs, 6, bidirectional=True, weight_dropout=1.0)
    free = fused.Recurrent(cells.lstm, inputs, 6, bidirectional=True)
    free.load_state_dict(
        {name: value * (not name.startswith("weight_hh")) for name, value in module.state_dict().items()}
    )
    x = torch.randn(4, 2, module.features)
    torch.testing.assert_close(module(x)[0], free(x)[0])
