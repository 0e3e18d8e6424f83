"""What each CUDA kernel needs of a multiprocessor: `python -m benchmarks.cuda_report`, without a GPU.

Prints the table of docs/cuda.md; `--write` puts it there.  Needs numba-cuda and ptxas
(pip install nvidia-cuda-nvcc).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedlstm import cells
from fusedlstm.cells import Cell
from fusedlstm.kernels.cuda.launch import target
from fusedlstm.kernels.cuda.plan import PRECISIONS, TENSOR_CORES, Plan, Precision, choose
from fusedlstm.kernels.cuda.resources import DEVICES, REGISTERS, ptx_of, resources

PAGE = Path(__file__).parents[1] / "docs" / "cuda.md"
BEGIN, END = "<!-- table of benchmarks.cuda_report -->\n", "<!-- end of the table -->"
HEADER = (
    "| GPU | cell | precision | H | B | pass | form | blocks | hidden units x rows | registers "
    "| shared memory | mma.sync | spills |\n" + "|---" * 13 + "|\n"
)


def kernels() -> Iterator[tuple[str, Cell, Precision, int, int]]:
    """GPU, cell, precision, H and B of each row."""
    for precision in PRECISIONS:
        for hidden, batch in ((256, 16), (1024, 16), (1024, 128), (2048, 16)):
            yield "sm_90", cells.lstm, precision, hidden, batch
    for cell in (cells.gru, cells.peephole_lstm, cells.rnn_tanh):
        for precision in ("float32", "bfloat16"):
            yield "sm_90", cell, precision, 512, 32
    for architecture in ("sm_75", "sm_80", "sm_100"):
        for precision in ("float32", "tf32", "bfloat16"):
            if precision not in TENSOR_CORES or DEVICES[architecture].capability >= (8, 0):
                yield architecture, cells.lstm, precision, 512, 16


def row(architecture: str, cell: Cell, plan: Plan, hidden: int, batch: int) -> str:
    """One line of the table.

    Raises:
        RuntimeError: if the kernel spills, uses the stack, or does not fit.
    """
    device, product = DEVICES[architecture], plan.recurrent
    found = resources(ptx_of(cell, plan, target(device.capability)), architecture)
    if found.spills or found.stack or found.calls or found.registers * plan.threads > REGISTERS:
        raise RuntimeError(f"{cell.name} {plan}: {found}")
    grid = plan.grid(batch)
    values: tuple[Any, ...] = (
        device.name, cell.name, product.precision, hidden, batch, "backward" if plan.backward else "forward",
        plan.form, f"{grid[0]} x {grid[1]}", f"{plan.units} x {product.batch}", found.registers,
        f"{plan.shared / 1024:.0f} KiB", found.tensor or "", found.spills,
    )  # fmt: skip
    return "| " + " | ".join(str(value) for value in values) + " |\n"


def table() -> str:
    """The whole table; takes minutes."""
    lines = [HEADER]
    for architecture, cell, precision, hidden, batch in kernels():
        for backward in (False, True):
            if backward and precision == "float16":
                continue  # in bfloat16
            plan = choose(DEVICES[architecture], cell, precision, hidden, 0, batch, backward)
            lines.append(row(architecture, cell, plan, hidden, batch))
            print(lines[-1], end="", flush=True)
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/cuda.md")
    arguments = parser.parse_args()
    print(HEADER, end="")
    text = table()
    if arguments.write:
        page = PAGE.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{after}")


if __name__ == "__main__":
    main()
