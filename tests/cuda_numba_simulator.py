"""A few small cases without any help: in Numba's own simulator, as a user would start it, and under
compute-sanitizer on a GPU.  test_cuda_simulated.py and test_cuda_gpu.py run this file.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda_cases import Case, check

import fusedlstm
from fusedlstm import cells
from fusedlstm.kernels.cuda.launch import array_module
from fusedlstm.kernels.cuda.ptx import SIMULATED

FORMS = ["stepwise"] if SIMULATED else ["persistent", "stepwise"]
CASES = [
    case
    for form in FORMS
    for case in (
        Case(cells.lstm, 2, 5, 2, 5, lengths=True, reset=True, form=form),
        Case(cells.gru, 2, 5, 2, 5, lengths=True, reset=True, form=form),
        Case(cells.gru_reset_before, 2, 5, 2, 5, lengths=True, reset=True, form=form),
        Case(cells.lstm, 2, 2, 2, 4, proj=3, reverse=True, form=form),
    )
]
if not SIMULATED:
    CASES += [Case(cells.lstm, 2, 9, 3, 33, precision=precision) for precision in ("tf32", "bfloat16")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    check(case)


def test_a_layer() -> None:
    xp = array_module()
    x = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)
    y, (h, c) = fusedlstm.LSTM(2, 3, backend="cuda", seed=1)(xp.asarray(x))
    wanted, (h_wanted, c_wanted) = fusedlstm.LSTM(2, 3, backend="reference", seed=1)(x)
    for found, want in ((y, wanted), (h, h_wanted), (c, c_wanted)):
        host = found if xp is np else found.get()
        np.testing.assert_allclose(host, want, rtol=1e-5, atol=1e-6)


def test_threads_call_layers_at_once() -> None:
    xp = array_module()
    x = xp.ones((2, 3, 2), np.float32)
    layers = [fusedlstm.LSTM(2, 3, backend="cuda", seed=seed) for seed in range(4)]
    alone = [layer(x)[0] for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda layer: layer(x)[0], layers))
    for found, wanted in zip(together, alone):
        assert (found == wanted).all()


if SIMULATED:

    def test_persistent_form_is_refused() -> None:
        with pytest.raises(ValueError, match="blocks cannot wait for each other on Numba's simulator"):
            check(Case(cells.lstm, 1, 2, 2, 3, form="persistent"))
