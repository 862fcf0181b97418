"""What the page of advice writes: a table of caches, and whether an answer changed."""

from __future__ import annotations

import html

import polars as pl

from veloxlab.measure.generation import first_parting
from veloxlab.views.memory import amount
from veloxlab.views.picture import html_table

ROWS = 12  # of the table
TITLES = ["", "cache", "fits", "bytes held", "most tokens", "nats a token", "other first choice", ""]


def advice_table(frame: pl.DataFrame, picked: str) -> str:
    """HTML of the first rows of `veloxlab.measure.advise.ADVICE`, and of the picked one, which is marked."""
    rows = [row for place, row in enumerate(frame.to_dicts()) if place < ROWS or row["name"] == picked]
    lines = [
        (
            "\u25b6" if row["name"] == picked else "",
            row["name"],
            "yes" if row["fits"] else "no",
            amount(row["held_bytes"]),
            f"{row['most_tokens']:,}",
            f"{row['kl_mean']:.3f}",
            f"{row['top1_flips']:.0%}",
            row["kind"] if row["name"] != "fp16" else "exact",
        )
        for row in rows
    ]
    return html_table(TITLES, lines, cell="padding: 1px 14px 1px 0")


def answer_said(rows: pl.DataFrame) -> str:
    """Say in HTML whether two answers differ, and from where: rows of `veloxlab.measure.generation.GENERATION`."""
    parting = first_parting(rows)
    exact, ours = ("".join(rows.filter(side=side)["text"]) for side in ("exact", "compressed"))
    if parting is None:
        return (
            f"The answer does not change in {rows.filter(side='exact').height} tokens: \u201c{html.escape(exact)}\u201d"
        )
    words = f"The answer changes at token {parting + 1}."
    return f"{words}<br>exact: \u201c{html.escape(exact)}\u201d<br>compressed: \u201c{html.escape(ours)}\u201d"
