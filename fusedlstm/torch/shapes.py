"""The sizes of one layer, by which all else is measured.

T  time steps        I  input_size          L  num_layers
B  batch             H  hidden_size         D  directions: 2 if bidirectional, else 1
                     P  size of the output: proj_size if there is a projection, else H
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cells, dispatch
from ..cells import Cell
from ..once import lazy

# By key, since an operator takes a text, not a cell.  Entries are made before anything is traced.
known_cells: dict[str, Cell] = {
    cell.key: cell for cell in (cells.lstm, cells.gru, cells.rnn_tanh, cells.rnn_relu)
}


def text_of(cell: Cell, precision: str) -> str:
    """How an operator is told which cell, and which precision of products."""
    return cell.key if precision == "float32" else f"{cell.key} {precision}"


def known_cell(text: str) -> tuple[Cell, str]:
    """What :func:`text_of` was given.

    Raises:
        ValueError: if no module has been made of such a cell, or there is no such precision.
    """
    key, _, precision = text.partition(" ")
    if key not in known_cells or precision not in ("", *dispatch.OPTIONS["precision"]):
        raise ValueError(f"cell must be the key of a cell that a module has been made of, got {text!r}")
    return known_cells[key], precision or "float32"


class Sizes(NamedTuple):
    """Of the input, the hidden units and the output of a layer: I, H and P."""

    inputs: int
    hidden: int
    outputs: int


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    cell: Cell
    directions: int
    steps: int
    batch: int
    layer: Sizes
    precision: str  # of products

    @property
    def hidden(self) -> int:
        return self.layer.hidden

    @property
    def outputs(self) -> int:
        return self.layer.outputs

    @property
    def input(self) -> tuple[int, int, int]:
        """Shape of the input."""
        return self.steps, self.batch, self.layer.inputs

    @property
    def sizes(self) -> list[int]:
        """Of the states."""
        return [self.outputs, *[self.hidden] * (len(self.cell.states) - 1)]

    @lazy
    def states(self) -> list[tuple[int, int, int]]:
        """Shapes of the states."""
        return [(self.directions, self.batch, size) for size in self.sizes]

    @lazy
    def results(self) -> list[tuple[int, int, int]]:
        """Shapes of the output and of the final states."""
        return [(self.steps, self.batch, self.directions * self.outputs), *self.states]


def shape_of(x: Tensor, weights: Sequence[Tensor], key: str, directions: int) -> Shape:
    """The sizes of a layer, by which all else is measured.

    Raises:
        ValueError, RuntimeError: if these cannot be the input and the weights of a layer.
    """
    number = len(weights)
    if not number:
        raise ValueError("weights must be one matrix at least, got no tensors")
    second = weights[1].shape if number > 1 else None
    try:
        return _measured(x.shape, weights[0].shape, second, number, key, directions)
    except TypeError:  # symbols, of a graph that is compiled for any size, have no hash
        return _measured.__wrapped__(x.shape, weights[0].shape, second, number, key, directions)


@lru_cache(1024)
def _measured(
    x: torch.Size, ih: torch.Size, second: torch.Size | None, weights: int, key: str, directions: int
) -> Shape:
    cell, precision = known_cell(key)
    least, most = (2, 5) if cell.gates_with_recurrent else (1, 2)
    each, more = divmod(weights, directions) if directions in (1, 2) else (0, 1)
    if more or not least <= each - len(cell.weights) <= most:
        raise ValueError(
            f"weights must be those of 1 or 2 directions, each {least} to {most} and {len(cell.weights)} "
            f"vectors of the cell {cell.name}, got {weights} for {directions} directions"
        )
    matrices = [ih] if second is None or not cell.gates_with_recurrent else [ih, second]
    if len(x) != 3 or any(len(matrix) != 2 for matrix in matrices):
        raise RuntimeError(
            "input must have 3 dimensions and the matrices of weights 2, got the shapes "
            f"{', '.join(str(tuple(shape)) for shape in (x, *matrices))}"
        )
    hidden = ih[0] // len(cell.gates_with_input)
    if not hidden:
        raise RuntimeError(f"weight_ih must have rows for each gate of the cell, got the shape {tuple(ih)}")
    outputs = hidden if len(matrices) == 1 else matrices[1][1]
    return Shape(cell, directions, x[0], x[1], Sizes(x[2], hidden, outputs), precision)


def empty_results(x: Tensor, shape: Shape) -> list[Tensor]:
    return [x.new_empty(sizes) for sizes in shape.results]
