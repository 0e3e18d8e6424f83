"""Names, shapes and gate orders of weights; state_dict; files."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
import torch
from checks import BUILT_IN, OWN, name, three_states
from hypothesis import given
from hypothesis import strategies as st

import fusedlstm
from fusedlstm import GRU, LSTM, RNN, Recurrent, cells, weights
from fusedlstm.cells import Cell, cell
from fusedlstm.demo import CharacterModel, Record
from fusedlstm.math import tanh
from fusedlstm.weights import Weights

# --- Names and shapes -------------------------------------------------------------------------------------


def test_names_are_those_of_pytorch() -> None:
    assert weights.names(cells.lstm, 1, reverse=True, bias=True, projected=True) == Weights(
        "weight_ih_l1_reverse",
        "weight_hh_l1_reverse",
        "bias_ih_l1_reverse",
        "bias_hh_l1_reverse",
        "weight_hr_l1_reverse",
    )
    plain = weights.names(cells.peephole_lstm, 0, reverse=False, bias=False, projected=False)
    assert plain == Weights("weight_ih_l0", "weight_hh_l0", vectors=("p_i_l0", "p_f_l0", "p_o_l0"))


@pytest.mark.parametrize("cell", [cells.lstm, cells.peephole_lstm], ids=name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("proj", [0, 2])
def test_unflatten_undoes_flatten(cell: Cell, bias: bool, proj: int) -> None:
    entries = weights.names(cell, 0, reverse=False, bias=bias, projected=proj > 0)
    assert weights.unflatten(cell, weights.flatten(entries)) == entries


@pytest.mark.parametrize("bias", [None, (8,), (2, 8)])
def test_views_of_weights_of_keras(bias: tuple[int, ...] | None) -> None:
    generator = np.random.default_rng(0)
    vectors = [generator.normal(size=2) for _ in range(3)]
    given = [generator.normal(size=(3, 8)), generator.normal(size=(2, 8))]
    given += [] if bias is None else [generator.normal(size=bias)]
    taken = weights.keras_views(cells.peephole_lstm, [*given, *vectors], np.zeros_like)
    assert np.shares_memory(taken.ih, given[0])
    assert taken.ih.shape == (8, 3)
    assert taken.hh.shape == (8, 2)
    assert (taken.bias_hh is None) == (bias is None)
    assert taken.bias_hh is None or taken.bias_hh.shape == (8,)
    back = weights.keras_gradients(taken, [*given, *vectors])
    assert len(back) == len(given) + 3
    for a, b in zip(back, [*given, *vectors]):
        assert np.array_equal(a, b)


def test_shapes() -> None:
    assert weights.shapes(cells.peephole_lstm, 3, 5, True, 2) == Weights(
        (20, 3), (20, 2), (20,), (20,), (2, 5), ((5,), (5,), (5,))
    )
    assert weights.shapes(cells.gru, 3, 5, False, 0) == Weights((15, 3), (15, 5))


def test_flatten_and_fill_agree() -> None:
    entries = weights.names(three_states, 0, reverse=False, bias=True, projected=False)
    upper = weights.fill(entries, str.upper)
    assert upper.hr is None
    assert weights.flatten(upper) == [entry.upper() for entry in weights.flatten(entries)]
    assert weights.flatten(entries)[-1] == "n_l0"


@pytest.mark.parametrize("framework", weights.GATE_ORDERS)
def test_gate_orders_are_permutations_of_ours(framework: str) -> None:
    for built_in in (cells.lstm, cells.gru):
        assert sorted(weights.GATE_ORDERS[framework][built_in.name]) == sorted(built_in.gates)
        assert weights.GATE_ORDERS["torch"][built_in.name] == built_in.gates


# --- Conversions ------------------------------------------------------------------------------------------


def assert_loads(layer: Recurrent, converted: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    layer.load_state_dict(converted)
    for key, array in layer.state_dict().items():
        assert np.array_equal(array, np.asarray(expected[key]))


def test_weights_of_pytorch_there_and_back() -> None:
    layer = LSTM(3, 5, 2, bidirectional=True, proj_size=2, seed=1)
    module = torch.nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    module.load_state_dict(weights.to_torch(layer))
    module.weight_ih_l0.data.zero_()  # the layer keeps its own
    assert layer.weight_ih_l0.any()
    model = torch.nn.ModuleDict(
        {"encoder": torch.nn.ModuleDict({"lstm": module}), "head": torch.nn.Linear(2, 2)}
    )
    for state_dict, prefix in ((module.state_dict(), ""), (model.state_dict(), "encoder.lstm.")):
        assert_loads(layer, weights.from_torch(layer, state_dict, prefix), module.state_dict())
    with pytest.raises(
        ValueError, match=r"state_dict has no names that begin with 'decoder\.'; it has encoder"
    ):
        weights.from_torch(layer, model.state_dict(), "decoder.")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_weights_of_a_cell_of_pytorch(kind: str) -> None:
    module = getattr(torch.nn, f"{kind}Cell")(3, 5).to(torch.bfloat16)
    layer: Recurrent = getattr(fusedlstm, kind)(3, 5)
    named = {f"{name}_l0": value.float() for name, value in module.state_dict().items()}
    assert_loads(layer, weights.from_torch(layer, module.state_dict()), named)


CONVERTED = {
    "LSTM": LSTM(3, 5, seed=1, backend="reference"),
    "LSTM without bias": LSTM(3, 5, bias=False, seed=1, backend="reference"),
    "stack": LSTM(3, 5, 2, seed=1, backend="reference"),
    "GRU": GRU(3, 5, bidirectional=True, seed=1, backend="reference"),
    "GRU reset before": GRU(3, 5, reset_after=False, seed=1, backend="reference"),
    "RNN": RNN(3, 5, seed=1, backend="reference"),
    "peephole": Recurrent(cells.peephole_lstm, 3, 5, seed=1, backend="reference"),
    "own": Recurrent(three_states, 3, 5, seed=1, backend="reference"),
}
KERAS = {  # with the same mathematics
    "LSTM": "layers.LSTM(5, return_sequences=True)",
    "LSTM without bias": "layers.LSTM(5, return_sequences=True, use_bias=False)",
    "stack": "keras.Sequential([layers.LSTM(5, return_sequences=True) for _ in range(2)])",
    "GRU": "layers.Bidirectional(layers.GRU(5, return_sequences=True))",
    "GRU reset before": "layers.GRU(5, return_sequences=True, reset_after=False)",
    "RNN": "layers.SimpleRNN(5, return_sequences=True)",
    "peephole": "fusedlstm.keras.Recurrent(fusedlstm.cells.peephole_lstm, 5, return_sequences=True)",
}


@pytest.mark.parametrize("key", CONVERTED)
def test_weights_of_keras_there_and_back(key: str) -> None:
    """One bias in the place of two is their sum, and the other one zero."""
    layer = CONVERTED[key]
    expected = dict(layer.state_dict())
    if not layer.cell.split:
        for name in [name for name in expected if name.startswith("bias_hh")]:
            other = name.replace("_hh", "_ih")
            expected |= {other: expected[other] + expected[name], name: np.zeros_like(expected[name])}
    flat = weights.to_keras(layer)
    assert all(array.flags.writeable for array in flat)
    assert_loads(copy.copy(layer), weights.from_keras(layer, flat), expected)


def test_keras_computes_the_same_with_converted_weights(tmp_path: Path) -> None:
    x = np.random.default_rng(2).normal(size=(2, 6, 3)).astype(np.float32)
    given = {"x": x}
    for key, layer in CONVERTED.items():
        y, _ = layer(x.swapaxes(0, 1))
        given |= {f"{key}/{n}": array for n, array in enumerate(weights.to_keras(layer))}
        given |= {f"{key}/y": y.swapaxes(0, 1)}
    np.savez(tmp_path / "given.npz", **given)
    program = f"""
import keras, numpy as np, fusedlstm.keras
from keras import layers
given = np.load({str(tmp_path / "given.npz")!r})
for key, make in {KERAS!r}.items():
    layer = eval(make)
    layer(given["x"])
    layer.set_weights([given[f"{{key}}/{{n}}"] for n in range(len(layer.weights))])
    y = keras.ops.convert_to_numpy(layer(given["x"]))
    np.testing.assert_allclose(y, given[f"{{key}}/y"], rtol=1e-5, atol=1e-6, err_msg=key)
"""
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_keras_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="layer must have no projection"):
        weights.to_keras(LSTM(3, 5, proj_size=2))
    with pytest.raises(ValueError, match="in the cell lstm_output_from_memory 'o', 'm' lack one"):
        weights.from_keras(Recurrent(cells.lstm_output_from_memory, 3, 5), [])
    flat = weights.to_keras(CONVERTED["GRU"])
    with pytest.raises(ValueError, match=r"weights must hold 6 arrays \[\(3, 15\), .*, got \[\(3, 15\)"):
        weights.from_keras(CONVERTED["GRU"], flat[:5])
    with pytest.raises(ValueError, match=r"weights\[2\] must have the shape \(2, 15\), got \(15,\)"):
        weights.from_keras(CONVERTED["GRU"], [*flat[:2], flat[2][0], *flat[3:]])


ONNX = [key for key in CONVERTED if key != "own"]


@pytest.mark.parametrize("key", ONNX)
def test_weights_of_onnx_there_and_back(key: str) -> None:
    layer = CONVERTED[key]
    nodes = weights.to_onnx(layer)
    assert len(nodes) == layer.num_layers
    assert_loads(copy.copy(layer), weights.from_onnx(layer, nodes), layer.state_dict())


def test_the_order_of_weights_of_onnx() -> None:
    layer = Recurrent(cells.peephole_lstm, 1, 1, seed=1)
    (node,) = weights.to_onnx(layer)
    i, f, g, o = layer.weight_ih_l0
    assert np.array_equal(node["W"], [[i, o, f, g]])
    biases = [[bias[n] for n in (0, 3, 1, 2)] for bias in (layer.bias_ih_l0, layer.bias_hh_l0)]
    assert np.array_equal(node["B"], [[*biases[0], *biases[1]]])
    assert np.array_equal(node["P"], [[layer.p_i_l0[0], layer.p_o_l0[0], layer.p_f_l0[0]]])
    del node["B"], node["P"]
    found = weights.from_onnx(layer, [node])
    assert not any(found[name].any() for name in ("bias_ih_l0", "bias_hh_l0", "p_i_l0", "p_f_l0", "p_o_l0"))


def test_gates_that_onnx_couples() -> None:
    layer = Recurrent(cells.coupled_lstm, 3, 5, seed=1)
    nodes = weights.to_onnx(layer)
    assert not nodes[0]["W"][:, 10:15].any()  # those of its forget gate
    assert_loads(copy.copy(layer), weights.from_onnx(layer, nodes), layer.state_dict())


def test_what_onnx_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="ONNX has no operator with a projection"):
        weights.to_onnx(LSTM(3, 5, proj_size=2))
    with pytest.raises(
        ValueError, match=r"ONNX has no operator with a cell three_states; fusedlstm\.onnx\.export"
    ):
        weights.from_onnx(CONVERTED["own"], [])
    layer, nodes = CONVERTED["stack"], weights.to_onnx(CONVERTED["stack"])
    with pytest.raises(ValueError, match=r"nodes must hold the inputs of 2 node\(s\), got 1"):
        weights.from_onnx(layer, nodes[:1])
    with pytest.raises(ValueError, match=r"nodes\[0\] must hold W, R, B, got W, R, B, P"):
        weights.from_onnx(layer, [nodes[0] | {"P": np.zeros((1, 15))}, nodes[1]])
    with pytest.raises(
        ValueError, match=r"R of nodes\[1\] must have the shape \(1, 20, 5\), got \(1, 20, 3\)"
    ):
        weights.from_onnx(layer, [nodes[0], nodes[1] | {"R": np.zeros((1, 20, 3))}])


# --- state_dict -------------------------------------------------------------------------------------------


def test_state_dict_of_pytorch_goes_in_and_comes_out() -> None:
    module = torch.nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    layer = LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    layer.load_state_dict(module.state_dict())
    for key, array in layer.state_dict().items():
        assert np.array_equal(array, module.state_dict()[key].numpy())
        assert getattr(layer, key) is array
    module.load_state_dict({key: torch.tensor(array) for key, array in layer.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.nn.Module.named_parameters, torch.nn.Module.state_dict])
def test_tensors_may_require_gradients_and_be_of_any_precision(parameters: Any, dtype: torch.dtype) -> None:
    module, layer = torch.nn.LSTM(3, 5).to(dtype), LSTM(3, 5)
    layer.load_state_dict(dict(parameters(module)))
    for key, array in layer.state_dict().items():
        assert array.dtype == np.float32
        assert np.array_equal(array, module.state_dict()[key].float().numpy())


@pytest.mark.parametrize("state_dict", ["weights", None, [np.zeros(3)]])
def test_what_is_no_mapping_is_refused(state_dict: Any) -> None:
    what = type(state_dict).__name__
    with pytest.raises(TypeError, match=f"^state_dict must map names to arrays, got {what}$"):
        LSTM(3, 5).load_state_dict(state_dict)


def test_entries_that_do_not_fit_are_named_and_nothing_is_loaded() -> None:
    layer = GRU(3, 5, seed=1)
    before, good = layer.state_dict(), GRU(3, 5, seed=2).state_dict()

    def refused(entries: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            layer.load_state_dict(entries)
        assert all(before[name] is array for name, array in layer.state_dict().items())

    some = {key: array for key, array in good.items() if key.startswith("bias")}
    refused(some, ValueError, r"GRU\(3, 5\): weight_ih_l0 is missing; weight_hh_l0 is missing$")
    refused(good | {"weight_hr_l0": 1.0}, ValueError, "weight_hr_l0 is unexpected$")
    refused({**some, "x": 1}, ValueError, "weight_ih_l0 is missing.*; x is unexpected")
    misshapen = good | {"bias_hh_l0": np.zeros(16)}
    refused(misshapen, ValueError, r"bias_hh_l0 must have the shape \(15,\), got \(16,\)")
    refused(good | {"weight_hh_l0": good["weight_hh_l0"].T}, ValueError, r"got \(5, 15\)")
    refused(good | {"bias_hh_l0": np.zeros(15, int)}, TypeError, "bias_hh_l0 must be .* got int64")
    refused(good | {"bias_hh_l0": None}, TypeError, "bias_hh_l0 must be .* got object")
    refused(good | {"bias_hh_l0": [[1], []]}, TypeError, "bias_hh_l0 must be an array or regular lists, got ")
    refused(good | {"bias_hh_l0": torch.empty(15, device="meta")}, TypeError, "bias_hh_l0 must be .*Tensor")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_entries_are_copied_and_converted(dtype: str) -> None:
    layer = LSTM(3, 5, dtype=dtype)
    entries = {key: array.astype(">f8") for key, array in LSTM(3, 5, seed=2).state_dict().items()}
    layer.load_state_dict(entries)
    expected = entries["bias_ih_l0"].copy()
    entries["bias_ih_l0"][:] = 0
    loaded = layer.state_dict()["bias_ih_l0"]
    assert np.array_equal(loaded, expected)
    assert loaded.dtype == np.dtype(dtype)
    assert loaded.dtype.isnative
    assert not loaded.flags.writeable


# --- Files ------------------------------------------------------------------------------------------------

LAYERS: list[Recurrent] = [
    LSTM(3, 5),
    LSTM(3, 5, 2, bias=False, batch_first=True, bidirectional=True, proj_size=2, dtype="float64"),
    GRU(3, 5, 2, dropout=0.25),
    RNN(3, 5, nonlinearity="relu"),
    *(Recurrent(built_in, 2, 3) for built_in in BUILT_IN),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_saved_layer_comes_back(layer: Recurrent, tmp_path: Path) -> None:
    layer.save(tmp_path / "m.safetensors")
    loaded = fusedlstm.load(tmp_path / "m.safetensors", backend="reference")
    assert type(loaded) is type(layer)
    assert repr(loaded).replace(", backend='reference'", "") == repr(layer)
    assert loaded.cell is layer.cell
    assert loaded.state_dict().keys() == layer.state_dict().keys()
    for key, array in loaded.state_dict().items():
        assert np.array_equal(array, layer.state_dict()[key])
        assert array.dtype == layer.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]  # no temporary file


def test_settings_of_the_machine_are_given_when_a_layer_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(3, 5, backend="cuda", precision="tf32", form="stepwise").save(path)
    _, settings = weights.read(path)
    assert not {"backend", "precision", "form"} & settings.keys()
    assert repr(fusedlstm.load(path)) == "LSTM(3, 5)"
    options = {"backend": "cuda", "precision": "bfloat16", "form": "persistent"}
    assert repr(fusedlstm.load(path, **options)) == repr(LSTM(3, 5, **options))


def test_a_file_that_holds_a_precision_can_be_used_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(3, 5).save(path)
    _rewrite(path, precision="tf32")  # as older files do
    y, _ = fusedlstm.load(path, backend="reference")(np.ones((2, 1, 3), np.float32))
    assert y.shape == (2, 1, 5)


@pytest.mark.parametrize("own", OWN, ids=name)
def test_a_layer_with_a_cell_of_ones_own_comes_back(own: Cell, tmp_path: Path) -> None:
    layer, path = Recurrent(own, 2, 3, bidirectional=True), str(tmp_path / "m.safetensors")
    layer.save(path)
    loaded = fusedlstm.load(path, cell=own)
    assert loaded.cell is own
    assert all(np.array_equal(array, layer.state_dict()[key]) for key, array in loaded.state_dict().items())
    with pytest.raises(ValueError, match=rf"cell of your own, {own.name}: pass it, load\(path, cell="):
        fusedlstm.load(path)


def test_another_cell_is_refused(tmp_path: Path) -> None:
    @cell(gates=("u",))
    def one_gate(u: Any, h: Any) -> Any:
        return 0.5 * h + 0.5 * tanh(u)

    @cell(gates=("i", "f", "g", "o"), states=("h", "c"))
    def lstm(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
        return tanh(i + o + f), c + g

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    LSTM(2, 3).save(ours)
    Recurrent(OWN[0], 2, 3).save(theirs)
    with pytest.raises(ValueError, match="saved with another cell than one_gate: the names or the math"):
        fusedlstm.load(theirs, cell=one_gate)
    with pytest.raises(ValueError, match=r"saved with fusedlstm.cells.lstm, not with the cell <fused"):
        fusedlstm.load(ours, cell=three_states)
    assert fusedlstm.load(ours, cell=cells.lstm).cell is cells.lstm
    for path in (ours, theirs):
        with pytest.raises(TypeError, match=r"cell must be made with @fusedlstm\.cell, got 'mine'"):
            fusedlstm.load(path, cell="mine")  # type: ignore[arg-type]
    Recurrent(lstm, 2, 3).save(ours)  # named as a built-in cell, but not one
    with pytest.raises(ValueError, match="cell of your own, lstm"):
        fusedlstm.load(ours)
    assert fusedlstm.load(ours, cell=lstm).cell is lstm


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layers_can_be_copied_and_pickled(copied: Any) -> None:
    x = np.ones((4, 2, 3), np.float32)
    for own in (cells.gru, three_states):
        layer = Recurrent(own, 3, 5, 2, dropout=0.5, bidirectional=True, backend="reference", seed=1)
        y = layer.forward(x, training=True, draw=2)[0]
        other = copied(layer)
        assert other.cell is own
        assert repr(other) == repr(layer)
        assert np.array_equal(other.forward(x, training=True, draw=2)[0], y)
        other.weight_hh_l0 = np.zeros_like(layer.weight_hh_l0)
        assert np.array_equal(layer.forward(x, training=True, draw=2)[0], y)


def test_others_can_read_the_file(tmp_path: Path) -> None:
    LSTM(2, 3, seed=1).save(tmp_path / "m.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert sorted(arrays) == ["bias_hh_l0", "bias_ih_l0", "weight_hh_l0", "weight_ih_l0"]
    header = _header(tmp_path / "m.safetensors")
    settings = json.loads(header["__metadata__"]["fusedlstm"])
    assert settings["cell"] == "lstm"
    assert settings["hidden_size"] == 3


def test_a_layer_does_not_outlive_its_file(tmp_path: Path) -> None:
    """Arrays are read, not mapped: the file may be overwritten."""
    path = tmp_path / "m.safetensors"
    LSTM(2, 3, seed=1).save(path)
    layer = fusedlstm.load(path)
    before = {key: array.copy() for key, array in layer.state_dict().items()}
    LSTM(2, 3, seed=2).save(path)
    assert all(np.array_equal(array, before[key]) for key, array in layer.state_dict().items())


def test_threads_may_save_to_one_path_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, both, replace = tmp_path / "m.safetensors", threading.Barrier(2), Path.replace

    def replace_together(self: Path, target: Path) -> Path:
        both.wait(timeout=60)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: LSTM(2, 3, seed=seed).save(path), range(2)))
    saved = fusedlstm.load(path).weight_ih_l0
    assert any(np.array_equal(saved, LSTM(2, 3, seed=seed).weight_ih_l0) for seed in range(2))
    assert list(tmp_path.iterdir()) == [path]


def _header(path: Path) -> Any:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def _rewrite(path: Path, **changes: Any) -> None:
    """Write a file again with other settings; ... takes one out."""
    arrays, settings = weights.read(path)
    settings = {key: value for key, value in (settings | changes).items() if value is not ...}
    weights.write(path, arrays, settings)


def _refusal(path: Path) -> str:
    """Why a file cannot be loaded, or its name if it can."""
    try:
        layer = fusedlstm.load(path)
    except ValueError as error:
        return str(error)
    return f"{path} holds {layer}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fusedlstm.load(tmp_path / "none.safetensors")


def test_a_file_that_cannot_be_written_is_named_as_the_caller_does(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    errors = {"none/m": FileNotFoundError, "file/m": NotADirectoryError, "folder": IsADirectoryError}
    for address, error in errors.items():
        path = tmp_path / address
        with pytest.raises(error, match=f": '{re.escape(str(path))}'$"):
            LSTM(2, 3).save(path)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    file, link, dangling = tmp_path / "file", tmp_path / "link", tmp_path / "dangling"
    link.symlink_to("file")
    dangling.symlink_to("new")
    LSTM(2, 3, seed=1).save(file)
    for mode in (0o600, 0o640, 0o666):
        file.chmod(mode)
        for path in (file, link):
            LSTM(2, 3, seed=mode).save(path)
            assert link.is_symlink()
            assert not file.is_symlink()
            assert _mode(file) == mode
            assert np.array_equal(fusedlstm.load(file).weight_ih_l0, LSTM(2, 3, seed=mode).weight_ih_l0)
    LSTM(2, 3).save(dangling)
    assert dangling.is_symlink()
    umask = os.umask(0o027)
    LSTM(2, 3).save(tmp_path / "other")
    os.umask(umask)
    assert _mode(tmp_path / "other") == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link", "dangling", "new", "other"}


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_nobody_may_read_a_private_file_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, modes, fchmod = tmp_path / "m.safetensors", [], os.fchmod
    path.touch(0o600)

    def watched(descriptor: int, mode: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", watched)
    LSTM(2, 3).save(path)
    assert modes == [0o600]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_a_group_that_cannot_be_given_gets_no_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, status = tmp_path / "m.safetensors", Path.stat
    path.touch()
    path.chmod(0o664)

    def of_another_group(self: Path, **options: Any) -> os.stat_result:
        found = list(status(self, **options))
        found[stat.ST_GID] += 1
        return os.stat_result(found)

    def refused(descriptor: int, owner: int, group: int) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "stat", of_another_group)
    monkeypatch.setattr(os, "fchown", refused)
    LSTM(2, 3).save(path)
    monkeypatch.undo()
    assert _mode(path) == 0o604


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, layer = tmp_path / "pipe", LSTM(2, 3)
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read_bytes)
        layer.save(pipe)
        (tmp_path / "file").write_bytes(reading.result())
    assert np.array_equal(fusedlstm.load(tmp_path / "file").weight_ih_l0, layer.weight_ih_l0)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -4, -1])
def test_a_file_that_is_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"m.safetensors is damaged, or not a safetensors file"):
        fusedlstm.load(path)


@pytest.mark.parametrize("place", [0, 3, 9, 40])
def test_a_file_with_a_wrong_byte_in_its_header(tmp_path: Path, place: int) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        fusedlstm.load(path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("not a model")
    with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
        fusedlstm.load(path)
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no fusedlstm settings; build a layer and call load_state"):
        fusedlstm.load(path)
    weights.write(path, {"a": np.zeros(3)}, {"note": 1})
    with pytest.raises(ValueError, match="holds no layer"):
        fusedlstm.load(path)
    safetensors.numpy.save_file({"a": np.zeros(3)}, path, {"fusedlstm": "{"})
    with pytest.raises(ValueError, match="is damaged: its settings are no JSON"):
        fusedlstm.load(path)


def test_a_model_of_the_demo_is_no_layer(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    CharacterModel("ab", "a", hidden=2).save(str(path), Record(1.0, 1.0, 1, ""))
    with pytest.raises(ValueError, match=f"holds a model of the demo; .* fusedlstm demo --load {path}"):
        fusedlstm.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": ...}, "is damaged: its settings lack 'cell'"),
        ({"layer": ..., "key": ...}, "is damaged: its settings lack 'layer', 'key'"),
        ({"cell": "no_such_cell"}, "saved with the cell 'no_such_cell', which this version does not have"),
        ({"hidden_size": 4}, "weight_ih_l0 must have the shape"),
        ({"hidden_size": ...}, "cannot be loaded: .*hidden_size"),
        ({"hidden_size": "three"}, "cannot be loaded: hidden_size must be an integer"),
        ({"hidden_size": -3}, "cannot be loaded: hidden_size must be at least 1"),
        ({"bidirectional": True}, "cannot be loaded: .*weight_ih_l0_reverse is missing"),
        ({"bias": False}, "bias_ih_l0 is unexpected"),
        ({"something": 1}, "cannot be loaded: .*something"),
        ({"self": 1}, "cannot be loaded: .*self"),
        ({"layer": []}, "is damaged: 'layer' in its settings is nested"),
        ({"cell": {}}, "is damaged: 'cell' in its settings is nested"),
        ({"dtype": [[[]]]}, "is damaged: 'dtype' in its settings is nested"),
        ({"layer": 1}, "is damaged: its layer, cell and key are 1, 'lstm' and None"),
        ({"key": 1}, "is damaged: its layer, cell and key are"),
        ({"layer": "GRU"}, "is damaged: its layer is GRU, which does not have the cell 'lstm'"),
        ({"layer": "RNN"}, "is damaged: its layer is RNN, which does not have the cell 'lstm'"),
        (
            {"cell": "peephole_lstm"},
            "is damaged: its layer is LSTM, which does not have the cell 'peephole_l",
        ),
        ({"dtype": "f8,f4"}, "cannot be loaded: dtype must be 'float32' or 'float64'"),
        ({"dropout": float("nan")}, "cannot be loaded: dropout must be between 0 and 1"),
        ({"hidden_size": 10**400}, "cannot be loaded: "),
    ],
)
def test_a_file_with_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    _rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        fusedlstm.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("1", "its settings are no mapping but a int"),
        ("null", "its settings are no mapping but a NoneType"),
        ('"layer cell key"', "its settings are no mapping but a str"),
        ("[" * 100_000, "its settings are no JSON"),
        ('{"layer": ' * 100_000, "its settings are no JSON"),
        ('{"num_layers": ' + "9" * 5000 + "}", "its settings are no JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_a_file_whose_settings_are_anything(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(dict(LSTM(2, 3).state_dict()), path, {"fusedlstm": settings})
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        fusedlstm.load(path)
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        CharacterModel.load(str(path))


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**9},
        {"hidden_size": 30_000},
        {"input_size": 10**9},
        {"num_layers": 10**9},
        {"proj_size": 10**8, "hidden_size": 10**9},
        {"num_layers": 10**9, "bidirectional": True},
    ],
    ids=str,
)
def test_a_small_file_takes_little_memory(tmp_path: Path, sizes: dict[str, Any]) -> None:
    """Whatever sizes it claims."""
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    _rewrite(path, **sizes)
    tracemalloc.start()
    with pytest.raises(ValueError, match="cannot be loaded: weight_"):
        fusedlstm.load(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_large_arrays_do_not_vouch_for_others(tmp_path: Path) -> None:
    """The first array fits the size that is claimed; of the others none is made."""
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    arrays, settings = weights.read(path)
    arrays["weight_ih_l0"] = np.zeros((4 * 20_000, 2), np.float32)
    weights.write(path, arrays, settings | {"hidden_size": 20_000})
    tracemalloc.start()
    with pytest.raises(ValueError, match="cannot be loaded: weight_hh_l0 must have the shape"):
        fusedlstm.load(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000_000


@hypothesis.settings(max_examples=300)
@given(
    name=st.sampled_from(["layer", "cell", "key", "input_size", "hidden_size", "num_layers", "bias", "dtype"])
    | st.text(max_size=3),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_a_setting_may_be_anything(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    _rewrite(path, **{name: value})
    assert "m.safetensors" in _refusal(path)


@hypothesis.settings(max_examples=300)
@given(place=st.integers(0, 1399), bits=st.integers(1, 255))
def test_a_byte_may_be_anything(tmp_path: Path, place: int, bits: int) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= bits
    path.write_bytes(data)
    assert "m.safetensors" in _refusal(path)


def test_options_of_load_are_not_taken_for_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    with pytest.raises(TypeError, match=r"^seed must be an integer, got 'x'"):
        fusedlstm.load(path, seed="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        fusedlstm.load(path, backend="gpu")
    again = [fusedlstm.load(path, seed=seed)._key for seed in (1, 1, 2)]
    assert again[0] == again[1] == LSTM(2, 3, seed=1)._key != again[2]


# Written before the arrays were compared with the settings; base64 of LSTM(1, 1, seed=0).save(path).
SAVED = (
    "SAIAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJucCIsImZ1c2VkbHN0bSI6IntcImxheWVyXCI6IFwiTFNUTVwiLCBc"
    "ImNlbGxcIjogXCJsc3RtXCIsIFwia2V5XCI6IG51bGwsIFwiaW5wdXRfc2l6ZVwiOiAxLCBcImhpZGRlbl9zaXplXCI6IDEsIFwi"
    "bnVtX2xheWVyc1wiOiAxLCBcImJpYXNcIjogdHJ1ZSwgXCJiYXRjaF9maXJzdFwiOiBmYWxzZSwgXCJkcm9wb3V0XCI6IDAuMCwg"
    "XCJiaWRpcmVjdGlvbmFsXCI6IGZhbHNlLCBcInByb2pfc2l6ZVwiOiAwLCBcImR0eXBlXCI6IFwiZmxvYXQzMlwiLCBcInJlY3Vy"
    "cmVudF9kcm9wb3V0XCI6IDAuMH0ifSwiYmlhc19oaF9sMCI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbNF0sImRhdGFfb2Zmc2V0"
    "cyI6WzAsMTZdfSwiYmlhc19paF9sMCI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbNF0sImRhdGFfb2Zmc2V0cyI6WzE2LDMyXX0s"
    "IndlaWdodF9oaF9sMCI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbNCwxXSwiZGF0YV9vZmZzZXRzIjpbMzIsNDhdfSwid2VpZ2h0"
    "X2loX2wwIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOls0LDFdLCJkYXRhX29mZnNldHMiOls0OCw2NF19fSAgICAgIO1cUj+Gs1c/"
    "QkdEv1BajzzE2uy+noy3Pg+YNT/q7lG/kr4dvk2Xlz4z+2K/GEkjP7bIYj8dEry+x63jPvSwP78="
)


def test_files_of_earlier_versions_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(base64.b64decode(SAVED))
    loaded, expected = fusedlstm.load(path), LSTM(1, 1, seed=0)
    assert repr(loaded) == "LSTM(1, 1)"
    for key, array in expected.state_dict().items():
        assert np.array_equal(loaded.state_dict()[key], array)


def test_an_array_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    LSTM(2, 3).save(path)
    arrays, settings = weights.read(path)
    del arrays["bias_hh_l0"]
    weights.write(path, arrays, settings)
    with pytest.raises(ValueError, match="bias_hh_l0 is missing"):
        fusedlstm.load(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"input_size": None}, "an input_size"), ({"heads": 2}, "one head")],
    ids=["gate inputs", "heads"],
)
@pytest.mark.parametrize("convert", [weights.to_keras, weights.to_onnx])
def test_options_that_others_do_not_have_are_refused(convert: Any, options: Any, expected: str) -> None:
    layer = Recurrent(cells.lstm, **({"input_size": 3, "hidden_size": 4} | options))
    with pytest.raises(ValueError, match=f"^layer must have {expected}, as layers of"):
        convert(layer)
