"""The kernels on a GPU at real sizes: pytest tests -m gpu

With NUMBA_ENABLE_CUDASIM=1 the same tests run in the simulator at tiny sizes, to see that they are ready.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import ALL, name, three_states
from cuda_cases import Case, actual, arrays, check, expected

import fusedlstm
from fusedlstm import cells
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.engine import CUDA
from fusedlstm.kernels.cuda.launch import array_module
from fusedlstm.kernels.cuda.plan import Device
from fusedlstm.kernels.cuda.ptx import SIMULATED

pytestmark = pytest.mark.gpu

FORMS = ("persistent", "stepwise")
PRECISIONS = ("float32", "float64", "tf32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU, blocks that run at once."""
    if not SIMULATED:
        yield
        return
    from cuda_simulator import concurrent_blocks

    monkeypatch.setattr(launch, "simulated_device", Device("64 threads", (9, 0), 6, 1 << 20, threads=64))
    with concurrent_blocks():
        yield


def sized(case: Case) -> Case:
    """The case, or in a simulator a tiny one with its options."""
    if not SIMULATED:
        return case
    proj = min(case.proj, 7)
    return replace(case, steps=2, batch=min(case.batch, 5), inputs=3, hidden=min(case.hidden, 18), proj=proj)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (7, 7, 5, 17), (20, 33, 40, 129), (25, 16, 512, 512), (25, 64, 256, 1024)],
    ids=lambda sizes: "T{}-B{}-I{}-H{}".format(*sizes),
)
def test_lstm(sizes: tuple[int, int, int, int], form: str, precision: str) -> None:
    case = sized(Case(cells.lstm, *sizes, form=form, precision=precision, lengths=True, reset=True))
    fits = True
    if form == "persistent" and not SIMULATED:
        direction = CUDA("float32" if precision == "float64" else precision)  # type: ignore[arg-type]
        said = direction.prepare(case.cell, arrays(case).weights).explain(case.steps, case.batch, True)
        fits = said["forward"].startswith("persistent") and said["backward"].startswith("persistent")
    if fits:
        check(case)
    else:
        with pytest.raises(ValueError, match="'persistent' cannot run"):
            check(case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ALL, ids=name)
def test_every_cell(cell: fusedlstm.Cell, form: str) -> None:
    check(sized(Case(cell, 12, 20, 40, 200, form=form, lengths=True, reset=True, strided=True)))
    check(sized(Case(cell, 12, 20, 40, 200, form=form, reverse=True, bias=False, accumulate=True)))
    if not cell.unprojectable:
        check(sized(Case(cell, 12, 20, 40, 200, proj=72, form=form, lengths=True, reset=True)))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", [cells.gru, cells.rnn_tanh, three_states], ids=name)
def test_tensor_cores(cell: fusedlstm.Cell, precision: str) -> None:
    for form in FORMS:
        check(sized(Case(cell, 12, 20, 40, 160, form=form, precision=precision, lengths=True)))


@pytest.mark.parametrize("barrier_every", [1, 2, 8])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exchange(precision: str, barrier_every: int) -> None:
    """With a barrier every step, and polled in buffers that are used again."""
    case = Case(cells.lstm, 50, 33, 64, 512, precision=precision, form="persistent", lengths=True)
    check(sized(replace(case, barrier_every=barrier_every)))
    check(sized(replace(case, barrier_every=barrier_every, hidden=256, proj=96)))


def test_weights_in_registers() -> None:
    check(sized(Case(cells.lstm, 6, 16, 64, 1536, precision="tf32")))
    check(sized(Case(cells.lstm, 6, 16, 64, 2048, precision="bfloat16")))


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_every_run(form: str) -> None:
    """The stepwise form replays a graph from its second run on."""
    case = sized(Case(cells.lstm, 30, 40, 64, 256, form=form, lengths=True))
    given = arrays(case)
    first = actual(case, given)
    for _ in range(5):
        for what, array in actual(case, given).items():
            assert array.tobytes() == first[what].tobytes(), what


def test_long_sequences() -> None:
    check(sized(Case(cells.lstm, 3000, 4, 8, 64)))


def test_another_stream_and_several_threads() -> None:
    """Every thread has its stream, and nothing waits for the device."""
    xp = array_module()
    case = sized(Case(cells.lstm, 20, 16, 32, 128))
    given = arrays(case)
    wanted = expected(case, given)["y"]
    direction = CUDA().prepare(case.cell, given.weights)
    results: list[Any] = []

    def run() -> None:
        x, initial = xp.asarray(given.x), tuple(map(xp.asarray, given.initial))
        y, final = xp.empty(given.dy.shape, x.dtype), tuple(xp.empty_like(s) for s in initial)
        direction.forward(x, initial, y, final, None, None, False, False)
        results.append(y if xp is np else y.get())

    def threaded() -> None:
        with xp.cuda.Stream(non_blocking=True) as stream:
            run()
            stream.synchronize()

    if xp is np:  # the simulator runs one kernel at a time
        run()
    else:
        threads = [threading.Thread(target=threaded) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
    for y in results:
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_layers_take_arrays_on_the_device() -> None:
    xp = array_module()
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((3, 5, 4), np.float32), rng.standard_normal((3, 5, 14), np.float32)
    layer = fusedlstm.LSTM(4, 7, 2, bidirectional=True, backend="cuda", seed=1)
    y, _, tape = layer.forward(xp.asarray(x), training=True)
    assert type(y) is xp.ndarray
    assert tape is not None
    dx, _, grads = tape.backward(xp.asarray(dy))
    same = fusedlstm.LSTM(4, 7, 2, bidirectional=True, backend="reference", seed=1)
    wanted, _, tape = same.forward(x, training=True)
    assert tape is not None
    dx_wanted, _, grads_wanted = tape.backward(dy)
    host = (lambda array: array) if xp is np else xp.asnumpy
    np.testing.assert_allclose(host(y), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(host(dx), dx_wanted, rtol=1e-4, atol=1e-5)
    for key, gradient in grads.items():
        np.testing.assert_allclose(host(gradient), grads_wanted[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """No access outside of arrays, and no race in shared memory, in any form."""
    file = Path(__file__).with_name("cuda_numba_simulator.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    if not SIMULATED:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
