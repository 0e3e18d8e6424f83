"""Every form, pass and precision compiled and assembled without a GPU: what simulators cannot tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checks import five_gates, name, three_states
from cuda_ahead import compile_all, kernels
from cuda_cases import Case

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels.cuda.plan import (
    BARRIER_EVERY,
    PRECISIONS,
    TENSOR_CORES,
    Form,
    Plan,
    Precision,
    choose,
)
from fusedlstm.kernels.cuda.resources import DEVICES, REGISTERS, ptx_of, resources

H200 = DEVICES["sm_90"]


def check(
    cell: Cell,
    precision: Precision,
    form: Form,
    backward: bool,
    hidden: int,
    batch: int,
    proj: int = 0,
    barrier_every: int = BARRIER_EVERY,
) -> None:
    """What `check_resources` does, and the instructions that the form and the precision are about."""
    tensor = precision in TENSOR_CORES
    plan = choose(H200, cell, precision, hidden, proj, batch, backward, form, barrier_every)
    assert plan.form == form
    assert plan.shared <= H200.shared
    ptx = check_resources(cell, plan)
    vector = "v4.b32" if tensor else "v2.f64" if precision == "float64" else "v4.f32"
    alias = vector.replace("b32", "u32")
    assert {name in ptx for name in ("red.release.gpu", "ld.acquire.gpu")} == {form == "persistent"}
    polled = (f"ld.relaxed.gpu.global.{vector}", "st.relaxed.gpu.global")
    assert {name in ptx for name in polled} == {plan.polling}
    if form == "stepwise":
        assert f"ld.global.{vector}" in ptx or f"ld.global.{alias}" in ptx
    else:
        assert f"ld.shared.{vector}" in ptx or f"ld.shared.{alias}" in ptx


def check_resources(cell: Cell, plan: Plan) -> str:
    """No spills, no stack, everything inlined, and all registers for one block at least; returns the PTX.

    The PTX for the oldest architecture that has the instructions is assembled for all later ones.
    """
    tensor = plan.recurrent.tensor
    ptx = ptx_of(cell, plan, (8, 0) if tensor else (7, 5))
    for architecture, device in DEVICES.items():
        if tensor and device.capability < (8, 0):
            continue
        found = resources(ptx, architecture)
        assert (found.spills, found.stack, found.calls) == (0, 0, 0), (architecture, found)
        assert found.registers * plan.threads <= REGISTERS, (architecture, found)
        assert (found.tensor > 0) == tensor
    return ptx


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("form", ["persistent", "stepwise"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_form_and_precision(precision: Precision, form: Form, backward: bool) -> None:
    check(cells.lstm, precision, form, backward, hidden=512, batch=16)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_barrier_every_step(precision: Precision, backward: bool) -> None:
    check(cells.lstm, precision, "persistent", backward, hidden=512, batch=16, barrier_every=1)


@pytest.mark.parametrize(
    ("precision", "hidden", "backward"),
    [("bfloat16", 2048, False), ("bfloat16", 2048, True), ("tf32", 1024, True)],
)
def test_weights_in_registers(precision: Precision, hidden: int, backward: bool) -> None:
    plan = choose(H200, cells.lstm, precision, hidden, 0, 16, backward)
    assert plan.recurrent.held > 0
    check(cells.lstm, precision, "persistent", backward, hidden, batch=16)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_small_batches(precision: Precision, batch: int) -> None:
    """Vectors are loaded number by number, or in pairs."""
    plan = choose(H200, cells.lstm, precision, 512, 0, batch, False)
    assert plan.recurrent.width == batch
    check_resources(cells.lstm, plan)


def test_weights_in_registers_without_tensor_cores() -> None:
    assert choose(H200, cells.gru, "float32", 1256, 0, 8, backward=True).recurrent.held == 8
    check(cells.gru, "float32", "persistent", backward=True, hidden=1256, batch=8)


@pytest.mark.parametrize(
    ("cell", "precision", "proj"),
    [(five_gates, "float32", 0), (three_states, "tf32", 64), (cells.gru, "bfloat16", 0)],
    ids=name,
)
def test_other_cells(cell: Cell, precision: Precision, proj: int) -> None:
    check(cell, precision, "persistent", True, hidden=256, batch=64, proj=proj)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_recurrent_dropout(backward: bool) -> None:
    """The blocks exchange another state than the output."""
    dropped = cells.recurrent_dropout(cells.lstm)
    check(dropped, "bfloat16", "persistent", backward, hidden=256, batch=32)


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("form", ["persistent", "stepwise"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", [cells.gru_reset_before, cells.lstm_output_from_memory], ids=name)
def test_late_gates(cell: Cell, precision: Precision, form: Form, backward: bool) -> None:
    check(cell, precision, form, backward, hidden=512, batch=16)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("cell", "precision", "hidden", "form"),
    [
        (cells.gru_reset_before, "tf32", 512, "persistent"),
        (cells.lstm_output_from_memory, "bfloat16", 1024, "stepwise"),
        (cells.lstm_output_from_memory, "float32", 1024, "stepwise"),
    ],
    ids=name,
)
def test_late_gates_of_several_units_a_thread(
    cell: Cell, precision: Precision, hidden: int, form: Form, backward: bool
) -> None:
    """Persistent, their numbers stay in registers while the blocks exchange what the late gate multiplies."""
    plan = choose(H200, cell, precision, hidden, 0, 128, backward)
    assert plan.form == form
    assert plan.units * plan.recurrent.batch > plan.threads
    check_resources(cell, plan)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_late_gates_with_a_barrier_every_step(backward: bool) -> None:
    check(cells.gru_reset_before, "float32", "persistent", backward, hidden=512, batch=16, barrier_every=1)


def test_kernels_of_tests_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other processes, to which cells of a user go by name."""
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path))
    wanted = kernels(Case(three_states, 1, 2, 2, 5, form="stepwise"), H200)
    assert len(wanted) == 2
    compile_all(wanted, 1)
    assert len(list(tmp_path.glob("three_states_*.ptx"))) == 2
    assert len(list(tmp_path.glob("*.sm_90.cubin"))) == 2


WITHOUT_ROW_STACK = """
import numpy

if vars(numpy).pop("row_stack", None):
    numpy.__all__.remove("row_stack")
assert not hasattr(numpy, "row_stack")

from fusedlstm import cells
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.plan import choose
from fusedlstm.kernels.cuda.resources import DEVICES, without_gpu

assert not hasattr(numpy, "row_stack"), "others see a NumPy that has been changed"
plan = choose(DEVICES["sm_75"], cells.rnn_tanh, "float32", 4, 0, 1, False, "stepwise")
with without_gpu((7, 5)):
    ptx = launch.compile_ptx(cells.rnn_tanh, plan, False, False, (7, 5))
assert launch.assemble(ptx, (7, 5)).startswith(b"\x7fELF")
"""


def test_the_engine_loads_and_compiles_with_a_numpy_that_has_no_row_stack() -> None:
    """NumPy 2.5, which numba-cuda does not know."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_ROW_STACK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
