"""A record as tables: milliseconds, ratios, share of the limit."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .cases import Case
from .contenders import OURS, best_peer

LOW_SHARE = 0.8  # of the limit: below it a row is marked
BUSY = 0.25  # load for each core: above it the record says so
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PICTURE_WIDTH = 900


def seconds_of(row: dict[str, Any], name: str) -> float | None:
    """The median of a contender, None if there is none."""
    median: float | None = row["results"].get(name, {}).get("median")
    return median


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def peer_of(row: dict[str, Any]) -> float | None:
    """The time of the best peer."""
    times = {name: seconds for name in row["results"] if (seconds := seconds_of(row, name)) is not None}
    return times.get(best_peer(times) or "")


def groups(record: dict[str, Any]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """The rows by cell, mode, dtype and threads."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        case = row["case"]
        found.setdefault(
            f"{case['cell']}, {case['mode']}, {case['dtype']}, {_threads(case['threads'])}", []
        ).append(row)
    return found.items()


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def text(record: dict[str, Any], images: Sequence[str] = ()) -> str:
    """The whole record as a page in Markdown, with pictures at the addresses `images`."""
    return f"# fusedlstm beside its peers\n\n{results(record, images)}"


def results(record: dict[str, Any], images: Sequence[str] = ()) -> str:
    """The whole record in Markdown: where it was made, pictures, tables."""
    parts = [heading(record)]
    parts += [f"![{Path(image).stem}]({image})" for image in images]
    for title, rows in groups(record):
        parts += [f"## {title}", table(record, rows), *problems(record, rows)]
    return "\n\n".join(parts)


def heading(record: dict[str, Any]) -> str:
    """The machine, the limits and the versions."""
    machine, limits, settings = record["machine"], record["limits"], record["settings"]
    threads = max(limits["barrier"], key=int)
    rates = ", ".join(
        f"{rates[threads] / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rates in limits["multiply_add"].items()
    )
    reads = ", ".join(f"{level} {rates[threads] / 1e9:.0f}" for level, rates in limits["read"].items())
    versions = {
        name: version for c in record["contenders"].values() for name, version in c["versions"].items()
    }
    load = machine["load"]
    busy = f"; others were busy: load {load:.1f} before" if load and load > BUSY * machine["cores"] else ""
    caches = "cold" if settings["cold"] else "hot"
    command = f"    {record['command']}\n\n" if "command" in record else ""
    return command + (
        f"{machine['processor']}, {machine['cores']} cores, {limits['registers']}; "
        f"{caches} caches, {record['date']}, commit {record['commit']}{busy}\n\n"
        f"Limits of {_threads(int(threads))}, measured: {rates}; reads in GB/s: {reads}; "
        f"barrier {limits['barrier'][threads] * 1e9:.0f} ns\n\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def table(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Milliseconds of each contender, how many times ours that is, and our share of the limit."""
    names = [name for name in record["contenders"] if any(seconds_of(row, name) for row in rows)]
    ours = next((name for name in OURS if name in names), None)
    header = ["T", "B", "I", "H", *(record["contenders"][name]["title"] for name in names)]
    header += ["best peer / ours", "limit", "share"] if ours else ["limit"]
    lines = [cells_of_row(row, names, ours) for row in rows]
    if ours:
        lines.append(means(rows, names, ours))
    return markdown(header, lines)


def cells_of_row(row: dict[str, Any], names: list[str], ours: str | None) -> list[str]:
    """One row of the table."""
    case, bound = row["case"], row["bound"]
    mine = seconds_of(row, ours) if ours else None
    cells = [str(case[size]) for size in ("steps", "batch", "inputs", "hidden")]
    for name in names:
        seconds = seconds_of(row, name)
        cell = outcome(row["results"].get(name, {})) if seconds is None else milliseconds(seconds)
        if seconds and mine and name != ours:
            cell += f" ({seconds / mine:.2f})"
        cells.append(cell)
    peer = peer_of(row)
    if ours:
        cells.append(f"{peer / mine:.2f}" if mine and peer else "")
    cells.append(f"{milliseconds(bound['seconds'])} {bound['name']}")
    if ours:
        share = bound["seconds"] / mine if mine else None
        cells.append("" if share is None else f"{share:.0%}{' low' if share < LOW_SHARE else ''}")
    return cells


def means(rows: list[dict[str, Any]], names: list[str], ours: str) -> list[str]:
    """The last row: geometric means of the ratios and of the share."""
    cells = ["geometric mean", "", "", ""]
    for name in names:
        ratios = [b / a for row in rows if (a := seconds_of(row, ours)) and (b := seconds_of(row, name))]
        cells.append(f"({geometric_mean(ratios):.2f})" if ratios and name != ours else "")
    pairs = [(seconds_of(row, ours), peer_of(row), row["bound"]["seconds"]) for row in rows]
    ratios = [peer / mine for mine, peer, _ in pairs if mine and peer]
    shares = [bound / mine for mine, _, bound in pairs if mine]
    cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
    return [*cells, "", f"{geometric_mean(shares):.0%}" if shares else ""]


SAME = 0.1  # how far a ratio may be from that of another record to count as the same


def against(record: dict[str, Any], other: dict[str, Any]) -> str:
    """How far each ratio of a peer's time to ours is from that in another record, as Markdown."""
    before = {Case(**row["case"]): row for row in other["rows"]}
    names = [name for name in record["contenders"] if name not in OURS]
    lines, changes, best = [], [], []
    for row in record["rows"]:
        case = Case(**row["case"])
        if case not in before:
            continue
        cells, both = [], []
        for name in names:
            now, then = ratio_of(row, name), ratio_of(before[case], name)
            cells.append(f"{then:.2f} to {now:.2f}, {now / then - 1:+.0%}" if now and then else "-")
            both += [(now, then)] if now and then else []
        lines.append([str(case), *cells])
        changes += [abs(now / then - 1) for now, then in both]
        if both:
            now, then = map(min, zip(*both))
            best.append(abs(now / then - 1))
    near, nearest = (sum(change <= SAME for change in some) for some in (changes, best))
    header = ["case", *(record["contenders"][name]["title"] for name in names)]
    summary = (
        f"{near} of {len(changes)} ratios to ours are within {SAME:.0%} of those of {other['date']}, "
        f"and so is that of the best peer in {nearest} of {len(best)} rows"
    )
    return f"{markdown(header, lines)}\n\n{summary}"


def ratio_of(row: dict[str, Any], name: str) -> float | None:
    """A contender's time over ours."""
    ours = next((seconds for mine in OURS if (seconds := seconds_of(row, mine))), None)
    seconds = seconds_of(row, name)
    return seconds / ours if seconds and ours else None


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def outcome(result: dict[str, Any]) -> str:
    """What stands in the place of a time."""
    return "failed" if "failed" in result else "-"


def problems(record: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Who failed, where and why."""
    lines = [
        f"* {record['contenders'][name]['title']}, {Case(**row['case']).sizes}: {result['failed']}"
        for row in rows
        for name, result in row["results"].items()
        if "failed" in result
    ]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def page(record: dict[str, Any]) -> str:
    """A self-contained HTML page with pictures."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("/*RECORD*/", json.dumps(record).replace("</", "<\\/"))


def pictures(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of the page as PNG files, one for each picture and mode; which were written.

    Raises:
        FileNotFoundError: if there is no browser to draw them.
    """
    browser = find_browser()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "page.html"
        source.write_text(page(record), encoding="utf-8")
        for group in dict.fromkeys(page_group(row["case"]) for row in record["rows"]):
            for section in ("ratios", "roofline", "curves"):
                path = folder / f"{section}-{'-'.join(group.split(', '))}.png"
                if take_picture(browser, f"{source.as_uri()}#{section}/{quote(group)}", path):
                    written.append(path)
    return written


def find_browser() -> str:
    """The program that draws pictures.

    Raises:
        FileNotFoundError: if there is no Chromium or Chrome.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(
            f"pictures need a browser, and there is none of {', '.join(BROWSERS)}: install Chromium, or do "
            "without --png"
        )
    return found


def page_group(case: dict[str, Any]) -> str:
    """The name of a group of rows on the page."""
    return f"{case['cell']}, {case['mode']}, {case['dtype']}"


def take_picture(browser: str, address: str, path: Path) -> bool:
    """Write a section of the page as a PNG file; false if the section is empty."""
    options = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--virtual-time-budget=2000", "--force-device-scale-factor=2"]

    def draw(height: str, *more: str) -> str:
        command = [*options, f"--window-size={PICTURE_WIDTH},{height}", *more, address]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    height = re.search(r'data-height="(\d+)"', draw("800", "--dump-dom"))
    if height is None:
        return False
    draw(height[1], f"--screenshot={path.absolute()}")
    return True


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, its columns aligned as text as well."""
    widths = [max(2, *map(len, column)) for column in zip(header, *rows)]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |"

    return "\n".join([line(header), line("-" * (width - 1) + ":" for width in widths), *map(line, rows)])
