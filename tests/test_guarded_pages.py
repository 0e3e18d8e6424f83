"""Kernels beside memory that is not theirs: one number too far, read or written, ends the process.

Arrays end exactly where a page that nobody may touch begins, or begin exactly behind one.  The cases run in
processes of their own, which name each case before they run it:

    python tests/test_guarded_pages.py GROUP FIRST COUNT
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from checks import normalized_lstm

from fusedlstm import GRU, LSTM, Recurrent, cells, layers, masks, set_num_threads
from fusedlstm import weights as storage
from fusedlstm.cells import Cell

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no mprotect")

PAGE = mmap.PAGESIZE
POISON = 0xFF  # NaN, as a number

# --- Memory --------------------------------------------------------------------------------


class Memory:
    """Where the arrays of a case lie: "plain", or with a page of their own right "after" or "before" each."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._margins: list[tuple[np.ndarray, str]] = []  # what lies on the other side of each array

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        """An array full of NaN."""
        dtype, shape = np.dtype(dtype), shape if isinstance(shape, tuple) else (shape,)
        size = prod(shape) * dtype.itemsize
        return self._room(size, size).view(dtype).reshape(shape)

    def copy(self, values: Any) -> np.ndarray:
        values = np.asarray(values)
        copy = self.empty(values.shape, values.dtype)
        copy[...] = values
        return copy

    def lines(self, size: int) -> np.ndarray:
        """So many bytes of whole cache lines, as the engine takes its workspaces."""
        return self._room(size, -(-size // 64) * 64)

    def _room(self, size: int, room: int) -> np.ndarray:
        """The first `size` of `room` bytes beside the page."""
        if self.kind == "plain" or not size:
            return np.full(size, POISON, np.uint8)
        pages = -(-room // PAGE) * PAGE
        raw = np.frombuffer(mmap.mmap(-1, pages + PAGE), np.uint8)
        raw[:] = POISON
        start = pages - room if self.kind == "after" else PAGE
        protect(raw.ctypes.data + (pages if self.kind == "after" else 0))
        margin = raw[:start] if self.kind == "after" else raw[start + size :]
        self._margins.append((margin, f"{size} bytes"))
        return raw[start : start + size]

    def check(self) -> None:
        """Nothing has been written on the other side of an array either."""
        for margin, what in self._margins:
            assert (margin == POISON).all(), f"written beside {what}"


def protect(address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), ctypes.c_int(0)):
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """NumPy, but new arrays lie in such memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.empty = memory.empty

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if name in ("array", "ascontiguousarray", "zeros", "zeros_like", "empty_like", "stack"):
            return lambda *args, **options: self.memory.copy(value(*args, **options))
        return value


@contextmanager
def allocating(memory: Memory) -> Iterator[None]:
    """What the package allocates lies in this memory too: results, gradients, workspaces, packed weights."""
    from fusedlstm import host
    from fusedlstm.kernels.cpu import engine

    rooms = [module for name, module in sys.modules.items() if name.startswith("fusedlstm.torch.")]
    modules = [engine, host, layers, masks, *[room for room in rooms if hasattr(room, "np")]]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "np", Guarded(memory))
        order = engine.sequences
        patch.setattr(
            engine, "sequences", lambda *sizes: type(made := order(*sizes))(*map(memory.copy, made))
        )
        patch.setattr(engine, "empty_bytes", memory.lines)
        patch.setattr(host, "_packed", host._Table(1 << 28))
        yield


# --- Cases --------------------------------------------------------------------------------

CELLS = (
    cells.lstm, cells.gru, cells.gru_reset_before, cells.rnn_tanh, cells.peephole_lstm,
    cells.lstm_output_sees_cell, normalized_lstm,
)  # fmt: skip
SIZES = ((1, 1, 1, 1), (3, 2, 1, 17), (5, 7, 3, 33), (2, 19, 17, 5))  # T, B, I, H
ALL = len(CELLS) * 2 * len(SIZES)


class Case(NamedTuple):
    """One of the cases, which its number determines: the first ones are every cell, precision and size."""

    number: int
    cell: Cell
    dtype: np.dtype[Any]
    sizes: tuple[int, int, int, int]
    proj: int
    heads: int
    options: dict[str, bool]
    threads: int

    def __str__(self) -> str:
        chosen = [name for name, on in self.options.items() if on]
        return (
            f"{self.number}: {self.cell.name} {self.dtype} T, B, I, H = {self.sizes} "
            f"proj={self.proj} heads={self.heads} threads={self.threads} {' '.join(chosen)}"
        )

    def drawn(self, memory: Memory) -> Drawn:
        return Drawn(self, memory)


OPTIONS = (
    "bias",
    "initial",
    "dfinal",
    "lengths",
    "reset",
    "reverse",
    "wide",
    "batch_first",
    "backward",
    "deep",
    "every",
    "mask",
    "gates",
)


def case(number: int) -> Case:
    random = Random(number)
    cell = CELLS[number % len(CELLS)]
    sizes = SIZES[number // (2 * len(CELLS)) % len(SIZES)]
    if number >= ALL:
        sizes = tuple(random.choice((1, 2, 3, random.randint(1, most))) for most in (9, 40, 40, 70))
    hidden = sizes[3]
    proj = random.randint(1, hidden - 1) if cell is cells.lstm and hidden > 1 and random.random() < 0.5 else 0
    options = {name: random.random() < 0.5 for name in OPTIONS}
    dtype = np.dtype(("float32", "float64")[number // len(CELLS) % 2])
    # of the numbers that there may be
    heads = 1 if proj else random.choice([n for n in range(1, hidden + 1) if hidden % n == 0])
    options["gates"] &= not proj
    return Case(number, cell, dtype, sizes, proj, heads, options, random.choice((1, 2)))


class Drawn:
    """The numbers of a case: the same in every memory."""

    def __init__(self, case: Case, memory: Memory) -> None:
        self.case, self.memory = case, memory
        self.random = np.random.default_rng(case.number)

    def normal(self, *shape: int) -> np.ndarray:
        return self.memory.copy(0.5 * self.random.normal(size=shape).astype(self.case.dtype))

    def states(self, *leading: int) -> tuple[np.ndarray, ...]:
        hidden = self.case.sizes[3]
        sizes = (self.case.proj or hidden, *[hidden] * (len(self.case.cell.states) - 1))
        return tuple(self.normal(*leading, size) for size in sizes)

    def lengths(self) -> np.ndarray | None:
        steps, batch, *_ = self.case.sizes
        ends = self.random.integers(0, steps + 1, batch)
        return self.memory.copy(ends) if self.case.options["lengths"] else None

    def mask(self, *shape: int) -> np.ndarray | None:
        flags = self.random.random(shape) < 0.7
        return self.memory.copy(flags) if self.case.options["mask"] else None

    def reset(self, *shape: int) -> np.ndarray | None:
        flags = self.random.random(shape) < 0.3
        return self.memory.copy(flags) if self.case.options["reset"] else None


# --- The ways in --------------------------------------------------------------------------------

Results = list[Any]


def run_engine(case: Case, memory: Memory) -> Results:
    """Everything that the engine is given, and all that it makes."""
    from fusedlstm.kernels.cpu.engine import CPUDirection

    drawn, on = case.drawn(memory), case.options
    steps, batch, inputs, hidden = case.sizes
    outputs = case.proj or hidden
    cell = case.cell
    if on["gates"]:
        cell, inputs = cells.gate_inputs(cell), len(cell.gates_with_input) * hidden
    shapes = storage.shapes(cell, inputs, hidden, on["bias"], case.proj, case.heads)
    direction = CPUDirection(cell, storage.fill(shapes, lambda shape: drawn.normal(*shape)))

    def sequence(make: Callable[..., np.ndarray], size: int) -> np.ndarray:
        """(T, B, size): of a wider array the part beside the page, or with its first axes swapped."""
        own = slice(size, None) if memory.kind == "after" else slice(size)
        if memory.kind == "plain" or not on["wide"]:
            whole = make(steps, batch, size)
            return memory.copy(whole.swapaxes(0, 1)).swapaxes(0, 1) if on["batch_first"] else whole
        part = make(steps, batch, size)
        wide = memory.empty((steps, batch, 2 * size), case.dtype)
        wide[..., own] = part
        return wide[..., own]

    def empty(*shape: int) -> np.ndarray:
        return memory.empty(shape, case.dtype)

    x, dy = sequence(drawn.normal, inputs), sequence(drawn.normal, outputs)
    y = sequence(empty, outputs)
    initial, dfinal = drawn.states(batch), drawn.states(batch)
    final = tuple(empty(*state.shape) for state in initial)
    lengths, reset = drawn.lengths(), drawn.reset(steps, batch)
    states, dstates = (
        tuple(sequence(make, hidden) for _ in final[1:]) if on["every"] else None
        for make in (empty, drawn.normal)
    )
    given = (lengths, reset, on["reverse"], on["backward"], states)
    tape = direction.forward(x, initial if on["initial"] else None, y, final, *given)
    results = [y, *final, *(states or ())]
    if tape is None:
        return results
    for accumulate in (False, True):
        dx = sequence(empty if not accumulate else drawn.normal, inputs)
        dinitial, gradients = direction.backward(
            tape, dy, dfinal if on["dfinal"] else None, dx, accumulate, dstates
        )
        results += [dx, *dinitial, *storage.flatten(gradients)]
    dinitial, gradients = direction.backward(tape, dy, dfinal, None, False)
    return [*results, *dinitial, *storage.flatten(gradients)]


def settings(case: Case) -> dict[str, Any]:
    on = case.options
    chosen = {"bias": on["bias"], "batch_first": on["batch_first"], "bidirectional": on["reverse"]}
    return chosen | {"num_layers": 2 if on["deep"] else 1} | ({"proj_size": case.proj} if case.proj else {})


def run_arrays(case: Case, memory: Memory) -> Results:
    """The layers on arrays."""
    drawn, on = case.drawn(memory), case.options
    steps, batch, inputs, hidden = case.sizes
    args: Any = (None if on["gates"] else inputs, hidden)
    options = settings(case) | {"dtype": case.dtype, "backend": "cpu", "seed": 1, "heads": case.heads}
    layer: Recurrent
    if case.cell is cells.lstm:
        layer = LSTM(*args, **options)
    elif case.cell in (cells.gru, cells.gru_reset_before):
        layer = GRU(*args, reset_after=case.cell is cells.gru, **options)
    else:
        layer = Recurrent(case.cell, *args, **options)
    layer.load_state_dict({name: memory.copy(array) for name, array in layer.state_dict().items()})
    leading = (batch, steps) if on["batch_first"] else (steps, batch)
    rows = layer.num_layers * layer._directions
    x, dy = drawn.normal(*leading, layer._features), drawn.normal(*leading, layer._width)
    state, dstate = (
        parts[0] if len(parts) == 1 else parts
        for parts in (drawn.states(rows, batch), drawn.states(rows, batch))
    )
    given = (state if on["initial"] else None, drawn.lengths(), drawn.reset(*leading))
    mask, dstates = drawn.mask(*leading), drawn.states(steps, rows, batch)
    options = {"mask": mask, "all_states": on["every"]}
    y, final, *states, tape = layer.forward(x, *given, training=on["backward"], **options)
    results = [y, *_tuple(final), *(states[0] if states else ())]
    if tape is not None:
        dx, dinitial, gradients = tape.backward(
            dy, dstate if on["dfinal"] else None, dstates if on["every"] else None
        )
        results += [dx, *_tuple(dinitial), *gradients.values()]
    return results


def run_torch(case: Case, memory: Memory) -> Results:
    """The modules of PyTorch: tensors over such memory, and parameters too."""
    import torch

    import fusedlstm.torch as fused

    drawn, on = case.drawn(memory), case.options
    steps, batch, inputs, hidden = case.sizes
    dtype = torch.float32 if case.dtype == np.float32 else torch.float64
    module: Any
    if case.heads > 1 or on["gates"] or case.cell not in (cells.lstm, cells.gru):
        given_size = None if on["gates"] else inputs
        options = settings(case) | {"heads": case.heads}
        module = fused.Recurrent(case.cell, given_size, hidden, **options, dtype=dtype)
    elif case.cell is cells.lstm:
        module = fused.LSTM(inputs, hidden, **settings(case), dtype=dtype)
    else:
        module = fused.GRU(inputs, hidden, **settings(case), dtype=dtype)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).requires_grad_()

    for name, old in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(torch.from_numpy(drawn.normal(*old.shape))))
    leading = (batch, steps) if on["batch_first"] else (steps, batch)
    directions = 2 if on["reverse"] else 1
    rows = module.num_layers * directions
    x = tensor(drawn.normal(*leading, module.features))
    dy = torch.from_numpy(drawn.normal(*leading, directions * (case.proj or hidden)))
    parts, dfinal = map(list, (drawn.states(rows, batch), drawn.states(rows, batch)))
    hx = tuple(map(tensor, parts))
    marks = (drawn.lengths(), drawn.reset(*leading), drawn.mask(*leading))
    lengths, reset, mask = (None if a is None else torch.from_numpy(a) for a in marks)
    dstates = drawn.states(steps, rows, batch) if on["every"] else ()
    given = (x, (hx if len(hx) > 1 else hx[0]) if on["initial"] else None, lengths, reset)
    with torch.set_grad_enabled(on["backward"]):
        y, final, *states = module(*given, mask=mask, all_states=on["every"])
    results = [y, *_tuple(final), *(states[0] if states else ())]
    if on["backward"]:
        inputs_ = [x, *(hx if on["initial"] else ()), *module.parameters()]
        seeds = [dy, *map(torch.from_numpy, (*dfinal, *dstates))]
        results += torch.autograd.grad(results, inputs_, seeds)
    return [result.detach().numpy() for result in results]


def run_host(case: Case, memory: Memory) -> Results:
    """What Keras calls."""
    from fusedlstm import host

    drawn, on = case.drawn(memory), case.options
    steps, batch, inputs, units = case.sizes
    case = case._replace(proj=0)
    drawn.case = case
    masked, flags = on["lengths"], drawn.random.random((batch, steps)) < 0.7
    run = host.Run(case.cell, on["reverse"], on["wide"], on["reset"], on["initial"], masked)
    shapes = host._weight_shapes(case.cell, inputs, units, on["bias"]).values()
    x, initial = drawn.normal(batch, steps, inputs), drawn.states(batch)
    weights = [drawn.normal(*shape) for shape in shapes]
    flat = [x, *([memory.copy(flags)] if masked else []), *initial, *weights]
    *results, number = host.forward(run, on["backward"], *flat)
    dy, dfinal = drawn.normal(*results[0].shape), drawn.states(batch)
    if on["backward"]:
        for wants_dx in (True, False):  # the second runs forward again
            out = [memory.empty(a.shape, a.dtype) for a in [*[x] * wants_dx, *initial, *weights]]
            results += host.backward(run, wants_dx, number, *flat, dy, *dfinal, out=out)
    return results


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


GROUPS: dict[str, Callable[[Case, Memory], Results]] = {
    "engine": run_engine,
    "arrays": run_arrays,
    "torch": run_torch,
    "host": run_host,
}

# --- In a process of its own --------------------------------------------------------------------------------


def main(group: str, first: int, count: int) -> None:
    """Run the cases from `first` on; each gives the bits that it gives in memory of the usual kind."""
    from fusedlstm.kernels.cpu import plan

    faulthandler.enable()
    plan.START, plan.BARRIER, plan.FLOPS = 0.0, 0.0, 100.0  # several threads are always worth while
    if group == "torch":
        import fusedlstm.torch  # noqa: F401
    for number in range(first, first + count):
        one = case(number)
        set_num_threads(one.threads)
        expected = [np.array(result) for result in GROUPS[group](one, Memory("plain"))]
        for kind in ("after", "before"):
            print(group, kind, one, flush=True)
            memory = Memory(kind)
            with allocating(memory):
                found = GROUPS[group](one, memory)
            memory.check()
            for n, (ours, theirs) in enumerate(zip(found, expected)):
                np.testing.assert_array_equal(ours, theirs, f"result {n}", strict=True)
    print("done", flush=True)


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(__file__)), *arguments], capture_output=True, text=True, timeout=3000
    )


def check_group(group: str, first: int, count: int) -> None:
    done = child(group, str(first), str(count))
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "before the first case"
    assert done.returncode == 0, f"{last}\nended with {done.returncode}:\n{done.stderr}"
    assert len(lines) == 2 * count + 1


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_stay_in_their_arrays(group: str) -> None:
    """Every cell, precision and size."""
    check_group(group, 0, ALL)


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_stay_in_their_arrays_at_random(group: str, request: pytest.FixtureRequest) -> None:
    """As many as --guarded says; a failure names the number of its case."""
    count = request.config.getoption("--guarded")
    check_group(group, Random().randrange(ALL, 1 << 40) if count else ALL, count or 8)


@pytest.mark.parametrize(("kind", "place"), [("after", 5), ("before", -1)])
def test_one_number_too_far_is_found(kind: str, place: int) -> None:
    """By compiled code, which has no look at bounds: else nothing above would tell."""
    code = (
        "import ctypes, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_guarded_pages import Memory\n"
        f"array = Memory({kind!r}).empty((5,), 'float32')\n"
        "size = array.itemsize\n"
        "for place in (0, 4, {}):\n"
        "    print(place, flush=True)\n"
        "    ctypes.string_at(array.ctypes.data + place * size, size)\n"
    )
    good, bad = (
        subprocess.run([sys.executable, "-c", code.format(n)], capture_output=True, text=True)
        for n in (3, place)
    )
    assert good.returncode == 0, good.stderr
    assert bad.returncode < 0  # a signal
    assert bad.stdout.split() == ["0", "4", str(place)]


def test_what_is_written_on_the_other_side_is_found() -> None:
    memory = Memory("after")
    array = memory.empty((5,), "float32")
    memory.check()
    ctypes.memset(array.ctypes.data - 1, 0, 1)
    with pytest.raises(AssertionError, match="written beside 20 bytes"):
        memory.check()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
