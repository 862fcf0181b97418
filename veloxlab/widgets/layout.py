"""How a page is laid out: controls that stay in sight, charts in as many columns as there is room for, and the rest."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

import ipywidgets

from veloxlab.views import theme

STYLE = f"<style>{(Path(__file__).parent / 'static' / 'pages.css').read_text('utf-8')}</style>"
BROAD = "veloxlab-broad"  # a control that has a row of its own
LEGEND = (
    ("●", theme.KEYS, "keys"),
    ("■", theme.VALUES, "values"),
    ("◆", theme.NEUTRAL, "exact"),
    ("●", theme.CHOSEN, "compressed"),
    ("▭", theme.PICKED, "picked"),
    ("×", theme.PICKED, "not finite"),
    ("▲", theme.PICKED, "above the scale"),
)


def laid_out(head: Iterable[ipywidgets.Widget], *parts: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """Children of a page: its style, a head that stays in sight, and what is below it."""
    return [styled(), _box("veloxlab-head", head, ipywidgets.VBox), *parts]


def about(help_at: str) -> ipywidgets.HTML:
    """What marks in charts mean, and where a page is explained: a notebook and a heading, ``"file.ipynb#heading"``.

    It is a link where that notebook lies beside the present one.
    """
    file, heading = help_at.split("#")
    words = f"Explained in {file}, “{html.escape(heading)}”"
    link = f"<span class='veloxlab-help' title='{words}'>?</span>"
    if Path(file).is_file():
        at = f"{file}#{quote(heading.replace(' ', '-'))}"
        link = f"<a class='veloxlab-help' href='{at}' target='_blank' title='{words}' aria-label='{words}'>?</a>"
    marks = "".join(f"<span><b style='color: {colour}'>{mark}</b> {word}</span>" for mark, colour, word in LEGEND)
    return ipywidgets.HTML(f"<div class='veloxlab-legend'>{marks}{link}</div>")


def styled() -> ipywidgets.HTML:
    """What brings the style of pages to wherever they are shown."""
    return ipywidgets.HTML(STYLE, layout={"display": "none"})


def controls(*parts: ipywidgets.Widget | Iterable[ipywidgets.Widget]) -> ipywidgets.Box:
    """Controls beside one another, as many in a row as there is room for."""
    flat = [one for part in parts for one in ([part] if isinstance(part, ipywidgets.Widget) else part)]
    return _box("veloxlab-controls", flat)


def status(said: Iterable[ipywidgets.Widget], bar: ipywidgets.Widget) -> ipywidgets.Box:
    """What a page says, and beside it what its worker does."""
    words = ipywidgets.VBox([*said], layout={"flex": "1 1 260px", "overflow": "visible"})
    return _box("veloxlab-status", [words, bar])


def broad(control: ipywidgets.Widget) -> ipywidgets.Widget:
    """A control with a row of its own."""
    control.add_class(BROAD)
    return control


def columns(charts: Iterable[ipywidgets.Widget] = ()) -> ipywidgets.Box:
    """Charts in columns, each chart as wide as its column."""
    return _box("veloxlab-grid", charts)


def _box(name: str, parts: Iterable[ipywidgets.Widget], kind: type[ipywidgets.Box] = ipywidgets.Box) -> ipywidgets.Box:
    made = kind([*parts])
    made.add_class(name)
    return made


def button(words: str, tip: str, act: Callable[[], object], width: str = "") -> ipywidgets.Button:
    """A button that acts when it is pressed."""
    made = ipywidgets.Button(description=words, tooltip=tip, layout={"width": width} if width else {})
    made.on_click(lambda _: act())
    return made
