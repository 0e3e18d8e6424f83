"""Laying out new weights for the kernels, as after each step of an optimizer."""

from __future__ import annotations

from typing import Any

from fusedlstm.benchmarks.cases import Case, make_data, recurrent


def test_packing(benchmark: Any, shape: Case) -> None:
    layer = recurrent(shape)
    data = make_data(shape)
    x = data.x[:1, :1]

    def load_and_step() -> Any:
        layer.load_state_dict(data.weights)
        return layer(x)

    y, _ = benchmark(load_and_step)
    assert y.shape == (1, 1, shape.hidden)
