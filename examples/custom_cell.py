"""A cell of one's own in a PyTorch model, and what its fused kernels save over the loop in Python.

    python examples/custom_cell.py

A peephole LSTM, whose gates look at the cell state, is not in PyTorch: there it is a loop over time steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusedlstm.torch as fused
from fusedlstm import cell
from fusedlstm.math import sigmoid, tanh


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), weights=("p_i", "p_f", "p_o"))
def peephole(i: Any, f: Any, g: Any, o: Any, c: Any, p_i: Any, p_f: Any, p_o: Any) -> Any:
    """The cell as mathematics; its backward pass is derived."""
    new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * tanh(g)
    return sigmoid(o + p_o * new) * tanh(new), new


def python_loop(layer: nn.Module, x: Tensor) -> Tensor:  # (T, B, I)
    """The same as it is written in PyTorch, with the parameters of `layer`."""
    from_input = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0 + layer.bias_hh_l0)
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    y = []
    for part in from_input:
        i, f, g, o = (part + h @ layer.weight_hh_l0.T).chunk(4, -1)
        i, f = torch.sigmoid(i + layer.p_i_l0 * c), torch.sigmoid(f + layer.p_f_l0 * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + layer.p_o_l0 * c) * torch.tanh(c)
        y.append(h)
    return torch.stack(y)


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of a few calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[1:])[repeats // 2]


def compare(steps: int, batch: int, hidden: int, repeats: int) -> None:
    """Print a row: forward and training, of the loop and of the fused layer."""
    torch.manual_seed(0)
    layer = fused.Recurrent(peephole, hidden, hidden)
    x = torch.randn(steps, batch, hidden)
    torch.testing.assert_close(layer(x)[0], python_loop(layer, x), rtol=1e-4, atol=1e-5)

    def forward(run: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode():
            run(x)

    def train(run: Callable[[Tensor], Tensor]) -> None:
        layer.zero_grad()
        run(x).square().mean().backward()

    runs = (lambda x: python_loop(layer, x), lambda x: layer(x)[0])
    row = [milliseconds(lambda: work(run), repeats) for work in (forward, train) for run in runs]  # noqa: B023
    text = "  ".join(
        f"{loop:7.2f} -> {ours:6.2f} ms ({loop / ours:4.1f}x)" for loop, ours in (row[:2], row[2:])
    )
    print(f"T={steps:4} B={batch:3} H={hidden:4}:  {text}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it works")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads: forward, then forward and backward; loop -> fused")
    sizes = [(500, 1, 64), (150, 1, 256), (25, 4, 512), (100, 64, 128)]
    for size in [(10, 2, 16)] if options.quick else sizes:
        compare(*size, repeats=1 if options.quick else 9)


if __name__ == "__main__":
    main()
