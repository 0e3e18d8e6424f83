"""A PyTorch training script before and after: one line makes its LSTM faster.

    python examples/train_torch.py            # as it was
    python examples/train_torch.py --fused    # with that line

The model learns to say, at the end of a sequence, whether two marked numbers in it have a sum above 1
(the adding problem of Hochreiter and Schmidhuber, 1997).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import fusedlstm.torch as fused


class Adder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 128, batch_first=True)
        self.head = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 2)
        _, (h, _) = self.lstm(x)
        return self.head(h[-1]).squeeze(-1)


def batch(size: int, steps: int) -> tuple[Tensor, Tensor]:
    """Sequences (size, steps, 2) of numbers and marks, and the answers (size,)."""
    numbers, marks = torch.rand(size, steps), torch.zeros(size, steps)
    marks.scatter_(1, torch.rand(size, steps).topk(2).indices, 1)
    return torch.stack([numbers, marks], -1), ((numbers * marks).sum(1) > 1).float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fused", action="store_true", help="accelerate the model")
    parser.add_argument("--updates", type=int, default=300)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Adder()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    if options.fused:
        print(fused.accelerate(model))  # the line

    start = time.perf_counter()
    for update in range(1, options.updates + 1):
        x, answer = batch(64, 50)
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % 50 == 0 or update == options.updates:
            seconds = time.perf_counter() - start
            print(f"update {update}: loss {loss.item():.4f}, {seconds / update * 1e3:.1f} ms an update")


if __name__ == "__main__":
    main()
