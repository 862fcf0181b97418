"""Which coordinates of a layer's keys and values get how many bits."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import Plot, caption_title, framed

CELLS = 1_900  # at most: more coordinates are drawn in groups, each by its mean
STEP, TALLEST = 11, 220  # pixels of a layer, and of a map


def coordinate_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the code bits of every layer and coordinate, keys above values.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.coordinate_bits.COORDINATE_BITS`.
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
    tensors = [tensor for tensor in palette.TENSORS if tensor in set(shown["tensor"])]
    most = int(frame["bits"].max())  # type: ignore[arg-type]
    step = min(STEP, TALLEST / shown["layer"].n_unique())
    words = "coordinate" if group == 1 else f"coordinates, by {group}"
    plots = [
        _cells(tensor, most, words if tensor == tensors[-1] else None).properties(
            width=palette.WIDTH - 20, height=alt.Step(step)
        )
        for tensor in tensors
    ]
    plots[0] = plots[0].properties(title=caption_title())
    said = coordinate_caption(frame) if caption is None else caption
    return framed(plots, shown, "Code bits of each coordinate, by layer", said, pickable=False)


def coordinate_caption(frame: pl.DataFrame) -> str:
    """Say the mean bits of keys and of values, the most, and what share of coordinates gets none."""
    said = []
    for tensor in palette.TENSORS:
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
