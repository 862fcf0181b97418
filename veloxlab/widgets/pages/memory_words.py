"""What the memory planner writes: a table of what each cache holds, and what it loses."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from veloxlab.measure.known import Loss
from veloxlab.views.memory import amount
from veloxlab.views.picture import html_table

TITLES = ["cache", "bytes held", "most tokens", "nats a token", "other first choice", "", "source"]


def losses_table(plan: pl.DataFrame, largest: pl.DataFrame, loss: Callable[[str], Loss]) -> str:
    """HTML: a row for each cache of `veloxlab.measure.planned_memory.LARGEST`, with its bytes of the `PLANNED` rows."""
    held = dict(plan.group_by("cache").agg(pl.col("bytes").sum()).iter_rows())
    rows = []
    for row in largest.to_dicts():
        lost = loss(row["cache"])
        said = _range(lost.kl, "{:.2g}"), _range(lost.flips, "{:.0%}")
        rows.append((row["cache"], amount(held[row["cache"]]), f"{row['tokens']:,}", *said, lost.kind, lost.source))
    return html_table(TITLES, rows, cell="padding: 1px 14px 1px 0")


def _range(ends: tuple[float | None, float | None], form: str) -> str:
    least, most = ends
    if most is None:
        return "?"
    if least is None:
        return f"less than {form.format(most)}"
    return form.format(most) if least == most else f"{form.format(least)} to {form.format(most)}"
