"""Errors of single vectors: along the text, how they are distributed, and how they fall with bits."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import Plot, caption_title, framed, tensor_colour
from veloxlab.views.logscale import LABEL, log_domain, log_steps, log_ticks, not_drawn, on_log_scale


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
    plots = [_along(bits, widths).properties(width=palette.WIDTH - 90, height=110) for bits in widths]
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
    axis = alt.X("middle_drawn:Q", title="relative squared error of a vector").scale(type="log", nice=False)
    axis = axis.axis(values=log_steps(1, 2, 5), labelExpr=LABEL)
    if len(widths) > 1:  # one axis for all; alone, a width's own rows make its axis, whichever come
        bins = shown.filter(pl.col("least").is_finite() & pl.col("most").is_finite() & (pl.col("least") > 0))
        domain = log_domain([])
        if not bins.is_empty():
            domain = (float(bins["least"].min()), float(bins["most"].max()))  # type: ignore[arg-type]
        axis = axis.scale(type="log", domain=domain, nice=False).axis(values=log_ticks(domain), labelExpr=LABEL)
    plots: list[Plot] = [
        on_log_scale(_of_width(bits, widths).transform_calculate(middle="sqrt(datum.least * datum.most)"), "middle")
        .mark_area(interpolate="step", opacity=0.3, line={"interpolate": "step", "strokeWidth": 1.5})
        .encode(
            x=axis if bits == widths[-1] else axis.title(None),
            y=alt.Y("share:Q", title=_titled(bits, widths, "share of vectors"), stack=None).axis(
                format="%", tickCount=3
            ),
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
    said += not_drawn(frame["least"] * frame["most"], zero=True)
    return "; ".join(said) or "Every vector of the capture is counted"


def errors_by_bits(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw how the error of keys and of values falls with the true bits of a value.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.error_profiles.ERRORS_BY_BITS`; errors of 0 have no place on a log scale.
    caption
        The line under the heading; by default what one more bit does.
    """
    numbers = ("bits", "error", "true_bits", "not_finite")
    require(frame, {"tensor": "text"} | dict.fromkeys(numbers, "number"), "errors_by_bits")  # type: ignore[arg-type]
    shown = frame.select("tensor", *numbers)
    base = on_log_scale(alt.Chart(), "error").encode(
        x=alt.X("true_bits:Q", title="true bits a value, scales included")
        .scale(zero=False, nice=False, padding=12)
        .axis(tickMinStep=1),
        y=alt.Y("error_drawn:Q", title=["relative", "squared error"])
        .scale(type="log")
        .axis(values=log_steps(1), labelExpr=LABEL),
        color=tensor_colour(legend=True),
    )
    tips = [
        alt.Tooltip("tensor:N"),
        alt.Tooltip("bits:Q", title="code bits"),
        alt.Tooltip("true_bits:Q", title="true bits", format=".2f"),
        alt.Tooltip("error:Q", format=".3~g"),
    ]
    points = base.mark_point(filled=True, size=50, opacity=1).encode(tooltip=tips)
    plot = alt.layer(base.mark_line(strokeWidth=1.5), points).properties(
        width=palette.WIDTH - 90, height=150, title=caption_title()
    )
    words = by_bits_caption(frame) if caption is None else caption
    return framed([plot], shown, "How the error falls with bits", words, pickable=False)


def by_bits_caption(frame: pl.DataFrame) -> str:
    """Say by what factor an error falls with a bit, on average, how many are not finite, and how many not drawn."""
    said = []
    for tensor in palette.TENSORS:
        own = frame.filter(pl.col("tensor") == tensor, pl.col("error").is_finite() & (pl.col("error") > 0)).sort(
            "true_bits"
        )
        spent = own["true_bits"][-1] - own["true_bits"][0] if len(own) > 1 else 0
        if spent > 0:
            factor = (own["error"][0] / own["error"][-1]) ** (1 / spent)
            said.append(f"{tensor} {factor:.1f}×")
    broken = int(frame["not_finite"].sum())
    alone = "One width alone" if (frame["error"] > 0).any() else "Nothing is lost"
    words = f"One more bit divides the error by: {', '.join(said)}" if said else alone
    words += f"; × {broken} not finite" if broken else ""
    return "; ".join([words, *not_drawn(frame["error"], zero=True)])


def _of_width(bits: int, widths: list[int]) -> alt.Chart:
    """The rows of one width: all rows where there is no other, so that rows of another may take their place."""
    return alt.Chart().transform_filter(f"datum.bits === {bits}" if len(widths) > 1 else "true")


def _titled(bits: int, widths: list[int], what: str) -> list[str]:
    return [f"{bits} bits", what] if len(widths) > 1 else [what]


def _along(bits: int, widths: list[int]) -> Plot:
    colour = tensor_colour(legend=bits == widths[0])
    title = "position in the text, tokens" if bits == widths[-1] else None
    base = (
        _of_width(bits, widths)
        .transform_calculate(middle="(datum.position + datum.position_end - 1) / 2")
        .encode(x=alt.X("middle:Q", title=title).scale(nice=False))
    )
    y = alt.Y("low:Q", title=_titled(bits, widths, "relative error")).scale(zero=True).axis(tickCount=4)
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
