"""One layer as PyTorch sees it: operators, their derivatives, transforms, and a way around the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..cells import Cell
from ..once import once
from . import passes
from .export import export_layer, leaves_python, no_operator
from .records import handle_of, record_of
from .replay import carry_tangents, replay, replay_backward, replay_second
from .shapes import empty_results, known_cell, shape_of, text_of

_SHARED = (
    "Tensor x, Tensor[] initial, Tensor[] weights, Tensor? lengths, Tensor? reset, str cell, int directions"
)


def _without_tangents(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator, which does not see the tangents that would be lost, so that it refuses them all."""

    @wraps(function)
    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "the operators of fusedlstm have no forward-mode derivative: instead of an exported program "
                "call the module, which has one"
            )
        return function(*args)

    return run


_layer = torch.library.custom_op(
    "fusedlstm::layer",
    _without_tangents(passes.forward),
    mutates_args=(),
    schema=f"({_SHARED}, bool training) -> Tensor[]",
)
_layer_backward = torch.library.custom_op(
    "fusedlstm::layer_backward",
    _without_tangents(passes.backward),
    mutates_args=(),
    schema=f"(Tensor[] grads, Tensor handle, Tensor y, {_SHARED}) -> Tensor[]",
)


@_layer.register_fake
def _(x, initial, weights, lengths, reset, cell, directions, training):  # type: ignore[no-untyped-def]
    if torch.onnx.is_in_onnx_export():
        raise no_operator(known_cell(cell)[0])
    results = empty_results(x, shape_of(x, weights, cell, directions))
    return [*results, torch.empty(1, dtype=torch.int64, device="cpu")]


@_layer_backward.register_fake
def _(grads, handle, y, x, initial, weights, *rest):  # type: ignore[no-untyped-def]
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, *initial, *weights)]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, initial, weights, lengths, reset, ctx.cell, ctx.directions, _ = inputs
    ctx.states = len(initial)
    # the output belongs to what backward reads, so that nobody changes it unnoticed
    ctx.save_for_backward(lengths, reset, output[-1], output[0], x, *initial, *weights)


def _layer_gradient(ctx: Any, grads: Sequence[Any], wants_x: bool) -> Any:
    lengths, reset, handle, y, x, *rest = ctx.saved_tensors
    initial, weights = rest[: ctx.states], rest[ctx.states :]
    # the output has no gradient here: detached, or this would be called again with zeros
    y = y.detach()
    args = (list(grads[:-1]), handle, y, x, initial, weights, lengths, reset, ctx.cell, ctx.directions)
    gradients: Sequence[Tensor | None]
    if not torch.is_grad_enabled() and _plain([x, *grads[:-1], *rest]):
        gradients = passes.backward(*args, wants_x)
    elif forward_ad._current_level >= 0:
        shape = shape_of(x, weights, ctx.cell, ctx.directions)
        gradients = replay_backward(grads[:-1], x, initial, weights, lengths, reset, shape)
    else:
        gradients = _call("layer_backward", *args)
    dx, *others = gradients
    return dx, others[: ctx.states], others[ctx.states :], None, None, None, None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grads, handle, y, x, initial, weights, lengths, reset, ctx.cell, ctx.directions = inputs
    ctx.counts = len(grads), len(initial)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lengths, reset, handle, y, x, *grads, *initial, *weights)


def _second_gradient(ctx: Any, seeds: list[Tensor | None], wants_x: bool) -> Any:
    """The gradient of the gradient."""
    lengths, reset, handle, y, x, *rest = ctx.saved_tensors
    first, second = ctx.counts[0], sum(ctx.counts)
    grads, initial, weights = rest[:first], rest[first:second], rest[second:]
    masks, given = (lengths, reset), [seed for seed in seeds if seed is not None]
    if x.is_cpu and x.size(1) and not torch.is_grad_enabled() and _plain([y, x, *rest, *given]):
        args = (grads, handle, y, x, initial, weights, *masks, ctx.cell, ctx.directions)
        dgrads, dx, dinitial, dweights = passes.backward_gradient(*args, seeds, wants_x)
    else:
        shape = shape_of(x, weights, ctx.cell, ctx.directions)
        dgrads, dx, dinitial, dweights = replay_second(grads, x, initial, weights, seeds, *masks, shape)
    return dgrads, None, None, dx, dinitial, dweights, None, None, None, None


def _transformable(name: str, save: Any, gradient: Any) -> Any:
    """The operator for the transforms of ``torch.func``, which take no registered formulas."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(spec: Any, *flat: Any) -> Any:
            return tuple(_call(name, *tree_unflatten(flat, spec)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            save(ctx, tree_unflatten(inputs[1:], inputs[0]), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *tree_leaves(gradient(ctx, list(grads), True))

        @staticmethod
        def vmap(info: Any, dims: Any, spec: Any, *flat: Any) -> Any:
            """One call for each entry, each of them a fused kernel."""
            calls = []
            for n in range(info.batch_size):
                entry = [value if dim is None else value.select(dim, n) for value, dim in zip(flat, dims[1:])]
                calls.append(_call(name, *tree_unflatten(entry, spec)))
            results = [torch.stack(parts) for parts in zip(*calls)]
            if name == "layer" and not _transforming():
                results[-1] = handle_of([record_of(call[-1]) for call in calls])[:, None]
            return tuple(results), (0,) * len(results)

    return Transformable


def _call(name: str, *args: Any) -> list[Tensor]:
    """The results of an operator, whatever watches."""
    if not torch.compiler.is_compiling():
        _prepare_operators()
        if _transforming():
            flat, spec = tree_flatten(list(args))
            return list(_TRANSFORMABLE[name].apply(spec, *flat))
    return cast("list[Tensor]", getattr(torch.ops.fusedlstm, name)(*args))


@once
def _prepare_operators() -> None:
    """Import what PyTorch imports with the first call of an operator, so that no fork cuts that in two."""
    import torch._dynamo  # noqa: F401


def _transforming() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


_layer.register_autograd(
    lambda ctx, grads: _layer_gradient(ctx, grads, ctx.needs_input_grad[0]), setup_context=_save
)
_layer_backward.register_autograd(
    lambda ctx, seeds: _second_gradient(ctx, seeds, ctx.needs_input_grad[3]), setup_context=_save_backward
)
_TRANSFORMABLE = {
    "layer": _transformable("layer", _save, _layer_gradient),
    "layer_backward": _transformable("layer_backward", _save_backward, _second_gradient),
}


def apply_layer(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: Cell,
    directions: int,
    precision: str = "float32",
) -> list[Tensor]:
    """The output and the final states of one layer, with products in a precision."""
    tensors = [x, *initial, *weights]
    gradients = torch.is_grad_enabled() and _wanted(tensors)
    text = text_of(cell, precision)
    args = (x, initial, weights, lengths, reset, text, directions)
    if _plain(tensors):
        return (
            list(cast(Any, _Eager).apply(*args, *initial, *weights))
            if gradients
            else passes.run(*args, False)[0]
        )
    if leaves_python():
        return export_layer(x, initial, weights, lengths, reset, cell, directions)
    if forward_ad._current_level >= 0:  # whatever else goes on, the replay is right
        return replay(x, initial, weights, lengths, reset, shape_of(x, weights, text, directions))
    return _call("layer", *args, gradients)[:-1]


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a short sequence.

    Tensors that want a gradient must be arguments by themselves, so lists are given once more, flat.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Any:
        inputs: Any = (x, *args[:6], True)
        results = passes.forward(*inputs)
        _save(ctx, inputs, results)
        return tuple(results[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dinitial, dweights, *_ = _layer_gradient(ctx, [*grads, None], ctx.needs_input_grad[0])
        return dx, *[None] * 6, *dinitial, *dweights


def _wanted(tensors: list[Tensor]) -> bool:
    """Whether one of them wants a gradient."""
    for tensor in tensors:  # noqa: SIM110 (this is quicker, and can be traced)
        if tensor.requires_grad:
            return True
    return False


_TENSORS = {Tensor, nn.Parameter}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # whose modes are not in the stack of the others


def _plain(tensors: list[Tensor]) -> bool:
    """Whether nobody watches what is done with these tensors, so that the dispatcher has no part in it."""
    return (
        not torch.compiler.is_compiling()
        and not _transforming()
        and (forward_ad._current_level < 0 or not carry_tangents(tensors))
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        and _TENSORS.issuperset(map(type, tensors))
    )
