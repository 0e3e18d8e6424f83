"""The comparison: contenders in turn, round after round, and the record of what came out.

A sample is a number of calls that takes long enough to be timed; a round is a sample of each contender; a
result is the median over the rounds, with the quartiles beside it.  Contenders far behind sit out the later
rounds; where we or the best peer scatter, there are more of these two.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fusedlstm.files import check_writable
from fusedlstm.layers import BUILT_IN
from fusedlstm.options import integer, positive

from . import machine, report
from .cases import (
    DTYPES,
    MODES,
    Case,
    cases_of_set,
    expected,
    in_mode,
    make_data,
    parse_shapes,
    shape_sets,
    unique,
)
from .contender import Contender, Unsupported
from .contenders import OURS, absent, best_peer, choose
from .worker import Failed, Worker, contender_worker

SCHEMA = 1  # version of the record; see schema.json
MEASURING = (  # the options that say what is measured, and how
    *("set", "shapes", "mode", "cell", "dtype", "contenders"),
    *("threads", "rounds", "seconds", "cold", "timeout"),
)
FEWEST_ROUNDS = 3  # for those who are far behind
FAR = 3.0  # times the time of the best
MOST_ROUNDS = 3  # times as many rounds where results scatter
MOST_MEASUREMENTS = 4  # of the limits after the run, beside one before it
SCATTER = 0.05  # of the median between the quartiles


@dataclass
class Settings:
    """How to measure.

    Attributes:
        rounds: samples of each contender and case.
        seconds: that the calls of a sample take together, at least.
        cold: whether the caches are flushed before each call.
        timeout: seconds after which an answer of a contender is not waited for.
    """

    rounds: int = 7
    seconds: float = 0.05
    cold: bool = False
    timeout: float = 300.0


def compare(
    cases: Sequence[Case],
    contenders: Sequence[type[Contender]],
    settings: Settings,
    progress: Callable[[Case, str], None] = lambda case, name: None,
) -> list[dict[str, Any]]:
    """The results of all contenders for all cases, as in the schema; `progress` hears of every sample.

    If the user interrupts, the rows that are done are what there is.
    """
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as open_workers,
        suppress(KeyboardInterrupt),
    ):
        workers: dict[str, Worker] = {}
        threads = None
        right = Path(folder) / "expected.npz"
        for case in cases:
            if case.threads != threads:
                open_workers.close()
                threads = case.threads
                workers = {c.name: contender_worker(c, threads, settings.timeout) for c in contenders}
                for worker in workers.values():
                    open_workers.callback(worker.close)
            np.savez(right, **expected(case, make_data(case)))  # type: ignore[arg-type]
            results = compare_case(case, workers, right, settings, progress)
            rows.append({"case": case.to_json(), "results": results})
    return rows


def compare_case(
    case: Case,
    workers: dict[str, Worker],
    right: Path,
    settings: Settings,
    progress: Callable[[Case, str], None],
) -> dict[str, dict[str, Any]]:
    """The results of all contenders for one case."""
    results: dict[str, dict[str, Any]] = {}
    running = dict(workers)

    def ask(name: str, *request: Any) -> Any:
        """The answer of a contender; one that fails is out."""
        try:
            return workers[name].ask(*request)
        except (Unsupported, Failed) as error:
            del running[name]
            kind = "unsupported" if isinstance(error, Unsupported) else "failed"
            results[name] = {kind: str(error)}

    for name in workers:
        progress(case, name)
        if ready := ask(name, "prepare", case, str(right), settings.seconds, settings.cold):
            results[name] = {**ready, "samples": []}
    rounds = 0
    while rounds < settings.rounds or (rounds < MOST_ROUNDS * settings.rounds and scattered(results)):
        for name in turns(results, rounds, settings.rounds):
            progress(case, name)
            if seconds := ask(name, "sample"):
                results[name]["samples"].append(seconds)
        rounds += 1
    for name in list(running):
        ask(name, "release")
    return {name: summarize(result) for name, result in results.items()}


def turns(results: dict[str, dict[str, Any]], done: int, wanted: int) -> list[str]:
    """Whose turn it is in the round after `done`: all, later only those that are near the best.

    When all `wanted` rounds are done, it is ours and the best peer.
    """
    running = [name for name, result in results.items() if "samples" in result]
    if done < FEWEST_ROUNDS:
        return running
    best = {name: min(results[name]["samples"]) for name in running}
    if done >= wanted:
        return [name for name in running if name in OURS or name == best_peer(best)]
    return [name for name in running if name in OURS or best[name] < FAR * min(best.values())]


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the median and the quartiles of its samples."""
    samples = result.get("samples")
    if not samples:
        return result
    return {"median": statistics.median(samples), "quartiles": quartiles(samples), **result}


def quartiles(samples: Sequence[float]) -> list[float]:
    """The first and the third quartile."""
    return [float(q) for q in np.quantile(samples, [0.25, 0.75])]


def scattered(results: dict[str, dict[str, Any]]) -> bool:
    """Whether the samples of ours, or of the best peer, lie too far apart to tell who is ahead."""
    done = {name: result["samples"] for name, result in results.items() if result.get("samples")}
    medians = {name: statistics.median(samples) for name, samples in done.items()}
    for name, samples in done.items():
        if name in OURS or name == best_peer(medians):
            low, high = quartiles(samples)
            if high - low > SCATTER * medians[name]:
                return True
    return False


def beaten(row: dict[str, Any]) -> bool:
    """Whether somebody was faster than the limit allows."""
    medians = [result["median"] for result in row["results"].values() if "median" in result]
    return bool(medians) and min(medians) < row["bound"]["seconds"]


def record(
    cases: Sequence[Case],
    contenders: Sequence[type[Contender]],
    settings: Settings,
    progress: Callable[[Case, str], None] = lambda case, name: None,
) -> dict[str, Any]:
    """Compare, and all that is needed to understand the results, as in schema.json."""
    from .limits import best_of, bound, measure_apart  # they need the compiler, which other commands do not

    described = machine.describe()  # with the load before ours
    counts = sorted({case.threads for case in cases})
    limits = measure_apart(counts)
    rows = compare(cases, contenders, settings, progress)
    for _ in range(MOST_MEASUREMENTS):  # others may have disturbed the measurement
        limits = best_of(limits, measure_apart(counts))
        for case, row in zip(cases, rows):
            row["bound"] = bound(case, limits)._asdict()
        if not any(beaten(row) for row in rows):
            break
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": described,
        "settings": vars(settings),
        "limits": limits,
        "contenders": {c.name: {"title": c.title, "versions": c.versions()} for c in contenders},
        "rows": rows,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--set",
        metavar="NAME,...",
        help=f"sets of shapes: {', '.join(shape_sets())}, all (default: cpu, or streaming for --mode step)",
    )
    what.add_argument("--shapes", metavar="T,B,I,H;...", help="shapes of your own")
    what.add_argument(
        "--mode",
        default="forward",
        help=f"{', '.join(MODES)}, or several of them separated by commas (default: %(default)s)",
    )
    what.add_argument(
        "--cell", choices=BUILT_IN, help="of a set only this cell; with --shapes the cell (default: lstm)"
    )
    what.add_argument("--dtype", choices=DTYPES, default="float32")
    what.add_argument("--contenders", metavar="NAME,...", help="default: all that are installed")
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--threads",
        default=str(machine.cores()),
        metavar="N,...",
        help="for each contender (default: all cores, %(default)s)",
    )
    how.add_argument(
        "--rounds", type=integer(1), metavar="N", default=Settings.rounds, help="default: %(default)s"
    )
    how.add_argument(
        "--seconds",
        type=positive,
        metavar="S",
        default=Settings.seconds,
        help="per sample, at least (default: %(default)s)",
    )
    how.add_argument("--cold", action="store_true", help="flush the caches before each call")
    how.add_argument(
        "--timeout",
        type=positive,
        metavar="S",
        default=Settings.timeout,
        help="seconds for an answer (default: %(default)s)",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    results.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with pictures, all in one file"
    )
    results.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    results.add_argument("--png", type=Path, metavar="FOLDER", help="write the pictures; needs Chromium")
    results.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="report a record, run nothing"
    )
    results.add_argument(
        "--against", type=Path, metavar="FILE", help="say how far the ratios are from those of another record"
    )
    parser.set_defaults(defaults={name: parser.get_default(name) for name in MEASURING})


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        ValueError: if there are none, or an option makes no sense.
    """
    threads = arguments.threads.split(",")
    if not all(count.isdecimal() and 1 <= int(count) <= machine.cores() for count in threads):
        raise ValueError(f"--threads must be from 1 to {machine.cores()}, got {arguments.threads!r}")
    cases: list[Case] = []
    available: set[str] = set()  # cells of the sets
    for mode in arguments.mode.split(","):
        if mode not in MODES:
            raise ValueError(f"--mode must be {', '.join(MODES)}, got {mode!r}")
        if arguments.shapes is not None:
            shapes = parse_shapes(arguments.shapes, arguments.cell or "lstm")
        else:
            names = arguments.set or ("streaming" if mode == "step" else "cpu")
            shapes = unique(case for name in names.split(",") for case in cases_of_set(name))
            available |= {case.cell for case in shapes}
            shapes = [case for case in shapes if arguments.cell in (None, case.cell)]
        cases += [case for count in threads for case in in_mode(shapes, mode, arguments.dtype, int(count))]
    if not cases:
        if arguments.shapes is not None:
            raise ValueError("--shapes names no shape")
        others = ", ".join(sorted(available))
        raise ValueError(f"the set has no cell {arguments.cell}, only {others}; --shapes takes every cell")
    return sorted(cases, key=lambda case: case.threads)  # each change of it starts all processes anew


def run(arguments: argparse.Namespace) -> int:
    """Do what the options ask for; 1 if a contender failed, else 0.

    Raises:
        OSError: if a file cannot be read, or the results not be written, before anything is measured.
        ValueError: if there are no cases or contenders, an option makes no sense, or a file is no record;
            likewise.
    """
    check_options(arguments)
    other = read(arguments.against) if arguments.against is not None else None
    results = read(arguments.source) if arguments.source is not None else _run_with_progress(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(report.text(results))
    write_pages(results, arguments)
    if other is not None:
        print("\n" + report.against(results, other))
    if arguments.source is None and arguments.contenders is None:
        for what, names in absent().items():
            print(f"Not compared: {', '.join(names)}. To take part they need {what}.")
    return int(any("failed" in result for row in results["rows"] for result in row["results"].values()))


def read(path: Path) -> dict[str, Any]:
    """A record from a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no record.
    """
    schema = json.loads(files(__package__).joinpath("schema.json").read_text(encoding="utf-8"))
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = _holds(results, schema) and all(
            _holds(row, schema["$defs"]["row"]) for row in results["rows"]
        )
    except (ValueError, TypeError):  # no text, no JSON, or rows that are no list
        complete = False
    if not complete:
        raise ValueError(f"{path} is not a record of fusedlstm bench")
    return results


def _holds(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` is an object with the keys that the schema requires."""
    return isinstance(value, dict) and value.keys() >= set(schema["required"])


def check_options(arguments: argparse.Namespace) -> None:
    """See that the options go together, and that there is what the results need.

    Raises:
        ValueError: if a record is to be reported, and something else to be measured.
        OSError: if a file cannot be written, or the browser that draws pictures is missing.
    """
    if arguments.source is not None:
        given = [name for name, default in arguments.defaults.items() if getattr(arguments, name) != default]
        if given:
            refused = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"--from reports a record and measures nothing: leave out {refused}")
    for path in (arguments.json, arguments.html, arguments.markdown):
        if path is not None:
            check_writable(path)
    if arguments.png is not None:
        report.find_browser()


def write_pages(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the results for people to read, in the files that the options ask for."""
    if arguments.html is not None:
        arguments.html.write_text(report.page(results), encoding="utf-8")
    images = report.pictures(results, arguments.png) if arguments.png is not None else []
    if arguments.markdown is not None:
        folder = arguments.markdown.parent
        addresses = [Path(os.path.relpath(image, folder)).as_posix() for image in images]
        arguments.markdown.write_text(report.text(results, addresses) + "\n", encoding="utf-8")


def _run_with_progress(arguments: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    cases, contenders = chosen_cases(arguments), choose(arguments.contenders)
    settings = Settings(arguments.rounds, arguments.seconds, arguments.cold, arguments.timeout)
    samples = len(contenders) * (settings.rounds + 1)  # of a row, the preparations among them
    with tqdm(total=len(cases), bar_format=BAR) as bar:
        asked: dict[Case, int] = {}

        def progress(case: Case, name: str) -> None:
            asked[case] = asked.get(case, -1) + 1
            bar.n = len(asked) - 1 + min(1, asked[case] / samples)
            bar.set_postfix_str(f"row {len(asked)} of {len(cases)}: {case}, {name}", refresh=False)
            bar.update(0)

        results = record(cases, contenders, settings, progress)
    if len(results["rows"]) < len(cases):
        print(f"interrupted: the record holds {len(results['rows'])} of {len(cases)} rows", file=sys.stderr)
    return {"command": command(arguments), **results}


def command(arguments: argparse.Namespace) -> str:
    """What measures the same again."""
    options = ("set", "shapes", "mode", "cell", "dtype", "contenders", "threads", "rounds", "seconds")
    given = {f"--{name}": getattr(arguments, name) for name in options}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return shlex.join(["fusedlstm", "bench", *words, *["--cold"] * arguments.cold])


BAR = "{percentage:3.0f}% {bar:20} {remaining} left{postfix}"
