"""A few cases in Numba's own simulator, as a user would start it; test_cuda_simulated.py runs this file."""

from __future__ import annotations

import numpy as np
import pytest
from checks import name
from cuda_cases import Case, check

import fusedlstm
from fusedlstm import cells


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru], ids=name)
def test_kernels(cell: fusedlstm.Cell) -> None:
    check(Case(cell, 2, 5, 2, 5, lengths=True, reset=True))


def test_projection() -> None:
    check(Case(cells.lstm, 2, 2, 2, 4, proj=3, reverse=True))


def test_a_layer() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)
    y, (h, c) = fusedlstm.LSTM(2, 3, backend="cuda", seed=1)(x)
    wanted, (h_wanted, c_wanted) = fusedlstm.LSTM(2, 3, backend="reference", seed=1)(x)
    for found, want in ((y, wanted), (h, h_wanted), (c, c_wanted)):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_persistent_form_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks cannot wait for each other on Numba's simulator"):
        check(Case(cells.lstm, 1, 2, 2, 3, form="persistent"))
