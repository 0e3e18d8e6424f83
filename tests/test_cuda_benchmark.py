"""The benchmark for GPUs, as far as it runs without one; cuda_simulated.py runs its contenders."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusedlstm.benchmarks import gpu, gpu_contenders, gpu_problems, gpu_report
from fusedlstm.benchmarks.worker import Failed
from fusedlstm.kernels.cuda.plan import PRECISIONS
from fusedlstm.kernels.cuda.resources import DEVICES

PROBLEM = gpu_problems.Problem("gru", "gru", 3, 11, 4, 5)
TIME = {"median": 2.0, "low": 1.0, "high": 3.0, "host": 0.02}
TIMES = {"errors": {"y": 1e-7}, "kernels": {}, "forward": TIME, "train": TIME, "recurrent": TIME}
TIMES["barriers"] = TIME | {"median": 3.0}
MACHINE = {"gpu": "a GPU", "device": vars(DEVICES["sm_90"]), "versions": {"cupy": "14"}, "driver": 1}
FLOORS = {"launch": TIME, "barrier": {"16": 0.5}, "exchange": {"16": 0.25}, "copy": 4e12}
FLOORS["product"] = {"tf32": 4e14}


# --- No check, no number ----------------------------------------------------------------------------------


def test_results_are_those_of_the_checked_rows() -> None:
    """Everything over the whole batch, with gradients in the checked rows, gives what is expected."""
    from fusedlstm import cells
    from fusedlstm.kernels import reference

    given = gpu_problems.data(PROBLEM)
    assert len(PROBLEM.rows) == gpu_problems.CHECKED
    assert {PROBLEM.rows[0], PROBLEM.rows[-1]} == {0, PROBLEM.batch - 1}
    zero = (np.zeros((PROBLEM.batch, PROBLEM.hidden)),)
    y, _, tape = reference.forward(cells.gru, given.weights, given.x, zero)
    dx, _, grads = reference.backward(tape, given.dy_checked, zero)
    found = gpu_problems.results(PROBLEM.rows, y, dx, grads[:4], np.asarray)
    errors = gpu_problems.check(found, gpu_problems.expected(*PROBLEM.checked), "float32")
    assert errors.keys() == {"y", "dx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("spoilt", ["y", "dx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("by", [1.2, np.nan])
def test_one_wrong_result_is_enough(spoilt: str, by: float) -> None:
    wanted = gpu_problems.expected(*PROBLEM.checked)
    with pytest.raises(RuntimeError, match=f"relative error of {spoilt}"):
        gpu_problems.check(wanted | {spoilt: by * wanted[spoilt]}, wanted, "bfloat16")


def test_cudnn_is_in_training_mode_if_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    class GRU(torch.nn.GRU):
        def forward(self, *arguments: Any) -> Any:
            modes.append(self.training)
            return super().forward(*arguments)

    monkeypatch.setattr(torch.nn, "GRU", GRU)
    monkeypatch.setattr(gpu_contenders, "SIMULATED", True)  # on the CPU
    # PyTorch's test utilities, which other tests import, forbid to change its settings
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        prepared = gpu_contenders.cudnn(PROBLEM, gpu_problems.data(PROBLEM), "float32")
    for call in prepared.calls.values():
        call()
    assert dict(zip(prepared.calls, modes)) == {"forward": False, "train": True, "recurrent": False}
    errors = gpu_problems.check(prepared.results(), gpu_problems.expected(*PROBLEM.checked), "float32")
    assert "inference" in errors


# --- The run ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Contenders that answer at once, cuDNN with an error in float16; and no pool of processes."""
    questions: list[Any] = []

    class Answers(gpu.Process):
        def ask(self, method: str, *arguments: Any) -> Any:
            questions.append((method, *arguments[:3]))
            if method == "measure" and arguments[0] == "cudnn" and arguments[2] == "float16":
                raise Failed("no answer within 90 s")
            return {"machine": MACHINE, "floors": FLOORS, "measure": TIMES}[method]

    monkeypatch.setattr(gpu, "Process", Answers)
    monkeypatch.setattr(gpu, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    monkeypatch.setattr(gpu, "compile_kernel", lambda *kernel: questions.append(("compile", *kernel)))
    monkeypatch.setattr(gpu, "expected", lambda *sizes: {"y": np.zeros(1)})
    return questions


def test_each_row_is_written_and_failures_are_shown(asked: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    record = gpu.run(["gru"], ["tf32", "float16"], path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert len(record["rows"]) == 2 * len(gpu_problems.GRU)
    assert record["left out"] == 0
    assert asked[:2] == [("machine",), ("floors", False)]
    text = gpu_report.document(record)
    assert text.count("cudnn failed: no answer within 90 s") == len(gpu_problems.GRU)
    assert "| gru | 25 | 16 | 512 | tf32 | 2.000 | 2.000 | 1.00 |" in text
    assert "| 80.00 | 120.00 | 80.00 | 20 | 20 |" in text
    assert "One barrier of 16 blocks 0.50 us" in text
    assert "One exchange of a number between 16 blocks 0.25 us" in text


def test_kernels_are_compiled_before_they_are_timed(asked: list[Any], tmp_path: Path) -> None:
    gpu.run(["gru"], ["bfloat16"], tmp_path / "record.json")
    kinds = [question[0] for question in asked[2:]]
    assert kinds == ["compile"] * 4 * len(gpu_problems.GRU) + ["measure"] * 2 * len(gpu_problems.GRU)
    plans = [(plan.backward, training, plan.polling) for _, _, plan, training, _ in asked[2:6]]
    assert plans == [(False, False, True), (False, True, True), (True, True, True), (False, False, False)]


def test_the_budget_ends_the_run(asked: list[Any], tmp_path: Path) -> None:
    record = gpu.run(["gru"], ["tf32"], tmp_path / "record.json", budget=0)
    assert (record["rows"], record["left out"]) == ([], len(gpu_problems.GRU))
    assert "4 rows were left out for lack of time" in gpu_report.table(record)


def test_the_most_important_rows_come_first() -> None:
    rows = list(gpu_problems.problems(gpu_problems.GROUPS))
    assert {(row.steps, row.batch, row.hidden) for row in rows[: len(gpu_problems.FIRST)]} == set(
        gpu_problems.FIRST
    )
    assert len(set(rows)) == len(rows)
    assert set(gpu.PRECISIONS) < set(PRECISIONS)


def test_a_process_that_dies_is_replaced() -> None:
    process = gpu.Process()
    with pytest.raises(Failed, match=r"CuPy|GPU"):  # there is none
        process.ask("machine")
    with pytest.raises(Failed, match="KeyError"):
        process.ask("nothing")
    assert process._process is None
    process.close()


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(*arguments: Any) -> None:
        raise Failed("RuntimeError: there is no GPU")

    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu, "run", run)
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    assert "there is no GPU" in capsys.readouterr().err


def test_the_page_is_made_of_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = MACHINE | {"date": "today", "commit": "c", "simulated": False, "floors": {"failed": "stuck"}}
    source, page = tmp_path / "record.json", tmp_path / "page.md"
    source.write_text(json.dumps(record | {"rows": [], "left out": 0}))
    monkeypatch.setattr(gpu, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["gpu", "--document", str(source)])
    gpu.main()
    assert "The floors could not be measured: stuck." in page.read_text()
