"""The CUDA kernels beside cuDNN on a GPU: `python -m benchmarks.gpu`.

First the floors: what a launch and the barrier of a grid take alone.  Then, row by row and the most important
ones first, the LSTM problems of DeepBench, FlashRNN's, and a selection of GRU problems, forward and forward
with backward, with and without the product of the input, and with a barrier every step, against
`torch.nn.LSTM` and `torch.nn.GRU` (cuDNN) in float32, TF32, bfloat16 and float16.  Nothing is timed before
its results, gradients among them, are right.
Times are medians of CUDA events.

Each contender has a process of its own, which may hang or lose its GPU without taking others along; kernels
are compiled beforehand on all cores.  The record, JSON in benchmarks/results/, is written after each row;
`--budget` ends the run in time.  `--document FILE` makes docs/results_gpu.md of a record.

`--first` is for the first minutes on a GPU: see gpu_first.py.  `--fit FILE` makes the costs of plan.py of
such a record.

With NUMBA_ENABLE_CUDASIM=1 everything runs in a simulator at tiny sizes and nothing is timed, to see
that it is ready; `--tiny` is for the sizes alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numba
import numpy as np

from fusedlstm import cells
from fusedlstm.dispatch import PRECISIONS
from fusedlstm.files import write_whole
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.plan import Device, Plan, Precision, choose
from fusedlstm.kernels.cuda.ptx import SIMULATED

from .gpu_contenders import CONTENDERS, measure
from .gpu_first import Question, answers, checks, compare, comparisons, small, summary, versions
from .gpu_first import kernels as first_kernels
from .gpu_fit import fit
from .gpu_floors import floors
from .gpu_problems import GROUPS, Problem, expected, problems
from .gpu_report import HEADER, about, document, line
from .machine import commit, cores
from .worker import Failed, Worker, serve

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results_gpu.md"
TOGETHER = 6  # problems whose kernels are compiled at once
TIMEOUT = 90.0  # seconds for a row of one contender
COMPILING = 60.0  # seconds that the first kernels are waited for
PATIENCE = 20.0  # times as long, where tiny sizes are tried on a machine that may be slow
COMPARING = 0.2  # of the first minutes, for plans beside others


# --- Processes --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    device = launch.current_device()
    versions = {"numba": numba.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    found: dict[str, Any] = {"gpu": device.name, "device": asdict(device), "versions": versions}
    if not SIMULATED:
        import numba_cuda  # type: ignore[import-untyped]

        xp = launch.array_module()
        versions |= {"numba-cuda": numba_cuda.__version__, "cupy": xp.__version__}
        with suppress(ImportError):  # which cuDNN's rows will say
            import torch

            versions |= {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
        versions["cuda"] = xp.cuda.runtime.runtimeGetVersion()
        found["driver"] = xp.cuda.runtime.driverGetVersion()
    return found


QUESTIONS: dict[str, Callable[..., Any]] = {
    "versions": versions, "machine": machine, "small": small, "floors": floors, "measure": measure,
    "compare": compare,
}  # fmt: skip


class Process(Worker):
    """The process of a contender; questions are the names of functions here."""

    def __init__(self) -> None:
        super().__init__(serve_questions, (), TIMEOUT, {})

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer; whatever goes wrong, the next question has a new process, and a GPU that works."""
        try:
            return QUESTIONS[method](*arguments) if SIMULATED else super().ask(method, *arguments)
        except Failed:
            self.close()
            raise


def serve_questions(connection: Connection) -> None:
    """Answer questions until there are no more."""
    serve(connection, lambda question, *arguments: QUESTIONS[question](*arguments))


def compile_kernel(cell: str, plan: Plan, training: bool, capability: tuple[int, int]) -> None:
    """Put a kernel into the cache on disk."""
    from fusedlstm.kernels.cuda.resources import compile_ahead

    compile_ahead(getattr(cells, cell), plan, False, training, capability)


def kernels(problem: Problem, precision: Precision, device: Device) -> Iterator[tuple[str, Plan, bool]]:
    """Cell, plan and whether for training, of each kernel that a row needs."""
    sizes = (device, problem.mathematics, precision, problem.hidden, 0, problem.batch)
    for backward, training in ((False, False), (False, True), (True, True)):
        yield problem.cell, choose(*sizes, backward), training
    yield problem.cell, choose(*sizes, False, barrier_every=1), False


def prepared(
    pool: Executor, batch: Sequence[Problem], precisions: Sequence[Precision], device: Device, until: float
) -> dict[Any, Future[dict[str, np.ndarray]]]:
    """Compile what the problems need, and work out what is right, on all cores."""
    right = {key: pool.submit(expected, *key) for key in dict.fromkeys(p.checked for p in batch)}
    wanted = dict.fromkeys(
        k for p in batch for precision in precisions for k in kernels(p, precision, device)
    )
    compiled = [pool.submit(compile_kernel, *kernel, device.capability) for kernel in wanted]
    jobs: list[Future[Any]] = [*right.values(), *compiled]
    wait(jobs, max(0, until - time.monotonic()))
    return right


# --- The record -------------------------------------------------------------------------------------------


def run(
    groups: Sequence[str],
    precisions: Sequence[Precision],
    path: Path | None,
    budget: float = 480,
    tiny: bool = SIMULATED,
) -> dict[str, Any]:
    """Measure for `budget` seconds; the record is written to `path`, or a name of its own, after each row."""
    until = time.monotonic() + budget
    with ExitStack() as stack:
        contenders, pool = _processes(stack)
        record: dict[str, Any] = _begun() | contenders["fusedlstm"].ask("machine")
        path = path or _own_path(record)
        record["floors"] = _answer(contenders["fusedlstm"], "floors", tiny)
        print(about(record), flush=True)
        _measure_rows(record, path, groups, precisions, contenders, pool, until, tiny)
    return record


def first(
    groups: Sequence[str],
    precisions: Sequence[Precision],
    path: Path | None,
    budget: float = 480,
    tiny: bool = False,
) -> dict[str, Any]:
    """Everything in gpu_first.py, for `budget` seconds; the record is written after each answer."""
    until = time.monotonic() + budget
    patience = PATIENCE if tiny else 1
    with ExitStack() as stack:
        contenders, pool = _processes(stack)
        record = _begun() | {"versions": {}, "answers": {}}
        process = contenders["fusedlstm"]

        def ask(seconds: float, method: str, arguments: tuple[Any, ...] = ()) -> Any:
            process.timeout = seconds
            return process.ask(method, *arguments)

        def note(asked: Iterable[Question], end: float) -> None:
            for name, answer in answers(asked, end, patience):
                record["answers"][name] = answer
                write(record, path)
                print(summary(name, answer), flush=True)

        note([Question("versions", partial(ask, method="versions"), 60)], until)
        record |= ask(60 * patience, "machine")
        path = path or _own_path(record)
        device = Device(**record["device"])
        now, later = first_kernels(precisions, device, tiny)
        if pool is not None:
            jobs = [pool.submit(compile_kernel, *kernel, device.capability) for kernel in (*now, *later)]
            wait(jobs[: len(now)], COMPILING * patience)
        note(checks(ask, precisions, tiny), until)
        record["floors"] = record["answers"].pop("floors")
        print(about(record), flush=True)
        compared = comparisons(ask, precisions, device, tiny)
        _measure_rows(record, path, groups, precisions, contenders, pool, until - COMPARING * budget, tiny)
        note(compared, until)
    return record


def _processes(stack: ExitStack) -> tuple[dict[str, Process], Executor | None]:
    """Those of the contenders, and those that compile."""
    contenders = {who: Process() for who in CONTENDERS}
    for process in contenders.values():
        stack.callback(process.close)
    if SIMULATED:
        return contenders, None
    pool = stack.enter_context(ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")))
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    return contenders, pool


def _begun() -> dict[str, Any]:
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": commit(), "simulated": SIMULATED, "rows": [], "left out": 0}


def _own_path(record: dict[str, Any]) -> Path | None:
    name = f"gpu-{record['gpu'].replace(' ', '-')}-{record['commit']}.json"
    return None if SIMULATED else HERE / "results" / name


def _measure_rows(
    record: dict[str, Any],
    path: Path | None,
    groups: Sequence[str],
    precisions: Sequence[Precision],
    contenders: dict[str, Process],
    pool: Executor | None,
    until: float,
    tiny: bool,
) -> None:
    asked = list(problems(groups, tiny))
    record["left out"] = len(asked) * len(precisions)
    write(record, path)
    print(HEADER, flush=True)
    for process in contenders.values():
        process.timeout = TIMEOUT * (PATIENCE if tiny else 1)
    for start in range(0, len(asked), TOGETHER):
        batch = asked[start : start + TOGETHER]
        right = prepared(pool, batch, precisions, Device(**record["device"]), until) if pool else {}
        for problem, precision in product(batch, precisions):
            if time.monotonic() > until:
                return
            wanted = right[problem.checked].result() if pool else expected(*problem.checked)
            row: dict[str, Any] = problem._asdict() | {"precision": precision}
            for who, process in contenders.items():
                row[who] = _answer(process, "measure", who, problem, precision, wanted)
            record["rows"].append(row)
            record["left out"] -= 1
            write(record, path)
            print(line(row), flush=True)


def _answer(process: Process, *question: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = process.ask(*question)
        return answer
    except Failed as error:
        return {"failed": str(error)}


def write(record: dict[str, Any], path: Path | None) -> None:
    """Replace the file as a whole."""
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(record, indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--budget", type=float, default=480, help="seconds (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the record goes; by default benchmarks/results/")
    parser.add_argument("--first", action="store_true", help="what to run first on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a few units only, to see that everything runs")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="make the costs of plan.py of a record")
    parser.add_argument("--document", type=Path, metavar="FILE", help="make docs/results_gpu.md of a record")
    arguments = parser.parse_args()
    if arguments.document:
        PAGE.write_text(document(json.loads(arguments.document.read_text())))
        return
    if arguments.fit:
        print(fit(json.loads(arguments.fit.read_text())))
        return
    if SIMULATED and not launch.current_device().warps:
        print("simulator without warps: float32 only")
        arguments.precisions = ["float32"]
    try:
        tiny = arguments.tiny or SIMULATED
        (first if arguments.first else run)(
            arguments.groups, arguments.precisions, arguments.output, arguments.budget, tiny
        )
    except Failed as error:  # there is no GPU
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
