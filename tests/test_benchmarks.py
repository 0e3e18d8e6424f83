"""The benchmarks: what is run, that wrong results get no time, the limits and the record.  No timings."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import ValidationError, validate

from fusedlstm import cli
from fusedlstm.benchmarks import documents, limits, machine, report, runner, worker
from fusedlstm.benchmarks.cases import (
    Case,
    WrongResult,
    cases_of_set,
    check,
    expected,
    in_mode,
    make_data,
    parse_shapes,
    shape_sets,
)
from fusedlstm.benchmarks.contender import Contender, Prepared, Unsupported
from fusedlstm.benchmarks.contenders import CONTENDERS, FusedLSTM, NumPy, choose

SMALL = Case(3, 2, 4, 5)
QUICK = runner.Settings(rounds=1, seconds=1e-4, timeout=120)


# --- cases -----------------------------------------------------------------------------------------------


def test_every_set_has_cases_and_all_has_each_once() -> None:
    everything = cases_of_set("all")
    assert len(everything) == len(set(everything))
    for name in shape_sets():
        assert cases_of_set(name)
        assert set(cases_of_set(name)) <= set(everything)


def test_the_set_of_the_cpu() -> None:
    cases = cases_of_set("cpu")
    assert cases[0] == Case(500, 1, 64, 64)
    assert len(cases) == 14


def test_several_sets_are_taken() -> None:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    options = parser.parse_args(["--set", "cpu,text"])
    threads = int(options.threads)
    assert runner.chosen_cases(options) == in_mode(
        [*cases_of_set("cpu"), *cases_of_set("text")], "forward", "float32", threads
    )


def test_layers_of_a_set_are_kept() -> None:
    assert {case.layers for case in cases_of_set("lm")} == {2}


def test_shapes_are_parsed() -> None:
    assert parse_shapes("3,2,4,5; 1,1,1,1;3,2,4,5", "gru") == [
        Case(3, 2, 4, 5, "gru"),
        Case(1, 1, 1, 1, "gru"),
    ]


@pytest.mark.parametrize("text", ["3,2,4", "3,2,4,x", "0,2,4,5", "-1,2,4,5", "3,2,4,5,6"])
def test_a_wrong_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="four positive numbers"):
        parse_shapes(text)


def test_a_step_has_one_time_step_and_each_shape_once() -> None:
    cases = in_mode([Case(25, 1, 4, 5), Case(50, 1, 4, 5)], "step", "float64", 2)
    assert cases == [Case(1, 1, 4, 5, mode="step", dtype="float64", threads=2)]


def test_data_is_the_same_in_every_process() -> None:
    first, second = make_data(SMALL), make_data(SMALL)
    assert first.x.dtype == np.float32
    for name, array in first.weights.items():
        np.testing.assert_array_equal(array, second.weights[name])
    np.testing.assert_array_equal(first.x, second.x)


# --- no check, no number ---------------------------------------------------------------------------------


def right_results(case: Case) -> dict[str, np.ndarray]:
    return expected(case, make_data(case))


def test_right_results_pass_with_their_error() -> None:
    case = Case(3, 2, 4, 5, mode="train")
    right = right_results(case)
    assert {"y", "h", "c", "dx", "dh", "dc", "dweight_ih_l0", "dbias_hh_l0"} <= set(right)
    assert check(case, right, right) == 0
    assert check(case, {name: array * (1 + 1e-6) for name, array in right.items()}, right) == pytest.approx(
        1e-6
    )


@pytest.mark.parametrize(
    "name", ["y", "h", "c", "dx", "dh", "dc", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0"]
)
@pytest.mark.parametrize("spoil", ["value", "nan", "shape", "missing"])
def test_one_wrong_result_is_enough(name: str, spoil: str) -> None:
    case = Case(3, 2, 4, 5, mode="train")
    right = right_results(case)
    wrong = {key: array.copy() for key, array in right.items()}
    if spoil == "value":
        wrong[name].flat[0] += 1
    elif spoil == "nan":
        wrong[name].flat[0] = np.nan
    elif spoil == "shape":
        wrong[name] = wrong[name][None]
    else:
        del wrong[name]
    with pytest.raises(WrongResult, match=name):
        check(case, wrong, right)


class Broken(Contender):
    name, title = "broken", "Broken"
    modes = ("forward",)

    def prepare(self, case: Case, data: Any) -> Prepared:
        call, read = NumPy(1).prepare(case, data)
        return Prepared(call, lambda result: {key: array + 1 for key, array in read(result).items()})


class TurnsBad(Contender):
    """Right the first time only."""

    name, title = "turns-bad", "Turns bad"

    def prepare(self, case: Case, data: Any) -> Prepared:
        call, read = NumPy(1).prepare(case, data)
        calls = iter(range(10**9))
        return Prepared(lambda: (next(calls), call()), lambda result: read(_spoiled(*result)))


def _spoiled(calls: int, result: Any) -> Any:
    return (result[0] + 1, *result[1:]) if calls else result


@pytest.fixture
def right(tmp_path: Path) -> str:
    np.savez(tmp_path / "expected.npz", **right_results(SMALL))  # type: ignore[arg-type]
    return str(tmp_path / "expected.npz")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from a contender of a test to it on its bench, in this process."""

    def make(contender: type[Contender]) -> worker.Bench:
        monkeypatch.setitem(CONTENDERS, contender.name, contender)
        return worker.Bench(contender.name, 1)

    return make


def test_a_wrong_contender_is_not_timed(bench: Any, right: str) -> None:
    with pytest.raises(WrongResult, match="y has the relative error"):
        bench(Broken).prepare(SMALL, right, 1e-4, False)


def test_a_contender_that_turns_bad_is_found(bench: Any, right: str) -> None:
    station = bench(TurnsBad)
    station.prepare(SMALL, right, 1e-4, False)
    station.sample()
    with pytest.raises(WrongResult, match="y has the relative error"):
        station.release()


def test_what_a_contender_lacks_is_said(bench: Any, right: str) -> None:
    with pytest.raises(Unsupported, match="no mode train"):
        bench(Broken).prepare(Case(3, 2, 4, 5, mode="train"), right, 1e-4, False)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("name", ["torch-loop", "jax"])
def test_a_cell_with_a_late_gate_is_run_by_a_loop(name: str, mode: str) -> None:
    case = Case(3, 2, 4, 5, "gru_reset_before", mode=mode, dtype="float64")
    data = make_data(case)
    call, read = CONTENDERS[name](threads=1).prepare(case, data)
    expected_call, expected_read = NumPy(1).prepare(case, data)
    found, expected = read(call()), expected_read(expected_call())
    assert found.keys() == expected.keys()
    for part in expected:
        np.testing.assert_allclose(np.asarray(found[part]), expected[part], rtol=1e-9, atol=1e-12)


def test_cold_and_hot_samples(bench: Any, right: str) -> None:
    station = bench(NumPy)
    assert station.prepare(SMALL, right, 0.01, False)["calls"] > 1
    assert station.sample() > 0
    assert station.prepare(SMALL, right, 0.01, True)["calls"] == worker.COLD_CALLS
    assert station.sample() > 0


# --- contenders in their own processes -------------------------------------------------------------------

EVERYTHING = [
    *(Case(3, 2, 4, 5, cell, mode=mode) for cell in ("lstm", "gru") for mode in ("forward", "train")),
    Case(1, 2, 4, 5, mode="step"),
    Case(1, 2, 4, 5, "gru", mode="step"),
    Case(3, 2, 4, 5, "peephole_lstm"),
    Case(3, 2, 4, 5, "rnn_tanh"),
    Case(3, 2, 4, 5, layers=2),
    Case(3, 2, 4, 5, layers=2, mode="train"),
    Case(1, 2, 4, 5, layers=2, mode="step"),
    Case(3, 2, 4, 5, dtype="float64"),
]


@pytest.mark.parametrize("name", [contender.name for contender in choose(None)])
def test_every_installed_contender_gives_right_results(name: str) -> None:
    done = 0
    for row in runner.compare(EVERYTHING, [CONTENDERS[name]], QUICK):
        result = row["results"][name]
        assert "failed" not in result, (row["case"], result)
        done += "median" in result
    assert done


def test_a_process_that_dies_has_failed_and_is_started_again(right: str) -> None:
    process = worker.contender_worker(NumPy, 1, 60)
    try:
        process.ask("prepare", SMALL, right, 1e-4, False)
        process._process.kill()
        with pytest.raises(worker.Failed, match="its process ended"):
            process.ask("sample")
        assert process.ask("prepare", SMALL, right, 1e-4, False)["error"] < 1e-4
    finally:
        process.close()


def test_a_contender_that_hangs_has_failed(right: str) -> None:
    process = worker.contender_worker(NumPy, 1, timeout=1e-3)
    with pytest.raises(worker.Failed, match="no answer within"):
        process.ask("prepare", SMALL, right, 1e-4, False)
    assert process._process is None


def test_a_failed_contender_is_shown_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Fake:
        def __init__(self, contender: type[Contender], threads: int, timeout: float) -> None:
            self.name = contender.name

        def ask(self, method: str, *arguments: Any) -> Any:
            asked.append(f"{self.name} {method}")
            if self.name == "torch" and method == "sample":
                raise worker.Failed("it broke")
            return {"prepare": {"error": 0.0, "calls": 1}, "sample": 1.0, "release": None}[method]

        def close(self) -> None:
            pass

    monkeypatch.setattr(runner, "contender_worker", Fake)
    contenders = [CONTENDERS[name] for name in ("fusedlstm", "torch", "numpy")]
    rows = runner.compare([SMALL], contenders, runner.Settings(rounds=2))
    results = rows[0]["results"]
    assert results["torch"] == {"failed": "it broke"}
    assert results["fusedlstm"]["samples"] == results["numpy"]["samples"] == [1.0, 1.0]
    samples = [name for name in asked if name.endswith("sample")]
    assert samples == ["fusedlstm sample", "torch sample", "numpy sample", "fusedlstm sample", "numpy sample"]


def test_contenders_far_behind_sit_out_the_later_rounds() -> None:
    def results(**samples: float) -> dict[str, Any]:
        return {name: {"samples": [seconds] * 3} for name, seconds in samples.items()} | {
            "jax": {"failed": "why"}
        }

    near = results(fusedlstm=1.0, torch=2.0, onnxruntime=2.5, numpy=9.0)
    assert runner.turns(near, 2, 7) == ["fusedlstm", "torch", "onnxruntime", "numpy"]
    assert runner.turns(near, 3, 7) == ["fusedlstm", "torch", "onnxruntime"]
    assert runner.turns(near, 7, 7) == ["fusedlstm", "torch"]
    assert runner.turns(results(fusedlstm=9.0, torch=1.0, numpy=5.0), 3, 7) == ["fusedlstm", "torch"]


def test_rows_that_scatter_get_more_rounds() -> None:
    def results(ours: list[float], best: list[float], other: list[float]) -> dict[str, Any]:
        return {name: {"samples": s} for name, s in zip(("fusedlstm", "torch", "numpy"), (ours, best, other))}

    steady, loose = [1.0, 1.01, 1.0], [1.0, 1.3, 0.8]
    slow = [9.0, 5.0, 8.0]
    assert not runner.scattered(results(steady, steady, slow))
    assert runner.scattered(results(loose, steady, slow))
    assert runner.scattered(results(steady, loose, slow))
    assert not runner.scattered({"fusedlstm": {"failed": "why"}})


def test_contenders_are_chosen_by_name() -> None:
    assert choose("numpy, fusedlstm") == [NumPy, FusedLSTM]
    with pytest.raises(ValueError, match="there is no contender 'nobody'"):
        choose("nobody")


def test_a_contender_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumPy, "modules", ("no_such_module",))
    assert NumPy not in choose(None)
    with pytest.raises(ValueError, match="needs no_such_module"):
        choose("numpy")


# --- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_multiply_adds_are_all_done(dtype: str, threads: int) -> None:
    out = np.zeros(8 * threads)
    x, turns = np.dtype(dtype).type(1), 1000
    limits._run_multiply_adds(limits._team(threads), threads, x, turns, out)
    # each sum starts from 1 and has 1 * 1 + ... added in each turn
    assert out[0] == limits.chains() * (1 + turns)
    assert 1 <= out[1] <= threads


def test_every_byte_of_the_stream_is_read() -> None:
    lanes, turns = limits.machine().bits // 64, 5
    buffer = np.random.default_rng(0).integers(0, 2**50, (1, turns * limits.STREAM * lanes))
    out = np.zeros(8)
    limits._run_reads(0, 1, buffer, turns, 1, out)
    assert out[0] == np.bitwise_xor.reduce(buffer.reshape(-1, lanes)[:, 0])


def test_buffers_lie_in_their_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cache_sizes", lambda: {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20})
    assert limits.buffer_sizes(2) == {"L1": 16 << 10, "L2": 512 << 10, "L3": 4 << 20, "memory": 128 << 20}


@pytest.mark.parametrize(
    ("weights", "level"),
    [(40 << 10, "L1"), (64 << 10, "L2"), (1 << 20, "L2"), (4 << 20, "L3"), (64 << 20, "memory")],
)
def test_weights_lie_in_the_level_that_holds_a_threads_share(
    monkeypatch: pytest.MonkeyPatch, weights: int, level: str
) -> None:
    monkeypatch.setattr(limits, "cache_sizes", lambda: {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20})
    assert limits.level_of(weights, 2) == level


def test_each_level_gives_what_it_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cache_sizes", lambda: {"L1": 10, "L2": 90, "L3": 400})
    rates = {level: {"2": rate} for level, rate in (("L1", 8.0), ("L2", 4.0), ("L3", 2.0), ("memory", 1.0))}
    assert limits.seconds_of_a_byte(20, rates, 2) == pytest.approx(1 / 8)
    assert limits.seconds_of_a_byte(200, rates, 2) == pytest.approx(0.1 / 8 + 0.9 / 4)
    assert limits.seconds_of_a_byte(1000, rates, 2) == pytest.approx(0.02 / 8 + 0.18 / 4 + 0.4 / 2 + 0.4)


def test_the_better_of_two_measurements() -> None:
    first = {
        "registers": "some",
        "multiply_add": {"float32": {"1": 5.0, "2": 9.0}},
        "read": {"L1": {"1": 3.0, "2": 4.0}},
        "barrier": {"1": 0.0, "2": 2.0},
    }
    second = {
        "registers": "some",
        "multiply_add": {"float32": {"1": 6.0, "2": 8.0}},
        "read": {"L1": {"1": 1.0, "2": 7.0}},
        "barrier": {"1": 0.0, "2": 1.0},
    }
    assert limits.best_of(first, second) == {
        "registers": "some",
        "multiply_add": {"float32": {"1": 6.0, "2": 9.0}},
        "read": {"L1": {"1": 3.0, "2": 7.0}},
        "barrier": {"1": 0.0, "2": 1.0},
    }


def test_a_row_that_beats_its_limit_is_noticed() -> None:
    row = {"bound": {"seconds": 2.0}, "results": {"a": {"median": 3.0}, "b": {"failed": "why"}}}
    assert not runner.beaten(row)
    row["results"]["a"]["median"] = 1.0  # type: ignore[index]
    assert runner.beaten(row)


SLOW_READS = {
    "multiply_add": {"float32": {"1": 1e9, "2": 2e9}},
    "read": {level: {"1": 1e6, "2": 2e6} for level in ("L1", "L2", "L3", "memory")},
}


def test_the_bound_of_few_rows_is_reading_the_weights() -> None:
    bound = limits.bound(Case(100, 1, 8, 16, threads=2), SLOW_READS)
    recurrent = 100 * 4 * 16 * 16 * 4 / 2e6
    inputs = max(2 * 100 * 4 * 16 * 8 / 2e9, 4 * 16 * 8 * 4 / 2e6)
    assert bound.seconds == pytest.approx(recurrent + inputs)
    assert bound.name == "L1"
    assert bound.operations == 2 * 100 * 64 * 24


def test_the_bound_of_many_rows_is_multiply_adds() -> None:
    fast_reads = {**SLOW_READS, "read": {level: {"1": 1e12, "2": 1e12} for level in SLOW_READS["read"]}}  # type: ignore[attr-defined]
    forward = limits.bound(Case(10, 64, 8, 16, threads=2), fast_reads)
    assert forward.name == "FMA"
    assert forward.seconds == pytest.approx(2 * 10 * 64 * 64 * 24 / 2e9)
    train = limits.bound(Case(10, 64, 8, 16, mode="train", threads=2), fast_reads)
    assert train.seconds == pytest.approx(3 * forward.seconds)
    assert train.operations == 3 * forward.operations


# --- the page --------------------------------------------------------------------------------------------


def sample_record() -> dict[str, Any]:
    """A record of made-up times, with a sweep over T and a failure."""
    results = [
        {
            "fusedlstm": {"median": 1e-3 * steps},
            "torch": {"median": 3e-3 * steps},
            "numpy": {"median": 9e-3 * steps},
        }
        for steps in (1, 10, 100, 1000)
    ]
    results[1]["numpy"] = {"failed": "why <b>not</b> </script>"}  # type: ignore[dict-item]
    record = made_record(*results)
    for steps, row in zip((1, 10, 100, 1000), record["rows"]):
        row["case"]["steps"] = steps
    for row in record["rows"]:
        for result in row["results"].values():
            if "median" in result:
                result |= {"quartiles": [result["median"]] * 2, "error": 1e-7}
    rates = {"1": 1e11}
    return {
        **record,
        "schema": runner.SCHEMA,
        "date": "2030-01-02",
        "commit": "abc",
        "machine": {"processor": "A processor", "cores": 1, "load": 0.5},
        "settings": {"cold": False},
        "limits": {
            "registers": "some",
            "multiply_add": {"float32": rates},
            "read": {"L1": rates, "memory": {"1": 1e10}},
            "barrier": {"1": 0.0},
        },
    }


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, report.BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser, one of {', '.join(report.BROWSERS)}")
    return found


def dump(browser: str, html: str, path: Path, *options: str) -> tuple[str, str]:
    """What a browser makes of a page, and what the page says on the console."""
    path.write_text(html)
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run([*command, *options, path.as_uri()], capture_output=True, text=True, check=True)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    # scripts are the page's source, not what it made
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL), console


def test_the_page_needs_nothing_from_outside() -> None:
    html = report.page(sample_record())
    assert not re.search(r"(src|href|url|import)\s*[=(]", html.replace("http://www.w3.org/2000/svg", ""))
    assert html.count("</script>") == 2  # a text in the record does not end the script


def test_the_page_draws_its_pictures(browser: str, tmp_path: Path) -> None:
    page, console = dump(browser, report.page(sample_record()), tmp_path / "page.html")
    assert console == ""
    assert page.count('class="bar"') == 4
    assert page.count("<circle") >= 3 + 8 + 11  # other peers, both of each row in the roofline, curves
    assert page.count('class="curve"') == 3
    for text in (
        "3.00 \N{MULTIPLICATION SIGN}",
        "4 of 4",
        "A processor",
        "load 0.5 before",
        "multiply-adds 100 GFLOP/s",
        "memory 10 GB/s",
    ):
        assert text in page
    assert "NaN" not in page
    assert "undefined" not in page
    assert 'title="why &lt;b&gt;not&lt;/b&gt; &lt;/script&gt;"' in page


def test_each_contender_is_drawn_in_its_own_way(browser: str, tmp_path: Path) -> None:
    """Beyond twelve the colours come again, with other lines and marks."""
    record = sample_record()
    peer = next(name for name in record["contenders"] if not name.startswith("fusedlstm"))
    for n in range(15 - len(record["contenders"])):
        record["contenders"][f"peer{n}"] = record["contenders"][peer]
        for row in record["rows"]:
            if peer in row["results"]:
                row["results"][f"peer{n}"] = row["results"][peer]
    page, console = dump(browser, report.page(record), tmp_path / "page.html")
    assert console == ""
    lines = re.findall(r'<path [^>]*class="curve"[^>]*>', page)
    looks = [(re.search(r"--c\d+", line)[0], "dasharray" in line) for line in lines]
    assert len(set(looks)) == len(looks) >= 13
    assert page.count("<rect") > 0


def test_figures_stand_where_no_mark_is(browser: str, tmp_path: Path) -> None:
    page, _ = dump(browser, report.page(sample_record()), tmp_path / "page.html")
    chart = page[page.index('id="ratios"') : page.index('id="roofline"')]
    (figures,) = {float(x) for x in re.findall(r'class="figure" x="([\d.]+)"', chart)}
    marks = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert marks
    assert max(marks) + 5 < figures - 40


@pytest.mark.parametrize(("width", "wide"), [(360, True), (1400, False)])
def test_the_table_says_that_it_scrolls(browser: str, tmp_path: Path, width: int, wide: bool) -> None:
    page, _ = dump(
        browser, report.page(sample_record()), tmp_path / "page.html", f"--window-size={width},800"
    )
    assert ('id="results" class="wide"' in page) == wide


def test_what_pointing_shows_tapping_shows(browser: str, tmp_path: Path) -> None:
    tap = "<script>document.querySelector('td[title]').click()</script>"
    page, console = dump(browser, report.page(sample_record()) + tap, tmp_path / "page.html")
    assert console == ""
    assert re.search('<p id="detail" role="status">quartiles ', page)


def test_the_table_sorts(browser: str, tmp_path: Path) -> None:
    click = "<script>document.querySelectorAll('th button')[{}].click();</script>"
    html = report.page(sample_record())

    def column(page: str, place: int) -> list[str]:
        rows = re.findall(r"<tr>(<td.*?)</tr>", page)
        return [re.findall(r"<td[^>]*>(.*?)</td>", row)[place] for row in rows]

    page, _ = dump(browser, html, tmp_path / "page.html")
    assert column(page, 1) == ["1", "10", "100", "1000"]
    page, console = dump(browser, html + click.format(1) * 2, tmp_path / "page.html")
    assert console == ""
    assert column(page, 1) == ["1000", "100", "10", "1"]
    assert 'aria-sort="descending"' in page
    page, _ = dump(browser, html + click.format(7), tmp_path / "page.html")
    assert column(page, 7) == ["9.00", "900", "9000", "failed"]


@pytest.mark.parametrize("options", [["--window-size=360,800"], ["--window-size=1400,900"]])
def test_the_page_fits_the_screen(browser: str, tmp_path: Path, options: list[str]) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth"
    measure = f"<script>document.title = {fits} ? 'fits' : 'too wide'</script>"
    page, _ = dump(browser, report.page(sample_record()) + measure, tmp_path / "page.html", *options)
    assert "<title>fits</title>" in page


def test_pictures_are_written(browser: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(sample_record()))
    options = ["--from", str(tmp_path / "record.json"), "--png", str(tmp_path / "pictures")]
    options += ["--markdown", str(tmp_path / "results.md"), "--html", str(tmp_path / "page.html")]
    assert cli.main(["bench", *options]) == 1  # since a contender of the record failed
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {f"{name}-lstm-forward-float32.png" for name in ("ratios", "roofline", "curves")}
    links = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "results.md").read_text())
    assert {tmp_path / link for link in links} == {tmp_path / "pictures" / name for name in names}
    assert (tmp_path / "page.html").read_text() == report.page(sample_record())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--png", "pictures"], "no-such-browser: install Chromium, or do without --png"),
        (["--json", "none/record.json"], "no folder .*none to write record.json in"),
        (["--markdown", "."], r"\. is a folder"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "BROWSERS", ("no-such-browser",))
    monkeypatch.setattr(runner, "record", lambda *arguments: pytest.fail("it measures"))
    assert cli.main(["bench", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_pictures_that_fail_lose_nothing_else(
    record_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(record: Any, folder: Path) -> list[Path]:
        raise OSError("the browser has crashed")

    monkeypatch.setattr(report, "find_browser", lambda: "browser")
    monkeypatch.setattr(report, "pictures", fail)
    path = tmp_path / "record.json"
    options = ["--from", str(record_file), "--json", str(path), "--png", str(tmp_path / "pictures")]
    assert cli.main(["bench", *options]) == 2
    told = capsys.readouterr()
    assert "geometric mean" in told.out
    assert "the browser has crashed" in told.err
    assert path.read_text() == record_file.read_text()


# --- the record ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "record.json"
    options = ["--shapes", "3,2,4,5;5,1,4,5", "--mode", "forward,train", "--contenders", "fusedlstm,numpy"]
    options += ["--threads", "1", "--rounds", "2", "--seconds", "0.001", "--json", str(path)]
    assert cli.main(["bench", *options]) == 0
    return path


def test_a_record_fits_the_schema(record_file: Path) -> None:
    schema = json.loads(files(runner.__package__).joinpath("schema.json").read_text())
    record = json.loads(record_file.read_text())
    validate(record, schema)
    assert schema["properties"]["schema"]["const"] == record["schema"] == runner.SCHEMA
    record["rows"][0]["results"]["numpy"] = {"median": 1.0}
    with pytest.raises(ValidationError):
        validate(record, schema)


def test_a_record_has_every_row_with_results_and_bound(record_file: Path) -> None:
    record = json.loads(record_file.read_text())
    assert [Case(**row["case"]) for row in record["rows"]] == [
        Case(steps, batch, 4, 5, mode=mode)
        for mode in ("forward", "train")
        for steps, batch in ((3, 2), (5, 1))
    ]
    for row in record["rows"]:
        assert row["bound"]["seconds"] > 0
        for result in row["results"].values():
            assert len(result["samples"]) >= 2
            low, high = result["quartiles"]
            assert low <= result["median"] <= high


def test_a_record_is_reported_again(record_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--from", str(record_file)]) == 0
    printed = capsys.readouterr().out
    assert "## lstm, forward, float32, 1 thread" in printed
    assert "## lstm, train, float32, 1 thread" in printed
    assert "geometric mean" in printed


BOUND = {"seconds": 1e-3, "name": "FMA", "operations": 10**8, "bytes": 10**7}


def made_record(*results: dict[str, Any]) -> dict[str, Any]:
    return {
        "contenders": {
            name: {"title": name.title(), "versions": {}} for name in ("fusedlstm", "torch", "numpy")
        },
        "rows": [
            {"case": Case(3, 2, 4, 5).to_json(), "bound": BOUND, "results": result} for result in results
        ],
    }


def test_ratios_means_and_shares() -> None:
    record = made_record(
        {"fusedlstm": {"median": 2e-3}, "torch": {"median": 4e-3}, "numpy": {"median": 8e-3}},
        {"fusedlstm": {"median": 1e-3}, "torch": {"median": 8e-3}, "numpy": {"median": 2e-3}},
    )
    lines = report.table(record, record["rows"]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == [
        "3",
        "2",
        "4",
        "5",
        "2.00",
        "4.00 (2.00)",
        "8.00 (4.00)",
        "2.00",
        "1.00 FMA",
        "50% low",
    ]
    assert rows[1][-3:] == ["2.00", "1.00 FMA", "100%"]
    assert rows[2] == ["geometric mean", "", "", "", "", "(4.00)", "(2.83)", "2.00", "", "71%"]


def test_a_failure_is_shown_with_its_reason() -> None:
    record = made_record({"fusedlstm": {"median": 2e-3}, "torch": {"failed": "y has the relative error 1"}})
    text = report.table(record, record["rows"])
    assert "failed" not in text.splitlines()[0]
    assert report.problems(record, record["rows"]) == [
        "Failed:\n\n* Torch, T=3 B=2 I=4 H=5: y has the relative error 1"
    ]


def test_the_command_of_a_record_measures_the_same_again(record_file: Path) -> None:
    command = json.loads(record_file.read_text())["command"]
    assert command.startswith("fusedlstm bench --shapes '3,2,4,5;5,1,4,5' --mode forward,train ")
    assert "--json" not in command
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    arguments = parser.parse_args(shlex.split(command)[2:])
    assert runner.command(arguments) == command
    assert len(runner.chosen_cases(arguments)) == 4


def test_an_interrupted_run_keeps_the_rows_that_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    second = Case(5, 1, 4, 5)

    def interrupt(case: Case, name: str) -> None:
        if case == second:
            raise KeyboardInterrupt

    rows = runner.compare([SMALL, second], [FusedLSTM], QUICK, interrupt)
    assert [row["case"] for row in rows] == [SMALL.to_json()]
    assert "median" in rows[0]["results"]["fusedlstm"]


def test_ratios_of_two_records_are_compared() -> None:
    before = made_record(
        {"fusedlstm": {"median": 1e-3}, "torch": {"median": 2e-3}, "numpy": {"failed": "why"}}
    )
    after = made_record({"fusedlstm": {"median": 2e-3}, "torch": {"median": 5e-3}, "numpy": {"median": 1}})
    text = report.against(after, {**before, "date": "yesterday"})
    assert "2.00 to 2.50, +25%" in text
    assert "0 of 1 ratios to ours are within 10% of those of yesterday" in text
    assert text.endswith("and so is that of the best peer in 0 of 1 rows")
    assert "2 of 2 ratios" in report.against(after, {**after, "date": "today"})


# --- the documents ---------------------------------------------------------------------------------------


def test_the_summary_has_us_against_peers_and_drop_ins_against_originals() -> None:
    record = made_record(
        {"fusedlstm": {"median": 1.0}, "torch": {"median": 3.0}, "fusedlstm-torch": {"median": 2.0}},
        {"fusedlstm": {"median": 2.0}, "torch": {"median": 1.5}, "fusedlstm-torch": {"median": 1.0}},
    )
    record["contenders"]["fusedlstm-torch"] = {"title": "Module", "versions": {}}
    lines = documents.summary([{**record, "command": "fusedlstm bench"}]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert rows[0][1:] == ["fusedlstm", "best of 2 peers", "1 of 2", "1.50 (0.75 to 3.00)"]
    assert rows[1][1:] == ["Module", "Torch", "2 of 2", "1.50 (1.50 to 1.50)"]
    assert lines[-1] == "1. `fusedlstm bench`"


def test_results_are_filled_in_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results: begin, by a command -->\nold\n<!-- results: end -->\nafter\n")
    documents.fill(page, r"new \1")
    assert page.read_text() == (
        "before\n<!-- results: begin, by a command -->\nnew \\1\n<!-- results: end -->\nafter\n"
    )
    page.write_text("no markers")
    with pytest.raises(ValueError, match="needs one"):
        documents.fill(page, "new")


def test_a_record_is_reported_without_options_that_measure(
    record_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shapes", "3,2,4,5", "--dtype", "float32", "--rounds", "2", "--cold"]
    assert cli.main(["bench", "--from", str(record_file), *options]) == 2
    assert "measures nothing: leave out --shapes, --rounds, --cold" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--from", "--against"])
@pytest.mark.parametrize("content", ["no JSON", "[1]", '{"rows": []}', b"\xff"])
def test_what_is_no_record_is_refused_before_anything_is_measured(
    option: str,
    content: str | bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "record", lambda *arguments: pytest.fail("it measures"))
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["bench", option, str(path)]) == 2
    assert f"{path} is not a record of fusedlstm bench" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [None, [1], [{"case": {}}]])
def test_a_record_with_broken_rows_is_refused(record_file: Path, tmp_path: Path, rows: Any) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(json.loads(record_file.read_text()) | {"rows": rows}))
    with pytest.raises(ValueError, match="is not a record"):
        runner.read(path)


def test_a_failed_contender_gives_exit_status_1(tmp_path: Path, record_file: Path) -> None:
    record = json.loads(record_file.read_text())
    record["rows"][0]["results"]["numpy"] = {"failed": "why"}
    (tmp_path / "failed.json").write_text(json.dumps(record))
    assert cli.main(["bench", "--from", str(tmp_path / "failed.json")]) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234e-3, "1.23"), (0.1234, "123"), (12.345e-6, "0.0123"), (2.0, "2000")]
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert report.milliseconds(seconds) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "sideways"], "--mode must be"),
        (["--shapes", "1,2"], "four positive numbers"),
        (["--threads", "0"], "--threads must be from 1"),
        (["--cell", "gru", "--set", "cpu"], "the set has no cell gru, only lstm; --shapes takes every cell"),
        (["--shapes", ";"], "--shapes names no shape"),
        (["--set", "cpu,gpu"], "no set 'gpu'"),
        (["--contenders", "nobody"], "no contender"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: 0 is less than 1"),
        (["--seconds", "0"], "--seconds: 0 is not enough"),
        (["--seconds", "nan"], "--seconds: nan is not a number from 0 on"),
        (["--timeout", "-1"], "--timeout: -1 is not a number from 0 on"),
    ],
)
def test_bad_numbers_are_refused_by_the_parser(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", *options])
    assert message in capsys.readouterr().err


def test_modes_and_cells_of_the_options() -> None:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    options = parser.parse_args(["--set", "all", "--cell", "gru", "--mode", "forward,step"])
    cases = runner.chosen_cases(options)
    assert {case.cell for case in cases} == {"gru"}
    assert {case.mode for case in cases} == {"forward", "step"}


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["cores"] >= 1
    assert set(found["caches"]) == {"L1", "L2", "L3"}
    assert found["processor"]
