"""What forward passes keep for backward, known by numbers, which a tensor can carry."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dispatch import Direction
from .shapes import Shape


class Given(NamedTuple):
    """What the tapes of a forward pass depend on: backward must be given the same."""

    shape: Shape
    states: int  # initial ones; none is zero
    every: bool  # whether all states after each step are results
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        shape, (inputs, hidden, outputs, _) = self.shape, self.shape.layer
        sizes = f"T={shape.steps}, B={shape.batch}, I={inputs}, H={hidden}, P={outputs}"
        return f"{sizes}, {self.states} initial states, {self.dtype} on {self.device}"


@dataclass(eq=False)
class Record:
    """What backward needs of one forward pass."""

    given: Given
    directions: list[Direction]
    places: list[list[Any]]  # of the weights of each direction
    tapes: list[Any]


class _Handle(np.ndarray):
    """Numbers of records, which live as long as this memory."""

    records: list[Record]


_numbers = count(1)
_records: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()


def handle_of(records: list[Record | None]) -> Tensor:
    """A tensor of the numbers of records, which keeps them; 0 is none.

    Autograd, compiled graphs and the like carry tensors only.  Whoever is given a copy after the original
    is gone finds no record, and runs the layer again.
    """
    numbers = [0 if record is None else next(_numbers) for record in records]
    handle = np.array(numbers, np.int64).view(_Handle)
    handle.records = [record for record in records if record is not None]
    _records.update({n: record for n, record in zip(numbers, records) if record is not None})
    return torch.from_numpy(handle)


def record_of(handle: Tensor) -> Record | None:
    """The record that a handle (1,) is of, if it is still there."""
    return _records.get(int(handle))
