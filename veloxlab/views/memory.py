"""Bytes that are really held as a context grows, beside what 16-bit keys and values take."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import IS_PICKED, PICKED, caption_title, framed

EXACT = "fp16"  # the cache that others are compared with
MEGABYTE = 1_000_000
MEASURED = "datum.kind === 'measured'"
AHEAD = "(datum.kind === 'predicted' || datum.tokens === datum.known)"  # from the last measured point on
SIZE = "format(datum.megabytes, ',.3~r') + ' MB'"


def memory_growth(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the bytes held against the tokens of the context.

    Parameters
    ----------
    frame
        Rows of ``tokens``, ``cache``, ``bytes`` and ``kind`` (``"measured"`` or ``"predicted"``), whose bytes add up
        to what a cache holds. With a column ``layer``, a row is one layer's share, or where it is null what all layers
        share, and the picked layer's bytes are drawn too.
    caption
        The line under the heading; by default the ratio at the longest context.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    needed = {"tokens": "number", "cache": "text", "bytes": "number", "kind": "text"}
    require(frame, needed, "memory_growth")  # type: ignore[arg-type]
    layer = pl.col("layer") if "layer" in frame.columns else pl.lit(None, pl.Int64).alias("layer")
    shown = frame.select(*needed, layer).sort("cache", "layer", "tokens")
    caches = shown["cache"].unique(maintain_order=True).to_list()
    plot = (
        alt.layer(*_totals(caches), *_shares())
        .encode(
            x=alt.X("tokens:Q", title="tokens of context").axis(format=",d", tickCount=6).scale(zero=True, nice=False),
            y=alt.Y("megabytes:Q", title=["bytes held", "MB"]).axis(tickCount=5),
        )
        .properties(width=palette.WIDTH - 100, height=220, title=caption_title())
    )
    words = memory_caption(frame) if caption is None else caption
    return framed([plot], shown, "Bytes held as the context grows", words, pickable=True)


def memory_caption(frame: pl.DataFrame) -> str:
    """Say how much smaller each cache is than 16 bits at the longest context, and whether that was measured."""
    end = frame.filter(pl.col("tokens") == pl.col("tokens").max())
    held = end.group_by("cache", maintain_order=True).agg(pl.col("bytes").sum(), pl.col("kind").first())
    sizes = {row["cache"]: row for row in held.iter_rows(named=True)}
    exact = sizes.pop(EXACT, None)
    said = [
        f"{name} holds {row['bytes'] / MEGABYTE:,.1f} MB, {exact['bytes'] / row['bytes']:.2f} times less than fp16"
        f" ({row['kind']})"
        for name, row in sizes.items()
        if exact and row["bytes"]
    ]
    return f"At {end['tokens'][0]:,} tokens " + "; ".join(said) if said else "Solid is measured, dashed is predicted"


def _totals(caches: list[str]) -> list[alt.Chart]:
    """Draw each cache: solid with points where measured, dashed where predicted, its name and size at the end."""
    colour = alt.Color("cache:N", legend=None).scale(domain=caches, range=[palette.colour_of(name) for name in caches])
    base = _growth(alt.Chart()).encode(color=colour)
    tooltip = [
        alt.Tooltip("cache:N"),
        alt.Tooltip("tokens:Q", format=",d"),
        alt.Tooltip("bytes:Q", format=",d"),
        alt.Tooltip("kind:N"),
    ]
    name = alt.Text("label:N")
    return [
        base.transform_filter(AHEAD).mark_line(strokeDash=[5, 4], strokeWidth=2),
        base.transform_filter(MEASURED).mark_line(strokeWidth=2),
        base.transform_filter(MEASURED).mark_point(filled=True, size=34, opacity=1).encode(tooltip=tooltip),
        base.transform_filter("datum.tokens === datum.end")
        .transform_calculate(label=f"datum.cache + '  ' + {SIZE}")
        .mark_text(align="left", dx=7, fontWeight=600)
        .encode(text=name),
    ]


def _shares() -> list[alt.Chart]:
    """Draw the picked layer's part of each cache, and say how much it is in the empty corner."""
    base = _growth(alt.Chart().transform_filter(IS_PICKED))
    words = (
        base.transform_filter("datum.tokens === datum.end")
        .transform_window(rank="row_number()", sort=[alt.SortField("megabytes", "descending")])
        .transform_calculate(label=f"'layer ' + {PICKED} + ' in ' + datum.cache + ': ' + {SIZE}")
        .mark_text(
            align="left", baseline="top", color=palette.PICKED, fontWeight=600, dy=alt.expr("16 * datum.rank - 12")
        )
        .encode(x=alt.value(10), y=alt.value(0), text="label:N")
    )
    line = base.transform_filter(f"{MEASURED} || {AHEAD}").mark_line(color=palette.PICKED, strokeWidth=1.5)
    return [line.encode(detail="cache:N"), words]


def _growth(chart: alt.Chart) -> alt.Chart:
    """Add up a cache's layers, and note how far it was measured and where it ends."""
    return (
        chart.transform_aggregate(bytes="sum(bytes)", groupby=["tokens", "cache", "kind"])
        .transform_calculate(megabytes=f"datum.bytes / {MEGABYTE}", seen="datum.kind === 'measured' ? datum.tokens : 0")
        .transform_joinaggregate(known="max(seen)", end="max(tokens)", groupby=["cache"])
    )
