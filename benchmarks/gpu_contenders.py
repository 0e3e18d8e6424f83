"""Who is measured on a GPU: the kernels of this package and cuDNN; and how they are timed there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedlstm.kernels.cuda import launch
from fusedlstm.kernels.cuda.engine import CUDA
from fusedlstm.kernels.cuda.plan import Precision
from fusedlstm.kernels.cuda.ptx import SIMULATED
from fusedlstm.weights import Weights

from .gpu_problems import Data, Problem, check, data, results

WARM_UP, FEWEST, MOST, SECONDS = 3, 10, 50, 0.3  # calls, and how long they should take together
SLOW = 0.1  # seconds of a call of which none is made for nothing


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

    calls = {
        "forward": forward,
        "train": train,
        "recurrent": recurrent_part(problem, given, CUDA(precision)),
    }
    kernels = direction.explain(problem.steps, problem.batch, True)
    if kernels["forward"].startswith("persistent"):
        calls["barriers"] = recurrent_part(problem, given, CUDA(precision, barrier_every=1))
    return Prepared(checked, calls, kernels)


def recurrent_part(problem: Problem, given: Data, engine: CUDA) -> Callable[[], Any]:
    """The forward pass over an input of one feature, whose product costs next to nothing."""
    xp, cell = launch.array_module(), problem.mathematics
    part = engine.prepare(cell, given.weights._replace(ih=given.weights.ih[:, :1].copy()))
    x = xp.zeros((problem.steps, problem.batch, 1), np.float32)
    y = xp.empty((problem.steps, problem.batch, problem.hidden), np.float32)
    final = tuple(xp.empty(y.shape[1:], y.dtype) for _ in cell.states)
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
    start = time.perf_counter()
    call()
    synchronize()
    slow = time.perf_counter() - start > SLOW  # the first may be, since kernels are loaded
    for _ in range(0 if slow else WARM_UP - 1):
        call()
    synchronize()
    start, calls = time.perf_counter(), 1 if slow else WARM_UP
    for _ in range(calls):
        call()
    host = (time.perf_counter() - start) / calls
    synchronize()
    whole = (time.perf_counter() - start) / calls
    times = []
    for _ in range(2 if whole > SLOW else min(MOST, max(FEWEST, int(SECONDS / whole)))):
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
