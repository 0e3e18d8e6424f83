"""The command ``fusedlstm``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from . import __version__, demo
from .benchmarks import runner
from .options import integer, not_negative, positive

if TYPE_CHECKING:
    from .check import Case


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 for success, 1 for a failed check, 2 for bad options."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"fusedlstm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedlstm", description="Recurrent layers with fused kernels.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fusedlstm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_info, _add_check, _add_compile, _add_bench):
        add(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Show processor, registers, threads, GPU, versions and the folders of compiled kernels."
    parser = commands.add_parser("info", help="what this machine has", description=text)
    parser.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> int:
    from .info import facts

    for subject, text in facts().items():
        print(f"{subject + ':':14}" + text.replace("\n", "\n" + " " * 14))
    return 0


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Compare outputs, final states and all gradients with an explicit time loop in float64: by default "
        "for one cell of each kind and every option, which takes seconds, and the first time, when kernels "
        "are compiled, a minute or two. Exit status 1 if a comparison fails."
    )
    parser = commands.add_parser("check", help="hold the kernels against the reference", description=text)
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every built-in cell with every option in float32 and float64; compiling takes some ten minutes",
    )
    parser.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from . import check, dispatch

    dispatch.engine(arguments.backend)  # says what is missing before anything needs it
    start = time.perf_counter()
    outcomes = [check.run(case, arguments.backend) for case in _with_bar(list(check.cases(arguments.all)))]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    print("Largest error of results and gradients, as a share of the error that is allowed:\n")
    for dtype, tolerance in check.TOLERANCE.items():
        print(f"{check.table(outcomes, dtype)}\n({tolerance:g} times the root of T is allowed)\n")
    for outcome in failed:
        print(f"FAILED {outcome}")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} passed in {time.perf_counter() - start:.0f} s")
    if not arguments.all:
        print("Every cell with every option: fusedlstm check --all")
    return 1 if failed else 0


def _add_compile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Compile the CPU kernels of built-in cells, forward and backward, so that first calls find them on "
        "disk: in the build of an image, say, or where a program is installed. What is there is not compiled "
        "again. Without cells: those of LSTM, GRU and RNN."
    )
    parser = commands.add_parser("compile", help="compile kernels before they are needed", description=text)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="lstm, peephole_lstm, and so on")
    parser.add_argument("--all", action="store_true", help="every built-in cell")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "float64"),
        default=("float32",),
        help="precisions (default float32)",
    )
    parser.add_argument(
        "--projection", action="store_true", help="with a projection too, where there can be one"
    )
    parser.set_defaults(command=_compile)


def _compile(arguments: argparse.Namespace) -> int:
    from . import ahead
    from .info import caches_on_disk
    from .layers import BUILT_IN

    chosen = list(BUILT_IN) if arguments.all else arguments.cells or ["lstm", "gru", "rnn_tanh", "rnn_relu"]
    if unknown := [name for name in chosen if name not in BUILT_IN]:
        raise ValueError(f"CELL must be one of {', '.join(BUILT_IN)}, got {', '.join(unknown)}")
    cells = [BUILT_IN[name] for name in chosen]
    for what, seconds in ahead.compile_all(cells, arguments.dtype, arguments.projection):
        print(f"{what:40} {seconds:6.1f} s", flush=True)
    print(f"kept in {caches_on_disk()[0]}")
    return 0


def _with_bar(cases: list[Case]) -> Iterator[Case]:
    """The cases, beside a bar that shows the time left, and which cell is at work."""
    from tqdm import tqdm

    from . import check

    costs = check.costs(cases)
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"
    with tqdm(total=sum(costs), bar_format=form, dynamic_ncols=True, smoothing=0, leave=False) as bar:
        for case, cost in zip(cases, costs):
            bar.set_description_str(f"{case.cell.name}, {case.dtype}, {case.option}")
            yield case
            bar.update(cost)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Train a two-layer LSTM to write like Python's help pages, or like a text of yours, compare it with "
        "a 3-gram model on text that neither has seen, and let it write."
    )
    parser = commands.add_parser("demo", help="an LSTM learns to write", description=text)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=positive, metavar="S", help=f"time to train for (default {demo.SECONDS:g})"
    )
    length.add_argument(
        "--steps",
        type=integer(1),
        metavar="N",
        help="train for so many steps instead, which with --seed gives the same model every time",
    )
    parser.add_argument(
        "--seed", type=integer(0), default=1, metavar="N", help="of weights, windows and sample (default 1)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--hidden",
        type=integer(1),
        default=demo.HIDDEN,
        metavar="H",
        help="hidden units of a layer (default %(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="learn another text, UTF-8, in any language")
    source.add_argument(
        "--language",
        choices=demo.TEXTS,
        default="en",
        help=f"of the text: {', '.join(f'{name} is {what}' for name, what in demo.TEXTS.items())}",
    )
    parser.add_argument("--save", metavar="FILE", help="write the model to a safetensors file")
    size.add_argument(
        "--load",
        metavar="FILE",
        help="take a model that was saved; it is trained further only with --seconds or --steps",
    )
    parser.add_argument(
        "--generate",
        type=integer(0),
        default=demo.SAMPLE,
        metavar="N",
        help="characters to write at the end (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=not_negative,
        default=demo.TEMPERATURE,
        metavar="X",
        help="of the sample: 0 takes the likeliest character always, 1 what the model says "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what the sample goes on from (default: the beginning of the text)"
    )
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    seconds, steps = options.pop("seconds"), options.pop("steps")
    budget = demo.Budget(seconds or demo.SECONDS, steps) if seconds or steps else None
    demo.run(budget=budget, **options)
    return 0


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Time the kernels beside other libraries, each in a process of its own."
    parser = commands.add_parser("bench", help="time the kernels beside other libraries", description=text)
    runner.add_arguments(parser)
    parser.set_defaults(command=runner.run)
