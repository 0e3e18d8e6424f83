"""Steps that are left out of sequences: what a mask means, for arrays, tensors and Keras.

Kernels know sequences that end, not steps that are left out.  So the steps that count move to the front, a
layer runs over these, and its results are spread over all steps again.  A step that is left out hands the
state on: it shows the one after the last step that counts, or the initial one where there is none.  Sizes in
the comments:

    T  time steps        B  batch        N  numbers of a row
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dispatch import on_host


class Steps:
    """Which steps of a batch of sequences count, as indices of NumPy or of PyTorch.

    Args:
        xp: numpy or torch, whose arrays or tensors the others are.
        mask: (T, B) booleans, at least one step: which steps count.
        lengths: (B,) integers: beyond them none does.
        reset: (T, B) booleans, marks of boundaries, as a layer takes them.

    Attributes:
        mask: (T, B), the steps that count.
        inside: (T, B), those before the ends; None if all are.
        columns, order: (T, B) each: ``x[steps.order, steps.columns]`` has the steps that count at the front.
        lengths: (B,), how many count.
        reset: (T, B), the boundaries between steps that count; None if there are none.
    """

    def __init__(self, xp: Any, mask: Any, lengths: Any = None, reset: Any = None) -> None:
        self.xp = xp
        every = mask | True
        times, self.columns = xp.cumsum(every, 0) - 1, xp.cumsum(every, 1) - 1
        self.inside = None if lengths is None else times < lengths
        self.mask = mask if self.inside is None else mask & self.inside
        self._ends = len(mask) - 1 if lengths is None else (lengths - 1).clip(0)  # the last steps
        self._counts = xp.cumsum(self.mask, 0)
        self.lengths = self._counts[-1]
        self.order = xp.argsort(times + len(mask) * ~self.mask, 0)
        self.reset = self._boundaries = None
        if reset is not None:
            self._boundaries = xp.cumsum(reset, 0)
            at = self._boundaries[self.order, self.columns]
            self.reset = xp.concatenate([at[:1] != at[:1], at[1:] != at[:-1]])
        self._shown: dict[bool, Any] = {}

    def shown(self, reverse: bool) -> Any:
        """(T, B): after which of the steps that count a step shows the state; -1 for the initial state."""
        if reverse not in self._shown:
            self._shown[reverse] = self._find_shown(reverse)
        return self._shown[reverse]

    def _find_shown(self, reverse: bool) -> Any:
        nearest = self._counts - 1
        if reverse:  # not the one before
            nearest = nearest + ~self.mask
        known = (nearest >= 0) & (nearest < self._counts[-1])
        if self._boundaries is not None:
            times = self.order[nearest.clip(0, len(self.order) - 1), self.columns]
            known = known & (self._boundaries[times, self.columns] == self._boundaries)
        return self.xp.where(known, nearest, -1)

    def forgotten(self, reverse: bool) -> Any:
        """(B,): where the state is the initial one in the end, since a boundary comes after all steps that
        count, or none does."""
        shown = self.shown(reverse)
        return (shown[0] if reverse else shown[self._ends, self.columns[0]]) < 0


class ArraySteps(Steps):
    """The same, and what is done with arrays of NumPy or CuPy.

    Args:
        module: numpy or cupy, whose arrays all are; the indices are NumPy's.
    """

    def __init__(self, module: Any, mask: Any, lengths: Any = None, reset: Any = None) -> None:
        super().__init__(np, *[None if a is None else on_host("", a) for a in (mask, lengths, reset)])
        self.module = module
        self.lengths = module.asarray(np.ascontiguousarray(self.lengths))
        if self.reset is not None:
            self.reset = module.asarray(self.reset)
        self.moves = bool((self.mask[1:] & ~self.mask[:-1]).any())  # else some are left out at the ends only

    def front(self, x: Any) -> Any:
        """x (T, B, N) with the steps that count at the front."""
        return self._ordered(x) if self.moves else x

    def _ordered(self, x: Any) -> Any:
        # kernels want rows that are contiguous
        return self.module.ascontiguousarray(x[self._here(self.order, self.columns)])

    def back(self, dx: Any) -> Any:
        """The gradient of x, of what :meth:`front` made of it."""
        if not self.moves:
            return dx
        moved = self.module.zeros_like(dx)
        times, columns = np.nonzero(self.mask)
        moved[self._here(times, columns)] = dx[self._here(self._counts[times, columns] - 1, columns)]
        return moved

    def spread(self, y: Any, reverse: bool, initial: Any, zeros: bool = False) -> Any:
        """What all steps show of a state (T, B, N) after those that count; zero beyond the ends.

        Args:
            y: the values, which may be overwritten.
            initial: (B, N), or 0, what is shown where nothing has run.
            zeros: whether steps that are left out show zero.
        """
        shown = self.shown(reverse)
        left_out = ~self.mask if self.inside is None else ~self.mask & self.inside
        if self.moves:
            y = y[self._here(shown.clip(0), self.columns)]
        elif not zeros:
            self._copy(y, y, left_out & (shown >= 0), shown)
        if zeros:
            y[self._here(~self.mask)] = 0
            return y
        times, columns = np.nonzero(left_out & (shown < 0))
        at = self._here(times, columns)
        y[at] = initial if isinstance(initial, int) else initial[at[1]]
        if self.inside is not None:
            y[self._here(~self.inside)] = 0
        return y

    def _copy(self, target: Any, source: Any, where: np.ndarray, shown: np.ndarray) -> None:
        times, columns = np.nonzero(where)
        target[self._here(times, columns)] = source[self._here(shown[times, columns], columns)]

    def gather(self, dy: Any, reverse: bool, zeros: bool = False) -> tuple[Any, Any]:
        """The gradients of `y` and `initial`, as :meth:`spread` takes them; what `dy` is stays."""
        shown, xp = self.shown(reverse), self.module
        own = self._ordered(dy) if self.moves else dy
        dinitial = xp.zeros_like(dy[0])
        if zeros:
            return own, dinitial
        left_out = ~self.mask if self.inside is None else ~self.mask & self.inside
        if own is dy and left_out.any():
            own = dy.copy()
        # by the distance from the step that is shown, since of one distance all show others
        for times, columns in self._by_distance(left_out, shown):
            own[self._here(shown[times, columns], columns)] += dy[self._here(times, columns)]
        if (first := left_out & (shown < 0)).any():
            dinitial += xp.where(xp.asarray(first)[..., None], dy, 0).sum(0)
        return own, dinitial

    def _by_distance(self, left_out: np.ndarray, shown: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        times, columns = np.nonzero(left_out & (shown >= 0))
        distance = np.abs(times - self.order[shown[times, columns], columns])
        places = np.argsort(distance, kind="stable")
        cuts = np.flatnonzero(np.diff(distance[places])) + 1
        return [(times[group], columns[group]) for group in np.split(places, cuts) if group.size]

    def end(self, final: Any, reverse: bool, initial: Any) -> None:
        """Write the initial state (B, N), or 0, to a final one where it is that in the end."""
        rows = self._forgotten_rows(reverse)
        final[rows] = initial if isinstance(initial, int) else initial[rows]

    def split_end(self, dfinal: Any, reverse: bool) -> Any:
        """The gradient of `initial`, as :meth:`end` takes it; what goes there is taken out of `dfinal`."""
        rows, dinitial = self._forgotten_rows(reverse), self.module.zeros_like(dfinal)
        dinitial[rows], dfinal[rows] = dfinal[rows], 0
        return dinitial

    def _forgotten_rows(self, reverse: bool) -> Any:
        return self._here(np.flatnonzero(self.forgotten(reverse)))[0]

    def _here(self, *indices: np.ndarray) -> tuple[Any, ...]:
        """Indices where the arrays lie."""
        return tuple(map(self.module.asarray, indices))
