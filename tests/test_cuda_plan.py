"""The choice of kernels: what a device is given to do."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusedlstm import cells
from fusedlstm.benchmarks.gpu_problems import GROUPS, problems
from fusedlstm.kernels.cuda.plan import (
    FETCHED,
    PRECISIONS,
    REGISTERS,
    Form,
    Plan,
    Precision,
    Product,
    choose,
)
from fusedlstm.kernels.cuda.resources import DEVICES

H200 = DEVICES["sm_90"]
SIZES = sorted({(problem.hidden, problem.batch) for problem in problems(GROUPS)})


def busy(plan: Plan, batch: int) -> float:
    """The share of multiprocessors at work while blocks of one size run, one on each."""
    blocks = plan.blocks * plan.grid(batch)[1]
    return blocks / (H200.multiprocessors * ceil(blocks / H200.multiprocessors))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_benchmarked_sizes_keep_a_gpu_at_work(precision: Precision, backward: bool) -> None:
    for hidden, batch in SIZES:
        plan = choose(H200, cells.lstm, precision, hidden, 0, batch, backward)
        columns = plan.grid(batch)[1]
        assert plan.shared <= H200.shared
        assert plan.blocks * plan.units >= hidden
        assert columns * plan.recurrent.batch >= batch
        if plan.form == "persistent":
            assert plan.blocks * columns <= H200.multiprocessors
        else:
            assert busy(plan, batch) > 0.7, (hidden, batch)


def test_no_second_wave_for_a_few_blocks() -> None:
    """15 units a block are 137 blocks, 5 of which would wait for the others."""
    plan = choose(H200, cells.lstm, "float32", 2048, 0, 16, False)
    assert (plan.form, plan.blocks, plan.units) == ("stepwise", 128, 16)


@pytest.mark.parametrize(("hidden", "grid"), [(256, (16, 2)), (512, (32, 2)), (1024, (64, 2))])
def test_the_batch_is_cut_where_units_do_not_fill_the_gpu(hidden: int, grid: tuple[int, int]) -> None:
    """A backward pass on tensor cores has tiles of sixteen units."""
    plan = choose(H200, cells.lstm, "bfloat16", hidden, 0, 16, True)
    assert (plan.units, plan.grid(16)) == (16, grid)


@given(
    precision=st.sampled_from(PRECISIONS),
    units=st.integers(1, 32),
    size=st.integers(1, 5000),
    columns=st.sampled_from([8, 16, 32, 64]),
    resident=st.booleans(),
)
def test_vectors_on_their_way_fit_the_registers(
    precision: Precision, units: int, size: int, columns: int, resident: bool
) -> None:
    product = Product(precision, 4, units, size, columns, 256, resident=resident)
    assume(product.fits)
    steps = product.steps
    together = product.together(steps)
    assert 1 <= together <= steps
    if together > 1:
        vectors = 4 * product.column_tiles if product.tensor else product.real_size
        assert together * vectors <= FETCHED
        if product.tensor:
            assert together * vectors + 4 * product.row_tiles * product.column_tiles <= REGISTERS
    assert replace(product, resident=True).together(steps) >= together / 2
    assert product.together(0) >= 1  # a size of arrays


@pytest.mark.parametrize("form", ["persistent", "stepwise"])
def test_exchange_buffers(form: Form) -> None:
    """Two halves take turns; a launch for each step needs two buffers."""
    polled = choose(H200, cells.lstm, "float32", 512, 0, 16, False, form)
    met = choose(H200, cells.lstm, "float32", 512, 0, 16, False, form, barrier_every=1)
    assert met.buffers == 2
    assert not met.polling
    assert polled.polling == (form == "persistent")
    assert polled.buffers == (16 if polled.polling else 2)
