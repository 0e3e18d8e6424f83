"""Calls with arguments of every kind and shape: each agrees with the reference, or is refused by name.

They run in a process of their own, which prints each call before it makes it, so that a crash is told with
what led to it:

    python tests/test_fuzz.py GROUP [SO MANY, NEW ONES EACH TIME]
"""

from __future__ import annotations

import faulthandler
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from checks import assert_close
from hypothesis import HealthCheck, given, settings

from fusedlstm import Recurrent, cells, set_num_threads

REFUSALS = (TypeError, ValueError, RuntimeError)
CELLS = (cells.lstm, cells.gru, cells.rnn_tanh, cells.peephole_lstm)
EXAMPLES = 60


# --- Arguments --------------------------------------------------------------------------------

Change = Callable[[np.ndarray], Any]


def spaced(a: np.ndarray) -> np.ndarray:
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), 100).astype(a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def unaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


class Subclass(np.ndarray):
    """An array of a class of its own."""


# those that change nothing but where numbers lie
LAYOUTS: dict[str, Change] = {
    "fortran": np.asfortranarray,
    "spaced": spaced,
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "last axis reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "swapped bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": unaligned,
    "read-only": read_only,
    "subclass": lambda a: a.view(Subclass),
    "first axis last": lambda a: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0),
}
# those after which the call may be refused
HOSTILE: dict[str, Change] = {
    "one more": lambda a: np.concatenate([a, a[:1]]) if a.size else np.ones((7, *a.shape[1:]), a.dtype),
    "one less": lambda a: a[:-1],
    "one column more": lambda a: np.concatenate([a, a[..., :1]], -1),
    "one column less": lambda a: a[..., :-1],
    "no columns": lambda a: a[..., :0],
    "no rows": lambda a: a[:0],
    "one axis more": lambda a: a[None],
    "one axis more at the end": lambda a: a[..., None],
    "one axis less": lambda a: a[0] if len(a) else a.reshape(-1),
    "flat": np.ravel,
    "transposed": np.transpose,
    "axes swapped": lambda a: a.swapaxes(0, 1) if a.ndim > 1 else a,
    "strides of zero": lambda a: np.broadcast_to(a[:1], a.shape) if len(a) else a,
    "a number": lambda a: np.float32(1),
    "a number without axes": lambda a: np.array(1, a.dtype),
    "lists": lambda a: a.tolist(),
    "masked": lambda a: np.ma.masked_array(a, np.ones(a.shape, bool)),
    "a text": lambda a: "text",
    "a mapping": lambda a: {"a": a},
    "ragged": lambda a: [[1], [2, 3]],
    "None inside": lambda a: [None, a],
    **{f"of {kind}": lambda a, kind=kind: a.astype(kind) for kind in (
        "float16", "float32", "float64", "longdouble", "complex64", "int64", "int8", "bool", "object", "S3",
    )},
    "of dates": lambda a: a.astype("int64").astype("M8[s]"),
    "of records": lambda a: np.zeros(a.shape, [("a", "f4"), ("b", "f4")]),
}  # fmt: skip
LENGTHS: dict[str, Change] = HOSTILE | {
    "huge": lambda a: a + 2**62,
    "one too long": lambda a: a + 100,
    "negative": lambda a: a - 100,
    "the least": lambda a: np.full_like(a, -(2**63)),
    "unsigned and huge": lambda a: a.astype("uint64") + np.uint64(2**63 + 2),
    "beyond 64 bits": lambda a: [2**70] * len(a),
    "of int32": lambda a: a.astype("int32"),
    "of uint8": lambda a: a.astype("uint8"),
    "NaN": lambda a: np.full(a.shape, np.nan),
}
STATES: dict[str, Callable[[list[Any]], Any]] = {
    "none of the states": lambda parts: (),
    "one state more": lambda parts: (*parts, parts[0]),
    "one state less": lambda parts: tuple(parts[:-1]),
    "stacked states": lambda parts: np.stack(parts) if len({p.shape for p in parts}) == 1 else (None,),
    "states of None": lambda parts: tuple(None for _ in parts),
    "a list of states": lambda parts: [*parts],
    "a generator": lambda parts: (part for part in parts),
    "a set": lambda parts: {1, 2},
}


class Argument(NamedTuple):
    """An argument of a call: what it is, and what was done to it."""

    value: Any
    change: str
    hostile: bool

    def __str__(self) -> str:
        return f"{self.change or 'as it should be'}: {shown(self.value)}"


def shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype.str} {value.shape} strides {value.strides}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(shown, value[:4]))})"
    if hasattr(value, "stride") and hasattr(value, "layout") and "strided" in str(value.layout):
        return f"{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}"
    return repr(value)[:80].replace("\n", " ")


CHANGED = st.sampled_from(["", "", "", "", "layout", "layout", "hostile"])


@st.composite
def changed(draw: st.DrawFn, a: np.ndarray, hostile: dict[str, Change] = HOSTILE) -> Argument:
    how = draw(CHANGED)
    if not how:
        return Argument(a, "", False)
    table = LAYOUTS if how == "layout" else hostile
    name = draw(st.sampled_from(list(table)))
    if a.ndim == 0:
        return Argument(a, "", False)
    return Argument(table[name](a), name, how == "hostile")


@st.composite
def changed_states(draw: st.DrawFn, parts: list[np.ndarray]) -> Argument:
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(list(STATES)))
        return Argument(STATES[name](parts), name, True)
    drawn = [draw(changed(part)) for part in parts]
    values = tuple(part.value for part in drawn)
    changes = ", ".join(part.change for part in drawn if part.change)
    return Argument(values if len(values) > 1 else values[0], changes, any(part.hostile for part in drawn))


# --- Calls --------------------------------------------------------------------------------


class Call(NamedTuple):
    """A layer and what it is called with."""

    options: dict[str, Any]
    arguments: dict[str, Argument]  # x, state, lengths, reset, mask, dy, dstate, dstates
    all_states: bool

    def __str__(self) -> str:
        told = [f"{name} {argument}" for name, argument in self.arguments.items()]
        options = {name: getattr(value, "name", value) for name, value in self.options.items()}
        return f"{options} " + "; ".join(told)

    @property
    def hostile(self) -> list[str]:
        return [name for name, argument in self.arguments.items() if argument.hostile]

    def given(self, *names: str) -> list[Any]:
        return [self.arguments[name].value if name in self.arguments else None for name in names]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    cell = draw(st.sampled_from(CELLS))
    hidden, inputs = draw(st.sampled_from([1, 3, 9, 17])), draw(st.sampled_from([1, 2, 5]))
    steps, batch = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    batched = draw(st.booleans()) or draw(st.booleans())
    proj = 1 if cell is cells.lstm and hidden > 1 and draw(st.booleans()) else 0
    options = {
        "cell": cell, "input_size": inputs, "hidden_size": hidden, "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()), "batch_first": draw(st.booleans()), "proj_size": proj,
        "bias": draw(st.booleans()), "heads": 1 if proj or draw(st.booleans()) else hidden,
    }  # fmt: skip
    dtype = draw(st.sampled_from(["float32", "float64"]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    directions = 1 + options["bidirectional"]
    rows = options["num_layers"] * directions
    leading: tuple[int, ...] = (steps,)
    if batched:
        leading = (batch, steps) if options["batch_first"] else (steps, batch)
    sizes = [proj or hidden, *[hidden] * (len(cell.states) - 1)]

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(dtype)

    def states() -> list[np.ndarray]:
        return [normal(rows, *([batch] if batched else []), size) for size in sizes]

    if not proj and draw(st.booleans()):
        options["input_size"], inputs = None, directions * len(cell.gates) * hidden
    arguments = {"x": draw(changed(normal(*leading, inputs)))}
    if draw(st.booleans()):
        arguments["state"] = draw(changed_states(states()))
    if (batched and draw(st.booleans())) or draw(st.integers(0, 15)) == 0:
        arguments["lengths"] = draw(changed(random.integers(0, steps + 1, batch), LENGTHS))
        if not batched:
            arguments["lengths"] = arguments["lengths"]._replace(hostile=True)
    if draw(st.booleans()):
        arguments["reset"] = draw(changed(random.random(leading) < 0.3))
    if draw(st.booleans()):
        arguments["mask"] = draw(changed(random.random(leading) < 0.7))
    all_states = draw(st.booleans())
    if draw(st.booleans()):
        arguments["dy"] = draw(changed(normal(*leading, directions * sizes[0])))
        if draw(st.booleans()):
            arguments["dstate"] = draw(changed_states(states()))
        if all_states:
            parts = [normal(steps, *state.shape) for state in states()]
            drawn = draw(changed_states(parts))
            # a tuple even of one
            arguments["dstates"] = drawn if len(parts) > 1 else drawn._replace(value=(drawn.value,))
    options["dtype"] = dtype
    return Call(options, arguments, all_states)


def plain(value: Any, dtype: Any = np.float64) -> Any:
    """What an accepted argument means, as the reference takes it."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and dtype is np.float64:
        return tuple(plain(part) for part in value)
    if hasattr(value, "detach"):
        value = value.detach().double() if value.is_floating_point() else value
        value = value.resolve_neg().resolve_conj().numpy()
    assert not isinstance(value, np.ma.MaskedArray), "a mask has been ignored"
    return np.array(value, dtype, order="C", subok=False)


def expected(call: Call, weights: dict[str, Any]) -> list[np.ndarray]:
    """What the reference gives in float64."""
    layer = Recurrent(**call.options | {"dtype": "float64"}, backend="reference")
    layer.load_state_dict(weights)
    x, state, lengths, reset, mask = call.given("x", "state", "lengths", "reset", "mask")
    reset, mask = (None if marks is None else plain(marks, None) for marks in (reset, mask))
    lengths = None if lengths is None else plain(lengths, np.int64)
    options = {"training": "dy" in call.arguments, "mask": mask, "all_states": call.all_states}
    y, final, *states, tape = layer.forward(plain(x), plain(state), lengths, reset, **options)
    results = [y, *_tuple(final), *(states[0] if states else ())]
    if tape is not None:
        dx, dinitial, gradients = tape.backward(*map(plain, call.given("dy", "dstate", "dstates")))
        results += [dx, *_tuple(dinitial), *gradients.values()]
    return results


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def check(call: Call, run: Callable[[Call], tuple[list[Any], dict[str, Any]]], names: dict[str, str]) -> None:
    """`names` are the patterns of the names of arguments in messages."""
    print(call, flush=True)
    refusal: Exception | None = None
    try:
        found, weights = run(call)
    except REFUSALS as error:
        refusal = error
    if refusal is not None:
        assert call.hostile, f"refused without a reason: {refusal!r}"
        # another size of the input may be what the others do not fit
        asked = list(call.arguments) if "x" in call.hostile else call.hostile
        assert any(re.search(names[name], str(refusal)) for name in asked), f"{asked} not named: {refusal!r}"
        return
    for n, (ours, theirs) in enumerate(zip(found, expected(call, weights), strict=True)):
        if ours is not None:
            assert_close(ours, theirs, 10, f"result {n}", gradient=True)


def run_arrays(call: Call) -> tuple[list[Any], dict[str, Any]]:
    layer = Recurrent(**call.options, backend="cpu", seed=1)
    (mask,) = call.given("mask")
    options = {"training": "dy" in call.arguments, "mask": mask, "all_states": call.all_states}
    y, final, *states, tape = layer.forward(*call.given("x", "state", "lengths", "reset"), **options)
    results = [y, *_tuple(final), *(states[0] if states else ())]
    if tape is not None:
        dx, dinitial, gradients = tape.backward(*call.given("dy", "dstate", "dstates"))
        results += [dx, *_tuple(dinitial), *gradients.values()]
    return results, layer.state_dict()


ARRAYS = {
    "x": r"\bx\b", "state": r"\bstate\b", "lengths": r"\blengths\b", "reset": r"\breset\b", "dy": r"\bdy\b",
    "mask": r"\bmask\b", "dstate": r"\bdstate\b", "dstates": r"\bdstates\b",
}  # fmt: skip


# --- PyTorch --------------------------------------------------------------------------------

TENSORS: dict[str, Callable[[Any], Any]] = {
    "": lambda t: t,
    "transposed storage": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
    "negative": lambda t: (
        _torch().complex(0 * t, t).conj().imag if t.itemsize in (4, 8) and t.is_floating_point() else t
    ),
    "a view": lambda t: t.repeat(2, *[1] * (t.ndim - 1))[len(t) :] if t.ndim else t,
    "a parameter": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "an array": lambda t: t.numpy(),
    "sparse": lambda t: t.to_sparse(),
    "without memory": lambda t: t.to("meta"),
    "of bfloat16": lambda t: t.bfloat16(),
    "quantized": lambda t: _torch().quantize_per_tensor(t.float(), 0.1, 0, _torch().quint8),
}
HARMLESS = ("", "transposed storage", "a view", "a parameter")


def _torch() -> Any:
    import torch

    return torch


@st.composite
def torch_calls(draw: st.DrawFn) -> Call:
    """Some of the calls on arrays, with tensors."""
    torch, call = _torch(), draw(calls())
    arguments = {}
    for name, argument in call.arguments.items():
        if name in ("dstate", "dstates"):
            continue
        changes: list[str] = []

        def convert(value: Any, name: str = name, changes: list[str] = changes) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(convert, value))
            try:
                tensor = (
                    torch.from_numpy(np.array(value, subok=False)) if isinstance(value, np.ndarray) else None
                )
            except (TypeError, ValueError):  # PyTorch has no such numbers
                tensor = None
            if tensor is None or isinstance(value, np.ma.MaskedArray):
                return value
            if value.strides[-1:] != (value.itemsize,) and value.ndim > 1 and value.size:
                tensor = tensor.mT.contiguous().mT
            # of a quantized gradient autograd itself says what it cannot make
            change = draw(
                st.sampled_from([*[""] * 20, *(c for c in TENSORS if c != "quantized" or name != "dy")])
            )
            changes.append(change)
            return TENSORS[change](tensor)

        value = convert(argument.value)
        hostile = argument.hostile or any(change not in HARMLESS for change in changes)
        told = ", ".join(filter(None, [argument.change, *changes]))
        if "swapped bytes" in argument.change or (name == "x" and 0 in getattr(value, "shape", ())[:-1]):
            hostile = True  # PyTorch has no such numbers; there must be a step
        arguments[name] = Argument(value, told, hostile)
    return Call(call.options, arguments, call.all_states)


def run_torch(call: Call) -> tuple[list[Any], dict[str, Any]]:
    import fusedlstm.torch as fused

    torch = _torch()
    options = call.options | {"dtype": getattr(torch, call.options["dtype"])}
    module = fused.Recurrent(**options)
    x, state, lengths, reset, dy = call.given("x", "state", "lengths", "reset", "dy")
    training = dy is not None
    if training:
        x, state = wanting(x), wanting(state)
    with torch.set_grad_enabled(training):
        mask = call.given("mask")[0]
        y, final, *states = module(x, state, lengths, reset, mask=mask, all_states=call.all_states)
    results = [y, *_tuple(final), *(states[0] if states else ())]
    if training:
        inputs = [x, *(() if state is None else state if isinstance(state, (tuple, list)) else (state,))]
        found = torch.autograd.grad([y], [*inputs, *module.parameters()], [dy])
        missing = [] if state is not None else [None] * len(call.options["cell"].states)
        results += [*found[: len(inputs)], *missing, *found[len(inputs) :]]
    return [result if result is None else result.detach().numpy() for result in results], module.state_dict()


def wanting(value: Any) -> Any:
    """Tensors that want a gradient, in the place of tensors."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(wanting, value))
    if isinstance(value, _torch().Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


TORCH = {
    "x": r"\binput\b", "state": r"\bhx\b|\bhidden\b|\binitial\b", "lengths": r"\blengths\b",
    "reset": r"\breset\b", "mask": r"\bmask\b", "dy": r"grad",
}  # fmt: skip


# --- In a process of its own --------------------------------------------------------------------------------


def fuzz_arrays(call: Call) -> None:
    check(call, run_arrays, ARRAYS)


def fuzz_torch(call: Call) -> None:
    check(call, run_torch, TORCH)


GROUPS: dict[str, tuple[Callable[..., Any], Callable[[Call], None]]] = {
    "arrays": (calls, fuzz_arrays),
    "torch": (torch_calls, fuzz_torch),
}


def main(group: str, count: str = "") -> None:
    faulthandler.enable()
    set_num_threads(1)
    draw, fuzz = GROUPS[group]
    few = settings(
        max_examples=int(count or EXAMPLES),
        deadline=None,
        derandomize=not count,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    few(given(call=draw())(fuzz))()


@pytest.mark.parametrize("group", GROUPS)
def test_a_call_is_right_or_refused_by_name(group: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), group], capture_output=True, text=True, timeout=3000
    )
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "before the first call"
    assert done.returncode == 0, f"{last}\nended with {done.returncode}:\n{done.stderr[-4000:]}"
    assert len(lines) >= EXAMPLES


if __name__ == "__main__":
    main(*sys.argv[1:])
