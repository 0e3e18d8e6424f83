"""PyTorch: modules with the arguments, parameters and results of ``torch.nn``'s, run by our kernels.

:class:`LSTM`, :class:`GRU`, :class:`RNN` and their cells take the place of the modules of the same names;
:class:`Recurrent` runs any cell; :func:`accelerate` turns the modules inside a model into these.

One layer of a stack, both directions of it, is one operator, ``fusedlstm::layer``, and its gradient is
another, ``fusedlstm::layer_backward``; stacking and dropout are PyTorch's.  Gradients of gradients replay
the layer with PyTorch's own operators.  Sizes in the comments and docstrings:

    T  time steps        I  input_size          L  num_layers
    B  batch             H  hidden_size         D  directions: 2 if bidirectional, else 1
                         P  size of the output: proj_size if there is a projection, else H
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fusedlstm.kernels.reference import schedule

from . import cells, dispatch, layers
from . import weights as storage
from .cells import Cell
from .derive import compile_source
from .directions import half_reset, half_states, prepare, second_halves
from .dispatch import Direction
from .once import lazy, once
from .weights import Weights

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Report",
    "accelerate",
    "restore",
]

_NUMPY = {torch.float32: np.dtype("float32"), torch.float64: np.dtype("float64")}  # what kernels compute in
# By key, since an operator takes a text, not a cell.  Entries are made before anything is traced.
_cells: dict[str, Cell] = {cell.key: cell for cell in (cells.lstm, cells.gru, cells.rnn_tanh, cells.rnn_relu)}


# --- Weights as the kernels want them --------------------------------------------------------------------


def _array(tensor: Tensor) -> Any:
    """The tensor's memory as a NumPy or CuPy array; the last axis is contiguous."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.is_cuda:
        import cupy

        return cupy.asarray(tensor)
    return tensor.numpy()


def _tensor(array: Any) -> Tensor:
    """A tensor over the memory of a NumPy or CuPy array."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.as_tensor(array, device="cuda")


class _Sizes(NamedTuple):
    """Of the input, the hidden units and the output of a layer: I, H and P."""

    inputs: int
    hidden: int
    outputs: int


class _Packed(NamedTuple):
    """Weights laid out for the kernels, and what tells whether they still are the weights."""

    cell: Cell
    owners: list[weakref.ref[Tensor]]  # the weights
    sizes: _Sizes
    places: list[Any]  # where and how they lie
    arrays: list[Any]  # their memory, so that nothing else can lie there
    table: np.ndarray | None  # where to look at it, (n, 2); none on a GPU
    sparse: int  # for few rows one block of numbers in so many is looked at
    stamps: dict[int, list[Any]]  # by how much was looked at
    direction: Direction


_packed: dict[tuple[Any, ...], _Packed] = {}  # by the identities of the weights, until one of them goes
_LOOKED_AT = 1 << 16  # numbers of large weights that are looked at: more would push others out of the cache
_MANY_ROWS = 1024  # for so many rows all numbers are: that takes a few per cent of what the products take


def _direction(cell: Cell, weights: Sequence[Tensor], sizes: _Sizes, rows: int) -> Direction:
    """One direction with these weights, as they are now, to be run on so many rows, T times B.

    What was laid out is used again if the tensors are the same, or views of the same, contiguous in one of
    both orders, lie where they lay, and have the same version counters and the same bits.  The bits are for
    what the counters do not see: a write to ``weight.data``, or to memory shared with NumPy.  On a GPU it is
    the counters alone.
    """
    known = _packed.get(tuple(map(id, weights))) or _packed.get(tuple(map(_identity, weights)))
    if (
        known is not None
        and known.cell is cell
        and known.sizes == sizes
        and known.places == _places(weights)
        and known.stamps.get(every := 1 if rows >= _MANY_ROWS else known.sparse)
        == _stamp(known.table, weights, every)
    ):
        return known.direction
    return _pack(cell, weights, sizes)


def _owner(weight: Tensor) -> Tensor:
    """The tensor that the weight is, or is a view of."""
    return weight if weight._base is None else weight._base


def _identity(weight: Tensor) -> Any:
    """What is equal for the same weight; views are new objects each time."""
    return id(weight) if weight._base is None else (id(weight._base), weight.shape, weight.stride())


def _places(weights: Sequence[Tensor]) -> list[Any]:
    """Where weights lie, and how the two matrices do: they may be given other data at the same place.

    With the sizes that are compared beside it, this tells a matrix from its transpose and from another one.
    """
    return [*[weight.data_ptr() for weight in weights], weights[0].stride(), weights[1].stride()]


def _pack(cell: Cell, weights: Sequence[Tensor], sizes: _Sizes) -> Direction:
    _check_weights(cell, weights, sizes)
    engine = dispatch.engine(weights[1].device.type)
    own = storage.unflatten(cell, [_array(weight.contiguous()) for weight in weights])
    dense = [weight if weight.is_contiguous() else weight.t() for weight in weights]
    if not all(weight.is_contiguous() for weight in dense):  # what would be looked at is a copy
        return prepare(engine, cell, own)
    arrays, key = [_array(weight) for weight in dense], tuple(map(_identity, weights))
    table = None if weights[1].is_cuda else _bits().table(arrays)
    sparse = 1 + (weights[0].numel() + weights[1].numel()) // _LOOKED_AT
    stamps = {every: _stamp(table, weights, every) for every in {1, sparse}}
    direction = prepare(engine, cell, own)

    def drop(reference: Any) -> None:
        if (entry := _packed.get(key)) is not None and any(owner is reference for owner in entry.owners):
            del _packed[key]

    owners = [weakref.ref(_owner(weight), drop) for weight in weights]
    _packed[key] = _Packed(cell, owners, sizes, _places(weights), arrays, table, sparse, stamps, direction)
    return direction


def _check_weights(cell: Cell, weights: Sequence[Tensor], sizes: _Sizes) -> None:
    """Refuse weights that a parametrization or ``functional_call`` has put in the place of those that fit.

    Raises:
        RuntimeError: for the first that does not fit; the kernels would read beyond what there is.
    """
    own, (inputs, hidden, outputs) = storage.unflatten(cell, weights), sizes
    bias, proj = own.bias_ih is not None, 0 if own.hr is None else outputs
    names = storage.names(cell, 0, False, bias, proj > 0)
    shapes = storage.shapes(cell, inputs, hidden, bias, proj)
    for name, shape, weight in zip(storage.flatten(names), storage.flatten(shapes), weights):
        if weight.shape != shape:
            what = name.removesuffix("_l0")
            raise RuntimeError(f"{what} must have the shape {shape}, got {tuple(weight.shape)}")


def _stamp(table: np.ndarray | None, weights: Sequence[Tensor], every: int) -> list[Any]:
    """Version counters, and a number for the bits that are looked at."""
    try:
        stamp: list[Any] = [weight._version for weight in weights]
    except RuntimeError:  # tensors made in inference mode have no counters: equal bits, or never the same
        stamp, every = [] if table is not None else [object()], 1
    if table is not None:
        stamp.append(_bits().fingerprint(table, every))
    return stamp


# these import Numba, so not before it is needed
@once
def _bits() -> Any:
    from fusedlstm.kernels.cpu import fingerprint

    return fingerprint


@once
def _second_order() -> Any:
    from . import second_order

    return second_order


# --- One layer, forward and backward ---------------------------------------------------------------------


class _Record:
    """What backward needs of one forward pass."""

    def __init__(self, directions: list[Direction], tapes: list[Any]) -> None:
        self.directions, self.tapes = directions, tapes


class _Handle(np.ndarray):
    """Numbers of records, which live as long as this memory."""

    records: list[_Record]


_numbers = count(1)
_records: weakref.WeakValueDictionary[int, _Record] = weakref.WeakValueDictionary()


def _handle(records: list[_Record | None]) -> Tensor:
    """A tensor of the numbers of records, which keeps them; 0 is none.

    Autograd, compiled graphs and the like carry tensors only.  Whoever is given a copy after the original
    is gone finds no record, and runs the layer again.
    """
    numbers = [0 if record is None else next(_numbers) for record in records]
    handle = np.array(numbers, np.int64).view(_Handle)
    handle.records = [record for record in records if record is not None]
    _records.update({n: record for n, record in zip(numbers, records) if record is not None})
    return torch.from_numpy(handle)


@contextmanager
def _on_stream(x: Tensor) -> Iterator[None]:
    """CuPy on PyTorch's current stream, if x lies on a GPU."""
    if x.is_cuda:
        import cupy

        stream = torch.cuda.current_stream(x.device)
        with cupy.cuda.Device(x.device.index), cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index):
            yield
    else:
        yield


@dataclass(frozen=True)
class _Shape:
    """Sizes of one layer."""

    cell: Cell
    directions: int
    steps: int
    batch: int
    layer: _Sizes

    @property
    def hidden(self) -> int:
        return self.layer.hidden

    @property
    def outputs(self) -> int:
        return self.layer.outputs

    @lazy
    def sizes(self) -> list[int]:
        """Of the states."""
        return [self.outputs, *[self.hidden] * (len(self.cell.states) - 1)]

    @lazy
    def results(self) -> list[tuple[int, int, int]]:
        """Shapes of the output and of the final states."""
        y = (self.steps, self.batch, self.directions * self.outputs)
        return [y, *[(self.directions, self.batch, size) for size in self.sizes]]


def _shape(x: Tensor, weights: Sequence[Tensor], key: str, directions: int) -> _Shape:
    sizes = (x.shape, weights[0].shape, weights[1].shape, key, directions)
    try:
        return _shape_of(*sizes)
    except TypeError:  # symbols, of a graph that is compiled for any size, have no hash
        return _shape_of.__wrapped__(*sizes)


@lru_cache(1024)
def _shape_of(x: torch.Size, ih: torch.Size, hh: torch.Size, key: str, directions: int) -> _Shape:
    cell = _cells[key]
    return _Shape(cell, directions, x[0], x[1], _Sizes(x[2], ih[0] // len(cell.gates), hh[1]))


def _empty_results(x: Tensor, shape: _Shape) -> list[Tensor]:
    return [x.new_empty(sizes) for sizes in shape.results]


def _host_lengths(lengths: Tensor | None, steps: int) -> np.ndarray | None:
    if lengths is None:
        return None
    host = lengths.detach().to("cpu", torch.int64).contiguous().numpy()
    if host.size and (host.min() < 1 or host.max() > steps):
        raise ValueError(f"lengths must be from 1 to {steps}, got {host.min()} to {host.max()}")
    return host


def _masks(lengths: Tensor | None, reset: Tensor | None, x: Tensor) -> tuple[Any, Any]:
    """lengths and reset as the kernels take them, in memory that nobody else writes."""
    host = _host_lengths(lengths, x.shape[0])
    flags = None if reset is None else reset.to(x.device, torch.bool, copy=True).contiguous()
    if x.is_cuda and host is not None:
        import cupy

        return cupy.asarray(host), None if flags is None else _array(flags)
    return host, None if flags is None else _array(flags)


def _forward(
    x: Tensor,  # (T, B, I)
    initial: list[Tensor],  # (D, B, P) for the output, (D, B, H) for other states; none is zero
    weights: list[Tensor],  # for each direction as storage.flatten gives them
    lengths: Tensor | None,  # (B,)
    reset: Tensor | None,  # (T, B)
    cell: str,
    directions: int,
    training: bool,
) -> list[Tensor]:
    """The output (T, B, D*P), the final states, and the handle of what backward needs."""
    results, record = _run(x, initial, weights, lengths, reset, cell, directions, training)
    return [*results, _handle([record])]


def _run(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: int,
    training: bool,
) -> tuple[list[Tensor], _Record | None]:
    shape = _shape(x, weights, cell, directions)
    if not shape.batch:
        return _empty_results(x, shape), None
    if x.is_cuda:
        with _on_stream(x):
            results = _empty_results(x, shape)
            arrays = [_array(result) for result in results]
            return results, _fill(x, initial, weights, lengths, reset, shape, arrays, training)
    dtype = _NUMPY[x.dtype]
    arrays = [np.empty(sizes, dtype) for sizes in shape.results]  # quicker than tensors
    record = _fill(x, initial, weights, lengths, reset, shape, arrays, training)
    return [torch.from_numpy(array) for array in arrays], record


def _fill(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: _Shape,
    results: list[Any],
    training: bool,
) -> _Record | None:
    ends, marks = (None, None) if lengths is None and reset is None else _masks(lengths, reset, x)
    source, (y, *final) = _array(x), results
    given = [_array(part) for part in initial]
    used, tapes = [], []
    each = len(weights) // shape.directions
    for d in range(shape.directions):
        own = weights[d * each : (d + 1) * each]
        direction = _direction(shape.cell, own, shape.layer, shape.steps * shape.batch)
        tape = direction.forward(
            source,
            tuple([part[d] for part in given]) if given else None,
            y if shape.directions == 1 else y[..., d * shape.outputs : (d + 1) * shape.outputs],
            tuple([part[d] for part in final]),
            ends,
            marks,
            d == 1,
            training,
        )
        if training:
            used.append(direction)
            tapes.append(_bound(tape, None, None))  # whoever calls backward brings x and y
    return _Record(used, tapes) if training else None


def _bound(tape: Any, x: Any, y: Any) -> Any:
    """A tape of an engine with other memory of the input and the output.

    A compiled graph may use theirs again once it has passed them on to backward.
    """
    fields = getattr(tape, "_fields", ())  # a tape that holds copies has none
    parts = {name: value for name, value in (("x", x), ("y", y)) if name in fields}
    return tape._replace(**parts) if parts else tape


def _backward(
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
    wants_x: bool = True,
) -> list[Tensor | None]:
    """Gradients of x, of the initial states and of the weights; x's has a product of its own."""
    if not x.shape[1]:
        return [torch.zeros_like(part) for part in (x, *initial, *weights)]
    record = _records.get(int(handle))
    if record is None:
        (y, *_), record = _run(x, initial, weights, lengths, reset, cell, directions, True)
    with _on_stream(x):
        return _run_backward(
            cast(_Record, record), grads, y, x, initial, _shape(x, weights, cell, directions), wants_x
        )


def _run_backward(
    record: _Record,
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    shape: _Shape,
    wants_x: bool,
) -> list[Tensor | None]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
    source, output, target = _array(x), _array(y), None if dx is None else _array(dx)
    dy, *dfinal = map(_array, grads)
    dinitial, dweights = [], []
    for d, (direction, tape) in enumerate(zip(record.directions, record.tapes)):
        part = slice(d * shape.outputs, (d + 1) * shape.outputs)
        states, gradients = direction.backward(
            _bound(tape, source, output[..., part]),
            dy[..., part],
            tuple(state[d] for state in dfinal),
            target,
            d == 1,
        )
        dinitial.append([_tensor(state) for state in states])
        gradients = gradients._replace(vectors=tuple(v.copy() for v in gradients.vectors))  # may share memory
        dweights += [_tensor(array) for array in storage.flatten(gradients)]
    if not initial:
        return [dx, *dweights]
    return [dx, *[torch.stack(parts) for parts in zip(*dinitial)], *dweights]


# --- The same with PyTorch's operators, for gradients of gradients ---------------------------------------


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
}


@once
def _step(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """The step of a cell on tensors."""
    step = compile_source(cell.source, _FUNCTIONS, f"<cell {cell.name} in PyTorch>").step
    return cast("Callable[..., tuple[Tensor, ...]]", step)


def _replay(
    x: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: np.ndarray | None,
    reset: np.ndarray | None,
    shape: _Shape,
) -> list[Tensor]:
    """What `_forward` computes, without the handle."""
    states = initial or [x.new_zeros((shape.directions, shape.batch, size)) for size in shape.sizes]
    each = len(weights) // shape.directions
    outputs, finals = [], []
    for d in range(shape.directions):
        own = storage.unflatten(shape.cell, weights[d * each : (d + 1) * each])
        y, final = _replay_direction(shape.cell, own, x, [part[d] for part in states], lengths, reset, d == 1)
        outputs.append(y)
        finals.append(final)
    return [torch.cat(outputs, -1), *[torch.stack(parts) for parts in zip(*finals)]]


def _replay_direction(
    cell: Cell,
    weights: Weights,
    x: Tensor,  # (T, B, I)
    initial: list[Tensor],  # (B, size)
    lengths: np.ndarray | None,  # (B,)
    reset: np.ndarray | None,  # (T, B)
    reverse: bool,
) -> tuple[Tensor, list[Tensor]]:
    if cell.half is not None:
        return _replay_halves(cell, cell.half, weights, x, initial, lengths, reset, reverse)
    steps, batch, _ = x.shape
    active, boundary, order = schedule(steps, batch, lengths, reset, reverse)
    running, anew = (torch.from_numpy(mask).to(x.device)[..., None] for mask in (active, boundary))
    from_input = nn.functional.linear(x, weights.ih, weights.bias_ih)
    step, count, states = _step(cell), len(cell.gates), initial
    y: list[Tensor] = [x] * steps
    for t in order:
        if boundary[t].any():
            states = [torch.where(anew[t], s0, s) for s0, s in zip(initial, states)]
        from_output = nn.functional.linear(states[cell.operand], weights.hh, weights.bias_hh)
        by_gate = (product.chunk(count, -1) for product in (from_input[t], from_output))
        new = list(step(**cell.step_arguments(by_gate, states, weights.vectors)))
        if weights.hr is not None:
            new[0] = nn.functional.linear(new[0], weights.hr)
        y[t] = new[0]
        if active[t].all():
            states = new
        else:
            y[t] = torch.where(running[t], y[t], 0)
            states = [torch.where(running[t], n, s) for n, s in zip(new, states)]
    return torch.stack(y), states


def _replay_halves(
    cell: Cell,
    half: Cell,
    weights: Weights,
    x: Tensor,
    initial: list[Tensor],
    lengths: np.ndarray | None,
    reset: np.ndarray | None,
    reverse: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Each step as two of half of it, as :class:`fusedlstm.directions.TwoProducts` runs it."""
    halves = half_states(cell, initial, initial[0], torch.zeros_like(initial[0]))
    y, final = _replay_direction(
        half, weights, x.repeat_interleave(2, 0), list(halves),
        None if lengths is None else 2 * lengths, None if reset is None else half_reset(reset), reverse,
    )  # fmt: skip
    found = dict(zip(half.states, final))
    return y[second_halves(reverse)], [found[name] for name in cell.states]


# --- The operators ---------------------------------------------------------------------------------------

_SHARED = (
    "Tensor x, Tensor[] initial, Tensor[] weights, Tensor? lengths, Tensor? reset, str cell, int directions"
)
_layer = torch.library.custom_op(
    "fusedlstm::layer", _forward, mutates_args=(), schema=f"({_SHARED}, bool training) -> Tensor[]"
)
_layer_backward = torch.library.custom_op(
    "fusedlstm::layer_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor[] grads, Tensor handle, Tensor y, {_SHARED}) -> Tensor[]",
)


@_layer.register_fake
def _(x, initial, weights, lengths, reset, cell, directions, training):  # type: ignore[no-untyped-def]
    results = _empty_results(x, _shape(x, weights, cell, directions))
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
    watched = torch.is_grad_enabled() or not _plain([x, *grads[:-1], *rest])
    dx, *others = _call("layer_backward", *args) if watched else _backward(*args, wants_x)
    return dx, others[: ctx.states], others[ctx.states :], None, None, None, None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grads, _, y, x, initial, weights, lengths, reset, ctx.cell, ctx.directions = inputs
    ctx.counts = len(grads), len(initial)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lengths, reset, y, x, *grads, *initial, *weights)


def _second_gradient(ctx: Any, seeds: list[Tensor | None], wants_x: bool) -> Any:
    """The gradient of `_backward`."""
    lengths, reset, y, x, *rest = ctx.saved_tensors
    first, second = ctx.counts[0], sum(ctx.counts)
    grads, initial, weights = rest[:first], rest[first:second], rest[second:]
    shape = _shape(x, weights, ctx.cell, ctx.directions)
    ends, marks = _host_lengths(lengths, shape.steps), None if reset is None else reset.cpu().numpy()
    given = [seed for seed in seeds if seed is not None]
    known = x.is_cpu and shape.batch and shape.cell.half is None and shape.cell.operand == 0
    if known and not torch.is_grad_enabled() and _plain([y, x, *rest, *given]):
        dgrads, dx, dinitial, dweights = _run_second(
            grads, y, x, initial, weights, seeds, ends, marks, shape, wants_x
        )
    else:
        dgrads, dx, dinitial, dweights = _replay_second(grads, x, initial, weights, seeds, ends, marks, shape)
    return dgrads, None, None, dx, dinitial, dweights, None, None, None, None


def _run_second(
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    seeds: list[Tensor | None],  # of the gradients of x, of the initial states and of the weights
    lengths: np.ndarray | None,
    reset: np.ndarray | None,
    shape: _Shape,
    wants_x: bool,
) -> tuple[list[Tensor], Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of `grads`, x, the initial states and the weights, by kernels."""
    moved_x, *moved = seeds
    each = len(weights) // shape.directions

    def of(d: int, states: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if state is None else state[d] for state in states]

    results = []
    for d in range(shape.directions):
        part, own = slice(d * shape.outputs, (d + 1) * shape.outputs), slice(d * each, (d + 1) * each)
        results.append(
            _second_order().second_backward(
                shape.cell, x, y[..., part], of(d, initial),
                storage.unflatten(shape.cell, weights[own]),
                grads[0][..., part], [state[d] for state in grads[1:]],
                moved_x, of(d, moved[: len(initial)]),
                storage.unflatten(shape.cell, moved[len(initial) :][own]), lengths, reset, d == 1, wants_x,
            )
        )  # fmt: skip
    dy, dfinal, dx, dinitial, dweights = zip(*results)
    return (
        [torch.cat(dy, -1), *map(torch.stack, zip(*dfinal))],
        sum(dx[1:], dx[0]) if wants_x else None,
        list(map(torch.stack, zip(*dinitial))) if initial else [],
        [entry for each in dweights for entry in storage.flatten(each)],
    )


def _replay_second(
    grads: list[Tensor],
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    seeds: list[Tensor | None],
    lengths: np.ndarray | None,
    reset: np.ndarray | None,
    shape: _Shape,
) -> Any:
    """What `_run_second` computes, by replaying the layer."""

    def gradient(grads: list[Tensor], x: Tensor, initial: list[Tensor], weights: list[Tensor]) -> Any:
        def layer(x: Tensor, initial: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
            return _replay(x, initial, weights, lengths, reset, shape)

        dx, dinitial, dweights = torch.func.vjp(layer, x, initial, weights)[1](grads)
        return [dx, *dinitial, *dweights]

    parts = [x, *initial, *weights]
    given = [torch.zeros_like(part) if seed is None else seed for part, seed in zip(parts, seeds)]
    return torch.func.vjp(gradient, grads, x, initial, weights)[1](given)


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
                results[-1] = _handle([_records.get(int(call[-1])) for call in calls])[:, None]
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


def _apply(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: Cell,
    directions: int,
) -> list[Tensor]:
    """The output and the final states of one layer."""
    tensors = [x, *initial, *weights]
    gradients = torch.is_grad_enabled() and _wanted(tensors)
    args = (x, initial, weights, lengths, reset, cell.key, directions)
    if _plain(tensors):
        return (
            list(cast(Any, _Eager).apply(*args, *initial, *weights)) if gradients else _run(*args, False)[0]
        )
    return _call("layer", *args, gradients)[:-1]


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a short sequence.

    Tensors that want a gradient must be arguments by themselves, so lists are given once more, flat.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Any:
        inputs: Any = (x, *args[:6], True)
        results = _forward(*inputs)
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


def _plain(tensors: list[Tensor]) -> bool:
    """Whether nobody watches what is done with these tensors, so that the dispatcher has no part in it."""
    return (
        not torch.compiler.is_compiling()
        and not _transforming()
        and not torch._C._len_torch_dispatch_stack()
        and _TENSORS.issuperset(map(type, tensors))
    )


# --- Modules ---------------------------------------------------------------------------------------------


class _Stack(nn.Module):
    """What layers share; their parameters are named by `_all_weights`, for each direction of each layer.

    Call as ``torch.nn``'s layers, with two more arguments:

        lengths: (B,) integers from 1 to T, in any order and on any device: sequences end there.  Outputs past
            the end are zero, the final state is that at the end, and a reverse direction starts there.
        reset: (T, B), or (B, T) if batch_first, or (T,), booleans: where true, the state goes back to the
            initial one before that step.  A reverse direction goes back at the same boundary.
    """

    cell: Cell
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]

    def forward(
        self,
        input: Tensor | PackedSequence,  # (T, B, I), (B, T, I) or (T, I)
        hx: Tensor | tuple[Tensor, ...] | None = None,  # (L*D, B, P), others (L*D, B, H)
        *,
        lengths: Tensor | Sequence[int] | None = None,  # (B,)
        reset: Tensor | None = None,  # (T, B), (B, T) or (T,)
    ) -> Any:
        """Output and final state, as ``torch.nn`` shapes them.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, lengths, reset)
        weights = self._weights()
        weight = weights[0][0]
        self._check_input(input, weight)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if x.size(0) == 0:
            raise RuntimeError(f"input must have one time step at least, got the shape {tuple(input.shape)}")
        states = [] if hx is None else self._check_state(hx, x.size(1), batched, weight)
        if lengths is not None:
            lengths = self._check_lengths(lengths, x.size(1), batched)
        if reset is not None:
            reset = self._check_reset(reset, input.shape[:-1], batched)
        y, final = self._run(x, states, weights, lengths, reset)
        if not batched:
            y, final = y.squeeze(1), [part.squeeze(1) for part in final]
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, tuple(final) if len(final) > 1 else final[0]

    def _weights(self) -> list[list[Tensor]]:
        """Of each layer, those of both directions one after the other."""
        names = self._all_weights
        if self.bidirectional:
            names = [there + back for there, back in zip(names[::2], names[1::2])]
        return [_parameters(self, own) for own in names]

    def _run(
        self,
        x: Tensor,
        states: list[Tensor],
        weights: list[list[Tensor]],
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The output (T, B, D*P) and the final states of all layers."""
        directions = 2 if self.bidirectional else 1
        cell, results = self.cell, []
        given = x.dtype
        for level, used in enumerate(weights):
            if len(weights) == 1:
                own = states
            else:
                own = [part[level * directions : (level + 1) * directions] for part in states]
            if level and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            if not (x.dtype is used[0].dtype and x.dtype in _NUMPY):
                x, own, used = _converted(x, own, used)
            x, *final = _apply(x, own, used, lengths, reset, cell, directions)
            results.append(final)
        final = results[0] if len(results) == 1 else [torch.cat(parts) for parts in zip(*results)]
        return _as_results(x, final, given, self._autocasts or x.is_cuda)

    def _run_packed(self, packed: PackedSequence, hx: Any, lengths: Any, reset: Any) -> Any:
        if lengths is not None or reset is not None:
            raise ValueError("a PackedSequence has lengths of its own, and cannot be reset: pad it instead")
        padded, ends = pad_packed_sequence(packed)
        weights = self._weights()
        self._check_input(padded, weights[0][0])
        states = [] if hx is None else self._check_state(hx, padded.shape[1], True, weights[0][0])
        y, final = self._run(padded, states, weights, ends, None)
        order = packed.sorted_indices
        if order is not None:
            y, ends = y.index_select(1, order), ends[order.cpu()]
        data = pack_padded_sequence(y, ends).data
        output = PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)
        return output, tuple(final) if len(final) > 1 else final[0]

    _autocasts = True  # whether autocast gives its type to the results, on a CPU too

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        if x.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead, with the "
                f"shape {tuple(x.shape)}"
            )
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]} "
                f"in the shape {tuple(x.shape)}"
            )
        _check_dtype(x, weight)

    def _check_state(self, hx: Any, batch: int, batched: bool, weight: Tensor) -> list[Tensor]:
        """The states as (L*D, B, size) each."""
        names = self.cell.states
        parts = (hx,) if len(names) == 1 else hx
        if not isinstance(parts, (tuple, list)) or len(parts) != len(names):
            raise TypeError(f"hx must be a tuple ({', '.join(names)}), got {_described(hx)}")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        leading, size = (rows, batch) if batched else (rows,), self.proj_size or self.hidden_size
        shape = (*leading, size)
        for n, part in enumerate(parts):
            label = "hx" if len(names) == 1 else f"hidden[{n}]"
            if not isinstance(part, Tensor):
                raise TypeError(f"{label} must be a tensor, got {_described(part)}")
            if part.shape != shape:
                raise RuntimeError(f"Expected {label} size {shape}, got {tuple(part.shape)}")
            _check_dtype(part, weight, label)
            shape = (*leading, self.hidden_size)  # of all states but the output
        return list(parts) if batched else [part.unsqueeze(1) for part in parts]

    def _check_lengths(self, lengths: Any, batch: int, batched: bool) -> Tensor:
        if not batched:
            raise ValueError(
                "lengths needs an input with a batch axis; cut one sequence to its length instead"
            )
        given: Tensor = torch.as_tensor(lengths)
        if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype is torch.bool:
            raise TypeError(f"lengths must be integers, got {given.dtype}")
        if given.shape != (batch,):
            raise ValueError(
                f"lengths must have the shape ({batch},), one for each sequence, got {tuple(given.shape)}"
            )
        return given

    def _check_reset(self, reset: Any, shape: torch.Size, batched: bool) -> Tensor:
        """reset as (T, B)."""
        if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
            raise TypeError(f"reset must be a tensor of booleans, got {_described(reset)}")
        if reset.shape != shape:
            raise ValueError(
                f"reset must have the shape {tuple(shape)}, as input without its features, got "
                f"{tuple(reset.shape)}"
            )
        if not batched:
            return reset.unsqueeze(1)
        return reset.transpose(0, 1) if self.batch_first else reset


def _parameters(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """What these attributes are; a parametrization or a hook may have put anything there."""
    own, found = module._parameters, []
    for name in names:  # a loop can be traced
        parameter = own.get(name)  # quicker
        found.append(getattr(module, name) if parameter is None else parameter)
    return found


def _check_dtype(value: Tensor, weight: Tensor, label: str = "input") -> None:
    if value.dtype is weight.dtype and value.is_cpu and weight.is_cpu:
        return
    if value.dtype is not weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN {label} dtype ({value.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert {label}: {label}.to({weight.dtype}), or convert model: model.to({value.dtype})"
        )
    if value.device != weight.device:
        raise RuntimeError(f"{label} lies on {value.device}, but the weights on {weight.device}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    entries = f" of {len(value)} entries" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{entries}"


def _converted(
    x: Tensor, states: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All in the precision in which kernels compute: that of the weights, but float32 at least."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    return x.to(dtype), [part.to(dtype) for part in states], [weight.to(dtype) for weight in weights]


def _as_results(
    y: Tensor, final: list[Tensor], given: torch.dtype, autocasts: bool
) -> tuple[Tensor, list[Tensor]]:
    """Results of the type of the input, or of autocast's."""
    if y.dtype is torch.float64:
        return y, final
    if autocasts and torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(y.device.type):
        given = torch.get_autocast_dtype(y.device.type)
    return (y, final) if y.dtype is given else (y.to(given), [part.to(given) for part in final])


_MODES = {"LSTM": cells.lstm, "GRU": cells.gru, "RNN_TANH": cells.rnn_tanh, "RNN_RELU": cells.rnn_relu}


class _TorchStack(_Stack, nn.RNNBase):
    """A layer that PyTorch has: its parameters, settings and texts are PyTorch's own."""

    @property
    def cell(self) -> Cell:  # type: ignore[override]
        return _MODES[self.mode]

    def flatten_parameters(self) -> None:
        """Lay out the weights anew at the next call.

        Not needed but after a write to few entries of large weights that PyTorch does not see, through
        ``.data`` or NumPy: the layout that the kernels keep follows all else by itself.
        """
        for names in self._all_weights:
            _packed.pop(tuple(map(_identity, _parameters(self, names))), None)


class LSTM(_TorchStack):
    """``torch.nn.LSTM`` with fused kernels: the same arguments, parameters, shapes and results.

    See :class:`torch.nn.LSTM`, and :meth:`forward` for `lengths` and `reset`.

    Example:
        >>> lstm = LSTM(3, 5)
        >>> y, (h, c) = lstm(torch.zeros(7, 2, 3), lengths=[7, 4])
        >>> y.shape, h.shape, c.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.RNNBase.__init__(
            self, "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype,
        )  # fmt: skip


class GRU(_TorchStack):
    """``torch.nn.GRU`` with fused kernels, as :class:`LSTM` is ``torch.nn.LSTM``."""

    _autocasts = False  # as PyTorch's

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.RNNBase.__init__(
            self, "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype,
        )  # fmt: skip


class RNN(_TorchStack):
    """``torch.nn.RNN`` with fused kernels, as :class:`LSTM` is ``torch.nn.LSTM``."""

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        mode = f"RNN_{_check_nonlinearity(nonlinearity).upper()}"
        nn.RNNBase.__init__(
            self, mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


def _check_nonlinearity(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
    return nonlinearity


class Recurrent(_Stack):
    """A stack of recurrent layers that run any cell.

    Parameters are named as in ``torch.nn.LSTM``, and the learned vectors of the cell likewise (``p_i_l0``).

    Args:
        cell: what :func:`fusedlstm.cell` made of a function, or one of :mod:`fusedlstm.cells`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size: as
            ``torch.nn.LSTM``'s.  A projection needs a cell that does not read its own output.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for an argument that is none of the above.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        # the arguments are looked at, and the parameters named and measured, where the array layers do it
        plan = layers.Recurrent(
            cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        )
        _cells[cell.key] = cell
        self.cell, self.input_size, self.hidden_size = cell, plan.input_size, plan.hidden_size
        self.num_layers, self.bias, self.batch_first = plan.num_layers, plan.bias, plan.batch_first
        self.dropout, self.bidirectional, self.proj_size = plan.dropout, plan.bidirectional, plan.proj_size
        self._all_weights = [storage.flatten(names) for names in plan._names]
        for name, shape in plan._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _cells[self.cell.key] = self.cell

    def reset_parameters(self) -> None:
        """Draw all parameters evenly between -1 and 1, divided by the root of hidden_size."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        shown = [self.cell.name, str(self.input_size), str(self.hidden_size)]
        for name, default in _DEFAULTS.items():
            if (value := getattr(self, name)) != default:
                shown.append(f"{name}={value}")
        return ", ".join(shown)


_DEFAULTS = {
    "proj_size": 0,
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
}


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Single(nn.RNNCellBase):
    """What cells share: one step of one layer; the parameters are PyTorch's."""

    _cell: Cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # (B, I) or (I,); (B, H) or (H,) each
        """The new state, as ``torch.nn`` shapes it.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}"
            )
        weights = _parameters(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])
        _check_dtype(input, weights[0])
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input[None, None]
        states = [] if hx is None else self._check_state(hx, x.shape[1], batched, weights[0])
        if not (x.dtype is weights[0].dtype and x.dtype in _NUMPY):
            x, states, weights = _converted(x, states, weights)
        y, *final = _apply(x, states, weights, None, None, self._cell, 1)
        _, final = _as_results(y, final, input.dtype, y.is_cuda)
        final = [part.squeeze(0) if batched else part[0, 0] for part in final]
        return tuple(final) if len(final) > 1 else final[0]

    def _check_state(self, hx: Any, batch: int, batched: bool, weight: Tensor) -> list[Tensor]:
        """The states as (1, B, H) each."""
        names = self._cell.states
        parts = (hx,) if len(names) == 1 else hx
        if not isinstance(parts, (tuple, list)) or len(parts) != len(names):
            raise TypeError(f"hx must be a tuple ({', '.join(names)}), got {_described(hx)}")
        states = []
        for n, part in enumerate(parts):
            label = "hidden" if len(names) == 1 else f"hx[{n}]"
            if not isinstance(part, Tensor):
                raise TypeError(f"{label} must be a tensor, got {_described(part)}")
            if part.dim() not in (1, 2):
                raise ValueError(
                    f"{type(self).__name__}: Expected {label} to be 1D or 2D, got {part.dim()}D instead"
                )
            if part.dim() != 1 + batched:
                raise RuntimeError(
                    f"{label} must have as many dimensions as input, {1 + batched}, got {part.dim()}"
                )
            if part.shape[-1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{n} has inconsistent hidden_size: got {part.shape[-1]}, "
                    f"expected {self.hidden_size}"
                )
            if batched and part.shape[0] != batch:
                raise RuntimeError(
                    f"Input batch size {batch} doesn't match hidden{n} batch size {part.shape[0]}"
                )
            _check_dtype(part, weight, label)
            states.append(part.unsqueeze(0) if batched else part[None, None])
        return states


class LSTMCell(_Single, nn.LSTMCell):
    """``torch.nn.LSTMCell`` with a fused kernel."""

    _cell = cells.lstm


class GRUCell(_Single, nn.GRUCell):
    """``torch.nn.GRUCell`` with a fused kernel."""

    _cell = cells.gru


class RNNCell(_Single, nn.RNNCell):
    """``torch.nn.RNNCell`` with a fused kernel."""

    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        return _MODES[f"RNN_{_check_nonlinearity(self.nonlinearity).upper()}"]


# --- Models that exist -----------------------------------------------------------------------------------

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_MARK = "_fusedlstm_accelerated"


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; prints as text.

    Attributes:
        replaced: names of the modules that our kernels run now, and what they are.
        skipped: names of the recurrent modules that were left as they are, and why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.skipped)} not"]
        lines += [f"  {name or 'the model itself'}: {text}" for name, text in self.replaced.items()]
        lines += [f"  {name or 'the model itself'}: left, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Let our kernels run every ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and cell of a model, in place.

    The modules stay the objects that they are and change their class: parameters, hooks, settings and
    everything that refers to them go on working.  :func:`restore` undoes it.

    Example:
        >>> print(accelerate(nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5))))
        1 replaced, 0 not
          1: LSTM(4, 5)
    """
    report = Report()
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_OURS)) or type(module) in _THEIRS:
            continue
        if reason := _obstacle(module):
            report.skipped[name] = reason
        else:
            module.__class__ = _OURS[cast("type[nn.Module]", type(module))]
            module.__dict__[_MARK] = True
            report.replaced[name] = repr(module)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`accelerate`; the names of the modules that are PyTorch's again.

    Raises:
        TypeError: if a module has become another class since; then nothing is changed.
    """
    marked = {name: module for name, module in model.named_modules() if _MARK in module.__dict__}
    for name, module in marked.items():
        if type(module) not in _THEIRS:
            raise TypeError(
                f"{name or 'the model itself'} has become a {type(module).__name__} since: undo that first, "
                "a parametrization with torch.nn.utils.parametrize.remove_parametrizations"
            )
    for module in marked.values():
        del module.__dict__[_MARK]
        module.__class__ = _THEIRS[cast("type[nn.Module]", type(module))]
    return list(marked)


def _obstacle(module: Any) -> str | None:
    """Why a recurrent module cannot be run by our kernels, if it cannot."""
    if type(module) not in _OURS:
        return f"{type(module).__name__} is a class of its own, which may do something else"
    for name, parameter in module.named_parameters():
        if parameter.dtype not in _NUMPY:
            return f"{name} is {parameter.dtype}, and the kernels compute in float32 or float64"
        if parameter.device.type not in ("cpu", "cuda"):
            return f"{name} lies on {parameter.device}, and the kernels run on CPUs and CUDA devices"
    return None
