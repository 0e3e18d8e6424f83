"""Train a character model on several processes: DistributedDataParallel around our LSTM, as ever.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Each process takes its share of every batch; the gradients are averaged while backward runs.  gloo carries
them between CPUs, nccl between GPUs.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedlstm.torch as fused

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be on his first entering "
    "a neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered as the rightful property of some one or other of their daughters. "
)  # Jane Austen, Pride and Prejudice (1813)
ALPHABET = sorted(set(TEXT))


class CharacterModel(nn.Module):
    """The next character from those before it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), 16)
        self.lstm = fused.LSTM(16, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, len(ALPHABET))

    def forward(self, text: Tensor) -> Tensor:  # (B, T)
        y, _ = self.lstm(self.embed(text))
        return self.head(y)  # (B, T, characters)


def batch(step: int, size: int, length: int = 32) -> Tensor:
    """(size, length + 1): pieces of the text, the same in every process."""
    text = torch.tensor([ALPHABET.index(character) for character in TEXT])
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (size, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    """The mean cross entropy of the next character, in nats."""
    return nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--gradients", help="write the gradients of the first step to this file")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.batch % ranks:
        raise ValueError(f"--batch must be a multiple of the {ranks} processes, got {options.batch}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    torch.manual_seed(0)
    model = DistributedDataParallel(CharacterModel(options.hidden).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        share = batch(step, options.batch).chunk(ranks)[rank].to(device)
        loss = loss_of(model, share)
        optimizer.zero_grad()
        loss.backward()
        if step == 0 and rank == 0 and options.gradients:
            torch.save({name: p.grad.cpu() for name, p in model.module.named_parameters()}, options.gradients)
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or step == options.steps - 1):
            print(f"step {step}: {loss.item():.3f} nats a character")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
