"""Frames as tables in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

Row = dict[str, Any]


def markdown(titles: str, cells: str, frame: pl.DataFrame | Sequence[Row], **more: Callable[[Row], object]) -> str:
    """Return a Markdown table of a frame, or of rows.

    ``titles`` are parted by ``" | "``; a colon behind one aligns its column to the right. ``cells`` is the template of
    a line, with the fields of a row, and ``more`` that follow from them.
    """
    columns = titles.split(" | ")
    marks = ["---:" if title.endswith(":") else "---" for title in columns]
    head = " | ".join(title.removesuffix(":") for title in columns)
    given = frame if isinstance(frame, Sequence) else frame.iter_rows(named=True)
    rows = [row | {name: made(row) for name, made in more.items()} for row in given]
    return "\n".join([f"| {head} |", f"|{'|'.join(marks)}|", *(f"| {cells.format(**row)} |" for row in rows)])


def html_table(titles: Sequence[str], rows: Iterable[Sequence[object]], cell: str = "") -> str:
    """Return an HTML table, in which all text is escaped; a float has four digits.

    ``cell``: CSS of every cell where the page has none of its own; all columns but the first are then on the right.
    """
    sides = ("left", *["right"] * (len(titles) - 1))
    styles = [f' style="text-align: {side}; {cell}"' if cell else "" for side in sides]

    def line(tag: str, values: Sequence[object]) -> str:
        said = (escape(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in values)
        cells = (f"<{tag}{style}>{value}</{tag}>" for style, value in zip(styles, said, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line("th", titles), *(line("td", row) for row in rows)]
    return "<table>\n{}\n</table>".format("\n".join(lines))
