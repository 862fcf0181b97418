"""Errors of single vectors: along the text, and how they are distributed."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import Plot, caption_title, framed, tensor_colour
from veloxlab.views.logscale import LABEL, log_ticks


def errors_along_position(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the relative error of keys and values along the text: medians, and bands that hold eight tenths.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.error_profiles.PROFILE`; a panel for each width. Blocks with an error that is not
        finite are marked with a cross.
    caption
        The line under the heading; by default the mean of the medians.
    """
    numbers = ("bits", "position", "position_end", "low", "median", "high", "not_finite")
    require(frame, {"tensor": "text"} | dict.fromkeys(numbers, "number"), "errors_along_position")  # type: ignore[arg-type]
    shown = frame.select("tensor", *numbers)
    widths = shown["bits"].unique().sort().to_list()
    plots = [
        _along(bits, legend=bits == widths[0], last=bits == widths[-1]).properties(width=palette.WIDTH - 90, height=110)
        for bits in widths
    ]
    plots[0] = plots[0].properties(title=caption_title())
    words = profile_caption(frame) if caption is None else caption
    return framed(plots, shown, "Error of keys and values along the text", words, pickable=False)


def profile_caption(frame: pl.DataFrame) -> str:
    """Say the mean of the blocks' medians for each width, and how many vectors have no finite error."""
    medians = frame.group_by("bits", "tensor").agg(pl.col("median").mean()).sort("bits", "tensor")
    said = [
        f"{tensor} at {bits} bits {median:.2g}" for bits, tensor, median in medians.iter_rows() if median is not None
    ]
    broken = int(frame["not_finite"].sum())
    return "Median: " + "; ".join([*said, *([f"× {broken} not finite"] if broken else [])])


def error_distribution(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw how the relative errors of single vectors are distributed, a panel for each width.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.error_profiles.ERROR_DENSITIES`.
    caption
        The line under the heading; by default what a log scale cannot show.
    """
    numbers = ("bits", "least", "most", "share", "zero", "not_finite")
    require(frame, {"tensor": "text"} | dict.fromkeys(numbers, "number"), "error_distribution")  # type: ignore[arg-type]
    shown = frame.select("tensor", *numbers[:4])
    widths = shown["bits"].unique().sort().to_list()
    domain = (float(shown["least"].min()), float(shown["most"].max()))  # type: ignore[arg-type]
    plots: list[Plot] = [
        alt.Chart()
        .transform_filter(f"datum.bits === {bits}")
        .transform_calculate(middle="sqrt(datum.least * datum.most)")
        .mark_area(interpolate="step", opacity=0.3, line={"interpolate": "step", "strokeWidth": 1.5})
        .encode(
            x=alt.X("middle:Q", title="relative squared error of a vector" if bits == widths[-1] else None)
            .scale(type="log", domain=domain, nice=False)
            .axis(values=log_ticks(domain), labelExpr=LABEL),
            y=alt.Y("share:Q", title=[f"{bits} bits", "share of vectors"], stack=None).axis(format="%", tickCount=3),
            color=tensor_colour(legend=bits == widths[0]),
            tooltip=[
                alt.Tooltip("tensor:N"),
                alt.Tooltip("middle:Q", title="error", format=".3~g"),
                alt.Tooltip("share:Q", format=".2%"),
            ],
        )
        .properties(width=palette.WIDTH - 90, height=100)
        for bits in widths
    ]
    plots[0] = plots[0].properties(title=caption_title())
    words = distribution_caption(frame) if caption is None else caption
    return framed(plots, shown, "How errors of single vectors are distributed", words, pickable=False)


def distribution_caption(frame: pl.DataFrame) -> str:
    """Say how many vectors are without error, which a log scale cannot show, and how many have none that is finite."""
    sides = frame.group_by("tensor", "bits").agg(pl.col("zero", "not_finite").first())
    zero, broken = int(sides["zero"].sum()), int(sides["not_finite"].sum())
    said = [f"{zero} vectors without error are not drawn"] if zero else []
    said += [f"× {broken} not finite"] if broken else []
    return "; ".join(said) or "Every vector of the capture is counted"


def _along(bits: int, *, legend: bool, last: bool) -> Plot:
    colour = tensor_colour(legend=legend)
    base = (
        alt.Chart()
        .transform_filter(f"datum.bits === {bits}")
        .transform_calculate(middle="(datum.position + datum.position_end - 1) / 2")
        .encode(x=alt.X("middle:Q", title="position in the text, tokens" if last else None).scale(nice=False))
    )
    y = alt.Y("low:Q", title=[f"{bits} bits", "relative error"]).scale(zero=True).axis(tickCount=4)
    finite = base.transform_filter("isValid(datum.median)")
    band = finite.mark_area(opacity=0.25).encode(y=y, y2="high:Q", color=colour)
    tips = [alt.Tooltip("tensor:N"), alt.Tooltip("position:Q"), alt.Tooltip("median:Q", format=".3~g")]
    line = finite.mark_line(strokeWidth=1.5).encode(y=alt.Y("median:Q"), color=colour, tooltip=tips)
    broken = (
        base.transform_filter("datum.not_finite > 0")
        .mark_text(text="×", fontSize=13, fontWeight="bold", color=palette.PICKED)
        .encode(y=alt.value(6), tooltip=[alt.Tooltip("tensor:N"), alt.Tooltip("not_finite:Q", title="not finite")])
    )
    return alt.layer(band, line, broken)
