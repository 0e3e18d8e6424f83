"""The command ``fusedlstm``: what it prints, its exit status, and how it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba import config
from tqdm import tqdm

import fusedlstm
from fusedlstm import Recurrent, check, cli, dispatch, info
from fusedlstm.kernels.cpu import engine


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said about options that are refused by the parser."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedlstm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fusedlstm {fusedlstm.__version__}\n"


def test_the_benchmarks_run_as_a_module() -> None:
    command = [sys.executable, "-m", "fusedlstm.benchmarks", "--from", "no such file"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fusedlstm: error: ")


@pytest.mark.parametrize("command", ["demo", "info", "check", "bench"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fusedlstm {command}" in capsys.readouterr().out


def test_no_command_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in refusal(capsys)
    assert "'tango'" in refusal(capsys, "tango")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "0"], "--seconds: 0 is not enough"),
        (["--seconds", "nan"], "--seconds: nan is not a number from 0 on"),
        (["--seconds", "soon"], "--seconds: 'soon' is not a number"),
        (["--steps", "0"], "--steps: 0 is less than 1"),
        (["--steps", "1.5"], "--steps: '1.5' is not an integer"),
        (["--seed", "-1"], "--seed: -1 is less than 0"),
        (["--temperature", "-1"], "--temperature: -1 is not a number from 0 on"),
        (["--seconds", "1", "--steps", "1"], "not allowed with argument"),
        (["--hidden", "8", "--load", "x"], "not allowed with argument"),
    ],
)
def test_bad_options_of_the_demo_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "demo", *options)


def test_files_that_cannot_be_used_are_an_error_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    assert cli.main(["demo", "--load", str(tmp_path / "none")]) == 2
    assert "fusedlstm: error: there is no file" in capsys.readouterr().err
    assert cli.main(["demo", "--save", str(tmp_path / "no" / "model")]) == 2
    assert "fusedlstm: error: there is no folder" in capsys.readouterr().err
    assert cli.main(["demo", "--save", str(tmp_path)]) == 2
    assert f"fusedlstm: error: {tmp_path} is a folder" in capsys.readouterr().err
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    assert cli.main(["demo", "--text", str(tmp_path / "latin")]) == 2
    assert f"fusedlstm: error: {tmp_path / 'latin'} is not UTF-8 text" in capsys.readouterr().err


# --- info -----------------------------------------------------------------------------------------------


def test_info_tells_of_machine_versions_and_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusedlstm.kernels.cpu.team, "_requested", 1)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out.replace("\n ", " ").splitlines()
    lines = dict(line.split(":", 1) for line in shown)
    assert fusedlstm.__version__ in lines["fusedlstm"]
    assert f"numpy {np.__version__}" in lines["packages"]
    assert lines["threads"].strip() == "1 thread"
    assert lines["registers"].strip().endswith("bits")
    assert set(lines) == {
        *("fusedlstm", "Python", "packages", "processor", "features", "caches", "registers", "threads"),
        *("GPU", "kernel cache"),
    }


def test_info_says_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.util, "find_spec", lambda name: None)
    assert info.gpu().startswith("not used: numba-cuda and CuPy not installed")
    monkeypatch.setattr(info.util, "find_spec", lambda name: name == "cupy" or None)
    assert info.gpu().startswith("not used: numba-cuda not installed")


def test_info_names_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"name": b"Model T", "major": 9, "minor": 0}
    runtime = SimpleNamespace(getDeviceCount=lambda: 2, getDeviceProperties=lambda n: properties)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(info.util, "find_spec", lambda name: True)
    assert info.gpu() == ", ".join(["Model T (compute capability 9.0)"] * 2)

    def fail() -> int:
        raise RuntimeError("no driver")

    runtime.getDeviceCount = fail
    assert info.gpu() == "not used: CuPy finds none: no driver"


def test_info_counts_the_kernels_of_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", config.CACHE_DIR)
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path / "cuda"))
    kernels = [tmp_path / "numba" / "fusedlstm" / "kernel.nbi", tmp_path / "cuda" / "kernel.ptx"]
    for kernel in kernels:
        kernel.parent.mkdir(parents=True, exist_ok=True)
        kernel.touch()
    for kernel, said in zip(kernels, info.caches_on_disk(), strict=True):
        assert said.startswith(f"{kernel.parent} (set by ")
        assert said.endswith("), 1 files, 0.0 MiB")


# --- check ----------------------------------------------------------------------------------------------


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LSTM in float32, at two sizes."""
    monkeypatch.setattr(check, "BUILT_IN", {"lstm": fusedlstm.cells.lstm})
    monkeypatch.setattr(check, "TOLERANCE", {"float32": check.TOLERANCE["float32"]})
    monkeypatch.setattr(check, "SIZES", ((1, 1, 1, 1), (7, 13, 1, 33)))


@pytest.mark.usefixtures("few_cases")
def test_check_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm, disable=False))  # whatever TQDM_DISABLE says
    assert cli.main(["check", "--all"]) == 0
    shown, bar = capsys.readouterr()
    assert "22 of 22 passed" in shown
    assert "FAIL" not in shown
    assert all(f"\n{option} " in shown for option in check.OPTIONS)
    assert "--all" not in shown
    assert re.search(r"100%\|\S*\| \d\d:\d\d<\d\d:\d\d lstm, float32, all of these", bar)


@pytest.mark.usefixtures("few_cases")
def test_check_without_all_is_a_part_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "REPRESENTATIVES", {("lstm", "float32"): ("plain", "reset")})
    assert cli.main(["check"]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 passed" in shown
    assert "\nplain " in shown
    assert "\nlengths " not in shown
    assert "Every cell with every option: fusedlstm check --all" in shown


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_check_finds_a_wrong_gradient(
    wrong: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine.CPUDirection.backward

    def backward(*arguments: Any) -> Any:
        states, weights = right(*arguments)
        return states, weights._replace(hh=weights.hh * np.float32(wrong))

    monkeypatch.setattr(engine.CPUDirection, "backward", backward)
    assert cli.main(["check", "--all"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED lstm, plain, float32, T=7, B=13, I=1, H=33: gradient of weight_hh_l0" in shown


@pytest.mark.parametrize("reason", [ImportError("no package"), RuntimeError("no driver")])
def test_check_without_a_gpu_is_an_error_without_a_traceback(
    reason: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise reason

    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setitem(dispatch._ENGINES, "cuda", (__name__, "CUDA"))
    monkeypatch.setattr(sys.modules[__name__], "CUDA", fail, raising=False)
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    assert cli.main(["check", "--backend", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fusedlstm: error: ")
    assert str(reason) in said


def test_check_covers_every_cell_option_and_precision() -> None:
    covered = {(case.cell.name, case.option, case.dtype) for case in check.cases()}
    for cell in check.BUILT_IN.values():
        for option in check.OPTIONS:
            refused = option == "projection" and bool(cell.unprojectable)
            for dtype in ("float32", "float64"):
                left_out = refused or (cell.name, dtype) in check.ILL_CONDITIONED
                assert ((cell.name, option, dtype) in covered) != left_out


def test_the_cases_of_check_without_all_are_of_each_kind_and_need_few_kernels() -> None:
    every, few = list(check.cases()), list(check.cases(every=False))
    assert set(few) < set(every)
    assert {case.option for case in few} == set(check.OPTIONS)
    assert {case.dtype for case in few} == {"float32", "float64"}
    assert {len(case.cell.states) for case in few} == {1, 2}
    assert any(case.cell.weights for case in few)
    assert sum(cost > 1 for cost in check.costs(few)) == 4
    # in both precisions, plain, with recurrent dropout, and with a projection where there can be one
    cells = [cell for cell in check.BUILT_IN.values() for dtype in ("float32", "float64")
             if (cell.name, dtype) not in check.ILL_CONDITIONED]  # fmt: skip
    kernels = 2 * len(cells) + sum(not cell.unprojectable for cell in cells)
    assert sum(cost > 1 for cost in check.costs(every)) == kernels


def test_an_error_is_measured_by_the_terms_of_a_result() -> None:
    """Not by what is left of them: 1 + 1e-8 - 1 is not 1e-8 in float32."""
    exact = np.array([1e-8])
    rounded = np.array([1 + 1e-8 - 1], np.float32) * 0
    assert check.error(rounded, exact, terms=1.0) == pytest.approx(1e-8)
    assert check.error(rounded, exact, terms=0.0) == 1
    assert check.error(np.zeros(1), np.zeros(1), terms=0.0) == 0
    assert check.error(np.ones(1), np.zeros(1), terms=0.0) > 1e300
    assert np.isnan(check.error(np.array([np.nan]), exact, terms=1.0))


@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "rnn_tanh"])
def test_results_that_cancel_pass_the_check(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers of one unit, dx is the sum of what both directions give, and may be next to nothing of it."""
    shares = []
    for seed in range(40):
        monkeypatch.setattr(check, "Recurrent", partial(_seeded, seed))
        outcome = check.run(
            check.Case(check.BUILT_IN[cell], "all of these", "float32", (1, 1, 1, 1)), "reference"
        )
        shares.append(outcome.error / outcome.limit)
    assert max(shares) < 0.6


def _seeded(number: int, *arguments: Any, **options: Any) -> Recurrent:
    return Recurrent(*arguments, **options | {"seed": number})


@pytest.mark.sampled(0.12)
@pytest.mark.parametrize("cell", check.BUILT_IN)
def test_the_reference_in_float32_passes_the_check(cell: str) -> None:
    """The tolerances suit an implementation without any cleverness."""
    outcomes = [check.run(case, "reference") for case in check.cases() if case.cell.name == cell]
    assert [str(outcome) for outcome in outcomes if not outcome.passed] == []


def test_compile_says_what_it_compiles_and_where_it_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "gru", "lstm", "--projection"]) == 0
    *lines, kept = capsys.readouterr().out.splitlines()
    named = ["gru in float32", "lstm in float32", "lstm in float32 with a projection"]
    assert [re.split(" {2,}", line)[0] for line in lines] == named
    assert all(line.endswith(" s") for line in lines)
    assert kept.startswith("kept in ")


def test_compile_refuses_cells_that_there_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "lstn"]) == 2
    assert "CELL must be one of" in capsys.readouterr().err
