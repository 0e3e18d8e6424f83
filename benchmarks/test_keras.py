"""``model.fit`` and ``model.predict`` with our layers and with those of Keras, on each backend.

Each backend with each kind of layers runs in a process of its own, one after the other; rows that are
compared stand in one group.
"""

from __future__ import annotations

import gc
import importlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from fusedlstm.benchmarks.cases import Case, cases_of_set
from fusedlstm.benchmarks.worker import rest

pytest.importorskip("keras")

SHAPES = cases_of_set("text")
LAYERS = {"ours": "fusedlstm.keras", "theirs": "keras.layers"}
MODULES = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow"}  # that a backend needs
BATCHES, ROUNDS = 12, 3  # batches of an epoch or a prediction, and how many of these are timed

Ask = Callable[..., Any]
_losses: dict[str, float] = {}  # of the first epoch, the same for both kinds of layers


class Trainer:
    """In the process of a contender: a model and its data."""

    def __init__(self, source: str) -> None:
        gc.disable()  # as timeit does: some hundred milliseconds, wherever they happen to fall
        self.source = source
        self.ready: tuple[Case, float] | None = None  # what it has been built for
        self.loss = math.nan

    def build(self, case: Case, recurrent_dropout: float) -> float:
        """Get ready for a case, or stay so; the mean loss of the first epoch, in which all is compiled."""
        if self.ready == (case, recurrent_dropout):
            return self.loss
        keras: Any = importlib.import_module("keras")
        keras.utils.set_random_seed(0)
        layer = importlib.import_module(LAYERS[self.source]).LSTM
        self.model = keras.Sequential(
            [
                keras.Input((case.steps, case.inputs)),
                layer(case.hidden, recurrent_dropout=recurrent_dropout),
                keras.layers.Dense(1),
            ]
        )
        self.model.compile("adam", "mse")
        generator, self.batch = np.random.default_rng(0), case.batch
        count = BATCHES * case.batch
        self.x = generator.standard_normal((count, case.steps, case.inputs), np.float32)
        self.y = generator.standard_normal((count, 1), np.float32)
        self.ready, self.loss = (case, recurrent_dropout), self.fit()
        return self.loss

    def fit(self) -> float:
        """One epoch."""
        history = self.model.fit(self.x, self.y, self.batch, epochs=1, shuffle=False, verbose=0).history
        return float(history["loss"][0])

    def predict(self) -> float:
        """The mean of the predictions."""
        return float(np.mean(self.model.predict(self.x, self.batch, verbose=0)))

    def rest(self) -> None:
        """Collect garbage, and wait for threads that still spin."""
        gc.collect()
        rest()


def serve(connection: Connection, source: str) -> None:
    """Answer requests (method of Trainer, arguments) until there are no more."""
    trainer = Trainer(source)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(trainer, method)(*arguments))


@pytest.fixture(scope="module", params=[f"{b}-{s}" for b in MODULES for s in LAYERS])
def contender(request: pytest.FixtureRequest) -> Iterator[tuple[str, Ask]]:
    """The backend, and what asks the process."""
    backend, source = request.param.split("-")
    pytest.importorskip(MODULES[backend])
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERAS_BACKEND", backend)
        patch.setitem(os.environ, "TF_CPP_MIN_LOG_LEVEL", "3")
        process = context.Process(target=serve, args=(theirs, source), daemon=True)
        process.start()
    theirs.close()

    def ask(method: str, *arguments: Any) -> Any:
        connection.send((method, arguments))
        return connection.recv()

    yield backend, ask
    connection.close()
    process.join(10)
    process.kill()


@pytest.mark.parametrize("method", ["fit", "predict"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.sizes.replace(" ", "-"))
def test_model(benchmark: Any, contender: tuple[str, Ask], case: Case, method: str) -> None:
    backend, ask = contender
    loss = ask("build", case, 0.0)
    assert loss == pytest.approx(_losses.setdefault(f"{backend} {case.sizes}", loss), rel=1e-4)
    timed(benchmark, ask, method, f"{method}, {backend}, {case.sizes}")


def test_fit_with_recurrent_dropout(benchmark: Any, contender: tuple[str, Ask]) -> None:
    backend, ask = contender
    ask("build", SHAPES[1], 0.2)
    timed(benchmark, ask, "fit", f"fit with recurrent dropout, {backend}, {SHAPES[1].sizes}")


def timed(benchmark: Any, ask: Ask, method: str, group: str) -> None:
    benchmark.group = f"{group}, {BATCHES} batches"
    result = benchmark.pedantic(
        lambda: ask(method), setup=lambda: ask("rest"), rounds=ROUNDS, warmup_rounds=1
    )
    assert math.isfinite(result)
