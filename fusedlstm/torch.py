"""PyTorch: modules with the arguments, parameters and results of ``torch.nn``'s, run by our kernels.

:class:`LSTM`, :class:`GRU`, :class:`RNN` and their cells take the place of the modules of the same names;
:class:`Recurrent` runs any cell; :func:`accelerate` turns the modules inside a model into these.

One layer of a stack, both directions of it, is one operator, ``fusedlstm::layer``, and its gradient is
another, ``fusedlstm::layer_backward``; stacking and dropout are PyTorch's.  Gradients of gradients and
tangents replay the layer with PyTorch's own operators; graphs that leave Python get PyTorch's own layers.
Sizes in the comments and docstrings:

    T  time steps        I  input_size          L  num_layers
    B  batch             H  hidden_size         D  directions: 2 if bidirectional, else 1
                         P  size of the output: proj_size if there is a projection, else H
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple, cast

import numpy as np

from .frameworks import missing

try:
    import torch
except ImportError as error:
    raise missing(__name__, error) from error

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit import TracerWarning  # type: ignore[attr-defined]
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import cells, dispatch, layers
from . import weights as storage
from .cells import Cell
from .derive import compile_source
from .dispatch import Direction, TwiceDifferentiable
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

_TYPE_AND_BYTES = attrgetter("dtype", "nbytes")
_autocasting = torch._C._is_any_autocast_enabled
_NUMPY = {torch.float32: np.dtype("float32"), torch.float64: np.dtype("float64")}  # what kernels compute in
# By key, since an operator takes a text, not a cell.  Entries are made before anything is traced.
_cells: dict[str, Cell] = {cell.key: cell for cell in (cells.lstm, cells.gru, cells.rnn_tanh, cells.rnn_relu)}


# --- Weights as the kernels want them --------------------------------------------------------------------


class Export:
    """A tensor on the host as NumPy imports it: ``numpy.from_dlpack(Export(tensor))``, to be read.

    The array keeps the storage, but not where it lies: whoever resizes the storage moves it.  `Tensor.numpy`
    would forbid that for good, and FSDP does it after each use of a weight; PyTorch's own DLPack takes
    three times as long.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        # a negative one has a mark that the numbers are meant with the other sign
        self.tensor = tensor.resolve_neg() if tensor.is_neg() else tensor

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def _array(tensor: Tensor) -> Any:
    """The tensor's memory as a NumPy or CuPy array, to be read; the last axis is contiguous."""
    if not tensor.is_contiguous() and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.is_cuda:
        import cupy

        return cupy.asarray(tensor.detach().resolve_neg())
    return np.from_dlpack(Export(tensor))


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
    device: int  # number of the GPU; -1 is the host
    places: list[Any]  # where and how they lie
    arrays: list[Any]  # their storage, so that nothing else lies there as long as nobody resizes it
    table: np.ndarray | None  # where to look at it, (n, 2); none on a GPU
    sparse: int  # for few rows one block of numbers in so many is looked at
    stamps: dict[int, list[Any]]  # by how much was looked at
    direction: Direction


_packed: dict[tuple[Any, ...], _Packed] = {}  # by the identities of the weights, until one of them goes
_LOOKED_AT = 1 << 16  # numbers of large weights that are looked at: more would push others out of the cache
_MANY_ROWS = 1024  # for so many rows all numbers are: that takes a few per cent of what the products take


def _direction(weights: Sequence[Tensor], x: Tensor, shape: _Shape, d: int) -> Direction:
    """Direction d of a layer with these weights, as they are now, to be run on x.

    What was laid out is used again if the tensors are the same, or views of the same, contiguous in one of
    both orders, lie where they lay, and have the same version counters and the same bits.  The bits are for
    what the counters do not see: a write to ``weight.data``, or to memory shared with NumPy.  On a GPU it is
    the counters alone.
    """
    known = _packed.get(tuple(map(id, weights))) or _packed.get(tuple(map(_identity, weights)))
    if (
        known is not None
        and known.cell is shape.cell
        and known.sizes == shape.layer
        and known.device == x.get_device()
        and weights[0].dtype is x.dtype
        and known.places == _places(weights)
        and known.stamps.get(every := 1 if shape.steps * shape.batch >= _MANY_ROWS else known.sparse)
        == _stamp(known.table, weights, every)
    ):
        return known.direction
    return _pack(weights, x, shape, d)


def _owner(weight: Tensor) -> Tensor:
    """The tensor that the weight is, or is a view of."""
    return weight if weight._base is None else weight._base


def _identity(weight: Tensor) -> Any:
    """What is equal for the same weight; views are new objects each time."""
    return id(weight) if weight._base is None else (id(weight._base), weight.shape, weight.stride())


def _places(weights: Sequence[Tensor]) -> list[Any]:
    """Where weights lie, and how the two matrices do: they may be given other data at the same place.

    With the sizes that are compared beside it, this tells a matrix from its transpose and from another one,
    from a part of it, and from the same bits as another type.
    """
    matrices = map(Tensor.stride, weights[:2])
    return [*map(Tensor.data_ptr, weights), *map(_TYPE_AND_BYTES, weights), *matrices]


def _pack(weights: Sequence[Tensor], x: Tensor, shape: _Shape, d: int) -> Direction:
    cell, sizes, key = shape.cell, shape.layer, tuple(map(_identity, weights))
    _check(_named_weights(cell, weights, sizes, d), x)
    owners, places = list(map(_owner, weights)), _places(weights)
    weights = [weight.detach() for weight in weights]  # whose arrays do not keep the tensors themselves
    engine = dispatch.engine(x.device.type)
    own = storage.unflatten(cell, [_array(weight.contiguous()) for weight in weights])
    dense = [weight if weight.is_contiguous() else weight.t() for weight in weights]
    if not all(weight.is_contiguous() for weight in dense):  # what would be looked at is a copy
        return engine.prepare(cell, own)
    arrays = [_array(weight) for weight in dense]
    table = None if x.is_cuda else _bits().table(arrays)
    sparse = 1 + sum(weight.numel() for weight in weights[:2]) // _LOOKED_AT
    stamps = {every: _stamp(table, weights, every) for every in {1, sparse}}
    direction = engine.prepare(cell, own)

    def drop(reference: Any) -> None:
        if (entry := _packed.get(key)) is not None and any(owner is reference for owner in entry.owners):
            del _packed[key]

    references = [weakref.ref(owner, drop) for owner in owners]
    _packed[key] = _Packed(
        cell, references, sizes, x.get_device(), places, arrays, table, sparse, stamps, direction
    )
    return direction


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


# --- What is known of one layer ---------------------------------------------------------------------------


class _Given(NamedTuple):
    """What the tapes of a forward pass depend on: backward must be given the same."""

    shape: _Shape
    states: int  # initial ones; none is zero
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        shape, (inputs, hidden, outputs) = self.shape, self.shape.layer
        sizes = f"T={shape.steps}, B={shape.batch}, I={inputs}, H={hidden}, P={outputs}"
        return f"{sizes}, {self.states} initial states, {self.dtype} on {self.device}"


@dataclass(eq=False)
class _Record:
    """What backward needs of one forward pass."""

    given: _Given
    directions: list[Direction]
    places: list[list[Any]]  # of the weights of each direction
    tapes: list[Any]


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

        from fusedlstm.kernels.cuda.launch import stream_at

        number, stream = x.device.index, torch.cuda.current_stream(x.device)
        with cupy.cuda.Device(number), stream_at(stream.cuda_stream, number):
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

    @property
    def input(self) -> tuple[int, int, int]:
        """Shape of the input."""
        return self.steps, self.batch, self.layer.inputs

    @property
    def sizes(self) -> list[int]:
        """Of the states."""
        return [self.outputs, *[self.hidden] * (len(self.cell.states) - 1)]

    @lazy
    def states(self) -> list[tuple[int, int, int]]:
        """Shapes of the states."""
        return [(self.directions, self.batch, size) for size in self.sizes]

    @lazy
    def results(self) -> list[tuple[int, int, int]]:
        """Shapes of the output and of the final states."""
        return [(self.steps, self.batch, self.directions * self.outputs), *self.states]


def _shape(x: Tensor, weights: Sequence[Tensor], key: str, directions: int) -> _Shape:
    """The sizes of a layer, by which all else is measured.

    Raises:
        ValueError, RuntimeError: if these cannot be the input and the weights of a layer.
    """
    number = len(weights)
    if not number:
        raise ValueError("weights must be one matrix at least, got no tensors")
    second = weights[1].shape if number > 1 else None
    try:
        return _shape_of(x.shape, weights[0].shape, second, number, key, directions)
    except TypeError:  # symbols, of a graph that is compiled for any size, have no hash
        return _shape_of.__wrapped__(x.shape, weights[0].shape, second, number, key, directions)


@lru_cache(1024)
def _shape_of(
    x: torch.Size, ih: torch.Size, second: torch.Size | None, weights: int, key: str, directions: int
) -> _Shape:
    cell = _cells.get(key)
    if cell is None:
        raise ValueError(f"cell must be the key of a cell that a module has been made of, got {key!r}")
    least, most = (2, 5) if cell.gates_with_recurrent else (1, 2)
    each, more = divmod(weights, directions) if directions in (1, 2) else (0, 1)
    if more or not least <= each - len(cell.weights) <= most:
        raise ValueError(
            f"weights must be those of 1 or 2 directions, each {least} to {most} and {len(cell.weights)} "
            f"vectors of the cell {cell.name}, got {weights} for {directions} directions"
        )
    matrices = [ih] if second is None or not cell.gates_with_recurrent else [ih, second]
    if len(x) != 3 or any(len(matrix) != 2 for matrix in matrices):
        raise RuntimeError(
            "input must have 3 dimensions and the matrices of weights 2, got the shapes "
            f"{', '.join(str(tuple(shape)) for shape in (x, *matrices))}"
        )
    hidden = ih[0] // len(cell.gates_with_input)
    if not hidden:
        raise RuntimeError(f"weight_ih must have rows for each gate of the cell, got the shape {tuple(ih)}")
    outputs = hidden if len(matrices) == 1 else matrices[1][1]
    return _Shape(cell, directions, x[0], x[1], _Sizes(x[2], hidden, outputs))


def _empty_results(x: Tensor, shape: _Shape) -> list[Tensor]:
    return [x.new_empty(sizes) for sizes in shape.results]


# --- What kernels may be given: they work on addresses, so that anything else would be a crash -------------

_STRIDED = torch.strided
_Named = tuple[str, Tensor, Sequence[int]]  # an argument, and the shape that it must have


def _check_forward(x: Tensor, initial: list[Tensor], weights: list[Tensor], shape: _Shape) -> None:
    """Refuse an input and states that do not fit the weights, which are looked at in `_direction`.

    Raises:
        RuntimeError, TypeError: for the first that does not fit; it names the argument.
    """
    if not shape.steps:
        raise RuntimeError(f"input must have one time step at least, got the shape {tuple(x.shape)}")
    dtype = x.dtype
    # what `_check` would find, in little time
    fits = dtype in _NUMPY and x.layout is _STRIDED and x.is_cpu and x.data_ptr() != 0
    if initial:
        for part in initial:
            fits = fits and part.dtype is dtype and part.layout is _STRIDED
            fits = fits and part.is_cpu and part.data_ptr() != 0
        fits = fits and [part.shape for part in initial] == shape.states
    if not fits:
        _check(_named(x, initial, weights, shape), x)


def _check_backward(
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    shape: _Shape,
    record: _Record | None,
) -> None:
    """Refuse arguments that do not fit each other, or the forward pass.

    Raises:
        RuntimeError, TypeError: for the first that does not fit; it names the argument.
    """
    now = _Given(shape, len(initial), x.dtype, x.device)
    if record is not None and record.given != now:
        raise RuntimeError(
            "input, states or weights have been given other data between forward and backward: there were "
            f"{record.given}; there are {now}"
        )
    tensors = [y, *grads, x, *initial, *weights]
    _, each = _expected(shape.cell, len(weights) // shape.directions, shape.layer)
    shapes = [
        shape.results[0],
        *shape.results,
        shape.input,
        *(shape.states if initial else ()),
        *each * shape.directions,
    ]
    fits = x.dtype in _NUMPY and [tensor.shape for tensor in tensors] == shapes  # as above
    for tensor in tensors:
        fits = fits and tensor.dtype is x.dtype and tensor.layout is _STRIDED
        fits = fits and tensor.is_cpu and tensor.data_ptr() != 0
    if not fits:
        _check([*_named(x, initial, weights, shape), *_named_results(y, grads, shape.results)], x)


def _check(named: Iterable[_Named], like: Tensor) -> None:
    """Refuse tensors of another shape than is said, or of another type or device than `like`.

    Raises:
        RuntimeError, TypeError: for the first; it names the argument.
    """
    for name, tensor, shape in named:
        if tensor.shape != tuple(shape):
            raise RuntimeError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype is not like.dtype:
            raise RuntimeError(f"{name} must be {like.dtype}, as what it goes with, got {tensor.dtype}")
        if tensor.dtype not in _NUMPY:
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if tensor.device != like.device:
            raise RuntimeError(f"{name} must lie on {like.device}, as what it goes with, got {tensor.device}")
        if not (tensor.is_cpu or tensor.is_cuda):
            raise RuntimeError(f"{name} lies on {tensor.device}, and kernels run on CPUs and CUDA devices")
        if tensor.layout is not _STRIDED:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
        if tensor.numel() and not tensor.data_ptr():
            raise RuntimeError(f"{name} has no memory: its storage has been freed, or not been allocated yet")


def _named(x: Tensor, initial: list[Tensor], weights: Sequence[Tensor], shape: _Shape) -> list[_Named]:
    """What a layer is given."""
    if len(initial) not in (0, len(shape.states)):
        names = ", ".join(shape.cell.states)
        raise RuntimeError(f"initial must have the states {names}, or none, got {len(initial)}")
    each = len(weights) // shape.directions
    labels = [f"initial state {name}" for name in shape.cell.states]
    return [
        ("input", x, shape.input),
        *zip(labels, initial, shape.states),
        *_named_weights(shape.cell, weights[:each], shape.layer, 0),
        *(_named_weights(shape.cell, weights[each:], shape.layer, 1) if shape.directions == 2 else ()),
    ]


def _named_weights(cell: Cell, weights: Sequence[Tensor], sizes: _Sizes, d: int) -> list[_Named]:
    """The weights of direction d."""
    names, shapes = _expected(cell, len(weights), sizes)
    return [(name + d * "_reverse", weight, shape) for name, weight, shape in zip(names, weights, shapes)]


@lru_cache(1024)
def _expected(cell: Cell, number: int, sizes: _Sizes) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and shapes of the weights of one direction."""
    own, (inputs, hidden, outputs) = storage.unflatten(cell, [True] * number), sizes
    bias, proj = own.bias_ih is not None, 0 if own.hr is None else outputs
    names = storage.flatten(storage.names(cell, 0, False, bias, proj > 0))
    shapes = storage.flatten(storage.shapes(cell, inputs, hidden, bias, proj))
    return [name.removesuffix("_l0") for name in names], shapes


def _named_results(y: Tensor, grads: list[Tensor], expected: list[tuple[int, int, int]]) -> list[_Named]:
    """The output of a layer, and the gradients of all its results."""
    if len(grads) != len(expected):
        raise RuntimeError(f"grads must be those of {len(expected)} results, got {len(grads)}")
    named = [(f"grads[{n}]", grad, shape) for n, (grad, shape) in enumerate(zip(grads, expected))]
    return [("y", y, expected[0]), *named]


def _host_lengths(lengths: Tensor | None, shape: _Shape) -> np.ndarray | None:
    """A copy on the host, which nobody else writes once it has been checked."""
    if lengths is None:
        return None
    if not _integral(lengths):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (shape.batch,):
        raise ValueError(f"lengths must have the shape ({shape.batch},), got {tuple(lengths.shape)}")
    host: np.ndarray = lengths.to("cpu", torch.int64, copy=True).contiguous().numpy()
    _check_range(host, shape.steps)
    return host


def _check_range(lengths: np.ndarray, steps: int) -> None:
    if lengths.size and (lengths.min() < 0 or lengths.max() > steps):
        raise ValueError(f"lengths must be from 0 to {steps}, got {lengths.min()} to {lengths.max()}")


def _flags(reset: Tensor | None, shape: _Shape, device: torch.device | str) -> Tensor | None:
    """A copy of reset on a device."""
    if reset is None:
        return None
    if reset.dtype is not torch.bool:
        raise TypeError(f"reset must be booleans, got {reset.dtype}")
    if reset.shape != (shape.steps, shape.batch):
        expected = (shape.steps, shape.batch)
        raise ValueError(f"reset must have the shape {expected}, got {tuple(reset.shape)}")
    return reset.to(device, copy=True).contiguous()


def _integral(values: Tensor) -> bool:
    dtype = values.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _masks(lengths: Tensor | None, reset: Tensor | None, x: Tensor, shape: _Shape) -> tuple[Any, Any]:
    """lengths and reset as the kernels take them, in memory that nobody else writes."""
    host, flags = _host_lengths(lengths, shape), _flags(reset, shape, x.device)
    marks = None if flags is None else _array(flags)
    if x.is_cuda and host is not None:
        import cupy

        return cupy.asarray(host), marks
    return host, marks


# --- One layer, forward and backward ---------------------------------------------------------------------


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
    _check_forward(x, initial, weights, shape)
    if not shape.batch:
        _check(_named(x, initial, weights, shape), x)
        _masks(lengths, reset, x, shape)
        return _empty_results(x, shape), None
    if x.is_cuda:
        with _on_stream(x):
            return _fill(x, initial, weights, lengths, reset, shape, training)
    return _fill(x, initial, weights, lengths, reset, shape, training)


def _fill(
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: _Shape,
    training: bool,
) -> tuple[list[Tensor], _Record | None]:
    ends, marks = (None, None) if lengths is None and reset is None else _masks(lengths, reset, x, shape)
    source, (results, (y, *final)) = _array(x), _new(x, shape.results)
    given = [_array(part) for part in initial]
    record = _Record(_Given(shape, len(initial), x.dtype, x.device), [], [], []) if training else None
    each = len(weights) // shape.directions
    for d in range(shape.directions):
        own = weights[d * each : (d + 1) * each]
        direction = _direction(own, x, shape, d)
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
        if record is not None:
            record.directions.append(direction)
            record.places.append(_places(own))
            record.tapes.append(_bound(tape, None, None))  # whoever calls backward brings x and y
    return results, record


def _new(like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Any]]:
    """New tensors, and their memory to be written."""
    if like.is_cuda:
        tensors = [like.new_empty(shape) for shape in shapes]
        return tensors, [_array(tensor) for tensor in tensors]
    dtype = _NUMPY[like.dtype]
    arrays = [np.empty(shape, dtype) for shape in shapes]  # quicker than tensors
    return [torch.from_numpy(array) for array in arrays], arrays


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
    if handle.shape != (1,):
        raise RuntimeError(
            f"handle must have the shape (1,), as the layer gave it, got {tuple(handle.shape)}"
        )
    record, shape = _records.get(int(handle)), _shape(x, weights, cell, directions)
    _check_backward(grads, y, x, initial, weights, shape, record)
    if not shape.batch:
        return [torch.zeros_like(part) for part in (x, *initial, *weights)]
    if record is None:
        (y, *_), record = _run(x, initial, weights, lengths, reset, cell, directions, True)
    with _on_stream(x):
        return _run_backward(cast(_Record, record), grads, y, x, weights, shape, wants_x)


def _run_backward(
    record: _Record,
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    weights: list[Tensor],
    shape: _Shape,
    wants_x: bool,
) -> list[Tensor | None]:
    source, output = _array(x), _array(y)
    (dx,), (target,) = _new(x, [shape.input]) if wants_x else ([None], [None])
    dy, *dfinal = map(_array, grads)
    dinitial, dweights = [], []
    each = len(weights) // shape.directions
    for d, (direction, tape) in enumerate(zip(record.directions, record.tapes)):
        own = weights[d * each : (d + 1) * each]
        if record.places[d] != _places(own):  # what was laid out may lie in memory that is no longer there
            direction = _direction(own, x, shape, d)
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
    if not record.given.states:
        return [dx, *dweights]
    return [dx, *[torch.stack(parts) for parts in zip(*dinitial)], *dweights]


# --- The same with PyTorch's operators, for gradients of gradients and for tangents ----------------------


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


def _replay(
    x: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: _Shape,
) -> list[Tensor]:
    """What `_forward` computes, without the handle."""
    if lengths is not None:
        _check_ends(lengths, shape.steps)
        lengths = lengths.to(x.device)
    if reset is not None:
        reset = reset.to(x.device)
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
    lengths: Tensor | None,  # (B,)
    reset: Tensor | None,  # (T, B)
    reverse: bool,
) -> tuple[Tensor, list[Tensor]]:
    steps = x.shape[0]
    running, anew = _schedule(steps, lengths, reset, reverse)
    from_input = nn.functional.linear(x, weights.ih, weights.bias_ih)
    step, states = _step(cell), initial
    y: list[Tensor] = [x] * steps
    for t in range(steps)[:: -1 if reverse else 1]:
        if anew is not None:
            states = [torch.where(anew[t], s0, s) for s0, s in zip(initial, states)]
        given = cell.step_arguments_of(from_input[t], states, weights, nn.functional.linear, torch.chunk)
        new = list(step(**given))
        if weights.hr is not None:
            new[0] = nn.functional.linear(new[0], weights.hr)
        if running is None:
            y[t], states = new[0], new
        else:
            y[t] = torch.where(running[t], new[0], 0)
            states = [torch.where(running[t], n, s) for n, s in zip(new, states)]
    return torch.stack(y), states


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


def _replay_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: _Shape,
) -> list[Tensor]:
    """What `_backward` computes, by replaying the layer."""

    def layer(x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        return _replay(x, initial, weights, lengths, reset, shape)

    dx, dinitial, dweights = torch.func.vjp(layer, x, list(initial), list(weights))[1](list(grads))
    return [dx, *dinitial, *dweights]


def _carry_tangents(tensors: Sequence[Tensor]) -> bool:
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
        _check_range(lengths.cpu().numpy(), steps)


# --- The same with PyTorch's layers, for graphs that leave Python ----------------------------------------

_PYTORCHS: dict[str, Any] = {
    cells.lstm.key: torch.lstm,
    cells.gru.key: torch.gru,
    cells.rnn_tanh.key: torch.rnn_tanh,
    cells.rnn_relu.key: torch.rnn_relu,
}
_RESTORE = "restore(model) gives back PyTorch's modules in the place of those that accelerate has changed"
# As PyTorch does for its own modules: the checks of sizes are not part of the graph.
warnings.filterwarnings("ignore", category=TracerWarning, module=r"fusedlstm\.torch")


def _leaves_python() -> bool:
    """Whether TorchScript or ONNX records what is called; they have PyTorch's operators only."""
    return torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export()


def _record(
    x: Tensor,  # (T, B, I)
    initial: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: Cell,
    directions: int,
) -> list[Tensor]:
    """What `_apply` returns."""
    if reset is not None:
        raise RuntimeError(
            "reset cannot be recorded by torch.jit.trace and torch.onnx.export, since PyTorch's layers have "
            f"no such argument: call the layer on each piece of the sequence; {_RESTORE}"
        )
    if lengths is None:
        return _record_layers((x,), x.shape[1], initial, weights, cell, directions)
    if torch._C._get_tracing_state() is None:
        raise RuntimeError(
            "lengths cannot be recorded by torch.onnx.export(dynamo=True), which has no packed sequences: "
            f"use dynamo=False; {_RESTORE}"
        )
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    y, *final = _record_packed(packed, initial, weights, cell, directions)
    padded, _ = pad_packed_sequence(packed._replace(data=y), total_length=x.shape[0])
    return [padded, *final]


def _record_packed(packed: PackedSequence, initial: list[Tensor], *rest: Any) -> list[Tensor]:
    """The data of the output, and the final states; `rest` as `_record_layers` takes it."""
    data, sizes, order, back = packed

    def select(states: list[Tensor], indices: Tensor | None) -> list[Tensor]:
        return states if indices is None else [part.index_select(1, indices) for part in states]

    y, *final = _record_layers((data, sizes), sizes[0], select(initial, order), *rest)
    return [y, *select(final, back)]


def _record_layers(
    source: tuple[Tensor, ...],  # the input (T, B, I), or data and batch sizes of packed sequences
    batch: Any,
    initial: list[Tensor],  # (L*D, B, size)
    weights: list[Tensor],  # of both directions of each layer
    cell: Cell,
    directions: int,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
) -> list[Tensor]:
    """The output and the final states, by the operator of PyTorch's module of the kind."""
    if cell.key not in _PYTORCHS:
        raise _no_operator(cell)
    rows, (ih, hh) = num_layers * directions, weights[:2]
    sizes = (hh.shape[1], ih.shape[0] // len(cell.gates_with_input))[: len(cell.states)]
    states = initial or [source[0].new_zeros((rows, batch, size)) for size in sizes]
    bias = storage.unflatten(cell, weights[: len(weights) // rows]).bias_ih is not None
    hx = states if len(states) > 1 else states[0]
    layout = (False,) if len(source) == 1 else ()  # not batch_first
    settings = (bias, num_layers, dropout, training, directions == 2, *layout)
    return list(_PYTORCHS[cell.key](*source, hx, weights, *settings))


def _no_operator(cell: Cell) -> RuntimeError:
    if cell.key in _PYTORCHS:
        return RuntimeError(
            "ONNX has no operator fusedlstm::layer: give torch.onnx.export the model, not a program that "
            f"torch.export has made of it; {_RESTORE}"
        )
    return RuntimeError(
        f"TorchScript and ONNX have no operator for the cell {cell.name!r}: for them, write it as a module "
        f"of PyTorch's operators, or put an LSTM, a GRU or an RNN in its place; {_RESTORE}"
    )


def _refuse_script(module: nn.Module) -> None:
    raise RuntimeError(
        f"torch.jit.script cannot compile {module}: {_RESTORE}; or use torch.jit.trace, or put a module of "
        "torch.nn with the same state_dict in its place"
    )


def _as_leaf(module: nn.Module, input: Any, hx: Any, **settings: Any) -> Any:
    """A call that torch.fx records as one node, as it does for the modules of ``torch.nn``.

    Raises:
        TypeError: if the input is no stand-in of torch.fx, so that it should have been a tensor, or if there
            is nothing around the module.
    """
    if not isinstance(input, torch.fx.Proxy):
        raise TypeError(f"input must be a tensor, got {_described(input)}")
    target = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not target:
        raise TypeError(f"torch.fx cannot trace inside {module}: trace a module that calls it")
    given = {"hx": hx, **settings}
    kwargs = {name: value for name, value in given.items() if value is not None}
    return input.tracer.create_proxy("call_module", target, (input,), kwargs)


# --- The operators ---------------------------------------------------------------------------------------

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
    _without_tangents(_forward),
    mutates_args=(),
    schema=f"({_SHARED}, bool training) -> Tensor[]",
)
_layer_backward = torch.library.custom_op(
    "fusedlstm::layer_backward",
    _without_tangents(_backward),
    mutates_args=(),
    schema=f"(Tensor[] grads, Tensor handle, Tensor y, {_SHARED}) -> Tensor[]",
)


@_layer.register_fake
def _(x, initial, weights, lengths, reset, cell, directions, training):  # type: ignore[no-untyped-def]
    if torch.onnx.is_in_onnx_export():
        raise _no_operator(_cells[cell])
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
    gradients: Sequence[Tensor | None]
    if not torch.is_grad_enabled() and _plain([x, *grads[:-1], *rest]):
        gradients = _backward(*args, wants_x)
    elif forward_ad._current_level >= 0:
        shape = _shape(x, weights, ctx.cell, ctx.directions)
        gradients = _replay_backward(grads[:-1], x, initial, weights, lengths, reset, shape)
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
    """The gradient of `_backward`."""
    lengths, reset, handle, y, x, *rest = ctx.saved_tensors
    first, second = ctx.counts[0], sum(ctx.counts)
    grads, initial, weights = rest[:first], rest[first:second], rest[second:]
    shape = _shape(x, weights, ctx.cell, ctx.directions)
    given = [seed for seed in seeds if seed is not None]
    if x.is_cpu and shape.batch and not torch.is_grad_enabled() and _plain([y, x, *rest, *given]):
        record = _records.get(int(handle))
        _check_backward(grads, y, x, initial, weights, shape, record)
        if record is None:
            args = (x, initial, weights, lengths, reset, ctx.cell, ctx.directions)
            (y, *_), record = _run(*args, True)
        dgrads, dx, dinitial, dweights = _run_second(
            cast(_Record, record), grads, y, x, initial, weights, seeds, shape, wants_x
        )
    else:
        dgrads, dx, dinitial, dweights = _replay_second(
            grads, x, initial, weights, seeds, lengths, reset, shape
        )
    return dgrads, None, None, dx, dinitial, dweights, None, None, None, None


def _run_second(
    record: _Record,
    grads: list[Tensor],
    y: Tensor,
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    seeds: list[Tensor | None],  # of the gradients of x, of the initial states and of the weights
    shape: _Shape,
    wants_x: bool,
) -> tuple[list[Tensor], Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of `grads`, x, the initial states and the weights, by kernels.

    With g = J^T dy the first gradients, J the derivative of the outputs, and v the seeds, it is the gradient
    of <v, g> = <J v, dy>: with respect to dy the tangent of the outputs along v, with respect to all else
    the tangent of the backward pass along v (Pearlmutter, Fast exact multiplication by the Hessian, Neural
    Computation 6, 1994).
    """
    moved_x, *moved = [None if seed is None else _array(seed) for seed in seeds]
    source, output = _array(x), _array(y)
    dy, *dfinal = map(_array, grads)
    each = len(weights) // shape.directions
    moved_initial: list[Any] = []
    if any(part is not None for part in moved[: len(initial)]):
        for sizes, part in zip(shape.results[1:], moved):
            moved_initial.append(np.zeros(sizes, source.dtype) if part is None else part)
    ty = np.empty(shape.results[0], source.dtype)
    tfinal = [np.empty(sizes, source.dtype) for sizes in shape.results[1:]]
    dinitial, dweights = [], []
    dx: list[Any] = []
    for d, (direction, tape) in enumerate(zip(record.directions, record.tapes)):
        here = weights[d * each : (d + 1) * each]
        if record.places[d] != _places(here):  # as in the first backward pass
            direction = _direction(here, x, shape, d)
        twice = cast(TwiceDifferentiable, direction)
        part = slice(d * shape.outputs, (d + 1) * shape.outputs)
        values = _bound(tape, source, output[..., part])
        own = moved[len(initial) :][d * each : (d + 1) * each]
        tangent = twice.tangent(
            values,
            moved_x,
            tuple([state[d] for state in moved_initial]) or None,
            storage.unflatten(shape.cell, own),
            ty[..., part],
            tuple([state[d] for state in tfinal]),
        )
        target = np.empty_like(source) if wants_x else None
        states, gradients = twice.backward_tangent(
            values, tangent, dy[..., part], tuple([state[d] for state in dfinal]), target
        )
        dx.append(target)
        dinitial.append([_tensor(state) for state in states])
        dweights += [_tensor(array) for array in storage.flatten(gradients)]
    return (
        [_tensor(array) for array in (ty, *tfinal)],
        _tensor(sum(dx[1:], dx[0])) if wants_x else None,
        [torch.stack(parts) for parts in zip(*dinitial)] if initial else [],
        dweights,
    )


def _replay_second(
    grads: list[Tensor],
    x: Tensor,
    initial: list[Tensor],
    weights: list[Tensor],
    seeds: list[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    shape: _Shape,
) -> Any:
    """What `_run_second` computes, by replaying the layer."""

    def gradient(grads: list[Tensor], x: Tensor, initial: list[Tensor], weights: list[Tensor]) -> Any:
        return _replay_backward(grads, x, initial, weights, lengths, reset, shape)

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
    if _leaves_python():
        return _record(x, initial, weights, lengths, reset, cell, directions)
    if forward_ad._current_level >= 0:  # whatever else goes on, the replay is right
        return _replay(x, initial, weights, lengths, reset, _shape(x, weights, cell.key, directions))
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
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # whose modes are not in the stack of the others


def _plain(tensors: list[Tensor]) -> bool:
    """Whether nobody watches what is done with these tensors, so that the dispatcher has no part in it."""
    return (
        not torch.compiler.is_compiling()
        and not _transforming()
        and (forward_ad._current_level < 0 or not _carry_tangents(tensors))
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        and _TENSORS.issuperset(map(type, tensors))
    )


# --- Modules ---------------------------------------------------------------------------------------------


class _Stack(nn.Module):
    """What layers share; their parameters are named by `_all_weights`, for each direction of each layer.

    Call as ``torch.nn``'s layers, with two more arguments:

        lengths: (B,) integers from 0 to T, in any order and on any device: sequences end there.  Outputs past
            the end are zero, the final state is that at the end, and a reverse direction starts there.  That
            of a sequence without steps is the initial one.
        reset: (T, B), or (B, T) if batch_first, or (T,), booleans: where true, the state goes back to the
            initial one before that step.  A reverse direction goes back at the same boundary.
    """

    __prepare_scriptable__ = _refuse_script
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
        lengths: Tensor | Sequence[int] | None = None,  # (B,)
        reset: Tensor | None = None,  # (T, B), (B, T) or (T,)
    ) -> Any:
        """Output and final state, as ``torch.nn`` shapes them.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if not isinstance(input, Tensor):
            if isinstance(input, PackedSequence):
                return self._run_packed(input, hx, lengths, reset)
            return _as_leaf(self, input, hx, lengths=lengths, reset=reset)
        weights = self._weights()
        weight = weights[0][0]
        self._check_input(input, weight)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
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
        if len(names) != self.num_layers * (2 if self.bidirectional else 1):
            raise RuntimeError(
                f"num_layers={self.num_layers} and bidirectional={self.bidirectional} do not fit the weights "
                f"that this {type(self).__name__} was made with, of {len(names)} layers and directions"
            )
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
        given, autocasts = x.dtype, _autocasting()
        for level, used in enumerate(weights):
            if len(weights) == 1:
                own = states
            else:
                own = [part[level * directions : (level + 1) * directions] for part in states]
            if level and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            if autocasts or x.dtype is not used[0].dtype or x.dtype not in _NUMPY:
                x, own, used = _converted(x, own, used, autocasts)
            x, *final = _apply(x, own, used, lengths, reset, cell, directions)
            results.append(final)
        final = results[0] if len(results) == 1 else [torch.cat(parts) for parts in zip(*results)]
        return _as_results(x, final, given, autocasts and (self._autocasts or x.is_cuda))

    def _run_packed(self, packed: PackedSequence, hx: Any, lengths: Any, reset: Any) -> Any:
        if lengths is not None or reset is not None:
            raise ValueError("a PackedSequence has lengths of its own, and cannot be reset: pad it instead")
        weights = self._weights()
        if _leaves_python():
            return self._record_packed(packed, hx, weights)
        padded, ends = pad_packed_sequence(packed)
        self._check_input(padded, weights[0][0])
        states = [] if hx is None else self._check_state(hx, padded.shape[1], True, weights[0][0])
        y, final = self._run(padded, states, weights, ends, None)
        order = packed.sorted_indices
        if order is not None:
            y, ends = y.index_select(1, order), ends[order.cpu()]
        data = pack_padded_sequence(y, ends).data
        output = PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)
        return output, tuple(final) if len(final) > 1 else final[0]

    def _record_packed(self, packed: PackedSequence, hx: Any, weights: list[list[Tensor]]) -> Any:
        """What `_run_packed` returns; for ONNX nothing may come between packing and the layers."""
        self._check_input(packed.data, weights[0][0])
        batch = int(packed.batch_sizes[0])
        states = [] if hx is None else self._check_state(hx, batch, True, weights[0][0])
        flat = [weight for level in weights for weight in level]
        settings = (1 + self.bidirectional, self.num_layers, self.dropout, self.training)
        data, *final = _record_packed(packed, states, flat, self.cell, *settings)
        return packed._replace(data=data), tuple(final) if len(final) > 1 else final[0]

    _autocasts = True  # whether autocast gives its type to the results, on a CPU too

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        if x.layout is not _STRIDED:
            raise TypeError(f"input must be a dense tensor, got {x.layout}")
        shape = x.shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {len(shape)}D instead, with the "
                f"shape {tuple(shape)}"
            )
        if shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {shape[-1]} "
                f"in the shape {tuple(shape)}"
            )
        if x.dtype is not weight.dtype:
            _refuse_dtype(x, weight)

    def _check_state(self, hx: Any, batch: int, batched: bool, weight: Tensor) -> list[Tensor]:
        """The states as (L*D, B, size) each."""
        names = self.cell.states
        parts = (hx,) if len(names) == 1 else hx
        if not isinstance(parts, (tuple, list)) or len(parts) != len(names):
            raise TypeError(f"hx must be a tuple ({', '.join(names)}), got {_described(hx)}")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        leading, size = (rows, batch) if batched else (rows,), self.proj_size or self.hidden_size
        shape, others, dtype = (*leading, size), (*leading, self.hidden_size), weight.dtype
        for n, part in enumerate(parts):
            fits = isinstance(part, Tensor) and part.shape == shape and part.dtype is dtype
            if not fits or part.layout is not _STRIDED:
                label = "hx" if len(names) == 1 else f"hidden[{n}]"
                if not isinstance(part, Tensor):
                    raise TypeError(f"{label} must be a tensor, got {_described(part)}")
                if part.layout is not _STRIDED:
                    raise TypeError(f"{label} must be a dense tensor, got {part.layout}")
                if part.shape != shape:
                    raise RuntimeError(f"Expected {label} size {shape}, got {tuple(part.shape)}")
                _refuse_dtype(part, weight, label)
            shape = others
        return list(parts) if batched else [part.unsqueeze(1) for part in parts]

    def _check_lengths(self, lengths: Any, batch: int, batched: bool) -> Tensor:
        """A copy of lengths as (B,), on the host."""
        if not batched:
            raise ValueError(
                "lengths needs an input with a batch axis; cut one sequence to its length instead"
            )
        given = _as_lengths(lengths)
        if given.numel() and not _integral(given):
            raise TypeError(f"lengths must be integers, got {given.dtype}")
        if given.shape != (batch,):
            raise ValueError(
                f"lengths must have the shape ({batch},), one for each sequence, got {tuple(given.shape)}"
            )
        return given.to("cpu", torch.int64, copy=True)

    def _check_reset(self, reset: Any, shape: torch.Size, batched: bool) -> Tensor:
        """A copy of reset as (T, B)."""
        if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
            raise TypeError(f"reset must be a tensor of booleans, got {_described(reset)}")
        _refuse_without_numbers("reset", reset)
        if reset.shape != shape:
            raise ValueError(
                f"reset must have the shape {tuple(shape)}, as input without its features, got "
                f"{tuple(reset.shape)}"
            )
        own = reset.clone()
        if not batched:
            return own.unsqueeze(1)
        return own.transpose(0, 1) if self.batch_first else own


def _as_lengths(lengths: Any) -> Tensor:
    """Lengths of any kind as a tensor, whose shape and type have not been looked at."""
    if isinstance(lengths, Tensor):
        _refuse_without_numbers("lengths", lengths)
        return lengths
    if isinstance(lengths, np.ma.MaskedArray):
        raise TypeError("lengths must be an array without a mask, which would be ignored; fill it first")
    try:
        if isinstance(lengths, np.ndarray):  # PyTorch takes no negative strides and no swapped bytes
            lengths = np.array(lengths, lengths.dtype.newbyteorder("="), subok=False)
        return torch.as_tensor(lengths)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"lengths must be integers, got {_described(lengths)}: {error}") from error


def _refuse_without_numbers(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be read as it lies in memory."""
    if tensor.layout is not _STRIDED or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"{name} must be a dense tensor that has memory, got {tensor.dtype} as {tensor.layout} on "
            f"{tensor.device}"
        )


def _parameters(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """What these attributes are; a parametrization or a hook may have put anything there."""
    own, found = module._parameters, []
    for name in names:  # a loop can be traced
        parameter = own.get(name)  # quicker
        found.append(getattr(module, name) if parameter is None else parameter)
    return found


def _refuse_dtype(value: Tensor, weight: Tensor, label: str = "input") -> None:
    """Refuse an argument of another type than the weights have, but under autocast."""
    if not _autocasting():
        raise ValueError(
            f"RNN {label} dtype ({value.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert {label}: {label}.to({weight.dtype}), or convert model: model.to({value.dtype})"
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    entries = f" of {len(value)} entries" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{entries}"


def _converted(
    x: Tensor, states: list[Tensor], weights: list[Tensor], autocasts: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All in the precision in which kernels compute: that of the weights, but float32 at least.

    What autocast would not convert, or without it has another type than the weights, stays, to be refused.
    """
    given = weights[0].dtype
    dtype = torch.promote_types(given, torch.float32)

    def convert(part: Tensor) -> Tensor:
        fits = part.dtype.is_floating_point if autocasts else part.dtype is given
        return part.to(dtype) if fits else part

    return convert(x), [convert(part) for part in states], [convert(weight) for weight in weights]


def _as_results(
    y: Tensor, final: list[Tensor], given: torch.dtype, autocasts: bool
) -> tuple[Tensor, list[Tensor]]:
    """Results of the type of the input, or of autocast's."""
    if y.dtype is torch.float64:
        return y, final
    if autocasts and torch.is_autocast_enabled(y.device.type):
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

    __prepare_scriptable__ = _refuse_script
    _cell: Cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # (B, I) or (I,); (B, H) or (H,) each
        """The new state, as ``torch.nn`` shapes it.

        Raises:
            ValueError, RuntimeError, TypeError: for an argument that does not fit; it names the argument.
        """
        if not isinstance(input, Tensor):
            return _as_leaf(self, input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}"
            )
        weights = _parameters(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])
        if input.dtype is not weights[0].dtype:
            _refuse_dtype(input, weights[0])
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input[None, None]
        states = [] if hx is None else self._check_state(hx, x.shape[1], batched, weights[0])
        autocasts = _autocasting()
        if autocasts or x.dtype is not weights[0].dtype or x.dtype not in _NUMPY:
            x, states, weights = _converted(x, states, weights, autocasts)
        y, *final = _apply(x, states, weights, None, None, self._cell, 1)
        _, final = _as_results(y, final, input.dtype, autocasts and y.is_cuda)
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
            if part.dtype is not weight.dtype:
                _refuse_dtype(part, weight, label)
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
