"""What the tests of the programs in examples/ share: import it before any of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np

RANDOM = np.random.default_rng


def small(program: ModuleType, folder: Path, *options: str) -> dict[str, float]:
    """The figures of a program, which are finite; it saves a picture."""
    picture = folder / "picture.png"
    figures = program.main([*options, "--picture", str(picture)])
    assert len(figures) >= 2
    assert all(np.isfinite(value) for value in figures.values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    return figures
