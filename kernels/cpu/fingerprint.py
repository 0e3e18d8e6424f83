"""A number that tells whether memory still holds what it held."""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 128  # 32-bit words that are mixed side by side: enough registers for any processor
_PRIME = np.uint64(0x9E3779B97F4A7C15)


@njit(nogil=True, cache=True, error_model="numpy")
def fingerprint(arrays, every):
    """A 64-bit number for the bits of arrays (n,) of uint32, read at the speed of the cache.

    Looks at one block of LANES words in `every`, and at the words after the last whole block.  A change
    of one word that is looked at changes the number; other changes do so but for a chance of 2^-32.
    """
    total = np.uint64(len(arrays))
    lanes = np.empty(LANES, np.uint32)
    for words in arrays:
        lanes[:] = 0
        whole = words.size // LANES * LANES
        for number in range((whole // LANES + every - 1) // every):
            start = number * every * LANES
            block = words[start : start + LANES]  # contiguous, so that this loop becomes SIMD
            for n in range(LANES):
                lane = lanes[n]
                lanes[n] = (lane << np.uint32(5) | lane >> np.uint32(27)) + block[n]
        for n in range(LANES):
            total = (total ^ np.uint64(lanes[n])) * _PRIME
            total ^= total >> np.uint64(29)
        for n in range(whole, words.size):
            total = (total ^ np.uint64(words[n])) * _PRIME
            total ^= total >> np.uint64(29)
    return total
