"""What a precision costs, told of the whole, of layers and of gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import late_and_means

import fusedlstm
from fusedlstm import cells, compare


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_error_is_that_of_the_layer(precision: str) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True, "seed": 1}
    exact = fusedlstm.LSTM(20, 33, **sizes)
    narrow = fusedlstm.LSTM(20, 33, **sizes, precision=precision)
    x, lengths = data(3, 9, 20), np.array([9, 2, 5])
    state = data(4, 3, 33), data(4, 3, 33)
    reset = np.zeros((3, 9), bool)
    reset[0, 4] = True
    (y, _), (other, _) = (layer(x, state, lengths, reset) for layer in (exact, narrow))
    found = compare(exact, x, state, lengths, reset, precision=precision)
    assert found.output == pytest.approx(np.linalg.norm(other - y) / np.linalg.norm(y), rel=1e-3)
    assert list(found.layers) == ["layer 0", "layer 1"]
    assert list(found.states) == ["h", "c"]
    assert set(found.gates) == {"layer 0", "layer 0, reverse", "layer 1", "layer 1, reverse"}
    assert all(1e-4 < error < 2e-2 for gates in found.gates.values() for error in gates.values())
    assert f"products of {precision}" in str(found)
    assert "gates of layer 1, reverse: i " in str(found)


def test_it_tells_which_gate_and_which_layer() -> None:
    """One weight that is far larger than its neighbours, and multiplies nothing, spoils their scale."""
    layer = fusedlstm.GRU(20, 32, num_layers=3, seed=1)
    weights = layer.weight_ih_l0.copy()
    weights[32:64, 3] = 20.0  # those of gate z
    layer.weight_ih_l0 = weights
    x = data(9, 4, 20)
    x[..., 3] = 0
    found = compare(layer, x)
    gates = found.gates["layer 0"]
    assert gates["z"] > 5 * max(gates["r"], gates["n"], *found.gates["layer 1"].values())
    assert max(found.layers, key=found.layers.__getitem__) == "layer 0"


def test_any_cell_and_one_sequence() -> None:
    found = compare(fusedlstm.Recurrent(late_and_means, 5, 8, seed=1), data(6, 5), precision="bfloat16")
    assert set(found.gates["layer 0"]) == set(late_and_means.gates)
    assert compare(fusedlstm.Recurrent(cells.lstm, 5, 8, proj_size=3, seed=1), data(6, 2, 5)).output < 0.05


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": None, "bidirectional": True, "num_layers": 2},
        {"heads": 4},
        {"zoneout": (0.2, 0.4), "recurrent_dropout": 0.3, "weight_dropout": 0.1, "num_layers": 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_the_error_is_that_of_layers_with_options(options: dict[str, Any], precision: str) -> None:
    settings: dict[str, Any] = {"input_size": 20, "hidden_size": 32, "seed": 1} | options
    exact = fusedlstm.LSTM(**settings)
    narrow = fusedlstm.LSTM(**settings, precision=precision)
    x = data(9, 3, exact._features)
    y, other = exact(x)[0], narrow(x)[0]
    found = compare(exact, x, precision=precision)
    assert found.output == pytest.approx(np.linalg.norm(other - y) / np.linalg.norm(y), rel=1e-3)
    assert set(found.gates["layer 0"]) == set("ifgo")


def test_what_cannot_be_compared_is_refused() -> None:
    layer = fusedlstm.LSTM(3, 5)
    with pytest.raises(ValueError, match="precision must be one of bfloat16, int8, got 'tf32'"):
        compare(layer, data(2, 1, 3), precision="tf32")
    with pytest.raises(ValueError, match="layer must be of float32, got float64"):
        compare(fusedlstm.LSTM(3, 5, dtype="float64"), data(2, 1, 3))
    with pytest.raises(TypeError, match=r"a layer on arrays, such as fusedlstm\.LSTM, got int"):
        compare(3, data(2, 1, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must have steps and sequences to compare"):
        compare(layer, data(0, 1, 3))


@pytest.mark.parametrize(("precision", "size"), [("bfloat16", 0.52), ("int8", 0.28)])
def test_files_in_a_precision(precision: str, size: float, tmp_path: Path) -> None:
    """They are small, and a layer made of one computes what the one that was saved does."""
    layer = fusedlstm.LSTM(64, 96, precision=precision, seed=1)
    layer.save(tmp_path / "whole")
    layer.save(tmp_path / "narrow", precision=precision)
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "narrow")]
    assert sizes[1] < size * sizes[0] + 2000
    x = data(9, 3, 64)
    for path in ("whole", "narrow"):
        loaded = fusedlstm.load(tmp_path / path, precision=precision)
        np.testing.assert_allclose(loaded(x)[0], layer(x)[0], rtol=0, atol=1e-5)
    exact = fusedlstm.load(tmp_path / "narrow")  # float32, of what the file holds
    assert exact.weight_ih_l0.dtype == np.float32
    limit = 2.0**-8 if precision == "bfloat16" else 1 / 127
    assert np.abs(exact.weight_ih_l0 - layer.weight_ih_l0).max() <= limit * np.abs(layer.weight_ih_l0).max()
    assert np.array_equal(exact.bias_ih_l0, layer.bias_ih_l0)


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    layer = fusedlstm.LSTM(3, 5)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, int8"):
        layer.save(tmp_path / "file", precision="tf32")
    with pytest.raises(ValueError, match="float32 for a layer of float64, got 'int8'"):
        fusedlstm.LSTM(3, 5, dtype="float64").save(tmp_path / "file", precision="int8")
    layer.weight_hh_l0 = np.full((20, 5), np.inf)
    with pytest.raises(ValueError, match="weight_hh_l0 has NaN or infinity, which int8 cannot hold"):
        layer.save(tmp_path / "file", precision="int8")
    assert not (tmp_path / "file").exists()
