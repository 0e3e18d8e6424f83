"""The compiled kernels, executed: each form, precision, pass, cell and option once, on ptx_machine.py.

Each test is handed to a worker of pytest-xdist by itself, since compiling takes most of its time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import cuda_stand_in
import numpy as np
import pytest
from checks import five_gates, other_operand, three_states
from cuda_cases import TOLERANCE, Case, actual, arrays, error, expected
from cuda_executed import executed
from ptx_memory import Fault

import fusedlstm
from fusedlstm import cells
from fusedlstm.kernels.cuda import engine
from fusedlstm.kernels.cuda import plan as plans
from fusedlstm.kernels.cuda.plan import Device, Plan, choose
from fusedlstm.kernels.cuda.resources import DEVICES

SMALL = Device("6 multiprocessors", (9, 0), 6, 227 * 1024, threads=64)
H200 = DEVICES["sm_90"]
FORMS: dict[str, dict[str, Any]] = {
    "polled": {"form": "persistent"},
    "met": {"form": "persistent", "barrier_every": 1},
    "stepwise": {"form": "stepwise"},
}
ENDS: dict[str, Any] = {"lengths": True, "reset": True, "strided": True}


def case(cell: fusedlstm.Cell, *sizes: int, **options: Any) -> Case:
    return Case(cell, *sizes, **{**ENDS, **options})


def idle(plan: Plan, device: Device, batch: int) -> int:
    """Multiprocessors without a block: with none, more blocks exchange more than speed would have it."""
    return abs(device.multiprocessors - plan.blocks * plan.grid(batch)[1])


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_clocks", idle)


def check(given: Case, device: Device = SMALL, seeds: tuple[int | None, ...] = (None, 1)) -> None:
    """Under each schedule nothing is reported, results are right, and their bits are the same."""
    data = arrays(given)
    wanted, limit = expected(given, data), TOLERANCE[given.precision]
    if given.precision in ("float32", "float64"):
        limit *= np.sqrt(given.steps)
    first: dict[str, Any] = {}
    for seed in seeds:
        with executed(device, seed):
            found = actual(given, data)
        first = first or found
        for what in wanted:
            assert error(found[what], wanted[what]) <= limit, what
            assert found[what].tobytes() == first[what].tobytes(), f"{what} has other bits with seed {seed}"


# --- Each once, at a small size ---------------------------------------------------------------------------


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize(
    ("precision", "form"),
    [(precision, form) for precision in plans.PRECISIONS for form in ("polled", "stepwise")]
    + [("float32", "met"), ("bfloat16", "met")],
)
@pytest.mark.usefixtures("many_blocks")
def test_every_form_and_precision(precision: str, form: str) -> None:
    tensor = precision in plans.TENSOR_CORES
    sizes = (3, 9, 3, 33) if tensor else (3, 5, 2, 7)
    check(case(cells.lstm, *sizes, precision=precision, **FORMS[form]))


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize(
    ("cell", "form"),
    [
        (cells.gru, "polled"),
        (cells.rnn_tanh, "stepwise"),
        (cells.peephole_lstm, "stepwise"),
        (three_states, "polled"),
        (five_gates, "stepwise"),
        (other_operand, "polled"),
        (cells.gru_reset_before, "polled"),
        (cells.gru_reset_before, "stepwise"),
        (cells.lstm_output_sees_cell, "polled"),
        (cells.lstm_output_from_memory, "stepwise"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.usefixtures("many_blocks")
def test_every_kind_of_cell(cell: fusedlstm.Cell, form: str) -> None:
    check(case(cell, 3, 5, 2, 7, **FORMS[form]))


@pytest.mark.sampled(0.17)
@pytest.mark.parametrize(
    ("precision", "form", "sizes"),
    [
        ("float32", "polled", (3, 3, 2, 7, 5)),
        ("float32", "met", (3, 3, 2, 7, 5)),
        ("float32", "stepwise", (3, 3, 2, 7, 5)),
        ("float64", "polled", (3, 3, 2, 7, 5)),
        ("bfloat16", "polled", (3, 5, 3, 19, 7)),
        ("tf32", "stepwise", (3, 5, 3, 19, 7)),
    ],
)
@pytest.mark.usefixtures("many_blocks")
def test_projection(precision: str, form: str, sizes: tuple[int, ...]) -> None:
    check(case(cells.lstm, *sizes, precision=precision, **FORMS[form]))


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize(
    ("cell", "precision", "form", "hidden"),
    [
        (cells.gru_reset_before, "float32", "met", 6),
        (cells.gru_reset_before, "bfloat16", "polled", 34),
        (cells.lstm_output_from_memory, "tf32", "stepwise", 34),
        (cells.gru, "float16", "polled", 33),
        (cells.recurrent_dropout(cells.lstm), "bfloat16", "polled", 34),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.usefixtures("many_blocks")
def test_other_cells_on_tensor_cores_and_with_barriers(
    cell: fusedlstm.Cell, precision: str, form: str, hidden: int
) -> None:
    check(case(cell, 3, 9, 3, hidden, precision=precision, **FORMS[form]))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lengths": False, "reset": False, "strided": False},
    "reverse": {"reverse": True, "accumulate": True},
    "bare": {"bias": False, "initial": False, "reset": False, "reverse": True},
}


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("form", ["polled", "stepwise"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("many_blocks")
def test_every_option(options: str, form: str) -> None:
    check(case(cells.lstm, 3, 5, 2, 7, **OPTIONS[options], **FORMS[form]))


@pytest.mark.parametrize("form", ["polled", "stepwise"])
@pytest.mark.usefixtures("many_blocks")
def test_inference(form: str) -> None:
    """Through the layers, in both directions, with what launch.py keeps from call to call."""
    x = np.random.default_rng(0).uniform(-1, 1, (3, 5, 4)).astype("f4")
    options: dict[str, Any] = {"bidirectional": True, "seed": 1}
    truth, _ = fusedlstm.LSTM(4, 7, backend="reference", **options)(x)
    with executed(SMALL, 2) as cupy:
        layer = fusedlstm.LSTM(4, 7, backend="cuda", form=FORMS[form]["form"], **options)
        for _ in range(2):  # the second time from a graph
            y, _ = layer(cupy.asarray(x))
            assert type(y) is cupy.ndarray
            np.testing.assert_allclose(y.get(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize(
    ("cell", "precision", "sizes"),
    [
        (cells.lstm, "float32", (9, 5, 2, 7)),
        (cells.lstm, "bfloat16", (9, 9, 3, 33)),
        (cells.gru_reset_before, "float32", (9, 4, 2, 8)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.usefixtures("many_blocks")
def test_buffers_are_used_again(cell: fusedlstm.Cell, precision: str, sizes: tuple[int, ...]) -> None:
    """There are four, with a barrier every second step."""
    check(case(cell, *sizes, precision=precision, form="persistent", barrier_every=2), seeds=(None, 1, 2))


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize(
    ("precision", "sizes"),
    [("float32", (3, 1, 3, 32)), ("float64", (3, 2, 3, 32)), ("bfloat16", (3, 33, 3, 64))],
)
def test_batches_of_another_width(precision: str, sizes: tuple[int, ...]) -> None:
    """Vectors that are loaded number by number, in pairs, and several blocks along the batch."""
    check(case(cells.lstm, *sizes, precision=precision))


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize(
    ("cell", "precision", "sizes"),
    [(cells.lstm, "float32", (2, 3, 3, 19)), (cells.gru, "bfloat16", (2, 3, 3, 33))],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.usefixtures("many_blocks")
def test_weights_in_registers(
    cell: fusedlstm.Cell, precision: Any, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little shared memory: some weights stay in registers, others do not."""
    chosen = []
    for backward in (False, True):
        roomy = choose(SMALL, cell, precision, sizes[3], 0, sizes[1], backward)
        few = replace(roomy.recurrent, held=1)
        tight = replace(SMALL, shared=replace(roomy, recurrent=few).shared)
        chosen.append(choose(tight, cell, precision, sizes[3], 0, sizes[1], backward))
        assert chosen[-1].recurrent.held > 0
    monkeypatch.setattr(engine, "choose", lambda *args: chosen[args[6]])
    check(case(cell, *sizes, precision=precision))


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.usefixtures("many_blocks")
def test_any_nan_may_be_exchanged(precision: str) -> None:
    """Also the one that marks what is not published."""
    sizes = (3, 9, 3, 33) if precision == "bfloat16" else (3, 5, 2, 7)
    given = case(cells.lstm, *sizes, precision=precision)
    data = arrays(given)
    assert data.initial is not None
    for state in (data.initial[0], data.dfinal[0]):
        state.view(np.uint8)[3, : 5 * state.itemsize] = 0xFF
    wanted = expected(given, data)
    with executed(SMALL), np.errstate(all="ignore"):
        found = actual(given, data)
    for what in wanted:
        np.testing.assert_array_equal(np.isnan(found[what]), np.isnan(wanted[what]), err_msg=what)


# --- As an H200 would run it ------------------------------------------------------------------------------


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_a_plan_of_an_h200(precision: str) -> None:
    check(case(cells.lstm, 3, 9, 5, 64, precision=precision), H200, seeds=(1,))


# --- What is broken on purpose must be noticed ------------------------------------------------------------


def nth(pattern: str, number: int, new: str = "") -> Callable[[str], str]:
    """The PTX with one occurrence replaced; a negative number counts from the end."""

    def spoil(text: str) -> str:
        found = list(re.finditer(pattern, text))[number]
        return text[: found.start()] + found.expand(new) + text[found.end() :]

    return spoil


def each(pattern: str, new: str) -> Callable[[str], str]:
    """The PTX with every occurrence replaced."""

    def spoil(text: str) -> str:
        spoilt, count = re.subn(pattern, new, text)
        assert count
        return spoilt

    return spoil


MET = case(cells.lstm, 3, 5, 2, 7, **FORMS["met"])
POLLED = case(cells.lstm, 3, 5, 2, 7, **FORMS["polled"])
REUSED = case(cells.lstm, 9, 5, 2, 7, form="persistent", barrier_every=2)
TENSOR = case(cells.lstm, 3, 9, 3, 33, precision="bfloat16", **FORMS["polled"])
STEPWISE = replace(TENSOR, **FORMS["stepwise"])
A_FRAGMENT = r"(mma\.sync[^{]*\{[^}]*\}, \{)(%r\d+), ?(%r\d+),"

BROKEN: dict[str, tuple[Case, Callable[[str], str]]] = {
    "acquire-made-relaxed": (MET, each(r"ld\.acquire", "ld.relaxed")),
    "acquire-made-relaxed-polled": (REUSED, each(r"ld\.acquire", "ld.relaxed")),
    "release-made-relaxed": (MET, each(r"red\.release", "red.relaxed")),
    "polled-loads-made-weak": (POLLED, each(r"ld\.relaxed\.gpu\.global", "ld.global")),
    "published-by-weak-stores": (POLLED, each(r"st\.relaxed\.gpu\.global", "st.global")),
    "operands-swapped": (TENSOR, each(A_FRAGMENT, r"\1\3, \2,")),
    "four-weights-too-far": (POLLED, each(r"(ld\.shared\.v4\.f32\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+16]")),
    "a-store-one-number-too-far": (POLLED, nth(r"(st\.global\.f32\s+\[%rd\d+)\]", 0, r"\1+4]")),
    "a-load-one-number-early": (POLLED, nth(r"(ld\.global\.f32\s+%f\d+, \[%rd\d+)\]", 0, r"\1+-4]")),
    "no-barrier-of-the-warp": (STEPWISE, each(r"bar\.warp\.sync[^;]*;", "")),
    "nothing-made-ready": (REUSED, each(r"st\.global\.u32\s+\[[^]]*\], %r\d+;", "")),
}  # fmt: skip


def noticed(given: Case, broken: Callable[[str], str]) -> str:
    """What is reported, or which result is wrong."""
    data = arrays(given)
    wanted = expected(given, data)
    for seed in (None, 1, 2):
        try:
            with executed(SMALL, seed, broken):
                found = actual(given, data)
        except Fault as fault:
            return str(fault)
        wrong = [what for what in wanted if not error(found[what], wanted[what]) <= 0.05]
        if wrong:
            return f"wrong: {wrong}"
    return ""


@pytest.mark.sampled(0.6)
@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.usefixtures("many_blocks")
def test_what_is_broken_is_noticed(what: str) -> None:
    assert noticed(*BROKEN[what])


@pytest.mark.sampled(0.25)
@pytest.mark.parametrize("given", [MET, REUSED, replace(TENSOR, steps=9, barrier_every=2), STEPWISE], ids=str)
@pytest.mark.usefixtures("many_blocks")
def test_each_barrier_of_a_block_is_needed(given: Case) -> None:
    """Any one taken out is noticed, if there are steps enough for buffers to be used again."""
    counts: list[int] = []
    data = arrays(given)
    with executed(SMALL, None, lambda text: counts.append(len(re.findall(r"bar\.sync", text))) or text):
        actual(given, data)
    assert min(counts) > 0
    for number in range(max(counts)):

        def without(text: str, number: int = number) -> str:
            found = list(re.finditer(r"bar\.sync\s+0;", text))
            return nth(r"bar\.sync\s+0;", number)(text) if number < len(found) else text

        assert noticed(given, without), number


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert cuda_stand_in.seed is None
