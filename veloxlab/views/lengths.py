"""What a length of text costs: memory at its peak while it is read and continued, and the time of a token."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import caption_title, framed
from veloxlab.views.logscale import not_drawn, on_log_scale
from veloxlab.views.memory import MEGABYTE

PANELS = (
    ("prefill_peak_bytes", ["peak while reading", "MB"], MEGABYTE),
    ("decode_peak_bytes", ["peak while continuing", "MB"], MEGABYTE),
    ("decode_seconds", ["a token behind it", "ms"], 1e-3),
)


def costs_by_length(
    frame: pl.DataFrame, *, heading: str = "What a length of text costs", caption: str | None = None
) -> alt.VConcatChart:
    """Draw peaks of memory and the time of a token against the tokens of the text, a line for each cache.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.lengths.LENGTHS`: ``cache``, ``tokens`` and the three measures of `PANELS`.
    heading
        What is seen, such as the model.
    caption
        The line under the heading; by default how the last compressed cache compares at the longest text.
    """
    needed = {"cache": "text", "tokens": "number"} | {name: "number" for name, _, _ in PANELS}
    require(frame, needed, "costs_by_length")  # type: ignore[arg-type]
    shown = frame.select(*needed).sort("tokens", maintain_order=True)
    caches = shown["cache"].unique(maintain_order=True).to_list()
    plots = [
        _panel(name, title, unit, caches, _lengths(shown), place) for place, (name, title, unit) in enumerate(PANELS)
    ]
    plots[0] = plots[0].properties(title=caption_title())
    words = lengths_caption(frame) if caption is None else caption
    return framed(plots, shown, heading, words, pickable=False)


def lengths_caption(frame: pl.DataFrame) -> str:
    """Say how the last cache's peaks compare with the first one's at the longest text that both have."""
    caches = frame["cache"].unique(maintain_order=True).to_list()
    peaks = ("prefill_peak_bytes", "decode_peak_bytes")
    whole = frame.drop_nulls(["tokens", *peaks])
    shared = [set(_lengths(whole.filter(pl.col("cache") == name))) for name in (caches[0], caches[-1])]
    left_out = not_drawn(frame["tokens"], zero=True)
    if len(caches) < 2 or not shared[0] & shared[1]:
        return "; ".join(["Memory beside the model's weights, and the time of one more token", *left_out])
    longest = max(shared[0] & shared[1])
    rows = {row["cache"]: row for row in whole.filter(pl.col("tokens") == longest).iter_rows(named=True)}
    first, last = rows[caches[0]], rows[caches[-1]]
    shares = [f"{last[name] / first[name]:.2f}" for name in peaks]
    said = (
        f"At {longest:,} tokens {caches[-1]} peaks at {shares[0]} of {caches[0]}'s memory while reading, "
        f"at {shares[1]} while continuing"
    )
    return "; ".join([said, *left_out])


def _lengths(frame: pl.DataFrame) -> list[int]:
    """Numbers of tokens that have a place on a log scale."""
    tokens = frame["tokens"].unique().sort()
    return tokens.filter(tokens.is_finite() & (tokens > 0)).to_list()


def _panel(
    name: str, title: list[str], unit: float, caches: list[str], tokens: list[int], place: int
) -> alt.LayerChart:
    last = place == len(PANELS) - 1
    colour = alt.Color("cache:N", legend=None if place else alt.Legend(title=None, orient="top")).scale(
        domain=caches, range=[palette.colour_of(cache) for cache in caches]
    )
    axis = alt.Axis(values=tokens, format=",d", labels=last, ticks=last, title="tokens of text" if last else None)
    base = (
        on_log_scale(alt.Chart(), "tokens")
        .transform_filter(f"isValid(datum.{name})")
        .transform_calculate(shown=f"datum.{name} / {unit}")
        .encode(
            x=alt.X("tokens_drawn:Q", axis=axis).scale(type="log", base=2, nice=False),
            y=alt.Y("shown:Q", title=title).axis(tickCount=4).scale(zero=True),
            color=colour,
        )
    )
    tooltip = [
        alt.Tooltip("cache:N"),
        alt.Tooltip("tokens:Q", format=",d"),
        alt.Tooltip("shown:Q", format=",.3~r", title=" in ".join(title)),
    ]
    line = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=34, opacity=1).encode(tooltip=tooltip)
    return alt.layer(line, points).properties(width=palette.WIDTH, height=130)  # type: ignore[return-value]
