"""Products of bfloat16 and int8 on the CPU, against the reference with weights and rows rounded likewise.

That is far tighter than what the precisions allow against exact products, which is tested beside it.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from checks import ALL, error, five_gates, late_and_means, name, other_operand
from test_cpu_engine import GIVEN, HEADS, SHARED, SIZES, Case, Problem, cast, problem, several_threads
from test_cpu_spec import AVX2, AVX512, SSE, X86, python

import fusedlstm
from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels import reference
from fusedlstm.kernels.cpu import engine as cpu
from fusedlstm.kernels.cpu import spec
from fusedlstm.kernels.cpu.engine import CPU, CPUDirection
from fusedlstm.weights import Weights, flatten

NARROW = ("bfloat16", "int8")
# Of the norm, against the rounded reference: a last bit of a sum decides now and then how a state is rounded.
CLOSE = {"bfloat16": 1e-3, "int8": 6e-3}
PROMISED = {"bfloat16": 5e-3, "int8": 8e-3}  # against exact products


def rounded(rows: np.ndarray, precision: str) -> np.ndarray:
    """Each row as products in a precision see it."""
    rows = rows.astype(np.float32)
    if precision == "int8 twice":  # what is left over is rounded to integers in turn
        first = rounded(rows, "int8")
        return first + rounded(rows - first, "int8")
    if precision == "bfloat16":
        bits = rows.view(np.uint32)
        return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)
    with np.errstate(divide="ignore"):
        factor = np.minimum(127 / np.abs(rows).max(-1, keepdims=True), 2.0**126).astype(np.float32)
    return np.rint(rows * factor) / factor.astype(np.float64)


class Rounding(np.ndarray):
    """Weights that round what they are multiplied by: an input in integers has 16 bits."""

    precision: str

    def __array_finalize__(self, other: Any) -> None:
        self.precision = getattr(other, "precision", "")

    def __rmatmul__(self, rows: Any) -> Any:
        return rounded(np.asarray(rows), self.precision).astype(float) @ np.asarray(self)


def rounding(matrix: np.ndarray | None, precision: str) -> Any:
    if matrix is None:
        return None
    made = rounded(matrix, precision.removesuffix(" twice")).astype(float).view(Rounding)
    made.precision = precision
    return made


Found = dict[str, np.ndarray]


def named(y: np.ndarray, final: Any) -> Found:
    return {"y": y, **{f"final {n}": state for n, state in enumerate(final)}}


def narrow_weights(cell: Cell, weights: Weights, precision: str) -> Weights:
    """Weights of the reference whose products are rounded; heads have zeros between them."""
    ih, hh, bias_ih, bias_hh, hr, vectors = weights
    if hh is not None and hr is None:
        parts, hidden = np.split(hh, len(cell.gates_with_recurrent)), cell.hidden_size(weights)
        hh = np.concatenate([reference.block_diagonal(part, hidden) for part in parts])
    of_input = "int8 twice" if precision == "int8" else precision
    ih, hh, hr = rounding(ih, of_input), rounding(hh, precision), rounding(hr, precision)
    return Weights(ih, hh, bias_ih, bias_hh, hr, vectors)


def expected(cell: Cell, p: Problem, case: Case, precision: str | None) -> Found:
    """What the reference says in float64, with rounded products if a precision is given."""
    weights = narrow_weights(cell, p.weights, precision) if precision else p.weights
    y, final, _ = reference.forward(cell, weights, p.x, p.initial, p.lengths, p.reset, case.reverse)
    return named(np.asarray(y), [np.asarray(state) for state in final])


def run(made: CPUDirection, p: Problem, case: Case) -> Found:
    initial = tuple(state.astype(np.float32) for state in p.initial)
    y, final = np.full(p.dy.shape, np.nan, np.float32), tuple(np.full_like(s, np.nan) for s in initial)
    x = p.x.astype(np.float32)
    made.forward(x, initial, y, final, p.lengths, p.reset, case.reverse, False)
    return named(y, final)


def check(cell: Cell, case: Case, precision: str) -> None:
    p = problem(cell, case, np.float32)
    found = run(CPU(precision).prepare(cell, cast(p.weights, np.float32)), p, case)
    wanted, exact = expected(cell, p, case, precision), expected(cell, p, case, None)
    for what, array in found.items():
        assert error(array, wanted[what]) < CLOSE[precision], what
    if case.inputs > 1:  # else its rows are their own scales
        assert any(error(wanted[what], exact[what]) > 1e-4 for what in found), "nothing was rounded"


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("case", SIZES[1:], ids=str)
@pytest.mark.parametrize("cell", ALL, ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_every_cell(precision: str, cell: Cell, case: Case) -> None:
    check(cell, case, precision)


GRADIENTS = [*SIZES[1:], Case(40, 20, 9, 75), Case(3, 5, 8, 64, proj=7, padded=True)]


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, late_and_means, five_gates], ids=name)
def test_training_in_bfloat16(cell: Cell, case: Case) -> None:
    """Gradients are multiplied as bfloat16 too, whose rounding errors the gradients of weights add up."""
    if cell is not cells.lstm:
        case = case._replace(proj=0)
    p = problem(cell, case, np.float32)
    made = CPU("bfloat16").prepare(cell, cast(p.weights, np.float32))
    x, dy, dx = (array.astype(np.float32) for array in (p.x, p.dy, p.dx))
    initial, dfinal = (tuple(s.astype(np.float32) for s in states) for states in (p.initial, p.dfinal))
    y, final = np.full_like(dy, np.nan), tuple(np.full_like(s, np.nan) for s in initial)
    states, dstates = (tuple(s.astype(np.float32) for s in p.dstates) if case.every else None for _ in "ab")
    tape = made.forward(x, initial, y, final, p.lengths, p.reset, case.reverse, True, states)
    dinitial, grads = made.backward(tape, dy, dfinal, dx, True, dstates)
    weights = narrow_weights(cell, p.weights, "bfloat16")
    *_, taped = reference.forward(cell, weights, p.x, p.initial, p.lengths, p.reset, case.reverse)
    for found, wanted in zip(states or (), taped.states):
        assert error(found, np.asarray(wanted)) < CLOSE["bfloat16"]
    dx_wanted, dinitial_wanted, grads_wanted = reference.backward(
        taped, p.dy, p.dfinal, p.dstates if case.every else ()
    )
    if grads.hh is not None and case.heads > 1:
        parts = np.split(np.asarray(grads_wanted.hh), len(cell.gates_with_recurrent))
        own = [reference.diagonal_blocks(part, case.hidden // case.heads) for part in parts]
        grads_wanted = grads_wanted._replace(hh=np.concatenate(own))
    assert error(dx, p.dx + np.asarray(dx_wanted)) < 3e-3
    for found, wanted in zip(dinitial, dinitial_wanted):
        assert error(found, np.asarray(wanted)) < 3e-3
    for found, wanted in zip(flatten(grads), flatten(grads_wanted)):
        assert error(found, np.asarray(wanted)) < 6e-3


# Heads that begin within a group, and with it, of less than one, and whose last ends where rows do.
NARROW_HEADS = [*HEADS, (30, 15), (48, 16), (130, 10)]


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("case", SIZES[1:3], ids=str)
@pytest.mark.parametrize(("hidden", "heads"), NARROW_HEADS)
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means], ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_heads(precision: str, cell: Cell, hidden: int, heads: int, case: Case) -> None:
    check(cell, case._replace(hidden=hidden, heads=heads), precision)


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize(("hidden", "heads"), NARROW_HEADS)
@pytest.mark.parametrize("cell", [cells.lstm, late_and_means], ids=name)
def test_training_heads_in_bfloat16(cell: Cell, hidden: int, heads: int) -> None:
    test_training_in_bfloat16(cell, SIZES[2]._replace(hidden=hidden, heads=heads))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("cell", GIVEN, ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_gate_inputs(precision: str, cell: Cell, heads: int) -> None:
    case = SIZES[2]._replace(heads=heads)
    check(cell, case, precision)
    if precision == "bfloat16":
        test_training_in_bfloat16(cell, case)


@pytest.mark.parametrize("cell", [cells.lstm, late_and_means, GIVEN[0]], ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_a_bound_pass_keeps_what_it_multiplies(precision: str, cell: Cell) -> None:
    """A step at a time, after everything else that knew of the weights is gone."""
    case = Case(6, 5, 7, 34, heads=2)
    p = problem(cell, case, np.float32)
    states = tuple(state.astype(np.float32) for state in p.initial)
    x, y = np.zeros((1, *p.x.shape[1:]), np.float32), np.zeros((1, *p.dy.shape[1:]), np.float32)
    bound = CPU(precision).prepare(cell, cast(p.weights, np.float32)).repeated(x, y, states)
    for state, start in zip(states, p.initial):
        state[...] = start
    gc.collect()
    outputs = []
    for given in p.x:
        x[0] = given
        bound.run()
        outputs.append(y[0].copy())
    wanted = expected(cell, p, case, precision)
    for what, array in named(np.array(outputs), states).items():
        assert error(array, wanted[what]) < CLOSE[precision], what


@pytest.mark.parametrize("proj", [1, 5, 16])
@pytest.mark.parametrize("case", SIZES[1:], ids=str)
@pytest.mark.parametrize("precision", NARROW)
def test_projection(precision: str, case: Case, proj: int) -> None:
    check(cells.lstm, case._replace(proj=proj), precision)


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("hidden", [1, 2, 3, 5, 31, 66, 130])
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 6, 33])
@pytest.mark.parametrize("precision", NARROW)
def test_sizes_that_fill_no_group(precision: str, inputs: int, hidden: int) -> None:
    check(cells.gru, Case(3, 4, inputs, hidden), precision)


@pytest.mark.sampled(0.34)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("cell", "proj"), [(cells.lstm, 0), (cells.lstm, 20), (late_and_means, 0)], ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_any_number_of_threads(
    precision: str, cell: Cell, proj: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = SHARED._replace(proj=proj)
    p = problem(cell, case, np.float32)
    weights = cast(p.weights, np.float32)
    fusedlstm.set_num_threads(1)
    alone = run(CPU(precision).prepare(cell, weights), p, case)
    with several_threads(threads, monkeypatch):
        made = CPU(precision).prepare(cell, weights)
        for _ in range(3):
            for what, array in run(made, p, case).items():
                assert np.array_equal(array, alone[what]), what


@pytest.mark.parametrize("hidden", [64, 256])
@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.coupled_lstm], ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_what_is_promised(precision: str, cell: Cell, hidden: int) -> None:
    """With weights and inputs as in practice, against exact products.

    Cells that normalize divide errors by what may be small; they are held against rounded products above.
    """
    made = fusedlstm.Recurrent(cell, hidden, hidden, precision=precision, seed=1)
    exact = fusedlstm.Recurrent(cell, hidden, hidden, seed=1)
    x = np.random.default_rng(3).normal(size=(25, 5, hidden)).astype(np.float32)
    assert error(made(x)[0], exact(x)[0]) < PROMISED[precision]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cell", [cells.lstm, other_operand, late_and_means], ids=name)
@pytest.mark.parametrize("precision", NARROW)
def test_nan_and_infinity_stay_in_their_row(precision: str, cell: Cell, value: float) -> None:
    """The others keep their bits; integers show either as NaN, never as a finite number."""
    case = Case(9, 14, 3, 17)
    p = problem(cell, case, np.float32)
    made = CPU(precision).prepare(cell, cast(p.weights, np.float32))
    clean = run(made, p, case)
    p.x[2, 5, 1] = value
    dirty = run(made, p, case)
    others = np.arange(14) != 5
    for what in clean:
        assert np.array_equal(clean[what][..., others, :], dirty[what][..., others, :]), what
    assert np.array_equal(dirty["y"][:2, 5], clean["y"][:2, 5])
    if np.isnan(value) or precision == "int8":
        assert np.isnan(dirty["y"][2:, 5]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", NARROW)
def test_a_spoilt_weight_shows(precision: str, value: float) -> None:
    """In the units that it belongs to; at the next step, in all."""
    p = problem(cells.rnn_tanh, case := Case(1, 3, 5, 40), np.float32)
    weights = cast(p.weights, np.float32)
    weights.ih[7, 2] = np.copysign(value, 1)
    y = run(CPU(precision).prepare(cells.rnn_tanh, weights), p, case)["y"]
    if np.isnan(value) or precision == "int8":
        assert np.isnan(y[0, :, 7]).all()
    assert np.isfinite(np.delete(y, 7, 2)).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("depth", [2, 3, 512, 5000])
def test_integers_do_not_saturate(depth: int, sign: int) -> None:
    """The largest products of all, in sums of the length that pairs of 16 bits could not hold."""
    weights = Weights(np.full((20, depth), 1.0, np.float32), np.zeros((20, 20), np.float32))
    x = np.full((1, 1, depth), sign, np.float32)
    made = CPU("int8").prepare(cells.rnn_relu, weights)
    y, final = np.empty((1, 1, 20), np.float32), (np.empty((1, 20), np.float32),)
    made.forward(x, None, y, final, None, None, False, False)
    np.testing.assert_allclose(y, max(sign, 0) * depth, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e-20, 1e20, 1e30])
def test_integers_have_the_range_of_their_scales(scale: float) -> None:
    """Rows and weights of any size, in one layer; denormal numbers lose what they have to."""
    generator = np.random.default_rng(0)
    ih = generator.normal(size=(33, 40)).astype(np.float32)
    ih[::2] *= 1e-3
    x = generator.normal(size=(1, 3, 40)) * np.array([1, scale, 0])[:, None]
    x = x.astype(np.float32)
    made = CPU("int8").prepare(cells.rnn_relu, Weights(ih, np.zeros((33, 33), np.float32)))
    y, final = np.empty((1, 3, 33), np.float32), (np.empty((3, 33), np.float32),)
    made.forward(x, None, y, final, None, None, False, False)
    exact = np.maximum(x[0].astype(float) @ ih.T, 0)
    assert error(y[0, 0], exact[0]) < 0.02
    assert (y[0, 2] == 0).all()
    difference = np.linalg.norm(y[0, 1] - exact[1])
    assert difference < 0.02 * np.linalg.norm(exact[1]) + 1e-37


def test_products_of_one_row_each_have_their_scale() -> None:
    """A row that is a thousand times another is no worse for it."""
    generator = np.random.default_rng(0)
    ih = (generator.normal(size=(32, 64)) * 10.0 ** generator.integers(-3, 3, (32, 1))).astype(np.float32)
    x = (generator.normal(size=(1, 9, 64)) * 10.0 ** np.arange(-4, 5)[:, None]).astype(np.float32)
    made = CPU("int8").prepare(cells.rnn_relu, Weights(ih, np.zeros((32, 32), np.float32)))
    y, final = np.empty((1, 9, 32), np.float32), (np.empty((9, 32), np.float32),)
    made.forward(x, None, y, final, None, None, False, False)
    exact = np.maximum(x[0].astype(float) @ ih.T, 0)
    worst = np.abs(x[0]).max(-1)[:, None] * np.abs(ih).max(-1) * 64 / 127
    assert (np.abs(y[0] - exact) < worst).all()


def test_training_in_integers_is_refused() -> None:
    layer = fusedlstm.LSTM(3, 5, precision="int8")
    with pytest.raises(ValueError, match="'int8' is for inference; train in 'float32' or 'bfloat16'"):
        layer.forward(np.zeros((2, 1, 3), np.float32), training=True)


def test_what_sums_of_integers_cannot_hold_is_refused() -> None:
    ih = np.zeros((1, cpu.MOST_INTEGERS + 1), np.float32)
    with pytest.raises(ValueError, match="'int8' takes at most 131072 inputs or units, got 131073"):
        CPU("int8").prepare(cells.rnn_tanh, Weights(ih, np.zeros((1, 1), np.float32)))
    with pytest.raises(ValueError, match="needs weights of float32, got float64"):
        CPU("int8").prepare(cells.rnn_tanh, Weights(np.zeros((1, 1)), np.zeros((1, 1))))


@pytest.mark.parametrize("precision", NARROW)
def test_weights_take_less_memory(precision: str) -> None:
    p = problem(cells.lstm, Case(1, 1, 128, 128), np.float32)
    weights = cast(p.weights, np.float32)
    exact, narrow = CPU().prepare(cells.lstm, weights), CPU(precision).prepare(cells.lstm, weights)
    assert narrow.nbytes < exact.nbytes * {"bfloat16": 0.55, "int8": 0.3}[precision]


def test_explain_says_what_is_multiplied() -> None:
    p = problem(cells.lstm, Case(1, 1, 8, 8), np.float32)
    weights = cast(p.weights, np.float32)
    for precision in NARROW:
        says = CPU(precision).prepare(cells.lstm, weights).explain(1, 1, training=False)["products"]
        operand = spec.operand(precision)
        assert ("widened to float32" if operand is spec.WIDENED else operand.instruction) in says


# --- Other processors -----------------------------------------------------------------------

BFLOAT16, VNNI = f"{AVX512},+avx512bf16", f"{AVX512},+avx512vnni"
PROCESSORS = {  # Numba's name, features, and what products of bfloat16 and of int8 are made of
    "AVX512-BF16": ("cooperlake", BFLOAT16, "dpbf16ps", "vpdpbusd"),
    "AVX512-VNNI": ("cascadelake", VNNI, "multiply-add of widened bfloat16", "vpdpbusd"),
    "AVX-512": ("skylake-avx512", AVX512, "multiply-add of widened bfloat16", "pmaddwd"),
    "AVX-VNNI": ("alderlake", f"{AVX2},+avxvnni", "multiply-add of widened bfloat16", "vpdpbusd"),
    "AVX2": ("haswell", AVX2, "multiply-add of widened bfloat16", "pmaddwd"),
    "SSE": ("nehalem", SSE, "multiply-add of widened bfloat16", "pmaddwd"),
}
NEEDED = {"AVX512-BF16": "avx512_bf16", "AVX512-VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni"}
KIND = """
import sys
from checks import late_and_means
from fusedlstm import cells
from fusedlstm.kernels.cpu.spec import operand
from test_cpu_engine import SIZES
from test_cpu_precision import Case, check, test_integers_do_not_saturate

found = operand("bfloat16").instruction, operand("int8").instruction
assert found == tuple(sys.argv[1:]), found
for precision in ("bfloat16", "int8"):
    check(cells.lstm, SIZES[2], precision)
    check(cells.lstm, SIZES[3]._replace(proj=5), precision)
    check(late_and_means, SIZES[1], precision)
for sign in (1, -1):
    test_integers_do_not_saturate(512, sign)
"""


def can_run(kind: str) -> bool:
    """Whether this processor has what a kind of processor has."""
    bits = {"AVX-512": 512, "AVX2": 256, "SSE": 128}
    if kind in bits:
        return spec.machine().bits >= bits[kind]
    with open("/proc/cpuinfo") as file:
        return NEEDED[kind] in file.read()


@pytest.mark.sampled(0.5)
@X86
@pytest.mark.parametrize("kind", PROCESSORS)
def test_kernels_for_another_processor(kind: str) -> None:
    """What cannot be tried here is not: the process would end at the first instruction it does not know."""
    processor, features, *instructions = PROCESSORS[kind]
    if not can_run(kind):
        pytest.skip(f"this processor has no {kind}")
    python(KIND, *instructions, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)
