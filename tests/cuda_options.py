"""Every option of the layers with backend="cuda" against the reference in float64, forward and backward.

On a GPU test_cuda_gpu.py runs them.  As a program, ``NUMBA_ENABLE_CUDASIM=1 python cuda_options.py NAME``,
this runs one as a user of Numba's simulator would, on NumPy arrays and with nothing prepared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from checks import assert_close, other_operand, three_states

from fusedlstm import GRU, LSTM, RNN, Recurrent, cells

STEPS, BATCH, INPUTS, HIDDEN = 3, 4, 2, 3
SIZES = (INPUTS, HIDDEN)
LENGTHS = np.array([3, 1, 2, 3])
RESET = np.array([[True, False, True, False], [False, True, True, False], [True, True, False, False]])

Layer = Callable[..., Recurrent]
# the layer, and what it is called with beside x and a state
OPTIONS: dict[str, tuple[Layer, dict[str, Any]]] = {
    "lstm": (partial(LSTM, *SIZES), {}),
    "both-directions": (partial(LSTM, *SIZES, bidirectional=True), {}),
    "two-layers": (partial(LSTM, *SIZES, 2), {}),
    "two-layers-both-directions": (partial(LSTM, *SIZES, 2, bidirectional=True), {}),
    "projection": (partial(LSTM, *SIZES, proj_size=2), {}),
    "projection-both-directions": (partial(LSTM, *SIZES, 2, proj_size=2, bidirectional=True), {}),
    "lengths": (partial(LSTM, *SIZES, bidirectional=True), {"lengths": LENGTHS}),
    "resets": (partial(LSTM, *SIZES, bidirectional=True), {"reset": RESET}),
    "lengths-and-resets": (partial(LSTM, *SIZES, proj_size=2), {"lengths": LENGTHS, "reset": RESET}),
    "no-bias": (partial(LSTM, *SIZES, bias=False), {}),
    "batch-first": (partial(LSTM, *SIZES, 2, batch_first=True, bidirectional=True), {}),
    "dropout": (partial(LSTM, *SIZES, 2, dropout=0.5, bidirectional=True), {}),
    "recurrent-dropout": (partial(LSTM, *SIZES, 2, recurrent_dropout=0.5, bidirectional=True), {}),
    "float64": (partial(LSTM, *SIZES, dtype="float64", bidirectional=True), {}),
    "gru": (partial(GRU, *SIZES, bidirectional=True), {"lengths": LENGTHS}),
    "gru-reset-before": (partial(GRU, *SIZES, bidirectional=True, reset_after=False), {"reset": RESET}),
    "output-sees-cell": (partial(Recurrent, cells.lstm_output_sees_cell, *SIZES, bidirectional=True), {}),
    "output-from-memory": (partial(Recurrent, cells.lstm_output_from_memory, *SIZES), {"lengths": LENGTHS}),
    "rnn-tanh": (partial(RNN, *SIZES, bidirectional=True), {"lengths": LENGTHS}),
    "rnn-relu": (partial(RNN, *SIZES, nonlinearity="relu"), {"reset": RESET}),
    "peephole": (partial(Recurrent, cells.peephole_lstm, *SIZES, bidirectional=True), {}),
    "own-cell": (partial(Recurrent, three_states, *SIZES, bidirectional=True), {"lengths": LENGTHS}),
    "own-operand": (partial(Recurrent, other_operand, *SIZES, 2), {"reset": RESET}),
}


def check(name: str, xp: Any = np) -> None:
    """Assert that all results of an option are right; `xp` is the library of the arrays that it takes."""
    make, options = OPTIONS[name]
    layer = make(backend="cuda", seed=1)
    exact = make(backend="reference", seed=1, dtype="float64")
    exact.load_state_dict(layer.state_dict())
    found, wanted = (results(tried, options, xp if tried is layer else np) for tried in (layer, exact))
    assert found.keys() == wanted.keys()
    for what, array in found.items():
        host = array if xp is np else array.get()
        assert_close(host, wanted[what], 2 * STEPS, f"{name}: {what}", gradient=what.startswith("d"))


def results(layer: Recurrent, options: dict[str, Any], xp: Any) -> dict[str, Any]:
    """What both passes compute, by name; the numbers that they are given are the same in every dtype."""
    rng = np.random.default_rng(0)

    def number(*shape: int) -> Any:
        return xp.asarray(rng.uniform(-1, 1, shape).astype(np.float32).astype(layer.dtype))

    shape = (BATCH, STEPS) if layer.batch_first else (STEPS, BATCH)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    outputs = layer.proj_size or HIDDEN
    sizes = (outputs, *[HIDDEN] * (len(layer.cell.states) - 1))

    def states() -> Any:
        parts = tuple(number(rows, BATCH, size) for size in sizes)
        return parts if len(parts) > 1 else parts[0]

    given = {key: xp.asarray(value) for key, value in options.items()}
    y, final, tape = layer.forward(number(*shape, INPUTS), states(), **given, training=True)
    assert tape is not None
    dx, dinitial, gradients = tape.backward(number(*y.shape), states())
    found = {"y": y, "dx": dx, **{f"d{key}": gradient for key, gradient in gradients.items()}}
    for what, parts in (("final", final), ("dinitial", dinitial)):
        of_each = parts if isinstance(parts, tuple) else (parts,)
        found |= {f"{what} {state}": part for state, part in zip(layer.cell.states, of_each)}
    return found


if __name__ == "__main__":
    check(sys.argv[1])
