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


def text_of(cell: Cell, precision: str, heads: int) -> str:
    """How an operator is told which cell, which precision of products, and how many heads.

    Heads are told, not seen: a recurrent matrix that is too narrow would look like some.
    """
    plain = precision == "float32" and heads == 1
    return cell.key if plain else f"{cell.key} {precision} {heads}"


def known_cell(text: str) -> tuple[Cell, str, int]:
    """What :func:`text_of` was given.

    Raises:
        ValueError: if no module has been made of such a cell, or there is no such precision.
    """
    key, *settings = text.split(" ")
    precision, heads = settings if len(settings) == 2 else ("float32", "1")
    fits = len(settings) in (0, 2) and precision in dispatch.OPTIONS["precision"]
    if key not in known_cells or not fits or not heads.isdecimal() or not int(heads):
        raise ValueError(f"cell must be the key of a cell that a module has been made of, got {text!r}")
    return known_cells[key], precision, int(heads)


class Sizes(NamedTuple):
    """Of the input, the hidden units and the output of a layer: I, H and P; blocks of recurrent weights."""

    inputs: int
    hidden: int
    outputs: int
    heads: int


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

    @lazy
    def every_state(self) -> list[tuple[int, int, int, int]]:
        """Shapes of the states but the output after each step."""
        return [(self.steps, self.directions, self.batch, self.hidden) for _ in self.cell.states[1:]]

    def results_with(self, every: bool) -> list[tuple[int, ...]]:
        """Shapes of all results, also those of each step if every state is asked for."""
        return [*self.results, *(self.every_state if every else ())]

    def fed(self, d: int) -> slice:
        """The features of the input that direction d takes."""
        if not self.cell.takes_gates:
            return slice(None)
        size = self.layer.inputs // self.directions
        return slice(d * size, (d + 1) * size)


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
    cell, precision, heads = known_cell(key)
    own = int(not cell.takes_gates) + bool(cell.gates_with_recurrent)  # matrices of weights
    least, most = (2, 5) if own == 2 else (own, 2 * own)
    each, more = divmod(weights, directions) if directions in (1, 2) else (0, 1)
    if more or not least <= each - len(cell.weights) <= most:
        raise ValueError(
            f"weights must be those of 1 or 2 directions, each {least} to {most} and {len(cell.weights)} "
            f"vectors of the cell {cell.name}, got {weights} for {directions} directions"
        )
    matrices = [shape for shape in (ih, second)[:own] if shape is not None]
    if len(x) != 3 or any(len(matrix) != 2 for matrix in matrices):
        raise RuntimeError(
            "input must have 3 dimensions and the matrices of weights 2, got the shapes "
            f"{', '.join(str(tuple(shape)) for shape in (x, *matrices))}"
        )
    gates = len(cell.gates_with_recurrent if cell.takes_gates else cell.gates_with_input) if own else 1
    hidden = ih[0] // gates
    if not hidden:
        name = "weight_hh" if cell.takes_gates else "weight_ih"
        raise RuntimeError(f"{name} must have rows for each gate of the cell, got the shape {tuple(ih)}")
    if cell.takes_gates and x[2] != (size := directions * len(cell.gates_with_input) * hidden):
        raise RuntimeError(f"input must have {size} features, those of all gates, got the shape {tuple(x)}")
    columns = hidden
    if cell.gates_with_recurrent:
        columns = matrices[-1][1]
    projected = own == 2 and (each - len(cell.weights)) % 2 == 1
    if heads > 1 and (projected or hidden % heads):
        raise RuntimeError(
            f"heads must divide the {hidden} hidden units, and be 1 with a projection, got {heads}"
        )
    outputs = columns if projected else hidden
    return Shape(cell, directions, x[0], x[1], Sizes(x[2], hidden, outputs, heads), precision)


def step_shape(x: torch.Size, weights: Sequence[Tensor], key: str) -> Shape:
    """The same for one step of one direction of a cell with recurrent weights, x being (B, I)."""
    return _measured_step(x, weights[0].shape, weights[1].shape, len(weights), key)


@lru_cache(1024)
def _measured_step(x: torch.Size, ih: torch.Size, hh: torch.Size, weights: int, key: str) -> Shape:
    return _measured(torch.Size((1, *x)), ih, hh, weights, key, 1)


def empty_results(x: Tensor, shape: Shape, every: bool = False) -> list[Tensor]:
    return [x.new_empty(sizes) for sizes in shape.results_with(every)]
