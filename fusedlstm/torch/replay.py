"""One layer by PyTorch's operators, step by step: for tangents, and for third derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import weights as storage
from ..cells import Cell
from ..derive import compile_source
from ..once import once
from ..weights import Weights
from .checks import check_range, check_shapes, named_inputs
from .shapes import Shape


def _like(value: Any, other: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(other, value)


def _where(condition: Tensor, x: Any, y: Any) -> Tensor:
    other = x if isinstance(x, Tensor) else y
    return torch.where(condition, x, y) if isinstance(other, Tensor) else torch.where(condition, float(x), y)


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    def apply(x: Any, y: Any) -> Tensor:
        return function(_like(x, y), _like(y, x))

    return apply


# Of fusedlstm.math; where two values are equal, both functions of a pair give half of the gradient to each.
_FUNCTIONS: dict[str, Any] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: torch.clamp(x / 6 + 0.5, 0, 1),
    "relu": torch.relu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "erf": torch.erf,
    "absolute": torch.abs,
    "minimum": _pairwise(torch.minimum),
    "maximum": _pairwise(torch.maximum),
    "where": _where,
    "full_like": torch.full_like,
    "mean": lambda x: x.mean(-1, keepdim=True).expand_as(x),
}


@once
def _step(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """The step of a cell on tensors."""
    module = compile_source(cell.source, _FUNCTIONS, f"<cell {cell.name} in PyTorch>")
    del module.__name__  # which torch.compile would try to import
    return cast("Callable[..., tuple[Tensor, ...]]", module.step)


def replay(
    x: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: Shape,
    every: bool = False,
) -> list[Tensor]:
    """What `passes.forward` computes, without the handle."""
    check_shapes(named_inputs(x, [*initial], weights, shape))
    if lengths is not None:
        _check_ends(lengths, shape.steps)
        lengths = lengths.to(x.device)
    if reset is not None:
        reset = reset.to(x.device)
    states = initial or [x.new_zeros((shape.directions, shape.batch, size)) for size in shape.sizes]
    each = len(weights) // shape.directions
    outputs, finals, further = [], [], []
    for d in range(shape.directions):
        own = storage.unflatten(shape.cell, weights[d * each : (d + 1) * each])
        (y, *others), final = _replay_direction(
            shape.cell, own, x[..., shape.fed(d)], [part[d] for part in states], lengths, reset, d == 1
        )
        outputs.append(y)
        finals.append(final)
        further.append(others)
    results = [torch.cat(outputs, -1), *[torch.stack(parts) for parts in zip(*finals)]]
    return results + [torch.stack(parts, 1) for parts in zip(*further)] if every else results


def _replay_direction(
    cell: Cell,
    weights: Weights,
    x: Tensor,  # (T, B, I)
    initial: list[Tensor],  # (B, size)
    lengths: Tensor | None,  # (B,)
    reset: Tensor | None,  # (T, B)
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The states after each step (T, B, size), and the final ones."""
    steps = x.shape[0]
    running, anew = _schedule(steps, lengths, reset, reverse)
    from_input = x if weights.ih is None else nn.functional.linear(x, weights.ih, weights.bias_ih)
    step, states = _step(cell), initial
    shown: list[list[Tensor]] = [[x]] * steps
    for t in range(steps)[:: -1 if reverse else 1]:
        if anew is not None:
            states = [torch.where(anew[t], s0, s) for s0, s in zip(initial, states)]
        given = cell.step_arguments_of(from_input[t], states, weights, _linear, torch.chunk)
        new = list(step(**given))
        if weights.hr is not None:
            new[0] = nn.functional.linear(new[0], weights.hr)
        if running is None:
            shown[t] = states = new
        else:
            shown[t] = [torch.where(running[t], n, 0) for n in new]
            states = [torch.where(running[t], n, s) for n, s in zip(new, states)]
    return [torch.stack(parts) for parts in zip(*shown)], states


def _linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``nn.functional.linear``, also of weights that are blocks on a diagonal, below each other."""
    if weight.shape[-1] == value.shape[-1]:
        return nn.functional.linear(value, weight, bias)
    rows, size = value.shape[0], weight.shape[-1]
    heads = value.shape[-1] // size
    # of each gate the blocks of all heads
    blocks = weight.reshape(-1, heads, size, size)
    parts = torch.einsum("bhk,ghuk->bghu", value.reshape(rows, heads, size), blocks).reshape(rows, -1)
    return parts if bias is None else parts + bias


def _schedule(
    steps: int, lengths: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`kernels.reference.schedule` has it: which steps count, and before which states begin anew.

    Both (T, B, 1); none where all steps count, or where states never begin anew.
    """
    running = None if lengths is None else torch.arange(steps, device=lengths.device)[:, None] < lengths
    if reset is not None and reverse:
        reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    if reset is not None and running is not None:
        reset = reset & running  # what lies beyond the end of a sequence does not touch its state
    return None if running is None else running[..., None], None if reset is None else reset[..., None]


def replay_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: Shape,
    every: bool = False,
) -> list[Tensor]:
    """What `passes.backward` computes, by replaying the layer."""

    def layer(x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        return replay(x, initial, weights, lengths, reset, shape, every)

    dx, dinitial, dweights = torch.func.vjp(layer, x, list(initial), list(weights))[1](list(grads))
    return [dx, *dinitial, *dweights]


def replay_second(
    grads: list[Tensor],
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    seeds: list[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: Shape,
    every: bool = False,
) -> Any:
    """What `passes.backward_gradient` computes, by replaying the layer."""

    def gradient(grads: list[Tensor], x: Tensor, initial: list[Tensor], weights: list[Tensor]) -> Any:
        return replay_backward(grads, x, initial, weights, lengths, reset, shape, every)

    parts = [x, *initial, *weights]
    given = [torch.zeros_like(part) if seed is None else seed for part, seed in zip(parts, seeds)]
    return torch.func.vjp(gradient, grads, x, initial, weights)[1](given)


def carry_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these tensors has a tangent; only asked while forward-mode differentiation goes on."""
    return any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def _check_ends(lengths: Tensor, steps: int) -> None:
    """The check of the kernels' path, for lengths that a transform of ``torch.func`` may have wrapped."""
    if torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        lengths = torch._C._functorch.get_unwrapped(lengths)
    with torch._C._DisableFuncTorch():
        check_range(lengths.cpu().numpy(), steps)
