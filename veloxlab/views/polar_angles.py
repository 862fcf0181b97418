"""The angles that PolarQuant codes, level by level, beside the density that its codebooks expect."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import one_head, require
from veloxlab.views.furniture import Plot, caption_title, framed, head_words, tensor_colour


def angle_densities(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of one head's polar angles, a panel for each level; dashed, what the codebooks expect.

    Parameters
    ----------
    frame
        Rows of one head of `veloxlab.measure.polar_angles.ANGLES`.
    caption
        The line under the heading; by default how far each level is from what is expected.
    """
    numbers = ("layer", "head", "level", "angle", "density", "expected")
    require(frame, {"tensor": "text"} | dict.fromkeys(numbers, "number"), "angle_densities")  # type: ignore[arg-type]
    one_head(frame, "angle_densities")
    shown = frame.select("tensor", *numbers[2:])
    levels = shown["level"].unique().sort().to_list()
    plots = [
        _panel(level, last=level == levels[-1]).properties(width=palette.WIDTH - 90, height=84) for level in levels
    ]
    plots[0] = plots[0].properties(title=caption_title())
    words = angle_caption(frame) if caption is None else caption
    return framed(plots, shown, "Angles of PolarQuant's recursion", words, pickable=False)


def angle_caption(frame: pl.DataFrame) -> str:
    """Say which share of each level's angles lies elsewhere than expected: ½ Σ|density − expected| over the bins."""
    apart = (pl.col("density") - pl.col("expected")).abs().sum() / (pl.col("density").sum() * 2)
    shares = frame.group_by("level", "tensor").agg(apart=apart).sort("level", "tensor")
    said = []
    for tensor in palette.TENSORS:
        own = shares.filter(pl.col("tensor") == tensor)["apart"]
        if len(own):
            said.append(f"{tensor} {', '.join(f'{100 * share:.0f}' for share in own)} %")
    return f"{head_words(frame)}. Elsewhere than expected (dashed), by level: " + "; ".join(said)


def _panel(level: int, *, last: bool) -> Plot:
    colour = tensor_colour(legend=level == 1)
    x = alt.X("angle:Q", title="angle, radians" if last or level == 1 else None).scale(nice=False)
    base = alt.Chart().transform_filter(f"datum.level === {level}").encode(x=x)
    y = alt.Y("density:Q", title=[f"level {level}", "density"]).axis(tickCount=3)
    tips = [alt.Tooltip("tensor:N"), alt.Tooltip("angle:Q", format=".3~g"), alt.Tooltip("density:Q", format=".3~g")]
    measured = base.mark_line(interpolate="step", strokeWidth=1.5).encode(y=y, color=colour, tooltip=tips)
    expected = (
        base.transform_aggregate(expected="mean(expected)", groupby=["angle"])
        .mark_line(strokeDash=[4, 3], strokeWidth=1.5, color=palette.NEUTRAL)
        .encode(y=alt.Y("expected:Q"))
    )
    return alt.layer(measured, expected)
