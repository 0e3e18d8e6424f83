"""The phases of a cell's step and of its adjoint, and where a thread keeps the numbers of a hidden unit."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fusedlstm.cells import Cell
from fusedlstm.step import Phase, Value


def unsupported(cell: Cell) -> str:
    """Why there are no kernels for a cell; empty if there are."""
    if cell.step.means():
        return "it takes means over the hidden units"
    if cell.noise:
        return "it has noise, which is drawn on the CPU only"
    if not cell.recurrent_gates:
        return "it has no gate whose recurrent weights multiply a state"
    if len(cell.late) > 1:
        return f"it has several late gates, {_listed(cell.late)}, and kernels have one product within a step"
    return ""


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


def recurrent_slots(cell: Cell) -> tuple[int, int]:
    """Where among the pre-activations those begin and end that the recurrent product gives."""
    first = len(cell.input_gates) - len(cell.plain)
    return first, first + len(cell.recurrent_gates)


class Phases(NamedTuple):
    """One phase, or two with the product of a late gate between them.

    The numbers of a unit are: every pre-activation, every state and every learned vector, whether the cell
    takes it or not, for an adjoint then the gradients of the new states; behind them what the phases store.
    """

    cuts: tuple[Phase, ...]
    places: dict[Value, int]  # among the numbers of a unit
    results: int  # where the new states begin; of an adjoint the gradients of all that a step is given

    @property
    def slots(self) -> int:
        """How many numbers there are."""
        return 1 + max(self.places.values())

    @property
    def late(self) -> tuple[int, int]:
        """The places of what the late gate's product multiplies, and of what it gives; 0 without one.

        In a step what it gives is added to what is there.
        """
        operators = [operator for cut in self.cuts for operator in cut.operators]
        return next(((self.places[o.operand], self.places[o.result]) for o in operators), (0, 0))


@lru_cache(maxsize=64)
def phases(cell: Cell, backward: bool) -> Phases:
    """Of a step, or of its adjoint."""
    cuts = (cell.adjoint if backward else cell.step).phases()
    names = (*cell.preactivations, *cell.states, *cell.weights)
    given = (*names, *cell.seeds) if backward else names
    values = [Value("given", name) for name in given]
    values += [Value("result", name) for name in (names if backward else cell.states)]
    values += [value for cut in cuts for value in cut.stores if value.role != "result"]
    if backward:
        values += [operator.result for cut in cuts for operator in cut.operators]
    places = {value: n for n, value in enumerate(values)}
    if not backward:  # a product is a part of the pre-activation
        places |= {Value("product", gate): places[Value("given", gate)] for gate in cell.late}
    return Phases(cuts, places, len(given))
