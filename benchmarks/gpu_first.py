"""The first minutes on a GPU, part by part: what tells most comes first, and no failure takes the rest along.

The parts: what can be imported; a small layer in each precision and form against the reference; the tests
most likely to fail; compute-sanitizer; latencies of launches, barriers and exchanges; DeepBench's rows beside
cuDNN; and plans beside the next best ones, for `benchmarks.gpu --fit`.  Each question has a process that may
hang or lose its GPU, and the record is written after each answer.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from fusedlstm.kernels.cuda import engine, launch
from fusedlstm.kernels.cuda.engine import CUDA
from fusedlstm.kernels.cuda.plan import (
    BARRIER_EVERY,
    Device,
    Plan,
    Precision,
    choose,
    persistent,
    work,
)

from .gpu_contenders import milliseconds, recurrent_part
from .gpu_problems import Problem, check, data, expected, results

ROOT = Path(__file__).parents[1]
MODULES = ("numpy", "numba", "numba_cuda", "cuda.bindings", "cupy", "torch")
FORMS = ("persistent", "stepwise")
SMALL = Problem("small", "lstm", 5, 9, 7, 33)
TESTS = "there_is or first_kernels or same_bits or another_stream or weights_in_registers or long_sequences"
TINY_TESTS = "there_is or (first_kernels and stepwise)"
SANITIZED = "lstm-T2-B5-I2-H5"  # in the persistent form, and stepwise
COMPARED = 3  # plans that are timed for a problem: the one chosen, and the next best
FITTED = (  # T, B, H
    (25, 16, 512), (25, 64, 512), (25, 16, 1024), (25, 64, 1024), (25, 128, 1024), (150, 32, 256)
)  # fmt: skip


# --- In a process of their own ----------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Of what has to be imported; where that fails, the error."""
    found = {}
    for name in MODULES:
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "there"))
        except Exception as error:  # whatever it is, it is told
            found[name] = f"{type(error).__name__}: {error}"
    tools = {tool: shutil.which(tool) for tool in ("nvcc", "compute-sanitizer", "nvidia-smi")}
    home = {name: os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")}
    return {"modules": found, "tools": tools, "environment": home}


def small(precision: Precision, form: str) -> dict[str, Any]:
    """Errors of both passes of a small layer, and which kernels it took."""
    given, cell, xp = data(SMALL), SMALL.mathematics, launch.array_module()
    direction = CUDA(precision, form).prepare(cell, given.weights)  # type: ignore[arg-type]
    x = xp.asarray(given.x)
    y, dx = xp.empty(given.dy.shape, np.float32), xp.empty_like(x)
    final = tuple(xp.empty(y.shape[1:], np.float32) for _ in cell.states)
    tape = direction.forward(x, None, y, final, None, None, False, True)
    dy = xp.asarray(given.dy_checked)
    gradients = [part.astype(np.float64) for part in direction.backward(tape, dy, None, dx, False)[1][:4]]
    found = results(SMALL.rows, y, dx, gradients, lambda vector: xp.asarray(vector, np.float64))
    host = {name: part if xp is np else part.get() for name, part in found.items()}
    errors = check(host, expected(*SMALL.checked), precision)
    return {"errors": errors, "kernels": direction.explain(SMALL.steps, SMALL.batch, True)}


def compare(problem: Problem, precision: Precision, number: int) -> dict[str, Any]:
    """What a step of the plan `number` in the order of the estimate takes, in microseconds."""
    device = launch.current_device()
    plan = alternatives(problem, precision, device)[number]
    with mock.patch.object(engine, "choose", return_value=plan):
        found = milliseconds(recurrent_part(problem, data(problem), CUDA(precision)))
    micros = None if found is None else 1000 * found["median"] / problem.steps
    tile = f"{plan.units} units x {plan.recurrent.batch} rows, {plan.grid(problem.batch)} blocks"
    return {"us a step": micros, "tile": tile, "work": work(plan, device, problem.batch)}


def alternatives(problem: Problem, precision: Precision, device: Device) -> list[Plan]:
    """Persistent plans of the forward pass, in the order of the estimate; polled, as they are chosen."""
    plans = persistent(device, problem.mathematics, problem.hidden, 0, problem.batch, False, precision)
    return [replace(plan, barrier_every=BARRIER_EVERY) for plan in plans[:COMPARED]]


# --- In the process that asks -----------------------------------------------------------------------------


class Question(NamedTuple):
    """Something to find out: what it is called, who answers, and for how many seconds at most."""

    name: str
    ask: Callable[[float], Any]  # with the seconds that there are
    seconds: float


Ask = Callable[..., Any]  # (seconds, method, *arguments): the answer of a process of its own


def program(*command: str, seconds: float) -> dict[str, Any]:
    """How a program ends, and the last that it says; after `seconds` it is killed with what it started."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            said += f"\nkilled after {seconds:.0f} s"
    answer = {"said": said[-3000:]}
    return answer if process.returncode == 0 else {"failed": f"exit code {process.returncode}", **answer}


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def tests(tiny: bool, seconds: float) -> dict[str, Any]:
    """Those on a GPU that are most likely to fail."""
    wanted = TINY_TESTS if tiny else TESTS
    return program(*PYTEST, "tests", "-m", "gpu", "--maxfail=5", "-k", wanted, seconds=seconds)


def sanitizer(seconds: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck on two cases."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"failed": "compute-sanitizer is not on the PATH"}
    command = (found, "--tool", "memcheck", "--error-exitcode", "9", *PYTEST)
    return program(*command, str(ROOT / "tests/cuda_numba_simulator.py"), "-k", SANITIZED, seconds=seconds)


def checks(ask: Ask, precisions: Sequence[Precision], tiny: bool) -> Iterator[Question]:
    """Whether anything works, and what launches, barriers and exchanges take."""
    for form in FORMS:
        for precision in precisions:
            name = f"small layer, {form}, {precision}"
            yield Question(name, partial(ask, method="small", arguments=(precision, form)), 40)
    yield Question("tests", partial(tests, tiny), 120)
    yield Question("sanitizer", sanitizer, 60)
    yield Question("floors", partial(ask, method="floors", arguments=(tiny,)), 60)


def comparisons(ask: Ask, precisions: Sequence[Precision], device: Device, tiny: bool) -> Iterator[Question]:
    """Plans beside the next best."""
    for problem in compared(tiny):
        for precision in precisions:
            for number in range(len(alternatives(problem, precision, device))):
                name = f"plan {number}, {precision}, T={problem.steps} B={problem.batch} H={problem.hidden}"
                arguments = (problem, precision, number)
                yield Question(name, partial(ask, method="compare", arguments=arguments), 20)


def compared(tiny: bool) -> list[Problem]:
    """The problems whose plans are."""
    if tiny:
        return [Problem("plans", "lstm", 2, 3, 4, 9)]
    return [Problem("plans", "lstm", steps, batch, hidden, hidden) for steps, batch, hidden in FITTED]


def kernels(
    precisions: Sequence[Precision], device: Device, tiny: bool
) -> tuple[list[tuple[str, Plan, bool]], list[tuple[str, Plan, bool]]]:
    """Cell, plan and whether for training, of the kernels of the small layers, and of those of the plans."""
    first = []
    for form, precision, backward in product(FORMS, precisions, (False, True)):
        sizes = (device, SMALL.mathematics, precision, SMALL.hidden, 0, SMALL.batch, backward)
        with suppress(ValueError):  # which the question answers
            first.append((SMALL.cell, choose(*sizes, form), True))  # type: ignore[arg-type]
    plans = [plan for p in compared(tiny) for q in precisions for plan in alternatives(p, q, device)]
    return first, [("lstm", plan, False) for plan in plans]


def answers(
    asked: Iterable[Question], until: float, patience: float = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each question with its answer, or why there is none, until time is over.

    Answers are waited for `patience` times as long as they should take.
    """
    for question in asked:
        start = time.monotonic()
        seconds = min(patience * question.seconds, until - start)
        try:
            answer = question.ask(seconds) if seconds > 0 else {"failed": "there was no time"}
        except Exception as error:  # which must not take the others along
            answer = {"failed": str(error) or type(error).__name__}
        yield question.name, {**answer, "took": round(time.monotonic() - start, 1)}


def summary(name: str, answer: dict[str, Any]) -> str:
    """An answer in one line."""
    said = answer.get("failed") or answer.get("modules") or answer.get("us a step") or "done"
    if isinstance(said, dict):
        said = ", ".join(f"{module} {version}" for module, version in said.items())
    elif isinstance(said, float):
        said = f"{said:.2f} us a step, {answer['tile']}"
    return f"{name}: {said} ({answer['took']} s)"
