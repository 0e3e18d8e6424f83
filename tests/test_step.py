"""Steps cut into phases: what each takes and stores, and that together they are the step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from checks import ALL, late_and_means, late_of_output, name, normalized_lstm, tangents_alike
from test_derive import FUNCTIONS, Rows
from test_random_cells import write_cell

from fusedlstm import cell, cells
from fusedlstm.cells import Cell
from fusedlstm.derive import Expression, compile_source
from fusedlstm.math import exp, mean, sigmoid, tanh, variance
from fusedlstm.step import Phase, Step, Value

WRITTEN = [write_cell(seed) for seed in range(25)]
EVERY = pytest.mark.parametrize("cell", [*ALL, *WRITTEN], ids=name)


class Run(Rows):
    """Phases run one after the other over arrays of rows, with the operators between them."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.new = self.step(self.values, self.weights)
        self.gradients: dict[str, Value] = {}  # of late gates, as the products with their weights took them
        self.turns = {gate: self.generator.normal(size=w.shape) for gate, w in self.weights.items()}
        self.directions = {
            cell.moved + name: self.generator.normal(size=array.shape) for name, array in self.values.items()
        }

    def operate(
        self, kind: str, gate: str, operand: np.ndarray, values: dict[Value, np.ndarray]
    ) -> np.ndarray:
        """What an operator over the units gives; of a product's tangent, for weights that move."""
        if kind in ("mean", "variance"):  # here a vector has as many lanes as a row has units
            return np.tile(operand.mean(-1, keepdims=True), operand.shape[-1])
        weight = self.weights[gate]
        if kind == "product":
            return self.values[gate] + operand @ weight.T
        if kind == "transposed":
            return operand @ weight
        if kind == "moved_product":
            own = self.directions[self.cell.moved + gate] + self.operands[gate] @ self.turns[gate].T
            return own + operand @ weight.T
        assert kind == "moved_transposed"
        value = values[self.gradients[gate]]  # which is multiplied by the weights that move
        return operand @ weight + value @ self.turns[gate]

    def phases(self, phases: tuple[Phase, ...], given: dict[Value, np.ndarray]) -> dict[Value, np.ndarray]:
        """All values that are there at the end.  Nothing is taken that is not there yet."""
        values = dict(given) | {Value("lanes", 0): np.full(1, self.new[0].shape[-1])}
        for phase in phases:
            scope = FUNCTIONS | {"vector_mean": lambda x, lanes: mean(x)}
            function = compile_source(phase.code, scope, "phase").phase
            found = function(*[values[value] for value in phase.takes])
            values |= {v: np.broadcast_to(a, self.new[0].shape) for v, a in zip(phase.stores, found)}
            for kind, gate, operand, result in phase.operators:
                if kind == "transposed":
                    self.gradients[gate] = operand
                values[result] = self.operate(kind, gate, values[operand], values)
        return values

    def moved_adjoint(self) -> list[np.ndarray]:
        """The tangents of the gradients, by finite differences."""
        h, sides = 1e-5, []
        values, weights = self.values, self.weights
        for shift in (h, -h):
            self.values = {n: a + shift * self.directions[self.cell.moved + n] for n, a in values.items()}
            self.weights = {gate: w + shift * self.turns[gate] for gate, w in weights.items()}
            sides.append([*self.adjoint().values()])
        self.values, self.weights = values, weights
        return [(high - low) / (2 * h) for high, low in zip(*sides)]


def leaves(*sets: dict[str, np.ndarray]) -> dict[Value, np.ndarray]:
    return {Value("given", name): array for part in sets for name, array in part.items()}


def close(values: dict[Value, np.ndarray], names: list[str], expected: Any, limit: float = 1e-11) -> None:
    for result, array in zip(names, expected, strict=True):
        np.testing.assert_allclose(values[Value("result", result)], array, rtol=limit, atol=limit)


def tape(cell: Cell) -> dict[Value, Expression]:
    return {Value("tape", n): node for n, node in enumerate(cell.step.means())}


def means(run: Run, role: str, values: dict[Value, np.ndarray]) -> dict[Value, np.ndarray]:
    return {Value(role, v.name): array for v, array in values.items() if v.role == "mean"}


@EVERY
def test_the_phases_are_the_step_and_its_adjoint_and_their_tangents(cell: Cell) -> None:
    """The adjoint takes the means of the step from the tape, and the tangents those of both."""
    run, moved = Run(cell), cell.moved
    late = {name: run.values[name] for name in cell.arguments if name not in cell.late}
    forward = run.phases(cell.step.phases(), leaves(late))
    close(forward, [*cell.states], run.new)
    values = run.values | run.products
    given = leaves(values) | means(run, "tape", forward)
    adjoint = run.phases(cell.adjoint.phases(tape(cell), cell.states, cell.weights), given)
    gradients = run.adjoint()
    close(adjoint, [*cell.arguments], gradients.values())

    operands = [gate for phase in cell.step.phases() for gate in operand_gates(phase)]
    tangent = cell.step.tangent(moved, operands=operands)
    own = {name: d for name, d in run.directions.items() if name.removeprefix(moved) not in cell.late}
    along = run.phases(tangent.phases(tape(cell)), given | leaves(own))
    results = [along[Value("result", moved + name)] for name in cell.states]
    forward_sum = sum((run.values[s] * part).sum() for s, part in zip(cell.seeds, results))
    back = sum((run.directions[moved + name] * gradients[name]).sum() for name in cell.arguments)
    back += sum((run.turns[gate] * (gradients[gate].T @ run.operands[gate])).sum() for gate in cell.late)
    assert forward_sum == pytest.approx(back, rel=1e-10, abs=1e-10)

    known = tape(cell)
    known |= {Value("moved tape", n): node for n, node in enumerate(tangent.means(tape(cell)))}
    given |= leaves(run.directions) | means(run, "moved tape", along)
    given |= {
        Value("given", moved + gate): along[Value("moved", gate)]
        for gate in cell.late
        if Value("moved", gate) in along
    }
    both = cell.adjoint.tangent(moved, cell.arguments).phases(known)
    found = run.phases(both, given)
    close(found, [*cell.arguments], gradients.values())
    close(found, [moved + name for name in cell.arguments], run.moved_adjoint(), 1e-6)


def operand_gates(phase: Phase) -> list[str]:
    return [str(value.name) for value in phase.stores if value.role == "operand"]


def shape(phases: tuple[Phase, ...]) -> list[list[tuple[str, str, str]]]:
    """The operators behind each phase: kind, gate, and what they are applied to."""
    return [[(o.kind, o.gate, o.operand.role) for o in phase.operators] for phase in phases]


# --- Levels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.peephole_lstm, cells.rnn_tanh], ids=name)
def test_a_cell_without_operators_has_one_phase(cell: Cell) -> None:
    for step in (cell.step, cell.adjoint, cell.step.tangent("t_"), cell.adjoint.tangent("t_")):
        assert shape(step.phases()) == [[]]


def test_operators_stand_where_their_operand_is_there() -> None:
    """As early as they can, so that those of one level meet once."""
    assert shape(cells.gru_reset_before.step.phases()) == [[("product", "n", "operand")], []]
    assert shape(cells.lstm_output_sees_cell.step.phases()) == [[("product", "o", "result")], []]
    assert shape(late_of_output.step.phases()) == [[("product", "n", "result")], []]
    assert shape(normalized_lstm.step.phases()) == [
        *[[("mean", "", "sum")] * 4] * 2, *[[("mean", "", "sum")]] * 2, []
    ]  # fmt: skip
    assert shape(late_and_means.step.phases()) == [
        [("mean", "", "sum")], [("product", "n", "operand")], [("mean", "", "sum")],
        [("product", "m", "operand")], [("mean", "", "sum")], [],
    ]  # fmt: skip


def test_a_mean_and_its_variance_stand_side_by_side() -> None:
    """Wherever they are written, and for several gates together too; an adjoint takes means only."""
    found = [[kind for kind, *_ in here] for here in shape(cells.layer_norm_lstm.step.phases())]
    assert found == [["mean", "variance"] * 2, ["mean", "variance"], []]

    @cell(gates=("a", "b"))
    def apart(a: Any, b: Any, h: Any) -> Any:
        first, second = mean(a), mean(b)
        return h + first * second + variance(b) * variance(a, b) * variance(a)

    (first, _) = apart.step.phases()
    kinds = [operator.kind for operator in first.operators]
    assert kinds == ["mean", "variance", "mean", "variance", "mean", "variance"]
    assert {o.kind for phase in apart.adjoint.phases(tape(apart)) for o in phase.operators} == {"mean"}


def test_operators_of_an_adjoint_are_transposed_and_in_turn() -> None:
    found = shape(cells.gru_reset_before.adjoint.phases(last=("h",)))
    assert found == [[("transposed", "n", "result")], []]
    kinds = [kind for here in shape(late_and_means.adjoint.phases(tape(late_and_means))) for kind, *_ in here]
    assert Counter(kinds) == {"mean": 3, "transposed": 2}
    later = cells.gru_reset_before.adjoint.tangent("t_").phases()
    kinds = [kind for here in shape(later) for kind, *_ in here]
    assert kinds == ["transposed", "moved_transposed"]


def test_means_that_the_forward_pass_has_taken_are_not_taken_again() -> None:
    without = normalized_lstm.adjoint.phases()
    with_tape = normalized_lstm.adjoint.phases(tape(normalized_lstm))
    count = [sum(len(here) for here in shape(phases)) for phases in (without, with_tape)]
    assert count[0] == count[1] + len(normalized_lstm.step.means()) == 20
    taken = {value for phase in with_tape for value in phase.takes}
    assert tape(normalized_lstm).keys() <= taken


def test_equal_operators_are_applied_once() -> None:
    @cell(gates=("a", "b"))
    def twice(a: Any, b: Any) -> Any:
        return (a - mean(a * b)) * tanh(mean(a * b) + b)

    assert shape(twice.step.phases()) == [[("mean", "", "sum")], []]


# --- What is stored ---------------------------------------------------------------------------------------


@EVERY
def test_what_phases_take_is_there(cell: Cell) -> None:
    """Leaves, what a phase before has stored, or an operator behind one has given; no name is given twice."""
    step = cell.step.tangent(cell.moved)
    for phases in (
        cell.step.phases(),
        cell.adjoint.phases(tape(cell), cell.states, cell.weights),
        step.phases(tape(cell)),
    ):
        there: set[Value] = set()
        for phase in phases:
            assert all(value.role in ("given", "tape", "lanes") or value in there for value in phase.takes)
            assert there.isdisjoint(phase.stores)
            there |= {*phase.stores}
            for operator in phase.operators:
                assert operator.operand in there
                assert operator.result not in there
                there.add(operator.result)


@EVERY
def test_results_that_take_the_place_of_leaves_are_stored_last(cell: Cell) -> None:
    """And nothing takes them; nor those that are added to what is there."""
    phases = cell.adjoint.phases(tape(cell), cell.states, cell.weights)
    states = {Value("result", state) for state in cell.states if state in cell.arguments}
    assert states <= {*phases[-1].stores}
    untaken = states | {Value("result", vector) for vector in cell.weights}
    assert all(untaken.isdisjoint(phase.takes) for phase in phases)


def test_a_value_that_is_dear_is_kept_and_a_cheap_one_computed_again() -> None:
    @cell(gates=("a", "b"), late=("b",))
    def kept(a: Any, b: Any) -> Any:
        dear, cheap = tanh(a), 2 * a + 1
        return b(dear * cheap) * dear + cheap

    first, second = kept.step.phases()
    assert Value("kept", 0) in first.stores
    assert "tanh" not in second.code
    assert Value("given", "a") in second.takes  # of which the cheap one is made again


def test_of_a_cheap_function_of_one_dear_value_that_value_is_kept() -> None:
    @cell(gates=("a", "b"), late=("b",))
    def kept(a: Any, b: Any) -> Any:
        dear = exp(a)
        return b(dear + 1) * (dear + 2) * (dear + 3)

    first, second = kept.step.phases()
    assert sum(value.role == "kept" for value in first.stores) == 1
    assert second.takes.count(Value("kept", 0)) == 1


def test_what_is_stored_anyway_is_not_kept_beside() -> None:
    """The new cell state, which is a result, and what a late gate multiplies."""
    first, second = cells.lstm_output_sees_cell.step.phases()
    assert first.stores == (Value("result", "c"),)
    assert second.takes == (Value("result", "c"), Value("product", "o"))

    @cell(gates=("a", "b"), late=("b",))
    def stored(a: Any, b: Any) -> Any:
        return b(tanh(a)) + tanh(a)

    first, second = stored.step.phases()
    assert first.stores == (Value("operand", "b"),)
    assert Value("operand", "b") in second.takes


def test_a_mean_and_what_is_made_of_means_is_not_kept() -> None:
    """It is one number a row: to compute it again is as cheap as to read it."""

    @cell(gates=("a",))
    def normal(a: Any) -> Any:
        scale = 1 / exp(mean(a))
        return a * scale - mean(a * scale) * scale

    assert all(value.role != "kept" for phase in normal.step.phases() for value in phase.stores)


def test_tangents_of_operands_are_stored_as_the_step_stores_values() -> None:
    """Also where they are those of a state, or lead to no result."""
    for made, alone in ((tangents_alike, ["n", "m"]), (cells.gru_reset_before, ["n"])):
        tangent = made.step.tangent("t_", operands=alone)
        stored = [gate for phase in tangent.phases() for gate in operand_gates(phase)]
        assert sorted(stored) == sorted(alone)
    assert not any(operand_gates(phase) for phase in cells.lstm_output_sees_cell.step.tangent("t_").phases())


def test_tangents_beside_values() -> None:
    step: Step = cells.lstm.step.tangent("t_", values=("h",))
    assert [*step.results] == ["h", "t_h", "t_c"]
    assert [*step.given] == ["i", "f", "g", "o", "c", "t_i", "t_f", "t_g", "t_o", "t_c"]


def test_a_step_of_numbers_alone_is_as_long_as_a_leaf() -> None:
    @cell(gates=("a",), states=("h", "s"))
    def numbers(a: Any, s: Any) -> Any:
        return 2.5, sigmoid(s)

    (phase,) = numbers.step.phases()
    function = compile_source(phase.code, FUNCTIONS, "phase").phase
    h, _ = function(*[np.zeros(3) for _ in phase.takes])
    assert np.array_equal(h, [2.5, 2.5, 2.5])
