"""Layers into files: with the standard's recurrent operators, or as loops of elementary ones.

A cell that ONNX has no operator for becomes a Scan.  Its body is made of the cell's own step, called with
values that write nodes where others compute; the products of the input are one product before the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from .. import weights as storage
from ..cells import Cell
from ..derive import compile_source
from ..files import write_whole
from ..layers import Recurrent
from ..weights import Weights
from .cells import DEFAULTS, Form, form_of

OPSET, IR = 14, 8  # the oldest in which all that is written means the same as in the newest


def export(
    layer: Recurrent, path: str | os.PathLike[str], *, states: bool = False, lengths: bool = False
) -> None:
    """Write a layer, or a stack of them, as a model of ONNX; see :func:`to_model`.

    Raises:
        TypeError, ValueError: as in :func:`to_model`.
        OSError: if the file cannot be written.
    """
    write_whole(Path(path), to_model(layer, states=states, lengths=lengths).SerializeToString())


def to_model(layer: Recurrent, *, states: bool = False, lengths: bool = False) -> ModelProto:
    """A layer, or a stack of them, as a model of ONNX, of opset 14, in the layer's precision.

    Its input is "x", shaped as the layer takes it, with any numbers of steps and sequences; its outputs are
    "y" and, by the names of the cell's states, the final ones: "h_n" and "c_n", (L*D, B, features).  Dropout
    is a matter of training and left out.

    Args:
        layer: on arrays: :class:`fusedlstm.LSTM`, ``GRU``, ``RNN`` or ``Recurrent``.
        states: whether initial states are inputs too, "h_0" and "c_0"; else they are zero.
        lengths: whether the lengths of the sequences are an input too, "lengths" (B,) of int32.

    Raises:
        TypeError: `layer` is none on arrays.
        ValueError: for a layer of gate inputs, with heads or with zoneout, which are not written yet.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(
            "layer must be a layer on arrays, such as fusedlstm.LSTM, got "
            f"{type(layer).__module__}.{type(layer).__qualname__}; fusedlstm.weights.from_torch and "
            "from_keras give one the weights of others"
        )
    storage.check_plain(layer, "ONNX")
    if np.any(layer.zoneout):
        raise ValueError(f"layer must have no zoneout, which is not written to ONNX, got {layer!r}")
    return _Layer(layer, states, lengths).made()


@dataclass(eq=False)
class _Graph:
    """Nodes in the order in which they are added, and the constants that they use."""

    dtype: np.dtype[Any]
    numbers: count[int] = field(default_factory=lambda: count(1))  # of names, in the graphs inside it too
    nodes: list[NodeProto] = field(default_factory=list)
    arrays: list[TensorProto] = field(default_factory=list)

    def name(self, what: str) -> str:
        return f"{what}_{next(self.numbers)}"

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """The outputs of a new node."""
        names = [self.name(operator) for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def one(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new node that has one."""
        return self.add(operator, *inputs, **attributes)[0]

    def rename(self, value: str, name: str) -> None:
        """Give a value a name that somebody else has chosen."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def array(self, value: np.ndarray, what: str = "array") -> str:
        tensor = numpy_helper.from_array(np.asarray(value, order="C"), self.name(what))
        self.arrays.append(tensor)
        return str(tensor.name)

    def integers(self, *values: int) -> str:
        return self.array(np.array(values, np.int64), "integers")

    def linear(self, value: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """``value @ weight.T + bias``."""
        product = self.one("MatMul", value, self.array(weight.T, "weight"))
        return product if bias is None else self.one("Add", product, self.array(bias, "bias"))

    def joined(self, values: Sequence[str], axis: int) -> str:
        return values[0] if len(values) == 1 else self.one("Concat", *values, axis=axis)

    def reversed(self, value: str) -> str:
        """A value reversed in its first axis."""
        start, end, step = self.integers(-1), self.integers(-(2**63)), self.integers(-1)
        return self.one("Slice", value, start, end, self.integers(0), step)

    def info(self, name: str, *shape: int | str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.dtype), shape)

    def made(self, name: str, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> GraphProto:
        return helper.make_graph(self.nodes, name, inputs, outputs, self.arrays)


class _Layer:
    """A layer as a graph."""

    def __init__(self, layer: Recurrent, states: bool, lengths: bool) -> None:
        self.layer, self.states = layer, states
        self.graph = _Graph(layer.dtype)
        self.lengths = "lengths" if lengths else ""
        self.cell = cell = layer.cell.inference
        self.sizes = [layer.proj_size or layer.hidden_size, *[layer.hidden_size] * (len(cell.states) - 1)]
        self.directions = 2 if layer.bidirectional else 1

    def made(self) -> ModelProto:
        layer, graph = self.layer, self.graph
        names, finals = self.cell.states, []
        x = graph.one("Transpose", "x", perm=[1, 0, 2]) if layer.batch_first else "x"
        form = None if layer.proj_size else form_of(self.cell)
        levels = [None] * layer.num_layers if form is None else storage.to_onnx(layer)
        for level, inputs in enumerate(levels):
            initial = self._initial(level)
            if form is None or inputs is None:
                x, final = self._loops(x, initial, level)
            else:
                x, final = self._node(x, initial, form, inputs)
            finals.append(final)
        graph.rename(graph.one("Transpose", x, perm=[1, 0, 2]) if layer.batch_first else x, "y")
        for name, parts in zip(names, zip(*finals)):
            graph.rename(graph.joined(parts, 0), f"{name}_n")
        model = helper.make_model(
            graph.made(self.cell.name, self._inputs(), self._outputs()),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR,
            producer_name="fusedlstm",
        )
        return cast(ModelProto, model)

    def _inputs(self) -> list[ValueInfoProto]:
        found = [self.graph.info("x", *self._axes(), self.layer._features)]
        if self.states:
            found += self._states("0")
        if self.lengths:
            found.append(helper.make_tensor_value_info(self.lengths, TensorProto.INT32, ["batch"]))
        return found

    def _outputs(self) -> list[ValueInfoProto]:
        width = self.sizes[0] * self.directions
        return [self.graph.info("y", *self._axes(), width), *self._states("n")]

    def _axes(self) -> tuple[str, str]:
        return ("batch", "steps") if self.layer.batch_first else ("steps", "batch")

    def _states(self, when: str) -> list[ValueInfoProto]:
        rows = self.layer.num_layers * self.directions
        return [
            self.graph.info(f"{name}_{when}", rows, "batch", size)
            for name, size in zip(self.cell.states, self.sizes)
        ]

    def _initial(self, level: int) -> list[str]:
        """The initial states of a level, (D, B, size) each; empty names where they are zero."""
        first, graph = level * self.directions, self.graph
        if not self.states:
            return [""] * len(self.sizes)
        if self.layer.num_layers == 1:
            return [f"{name}_0" for name in self.cell.states]
        bounds = graph.integers(first), graph.integers(first + self.directions), graph.integers(0)
        return [graph.one("Slice", f"{name}_0", *bounds) for name in self.cell.states]

    def _node(
        self, x: str, initial: list[str], form: Form, inputs: dict[str, np.ndarray]
    ) -> tuple[str, list[str]]:
        """One level as a node of a standard operator: its output (T, B, D*H), and its final states."""
        graph = self.graph
        arrays = {name: graph.array(array, name) for name, array in inputs.items()}
        weights = [arrays.get(name, "") for name in ("W", "R", "B")]
        given = [x, *weights, self.lengths, *initial, arrays.get("P", "")]
        while not given[-1]:
            given.pop()
        attributes = attributes_of(form, self.directions) | {"hidden_size": self.layer.hidden_size}
        y, *final = graph.add(form.operator, *given, outputs=1 + len(initial), **attributes)
        if self.directions == 1:
            return graph.one("Squeeze", y, graph.integers(1)), final
        y = graph.one("Transpose", y, perm=[0, 2, 1, 3])
        return graph.one("Reshape", y, graph.integers(0, 0, -1)), final

    def _loops(self, x: str, initial: list[str], level: int) -> tuple[str, list[str]]:
        """One level as loops, of each direction one: as :meth:`_node`."""
        layer, graph = self.layer, self.graph
        arrays, outputs, finals = layer.state_dict(), [], []
        for d in range(self.directions):
            names = layer._names[level * self.directions + d]
            weights = storage.fill(names, arrays.__getitem__)
            starts = self._starts(x, initial, d)
            y, *final = self._loop(x, starts, weights, d == 1)
            outputs.append(y)
            finals.append([graph.one("Unsqueeze", state, graph.integers(0)) for state in final])
        return graph.joined(outputs, 2), [graph.joined(parts, 0) for parts in zip(*finals)]

    def _starts(self, x: str, initial: list[str], direction: int) -> list[str]:
        """The initial states of one direction, (B, size) each."""
        if not self.states:
            return [self._zeros(x, size) for size in self.sizes]
        place = self.graph.array(np.array(direction, np.int64))
        return [self.graph.one("Gather", name, place, axis=0) for name in initial]

    def _zeros(self, x: str, size: int) -> str:
        """A state (B, size) of zeros."""
        graph = self.graph
        batch = graph.one("Gather", graph.one("Shape", x), graph.integers(1), axis=0)
        shape = graph.one("Concat", batch, graph.integers(size), axis=0)
        return graph.one("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, graph.dtype)))

    def _loop(self, x: str, initial: list[str], weights: Weights, reverse: bool) -> list[str]:
        """One direction as a loop over the steps: its output (T, B, P), and its final states (B, size)."""
        graph = self.graph
        scanned = [graph.linear(x, weights.ih, weights.bias_ih)]
        if self.lengths:
            scanned.append(self._running(x))
        if reverse:
            scanned = [graph.reversed(value) for value in scanned]
        options = {"body": self._body(weights), "num_scan_inputs": len(scanned)}
        *final, y = graph.add("Scan", *initial, *scanned, outputs=len(initial) + 1, **options)
        return [graph.reversed(y) if reverse else y, *final]

    def _running(self, x: str) -> str:
        """Which steps are before the end of a sequence, (T, B, 1)."""
        graph = self.graph
        zero, one = (graph.array(np.array(value, np.int64)) for value in (0, 1))
        steps = graph.one("Gather", graph.one("Shape", x), zero, axis=0)
        times = graph.one("Unsqueeze", graph.one("Range", zero, steps, one), graph.integers(1, 2))
        ends = graph.one("Cast", self.lengths, to=TensorProto.INT64)
        ends = graph.one("Unsqueeze", ends, graph.integers(0, 2))
        return graph.one("Less", times, ends)

    def _body(self, weights: Weights) -> GraphProto:
        """A step of a loop: from states and the product of the input to new states and the output."""
        cell = self.cell
        graph = _Graph(self.graph.dtype, self.graph.numbers)
        states = [graph.name(name) for name in cell.states]
        product = graph.name("product")
        inputs = [graph.info(name, "batch", size) for name, size in zip(states, self.sizes)]
        inputs.append(graph.info(product, "batch", len(weights.ih)))
        new = _stepped(graph, cell, weights, states, product)
        shown = new[0]
        if self.lengths:
            running = graph.name("running")
            inputs.append(helper.make_tensor_value_info(running, TensorProto.BOOL, ["batch", 1]))
            zero = graph.array(np.zeros((), graph.dtype))
            shown = graph.one("Where", running, shown, zero)
            new = [graph.one("Where", running, after, before) for after, before in zip(new, states)]
        outputs = [graph.one("Identity", value) for value in (*new, shown)]
        infos = zip(outputs, (*self.sizes, self.sizes[0]))
        return graph.made("step", inputs, [graph.info(name, "batch", size) for name, size in infos])


def attributes_of(form: Form, directions: int = 1) -> dict[str, Any]:
    """The attributes of a node that computes this form in each of its directions."""
    found: dict[str, Any] = {"direction": "bidirectional"} if directions == 2 else {}
    if form.activations != DEFAULTS[form.operator]:
        activations = form.activations * directions
        found["activations"] = [activation.name for activation in activations]
        for kind in ("alpha", "beta"):
            if values := [value[kind] for value in (a.named() for a in activations) if kind in value]:
                found[f"activation_{kind}"] = values
    if form.clip is not None:
        found["clip"] = form.clip
    for name in ("input_forget", "linear_before_reset"):
        if getattr(form, name):
            found[name] = 1
    return found


# --- The step of a cell -----------------------------------------------------------------------------------


class _Value:
    """A value of a graph: what a cell's step computes with while it is written."""

    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def call(self, operator: str, *inputs: Any, **attributes: Any) -> _Value:
        """What an operator makes of values and numbers."""
        names = [
            value.name
            if isinstance(value, _Value)
            else self.graph.array(self.graph.dtype.type(value), "number")
            for value in inputs
        ]
        return _Value(self.graph, self.graph.one(operator, *names, **attributes))

    def __add__(self, y: Any) -> _Value:
        return self.call("Add", self, y)

    def __radd__(self, x: Any) -> _Value:
        return self.call("Add", x, self)

    def __sub__(self, y: Any) -> _Value:
        return self.call("Sub", self, y)

    def __rsub__(self, x: Any) -> _Value:
        return self.call("Sub", x, self)

    def __mul__(self, y: Any) -> _Value:
        return self.call("Mul", self, y)

    def __rmul__(self, x: Any) -> _Value:
        return self.call("Mul", x, self)

    def __truediv__(self, y: Any) -> _Value:
        return self.call("Div", self, y)

    def __rtruediv__(self, x: Any) -> _Value:
        return self.call("Div", x, self)

    def __lt__(self, y: Any) -> _Value:
        return self.call("Less", self, y)

    def __le__(self, y: Any) -> _Value:
        return self.call("LessOrEqual", self, y)

    def __gt__(self, y: Any) -> _Value:
        return self.call("Greater", self, y)

    def __ge__(self, y: Any) -> _Value:
        return self.call("GreaterOrEqual", self, y)

    def __eq__(self, y: object) -> _Value:  # type: ignore[override]
        return self.call("Equal", self, y)

    def __ne__(self, y: object) -> _Value:  # type: ignore[override]
        return ~self.call("Equal", self, y)

    def __and__(self, y: Any) -> _Value:
        return self.call("And", self, y)

    def __or__(self, y: Any) -> _Value:
        return self.call("Or", self, y)

    def __invert__(self) -> _Value:
        return self.call("Not", self)

    __hash__ = object.__hash__


def _function(operator: str) -> Callable[..., _Value]:
    def call(*inputs: Any) -> _Value:
        value = next(value for value in inputs if isinstance(value, _Value))
        return value.call(operator, *inputs)

    return call


def _full_like(like: _Value, number: Any) -> _Value:
    return like.call("Expand", number, like.call("Shape", like))


def _mean(x: _Value) -> _Value:
    return _full_like(x, x.call("ReduceMean", x, axes=[-1], keepdims=1))


def _hard_sigmoid(x: _Value) -> _Value:
    return x.call("Min", x.call("Max", x / 6 + 0.5, 0), 1)  # the operator's attributes are of float32


_FUNCTIONS: dict[str, Callable[..., _Value]] = {
    "absolute": _function("Abs"),
    "erf": _function("Erf"),
    "exp": _function("Exp"),
    "full_like": _full_like,
    "hard_sigmoid": _hard_sigmoid,
    "log": _function("Log"),
    "maximum": _function("Max"),
    "mean": _mean,
    "minimum": _function("Min"),
    "relu": _function("Relu"),
    "sigmoid": _function("Sigmoid"),
    "softplus": _function("Softplus"),
    "sqrt": _function("Sqrt"),
    "tanh": _function("Tanh"),
    "where": _function("Where"),
}


def _stepped(graph: _Graph, cell: Cell, weights: Weights, states: list[str], product: str) -> list[str]:
    """The new states of a cell, (B, size) each."""

    def linear(value: _Value, weight: np.ndarray, bias: np.ndarray | None) -> _Value:
        return _Value(graph, graph.linear(value.name, weight, bias))

    def chunk(stacked: Any, parts: int, axis: int) -> Sequence[Any]:
        if isinstance(stacked, np.ndarray):
            return np.split(stacked, parts, axis)
        if parts == 1:
            return [stacked]
        return [_Value(graph, name) for name in graph.add("Split", stacked.name, outputs=parts, axis=axis)]

    vectors = tuple(_Value(graph, graph.array(vector, "vector")) for vector in weights.vectors)
    arguments = cell.step_arguments_of(
        _Value(graph, product),
        [_Value(graph, name) for name in states],
        weights._replace(vectors=vectors),
        linear,
        chunk,
    )
    step = compile_source(cell.source, _FUNCTIONS, f"<cell {cell.name} in ONNX>").step
    new = list(step(**arguments))
    if weights.hr is not None:
        new[0] = linear(new[0], weights.hr, None)
    return [value.name for value in new]
