"""Masks for each step: what :mod:`fusedlstm.masks` finds, done with tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import Steps


class TensorSteps(Steps):
    """Steps of which some are left out, (T, B), on the device of the input; see there."""

    def __init__(self, mask: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None) -> None:
        super().__init__(torch, mask, lengths, reset)
        # else some are left out at the ends only; in a graph and under a transform nobody can tell
        self.moves = _watched() or bool((self.mask[1:] & ~self.mask[:-1]).any())

    def front(self, x: Tensor) -> Tensor:
        """x (T, B, N) with the steps that count at the front."""
        return self._taken(x, self.order) if self.moves else x

    def spread(self, y: Tensor, reverse: bool, initial: Tensor | None, zeros: bool = False) -> Tensor:
        """What all steps show of a state (T, B, N) after those that count; zero beyond the ends.

        Args:
            y: the values.
            reverse: of which direction.
            initial: (B, N), or None for zero, what is shown where nothing has run.
            zeros: whether steps that are left out show zero.
        """
        shown = self.shown(reverse)
        if self.moves or reverse:
            values = self._taken(y, shown.clip(0))
        else:
            last = y[(self.lengths - 1).clip(0), self.columns[0]]
            values = torch.where(self.mask[..., None], y, last)
        hidden = ~self.mask if zeros else shown < 0
        values = torch.where(hidden[..., None], 0 if zeros or initial is None else initial, values)
        return values if self.inside is None else torch.where(self.inside[..., None], values, 0)

    def end(self, final: Tensor, reverse: bool, initial: Tensor | None) -> Tensor:
        """A final state (B, N), or the initial one where it is that in the end."""
        if self.reset is None:
            return final
        return torch.where(self.forgotten(reverse)[:, None], 0 if initial is None else initial, final)

    def _taken(self, x: Tensor, steps: Tensor) -> Tensor:
        """The rows of x (T, B, N) of these steps (T, B)."""
        # by one index, whose gradient is quicker than that of two
        rows = (steps * x.size(1) + self.columns).flatten()
        return x.reshape(-1, x.size(2)).index_select(0, rows).reshape(x.shape)


def _watched() -> bool:
    """Whether what is done with tensors is recorded, or done for many at once."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or bool(torch._C._len_torch_dispatch_stack())
    )
