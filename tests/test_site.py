"""The documentation as a site: it builds without a warning, search finds things, pages fit a phone."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from fusedlstm.benchmarks.report import BROWSERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site that SITE names, if it has been built already, else a new one."""
    if (made := Path(os.environ.get("SITE", "none")) / "index.html").exists():
        return made.parent
    pytest.importorskip("sphinx", reason='the documentation needs: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser to look at the site with: none of {', '.join(BROWSERS)}")
    return found


def dump(browser: str, address: str, *options: str) -> tuple[str, list[str]]:
    """The page as the browser has it in the end, and what it wrote to the console."""
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    command += ["--virtual-time-budget=5000", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def is_broken(page: Path, link: str) -> bool:
    """Whether a link of a page leads to no page, or to no place on it."""
    target, _, anchor = unquote(unescape(link)).partition("#")
    target = target.partition("?")[0]
    if re.match(r"\w+:|//", target):
        return False
    file = (page.parent / target).resolve() if target else page
    file = file / "index.html" if file.is_dir() else file
    return not file.exists() or bool(anchor and file.suffix == ".html" and anchor not in places(file))


@cache
def places(page: Path) -> set[str]:
    """The places of a page that a link can name."""
    return set(re.findall(r'id="([^"]*)"', page.read_text(encoding="utf-8")))


def test_links_and_pictures_lead_somewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        links = re.findall(r'(?:href|src)="([^"]*)"', page.read_text(encoding="utf-8"))
        assert [link for link in links if is_broken(page, link)] == [], page.name


def test_the_site_needs_nothing_from_outside(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r'(?:src|<link[^>]* href)="(?:https?:)?//', page.read_text(encoding="utf-8")), (
            page
        )


def test_every_class_has_its_arguments_and_weights(site: Path) -> None:
    page = (site / "reference" / "lstm.html").read_text(encoding="utf-8")
    for name in ("input_size", "proj_size", "recurrent_dropout", "seed"):
        assert f"<strong>{name}</strong>" in page
    assert "nonlinearity" not in page
    text = re.sub(r"<[^>]+>|\s", "", page)
    assert "weight_hh_l0(4H,P)" in text
    assert "weight_hr_l0(P,H)" in text


@pytest.mark.parametrize(
    ("query", "page"),
    [("lengths", "reference/lstm.html"), ("输出门", "zh/equations.html"), ("peephole", "cells.html")],
)
def test_search_finds(site: Path, browser: str, query: str, page: str) -> None:
    text, console = dump(browser, f"{(site / 'search.html').as_uri()}?q={quote(query)}")
    assert console == []
    results = re.findall(r'<li[^>]*><a href="([^"?#]*)', text[text.index('id="search-results"') :])
    assert page in results


@pytest.mark.parametrize("page", ["index.html", "reference/lstm.html", "zh/equations.html", "results.html"])
def test_pages_fit_a_phone_and_the_console_is_empty(
    site: Path, browser: str, page: str, tmp_path: Path
) -> None:
    copy = site / page.replace(".html", "-measured.html")
    fits = "document.documentElement.scrollWidth <= innerWidth"
    measure = f"<script>document.title = {fits} ? 'fits' : 'too wide'</script>"
    copy.write_text((site / page).read_text(encoding="utf-8") + measure, encoding="utf-8")
    try:
        text, console = dump(browser, copy.as_uri(), "--window-size=500,900")
    finally:
        copy.unlink()
    assert console == []
    assert "<title>fits</title>" in text


@pytest.mark.parametrize("module", ["", ".math", ".torch", ".keras", ".onnx"])
def test_every_public_name_is_in_the_reference(site: Path, module: str) -> None:
    module = f"fusedlstm{module}"
    known = {place for page in (site / "reference").glob("*.html") for place in places(page)}
    known |= {"fusedlstm.cells", "fusedlstm.math"}  # pages of their own
    names = importlib.import_module(module).__all__
    assert [name for name in names if f"{module}.{name}" not in known] == []
