"""LSTM, GRU and RNN for ``onnx.reference.ReferenceEvaluator``, run by our kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import NodeProto
from onnx.defs import onnx_opset_version
from onnx.reference.op_run import OpRun

from .. import dispatch
from ..layers import Recurrent
from .cells import Attributes
from .nodes import check_shapes, check_types, check_weights, computed, made, run

OLDEST = 7  # the opset since which the operators are what they are
STATES = {"LSTM": ("initial_h", "initial_c"), "GRU": ("initial_h",), "RNN": ("initial_h",)}
_FIRST = ("X", "W", "R", "B", "sequence_lens", "initial_h")
INPUTS = {"LSTM": (*_FIRST, "initial_c", "P"), "GRU": _FIRST, "RNN": _FIRST}
WEIGHTS = ("W", "R", "B", "P")


def operators(backend: str = "auto") -> list[type[OpRun]]:
    """LSTM, GRU and RNN for ``onnx.reference.ReferenceEvaluator(model, new_ops=operators())``.

    They have every attribute, input and output of the opsets from 7 on; see :mod:`fusedlstm.onnx.cells` for
    what the standard leaves open.  Inputs of float16 and bfloat16 are computed in float32.  Weights are laid
    out for the kernels once, and again if a later call gives others.  The final state of a sequence of length
    0 is its initial one.

    Args:
        backend: as of :class:`fusedlstm.Recurrent`.

    Raises:
        ValueError: if there is no such backend.  The operators raise it for attributes or inputs that the
            standard does not allow.
    """
    dispatch.check_options(backend=backend)
    return [type(name, (_Node,), {"backend": backend, "__doc__": f"ONNX's {name}."}) for name in INPUTS]


class _Node(OpRun):  # type: ignore[misc]
    """A node of a graph; the name of the class is the operator."""

    op_domain = ""
    backend: str

    def __init__(self, onnx_node: NodeProto, run_params: dict[str, Any], schema: Any = None) -> None:
        super().__init__(onnx_node, run_params, schema)
        check_opset(run_params["opsets"].get(onnx_node.domain, onnx_opset_version()))
        # attributes, weights, and what was made of them
        self._made: tuple[Any, dict[str, np.ndarray], list[tuple[Recurrent, bool]]] = (None, {}, [])

    def _run(self, *inputs: np.ndarray | None, **attributes: Any) -> tuple[np.ndarray | None, ...]:
        operator = type(self).__name__
        names = INPUTS[operator]
        if len(inputs) > len(names):
            raise ValueError(f"{operator} has {len(names)} inputs, got {len(inputs)}")
        given = {name: array for name, array in zip(names, inputs) if array is not None}
        if missing := [name for name in ("X", "W", "R") if name not in given]:
            raise ValueError(f"{operator} needs the inputs {', '.join(missing)}")
        read = Attributes.read(operator, attributes, "P" in given)
        results = _computed(read, given, self._layers(read, given))
        return tuple(result if name else None for name, result in zip(self.onnx_node.output, results))

    def _check_and_fix_outputs(self, res: tuple[Any, ...]) -> tuple[Any, ...]:
        """An output that a node leaves out stays None: its name is that of inputs that others leave out."""
        return res

    def _layers(self, read: Attributes, given: Mapping[str, np.ndarray]) -> list[tuple[Recurrent, bool]]:
        weights = {name: given[name] for name in WEIGHTS if name in given}
        attributes, before, found = self._made
        if attributes != read or not _equal(before, weights):
            check_weights(read, weights)
            found = made(read, [weights], self.backend)
            self._made = (read, {name: array.copy() for name, array in weights.items()}, found)
        return found


def check_opset(version: int) -> None:
    """Refuse an opset in which the operators were others.

    Raises:
        ValueError: if it is one.
    """
    if version < OLDEST:
        raise ValueError(f"LSTM, GRU and RNN are known of opset {OLDEST} and later, got opset {version}")


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == array.dtype and np.array_equal(one[name], array) for name, array in other.items()
    )


def _computed(
    read: Attributes, given: Mapping[str, np.ndarray], layers: list[tuple[Recurrent, bool]]
) -> list[np.ndarray]:
    """Y and the final states, laid out and typed as the node has them."""
    x, states, lengths = _sequences(read, given, layers)
    dtype = given["X"].dtype
    outputs, finals = [], []
    for d, (layer, reverse) in enumerate(layers):
        own: Any = states
        if states is not None:
            own = states if len(layers) == 1 else tuple(state[d : d + 1] for state in states)
            own = own if len(own) > 1 else own[0]
        y, final = run(layer, reverse, x, own, lengths)
        own_directions = 2 if layer.bidirectional else 1
        outputs.append(y.reshape(*y.shape[:2], own_directions, layer.hidden_size))  # (T, B, D, H)
        finals.append(final if isinstance(final, tuple) else (final,))
    y = np.concatenate(outputs, 2) if len(outputs) > 1 else outputs[0]
    y = y.transpose(1, 0, 2, 3) if read.layout else y.transpose(0, 2, 1, 3)
    final_states = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*finals)]
    results = [y, *(_swapped(read, state) for state in final_states)]
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite
        return [np.ascontiguousarray(array).astype(dtype, copy=False) for array in results]


def _sequences(
    read: Attributes, given: Mapping[str, np.ndarray], layers: list[tuple[Recurrent, bool]]
) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None, np.ndarray | None]:
    """X (T, B, I), the initial states (D, B, H), and the lengths (B,), checked, as kernels take them."""
    check_types(given)
    x, layer = given["X"], layers[0][0]
    if x.ndim != 3 or x.shape[2] != layer.input_size:
        raise ValueError(f"X must have three axes, of which the last is {layer.input_size}, got {x.shape}")
    x = computed(_swapped(read, x))
    steps, batch, _ = x.shape
    shape = (len(read.forms), batch, layer.hidden_size)
    names = STATES[read.operator]
    states = {name: _swapped(read, given[name]) for name in names if name in given}
    check_shapes(states, dict.fromkeys(names, shape))
    initial = None
    if states:
        zeros = np.zeros(shape, x.dtype)
        initial = tuple(computed(states[name]) if name in states else zeros for name in names)
    lengths = given.get("sequence_lens")
    if lengths is not None:
        check_shapes(given, {"sequence_lens": (batch,)})
        if lengths.dtype.kind not in "iu" or np.any((lengths < 0) | (lengths > steps)):
            raise ValueError(f"sequence_lens must be integers from 0 to {steps}, got {lengths}")
    return x, initial, lengths


def _swapped(read: Attributes, array: np.ndarray) -> np.ndarray:
    """An array with the batch in its other place, if the layout of the node is the other one."""
    return array.swapaxes(0, 1) if read.layout else array
