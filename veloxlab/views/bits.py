"""How the bits are spent: true bits per value of each layer, by what they are spent on."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.furniture import (
    Plot,
    caption_title,
    framed,
    layer_axis,
    layer_columns,
    layer_step,
    picked_outline,
    require,
)

# What bits are spent on, from the base of a bar upwards: the fainter, the less of it says something about a value.
PARTS = {"codes": 1.0, "scales": 0.55, "exact tokens": 0.3, "tables": 0.2}


def bit_allocation(
    frame: pl.DataFrame, *, greatest: float | None = None, caption: str | None = None
) -> alt.VConcatChart:
    """Draw the bits that each layer spends on a value.

    Parameters
    ----------
    frame
        Rows of ``layer``, ``tensor`` (``"keys"`` or ``"values"``), ``part`` and ``bits_per_value``; the parts of a
        layer add up. ``"codes"`` and ``"scales"`` come first; any other part is drawn above them.
    greatest
        Top of the scale in bits; give one to compare charts or to keep a slider's bars steady.
    caption
        The line under the heading; by default the mean of keys and of values.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    needed = {"layer": "number", "tensor": "text", "part": "text", "bits_per_value": "number"}
    require(frame, needed, "bit_allocation")  # type: ignore[arg-type]
    parts = [*PARTS, *sorted(set(frame["part"]) - set(PARTS))]
    parts = [part for part in parts if part in set(frame["part"])]
    order = f"indexof({parts}, datum.part)"
    shown = frame.select(*needed).sort("tensor", "layer", pl.col("part").replace_strict(parts, range(len(parts))))
    tensors = [tensor for tensor in theme.TENSORS if tensor in set(frame["tensor"])]
    totals = shown.group_by("layer", "tensor").agg(pl.col("bits_per_value").sum())["bits_per_value"]
    top = greatest or math.ceil(float(totals.max()))  # type: ignore[arg-type]
    step = layer_step(shown["layer"].n_unique())
    rows = [
        _bars(tensor, parts, order, top, last=tensor == tensors[-1]).properties(width=alt.Step(step), height=90)
        for tensor in tensors
    ]
    rows[0] = rows[0].properties(title=caption_title())
    words = bit_caption(frame) if caption is None else caption
    heading = "Bits spent on a value, scales included"
    return framed(rows, shown, heading, words, pickable=True)


def bit_caption(frame: pl.DataFrame) -> str:
    """Say the mean bits per value of keys and of values, with the part that is not codes."""
    said = []
    layers = frame["layer"].n_unique()
    for tensor in theme.TENSORS:
        own = frame.filter(pl.col("tensor") == tensor)
        if not own.is_empty():
            total = own["bits_per_value"].sum() / layers
            codes = own.filter(pl.col("part") == "codes")["bits_per_value"].sum() / layers
            said.append(f"{tensor} {total:.2f} ({codes:.2f} of them codes)")
    return "Mean bits a value, dashed: " + ", ".join(said)


def _bars(tensor: str, parts: list[str], order: str, top: float, *, last: bool) -> Plot:
    own = alt.Chart().transform_filter(f"datum.tensor === '{tensor}'")
    y = alt.Y("bits_per_value:Q", title=[tensor, "bits a value"]).scale(domain=[0, top], clamp=True).axis(tickCount=4)
    opacity = (
        alt.Opacity("part:N", title=None)
        .scale(domain=parts, range=[PARTS.get(part, 0.25) for part in parts])
        .legend(symbolFillColor=theme.TENSORS[tensor], symbolStrokeWidth=0, symbolType="square")
    )
    bars = (
        own.transform_calculate(order=order)
        .mark_bar(color=theme.TENSORS[tensor], cursor="pointer")
        .encode(
            x=layer_axis(labelled=last, gap=0.12),
            y=y,
            opacity=opacity,
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("part:N", title=tensor),
                alt.Tooltip("bits_per_value:Q", title="bits a value", format=".3f"),
            ],
        )
    )
    mean = (
        own.transform_aggregate(total="sum(bits_per_value)", groupby=["layer"])
        .transform_aggregate(mean="mean(total)")
        .mark_rule(strokeDash=[3, 3], strokeWidth=1)
        .encode(y=alt.Y("mean:Q"))
    )
    return alt.layer(layer_columns(), bars, mean, picked_outline())


CELLS = 1_900  # at most: more coordinates are drawn in groups, each by its mean
STEP, TALLEST = 11, 220  # pixels of a layer, and of a map


def coordinate_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the code bits of every layer and coordinate, keys above values.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.levels.COORDINATE_BITS`.
    caption
        The line under the heading; by default means, and how many coordinates get no bits.
    """
    needed = {"layer": "number", "tensor": "text", "coordinate": "number", "bits": "number"}
    require(frame, needed, "coordinate_map")  # type: ignore[arg-type]
    group = math.ceil(frame.height / CELLS)
    shown = (
        frame.select("layer", "tensor", "bits", coordinate=pl.col("coordinate") // group * group)
        .group_by("tensor", "layer", "coordinate", maintain_order=True)
        .agg(pl.col("bits").mean())
        .with_columns(end=pl.min_horizontal(pl.col("coordinate") + group, frame["coordinate"].max() + 1))  # type: ignore[operator]
    )
    tensors = [tensor for tensor in theme.TENSORS if tensor in set(shown["tensor"])]
    most = int(frame["bits"].max())  # type: ignore[arg-type]
    step = min(STEP, TALLEST / shown["layer"].n_unique())
    words = "coordinate" if group == 1 else f"coordinates, by {group}"
    plots = [
        _cells(tensor, most, words if tensor == tensors[-1] else None).properties(
            width=theme.WIDTH - 20, height=alt.Step(step)
        )
        for tensor in tensors
    ]
    plots[0] = plots[0].properties(title=caption_title())
    said = coordinate_caption(frame) if caption is None else caption
    return framed(plots, shown, "Code bits of each coordinate, by layer", said, pickable=False)


def coordinate_caption(frame: pl.DataFrame) -> str:
    """Say the mean bits of keys and of values, the most, and what share of coordinates gets none."""
    said = []
    for tensor in theme.TENSORS:
        widths = frame.filter(pl.col("tensor") == tensor)["bits"].to_list()
        if widths:
            mean, none = sum(widths) / len(widths), 100 * widths.count(0) / len(widths)
            said.append(f"{tensor} {mean:.2f} on average, {max(widths)} at most, none for {none:.0f} %")
    return "; ".join(said)


def _cells(tensor: str, most: int, words: str | None) -> Plot:
    key = alt.Legend(values=list(range(most + 1)), format="d", gradientLength=90, gradientThickness=10)
    cells: Plot = (
        alt.Chart()
        .transform_filter(f"datum.tensor === '{tensor}'")
        .mark_rect()
        .encode(
            x=alt.X("coordinate:Q", title=words).scale(nice=False).axis(tickMinStep=1),
            x2="end:Q",
            y=alt.Y("layer:O", title=[tensor, "layer"]).axis(labelOverlap=True),
            color=alt.Color("bits:Q", title=["bits of", tensor], legend=key).scale(domain=[0, most]),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("coordinate:O", title="coordinates from"),
                alt.Tooltip("bits:Q", title=f"bits of {tensor}", format=".3~g"),
            ],
        )
    )
    return cells
