"""Recurrent nodes as layers of ours: what reading a file and running a node have in common.

Sizes in the comments and docstrings:

    T  time steps        I  features of X       G  gates, as the operator counts them
    B  batch             H  hidden units        D  directions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from .. import layers
from .. import weights as storage
from ..layers import Recurrent
from .cells import Attributes, Form, cell_of

TYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class RecurrentNodes:
    """Nodes of a file that make one layer of ours.

    Attributes:
        layer: with the weights of the nodes, and `batch_first` if they have ``layout=1``.
        reverse: whether they run from the last step to the first, where a layer runs from the first to the
            last.  A bidirectional layer does both, and is not reversed.
        nodes: one for each layer of the stack.  What the graph gives them as initial states and lengths, by
            its names, is not in the layer; it is given to a call.
    """

    layer: Recurrent
    reverse: bool
    nodes: tuple[NodeProto, ...]

    def __call__(self, x: Any, state: Any = None, lengths: Any = None) -> tuple[Any, Any]:
        """What the nodes compute: ``layer(x, state, lengths)``, reversed in time if they are."""
        return run(self.layer, self.reverse, x, state, lengths)


def run(layer: Recurrent, reverse: bool, x: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
    """``layer(x, state, lengths)``, from the last step of each sequence to the first if `reverse`."""
    if not reverse:
        return layer(x, state, lengths)
    axis = int(layer.batch_first and x.ndim == 3)
    y, final = layer(_flipped(x, lengths, axis), state, lengths)
    return _flipped(y, lengths, axis), final


def _flipped(x: Any, lengths: Any, axis: int) -> Any:
    """Each sequence of x reversed in time, where it lies; what is past the end stays."""
    if lengths is None or x.ndim != 3:
        return np.flip(x, axis)
    count, ends = x.shape[axis], np.asarray(lengths)  # which the layer checks
    steps = np.arange(count)[:, None]
    places = np.where(steps < ends, ends - 1 - steps, steps)  # (T, B)
    places = np.clip(places, 0, max(count - 1, 0)).astype(np.intp)
    return np.take_along_axis(x, (places.T if axis else places)[..., None], axis)


def made(
    attributes: Attributes,
    levels: Sequence[Mapping[str, np.ndarray]],  # W, R, B and P of each node of a stack, checked
    backend: str,
    batch_first: bool = False,
) -> list[tuple[Recurrent, bool]]:
    """The layer of a stack of nodes, and whether it runs reversed.

    A node of two directions with different mathematics makes two layers, of which the second runs reversed.
    """
    if len(set(attributes.forms)) == 1:
        layer = _layer(attributes.forms[0], levels, batch_first, backend)
        return [(layer, attributes.direction == "reverse")]
    (inputs,) = levels
    return [
        (_layer(form, [{k: v[d : d + 1] for k, v in inputs.items()}], batch_first, backend), d == 1)
        for d, form in enumerate(attributes.forms)
    ]


def _layer(
    form: Form, levels: Sequence[Mapping[str, np.ndarray]], batch_first: bool, backend: str
) -> Recurrent:
    cell, first = cell_of(form), levels[0]
    directions, _, inputs = first["W"].shape
    bias = "B" in first
    arrays: dict[str, np.ndarray] = {}
    for level, given in enumerate(levels):
        for d in range(directions):
            names = storage.names(cell, level, d == 1, bias, projected=False)
            one = {name: computed(array[d]) for name, array in given.items()}
            arrays |= storage.named(names, storage.onnx_weights(cell, form, one))
    settings = {
        "input_size": inputs,
        "hidden_size": first["R"].shape[2],
        "num_layers": len(levels),
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": directions == 2,
        "dtype": computed(first["W"]).dtype,
        "backend": backend,
    }
    kinds = {cell: kind for kind, own in layers._CLASSES.values() for cell in own}
    return layers._rebuilt(kinds.get(cell, Recurrent), cell, settings, arrays)


def computed(array: np.ndarray) -> np.ndarray:
    """An array in the type that our kernels compute it in: float64 as it is, any other in float32."""
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def check_weights(attributes: Attributes, inputs: Mapping[str, np.ndarray]) -> None:
    """Refuse W, R, B and P that are not those of one node.

    Raises:
        ValueError: for a shape or type that they cannot have; it names the input.
    """
    form = attributes.forms[0]
    directions, gates = len(attributes.forms), len(form.gates)
    for name in ("W", "R"):
        if inputs[name].ndim != 3 or 0 in inputs[name].shape:
            raise ValueError(f"{name} must have three axes, none of them empty, got {inputs[name].shape}")
    hidden = attributes.hidden_size or inputs["R"].shape[2]
    expected = {
        "W": (directions, gates * hidden, inputs["W"].shape[2]),
        "R": (directions, gates * hidden, hidden),
        "B": (directions, 2 * gates * hidden),
        "P": (directions, 3 * hidden),
    }
    check_shapes(inputs, expected)
    check_types(inputs)


def check_shapes(inputs: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an input of another shape.

    Raises:
        ValueError: for the first of them.
    """
    for name, array in inputs.items():
        if name in expected and array.shape != expected[name]:
            raise ValueError(f"{name} must have the shape {expected[name]}, got {array.shape}")


def check_types(inputs: Mapping[str, np.ndarray]) -> None:
    """Refuse inputs that are not all of one floating-point type.

    Raises:
        ValueError: if they are not.
    """
    found = {name: array.dtype.name for name, array in inputs.items() if name != "sequence_lens"}
    if len(set(found.values())) > 1 or not set(found.values()) <= set(TYPES):
        named = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise ValueError(f"the inputs must be of one type, one of {', '.join(TYPES)}, got {named}")
