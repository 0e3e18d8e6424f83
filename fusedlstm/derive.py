"""From the mathematics of a cell: straight-line code for its step, its adjoint and its tangent.

A cell is called once with symbols.  Every operation on a symbol makes a node of an expression
graph in which equal expressions are one node, so that common subexpressions are found as they
arise.  The adjoint follows by walking the graph backwards (reverse-mode differentiation), which
yields the short code that one would write by hand; differentiating each result with respect to
each argument, as a computer algebra system does, yields several times as much.

Beside functions of one hidden unit there are operators over the units of a row, the only places where a
unit sees another: the mean, the variance, and the products with the recurrent weights of a gate.  The adjoint
of the mean is the mean, and that of the variance is made of means; that of a product is the product with the
transposed weights.

The code is Python that calls the functions of :mod:`fusedlstm.math` by name.  NumPy arrays, SIMD
vectors and CUDA scalars all run it, each with its own versions of these functions.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any

from . import math
from .math import DERIVATIVES

OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
LOGIC = {"and": "&", "or": "|"}

# Operators over the units; products are written "kind:gate".  A product stands for the whole pre-activation
# of a gate: its part of the input and its biases are in it.  The variance is that of its arguments but the
# first, all taken together; the first is their mean.
MEAN, VARIANCE = "mean", "variance"
MOMENTS = (MEAN, VARIANCE)
# What a phase computes toward a variance: the mean over those units of a row that are in one vector.
VECTOR_MEAN = "vector_mean"
PRODUCT, TRANSPOSED = "product", "transposed"  # of one argument
# Their tangents, of the argument's tangent and the argument, since the weights may move too.
MOVED_PRODUCT, MOVED_TRANSPOSED = "moved_product", "moved_transposed"
_FUNCTION_OF = {
    PRODUCT: "{}",
    TRANSPOSED: "{}_transposed",
    MOVED_PRODUCT: "{}_moved",
    MOVED_TRANSPOSED: "{}_transposed_moved",
}


def function_name(op: str) -> str:
    """The name by which generated code calls an operator over the units."""
    kind, _, gate = op.partition(":")
    return _FUNCTION_OF[kind].format(gate) if gate else op


class CellError(TypeError):
    """A cell that cannot become a kernel; the message says what to change."""


class Graph:
    """Expressions in the order in which they were made, equal ones once."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Expression] = {}

    def symbol(self, name: str) -> Expression:
        return self._node("symbol", (), name)

    def constant(self, value: float) -> Expression:
        if not isfinite(value):
            raise CellError(f"{value} is used as a number; a cell may use finite numbers only")
        # repr tells 0.0 from -0.0
        return self._node("constant", (), repr(float(value)))

    def apply(self, op: str, *args: Any) -> Expression:
        """The expression `op(*args)`, simplified.

        A constant 0 is exact: times anything it is 0, also infinity or NaN.  Gradients rely on that.
        """
        nodes = tuple(self.lift(op, arg) for arg in args)
        if op == "div" and nodes[1].number == 0:
            raise CellError("the cell divides by zero")
        simple = self._simplified(op, nodes)
        return self._node(op, nodes, None) if simple is None else simple

    def operator(self, op: str, *args: Expression) -> Expression:
        """The operator over the units `op` of `args`; of zero it is zero, but for a product's own part."""
        if op == MEAN and not differs_between_units(args[0]):
            return args[0]
        if args[0].number == 0 and op.startswith(TRANSPOSED):
            return args[0]
        return self._node(op, args, None)

    def moment(self, op: str, *args: Any) -> Expression:
        """The mean or the variance over the units of a row, of all values of several taken together."""
        values = [self.lift(f"{op}()", arg) for arg in args]
        for value in values:
            _refuse_condition(value, f"{op}()")
        if not any(map(differs_between_units, values)):
            known = "it is zero" if op == VARIANCE else "it is that value"
            raise CellError(f"{op}() is taken of what is the same for all hidden units of a row: {known}")
        total = values[0]
        for value in values[1:]:
            total = total + value
        center = self.operator(MEAN, total * (1 / len(values)))
        return center if op == MEAN else self._node(VARIANCE, (center, *values), None)

    def lift(self, op: str, value: Any) -> Expression:
        if isinstance(value, Expression):
            if value.graph is not self:
                raise CellError("a value of another cell is used; pass it as an argument")
            return value
        if isinstance(value, LateGate):
            value.record()
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise CellError(f"{op} is applied to {value!r}; use arguments, constants and numbers only")
        return self.constant(float(value))

    def _node(self, op: str, args: tuple[Expression, ...], value: str | None) -> Expression:
        key = (op, tuple(id(arg) for arg in args), value)
        if key not in self._nodes:
            self._nodes[key] = Expression(self, op, args, value, len(self._nodes))
        return self._nodes[key]

    def _simplified(self, op: str, args: tuple[Expression, ...]) -> Expression | None:
        numbers = [arg.number for arg in args]
        if op in OPERATORS and None not in numbers:
            return self.constant(_fold(op, *numbers))
        if op in DERIVATIVES and None not in numbers:
            return self.constant(float(getattr(math, op)(*numbers)))
        if op == "add":
            if numbers[0] == 0:
                return args[1]
            if numbers[1] == 0:
                return args[0]
        elif op == "sub" and numbers[1] == 0:
            return args[0]
        elif op == "mul":
            for one, other in ((0, 1), (1, 0)):
                if numbers[one] == 0 or numbers[one] == 1:
                    return args[one] if numbers[one] == 0 else args[other]
                mask = args[one]
                if mask.op == "where" and any(arm.number is not None for arm in mask.args[1:]):
                    # a derivative that is 0 must stay 0 when it meets infinity or NaN
                    chosen = (self.apply("mul", args[other], arm) for arm in mask.args[1:])
                    return self.apply("where", mask.args[0], *chosen)
        elif op == "div" and (numbers[1] == 1 or numbers[0] == 0):
            return args[0]
        elif op == "where":
            holds = _decided(args[0])
            if args[1] is args[2] or holds is not None:
                return args[2] if holds is False else args[1]
        return None


def _decided(condition: Expression) -> bool | None:
    """Whether a comparison of constants holds; None if it depends on values."""
    numbers = [arg.number for arg in condition.args]
    if condition.op in COMPARISONS and None not in numbers:
        return bool(getattr(operator, condition.op)(*numbers))
    if condition.op != "not" and condition.op not in LOGIC:
        return None
    known = [_decided(arg) for arg in condition.args]
    if condition.op == "not":
        return None if known[0] is None else not known[0]
    decisive = condition.op == "or"  # one that holds decides an or, one that does not an and
    if decisive in known or None not in known:
        return decisive if decisive in known else not decisive
    return None


def _fold(op: str, x: Any, y: Any) -> float:
    return float({"add": x + y, "sub": x - y, "mul": x * y, "div": x / (y or 1)}[op])


class Expression:
    """One node: what a cell's function computes with while it is traced."""

    __array_ufunc__ = None  # np.float32(2) * x asks us, not NumPy
    __hash__ = object.__hash__

    def __init__(
        self, graph: Graph, op: str, args: tuple[Expression, ...], value: str | None, index: int
    ) -> None:
        self.graph, self.op, self.args, self.value, self.index = graph, op, args, value, index

    @property
    def number(self) -> float | None:
        return float(self.value) if self.op == "constant" and self.value is not None else None

    @property
    def is_operator(self) -> bool:
        """Whether it is an operator over the units."""
        return self.op in MOMENTS or ":" in self.op

    @property
    def is_condition(self) -> bool:
        return self.op in COMPARISONS or self.op in LOGIC or self.op == "not"

    def record(self, name: str, args: tuple[Any, ...]) -> Expression:
        """The call `name(*args)` of one of the functions of :mod:`fusedlstm.math`."""
        if name in MOMENTS:
            return self.graph.moment(name, *args)
        if name == "where" and not getattr(args[0], "is_condition", False):
            raise CellError("the first argument of where() must be a comparison, such as x > 0")
        for arg in args[1:] if name == "where" else args:
            _refuse_condition(arg, f"{name}()")
        return self.graph.apply(name, *args)

    def _operation(self, op: str, *args: Any) -> Expression:
        for arg in args:
            _refuse_condition(arg, OPERATORS.get(op, COMPARISONS.get(op, op)))
        return self.graph.apply(op, *args)

    def _combine(self, op: str, *args: Any) -> Expression:
        if not all(getattr(arg, "is_condition", False) for arg in args):
            raise CellError("&, | and ~ combine comparisons only; put each comparison in parentheses")
        return self.graph.apply(op, *args)

    def __add__(self, y: Any) -> Expression:
        return self._operation("add", self, y)

    def __radd__(self, x: Any) -> Expression:
        return self._operation("add", x, self)

    def __sub__(self, y: Any) -> Expression:
        return self._operation("sub", self, y)

    def __rsub__(self, x: Any) -> Expression:
        return self._operation("sub", x, self)

    def __mul__(self, y: Any) -> Expression:
        return self._operation("mul", self, y)

    def __rmul__(self, x: Any) -> Expression:
        return self._operation("mul", x, self)

    def __truediv__(self, y: Any) -> Expression:
        return self._operation("div", self, y)

    def __rtruediv__(self, x: Any) -> Expression:
        return self._operation("div", x, self)

    def __neg__(self) -> Expression:
        return self._operation("mul", self, -1.0)

    def __pos__(self) -> Expression:
        return self

    def __abs__(self) -> Expression:
        return self.record("absolute", (self,))

    def __pow__(self, exponent: Any) -> Expression:
        if isinstance(exponent, (int, float)) and exponent in (0.5, *range(1, 17)):
            if exponent == 0.5:
                return self.record("sqrt", (self,))
            half = self if exponent == 1 else self ** (exponent // 2)
            return half if exponent == 1 else half * half * (self if exponent % 2 else 1)
        raise CellError(
            f"** takes the constants 1 to 16 and 0.5 here, got {exponent!r}; write 1 / x**n for x**-n, and "
            "for other exponents, where x > 0, exp(y * log(x))"
        )

    def __lt__(self, y: Any) -> Expression:
        return self._operation("lt", self, y)

    def __le__(self, y: Any) -> Expression:
        return self._operation("le", self, y)

    def __gt__(self, y: Any) -> Expression:
        return self._operation("gt", self, y)

    def __ge__(self, y: Any) -> Expression:
        return self._operation("ge", self, y)

    def __eq__(self, y: object) -> Expression:  # type: ignore[override]
        return self._operation("eq", self, y)

    def __ne__(self, y: object) -> Expression:  # type: ignore[override]
        return self._operation("ne", self, y)

    def __and__(self, y: Any) -> Expression:
        return self._combine("and", self, y)

    def __or__(self, y: Any) -> Expression:
        return self._combine("or", self, y)

    def __invert__(self) -> Expression:
        return self._combine("not", self)

    def __matmul__(self, y: Any) -> Expression:
        raise CellError(
            "a cell multiplies by no matrix itself: the product with the recurrent weights is in its gates.  "
            "For a product in the middle of a step name the gate in late=(...) and call it: n(sigmoid(r) * h)"
        )

    __rmatmul__ = __matmul__

    def __bool__(self) -> bool:
        raise CellError(
            "the cell branches on a value (if, and, or, not, min, max, a chained comparison); every "
            "unit must take the same path: use where(condition, x, y), minimum, maximum, & and |"
        )

    def __float__(self) -> float:
        raise CellError(
            "a function that works on plain numbers was called with a cell's value (math.tanh, say); "
            "use the functions of fusedlstm.math: " + ", ".join(sorted(DERIVATIVES))
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CellError(
            f"a cell's value has no attribute {name!r}; use arithmetic and the functions of "
            "fusedlstm.math: " + ", ".join(sorted(DERIVATIVES))
        )


def _refuse_condition(arg: Any, where: str) -> None:
    if getattr(arg, "is_condition", False):
        raise CellError(f"a comparison is used as a number in {where}; write where(comparison, 1.0, 0.0)")


def differs_between_units(node: Expression) -> bool:
    """Whether a value may differ between the hidden units of a row, as means do not."""
    parts = reachable([node], stop=lambda part: part.op in MOMENTS)
    return any(part.op == "symbol" or (part.is_operator and part.op not in MOMENTS) for part in parts)


class LateGate:
    """What a cell's function is given for a late gate: a function, to be called once."""

    def __init__(self, name: str, graph: Graph) -> None:
        self.name, self.graph = name, graph
        self.value: Expression | None = None  # once it is called

    def __call__(self, operand: Any) -> Expression:
        if self.value is not None:
            raise CellError(
                f"the late gate {self.name!r} is called twice; a second product needs a gate of its own"
            )
        if not isinstance(operand, Expression) or operand.number is not None:
            raise CellError(
                f"the late gate {self.name!r} is called with {operand!r}; call it with the value that its "
                "recurrent weights multiply"
            )
        _refuse_condition(operand, f"{self.name}()")
        self.value = self.graph.operator(f"{PRODUCT}:{self.name}", operand)
        return self.value

    def record(self, *args: Any) -> Expression:
        raise CellError(
            f"the gate {self.name!r} is late, a function: call it with what its recurrent weights multiply, "
            f"such as {self.name}(sigmoid(r) * h), and use the result"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = record
    __neg__ = __pow__ = __lt__ = __le__ = __gt__ = __ge__ = record


def trace(
    function: Callable[..., Any], given: dict[str, Expression | LateGate], constants: dict[str, float]
) -> list[Expression]:
    """Call `function` with arguments by name; its results as expressions."""
    graph = next(iter(given.values())).graph
    try:
        results = function(**given, **constants)
    except CellError:
        raise
    except Exception as error:
        raise CellError(
            f"cell {function.__name__}: {error}. A cell may use arithmetic, comparisons and the "
            "functions of fusedlstm.math: " + ", ".join(sorted(DERIVATIVES))
        ) from error
    if results is None:
        raise CellError(f"cell {function.__name__} returns nothing; it must return the new states")
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    for n, result in enumerate(results):
        _refuse_condition(result, f"result {n + 1} of cell {function.__name__}")
        if isinstance(result, LateGate):
            result.record()
    return [graph.lift(f"result of {function.__name__}", result) for result in results]


def differentiate(
    results: Sequence[Expression], seeds: Sequence[Expression], inputs: Sequence[Expression]
) -> list[Expression]:
    """The gradient of sum(seeds * results) with respect to each of `inputs`."""
    graph = inputs[0].graph
    zero = graph.constant(0.0)
    adjoint: dict[int, Expression] = {}  # of a product too: the gradient of its gate

    def accumulate(node: Expression, term: Expression) -> None:
        adjoint[node.index] = graph.apply("add", adjoint.get(node.index, zero), term)

    for result, seed in zip(results, seeds):
        accumulate(result, seed)
    for node in reversed(reachable(results)):
        d = adjoint.get(node.index)
        if d is None or not node.args or node.is_condition:
            continue
        if node.op == VARIANCE:  # as if the mean stood still, since deviations from it add up to zero
            center, *values = node.args
            d = graph.operator(MEAN, d)
            for value in values:
                accumulate(value, d * (value - center) * (2 / len(values)))
            continue
        if node.is_operator:
            kind, _, gate = node.op.partition(":")
            assert kind in (MEAN, PRODUCT), f"{node.op} is differentiated"
            accumulate(node.args[0], graph.operator(f"{TRANSPOSED}:{gate}" if gate else MEAN, d))
            continue
        for arg, factor in zip(node.args, _factors(node)):
            if factor is not None:
                accumulate(arg, graph.apply("mul", d, factor))
    return [adjoint.get(node.index, zero) for node in inputs]


def tangents(
    results: Sequence[Expression], inputs: Sequence[Expression], directions: Sequence[Expression]
) -> list[Expression]:
    """The derivative of each of `results` as each of `inputs` moves in its direction (forward mode)."""
    graph = inputs[0].graph
    moved = {node.index: direction for node, direction in zip(inputs, directions)}
    for node in reachable(results):
        if node.index in moved or node.is_condition:
            continue
        if node.op == VARIANCE:
            center, *values = node.args
            total = graph.constant(0.0)
            for value in values:
                total = total + (value - center) * moved[value.index] * (2 / len(values))
            moved[node.index] = graph.operator(MEAN, total)
            continue
        if node.is_operator:
            gate = node.op.partition(":")[2]
            (operand,) = node.args
            both = (moved[operand.index], operand) if gate else (moved[operand.index],)
            moved[node.index] = graph.operator(f"moved_{node.op}" if gate else MEAN, *both)
            continue
        total = graph.constant(0.0)
        for arg, factor in zip(node.args, _factors(node) if node.args else ()):
            if factor is not None:
                total = graph.apply("add", total, graph.apply("mul", moved[arg.index], factor))
        moved[node.index] = total
    return [moved[node.index] for node in results]


def _factors(node: Expression) -> tuple[Any, ...]:
    if node.op in ("add", "sub"):
        return (1.0, 1.0 if node.op == "add" else -1.0)
    x, *rest = node.args
    if node.op == "mul":
        return (rest[0], x)
    if node.op == "div":
        return (1 / rest[0], -node / rest[0])
    return DERIVATIVES[node.op][1](*node.args, node)


def reachable(
    results: Iterable[Expression], stop: Callable[[Expression], bool] = lambda node: False
) -> list[Expression]:
    """What `results` depend on, up to `stop`, in the order in which it was made: arguments first."""
    found: dict[int, Expression] = {}
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node.index not in found:
            found[node.index] = node
            if not stop(node):
                waiting.extend(node.args)
    return [found[index] for index in sorted(found)]


def source(
    name: str,
    arguments: Sequence[str],
    results: Sequence[Expression],
    given: dict[int, str] | None = None,  # index of an expression -> the argument that it arrives as
) -> str:
    """A Python function of straight-line code; a bare number becomes an array like the first value given."""
    names = dict(given or {})
    like = next(iter(names.values()), arguments[0])  # the first argument may be a function
    lines: list[str] = []
    for node in reachable(results, stop=lambda node: node.index in names):
        if node.index in names:
            continue
        text = _text(node, [names[arg.index] for arg in node.args])
        if node.op in ("symbol", "constant"):
            names[node.index] = text
        else:
            names[node.index] = f"v{len(lines)}"
            lines.append(f"    v{len(lines)} = {text}")
    returned = [
        f"full_like({like}, {names[node.index]})" if node.op == "constant" else names[node.index]
        for node in results
    ]
    body = "\n".join([*lines, f"    return ({', '.join(returned)},)"])
    return f"def {name}({', '.join(arguments)}):\n{body}\n"


def _text(node: Expression, args: list[str]) -> str:
    if node.op == "symbol":
        return str(node.value)
    if node.op == "constant":
        return str(node.value) if not str(node.value).startswith("-") else f"({node.value})"
    for table in (OPERATORS, COMPARISONS, LOGIC):
        if node.op in table:
            return f"{args[0]} {table[node.op]} {args[1]}"
    if node.op == "not":
        return f"~{args[0]}"
    if node.op == VARIANCE:
        squares = [f"({value} - {args[0]}) * ({value} - {args[0]})" for value in args[1:]]
        return f"mean(({' + '.join(squares)}) * {1 / len(squares)!r})"
    if node.is_operator:
        return f"{function_name(node.op)}({', '.join(args)})"
    return f"{node.op}({', '.join(args)})"


def compile_source(text: str, namespace: dict[str, Any], filename: str) -> types.ModuleType:
    """The functions of generated code as a module, in which `namespace` is visible."""
    module = types.ModuleType(filename)
    module.__dict__.update(namespace)
    exec(compile(text, filename, "exec"), module.__dict__)
    return module
