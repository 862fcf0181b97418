"""What a cache will hold, by part, and the largest context that fits: predictions, and said to be so."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import Plot, caption_title, framed

# what a part is, in the order of the bars, and its colour
PARTS = {
    "codes": ("codes", palette.KEYS),
    "scales": ("scales and norms", "#2b93b8"),
    "sinks": ("exact sinks", "#b58900"),
    "window": ("exact window", palette.VALUES),
    "exact": ("exact tokens", palette.NEUTRAL),
    "states": ("states", "#8e63ce"),
    "tables": ("tables", "#3f9142"),
}
ROW = 30  # pixels of a cache
FITS = "datum.total <= datum.limit"


def memory_plan(planned: pl.DataFrame, largest: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the bytes of each cache by part beside the memory there is, and below, the largest context that fits.

    Parameters
    ----------
    planned
        Rows of `veloxlab.measure.planned_memory.PLANNED` at one context: ``cache``, ``tokens``, ``batch``, ``part``,
        ``bytes``.
    largest
        Rows of `veloxlab.measure.planned_memory.LARGEST` of the same caches: ``cache``, ``memory_bytes``, ``tokens``.
    caption
        The line under the heading; by default whether the first cache fits, and how far it goes.

    Returns
    -------
    alt.VConcatChart
        A chart with the param ``caption``.

    Raises
    ------
    InputError
        A column or a row is missing, or the plan is of more than one context.
    """
    numbers = {"tokens": "number", "batch": "number", "bytes": "number"}
    require(planned, {"cache": "text", "part": "text", **numbers}, "memory_plan")  # type: ignore[dict-item]
    require(largest, {"cache": "text", "memory_bytes": "number", "tokens": "number"}, "memory_plan")
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
        _held(caches, used, bars["total"].max()).properties(title=caption_title()),  # type: ignore[arg-type]
        _contexts(caches),
    ]
    words = plan_caption(planned, largest) if caption is None else caption
    return framed(plots, shown, "Memory a cache will hold (predicted)", words, pickable=False)


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
        tooltip=[
            alt.Tooltip("cache:N"),
            alt.Tooltip("part:N"),
            alt.Tooltip("bytes:Q", format=",d"),
            alt.Tooltip("total:Q", format=",d", title="all parts"),
        ],
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
    rule = edge.mark_rule(strokeDash=[5, 4], color=palette.PICKED).encode(x=axis)
    word = edge.mark_text(align="left", dx=4, dy=-6, color=palette.PICKED, fontWeight=600).encode(
        x=axis, y=alt.value(0), text="label:N"
    )
    return alt.layer(bars, rule, word, totals).properties(width=palette.WIDTH - 130, height=ROW * len(caches))


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
    colours = [palette.colour_of(cache) for cache in caches]
    bars = base.mark_bar().encode(
        color=alt.Color("cache:N", legend=None).scale(domain=caches, range=colours),
        tooltip=[alt.Tooltip("cache:N"), alt.Tooltip("context:Q", format=",d", title="tokens")],
    )
    words = (
        base.transform_calculate(label="format(datum.context, ',d')")
        .mark_text(align="left", dx=6, fontWeight=600)
        .encode(text="label:N")
    )
    return alt.layer(bars, words).properties(width=palette.WIDTH - 130, height=ROW * len(caches))
