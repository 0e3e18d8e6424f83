"""From a cell to tables: orders of gates, panels, products of phases, where operands of late gates lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checks import (
    five_gates,
    independent,
    late_and_means,
    late_of_output,
    late_without_gradient,
    name,
    normalized_lstm,
    other_operand,
    tangents_alike,
    three_states,
    unused_state,
)
from numba import types

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels.cpu.memory import OPERAND, OUTPUT, STATE
from fusedlstm.kernels.cpu.program import Program, program
from fusedlstm.kernels.cpu.records import INPUT, LATE, PHASE, PRODUCT
from fusedlstm.kernels.cpu.spec import MOST_ROWS, machine


def made(cell: Cell, scalar: types.Float = types.float32, projected: bool = False) -> Program:
    return program(cell, scalar, projected)


def columns(table: np.ndarray, record: Any, *names: str) -> list[list[int]]:
    return table[:, [record.fields[name] for name in names]].tolist()


@pytest.mark.parametrize(
    ("cell", "units"),
    [  # at least four vectors wide, where the input product has twice as many gates to begin with
        (cells.lstm, 1), (cells.gru, 1), (cells.rnn_tanh, 4), (three_states, 2), (unused_state, 4),
        (five_gates, 1), (cells.gru_reset_before, 2), (independent, 4), (normalized_lstm, 1),
        (late_of_output, 4),
    ],
    ids=name,
)  # fmt: skip
def test_panels(cell: Cell, units: int) -> None:
    for scalar in (types.float32, types.float64):
        found = made(cell, scalar)
        assert found.units == units
        assert found.panel == units * machine().bits // scalar.bitwidth
        width = max(len(cell.recurrent_gates), 1) * units
        if cell.recurrent_gates:
            assert found.recurrent_rows == found.registers.rows(width)
        else:
            assert found.recurrent_rows == MOST_ROWS


def test_programs_are_made_once() -> None:
    assert made(cells.lstm) is made(cells.lstm)
    assert (
        len(
            {
                made(cells.lstm),
                made(cells.gru),
                made(cells.lstm, types.float64),
                made(cells.lstm, projected=True),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("cell", "inputs", "recurrent", "late", "slots"),
    [
        (cells.lstm, [0, 1, 2, 3], [0, 1, 2, 3], [], []),
        (cells.gru, [2, 0, 1], [0, 1, 2], [], []),  # n_x, r, z, n_h
        (cells.gru_reset_before, [2, 0, 1], [0, 1], [2], [0]),
        (cells.lstm_output_from_memory, [0, 1, 2], [0, 1, 2, 3], [4], [4]),  # o and m see no input
        (independent, [0, 1], [], [], []),
        # gates with input: r, z, n, k; all have recurrent weights
        (late_and_means, [2, 3, 0, 1], [0, 1, 4], [2, 3], [0, 5]),
    ],
    ids=name,
)  # fmt: skip
def test_orders_of_gates(
    cell: Cell, inputs: list[int], recurrent: list[int], late: list[int], slots: list[int]
) -> None:
    """Places in the weights, in the order in which the pre-activations stand."""
    found = made(cell)
    assert found.input_order.tolist() == inputs
    assert found.recurrent_order.tolist() == recurrent
    assert found.late_order.tolist() == late
    assert found.late_slots.tolist() == slots
    by_input = [gate for gate in cell.preactivations if gate.removesuffix("_x") in cell.gates_with_input]
    assert [gate.removesuffix("_x") for gate in by_input if not gate.endswith("_h")] == [
        cell.gates_with_input[n] for n in inputs
    ]


@pytest.mark.parametrize(
    ("cell", "ring"),
    [
        (cells.lstm, 1),
        (other_operand, 2),
        (cells.lstm_output_sees_cell, 2),
        (normalized_lstm, 2),
        (independent, 1),
    ],
    ids=name,
)
def test_states_that_other_threads_read_are_not_written_over(cell: Cell, ring: int) -> None:
    assert made(cell).ring == ring


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (cells.lstm, [(0, 4, 0, 0, 0)]),
        (cells.gru, [(1, 3, 0, 0, 0)]),
        (cells.gru_reset_before, [(1, 2, 0, 0, 0), (0, 1, 1, OPERAND, 0)]),
        (cells.lstm_output_sees_cell, [(1, 3, 0, 0, 0), (0, 1, 1, STATE, 0)]),
        (cells.lstm_output_from_memory, [(0, 4, 0, 0, 0), (4, 1, 1, STATE, 0)]),
        (late_of_output, [(2, 1, 0, 0, 0), (0, 1, 1, OUTPUT, 0)]),
        (late_and_means, [(2, 3, 0, 0, 0), (0, 1, 1, OPERAND, 0), (5, 1, 1, OPERAND, 1)]),
        (independent, []),
    ],
    ids=name,
)
def test_products_of_a_step(cell: Cell, expected: list[tuple[int, ...]]) -> None:
    """Those with the recurrent weights first, then those of late gates; slots, and where operands lie."""
    found = made(cell)
    late = {gate: 100 + n for n, gate in enumerate(cell.late)}
    gate = found.panel * found.registers.size
    for cuts in (found.steps, found.tangents):
        table = found.product_table(cuts, 7, late)
        places = [[found.tile(slots), slot * gate, *rest] for slot, slots, *rest in expected]
        assert columns(table, PRODUCT, "tile", "offset", "late", "source", "place") == places
        panels = [[7 if not row[2] else late[cell.late[n - 1]]] for n, row in enumerate(expected)]
        assert columns(table, PRODUCT, "panels") == panels
    begun = columns(found.phase_table, PHASE, "product", "products")
    assert [first for first, _ in begun] == np.cumsum([0, *[count for _, count in begun[:-1]]]).tolist()
    assert sum(count for _, count in begun) == len(expected)


def test_the_phase_behind_an_operator_takes_its_product() -> None:
    """Means: before, between and behind the late gates."""
    found = made(late_and_means)
    fields = ("product", "products", "mean", "means")
    assert columns(found.phase_table, PHASE, *fields) == [
        [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1], [2, 0, 2, 0], [2, 1, 2, 1], [3, 0, 3, 0]
    ]  # fmt: skip


def test_late_gates_in_an_adjoint() -> None:
    """The phase that takes a product, and the gradient that is multiplied; -1 where that is zero."""
    cell = late_without_gradient
    planes = dict.fromkeys(cell.late, 5)
    table = made(cell).late_table(made(cell).adjoints, planes)
    fields = ("phase", "weights", "slot", "moved_phase")
    assert columns(table, LATE, *fields) == [[-1, 5, cell.preactivations.index("n"), -1]]
    found = made(cells.lstm_output_sees_cell)
    table = found.late_table(found.adjoints, {"o": 6})
    fields = ("phase", "from_slot", "weights", "slot", "source", "place", "moved_phase", "moved_weights")
    assert columns(table, LATE, *fields) == [[1, 0, 6, 0, STATE, 0, -1, 0]]
    table = found.late_table(found.adjoint_tangents, {"o": 6}, {"o": 8})
    assert columns(table, LATE, *fields) == [[1, 0, 6, 0, STATE, 0, 1, 8]]


def test_operands_lie_where_the_step_has_them() -> None:
    """In a pass of tangents too, though the tangent of c + 1 is that of c: others read them there."""
    found = made(tangents_alike)
    assert found.operands == ["n", "m"]
    stored = [str(value.name) for cut in found.tangents for value in cut.stores if value.role == "operand"]
    assert sorted(stored) == ["m", "n"]
    assert columns(found.late_table(found.adjoints, {"n": 1, "m": 2}), LATE, "source", "place") == [
        [OPERAND, 0],
        [OPERAND, 1],
    ]


def test_tangents_of_weights_that_are_zero_are_not_multiplied() -> None:
    found = made(late_and_means)
    addresses = {"ih": 3, "hh": 0, "n": 4, "m": 0}
    assert columns(found.input_table(addresses), INPUT, "panels", "slot") == [[3, 0], [4, 0]]
    assert len(found.input_table(dict.fromkeys(addresses, 0))) == 0
