"""A record of benchmarks.gpu as text."""

from __future__ import annotations

from typing import Any

from .gpu_contenders import CONTENDERS

HEADER = (
    "| cell | T | B | H | precision | forward, ms | cuDNN | ratio | forward and backward, ms | cuDNN | ratio "
    "| us a step | with barriers | cuDNN | host, us | cuDNN |\n" + "|---" * 16 + "|"
)


def line(row: dict[str, Any]) -> str:
    """One row as Markdown; us a step are without the product of the input, the host's forward.

    "with barriers" is our persistent kernel with one every step, instead of polling.
    """

    def figure(who: str, what: str, which: str = "median") -> float:
        found = row[who].get(what)
        return float(found[which]) if found else float("nan")

    def pair(what: str, which: str = "median", scale: float = 1) -> list[float]:
        return [scale * figure(who, what, which) for who in CONTENDERS]

    values = [str(row[key]) for key in ("cell", "steps", "batch", "hidden", "precision")]
    for what in ("forward", "train"):
        mine, theirs = pair(what)
        values += [f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}"]
    mine, theirs = pair("recurrent", scale=1000 / row["steps"])
    met = figure("fusedlstm", "barriers") * 1000 / row["steps"]
    values += [f"{value:.2f}" for value in (mine, met, theirs)]
    values += [f"{value:.0f}" for value in pair("forward", "host", 1000)]
    notes = [f" {who} failed: {row[who]['failed']}" for who in CONTENDERS if "failed" in row[who]]
    return "| " + " | ".join(values).replace("nan", "") + " |" + "".join(notes)


def about(record: dict[str, Any]) -> str:
    """Where and when, and the floors."""
    floor = record["floors"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    said = [f"{record['gpu']}, commit {record['commit']}, {record['date']}; {versions}."]
    if "failed" in floor:
        said.append(f"The floors could not be measured: {floor['failed']}.")
    elif not record["simulated"]:
        barriers = ", ".join(f"{count} blocks {us:.2f} us" for count, us in floor["barrier"].items())
        exchanges = ", ".join(f"{count} blocks {us:.2f} us" for count, us in floor["exchange"].items())
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in floor["product"].items())
        empty = floor["launch"]
        said += [
            f"An empty launch: {1000 * empty['median']:.1f} us, {1000 * empty['host']:.1f} us of the host's.",
            f"One barrier of {barriers}.",
            f"One exchange of a number between {exchanges}.",
            f"A copy: {floor['copy'] / 1e9:.0f} GB/s; products: {rates}.",
        ]
    return "\n".join(said) + "\n"


def table(record: dict[str, Any]) -> str:
    """A record as Markdown."""
    left = f"\n\n{record['left out']} rows were left out for lack of time." if record["left out"] else ""
    return "\n".join([about(record), HEADER, *(line(row) for row in record["rows"])]) + left


def document(record: dict[str, Any]) -> str:
    """A record as a page of the docs."""
    return (
        "# Results on a GPU\n\n"
        "Made by `python -m benchmarks.gpu` and, of its record, `python -m benchmarks.gpu --document FILE`. "
        "A ratio is cuDNN's time over ours. " + table(record) + "\n"
    )
