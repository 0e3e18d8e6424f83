"""Two processes that share a batch, against one that has it all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_two(script: Path, *options: str) -> str:
    """Run a program as two processes that know of each other."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
    place = ("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    return run(*launcher, *place, str(script), *options)


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    file = tmp_path / "gradients.pt"
    options = ("--steps", "2", "--batch", "8", "--hidden", "24", "--gradients", str(file))
    printed = run_two(EXAMPLES / "train_ddp.py", *options)
    assert "nats a character" in printed
    train = example("train_ddp")
    torch.manual_seed(0)
    model = train.CharacterModel(24)
    train.loss_of(model, train.batch(0, 8)).backward()
    shared = torch.load(file)
    assert shared.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-4, atol=1e-6)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from fusedlstm.torch import accelerate

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.LSTM(6, 10, 2, bidirectional=True), torch.nn.GRU(20, 7), torch.nn.RNN(7, 4)]
        )

    def forward(self, x, again):
        for layer in self.layers:
            x, _ = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return x

def updated(shards, way):
    \"\"\"Weights and gradients after three updates, with this process's half of the batch.\"\"\"
    torch.manual_seed(0)
    model, batch = Model(), torch.randn(3, 5, 8, 6)
    if shards:
        assert len(accelerate(model).replaced) == 3
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        batch = batch.chunk(2, 2)[dist.get_rank()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batch:
        optimizer.zero_grad()
        loss = model(x, way == "checkpoint").square().mean()
        if way == "called again":
            with torch.no_grad():
                model(x, False)
        loss.backward()
        optimizer.step()
    found = [part for p in model.parameters() for part in (p, p.grad)]
    return [part.full_tensor() if shards else part for part in found]

dist.init_process_group("gloo")
torch.testing.assert_close(updated(True, sys.argv[1]), updated(False, sys.argv[1]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("way", ["plain", "checkpoint", "called again"])
def test_weights_may_be_sharded(way: str, tmp_path: Path) -> None:
    """FSDP frees the gathered weights after forward, and gathers them again for backward."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    run_two(script, way)


PROGRAMS = {"custom_cell.py": ["--quick"], "train_torch.py": ["--fused", "--updates", "2"]}


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_run(name: str) -> None:
    assert " ms" in run(str(EXAMPLES / name), *PROGRAMS[name])
