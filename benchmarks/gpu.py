"""The CUDA kernels beside cuDNN on a GPU: `python -m benchmarks.gpu`.

Times the LSTM problems of DeepBench, FlashRNN's, and a selection of GRU problems, forward and forward
with backward, with and without the product of the input, against `torch.nn.LSTM` and `torch.nn.GRU`
(cuDNN) in float32, TF32, bfloat16 and float16.  No result is timed before it is right.  Times are
medians of CUDA events; the floor of a step (the grid barrier alone) and of a launch are measured on
the spot.  Writes JSON to benchmarks/results/, and `--table FILE` prints such a file as Markdown.

With NUMBA_ENABLE_CUDASIM=1 everything runs in a simulator at tiny sizes and nothing is timed, to see
that it is ready.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import cuda
from numba.cuda import types

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.engine import CUDA, Direction
from fusedlstm.kernels.cuda.plan import Precision
from fusedlstm.kernels.cuda.product import meet
from fusedlstm.kernels.cuda.ptx import SIMULATED
from fusedlstm.weights import Weights

from .machine import commit

HERE = Path(__file__).parent
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16", "float16")
GROUPS = ("deepbench_train_lstm", "deepbench_inference_lstm", "flashrnn", "gru")
GRU = ((25, 16, 512), (25, 64, 1024), (150, 32, 256), (50, 16, 1536))  # T, B, H = I
# The largest relative error of the output, from issues of each arithmetic alone; see docs/cuda.md
LIMITS = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
WARM_UP, REPEATS = 5, 30
BARRIERS = 1000


class Problem(NamedTuple):
    group: str
    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int


class Data(NamedTuple):
    """Arrays of one problem, float32 on the host."""

    weights: Weights
    x: np.ndarray  # (T, B, I)
    dy: np.ndarray  # (T, B, H)
    y: np.ndarray  # (T, B, H) by the reference in float64


def problems(groups: list[str]) -> Iterator[Problem]:
    shapes = json.loads((HERE / "shapes.json").read_text())
    for group in groups:
        if group == "gru":
            rows = [Problem(group, "gru", *sizes[:2], sizes[2], sizes[2]) for sizes in GRU]
        else:
            rows = [Problem(group, row["cell"], *(row[key] for key in "TBIH")) for row in shapes[group]]
        yield from ([rows[0]._replace(steps=2, batch=3, inputs=4, hidden=9)] if SIMULATED else rows)


def data(problem: Problem) -> Data:
    rng = np.random.default_rng(0)
    cell: Cell = getattr(cells, problem.cell)
    rows, bound = len(cell.gates) * problem.hidden, problem.hidden**-0.5

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    weights = Weights(
        uniform(rows, problem.inputs), uniform(rows, problem.hidden), uniform(rows), uniform(rows)
    )
    x = rng.standard_normal((problem.steps, problem.batch, problem.inputs), np.float32)
    dy = rng.standard_normal((problem.steps, problem.batch, problem.hidden), np.float32)
    exact = Weights._make([*(None if e is None else e.astype(np.float64) for e in weights[:5]), ()])
    initial = tuple(np.zeros((problem.batch, problem.hidden)) for _ in cell.states)
    y, _, _ = reference.forward(cell, exact, x.astype(np.float64), initial)
    return Data(weights, x, dy, y)


def relative_error(y: Any, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted))


def check(y: Any, wanted: np.ndarray, precision: Precision, who: str) -> float:
    """The relative error.

    Raises:
        RuntimeError: if it is so large that a time would mean nothing.
    """
    found = relative_error(y, wanted)
    if not found <= LIMITS[precision]:
        raise RuntimeError(f"{who}, {precision}: relative error {found:.1e} > {LIMITS[precision]:.0e}")
    return found


def milliseconds(run: Callable[[], Any]) -> dict[str, float] | None:
    """Median and quartiles by CUDA events; None in a simulator, which only runs it."""
    if SIMULATED:
        run()
        return None
    xp = launch.array_module()
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = xp.cuda.Event(), xp.cuda.Event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(xp.cuda.get_elapsed_time(begin, end))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "low": low, "high": high}


# --- Ours -------------------------------------------------------------------------------------------------


def ours(problem: Problem, given: Data, precision: Precision) -> dict[str, Any]:
    xp = launch.array_module()
    cell: Cell = getattr(cells, problem.cell)
    x, dy = xp.asarray(given.x), xp.asarray(given.dy)
    direction = CUDA(precision).prepare(cell, given.weights)
    y, dx = xp.empty_like(dy), xp.empty_like(x)
    final = tuple(xp.empty(dy.shape[1:], dy.dtype) for _ in cell.states)

    def forward(training: bool = False) -> Any:
        return direction.forward(x, None, y, final, None, None, False, training)

    def train() -> None:
        direction.backward(forward(training=True), dy, None, dx, False)

    forward()
    error = check(y if xp is np else y.get(), given.y, precision, "fusedlstm")
    return {
        "error": error,
        "kernels": direction.explain(problem.steps, problem.batch, True),
        "forward": milliseconds(forward),
        "train": milliseconds(train),
        "forward without input product": milliseconds(_recurrent_part(direction, problem)),
    }


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


# --- cuDNN ------------------------------------------------------------------------------------------------


def cudnn(problem: Problem, given: Data, precision: Precision) -> dict[str, Any]:
    """PyTorch's layer with the same weights, on the same stream."""
    import torch

    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    device = "cpu" if SIMULATED else "cuda"
    if SIMULATED:
        dtype = torch.float32  # to see that the weights are in their places

    def layer_of(inputs: int) -> Any:
        kind = torch.nn.LSTM if problem.cell == "lstm" else torch.nn.GRU
        layer = kind(inputs, problem.hidden)
        with torch.no_grad():
            for parameter, entry in zip(layer.parameters(), given.weights[:4]):
                parameter.copy_(
                    torch.from_numpy(entry[:, :inputs] if parameter.shape[1:] == (inputs,) else entry)
                )
        return layer.to(device, dtype)

    layer, x = layer_of(problem.inputs), torch.from_numpy(given.x).to(device, dtype)
    dy = torch.from_numpy(given.dy).to(device, dtype)
    narrow, thin = layer_of(1), torch.zeros((problem.steps, problem.batch, 1), dtype=dtype, device=device)

    def forward() -> Any:
        with torch.no_grad():
            return layer(x)[0]

    def train() -> None:
        source = x.detach().requires_grad_()
        layer.zero_grad(set_to_none=True)
        layer(source)[0].backward(dy)

    def without_input() -> Any:
        with torch.no_grad():
            return narrow(thin)[0]

    error = check(forward().float().cpu().numpy(), given.y, precision, "cuDNN")
    if SIMULATED:
        return {"error": error, "forward": milliseconds(forward), "train": milliseconds(train)}
    xp = launch.array_module()
    with xp.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        return {
            "error": error,
            "forward": milliseconds(forward),
            "train": milliseconds(train),
            "forward without input product": milliseconds(without_input),
        }


# --- What nothing can be faster than ----------------------------------------------------------------------


def floors() -> dict[str, Any]:
    """Milliseconds of an empty launch, and microseconds of one barrier of a grid that fills the GPU."""
    xp, device = launch.array_module(), launch.current_device()
    blocks = device.multiprocessors

    def barriers(arrivals: Any, count: Any) -> None:
        for n in range(count):
            meet(arrivals, 0, np.uint64((n + 1) * cuda.gridDim.x))

    if SIMULATED:
        if device.cooperative:
            cuda.jit(barriers)[blocks, device.threads](np.zeros(1, np.uint64), 3)
        return {"blocks": blocks, "launch": None, "barrier": None}
    ptx, _ = cuda.compile(
        barriers,
        types.void(types.uint64[::1], types.int64),
        cc=launch.target(device.capability),
        device=False,
        abi="numba",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "barriers.ptx")
        path.write_text(ptx if isinstance(ptx, str) else ptx.decode())
        run = launch.Loaded(path, device.threads, cooperative=True)
        run.prepare([xp.zeros(1, np.uint64)], 1)

    def timed(count: int) -> float:
        def once() -> None:
            run((blocks, 1), run.prepare([xp.zeros(1, np.uint64)], 1), (count,))

        found = milliseconds(once)
        assert found is not None
        return found["median"]

    empty = timed(0)
    return {"blocks": blocks, "launch": empty, "barrier": 1000 * (timed(BARRIERS) - empty) / BARRIERS}


# --- The record -------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """GPU, driver, versions and commit."""
    device = launch.current_device()
    versions = {"numba": numba.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    found: dict[str, Any] = {"gpu": device.name, "commit": commit(), "versions": versions}
    if not SIMULATED:
        import numba_cuda  # type: ignore[import-untyped]
        import torch

        xp = launch.array_module()
        runtime = xp.cuda.runtime
        versions |= {"numba-cuda": numba_cuda.__version__, "cupy": xp.__version__, "torch": torch.__version__}
        cudnn_version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        versions |= {"cudnn": cudnn_version, "cuda": runtime.runtimeGetVersion()}
        found["driver"] = runtime.driverGetVersion()
    return found


def measure(groups: list[str], precisions: list[Precision]) -> dict[str, Any]:
    rows = []
    for problem in problems(groups):
        given = data(problem)
        for precision in precisions:
            row: dict[str, Any] = problem._asdict() | {"precision": precision}
            for who, contender in (("fusedlstm", ours), ("cudnn", cudnn)):
                row[who] = contender(problem, given, precision)
            rows.append(row)
            print(line(row), flush=True)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "simulated": SIMULATED, **machine(), "floors": floors(), "rows": rows}


HEADER = (
    "| cell | T | B | H | precision | forward, ms | cuDNN | ratio | forward and backward, ms | cuDNN | ratio "
    "| us a step | cuDNN |\n" + "|---" * 13 + "|"
)


def line(row: dict[str, Any]) -> str:
    """One row as Markdown; the last columns are without the product of the input."""

    def median(who: str, what: str) -> float:
        found = row[who].get(what)
        return float(found["median"]) if found else float("nan")

    values = [str(row[key]) for key in ("cell", "steps", "batch", "hidden", "precision")]
    for what in ("forward", "train"):
        mine, theirs = median("fusedlstm", what), median("cudnn", what)
        values += [f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}"]
    for who in ("fusedlstm", "cudnn"):
        values.append(f"{1000 * median(who, 'forward without input product') / row['steps']:.2f}")
    return "| " + " | ".join(values) + " |"


def table(record: dict[str, Any]) -> str:
    """A record as Markdown."""
    floor = record["floors"]
    about = (
        f"{record['gpu']}, commit {record['commit']}, {record['date']}; an empty launch takes "
        f"{floor['launch']} ms, a barrier of {floor['blocks']} blocks {floor['barrier']} us.\n\n"
    )
    return about + "\n".join([HEADER, *(line(row) for row in record["rows"])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--table", type=Path, help="print this record and measure nothing")
    parser.add_argument("--output", type=Path, help="where the record goes; by default benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if SIMULATED and not launch.current_device().warps:
        print("simulator without warps: float32 only")
        arguments.precisions = ["float32"]
    print(HEADER)
    record = measure(arguments.groups, arguments.precisions)
    path = arguments.output
    if path is None and not SIMULATED:
        path = HERE / "results" / f"gpu-{record['gpu'].replace(' ', '-')}-{record['commit']}.json"
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
