"""Charts of memory: held bytes as a context grows, predicted bytes of a plan, and the bits spent on a value."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

EXACT = "fp16"  # the cache that others are compared with
MEASURED = "datum.kind === 'measured'"
AHEAD = "(datum.kind === 'predicted' || datum.tokens === datum.known)"  # from the last measured point on
SIZE = "format(datum.megabytes, ',.3~r') + ' MB'"


def memory_growth(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the bytes held against the tokens of the context.

    Rows of ``tokens``, ``cache``, ``bytes`` and ``kind`` (``"measured"`` or ``"predicted"``). The bytes of a cache are
    the sum of its rows. With a column ``layer``, a row is the share of one layer, or, where ``layer`` is null,
    bytes that all layers share; the bytes of the picked layer are then drawn too.
    """
    needed = columns.require(frame, "memory_growth", "tokens cache bytes kind")
    layer = frame["layer"] if "layer" in frame.columns else pl.lit(None, pl.Int64)
    shown = needed.with_columns(layer=layer).sort("cache", "layer", "tokens")
    caches = shown["cache"].unique(maintain_order=True).to_list()
    # each cache: solid with points if measured, dashed if predicted; name and size at the end
    base = _growth(alt.Chart()).encode(color=marks.cache_colour(caches))
    measured, end = base.transform_filter(MEASURED), base.transform_filter("datum.tokens === datum.end")
    # the picked layer's share of each cache, with its size in the empty corner
    picked = _growth(alt.Chart().transform_filter(marks.IS_PICKED))
    part = picked.transform_filter(f"{MEASURED} || {AHEAD}").mark_line(color=theme.PICKED, strokeWidth=1.5)
    look: dict[str, Any] = {"align": "left", "baseline": "top", "color": theme.PICKED, "fontWeight": 600}
    words = (
        picked.transform_filter("datum.tokens === datum.end")
        .transform_window(rank="row_number()", sort=[alt.SortField("megabytes", "descending")])
        .transform_calculate(label=f"'layer ' + {marks.PICKED} + ' in ' + datum.cache + ': ' + {SIZE}")
        .mark_text(**look, dy=alt.expr("16 * datum.rank - 12"))
    )
    plot = marks.layered(
        base.transform_filter(AHEAD).mark_line(strokeDash=[5, 4], strokeWidth=2),
        measured.mark_line(strokeWidth=2),
        marks.points(measured, columns.tips("cache tokens bytes kind")),
        marks.labels(end, f"datum.cache + '  ' + {SIZE}"),
        part.encode(detail=alt.Detail("cache:N")),
        words.encode(x=alt.value(10), y=alt.value(0), text=alt.Text("label:N")),
        x=columns.x("tokens", format=",d", tickCount=6, zero=True, nice=False),
        y=columns.y("megabytes", tickCount=5),
    )
    plots = [marks.sized(plot, theme.WIDTH - 100, 220)]
    said = caption or memory_caption(frame)
    return marks.framed(plots, shown, "Bytes held as the context grows", said, pickable=True)


def memory_caption(frame: pl.DataFrame) -> str:
    """State the ratio of 16 bits to each cache at the longest context, and whether it was measured."""
    end = frame.filter(pl.col("tokens") == pl.col("tokens").max())
    held = end.group_by("cache", maintain_order=True).agg(pl.col("bytes").sum(), pl.col("kind").first())
    exact = next(iter(held.filter(cache=EXACT)["bytes"]), 0)
    said = [
        f"{name} holds {size / 1e6:,.1f} MB, {exact / size:.2f} times less than fp16 ({kind})"
        for name, size, kind in held.filter(pl.col("cache") != EXACT).iter_rows()
        if exact and size
    ]
    return f"At {end['tokens'][0]:,} tokens " + "; ".join(said) if said else "Solid is measured, dashed is predicted"


def _growth(chart: alt.Chart) -> alt.Chart:
    """Add up a cache's layers, and add the last measured length and the last length of each cache."""
    return (
        chart.transform_aggregate(bytes="sum(bytes)", groupby=["tokens", "cache", "kind"])
        .transform_calculate(megabytes="datum.bytes / 1e6", seen=f"{MEASURED} ? datum.tokens : 0")
        .transform_joinaggregate(known="max(seen)", end="max(tokens)", groupby=["cache"])
    )


# parts of a cache in the order of the bars: name and colour
PARTS = {
    "codes": ("codes", theme.KEYS),
    "scales": ("scales and norms", "#2b93b8"),
    "sinks": ("exact sinks", "#b58900"),
    "window": ("exact window", theme.VALUES),
    "exact": ("exact tokens", theme.NEUTRAL),
    "states": ("states", "#8e63ce"),
    "tables": ("tables", "#3f9142"),
}
ROW = 30  # pixels: height of a cache's row
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


def memory_plan(
    planned: pl.DataFrame, largest: pl.DataFrame, *, trained: int = 0, caption: str = ""
) -> alt.VConcatChart:
    """Draw the bytes of each cache by part beside the available memory, and below, the largest context that fits.

    ``planned``: rows of `veloxlab.measure.planned_memory.PLANNED` at one context: ``cache``, ``tokens``, ``batch``,
    ``part``, ``bytes``. ``largest``: rows of `veloxlab.measure.planned_memory.LARGEST` of the same caches: ``cache``,
    ``memory_bytes``, ``tokens``. ``trained``: the model's trained context in tokens, drawn as a line; 0 for none.
    Raises `InputError` if a column or a row is missing, or if the plan has more than one context.
    """
    columns.require(planned, "memory_plan", "cache part batch bytes", one="tokens")
    columns.require(largest, "memory_plan", "cache memory_bytes tokens")
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
    y = columns.y("cache", None, sort=caches, paddingInner=0.3)
    fit = alt.Chart().transform_filter("isValid(datum.context)")
    fit = fit.encode(x=columns.x("context", zero=True, nice=False, tickCount=6, format="~s"), y=y)
    fit_bars = fit.mark_bar().encode(color=marks.cache_colour(caches), tooltip=columns.tips("cache context"))
    held = _held(y, used, "GB" if bars["total"].max() >= 1e9 else "MB")  # type: ignore[operator]
    layers = [fit_bars, marks.labels(fit, "format(datum.context, ',d')")]
    if trained:
        made = alt.Chart().transform_aggregate(caches="count()").transform_calculate(context=str(trained))
        label: marks.Look = {"text": f"trained for {trained:,}", "align": "left", "dx": 4, "dy": -6}
        made = made.encode(x=alt.X("context:Q"))
        layers += [made.mark_rule(strokeDash=[5, 4]), made.mark_text(**label).encode(y=alt.value(0))]
    plots = [marks.sized(plot, theme.WIDTH - 130, ROW * len(caches)) for plot in (held, marks.layered(*layers))]
    said = caption or plan_caption(planned, largest)
    return marks.framed(plots, shown, "Memory a cache will hold (predicted)", said)


def plan_caption(planned: pl.DataFrame, largest: pl.DataFrame) -> str:
    """State whether the first cache fits, and its largest context beside that of the exact cache."""
    name, tokens, batch = planned.select("cache", "tokens", "batch").row(0)
    held, limit = sum(planned.filter(cache=name)["bytes"]), largest["memory_bytes"][0]
    furthest = dict(largest.select("cache", "tokens").rows())
    sequences = f"{batch} sequences of {tokens:,} tokens" if batch > 1 else f"{tokens:,} tokens"
    beside = f", in 16 bits {furthest[EXACT]:,}" if EXACT in furthest and name != EXACT else ""
    return f"{sequences} as {name}: {amount(held)} of {amount(limit)}. At most {furthest[name]:,} fit{beside}."


def amount(nbytes: float) -> str:
    """Return a number of bytes as text, with three digits and a unit of a power of 1,000."""
    unit = next((unit for unit, size in UNITS.items() if nbytes >= size), "B")
    return f"{nbytes / UNITS[unit]:.3g} {unit}"


def _held(y: alt.Y, colours: dict[str, str], unit: str) -> marks.Plot:
    axis = columns.x("size", f"bytes held ({unit})", tickCount=6, zero=True, nice=False, padding=0)
    rows = alt.Chart().transform_filter("isValid(datum.part)").transform_calculate(size=f"datum.bytes / {UNITS[unit]}")
    base = rows.encode(y=y)
    bars = base.mark_bar().encode(
        x=axis.stack("zero"),
        color=marks.scaled(alt.Color, "part", colours).sort(None).legend(orient="bottom", columns=len(colours)),
        order=alt.Order("order:Q"),
        tooltip=columns.tips("cache part bytes total"),
    )
    totals = base.transform_aggregate(groupby=["cache", "total", "limit"])
    totals = totals.transform_calculate(size=f"datum.total / {UNITS[unit]}")
    edge = rows.transform_aggregate(groupby=["limit"]).transform_calculate(size=f"datum.limit / {UNITS[unit]}")
    written = f"format(datum.size, ',.3~r') + ' {unit}"
    word = edge.transform_calculate(label=f"{written} of memory'")
    word = word.mark_text(align="left", dx=4, dy=-6, color=theme.PICKED, fontWeight=600)
    fits = f"{written}' + (datum.total <= datum.limit ? ', fits' : ', does not fit')"
    return marks.layered(
        bars,
        edge.mark_rule(strokeDash=[5, 4], color=theme.PICKED).encode(x=axis),
        word.encode(x=axis, y=alt.value(0), text=alt.Text("label:N")),
        marks.labels(totals, fits, x=axis),
    )


# parts of the bits from the base of a bar up, and their opacity: fainter parts have less information on a value
SPENT = {"codes": 1.0, "scales": 0.55, "exact tokens": 0.3, "tables": 0.2}


def bit_allocation(frame: pl.DataFrame, *, greatest: float | None = None, caption: str = "") -> alt.VConcatChart:
    """Draw the bits that each layer spends on a value.

    Rows of ``layer``, ``tensor`` (``"keys"`` or ``"values"``), ``part`` and ``bits_per_value``; the parts of a layer
    add up. ``"codes"`` and ``"scales"`` come first; any other part is drawn above them. ``greatest``: top of the scale
    in bits; set it to compare charts or to keep the bars steady while a slider moves.
    """
    needed = columns.require(frame, "bit_allocation", "layer tensor part bits_per_value")
    found = set(frame["part"])
    parts = {part: SPENT.get(part, 0.25) for part in [*SPENT, *sorted(found - set(SPENT))] if part in found}
    order = pl.col("part").replace_strict(list(parts), range(len(parts)))
    shown = needed.sort("tensor", "layer", order)
    totals = shown.group_by("layer", "tensor").agg(pl.col("bits_per_value").sum())["bits_per_value"]
    top = greatest or math.ceil(totals.max())  # type: ignore[arg-type]

    def draw(tensor: str, last: bool) -> marks.Plot:
        own, colour = marks.only(tensor=tensor), theme.TENSORS[tensor]
        bars = own.transform_calculate(order=f"indexof({list(parts)}, datum.part)")
        bars = bars.mark_bar(color=colour, cursor="pointer").encode(
            x=marks.layer_axis(labelled=last, gap=0.12),
            y=columns.y("bits_per_value", [tensor, "bits per value"], domain=[0, top], clamp=True, tickCount=4),
            opacity=marks.part_opacity("part", parts, colour),
            order=alt.Order("order:Q"),
            tooltip=columns.tips("layer", ("part", tensor), "bits_per_value"),
        )
        totals = own.transform_aggregate(total="sum(bits_per_value)", groupby=["layer"])
        mean = totals.transform_aggregate(mean="mean(total)").mark_rule(strokeDash=[3, 3], strokeWidth=1)
        told = columns.tips("layer", ("total", "bits per value", ".3f"))
        higher = marks.above(totals, "total", top, x=alt.X("layer:O"), tooltip=told)
        return marks.over_layers(bars, mean.encode(y=alt.Y("mean:Q")), higher)

    width = alt.Step(marks.layer_step(shown["layer"].n_unique()))
    plots = marks.panels(marks.tensors_of(frame), draw, width, 90)
    said = caption or bit_caption(frame)
    return marks.framed(plots, shown, "True bits per value, scales included, by layer", said, pickable=True)


def bit_caption(frame: pl.DataFrame) -> str:
    """State the mean bits per value of keys and of values, and how many of them are codes."""
    said, layers = [], frame["layer"].n_unique()
    for tensor, own in marks.by_tensor(frame):
        total, codes = (rows["bits_per_value"].sum() / layers for rows in (own, own.filter(part="codes")))
        said.append(f"{tensor} {total:.2f} ({codes:.2f} of them codes)")
    return "Mean bits per value, dashed: " + ", ".join(said)
