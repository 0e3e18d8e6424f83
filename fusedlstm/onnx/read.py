"""The recurrent nodes of a file as layers of ours.

A file is not trusted: it is parsed, never run.  What is worked out are weights that it makes of others by
cutting and joining them, and what lies between two nodes that may be a stack; both by operators that make
nothing larger than what they are given.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx.reference import ReferenceEvaluator

from .. import dispatch
from ..layers import Recurrent
from .cells import Attributes
from .nodes import RecurrentNodes, check_weights, made
from .operators import INPUTS, WEIGHTS, check_opset

# By which exporters make the inputs of a node of the parameters of a model.
_CUTS = frozenset(
    ("Cast", "Concat", "DequantizeLinear", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose")
    + ("Unsqueeze",)
)
# What may lie between the nodes of a stack: it moves numbers, and works out shapes.
_MOVES = _CUTS - {"Cast", "DequantizeLinear"} | {"Dropout", "Flatten", "Gather", "Mul", "Shape"}
_GROWING = frozenset(("Gather", "Mul"))  # as the product of the sizes of their inputs
_TIMES = 32  # the size of what is read: as much may be made of it
_TRIALS = ((3, 2), (2, 5))  # T and B for which a stack must be one, if the file does not say them
_MOST = 2**24  # numbers that float32 can count


def layers(
    model: ModelProto | bytes | str | os.PathLike[str], *, backend: str = "auto"
) -> list[RecurrentNodes]:
    """The recurrent nodes of a model as layers with their weights, in its order, those of its subgraphs last.

    Nodes of the same operator, attributes and sizes become one layer with `num_layers` where each takes the
    output of the one before, and nothing else does.  Weights may be initializers or constants, of the file or
    beside it, or be cut and joined of such.  Those of float16 and bfloat16 become float32.  A node of both
    directions whose activations differ between them makes two layers.

    Args:
        model: a model, its bytes, or the path of its file.
        backend: as of :class:`fusedlstm.Recurrent`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no model, or a node is none that the standard allows, or its weights are
            computed when the model runs.
    """
    dispatch.check_options(backend=backend)
    file = _opened(model)
    found: list[RecurrentNodes] = []
    for scope in _scopes(file.graph, file):
        found += _found(scope, backend)
    return found


def _opened(model: Any) -> _File:
    folder = None
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        model, folder = path.read_bytes(), path.parent
    if isinstance(model, (bytes, bytearray, memoryview)):
        try:
            model = onnx.load_model_from_string(bytes(model))
        except Exception as error:  # of protobuf, of whichever implementation
            raise ValueError(f"the model is damaged, or not one of ONNX: {error}") from error
    if not isinstance(model, ModelProto):
        raise TypeError(f"model must be a ModelProto, bytes or a path, got {type(model).__name__}")
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not model.HasField("graph"):
        raise ValueError("the model is damaged, or not one of ONNX: it has no graph, or not one opset")
    for function in model.functions:
        if any(node.op_type in INPUTS for node in function.node):
            raise ValueError(
                f"the function {function.name!r} of the model has recurrent nodes: put its nodes in its "
                "place first, with onnx.inliner.inline_local_functions"
            )
    return _File(model.graph, versions[0], folder)


@dataclass(eq=False)
class _File:
    """A model, and what has been read and made of it."""

    graph: GraphProto
    opset: int
    folder: Path | None  # where external data lie
    left: int = 0  # numbers that may still be made of what has been read
    sizes: dict[str, int] = field(default_factory=dict)  # of the files beside it
    read: int = 0  # bytes, of these

    def array(self, tensor: TensorProto) -> np.ndarray:
        """A tensor of the file, or beside it."""
        folder = ""
        try:
            if uses_external_data(tensor):
                folder = self._beside(tensor)
            array: np.ndarray = numpy_helper.to_array(tensor, folder)
        except Exception as error:
            raise ValueError(f"the tensor {tensor.name!r} is damaged: {error}") from error
        self.left += _TIMES * array.size
        return array

    def _beside(self, tensor: TensorProto) -> str:
        """The folder of a tensor in another file; one file may not stand for much more than it holds."""
        if self.folder is None:
            raise ValueError(
                "its numbers are in another file: give the path of the model, or load them first"
            )
        info = ExternalDataInfo(tensor)
        path = self.folder / info.location
        if info.location not in self.sizes:
            self.sizes[info.location] = path.stat().st_size
        self.read += self.sizes[info.location] if info.length is None else info.length
        if self.read > 2 * sum(self.sizes.values()):
            raise ValueError("more numbers are read than there are")
        return str(self.folder)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"more is made of the weights of the model than {_TIMES} times their size")


class _Scope:
    """A graph or a subgraph: where names come from, and where they go."""

    def __init__(self, graph: GraphProto, file: _File, outer: _Scope | None) -> None:
        self.file, self.outer, self.nodes = file, outer, list(graph.node)
        self.tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.makers: dict[str, int] = {}  # the node of a name, by its number
        for n, node in enumerate(self.nodes):
            values = [a.t for a in node.attribute if a.name == "value" and a.type == AttributeProto.TENSOR]
            if node.op_type == "Constant" and values:
                self.tensors |= dict.fromkeys(node.output, values[0])
            else:
                self.makers |= dict.fromkeys(filter(None, node.output), n)
        self.uses = Counter(_names_used(graph))
        self.shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input)}
        self._arrays: dict[str, np.ndarray | None] = {}

    def array(self, name: str) -> np.ndarray | None:
        """What does not depend on the inputs of the model; None of what does."""
        if name not in self._arrays:
            self._arrays[name] = self._array(name)
        return self._arrays[name]

    def _array(self, name: str) -> np.ndarray | None:
        if name in self.tensors:
            return self.file.array(self.tensors[name])
        if name not in self.makers:
            return None if self.outer is None else self.outer.array(name)
        behind = self.behind(name, _CUTS)
        if behind is None:
            return None
        nodes, leaves = behind
        known = {leaf: self.array(leaf) for leaf in leaves}
        if any(array is None for array in known.values()):
            return None
        return self.computed(nodes, known, self.file.spend)[name]

    def behind(
        self, name: str, operators: Collection[str], stop: Collection[str] = ()
    ) -> tuple[list[NodeProto], set[str]] | None:
        """The nodes that make a name, first to last, and what they take; None if others are among them."""
        places: set[int] = set()
        leaves: set[str] = set()
        waiting = [(name, len(self.nodes))]
        while waiting:
            name, reader = waiting.pop()
            place = self.makers.get(name)
            if place is None or name in stop:
                leaves.add(name)
                continue
            node = self.nodes[place]
            if place >= reader:
                raise ValueError(f"the model is damaged: {name!r} is used before it is made")
            if node.op_type not in operators or node.domain not in ("", "ai.onnx"):
                return None
            if place not in places:
                places.add(place)
                waiting += [(taken, place) for taken in node.input if taken]
        return [self.nodes[place] for place in sorted(places)], leaves

    def computed(
        self, nodes: Sequence[NodeProto], known: Mapping[str, Any], spend: Any
    ) -> dict[str, np.ndarray]:
        """The arrays that nodes make, by name; `spend` is told how many numbers a node may make before."""
        arrays = dict(known)
        for node in nodes:
            taken = {name: arrays[name] for name in node.input if name}
            sizes = [array.size for array in taken.values()]
            spend(prod(sizes) if node.op_type in _GROWING else sum(sizes))
            arrays |= _computed(node, taken, self.file.opset)
        return arrays


def _computed(node: NodeProto, taken: Mapping[str, np.ndarray], opset: int) -> dict[str, np.ndarray]:
    """What one node makes."""
    names = [name for name in node.output if name]
    try:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in taken.items()
        ]
        outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in names]
        graph = helper.make_graph([node], "node", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(node.domain, opset)])
        return dict(zip(names, ReferenceEvaluator(model).run(None, dict(taken))))
    except Exception as error:  # whatever NumPy says of what the file says
        raise ValueError(f"the model is damaged: {_called(node)} cannot be computed: {error}") from error


def _scopes(graph: GraphProto, file: _File, outer: _Scope | None = None) -> Iterator[_Scope]:
    scope = _Scope(graph, file, outer)
    yield scope
    for inner in _subgraphs(graph.node):
        yield from _scopes(inner, file, scope)


def _subgraphs(nodes: Sequence[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


def _names_used(graph: GraphProto) -> Iterator[str]:
    """Every use of a name in a graph, in those inside it, or as its output."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
    for inner in _subgraphs(graph.node):
        yield from _names_used(inner)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The shape that a file states of a value, 0 where it is not a number."""
    return tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)


def _called(node: NodeProto) -> str:
    name = node.name or ", ".join(map(str, node.output))  # protobuf gives bytes for what is no text
    return f"{node.op_type} {name!r}"


# --- Recurrent nodes --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Read:
    """A recurrent node, and what it says."""

    node: NodeProto
    attributes: Attributes
    weights: dict[str, np.ndarray]

    def named(self, name: str) -> str:
        """What the graph gives to an input of the node; empty if it leaves it out."""
        return str(dict(zip(INPUTS[self.node.op_type], self.node.input)).get(name, ""))

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells its layer from others."""
        return (self.attributes, *(self.named(name) for name in WEIGHTS))

    def continues(self, before: _Read) -> bool:
        """Whether it could be the next layer of a stack, if it takes the output of the one before."""
        ours, theirs = self.attributes, before.attributes
        directions, _, hidden = before.weights["R"].shape
        return (
            (ours.operator, ours.direction, ours.forms) == (theirs.operator, theirs.direction, theirs.forms)
            and len(set(ours.forms)) == 1
            and self.weights.keys() == before.weights.keys()
            and self.weights["W"].dtype == before.weights["W"].dtype
            and self.weights["R"].shape == before.weights["R"].shape
            and self.weights["W"].shape[2] == directions * hidden
            and self.named("sequence_lens") == before.named("sequence_lens")
        )


def _found(scope: _Scope, backend: str) -> list[RecurrentNodes]:
    """The layers of one graph."""
    stacks: list[list[_Read]] = []
    ends: dict[str, list[_Read]] = {}  # by the output of the last node
    for node in scope.nodes:
        if node.op_type not in INPUTS or node.domain not in ("", "ai.onnx"):
            continue
        try:
            read = _read(scope, node)
        except ValueError as error:
            raise ValueError(f"{_called(node)}: {error}") from error
        stack = _before(scope, read, ends)
        if stack is None:
            stacks.append(stack := [])
        else:
            del ends[stack[-1].node.output[0]]
        stack.append(read)
        if node.output and node.output[0]:
            ends[node.output[0]] = stack
    known: dict[Any, list[tuple[Recurrent, bool]]] = {}
    found = []
    for stack in stacks:
        key = tuple(read.key for read in stack)
        if key not in known:  # nodes that share their weights share a layer
            first = stack[0].attributes
            known[key] = made(first, [read.weights for read in stack], backend, first.layout == 1)
        nodes = tuple(read.node for read in stack)
        found += [RecurrentNodes(layer, reverse, nodes) for layer, reverse in known[key]]
    return found


def _read(scope: _Scope, node: NodeProto) -> _Read:
    operator, opset = node.op_type, scope.file.opset
    check_opset(opset)
    names = INPUTS[operator]
    given = {name: taken for name, taken in zip(names, node.input) if taken}
    if len(node.input) > len(names) or not {"X", "W", "R"} <= given.keys():
        raise ValueError(
            f"its inputs must be X, W, R, and at most {', '.join(names[3:])}, got {list(node.input)}"
        )
    attributes = Attributes.read(operator, _attributes(node, opset), "P" in given)
    weights = {}
    for name in WEIGHTS:
        if name in given:
            array = scope.array(given[name])
            if array is None:
                raise ValueError(f"its input {name}, {given[name]!r}, is computed when the model runs")
            weights[name] = array
    check_weights(attributes, weights)
    return _Read(node, attributes, weights)


def _attributes(node: NodeProto, opset: int) -> dict[str, Any]:
    """The attributes of a node by name, each of the type that the standard gives it."""
    declared = onnx.defs.get_schema(node.op_type, opset, "").attributes
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        name = attribute.name
        if name not in declared or name in found:
            raise ValueError(f"its attribute {name!r} is unknown in opset {opset}, or given twice")
        if attribute.ref_attr_name or attribute.type != declared[name].type.value:
            raise ValueError(f"its attribute {name!r} is of another type than the standard gives it")
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif not isinstance(value, (int, float)):
            value = [entry.decode() if isinstance(entry, bytes) else entry for entry in value]
        found[name] = value
    return found


def _before(scope: _Scope, read: _Read, ends: Mapping[str, list[_Read]]) -> list[_Read] | None:
    """The stack that a node continues, if there is one."""
    taken = read.named("X")
    behind = scope.behind(taken, _MOVES, ends)
    if behind is None:
        return None
    nodes, leaves = behind
    sources = leaves & ends.keys()
    if len(sources) != 1:
        return None
    (source,) = sources
    known = {leaf: scope.array(leaf) for leaf in leaves - sources}
    stack = ends[source]
    if any(array is None for array in known.values()) or not read.continues(stack[-1]):
        return None
    between = Counter(name for node in nodes for name in node.input)
    between[taken] += 1
    passed = {source, taken, *(name for node in nodes for name in node.output if name)}
    if any(scope.uses[name] != between[name] for name in passed):  # others see what a stack does not show
        return None
    return stack if _is_stacked(scope, nodes, known, source, taken, stack[-1], read) else None


def _is_stacked(
    scope: _Scope,
    nodes: Sequence[NodeProto],
    known: Mapping[str, Any],
    source: str,
    taken: str,
    before: _Read,
    after: _Read,
) -> bool:
    """Whether what lies between two nodes lays the output of one out as the other takes it from it."""
    directions, _, hidden = before.weights["R"].shape
    shape = scope.shapes.get(source, ())
    first = before.attributes.layout
    if len(shape) == 4 and all(shape):
        trials = [(shape[1], shape[0]) if first else (shape[0], shape[2])]
    else:
        trials = list(_TRIALS)
    for steps, batch in trials:
        count = steps * batch * directions * hidden
        if count > _MOST:
            return False
        places = np.arange(count, dtype=np.float32).reshape(steps, batch, directions, hidden)
        given = places.transpose(1, 0, 2, 3) if first else places.transpose(0, 2, 1, 3)
        expected = places.reshape(steps, batch, directions * hidden)
        if after.attributes.layout:
            expected = expected.swapaxes(0, 1)

        def spend(made: int, most: int = 4 * count + 1000) -> None:
            if made > most:
                raise ValueError("more is made of the output of a node than it holds")

        try:
            computed = scope.computed(nodes, {**known, source: given}, spend)[taken]
        except ValueError:  # not for these sizes
            return False
        if computed.shape != expected.shape or not np.array_equal(computed, expected):
            return False
    return True
