"""The first minutes on a GPU, rehearsed without one: kernels are executed PTX, failures are injected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedlstm import cells
from fusedlstm.benchmarks import gpu_first, gpu_fit
from fusedlstm.benchmarks.gpu_first import Question, answers
from fusedlstm.benchmarks.worker import Worker, serve
from fusedlstm.kernels.cuda import plan
from fusedlstm.kernels.cuda.plan import COSTS, choose, costs_of, persistent, work
from fusedlstm.kernels.cuda.resources import DEVICES

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "gpu_stand_in"
H200 = DEVICES["sm_90"]


@pytest.mark.sampled(0)
def test_the_whole_of_it(tmp_path: Path) -> None:
    """Where products on tensor cores are wrong, cuDNN is missing, and compute-sanitizer finds something."""
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--first", "--tiny", "--budget", "3000"]
    command += ["--precisions", "float32", "tf32", "--groups", "deepbench_train_lstm", "--output", str(path)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (STAND_IN, ROOT, os.environ.get("PYTHONPATH", "")))),
        "PATH": os.pathsep.join((str(STAND_IN), os.environ["PATH"])),
        "BREAK_KERNELS": r"mma\.sync=wrong",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    answer = record["answers"]
    assert record["gpu"] == "no GPU"
    assert answer["versions"]["modules"]["cupy"] == "a stand-in"
    for form in ("persistent", "stepwise"):
        assert max(answer[f"small layer, {form}, float32"]["errors"].values()) < 1e-5
        assert "tf32: relative error" in answer[f"small layer, {form}, tf32"]["failed"]
    assert "2 passed" in answer["tests"]["said"], answer["tests"]
    assert answer["sanitizer"]["failed"] == "exit code 9"
    floors = record["floors"]
    assert (floors["barrier"].keys(), floors["exchange"].keys()) == ({"6"}, {"6"})
    exact, rounded = record["rows"]
    assert exact["fusedlstm"].keys() >= {"forward", "train", "recurrent", "barriers"}
    assert "tf32: relative error" in rounded["fusedlstm"]["failed"]
    assert "failed" in exact["cudnn"]
    compared = [name for name in answer if name.startswith("plan ")]
    assert len(compared) == 6
    assert all(answer[name]["us a step"] > 0 for name in compared)
    assert record["left out"] == 0


# --- One failure alone --------------------------------------------------------------------------------------


def broken(connection: Connection) -> None:
    """A process that is asked how to fail."""

    def answer(how: str) -> dict[str, Any]:
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(3600)
        if how == "raise":
            raise RuntimeError("an illegal memory access was encountered")
        return {"process": os.getpid()}

    serve(connection, answer)


def test_no_failure_takes_the_others_along() -> None:
    process = Worker(broken, (), 60, {})

    def ask(seconds: float, how: str) -> Any:
        process.timeout = 2 if how == "hang" else 60
        return process.ask(how)

    names = ("work", "raise", "exit", "hang", "work again")
    asked = [Question(name, partial(ask, how=name.partition(" ")[0]), 60) for name in names]
    asked.append(Question("a program", lambda seconds: gpu_first.program("false", seconds=seconds), 60))
    asked.append(Question("no program", lambda seconds: gpu_first.program("/none", seconds=seconds), 60))
    found = dict(answers(asked, time.monotonic() + 600))
    process.close()
    failed = {name: answer.get("failed", "") for name, answer in found.items()}
    assert failed["work"] == failed["work again"] == ""
    assert failed["raise"] == "RuntimeError: an illegal memory access was encountered"
    assert failed["exit"] == "its process ended with exit code 3"
    assert failed["hang"] == "no answer within 2 s"
    assert failed["a program"] == "exit code 1"
    assert "No such file" in failed["no program"]
    assert found["work"]["process"] != found["work again"]["process"]


def test_a_program_that_hangs_is_killed_with_what_it_started() -> None:
    said = gpu_first.program("sh", "-c", "echo begun; sleep 3600", seconds=1)
    assert said["failed"] == "exit code -9"
    assert said["said"] == "begun\n\nkilled after 1 s"


def test_what_there_is_no_time_for_is_said() -> None:
    asked = [Question("late", lambda seconds: pytest.fail("it was asked"), 60)]
    ((name, answer),) = answers(asked, time.monotonic() - 1)
    assert (name, answer["failed"]) == ("late", "there was no time")


def test_missing_packages_are_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = gpu_first.versions()["modules"]
    assert found["numpy"] == np.__version__
    assert found["torch"].startswith("ModuleNotFoundError")


# --- Plans and what they cost -------------------------------------------------------------------------------


def test_the_first_alternative_is_the_plan_that_is_chosen() -> None:
    for problem in gpu_first.compared(tiny=False):
        plans = gpu_first.alternatives(problem, "bfloat16", H200)
        assert plans[0] == choose(H200, cells.lstm, "bfloat16", problem.hidden, 0, problem.batch, False)
        assert len(set(plans)) == len(plans) == gpu_first.COMPARED


def test_costs_are_found_again() -> None:
    """From times that they have made, with a hundredth of noise."""
    wanted = {**COSTS, "shared": 1 / 90, "cache": 1 / 50, "trip": 700.0, "bfloat16": 1 / 400, "tf32": 1 / 200}
    rng = np.random.default_rng(0)
    works, micros = [], []
    for problem in gpu_first.compared(tiny=False):
        for precision in ("bfloat16", "tf32"):
            plans = persistent(H200, cells.lstm, problem.hidden, 0, problem.batch, False, precision)
            for made in plans[:: max(1, len(plans) // 5)]:
                works.append(work(made, H200, problem.batch))
                clocks = 900 + sum(wanted[kind] * amount for kind, amount in works[-1].items())
                micros.append(clocks / gpu_fit.CLOCKS * rng.uniform(0.99, 1.01))
    costs, fixed, misfit = gpu_fit.solve(works, micros)
    assert costs.keys() == {"shared", "cache", "trip", "bfloat16", "tf32"}
    for kind in ("cache", "trip"):
        assert costs[kind] == pytest.approx(wanted[kind], rel=0.2), kind
    assert fixed == pytest.approx(900, rel=0.5)
    assert max(misfit) < 0.02
    assert min(costs.values()) >= 0


def test_fitted_costs_choose_the_plans_of_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "costs.json"
    for module in (plan, gpu_fit):
        monkeypatch.setattr(module, "FITTED", path)
    problems = gpu_first.compared(tiny=False)
    plans = [(p, made) for p in problems for made in gpu_first.alternatives(p, "float32", H200)]
    works = [work(made, H200, problem.batch) for problem, made in plans]
    answered = {
        str(n): {"work": amounts, "us a step": 1 + amounts["trip"]} for n, amounts in enumerate(works)
    }
    costs_of.cache_clear()
    said = gpu_fit.fit({"gpu": H200.name, "answers": {**answered, "failed": {"failed": "it did"}}})
    assert said.startswith("H200: clocks")
    assert f"{len(works)} plans" in said
    costs_of.cache_clear()
    assert costs_of(H200.name)["trip"] == pytest.approx(gpu_fit.CLOCKS, rel=0.01)
    assert costs_of(H200.name)["float64"] == COSTS["float64"]
    assert costs_of("another") == COSTS
    costs_of.cache_clear()


def test_too_few_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="2 timed plans are too few for 1 kinds of work"):
        gpu_fit.solve([dict.fromkeys(COSTS, 0.0) | {"trip": 1.0}] * 2, [1.0, 1.0])
