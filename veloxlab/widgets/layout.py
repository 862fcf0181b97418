"""How a page is laid out: controls that stay in sight, charts in as many columns as there is room for, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import ipywidgets

STYLE = f"<style>{(Path(__file__).parent / 'static' / 'pages.css').read_text('utf-8')}</style>"
BROAD = "veloxlab-broad"  # a control that has a row of its own


def laid_out(head: Iterable[ipywidgets.Widget], *parts: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """Children of a page: its style, a head that stays in sight, and what is below it."""
    return [styled(), _box("veloxlab-head", head, ipywidgets.VBox), *parts]


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
