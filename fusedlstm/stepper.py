"""Stepping through sequences whose next input depends on the last output: streams, generated text, agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import dispatch

if TYPE_CHECKING:
    from .layers import Recurrent


class Stepper:
    """The layers of a stack, a few steps at a time, over buffers that stay: made by ``layer.stepper``.

    Everything is checked and laid out once, so that a call costs little more than the kernels.  The weights
    are those that the layer has when the stepper is made.  One thread at a time may use it.

    Attributes:
        input: (B, I), or (T, B, I) with `steps`: what the next call reads.
        output: (B, P), or (T, B, P): what the last call has written.
        state: a tuple of the states of all layers, the output (L, B, P) first, others (L, B, H): where the
            next call starts, zero at first.  Write to its arrays to start elsewhere.
    """

    __slots__ = ("_input", "_output", "_runs", "_state")

    def __init__(self, layer: Recurrent, batch: int, steps: int | None) -> None:
        if layer.bidirectional:
            raise ValueError(
                "a stepper needs a layer of one direction: the other one starts at the sequence's end, got "
                "bidirectional=True"
            )
        shape = (1 if steps is None else steps, batch)
        dtype, sizes = layer.dtype, layer._sizes
        x = np.zeros((*shape, layer._features), dtype)
        backend = dispatch.backend_for(layer.backend, x)
        if backend != "cpu":
            raise ValueError(f"a stepper runs on the CPU, got a layer with backend={backend!r}")
        self._state = tuple(np.zeros((layer.num_layers, batch, size), dtype) for size in sizes)
        self._input = x if steps is not None else x[0]
        self._runs = []
        for n, place in enumerate(layer._places):
            direction: Any = place.ready.get(np.ndarray) or layer._prepare(place, x)
            y = np.zeros((*shape, layer._width), dtype)
            repeated = direction.repeated(x, y, tuple(state[n] for state in self._state))
            self._runs.append(repeated.run)
            x = y
        self._output = x if steps is not None else x[0]
        self.reset()

    @property
    def input(self) -> np.ndarray:
        return self._input

    @property
    def output(self) -> np.ndarray:
        return self._output

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        return self._state

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The kernels know where the buffers are, so that neither can be copied."""
        raise TypeError(
            "a stepper cannot be copied or pickled: make another one, and copy the state to its own"
        )

    def __call__(self, x: Any = None) -> np.ndarray:
        """Run the next step, or steps.

        Args:
            x: shaped as `input`, and copied to it; None if that has been written to.

        Returns:
            `output`, which the next call overwrites.

        Raises:
            ValueError: if x has another shape.
            TypeError: if its numbers do not fit the layer's dtype.
        """
        if x is not None:
            if np.shape(x) != self._input.shape:
                raise ValueError(f"x must have the shape {self._input.shape}, got {np.shape(x)}")
            np.copyto(self._input, x, "same_kind")
        for run in self._runs:
            run()
        return self._output

    def reset(self, where: Any = None) -> None:
        """Go back to a state of zero: of all sequences, or of those that `where`, (B,) booleans, picks.

        Raises:
            ValueError: if `where` has another shape.
            TypeError: if it has other values.
        """
        if where is not None:
            where = np.asarray(where)
            if where.dtype != np.bool_:
                raise TypeError(f"where must be an array of booleans, got {where.dtype}")
            if where.shape != (batch := self.state[0].shape[1],):
                raise ValueError(f"where must have the shape ({batch},), got {where.shape}")
        for state in self.state:
            state[:, slice(None) if where is None else where] = 0
