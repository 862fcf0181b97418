"""Right answers with the exact and with a compressed cache, task by task."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme
from veloxlab.views.generation import SIDES

ROW = 30  # pixels of a task
SHARES = {"domain": [0, 1], "nice": False, "format": "%", "tickCount": 5}


def task_scores(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the shares of right answers with both caches, and below their difference with its interval.

    Rows of `veloxlab.measure.tasks.EVALUATION`: ``task``, ``questions``, ``chance``, ``exact``, ``compressed``,
    ``difference``, ``low``, ``high``, ``same``, ``nll_exact``, ``nll`` (nats) and ``coded_share``; shares are 0 to 1.
    """
    numbers = "questions chance exact compressed difference low high same nll_exact nll coded_share"
    shown = columns.require(frame, "task_scores", "task", numbers)
    order = shown["task"].to_list()
    interval = [(end, f"interval {word}", ".0%") for end, word in (("low", "from"), ("high", "to"))]
    told = columns.tips(
        "task questions exact compressed difference", *interval, "same nll_exact nll coded_share chance"
    )
    side: Any = {"as_": ["side", "score"]}
    base = alt.Chart().encode(y=columns.y("task", None, sort=order), tooltip=told)
    both = base.transform_fold(["exact", "compressed"], **side)
    score = columns.x("score", "right answers; the dashes are what a guess gets", **SHARES)
    shapes = marks.scaled(alt.Shape, "side", {"exact": "circle", "compressed": "diamond"})
    scores = marks.layered(
        base.mark_rule(strokeWidth=5, opacity=0.2).encode(x=alt.X("exact:Q"), x2=alt.X2("compressed:Q")),
        base.mark_tick(thickness=1.5, size=ROW - 8, strokeDash=[3, 3], color=theme.NEUTRAL).encode(x=alt.X("chance:Q")),
        both.mark_point(filled=True, size=90, opacity=1).encode(
            x=score, color=marks.scaled(alt.Color, "side", SIDES), shape=shapes
        ),
    )
    ends = [end for name in ("low", "high", "difference") for end in shown[name].drop_nulls()]
    reach = max(0.1, *map(abs, ends))
    around = SHARES | {"domain": [-reach, reach]}
    apart = columns.x("difference", "compressed \u2212 exact, with its 95 % interval", **around)
    difference = marks.layered(
        base.mark_rule(strokeWidth=1, opacity=0.4).encode(x=alt.datum(0.0)),
        base.mark_rule(strokeWidth=2, color=theme.CHOSEN).encode(x=alt.X("low:Q"), x2=alt.X2("high:Q")),
        base.mark_point(filled=True, size=60, opacity=1, color=theme.CHOSEN, shape="diamond").encode(x=apart),
    )
    plots = [marks.sized(plot, theme.WIDTH - 100, alt.Step(ROW)) for plot in (scores, difference)]
    return marks.framed(plots, shown, "Questions asked through the cache", caption or task_caption(frame))


def task_caption(frame: pl.DataFrame) -> str:
    """Say where a difference is decisive, and where the exact cache itself is no better than a guess."""
    rows = columns.require(frame, "task_caption", "task chance exact low high").to_dicts()
    worse = [row["task"] for row in rows if row["high"] is not None and row["high"] < 0]
    better = [row["task"] for row in rows if row["low"] is not None and row["low"] > 0]
    guessed = [row["task"] for row in rows if row["chance"] is not None and row["exact"] <= row["chance"]]
    found = {"fewer right answers": worse, "more right answers": better}
    said = " and ".join(f"{words} on {', '.join(names)}" for words, names in found.items() if names)
    said = f"Compressed, {said}" if said else "No difference is decisive: each interval holds 0"
    tells_nothing = f"{', '.join(guessed)}: the exact cache guesses too, so this tells nothing" if guessed else ""
    return f"{marks.sentence(said, tells_nothing)}."
