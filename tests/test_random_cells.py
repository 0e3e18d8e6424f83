"""Cells written at random from the grammar of the language, on the CPU engine against the oracle."""

from __future__ import annotations

from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from numba import types
from test_layers import check_against_oracle
from test_second_order import Case

from fusedlstm import cell, math
from fusedlstm.cells import Cell
from fusedlstm.derive import MOMENTS
from fusedlstm.kernels.cpu import phase
from fusedlstm.kernels.cpu.program import Program

KINDS = ("plain", "split", "without_input", "without_recurrent")
FORMS = (  # bounded enough that no cell explodes
    "tanh({0})", "sigmoid({0})", "{0} + {1}", "{0} - {1}", "{0} * sigmoid({1})", "tanh({0}) * {1}",
    "0.5 * {0}",
)  # fmt: skip


class _Text:
    """The function of a cell as it is written: what each value is made of, and which differ between units."""

    def __init__(self, random: Random, known: list[str]) -> None:
        self.random, self.known = random, [*known]
        self.lines: list[str] = []
        self.parts: dict[str, list[str]] = {name: [] for name in known}
        self.differing = {*known}

    def pick(self) -> str:
        """Any value, mostly one that was written last, so that trees grow deep."""
        return self.random.choice(self.known if self.random.random() < 0.5 else self.known[-3:])

    def write(self, form: str, *operands: str) -> str:
        """One more value."""
        name = f"x{len(self.lines)}"
        self.lines.append(f"    {name} = {form.format(*operands)}")
        self.known.append(name)
        self.parts[name] = [*operands]
        if self.differing & {*operands} and not form.startswith(MOMENTS):
            self.differing.add(name)
        return name

    def write_call(self, function: str) -> str:
        """The call of a late gate, of the mean or of the variance, of what differs between units."""
        name = self.write(f"{function}({{0}})", [n for n in self.known if n in self.differing][-1])
        if function not in MOMENTS:
            self.differing.add(name)
        return name

    def write_any(self) -> str:
        form = self.random.choice(FORMS)
        return self.write(form, *[self.pick() for _ in range(1 + ("{1}" in form))])

    def reached(self, results: list[str]) -> set[str]:
        """What results are made of."""
        found, waiting = set(), [*results]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.parts[name]
        return found


def write_cell(seed: int) -> Cell:
    """A cell of one to four gates, and zero to two late ones, to three states, to two means or variances."""
    random = Random(seed)
    kinds = {"g0": "plain"} | {f"g{n}": random.choice(KINDS) for n in range(1, random.randint(1, 4))}
    late = [f"n{n}" for n in range(random.randint(0, 2))]
    states = [f"s{n}" for n in range(random.randint(1, 3))]
    weights = [f"w{n}" for n in range(random.randint(0, 2))]
    options: dict[str, Any] = {
        kind: tuple(gate for gate, own in kinds.items() if own == kind) for kind in KINDS[1:]
    }
    options["without_input"] += tuple(gate for gate in late if random.random() < 0.3)
    taken = [
        name
        for gate, kind in kinds.items()
        for name in ([f"{gate}_x", f"{gate}_h"] if kind == "split" else [gate])
    ]
    text = _Text(random, [*taken, *states, *weights])
    moments = [random.choice(MOMENTS) for _ in range(random.randint(0, 2))]
    actions = [*late, *moments, *["any"] * random.randint(4, 10)]
    random.shuffle(actions)
    calls = [text.write_any() if action == "any" else text.write_call(action) for action in actions]
    results = [random.choice(text.known[-5:]) for _ in states]
    for call, action in zip(calls, actions):  # a late gate must have an effect
        if action != "any" and call not in text.reached(results):
            n = random.randrange(len(results))
            results[n] = text.write("0.5 * {0} + tanh({1})", results[n], call)
    arguments = ", ".join([*taken, *late, *states, *weights])
    source = f"def written({arguments}):\n" + "\n".join([*text.lines, f"    return {', '.join(results)}"])
    scope: dict[str, Any] = {name: getattr(math, name) for name in ("tanh", "sigmoid", *MOMENTS)}
    exec(source, scope)
    scope["written"].__doc__ = source
    gates = random.sample([*kinds, *late], len(kinds) + len(late))
    options |= {"weights": weights, "late": late, "recurrent": random.choice(states)}
    return cell(gates, states, **options)(scope["written"])


CELLS = st.builds(write_cell, st.integers(0, 1 << 30))


@pytest.mark.parametrize("projected", [False, True])
def test_every_value_of_a_phase_has_a_place(projected: bool) -> None:
    """In all passes of very many cells; this compiles nothing."""
    for one in map(write_cell, range(300)):
        if projected and one.unprojectable:
            continue
        made = Program(one, types.float64, projected)
        passes = (
            (made.steps, phase.step_places(one, made.steps)),
            (made.adjoints, phase.adjoint_places(one, made.adjoints, projected)),
            (made.tangents, phase.tangent_places(one, made.tangents, made.operands)),
            (made.adjoint_tangents, phase.adjoint_tangent_places(one, made.adjoint_tangents, projected)),
        )
        for cuts, places in passes:
            for cut in cuts:
                phase.source(cut, places, made.registers, made.units)


@settings(max_examples=12)
@given(cell=CELLS, seed=st.integers(0, 1000), bias=st.booleans())
def test_any_cell_is_the_oracle(cell: Cell, seed: int, bias: bool) -> None:
    """Outputs, final states and all gradients, in both directions."""
    options = {
        "cell": cell, "input_size": 3, "hidden_size": 9, "bidirectional": True, "bias": bias,
        "dtype": "float64",
    }  # fmt: skip
    check_against_oracle("cpu", options, 4, 3, lengths=True, reset=True, seed=seed)


@settings(max_examples=5)
@given(cell=CELLS)
def test_any_cell_has_second_derivatives(cell: Cell) -> None:
    Case(cell, (4, 3, 2, 9), torch.float64).cut().check()
