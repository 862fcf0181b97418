"""Bytes that are really held as a context grows, beside what 16-bit keys and values take."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import columns, marks, theme

EXACT = "fp16"  # the cache that others are compared with
MEGABYTE = 1_000_000
MEASURED = "datum.kind === 'measured'"
AHEAD = "(datum.kind === 'predicted' || datum.tokens === datum.known)"  # from the last measured point on
SIZE = "format(datum.megabytes, ',.3~r') + ' MB'"


def memory_growth(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the bytes held against the tokens of the context.

    Rows of ``tokens``, ``cache``, ``bytes`` and ``kind`` (``"measured"`` or ``"predicted"``), whose bytes add up to
    what a cache holds. With a column ``layer``, a row is one layer's share, or where it is null what all layers share,
    and the picked layer's bytes are drawn too.
    """
    needed = ("tokens", "cache", "bytes", "kind")
    columns.require(frame, "memory_growth", *needed)
    layer = pl.col("layer") if "layer" in frame.columns else pl.lit(None, pl.Int64).alias("layer")
    shown = frame.select(*needed, layer).sort("cache", "layer", "tokens")
    caches = shown["cache"].unique(maintain_order=True).to_list()
    plot = (
        alt.layer(*_totals(caches), *_shares())
        .encode(
            x=alt.X("tokens:Q", title="tokens of context").axis(format=",d", tickCount=6).scale(zero=True, nice=False),
            y=alt.Y("megabytes:Q", title=["bytes held", "MB"]).axis(tickCount=5),
        )
        .properties(width=theme.WIDTH - 100, height=220)
    )
    return marks.framed([plot], shown, "Bytes held as the context grows", caption, memory_caption(frame), pickable=True)


def memory_caption(frame: pl.DataFrame) -> str:
    """Say how much smaller each cache is than 16 bits at the longest context, and whether that was measured."""
    end = frame.filter(pl.col("tokens") == pl.col("tokens").max())
    held = end.group_by("cache", maintain_order=True).agg(pl.col("bytes").sum(), pl.col("kind").first())
    exact = next(iter(held.filter(cache=EXACT)["bytes"]), 0)
    said = [
        f"{name} holds {size / MEGABYTE:,.1f} MB, {exact / size:.2f} times less than fp16 ({kind})"
        for name, size, kind in held.filter(pl.col("cache") != EXACT).iter_rows()
        if exact and size
    ]
    return f"At {end['tokens'][0]:,} tokens " + "; ".join(said) if said else "Solid is measured, dashed is predicted"


def _totals(caches: list[str]) -> list[alt.Chart]:
    """Draw each cache: solid with points where measured, dashed where predicted, its name and size at the end."""
    base = _growth(alt.Chart()).encode(color=marks.cache_colour(caches))
    measured, end = base.transform_filter(MEASURED), base.transform_filter("datum.tokens === datum.end")
    return [
        base.transform_filter(AHEAD).mark_line(strokeDash=[5, 4], strokeWidth=2),
        measured.mark_line(strokeWidth=2),
        marks.points(measured, columns.tips("cache", "tokens", "bytes", "kind")),
        marks.labels(end, f"datum.cache + '  ' + {SIZE}"),
    ]


def _shares() -> list[alt.Chart]:
    """Draw the picked layer's part of each cache, and say how much it is in the empty corner."""
    base = _growth(alt.Chart().transform_filter(marks.IS_PICKED))
    look: dict[str, Any] = {"align": "left", "baseline": "top", "color": theme.PICKED, "fontWeight": 600}
    words = (
        base.transform_filter("datum.tokens === datum.end")
        .transform_window(rank="row_number()", sort=[alt.SortField("megabytes", "descending")])
        .transform_calculate(label=f"'layer ' + {marks.PICKED} + ' in ' + datum.cache + ': ' + {SIZE}")
        .mark_text(**look, dy=alt.expr("16 * datum.rank - 12"))
        .encode(x=alt.value(10), y=alt.value(0), text="label:N")
    )
    line = base.transform_filter(f"{MEASURED} || {AHEAD}").mark_line(color=theme.PICKED, strokeWidth=1.5)
    return [line.encode(detail="cache:N"), words]


def _growth(chart: alt.Chart) -> alt.Chart:
    """Add up a cache's layers, and note how far it was measured and where it ends."""
    return (
        chart.transform_aggregate(bytes="sum(bytes)", groupby=["tokens", "cache", "kind"])
        .transform_calculate(megabytes=f"datum.bytes / {MEGABYTE}", seen="datum.kind === 'measured' ? datum.tokens : 0")
        .transform_joinaggregate(known="max(seen)", end="max(tokens)", groupby=["cache"])
    )


# what a part is, in the order of the bars, and its colour
PARTS = {
    "codes": ("codes", theme.KEYS),
    "scales": ("scales and norms", "#2b93b8"),
    "sinks": ("exact sinks", "#b58900"),
    "window": ("exact window", theme.VALUES),
    "exact": ("exact tokens", theme.NEUTRAL),
    "states": ("states", "#8e63ce"),
    "tables": ("tables", "#3f9142"),
}
ROW = 30  # pixels of a cache
FITS = "datum.total <= datum.limit"


def memory_plan(planned: pl.DataFrame, largest: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the bytes of each cache by part beside the memory there is, and below, the largest context that fits.

    ``planned``: rows of `veloxlab.measure.planned_memory.PLANNED` at one context: ``cache``, ``tokens``, ``batch``,
    ``part``, ``bytes``. ``largest``: rows of `veloxlab.measure.planned_memory.LARGEST` of the same caches: ``cache``,
    ``memory_bytes``, ``tokens``. Raises `InputError`: A column or a row is missing, or the plan is of more than one
    context.
    """
    columns.require(planned, "memory_plan", "cache", "part", "tokens", "batch", "bytes")
    columns.require(largest, "memory_plan", "cache", "memory_bytes", "tokens")
    if (contexts := planned["tokens"].n_unique()) > 1:
        raise InputError(f"memory_plan draws one context, and the frame has {contexts}: filter it by tokens.")
    caches = planned["cache"].unique(maintain_order=True).to_list()
    part, limit = pl.col("part"), float(largest["memory_bytes"][0])
    bars = planned.select(
        "cache",
        part=part.replace_strict({part: words for part, (words, _) in PARTS.items()}),
        order=part.replace_strict(list(PARTS), range(len(PARTS))),
        bytes="bytes",
        total=pl.col("bytes").sum().over("cache"),
        limit=pl.lit(limit),
    )
    fits = largest.select("cache", limit=pl.lit(limit), context="tokens")
    shown = pl.concat([bars, fits], how="diagonal_relaxed")
    used = dict(PARTS[part] for part in PARTS if part in planned["part"])
    plots = [
        plot.properties(width=theme.WIDTH - 130, height=ROW * len(caches))
        for plot in (_held(caches, used, bars["total"].max()), _contexts(caches))  # type: ignore[arg-type]
    ]
    return marks.framed(plots, shown, "Memory a cache will hold (predicted)", caption, plan_caption(planned, largest))


def plan_caption(planned: pl.DataFrame, largest: pl.DataFrame) -> str:
    """Say whether the first cache fits, and how far it and the exact one go."""
    name, tokens, batch = planned.select("cache", "tokens", "batch").row(0)
    held = int(planned.filter(pl.col("cache") == name)["bytes"].sum())
    limit = int(largest["memory_bytes"][0])
    furthest = dict(largest.select("cache", "tokens").rows())
    sequences = f"{batch} sequences of {tokens:,} tokens" if batch > 1 else f"{tokens:,} tokens"
    beside = f", in 16 bits {furthest[EXACT]:,}" if EXACT in furthest and name != EXACT else ""
    return f"{sequences} as {name}: {amount(held)} of {amount(limit)}. At most {furthest[name]:,} fit{beside}."


def amount(nbytes: float) -> str:
    """Say a number of bytes in three digits and a unit of a power of 1,000."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
    unit, size = next((pair for pair in units if nbytes >= pair[1]), units[-1])
    return f"{nbytes / size:.3g} {unit}"


def _held(caches: list[str], colours: dict[str, str], greatest: int) -> marks.Plot:
    size, unit = (1e9, "GB") if greatest >= 1e9 else (1e6, "MB")
    axis = alt.X("size:Q", title=f"bytes held ({unit})").axis(tickCount=6).scale(zero=True, nice=False, padding=0)
    colour = marks.scaled(alt.Color, "part", colours).sort(None).legend(orient="bottom", columns=len(colours))
    rows = alt.Chart().transform_filter("isValid(datum.part)").transform_calculate(size=f"datum.bytes / {size}")
    base = rows.encode(y=_rows(caches))
    bars = base.mark_bar().encode(
        x=axis.stack("zero"),
        color=colour,
        order=alt.Order("order:Q"),
        tooltip=columns.tips("cache", "part", "bytes", "total"),
    )
    totals = base.transform_aggregate(groupby=["cache", "total", "limit"])
    edge = rows.transform_aggregate(groupby=["limit"]).transform_calculate(size=f"datum.limit / {size}")
    rule = edge.mark_rule(strokeDash=[5, 4], color=theme.PICKED).encode(x=axis)
    written = f"format(datum.size, ',.3~r') + ' {unit}"
    word = (
        edge.transform_calculate(label=f"{written} of memory'")
        .mark_text(align="left", dx=4, dy=-6, color=theme.PICKED, fontWeight=600)
        .encode(x=axis, y=alt.value(0), text="label:N")
    )
    sums = totals.transform_calculate(size=f"datum.total / {size}")
    return alt.layer(
        bars, rule, word, marks.labels(sums, f"{written}' + ({FITS} ? ', fits' : ', does not fit')", x=axis)
    )


def _contexts(caches: list[str]) -> marks.Plot:
    x = alt.X("context:Q", title="largest context that fits (tokens of each sequence)").scale(zero=True, nice=False)
    base = (
        alt.Chart()
        .transform_filter("isValid(datum.context)")
        .encode(x=x.axis(tickCount=6, format="~s"), y=_rows(caches))
    )
    bars = base.mark_bar().encode(color=marks.cache_colour(caches), tooltip=columns.tips("cache", "context"))
    return alt.layer(bars, marks.labels(base, "format(datum.context, ',d')"))


def _rows(caches: list[str]) -> alt.Y:
    return alt.Y("cache:N", sort=caches, title=None).scale(paddingInner=0.3)
