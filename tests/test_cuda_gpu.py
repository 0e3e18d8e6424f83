"""The kernels on a GPU at real sizes: pytest tests -m gpu, and -n 8 where pytest-xdist is there.

The first tests tell whether anything works, and end the run if it does not.  Before the others, the kernels
of all tests are compiled on all cores; of workers of pytest-xdist, each compiles what it needs.

With NUMBA_ENABLE_CUDASIM=1 the same tests run in the simulator at tiny sizes, to see that they are ready.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cuda_numba_simulator
import cuda_options
import numpy as np
import pytest
from checks import three_states
from cuda_ahead import compile_all, kernels
from cuda_cases import RUN, Case, actual, arrays, check, expected

import fusedlstm
from fusedlstm import cells
from fusedlstm.benchmarks.machine import cores
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.engine import CUDA
from fusedlstm.kernels.cuda.launch import array_module
from fusedlstm.kernels.cuda.plan import Device
from fusedlstm.kernels.cuda.ptx import SIMULATED

pytestmark = pytest.mark.gpu

FORMS = ("persistent", "stepwise")
PRECISIONS = ("float32", "float64", "tf32", "bfloat16", "float16")
SANITIZER_SECONDS = 100


@pytest.fixture(scope="session")
def all_compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all tests are in the cache on disk."""
    if SIMULATED or "PYTEST_XDIST_WORKER" in os.environ:
        return
    items = [item for item in request.session.items if hasattr(item, "callspec")]
    given = [value for item in items for value in item.callspec.params.values()]
    given = [value for value in given if isinstance(value, Case) or value in cuda_options.OPTIONS]
    given += cuda_numba_simulator.CASES  # of the last tests
    device = launch.current_device()
    compile_all(set().union(*(kernels(value, device) for value in given)), cores())


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """The first tests wait for their own kernels only."""
    if request.node.get_closest_marker("first") is None:
        request.getfixturevalue("all_compiled")


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


def cases(*given: Case) -> pytest.MarkDecorator:
    """A test for each case."""
    return pytest.mark.parametrize("case", [sized(case) for case in given], ids=map(str, given))


# --- Whether anything works --------------------------------------------------------------------------------


@pytest.mark.first
def test_there_is_a_gpu_that_computes() -> None:
    xp = array_module()
    a = np.random.default_rng(0).standard_normal((33, 17), np.float32)
    product = xp.asarray(a) @ xp.asarray(a.T)  # cuBLAS
    np.testing.assert_allclose(product if xp is np else product.get(), a @ a.T, rtol=1e-5, atol=1e-5)
    assert launch.current_device().multiprocessors > 0


@pytest.mark.first
@cases(
    Case(cells.lstm, 3, 5, 4, 17, form="stepwise"),
    Case(cells.lstm, 20, 5, 4, 17, form="persistent"),
    Case(cells.lstm, 20, 5, 4, 33, form="persistent", precision="bfloat16"),
)
def test_the_first_kernels(case: Case) -> None:
    check(case)


# --- All forms, precisions and cells -----------------------------------------------------------------------

SIZES = [(1, 1, 1, 1), (7, 7, 5, 17), (20, 33, 40, 129), (25, 16, 512, 512), (25, 64, 256, 1024)]


@cases(
    *(
        Case(cells.lstm, *sizes, form=form, precision=precision, lengths=True, reset=True)
        for sizes in SIZES
        for form in FORMS
        for precision in PRECISIONS
    )
)
def test_lstm(case: Case) -> None:
    fits = True
    if case.form == "persistent" and not SIMULATED:
        direction = CUDA("float32" if case.precision == "float64" else case.precision)  # type: ignore[arg-type]
        said = direction.prepare(case.cell, arrays(case).weights).explain(case.steps, case.batch, True)
        fits = said["forward"].startswith("persistent") and said["backward"].startswith("persistent")
    if fits:
        check(case)
    else:
        with pytest.raises(ValueError, match="'persistent' cannot run"):
            check(case)


@cases(
    *(
        Case(cell, 12, 20, 40, 200, form=form, **options)
        for cell in RUN
        for form in FORMS
        for options in (
            {"lengths": True, "reset": True, "strided": True},
            {"reverse": True, "bias": False, "accumulate": True},
            {"proj": 72, "lengths": True, "reset": True},
        )
        if not ("proj" in options and cell.unprojectable)
    )
)
def test_every_cell(case: Case) -> None:
    check(case)


@cases(
    *(
        Case(cell, 12, 20, 40, 160, form=form, precision=precision, lengths=True)
        for cell in (cells.gru, cells.rnn_tanh, three_states)
        for precision in ("tf32", "bfloat16", "float16")
        for form in FORMS
    )
)
def test_tensor_cores(case: Case) -> None:
    check(case)


@cases(
    *(
        Case(
            cells.lstm, 50, 33, 64, hidden, proj, precision=precision, form="persistent", lengths=True,
            barrier_every=barrier_every,
        )
        for barrier_every in (1, 2, 8)
        for precision in ("float32", "bfloat16")
        for hidden, proj in ((512, 0), (256, 96))
    )
)  # fmt: skip
def test_exchange(case: Case) -> None:
    """With a barrier every step, and polled in buffers that are used again."""
    check(case)


@cases(
    Case(cells.lstm, 6, 16, 64, 1536, precision="tf32"),
    Case(cells.lstm, 6, 16, 64, 2048, precision="bfloat16"),
)
def test_weights_in_registers(case: Case) -> None:
    check(case)


@cases(*(Case(cells.lstm, 30, 40, 64, 256, form=form, lengths=True) for form in FORMS))
def test_same_bits_every_run(case: Case) -> None:
    """The stepwise form replays a graph from its second run on."""
    given = arrays(case)
    first = actual(case, given)
    for _ in range(5):
        for what, array in actual(case, given).items():
            assert array.tobytes() == first[what].tobytes(), what


@cases(Case(cells.lstm, 3000, 4, 8, 64))
def test_long_sequences(case: Case) -> None:
    check(case)


@cases(Case(cells.lstm, 20, 16, 32, 128))
def test_another_stream_and_several_threads(case: Case) -> None:
    """Every thread has its stream, and nothing waits for the device."""
    xp = array_module()
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


def test_results_lie_on_the_device() -> None:
    xp = array_module()
    y, _, tape = fusedlstm.LSTM(2, 3, backend="cuda").forward(xp.ones((3, 4, 2), np.float32), training=True)
    assert tape is not None
    dx, dstate, gradients = tape.backward(xp.ones_like(y))
    for array in (y, dx, *dstate, *gradients.values()):
        assert type(array) is xp.ndarray


@pytest.mark.parametrize("name", cuda_options.OPTIONS)
def test_an_option_of_the_layers(name: str) -> None:
    cuda_options.check(name, array_module())


# --- Last, since it may take long --------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """No access outside of arrays, and no race in shared memory, in any form."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cuda_numba_simulator.__file__]
    if not SIMULATED:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            pytest.skip("there is no compute-sanitizer on the PATH: it comes with the toolkit of CUDA")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool, and what it runs
            raise
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer refuses this device")
    assert process.returncode == 0, said
