"""Files that PyTorch's exporters write, read back."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from checks import error

import fusedlstm
from fusedlstm.onnx import layers


class Model(torch.nn.Module):
    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.recurrent = getattr(torch.nn, kind)(4, 5, **options)

    def forward(self, x: torch.Tensor) -> Any:
        return self.recurrent(x)


def exported(model: torch.nn.Module, x: torch.Tensor, **options: Any) -> bytes:
    """What PyTorch's exporter of TorchScript writes."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": [0, 1]}, **options
        )
    return file.getvalue()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"num_layers": 2}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        ("GRU", {"num_layers": 3, "bidirectional": True, "bias": False}),
        ("GRU", {}),
        ("RNN", {"num_layers": 2, "nonlinearity": "relu"}),
    ],
)
def test_files_of_pytorch(kind: str, options: dict[str, Any], folded: bool) -> None:
    model = Model(kind, options).eval()
    x = torch.randn(3, 7, 4)
    (found,) = layers(exported(model, x, do_constant_folding=folded), backend="reference")
    assert type(found.layer) is getattr(fusedlstm, kind)
    assert found.layer.num_layers == len(found.nodes) == options.get("num_layers", 1)
    for key, array in found.layer.state_dict().items():
        assert np.array_equal(array, getattr(model.recurrent, key).detach().numpy())
    expected = model(x)[0].detach().numpy()
    if options.get("batch_first"):  # of the model; its nodes have the steps first
        x, expected = x.swapaxes(0, 1), expected.swapaxes(0, 1)
    assert error(found(x.numpy())[0], expected) < 1e-6


def test_a_file_of_pytorchs_newer_exporter() -> None:
    """It works out between two nodes, from the shape of the output of one, that of the input of the other."""
    model = Model("LSTM", {"num_layers": 2, "bidirectional": True}).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (torch.randn(5, 3, 4),), dynamo=True, dynamic_shapes=(dynamic,), verbose=False
        )
    (found,) = layers(program.model_proto)
    assert repr(found.layer) == "LSTM(4, 5, num_layers=2, bidirectional=True)"
    for key, array in found.layer.state_dict().items():
        assert np.array_equal(array, getattr(model.recurrent, key).detach().numpy())
