"""The documentation: every block of Python runs as shown, page by page, and links and commands are right.

The blocks of a page run one after the other in one namespace.  Pages that need no framework share a process,
and those that need one another, since importing a framework takes seconds.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fusedlstm import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "programs" not in path.parts)
PROGRAMS = sorted((DOCS / "programs").glob("*.md"))
ROOT_PAGES = [
    ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
]

# What stands before the blocks of a page that quotes the source.
BEFORE = {"cells.md": "from fusedlstm import cell\nfrom fusedlstm.math import *\n"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str = "python") -> list[str]:
    """The blocks of a language that a page shows."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def framework(code: str) -> str:
    """The framework whose process the blocks of a page run in."""
    for name in ("keras", "torch", "onnx", "jax"):
        if re.search(rf"^\s*(import|from) (fusedlstm\.)?{name}\b", code, re.MULTILINE):
            return "frameworks"
    return "arrays"


def code_of(path: Path) -> str:
    return BEFORE.get(path.name, "") + "\n".join(blocks(path))


# each block of the README runs by itself, in test_package.py
RUN = [path for path in [*PAGES, *ROOT_PAGES[1:]] if blocks(path)]

RUNNER = """
import os, sys, traceback
os.environ.setdefault("KERAS_BACKEND", "torch")
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        code = file.read()
    try:
        exec(compile(code, path, "exec"), {"__name__": "__page__"})
    except BaseException:
        traceback.print_exc()
        print("FAILED", path)
"""


@pytest.mark.parametrize("kind", ["arrays", "frameworks"])
def test_every_block_of_python_runs_as_shown(kind: str, tmp_path: Path) -> None:
    files = []
    for path in RUN:
        code = code_of(path)
        if framework(code) == kind:
            files.append(tmp_path / name_of(path).replace("/", "_"))
            files[-1].write_text(code, encoding="utf-8")
    assert len(files) > 5
    command = [sys.executable, "-c", RUNNER, *map(str, files)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    failed = re.findall(r"^FAILED (.*)$", done.stdout, re.MULTILINE)
    assert failed == [], done.stderr


@pytest.mark.parametrize("path", [path for path in PROGRAMS if blocks(path)], ids=lambda path: path.stem)
def test_the_models_that_pages_of_programs_show_are_those_of_the_programs(path: Path) -> None:
    source = (ROOT / "examples" / f"{path.stem}.py").read_text(encoding="utf-8")
    for block in blocks(path):
        for function in re.split(r"\n\n+(?=def )", block.strip()):
            assert function.strip() in source


def commands(text: str) -> list[list[str]]:
    """The commands of this package that a page shows, as arguments."""
    lines = re.findall(r"^    (?:.*&& )?fusedlstm ((?:demo|info|check|bench).*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("path", [*PAGES, *ROOT_PAGES], ids=name_of)
def test_commands_have_options_that_there_are(path: Path) -> None:
    for arguments in commands(path.read_text(encoding="utf-8")):
        cli._parser().parse_args(arguments)


def links(path: Path) -> list[str]:
    """Where the links of a page lead that are not to other sites."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "``", text))
    return [link for link in found if "://" not in link]


def anchors(path: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *PROGRAMS, *ROOT_PAGES], ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in links(path):
        target, _, anchor = link.partition("#")
        file = path if not target else (path.parent / target).resolve()
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_english_and_chinese_pages_have_the_same_code() -> None:
    """But for the names of what they explain, and comments."""

    def bare(path: Path) -> list[str]:
        return [re.sub(r"  # .*", "", block) for block in blocks(path)]

    english, chinese = bare(DOCS / "tutorial.md"), bare(DOCS / "zh" / "tutorial.md")
    assert chinese[: len(english)] == english
