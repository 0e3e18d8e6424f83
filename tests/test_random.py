"""The counter-based generator: published vectors, and what dropout makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from fusedlstm.kernels.random import dropout_mask, philox

KEY = np.uint64(17), np.uint64(4)

# Random123 1.14, tests/kat_vectors: philox4x32 10, counter, key, result
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[np.uint64]:
    return [np.uint64(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_gives_the_published_numbers(counter: str, key: str, result: str) -> None:
    assert list(philox(*words(counter), *words(key))) == words(result)


def test_philox_of_arrays_and_in_numba_is_philox_of_each_number() -> None:
    numba = pytest.importorskip("numba")
    counters = np.random.default_rng(1).integers(0, 2**32, (4, 9)).astype(np.uint64)
    together = np.stack(philox(*counters, *KEY))
    compiled = numba.njit(philox)
    for n in range(9):
        one = philox(*counters[:, n], *KEY)
        assert list(one) == list(together[:, n])
        assert list(compiled(*counters[:, n], *KEY)) == list(one)


def test_mask_is_the_same_whatever_its_shape_and_length() -> None:
    long = dropout_mask((70000,), 0.4, KEY, 3, 1, np.float64)  # longer than one chunk
    assert np.array_equal(dropout_mask((7, 5, 3), 0.4, KEY, 3, 1, np.float64).ravel(), long[:105])
    assert np.array_equal(dropout_mask((70000,), 0.4, KEY, 3, 1, np.float32) > 0, long > 0)


def test_mask_differs_by_draw_layer_and_key() -> None:
    def mask(draw: int = 0, layer: int = 0, key: tuple[np.uint64, np.uint64] = KEY) -> bytes:
        return dropout_mask((200,), 0.5, key, draw, layer, np.float32).tobytes()

    different = {mask(), mask(draw=1), mask(layer=1), mask(key=(KEY[1], KEY[0]))}
    assert len(different) == 4
    assert mask(draw=2**32) == mask()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mask_has_the_rate_and_keeps_the_mean(rate: float) -> None:
    mask = dropout_mask((400, 250), rate, KEY, 0, 0, np.float64)
    assert set(np.unique(mask)) == {0.0, 1 / (1 - rate)}
    # five standard deviations of a binomial distribution
    assert abs((mask == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / mask.size)
    assert abs(np.corrcoef(mask[:, :-1].ravel(), mask[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(mask.size)


def test_mask_at_the_ends() -> None:
    assert np.array_equal(dropout_mask((50,), 0.0, KEY, 0, 0, np.float32), np.ones(50))
    assert np.array_equal(dropout_mask((50,), 1.0, KEY, 0, 0, np.float32), np.zeros(50))
