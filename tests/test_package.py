"""The package as a user meets it: imports from anywhere, what they cost, and the README."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy
import pytest

import fusedlstm
import fusedlstm.keras

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

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


def examples(page: str) -> list[str]:
    """The code that a page shows."""
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


SITE = str(Path(numpy.__file__).parents[1])
EXAMPLES = examples(README)


def is_suite(name: str) -> bool:
    """Whether a file is run by pytest, and not installed."""
    return name.startswith(("test_", "conftest"))


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
            if is_suite(path.name):
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules.append(".".join((package, *parts)).removesuffix(".__init__"))
    assert {"fusedlstm.layers", "fusedlstm.kernels.cpu.engine", "fusedlstm.kernels.cuda"} <= set(modules)
    code = f"from importlib.util import find_spec; print([n for n in {modules} if find_spec(n) is None])"
    assert python(code, tmp_path).strip() == "[]"


def test_a_checkout_need_not_be_installed() -> None:
    """What is installed, or lies on PYTHONPATH, is another copy; its own parts are found all the same."""
    code = (
        "import fusedlstm, fusedlstm.kernels.random as r, benchmarks.cases, fusedlstm.benchmarks as b\n"
        "print(fusedlstm.__file__, r.__file__, b.__file__, sep='\\n')"
    )
    # without site-packages there is no installation; NumPy, which is needed, lies there too
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.append({SITE!r})\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(ROOT / part) for part in ("fusedlstm/__init__.py", "kernels/random.py", "benchmarks/__init__.py")
    ]


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


def test_a_wheel_has_the_version_and_the_modules_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    for folder in ("fusedlstm", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    module = tree / "fusedlstm" / "__init__.py"
    module.write_text(module.read_text().replace(fusedlstm.__version__, "9.8.7"))
    environment = "import os; os.environ['GITHUB_REPOSITORY'] = 'someone/fusedlstm'; "
    python(f"{environment}from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})", tree)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("fusedlstm-9.8.7-")
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fusedlstm/")}
    sources = {path.relative_to(ROOT) for path in (ROOT / "fusedlstm").rglob("*.py")}
    sources |= {Path("fusedlstm", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert sources <= names
    assert {"__init__.py", "shapes.json", "page.html"} <= {n.name for n in names if "benchmarks" in n.parts}
    assert [name for name in names if is_suite(name.name) or "results" in name.parts] == []
    described = zipfile.ZipFile(wheel).read("fusedlstm-9.8.7.dist-info/METADATA").decode()
    assert "Project-URL: Source, https://github.com/someone/fusedlstm" in described
    assert "[docs/torch.md](https://github.com/someone/fusedlstm/blob/main/docs/torch.md)" in described
    assert "](https://github.com/someone/fusedlstm/raw/main/docs/pictures/" in described
    assert re.findall(r"\]\((?!https?:|#)", described) == []


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(fusedlstm.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_the_readme_run_as_shown(example: str, tmp_path: Path) -> None:
    python(example, tmp_path)


def test_the_readme_names_the_functions_that_a_cell_may_use() -> None:
    (functions,) = re.findall(r"those of `fusedlstm.math`: (.*?)\. ", README, re.DOTALL)
    assert re.findall(r"`(\w+)`", functions) == fusedlstm.math.__all__


def test_the_readme_begins_with_what_a_newcomer_needs() -> None:
    first_screen = README[: README.index("\n## ")]
    assert EXAMPLES[0] in first_screen
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 10
    assert "pip install -e . && fusedlstm demo\n" in first_screen
    assert 'pip install -e ".[test]" && pytest -n auto\n' in first_screen


def test_links_of_the_readme_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not leads_somewhere(*link.partition("#")[::2])] == []


def leads_somewhere(path: str, anchor: str) -> bool:
    """Whether a link from the README finds its file, and in it the heading that it names."""
    target = ROOT / (path or "README.md")
    if not anchor or not target.is_file():
        return target.exists() and not anchor
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {heading.lower().replace(" ", "-") for heading in headings}


# --- What tools see -------------------------------------------------------------------------------------


def test_dir_shows_the_public_names_and_all_of_them() -> None:
    assert set(dir(fusedlstm)) == {*fusedlstm.__all__, "__version__"}
    assert "set_num_threads" in dir(fusedlstm)
    assert dir(fusedlstm.math) == sorted(fusedlstm.math.__all__)


@pytest.mark.parametrize(
    "module", ["fusedlstm", "fusedlstm.math", "fusedlstm.cells", "fusedlstm.torch", "fusedlstm.keras"]
)
def test_every_exported_name_is_documented(module: str) -> None:
    namespace = importlib.import_module(module)
    inherited = {object.__doc__, dict.__doc__}
    for name in namespace.__all__:
        value = getattr(namespace, name)
        assert value.__doc__ not in (None, "", *inherited), name
        for member, method in vars(value).items() if isinstance(value, type) else ():
            if (
                inspect.isfunction(method)
                and not member.startswith("_")
                and method.__module__ == value.__module__
            ):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_layers_of_keras_have_the_signature_of_keras(name: str) -> None:
    assert inspect.signature(getattr(fusedlstm.keras, name)) == inspect.signature(getattr(keras.layers, name))


@pytest.mark.parametrize(
    ("framework", "front_end", "advice"),
    [
        ("torch", "torch", "download.pytorch.org/whl/cpu"),
        ("keras", "keras", "pip install 'keras>=3.10'"),
        ("tensorflow", "keras", "set KERAS_BACKEND to torch"),
    ],
)
def test_a_front_end_without_its_framework_says_what_to_install(
    framework: str, front_end: str, advice: str, tmp_path: Path
) -> None:
    code = (
        "import os, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {framework!r}:\n"
        f"            raise ModuleNotFoundError('No module named ' + name, name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "os.environ['KERAS_BACKEND'] = 'tensorflow'\n"
        f"try:\n    import fusedlstm.{front_end}\n"
        "except ImportError as error:\n    print(error)"
    )
    said = python(code, tmp_path)
    assert f"fusedlstm.{front_end} needs {framework}, which is not installed" in said
    assert advice in said


def test_a_package_without_its_kernels_says_how_to_install_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fusedlstm", tmp_path / "fusedlstm", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.raises(AssertionError, match=r"kernels of fusedlstm are missing.*run: pip install -e \."):
        python("import sys; sys.path.insert(0, '.'); import fusedlstm", tmp_path)
