"""The pages of results in docs and the summary in the README, made from the records in benchmarks/results.

python -m benchmarks.documents
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import report
from .contenders import OURS
from .runner import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

PAGES = {"cpu": "results.md", "peephole": "results_peephole.md"}  # by record
SCALING = "scaling"  # a record whose tables and pictures stand inside a page that explains them
REPLACED = {  # what our drop-ins take the place of
    "fusedlstm-torch": "torch",
    "fusedlstm-keras-tensorflow": "keras-tensorflow",
    "fusedlstm-keras-jax": "keras-jax",
    "fusedlstm-keras-torch": "keras-torch",
}


def fill(path: Path, text: str) -> None:
    """Replace what stands between the markers of a page.

    Raises:
        ValueError: if the page has no markers.
    """
    page = path.read_text(encoding="utf-8")
    filled, count = re.subn(
        r"(<!-- results: begin[^>]*-->\n).*?(<!-- results: end -->)",
        lambda found: f"{found[1]}{text}\n{found[2]}",
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(
            f"{path.name} needs one <!-- results: begin --> and <!-- results: end -->, has {count}"
        )
    path.write_text(filled, encoding="utf-8")


def summary(records: Iterable[dict[str, Any]]) -> str:
    """For each group of rows: us against the best peer, and each drop-in against what it replaces."""
    lines, commands = [], []
    for record in records:
        commands.append(record["command"])
        for title, rows in report.groups(record):
            what = f"{title} ({len(commands)})"
            peers = [title for name, title in titles(record) if name not in OURS]
            lines += line(what, "fusedlstm", f"best of {len(peers)} peers", rows, "fusedlstm", report.peer_of)
            for ours, theirs in REPLACED.items():
                if ours in record["contenders"] and theirs in record["contenders"]:
                    names = dict(titles(record))
                    lines += line(what, names[ours], names[theirs], rows, ours, median_of(theirs))
    table = report.markdown(
        ["rows (command)", "we", "they", "ahead on", "their time / ours (least to most)"], lines
    )
    return "\n".join([table, "", *(f"{n}. `{command}`" for n, command in enumerate(commands, 1))])


def titles(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The names and titles of the contenders."""
    return [(name, contender["title"]) for name, contender in record["contenders"].items()]


def median_of(name: str) -> Callable[[dict[str, Any]], float | None]:
    """The time of a contender in a row."""
    return lambda row: report.seconds_of(row, name)


def line(
    what: str,
    we: str,
    they: str,
    rows: Sequence[dict[str, Any]],
    ours: str,
    theirs: Callable[[dict[str, Any]], float | None],
) -> list[list[str]]:
    """One line of the summary, none if there is nothing to compare."""
    pairs = [(report.seconds_of(row, ours), theirs(row)) for row in rows]
    ratios = [peer / mine for mine, peer in pairs if mine and peer]
    if not ratios:
        return []
    ahead = sum(ratio > 1 for ratio in ratios)
    spread = f"{report.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [[what, we, they, f"{ahead} of {len(ratios)}", spread]]


def main() -> None:
    """Write all pages for which there is a record."""
    records = {name: read(RESULTS / f"{name}.json") for name in [*PAGES, SCALING]}
    for name, page in PAGES.items():
        images = report.pictures(records[name], DOCS / "pictures" / name)
        text = report.text(records[name], [image.relative_to(DOCS).as_posix() for image in images])
        (DOCS / page).write_text(text + "\n", encoding="utf-8")
    images = report.pictures(records[SCALING], DOCS / "pictures" / SCALING)
    curves = [image.relative_to(DOCS).as_posix() for image in images if image.name.startswith("curves")]
    fill(DOCS / "scaling.md", report.results(records[SCALING], curves))
    fill(ROOT / "README.md", summary(records[name] for name in PAGES))


if __name__ == "__main__":
    main()
