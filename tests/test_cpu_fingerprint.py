"""The number that tells whether memory still holds what it held."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedlstm.kernels.cpu.fingerprint import LANES, fingerprint, table

SIZES = st.lists(st.integers(0, 3 * LANES), min_size=1, max_size=4)


def arrays_of(sizes: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 1 << 32, size, np.uint32) for size in sizes]


@given(sizes=SIZES, data=st.data())
def test_a_change_of_one_word_is_noticed(sizes: list[int], data: st.DataObject) -> None:
    arrays = arrays_of([*sizes, 1])
    known = fingerprint(table(arrays), 1)
    assert fingerprint(table([array.copy() for array in arrays]), 1) == known
    array = data.draw(st.sampled_from([array for array in arrays if array.size]))
    array[data.draw(st.integers(0, array.size - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert fingerprint(table(arrays), 1) != known


@pytest.mark.parametrize("distance", [1, LANES - 1, LANES, 31 * LANES, 32 * LANES, 64 * LANES])
def test_words_that_change_places_and_pairs_of_signs_are_noticed(distance: int) -> None:
    (words,) = arrays_of([80 * LANES])
    known = fingerprint(table([words]), 1)
    for n in range(64):
        words[[n, n + distance]] = words[[n + distance, n]]
        assert fingerprint(table([words]), 1) != known
        words[[n, n + distance]] = words[[n + distance, n]]
        words[[n, n + distance]] ^= np.uint32(1 << 31)
        assert fingerprint(table([words]), 1) != known
        words[[n, n + distance]] ^= np.uint32(1 << 31)
    assert fingerprint(table([words]), 1) == known


@pytest.mark.parametrize("every", [1, 2, 5])
def test_one_block_in_so_many_is_looked_at_and_the_rest(every: int) -> None:
    blocks = 11
    (words,) = arrays_of([blocks * LANES + 3])
    known = fingerprint(table([words]), every)
    noticed = []
    for block in range(blocks + 1):
        words[block * LANES + 2] ^= np.uint32(1)
        noticed.append(fingerprint(table([words]), every) != known)
        words[block * LANES + 2] ^= np.uint32(1)
    assert noticed == [block % every == 0 for block in range(blocks)] + [True]


def test_float64_words_are_looked_at_too() -> None:
    array = np.arange(2 * LANES, dtype=np.float64)
    known = fingerprint(table([array]), 1)
    array[-1] = np.nextafter(array[-1], 0)
    assert fingerprint(table([array]), 1) != known
