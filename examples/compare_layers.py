"""The programs with `keras.layers`: their models learn the same, and how much longer that takes.

A program of this folder is run twice, each time in a process of its own: as it is, and with the layers of
`keras.layers` in the place of those that it imports from `fusedlstm.keras`. The seed is the same, and so are
the first weights, the order of the data and dropout. Of the first model that the program trains the first
batches are watched: their losses agree but for rounding, which grows from update to update.

    python examples/compare_layers.py sentiment translation
    python examples/compare_layers.py text_generation --batches 50
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras

import fusedlstm.keras

EXAMPLES = Path(__file__).parent
OURS, THEIRS = "fusedlstm.keras", "keras.layers"
NAMES = ("LSTM", "GRU", "SimpleRNN")
FIRST = 5  # batches that are not timed: in them kernels are compiled or loaded, and memory is taken


class Training(NamedTuple):
    """What was seen of the first batches of a model."""

    losses: list[float]  # mean of the epoch up to each batch
    seconds: list[float]  # of each batch

    @property
    def batch(self) -> float:
        """Seconds of a batch, the median."""
        return median(self.seconds[FIRST:] or self.seconds)


class Comparison(NamedTuple):
    """The same program with both kinds of layers."""

    ours: Training
    theirs: Training

    @property
    def faster(self) -> float:
        """How many times as fast as theirs ours is."""
        return self.theirs.batch / self.ours.batch

    @property
    def difference(self) -> float:
        """The largest relative difference of the losses."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.ours.losses, self.theirs.losses, strict=True))


class Enough(Exception):
    """As many batches as wanted are done."""


class Watch(keras.callbacks.Callback):
    """Keeps losses and times of some batches, then stops the program."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches, self.seen = batches, Training([], [])

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        self.seen.losses.append(float(logs["loss"]))
        self.seen.seconds.append(time.perf_counter() - self.start)
        if len(self.seen.losses) == self.batches:
            raise Enough


def load(program: str) -> ModuleType:
    """The module of a program, anew."""
    spec = importlib.util.spec_from_file_location(program, EXAMPLES / f"{program}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[program] = module
    spec.loader.exec_module(module)
    return module


def first_batches(program: str, layers: str, batches: int, arguments: Sequence[str] = ()) -> Training:
    """Run a program with the layers of OURS or THEIRS until its first model has trained on some batches."""
    source = {OURS: fusedlstm.keras, THEIRS: keras.layers}[layers]
    watch, fit = Watch(batches), keras.Model.fit

    def watched(model: keras.Model, *args: Any, callbacks: Sequence[Any] = (), **options: Any) -> Any:
        return fit(model, *args, callbacks=[*callbacks, watch], **options)

    with (
        patch.multiple(fusedlstm.keras, **{name: getattr(source, name) for name in NAMES}),
        patch.object(keras.Model, "fit", watched),
        suppress(Enough),
    ):
        load(program).main(arguments)
    return watch.seen


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that is called in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def compare(program: str, batches: int = 25) -> Comparison:
    """The first batches of a program with either kind of layers."""
    return Comparison(*(alone(first_batches, program, layers, batches) for layers in (OURS, THEIRS)))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", nargs="+")
    parser.add_argument("--batches", type=int, default=25)
    options = parser.parse_args(argv)
    for program in options.program:
        found = compare(program, options.batches)
        print(f"\n{program:20}{OURS:>20}{THEIRS:>20}")
        for n in sorted({0, options.batches // 2, options.batches - 1}):
            print(f"{f'loss, {n + 1} batches':20}" + "".join(f"{seen.losses[n]:20.6f}" for seen in found))
        print(f"{'ms a batch':20}" + "".join(f"{1e3 * seen.batch:20.1f}" for seen in found))
        print(f"{found.faster:.1f} times as fast; losses differ by at most {found.difference:.0e} of theirs")


if __name__ == "__main__":
    main()
