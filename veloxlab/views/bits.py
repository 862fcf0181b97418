"""How the bits are spent: true bits per value of each layer, by what they are spent on."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

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
    needed = columns.require(frame, "bit_allocation", "layer", "tensor", "part", "bits_per_value")
    found = set(frame["part"])
    parts = {part: PARTS.get(part, 0.25) for part in [*PARTS, *sorted(found - set(PARTS))] if part in found}
    shown = needed.sort("tensor", "layer", pl.col("part").replace_strict(list(parts), range(len(parts))))
    totals = shown.group_by("layer", "tensor").agg(pl.col("bits_per_value").sum())["bits_per_value"]
    top = greatest or math.ceil(float(totals.max()))  # type: ignore[arg-type]
    width = alt.Step(marks.layer_step(shown["layer"].n_unique()))
    plots = marks.panels(marks.tensors_of(frame), lambda tensor, last: _bars(tensor, parts, top, last), width, 90)
    heading, usual = "True bits per value, scales included, by layer", bit_caption(frame)
    return marks.framed(plots, shown, heading, caption, usual, pickable=True)


def bit_caption(frame: pl.DataFrame) -> str:
    """Say the mean bits per value of keys and of values, with the part that is not codes."""
    said, layers = [], frame["layer"].n_unique()
    for tensor, own in marks.by_tensor(frame):
        total, codes = (rows["bits_per_value"].sum() / layers for rows in (own, own.filter(pl.col("part") == "codes")))
        said.append(f"{tensor} {total:.2f} ({codes:.2f} of them codes)")
    return "Mean bits per value, dashed: " + ", ".join(said)


def _bars(tensor: str, parts: dict[str, float], top: float, last: bool) -> marks.Plot:
    own, colour = marks.only(tensor=tensor), theme.TENSORS[tensor]
    y = alt.Y("bits_per_value:Q", title=[tensor, "bits per value"]).scale(domain=[0, top], clamp=True)
    opacity = alt.Opacity("part:N", title=None).scale(domain=list(parts), range=list(parts.values()))
    bars = (
        own.transform_calculate(order=f"indexof({list(parts)}, datum.part)")
        .mark_bar(color=colour, cursor="pointer")
        .encode(
            x=marks.layer_axis(labelled=last, gap=0.12),
            y=y.axis(tickCount=4),
            opacity=opacity.legend(symbolFillColor=colour, symbolStrokeWidth=0, symbolType="square"),
            order=alt.Order("order:Q"),
            tooltip=columns.tips("layer", ("part", tensor), "bits_per_value"),
        )
    )
    totals = own.transform_aggregate(total="sum(bits_per_value)", groupby=["layer"])
    mean = totals.transform_aggregate(mean="mean(total)").mark_rule(strokeDash=[3, 3], strokeWidth=1)
    return marks.over_layers(bars, mean.encode(y=alt.Y("mean:Q")))


CELLS = 1_900  # at most: more coordinates are drawn in groups, each by its mean
STEP, TALLEST = 11, 220  # pixels of a layer, and of a map


def coordinate_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the code bits of every layer and coordinate, keys above values.

    Rows of `veloxlab.measure.levels.COORDINATE_BITS`.
    """
    columns.require(frame, "coordinate_map", "layer", "tensor", "coordinate", "bits")
    group, words = marks.grouped(frame.height, CELLS, "coordinate")
    end = pl.min_horizontal(pl.col("coordinate") + group, frame["coordinate"].max() + 1)  # type: ignore[operator]
    shown = (
        frame.group_by("tensor", "layer", coordinate=pl.col("coordinate") // group * group, maintain_order=True)
        .agg(pl.col("bits").mean())
        .with_columns(end=end)
    )
    most = int(frame["bits"].max())  # type: ignore[arg-type]
    height = alt.Step(min(STEP, TALLEST / shown["layer"].n_unique()))

    def draw(tensor: str, last: bool) -> marks.Plot:
        return _cells(tensor, most, words if last else None)

    plots = marks.panels(marks.tensors_of(shown), draw, theme.WIDTH - 20, height)
    return marks.framed(plots, shown, "Code bits of each coordinate, by layer", caption, coordinate_caption(frame))


def coordinate_caption(frame: pl.DataFrame) -> str:
    """Say the mean bits of keys and of values, the most, and what share of coordinates gets none."""
    said = []
    for tensor, own in marks.by_tensor(frame):
        bits = own["bits"].to_list()
        mean, none = sum(bits) / len(bits), 100 * bits.count(0) / len(bits)
        said.append(f"{tensor} {mean:.2f} on average, {max(bits)} at most, none for {none:.0f} %")
    return marks.sentence(*said)


def _cells(tensor: str, most: int, words: str | None) -> marks.Plot:
    key = alt.Legend(values=list(range(most + 1)), format="d", gradientLength=90, gradientThickness=10)
    cells: marks.Plot = marks.only(tensor=tensor).mark_rect()
    return cells.encode(
        x=alt.X("coordinate:Q", title=words).scale(nice=False).axis(tickMinStep=1),
        x2="end:Q",
        y=alt.Y("layer:O", title=[tensor, "layer"]).axis(labelOverlap=True),
        color=alt.Color("bits:Q", title=["bits of", tensor], legend=key).scale(domain=[0, most]),
        tooltip=columns.tips("layer", ("coordinate", "coordinates from"), ("bits", f"bits of {tensor}")),
    )
