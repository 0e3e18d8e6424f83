"""The CUDA kernels beside cuDNN on a GPU: `python -m benchmarks.gpu`.

First the floors: what a launch and the barrier of a grid take alone.  Then, row by row and the most important
ones first, the LSTM problems of DeepBench, FlashRNN's, and a selection of GRU problems, forward and forward
with backward, with and without the product of the input, against `torch.nn.LSTM` and `torch.nn.GRU` (cuDNN)
in float32, TF32, bfloat16 and float16.  Nothing is timed before its results, gradients among them, are right.
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
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import cuda
from numba.cuda import types
from threadpoolctl import threadpool_limits

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.dispatch import PRECISIONS
from fusedlstm.kernels import reference
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.engine import CUDA, Direction
from fusedlstm.kernels.cuda.plan import Device, Plan, Precision, choose
from fusedlstm.kernels.cuda.product import meet
from fusedlstm.kernels.cuda.ptx import SIMULATED
from fusedlstm.weights import Weights

from .cases import TOLERANCES
from .machine import commit, cores
from .worker import Failed, Worker, serve

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results_gpu.md"
GROUPS = ("deepbench_train_lstm", "flashrnn", "gru", "deepbench_inference_lstm")  # the first matter most
FIRST = ((25, 16, 512), (25, 64, 1024), (25, 16, 2048), (150, 32, 256), (25, 128, 1024))  # T, B, H
GRU = ((25, 16, 512), (25, 64, 1024), (150, 32, 256), (50, 16, 1536))  # T, B, H = I
GRADIENTS = 5  # times as far off as outputs they may be, since they pass more roundings
CHECKED = 8  # rows of the batch whose results are checked
TOGETHER = 6  # problems whose kernels are compiled at once
WARM_UP, FEWEST, MOST, SECONDS = 3, 10, 50, 0.3  # calls, and how long they should take together
BARRIERS = 1000
TIMEOUT = 90.0  # seconds for a row of one contender


class Problem(NamedTuple):
    group: str
    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int

    @property
    def mathematics(self) -> Cell:
        cell: Cell = getattr(cells, self.cell)
        return cell

    @property
    def checked(self) -> tuple[str, int, int, int, int]:
        """What the checked results depend on: cell, T, rows, I and H."""
        return self.cell, self.steps, min(self.batch, CHECKED), self.inputs, self.hidden

    @property
    def rows(self) -> np.ndarray:
        """The rows of the batch that are checked: the first, the last and some between."""
        return np.linspace(0, self.batch - 1, min(self.batch, CHECKED)).astype(int)


def problems(groups: Sequence[str]) -> Iterator[Problem]:
    shapes = json.loads((HERE / "shapes.json").read_text())
    for group in groups:
        if group == "gru":
            rows = [Problem(group, "gru", *sizes[:2], sizes[2], sizes[2]) for sizes in GRU]
        else:
            rows = [Problem(group, row["cell"], *(row[key] for key in "TBIH")) for row in shapes[group]]
            rows.sort(key=lambda row: (row.steps, row.batch, row.hidden) not in FIRST)
        yield from ([rows[0]._replace(steps=2, batch=3, inputs=4, hidden=9)] if SIMULATED else rows)


# --- Data, and what is right ------------------------------------------------------------------------------


class Data(NamedTuple):
    """Arrays of one problem, float32 on the host."""

    weights: Weights
    x: np.ndarray  # (T, B, I)
    dy: np.ndarray  # (T, B, H)
    dy_checked: np.ndarray  # (T, B, H), zero but in the checked rows, so that these alone have gradients


def weights_of(cell: str, inputs: int, hidden: int) -> Weights:
    rng, bound = np.random.default_rng(0), hidden**-0.5
    rows = len(getattr(cells, cell).gates) * hidden

    def uniform(*shape: int) -> np.ndarray:
        drawn: np.ndarray = np.float32(bound) * (2 * rng.random(shape, np.float32) - 1)
        return drawn

    return Weights(uniform(rows, inputs), uniform(rows, hidden), uniform(rows), uniform(rows))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def data(problem: Problem) -> Data:
    cell, steps, rows, inputs, hidden = problem.checked
    x, dy = (normal(1, steps, problem.batch, inputs), normal(2, steps, problem.batch, hidden))
    x[:, problem.rows] = normal(3, steps, rows, inputs)
    dy[:, problem.rows] = normal(4, steps, rows, hidden)
    dy_checked = np.zeros_like(dy)
    dy_checked[:, problem.rows] = dy[:, problem.rows]
    return Data(weights_of(cell, inputs, hidden), x, dy, dy_checked)


def results(
    rows: Any, y: Any, dx: Any, gradients: Sequence[Any], matrix: Callable[..., Any]
) -> dict[str, Any]:
    """What is checked: some rows, and gradients of weights (ih, hh and biases) times a vector."""
    times = [matrix(normal(5, part.shape[1])) if part.ndim == 2 else None for part in gradients]
    named = zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), gradients, times)
    found = {name: part if vector is None else part @ vector for name, part, vector in named}
    return {"y": y[:, rows], "dx": dx[:, rows], **found}


def expected(cell: str, steps: int, rows: int, inputs: int, hidden: int) -> dict[str, np.ndarray]:
    """The checked results, by the reference in float64."""
    weights = weights_of(cell, inputs, hidden)
    exact = Weights._make([*(None if e is None else e.astype(np.float64) for e in weights[:5]), ()])
    x, dy = (normal(seed, steps, rows, size).astype(np.float64) for seed, size in ((3, inputs), (4, hidden)))
    zero = tuple(np.zeros((rows, hidden)) for _ in getattr(cells, cell).states)
    with threadpool_limits(1):
        y, _, tape = reference.forward(getattr(cells, cell), exact, x, zero)
        dx, _, grads = reference.backward(tape, dy, zero)
    return results(slice(None), y, dx, grads[:4], lambda vector: vector.astype(np.float64))


def check(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], precision: Precision
) -> dict[str, float]:
    """The relative error of each result.

    Raises:
        RuntimeError: if one is so large that a time would mean nothing.
    """
    errors = {}
    if "inference" in found:  # which is another kernel
        wanted = wanted | {"inference": wanted["y"]}
    for name, right in wanted.items():
        off = np.asarray(found[name], np.float64) - right
        errors[name] = float(np.linalg.norm(off) / np.linalg.norm(right))
        limit = TOLERANCES[precision] / (GRADIENTS if name in ("y", "inference") else 1)
        if not errors[name] <= limit:
            raise RuntimeError(f"{precision}: relative error of {name} {errors[name]:.1e} > {limit:.0e}")
    return errors


# --- Contenders, each in a process of its own -------------------------------------------------------------


class Prepared(NamedTuple):
    """A contender that is ready for a problem."""

    results: Callable[[], dict[str, np.ndarray]]  # of both passes, see `results`
    calls: dict[str, Callable[[], Any]]  # what is timed
    kernels: dict[str, str]


def ours(problem: Problem, given: Data, precision: Precision) -> Prepared:
    xp, cell = launch.array_module(), problem.mathematics
    x, dy = xp.asarray(given.x), xp.asarray(given.dy)
    direction = CUDA(precision).prepare(cell, given.weights)
    y, dx = xp.empty_like(dy), xp.empty_like(x)
    final = tuple(xp.empty(dy.shape[1:], dy.dtype) for _ in cell.states)

    def forward(training: bool = False) -> Any:
        return direction.forward(x, None, y, final, None, None, False, training)

    def train(gradient: Any = dy) -> Weights:
        weights: Weights = direction.backward(forward(training=True), gradient, None, dx, False)[1]
        return weights

    def checked() -> dict[str, np.ndarray]:
        forward()
        inferred = y.copy()
        gradients = [part.astype(np.float64) for part in train(xp.asarray(given.dy_checked))[:4]]
        found = results(problem.rows, y, dx, gradients, lambda vector: xp.asarray(vector, np.float64))
        found["inference"] = inferred[:, problem.rows]
        return {name: part if xp is np else part.get() for name, part in found.items()}

    calls = {"forward": forward, "train": train, "recurrent": _recurrent_part(direction, problem)}
    return Prepared(checked, calls, direction.explain(problem.steps, problem.batch, True))


def _recurrent_part(direction: Direction, problem: Problem) -> Callable[[], Any]:
    """The forward pass over an input of one feature, whose product costs next to nothing."""
    xp = launch.array_module()
    weights = direction._weights
    narrow = weights._replace(ih=weights.ih[:, :1].copy())
    part = CUDA(direction._precision).prepare(direction.cell, narrow)
    x = xp.zeros((problem.steps, problem.batch, 1), np.float32)
    y = xp.empty((problem.steps, problem.batch, problem.hidden), np.float32)
    final = tuple(xp.empty(y.shape[1:], y.dtype) for _ in direction.cell.states)
    return lambda: part.forward(x, None, y, final, None, None, False, False)


def cudnn(problem: Problem, given: Data, precision: Precision) -> Prepared:
    """PyTorch's layer with the same weights; in a simulator on the CPU, in float32."""
    import torch

    device = "cpu" if SIMULATED else "cuda"
    kinds = {} if SIMULATED else {"bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = kinds.get(precision, torch.float32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def layer_of(inputs: int) -> Any:
        layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[problem.cell](inputs, problem.hidden)
        with torch.no_grad():
            for parameter, entry in zip(layer.parameters(), given.weights[:4]):
                narrow = parameter.shape[1:] == (inputs,)
                parameter.copy_(torch.from_numpy(entry[:, :inputs] if narrow else entry))
        return layer.to(device, dtype)

    # in training mode cuDNN keeps what gradients need, even if none are wanted
    layer, inferring, narrow = layer_of(problem.inputs), layer_of(problem.inputs).eval(), layer_of(1).eval()
    x, dy = (torch.from_numpy(array).to(device, dtype) for array in (given.x, given.dy))
    thin = torch.zeros((problem.steps, problem.batch, 1), dtype=dtype, device=device)

    def forward() -> Any:
        with torch.no_grad():
            return inferring(x)[0]

    def without_input() -> Any:
        with torch.no_grad():
            return narrow(thin)[0]

    def train(gradient: Any = dy) -> tuple[Any, Any]:
        source = x.detach().requires_grad_()
        layer.zero_grad(set_to_none=True)
        y = layer(source)[0]
        y.backward(gradient)
        return y.detach(), source.grad

    def checked() -> dict[str, np.ndarray]:
        y, dx = train(torch.from_numpy(given.dy_checked).to(device, dtype))
        gradients = [parameter.grad.double() for parameter in layer.parameters()]
        vector = lambda values: torch.from_numpy(values).to(device).double()  # noqa: E731
        found = results(problem.rows, y, dx, gradients, vector)
        found["inference"] = forward()[:, problem.rows]
        return {name: part.double().cpu().numpy() for name, part in found.items()}

    return Prepared(checked, {"forward": forward, "train": train, "recurrent": without_input}, {})


CONTENDERS = {"fusedlstm": ours, "cudnn": cudnn}


def measure(
    who: str, problem: Problem, precision: Precision, wanted: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Errors and times of a contender."""
    prepared = CONTENDERS[who](problem, data(problem), precision)
    errors = check(prepared.results(), wanted, precision)
    times = {what: milliseconds(call, who) for what, call in prepared.calls.items()}
    return {"errors": errors, "kernels": prepared.kernels, **times}


def milliseconds(call: Callable[[], Any], who: str = "fusedlstm") -> dict[str, float] | None:
    """Median and quartiles by CUDA events, and how long the host takes to ask for it; None in a simulator."""
    if SIMULATED:
        call()
        return None
    event, elapsed, synchronize = _clock(who)
    for _ in range(WARM_UP):
        call()
    synchronize()
    start = time.perf_counter()
    for _ in range(WARM_UP):
        call()
    host = (time.perf_counter() - start) / WARM_UP
    synchronize()
    whole = (time.perf_counter() - start) / WARM_UP
    times = []
    for _ in range(min(MOST, max(FEWEST, int(SECONDS / whole)))):
        begin, end = event(), event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(elapsed(begin, end))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "low": low, "high": high, "host": 1000 * host}


def _clock(who: str) -> tuple[Callable[[], Any], Callable[[Any, Any], float], Callable[[], None]]:
    """Events on the contender's stream, the milliseconds between two, and a wait for the device."""
    if who == "cudnn":
        import torch

        event: Any = torch.cuda.Event
        return lambda: event(True), lambda begin, end: float(begin.elapsed_time(end)), torch.cuda.synchronize
    xp = launch.array_module()
    return xp.cuda.Event, xp.cuda.get_elapsed_time, xp.cuda.Device().synchronize


# --- What nothing can be faster than ----------------------------------------------------------------------


def _barriers(arrivals: Any, count: Any) -> None:
    for n in range(count):
        meet(arrivals, 0, np.uint64((n + 1) * cuda.gridDim.x))


def floors() -> dict[str, Any]:
    """Milliseconds of an empty launch, and microseconds of a barrier by the number of blocks that meet; bytes
    per second of a copy, and operations per second of a product in each precision."""
    device = launch.current_device()
    if SIMULATED:
        if device.cooperative:
            cuda.jit(_barriers)[3, device.threads](np.zeros(1, np.uint64), 3)
        return {"launch": None, "barrier": {}, "copy": None, "product": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "barriers.ptx")
        ptx, _ = cuda.compile(
            _barriers,
            types.void(types.uint64[::1], types.int64),
            cc=launch.target(device.capability),
            device=False,
            abi="numba",
        )
        path.write_text(ptx if isinstance(ptx, str) else ptx.decode())
        kernel = launch.Loaded(path, device.capability, device.threads, cooperative=True)
        kernel.prepare([launch.array_module().zeros(1, np.uint64)], 1)  # loads it

    def timed(blocks: int, count: int) -> dict[str, float]:
        arrivals = launch.array_module().zeros(1, np.uint64)
        arguments = kernel.prepare([arrivals], 1)
        arguments[-1] = count

        def once() -> None:
            arrivals.fill(0)
            kernel((blocks, 1), arguments)

        found = milliseconds(once)
        assert found is not None
        return found

    empty = timed(1, 0)
    counts = sorted({16, 64, 128, device.multiprocessors} & set(range(device.multiprocessors + 1)))
    barrier = {n: 1000 * (timed(n, BARRIERS)["median"] - timed(n, 0)["median"]) / BARRIERS for n in counts}
    return {"launch": empty, "barrier": barrier, **_rates()}


def _rates() -> dict[str, Any]:
    from fusedlstm.kernels.cuda.gemm import matmul

    xp, size = launch.array_module(), 8192
    source = xp.ones(1 << 28, np.float32)
    target = xp.empty_like(source)
    copied = milliseconds(lambda: xp.copyto(target, source))
    a = xp.asarray(normal(0, size, size))
    products = {name: milliseconds(lambda name=name: matmul(a, a, name, xp)) for name in PRECISIONS}  # type: ignore[misc]
    return {
        "copy": 2 * source.nbytes / (copied["median"] / 1000) if copied else None,
        "product": {n: 2 * size**3 / (found["median"] / 1000) for n, found in products.items() if found},
    }


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
    from fusedlstm.kernels.cuda.resources import without_gpu

    with without_gpu(launch.target(capability)):
        ptx = launch.cached_ptx(getattr(cells, cell), plan, False, training, launch.target(capability))
    launch.cached_cubin(ptx, capability)


def kernels(problem: Problem, precision: Precision, device: Device) -> Iterator[tuple[str, Plan, bool]]:
    """Cell, plan and whether for training, of each kernel that a row needs."""
    sizes = (device, problem.mathematics, precision, problem.hidden, 0, problem.batch)
    for backward, training in ((False, False), (False, True), (True, True)):
        yield problem.cell, choose(*sizes, backward), training


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
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(path)


HEADER = (
    "| cell | T | B | H | precision | forward, ms | cuDNN | ratio | forward and backward, ms | cuDNN | ratio "
    "| us a step | cuDNN | host, us | cuDNN |\n" + "|---" * 15 + "|"
)


def line(row: dict[str, Any]) -> str:
    """One row as Markdown; us a step are without the product of the input, the host's forward."""

    def figure(who: str, what: str, which: str = "median") -> float:
        found = row[who].get(what)
        return float(found[which]) if found else float("nan")

    def pair(what: str, which: str = "median", scale: float = 1) -> list[float]:
        return [scale * figure(who, what, which) for who in CONTENDERS]

    values = [str(row[key]) for key in ("cell", "steps", "batch", "hidden", "precision")]
    for what in ("forward", "train"):
        mine, theirs = pair(what)
        values += [f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}"]
    values += [f"{value:.2f}" for value in pair("recurrent", scale=1000 / row["steps"])]
    values += [f"{value:.0f}" for value in pair("forward", "host", 1000)]
    notes = [f" {who} failed: {row[who]['failed']}" for who in CONTENDERS if "failed" in row[who]]
    return "| " + " | ".join(values).replace("nan", "") + " |" + "".join(notes)


def about(record: dict[str, Any]) -> str:
    """Where and when, and the floors."""
    floor = record["floors"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    said = [f"{record['gpu']}, commit {record['commit']}, {record['date']}; {versions}."]
    if "failed" in floor:
        said.append(f"The floors could not be measured: {floor['failed']}.")
    elif not record["simulated"]:
        barriers = ", ".join(f"{count} blocks {us:.2f} us" for count, us in floor["barrier"].items())
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in floor["product"].items())
        empty = floor["launch"]
        said += [
            f"An empty launch: {1000 * empty['median']:.1f} us, {1000 * empty['host']:.1f} us of the host's.",
            f"One barrier of {barriers}.",
            f"A copy: {floor['copy'] / 1e9:.0f} GB/s; products: {rates}.",
        ]
    return "\n".join(said) + "\n"


def table(record: dict[str, Any]) -> str:
    """A record as Markdown."""
    left = f"\n\n{record['left out']} rows were left out for lack of time." if record["left out"] else ""
    return "\n".join([about(record), HEADER, *(line(row) for row in record["rows"])]) + left


def document(record: dict[str, Any]) -> str:
    """A record as a page of the docs."""
    return (
        "# Results on a GPU\n\n"
        "Made by `python -m benchmarks.gpu` and, of its record, `python -m benchmarks.gpu --document FILE`. "
        "A ratio is cuDNN's time over ours. " + table(record) + "\n"
    )


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
