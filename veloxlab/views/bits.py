"""How the bits are spent: true bits per value of each layer, by what they are spent on."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.furniture import (
    Plot,
    by_tensor,
    framed,
    layer_axis,
    layer_step,
    over_layers,
    require,
    tensors_of,
    tips,
)

# What bits are spent on, from the base of a bar upwards: the fainter, the less of it says something about a value.
PARTS = {"codes": 1.0, "scales": 0.55, "exact tokens": 0.3, "tables": 0.2}


def bit_allocation(
    frame: pl.DataFrame, *, greatest: float | None = None, caption: str | None = None
) -> alt.VConcatChart:
    """Draw the bits that each layer spends on a value.

    Rows of ``layer``, ``tensor`` (``"keys"`` or ``"values"``), ``part`` and ``bits_per_value``; the parts of a layer
    add up. ``"codes"`` and ``"scales"`` come first; any other part is drawn above them. ``greatest``: top of the scale
    in bits; give one to compare charts or to keep a slider's bars steady.
    """
    needed = ("layer", "tensor", "part", "bits_per_value")
    require(frame, "bit_allocation", *needed)
    parts = [*PARTS, *sorted(set(frame["part"]) - set(PARTS))]
    parts = [part for part in parts if part in set(frame["part"])]
    order = f"indexof({parts}, datum.part)"
    shown = frame.select(*needed).sort("tensor", "layer", pl.col("part").replace_strict(parts, range(len(parts))))
    tensors = tensors_of(frame)
    totals = shown.group_by("layer", "tensor").agg(pl.col("bits_per_value").sum())["bits_per_value"]
    top = greatest or math.ceil(float(totals.max()))  # type: ignore[arg-type]
    step = layer_step(shown["layer"].n_unique())
    rows = [
        _bars(tensor, parts, order, top, last=tensor == tensors[-1]).properties(width=alt.Step(step), height=90)
        for tensor in tensors
    ]
    return framed(rows, shown, "Bits spent on a value, scales included", caption, bit_caption(frame), pickable=True)


def bit_caption(frame: pl.DataFrame) -> str:
    """Say the mean bits per value of keys and of values, with the part that is not codes."""
    said = []
    layers = frame["layer"].n_unique()
    for tensor, own in by_tensor(frame):
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
            tooltip=tips("layer:O", ("part:N", tensor), ("bits_per_value:Q", "bits a value", ".3f")),
        )
    )
    mean = (
        own.transform_aggregate(total="sum(bits_per_value)", groupby=["layer"])
        .transform_aggregate(mean="mean(total)")
        .mark_rule(strokeDash=[3, 3], strokeWidth=1)
        .encode(y=alt.Y("mean:Q"))
    )
    return over_layers(bars, mean)


CELLS = 1_900  # at most: more coordinates are drawn in groups, each by its mean
STEP, TALLEST = 11, 220  # pixels of a layer, and of a map


def coordinate_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the code bits of every layer and coordinate, keys above values.

    Rows of `veloxlab.measure.levels.COORDINATE_BITS`.
    """
    require(frame, "coordinate_map", "layer", "tensor", "coordinate", "bits")
    group = math.ceil(frame.height / CELLS)
    shown = (
        frame.select("layer", "tensor", "bits", coordinate=pl.col("coordinate") // group * group)
        .group_by("tensor", "layer", "coordinate", maintain_order=True)
        .agg(pl.col("bits").mean())
        .with_columns(end=pl.min_horizontal(pl.col("coordinate") + group, frame["coordinate"].max() + 1))  # type: ignore[operator]
    )
    tensors = tensors_of(shown)
    most = int(frame["bits"].max())  # type: ignore[arg-type]
    step = min(STEP, TALLEST / shown["layer"].n_unique())
    words = "coordinate" if group == 1 else f"coordinates, by {group}"
    plots = [
        _cells(tensor, most, words if tensor == tensors[-1] else None).properties(
            width=theme.WIDTH - 20, height=alt.Step(step)
        )
        for tensor in tensors
    ]
    return framed(plots, shown, "Code bits of each coordinate, by layer", caption, coordinate_caption(frame))


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
            tooltip=tips("layer:O", ("coordinate:O", "coordinates from"), ("bits:Q", f"bits of {tensor}", ".3~g")),
        )
    )
    return cells
