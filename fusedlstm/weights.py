"""Names, gate orders and files of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .files import write_whole

if TYPE_CHECKING:
    from .cells import Cell

# The only table of gate orders.  Ours is PyTorch's; the others are given in its names.
GATE_ORDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")},
    "keras": {"lstm": ("i", "f", "g", "o"), "gru": ("z", "r", "n")},
    "onnx": {"lstm": ("i", "o", "f", "g"), "gru": ("z", "r", "n")},
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


def from_keras(cell: Cell, flat: Sequence[Any], zeros_like: Callable[[Any], Any]) -> Weights:
    """The weights of a layer of Keras, as views of the same memory; only a missing second bias is new.

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


def to_keras(gradients: Weights, flat: Sequence[Any]) -> list[Any]:
    """The gradients of the weights that :func:`from_keras` was given as `flat`, matrices as views."""
    biases = len(flat) - 2 - len(gradients.vectors)
    bias: list[Any] = [gradients.bias_ih][:biases]
    if biases and flat[2].ndim == 2:
        bias = [np.stack([gradients.bias_ih, gradients.bias_hh])]
    return [gradients.ih.T, gradients.hh.T, *bias, *gradients.vectors]


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
