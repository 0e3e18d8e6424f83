"""Run the Keras programs of this folder and write a page about each to docs/programs.

    python examples/pages.py                             # all of them
    python examples/pages.py sentiment text_generation   # these

What a program has to offer for its page:

- its docstring: a title, a colon and a summary in the first line, then what it shows, its data and where
  they come from;
- functions named ``*_model``, which build its models and are shown;
- ``main(argv)``, which takes ``--picture FILE`` and returns its figures by name, of which the first is the
  figure of merit and the second that of the baseline;
- what it prints.

Every program runs in a process of its own, with its default settings, on Keras's PyTorch backend;
compare_layers.py then measures how much faster it learns than with the layers of Keras. Programs that fail
are named at the end.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from compare_layers import EXAMPLES, THEIRS, Comparison, alone, compare, load
from tqdm import tqdm

PROGRAMS = (
    "text_generation",
    "sentiment",
    "model_selection",
    "text_classification",
    "sequence_labelling",
    "translation",
    "dialogue",
    "summarise",
    "forecasting",
    "speech",
    "compare_cells",
)


class Page(NamedTuple):
    """What is known about a program that has run."""

    title: str  # the first line of its docstring up to the colon
    summary: str  # the rest of that line
    about: str  # the rest of the docstring
    models: str  # source code of the functions that build its models
    figures: dict[str, float]  # the first is the figure of merit, the second that of the baseline
    seconds: float
    busy: bool  # whether other programs used the cores
    printed: str


class Tee(io.StringIO):
    """Keeps what is printed, and shows it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        return super().write(text)


def run(program: str, arguments: Sequence[str]) -> Page:
    """Run a program and return what its page says."""
    busy = os.getloadavg()[0] > os.cpu_count() / 2 if hasattr(os, "getloadavg") else False
    start = time.perf_counter()
    with redirect_stdout(Tee()) as printed:
        module = load(program)
        figures = module.main(arguments)
    seconds = time.perf_counter() - start
    first, _, about = inspect.getdoc(module).partition("\n")
    title, _, summary = first.partition(": ")
    models = [
        inspect.getsource(function)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.endswith("_model") and function.__module__ == program
    ]
    return Page(
        title, summary, about.strip(), "\n\n".join(models), figures, seconds, busy, printed.getvalue().strip()
    )


def markdown(program: str, page: Page, layers: Comparison, picture: bool) -> str:
    """The page of a program."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in page.figures.items())
    ours, theirs = (1e3 * training.batch for training in layers)
    agree = f"agree up to {layers.difference:.0e} of them" if layers.difference else "are the same"
    cores = f"{os.cpu_count()} cores" + ", which others used too" * page.busy
    parts = [
        f"# {page.title}",
        page.summary[:1].upper() + page.summary[1:],
        page.about,
        f"![{page.title}](../pictures/program-{program}.png)" if picture else "",
        f"| figure | value |\n|---|---|\n{rows}\n| seconds on {cores} | {page.seconds:.0f} |",
        _models(program, page),
        f"## With `{THEIRS}`",
        f"With the layers of `{THEIRS}` in the place of ours, and the same seed, the losses of the first\n"
        f"{len(layers.ours.losses)} batches {agree}. A batch of the\n"
        f"first model takes {theirs:.1f} ms there and {ours:.1f} ms here: {layers.faster:.1f} times as fast.",
        "## What it prints",
        f"```text\n{page.printed}\n```",
        f"Made by `python examples/pages.py {program}`.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _models(program: str, page: Page) -> str:
    """The code that builds the models; nothing where they are another program's."""
    if not page.models:
        return ""
    head = f"## The model\n\nFrom [{program}.py](../../examples/{program}.py):"
    return f"{head}\n\n```python\n{page.models.strip()}\n```"


def table(records: dict[str, dict], folder: str) -> str:
    """One row a program, with links to pages in a folder."""
    lines = [
        f"| program | figure of merit | baseline | seconds | faster than `{THEIRS}` on PyTorch |",
        "|---|---|---|---|---|",
    ]
    for program in filter(records.__contains__, PROGRAMS):
        record = records[program]
        (name, value), (baseline, reached) = list(record["figures"].items())[:2]
        lines.append(
            f"| [{record['title']}]({folder}{program}.md) | {name}: {value:.4g} | {baseline}: {reached:.4g} "
            f"| {record['seconds']:.0f}{' (busy)' * record['busy']} | {record['faster']:.1f} times |"
        )
    return "\n".join(lines)


def write(docs: Path, program: str, page: Page, layers: Comparison) -> None:
    """Write the page of a program, and its row in the tables of the index and of the README."""
    picture = (docs / "pictures" / f"program-{program}.png").exists()
    (docs / "programs" / f"{program}.md").write_text(
        markdown(program, page, layers, picture), encoding="utf-8"
    )
    path = docs / "programs" / "figures.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    records[program] = {
        "title": page.title,
        "figures": page.figures,
        "seconds": page.seconds,
        "faster": layers.faster,
        "busy": page.busy,
    }
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")  # figures stay in their order
    write_tables(docs, records)


def write_tables(docs: Path, records: dict[str, dict]) -> None:
    """Write the index of the pages, and the table in the README."""
    index = f"""\
        # The programs

        The programs that people write with LSTMs, in [examples](../../examples): models of `keras` whose
        recurrent layers come from `fusedlstm.keras`. Each figure comes from running the program with its
        default settings; seconds are of the whole program, on {os.cpu_count()} cores (busy: while other
        programs used them too). The last column says how much faster its first model learns than with
        `{THEIRS}`, both on PyTorch, the backend that the programs choose; for the other backends see
        [Keras](../keras.md#speed).

        """
    (docs / "programs" / "README.md").write_text(
        textwrap.dedent(index) + table(records, "") + "\n", encoding="utf-8"
    )
    readme = docs.parent / "README.md"
    if readme.exists():
        replaced = re.sub(
            "(?<=<!-- programs: begin -->\n).*(?=<!-- programs: end -->)",
            table(records, "docs/programs/") + "\n",
            readme.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        readme.write_text(replaced, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", nargs="*", help="default: all of them")
    parser.add_argument("--docs", type=Path, default=EXAMPLES.parent / "docs", help="folder to write to")
    options = parser.parse_args(argv)
    if unknown := set(options.program) - set(PROGRAMS):
        parser.error(f"no such program: {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")

    for folder in ("programs", "pictures"):
        (options.docs / folder).mkdir(parents=True, exist_ok=True)
    failed = []
    for program in tqdm(options.program or PROGRAMS, "programs", unit="program"):
        print(f"\n=== {program}", flush=True)
        picture = options.docs / "pictures" / f"program-{program}.png"
        try:
            page = alone(run, program, ["--picture", str(picture)])
            write(options.docs, program, page, compare(program))
        except (Exception, SystemExit):  # whatever it is, the other programs shall have their pages
            traceback.print_exc()
            failed.append(program)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
