"""The parts of pages: controls that stay in sight, charts in columns, notes, a glossary, and lines of code."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from urllib.parse import quote

import anywidget
import ipywidgets
import traitlets as t

from veloxlab.views import theme

STATIC = Path(__file__).parent / "static"
STYLE = f"<style>{(STATIC / 'pages.css').read_text('utf-8')}</style>"
BROAD = "veloxlab-broad"  # a control that has a row of its own
WIDE = "veloxlab-wide"  # a control as wide as two
LEGEND = (  # mark, colour, words, and what a chart's spec has that uses the mark
    ("●", theme.KEYS, "keys", """["']keys["'](?!:)"""),
    ("■", theme.VALUES, "values", """["']values["'](?!:)"""),
    ("◆", theme.NEUTRAL, "exact", r'"domain":\[[^]]*"(exact|fp16)'),
    ("●", theme.CHOSEN, "compressed", r'"domain":\[[^]]*"compressed"'),
    ("▭", theme.PICKED, "picked", '"picked_'),
    ("×", theme.PICKED, "not finite", r'"\\u00d7"'),
    ("▲", theme.PICKED, "above the scale", r'"\\u25b2"'),
)


def laid_out(head: Iterable[ipywidgets.Widget], *parts: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """Children of a page: its style, a head that stays in sight, and the parts below it."""
    return [styled(), _box("veloxlab-head", head, ipywidgets.VBox), *parts]


def marks_in(spec: str) -> set[str]:
    """Words of the marks that a chart uses; ``spec``: its Vega-Lite spec without rows, as compact JSON."""
    return {words for _, _, words, used in LEGEND if re.search(used, spec)}


def about(help_at: str, used: Container[str] = ()) -> str:
    """HTML of the legend of ``used`` marks, and of a pointer to the notebook and heading that explain a page.

    ``help_at``: ``"file.ipynb#heading"``. The pointer is a link if that notebook is in the present folder.
    """
    file, heading = help_at.split("#")
    words = f"Explained in {file}, “{html.escape(heading)}”"
    link = f"<span class='veloxlab-help' title='{words}'>?</span>"
    if Path(file).is_file():
        at = f"{file}#{quote(heading.replace(' ', '-'))}"
        link = f"<a class='veloxlab-help' href='{at}' target='_blank' title='{words}' aria-label='{words}'>?</a>"
    shown = ((mark, colour, word) for mark, colour, word, _ in LEGEND if word in used)
    marks = "".join(f"<span><b style='color: {colour}'>{mark}</b> {word}</span>" for mark, colour, word in shown)
    return f"<div class='veloxlab-legend'>{marks}{link}</div>"


def styled() -> ipywidgets.HTML:
    """A hidden widget with the style of pages."""
    return ipywidgets.HTML(STYLE, layout={"display": "none"})


def controls(*parts: ipywidgets.Widget | Iterable[ipywidgets.Widget]) -> ipywidgets.Box:
    """Controls in rows, with as many in a row as fit."""
    flat = [one for part in parts for one in ([part] if isinstance(part, ipywidgets.Widget) else part)]
    return _box("veloxlab-controls", flat)


def status(said: Iterable[ipywidgets.Widget], bar: ipywidgets.Widget) -> ipywidgets.Box:
    """The messages of a page, and beside them the progress bar of its worker."""
    words = ipywidgets.VBox([*said], layout={"flex": "1 1 260px", "overflow": "visible"})
    return _box("veloxlab-status", [words, bar])


def broad(control: ipywidgets.Widget) -> ipywidgets.Widget:
    """A control with a row of its own."""
    control.add_class(BROAD)
    return control


def wide(control: ipywidgets.Widget) -> ipywidgets.Widget:
    """A control as wide as two, where they fit: for long words."""
    control.add_class(WIDE)
    return control


def columns(charts: Iterable[ipywidgets.Widget] = ()) -> ipywidgets.Box:
    """Charts in columns, each chart as wide as its column."""
    return _box("veloxlab-grid", charts)


def _box(name: str, parts: Iterable[ipywidgets.Widget], kind: type[ipywidgets.Box] = ipywidgets.Box) -> ipywidgets.Box:
    made = kind([*parts])
    made.add_class(name)
    return made


def button(words: str, tip: str, act: Callable[[], object], width: str = "") -> ipywidgets.Button:
    """A button that calls ``act`` when it is pressed."""
    made = ipywidgets.Button(description=words, tooltip=tip, layout={"width": width} if width else {})
    made.on_click(lambda _: act())
    return made


WORDS = {
    "keys, values": "the two vectors that a layer stores for each token; attention compares a query with the keys, "
    "and takes a weighted mean of the values",
    "KV head": "a part of a layer that stores its own keys and values; several query heads can share it",
    "sinks": "the first tokens of a text, kept exact, because much attention goes to them",
    "window": "the newest tokens, kept exact; up to 32 more wait to be coded together",
    "code bits": "bits of the code of one coordinate of a key (K) or value (V)",
    "true bits": "all stored bits of one coordinate, including its share of scales and norms",
    "relative MSE": "squared error divided by squared size: at 0.01 the error has 1 % of the energy",
    "KL (nats)": "how far the next token's probabilities move from those of the exact cache; 0 is no change",
    "other first choice": "share of positions at which the most probable next token differs from the exact cache's",
    "fp16, exact": "the uncompressed cache, 16 bits a number: the reference for all bytes",
    "measured": "run on this model and text, or counted in live buffers",
    "predicted": "computed from the layout of codes, or from the committed results of another model",
    "stale": "of older settings: the present ones are being measured, or cannot be measured",
    "geometric mean": "the mean of logarithms; a usual mean far above it shows that a few heads matter much more than "
    "others",
}


def awaited(why: str) -> ipywidgets.HTML:
    """A placeholder for a chart that is not measured yet, with the chart's purpose."""
    return ipywidgets.HTML(f"<div class='veloxlab-awaited'>{html.escape(why)}</div>")


def note(why: str, badge: str) -> dict[str, str]:
    """The line above a chart: its purpose, and whether its numbers are "measured", "predicted" or "stale"."""
    return {"why": why, "badge": badge, "tip": "; ".join(WORDS[word] for word in badge.split(", then "))}


def glossary() -> str:
    """HTML of `WORDS`, which opens at a click."""
    lines = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(said)}</dd>" for word, said in WORDS.items())
    return f"<details class='veloxlab-glossary'><summary>Words used here</summary><dl>{lines}</dl></details>"


class CodeLines(anywidget.AnyWidget):
    """Show ``value``, lines of code, with a button that copies them."""

    # text, not a path: anywidget watches a path, and its signal would keep every widget alive
    _esm = (STATIC / "code_lines.js").read_text("utf-8")

    value = t.Unicode("", help="lines of Python").tag(sync=True)

    def __repr__(self) -> str:
        return self.value
