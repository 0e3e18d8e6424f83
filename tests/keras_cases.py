"""Our layers in Keras against those of Keras, on the backend that KERAS_BACKEND names; see test_keras.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import layers, ops

import fusedlstm.keras
from fusedlstm import cells, host
from fusedlstm.keras import _ACTIVATIONS, GRU, LSTM, Recurrent, SimpleRNN, accelerate

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
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


def numpy(value: Any) -> np.ndarray:
    if BACKEND == "torch" and not isinstance(value, np.ndarray):
        value = value.detach()
    return np.asarray(value)


def gradients(function: Any, given: list[np.ndarray], jit: bool = False) -> tuple[list[Any], list[Any]]:
    """What `function` returns for these arrays, and the gradients of the sum of it times random seeds."""

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
    elif BACKEND == "tensorflow":
        model.layers[0].cell.kernel._value.scatter_nd_add([[0, 0]], [1.0])
    else:
        model.layers[0].cell.kernel._value = value.at[0, 0].add(1)


@pytest.mark.parametrize("kind", PAIRS)
def test_weights_are_laid_out_once_for_each_change(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKEND == "torch":
        from fusedlstm import torch as packer
    else:
        packer = host
    real, count = packer._pack, []
    monkeypatch.setattr(packer, "_pack", lambda *args: count.append(1) or real(*args))
    ours, theirs = (keras.Sequential([keras.Input((T, D)), make(H)]) for make in PAIRS[kind])
    x = normal(B, T, D)
    for model in (ours, theirs):
        model.compile("sgd", "mse")
    for change in (nothing, assign, set_weights, fit, one_number):
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


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(layers)
    model.compile("adam", "mse")
    clone = accelerate(model)
    kinds = [type(layer).__module__ for layer in clone._flatten_layers() if isinstance(layer, layers.RNN)]
    assert kinds == ["fusedlstm.keras"] * 4
    words, targets = data()
    expected = model.predict(words, verbose=0)
    np.testing.assert_allclose(clone.predict(words, verbose=0), expected, atol=1e-6)
    clone.evaluate(words, targets, verbose=0)  # compiled, as the model is

    clone.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    np.testing.assert_array_equal(again.predict(words, verbose=0), clone.predict(words, verbose=0))
    names = {f"fusedlstm>{name}": theirs for name, (_, theirs) in PAIRS.items()}
    for name in names:  # as where fusedlstm.keras has not been imported
        monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    plain = keras.models.load_model(tmp_path / "ours.keras", custom_objects=names)
    assert not any(isinstance(layer, LSTM) for layer in plain._flatten_layers())
    np.testing.assert_allclose(plain.predict(words, verbose=0), expected, atol=1e-6)
    model.save_weights(tmp_path / "theirs.weights.h5")
    again.load_weights(tmp_path / "theirs.weights.h5")


def test_accelerate_says_what_it_leaves() -> None:
    model = keras.Sequential(
        [
            keras.Input((T, D)),
            layers.LSTM(H, return_sequences=True, activation="softmax", name="soft"),
            layers.RNN([layers.LSTMCell(H)], return_sequences=True, name="stacked"),
            layers.GRU(H, name="plain"),
        ]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        clone = accelerate(model)
    told = [str(warning.message) for warning in caught if "left as it is" in str(warning.message)]
    assert len(told) == 2
    assert "soft is left" in told[0]
    assert "softmax" in told[0]
    assert "stacked is left" in told[1]
    assert isinstance(clone.get_layer("plain"), GRU)
    with pytest.raises(TypeError, match="must be sequential or functional"):
        accelerate(type("Own", (keras.Model,), {})())


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


@only("torch")
def test_torch_compile() -> None:
    import torch

    layer = built(LSTM, H)
    x = torch.tensor(normal(B, T, D))
    found = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=False)(x)
    np.testing.assert_allclose(numpy(found), numpy(layer(x)), atol=1e-6)
