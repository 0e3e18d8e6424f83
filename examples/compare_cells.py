"""Comparing cells: how far back a gradient reaches in an RNN, a GRU, an LSTM and a bidirectional LSTM.

Each layer has to learn the adding problem (Hochreiter & Schmidhuber, 1997): of a long row of numbers between
0 and 1 two are marked, one early and one late, and their sum is wanted at the end. A model that knows neither
number can do no better than to say 1, with a mean squared error of 1/6, which is the baseline; one that knows
the late number alone can reach 1/12.

The reason why the plain RNN fails is measured: the gradient of the answer with respect to the input of each
step. It shrinks with the distance in time by a factor at each step (Hochreiter, 1991; Bengio, Simard &
Frasconi, 1994). Before training it does so in all cells, and least of all in the RNN, whose recurrent
weights start as a rotation; but cells with gates learn to let it through, and the RNN does not. The reverse
direction of the bidirectional LSTM ends at the first step, so its gradient has two ends to start from.

Data: made by the program, new numbers for every update. The gradients are PyTorch's, so this program runs on
that backend of Keras only.

    python examples/compare_cells.py
    python examples/compare_cells.py --steps 200 --epochs 40 --picture cells.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import layers
from tqdm.keras import TqdmCallback

from fusedlstm.keras import GRU, LSTM, SimpleRNN

CELLS = {
    "RNN": SimpleRNN,
    "GRU": GRU,
    "LSTM": LSTM,
    "bidirectional LSTM": lambda units: layers.Bidirectional(LSTM(units // 2)),
}
BASELINE = 1 / 6  # the variance of a sum of two uniform numbers


def adding_problem(count: int, steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers with marks (count, steps, 2), and the sums of the marked numbers (count, 1).

    One mark is in the first tenth and one in the second half.
    """
    numbers = random.random((count, steps), "float32")
    marks = np.zeros_like(numbers)
    rows = np.arange(count)
    marks[rows, random.integers(max(1, steps // 10), size=count)] = 1
    marks[rows, random.integers(steps // 2, steps, size=count)] = 1
    return np.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdims=True)


def adding_model(cell: str, units: int) -> keras.Model:
    """The sum, from the final output of a layer of the cell."""
    model = keras.Sequential([keras.Input((None, 2)), CELLS[cell](units), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(4e-3, clipnorm=1.0), "mean_squared_error")
    return model


def gradient_norms(model: keras.Model, x: np.ndarray) -> np.ndarray:  # (B, T, I) -> (T,)
    """Mean norm of the gradient of the answer with respect to the input of each step, the last step first."""
    inputs = keras.ops.convert_to_tensor(x).requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
    return gradient.norm(dim=-1).mean(0).flip(0).cpu().numpy()


def batches(options: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New numbers for every update, without end; all cells see the same."""
    random = np.random.default_rng(options.seed + 1)
    while True:
        yield adding_problem(options.batch, options.steps, random)


def train(model: keras.Model, options: argparse.Namespace, name: str) -> list[float]:
    """The mean loss of each epoch."""
    how = {"epochs": options.epochs, "steps_per_epoch": options.updates, "verbose": 0}
    return model.fit(batches(options), callbacks=[TqdmCallback(verbose=0, desc=name)], **how).history["loss"]


def draw(path: str, losses: dict[str, list[float]], norms: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Save the learning curves, and the gradients before and after training."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for n, (name, curve) in enumerate(losses.items()):
        left.plot(range(1, len(curve) + 1), curve, color=f"C{n}", label=name)
        before, after = norms[name]
        right.plot(before, color=f"C{n}", linestyle=":", linewidth=1)
        right.plot(after, color=f"C{n}", label=name)
    left.axhline(BASELINE, color="0.5", linestyle="--", label="always 1")
    left.set(yscale="log", xlabel="epoch", ylabel="mean squared error", title="learning to add")
    right.plot([], [], color="0.5", label="solid: after training")
    right.plot([], [], color="0.5", linestyle=":", linewidth=1, label="dotted: before training")
    right.set(yscale="log", xlabel="distance in time from the answer", ylabel="norm of the gradient")
    right.set_title("what reaches back")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: the LSTM's error, the baseline, and more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="length of a row")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--updates", type=int, default=50, help="of an epoch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=64, help="of both directions together, if there are two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save learning curves and gradients")
    options = parser.parse_args(argv)
    if keras.backend.backend() != "torch":
        parser.error(
            f"this program takes gradients with PyTorch; KERAS_BACKEND is {keras.backend.backend()!r}"
        )

    x, y = adding_problem(500, options.steps, np.random.default_rng(options.seed))
    errors, losses, norms = {}, {}, {}
    for name in CELLS:
        keras.utils.set_random_seed(options.seed)
        model = adding_model(name, options.units)
        before = gradient_norms(model, x)
        losses[name] = train(model, options, name)
        norms[name] = before, gradient_norms(model, x)
        errors[name] = float(np.mean((model.predict(x, verbose=0) - y) ** 2))

    print(f"{'':20}{'error':>10}{'norm of the gradient with respect to':>40}")
    print(f"{'':30}{'first input':>20}{'last input':>20}")
    for name, error in errors.items():
        after = norms[name][1]
        print(f"{name:20}{error:10.4f}{after[-1]:20.1e}{after[0]:20.1e}")
    print(f"{'always 1':20}{BASELINE:10.4f}")
    if options.picture:
        draw(options.picture, losses, norms)
    return {
        "mean squared error, LSTM": errors.pop("LSTM"),
        "mean squared error, always 1": BASELINE,
        **{f"mean squared error, {name}": error for name, error in errors.items()},
        **{
            f"gradient at the first step over that at the last, {name}": float(after[-1] / after[0])
            for name, (_, after) in norms.items()
        },
    }


if __name__ == "__main__":
    main()
