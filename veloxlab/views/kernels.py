"""How long attention over a long context takes, beside what moving its bytes alone would."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import caption_title, framed

ROW = 17  # pixels of a cache's bar


def attention_times(
    frame: pl.DataFrame, *, heading: str = "Attention of one token", caption: str | None = None
) -> alt.VConcatChart:
    """Draw the time of attention as bars, a panel for each length of the context, and as a tick what memory would take.

    Parameters
    ----------
    frame
        Rows of one shape of `veloxlab.measure.bench.decode_attention`: ``cache``, ``tokens``, ``microseconds``,
        ``roofline_microseconds`` (the call's bytes at the device's copying speed) and ``ratio`` (to the exact cache).
    heading
        What is seen, such as the device.
    caption
        The line under the heading; by default how the best compressed cache compares at the longest context.
    """
    needed = ("tokens", "microseconds", "roofline_microseconds", "ratio")
    require(frame, {"cache": "text"} | dict.fromkeys(needed, "number"), "attention_times")  # type: ignore[arg-type]
    shown = frame.select("cache", *needed).sort("tokens", maintain_order=True)
    caches = shown["cache"].unique(maintain_order=True).to_list()
    lengths = shown["tokens"].unique(maintain_order=True).to_list()
    plots = [_panel(length, caches, last=length == lengths[-1]) for length in lengths]
    plots[0] = plots[0].properties(title=caption_title())
    words = times_caption(frame) if caption is None else caption
    return framed(plots, shown, heading, words, pickable=False)


def times_caption(frame: pl.DataFrame) -> str:
    """Say how the fastest cache that is neither exact nor mlx-lm's compares at the longest context."""
    longest = frame.filter(pl.col("tokens") == pl.col("tokens").max())
    ours = longest.filter(~pl.col("cache").str.contains("^(exact|mlx-lm)")).sort("microseconds")
    if ours.is_empty():
        return "Bars: measured; ticks: what moving the bytes alone would take"
    best = ours.row(0, named=True)
    return (
        f"At {best['tokens']:,} tokens {best['cache']} takes {best['ratio']:.2f} of exact's time; "
        "ticks: what its bytes alone would take"
    )


def _panel(tokens: int, caches: list[str], *, last: bool) -> alt.LayerChart:
    base = (
        alt.Chart()
        .transform_filter(f"datum.tokens === {tokens}")
        .encode(y=alt.Y("cache:N", sort=caches, title=None).axis(ticks=False, labelLimit=160, minExtent=110))
    )
    colours = alt.Color("cache:N", legend=None).scale(domain=caches, range=[palette.colour_of(c) for c in caches])
    title = [f"µs at {tokens:,} tokens"]
    x = alt.X("microseconds:Q", title=title if not last else [*title, "(ratio to exact beside each bar)"])
    tooltip = [
        alt.Tooltip("cache:N"),
        alt.Tooltip("tokens:Q", format=",d"),
        alt.Tooltip("microseconds:Q", format=".0f", title="µs, measured"),
        alt.Tooltip("roofline_microseconds:Q", format=".0f", title="µs, bytes alone"),
        alt.Tooltip("ratio:Q", format=".2f", title="of exact's time"),
    ]
    bars = base.mark_bar(height=ROW - 5, cornerRadiusEnd=2).encode(x=x, color=colours, tooltip=tooltip)
    ticks = base.mark_tick(thickness=2, size=ROW - 3, color=palette.PICKED).encode(x="roofline_microseconds:Q")
    text = (
        base.transform_calculate(label="format(datum.microseconds, '.0f') + ' µs  ' + format(datum.ratio, '.2f') + '×'")
        .mark_text(align="left", dx=5)
        .encode(x="microseconds:Q", text="label:N")
    )
    layered: alt.LayerChart = alt.layer(bars, ticks, text)  # type: ignore[assignment]
    return layered.properties(width=palette.WIDTH - 150, height=ROW * len(caches))
