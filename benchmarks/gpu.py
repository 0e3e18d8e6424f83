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

With NUMBA_ENABLE_CUDASIM=1 everything runs in a simulator at tiny sizes and nothing is timed, to see
that it is ready.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
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
from .gpu_floors import floors
from .gpu_problems import GROUPS, Problem, expected, problems
from .gpu_report import HEADER, about, document, line
from .machine import commit, cores
from .worker import Failed, Worker, serve

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results_gpu.md"
TOGETHER = 6  # problems whose kernels are compiled at once
TIMEOUT = 90.0  # seconds for a row of one contender


# --- Processes --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    device = launch.current_device()
    versions = {"numba": numba.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    found: dict[str, Any] = {"gpu": device.name, "device": asdict(device), "versions": versions}
    if not SIMULATED:
        import numba_cuda  # type: ignore[import-untyped]
        import torch

        xp = launch.array_module()
        versions |= {"numba-cuda": numba_cuda.__version__, "cupy": xp.__version__, "torch": torch.__version__}
        versions["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        versions["cuda"] = xp.cuda.runtime.runtimeGetVersion()
        found["driver"] = xp.cuda.runtime.driverGetVersion()
    return found


QUESTIONS: dict[str, Callable[..., Any]] = {"machine": machine, "floors": floors, "measure": measure}


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
    groups: Sequence[str], precisions: Sequence[Precision], path: Path | None, budget: float = 480
) -> dict[str, Any]:
    """Measure for `budget` seconds; the record is written to `path`, or a name of its own, after each row."""
    until = time.monotonic() + budget
    with ExitStack() as stack:
        contenders = {who: Process() for who in CONTENDERS}
        for process in contenders.values():
            stack.callback(process.close)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"date": date, "commit": commit(), "simulated": SIMULATED}
        record |= contenders["fusedlstm"].ask("machine")
        if path is None and not SIMULATED:
            path = HERE / "results" / f"gpu-{record['gpu'].replace(' ', '-')}-{record['commit']}.json"
        record |= {"floors": _answer(contenders["fusedlstm"], "floors"), "rows": [], "left out": 0}
        write(record, path)
        print(about(record), HEADER, sep="\n", flush=True)
        asked = list(problems(groups))
        record["left out"] = len(asked) * len(precisions)
        pool = None
        if not SIMULATED:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(cores(), context))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for start in range(0, len(asked), TOGETHER):
            batch = asked[start : start + TOGETHER]
            device = Device(**record["device"])
            right = prepared(pool, batch, precisions, device, until) if pool else {}
            for problem in batch:
                for precision in precisions:
                    if time.monotonic() > until:
                        return record
                    wanted = right[problem.checked].result() if pool else expected(*problem.checked)
                    row: dict[str, Any] = problem._asdict() | {"precision": precision}
                    for who, process in contenders.items():
                        row[who] = _answer(process, "measure", who, problem, precision, wanted)
                    record["rows"].append(row)
                    record["left out"] -= 1
                    write(record, path)
                    print(line(row), flush=True)
    return record


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
    parser.add_argument("--document", type=Path, metavar="FILE", help="make docs/results_gpu.md of a record")
    arguments = parser.parse_args()
    if arguments.document:
        PAGE.write_text(document(json.loads(arguments.document.read_text())))
        return
    if SIMULATED and not launch.current_device().warps:
        print("simulator without warps: float32 only")
        arguments.precisions = ["float32"]
    try:
        run(arguments.groups, arguments.precisions, arguments.output, arguments.budget)
    except Failed as error:  # there is no GPU
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
