"""A number that tells whether memory still holds what it held."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fusedlstm.once import once

from .compile import entry_point

LANES = 128  # 32-bit words that are mixed side by side: enough registers for any processor
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_FIVE, _REST = np.uint32(5), np.uint32(27)  # a rotation
_ODD = np.uint32(0x9E3779B1)  # a rotation alone would let two signs 32 blocks apart change unnoticed


def table(arrays: list[np.ndarray]) -> np.ndarray:
    """Address and 32-bit words of each of these contiguous arrays, (n, 2)."""
    return np.array([(array.ctypes.data, array.nbytes // 4) for array in arrays], np.int64).reshape(-1, 2)


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


def fingerprint(table: np.ndarray, every: int) -> int:
    """A 64-bit number for the bits of the arrays in a :func:`table`, read at the speed of the cache.

    Looks at one block of LANES words in `every`, and at the words after the last whole block.  A change
    of one word that is looked at changes the number; other changes do so but for a chance of about 2^-32.
    """
    return int(_compiled()(table, every))


@once
def _compiled() -> Any:
    return entry_point(_fingerprint, types.int64[:, ::1], types.int64)


def _fingerprint(table, every):
    lanes = np.zeros(LANES, np.uint32)
    for row in range(len(table)):
        start, count = _pointer(table[row, 0]), table[row, 1]
        words = carray(start, (count,), np.uint32)
        blocks = carray(start, (count // LANES, LANES), np.uint32)
        for block in range(0, len(blocks), every):
            for n in range(LANES):  # contiguous, so that this loop becomes SIMD
                lanes[n] = ((lanes[n] << _FIVE | lanes[n] >> _REST) + blocks[block, n]) * _ODD
        for n in range(count % LANES):
            lanes[n] = ((lanes[n] << _FIVE | lanes[n] >> _REST) + words[blocks.size + n]) * _ODD
    total = np.uint64(len(table))
    for lane in lanes:
        total = (total ^ np.uint64(lane)) * _PRIME
        total ^= total >> np.uint64(29)
    return total
