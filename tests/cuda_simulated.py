"""CUDA kernels in simulators; test_cuda_simulated.py runs this file in a process of its own.

By hand: NUMBA_ENABLE_CUDASIM=1 pytest tests/cuda_simulated.py
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_options
import numpy as np
import pytest
from checks import (
    BUILT_IN,
    error,
    five_gates,
    independent,
    name,
    normalized_lstm,
    other_operand,
    three_states,
)
from cuda_ahead import kernels
from cuda_cases import RUN, TOLERANCE, Case, actual, arrays, check, expected
from cuda_simulator import Stuck, concurrent_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda

import fusedlstm
from fusedlstm import cells
from fusedlstm.kernels.cuda import backward, engine, forward, launch, product
from fusedlstm.kernels.cuda import plan as plans
from fusedlstm.kernels.cuda.plan import Device, Plan, choose
from fusedlstm.kernels.cuda.ptx import SIMULATED
from fusedlstm.math import sigmoid, tanh

assert SIMULATED, "set NUMBA_ENABLE_CUDASIM=1"

FORMS = ("persistent", "stepwise")
TENSOR = ("tf32", "bfloat16", "float16")
PLAIN_DEVICE = Device("8 threads a block", (9, 0), 6, 1 << 20, threads=8)
TENSOR_DEVICE = Device("64 threads a block", (9, 0), 6, 1 << 20, threads=64)

LATE = (cells.gru_reset_before, cells.lstm_output_sees_cell, cells.lstm_output_from_memory)


@fusedlstm.cell(gates=("r", "a", "b"), late=("a", "b"))
def two_late(r: Any, a: Any, b: Any, h: Any) -> Any:
    return tanh(b(tanh(a(sigmoid(r) * h))))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths-reset": {"lengths": True, "reset": True, "strided": True},
    "reverse": {"lengths": True, "reset": True, "reverse": True, "accumulate": True},
    "bare": {"bias": False, "initial": False, "reverse": True},
}


def idle(plan: Plan, device: Device, batch: int) -> int:
    """Multiprocessors without a block: with none, more blocks exchange more than speed would have it."""
    return abs(device.multiprocessors - plan.blocks * plan.grid(batch)[1])


@pytest.fixture(autouse=True)
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Six multiprocessors whose blocks run at once; kernels are built anew."""
    monkeypatch.setattr(launch, "simulated_device", PLAIN_DEVICE)
    monkeypatch.setattr(plans, "_clocks", idle)
    launch.kernel.cache_clear()
    with concurrent_blocks():
        yield
    launch.kernel.cache_clear()


def three_blocks(case: Case) -> None:
    """Three blocks or more exchange state in both passes."""
    for direction in (False, True):
        plan = choose(
            launch.simulated_device, case.cell, case.precision, case.hidden, case.proj, case.batch,  # type: ignore[arg-type]
            direction, case.form,  # type: ignore[arg-type]
        )  # fmt: skip
        assert plan.blocks >= 3
        assert plan.threads >= 8


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", RUN, ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_every_cell(form: str, cell: fusedlstm.Cell, options: str) -> None:
    case = Case(cell, 3, 5, 2, 7, form=form, **OPTIONS[options])
    three_blocks(case)
    check(case)


@pytest.mark.sampled(0.12)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", [c for c in RUN if not c.unprojectable], ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_projection(form: str, cell: fusedlstm.Cell, options: str) -> None:
    case = Case(cell, 3, 3, 2, 7, proj=5, form=form, **OPTIONS[options])
    three_blocks(case)
    check(case)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, five_gates, three_states, *LATE], ids=name)
def test_float64(cell: fusedlstm.Cell, form: str) -> None:
    check(Case(cell, 3, 5, 2, 6, precision="float64", form=form, lengths=True, reset=True))


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", TENSOR)
@pytest.mark.parametrize(
    ("cell", "hidden"),
    [
        (cells.lstm, 33),
        (cells.gru, 33),
        (cells.rnn_tanh, 35),
        (three_states, 40),
        (other_operand, 36),
        *((cell, 34) for cell in LATE),
    ],
    ids=name,
)
def test_tensor_cores(
    cell: fusedlstm.Cell, hidden: int, precision: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE)
    case = Case(cell, 2, 9, 3, hidden, precision=precision, form=form, lengths=True, reset=True)
    three_blocks(case)
    check(case)


@pytest.mark.parametrize("precision", TENSOR)
def test_tensor_cores_with_projection(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE)
    check(Case(cells.lstm, 2, 5, 3, 19, proj=7, precision=precision, reverse=True, lengths=True))


@pytest.mark.parametrize("precision", TENSOR)
def test_small_gradients_are_not_lost(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mean over a large batch, say; float16 has no numbers between 0 and 6e-8."""
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE)
    case = Case(cells.lstm, 3, 5, 3, 19, precision=precision)
    given_arrays = arrays(case)
    small = np.float32(1e-9)
    dfinal = tuple(small * d for d in given_arrays.dfinal)
    given_arrays = replace(given_arrays, dy=small * given_arrays.dy, dfinal=dfinal)
    wanted, found = expected(case, given_arrays), actual(case, given_arrays)
    for what in wanted:
        scale = 1e9 if what.startswith(("d", "gradient")) else 1
        assert error(found[what] * scale, wanted[what] * scale) < TOLERANCE[precision], what


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru_reset_before], ids=name)
@pytest.mark.parametrize("precision", ["float32", "float64", *TENSOR])
def test_weights_in_registers(precision: str, cell: fusedlstm.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little shared memory: some weights stay in registers, others do not."""
    device = TENSOR_DEVICE if precision in TENSOR else PLAIN_DEVICE
    # of a cell with a late gate only where a thread has one unit
    batch, hidden = 3, 33 if precision in TENSOR else 11 if cell.late else 19
    chosen = []
    for backwards in (False, True):
        roomy = choose(device, cell, precision, hidden, 0, batch, backwards)  # type: ignore[arg-type]
        few = replace(roomy.recurrent, held=1)
        tight = replace(device, shared=replace(roomy, recurrent=few).shared)
        plan = choose(tight, cell, precision, hidden, 0, batch, backwards)  # type: ignore[arg-type]
        assert 0 < plan.recurrent.held < plan.recurrent.steps or plan.recurrent.steps == 1
        chosen.append(plan)
    monkeypatch.setattr(launch, "simulated_device", device)
    monkeypatch.setattr(engine, "choose", lambda *args: chosen[args[6]])
    check(Case(cell, 2, batch, 3, hidden, precision=precision))


@settings(max_examples=60)
@given(
    cell=st.sampled_from(RUN),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), st.integers(1, 9)),
    proj=st.integers(0, 4),
    flags=st.tuples(*[st.booleans()] * 7),
    form=st.sampled_from(FORMS),
    barrier_every=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_size_and_option(
    cell: fusedlstm.Cell, sizes: Any, proj: int, flags: Any, form: str, barrier_every: int, seed: int
) -> None:
    # float64: where a result is a single number, float32 may lose it to cancellation
    options = ("bias", "lengths", "reset", "reverse", "initial", "strided", "accumulate")
    steps, batch, inputs, hidden = sizes
    if cell.late:
        hidden = min(hidden, 6)  # each thread may keep the numbers of one unit meanwhile
    proj = 0 if cell.unprojectable else min(proj, hidden)
    rest = dict(zip(options, flags))
    check(
        Case(
            cell,
            steps,
            batch,
            inputs,
            hidden,
            proj,
            precision="float64",
            form=form,
            barrier_every=barrier_every,
            seed=seed,
            **rest,
        )
    )


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize(("cell", "proj"), [(cells.lstm, 0), (cells.lstm, 5), (LATE[0], 0), (LATE[2], 0)])
@pytest.mark.parametrize(("form", "barrier_every"), [("persistent", 1), ("persistent", 2), ("stepwise", 1)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_bits_under_any_schedule(
    precision: str,
    form: str,
    barrier_every: int,
    cell: fusedlstm.Cell,
    proj: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE if precision != "float32" else PLAIN_DEVICE)
    options: dict[str, Any] = {"lengths": True, "reset": True, "precision": precision, "form": form}
    case = Case(cell, 3, 5, 2, 11, proj, barrier_every=barrier_every, **options)
    given_arrays = arrays(case)
    results = []
    for seed in range(4):
        with concurrent_blocks(seed):
            results.append(actual(case, given_arrays))
    for result in results[1:]:
        for what, array in result.items():
            assert array.tobytes() == results[0][what].tobytes(), what


# --- Exchange buffers that are polled ---------------------------------------------------------------------


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize("barrier_every", [1, 2, 3])
@pytest.mark.parametrize("proj", [0, 5])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, other_operand, *LATE], ids=name)
def test_buffers_are_used_again(cell: fusedlstm.Cell, proj: int, barrier_every: int) -> None:
    """There are twice as many as `barrier_every`."""
    case = Case(cell, 8, 3, 2, 7, 0 if cell.unprojectable else proj, form="persistent", lengths=True)
    check(replace(case, barrier_every=barrier_every))
    # without padding they are not filled before
    check(replace(case, barrier_every=barrier_every, batch=4, hidden=8, proj=case.proj and 4))


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru_reset_before], ids=name)
@pytest.mark.parametrize("precision", TENSOR)
def test_buffers_are_used_again_on_tensor_cores(
    precision: str, cell: fusedlstm.Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE)
    check(Case(cell, 5, 9, 3, 33, precision=precision, form="persistent", barrier_every=2))


@pytest.mark.parametrize("precision", ["float32", "float64", *TENSOR])
def test_any_nan_may_be_exchanged(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that marks what is not published."""
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE if precision in TENSOR else PLAIN_DEVICE)
    hidden = 33 if precision in TENSOR else 11
    case = Case(cells.lstm, 3, 5, 3, hidden, precision=precision, form="persistent", barrier_every=2)
    given_arrays = arrays(case)
    assert given_arrays.initial is not None
    for state in (given_arrays.initial[0], given_arrays.dfinal[0]):
        state.view(np.uint8)[3, : 5 * state.itemsize] = 0xFF
    wanted, found = expected(case, given_arrays), actual(case, given_arrays)
    for what in wanted:
        np.testing.assert_array_equal(np.isnan(found[what]), np.isnan(wanted[what]), err_msg=what)


@pytest.mark.parametrize("late", [False, True], ids=["projection", "late"])
@pytest.mark.parametrize("module", [forward, backward], ids=lambda module: module.__name__.rpartition(".")[2])
def test_buffers_must_be_made_ready(module: Any, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published some steps ago must not be taken for what is awaited."""
    compiled, withdraw = product.products, []

    def products(plan: Any) -> Any:
        recurrent, inner = compiled(plan)
        inner = inner._replace(withdraw=lambda *args: withdraw.append(args))
        return recurrent if late else recurrent._replace(withdraw=inner.withdraw), inner

    monkeypatch.setattr(module, "products", products)
    assert is_wrong(replace(POLLED, cell=cells.gru_reset_before, proj=0) if late else POLLED)
    assert withdraw


# --- Barriers: each one taken out must show ---------------------------------------------------------------

BARRIER = re.compile(r"^ *(meet\(|cuda\.syncthreads\(\)|while ptx\.load_acquire)", re.MULTILINE)


def barriers(module: Any) -> list[Any]:
    return list(BARRIER.finditer(inspect.getsource(module)))


def without_barrier(module: Any, number: int) -> Any:
    """A copy of a module in which the barrier `number` does nothing."""
    text, found = inspect.getsource(module), barriers(module)[number]
    statement = found.group(1)
    instead = {"meet(": "_nothing(", "cuda.syncthreads()": "pass"}.get(statement, "while False and (1)")
    if statement.startswith("while"):
        text = re.sub(r"while ptx\.load_acquire\(.*\) < expected:", "while False:", text)
    else:
        text = text[: found.start(1)] + instead + text[found.end(1) :]
    copy = ModuleType(f"{module.__name__}_without_barrier")
    copy.__dict__.update({"__package__": module.__package__, "_nothing": lambda *args: None})
    exec(compile(text, module.__file__, "exec"), copy.__dict__)
    return copy


def is_wrong(case: Case) -> bool:
    """Whether some schedule gives wrong results or gets stuck."""
    given_arrays = arrays(case)
    wanted = expected(case, given_arrays)
    # a thread that is late wherever it may be, then some at random
    for seed, straggler in ((0, 0), (0, None), (1, None), (2, None)):
        launch.kernel.cache_clear()
        try:
            with concurrent_blocks(seed, straggler):
                found = actual(case, given_arrays)
        except Stuck:
            return True
        if any(not np.allclose(found[what], wanted[what], atol=1e-4) for what in wanted):
            return True
    return False


@cache
def is_right(device: Device, case: Case) -> bool:
    """Without anything taken out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "simulated_device", device)
        return not is_wrong(case)


MET = Case(cells.lstm, 4, 5, 2, 7, proj=5, form="persistent", barrier_every=1)
POLLED = replace(MET, steps=7, barrier_every=2)
# for blocks of two warps, of which one polls nothing that its own block publishes
OWN = Case(cells.rnn_tanh, 2, 1, 1, 36, form="persistent", barrier_every=4)


@pytest.mark.parametrize(
    ("module", "number"),
    [(module, n) for module in (forward, backward) for n in range(len(barriers(module)))],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_each_barrier_of_a_kernel_is_needed(
    module: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = without_barrier(module, number)
    monkeypatch.setitem(sys.modules, copy.__name__, copy)  # where the simulator finds it
    two_warps = replace(TENSOR_DEVICE, multiprocessors=3)
    tried = [
        (PLAIN_DEVICE, MET),
        (PLAIN_DEVICE, POLLED),
        (two_warps, OWN),
        (two_warps, replace(OWN, proj=36)),
    ]
    for device, case in tried:
        monkeypatch.setattr(launch, "simulated_device", device)
        with monkeypatch.context() as spoilt:
            spoilt.setattr(module, "build", copy.build)
            wrong = is_wrong(case)
        if wrong:
            assert is_right(device, case)
            return
    pytest.fail(f"{module.__name__} is right without {barriers(module)[number].group()}")


@pytest.mark.parametrize("case", [MET, POLLED], ids=["met", "polled"])
@pytest.mark.parametrize("number", range(len(barriers(product))))
def test_each_barrier_of_the_grid_barrier_is_needed(
    number: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = without_barrier(product, number)
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    for module in (forward, backward):
        monkeypatch.setattr(module, "meet", copy.meet)
    assert is_wrong(case)


def test_persistent_kernels_have_all_barriers() -> None:
    """The tests above take out what this finds.  A kernel has two products: before each, all blocks meet, or
    the threads of a block do; after each, these do."""
    for module in (forward, backward):
        found = [match.group(1) for match in barriers(module)]
        assert (found.count("meet("), found.count("cuda.syncthreads()")) == (2, 4)
    assert len(barriers(product)) == 3


# --- Values and errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", [c for c in BUILT_IN if c in RUN], ids=name)
def test_nan_and_infinity_come_out_as_in_the_reference(cell: fusedlstm.Cell, form: str) -> None:
    case = Case(cell, 3, 4, 2, 5, form=form)
    given_arrays = arrays(case)
    given_arrays.x[1, 0, 0] = np.nan
    given_arrays.x[1, 1, 0] = np.inf
    given_arrays.x[1, 2, 0] = -np.inf
    with np.errstate(all="ignore"):
        wanted, found = expected(case, given_arrays), actual(case, given_arrays)
    for what in ("y", "final 0"):
        np.testing.assert_array_equal(np.isnan(found[what]), np.isnan(wanted[what]))
        np.testing.assert_allclose(found[what], wanted[what], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        Case(cells.gru_reset_before, 3, 4, 2, 5, lengths=True, reverse=True),
        Case(cells.lstm, 3, 4, 2, 5, proj=3, lengths=True),
    ],
    ids=str,
)
def test_nan_beyond_the_end_of_a_sequence_is_not_seen(case: Case) -> None:
    given_arrays = arrays(case)
    assert given_arrays.lengths is not None
    given_arrays.lengths[:2] = 3, 1
    given_arrays.x[np.arange(3)[:, None] >= given_arrays.lengths] = np.nan
    wanted, found = expected(case, given_arrays), actual(case, given_arrays)
    for what in wanted:
        np.testing.assert_allclose(found[what], wanted[what], rtol=1e-4, atol=1e-5, err_msg=what)


@pytest.mark.parametrize("form", FORMS)
def test_inference_gives_the_bits_of_training(form: str) -> None:
    case = Case(cells.gru, 3, 5, 2, 7, form=form)
    given_arrays = arrays(case)
    direction = engine.CUDA(form=form).prepare(case.cell, given_arrays.weights)  # type: ignore[arg-type]
    results = []
    for training in (True, False):
        y, final = np.full_like(given_arrays.dy, np.nan), (np.full((5, 7), np.nan, np.float32),)
        args = (given_arrays.x, given_arrays.initial, y, final, None, None, False, training)
        assert (direction.forward(*args) is None) != training
        results.append((y, final[0]))
    for with_tape, without in zip(*results):
        np.testing.assert_array_equal(with_tape, without)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("lengths", [[0, 3, 0, 2, 1], [0] * 5], ids=["some", "all"])
@pytest.mark.parametrize("proj", [0, 5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_empty_sequences(form: str, proj: int, lengths: list[int], reverse: bool) -> None:
    """Their outputs are zero, their final state is the initial one, as is its gradient."""
    case = Case(three_states, 3, 5, 2, 7, proj, form=form, reverse=reverse, lengths=True, reset=True)
    given_arrays = replace(arrays(case), lengths=np.array(lengths))
    wanted, found = expected(case, given_arrays), actual(case, given_arrays)
    for what in wanted:
        assert error(found[what], wanted[what]) < 2 * TOLERANCE["float32"], what
    empty = given_arrays.lengths == 0
    assert (found["y"][:, empty] == 0).all()
    assert (found["dx"][:, empty] == 0).all()
    assert given_arrays.initial is not None
    for n, (state, gradient) in enumerate(zip(given_arrays.initial, given_arrays.dfinal)):
        assert np.array_equal(found[f"final {n}"][empty], state[empty])
        assert np.array_equal(found[f"dinitial {n}"][empty], gradient[empty])


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=str)
def test_no_steps_or_no_sequences(shape: tuple[int, int]) -> None:
    layer = fusedlstm.LSTM(4, 7, 2, bidirectional=True, backend="cuda", seed=1)
    state = tuple(np.full((4, shape[1], 7), value, np.float32) for value in (1, 2))
    y, final, tape = layer.forward(np.zeros((*shape, 4), np.float32), state, training=True)
    assert tape is not None
    dx, dstate, grads = tape.backward(y, final)
    assert (y.shape, dx.shape) == ((*shape, 14), (*shape, 4))
    assert all(np.array_equal(a, b) for a, b in zip((*final, *dstate), (*state, *state)))
    assert not any(gradient.any() for gradient in grads.values())


def test_a_tape_may_be_used_again() -> None:
    case = Case(cells.peephole_lstm, 3, 5, 2, 7, lengths=True, reset=True)
    given_arrays = arrays(case)
    direction = engine.CUDA().prepare(case.cell, given_arrays.weights)
    y = np.empty_like(given_arrays.dy)
    final = tuple(np.empty_like(d) for d in given_arrays.dfinal)
    tape = direction.forward(
        given_arrays.x, given_arrays.initial, y, final, given_arrays.lengths, given_arrays.reset, False, True
    )
    results = []
    for _ in range(2):
        dx = np.empty_like(given_arrays.x)
        direction.backward(tape, given_arrays.dy, given_arrays.dfinal, dx, False)
        results.append(dx)
    np.testing.assert_array_equal(*results)
    with_dx, without = (
        direction.backward(tape, given_arrays.dy, given_arrays.dfinal, wanted, False) for wanted in (dx, None)
    )
    np.testing.assert_array_equal(with_dx[1].hh, without[1].hh)


@pytest.mark.parametrize(
    "wanted",
    [
        Case(cells.lstm, 3, 5, 2, 7, lengths=True, reset=True, form="persistent"),
        Case(three_states, 3, 3, 2, 7, proj=5, reverse=True, form="stepwise"),
        "projection-both-directions",
        "gru-reset-before",
        "recurrent-dropout",
    ],
    ids=str,
)
def test_what_is_launched_is_known_ahead(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests on a GPU compile these beforehand."""
    launched = set()
    monkeypatch.setattr(engine, "kernel", lambda *given: launched.add(given) or launch.kernel(*given))
    (check if isinstance(wanted, Case) else cuda_options.check)(wanted)
    monkeypatch.undo()
    monkeypatch.setattr(plans, "_clocks", idle)
    assert launched == kernels(wanted, PLAIN_DEVICE)
    assert {plan.backward for _, plan, *_ in launched} == {False, True}


def test_layers_run_on_it() -> None:
    """Two layers, two directions, lengths and reset, through the public interface."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 4)).astype(np.float32)
    dy = rng.standard_normal((3, 5, 14)).astype(np.float32)
    options = {"lengths": [3, 1, 2, 3, 2], "reset": rng.random((3, 5)) < 0.3, "training": True}
    results = []
    for backend in ("cuda", "reference"):
        layer = fusedlstm.LSTM(4, 7, 2, bidirectional=True, backend=backend, seed=1)
        y, state, tape = layer.forward(x, **options)
        assert tape is not None
        dx, dstate, grads = tape.backward(dy)
        results.append([y, *state, dx, *dstate, *grads.values()])
    for found, wanted in zip(*results):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"precision": "tf32"}, {"form": "stepwise"}])
def test_a_layer_runs_in_the_precision_and_form_that_it_was_built_with(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4)).astype("f4")
    layer = fusedlstm.LSTM(4, 7, backend="cuda", seed=1, **options)
    (said,) = fusedlstm.explain(layer, x).places.values()
    assert all(value in said["forward"] for value in options.values())
    truth, _ = fusedlstm.LSTM(4, 7, backend="reference", seed=1)(x)
    error = np.linalg.norm(layer(x)[0] - truth) / np.linalg.norm(truth)
    assert error < 1e-3
    assert (error > 1e-6) == ("precision" in options)


def test_explain_says_which_kernel_and_why() -> None:
    weights = arrays(Case(cells.lstm, 1, 5, 2, 7)).weights
    said = engine.CUDA().prepare(cells.lstm, weights).explain(3, 5, True)
    assert said["forward"].startswith("persistent, float32: 3 x 2 blocks keep all weights in shared memory")
    assert "3 x 2 blocks of 8 threads" in said["backward launch"]
    said = engine.CUDA(form="stepwise").prepare(cells.lstm, weights).explain(3, 5, False)
    assert said["forward"] == "stepwise, float32: asked for"
    assert "backward" not in said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: engine.CUDA("int8"), "precision must be"),  # type: ignore[arg-type]
        (lambda: engine.CUDA(form="fast"), "form must be"),  # type: ignore[arg-type]
        (lambda: actual(case := Case(cells.gru, 1, 1, 1, 3, proj=2), arrays(case)), "reads its own output"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (normalized_lstm, "normalized_lstm: it takes means over the hidden units"),
        (independent, "independent: it has no gate whose recurrent weights multiply a state"),
        (two_late, "two_late: it has several late gates, 'a', 'b', and kernels have one product within"),
    ],
    ids=name,
)
def test_a_cell_without_kernels_is_refused(cell: fusedlstm.Cell, message: str) -> None:
    weights = arrays(Case(cell, 1, 1, 1, 3)).weights
    with pytest.raises(ValueError, match=f"backend 'cuda' has no kernels for cell {message}"):
        engine.CUDA().prepare(cell, weights)


def test_what_a_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "simulated_device", replace(PLAIN_DEVICE, cooperative=False))
    with pytest.raises(ValueError, match="'persistent' cannot run with H=7, B=5: blocks cannot wait"):
        check(Case(cells.lstm, 1, 5, 1, 7, form="persistent"))
    monkeypatch.setattr(launch, "simulated_device", replace(PLAIN_DEVICE, shared=64))
    with pytest.raises(ValueError, match="no tile keeps all weights on the chip"):
        check(Case(cells.lstm, 1, 5, 1, 7, form="persistent"))
    monkeypatch.setattr(launch, "simulated_device", replace(PLAIN_DEVICE, capability=(7, 5)))
    with pytest.raises(ValueError, match=r"'tf32' needs a GPU of compute capability 8\.0"):
        check(Case(cells.lstm, 1, 5, 1, 7, precision="tf32"))


def test_the_benchmark_for_gpus_is_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both contenders run and are right; nothing is timed in a simulator."""
    from fusedlstm.benchmarks import gpu, gpu_report

    monkeypatch.setattr(launch, "simulated_device", TENSOR_DEVICE)
    record = gpu.run(["deepbench_train_lstm"], gpu.PRECISIONS, tmp_path / "record.json")
    assert record["simulated"]
    assert [row["precision"] for row in record["rows"]] == list(gpu.PRECISIONS)
    for row in [*record["rows"], *gpu.run(["gru"], ["bfloat16"], None)["rows"]]:
        assert row["fusedlstm"]["forward"] is None
        assert len(row["fusedlstm"]["errors"]) == 7
        assert max(row["cudnn"]["errors"].values()) < 1e-5
    assert len(gpu_report.table(record).splitlines()) == 4 + len(record["rows"])


# --- The simulator itself ---------------------------------------------------------------------------------


def test_the_simulator_finds_divergence() -> None:
    @cuda.jit
    def diverging() -> None:
        if cuda.threadIdx.x == 0:
            cuda.syncthreads()
        else:
            cuda.syncwarp()

    with pytest.raises(Stuck, match="in block 1"):
        diverging[2, 8]()


def test_the_simulator_finds_polling_in_vain() -> None:
    @cuda.jit
    def waiting(flag: Any) -> None:
        while flag[0] == 0:
            cuda.nanosleep(1)

    with pytest.raises(Stuck, match="in block 1"):
        waiting[2, 8](np.zeros(1, np.uint64))


def test_the_simulator_runs_blocks_at_once() -> None:
    @cuda.jit
    def in_turns(turn: Any, order: Any) -> None:
        for n in range(3):
            while turn[0] != 2 * n + cuda.blockIdx.x:
                cuda.nanosleep(1)
            order[2 * n + cuda.blockIdx.x] = cuda.blockIdx.x
            turn[0] += 1

    order = np.full(6, -1)
    in_turns[2, 1](np.zeros(1, np.int64), order)
    assert order.tolist() == [0, 1, 0, 1, 0, 1]


def test_the_simulator_exchanges_values_of_a_warp() -> None:
    @cuda.jit
    def reverse(x: Any, out: Any) -> None:
        out[cuda.threadIdx.x] = cuda.shfl_xor_sync(0xFFFFFFFF, x[cuda.threadIdx.x], 31)

    x, out = np.arange(64), np.zeros(64, int)
    reverse[1, 64](x, out)
    np.testing.assert_array_equal(out, x ^ 31)
