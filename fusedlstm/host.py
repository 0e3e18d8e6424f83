"""A recurrent layer as two functions of NumPy arrays, for frameworks that call the host.

:func:`forward` and :func:`backward` run one layer over a batch of sequences, batch first, with masks as Keras
defines them.  A framework carries nothing but arrays from one to the other: what backward needs besides stays
here, and a number tells which it is.  Sizes in the comments:

    B  batch        I  features of the input
    T  time steps   H  units
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import weights as storage
from .cells import Cell
from .masks import ArraySteps
from .once import fork_lock, once

if TYPE_CHECKING:
    from fusedlstm.kernels.cpu.engine import CPUDirection


# Of the calls, where a framework that would run them elsewhere says what it cannot run.
NAME = "fusedlstm.in_this_process_only.see_fusedlstm.keras.restore"


class Run(NamedTuple):
    """What is the same in every call of a layer."""

    cell: Cell
    backwards: bool  # from the last step to the first; outputs are in the order of the run
    sequences: bool  # whether the outputs of all steps are asked for, or the last one
    zeros: bool  # whether the output of a step that is masked is zero, or that of the step before
    carries: bool  # whether, if there is no step before, it is the initial one, or zero
    masked: bool  # whether there is a mask


# --- What is kept from call to call ----------------------------------------------------------------------


_keeping = fork_lock()  # held while a table changes


class _Table:
    """Entries by key, up to so many bytes of all of them, or one; the oldest go."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Any, value: Any, size: int) -> None:
        with _keeping:
            self._entries[key] = value, size
            total = sum(size for _, size in self._entries.values())
            while total > self.most and len(self._entries) > 1:
                total -= self._entries.popitem(last=False)[1][1]

    def take(self, key: Any) -> Any:
        """The entry, which is gone then; None if there is none."""
        with _keeping:
            return self._entries.pop(key, (None, 0))[0]

    def use(self, key: Any) -> Any:
        """The entry, which is the youngest then; None if there is none."""
        with _keeping:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]


class _Record(NamedTuple):
    """What backward needs of one forward pass."""

    direction: CPUDirection
    tape: Any  # without the input, whose memory is the framework's

    @property
    def size(self) -> int:
        return int(self.direction.nbytes + self.tape.memory.nbytes + self.tape.y.nbytes)


_numbers = count(1)
_records = _Table(2 << 30)  # by number; a framework does not tell when it has no use for one
_packed = _Table(1 << 28)  # directions, by the bits of the weights that are laid out in them


# these import Numba, so not before it is needed
@once
def _engine() -> Any:
    from fusedlstm.kernels.cpu import engine

    return engine


@once
def _bits() -> Any:
    from fusedlstm.kernels.cpu import fingerprint

    return fingerprint


def _keep(record: _Record) -> int:
    """The number of a record."""
    number = next(_numbers) % (1 << 31)
    _records.put(number, record, record.size)
    return number


def _packed_direction(cell: Cell, flat: Sequence[np.ndarray]) -> CPUDirection:
    """A direction with these weights, for inference: laid out once, as long as their bits are the same."""
    bits = _bits()
    dense = [array.ravel(order="K") for array in flat]
    layout = tuple([(array.shape, array.strides) for array in flat])
    key = (cell, flat[0].dtype, layout, bits.fingerprint(bits.table(dense), 1))
    direction: CPUDirection | None = _packed.use(key)
    if direction is None:
        direction = _pack(cell, flat)
        _packed.put(key, direction, direction.nbytes)
    return direction


def _pack(cell: Cell, flat: Sequence[np.ndarray], training: bool = False) -> CPUDirection:
    direction: CPUDirection = _engine().CPUDirection(cell, storage.keras_views(cell, flat, np.zeros_like))
    if training:  # now, since the memory of the framework is ours during this call only
        direction.lay_out_for_backward()
    return direction


# --- Forward and backward --------------------------------------------------------------------------------


class _Arguments:
    """The arguments of both functions, in the order of the run.

    Kernels are given addresses, so this is where everything is checked: a graph may know sizes only when it
    is run.

    Raises:
        ValueError: if sizes do not fit.
        TypeError: if types do not.
    """

    def __init__(self, run: Run, flat: Sequence[Any]) -> None:
        x, *rest = flat
        x = _rows(x)
        # a copy, since it is read more than once, and may be memory that others write
        mask = np.array(rest.pop(0)) if run.masked else None
        states = len(run.cell.states)
        self.initial = tuple(map(_rows, rest[:states]))  # (B, H) each
        self.weights = list(map(_aligned, rest[states:]))
        self._check_all(run.cell, x, mask)
        if run.backwards:
            x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
        self.x, self.sequences = x, run.sequences  # (B, T, I)
        # of no sequences there is nothing to move
        self.steps = None if mask is None or not len(x) else ArraySteps(np, mask.T)

    def _check_all(self, cell: Cell, x: np.ndarray, mask: np.ndarray | None) -> None:
        kernel, recurrent, *others = self.weights
        batch, steps, inputs, units = *x.shape[:2], len(kernel), len(recurrent)
        self.dtype = kernel.dtype
        _check("the input", x, (batch, steps, inputs), self.dtype)
        if not steps:
            raise ValueError(f"the input must have one time step at least, got the shape {x.shape}")
        for state in self.initial:
            _check("initial_state", state, (batch, units), self.dtype)
        if mask is not None:
            _check("mask", mask, (batch, steps), _BOOL)
        expected = _weight_shapes(cell, inputs, units, bias=len(others) > len(cell.weights))
        for (name, shape), weight in zip(expected.items(), self.weights):
            _check(name, weight, shape, self.dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the outputs."""
        return (*self.x.shape[:2], self.initial[0].shape[1])

    @property
    def shown(self) -> tuple[int, ...]:
        """The shape of what Keras is shown of the outputs."""
        return self.shape if self.sequences else self.initial[0].shape

    @property
    def run_steps(self) -> np.ndarray:
        """(T, B, I): the input as kernels take it."""
        x = np.swapaxes(self.x, 0, 1)
        moved: np.ndarray = x if self.steps is None else self.steps.front(x)
        return moved


def _rows(array: Any) -> np.ndarray:
    """The array itself if its last axis is contiguous, as kernels take it to be; else a copy."""
    rows: np.ndarray = np.asarray(array)
    contiguous: bool = rows.flags.aligned and rows.strides[-1] == rows.itemsize
    return rows if contiguous else rows.copy()


def _aligned(weight: Any) -> np.ndarray:
    """The array itself if each number lies where a processor wants it, else a copy; any order will do."""
    numbers: np.ndarray = np.asarray(weight)
    return numbers if numbers.flags.aligned else numbers.copy()


def _weight_shapes(cell: Cell, inputs: int, units: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Of the weights by name, as :func:`fusedlstm.weights.keras_views` takes them."""
    rows = len(cell.gates) * units
    shapes: dict[str, tuple[int, ...]] = {"kernel": (inputs, rows), "recurrent_kernel": (units, rows)}
    if bias:
        shapes["bias"] = (2, rows) if cell.split else (rows,)
    return shapes | dict.fromkeys(cell.weights, (units,))


_BOOL = np.dtype(bool)


def _check(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {array.shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {array.dtype}")


def forward(
    run: Run, training: bool, *flat: Any, out: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
    """The outputs (B, T, H), or the last (B, H); the final states (B, H); the number of the record, or 0.

    Args:
        run: what is the same in every call.
        training: whether to keep a record, which makes backward quicker.
        flat: the input (B, T, I); the mask (B, T) if there is one; the initial states (B, H); the weights,
            as :func:`fusedlstm.weights.keras_views` takes them.
        out: arrays in which some of the results may be; else all are new.
    """
    given = _Arguments(run, flat)
    # what a record keeps is memory of ours
    y, finals, record = _forward(run, training, given, None if training or not run.sequences else out)
    number = 0 if record is None else _keep(record)
    return [_shown(run, given, y, finals), *finals, np.array(number, np.int32)]


def _forward(
    run: Run, training: bool, given: _Arguments, out: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, ...], _Record | None]:
    """The outputs (B, T, H) of the steps that count, the final states, and the record if training.

    There is no record of a batch of no sequences.
    """
    x, steps = given.run_steps, given.steps
    y = out[0] if out else np.empty(given.shape, x.dtype)
    finals = tuple([np.empty(state.shape, x.dtype) for state in given.initial])
    if not x.shape[1]:
        return y, finals, None
    # in training the weights are others at each call
    cell, weights = run.cell, given.weights
    direction = _pack(cell, weights, True) if training else _packed_direction(cell, weights)
    lengths = None if steps is None else steps.lengths
    tape = direction.forward(x, given.initial, y.swapaxes(0, 1), finals, lengths, None, False, training)
    return y, finals, _Record(direction, tape._replace(x=None)) if training else None


def _shown(run: Run, given: _Arguments, y: np.ndarray, finals: tuple[np.ndarray, ...]) -> np.ndarray:
    """The outputs that Keras shows, of all steps or of the last."""
    steps = given.steps
    if steps is None:
        return y if run.sequences else finals[0]
    if run.sequences:
        before = given.initial[0] if run.carries else 0
        return np.ascontiguousarray(steps.spread(y.swapaxes(0, 1), False, before, run.zeros).swapaxes(0, 1))
    return np.where(_hidden(run, steps), 0, finals[0])


def _hidden(run: Run, steps: ArraySteps) -> np.ndarray:
    """(B, 1): where the last output is zero, and not the final state."""
    hidden: np.ndarray = ~steps.mask[-1] if run.zeros else (steps.lengths == 0) & (not run.carries)
    return hidden[:, None]


def backward(
    run: Run, wants_dx: bool, number: Any, *flat: Any, out: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
    """The gradients of the input, if that is wanted, of the initial states and of the weights.

    Args:
        run: as for :func:`forward`.
        wants_dx: whether the gradient of the input is wanted; if not, its product is saved.
        number: of the record.  Where it is gone, the layer is run again.
        flat: as for :func:`forward`; then the gradients of the outputs and of the final states.
        out: contiguous arrays for the gradients; else they are new.
    """
    states = len(run.cell.states)
    given = _Arguments(run, flat[: -1 - states])
    dshown, *dfinals = map(_rows, flat[-1 - states :])
    _check("the gradient of the output", dshown, given.shown, given.dtype)
    for gradient, state in zip(dfinals, given.initial):
        _check("the gradient of a final state", gradient, state.shape, given.dtype)
    if out is None:
        wanted = ([given.x] if wants_dx else []) + [*given.initial, *given.weights]
        out = [np.empty(array.shape, array.dtype) for array in wanted]
    if not given.shape[0]:
        for target in out:
            target.fill(0)
        return list(out)
    record = _records.take(int(number)) or _forward(run, True, given)[2]
    assert record is not None
    dy, dfinals, past = _seeds(run, given, dshown, dfinals)
    x, steps = given.run_steps, given.steps
    dx = out[0][:, :: -1 if run.backwards else 1] if wants_dx else None  # (B, T, I)
    dinitial, dweights = record.direction.backward(
        record.tape._replace(x=x),
        dy,
        tuple(dfinals),
        None if dx is None else dx.swapaxes(0, 1),
        False,
    )
    if steps is not None and dx is not None and steps.moves:
        dx[...] = steps.back(dx.swapaxes(0, 1)).swapaxes(0, 1)
    dinitial = (dinitial[0] + past, *dinitial[1:])
    gradients = storage.keras_gradients(dweights, given.weights)
    for target, gradient in zip(out[wants_dx:], [*dinitial, *gradients]):
        _write(target, gradient)
    return list(out)


def _write(target: np.ndarray, gradient: np.ndarray) -> None:
    """``target[...] = gradient``; those of the kernels lie transposed."""
    if gradient.flags.c_contiguous:
        target[...] = gradient
    else:
        _engine().write_transposed(gradient.T, target)


def _seeds(
    run: Run, given: _Arguments, dshown: np.ndarray, dfinals: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray], Any]:
    """Gradients of the outputs (T, B, H) and final states of the run, and what goes past the run to the
    initial output."""
    steps, past = given.steps, 0
    if run.sequences:
        dy = dshown.swapaxes(0, 1)
        if steps is not None:
            dy, before = steps.gather(dy, False, run.zeros)
            past = before if run.carries else 0
        return dy, dfinals, past
    dy = np.broadcast_to(np.zeros(given.shape[2:], dshown.dtype), given.shape).swapaxes(0, 1)
    last = dshown if steps is None else np.where(_hidden(run, steps), 0, dshown)
    return dy, [dfinals[0] + last, *dfinals[1:]], past
