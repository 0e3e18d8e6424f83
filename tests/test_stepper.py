"""A stepper: the layer's own results a step at a time, in buffers that stay."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from checks import late_and_means

import fusedlstm
from fusedlstm import GRU, LSTM, Recurrent, cells

LAYERS: dict[str, Any] = {
    "lstm": lambda: LSTM(5, 19, seed=1),
    "float64": lambda: LSTM(5, 19, dtype="float64", seed=1),
    "stack": lambda: GRU(5, 19, num_layers=3, seed=1),
    "projected": lambda: LSTM(5, 19, proj_size=7, num_layers=2, seed=1),
    "late gates and means": lambda: Recurrent(late_and_means, 5, 19, seed=1),
    "gate inputs": lambda: Recurrent(cells.lstm, None, 19, seed=1),
    "heads": lambda: LSTM(5, 20, heads=4, seed=1),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Recurrent:
    made: Recurrent = LAYERS[request.param]()
    return made


def sequence(layer: Recurrent, steps: int, batch: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.standard_normal((steps, batch, layer._features)).astype(layer.dtype)


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_give_what_the_sequence_gives(layer: Recurrent, batch: int) -> None:
    x, step = sequence(layer, 6, batch), layer.stepper(batch)
    y, state = layer(x)
    for given, right in zip(x, y):
        np.testing.assert_allclose(step(given), right, rtol=1e-5, atol=1e-6)
    for ours, right in zip(step.state, state if isinstance(state, tuple) else (state,)):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-6)


def test_several_steps_at_a_time(layer: Recurrent) -> None:
    x, step = sequence(layer, 6, 2), layer.stepper(2, steps=3)
    y, _ = layer(x)
    np.testing.assert_allclose(np.concatenate([step(x[:3]).copy(), step(x[3:])]), y, rtol=1e-5, atol=1e-6)


def test_several_threads() -> None:
    layer = LSTM(64, 512, seed=1)
    x = sequence(layer, 6, 4)
    y, _ = layer(x)
    fusedlstm.set_num_threads(2)
    step = layer.stepper(4, steps=2)
    np.testing.assert_array_equal(np.concatenate([step(part).copy() for part in (x[:2], x[2:4], x[4:])]), y)


def test_the_input_may_be_written_to_the_buffer() -> None:
    layer = LSTM(5, 19, seed=1)
    x, step = sequence(layer, 1, 2)[0], layer.stepper(2)
    step.input[...] = x
    assert step() is step.output
    np.testing.assert_allclose(step.output, layer(x[None])[0][0], rtol=1e-5, atol=1e-6)


def test_it_starts_where_its_state_is_set() -> None:
    layer = LSTM(5, 19, seed=1)
    x, step = sequence(layer, 2, 2), layer.stepper(2)
    _, state = layer(x[:1])
    for ours, given in zip(step.state, state):
        ours[...] = given
    np.testing.assert_allclose(step(x[1]), layer(x[1:], state)[0][0], rtol=1e-5, atol=1e-6)


def test_some_sequences_go_back_to_zero() -> None:
    layer = GRU(5, 19, seed=1)
    x, step = sequence(layer, 2, 3), layer.stepper(3)
    step(x[0])
    step.reset(np.array([False, True, False]))
    reset = np.array([[False] * 3, [False, True, False]])
    np.testing.assert_allclose(step(x[1]), layer(x, reset=reset)[0][1], rtol=1e-5, atol=1e-6)
    step.reset()
    assert not any(state.any() for state in step.state)
    np.testing.assert_allclose(step(x[1]), layer(x[1:])[0][0], rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_the_layer_when_it_was_made() -> None:
    layer = LSTM(5, 19, seed=1)
    x, step = sequence(layer, 1, 1)[0], layer.stepper()
    before = step(x).copy()
    layer.load_state_dict(LSTM(5, 19, seed=2).state_dict())
    step.reset()
    np.testing.assert_array_equal(step(x), before)
    assert np.abs(layer.stepper()(x) - before).max() > 1e-3


def test_errors() -> None:
    layer = LSTM(5, 19)
    with pytest.raises(ValueError, match=r"^a stepper needs a layer of one direction"):
        LSTM(5, 19, bidirectional=True).stepper()
    with pytest.raises(ValueError, match=r"^a stepper runs on the CPU, got a layer with backend='reference'"):
        LSTM(5, 19, backend="reference").stepper()
    with pytest.raises(ValueError, match=r"^batch must be at least 1, got 0"):
        layer.stepper(0)
    with pytest.raises(TypeError, match=r"^steps must be an integer, got 2.5"):
        layer.stepper(1, 2.5)  # type: ignore[arg-type]
    step = layer.stepper(2)
    with pytest.raises(ValueError, match=r"^x must have the shape \(2, 5\), got \(5,\)"):
        step(np.zeros(5, np.float32))
    with pytest.raises(TypeError, match="Cannot cast"):
        step(np.zeros((2, 5), complex))
    with pytest.raises(ValueError, match=r"^where must have the shape \(2,\), got \(3,\)"):
        step.reset([True, False, True])
    with pytest.raises(TypeError, match=r"^where must be an array of booleans, got int64"):
        step.reset([1, 0])


def test_buffers_stay_where_they_are() -> None:
    step = LSTM(5, 19).stepper()
    for name in ("input", "output", "state"):
        with pytest.raises(AttributeError):
            setattr(step, name, getattr(step, name))
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^a stepper cannot be copied or pickled"):
            take(step)
