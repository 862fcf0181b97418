"""One HTML file with charts, tables and text, which needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import count
from string import Template

import polars as pl

from veloxlab.tables import html_table
from veloxlab.views import theme
from veloxlab.views.spec import Spec, compact, finite


@dataclass(frozen=True)
class Section:
    """Part of a report, each piece of which may be missing.

    ``heading``: what is seen; empty where a chart says it. ``words``: a paragraph. ``chart``: a Vega-Lite spec with its
    data. ``table``: a frame, drawn whole. ``code``: text to be copied.
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
    numbers, lines = count(), list[str]()
    for section in sections:
        lines += [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
        lines += [f"<p>{escape(section.words)}</p>"] if section.words else []
        lines += [f'<div class="chart" id="chart-{next(numbers)}"></div>'] if section.chart is not None else []
        lines += [html_table(section.table.columns, section.table.iter_rows())] if section.table is not None else []
        lines += [f"<pre>{escape(section.code)}</pre>"] if section.code else []
    themes = {mode: theme.colours(mode) | {"background": "transparent"} for mode in theme.INK}
    ink = {f"{mode}_{name}": colour for mode, colours in theme.INK.items() for name, colour in colours.items()}
    page = Template((files("veloxlab.views") / "report.html").read_text(encoding="utf-8"))
    return page.substitute(
        ink,
        title=escape(title),
        font=theme.FONT,
        sections="\n".join(lines),
        charts=_inert({"specs": finite(charts), "themes": themes}),
        script=_inert(script),
    )


def _inert(value: object) -> str:
    """JSON in which HTML sees no mark of its own: neither ``</script`` nor ``<!--``, for there is no ``<``."""
    return compact(value).replace("<", "\\u003c")
