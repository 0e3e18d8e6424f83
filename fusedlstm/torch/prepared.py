"""Weights laid out for the kernels, kept as long as they are the same."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .. import dispatch
from .. import weights as storage
from ..cells import Cell
from ..dispatch import Direction
from ..once import once
from .arrays import as_array
from .checks import check_tensors, named_weights
from .shapes import Shape, Sizes

_TYPE_AND_BYTES = attrgetter("dtype", "nbytes")


class _Packed(NamedTuple):
    """Weights laid out for the kernels, and what tells whether they still are the weights."""

    cell: Cell
    owners: list[weakref.ref[Tensor]]  # the weights
    sizes: Sizes
    precision: str
    device: int  # number of the GPU; -1 is the host
    places: list[Any]  # where and how they lie
    arrays: list[Any]  # their storage, so that nothing else lies there as long as nobody resizes it
    table: np.ndarray | None  # where to look at it, (n, 2); none on a GPU
    sparse: int  # for few rows one block of numbers in so many is looked at
    stamps: dict[int, list[Any]]  # by how much was looked at
    direction: Direction


_packed: dict[tuple[Any, ...], _Packed] = {}  # by the identities of the weights, until one of them goes
_LOOKED_AT = 1 << 16  # numbers of large weights that are looked at: more would push others out of the cache
_MANY_ROWS = 1024  # for so many rows all numbers are: that takes a few per cent of what the products take


def direction_of(weights: Sequence[Tensor], x: Tensor, shape: Shape, d: int) -> Direction:
    """Direction d of a layer with these weights, as they are now, to be run on x.

    What was laid out is used again if the tensors are the same, or views of the same, contiguous in one of
    both orders, lie where they lay, and have the same version counters and the same bits.  The bits are for
    what the counters do not see: a write to ``weight.data``, or to memory shared with NumPy.  On a GPU it is
    the counters alone.
    """
    known = _packed.get(tuple(map(id, weights))) or _packed.get(tuple(map(_identity, weights)))
    if (
        known is not None
        and known.cell is shape.cell
        and known.sizes == shape.layer
        and known.precision == shape.precision
        and known.device == x.get_device()
        and weights[0].dtype is x.dtype
        and known.places == places_of(weights)
        and known.stamps.get(every := 1 if shape.steps * shape.batch >= _MANY_ROWS else known.sparse)
        == _stamp(known.table, weights, every)
    ):
        return known.direction
    return _pack(weights, x, shape, d)


def forget(weights: Sequence[Tensor]) -> None:
    """Lay these weights out anew when they are used again."""
    _packed.pop(tuple(map(_identity, weights)), None)


def _owner(weight: Tensor) -> Tensor:
    """The tensor that the weight is, or is a view of."""
    return weight if weight._base is None else weight._base


def _identity(weight: Tensor) -> Any:
    """What is equal for the same weight; views are new objects each time."""
    return id(weight) if weight._base is None else (id(weight._base), weight.shape, weight.stride())


def places_of(weights: Sequence[Tensor]) -> list[Any]:
    """Where weights lie, and how the two matrices do: they may be given other data at the same place.

    With the sizes that are compared beside it, this tells a matrix from its transpose and from another one,
    from a part of it, and from the same bits as another type.
    """
    matrices = map(Tensor.stride, weights[:2])
    return [*map(Tensor.data_ptr, weights), *map(_TYPE_AND_BYTES, weights), *matrices]


def _pack(weights: Sequence[Tensor], x: Tensor, shape: Shape, d: int) -> Direction:
    cell, sizes, key = shape.cell, shape.layer, tuple(map(_identity, weights))
    check_tensors(named_weights(cell, weights, sizes, d), x)
    owners, places = list(map(_owner, weights)), places_of(weights)
    weights = [weight.detach() for weight in weights]  # whose arrays do not keep the tensors themselves
    engine = dispatch.engine(x.device.type, precision=shape.precision)
    own = storage.unflatten(cell, [as_array(weight.contiguous()) for weight in weights])
    dense = [weight if weight.is_contiguous() else weight.t() for weight in weights]
    if not all(weight.is_contiguous() for weight in dense):  # what would be looked at is a copy
        return engine.prepare(cell, own)
    arrays = [as_array(weight) for weight in dense]
    table = None if x.is_cuda else _bits().table(arrays)
    sparse = 1 + sum(weight.numel() for weight in weights[:2]) // _LOOKED_AT
    stamps = {every: _stamp(table, weights, every) for every in {1, sparse}}
    direction = engine.prepare(cell, own)

    def drop(reference: Any) -> None:
        if (entry := _packed.get(key)) is not None and any(owner is reference for owner in entry.owners):
            del _packed[key]

    references = [weakref.ref(owner, drop) for owner in owners]
    _packed[key] = _Packed(
        cell, references, sizes, shape.precision, x.get_device(), places, arrays, table, sparse, stamps,
        direction,
    )  # fmt: skip
    return direction


def _stamp(table: np.ndarray | None, weights: Sequence[Tensor], every: int) -> list[Any]:
    """Version counters, and a number for the bits that are looked at."""
    try:
        stamp: list[Any] = [weight._version for weight in weights]
    except RuntimeError:  # tensors made in inference mode have no counters: equal bits, or never the same
        stamp, every = [] if table is not None else [object()], 1
    if table is not None:
        stamp.append(_bits().fingerprint(table, every))
    return stamp


# these import Numba, so not before it is needed
@once
def _bits() -> Any:
    from fusedlstm.kernels.cpu import fingerprint

    return fingerprint
