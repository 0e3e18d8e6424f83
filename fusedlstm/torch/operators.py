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
from .checks import fits_step
from .export import export_layer, leaves_python, no_operator
from .prepared import places_of
from .records import Record, handle_of, record_of
from .replay import carry_tangents, replay, replay_backward, replay_second
from .shapes import Shape, empty_results, known_cell, shape_of, step_shape, text_of

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
    schema=f"({_SHARED}, bool training, bool every=False) -> Tensor[]",
)
_layer_backward = torch.library.custom_op(
    "fusedlstm::layer_backward",
    _without_tangents(passes.backward),
    mutates_args=(),
    schema=f"(Tensor[] grads, Tensor handle, Tensor y, {_SHARED}, bool every=False) -> Tensor[]",
)


@_layer.register_fake
def _(x, initial, weights, lengths, reset, cell, directions, training, every=False):  # type: ignore[no-untyped-def]
    if torch.onnx.is_in_onnx_export():
        raise no_operator(known_cell(cell)[0])
    results = empty_results(x, shape_of(x, weights, cell, directions), every)
    return [*results, torch.empty(1, dtype=torch.int64, device="cpu")]


@_layer_backward.register_fake
def _(grads, handle, y, x, initial, weights, *rest):  # type: ignore[no-untyped-def]
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, *initial, *weights)]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, initial, weights, lengths, reset, ctx.cell, ctx.directions, _, ctx.every = inputs
    ctx.states = len(initial)
    # the output belongs to what backward reads, so that nobody changes it unnoticed
    ctx.save_for_backward(lengths, reset, output[-1], output[0], x, *initial, *weights)


def _layer_gradient(ctx: Any, grads: Sequence[Any], wants_x: bool) -> Any:
    lengths, reset, handle, y, x, *rest = ctx.saved_tensors
    initial, weights = rest[: ctx.states], rest[ctx.states :]
    # the output has no gradient here: detached, or this would be called again with zeros
    y = y.detach()
    call = (ctx.cell, ctx.directions, ctx.every)
    args = (handle, y, x, initial, weights, lengths, reset, *call)
    dx, *others = _gradients(list(grads[:-1]), *args, wants_x)
    # the dispatcher leaves out an argument at the end that has its default
    return dx, others[: ctx.states], others[ctx.states :], *[None] * (5 + ctx.every)


def _gradients(
    grads: list[Tensor],
    handle: Tensor,
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: int,
    every: bool,
    wants_x: bool,
) -> Sequence[Tensor | None]:
    """Of the input, the initial states and the weights, whatever watches."""
    args = (grads, handle, y, x, initial, weights, lengths, reset, cell, directions, every)
    if not torch.is_grad_enabled() and _plain([x, *grads, *initial, *weights]):
        return passes.backward(*args, wants_x)
    if forward_ad._current_level >= 0:
        shape = shape_of(x, weights, cell, directions)
        return replay_backward(grads, x, initial, weights, lengths, reset, shape, every)
    return _call("layer_backward", *args)


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grads, handle, y, x, initial, weights, lengths, reset, ctx.cell, ctx.directions, ctx.every = inputs
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
        args = (grads, handle, y, x, initial, weights, *masks, ctx.cell, ctx.directions, ctx.every)
        dgrads, dx, dinitial, dweights = passes.backward_gradient(*args, seeds, wants_x)
    else:
        shape = shape_of(x, weights, ctx.cell, ctx.directions)
        dgrads, dx, dinitial, dweights = replay_second(
            grads, x, initial, weights, seeds, *masks, shape, ctx.every
        )
    return dgrads, None, None, dx, dinitial, dweights, *[None] * (4 + ctx.every)


def _transformable(name: str, save: Any, gradient: Any) -> Any:
    """The operator for the transforms of ``torch.func``, which take no registered formulas."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(spec: Any, *flat: Any) -> Any:
            return tuple(_call(name, *tree_unflatten(flat, spec)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.leaves = len(inputs) - 1
            save(ctx, tree_unflatten(inputs[1:], inputs[0]), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            leaves = tree_leaves(gradient(ctx, list(grads), True))
            return None, *leaves, *[None] * (ctx.leaves - len(leaves))

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
    every: bool = False,
    precision: str = "float32",
    heads: int = 1,
) -> list[Tensor]:
    """The output and the final states of one layer, with products in a precision; if every state is asked
    for, those but the output after each step too, (T, D, B, H)."""
    tensors = [x, *initial, *weights]
    gradients = torch.is_grad_enabled() and _wanted(tensors)
    text = text_of(cell, precision, heads)
    args = (x, initial, weights, lengths, reset, text, directions)
    if _plain(tensors):
        return (
            list(cast(Any, _Eager).apply(*args, every, *initial, *weights))
            if gradients
            else passes.run(*args, False, every)[0]
        )
    if leaves_python():
        return export_layer(x, initial, weights, lengths, reset, cell, directions, heads, every)
    if forward_ad._current_level >= 0:  # whatever else goes on, the replay is right
        shape = shape_of(x, weights, text, directions)
        return replay(x, initial, weights, lengths, reset, shape, every)
    return _call("layer", *args, gradients, every)[:-1]


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a short sequence.

    Tensors that want a gradient must be arguments by themselves, so lists are given once more, flat.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Any:
        inputs: Any = (x, *args[:6], True, args[6])
        results = passes.forward(*inputs)
        _save(ctx, inputs, results)
        return tuple(results[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dinitial, dweights, *_ = _layer_gradient(ctx, [*grads, None], ctx.needs_input_grad[0])
        return dx, *[None] * 7, *dinitial, *dweights


def apply_step(
    x: Tensor,  # (B, I)
    initial: list[Tensor],  # (B, size) each; none is zero
    weights: list[Tensor],
    cell: Cell,
) -> list[Tensor] | None:
    """The final states (B, size) of one step of a cell with recurrent weights.

    None where something watches, or does not fit; then `apply_layer` runs it, or says what is wrong.
    """
    tensors = [x, *initial, *weights]
    if not _plain(tensors):
        return None
    shape = step_shape(x.shape, weights, cell.key)
    if not shape.batch or not fits_step(x, initial, shape):
        return None
    if torch.is_grad_enabled() and _wanted(tensors):
        return list(cast(Any, _EagerStep).apply(shape, len(initial), *tensors))
    return passes.step(x, initial, weights, shape)[0]


class _EagerStep(torch.autograd.Function):
    """As `_Eager`, for one step, without a node of autograd for each axis that comes or goes."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, states: int, x: Tensor, *rest: Tensor) -> Any:
        final, y, ctx.record = passes.step(x, rest[:states], rest[states:], shape, True)
        ctx.save_for_backward(y, x, *rest)
        return tuple(final)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        record: Record = ctx.record
        (y, x, *rest), given = ctx.saved_tensors, record.given
        initial, weights, shape = rest[: given.states], rest[given.states :], given.shape
        if (
            not torch.is_grad_enabled()
            and _plain([x, *rest, *grads])
            and record.places[0] == places_of(weights)
            and x.shape == shape.input[1:]
            and x.dtype is given.dtype
            and fits_step(x, initial, shape)
            and fits_step(x, grads, shape)
        ):
            return None, None, *passes.step_backward(record, grads, y, x, ctx.needs_input_grad[2:])
        # by the operator, which checks all, and is differentiated again
        seeds = [torch.zeros_like(y), *[grad.unsqueeze(0) for grad in grads]]
        lifted = (x.unsqueeze(0), [part.unsqueeze(0) for part in initial])
        args = (handle_of([record]), y.detach(), *lifted, weights, None, None, shape.cell.key, 1, False)
        found = _gradients(seeds, *args, ctx.needs_input_grad[2])
        lowered = [part if part is None else part.squeeze(0) for part in found[: 1 + given.states]]
        return None, None, *lowered, *found[1 + given.states :]


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
