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


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    file, script = tmp_path / "gradients.pt", str(EXAMPLES / "train_ddp.py")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
    options = ("--steps", "2", "--batch", "8", "--hidden", "24", "--gradients", str(file))
    printed = run(*launcher, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
                  script, *options)  # fmt: skip
    assert "nats a character" in printed
    train = example("train_ddp")
    torch.manual_seed(0)
    model = train.CharacterModel(24)
    train.loss_of(model, train.batch(0, 8)).backward()
    shared = torch.load(file)
    assert shared.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-4, atol=1e-6)


PROGRAMS = {"custom_cell.py": ["--quick"], "train_torch.py": ["--fused", "--updates", "2"]}


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_run(name: str) -> None:
    assert " ms" in run(str(EXAMPLES / name), *PROGRAMS[name])
