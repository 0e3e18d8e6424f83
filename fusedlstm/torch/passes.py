"""One layer by the kernels: forward, backward, and the gradient of backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .. import weights as storage
from ..dispatch import Direction, TwiceDifferentiable
from .arrays import NUMPY, as_array, as_tensor, new_tensors, on_stream
from .checks import as_masks, check_backward, check_forward, check_tensors, named_inputs
from .prepared import direction_of, places_of
from .records import Given, Record, handle_of, record_of
from .shapes import Shape, empty_results, shape_of


def forward(
    x: Tensor,  # (T, B, I)
    initial: list[Tensor],  # (D, B, P) for the output, (D, B, H) for other states; none is zero
    weights: list[Tensor],  # for each direction as storage.flatten gives them
    lengths: Tensor | None,  # (B,)
    reset: Tensor | None,  # (T, B)
    cell: str,
    directions: int,
    training: bool,
    every: bool = False,
) -> list[Tensor]:
    """The output (T, B, D*P), the final states, and the handle of what backward needs.

    If every state is asked for, before that the states but the output after each step, (T, D, B, H).
    """
    results, record = run(x, initial, weights, lengths, reset, cell, directions, training, every)
    return [*results, handle_of([record])]


def run(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: int,
    training: bool,
    every: bool = False,
) -> tuple[list[Tensor], Record | None]:
    """The same, and what backward needs, if training."""
    shape = shape_of(x, weights, cell, directions)
    check_forward(x, initial, weights, shape)
    if x.is_cpu and shape.batch:
        return _fill(x, initial, weights, lengths, reset, shape, training, every)
    if x.is_meta or not shape.batch:
        check_tensors(named_inputs(x, initial, weights, shape), x)
        if not x.is_meta:
            as_masks(lengths, reset, x, shape)
        return empty_results(x, shape, every), None
    with on_stream(x):
        return _fill(x, initial, weights, lengths, reset, shape, training, every)


def _fill(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: Shape,
    training: bool,
    every: bool,
) -> tuple[list[Tensor], Record | None]:
    ends, marks = (None, None) if lengths is None and reset is None else as_masks(lengths, reset, x, shape)
    source, (results, (y, *rest)) = as_array(x), new_tensors(x, shape.results_with(every))
    final, states = rest[: len(shape.states)], rest[len(shape.states) :]
    given = [as_array(part) for part in initial]
    record = Record(Given(shape, len(initial), every, x.dtype, x.device), [], [], []) if training else None
    each = len(weights) // shape.directions
    for d in range(shape.directions):
        own = weights[d * each : (d + 1) * each]
        direction = direction_of(own, x, shape, d)
        tape = direction.forward(
            source if not shape.cell.takes_gates else source[..., shape.fed(d)],
            tuple([part[d] for part in given]) if given else None,
            y if shape.directions == 1 else y[..., d * shape.outputs : (d + 1) * shape.outputs],
            tuple([part[d] for part in final]),
            ends,
            marks,
            d == 1,
            training,
            tuple([part[:, d] for part in states]) if every else None,
        )
        if record is not None:
            record.directions.append(direction)
            record.places.append(places_of(own))
            record.tapes.append(_bound(tape, None, None))  # whoever calls backward brings x and y
    return results, record


def step(
    x: Tensor,  # (B, I)
    initial: Sequence[Tensor],  # (B, size) each; none is zero
    weights: Sequence[Tensor],
    shape: Shape,
    training: bool = False,
) -> tuple[list[Tensor], Tensor | None, Record | None]:
    """The final states (B, size) of one step on the host that :func:`checks.fits_step` has approved of; the
    output (1, B, P) and what backward needs, if training.

    A step takes as long as what is around it, so this does what `run` does for a layer, but no more.
    """
    dtype = NUMPY[x.dtype]
    y, *final = [np.empty(sizes, dtype) for sizes in shape.results]
    states = tuple([as_array(part) for part in initial]) or None
    ends = tuple([part[0] for part in final])
    direction = direction_of(weights, x, shape, 0)
    tape = direction.forward(as_array(x)[None], states, y, ends, None, None, False, training)
    results = [torch.from_numpy(part) for part in ends]
    if not training:
        return results, None, None
    given, tapes = Given(shape, len(initial), False, x.dtype, x.device), [_bound(tape, None, None)]
    return results, torch.from_numpy(y), Record(given, [direction], [places_of(weights)], tapes)


def step_backward(
    record: Record,
    grads: Sequence[Tensor],  # (B, size): of the final states
    y: Tensor,  # (1, B, P)
    x: Tensor,  # (B, I)
    wanted: Sequence[bool],  # of the input, the initial states and the weights
) -> list[Tensor | None]:
    """The gradients that are wanted, of a step whose tensors are those that it was run with, and as dense."""
    source = as_array(x)[None]
    target = np.empty_like(source) if wanted[0] else None
    tape = _bound(record.tapes[0], source, as_array(y))
    dfinal = tuple([as_array(grad) for grad in grads])
    dy = np.zeros(y.shape, source.dtype)
    states, weights = record.directions[0].backward(tape, dy, dfinal, target, False)
    arrays = [
        None if target is None else target[0],
        *states[: record.given.states],
        *storage.flatten(weights),
    ]
    return [torch.from_numpy(array) if want else None for array, want in zip(arrays, wanted)]


def _bound(tape: Any, x: Any, y: Any) -> Any:
    """A tape of an engine with other memory of the input and the output.

    A compiled graph may use theirs again once it has passed them on to backward.
    """
    fields = getattr(tape, "_fields", ())  # a tape that holds copies has none
    parts = {name: value for name, value in (("x", x), ("y", y)) if name in fields}
    return tape._replace(**parts) if parts else tape


def backward(
    grads: list[Tensor],  # of the output and the final states
    handle: Tensor,  # (1,)
    y: Tensor,  # (T, B, D*P)
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: int,
    every: bool = False,
    wants_x: bool = True,
) -> list[Tensor | None]:
    """Gradients of x, of the initial states and of the weights; x's has a product of its own."""
    shape = shape_of(x, weights, cell, directions)
    record = _checked_record(handle, grads, y, x, initial, weights, shape, every)
    if x.is_meta or not shape.batch:
        return [torch.zeros_like(part) for part in (x, *initial, *weights)]
    if record is None:
        (y, *_), record = run(x, initial, weights, lengths, reset, cell, directions, True, every)
    with on_stream(x):
        return _run_backward(cast(Record, record), grads, y, x, weights, shape, wants_x)


def _checked_record(
    handle: Tensor,
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    shape: Shape,
    every: bool,
) -> Record | None:
    """The record of the forward pass, none if it is gone, once all fits it, and each other."""
    if handle.shape != (1,):
        raise RuntimeError(
            f"handle must have the shape (1,), as the layer gave it, got {tuple(handle.shape)}"
        )
    record = record_of(handle)
    check_backward(grads, y, x, initial, weights, shape, every, record)
    return record


class _Part(NamedTuple):
    """One direction of a layer on the way back."""

    number: int
    fed: slice  # features of the input
    features: slice  # of the output
    weights: slice
    direction: Direction  # with the weights where they lie now
    tape: Any


def _parts(record: Record, x: Tensor, weights: list[Tensor], shape: Shape) -> Iterator[_Part]:
    each = len(weights) // shape.directions
    for d, (direction, tape) in enumerate(zip(record.directions, record.tapes)):
        own = slice(d * each, (d + 1) * each)
        # what was laid out may lie in memory that is no longer there
        if record.places[d] != places_of(weights[own]):
            direction = direction_of(weights[own], x, shape, d)
        features = slice(d * shape.outputs, (d + 1) * shape.outputs)
        yield _Part(d, shape.fed(d), features, own, direction, tape)


def _run_backward(
    record: Record,
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    weights: list[Tensor],
    shape: Shape,
    wants_x: bool,
) -> list[Tensor | None]:
    source, output = as_array(x), as_array(y)
    (dx,), (target,) = new_tensors(x, [shape.input]) if wants_x else ([None], [None])
    dy, dfinal, dstates = _apart(grads, shape)
    dinitial, dweights = [], []
    for d, fed, features, _, direction, tape in _parts(record, x, weights, shape):
        states, gradients = direction.backward(
            _bound(tape, source[..., fed], output[..., features]),
            dy[..., features],
            tuple(state[d] for state in dfinal),
            None if target is None else target[..., fed],
            d == 1 and not shape.cell.takes_gates,
            tuple(state[:, d] for state in dstates) if record.given.every else None,
        )
        dinitial.append([as_tensor(state) for state in states])
        gradients = gradients._replace(vectors=tuple(v.copy() for v in gradients.vectors))  # may share memory
        dweights += [as_tensor(array) for array in storage.flatten(gradients)]
    if not record.given.states:
        return [dx, *dweights]
    return [dx, *[torch.stack(parts) for parts in zip(*dinitial)], *dweights]


def _apart(grads: list[Tensor], shape: Shape) -> tuple[Any, list[Any], list[Any]]:
    """The gradients of the output, of the final states, and of those after each step."""
    dy, *rest = map(as_array, grads)
    return dy, rest[: len(shape.states)], rest[len(shape.states) :]


def backward_gradient(
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
    seeds: list[Tensor | None],  # of the gradients of x, of the initial states and of the weights
    wants_x: bool = True,
) -> tuple[list[Tensor], Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of `grads`, x, the initial states and the weights, on the host, for a batch of some rows.

    With g = J^T dy the first gradients, J the derivative of the outputs, and v the seeds, it is the gradient
    of <v, g> = <J v, dy>: with respect to dy the tangent of the outputs along v, with respect to all else
    the tangent of the backward pass along v (Pearlmutter, Fast exact multiplication by the Hessian, Neural
    Computation 6, 1994).
    """
    shape = shape_of(x, weights, cell, directions)
    record = _checked_record(handle, grads, y, x, initial, weights, shape, every)
    if record is None:
        (y, *_), record = run(x, initial, weights, lengths, reset, cell, directions, True, every)
    return _run_gradient(cast(Record, record), grads, y, x, initial, weights, seeds, shape, wants_x)


def _run_gradient(
    record: Record,
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    seeds: list[Tensor | None],
    shape: Shape,
    wants_x: bool,
) -> tuple[list[Tensor], Tensor | None, list[Tensor], list[Tensor]]:
    moved_x, *moved = [None if seed is None else as_array(seed) for seed in seeds]
    source, output = as_array(x), as_array(y)
    dy, dfinal, dstates = _apart(grads, shape)
    moved_initial: list[Any] = []
    if any(part is not None for part in moved[: len(initial)]):
        for sizes, part in zip(shape.results[1:], moved):
            moved_initial.append(np.zeros(sizes, source.dtype) if part is None else part)
    ty = np.empty(shape.results[0], source.dtype)
    tfinal = [np.empty(sizes, source.dtype) for sizes in shape.results[1:]]
    tstates = [np.empty(part.shape, source.dtype) for part in dstates]
    dinitial, dweights = [], []
    dx: list[Any] = []
    for d, fed, features, own, direction, tape in _parts(record, x, weights, shape):
        twice = cast(TwiceDifferentiable, direction)
        values = _bound(tape, source[..., fed], output[..., features])
        tangent = twice.tangent(
            values,
            None if moved_x is None else moved_x[..., fed],
            tuple([state[d] for state in moved_initial]) or None,
            storage.unflatten(shape.cell, moved[len(initial) :][own]),
            ty[..., features],
            tuple([state[d] for state in tfinal]),
            tuple([state[:, d] for state in tstates]),
        )
        target = np.empty_like(source[..., fed]) if wants_x else None
        states, gradients = twice.backward_tangent(
            values,
            tangent,
            dy[..., features],
            tuple([state[d] for state in dfinal]),
            target,
            tuple([state[:, d] for state in dstates]),
        )
        dx.append(target)
        dinitial.append([as_tensor(state) for state in states])
        dweights += [as_tensor(array) for array in storage.flatten(gradients)]
    if wants_x:
        dx = [np.concatenate(dx, -1) if shape.cell.takes_gates else sum(dx[1:], dx[0])]
    return (
        [as_tensor(array) for array in (ty, *tfinal, *tstates)],
        as_tensor(dx[0]) if wants_x else None,
        [torch.stack(parts) for parts in zip(*dinitial)] if initial else [],
        dweights,
    )
