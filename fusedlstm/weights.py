"""Names, gate orders and files of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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

    ih: Any  # (gates*H, I)
    hh: Any  # (gates*H, P)
    bias_ih: Any = None  # (gates*H,) or None
    bias_hh: Any = None  # (gates*H,) or None
    hr: Any = None  # (P, H) or None
    vectors: tuple[Any, ...] = ()  # (H,) for each name in cell.weights


def names(cell: Cell, layer: int, reverse: bool, bias: bool, projected: bool) -> Weights:
    """The names of the parameters, as PyTorch gives them, in the places of the weights."""
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    return Weights(
        f"weight_ih{suffix}",
        f"weight_hh{suffix}",
        f"bias_ih{suffix}" if bias else None,
        f"bias_hh{suffix}" if bias else None,
        f"weight_hr{suffix}" if projected else None,
        tuple(f"{name}{suffix}" for name in cell.weights),
    )


def shapes(cell: Cell, inputs: int, hidden: int, bias: bool, proj: int) -> Weights:
    """The shapes of the parameters, in the places of the weights."""
    rows = len(cell.gates) * hidden
    vector = (rows,) if bias else None
    return Weights(
        (rows, inputs),
        (rows, proj or hidden),
        vector,
        vector,
        (proj, hidden) if proj else None,
        ((hidden,),) * len(cell.weights),
    )


def flatten(weights: Weights) -> list[Any]:
    """The entries that are there, in PyTorch's order; the learned vectors come last."""
    present = [weights.ih, weights.hh, weights.bias_ih, weights.bias_hh, weights.hr]
    return [entry for entry in present if entry is not None] + list(weights.vectors)
