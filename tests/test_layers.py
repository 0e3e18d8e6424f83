"""Layers on every backend: against PyTorch, against the oracle over all options, and bad input."""

from __future__ import annotations

import inspect
import itertools
import pickle
import sys
import types
import warnings
from functools import partial
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest
import torch
from checks import (
    ALL,
    BUILT_IN,
    PROJECTED,
    assert_close,
    five_gates,
    late_and_means,
    name,
    other_operand,
    three_states,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedlstm
import fusedlstm.torch as fused
from fusedlstm import GRU, LSTM, RNN, Recurrent, cells, dispatch
from fusedlstm.cells import Cell
from fusedlstm.kernels.random import dropout_mask

DTYPES = ["float32", "float64"]
X, H = np.zeros((4, 2, 3), np.float32), np.zeros((1, 2, 5), np.float32)


def as_tuple(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


def as_state(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tuple(parts)


# --- Against PyTorch --------------------------------------------------------------------------------------

PAIRS: list[tuple[type[Recurrent], type[torch.nn.RNNBase], dict[str, Any]]] = [
    (LSTM, torch.nn.LSTM, {}),
    (LSTM, torch.nn.LSTM, {"proj_size": 2}),
    (GRU, torch.nn.GRU, {}),
    (RNN, torch.nn.RNN, {}),
    (RNN, torch.nn.RNN, {"nonlinearity": "relu"}),
]
SIZES = [(1, 1, 1, 3), (7, 13, 1, 17), (6, 7, 5, 33)]  # T, B, I, H
STACKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "bias": False, "batch_first": True},
]


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("size", SIZES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
@pytest.mark.parametrize("stack", STACKS, ids=["one", "stacked", "batch-first"])
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_layer_is_pytorch_with_its_weights(
    backend: str,
    ours: type[Recurrent],
    theirs: type[torch.nn.RNNBase],
    options: dict[str, Any],
    stack: dict[str, Any],
    size: tuple[int, int, int, int],
) -> None:
    steps, batch, inputs, hidden = size
    torch.manual_seed(1)
    module = theirs(inputs, hidden, **options, **stack, dtype=torch.float64)
    layer: Any = ours(inputs, hidden, **options, **stack, dtype="float64", backend=backend)
    layer.load_state_dict(module.state_dict())
    shape = (batch, steps, inputs) if module.batch_first else (steps, batch, inputs)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, final = module(x)
    dy, dfinal = torch.randn_like(y), [torch.randn_like(part) for part in as_tuple(final)]
    ((y * dy).sum() + sum((f * d).sum() for f, d in zip(as_tuple(final), dfinal))).backward()

    our_y, our_final, tape = layer.forward(x.detach().numpy(), training=True)
    dx, _, grads = tape.backward(dy.numpy(), as_state([d.numpy() for d in dfinal]))
    assert_close(our_y, y.detach(), steps, "y")
    for a, b in zip(as_tuple(our_final), as_tuple(final)):
        assert_close(a, b.detach(), steps, "final")
    assert_close(dx, x.grad, steps, "dx", gradient=True)
    assert list(grads) == list(module.state_dict()) == list(layer.state_dict())
    for key, parameter in module.named_parameters():
        assert_close(grads[key], parameter.grad, steps, key, gradient=True)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_parameters_are_named_shaped_and_drawn_as_in_pytorch(
    ours: type[Recurrent], theirs: type[torch.nn.RNNBase], options: dict[str, Any]
) -> None:
    stack = {"num_layers": 2, "bidirectional": True}
    module = theirs(30, 40, **options, **stack)
    layer: Any = ours(30, 40, **options, **stack, seed=1)
    theirs_by_name = module.state_dict()
    assert list(layer.state_dict()) == list(theirs_by_name)
    bound = 40**-0.5
    for key, array in layer.state_dict().items():
        assert array.shape == tuple(theirs_by_name[key].shape)
        assert array.dtype == np.float32
        assert np.abs(array).max() <= bound
        # standard deviation of the uniform distribution, within five of its own
        assert abs(array.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(array.size)


# --- Against the oracle, over the whole option space ------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    cell = draw(st.sampled_from(ALL))
    hidden = draw(st.sampled_from([2, 3, 5, 8, 16, 17, 33]))  # one number alone is all rounding
    proj = draw(st.sampled_from([0, hidden - 1, hidden // 2])) if cell in PROJECTED else 0
    dropout = draw(st.sampled_from([0.0, 0.0, 0.3]))
    return {
        "options": {
            "cell": cell,
            "input_size": draw(st.sampled_from([1, 2, 3, 7, 19])),
            "hidden_size": hidden,
            "num_layers": 2 if dropout else draw(st.integers(1, 3)),
            "bias": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
            "dropout": dropout,
            "bidirectional": draw(st.booleans()),
            "proj_size": proj,
            "dtype": draw(st.sampled_from(DTYPES)),
        },
        "steps": draw(st.integers(1, 9)),
        "batch": draw(st.sampled_from([None, 1, 2, 4, 7, 13])),  # None: one sequence without the axis
        "lengths": draw(st.booleans()),
        "reset": draw(st.booleans()),
        "state": draw(st.booleans()),
        "dstate": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
    }


@settings(max_examples=200)
@given(problem=problems())
def test_every_option_is_the_oracle(backend: str, problem: dict[str, Any]) -> None:
    check_against_oracle(backend, **problem)


@settings(max_examples=100)
@given(problem=problems(), mask=st.booleans(), all_states=st.booleans())
def test_masks_and_all_states_are_the_oracle(
    backend: str, problem: dict[str, Any], mask: bool, all_states: bool
) -> None:
    """In float64: a step that is left out shows the rounding error of another, which is not independent."""
    problem["options"]["dtype"] = "float64"
    check_against_oracle(backend, **problem, mask=mask, all_states=all_states)


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (5, 7, 1, 33), (3, 13, 4, 17)], ids=str)
@pytest.mark.parametrize("cell", ALL, ids=name)
def test_every_cell_is_the_oracle(
    backend: str, cell: Cell, size: tuple[int, int, int, int], dtype: str
) -> None:
    steps, batch, inputs, hidden = size
    options = {
        "cell": cell,
        "input_size": inputs,
        "hidden_size": hidden,
        "num_layers": 2,
        "bidirectional": True,
        "dtype": dtype,
    }
    check_against_oracle(backend, options, steps, batch, lengths=True, reset=True, mask=True, all_states=True)


def check_against_oracle(
    backend: str,
    options: dict[str, Any],
    steps: int,
    batch: int | None,
    lengths: bool = False,
    reset: bool = False,
    state: bool = True,
    dstate: bool = True,
    mask: bool = False,
    all_states: bool = False,
    seed: int = 1,
) -> None:
    generator = np.random.default_rng(seed)
    layer = Recurrent(**options, backend=backend, seed=seed)
    rows, dtype = batch or 1, layer.dtype

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(dtype)

    count = layer.num_layers * layer._directions
    x, dy = normal(steps, rows, layer._features), normal(steps, rows, layer._width)
    zeros = [np.zeros((count, rows, size), dtype) for size in layer._sizes]
    initial = [normal(*part.shape) for part in zeros] if state else zeros
    dfinal = [normal(*part.shape) for part in zeros] if dstate else zeros
    ends = generator.integers(0, steps + 1, rows) if lengths and batch else None
    marks = generator.random((steps, rows)) < 0.25 if reset else None
    counts = generator.random((steps, rows)) < 0.6 if mask else None
    dstates = [normal(steps, *part.shape) for part in zeros] if all_states else None

    def given(array: Any) -> Any:
        """As the layer takes an array (T, B, ...)."""
        if array is None or batch is None:
            return None if array is None else array[:, 0]
        return array.swapaxes(0, 1) if layer.batch_first else array

    def given_state(parts: list[Any], present: bool) -> Any:
        return as_state([part if batch else part[:, 0] for part in parts]) if present else None

    def given_states(parts: Any) -> Any:
        return None if parts is None else tuple(part if batch else part[:, :, 0] for part in parts)

    y, final, *states, tape = layer.forward(
        given(x),
        given_state(initial, state),
        ends,
        given(marks),
        training=True,
        mask=given(counts),
        all_states=all_states,
        draw=5,
    )
    dx, dinitial, grads = tape.backward(given(dy), given_state(dfinal, dstate), given_states(dstates))
    masks = [
        dropout_mask((steps, rows, layer._width), layer.dropout, layer._key, 5, n, np.float64)
        for n in range(layer.num_layers - 1)
    ]
    if counts is not None:  # masks are those of the steps that count
        inside = counts if ends is None else counts & (np.arange(steps)[:, None] < ends)
        places = np.argsort(np.argsort(~inside, 0, kind="stable"), 0)[..., None]
        masks = [np.take_along_axis(drawn, places, 0) for drawn in masks]
    rate, shape = layer.recurrent_dropout, (rows, layer.hidden_size)
    recurrent_masks = [
        dropout_mask(shape, rate, layer._key, 5, layer.num_layers + n, np.float64) for n in range(count)
    ]
    expected = oracle.run(
        layer, x, tuple(initial), dy, tuple(dfinal), ends, marks, masks, recurrent_masks if rate else None,
        counts, dstates,
    )  # fmt: skip

    depth = steps * layer.num_layers
    assert_close(y, given(expected.y), depth, "y")
    assert_close(dx, given(expected.dx), depth, "dx", gradient=True)
    for n, part in enumerate(as_tuple(final)):
        assert_close(part, given_state([expected.final[n]], True), depth, f"final {n}")
    assert len(states) == all_states
    for found, want in zip(*states, given_states(expected.states)) if states else ():
        assert_close(found, want, depth, "states")
    for n, part in enumerate(as_tuple(dinitial)):
        assert_close(part, given_state([expected.dinitial[n]], True), depth, f"dinitial {n}", gradient=True)
    assert list(grads) == list(layer.state_dict())
    for key, value in expected.grads.items():
        assert_close(grads[key], value, depth, key, gradient=True)


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", BUILT_IN, ids=name)
def test_long_sequences(backend: str, cell: Cell, dtype: str) -> None:
    """More steps than any chunk of time that an engine may cut."""
    options = {"cell": cell, "input_size": 3, "hidden_size": 9, "dtype": dtype}
    check_against_oracle(backend, options, steps=150, batch=2, lengths=True, reset=True)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize(
    ("cell", "dtype"), [(cells.lstm, "float32"), (cells.lstm, "float64"), (cells.gru, "float64")], ids=name
)
def test_recurrent_dropout_is_the_oracle(backend: str, cell: Cell, dtype: str, state: bool) -> None:
    options = {
        "cell": cell,
        "input_size": 3,
        "hidden_size": 17,
        "num_layers": 2,
        "bidirectional": True,
        "dropout": 0.25,
        "recurrent_dropout": 0.5,
        "dtype": dtype,
    }
    more = {"lengths": True, "reset": True, "mask": state, "all_states": True}
    check_against_oracle(backend, options, 9, 7, state=state, dstate=state, **more)


HEADS = [(1, 1), (12, 3), (20, 4), (34, 2), (48, 3), (33, 33), (70, 7)]  # H, heads


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "heads"), HEADS)
@pytest.mark.parametrize(
    "cell", [cells.lstm, cells.gru_reset_before, late_and_means, other_operand], ids=name
)
def test_heads_are_the_oracle(backend: str, cell: Cell, hidden: int, heads: int, dtype: str) -> None:
    """Those that fill panels, and parts of panels; of late gates, and of a state other than the output."""
    options = {
        "cell": cell,
        "input_size": 3,
        "hidden_size": hidden,
        "num_layers": 2,
        "bidirectional": True,
        "dtype": dtype,
        "heads": heads,
    }
    check_against_oracle(backend, options, steps=5, batch=7, lengths=True, reset=True, all_states=True)


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("cell", [c for c in ALL if c.gates_with_recurrent or c.weights], ids=name)
def test_gate_inputs_are_the_oracle(backend: str, cell: Cell, options: dict[str, Any], dtype: str) -> None:
    options = {"cell": cell, "input_size": None, "hidden_size": 17, "dtype": dtype, **options}
    check_against_oracle(backend, options, steps=5, batch=7, lengths=True, reset=True)
    check_against_oracle(backend, {**options, "bias": False, "heads": 1}, steps=1, batch=None, state=False)


@pytest.mark.parametrize("options", [{}, {"heads": 3}, {"recurrent_dropout": 0.5, "heads": 3}], ids=str)
def test_gate_inputs_with_other_options(backend: str, options: dict[str, Any]) -> None:
    options = {"cell": cells.lstm, "input_size": None, "hidden_size": 33, "bidirectional": True, **options}
    check_against_oracle(backend, options, steps=9, batch=7, lengths=True, reset=True, mask=True)


def test_gate_inputs_are_the_products_of_the_input(backend: str) -> None:
    """In the order of the weights: a layer with these, and one without, give the same."""
    whole = Recurrent(cells.lstm_output_from_memory, 3, 5, bidirectional=True, backend=backend, seed=1)
    given = Recurrent(cells.lstm_output_from_memory, None, 5, bidirectional=True, backend=backend, seed=2)
    state_dict = whole.state_dict()
    given.load_state_dict({name: state_dict[name] for name in given.state_dict()})
    assert set(state_dict) - set(given.state_dict()) == {
        f"{kind}_ih_l0{suffix}" for kind in ("weight", "bias") for suffix in ("", "_reverse")
    }
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)
    products = [x @ state_dict[f"weight_ih_l0{s}"].T + state_dict[f"bias_ih_l0{s}"] for s in ("", "_reverse")]
    for ours, theirs in zip(given(np.concatenate(products, -1)), whole(x)):
        for a, b in zip(as_tuple(ours), as_tuple(theirs)):
            assert_close(a, b, 6)


def test_heads_and_gate_inputs_are_saved_and_copied(backend: str, tmp_path: Any) -> None:
    layer = GRU(None, 6, heads=3, bidirectional=True, recurrent_dropout=0.5, backend=backend, seed=1)
    assert layer.weight_hh_l0.shape == (18, 2)
    layer.save(tmp_path / "layer.safetensors")
    x = np.random.default_rng(1).normal(size=(4, 2, 36)).astype(np.float32)
    loaded = fusedlstm.load(tmp_path / "layer.safetensors", backend=backend)
    for other in (loaded, pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert all(map(np.array_equal, other(x), layer(x)))
    assert cells.gate_inputs(cells.lstm) is pickle.loads(pickle.dumps(cells.gate_inputs(cells.lstm)))


@pytest.mark.parametrize(("heads", "shown"), [(1, ""), (3, ", recurrent ones in 3 heads")])
def test_explain_tells_heads(heads: int, shown: str) -> None:
    (says,) = fusedlstm.explain(LSTM(None, 6, heads=heads), np.zeros((4, 2, 24), np.float32)).places.values()
    assert says["layout"].endswith(f"MB{shown}")
    assert says["chunk"].endswith("is taken at once")


def test_a_cell_of_which_nothing_would_be_learned_needs_input_weights() -> None:
    @fusedlstm.cell(gates=("a", "b"), without_recurrent=("a", "b"))
    def minimal(a: Any, b: Any, h: Any) -> Any:
        return a * h + b

    with pytest.raises(cells.CellError, match="neither recurrent weights nor learned vectors"):
        Recurrent(minimal, None, 5)
    with pytest.raises(ValueError, match="heads must be 1 with the cell minimal"):
        Recurrent(minimal, 3, 6, heads=2)


# --- Inference, training, the tape ------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, three_states], ids=name)
def test_inference_gives_what_training_gives(backend: str, cell: Cell) -> None:
    layer = Recurrent(cell, 3, 5, 2, bidirectional=True, backend=backend, seed=1)
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)
    lengths = [3, 6, 1, 4]
    y, final = layer(x, lengths=lengths)
    trained_y, trained_final, tape = layer.forward(x, lengths=lengths, training=True)
    assert tape is not None
    assert layer.forward(x)[2] is None
    for a, b in zip((y, *as_tuple(final)), (trained_y, *as_tuple(trained_final))):
        assert_close(a, b, 6)


def test_state_is_carried_over(backend: str) -> None:
    """Two halves, the second with the state of the first, are the whole; so are single steps."""
    layer = LSTM(3, 5, 2, backend=backend, dtype="float64", seed=1)
    x = np.random.default_rng(1).normal(size=(6, 2, 3))
    y, (h, c) = layer(x)
    state, pieces = None, []
    for piece in (x[:2], x[2:3], x[3:4], x[4:]):
        part, state = layer(piece, state)
        pieces.append(part)
    assert state is not None
    assert_close(np.concatenate(pieces), y, 6)
    assert_close(state[0], h, 6)
    assert_close(state[1], c, 6)


def test_a_tape_may_be_used_again(backend: str) -> None:
    layer = GRU(3, 5, 2, dropout=0.5, bidirectional=True, backend=backend, seed=1)
    generator = np.random.default_rng(1)
    x = generator.normal(size=(4, 2, 3)).astype(np.float32)
    y, _, tape = layer.forward(x, training=True)
    assert tape is not None
    dy = generator.normal(size=y.shape).astype(np.float32)
    first, _, grads = tape.backward(dy)
    layer.weight_hh_l0 = np.zeros((15, 5), np.float32)  # the tape keeps the weights of its pass
    again, _, grads_again = tape.backward(dy)
    assert np.array_equal(first, again)
    assert all(np.array_equal(grads[key], grads_again[key]) for key in grads)


def test_gradients_add_up(backend: str) -> None:
    """Backward is linear: dy and dstate together, and either alone; None is zero."""
    layer = LSTM(2, 3, backend=backend, dtype="float64", seed=1)
    generator = np.random.default_rng(1)
    y, (h, c), tape = layer.forward(generator.normal(size=(4, 2, 2)), training=True)
    assert tape is not None
    dy, dstate = generator.normal(size=y.shape), (generator.normal(size=h.shape), np.zeros_like(c))
    both, first, second = tape.backward(dy, dstate), tape.backward(dy), tape.backward(None, dstate)
    assert_close(both[0], first[0] + second[0], 4, gradient=True)
    for key in both[2]:
        assert_close(both[2][key], first[2][key] + second[2][key], 4, gradient=True)


def test_results_do_not_share_memory_with_arguments(backend: str) -> None:
    layer = GRU(3, 3, backend=backend, seed=1)
    x, h = np.ones((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
    y, final, tape = layer.forward(x, h, training=True)
    assert tape is not None
    dy, dh = np.ones_like(y), np.ones_like(h)
    dx, dinitial, _ = tape.backward(dy, dh)
    arrays = [x, h, y, final, dy, dh, dx, dinitial]
    for a, b in itertools.combinations(arrays, 2):
        assert not np.shares_memory(a, b)
    assert all((array == 1).all() for array in (x, h, dy, dh))


# --- What changes between forward and backward ------------------------------------------------------------


def gradients(tape: Any, y: np.ndarray) -> list[np.ndarray]:
    dx, dstate, grads = tape.backward(np.ones_like(y))
    return [dx, *as_tuple(dstate), *grads.values()]


def test_arguments_other_than_x_may_be_written_after_forward(backend: str) -> None:
    layer = LSTM(3, 5, 2, bidirectional=True, backend=backend, seed=1)
    generator = np.random.default_rng(1)
    x, h = (generator.normal(size=shape).astype(np.float32) for shape in ((6, 2, 3), (4, 2, 5)))
    lengths, reset = np.array([6, 4]), generator.random((6, 2)) < 0.4
    y, _, tape = layer.forward(x, (h, h), lengths, reset, training=True)
    before = gradients(tape, y)
    h[:], lengths[:], reset[:] = 9, 10**9, ~reset
    for array, expected in zip(gradients(tape, y), before):
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru_reset_before, three_states], ids=name)
def test_the_tape_has_the_weights_of_its_forward_pass(backend: str, cell: Cell) -> None:
    """Also if they are replaced before the first backward pass."""
    layers = [Recurrent(cell, 3, 5, 2, bidirectional=True, backend=backend, seed=1) for _ in range(2)]
    x = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)
    (y, _, tape), (_, _, expected) = [layer.forward(x, training=True) for layer in layers]
    layers[0].load_state_dict({name: 2 * array for name, array in layers[0].state_dict().items()})
    for ours, theirs in zip(gradients(tape, y), gradients(expected, y)):
        assert np.array_equal(ours, theirs)


def test_x_that_is_resized_before_backward_is_refused(backend: str) -> None:
    layer = LSTM(3, 5, backend=backend, seed=1)
    for steps in (1, 4000):
        x = np.ones((4, 2, 3), np.float32)
        y, _, tape = layer.forward(x, training=True)
        x.resize((steps, 2, 3), refcheck=False)
        with pytest.raises(RuntimeError, match="x has been resized since the forward pass"):
            gradients(tape, y)
    tensor = torch.ones(4, 2, 3)
    y, _, tape = layer.forward(tensor, training=True)
    assert gradients(tape, y)
    tensor.resize_(4000, 2, 3)
    with pytest.raises(RuntimeError, match="x has been resized since the forward pass"):
        gradients(tape, y)


def test_a_copied_x_may_be_resized_before_backward(backend: str) -> None:
    layer, x = LSTM(3, 5, backend=backend, seed=1), np.ones((4, 2, 3), ">f4")
    y, _, tape = layer.forward(x, training=True)
    expected = gradients(tape, y)
    x.resize((1, 2, 3), refcheck=False)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(gradients(tape, y), expected))


def test_the_shapes_of_x_and_y_may_change_before_backward(backend: str) -> None:
    """Of the caller's arrays, whose numbers stay where they are."""
    layer = LSTM(3, 5, backend=backend, seed=1)
    x = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)
    y, _, tape = layer.forward(x, training=True)
    dy, dx = np.ones_like(y), tape.backward(np.ones_like(y))[0]
    with pytest.raises(ValueError, match="cannot resize this array"):
        y.resize((1000, 2, 5), refcheck=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x.shape, y.shape = (24,), (40,)
    assert np.array_equal(tape.backward(dy)[0], dx)


# --- Empty sequences, no sequences, no steps --------------------------------------------------------------


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("lengths", [[0, 3, 0, 5, 1], [0] * 5], ids=["some", "all"])
@pytest.mark.parametrize(
    ("cell", "proj_size"),
    [*((cell, 0) for cell in (*ALL, cells.gru_reset_before)), *((cell, 4) for cell in PROJECTED)],
    ids=name,
)
def test_empty_sequences(backend: str, cell: Cell, lengths: list[int], proj_size: int) -> None:
    """Their outputs are zero, their final state is the initial one, as is its gradient."""
    options: dict[str, Any] = {"bidirectional": True, "proj_size": proj_size, "dtype": "float64"}
    layer = Recurrent(cell, 3, 17, backend=backend, seed=1, **options)
    generator = np.random.default_rng(1)
    x, initial, dfinal = generator.normal(size=(5, 5, 3)), [], []
    for size in layer._sizes:
        initial.append(generator.normal(size=(2, 5, size)))
        dfinal.append(generator.normal(size=(2, 5, size)))
    empty = np.array(lengths) == 0
    x[:, empty] = np.nan
    reset = generator.random((5, 5)) < 0.4

    def both(keep: Any) -> Any:
        """Forward and backward, of some of the sequences."""
        state, dstate = (as_state([part[:, keep] for part in parts]) for parts in (initial, dfinal))
        arguments = x[:, keep], state, np.array(lengths)[keep], reset[:, keep]
        y, final, tape = layer.forward(*arguments, training=True)
        assert tape is not None
        assert_close(layer(*arguments)[0], y, 5)
        return y, as_tuple(final), *tape.backward(np.cos(y), dstate)

    y, final, dx, dinitial, grads = both(slice(None))
    assert (y[:, empty] == 0).all()
    assert (dx[:, empty] == 0).all()
    for n, (part, gradient) in enumerate(zip(final, as_tuple(dinitial))):
        assert np.array_equal(part[:, empty], initial[n][:, empty])
        assert np.array_equal(gradient[:, empty], dfinal[n][:, empty])
    _, _, _, _, others = both(~empty)
    for key, gradient in grads.items():
        assert_close(gradient, others[key], 5, key, gradient=True)


@pytest.mark.parametrize("dropped", [{}, {"dropout": 0.5, "recurrent_dropout": 0.5}], ids=["plain", "drop"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("shape", [(0, 2), (4, 0), (0, 0), (0,)], ids=str)
def test_no_steps_or_no_sequences(
    backend: str, shape: tuple[int, ...], state: bool, batch_first: bool, dropped: dict[str, float]
) -> None:
    """Outputs are empty, the final state is the initial one, weights have a gradient of zero."""
    options: dict[str, Any] = {"bidirectional": True, "batch_first": batch_first, **dropped}
    layer = Recurrent(three_states, 3, 5, 2, backend=backend, seed=1, **options)
    generator = np.random.default_rng(1)
    axes = shape[::-1] if batch_first else shape
    x = np.zeros((*axes, 3), np.float32)
    given, dfinal = generator.normal(size=(2, 3, 4, *shape[1:], 5)).astype(np.float32)
    initial = given if state else np.zeros_like(given)
    rest = (None if len(shape) == 1 else [0] * shape[1], np.zeros(axes, bool))
    for arguments in ((), rest):
        y, final, tape = layer.forward(x, tuple(given) if state else None, *arguments, training=True)
        assert tape is not None
        dx, dinitial, grads = tape.backward(y, tuple(dfinal))
        assert y.shape == (*axes, 10)
        assert dx.shape == x.shape
        for found, expected in zip((*final, *dinitial), (*initial, *dfinal), strict=True):
            assert np.array_equal(found, expected)
            assert not np.shares_memory(found, expected)
        assert all((part == 0).all() and part.dtype == np.float32 for part in tape.backward(None)[1])
        assert list(grads) == list(layer.state_dict())
        for key, gradient in grads.items():
            assert gradient.shape == layer.state_dict()[key].shape
            assert (gradient == 0).all()
    assert "none: there are" in str(fusedlstm.explain(layer, x, training=True))


def test_no_sequences_are_refused_where_others_are(cupy: Any) -> None:
    with pytest.raises(TypeError, match="backend 'cpu' takes NumPy arrays, got a CuPy array"):
        LSTM(3, 5, backend="cpu")(cupy.asarray(X[:, :0]))


# --- Dropout ----------------------------------------------------------------------------------------------


def test_dropout_is_between_layers_and_in_training_only(backend: str) -> None:
    x = np.random.default_rng(1).normal(size=(5, 4, 3)).astype(np.float32)
    with_dropout = LSTM(3, 8, 2, dropout=0.5, backend=backend, seed=1)
    without = LSTM(3, 8, 2, backend=backend, seed=1)
    assert np.array_equal(with_dropout(x)[0], without(x)[0])
    y, (h, _), tape = with_dropout.forward(x, training=True)
    assert tape is not None
    assert not np.array_equal(y, without(x)[0])
    assert (y != 0).all()  # the last layer is not dropped
    assert np.array_equal(h[0], without(x)[1][0][0])  # nor is the state


def test_dropout_draws_anew_and_can_be_repeated(backend: str) -> None:
    x = np.ones((5, 4, 3), np.float32)
    layer = GRU(3, 8, 3, dropout=0.5, backend=backend, seed=1)
    passes = [layer.forward(x, training=True) for _ in range(3)]
    assert [tape.draw for _, _, tape in passes if tape] == [0, 1, 2]
    assert len({y.tobytes() for y, _, _ in passes}) == 3
    assert np.array_equal(layer.forward(x, training=True, draw=1)[0], passes[1][0])
    again, other = (GRU(3, 8, 3, dropout=0.5, backend=backend, seed=seed) for seed in (1, 2))
    other.load_state_dict(layer.state_dict())
    assert np.array_equal(again.forward(x, training=True)[0], passes[0][0])
    assert not np.array_equal(other.forward(x, training=True, draw=0)[0], passes[0][0])


@pytest.mark.parametrize(("draw", "error"), [(-1, ValueError), (1.5, TypeError)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_bad_draw(backend: str, draw: Any, error: type[Exception], dropout: float) -> None:
    with pytest.raises(error, match="draw must be"):
        GRU(3, 8, 2, dropout=dropout, backend=backend).forward(X, training=True, draw=draw)


@pytest.mark.parametrize("training", ["no", 1, None])
def test_training_is_true_or_false(backend: str, training: Any) -> None:
    layer = GRU(3, 8, backend=backend)
    with pytest.raises(TypeError, match=f"training must be True or False, got {training!r}"):
        layer.forward(X, training=training)
    with pytest.raises(TypeError, match="training must be True or False"):
        fusedlstm.explain(layer, X, training)
    assert layer.forward(X, training=np.True_)[2] is not None


def test_dropout_of_everything(backend: str) -> None:
    layer = RNN(3, 4, 2, bias=False, dropout=1.0, backend=backend, seed=1)
    y, _, tape = layer.forward(np.ones((2, 2, 3), np.float32), training=True)
    assert tape is not None
    assert (y == 0).all()
    assert (tape.backward(np.ones_like(y))[0] == 0).all()


def gru_reset_before(
    layer: GRU, x: np.ndarray, h: np.ndarray, masks: Any, lengths: Any, reset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cho et al. (2014), one layer of two directions, a step at a time; masks (2, B, H) of the product."""
    steps, batch, _ = x.shape
    y, final = np.zeros((steps, batch, 2 * layer.hidden_size)), h.copy()
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        ih, hh, b_ih, b_hh = (
            np.asarray(getattr(layer, f"{name}{suffix}"), np.float64)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        (w_r, w_z, w_n), (u_r, u_z, u_n) = np.split(ih, 3), np.split(hh, 3)
        b_r, b_z, b_n = np.split(b_ih + b_hh, 3)
        for b in range(batch):
            state, times = h[d, b], range(lengths[b])
            for t in reversed(times) if d else times:
                if (t + d) < lengths[b] and reset[t + d, b] and t + d > 0:
                    state = h[d, b]
                dropped = masks[d, b] * state
                r = 1 / (1 + np.exp(-(w_r @ x[t, b] + u_r @ dropped + b_r)))
                z = 1 / (1 + np.exp(-(w_z @ x[t, b] + u_z @ dropped + b_z)))
                n = np.tanh(w_n @ x[t, b] + u_n @ (r * dropped) + b_n)
                state = (1 - z) * n + z * state
                y[t, b, d * layer.hidden_size : (d + 1) * layer.hidden_size] = state
            final[d, b] = state
    return y, final


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["plain", "dropout"])
def test_gru_that_resets_before_the_product(backend: str, rate: float) -> None:
    """Against the formulas; gradients against finite differences along a random direction."""
    generator = np.random.default_rng(1)
    steps, batch, inputs, hidden = 5, 3, 2, 9
    options: dict[str, Any] = {"bidirectional": True, "dtype": "float64", "recurrent_dropout": rate}
    layer = GRU(inputs, hidden, reset_after=False, backend=backend, seed=1, **options)
    x, h = generator.normal(size=(steps, batch, inputs)), generator.normal(size=(2, batch, hidden))
    dy, dh = generator.normal(size=(steps, batch, 2 * hidden)), generator.normal(size=h.shape)
    lengths, reset = np.array([5, 0, 4]), generator.random((steps, batch)) < 0.4
    masks = np.ones((2, batch, hidden))
    if rate:
        masks = np.stack(
            [dropout_mask((batch, hidden), rate, layer._key, 3, 1 + d, np.float64) for d in range(2)]
        )
    y, final, tape = layer.forward(x, h, lengths, reset, training=True, draw=3)
    expected_y, expected_final = gru_reset_before(layer, x, h, masks, lengths, reset)
    assert_close(y, expected_y, steps)
    assert_close(final, expected_final, steps)
    if not rate:
        assert_close(layer(x, h, lengths, reset)[0], expected_y, steps)
    assert tape is not None
    dx, dinitial, grads = tape.backward(dy, dh)
    slopes = {name: generator.normal(size=array.shape) for name, array in layer.state_dict().items()}
    slope_x, slope_h = generator.normal(size=x.shape), generator.normal(size=h.shape)

    def loss(shift: float) -> float:
        moved = GRU(inputs, hidden, reset_after=False, backend="reference", **options)
        moved.load_state_dict({name: w + shift * slopes[name] for name, w in layer.state_dict().items()})
        y, final = gru_reset_before(moved, x + shift * slope_x, h + shift * slope_h, masks, lengths, reset)
        return float((y * dy).sum() + (final * dh).sum())

    step = 1e-6
    found = (dx * slope_x).sum() + (dinitial * slope_h).sum()
    found += sum((grads[name] * slopes[name]).sum() for name in grads)
    assert found == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-7)


def test_gru_says_where_it_resets() -> None:
    layer = GRU(3, 5, reset_after=False)
    assert repr(layer) == "GRU(3, 5, reset_after=False)"
    assert (layer.reset_after, GRU(3, 5).reset_after) == (False, True)
    assert layer.cell is pickle.loads(pickle.dumps(layer)).cell
    assert "phases: 2 a step" in str(fusedlstm.explain(layer, np.zeros((2, 1, 3), "f4")))
    dropped = cells.recurrent_dropout(layer.cell)
    assert dropped.states == ("h", "dropout_mask", "dropped")
    assert pickle.loads(pickle.dumps(dropped)) is dropped


def test_recurrent_dropout_is_in_training_only(backend: str) -> None:
    """Weights, outputs and states are those of the cell without it."""
    x = np.random.default_rng(1).normal(size=(5, 4, 3))
    options: dict[str, Any] = {"backend": backend, "dtype": "float64", "seed": 1}
    layer, without = LSTM(3, 8, recurrent_dropout=0.5, **options), LSTM(3, 8, **options)
    assert layer.state_dict().keys() == without.state_dict().keys()
    y, (h, c) = layer(x)
    assert np.array_equal(y, without(x)[0])
    trained, state, tape = layer.forward(x, training=True)
    assert [part.shape for part in (trained, *state)] == [part.shape for part in (y, h, c)]
    assert np.allclose(trained[0], y[0], rtol=1e-14)  # the first step starts from zero
    assert not np.allclose(trained[1], y[1])
    assert tape is not None
    assert np.array_equal(trained, layer.forward(x, training=True, draw=tape.draw)[0])
    other = layer.forward(x, training=True)
    assert not np.allclose(trained[1], other[0][1])
    again = LSTM(3, 8, recurrent_dropout=0.5, **options).forward(x, training=True)
    assert np.array_equal(trained, again[0])
    _, dstate, grads = tape.backward(y)
    assert [part.shape for part in dstate] == [part.shape for part in state]
    assert grads.keys() == layer.state_dict().keys()


def test_recurrent_dropout_of_everything(backend: str) -> None:
    """The recurrent weights have no effect."""
    x = np.random.default_rng(1).normal(size=(5, 4, 3))
    layer = LSTM(3, 8, recurrent_dropout=1.0, backend=backend, dtype="float64", seed=1)
    y, _, tape = layer.forward(x, training=True)
    assert tape is not None
    assert not tape.backward(y)[2]["weight_hh_l0"].any()
    layer.weight_hh_l0 = np.zeros((32, 8))
    assert np.allclose(y, layer(x)[0], rtol=1e-14)


@pytest.mark.parametrize(
    "layer_class", [LSTM, GRU, RNN, partial(Recurrent, cells.lstm), partial(fused.Recurrent, cells.lstm)]
)
def test_dropout_after_a_single_layer_is_pointed_out(layer_class: Any) -> None:
    with pytest.warns(UserWarning, match="dropout is applied after every layer but the last") as caught:
        layer_class(3, 4, dropout=0.5)
    assert [warning.filename for warning in caught] == [__file__]


# --- Values that are not numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.rnn_relu, five_gates], ids=name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy says that there are NaNs
def test_nan_and_infinity_stay_in_their_row(backend: str, cell: Cell, bad: float) -> None:
    layer = Recurrent(cell, 3, 17, bidirectional=True, backend=backend, seed=1)
    x = np.random.default_rng(1).normal(size=(5, 7, 3)).astype(np.float32)
    spoilt = x.copy()
    spoilt[2, 4, 1] = bad
    others = np.arange(7) != 4
    y, final, tape = layer.forward(x, training=True)
    spoilt_y, spoilt_final, spoilt_tape = layer.forward(spoilt, training=True)
    assert tape is not None
    assert spoilt_tape is not None
    assert np.array_equal(y[:, others], spoilt_y[:, others])
    for a, b in zip(as_tuple(final), as_tuple(spoilt_final)):
        assert np.array_equal(a[:, others], b[:, others])
    dx, _, _ = tape.backward(np.ones_like(y))
    spoilt_dx, _, _ = spoilt_tape.backward(np.ones_like(y))
    assert np.array_equal(dx[:, others], spoilt_dx[:, others])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, torch.nn.LSTM), (GRU, torch.nn.GRU)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_come_out_as_in_pytorch(
    backend: str, ours: type[Recurrent], theirs: type[torch.nn.RNNBase], bad: float
) -> None:
    module, layer = theirs(2, 5), ours(2, 5, backend=backend)
    layer.load_state_dict(module.state_dict())
    x = np.ones((4, 1, 2), np.float32)
    x[1, 0, 0] = bad
    y = module(torch.tensor(x))[0].detach().numpy()
    assert np.allclose(layer(x)[0], y, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_padding_is_neither_read_nor_left_as_it_was(backend: str) -> None:
    """NaN past the end of a sequence reaches nothing; outputs and gradients there are zero."""
    layer = LSTM(3, 5, 2, bidirectional=True, proj_size=2, backend=backend, seed=1)
    generator = np.random.default_rng(1)
    lengths = np.array([2, 6, 1, 5])
    past = np.arange(6)[:, None] >= lengths
    x, dy = (generator.normal(size=(6, 4, size)).astype(np.float32) for size in (3, 4))
    x[past], dy[past] = np.nan, np.nan
    y, final, tape = layer.forward(x, lengths=lengths, training=True)
    assert tape is not None
    dx, dinitial, grads = tape.backward(dy)
    assert (y[past] == 0).all()
    assert (dx[past] == 0).all()
    for array in (y, *final, dx, *dinitial, *grads.values(), layer(x, lengths=lengths)[0]):
        assert np.isfinite(array).all()


# --- Arrays of every kind ---------------------------------------------------------------------------------


def awkward(array: np.ndarray) -> list[np.ndarray]:
    """The same numbers, held otherwise."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    part = np.full((*array.shape[:-1], array.shape[-1] + 3), np.nan, array.dtype)
    part[..., 1:-2] = array
    raw = np.empty(array.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    return [
        wide[..., ::2],
        part[..., 1:-2],
        np.ascontiguousarray(array[::-1])[::-1],
        np.asfortranarray(array),
        array.astype(array.dtype.newbyteorder(">")),
        unaligned,
        frozen,
        array.view(np.memmap),
    ]


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
@pytest.mark.parametrize("kind", range(8))
def test_arrays_of_every_layout_give_the_same(backend: str, kind: int, batched: bool) -> None:
    layer = LSTM(3, 5, backend=backend, dtype="float64", seed=1)
    generator = np.random.default_rng(1)
    axes = (2,) if batched else ()
    x, h, c, dy, dh, dc = (
        generator.normal(size=(first, *axes, last))
        for first, last in [(4, 3), (1, 5), (1, 5), (4, 5), (1, 5), (1, 5)]
    )

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        x, h, c, dy, dh, dc = arrays
        y, final, tape = layer.forward(x, (h, c), training=True)
        assert tape is not None
        dx, dinitial, grads = tape.backward(dy, (dh, dc))
        return [y, *final, dx, *dinitial, *grads.values()]

    plain = (x, h, c, dy, dh, dc)
    for ours, expected in zip(run(*(awkward(array)[kind] for array in plain)), run(*plain)):
        assert np.array_equal(ours, expected)
        assert type(ours) is np.ndarray


def test_state_may_be_a_list_and_lengths_and_reset_anything_like_an_array(backend: str) -> None:
    layer = LSTM(3, 5, backend=backend, seed=1)
    x, h = np.ones((4, 2, 3), np.float32), np.ones((1, 2, 5), np.float32)
    reset = [[False, False], [True, False], [False, True], [False, False]]
    expected = layer(x, (h, h), np.array([4, 2], np.uint8), np.array(reset))[0]
    assert np.array_equal(layer(x, [h, h], (4, 2), reset)[0], expected)
    assert np.array_equal(layer(x, [h, h], torch.tensor([4, 2]), reset)[0], expected)


# --- Arrays on a GPU, as far as that can be told without one ------------------------------------------------


class DeviceArray(np.ndarray):
    """A NumPy array that says that it is CuPy's."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        return np.asarray(self)


DeviceArray.__module__ = "cupy._core.core"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module like CuPy, and an engine for its arrays."""

    def on_device(function: Any) -> Any:
        return lambda *args, **options: function(*args, **options).view(DeviceArray)

    module: Any = types.ModuleType("cupy")
    module.ndarray = DeviceArray
    for function in ("array", "asarray", "empty", "zeros", "arange", "stack"):
        setattr(module, function, on_device(getattr(np, function)))
    module.cuda = types.SimpleNamespace(Device=lambda: "cpu")  # NumPy's arrays say that they lie there
    monkeypatch.setitem(sys.modules, "cupy", module)
    stand_in = dispatch.engine("reference", X)
    monkeypatch.setitem(dispatch._loaded, ("cuda", "float32", "auto"), stand_in)
    return module


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_cupy_in_cupy_out(cupy: Any, backend: str) -> None:
    layer, truth = (
        LSTM(3, 5, 2, dropout=0.5, bidirectional=True, batch_first=True, backend=b, seed=1)
        for b in (backend, "reference")
    )
    generator = np.random.default_rng(1)
    x, h, c, dy = (
        generator.normal(size=shape).astype(np.float32)
        for shape in [(2, 4, 3), (4, 2, 5), (4, 2, 5), (2, 4, 10)]
    )
    reset = generator.random((2, 4)) < 0.3

    def run(layer: LSTM, xp: Any) -> list[Any]:
        state = xp.asarray(h), xp.asarray(c)
        lengths, marks = xp.asarray([4, 2]), xp.asarray(reset)
        y, final, tape = layer.forward(xp.asarray(x), state, lengths, marks, training=True)
        assert tape is not None
        dx, dinitial, grads = tape.backward(xp.asarray(dy), final)
        return [y, *final, dx, *dinitial, *tape.backward(None)[:1], *grads.values()]

    for ours, expected in zip(run(layer, cupy), run(truth, np)):
        assert np.array_equal(ours, expected)
    assert all(type(array) is DeviceArray for array in run(layer, cupy)[:7])
    assert "since x is a CuPy array" in str(fusedlstm.explain(LSTM(3, 5), cupy.asarray(X)))


def test_weights_may_come_from_a_gpu(cupy: Any) -> None:
    layer = GRU(3, 5)
    layer.load_state_dict({key: cupy.asarray(array) for key, array in GRU(3, 5).state_dict().items()})
    assert all(type(array) is np.ndarray for array in layer.state_dict().values())


def test_arrays_of_two_kinds_are_refused(cupy: Any) -> None:
    layer, x, h = LSTM(3, 5), cupy.asarray(X), cupy.asarray(H)
    with pytest.raises(TypeError, match="h in state must be a CuPy array, as x is, got ndarray"):
        layer(x, (H, H))
    with pytest.raises(TypeError, match="c in state must be a NumPy array, as x is, got DeviceArray"):
        LSTM(3, 5, backend="reference")(X, (H, h))
    tape = layer.forward(x, training=True)[2]
    assert tape is not None
    with pytest.raises(TypeError, match="dy must be a CuPy array, as x is, got ndarray"):
        tape.backward(np.zeros((4, 2, 5), np.float32))
    with pytest.raises(TypeError, match="backend 'cpu' takes NumPy arrays, got a CuPy array"):
        LSTM(3, 5, backend="cpu")(x)


# --- Bad input --------------------------------------------------------------------------------------------


class FakeTensor:
    shape, dtype = (4, 2, 3), np.dtype("float32")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros(3, np.float32), ValueError, r"x must have the shape \(T, B, 3\) or \(T, 3\).* got \(3,\)"),
        (np.float32(1), TypeError, "x must be a NumPy or CuPy array, got float32"),
        (np.array(1, np.float32), ValueError, r"got \(\)"),
        (np.zeros((1, 4, 2, 3), np.float32), ValueError, r"got \(1, 4, 2, 3\)"),
        (np.zeros((4, 2, 4), np.float32), ValueError, r"got \(4, 2, 4\)"),
        (np.zeros((4, 2, 0), np.float32), ValueError, r"got \(4, 2, 0\)"),
        (np.zeros((0, 2, 4), np.float32), ValueError, r"got \(0, 2, 4\)"),
        (
            X.astype(np.int64),
            TypeError,
            r"got int64; convert it with .astype\('float32'\)$",
        ),
        (X.astype(bool), TypeError, "x must be float32, got bool"),
        (X.astype(str), TypeError, "x must be float32, got <U"),
        (X.astype(complex), TypeError, "x must be float32, got complex128"),
        (X.astype(object), TypeError, "x must be float32, got object"),
        (X.astype(np.float16), TypeError, "x must be float32, got float16"),
        (X.astype(np.float64), TypeError, r"got float64; convert .* or build the layer with dtype='float64'"),
        (X.tolist(), TypeError, "x must be a NumPy or CuPy array, got list"),
        (None, TypeError, "x must be a NumPy or CuPy array, got NoneType"),
        (FakeTensor(), TypeError, "x must be a NumPy or CuPy array, got FakeTensor"),
        (torch.zeros(4, 2, 3, requires_grad=True), TypeError, "x, a Tensor, cannot be taken .*detach"),
        (np.ma.masked_array(X), TypeError, "x must be a NumPy or CuPy array, got MaskedArray"),
    ],
)
def test_bad_x(backend: str, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 5, backend=backend)(x)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (H, TypeError, r"state must be a tuple \(h, c\), got an array \(1, 2, 5\)"),
        ((H,), ValueError, r"state must be a tuple \(h, c\), got 1 entries"),
        ((H, H, H), ValueError, "got 3 entries"),
        ((H, None), TypeError, "c in state must be a NumPy or CuPy array, got NoneType"),
        (
            (H, H[0]),
            ValueError,
            r"c in state must be \(layers \* directions, batch, size\) = \(1, ",
        ),
        ((H[:, :1], H), ValueError, r"h in state .* got \(1, 1, 5\)"),
        ((H, np.zeros((1, 2, 6), np.float32)), ValueError, r"c in state .* got \(1, 2, 6\)"),
        ((np.zeros((2, 2, 5), np.float32), H), ValueError, r"h in state .* got \(2, 2, 5\)"),
        ((H.astype(float), H), TypeError, "h in state must be float32, got float64"),
        ((H, H.astype(int)), TypeError, "c in state must be float32, got int64"),
    ],
)
def test_bad_state(backend: str, state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 5, backend=backend)(X, state)
    tape = LSTM(3, 5, backend=backend).forward(X, training=True)[2]
    assert tape is not None
    with pytest.raises(error, match=message.replace("state", "dstate")):
        tape.backward(None, state)


def test_bad_single_state(backend: str) -> None:
    layer = GRU(3, 5, backend=backend)
    with pytest.raises(TypeError, match="state must be a NumPy or CuPy array, got tuple"):
        layer(X, (H,))
    with pytest.raises(ValueError, match=r"state must be \(layers \* directions, size\) = \(1, 5\), got"):
        layer(X[:, 0], H)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([4, 5], ValueError, "lengths must be from 0 to 4, got 4 to 5"),
        ([-1, 4], ValueError, "got -1 to 4"),
        ([4], ValueError, r"lengths must have the shape \(2,\), one for each sequence, got \(1,\)"),
        ([[4, 4]], ValueError, r"got \(1, 2\)"),
        (4, ValueError, r"got \(\)"),
        ([4.0, 2.0], TypeError, "lengths must be integers, got float64"),
        ([True, True], TypeError, "lengths must be integers, got bool"),
        (["4", "2"], TypeError, "lengths must be integers, got <U1"),
        (np.array([2**63, 1], np.uint64), ValueError, "lengths must be from 0 to 4"),
        ([], ValueError, r"got \(0,\)"),
        ([[4, 2], [1]], TypeError, r"lengths must be an array or regular lists, got \[\[4, 2\], \[1\]\]"),
    ],
)
def test_bad_lengths(backend: str, lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 5, backend=backend)(X, lengths=lengths)


def test_lengths_of_one_sequence_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="lengths needs an input with a batch axis"):
        LSTM(3, 5, backend=backend)(X[:, 0], lengths=[3])


@pytest.mark.parametrize(
    ("reset", "error", "message"),
    [
        (np.zeros((2, 4), bool), ValueError, r"reset must have the shape \(4, 2\).* got \(2, 4\)"),
        (np.zeros((4, 2, 3), bool), ValueError, r"got \(4, 2, 3\)"),
        (np.zeros((4, 2), int), TypeError, "reset must be booleans, got int64"),
        (np.zeros((4, 2), np.float32), TypeError, "reset must be booleans, got float32"),
        ([[True], [True, False]], TypeError, r"reset must be an array or regular lists, got \[\[True\], "),
    ],
)
def test_bad_reset(backend: str, reset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 5, backend=backend)(X, reset=reset)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones((2, 4), bool), ValueError, r"mask must have the shape \(4, 2\).* got \(2, 4\)"),
        (np.ones((4, 2)), TypeError, "mask must be booleans, got float64"),
        ("mask", TypeError, "mask must be"),
    ],
)
def test_bad_mask(backend: str, mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 5, backend=backend)(X, mask=mask)


def test_steps_that_are_left_out_are_not_read(backend: str) -> None:
    """Whatever they hold; those at the ends, and those between others."""
    layer = LSTM(3, 5, bidirectional=True, backend=backend, seed=1)
    x = np.random.default_rng(1).normal(size=(6, 3, 3)).astype(np.float32)
    for mask in (np.arange(6)[:, None] < [[6, 0, 4]], np.random.default_rng(2).random((6, 3)) < 0.5):
        spoiled = np.where(mask[..., None], x, np.float32(np.nan))
        for (y, final, tape), (z, end, other) in [
            [layer.forward(values, mask=mask, training=True) for values in (x, spoiled)]
        ]:
            results = [y, *final, *gradients(tape, y)], [z, *end, *gradients(other, y)]
            for a, b in zip(*results, strict=True):
                assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("dstates", "error", "message"),
    [
        (np.zeros((4, 1, 2, 5), np.float32), TypeError, r"dstates must be a tuple \(h, c\), got an array"),
        ((None,), TypeError, r"dstates must be a tuple \(h, c\), got tuple"),
        (
            (None, np.zeros((4, 2, 1, 5), np.float32)),
            ValueError,
            r"c in dstates must have the shape \(4, 1, 2",
        ),
        ((np.zeros((4, 1, 2, 5)), None), TypeError, "h in dstates must be float32, got float64"),
    ],
)
def test_bad_dstates(backend: str, dstates: Any, error: type[Exception], message: str) -> None:
    *_, tape = LSTM(3, 5, backend=backend).forward(X, training=True, all_states=True)
    with pytest.raises(error, match=message):
        tape.backward(None, dstates=dstates)


def test_gradients_of_states_that_nobody_asked_for_are_refused(backend: str) -> None:
    *_, tape = LSTM(3, 5, backend=backend).forward(X, training=True)
    with pytest.raises(ValueError, match="dstates must be None after a forward pass without all_states=True"):
        tape.backward(None, dstates=(None, None))
    with pytest.raises(TypeError, match="all_states must be True or False, got 1"):
        LSTM(3, 5, backend=backend)(X, all_states=1)


def test_all_states_of_no_steps(backend: str) -> None:
    layer = LSTM(3, 5, 2, bidirectional=True, backend=backend)
    for shape in ((0, 2, 3), (4, 0, 3), (0, 3)):
        mask = np.ones(shape[:-1], bool)
        _, _, states, tape = layer.forward(
            np.zeros(shape, np.float32), mask=mask, all_states=True, training=True
        )
        assert [part.shape for part in states] == [(shape[0], 4, *shape[1:-1], 5)] * 2
        tape.backward(None, dstates=states)


def test_reset_has_the_axes_of_x(backend: str) -> None:
    layer = LSTM(3, 5, batch_first=True, backend=backend)
    with pytest.raises(ValueError, match=r"reset must have the shape \(4, 2\)"):
        layer(X, reset=np.zeros((2, 4), bool))
    with pytest.raises(ValueError, match=r"reset must have the shape \(4,\)"):
        layer(X[:, 0], reset=np.zeros((4, 1), bool))
    with pytest.raises(ValueError, match=r"x must have the shape \(B, T, 3\)"):
        layer(np.zeros((2, 2, 2), np.float32))


@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (
            np.zeros((4, 2, 4), np.float32),
            ValueError,
            r"dy must have the shape of the output \(4, 2",
        ),
        (np.zeros((4, 5), np.float32), ValueError, r"got \(4, 5\)"),
        (np.zeros((4, 2, 5)), TypeError, "dy must be float32, got float64"),
        ("dy", TypeError, "dy must be a NumPy or CuPy array, got str"),
    ],
)
def test_bad_dy(backend: str, dy: Any, error: type[Exception], message: str) -> None:
    tape = LSTM(3, 5, backend=backend).forward(X, training=True)[2]
    assert tape is not None
    with pytest.raises(error, match=message):
        tape.backward(dy)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        ({"hidden_size": -1}, ValueError, "hidden_size must be at least 1, got -1"),
        ({"hidden_size": 5.0}, TypeError, "hidden_size must be an integer, got 5.0"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
        ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
        ({"batch_first": "yes"}, TypeError, "batch_first must be True or False"),
        ({"bidirectional": None}, TypeError, "bidirectional must be True or False"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"recurrent_dropout": -1}, ValueError, "recurrent_dropout must be between 0 and 1, got -1"),
        (
            {"recurrent_dropout": 0.5, "proj_size": 2},
            ValueError,
            "recurrent_dropout must be 0 with proj_size, got 0.5 with 2",
        ),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"heads": 2}, ValueError, "hidden_size must be a multiple of heads 2, got 5"),
        ({"heads": 5, "proj_size": 2}, ValueError, "heads must be 1 with proj_size, got 5"),
        ({"input_size": None, "proj_size": 2}, ValueError, "proj_size must be 0 .*given their inputs"),
        ({"dropout": np.nan}, ValueError, "dropout must be between 0 and 1, got nan"),
        ({"dropout": "0.5"}, TypeError, "dropout must be a number"),
        ({"proj_size": 5}, ValueError, "proj_size must be smaller than hidden_size 5, got 5"),
        ({"proj_size": -1}, ValueError, "proj_size must be at least 0"),
        ({"dtype": "float16"}, ValueError, "dtype must be 'float32' or 'float64', got 'float16'"),
        ({"dtype": "nonsense"}, ValueError, "dtype must be 'float32' or 'float64', got 'nonsense'"),
        ({"dtype": None}, ValueError, "dtype must be 'float32' or 'float64', got None"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, cpu, cuda, reference, got 'gpu'"),
        ({"precision": "int4"}, ValueError, "precision must be one of float32, tf32, .*, int8, got 'int4'"),
        ({"precision": "tf32", "dtype": "float64"}, ValueError, "precision 'tf32' needs dtype 'float32'"),
        ({"form": "fast"}, ValueError, "form must be one of auto, persistent, stepwise, got 'fast'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": "one"}, TypeError, "seed must be an integer, got 'one'"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(**{"input_size": 3, "hidden_size": 5, **options})


@pytest.mark.parametrize("make", [LSTM, GRU, RNN, fusedlstm.load])
def test_defaults_are_the_same_everywhere(make: Any) -> None:
    expected, found = inspect.signature(Recurrent).parameters, inspect.signature(make).parameters
    assert dispatch.OPTIONS.keys() <= found.keys()
    for option, choices in dispatch.OPTIONS.items():
        assert expected[option].default == choices[0]
    for shared in expected.keys() & found.keys() - {"cell"}:
        assert found[shared].default == expected[shared].default


def test_bad_cells() -> None:
    with pytest.raises(TypeError, match=r"cell must be made with @fusedlstm\.cell, got <function"):
        Recurrent(lambda a: a, 3, 5)
    with pytest.raises(ValueError, match="proj_size must be 0 with the cell gru: it reads its own output"):
        Recurrent(cells.gru, 3, 5, proj_size=2)
    for nonlinearity in ("sine", []):
        with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got "):
            RNN(3, 5, nonlinearity=nonlinearity)  # type: ignore[arg-type]


# --- Weights as attributes --------------------------------------------------------------------------------


def test_a_replaced_weight_takes_effect(backend: str) -> None:
    layer = LSTM(3, 5, 2, bidirectional=True, backend=backend, seed=1)
    before = layer(X)[0]
    array = np.full((20, 5), 0.25)
    layer.weight_hh_l1_reverse = array
    array[:] = 9  # the layer has a copy
    assert (layer.weight_hh_l1_reverse == 0.25).all()
    assert layer.weight_hh_l1_reverse.dtype == np.float32
    after = layer(X)[0]
    assert np.array_equal(after[..., :5], before[..., :5])
    assert not np.array_equal(after[..., 5:], before[..., 5:])
    fresh = LSTM(3, 5, 2, bidirectional=True, backend=backend, seed=2)
    fresh.load_state_dict(layer.state_dict())
    assert np.array_equal(fresh(X)[0], after)


def test_weights_cannot_be_written_in_place() -> None:
    layer = Recurrent(three_states, 3, 5)
    for array in layer.state_dict().values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        layer.n_l0 *= 2


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("weight_hh_l0", np.zeros((5, 20)), ValueError, r"weight_hh_l0 must have the shape \(20, 5\), got"),
        ("weight_hh_l0", np.zeros((20, 5), int), TypeError, "floating-point numbers, got int64"),
        ("weight_hh_l0", "text", TypeError, "floating-point numbers, got <U4"),
        ("weight_hh_l1", np.zeros((20, 5)), AttributeError, "no parameter 'weight_hh_l1'.*weight_hh_l0"),
        ("hidden_size", 7, AttributeError, "settings are fixed when it is built"),
    ],
)
def test_assignments_that_are_refused(key: str, value: Any, error: type[Exception], message: str) -> None:
    layer = LSTM(3, 5, seed=1)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        setattr(layer, key, value)
    with pytest.raises(AttributeError, match="cannot be deleted"):
        del layer.weight_hh_l0
    assert all(before[name] is array for name, array in layer.state_dict().items())


def test_same_seed_same_weights_in_either_precision() -> None:
    layers = [LSTM(3, 5, seed=seed, dtype=dtype) for seed in (1, 1, 2) for dtype in DTYPES]
    first, double, again, _, other, _ = (layer.weight_ih_l0 for layer in layers)
    assert np.array_equal(first, again)
    assert np.array_equal(first, double.astype(np.float32))
    assert not np.array_equal(first, other)
    assert not np.array_equal(LSTM(3, 5).state_dict()["bias_ih_l0"], LSTM(3, 5).state_dict()["bias_ih_l0"])


# --- Text -------------------------------------------------------------------------------------------------


def test_repr_is_how_to_build_it() -> None:
    assert repr(LSTM(3, 5)) == "LSTM(3, 5)"
    layer = GRU(3, 5, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, dtype="float64")
    text = "GRU(3, 5, num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, "
    assert repr(layer) == text + "dtype='float64')"
    assert repr(RNN(3, 5, nonlinearity="relu")) == "RNN(3, 5, nonlinearity='relu')"
    assert repr(Recurrent(three_states, 3, 5, proj_size=2)) == "Recurrent(three_states, 3, 5, proj_size=2)"
    assert repr(eval(repr(layer))) == repr(layer)
    assert repr(LSTM(None, 6, heads=3)) == "LSTM(None, 6, heads=3)"


def test_explain_takes_layers_on_arrays_only() -> None:
    module: Any = fused.LSTM(3, 5)
    with pytest.raises(TypeError, match=r"layer must be a layer on arrays.*, got fusedlstm\.torch\.LSTM"):
        fusedlstm.explain(module, X)


def test_explain_says_what_runs_and_why(backend: str) -> None:
    layer = LSTM(3, 5, 2, bidirectional=True, backend=backend)
    explanation = fusedlstm.explain(layer, X)
    assert list(explanation.places) == ["layer 0", "layer 0, reverse", "layer 1", "layer 1, reverse"]
    assert all("kernel" in says for says in explanation.places.values())
    lines = str(explanation).splitlines()
    assert lines[0] == f"{layer!r} on x (4, 2, 3) float32, forward"
    assert lines[1] == f"  backend: {backend}, since the layer has backend='{backend}'"
    assert repr(explanation) == str(explanation)
    assert "forward and backward" in str(fusedlstm.explain(layer, X, training=True))
    with pytest.raises(TypeError, match="x must be float32"):
        fusedlstm.explain(layer, X.astype(float))


@pytest.mark.parametrize("name", ["x", "state", "lengths", "reset", "dy", "weight_ih_l0"])
def test_masks_are_refused_not_ignored(name: str) -> None:
    layer = GRU(3, 5, seed=1)
    given: dict[str, Any] = {
        "x": X, "state": H, "lengths": np.array([1, 2]), "reset": np.zeros((4, 2), bool),
        "dy": np.zeros((4, 2, 5), np.float32), "weight_ih_l0": layer.weight_ih_l0,
        "mask": np.ones((4, 2), bool),
    }  # fmt: skip
    given[name] = np.ma.masked_array(given[name], np.ones(given[name].shape, bool))
    dy, weight = given.pop("dy"), given.pop("weight_ih_l0")

    def run() -> None:
        layer.load_state_dict(layer.state_dict() | {"weight_ih_l0": weight})
        tape = layer.forward(**given, training=True)[2]
        assert tape is not None
        tape.backward(dy)

    with pytest.raises(TypeError, match=name):
        run()
