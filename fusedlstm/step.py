"""A step of a cell as expressions, its adjoint, its tangent, and their cuts into phases.

What lies between two operators over the hidden units (see :mod:`fusedlstm.derive`) is code of each unit
by itself.  So a step is a list of phases with a meeting of threads between two of them: a phase computes
and stores, then the operators are applied to what it stored, and the next phase has their results.  The
adjoint and the tangent of a step are made of the same operators, and are cut by the same function.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .derive import (
    MOMENTS,
    PRODUCT,
    TRANSPOSED,
    VARIANCE,
    VECTOR_MEAN,
    Expression,
    Graph,
    differentiate,
    differs_between_units,
    reachable,
    source,
    tangents,
)

# Dearer than to write a vector and read it again.
_EXPENSIVE = frozenset({"tanh", "sigmoid", "exp", "log", "erf", "softplus", "sqrt", "div"})


class Value(NamedTuple):
    """Something that a phase takes or stores.

    Attributes:
        role: "given", a leaf of the step; "result", one of its results; "operand", what a product is
            applied to, and "product", what it gives, or "moved", if it is the tangent of a product; "sum",
            what a mean or a variance is taken of, and "mean", what it is; "lanes", how many units of a row
            are in a vector; "kept", what a later phase would have to compute again.
        name: of the leaf or the result, of a product that of its gate; else a number.
    """

    role: str
    name: str | int


class Operator(NamedTuple):
    """An operator over the units, applied when all units of a phase are done.

    Attributes:
        kind: as the constants of :mod:`fusedlstm.derive` name it.
        gate: whose recurrent weights it multiplies; empty for a mean or a variance.
        operand: what it is applied to, which the phase, or one before it, has stored; of a variance, squares
            of differences from the mean over a vector.  Its mean is the last before it in the phase.
        result: what the phases after it take.
    """

    kind: str
    gate: str
    operand: Value
    result: Value


class Phase(NamedTuple):
    """Element-wise code between two meetings of the threads, and the operators on what it has stored."""

    takes: tuple[Value, ...]
    stores: tuple[Value, ...]
    operators: tuple[Operator, ...]
    code: str  # of a function `phase(a0, a1, ...)` that returns what is stored


@dataclass(frozen=True, eq=False)
class Step:
    """What a step computes for one hidden unit.

    Attributes:
        given: its leaves by name.
        results: what it computes, by name.
        gates: the late gates by name: each a product whose value is a leaf of adjoint and tangent.
        operands: what is stored beside the results, by the late gate whose operand it is, whoever takes it.
        noise: those leaves that are random numbers, which have no gradients and no tangents.
    """

    graph: Graph
    given: dict[str, Expression]
    results: dict[str, Expression]
    gates: dict[str, Expression] = field(default_factory=dict)
    operands: dict[str, Expression] = field(default_factory=dict)
    noise: tuple[str, ...] = ()

    def means(self, known: Mapping[Value, Expression] | None = None) -> tuple[Expression, ...]:
        """The means and variances that it takes, in the order in which its :meth:`phases` do."""
        return tuple(node for node in _Cut(self, dict(known or {})).found if node.op in MOMENTS)

    def adjoint(self, arguments: Iterable[str], seeds: Iterable[str]) -> Step:
        """The gradients of `arguments`, given those of the results under the names `seeds`.

        A late gate among the arguments is given by its value, and its gradient is that of its pre-activation.
        """
        values = self.given | self.gates
        given = {name: values[name] for name in arguments}
        symbols = {name: self.graph.symbol(name) for name in seeds}
        gradients = differentiate([*self.results.values()], [*symbols.values()], [*given.values()])
        drawn = {name: self.given[name] for name in self.noise}
        return Step(self.graph, given | drawn | symbols, dict(zip(given, gradients)), noise=self.noise)

    def tangent(self, prefix: str, values: Collection[str] = (), operands: Collection[str] = ()) -> Step:
        """The tangents of the results, given values and tangents of the leaves, named `prefix` + name.

        A late gate's value is given as well; its tangent is that of a product whose weights move too.  Of the
        results `values` the values are computed beside the tangents.  The tangents of what the late gates
        `operands` multiply are stored, as a step stores the values, even where they equal others or have no
        effect: the tangent of the adjoint takes them.
        """
        leaves = self.given | self.gates
        moved = {name: self.graph.symbol(prefix + name) for name in self.given if name not in self.noise}
        known = [self.given[name] for name in moved], list(moved.values())
        for name in self.noise:
            known[0].append(self.given[name])
            known[1].append(self.graph.constant(0.0))
        multiplied = {}
        for name, node in self.gates.items():
            (operand,) = node.args
            (direction,) = tangents([operand], *known)
            multiplied[name] = direction
            known[0].append(node)
            known[1].append(self.graph.operator(f"moved_{PRODUCT}:{name}", direction, operand))
        directions = tangents([*self.results.values()], *known)
        results = {name: self.results[name] for name in values}
        results |= {prefix + name: node for name, node in zip(self.results, directions)}
        given = leaves | {prefix + name: node for name, node in moved.items()}
        stored = {name: multiplied[name] for name in operands}
        return Step(self.graph, given, results, operands=stored, noise=self.noise)

    def code(self, name: str, arguments: Iterable[str], functions: Iterable[str] = ()) -> str:
        """The whole step as a function of `arguments`, which calls operators: :func:`derive.source`."""
        given = {node.index: leaf for leaf, node in self.given.items()}
        return source(name, (*arguments, *functions), [*self.results.values()], given)

    def phases(
        self,
        known: Mapping[Value, Expression] | None = None,
        last: Collection[str] = (),
        added: Collection[str] = (),
    ) -> tuple[Phase, ...]:
        """The step, cut where an operator is applied.

        Args:
            known: values beside `given` that are there, of the forward pass for an adjoint.
            last: results that are stored by the last phase, since they take the place of leaves.
            added: results that are added to what is there, so that no phase can take them.
        """
        return _Cut(self, dict(known or {}), last, added).phases()


class _Cut:
    """Which phase computes what."""

    def __init__(
        self,
        step: Step,
        known: dict[Value, Expression],
        last: Collection[str] = (),
        added: Collection[str] = (),
    ) -> None:
        self.step = step
        leaves = {Value("given", name): node for name, node in step.given.items()} | known
        self.leaves = {node.index: value for value, node in leaves.items()}
        self.level: dict[int, int] = {}  # the first phase that can compute it
        self.found = operators = self._find_levels()
        last_of_all = (*operators, *step.results.values(), *step.operands.values())
        count = 1 + max([self.level[node.index] for node in last_of_all], default=0)
        self.stores: list[dict[Value, Expression]] = [{} for _ in range(count)]
        self.operators: list[list[Operator]] = [[] for _ in range(count)]
        self.stored: dict[int, tuple[int, Value]] = {}  # expressions that later phases can take
        self.computed: dict[int, int] = {}  # the first phase that computes an expression
        self.kept = 0
        for name, node in step.results.items():
            phase = count - 1 if name in last else self.level[node.index]
            self._store(Value("result", name), node, phase, shared=name not in last and name not in added)
        for gate, node in step.operands.items():
            self._store(Value("operand", gate), node, self.level[node.index])
        self._place(operators)

    def _find_levels(self) -> list[Expression]:
        """Find the levels of all expressions; the operators in order."""
        operators = []
        ends = [*self.step.results.values(), *self.step.operands.values()]
        for node in reachable(ends, lambda node: node.index in self.leaves):
            if node.index in self.leaves:
                self.level[node.index] = 0
                continue
            args = node.args[1:] if node.op == VARIANCE else node.args  # its mean is taken beside it
            self.level[node.index] = max([self.level[arg.index] for arg in args], default=0)
            if node.is_operator:
                self.level[node.index] += 1
                operators.append(node)
        return sorted(operators, key=self._order)

    def _order(self, node: Expression) -> tuple[int, int, int]:
        """By phases; a variance comes behind its mean."""
        first = node.args[0] if node.op == VARIANCE else node
        return self.level[node.index], first.index, node.index

    def _store(self, value: Value, node: Expression, phase: int, shared: bool = True) -> None:
        self.stores[phase][value] = node
        if shared and node.number is None:
            self.stored.setdefault(node.index, (phase, value))

    def _place(self, operators: list[Expression]) -> None:
        """Have the operands of all operators stored, and name their results."""
        means = 0
        for node in operators:
            kind, _, gate = node.op.partition(":")
            phase, operand = self.level[node.index] - 1, node.args[0]
            if kind in MOMENTS:
                value, result = Value("sum", means), Value("mean", means)
                means += 1
                self._store(
                    value, self._deviation(node) if kind == VARIANCE else operand, phase, shared=False
                )
            else:
                result = Value("product" if kind in (PRODUCT, TRANSPOSED) else "moved", gate)
                found = self._find(operand, phase)
                value = found or Value("operand", gate)
                if found is None:
                    self._store(value, operand, phase)
            self.operators[phase].append(Operator(kind, gate, value, result))
            self.leaves[node.index] = result

    def _deviation(self, variance: Expression) -> Expression:
        """What a phase sums up toward a variance: squares of differences from the mean over a vector.

        That mean is near enough to the mean over all units; squares of the values themselves would cancel
        where the mean is large.
        """
        center, *values = variance.args
        graph = self.step.graph
        lanes = graph.symbol("lanes of a vector")
        self.leaves[lanes.index] = Value("lanes", 0)
        near = graph.apply(VECTOR_MEAN, center.args[0], lanes)
        squares = [(value - near) * (value - near) for value in values]
        total = squares[0]
        for square in squares[1:]:
            total = total + square
        return total * (1 / len(values))

    def _find(self, node: Expression, phase: int) -> Value | None:
        """Under which name a phase, or one before it, stores an expression."""
        for stores in self.stores[: phase + 1]:
            for value, stored in stores.items():
                if stored is node and value.role in ("result", "operand"):
                    return value
        return None

    def phases(self) -> tuple[Phase, ...]:
        taken = [self._walk(n) for n in range(len(self.stores))]  # in order, since a phase says what to keep
        return tuple(self._phase(n, values) for n, values in enumerate(taken))

    def _walk(self, n: int) -> dict[int, Value]:
        """Find what phase n computes, and what it takes, by index."""
        taken: dict[int, Value] = {}
        waiting = list(self.stores[n].values())
        seen: set[int] = set()
        while waiting:
            node = waiting.pop()
            if node.index in seen:
                continue
            seen.add(node.index)
            if (value := self._at_hand(node, n)) is not None:
                taken[node.index] = value
            else:
                self.computed.setdefault(node.index, n)
                waiting.extend(node.args)
        if not taken:  # numbers alone: as long as some leaf
            index, value = next(iter(self.leaves.items()))
            taken[index] = value
        return taken

    def _phase(self, n: int, taken: dict[int, Value]) -> Phase:
        order = sorted(taken)
        names = {index: f"a{k}" for k, index in enumerate(order)}
        code = source("phase", list(names.values()), list(self.stores[n].values()), names)
        takes = tuple(taken[index] for index in order)
        return Phase(takes, tuple(self.stores[n]), tuple(self.operators[n]), code)

    def _at_hand(self, node: Expression, n: int) -> Value | None:
        """The value that phase n takes in place of computing an expression."""
        if node.index in self.leaves:
            return self.leaves[node.index]
        phase, value = self.stored.get(node.index, (n, None))
        if phase < n:
            return value
        before = self.computed.get(node.index, n)
        if before < n and differs_between_units(node):
            dear = self._dear_parts(node)
            # of a cheap function of one dear value that value is kept, which may serve others too
            if len(dear) > 1 or node.index in dear:
                value = Value("kept", self.kept)
                self.kept += 1
                self._store(value, node, before)
                return value
        return None

    def _dear_parts(self, node: Expression) -> set[int]:
        """The outermost parts that are dearer than to store and take a vector."""

        def stop(part: Expression) -> bool:
            return part.index in self.leaves or part.op in _EXPENSIVE

        return {p.index for p in reachable([node], stop) if p.index not in self.leaves and p.op in _EXPENSIVE}
