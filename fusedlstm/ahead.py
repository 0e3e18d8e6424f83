"""Kernels compiled before they are needed, by ``fusedlstm compile`` and by ``fusedlstm.torch.warm_up``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import numpy as np

from .cells import Cell
from .layers import Recurrent


def compile_cell(cell: Cell, dtype: str, projected: bool = False) -> float:
    """Compile a cell's CPU kernels, forward and backward, or load what has been kept; the seconds it took.

    Kernels depend on the cell, the precision, and whether there is a projection, but on no other size.

    Raises:
        ValueError: for a projection of a cell that cannot have one, or another precision than "float32" and
            "float64".
    """
    from .kernels.cpu import fingerprint

    start = time.perf_counter()
    layer = Recurrent(cell, 1, 2, proj_size=int(projected), dtype=dtype, backend="cpu", seed=0)
    y, _, tape = layer.forward(np.zeros((1, 1, 1), dtype), training=True)
    assert tape is not None
    tape.backward(y)
    fingerprint.fingerprint(fingerprint.table([y]), 1)
    return time.perf_counter() - start


def compile_all(cells: Iterable[Cell], dtypes: Iterable[str], projected: bool) -> Iterator[tuple[str, float]]:
    """Compile one after the other, those with a projection where there can be one; what, and the seconds."""
    dtypes = list(dtypes)
    for cell in cells:
        for dtype in dtypes:
            yield f"{cell.name} in {dtype}", compile_cell(cell, dtype)
            if projected and not cell.unprojectable:
                yield f"{cell.name} in {dtype} with a projection", compile_cell(cell, dtype, True)
