"""One HTML file with charts, tables and text, which needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

import polars as pl

from veloxlab.views import theme
from veloxlab.views.spec import Spec, compact, finite


@dataclass(frozen=True)
class Section:
    """Part of a report, each piece of which may be missing.

    Attributes
    ----------
    heading : what is seen; empty where a chart says it.
    words : a paragraph.
    chart : a Vega-Lite spec with its data.
    table : a frame, drawn whole.
    code : text to be copied.
    """

    heading: str = ""
    words: str = ""
    chart: Spec | None = None
    table: pl.DataFrame | None = None
    code: str = ""


def report(title: str, sections: Sequence[Section], script: str) -> str:
    """Give the text of an HTML page.

    ``title``: what the page is about. ``sections``: its parts, from top to bottom. ``script``: an ES module that
    exports ``vegaEmbed``; it goes into the page.
    """
    charts = [section.chart for section in sections if section.chart is not None]
    numbers = iter(range(len(charts)))
    parts = [_part(section, numbers.__next__ if section.chart is not None else None) for section in sections]
    themes = {mode: theme.colours(mode) | {"background": "transparent"} for mode in theme.INK}
    ink = {f"{mode}_{name}": colour for mode, colours in theme.INK.items() for name, colour in colours.items()}
    page = Template((files("veloxlab.views") / "report.html").read_text(encoding="utf-8"))
    return page.substitute(
        ink,
        title=escape(title),
        font=theme.FONT,
        sections="\n".join(parts),
        charts=_inert({"specs": finite(charts), "themes": themes}),
        script=_inert(script),
    )


def _part(section: Section, number: object) -> str:
    lines = [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
    if section.words:
        lines.append(f"<p>{escape(section.words)}</p>")
    if callable(number):
        lines.append(f'<div class="chart" id="chart-{number()}"></div>')
    if section.table is not None:
        lines.append(_table(section.table))
    if section.code:
        lines.append(f"<pre>{escape(section.code)}</pre>")
    return "\n".join(lines)


def _table(frame: pl.DataFrame) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in frame.columns)
    rows = ("".join(f"<td>{escape(_shown(value))}</td>" for value in row) for row in frame.iter_rows())
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _inert(value: object) -> str:
    """JSON in which HTML sees no mark of its own: neither ``</script`` nor ``<!--``, for there is no ``<``."""
    return compact(value).replace("<", "\\u003c")
