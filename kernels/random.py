"""Random numbers from a counter: the same on every processor, in any order, without a state.

Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

Noise = tuple[int, int, int]  # a key of two words, and the number of the draw

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK = 4096  # blocks at a time: temporaries stay in a core's cache


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Four random 32-bit words for a counter of four and a key of two, all held in uint64.

    Takes NumPy or CuPy arrays, NumPy numbers, and the scalars of a Numba kernel.
    """
    for _ in range(10):
        p0, p1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def noise_key(key: tuple[Any, Any], place: int) -> tuple[int, int]:
    """The key of the noise of one direction of one layer, made of the key of the stack."""
    first, second, *_ = philox(np.uint64(place), _LOW, _LOW, _LOW, *key)  # no mask is so long as to use it
    return int(first), int(second)


def uniforms(units: Any, time: Any, sequence: Any, noise: Noise, dtype: Any) -> list[np.ndarray]:
    """Four numbers in [0, 1) for each hidden unit, time and sequence, whose indices broadcast.

    The 24 upper bits of the words of counter (unit, time, sequence, draw); `noise` is a key, and the draw,
    which counts modulo 2^32.
    """
    counter = (np.asarray(part, np.uint64) for part in (units, time, sequence, noise[2] % 2**32))
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    words = philox(c0, c1, c2, c3, np.uint64(noise[0]), np.uint64(noise[1]))
    return [(word >> np.uint64(8)).astype(dtype) * dtype.type(2**-24) for word in words]


def dropout_mask(
    shape: tuple[int, ...],
    rate: float,
    key: tuple[Any, Any],  # two 32-bit words in uint64
    draw: int,
    layer: int,
    dtype: Any,
    xp: Any = np,
) -> Any:
    """An array of `shape`: 0 with probability `rate`, else 1 / (1 - rate).

    Element n in C order takes word n % 4 of counter (n // 4, draw, layer); `draw` counts modulo 2^32.
    """
    count = prod(shape)
    mask = xp.empty(count, dtype)
    threshold = np.uint64(round(rate * 2**32))
    scale = mask.dtype.type(0 if rate == 1 else 1 / (1 - rate))
    stream = np.uint64(draw % 2**32), np.uint64(layer)
    for start in range(0, count, 4 * _CHUNK):
        part = mask[start : start + 4 * _CHUNK]
        block = start // 4 + xp.arange(-(-part.size // 4), dtype=np.uint64)
        words = philox(block & _LOW, block >> _HALF, *stream, *key)
        part[...] = (xp.stack(words, axis=-1).reshape(-1)[: part.size] >= threshold) * scale
    return mask.reshape(shape)
