"""The package as a user meets it: imports from anywhere, what they cost, and the README."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fusedlstm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# What `import fusedlstm` must leave alone: it may cost 0.3 s over importing NumPy.
HEAVY = (
    "numba",
    "llvmlite",
    "safetensors",
    "tqdm",
    "threadpoolctl",
    "torch",
    "cupy",
    "keras",
    "sympy",
    "scipy",
)


def python(code: str, folder: Path) -> str:
    """What a program prints that runs in a folder outside the repository."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_brings_numpy_only(tmp_path: Path) -> None:
    code = f"import fusedlstm, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code, tmp_path).strip() == "[]"


def test_every_module_is_installed_under_its_package(tmp_path: Path) -> None:
    modules = []
    for folder, package in (
        ("fusedlstm", "fusedlstm"),
        ("kernels", "fusedlstm.kernels"),
        ("benchmarks", "fusedlstm.benchmarks"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules.append(".".join((package, *parts)).removesuffix(".__init__"))
    assert {"fusedlstm.layers", "fusedlstm.kernels.cpu.engine", "fusedlstm.kernels.cuda"} <= set(modules)
    code = f"from importlib.util import find_spec; print([n for n in {modules} if find_spec(n) is None])"
    assert python(code, tmp_path).strip() == "[]"


def test_no_other_name_is_taken(tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; print(find_spec('kernels'), find_spec('benchmarks'))"
    assert python(code, tmp_path).strip() == "None None"


def test_the_public_names_are_there() -> None:
    for name in fusedlstm.__all__:
        assert getattr(fusedlstm, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fusedlstm.no_such_name


def test_the_version_is_that_of_the_distribution() -> None:
    assert fusedlstm.__version__ == metadata.version("fusedlstm")


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(fusedlstm.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_the_readme_run_as_shown(example: str, tmp_path: Path) -> None:
    python(example, tmp_path)


def test_the_readme_begins_with_what_a_newcomer_needs() -> None:
    first_screen = README[: README.index("\n## ")]
    assert EXAMPLES[0] in first_screen
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 10
    assert "pip install -e . && fusedlstm demo\n" in first_screen
    assert 'pip install -e ".[test]" && pytest -n auto\n' in first_screen


def test_links_of_the_readme_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    assert links
    assert [link for link in links if link not in anchors and not (ROOT / link).exists()] == []
