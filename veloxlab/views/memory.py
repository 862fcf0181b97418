"""Bytes that are really held as a context grows, beside what 16-bit keys and values take."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import theme
from veloxlab.views.furniture import IS_PICKED, PICKED, Plot, cache_colour, framed, require, tips

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
    require(frame, "memory_growth", *needed)
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
    return framed([plot], shown, "Bytes held as the context grows", caption, memory_caption(frame), pickable=True)


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
    colour = cache_colour(caches)
    base = _growth(alt.Chart()).encode(color=colour)
    tooltip = tips("cache:N", ("tokens:Q", None, ",d"), ("bytes:Q", None, ",d"), "kind:N")
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
            align="left", baseline="top", color=theme.PICKED, fontWeight=600, dy=alt.expr("16 * datum.rank - 12")
        )
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
    require(planned, "memory_plan", "cache", "part", "tokens", "batch", "bytes")
    require(largest, "memory_plan", "cache", "memory_bytes", "tokens")
    if planned["tokens"].n_unique() > 1:
        raise InputError(
            f"memory_plan draws one context, and the frame has {planned['tokens'].n_unique()}: filter it by tokens."
        )
    caches = planned["cache"].unique(maintain_order=True).to_list()
    limit = float(largest["memory_bytes"][0])
    order = {part: place for place, part in enumerate(PARTS)}
    bars = planned.select(
        "cache",
        part=pl.col("part").replace_strict({part: words for part, (words, _) in PARTS.items()}),
        order=pl.col("part").replace_strict(order),
        bytes="bytes",
        total=pl.col("bytes").sum().over("cache"),
        limit=pl.lit(limit),
        context=pl.lit(None, pl.Int64),
    )
    fits = largest.select(
        "cache",
        part=pl.lit(None, pl.String),
        order=pl.lit(None, pl.Int64),
        bytes=pl.lit(None, pl.Int64),
        total=pl.lit(None, pl.Int64),
        limit=pl.lit(limit),
        context="tokens",
    )
    shown = pl.concat([bars, fits], how="vertical_relaxed")
    used = [part for part in PARTS if part in planned["part"].unique()]
    plots = [
        _held(caches, used, bars["total"].max()),  # type: ignore[arg-type]
        _contexts(caches),
    ]
    return framed(plots, shown, "Memory a cache will hold (predicted)", caption, plan_caption(planned, largest))


def plan_caption(planned: pl.DataFrame, largest: pl.DataFrame) -> str:
    """Say whether the first cache fits, and how far it and the exact one go."""
    name, tokens, batch = planned.row(0, named=True)["cache"], planned["tokens"][0], planned["batch"][0]
    held = int(planned.filter(pl.col("cache") == name)["bytes"].sum())
    limit = int(largest["memory_bytes"][0])
    furthest = dict(largest.select("cache", "tokens").rows())
    sequences = f"{batch} sequences of {tokens:,} tokens" if batch > 1 else f"{tokens:,} tokens"
    beside = f", in 16 bits {furthest['fp16']:,}" if "fp16" in furthest and name != "fp16" else ""
    return f"{sequences} as {name}: {amount(held)} of {amount(limit)}. At most {furthest[name]:,} fit{beside}."


def amount(nbytes: float) -> str:
    """Say a number of bytes in three digits and a unit of a power of 1,000."""
    unit, size = next(
        ((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if nbytes >= s), ("B", 1.0)
    )
    return f"{nbytes / size:.3g} {unit}"


def _held(caches: list[str], used: list[str], greatest: int) -> Plot:
    size, unit = (1e9, "GB") if greatest >= 1e9 else (1e6, "MB")
    axis = alt.X("size:Q", title=f"bytes held ({unit})").axis(tickCount=6).scale(zero=True, nice=False, padding=0)
    colour = alt.Color("part:N", title=None, sort=None, legend=alt.Legend(orient="bottom", columns=len(used))).scale(
        domain=[PARTS[part][0] for part in used], range=[PARTS[part][1] for part in used]
    )
    rows = alt.Chart().transform_filter("isValid(datum.part)").transform_calculate(size=f"datum.bytes / {size}")
    base = rows.encode(y=alt.Y("cache:N", sort=caches, title=None).scale(paddingInner=0.3))
    bars = base.mark_bar().encode(
        x=axis.stack("zero"),
        color=colour,
        order=alt.Order("order:Q"),
        tooltip=tips("cache:N", "part:N", ("bytes:Q", None, ",d"), ("total:Q", "all parts", ",d")),
    )
    totals = (
        base.transform_aggregate(groupby=["cache", "total", "limit"])
        .transform_calculate(
            size=f"datum.total / {size}",
            label=f"format(datum.total / {size}, ',.3~r') + ' {unit}' + ({FITS} ? ', fits' : ', does not fit')",
        )
        .mark_text(align="left", dx=6, fontWeight=600)
        .encode(x=axis, text="label:N")
    )
    edge = rows.transform_aggregate(groupby=["limit"]).transform_calculate(
        size=f"datum.limit / {size}", label=f"format(datum.limit / {size}, ',.3~r') + ' {unit} of memory'"
    )
    rule = edge.mark_rule(strokeDash=[5, 4], color=theme.PICKED).encode(x=axis)
    word = edge.mark_text(align="left", dx=4, dy=-6, color=theme.PICKED, fontWeight=600).encode(
        x=axis, y=alt.value(0), text="label:N"
    )
    return alt.layer(bars, rule, word, totals).properties(width=theme.WIDTH - 130, height=ROW * len(caches))


def _contexts(caches: list[str]) -> Plot:
    base = (
        alt.Chart()
        .transform_filter("isValid(datum.context)")
        .encode(
            x=alt.X("context:Q", title="largest context that fits (tokens of each sequence)")
            .axis(tickCount=6, format="~s")
            .scale(zero=True, nice=False),
            y=alt.Y("cache:N", sort=caches, title=None).scale(paddingInner=0.3),
        )
    )
    colours = [theme.colour_of(cache) for cache in caches]
    bars = base.mark_bar().encode(
        color=alt.Color("cache:N", legend=None).scale(domain=caches, range=colours),
        tooltip=tips("cache:N", ("context:Q", "tokens", ",d")),
    )
    words = (
        base.transform_calculate(label="format(datum.context, ',d')")
        .mark_text(align="left", dx=6, fontWeight=600)
        .encode(text="label:N")
    )
    return alt.layer(bars, words).properties(width=theme.WIDTH - 130, height=ROW * len(caches))
