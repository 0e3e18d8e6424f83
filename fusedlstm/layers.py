"""Recurrent layers: stacking, directions, projection, dropout, and the tape for backward.

:class:`Recurrent` runs any cell; :class:`LSTM`, :class:`GRU` and :class:`RNN` are it with the
arguments of PyTorch's layers of the same names.  Sizes in the comments and docstrings:

    T  time steps        I  input_size          L  num_layers
    B  batch             H  hidden_size         D  directions: 2 if bidirectional, else 1
                         P  size of the output: proj_size if there is a projection, else H
"""

from __future__ import annotations

import inspect
import operator
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedlstm.kernels.random import dropout_mask

from . import cells, dispatch
from . import weights as storage
from .cells import Cell
from .directions import Nothing, RecurrentDropout
from .dispatch import Direction
from .masks import ArraySteps
from .once import fork_lock
from .stepper import Stepper
from .weights import Weights

__all__ = ["GRU", "LSTM", "RNN", "Explanation", "Recurrent", "Tape", "explain", "load"]

BUILT_IN = {name: value for name in cells.__all__ if isinstance(value := getattr(cells, name), Cell)}
_replacing = fork_lock()


class _Place:
    """One direction of one layer: its weights, and what engines made of them.

    Weights never change; a place is replaced as a whole, so nothing packed can be out of date.
    """

    __slots__ = ("dropping", "level", "ready", "weights")

    def __init__(self, weights: Weights, level: int) -> None:
        self.weights, self.level = weights, level
        self.ready: dict[type, Direction] = {}  # by the type of the input array
        self.dropping: dict[type, Direction] = {}  # those with recurrent dropout


class Recurrent:
    """A stack of recurrent layers that run `cell`.

    A layer holds weights and nothing else that changes, so that any number of threads may call it at
    once.  Its weights are attributes with PyTorch's names (``layer.weight_hh_l0``) and read-only:
    assign a new array, or use :meth:`load_state_dict`.  The learned vectors of a cell are named
    likewise (``layer.p_i_l0``).

    Args:
        cell: what :func:`fusedlstm.cell` made of a function, or one of :mod:`fusedlstm.cells`.
        input_size: I, the number of features of the input.  None if the input is what the gates get of it,
            (T, B, D*gates*H): of the gates that have input weights, in their order, first those of the
            forward direction.  Then I is D*gates*H, and the first layer has no ``weight_ih`` and ``bias_ih``.
            Not with a projection.
        hidden_size: H, the number of hidden units.
        num_layers: L; each layer after the first takes the output of the one before.
        bias: whether gates have biases, ``bias_ih`` and ``bias_hh``, if the cell's may.
        batch_first: whether input and output are (B, T, features) and not (T, B, features).  States
            are (L*D, B, features) in either case.
        dropout: probability with which an output of a layer except the last is set to zero in
            training; the others are divided by 1 - dropout.
        bidirectional: whether each layer has a second direction, from the last step to the first;
            outputs of both are concatenated.
        proj_size: P, the size to which each output is projected (Sak et al., 2014); 0 for none.  Not
            for a cell that reads its own output, nor with a `recurrent` state other than the output.
        dtype: "float32" or "float64", of the weights, the input, the states and the output.
        backend: "cpu", "cuda" or "reference"; "auto" is "cuda" for arrays on a GPU, else "cpu".
        precision: of what the products of a float32 layer multiply; sums of products, states and all
            else are float32 in any case.  "float32" exactly, or "bfloat16"; on a GPU also "tf32" and
            "float16"; on a CPU also "int8", for inference: integers with a scale for each row of the
            weights, and one for each row of the input and of the output at each step.
        form: of the kernels on a GPU: "persistent" is one launch for a sequence, "stepwise" one for each
            step; "auto" decides by the sizes and the device.
        recurrent_dropout: probability with which, in training, an element of the output is set to zero
            where the recurrent weights multiply it; the others are divided by 1 - recurrent_dropout.
            One mask holds for all steps of a sequence (Gal and Ghahramani, 2016); output and states are
            not masked.  Not with a projection.
        heads: blocks on the diagonal of the recurrent weights of each gate; between them these are zero, and
            neither kept nor multiplied: ``weight_hh`` is (gates*H, H/heads).  Not with a projection.
        seed: of the initial weights and of dropout; None takes fresh entropy.

    Raises:
        TypeError, ValueError: for an argument that is none of the above.
    """

    cell: Cell
    input_size: int | None
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    recurrent_dropout: float
    heads: int
    dtype: np.dtype[Any]
    backend: str
    precision: str
    form: str
    _names: tuple[Weights, ...]  # for each direction of each layer, as are the places
    _shapes: dict[str, tuple[int, ...]]
    _places: tuple[_Place, ...]
    _sizes: tuple[int, ...]  # of the states: P, then H
    _directions: int
    _width: int  # of the output: D * P
    _features: int  # of the input: I
    _drops: bool  # whether there is dropout of any kind in training
    _key: tuple[Any, Any]
    _draws: count[int]

    def __init__(
        self,
        cell: Cell,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: Any = "float32",
        backend: str = "auto",
        precision: str = "float32",
        form: str = "auto",
        recurrent_dropout: float = 0.0,
        heads: int = 1,
        seed: int | None = None,
    ) -> None:
        self._configure(
            {
                "cell": cell,
                "input_size": input_size,
                "hidden_size": hidden_size,
                "num_layers": num_layers,
                "bias": bias,
                "batch_first": batch_first,
                "dropout": dropout,
                "bidirectional": bidirectional,
                "proj_size": proj_size,
                "dtype": dtype,
                "backend": backend,
                "precision": precision,
                "form": form,
                "recurrent_dropout": recurrent_dropout,
                "heads": heads,
            }
        )
        self._name_weights()
        self._replace(self._drawn(self._seed(seed)))

    def _configure(self, given: Mapping[str, Any]) -> None:
        """Check the settings, and take them; the layer has no weights yet."""
        settings = vars(self)  # attributes themselves cannot be assigned
        settings.update({name: check(name, given[name]) for name, check in _CHECKS.items()})
        self._check_settings()
        directions = 2 if self.bidirectional else 1
        outputs = self.proj_size or self.hidden_size
        settings.update(
            _directions=directions,
            _width=directions * outputs,
            _features=self.input_size
            if self.input_size is not None
            else directions * len(self.cell.gates_with_input) * self.hidden_size,
            _drops=self.recurrent_dropout > 0 or (self.dropout > 0 and self.num_layers > 1),
            _sizes=(outputs, *[self.hidden_size] * (len(self.cell.states) - 1)),
        )

    def _check_settings(self) -> None:
        if self.precision != "float32" and self.dtype != np.float32:
            raise ValueError(f"precision {self.precision!r} needs dtype 'float32', got {self.dtype.name!r}")
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size must be a multiple of heads {self.heads}, got {self.hidden_size}")
        if self.heads > 1 and (self.proj_size or not self.cell.gates_with_recurrent):
            why = "proj_size" if self.proj_size else f"the cell {self.cell.name}, without recurrent weights"
            raise ValueError(f"heads must be 1 with {why}, got {self.heads}")
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size must be smaller than hidden_size {self.hidden_size}, got {self.proj_size}"
            )
        if self.proj_size and (why := self._cell(0).unprojectable):
            raise ValueError(f"proj_size must be 0 with the cell {self.cell.name}: {why}")
        if self.proj_size and self.recurrent_dropout:
            raise ValueError(
                f"recurrent_dropout must be 0 with proj_size, got {self.recurrent_dropout!r} with "
                f"{self.proj_size}"
            )
        if self.dropout and self.num_layers == 1:
            _warn("dropout is applied after every layer but the last, and there is one layer")

    def _cell(self, level: int, dropping: bool = False) -> Cell:
        """The cell that a layer of the stack runs."""
        cell = cells.recurrent_dropout(self.cell) if dropping else self.cell
        return cells.gate_inputs(cell) if self.input_size is None and level == 0 else cell

    def _name_weights(self, arrays: Mapping[str, Any] | None = None) -> None:
        """Fix the names and shapes of the weights, as long as `arrays` has all of these names, if given.

        Raises:
            ValueError: for the first direction of a layer that `arrays` lacks weights of.
        """
        places, shapes = [], {}
        for n in range(self.num_layers * self._directions):
            layer, reverse = divmod(n, self._directions)
            cell, inputs = self._cell(layer), self._width if layer else self._features
            names = storage.names(cell, layer, bool(reverse), self.bias, self.proj_size > 0)
            expected = storage.shapes(cell, inputs, self.hidden_size, self.bias, self.proj_size, self.heads)
            named = dict(zip(storage.flatten(names), storage.flatten(expected)))
            if arrays is not None and (missing := [name for name in named if name not in arrays]):
                raise ValueError("; ".join(f"{name} is missing" for name in missing))
            places.append(names)
            shapes.update(named)
        vars(self).update(_names=tuple(places), _shapes=shapes)

    def _seed(self, seed: Any) -> np.random.Generator:
        """Seed dropout; the generator of the initial weights."""
        if seed is not None:
            seed = _size("seed", seed, minimum=0)
        for_weights, for_dropout = np.random.SeedSequence(seed).spawn(2)
        vars(self).update(
            _key=tuple(np.uint64(word) for word in for_dropout.generate_state(2)), _draws=count()
        )
        return np.random.default_rng(for_weights)

    def _drawn(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Initial weights."""
        bound = self.hidden_size**-0.5
        drawn = {
            name: generator.uniform(-bound, bound, shape).astype(self.dtype)
            for name, shape in self._shapes.items()
        }
        for names in self._names:
            for own, name in zip(self.cell.weights, names.vectors):
                if own in self.cell.beginnings:
                    drawn[name][...] = self.cell.beginnings[own]
        return drawn

    def __repr__(self) -> str:
        shown = [repr(self.input_size), repr(self.hidden_size)]
        if type(self) is Recurrent:
            shown.insert(0, self.cell.name)
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={str(value) if name == 'dtype' else value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    # Weights

    if TYPE_CHECKING:  # the weights, which have names that depend on the settings

        def __getattr__(self, name: str) -> np.ndarray: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._shapes:
            raise AttributeError(
                f"{type(self).__name__} has no parameter {name!r}, and its settings are fixed when it is "
                f"built; the parameters are {', '.join(self._shapes)}"
            )
        self._replace({name: self._parameter(name, value)})

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name!r} cannot be deleted")

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights by name, read-only, on the host; later changes of the layer do not show in it."""
        places = self._places
        return {
            name: array
            for names, place in zip(self._names, places)
            for name, array in zip(storage.flatten(names), storage.flatten(place.weights))
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy weights from a mapping of names to arrays (NumPy, CuPy, PyTorch).

        Floating-point arrays of another precision are converted, and tensors may require gradients.

        Raises:
            ValueError: if an entry is missing, unexpected or misshapen; the layer is as it was.
            TypeError: if it is no mapping, or an entry no array of floating-point numbers; likewise.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must map names to arrays, got {_described(state_dict)}")
        problems = [f"{name} is missing" for name in self._shapes if name not in state_dict]
        problems += [f"{name} is unexpected" for name in state_dict if name not in self._shapes]
        if problems:
            raise ValueError(f"state_dict does not fit {self!r}: {'; '.join(problems)}")
        self._replace({name: self._parameter(name, state_dict[name]) for name in self._shapes})

    def _parameter(self, name: str, value: Any) -> np.ndarray:
        """A copy of `value` of the layer's dtype, if it fits the parameter `name`."""
        array = dispatch.on_host(name, value)
        if array.dtype.kind != "f":
            raise TypeError(f"{name} must be an array of floating-point numbers, got {array.dtype}")
        if array.shape != self._shapes[name]:
            raise ValueError(f"{name} must have the shape {self._shapes[name]}, got {array.shape}")
        return np.array(array, self.dtype, order="C")

    def _replace(self, arrays: dict[str, np.ndarray]) -> None:
        """Publish new weights, all at once; directions that keep theirs keep what was made of them."""
        for array in arrays.values():
            array.flags.writeable = False
        with _replacing:
            merged = vars(self) | arrays
            places = []
            for n, names in enumerate(self._names):
                if not arrays.keys().isdisjoint(storage.flatten(names)):
                    places.append(_Place(storage.fill(names, merged.__getitem__), n // self._directions))
                else:
                    places.append(self._places[n])
            vars(self).update(arrays, _places=tuple(places))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings to a safetensors file, which :func:`fusedlstm.load` reads."""
        identity = {
            "layer": type(self).__name__,
            "cell": self.cell.name,
            # a cell of this package is known by its name, another by its mathematics
            "key": None if BUILT_IN.get(self.cell.name) is self.cell else self.cell.key,
        }
        # what is a matter of the machine is said when the file is read
        settings = {name: value for name, value in self._settings().items() if name not in dispatch.OPTIONS}
        storage.write(path, self.state_dict(), identity | settings)

    def _settings(self) -> dict[str, Any]:
        """The arguments that build this layer, but for the cell, as JSON can hold them."""
        names = ("input_size", "hidden_size", *_DEFAULTS)
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}

    def __reduce__(self) -> Any:
        """Pickle and copy; what engines made of the weights is made anew."""
        return _rebuilt, (type(self), self.cell, self._settings(), self.state_dict(), self._key)

    # Running

    def __call__(
        self,
        x: Any,  # (T, B, I), (B, T, I) or (T, I)
        state: Any = None,
        lengths: Any = None,  # (B,)
        reset: Any = None,  # (T, B), (B, T) or (T,)
        *,
        mask: Any = None,  # (T, B), (B, T) or (T,)
        all_states: bool = False,
    ) -> tuple[Any, ...]:
        """Outputs, final state and, if asked for, all states; see :meth:`forward`."""
        return self.forward(x, state, lengths, reset, mask=mask, all_states=all_states)[:-1]

    def forward(
        self,
        x: Any,  # (T, B, I), (B, T, I) or (T, I)
        state: Any = None,
        lengths: Any = None,  # (B,)
        reset: Any = None,  # (T, B), (B, T) or (T,)
        training: bool = False,
        *,
        mask: Any = None,  # (T, B), (B, T) or (T,)
        all_states: bool = False,
        draw: int | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers over a batch of sequences, or over one.

        Args:
            x: (T, B, I), or (B, T, I) if batch_first, or one sequence (T, I), where T and B may be 0; an
                array of NumPy or CuPy of the layer's dtype, or any other that has DLPack or
                ``__cuda_array_interface__``, which is used where it lies.  Results are CuPy's on the same
                device for an array on a GPU, NumPy's for others.
            state: initial state, zero if None: an array (L*D, B, P) for a cell with one state, else a
                tuple of the states, of which those after the first are (L*D, B, H).  Without the axis B
                for one sequence.
            lengths: (B,) integers from 0 to T: sequences end there.  Outputs past the end are zero, the
                final state is that at the end, and the reverse direction starts there.  The final state of
                an empty sequence is its initial one.
            reset: booleans, shaped as x without its features: where true, the state goes back to the
                initial one before that step.  The reverse direction goes back at the same boundary.
            training: whether to apply dropout and to keep what backward needs.
            mask: booleans, shaped as x without its features: where false, a step is left out, and hands the
                state on; its output is that of the step before, or what has been carried in.
            all_states: whether all states after each step are asked for.
            draw: number of the dropout masks; ``tape.draw`` of an earlier call gives its masks again.
                By default each call in training takes the next number.

        Returns:
            y, shaped as x with D*P features; the final state, shaped as the initial one; with all_states a
            tuple of the states after each step, the output first, (T, L*D, B, P) and (T, L*D, B, H), or
            without the axis B, zero past the end; and the :class:`Tape` in training, else None.  The tape
            refers to x and y: change neither in place before backward.  Everything else that it needs, it
            has taken by value.

        Raises:
            TypeError, ValueError: for an argument that is none of the above; it names the argument.
        """
        if type(training) is not bool:
            training = _flag("training", training)
        if all_states is not False:
            all_states = _flag("all_states", all_states)
        if draw is not None:
            draw = _size("draw", draw, minimum=0)
        given = x
        if type(x) is not np.ndarray:
            x = dispatch.taken("x", x)
            if dispatch.elsewhere(device := dispatch.device_of(x)):
                with device:
                    options: dict[str, Any] = {"mask": mask, "all_states": all_states, "draw": draw}
                    return self.forward(x, state, lengths, reset, training, **options)
        x, batched = self._input(x)
        kind = type(x)
        xp = np if kind is np.ndarray else _array_module(x)
        steps, batch, _ = x.shape
        initial = None if state is None else self._state("state", state, batch, batched, xp)
        if lengths is not None:
            lengths = _lengths(lengths, steps, batch, batched, xp)
        if reset is not None:
            reset = self._marks("reset", reset, steps, batch, batched, xp)
        runs, masked = steps > 0 and batch > 0, None
        if mask is not None:
            mask = self._marks("mask", mask, steps, batch, batched, xp)
            if runs:
                masked = ArraySteps(xp, mask, lengths, reset)
                x, lengths, reset = masked.front(x), masked.lengths, masked.reset
        dtype, directions, outputs, places = self.dtype, self._directions, self._sizes[0], self._places
        final: list[Any] = []
        empty = xp.empty
        for size in self._sizes:
            final.append(empty((len(places), batch, size), dtype))
        every: list[Any] | None = None
        if all_states:
            every = [empty((steps, len(places), batch, size), dtype) for size in self._sizes]
        tape = None
        if training:
            x = x.view()  # whose shape nobody changes
            tape = Tape(self, given, x, batched, masked, all_states)
            if self._drops:
                tape.draw = next(self._draws) if draw is None else draw
        if not runs:
            dispatch.engine(self.backend, x, self.precision, self.form)  # refuses what it would of others
        y = x
        for n, place in enumerate(places):
            reverse = n % directions == 1
            if not reverse:
                x = tape.dropped(y, n // directions - 1, xp) if tape is not None and n else y
                y = empty((steps, batch, self._width), dtype)
            if not runs:
                direction: Direction = Nothing(place.weights)
            elif tape is not None and self.recurrent_dropout:
                direction = self._dropping(place, x, n, tape.draw, xp)
            else:
                direction = place.ready.get(kind) or self._prepare(place, x)
            own = y if directions == 1 else y[..., outputs * reverse : outputs * (1 + reverse)]
            record = direction.forward(
                x if self.input_size is not None else self._fed(x, n),
                None if initial is None else _entries(initial, n),
                own,
                _entries(final, n),
                lengths,
                reset,
                reverse,
                training,
                None if every is None else tuple([part[:, n] for part in every[1:]]),
            )
            if every is not None and len(places) == 1 and masked is None:
                every[0] = own[:, None]
            elif every is not None:
                every[0][:, n] = own
            if tape is not None:
                tape.runs.append((direction, record))
        if masked is not None:
            y = self._spread(masked, initial, y, final, every)
        if not batched:
            y, final = y[:, 0], [part[:, 0] for part in final]
        elif self.batch_first:
            y = y.swapaxes(0, 1)
        elif training:
            y = y.view()  # a view cannot be resized under the tape
        end = final[0] if len(final) == 1 else tuple(final)
        if every is None:
            return y, end, tape
        return y, end, tuple(every if batched else [part[:, :, 0] for part in every]), tape

    def stepper(self, batch: int = 1, steps: int | None = None) -> Stepper:
        """Buffers and kernels for a few steps at a time, whose state stays between calls.

        For streams, for text that is generated, for agents: all is checked once, so that a step costs little
        more than its kernel.  On the CPU, without dropout.

        Args:
            batch: B, the sequences that run side by side.
            steps: T, the steps of a call; by default one, and arrays without that axis.

        Raises:
            TypeError, ValueError: for sizes that are none; for a bidirectional layer, or one on a GPU.

        Example:
            >>> step = lstm.stepper()
            >>> for x in stream:  # (1, I) each
            ...     y = step(x)  # (1, P), until the next call
        """
        batch = _size("batch", batch)
        return Stepper(self, batch, None if steps is None else _size("steps", steps))

    def _spread(
        self, masked: ArraySteps, initial: Any, y: Any, final: list[Any], every: list[Any] | None
    ) -> Any:
        """The output (T, B, D*P) of all steps, of that of those that count; other results are overwritten."""
        directions, outputs, shown = self._directions, self._sizes[0], []
        for n in range(len(self._places)):
            reverse = n % directions
            before = [0] * len(final) if initial is None else _entries(initial, n)
            if n + directions >= len(self._places):
                part = slice(outputs * reverse, outputs * (1 + reverse))
                shown.append(masked.spread(y[..., part], reverse == 1, before[0]))
            for state, start in zip(final, before):
                masked.end(state[n], reverse == 1, start)
            for state, start in zip(every or (), before):
                values = masked.spread(state[:, n], reverse == 1, start)
                if masked.moves:
                    state[:, n] = values
        if not masked.moves:  # what lies at the ends has been written where it is
            return y
        return shown[0] if directions == 1 else masked.module.concatenate(shown, -1)

    def _fed(self, x: Any, n: int) -> Any:
        """What place n takes of the input of its layer, or gives to its gradient."""
        if self.input_size is not None or n >= self._directions or self._directions == 1:
            return x
        size = self._features // 2
        return x[..., size * n : size * (n + 1)]

    def _prepare(self, place: _Place, x: Any, dropping: bool = False) -> Direction:
        cell = self._cell(place.level, dropping)
        engine = dispatch.engine(self.backend, x, self.precision, self.form)
        direction = engine.prepare(cell, place.weights)
        return (place.dropping if dropping else place.ready).setdefault(type(x), direction)

    def _dropping(self, place: _Place, x: Any, n: int, draw: Any, xp: Any) -> Direction:
        """The direction of place n with the recurrent dropout of a draw."""
        direction = place.dropping.get(type(x)) or self._prepare(place, x, dropping=True)
        shape, number = (x.shape[1], self.hidden_size), self.num_layers + n  # layers have the numbers before
        mask = dropout_mask(shape, self.recurrent_dropout, self._key, draw, number, self.dtype, xp)
        return RecurrentDropout(self.cell, direction, mask)

    def _input(self, x: Any) -> tuple[Any, bool]:
        """x as (T, B, I), and whether it has a batch axis."""
        if type(x) is not np.ndarray or x.dtype is not self.dtype or not x.flags.carray:
            x = _laid_out("x", x, self.dtype, _array_module(x))
        shape = x.shape
        if len(shape) not in (2, 3) or shape[-1] != self._features:
            axes = "(B, T, {0})" if self.batch_first else "(T, B, {0})"
            expected = f"{axes} or (T, {{0}})".format(self._features)
            raise ValueError(f"x must have the shape {expected}, got {shape}")
        if len(shape) == 2:
            return x[:, None], False
        return x.swapaxes(0, 1) if self.batch_first else x, True

    def _state(self, what: str, state: Any, batch: int, batched: bool, xp: Any) -> Any:
        """The states as (L*D, B, size) each."""
        sizes, rows, dtype = self._sizes, len(self._places), self.dtype
        if len(sizes) == 1:
            state = (state,)
        elif type(state) is not tuple and type(state) is not list:
            raise TypeError(f"{what} must be a tuple {self._state_names()}, got {_described(state)}")
        if len(state) != len(sizes):
            raise ValueError(f"{what} must be a tuple {self._state_names()}, got {len(state)} entries")
        kind = xp.ndarray if xp is np else None  # others are looked at below
        for part, size in zip(state, sizes):
            if (
                type(part) is not kind
                or part.dtype is not dtype
                or part.shape != ((rows, batch, size) if batched else (rows, size))
                or not part.flags.carray
            ):
                state = self._laid_out_states(what, state, batch, batched, xp)
                break
        return state if batched else [part[:, None] for part in state]

    def _laid_out_states(self, what: str, state: Any, batch: int, batched: bool, xp: Any) -> list[Any]:
        names, rows, parts = self.cell.states, len(self._places), []
        for name, part, size in zip(names, state, self._sizes):
            label = what if len(names) == 1 else f"{name} in {what}"
            expected = (rows, batch, size) if batched else (rows, size)
            part = _laid_out(label, part, self.dtype, xp)
            if part.shape != expected:
                axes = "(layers * directions, batch, size)" if batched else "(layers * directions, size)"
                raise ValueError(f"{label} must be {axes} = {expected}, got {part.shape}")
            parts.append(part)
        return parts

    def _state_names(self) -> str:
        return f"({', '.join(self.cell.states)})"

    def _marks(self, name: str, marks: Any, steps: int, batch: int, batched: bool, xp: Any) -> Any:
        """reset or mask as (T, B), in memory that nobody else writes."""
        on_gpu = dispatch.lies_on_gpu(marks)
        flags = xp.asarray(_beside_x(name, marks, xp) if on_gpu else dispatch.on_host(name, marks))
        expected: tuple[int, ...] = (steps,)
        if batched:
            expected = (batch, steps) if self.batch_first else (steps, batch)
        if flags.dtype != bool:
            raise TypeError(f"{name} must be booleans, got {flags.dtype}")
        if flags.shape != expected:
            raise ValueError(
                f"{name} must have the shape {expected}, as x without its features, got {flags.shape}"
            )
        if not batched:
            flags = flags[:, None]
        elif self.batch_first:
            flags = flags.T
        return xp.array(flags, order="C")


class Tape:
    """What :meth:`backward` needs of one forward pass.  It may be used again, and by any thread.

    Attributes:
        draw: number of the dropout masks of this pass, None if there was no dropout.
    """

    __slots__ = (
        "all_states", "batched", "device", "draw", "given", "layer", "masked", "memory", "runs", "sizes",
    )  # fmt: skip

    def __init__(
        self, layer: Recurrent, given: Any, x: Any, batched: bool, masked: ArraySteps | None, all_states: bool
    ) -> None:
        self.layer, self.batched, self.masked, self.all_states = layer, batched, masked, all_states
        self.sizes: tuple[int, int] = x.shape[:2]
        self.device, self.memory = dispatch.device_of(x), _memory(x)
        # an x that was copied may change
        self.given = given if _memory(dispatch.taken("x", given)) == self.memory else None
        self.runs: list[tuple[Direction, Any]] = []  # what ran for each place, and the engine's tape
        self.draw: int | None = None

    def dropped(self, values: Any, layer: int, xp: Any) -> Any:
        """The output of a layer, or its gradient, (T, B, D*P), after dropout."""
        if not self.layer.dropout:
            return values
        assert self.draw is not None
        rate, key = self.layer.dropout, self.layer._key
        return values * dropout_mask(values.shape, rate, key, self.draw, layer, values.dtype, xp)

    def backward(self, dy: Any, dstate: Any = None, dstates: Any = None) -> tuple[Any, Any, dict[str, Any]]:
        """Gradients of x, of the initial state and of the weights.

        Args:
            dy: gradient of the output, shaped as it; None for zero.
            dstate: gradient of the final state, shaped as it; None for zero.
            dstates: those of all states, shaped as these, if the forward pass was asked for them; None, also
                in the place of some, for zero.

        Returns:
            dx, shaped as x; the gradient of the initial state, shaped as it; and those of the weights
            as a dictionary with the keys of ``layer.state_dict()``.

        Raises:
            TypeError, ValueError: for a gradient that is not shaped as what it belongs to.
            RuntimeError: if the memory of x has been given away since the forward pass.
        """
        if dispatch.elsewhere(self.device):
            with self.device:
                return self.backward(dy, dstate, dstates)
        if self.given is not None and _memory(dispatch.taken("x", self.given)) != self.memory:
            raise RuntimeError("x has been resized since the forward pass; backward needs what was in it")
        layer, (steps, batch) = self.layer, self.sizes
        xp = np if self.device is None else sys.modules["cupy"]
        d_output = self._output_gradient(dy, xp)
        d_final = None if dstate is None else layer._state("dstate", dstate, batch, self.batched, xp)
        d_every = None if dstates is None else self._all_gradients(dstates, xp)
        directions, outputs = layer._directions, layer._sizes[0]
        d_initial = [xp.empty((len(self.runs), batch, size), layer.dtype) for size in layer._sizes]
        past: list[Any] = []  # gradients that go past the steps to the initial states
        if self.masked is not None:
            d_output, d_final, d_every, past = self._gather(d_output, d_final, d_every)
        grads: dict[str, Any] = dict.fromkeys(layer._shapes)
        for level in reversed(range(layer.num_layers)):
            inputs = layer._width if level else layer._features
            d_input = xp.empty((steps, batch, inputs), layer.dtype)
            for reverse in range(directions):
                n = level * directions + reverse
                direction, record = self.runs[n]
                part = slice(outputs * reverse, outputs * (1 + reverse))
                own, further = d_output if directions == 1 else d_output[..., part], None
                if d_every is not None:
                    first, *others = [None if part is None else part[:, n] for part in d_every]
                    own, further = own if first is None else own + first, tuple(others)
                target = layer._fed(d_input, n)
                states, gradients = direction.backward(
                    record,
                    own,
                    None if d_final is None else _entries(d_final, n),
                    target,
                    reverse == 1 and target is d_input,
                    further,
                )
                for entry, state in zip(d_initial, states):
                    entry[n] = state
                grads.update(zip(storage.flatten(layer._names[n]), storage.flatten(gradients)))
            d_output = self.dropped(d_input, level - 1, xp) if level else d_input
        if self.masked is not None:
            d_output = self.masked.back(d_output)
        for target, part in zip(d_initial, past):
            target += part
        if not self.batched:
            d_output, d_initial = d_output[:, 0], [part[:, 0] for part in d_initial]
        elif layer.batch_first:
            d_output = d_output.swapaxes(0, 1)
        return d_output, d_initial[0] if len(d_initial) == 1 else tuple(d_initial), grads

    def _all_gradients(self, dstates: Any, xp: Any) -> list[Any]:
        """dstates as (T, L*D, B, size) each, or None."""
        layer, (steps, batch) = self.layer, self.sizes
        if not self.all_states:
            raise ValueError("dstates must be None after a forward pass without all_states=True")
        if type(dstates) not in (tuple, list) or len(dstates) != len(layer._sizes):
            raise TypeError(f"dstates must be a tuple {layer._state_names()}, got {_described(dstates)}")
        parts: list[Any] = []
        for name, part, size in zip(layer.cell.states, dstates, layer._sizes):
            if part is not None:
                label = f"{name} in dstates"
                part = _laid_out(label, part, layer.dtype, xp)
                expected = (steps, len(self.runs), *([batch] if self.batched else []), size)
                if part.shape != expected:
                    raise ValueError(f"{label} must have the shape {expected}, got {part.shape}")
                part = part if self.batched else part[:, :, None]
            parts.append(part)
        return parts

    def _gather(
        self, d_output: Any, d_final: Any, d_every: list[Any] | None
    ) -> tuple[Any, Any, list[Any] | None, list[Any]]:
        """Gradients of what the steps that count gave, and those that go past them to the initial states."""
        masked, layer = self.masked, self.layer
        assert masked is not None
        xp, outputs, places = masked.module, layer._sizes[0], len(self.runs)
        past = [xp.zeros((places, self.sizes[1], size), layer.dtype) for size in layer._sizes]
        gathered = xp.empty(d_output.shape, layer.dtype)
        if d_final is not None:
            d_final = [xp.array(part) for part in d_final]
        given: list[Any] = [None] * len(past) if d_every is None else d_every
        if d_every is not None:
            d_every = [None if part is None else xp.empty_like(part) for part in d_every]
        for n in range(places):
            reverse = n % layer._directions
            if n >= places - layer._directions:
                part = slice(outputs * reverse, outputs * (1 + reverse))
                gathered[..., part], past[0][n] = masked.gather(d_output[..., part], reverse == 1)
            for k in range(len(past)):
                if d_every is not None and given[k] is not None:
                    d_every[k][:, n], direct = masked.gather(given[k][:, n], reverse == 1)
                    past[k][n] += direct
                if d_final is not None:
                    past[k][n] += masked.split_end(d_final[k][n], reverse == 1)
        return gathered, d_final, d_every, past

    def _output_gradient(self, dy: Any, xp: Any) -> Any:
        """dy as (T, B, D*P)."""
        layer, (steps, batch) = self.layer, self.sizes
        if dy is None:
            return xp.zeros((steps, batch, layer._width), layer.dtype)
        dy = _laid_out("dy", dy, layer.dtype, xp)
        expected: tuple[int, ...] = (steps, layer._width)
        if self.batched:
            expected = (*((batch, steps) if layer.batch_first else (steps, batch)), layer._width)
        if dy.shape != expected:
            raise ValueError(f"dy must have the shape of the output {expected}, got {dy.shape}")
        if not self.batched:
            return dy[:, None]
        return dy.swapaxes(0, 1) if layer.batch_first else dy


class LSTM(Recurrent):
    """``torch.nn.LSTM`` with fused kernels; arguments as :class:`Recurrent`'s.

    Example:
        >>> lstm = LSTM(3, 5, seed=1)
        >>> y, (h, c) = lstm(np.zeros((7, 2, 3), "float32"))
        >>> y.shape, h.shape, c.shape
        ((7, 2, 5), (1, 2, 5), (1, 2, 5))
    """

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: Any = "float32",
        backend: str = "auto",
        precision: str = "float32",
        form: str = "auto",
        recurrent_dropout: float = 0.0,
        heads: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            cells.lstm,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            dtype=dtype,
            backend=backend,
            precision=precision,
            form=form,
            recurrent_dropout=recurrent_dropout,
            heads=heads,
            seed=seed,
        )


class GRU(Recurrent):
    """``torch.nn.GRU`` with fused kernels; arguments as :class:`Recurrent`'s, and `reset_after`: whether
    the reset gate applies after the product with the recurrent weights, as in PyTorch and cuDNN, or
    before it, as in Cho et al. (2014), where a step has two products, one after the other."""

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        dtype: Any = "float32",
        backend: str = "auto",
        precision: str = "float32",
        form: str = "auto",
        recurrent_dropout: float = 0.0,
        heads: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            cells.gru if _flag("reset_after", reset_after) else cells.gru_reset_before,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype=dtype,
            backend=backend,
            precision=precision,
            form=form,
            recurrent_dropout=recurrent_dropout,
            heads=heads,
            seed=seed,
        )

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.reset_after else f"{text[:-1]}, reset_after=False)"

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate applies after the product with the recurrent weights."""
        return self.cell is cells.gru


class RNN(Recurrent):
    """``torch.nn.RNN`` with fused kernels; arguments as :class:`Recurrent`'s, and
    `nonlinearity`, "tanh" or "relu"."""

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: Any = "float32",
        backend: str = "auto",
        precision: str = "float32",
        form: str = "auto",
        recurrent_dropout: float = 0.0,
        heads: int = 1,
        seed: int | None = None,
    ) -> None:
        kinds = {"tanh": cells.rnn_tanh, "relu": cells.rnn_relu}
        if not isinstance(nonlinearity, str) or nonlinearity not in kinds:
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(
            kinds[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype=dtype,
            backend=backend,
            precision=precision,
            form=form,
            recurrent_dropout=recurrent_dropout,
            heads=heads,
            seed=seed,
        )

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.nonlinearity == "tanh" else f"{text[:-1]}, nonlinearity={self.nonlinearity!r})"

    @property
    def nonlinearity(self) -> str:
        """ "tanh" or "relu"."""
        return self.cell.name.removeprefix("rnn_")


# The settings of a layer that have a default, and it; the seed is not kept.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Recurrent).parameters.items()
    if parameter.default is not parameter.empty and name != "seed"
}


def load(
    path: str | os.PathLike[str],
    *,
    cell: Cell | None = None,
    backend: str = "auto",
    precision: str = "float32",
    form: str = "auto",
    seed: int | None = None,
) -> Recurrent:
    """The layer that :meth:`Recurrent.save` wrote.

    Args:
        path: of the safetensors file.
        cell: the cell, if it is none of :mod:`fusedlstm.cells`.
        backend, precision, form: as for :class:`Recurrent`; they are a matter of the machine, and not saved.
        seed: of dropout, as for :class:`Recurrent`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not one of ours, or was saved with another cell.  Whatever it
            holds, no more memory is taken than a few times its size.
        TypeError: `cell` is none, or `seed` no integer.
    """
    if cell is not None:
        _cell("cell", cell)
    dispatch.check_options(backend=backend, precision=precision, form=form)
    if seed is not None:
        seed = _size("seed", seed, minimum=0)
    arrays, settings = storage.read(path)
    if "demo" in settings:
        raise ValueError(f"{path} holds a model of the demo; read it with: fusedlstm demo --load {path}")
    identity = ("layer", "cell", "key")
    if missing := [entry for entry in identity if entry not in settings]:
        if len(missing) == len(identity):
            raise ValueError(f"{path} holds no layer")
        raise ValueError(f"{path} is damaged: its settings lack {', '.join(map(repr, missing))}")
    if nested := [entry for entry, value in settings.items() if isinstance(value, (dict, list))]:
        raise ValueError(f"{path} is damaged: {', '.join(map(repr, nested))} in its settings is nested")
    kind, name, key = map(settings.pop, identity)
    if not isinstance(kind, str) or not isinstance(name, str) or not isinstance(key, (str, type(None))):
        raise ValueError(f"{path} is damaged: its layer, cell and key are {kind!r}, {name!r} and {key!r}")
    chosen = _saved_cell(path, name, key, cell)
    layer_class, own_cells = _CLASSES.get(kind, (Recurrent, None))
    if own_cells is not None and chosen not in own_cells:
        raise ValueError(f"{path} is damaged: its layer is {kind}, which does not have the cell {name!r}")
    # in place of what older files hold
    settings |= {"backend": backend, "precision": precision, "form": form}
    settings.pop("seed", None)
    try:
        return _rebuilt(layer_class, chosen, settings, arrays, seed=seed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


_CLASSES: dict[str, tuple[type[Recurrent], tuple[Cell, ...]]] = {
    "LSTM": (LSTM, (cells.lstm,)),
    "GRU": (GRU, (cells.gru, cells.gru_reset_before)),
    "RNN": (RNN, (cells.rnn_tanh, cells.rnn_relu)),
}


def _rebuilt(
    layer_class: type[Recurrent],
    cell: Cell,
    settings: dict[str, Any],
    arrays: Mapping[str, Any],
    key: tuple[Any, Any] | None = None,
    seed: int | None = None,
) -> Recurrent:
    """A layer with these settings, weights, and key or seed of dropout."""
    arguments = inspect.signature(Recurrent).bind(cell, **settings)
    arguments.apply_defaults()
    layer = object.__new__(layer_class)
    layer._configure(arguments.arguments)
    layer._name_weights(arrays)
    layer._seed(seed)
    layer.load_state_dict(arrays)
    if key is not None:
        vars(layer)["_key"] = key
    return layer


def _saved_cell(path: Any, name: str, key: str | None, cell: Cell | None) -> Cell:
    """The cell of a file: named `name`, with the mathematics `key` if it is not built in."""
    if key is None:
        if name not in BUILT_IN:
            raise ValueError(f"{path} was saved with the cell {name!r}, which this version does not have")
        if cell not in (None, BUILT_IN[name]):
            raise ValueError(f"{path} was saved with fusedlstm.cells.{name}, not with the cell {cell!r}")
        return BUILT_IN[name]
    if cell is None:
        raise ValueError(
            f"{path} was saved with a cell of your own, {name}: pass it, load(path, cell={name})"
        )
    if cell.key != key:
        raise ValueError(
            f"{path} was saved with another cell than {cell.name}: the names or the mathematics differ "
            f"(saved {key}, given {cell.key})"
        )
    return cell


@dataclass(frozen=True, repr=False)
class Explanation:
    """What would run, and why; prints as text.

    Attributes:
        what: the layer and its input.
        backend: the backend and why it was chosen.
        places: for each direction of each layer what its engine says, by subject.
    """

    what: str
    backend: str
    places: dict[str, dict[str, str]]

    def __str__(self) -> str:
        lines = [self.what, f"  backend: {self.backend}"]
        shown: dict[str, str] | None = None
        for place, says in self.places.items():
            if says == shown:
                lines.append(f"{place}: the same")
            else:
                lines += [f"{place}:", *(f"  {subject}: {text}" for subject, text in says.items())]
            shown = says
        return "\n".join(lines)

    __repr__ = __str__


def explain(layer: Recurrent, x: Any, training: bool = False) -> Explanation:
    """Which kernel, tile, threads and layout would run for `layer(x)`, and why.

    Args:
        layer: a layer on arrays: :class:`LSTM`, :class:`GRU`, :class:`RNN` or :class:`Recurrent`.
        x: its input; shape and kind of array decide, not the values.
        training: whether for ``layer.forward(x, training=True)``.

    Raises:
        TypeError, ValueError: as the call would.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(
            "layer must be a layer on arrays, such as fusedlstm.LSTM, got "
            f"{type(layer).__module__}.{type(layer).__qualname__}"
        )
    training = _flag("training", training)
    given = x.shape if hasattr(x, "shape") else None
    x = dispatch.taken("x", x)
    if dispatch.elsewhere(device := dispatch.device_of(x)):
        with device:
            return explain(layer, x, training)
    x, _ = layer._input(x)
    steps, batch, _ = x.shape
    name = dispatch.backend_for(layer.backend, x)
    kind = "NumPy" if type(x) is np.ndarray else "CuPy"
    reason = f"x is a {kind} array" if layer.backend == "auto" else f"the layer has backend={name!r}"
    places = {}
    for n, place in enumerate(layer._places):
        level, d = divmod(n, layer._directions)
        dropping = training and layer.recurrent_dropout > 0
        direction: Direction | None = (place.dropping if dropping else place.ready).get(type(x))
        if not (steps and batch):
            direction = Nothing(place.weights)
        elif direction is None:
            direction = layer._prepare(place, x, dropping)
        label = f"layer {level}, reverse" if d else f"layer {level}"
        places[label] = direction.explain(steps, batch, training)
    purpose = "forward and backward" if training else "forward"
    return Explanation(f"{layer!r} on x {given} {layer.dtype}, {purpose}", f"{name}, since {reason}", places)


# Checks of arguments


def _warn(message: str) -> None:
    """Warn, in the name of the first caller outside this package."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _cell(name: str, value: Any) -> Cell:
    if not isinstance(value, Cell):
        raise TypeError(f"{name} must be made with @fusedlstm.cell, got {value!r}")
    return value


def _size(name: str, value: Any, minimum: int = 1) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if size < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {size}")
    return size


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


def _dtype(name: str, value: Any) -> np.dtype[Any]:
    for dtype in (np.dtype("float32"), np.dtype("float64")):
        if value is not None and value == dtype:  # NumPy takes None for float64
            return dtype
    raise ValueError(f"{name} must be 'float32' or 'float64', got {value!r}")


def _option(name: str, value: Any) -> str:
    dispatch.check_options(**{name: value})
    return str(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {  # of the settings
    "cell": _cell,
    "input_size": lambda name, value: None if value is None else _size(name, value),
    "hidden_size": _size,
    "num_layers": _size,
    "bias": _flag,
    "batch_first": _flag,
    "dropout": _probability,
    "bidirectional": _flag,
    "proj_size": partial(_size, minimum=0),
    "recurrent_dropout": _probability,
    "heads": _size,
    "dtype": _dtype,
    **dict.fromkeys(dispatch.OPTIONS, _option),
}


def _described(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {tuple(value.shape)}"
    return type(value).__name__


def _entries(parts: Sequence[Any], n: int) -> tuple[Any, ...]:
    """Entry n of every part."""
    if len(parts) == 2:  # spelled out: this is a good part of the cost of a single step
        first, second = parts
        return first[n], second[n]
    return tuple([part[n] for part in parts])


def _array_module(array: Any) -> Any:
    """numpy or cupy, whichever the array belongs to; cupy is there if an array of it is."""
    return np if dispatch.device_of(array) is None else sys.modules["cupy"]


def _memory(array: Any) -> tuple[int, int]:
    """The address and the bytes of an array."""
    address = array.ctypes.data if dispatch.device_of(array) is None else array.data.ptr
    return address, array.nbytes


def _beside_x(name: str, value: Any, xp: Any) -> Any:
    """Any array as one of the module of x, if it lies where x does."""
    array = dispatch.taken(name, value)
    if _array_module(array) is not xp:
        kind = "NumPy" if xp is np else "CuPy"
        raise TypeError(f"{name} must be a {kind} array, as x is, got {type(value).__name__}")
    if dispatch.elsewhere(device := dispatch.device_of(array)):
        raise ValueError(f"{name} must lie on the device of x, {xp.cuda.Device()}, got {device}")
    return array


def _laid_out(name: str, value: Any, dtype: np.dtype[Any], xp: Any) -> Any:
    """The array itself if its last axis is contiguous and native, else a copy that is."""
    value = xp.asarray(_beside_x(name, value, xp))  # a plain array of a subclass
    if value.dtype.newbyteorder("=") != dtype:
        other = str(value.dtype)
        advice = f" or build the layer with dtype={other!r}" if other in ("float32", "float64") else ""
        raise TypeError(
            f"{name} must be {dtype}, got {other}; convert it with .astype({dtype.name!r}){advice}"
        )
    regular = value.ndim == 0 or value.strides[-1] == dtype.itemsize
    if value.dtype == dtype and regular and getattr(value.flags, "aligned", True):
        return value
    return value.astype(dtype, order="C", copy=True)


def _lengths(lengths: Any, steps: int, batch: int, batched: bool, xp: Any) -> Any:
    """lengths as (B,) int64, in memory that nobody else writes: what has been checked is what is used."""
    if not batched:
        raise ValueError("lengths needs an input with a batch axis; cut one sequence to its length instead")
    host = np.array(dispatch.on_host("lengths", lengths))
    if host.size and host.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {host.dtype}")
    if host.shape != (batch,):
        raise ValueError(f"lengths must have the shape ({batch},), one for each sequence, got {host.shape}")
    if host.size and (host.min() < 0 or host.max() > steps):
        raise ValueError(f"lengths must be from 0 to {steps}, got {host.min()} to {host.max()}")
    return xp.asarray(np.ascontiguousarray(host, np.int64))
