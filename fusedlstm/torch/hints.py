"""Which modules call a cell in a Python loop over time, as far as their source tells."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

_HINT = (
    "calls {cells} step by step, in a Python loop: a layer runs all steps at once, and Recurrent does so for "
    "a cell of your own"
)


def loops(module: nn.Module) -> str | None:
    """What to say to the author of a module whose ``forward`` calls a cell of its own in a loop."""
    cells = {name for name, child in module._modules.items() if _has_cells(child)}
    if not cells or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    called = sorted(cells & _called_in_loops(type(module).forward))
    return _HINT.format(cells=", ".join(f"self.{name}" for name in called)) if called else None


def _has_cells(child: nn.Module | None) -> bool:
    """Whether it is a cell, or a list of cells."""
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        return any(map(_has_cells, child.children()))
    return isinstance(child, nn.RNNCellBase) or type(child).__name__.endswith("Cell")


def _called_in_loops(function: Any) -> set[str]:
    """Names of the attributes of `self` that are called, or of which entries are, inside a loop."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # there is no source
        return set()
    found = set()
    for loop in ast.walk(tree):
        if not isinstance(loop, (ast.For, ast.While, ast.ListComp, ast.GeneratorExp)):
            continue
        for call in ast.walk(loop):
            if isinstance(call, ast.Call):
                called = call.func
                while isinstance(called, ast.Subscript):
                    called = called.value
                if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                    found.add(called.attr)
    return found
