"""The documentation site: `sphinx-build -W --keep-going docs site`.

Sphinx: mkdocs is no longer maintained, and the successor of mkdocs-material is not stable yet.  Furo: light,
dark and narrow, without fetching anything.  What is our own here: formulas as pictures, which need neither a
font of the reader's nor a program; search that also finds Chinese; arguments and weights on a layer's page.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

os.environ.setdefault("KERAS_BACKEND", "torch")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ziamath
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

import fusedlstm
from fusedlstm import layers, weights

project = "fusedlstm"
author = "the fusedlstm developers"
copyright = f"2026, {author}"
release = version = fusedlstm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["programs/figures.json"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = [
    "myst.header",  # pages of results begin deeper
    "ref.python",  # Recurrent is a class of three modules, and a signature names one
]
autodoc_inherit_docstrings = False  # those of other packages are not written for this one
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"  # as docstrings here have it
python_use_unqualified_type_names = True
nitpicky = False

html_theme = "furo"
html_title = "fusedlstm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "drawn"
html_show_search_summary = False  # it would fetch pages, which a browser forbids for files
html_copy_source = False
html_domain_indices = False  # search finds more
html_theme_options = {"navigation_with_keys": True}


# --- Mathematics -----------------------------------------------------------------------------------------


ziamath.config.svg2 = False
ziamath.config.precision = 2
EM = 17  # pixels; sizes on the page are multiples of the font's


@cache
def drawing(latex: str, inline: bool) -> str:
    """A formula as a picture in the colour of the text, on its baseline."""
    made = ziamath.Latex(latex, size=EM, color="currentColor", inline=inline)
    picture = made.svgxml()
    width, height = (float(picture.get(side)) / EM for side in ("width", "height"))
    below = f"vertical-align: {made.getyofst() / EM:.3f}em; " if inline else ""
    picture.set("style", f"{below}width: {width:.3f}em; height: {height:.3f}em")
    for side in ("width", "height"):
        del picture.attrib[side]
    picture.set("role", "img")
    picture.set("aria-label", latex)
    return ElementTree.tostring(picture, encoding="unicode")


def draw_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(drawing(node.astext(), True))
    raise nodes.SkipNode


def draw_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{drawing(node.astext(), False)}</div>')
    raise nodes.SkipNode


# --- Search ----------------------------------------------------------------------------------------------


class SearchBoth(SearchEnglish):
    """English words by their stems, Chinese by pairs of characters, since its words are not written apart."""

    js_splitter_code = r"""
function splitQuery(query) {
    const words = query.split(/[^\p{L}\p{N}_]+/u).filter((word) => word);
    return words.flatMap((word) => word.split(/([\u4e00-\u9fff]+)/).filter((part) => part).flatMap((part) => {
        if (!/[\u4e00-\u9fff]/.test(part) || part.length < 3) return [part];
        return Array.from({length: part.length - 1}, (_, n) => part.slice(n, n + 2));
    }));
}
"""

    def split(self, input: str) -> list[str]:
        return [
            part
            for word in re.findall(r"\w+", input)
            for run in re.split(r"([\u4e00-\u9fff]+)", word)
            for part in (self.pairs(run) if re.match(r"[\u4e00-\u9fff]", run) else [run])
            if part
        ]

    @staticmethod
    def pairs(run: str) -> list[str]:
        """Pairs and single characters of a run of Chinese."""
        return [run[n : n + 2] for n in range(len(run) - 1)] + list(run)

    def word_filter(self, word: str) -> bool:
        return bool(re.match(r"[\u4e00-\u9fff]", word)) or super().word_filter(word)


# --- Arguments and weights of layers ---------------------------------------------------------------------


def add_arguments(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Give LSTM, GRU and RNN, whose docstrings refer to Recurrent, its descriptions of what they take."""
    if what == "module":  # what developers read; the page says what a module is
        lines.clear()
    if not (inspect.isclass(value) and issubclass(value, layers.Recurrent) and value is not layers.Recurrent):
        return
    taken = inspect.signature(value).parameters
    described = re.split(
        r"\n(?=    \w)", inspect.getdoc(layers.Recurrent).partition("Args:\n")[2].partition("\n\n")[0]
    )
    kept = [entry for entry in described if entry.strip().partition(":")[0] in taken]
    end = lines.index("") if "" in lines else len(lines)  # of the first paragraph
    lines[end:end] = ["", "Args:", *"\n".join(kept).split("\n"), ""]


class WeightsOf(Directive):
    """A table of the weights of a layer of a cell, which is the argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        cell = getattr(fusedlstm.cells, self.arguments[0])
        names = weights.names(cell, 0, False, True, not cell.unprojectable)
        inputs, hidden, output = 11, 7, 5
        projected = 0 if cell.unprojectable else output
        shapes = weights.shapes(cell, inputs, hidden, True, projected)
        letters = {inputs: "I", output: "P"}
        rows = []
        for name, shape in zip(weights.flatten(names), weights.flatten(shapes)):
            sizes = [letters.get(n) or (f"{n // hidden} H" if n > hidden else "H") for n in shape]
            rows.append([f"{name}", f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"])
        gates = ", ".join(cell.gates)
        note = nodes.paragraph(text=f"The gates' rows lie one below the other in the order {gates}.")
        return [_table(["name", "shape"], rows), note]


def _table(head: list[str], rows: list[list[str]]) -> nodes.table:
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", _row(head, nodes.paragraph))
    group += nodes.tbody("", *(_row(row, nodes.literal) for row in rows))
    return nodes.table("", group)


def _row(cells: list[str], kind: type) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", kind("", cell))) for cell in cells))


# --- Pages and links of the repository -------------------------------------------------------------------

PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
PAGES["README.zh.md"] = "zh/index.md"


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Pages that lie at the root of the repository are read from there; links to sources are names of files,
    since the site stands by itself."""
    folder = (ROOT / "docs" / docname).parent
    for name, page in PAGES.items():
        if page == f"{docname}.md" and docname in ("changelog", "contributing"):
            source[0], folder = (ROOT / name).read_text(encoding="utf-8"), ROOT

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        resolved = Path(os.path.normpath(folder / path))
        if not resolved.exists() or not resolved.is_relative_to(ROOT):
            return match[0]  # which the build refuses
        name = resolved.relative_to(ROOT).as_posix()
        page = PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if page is None or not page.endswith(".md"):
            return f"`{name}`"
        return f"[{text}](/{page}{'#' + anchor if anchor and name not in PAGES else ''})"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|/)([^)\s]+)\)", replaced, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    def nothing(translator: Any, node: nodes.Node) -> None: ...

    app.add_html_math_renderer("drawn", (draw_inline, nothing), (draw_block, nothing))
    app.add_search_language(SearchBoth)
    app.add_directive("weights-of", WeightsOf)
    app.connect("autodoc-process-docstring", add_arguments, priority=100)  # before napoleon reads it
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
