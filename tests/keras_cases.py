"""Our layers in Keras against those of Keras, on the backend that KERAS_BACKEND names; see test_keras.py."""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import checks
import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import layers, ops

import fusedlstm.keras
from fusedlstm import cells, host
from fusedlstm.keras import _ACTIVATIONS, GRU, LSTM, Recurrent, SimpleRNN, accelerate, restore

BACKEND = keras.backend.backend()
B, T, D, H = 4, 6, 3, 5
PAIRS = {ours.__name__: (ours, getattr(layers, ours.__name__)) for ours in (LSTM, GRU, SimpleRNN)}
# Keras compiles each of its layers anew, except on PyTorch
FEW = hypothesis.settings(max_examples=40 if BACKEND == "torch" else 6)

NUMBERS = np.arange(T)
MASKS = {
    "none": None,
    "ends": np.array([[6], [1], [4], [5]]) > NUMBERS,
    "starts": np.array([[0], [5], [2], [1]]) <= NUMBERS,
    "empty": np.array([[6], [0], [4], [5]]) > NUMBERS,
    "any": np.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool),
    "all": np.zeros((B, T), bool),
}
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras does not train on NumPy")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def numpy(value: Any) -> np.ndarray:
    if BACKEND == "torch" and not isinstance(value, np.ndarray):
        value = value.detach()
    return np.asarray(value)


def gradients(function: Any, given: list[np.ndarray], jit: bool = False) -> tuple[list[Any], list[Any]]:
    """What `function` returns for these arrays, and the gradients of the sum of it times random seeds.

    On NumPy there are no gradients.
    """
    if BACKEND == "numpy":
        return list(function(*given)), []

    def loss(*tensors: Any) -> Any:
        results = function(*tensors)
        seeds = [ops.convert_to_tensor(normal(*result.shape, seed=n)) for n, result in enumerate(results)]
        return sum(ops.sum(result * seed) for result, seed in zip(results, seeds)), results

    if BACKEND == "torch":
        import torch

        tensors = [torch.tensor(array, requires_grad=True) for array in given]
        total, results = loss(*tensors)
        found = torch.autograd.grad(total, tensors, materialize_grads=True)
    elif BACKEND == "jax":
        import jax

        call = jax.value_and_grad(loss, tuple(range(len(given))), has_aux=True)
        (_, results), found = (jax.jit(call) if jit else call)(*given)
    else:
        import tensorflow as tf

        def call(*tensors: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                total, results = loss(*tensors)
            return results, tape.gradient(total, tensors, unconnected_gradients="zero")

        results, found = (tf.function(call) if jit else call)(*map(tf.constant, given))
    return [numpy(part) for part in results], [numpy(part) for part in found]


def outcome(
    layer: Any,
    weights: list[np.ndarray],
    mask: Any,
    states: int,
    training: bool = False,
    jit: bool = False,
    x: np.ndarray | None = None,
) -> Any:
    """Outputs, final states, and the gradients of the input, the initial states and the weights."""

    def function(x: Any, *rest: Any) -> list[Any]:
        fixed = [variable.value for variable in layer.non_trainable_variables]
        given = {} if mask is None else {"mask": ops.convert_to_tensor(mask)}
        if states:
            given["initial_state"] = list(rest[:states])
        results, _ = layer.stateless_call(list(rest[states:]), fixed, x, training=training, **given)
        return list(keras.tree.flatten(results))

    initial = [normal(B, H, seed=1 + n) for n in range(states)]
    return gradients(function, [normal(B, T, D) if x is None else x, *initial, *weights], jit)


def built(make: Any, *args: Any, **options: Any) -> Any:
    layer = make(*args, **options)
    layer.build((B, T, D))
    return layer


def alike(ours: Any, theirs: Any, **given: Any) -> None:
    """Both layers give the same, with the same weights."""
    assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
    weights = [0.5 * normal(*w.shape, seed=n) for n, w in enumerate(theirs.trainable_weights)]
    here, there = (outcome(layer, weights, **given) for layer in (ours, theirs))
    for kind, found, expected in zip(("results", "gradients"), here, there):
        assert len(found) == len(expected)
        for n, (a, b) in enumerate(zip(found, expected)):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{kind} {n}")


# --- Options ---------------------------------------------------------------------------------------------


@FEW
@hypothesis.given(
    kind=strategies.sampled_from(sorted(PAIRS)),
    mask=strategies.sampled_from(sorted(MASKS)),
    sequences=strategies.booleans(),
    backwards=strategies.booleans(),
    zeros=strategies.booleans(),
    bias=strategies.booleans(),
    initial=strategies.booleans(),
)
def test_as_keras(
    kind: str, mask: str, sequences: bool, backwards: bool, zeros: bool, bias: bool, initial: bool
) -> None:
    options = {
        "return_sequences": sequences,
        "return_state": True,
        "go_backwards": backwards,
        "zero_output_for_mask": zeros,
        "use_bias": bias,
    }
    ours, theirs = (built(make, H, **options) for make in PAIRS[kind])
    alike(ours, theirs, mask=MASKS[mask], states=len(ours.state_size) if initial else 0)


@pytest.mark.parametrize("kind", PAIRS)
def test_as_keras_when_compiled(kind: str) -> None:
    ours, theirs = (built(make, H, return_sequences=True) for make in PAIRS[kind])
    alike(ours, theirs, mask=MASKS["any"], states=0, jit=True)


def test_reset_before_the_product() -> None:
    ours, theirs = (built(make, H, reset_after=False, return_state=True) for make in PAIRS["GRU"])
    alike(ours, theirs, mask=MASKS["any"], states=1)


def test_half_precision_is_computed_in_float32() -> None:
    policy = keras.DTypePolicy("mixed_bfloat16")
    ours, theirs = (built(make, H, dtype=policy) for make in PAIRS["LSTM"])
    ours.set_weights(theirs.get_weights())
    x = normal(B, T, D)
    assert ours(x).dtype == theirs(x).dtype
    found, expected = (numpy(ops.cast(layer(x), "float32")) for layer in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("mask", ["starts", "empty", "any", "all"])
@pytest.mark.parametrize("unroll", [False, True])
def test_outputs_before_the_first_step_that_counts(mask: str, sequences: bool, unroll: bool) -> None:
    """The initial state on some backends, zero on others, and zero on all of them if unrolled."""
    options = {"return_sequences": sequences, "return_state": True, "unroll": unroll}
    ours, theirs = (built(make, H, **options) for make in PAIRS["LSTM"])
    alike(ours, theirs, mask=MASKS[mask], states=2)


@pytest.mark.parametrize("kind", PAIRS)
def test_no_step_counts(kind: str) -> None:
    ours = built(PAIRS[kind][0], H, return_state=True, zero_output_for_mask=True)
    states = [normal(B, H, seed=n) for n in range(len(ours.state_size))]
    mask = ops.convert_to_tensor(MASKS["all"])
    x = np.full((B, T, D), np.nan, "float32")  # nobody looks at it
    y, *finals = map(numpy, ours(x, initial_state=list(map(ops.convert_to_tensor, states)), mask=mask))
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(finals, states)


# --- Batches and sequences of none ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_a_batch_of_no_rows(kind: str, mask: bool, jit: bool) -> None:
    layer = built(PAIRS[kind][0], H, return_sequences=True, return_state=True, go_backwards=True)
    states, weights = len(layer.state_size), layer.get_weights()

    def function(x: Any, *rest: Any) -> list[Any]:
        given = {"mask": ops.ones((0, T), "bool")} if mask else {}
        fixed = [variable.value for variable in layer.non_trainable_variables]
        given["initial_state"] = list(rest[:states])
        return list(layer.stateless_call(list(rest[states:]), fixed, x, training=True, **given)[0])

    arrays = [normal(0, T, D), *[normal(0, H)] * states, *weights]
    results, found = gradients(function, arrays, jit)
    assert [part.shape for part in results] == [(0, T, H)] + [(0, H)] * states
    for gradient, array in zip(found, arrays):
        np.testing.assert_array_equal(gradient, np.zeros_like(array))


def test_predict_for_no_rows() -> None:
    model = keras.Sequential([keras.Input((T, D)), LSTM(H)])
    assert model.predict_on_batch(normal(0, T, D)).shape == (0, H)


@pytest.mark.parametrize("kind", PAIRS)
def test_sequences_of_no_steps_are_refused_as_keras_refuses_them(kind: str) -> None:
    raised = []
    for make in PAIRS[kind]:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (it is another one on each backend)
            built(make, H)(ops.convert_to_tensor(normal(B, 0, D)))
        raised.append(caught.type)
    assert raised[0] is raised[1]


# --- Memory that is not contiguous ----------------------------------------------------------------------

ORDERS = {
    "Fortran": np.asfortranarray,
    "reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "every second": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "time first": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
    "features first": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1),
    "broadcast": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "reversed in time": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "not aligned": lambda x: np.ndarray(x.shape, x.dtype, bytearray(b"." + x.tobytes()), 1),
    "other bytes": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


def as_tensor(array: np.ndarray) -> Any:
    """With the memory of the array, if the backend takes it."""
    if BACKEND != "numpy" and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if BACKEND == "torch":
        import torch

        usable = array.flags.writeable and min(array.strides) >= 0
        usable &= all(stride % array.itemsize == 0 for stride in array.strides) and array.flags.aligned
        return torch.from_numpy(array) if usable else ops.convert_to_tensor(array.copy())
    return array if BACKEND == "numpy" else ops.convert_to_tensor(array)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_arrays_may_lie_in_any_order(order: str, masked: bool, backwards: bool) -> None:
    """The input, the mask and the states."""
    options = {"return_sequences": True, "return_state": True, "go_backwards": backwards}
    layer = built(LSTM, H, **options)
    given = [normal(B, T, D), normal(B, H), normal(B, H, seed=1), *([MASKS["any"]] if masked else [])]
    other = [ORDERS[order](array) for array in given]

    def call(x: Any, h: Any, c: Any, *mask: Any) -> list[np.ndarray]:
        return list(map(numpy, layer(x, initial_state=[h, c], **({"mask": mask[0]} if mask else {}))))

    plain = [np.array(array, array.dtype.newbyteorder("="), order="C") for array in other]
    for found, expected in zip(call(*map(as_tensor, other)), call(*map(as_tensor, plain))):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(BACKEND != "numpy", reason="is about weights that are arrays of NumPy")
@pytest.mark.parametrize("order", ["Fortran", "reversed", "every second", "not aligned"])
@pytest.mark.parametrize("kind", PAIRS)
def test_weights_may_lie_in_any_order(kind: str, order: str) -> None:
    layer, other = (built(PAIRS[kind][0], H) for _ in range(2))
    for ours, variable in zip(layer.weights, other.weights):
        ours.assign(normal(*ours.shape))
        variable._value = ORDERS[order](ours.numpy())
    x = normal(B, T, D)
    np.testing.assert_array_equal(other(x), layer(x))


HOST = host.Run(cells.lstm, False, True, False, False, masked=True)


def host_arguments(**others: np.ndarray) -> list[np.ndarray]:
    """Those of the forward pass, by name."""
    shapes = {"x": (B, T, D), "mask": (B, T), "h": (B, H), "c": (B, H)}
    shapes |= {"kernel": (D, 4 * H), "recurrent": (H, 4 * H), "bias": (4 * H,)}
    given = {name: normal(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    return list((given | {"mask": MASKS["any"]} | others).values())


@pytest.mark.parametrize("order", ["Fortran", "reversed", "every second", "features first", "not aligned"])
def test_gradients_may_come_in_any_order_of_memory(order: str) -> None:
    given = host_arguments()
    seeds = [normal(B, T, H), normal(B, H), normal(B, H, seed=1)]
    plain, other = (
        host.backward(HOST, True, 0, *given, *map(layout, seeds)) for layout in (np.asarray, ORDERS[order])
    )
    for found, expected in zip(other, plain):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("kernel", (D, 4 * H + 1)), ("recurrent", (H, 4 * H - 4)), ("bias", (4 * H - 1,)), ("bias", (2, 4 * H))],
)
def test_weights_of_other_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\w* must have the shape \(.*20,?\), got"):
        host.forward(HOST, False, *host_arguments(**{name: normal(*shape)}))


@pytest.mark.parametrize("name", ["x", "h", "kernel", "recurrent", "bias"])
def test_other_types_are_refused(name: str) -> None:
    names = ["x", "mask", "h", "c", "kernel", "recurrent", "bias"]
    other = host_arguments()[names.index(name)].astype("float64")
    with pytest.raises(TypeError, match=r" must be float\d\d, got float\d\d"):
        host.forward(HOST, False, *host_arguments(**{name: other}))


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([(B, T, H + 1), (B, H), (B, H)], r"the gradient of the output must have the shape \(4, 6, 5\)"),
        ([(B, T, H), (B, H), (B - 1, H)], r"the gradient of a final state must have the shape \(4, 5\)"),
    ],
)
def test_other_gradients_are_refused(seeds: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host.backward(HOST, True, 0, *host_arguments(), *[normal(*shape) for shape in seeds])


def test_no_steps_are_refused_where_they_are_known_at_the_run_only() -> None:
    none = {"x": normal(B, 0, D), "mask": np.ones((B, 0), bool)}
    with pytest.raises(ValueError, match="the input must have one time step at least, got the shape"):
        host.forward(HOST, False, *host_arguments(**none))


# --- Dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_dropout_of_inputs_as_keras(kind: str) -> None:
    ours, theirs = (built(make, H, dropout=0.5, seed=7) for make in PAIRS[kind])
    alike(ours, theirs, mask=None, states=0, training=True)


def test_recurrent_dropout_as_keras() -> None:
    """Of the layer that has one gate, for which Keras draws one mask."""
    ours, theirs = (built(make, H, recurrent_dropout=0.5, seed=7) for make in PAIRS["SimpleRNN"])
    alike(ours, theirs, mask=None, states=1, training=True)


# --- Activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS))
def test_activations_are_those_of_keras(name: str) -> None:
    x = np.linspace(-8, 8, 1001, dtype="float32")
    x = np.append(x, np.float32([-100, 100]))
    with np.errstate(over="ignore"):
        found = np.asarray(_ACTIVATIONS[name](x))
    expected = numpy(keras.activations.get(name)(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-6)


def test_every_activation_is_known_or_refused() -> None:
    known = {function.__name__ for name, function in vars(keras.activations).items() if name[0] != "_"}
    known -= {"get", "serialize", "deserialize"}
    refused = {"softmax", "log_softmax", "sparsemax", "glu", "threshold"}
    assert known == refused | set(_ACTIVATIONS)
    for name in refused:
        with pytest.raises(ValueError, match=r"activation must be one of .*Recurrent"):
            SimpleRNN(H, activation=getattr(keras.activations, name))


def test_operations_are_taken_for_activations_where_they_are_the_same() -> None:
    x = ops.convert_to_tensor(normal(40))
    for name, function in vars(ops).items():
        if name not in _ACTIVATIONS:
            continue
        same = np.allclose(numpy(function(x)), numpy(keras.activations.get(name)(x)), rtol=1e-5)
        assert same == (name != "gelu")
        if same:
            SimpleRNN(H, activation=function)
        else:
            with pytest.raises(ValueError, match="activation must be one of"):
                SimpleRNN(H, activation=function)


@pytest.mark.parametrize("cell", [cells.lstm_output_from_memory, checks.independent], ids=checks.name)
def test_cells_whose_gates_lack_a_product_are_refused(cell: fusedlstm.Cell) -> None:
    with pytest.raises(ValueError, match=f"cell must have gates with.*in {cell.name} .* lack one of them"):
        Recurrent(cell, 5)


@pytest.mark.parametrize("cell", [cells.lstm_output_sees_cell, checks.normalized_lstm], ids=checks.name)
def test_late_gates_and_means_are_what_a_loop_of_keras_gives(cell: fusedlstm.Cell) -> None:
    layer, x = Recurrent(cell, 5, return_sequences=True), np.random.default_rng(0).normal(size=(3, 6, 4))
    found = ops.convert_to_numpy(layer(x.astype("float32")))
    states, expected = [ops.zeros((3, 5)) for _ in cell.states], []
    for step in x.astype("float32").swapaxes(0, 1):
        output, states = layer.cell.call(ops.convert_to_tensor(step), states)
        expected.append(ops.convert_to_numpy(output))
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_an_activation_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recurrent_activation must be one of .*, got <lambda>"):
        LSTM(H, recurrent_activation=lambda x: x)


def test_other_activations() -> None:
    options = {"activation": "softsign", "recurrent_activation": "hard_sigmoid"}
    ours, theirs = (built(make, H, **options) for make in PAIRS["LSTM"])
    alike(ours, theirs, mask=None, states=0)


# --- States and masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(1, H), (B, H)], [(H,), (H,)], [(1, H), (1, H)]], ids=str)
def test_states_are_broadcast(shapes: list[tuple[int, ...]]) -> None:
    ours, theirs = (built(make, H, return_state=True) for make in PAIRS["LSTM"])
    theirs.set_weights(ours.get_weights())
    x, states = normal(B, T, D), [normal(*shape, seed=n) for n, shape in enumerate(shapes)]
    whole = [np.broadcast_to(state, (B, H)) for state in states]  # on JAX, Keras takes no others
    for found, expected in zip(ours(x, initial_state=states), theirs(x, initial_state=whole)):
        np.testing.assert_allclose(numpy(found), numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shapes",
    [[(B, H)], [(B, H)] * 3, [(B, H - 1)] * 2, [(B, H), (B + 1, H)], [(B, H), (1, B, H)]],
    ids=str,
)
def test_other_states_are_refused(shapes: list[tuple[int, ...]]) -> None:
    states = [ops.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"initial_state must be 2 state\(s\), h, c, of the shape"):
        built(LSTM, H)(normal(B, T, D), initial_state=states)


def test_a_mask_may_have_a_last_axis_of_one() -> None:
    mask = np.arange(T) < np.arange(1, B + 1)[:, None]
    layer = built(LSTM, H, return_sequences=True)
    flat, deep = (
        numpy(layer(normal(B, T, D), mask=ops.convert_to_tensor(m))) for m in (mask, mask[..., None])
    )
    np.testing.assert_array_equal(flat, deep)


@pytest.mark.parametrize("shape", [(B + 1, T), (B, T - 1), (B, T + 1), (T,), (B, T, 2)], ids=str)
def test_other_masks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask must have the shape \("):
        built(LSTM, H)(normal(B, T, D), mask=ops.ones(shape, "bool"))


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(Exception, match=r"shape|size|dimension"):
        built(LSTM, H)(normal(B, T, D + 1))


@pytest.mark.skipif(BACKEND not in ("jax", "tensorflow", "numpy"), reason="is about calls of the host")
@pytest.mark.parametrize("wrong", ["the input", "initial_state", "mask"])
def test_sizes_that_are_known_at_the_run_only_are_checked(wrong: str) -> None:
    run = host.Run(cells.lstm, False, False, False, False, masked=True)
    shapes = {"the input": (B, T, D), "mask": (B, T), "initial_state": (B, H), "c": (B, H)}
    shapes |= {"kernel": (D, 4 * H), "recurrent": (H, 4 * H), wrong: (*shapes[wrong][:-1], 9)}
    given = [np.ones(shape, bool if name == "mask" else "float32") for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=f"^{wrong} must have the shape"):
        host.forward(run, False, *given)


# --- Weights that change ---------------------------------------------------------------------------------


def nothing(model: keras.Model) -> None:
    pass


def assign(model: keras.Model) -> None:
    kernel = model.layers[0].cell.recurrent_kernel
    kernel.assign(0.5 * normal(*kernel.shape))


def set_weights(model: keras.Model) -> None:
    model.set_weights([0.5 * normal(*w.shape, seed=1) for w in model.weights])


def fit(model: keras.Model) -> None:
    model.fit(normal(B, T, D), normal(B, H), verbose=0)


def one_number(model: keras.Model) -> None:
    """By what the backend has besides Keras, and in place where there is such a thing."""
    value = model.layers[0].cell.kernel.value
    if BACKEND == "torch":
        value.data.numpy()[0, 0] += 1
    elif BACKEND == "numpy":
        value[0, 0] += 1
    elif BACKEND == "tensorflow":
        model.layers[0].cell.kernel._value.scatter_nd_add([[0, 0]], [1.0])
    else:
        model.layers[0].cell.kernel._value = value.at[0, 0].add(1)


@pytest.mark.parametrize("kind", PAIRS)
def test_weights_are_laid_out_once_for_each_change(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKEND == "torch":
        from fusedlstm.torch import prepared as packer
    else:
        packer = host
    real, count = packer._pack, []
    monkeypatch.setattr(packer, "_pack", lambda *args: count.append(1) or real(*args))
    ours, theirs = (keras.Sequential([keras.Input((T, D)), make(H)]) for make in PAIRS[kind])
    x = normal(B, T, D)
    for model in (ours, theirs):
        model.compile("sgd", "mse")
    for change in (nothing, assign, set_weights, one_number, *([] if BACKEND == "numpy" else [fit])):
        before = numpy(ours(x))
        change(ours)
        theirs.set_weights(ours.get_weights())
        count.clear()
        for call in (keras.Model.predict_on_batch, keras.Model.__call__, keras.Model.predict_on_batch):
            found, expected = (numpy(call(model, x)) for model in (ours, theirs))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=change.__name__)
        assert np.array_equal(found, before) == (change is nothing)
        assert len(count) == (change is not nothing)


@pytest.mark.parametrize("kind", PAIRS)
def test_one_step(kind: str) -> None:
    ours, theirs = (built(make, H, return_state=True) for make in PAIRS[kind])
    x, states = normal(B, 1, D), len(ours.state_size)
    alike(ours, theirs, mask=np.array([[True], [False], [True], [True]]), states=states, jit=True, x=x)


# --- State, wrappers, models, files ----------------------------------------------------------------------


def test_stateful() -> None:
    ours, theirs = (built(make, H, stateful=True) for make in PAIRS["LSTM"])
    ours.set_weights(theirs.get_weights())
    for x in (normal(B, T, D), normal(B, T, D, seed=1)):
        np.testing.assert_allclose(numpy(ours(x)), numpy(theirs(x)), atol=1e-6)
    ours.reset_state()
    theirs.reset_state()
    np.testing.assert_allclose(numpy(ours(x)), numpy(theirs(x)), atol=1e-6)


def stack(source: Any) -> keras.Model:
    """A model with every kind of place where a layer can be."""
    words = keras.Input((T,), dtype="int32")
    x = layers.Embedding(9, D, mask_zero=True)(words)
    x = layers.Bidirectional(source.LSTM(H, return_sequences=True), name="both")(x)
    y = keras.Sequential([source.GRU(H, return_sequences=True), source.SimpleRNN(H)], name="inner")(x)
    return keras.Model(words, layers.Dense(1)(y))


def data() -> tuple[np.ndarray, np.ndarray]:
    words = np.random.default_rng(0).integers(0, 9, (8, T))
    return words, normal(8, 1)


@trains
def test_training_goes_as_with_keras() -> None:
    losses, models = [], []
    for source in (fusedlstm.keras, layers):
        keras.utils.set_random_seed(3)
        model = stack(source)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        losses.append(model.fit(*data(), batch_size=4, epochs=3, verbose=0).history["loss"])
        models.append(model)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    ours, theirs = (model.predict(data()[0], verbose=0) for model in models)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def kinds(model: Any) -> list[str]:
    """Where the classes of the recurrent layers are from."""
    found = [type(layer) for layer in model._flatten_layers() if isinstance(layer, layers.RNN)]
    return ["ours" if kind in (LSTM, GRU, SimpleRNN, Recurrent) else "theirs" for kind in found]


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(layers)
    model.compile("adam", "mse")
    words, targets = data()
    expected = model.predict(words, verbose=0)
    assert accelerate(model) is model
    assert kinds(model) == ["ours"] * 4
    np.testing.assert_allclose(model.predict(words, verbose=0), expected, atol=1e-6)
    model.evaluate(words, targets, verbose=0)

    model.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    np.testing.assert_array_equal(again.predict(words, verbose=0), model.predict(words, verbose=0))
    names = {f"fusedlstm>{name}": theirs for name, (_, theirs) in PAIRS.items()}
    for name in names:  # as where fusedlstm.keras has not been imported
        monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    plain = keras.models.load_model(tmp_path / "ours.keras", custom_objects=names)
    assert kinds(plain) == ["theirs"] * 4
    np.testing.assert_allclose(plain.predict(words, verbose=0), expected, atol=1e-6)
    plain.save_weights(tmp_path / "theirs.weights.h5")
    again.load_weights(tmp_path / "theirs.weights.h5")


def test_restore(tmp_path: Path) -> None:
    """Layers that were ours from the start become Keras's, too."""
    model, words = stack(fusedlstm.keras), data()[0]
    expected = model.predict(words, verbose=0)
    assert restore(model) is model
    assert kinds(model) == ["theirs"] * 4
    assert all(layer.supports_jit for layer in model._flatten_layers())
    np.testing.assert_allclose(model.predict(words, verbose=0), expected, atol=1e-6)
    model.save(tmp_path / "theirs.keras")
    assert kinds(keras.models.load_model(tmp_path / "theirs.keras")) == ["theirs"] * 4
    assert kinds(accelerate(model)) == ["ours"] * 4


def test_restore_says_what_has_no_counterpart() -> None:
    model = keras.Sequential([keras.Input((T, D)), Recurrent(leaky, H, name="mine")])
    with pytest.warns(UserWarning, match=r"mine is left as it is: keras\.layers has no Recurrent"):
        restore(model)
    assert kinds(model) == ["ours"]


@trains
def test_accelerate_goes_on_with_the_training() -> None:
    """The optimizer keeps its state."""
    losses = []
    for change in (accelerate, lambda model: model):
        keras.utils.set_random_seed(3)
        model = stack(layers)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(*data(), batch_size=4, epochs=2, verbose=0)
        change(model)
        losses.append(model.fit(*data(), batch_size=4, epochs=2, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@trains
def test_accelerate_runs_our_kernels_in_what_has_been_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlstm.kernels.cpu.engine import CPUDirection

    model, calls = keras.Sequential([keras.Input((T, D)), layers.LSTM(H)]), []
    model.compile("sgd", "mse")
    right = CPUDirection.forward
    monkeypatch.setattr(CPUDirection, "forward", lambda *args: calls.append(1) or right(*args))
    for change, expected in ((nothing, False), (accelerate, True), (restore, False)):
        change(model)
        calls.clear()
        model.predict(normal(B, T, D), verbose=0)
        fit(model)
        assert bool(calls) is expected


def own_function(true: Any, found: Any) -> Any:
    return ops.mean(ops.abs(true - found))


class OwnOptimizer(keras.optimizers.SGD):
    pass


class OwnSchedule(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> float:
        return 0.01


class OwnMetric(keras.metrics.Metric):
    def __init__(self, scale: float) -> None:
        super().__init__(name="own")
        self.scale, self.total = scale, self.add_weight(name="total", initializer="zeros")

    def update_state(self, true: Any, found: Any, sample_weight: Any = None) -> None:
        self.total.assign_add(self.scale * ops.mean(found))

    def result(self) -> Any:
        return ops.convert_to_tensor(self.total)


class OwnWrapper(layers.Wrapper):
    def call(self, x: Any) -> Any:
        return self.layer(x) * 2.0


class OwnModel(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [layers.LSTM(H, return_sequences=True), layers.Bidirectional(layers.GRU(H))]
        self.named = {"last": layers.Dense(1)}

    def call(self, x: Any) -> Any:
        for layer in self.stack:
            x = layer(x)
        return self.named["last"](x)


def chain(*parts: Any) -> keras.Model:
    return keras.Sequential([keras.Input((T, D)), *(parts or [layers.LSTM(H)]), layers.Dense(1)])


COMPILED: dict[str, Any] = {
    "loss": lambda: {"loss": own_function},
    "lambda as a loss": lambda: {"loss": lambda true, found: ops.mean(true - found)},
    "metric": lambda: {"metrics": [own_function, OwnMetric(2.0)]},
    "optimizer": lambda: {"optimizer": OwnOptimizer()},
    "schedule": lambda: {"optimizer": keras.optimizers.SGD(OwnSchedule())},
}
MODELS: dict[str, Any] = {
    "wrapper": lambda: chain(OwnWrapper(layers.LSTM(H))),
    "wrapper in a wrapper": lambda: chain(OwnWrapper(layers.Bidirectional(layers.LSTM(H)))),
    "Lambda": lambda: chain(layers.Lambda(lambda x: ops.tanh(x)), layers.LSTM(H)),
    "activation": lambda: chain(layers.LSTM(H), layers.Dense(3, activation=lambda x: x * T)),
    "regularizer": lambda: chain(layers.LSTM(H, kernel_regularizer=lambda w: 0.01 * ops.sum(w * w))),
    "model": OwnModel,
}


@pytest.mark.parametrize("name", [*COMPILED, *MODELS])
def test_accelerate_with_objects_of_ones_own(name: str) -> None:
    """None of them is registered, or needs a configuration."""
    model = MODELS.get(name, chain)()
    model.compile(**{"optimizer": "sgd", "loss": "mse"} | COMPILED.get(name, dict)())
    x, y = normal(B, T, D), normal(B, 1)

    def results() -> list[Any]:
        losses = [] if BACKEND == "numpy" else [model.evaluate(x, y, verbose=0)]  # not all there work
        return [model.predict(x, verbose=0), *losses]

    expected = results()
    accelerate(model)
    assert set(kinds(model)) == {"ours"}
    for found, right in zip(results(), expected):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)
    if BACKEND != "numpy":
        model.fit(x, y, verbose=0)


def test_accelerate_a_layer() -> None:
    layer = accelerate(layers.Bidirectional(layers.LSTM(H)))
    assert kinds(layer) == ["ours"] * 2
    assert layer(normal(B, T, D)).shape == (B, 2 * H)


class OwnLSTM(layers.LSTM):
    pass


def test_accelerate_says_what_it_leaves() -> None:
    model = chain(
        layers.LSTM(H, return_sequences=True, activation="softmax", name="soft"),
        layers.RNN([layers.LSTMCell(H)], return_sequences=True, name="stacked"),
        OwnLSTM(H, return_sequences=True, name="own"),
        layers.GRU(H, name="plain"),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        accelerate(model)
    told = [str(warning.message) for warning in caught if "left as it is" in str(warning.message)]
    assert [message.partition(" is left")[0] for message in told] == [
        f"the layer {name}" for name in ("soft", "stacked", "own")
    ]
    for message, why in zip(told, ["softmax", "RNN runs cells", "OwnLSTM is a class of its own"]):
        assert why in message
    assert isinstance(model.get_layer("plain"), GRU)
    with pytest.raises(TypeError, match=r"model must be a model or layer of Keras, got list"):
        accelerate([model])
    with pytest.warns(UserWarning, match="has no recurrent layers: it is not built"):
        accelerate(type("Own", (keras.Model,), {})())


# --- What is exported ------------------------------------------------------------------------------------

EXPORTED = {
    "LSTM": lambda: LSTM(H),
    "GRU": lambda: GRU(H),
    "SimpleRNN": lambda: SimpleRNN(H),
    "Bidirectional": lambda: layers.Bidirectional(LSTM(H)),
    "Recurrent": lambda: Recurrent(cells.peephole_lstm, H),
}


@pytest.mark.skipif(BACKEND == "numpy", reason="Keras does not export on NumPy")
@pytest.mark.parametrize("kind", EXPORTED)
def test_exported_models_run_without_us(kind: str, tmp_path: Path) -> None:
    """In the way of exporting that Keras has on each backend."""
    model, x = chain(EXPORTED[kind]()), normal(B, T, D)
    expected = model.predict(x, verbose=0)
    if BACKEND == "torch":
        import onnxruntime

        model.export(str(tmp_path / "a.onnx"), format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
        found = session.run(None, {session.get_inputs()[0].name: x})[0]
    else:
        import tensorflow as tf

        model.export(str(tmp_path / "a"), verbose=False)
        loaded = tf.saved_model.load(tmp_path / "a")
        assert "PyFunc" not in str(loaded.signatures["serve"].graph.as_graph_def())
        found = loaded.serve(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)  # ours again


@pytest.mark.parametrize("kind", PAIRS)
def test_configuration(kind: str) -> None:
    ours, theirs = PAIRS[kind]
    options = {
        "kernel_regularizer": "l2",
        "bias_constraint": "non_neg",
        "dropout": 0.1,
        "seed": 3,
        "name": "a",
    }
    assert ours(H, **options).get_config() == theirs(H, **options).get_config()
    assert ours.from_config(ours(H, **options).get_config()).get_config() == ours(H, **options).get_config()


# --- Any cell --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "any"])
def test_recurrent_is_the_loop_over_its_cell(mask: str) -> None:
    ours = built(Recurrent, cells.peephole_lstm, H, return_sequences=True, return_state=True)
    theirs = built(layers.RNN, ours.cell, return_sequences=True, return_state=True)
    assert [w.name for w in ours.weights] == ["kernel", "recurrent_kernel", "bias", "p_i", "p_f", "p_o"]
    alike(ours, theirs, mask=MASKS[mask], states=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": 0}, "units must be a positive integer, got 0"),
        ({"units": "5"}, "units must be a positive integer, got '5'"),
        ({"dropout": 2}, "dropout must be from 0 to 1, got 2"),
        ({"recurrent_dropout": "a"}, "recurrent_dropout must be from 0 to 1, got 'a'"),
    ],
)
def test_settings_of_recurrent_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recurrent(cells.lstm, **{"units": H, **settings})


def test_recurrent_with_the_cell_of_keras() -> None:
    """Split gates have two biases; only the order of the gates differs."""
    ours, theirs = built(Recurrent, cells.gru, H), built(layers.GRU, H)
    ours.set_weights(
        [np.concatenate([w[..., H : 2 * H], w[..., :H], w[..., 2 * H :]], -1) for w in theirs.get_weights()]
    )
    x = normal(B, T, D)
    np.testing.assert_allclose(numpy(ours(x)), numpy(theirs(x)), atol=1e-6)


@cells.cell(gates=("a",))
def leaky(a: Any, h: Any) -> Any:
    return 0.5 * h + 0.5 * fusedlstm.math.tanh(a)


def test_files_of_a_cell_of_ones_own(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((T, D)), Recurrent(leaky, H, recurrent_dropout=0.5)])
    model.save(tmp_path / "own.keras")
    with pytest.raises(ValueError, match="cell of your own, leaky"):
        keras.models.load_model(tmp_path / "own.keras")
    again = keras.models.load_model(tmp_path / "own.keras", custom_objects={"leaky": leaky})
    assert again.layers[0].cell.mathematics is leaky
    with pytest.raises(ValueError, match="another cell leaky"):
        keras.models.load_model(tmp_path / "own.keras", custom_objects={"leaky": cells.gru})
    with pytest.raises(TypeError, match=r"cell must be what fusedlstm\.cell made"):
        Recurrent("lstm", H)  # type: ignore[arg-type]


# --- What one backend has --------------------------------------------------------------------------------


def only(backend: str) -> Any:
    return pytest.mark.skipif(backend != BACKEND, reason=f"is about {backend}")


def built_with_values(**options: Any) -> tuple[Any, list[Any], list[Any]]:
    """A layer, and the values of its variables."""
    layer = built(LSTM, H, **options)
    kinds = layer.trainable_variables, layer.non_trainable_variables
    trained, fixed = ([variable.value for variable in variables] for variables in kinds)
    return layer, trained, fixed


@only("jax")
def test_jax_transforms() -> None:
    import jax

    layer, weights, fixed = built_with_values()

    def loss(weights: Any, x: Any) -> Any:
        return ops.sum(layer.stateless_call(weights, fixed, x)[0] ** 2)

    x = normal(3, B, T, D)
    expected = [jax.grad(loss)(weights, part) for part in x]
    for found in (
        jax.vmap(jax.grad(loss), (None, 0))(weights, x),
        jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)))(weights, x),
    ):
        for n, parts in enumerate(zip(*expected)):
            np.testing.assert_allclose(found[n], np.stack(parts), rtol=1e-5, atol=1e-6)
    _, pull = jax.vjp(loss, weights, x[0])  # its record is gone after the first call
    for (first, _), (second, _) in [(pull(1.0), pull(1.0))]:
        for a, b, c in zip(first, second, expected[0]):
            np.testing.assert_allclose(a, b)
            np.testing.assert_allclose(a, c, rtol=1e-6, atol=1e-6)


@only("jax")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", [{}, {"go_backwards": True, "return_sequences": True}])
def test_jax_saves_the_gradient_of_an_input_that_nobody_wants(
    options: dict[str, Any], jit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from fusedlstm.kernels.cpu.engine import CPUDirection

    layer, weights, fixed = built_with_values(**options)
    right, saved = CPUDirection.backward, []

    def backward(self: Any, tape: Any, dy: Any, dfinal: Any, dx: Any, accumulate: bool) -> Any:
        saved.append(dx is None)
        return right(self, tape, dy, dfinal, dx, accumulate)

    monkeypatch.setattr(CPUDirection, "backward", backward)

    def loss(weights: Any, x: Any) -> Any:
        return ops.sum(layer.stateless_call(weights, fixed, x)[0] ** 2)

    def gradient(wanted: Any) -> Any:
        function = jax.grad(loss, wanted)
        return (jax.jit(function) if jit else function)(weights, normal(B, T, D))

    without, (along, _) = gradient(0), gradient((0, 1))
    for a, b in zip(without, along):
        np.testing.assert_array_equal(a, b)
    assert saved == [True, False]


@only("jax")
def test_what_a_call_of_the_host_raises_is_told() -> None:
    import jax

    from fusedlstm import xla

    def fail(*arrays: Any, **options: Any) -> Any:
        raise ValueError("no such thing")

    result = jax.ShapeDtypeStruct((3,), "float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError: no such thing"):
        jax.block_until_ready(jax.jit(lambda x: xla.call(fail, [result], x))(np.zeros(3)))


@only("jax")
def test_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    layer, weights, fixed = built_with_values()
    monkeypatch.setattr(host, "_records", host._Table(1))
    calls = [jax.vjp(lambda w: layer.stateless_call(w, fixed, normal(B, T, D))[0], weights) for _ in range(3)]
    jax.block_until_ready([y for y, _ in calls])
    assert len(host._records) == 1
    first, *others = [pull(y)[0] for y, pull in calls]
    for other in others:
        for a, b in zip(first, other):
            np.testing.assert_array_equal(a, b)
    assert not len(host._records)


@only("jax")
def test_records_count_the_weights_that_are_laid_out_in_them() -> None:
    run = host.Run(cells.lstm, False, False, False, False, False)
    units, step = 300, normal(1, 1, 1)
    weights = [normal(1, 4 * units), normal(units, 4 * units), normal(4 * units)]
    *_, number = host.forward(run, True, step, *[normal(1, units)] * 2, *weights)
    assert host._records.take(int(number)).size >= 2 * weights[1].nbytes  # forward's and backward's


@only("tensorflow")
@pytest.mark.parametrize("eager", [False, True])
def test_tensorflow_runs_models_eagerly_and_not(eager: bool) -> None:
    model = stack(fusedlstm.keras)
    model.compile("sgd", "mse", run_eagerly=eager)
    assert not model.jit_compile
    before = model.get_weights()
    model.fit(*data(), verbose=0)
    assert all(np.any(a != b) for a, b in zip(before, model.get_weights()))
    assert not len(host._records)  # each has been used


@only("tensorflow")
def test_tensorflow_saves_models_that_run_without_us(tmp_path: Path) -> None:
    import tensorflow as tf

    model, x = chain(LSTM(H)), normal(B, T, D)
    expected = model.predict(x, verbose=0)
    tf.saved_model.save(model, tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    signature = loaded.signatures["serving_default"]
    assert "PyFunc" not in str(signature.graph.as_graph_def())
    np.testing.assert_allclose(next(iter(signature(tf.constant(x)).values())), expected, atol=1e-5)


@only("tensorflow")
def test_accelerate_turns_xla_off_and_restore_on() -> None:
    model = chain()
    model.compile("sgd", "mse", jit_compile=True)
    expected = model.predict(normal(B, T, D), verbose=0)
    for change, compiled in ((accelerate, False), (restore, True)):
        change(model)
        assert model.jit_compile is compiled
        np.testing.assert_allclose(model.predict(normal(B, T, D), verbose=0), expected, atol=1e-6)


@only("jax")
def test_jax_exports_the_loop_of_keras_and_names_what_would_do_otherwise() -> None:
    import jax

    layer, x = built(LSTM, H), normal(B, T, D)
    found = jax.export.export(jax.jit(lambda x: layer(x)))(x).call(x)
    np.testing.assert_allclose(found, layer(x), atol=1e-6)
    traced = jax.jit(lambda x: layer(x))
    traced(x)  # with a call of the host, which JAX knows now
    with pytest.raises(ValueError, match=r"fusedlstm\.keras\.restore"):
        jax.export.export(traced)(x)


@only("jax")
def test_functions_have_numbers_of_their_own() -> None:
    """However many threads number them at once."""
    from fusedlstm import xla

    found: list[tuple[Any, Any]] = []

    def number() -> None:
        for _ in range(1000):
            function = lambda *arrays, **options: []  # noqa: E731
            found.append((function, xla._number(function)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=number) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert all(xla._functions[int(number)] is function for function, number in found)


@only("torch")
def test_torch_traces_the_loop_of_keras() -> None:
    import torch

    layer, x = built(LSTM, H, return_sequences=True), torch.tensor(normal(B, T, D))
    other = torch.tensor(normal(B, T, D, seed=1))
    expected = layer(other)
    traced = torch.jit.trace(layer, x, check_trace=False)
    exported = torch.export.export(layer, (x,)).module()
    for found in (traced(other), exported(other)):
        np.testing.assert_allclose(numpy(found), numpy(expected), atol=1e-6)
    assert "fusedlstm::" not in str(traced.inlined_graph)


@only("torch")
def test_torch_compile() -> None:
    import torch

    layer = built(LSTM, H)
    x = torch.tensor(normal(B, T, D))
    found = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=False)(x)
    np.testing.assert_allclose(numpy(found), numpy(layer(x)), atol=1e-6)
