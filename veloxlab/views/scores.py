"""Causes of one head's logit error: RoPE pairs of channels, and coordinates of the codes."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

KINDS = {"pair": "RoPE pair, the fastest first", "coordinate": "coordinate of the codes' space"}
BARS = 160  # of a panel at most; more coordinates are drawn in groups


def logit_errors(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the shares of RoPE pairs and code coordinates in the logit error of one head, and the bits of coordinates.

    Rows of one head of `veloxlab.measure.scores.SCORE_ERRORS`. A share below 0 cancels part of the other shares.
    """
    shown = columns.require_head(frame, "logit_errors", "kind place wavelength bits share rms")
    kinds = [kind for kind in KINDS if kind in shown["kind"]]
    _, words = _grouped(shown)

    def bars(kind: str) -> alt.Chart:
        return marks.only(kind=kind).encode(x=columns.x("begin", "", nice=False), x2=alt.X2("end:Q"))

    def draw(kind: str, last: bool) -> marks.Plot:
        about = ("wavelength", "tokens per turn", ",.3~g") if kind == "pair" else ("bits", "code bits", ".3~g")
        told = columns.tips(("place", kind), "share", ("rms", "alone, nats", ".3~g"), about)
        drawn: alt.Chart = bars(kind).mark_rect(color=theme.KEYS, opacity=0.85)
        title = words if kind == "coordinate" else KINDS[kind]
        return drawn.encode(
            x=columns.x("begin", title, nice=False, tickMinStep=1),
            y=columns.y("share", ["share of", "squared error"], format="%", tickCount=4, zero=True),
            y2=alt.datum(0),
            tooltip=told,
        )

    plots = marks.panels(kinds, draw, theme.WIDTH - 90, 80)
    given: alt.Chart = bars("coordinate").mark_rect(color=theme.NEUTRAL, opacity=0.6)
    given = given.encode(
        x=columns.x("begin", None, nice=False, labels=False),
        y=columns.y("bits", ["code", "bits"], tickCount=3, zero=True),
        y2=alt.datum(0),
        tooltip=columns.tips(("place", "coordinate"), ("bits", "code bits", ".3~g")),
    )
    plots.append(marks.sized(given, theme.WIDTH - 90, 36))
    heading = "Where the error of the logits comes from, and the bits given there"
    return marks.framed(plots, logits_data(frame), heading, caption or logits_caption(frame))


def logits_data(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of `logit_errors`: one for each bar, from ``begin`` to ``end``."""
    group, _ = _grouped(frame)
    size, place = pl.when(pl.col("kind") == "coordinate").then(group).otherwise(1), pl.col("place")
    pooled = frame.group_by("kind", place // size * size, maintain_order=True).agg(
        pl.col("share").sum(), pl.col("rms").pow(2).sum().sqrt(), pl.col("bits", "wavelength").mean()
    )
    return pooled.with_columns(begin=place - 0.5 * size, end=place + 0.5 * size)


def _grouped(frame: pl.DataFrame) -> tuple[int, str]:
    return marks.grouped(frame.filter(kind="coordinate").height, BARS, KINDS["coordinate"])


def logits_caption(frame: pl.DataFrame) -> str:
    """State how few pairs and coordinates make half of the error, and whether they have more bits than the others."""
    said = []
    for kind in KINDS:
        own = frame.filter(pl.col("kind") == kind, pl.col("share").is_finite()).sort("share", descending=True)
        if own.is_empty() or own["share"].sum() <= 0:
            continue
        few = own.head(int((own["share"].cum_sum() < 0.5).sum()) + 1)
        most = few.row(0, named=True)
        words = f"half comes from {few.height} of {own.height} {kind}s, {most['share']:.0%} from {kind} {most['place']}"
        if kind == "pair":
            words += f" ({most['wavelength']:,.0f} tokens a turn)"
        elif own["bits"].n_unique() > 1:
            mean = [sum(each["bits"]) / each.height for each in (few, own)]
            words += f"; these got {mean[0]:.2g} bits, all {mean[1]:.2g} on average"
        said.append(words)
    return (
        f"{marks.head_words(frame)}: {marks.sentence(*said)}" if said else f"{marks.head_words(frame)}: nothing is lost"
    )
