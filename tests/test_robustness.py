"""Layers on the CPU engine under threads, forks, many calls, and any number of threads of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest
from checks import assert_close

import fusedlstm
from fusedlstm import GRU, LSTM, Recurrent, cells

SHAPE = (12, 9, 20)  # T, B, I


def python(script: str, **environment: str) -> str:
    """What a fresh Python process prints, which must end well."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def results(layer: Recurrent, x: np.ndarray) -> list[np.ndarray]:
    """Outputs, states and all gradients."""
    y, state, tape = layer.forward(x, training=True, draw=0)
    assert tape is not None
    dx, dstate, grads = tape.backward(np.cos(y), state)
    parts = [part if isinstance(part, tuple) else (part,) for part in (state, dstate)]
    return [y, *parts[0], dx, *parts[1], *grads.values()]


def inputs(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.normal(size=SHAPE).astype(np.float32) for _ in range(count)]


def together(count: int, work: Any) -> None:
    """Call work(n) in `count` threads that start at once; an exception in one is raised here."""
    start, errors = threading.Barrier(count), []

    def run(n: int) -> None:
        try:
            start.wait()
            work(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@pytest.mark.parametrize("layer_class", [LSTM, GRU])
def test_eight_threads_call_one_layer(layer_class: Any) -> None:
    layer = layer_class(20, 40, 2, bidirectional=True, dropout=0.5, backend="cpu", seed=1)
    truth = layer_class(20, 40, 2, bidirectional=True, dropout=0.5, backend="reference", seed=1)
    xs = inputs(8)
    expected = [results(truth, x) for x in xs]

    def work(n: int) -> None:
        for _ in range(5):
            for ours, theirs in zip(results(layer, xs[n]), expected[n]):
                assert_close(ours, theirs, SHAPE[0], gradient=True)

    together(8, work)


def test_weights_are_replaced_while_others_call() -> None:
    """Every call sees one set of weights, whole."""
    layers = [LSTM(20, 40, backend="cpu", seed=seed) for seed in (1, 2)]
    (x,) = inputs(1)
    possible = [layer(x)[0] for layer in layers]
    states = [layer.state_dict() for layer in layers]
    layer = layers[0]
    seen: set[int] = set()

    def work(n: int) -> None:
        for call in range(100):
            if n == 0:
                layer.load_state_dict(states[call % 2])
            else:
                y = layer(x)[0]
                close = [np.allclose(y, one, rtol=1e-5, atol=1e-6) for one in possible]
                assert sum(close) == 1
                seen.add(close.index(True))

    together(5, work)
    assert seen == {0, 1}


FORK = """
    import os, sys
    {first}
    import numpy as np
    import fusedlstm

    layer = fusedlstm.LSTM(20, 40, 2, backend="cpu", seed=1)
    x = np.ones((12, 9, 20), np.float32)

    def run():
        y, state, tape = layer.forward(x, training=True)
        return [y, *state, *tape.backward(np.ones_like(y))[2].values()]

    {use}
    expected = run()
    pid = os.fork()
    same = all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for _ in range(20) for a, b in zip(run(), expected))
    if pid == 0:
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert same
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("threads", ["1", "2", "4"])
@pytest.mark.parametrize("first", ["", "import torch"], ids=["alone", "torch"])
def test_a_forked_child_after_use(first: str, threads: str) -> None:
    use = "torch.ones(300, 300) @ torch.ones(300, 300)" if first else ""
    python(FORK.format(first=first, use=use), OMP_NUM_THREADS=threads)


WRITTEN = """
    import threading
    import numpy as np
    import fusedlstm

    layer = fusedlstm.RNN(2, 8, 4, backend="cpu", seed=0)
    x, lengths, done = np.zeros((500, 3, 2), "f4"), np.full(3, 500), threading.Event()

    def write():
        while not done.is_set():
            lengths[:] = 10_000_000
            done.wait(1e-4)
            lengths[:] = 500
            done.wait(1e-4)

    thread = threading.Thread(target=write)
    thread.start()
    passed = 0
    while passed < 100:
        try:
            layer(x, lengths=lengths)
            passed += 1
        except ValueError:
            pass
    done.set()
    thread.join()
"""


def test_lengths_that_are_written_while_the_layer_runs() -> None:
    """Lengths that reach far beyond the arrays; a call has taken what it has checked."""
    python(WRITTEN)


GROWTH = """
    import gc, os
    import numpy as np
    import fusedlstm

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    layer = fusedlstm.LSTM(16, 32, 2, bidirectional=True, dropout=0.5, backend="cpu", seed=1)
    x = np.ones((20, 4, 16), np.float32)

    def calls(count):
        for n in range(count):
            layer(x[: 1 + n % 20], lengths=[1, 1, 1, 1])
            y, state, tape = layer.forward(x, training=True)
            tape.backward(y, state)
            layer.weight_hh_l0 = layer.weight_hh_l0

    calls(200)
    before = resident()
    calls(2000)
    print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not tell")
def test_two_thousand_calls_do_not_grow() -> None:
    """One call in training allocates 200 KB; 2,000 must not leave even 1 KB each behind."""
    assert int(python(GROWTH)) < 2_000_000


BITS = """
    import hashlib
    import numpy as np
    import fusedlstm

    x = np.random.default_rng(1).normal(size={size}).astype(np.float32)
    for threads in (1, 2, 3) * 6:
        fusedlstm.set_num_threads(threads)
        layer = fusedlstm.{layer}(33, {hidden}, 2, bidirectional=True, dropout=0.5, backend="cpu", seed=1)
        y, state, tape = layer.forward(x, lengths=np.arange({batch}) + 4, training=True, draw=3)
        dx, dstate, grads = tape.backward(y, state)
        digest = hashlib.sha256()
        for array in (y, *state, dx, *dstate, *grads.values()):
            digest.update(np.ascontiguousarray(array))
        print(digest.hexdigest())
"""


@pytest.mark.parametrize(("batch", "hidden"), [(1, 300), (13, 65)])
@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_same_seed_same_bits(layer: str, batch: int, hidden: int) -> None:
    """In every run of every process, and however many threads come: fewer may than were asked for."""
    script = BITS.format(layer=layer, batch=batch, hidden=hidden, size=(17, batch, 33))
    assert len({*python(script).split(), *python(script).split()}) == 1


def own_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Set the number of threads for one test."""
    from fusedlstm.kernels.cpu import team

    monkeypatch.setattr(team, "_requested", None)  # put back afterwards
    monkeypatch.setattr(team, "_team", None)
    fusedlstm.set_num_threads(threads)


def test_the_number_of_threads_counts_for_layers_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LSTM(64, 512, backend="cpu"), np.ones((20, 16, 64), np.float32)
    said = []
    for threads in (1, 2, 1):
        own_threads(monkeypatch, threads)
        layer(x)
        said.append(fusedlstm.explain(layer, x).places["layer 0"]["threads"].split()[0])
    assert said == ["1", "2", "1"]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.peephole_lstm], ids=lambda cell: cell.name)
def test_any_number_of_threads(cell: cells.Cell, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own_threads(monkeypatch, threads)
    for batch, hidden in ((1, 300), (5, 70), (40, 33)):
        layer, truth = (Recurrent(cell, 20, hidden, backend=b, seed=1) for b in ("cpu", "reference"))
        x = np.random.default_rng(1).normal(size=(6, batch, 20)).astype(np.float32)
        for ours, theirs in zip(results(layer, x), results(truth, x)):
            assert_close(ours, theirs, 6, gradient=True)


def test_more_steps_than_sixteen_bits_count() -> None:
    layer = GRU(1, 3, backend="cpu", seed=1)
    x = np.random.default_rng(1).normal(size=(70_000, 1, 1)).astype(np.float32)
    y, h = layer(x)
    middle, state = layer(x[:40_000])
    end, last = layer(x[40_000:], state)
    assert_close(y, np.concatenate([middle, end]), 1)
    assert_close(h, last, 1)
