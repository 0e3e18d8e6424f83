"""The first calls of a process, all at once: many threads, each way in, while others fork.

Each case is a process of its own, with its kernels on disk, where loading is quick enough to fall together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

# What thread n does, `work(n)`, which returns arrays, the same for all n of a kind; and the number of kinds.
ARRAYS = """
    cells = ["lstm", "gru", "rnn_tanh", "coupled_lstm"]
    kinds, training = {kinds}, {training}
    layers = [
        fusedlstm.Recurrent(getattr(fusedlstm.cells, name), 3, 5, {layers}, seed=1, backend=BACKEND)
        for name in cells[:kinds]
    ]
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("f")

    def work(n):
        layer = layers[n % kinds]
        y, state, tape = layer.forward(x, training=training)
        results = [y, *(state if isinstance(state, tuple) else [state])]
        if training:
            dx, _, grads = tape.backward(np.cos(y))
            results += [dx, *grads.values()]
        return results
"""
LARGE = """
    # enough work for several threads: all start the team, and lay out the weights on it
    kinds, layer = 1, fusedlstm.LSTM(64, 512, seed=1, backend=BACKEND)
    x = np.random.default_rng(0).normal(size=(8, 16, 64)).astype("f")

    def work(n):
        return [layer(x)[0]]
"""
TORCH = """
    import torch
    import fusedlstm.torch
    kinds, order = 2, {order}
    torch.manual_seed(1)
    modules = [fusedlstm.torch.LSTM(3, 5, bidirectional=True), fusedlstm.torch.GRU(3, 5)]
    if BACKEND == "reference":
        modules = [kind(3, 5, bidirectional=both).requires_grad_() for kind, both in
                   ((torch.nn.LSTM, True), (torch.nn.GRU, False))]
        for ours, theirs in zip(OURS["modules"], modules):
            theirs.load_state_dict(ours.state_dict())
    x = torch.linspace(-1, 1, 72).reshape(6, 4, 3)

    def work(n):
        module, given = modules[n % kinds], x.clone().requires_grad_(order > 0)
        if order == 0:
            with torch.no_grad():
                return [module(given)[0].numpy()]
        y = module(given)[0]
        weights = list(module.parameters())
        first = torch.autograd.grad(y.cos().sum(), [given, *weights], create_graph=order > 1)
        if order > 1:
            first += torch.autograd.grad(first[0].square().sum(), [given, *weights])
        return [y.detach().numpy(), *[part.detach().numpy() for part in first]]
"""
HOST = """
    from fusedlstm import host
    kinds = 2
    cells = [fusedlstm.cells.lstm, fusedlstm.cells.rnn_tanh]
    runs = [host.Run(cell, False, True, False, False, False) for cell in cells]
    normal = np.random.default_rng(0).normal
    x = normal(size=(4, 6, 3)).astype("f")

    def work(n):
        n %= kinds
        gates, states = (4, 2) if n == 0 else (1, 1)
        rng = np.random.default_rng(1)
        initial = [rng.normal(size=(4, 5)).astype("f") for _ in range(states)]
        shapes = ((3, 5 * gates), (5, 5 * gates), (5 * gates,))
        weights = [rng.normal(size=shape).astype("f") for shape in shapes]
        if BACKEND == "reference":
            layer = fusedlstm.Recurrent(cells[n], 3, 5, backend=BACKEND, batch_first=True)
            own = [weights[0].T, weights[1].T, weights[2], np.zeros_like(weights[2])]
            layer.load_state_dict(dict(zip(layer.state_dict(), own)))
            state = tuple(part[None] for part in initial)
            return [layer(x, state if states > 1 else state[0])[0]]
        y, *_ = host.forward(runs[n], False, x, *initial, *weights)
        *results, number = host.forward(runs[n], True, x, *initial, *weights)
        seeds = [np.cos(y), *map(np.zeros_like, initial)]
        grads = host.backward(runs[n], True, number, x, *initial, *weights, *seeds)
        assert all(np.isfinite(grad).all() for grad in grads)
        return [y]
"""
WAYS = {
    "arrays": ARRAYS.format(kinds=1, training=False, layers="1"),
    "arrays in training": ARRAYS.format(kinds=1, training=True, layers="2, bidirectional=True"),
    "several cells": ARRAYS.format(kinds=4, training=False, layers="1"),
    "several cells in training": ARRAYS.format(kinds=4, training=True, layers="1"),
    "several threads each": LARGE,
    "PyTorch": TORCH.format(order=0),
    "PyTorch in training": TORCH.format(order=1),
    "second derivatives in PyTorch": TORCH.format(order=2),
    "the host of Keras": HOST,
}

RACE = """
import faulthandler, os, signal, sys, threading, time, warnings
faulthandler.enable()
warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
import numpy as np
import fusedlstm

BACKEND = "cpu"
{way}
THREADS, FORKS = {threads}, {forks}
sys.setswitchinterval(1e-5)
start, results, errors = threading.Barrier(THREADS + (FORKS > 0)), [None] * THREADS, []

def run(n):
    start.wait()
    try:
        results[n] = work(n)
    except BaseException as error:
        errors.append(error)
        raise

threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
[thread.start() for thread in threads]
children = []
if FORKS:
    start.wait()
for n in range(FORKS):
    time.sleep(0.02)
    children.append(os.fork())
    if children[-1] == 0:
        signal.alarm(100)
        np.savez(f"{{sys.argv[1]}}/{{n}}.npz", *work(n))
        os._exit(0)
[thread.join() for thread in threads]
assert not errors
for n, child in enumerate(children):
    assert os.waitpid(child, 0)[1] == 0, "a child did not end well"
    with np.load(f"{{sys.argv[1]}}/{{n}}.npz") as saved:
        results.append(list(saved.values()))
expected = {{}}
for n, result in zip([*range(THREADS), *range(FORKS)], results):
    for ours, others in zip(result, expected.setdefault(n % kinds, result), strict=True):
        np.testing.assert_array_equal(ours, others)

OURS, BACKEND = dict(globals()), "reference"
{way}
for n, result in expected.items():
    for ours, theirs in zip(result, work(n), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
"""


def race(way: str, folder: Any, threads: int, forks: int = 0) -> None:
    """First calls in a fresh process, which must end well, with the right results."""
    script = RACE.format(way=textwrap.dedent(WAYS[way]), threads=threads, forks=forks)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("way", WAYS)
def test_threads_that_call_first_at_once(way: str, threads: int, tmp_path: Any) -> None:
    for _ in range(2):  # kernels are on disk the second time, if not before
        race(way, tmp_path, threads)


@needs_fork
@pytest.mark.parametrize("way", WAYS)
def test_forks_meanwhile(way: str, tmp_path: Any) -> None:
    """Children find nothing half made and no lock held, and make first calls of their own."""
    race(way, tmp_path, threads=2, forks=4)
