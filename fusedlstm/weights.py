"""Names, gate orders, files and conversions of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import cells
from .files import write_whole

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .layers import Recurrent
    from .onnx.cells import Form

# The only table of gate orders.  Ours is PyTorch's; the others are given in its names.
GATE_ORDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")},
    "keras": {"lstm": ("i", "f", "g", "o"), "gru": ("z", "r", "n")},
    "onnx": {"lstm": ("i", "o", "f", "g"), "gru": ("z", "r", "n"), "rnn": ("a",)},
}


class Weights(NamedTuple):
    """The weights of one direction of one layer; gates are stacked in the order of the cell.

    With P the size of the output: the projection's if there is one, else H.
    """

    ih: Any  # (gates with input weights * H, I), or None if gates are given their inputs
    hh: Any  # (gates with recurrent weights * H, P / heads), or None if there are none
    bias_ih: Any = None  # (rows of ih,) or None
    bias_hh: Any = None  # (rows of hh,) or None
    hr: Any = None  # (P, H) or None
    vectors: tuple[Any, ...] = ()  # (H,) for each name in cell.weights


def names(cell: Cell, layer: int, reverse: bool, bias: bool, projected: bool) -> Weights:
    """The names of the parameters, as PyTorch gives them, in the places of the weights."""
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    recurrent, bias = bool(cell.gates_with_recurrent), bias and cell.biases
    given = cell.takes_gates
    return Weights(
        None if given else f"weight_ih{suffix}",
        f"weight_hh{suffix}" if recurrent else None,
        f"bias_ih{suffix}" if bias and not given else None,
        f"bias_hh{suffix}" if bias and recurrent else None,
        f"weight_hr{suffix}" if projected else None,
        tuple(f"{name}{suffix}" for name in cell.weights),
    )


def shapes(cell: Cell, inputs: int, hidden: int, bias: bool, proj: int, heads: int = 1) -> Weights:
    """The shapes of the parameters, in the places of the weights."""
    rows, recurrent = len(cell.gates_with_input) * hidden, len(cell.gates_with_recurrent) * hidden
    bias = bias and cell.biases
    given = cell.takes_gates
    return Weights(
        None if given else (rows, inputs),
        (recurrent, (proj or hidden) // heads) if recurrent else None,
        (rows,) if bias and not given else None,
        (recurrent,) if bias and recurrent else None,
        (proj, hidden) if proj else None,
        ((hidden,),) * len(cell.weights),
    )


def flatten(weights: Weights) -> list[Any]:
    """The entries that are there, in PyTorch's order; the learned vectors come last."""
    present = [weights.ih, weights.hh, weights.bias_ih, weights.bias_hh, weights.hr]
    return [entry for entry in present if entry is not None] + list(weights.vectors)


def unflatten(cell: Cell, flat: Sequence[Any]) -> Weights:
    """The weights of a cell whose entries :func:`flatten` gave."""
    products = (not cell.takes_gates, bool(cell.gates_with_recurrent))  # whether there are weights of each
    matrices, own = sum(products), len(flat) - len(cell.weights)
    # as many biases as matrices, or none; and one more with a projection, which needs both matrices
    biased, projected = own >= 2 * matrices, matrices == 2 and own % 2 == 1
    rest = iter(flat)
    ih, hh = (next(rest) if there else None for there in products)
    bias_ih, bias_hh = (next(rest) if there and biased else None for there in products)
    hr = next(rest) if projected else None
    return Weights(ih, hh, bias_ih, bias_hh, hr, tuple(rest))


def keras_views(cell: Cell, flat: Sequence[Any], zeros_like: Callable[[Any], Any]) -> Weights:
    """The weights of one direction of a layer of Keras, as views of the same memory; only a missing second
    bias is new.

    Args:
        cell: with the gates in Keras's order.
        flat: the kernel (I, gates*H); the recurrent kernel (H, gates*H); the bias, if there is one, as
            (gates*H,) or, for each product its own, (2, gates*H); the learned vectors (H,).
        zeros_like: makes the second bias where there is one only.
    """
    kernel, recurrent, *rest = flat
    biases = rest[: len(rest) - len(cell.weights)]
    bias_ih, bias_hh = None, None
    for bias in biases:
        bias_ih, bias_hh = (bias[0], bias[1]) if bias.ndim == 2 else (bias, zeros_like(bias))
    return Weights(kernel.T, recurrent.T, bias_ih, bias_hh, vectors=tuple(rest[len(biases) :]))


def keras_gradients(gradients: Weights, flat: Sequence[Any]) -> list[Any]:
    """The gradients of the weights that :func:`keras_views` was given as `flat`, matrices as views."""
    biases = len(flat) - 2 - len(gradients.vectors)
    bias: list[Any] = [gradients.bias_ih][:biases]
    if biases and flat[2].ndim == 2:
        bias = [np.stack([gradients.bias_ih, gradients.bias_hh])]
    return [gradients.ih.T, gradients.hh.T, *bias, *gradients.vectors]


def named(names: Weights, weights: Weights) -> dict[str, Any]:
    """The entries by name."""
    return dict(zip(flatten(names), flatten(weights)))


def fill(names: Weights, entry: Callable[[Any], Any]) -> Weights:
    """`names`, or other weights, with `entry(name)` in the place of each name."""
    single = [None if name is None else entry(name) for name in names[:-1]]
    return Weights._make([*single, tuple(entry(name) for name in names.vectors)])


SCALE = ".scale"  # behind the name of a matrix of integers: the name of what its rows are times


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """Numbers rounded to bfloat16, to even where two are equally near, as uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """The numbers, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def integers(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, K) of float32 as int8, and what each row is times, (N,)."""
    with np.errstate(divide="ignore"):
        factor = np.minimum(127 / np.abs(rows).max(-1, initial=0.0), 2.0**126).astype(np.float32)
    return np.rint(rows * factor[:, None]).astype(np.int8), 1 / factor


def write(
    path: str | os.PathLike[str], arrays: dict[str, Any], settings: dict[str, Any], precision: str = "float32"
) -> None:
    """Write a safetensors file: the arrays, and the settings as JSON in its metadata.

    Matrices of float32 in a precision: "bfloat16", or "int8", each with what its rows are times beside it.

    Raises:
        ValueError: for another precision, or what integers cannot hold.
    """
    metadata = {"format": "np", "fusedlstm": json.dumps(settings)}
    if precision == "float32":
        from safetensors.numpy import save

        content = save(arrays, metadata)
    else:
        content = _serialized(_narrowed(arrays, precision), metadata)
    write_whole(Path(path), content)


def _narrowed(arrays: dict[str, np.ndarray], precision: str) -> dict[str, tuple[str, np.ndarray]]:
    """The arrays, matrices in a precision, each with the name that the format has for its type."""
    found = {}
    for name, array in arrays.items():
        found[name] = "F32", np.ascontiguousarray(array, np.float32)
        if array.ndim == 2 and precision == "bfloat16":
            found[name] = "BF16", bfloat16_bits(array)
        elif array.ndim == 2:
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has NaN or infinity, which int8 cannot hold")
            whole, scale = integers(array)
            found |= {name: ("I8", whole), name + SCALE: ("F32", scale)}
    return found


def _serialized(entries: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> bytes:
    """A safetensors file; what the package of that name writes of NumPy's arrays has no bfloat16."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (kind, array) in entries.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for _, array in entries.values())


def _widened(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays in which matrices of integers are float32."""
    found = {}
    for name, array in arrays.items():
        scale = arrays.get(name + SCALE)
        if scale is not None and array.dtype == np.int8 and scale.shape == array.shape[:1]:
            array = array * scale[:, None]
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in arrays):
            found[name] = array
    return found


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the settings of a file that :func:`write` made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a file of ours.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"}
        if len(arrays) < len(kinds):  # what NumPy has no type for
            whole: Any = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
            for name, entry in whole:
                if kinds[name] == "BF16":
                    bits = np.frombuffer(entry["data"], np.uint16).reshape(entry["shape"])
                    arrays[name] = from_bfloat16_bits(bits)
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if "fusedlstm" not in metadata:
        raise ValueError(
            f"{path} holds no fusedlstm settings; build a layer and call load_state_dict with its arrays"
        )
    try:
        settings = json.loads(metadata["fusedlstm"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its settings are no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: its settings are no mapping but a {type(settings).__name__}")
    return _widened(arrays), settings


# --- Conversions ------------------------------------------------------------------------------------------


def to_torch(layer: Recurrent) -> dict[str, torch.Tensor]:
    """The weights of a layer for the ``load_state_dict`` of a module of PyTorch of the same sizes: copies."""
    import torch

    return {name: torch.from_numpy(array.copy()) for name, array in layer.state_dict().items()}


def from_torch(layer: Recurrent, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Weights of a module of PyTorch for ``layer.load_state_dict``.

    Args:
        layer: of the same cell and sizes.
        state_dict: of a recurrent module or of a cell, such as ``torch.nn.LSTMCell``; or of a model.
        prefix: what the names of the module's weights begin with in that of a model, "encoder.lstm." say.

    Raises:
        ValueError: if there is nothing under that prefix.
        TypeError: for an entry that is no array.
    """
    from .dispatch import on_host

    found = {
        name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)
    }
    if not found:
        raise ValueError(
            f"state_dict has no names that begin with {prefix!r}; it has {', '.join(state_dict)}"
        )
    of_cell = "weight_ih" in found  # the names of a cell say no layer
    return {f"{name}_l0" if of_cell else name: on_host(name, value) for name, value in found.items()}


def to_keras(layer: Recurrent) -> list[np.ndarray]:
    """The weights of a layer for the ``set_weights`` of Keras: copies.

    They are those of ``keras.layers.LSTM``, ``GRU`` or ``SimpleRNN``, or of a ``Bidirectional`` around it,
    and of another cell those of ``fusedlstm.keras.Recurrent``.  Those of several layers follow one another,
    as in a ``keras.Sequential`` of them.

    Raises:
        ValueError: if Keras has no layer like it.
    """
    order = _keras_order(layer)
    flat: list[np.ndarray] = []
    for weights in _directions(layer):
        ordered = _reordered(weights, layer.cell.gates, order)
        flat += [ordered.ih.T, ordered.hh.T]
        if ordered.bias_ih is not None:
            biases = ordered.bias_ih, ordered.bias_hh
            flat.append(np.stack(biases) if layer.cell.split else biases[0] + biases[1])
        flat += [vector.copy() for vector in weights.vectors]
    return flat


def from_keras(layer: Recurrent, weights: Sequence[Any]) -> dict[str, np.ndarray]:
    """What ``get_weights`` of Keras gives, as :func:`to_keras` orders it, for ``layer.load_state_dict``.

    Where Keras has one bias and we have two, the second is zero.

    Raises:
        ValueError: if Keras has no layer like it, or the weights are those of another.
    """
    order = _keras_order(layer)
    given, expected = [np.asarray(array) for array in weights], to_keras(layer)
    _check_shapes([f"weights[{n}]" for n in range(len(expected))], given, expected)
    each = len(expected) // len(layer._names)
    found: dict[str, np.ndarray] = {}
    for n, names in enumerate(layer._names):
        taken = keras_views(layer.cell, given[n * each : (n + 1) * each], np.zeros_like)
        found |= named(names, _reordered(taken, order, layer.cell.gates))
    return found


def to_onnx(layer: Recurrent) -> list[dict[str, np.ndarray]]:
    """The weights of a layer as inputs of ONNX's nodes, by name: W, R, B if there are biases, and P.

    One entry for each layer of a stack; it needs onnx.

    Raises:
        ValueError: if ONNX has no operator like it.
    """
    form = _form(layer)
    directions = [onnx_inputs(layer.cell, form, weights) for weights in _directions(layer)]
    each = len(directions) // layer.num_layers
    levels = [directions[n : n + each] for n in range(0, len(directions), each)]
    return [{name: np.stack([one[name] for one in level]) for name in level[0]} for level in levels]


def from_onnx(layer: Recurrent, nodes: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Inputs of ONNX's nodes, as :func:`to_onnx` gives them, for ``layer.load_state_dict``.

    B and P may be missing, and are zero then.

    Raises:
        ValueError: if ONNX has no operator like it, or the inputs are those of another.
    """
    form, expected = _form(layer), to_onnx(layer)
    if len(nodes) != len(expected):
        raise ValueError(f"nodes must hold the inputs of {len(expected)} node(s), got {len(nodes)}")
    each = len(layer._names) // layer.num_layers
    found: dict[str, np.ndarray] = {}
    for level, (node, wanted) in enumerate(zip(nodes, expected)):
        optional = {name: np.zeros_like(wanted[name]) for name in ("B", "P") if name in wanted}
        inputs = {name: np.asarray(array) for name, array in (optional | dict(node)).items()}
        if inputs.keys() != wanted.keys():
            raise ValueError(f"nodes[{level}] must hold {', '.join(wanted)}, got {', '.join(node)}")
        labels = [f"{name} of nodes[{level}]" for name in wanted]
        _check_shapes(labels, [inputs[name] for name in wanted], list(wanted.values()))
        for d in range(each):
            one = {name: array[d] for name, array in inputs.items()}
            found |= named(layer._names[level * each + d], onnx_weights(layer.cell, form, one))
    return found


def onnx_weights(cell: Cell, form: Form, inputs: Mapping[str, np.ndarray]) -> Weights:
    """The weights of one direction of a node.

    Args:
        cell: with a cell's order of gates.
        form: what the node computes.
        inputs: W (gates*H, I), R (gates*H, H), B (2*gates*H,) if there is one, P (3*H,).
    """

    def rows(array: np.ndarray) -> np.ndarray:
        parts = dict(zip(form.gates, np.split(array, len(form.gates))))
        return np.concatenate([_coupled(cell, parts)[gate] for gate in cell.gates])

    bias_ih, bias_hh = map(rows, np.split(inputs["B"], 2)) if "B" in inputs else (None, None)
    vectors = dict(zip(_PEEPHOLES, np.split(inputs["P"], 3))) if cell.weights else {}
    own = tuple(vectors[name] for name in cell.weights)
    return Weights(rows(inputs["W"]), rows(inputs["R"]), bias_ih, bias_hh, vectors=own)


def onnx_inputs(cell: Cell, form: Form, weights: Weights) -> dict[str, np.ndarray]:
    """The inputs of a node that :func:`onnx_weights` takes; what it does not take of them is zero."""

    def rows(array: np.ndarray) -> np.ndarray:
        parts = _coupled(cell, dict(zip(cell.gates, np.split(array, len(cell.gates)))))
        nothing = np.zeros_like(next(iter(parts.values())))
        return np.concatenate([parts.get(gate, nothing) for gate in form.gates])

    inputs = {"W": rows(weights.ih), "R": rows(weights.hh)}
    if weights.bias_ih is not None:
        inputs["B"] = np.concatenate([rows(weights.bias_ih), rows(weights.bias_hh)])
    if cell.weights:
        vectors = dict(zip(cell.weights, weights.vectors))
        nothing = np.zeros_like(weights.vectors[0])
        inputs["P"] = np.concatenate([vectors.get(name, nothing) for name in _PEEPHOLES])
    return inputs


_PEEPHOLES = ("p_i", "p_o", "p_f")  # as ONNX orders them in P


def _coupled(cell: Cell, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows by gate; between coupled_lstm, which has gate f, and ONNX, where i is 1 - f, the sign changes."""
    if cell is not cells.coupled_lstm:
        return rows
    if "i" in rows:
        return rows | {"f": -rows["i"]}
    return {gate: part for gate, part in rows.items() if gate != "f"} | {"i": -rows["f"]}


def _directions(layer: Recurrent) -> list[Weights]:
    """The weights of each direction of each layer."""
    arrays = layer.state_dict()
    return [fill(names, arrays.__getitem__) for names in layer._names]


def _reordered(weights: Weights, own: Sequence[str], wanted: Sequence[str]) -> Weights:
    """Weights with their gates in another order: copies."""

    def rows(stacked: np.ndarray) -> np.ndarray:
        parts = dict(zip(own, np.split(stacked, len(own))))
        return np.concatenate([parts[gate] for gate in wanted])

    stacks: dict[str, Any] = {name: getattr(weights, name) for name in ("ih", "hh", "bias_ih", "bias_hh")}
    stacks = {name: rows(stack) for name, stack in stacks.items() if stack is not None}
    return weights._replace(**stacks)


def _check_shapes(labels: Sequence[str], given: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    shapes = [array.shape for array in expected]
    if len(given) != len(expected):
        raise ValueError(f"weights must hold {len(expected)} arrays {shapes}, got {[g.shape for g in given]}")
    for label, array, shape in zip(labels, given, shapes):
        if array.shape != shape:
            raise ValueError(f"{label} must have the shape {shape}, got {array.shape}")


def check_plain(layer: Recurrent, whose: str) -> None:
    """Refuse options that layers of others do not have.

    Raises:
        ValueError: for a layer of gate inputs, or with heads.
    """
    if layer.input_size is None:
        raise ValueError(f"layer must have an input_size, as layers of {whose}, got {layer!r}")
    if layer.heads > 1:
        raise ValueError(f"layer must have one head, as layers of {whose}, got {layer!r}")


def _keras_order(layer: Recurrent) -> tuple[str, ...]:
    """The gates in the order in which Keras has them."""
    check_plain(layer, "Keras")
    cell = layer.cell
    if layer.proj_size:
        raise ValueError(f"layer must have no projection, as layers of Keras, got {layer!r}")
    if single := (*cell.without_input, *cell.without_recurrent):
        raise ValueError(
            f"layer must have gates with both products, as layers of Keras, but in the cell {cell.name} "
            f"{', '.join(map(repr, single))} lack one"
        )
    kinds = {cells.lstm: "lstm", cells.gru: "gru", cells.gru_reset_before: "gru"}
    return GATE_ORDERS["keras"][kinds[cell]] if cell in kinds else cell.gates


def _form(layer: Recurrent) -> Form:
    """What an operator of ONNX must compute to be like a layer."""
    from .onnx.cells import form_of

    check_plain(layer, "ONNX")
    form = form_of(layer.cell)
    if form is None or layer.proj_size:
        why = "projection" if layer.proj_size else f"cell {layer.cell.name}"
        raise ValueError(f"ONNX has no operator with a {why}; fusedlstm.onnx.export writes a loop for it")
    return form
