"""How many directions keys and values take up: the spectrum of one head, and effective dimensions by layer."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import one_head, require
from veloxlab.views.furniture import (
    Plot,
    caption_title,
    framed,
    head_words,
    layer_axis,
    layer_columns,
    layer_step,
    picked_outline,
    tensor_colour,
)
from veloxlab.views.logscale import LABEL, log_domain, log_ticks, not_drawn, on_log_scale

ABOUT = {"origin": "with the mean vector", "mean": "without it"}
DASHES = ([4, 3], [1, 0])
FLOOR = 1e-4  # shares below are drawn there
MEANS = [pl.col(n).filter(pl.col(n).is_finite()).mean() for n in ("uncentred", "centred", "mean_share")]


def spectrum(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the share of energy in each direction of one head, with its mean vector (dashed) and without.

    Parameters
    ----------
    frame
        Rows of one head of `veloxlab.measure.spectra.SPECTRUM`.
    caption
        The line under the heading; by default the effective dimensions.
    """
    numbers = ("layer", "head", "rank", "share")
    require(frame, {"tensor": "text", "about": "text"} | dict.fromkeys(numbers, "number"), "spectrum")  # type: ignore[arg-type]
    one_head(frame, "spectrum")
    shown = frame.select("tensor", "about", "rank", "share")
    domain = (FLOOR, 1.0)
    line = (
        on_log_scale(alt.Chart(), "share", domain)
        .transform_calculate(seen=f"datum.about === 'origin' ? '{ABOUT['origin']}' : '{ABOUT['mean']}'")
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("rank:Q", title="direction, the strongest first")
            .scale(nice=False, domainMin=1)
            .axis(tickMinStep=1),
            y=alt.Y("share_drawn:Q", title=["one direction's", "share of energy"])
            .scale(type="log", domain=domain, clamp=True)
            .axis(values=log_ticks(domain), labelExpr=LABEL),
            color=tensor_colour(),
            strokeDash=_with_mean(),
            tooltip=[
                alt.Tooltip("tensor:N"),
                alt.Tooltip("seen:N"),
                alt.Tooltip("rank:Q"),
                alt.Tooltip("share:Q", format=".3~g"),
            ],
        )
        .properties(width=palette.WIDTH - 110, height=190, title=caption_title())
    )
    words = spectrum_caption(frame) if caption is None else caption
    return framed([line], shown, "Directions that hold the energy of one head", words, pickable=False, dashed=True)


def spectrum_caption(frame: pl.DataFrame) -> str:
    """Say the effective dimensions (Σλ)² / Σλ² of keys and of values, with the mean vector and without."""
    said = []
    for tensor in palette.TENSORS:
        own = frame.filter(pl.col("tensor") == tensor, pl.col("share").is_finite())
        squares = [own.filter(pl.col("about") == about)["share"].pow(2).sum() for about in ABOUT]
        found = [1 / float(square) if square else 0.0 for square in squares]  # a head of zeros has no direction
        if not own.is_empty():
            said.append(f"{tensor} {found[0]:.1f} with the mean, {found[1]:.1f} without it")
    return f"{head_words(frame)}. Effective dimensions: " + "; ".join([*said, *not_drawn(frame["share"])])


def dimensions_by_layer(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw effective dimensions of every layer with and without the mean vector, and what the mean vector holds.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.spectra.DIMENSIONS`; heads are averaged.
    caption
        The line under the heading; by default means over all heads.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    numbers = ("layer", "head", "head_dim", "uncentred", "centred", "mean_share")
    require(frame, {"tensor": "text"} | dict.fromkeys(numbers, "number"), "dimensions_by_layer")  # type: ignore[arg-type]
    means = frame.group_by("layer", "tensor", maintain_order=True).agg(*MEANS)
    step = 0.88 * layer_step(means["layer"].n_unique())  # room for a broad legend
    plots = [
        _counts(means).properties(width=alt.Step(step), height=150, title=caption_title()),
        _mean_shares().properties(width=alt.Step(step), height=80),
    ]
    words = dimensions_caption(frame) if caption is None else caption
    return framed(
        plots, means, "How many directions a head uses, and its mean vector", words, pickable=True, dashed=True
    )


def dimensions_caption(frame: pl.DataFrame) -> str:
    """Say the mean effective dimensions over all heads, and the share of energy that is the mean vector."""
    means = frame.group_by("tensor").agg(*MEANS).drop_nulls()
    rows = {row["tensor"]: row for row in means.iter_rows(named=True)}
    own = [(tensor, rows[tensor]) for tensor in palette.TENSORS if tensor in rows]
    counts = "; ".join(
        f"{tensor} {row['uncentred']:.1f} with the mean, {row['centred']:.1f} without" for tensor, row in own
    )
    shares = " and ".join(f"{100 * row['mean_share']:.0f} %" for _, row in own)
    said = f"Of {frame['head_dim'][0]}: {counts}. The mean vector holds {shares}"
    return "; ".join([said, *not_drawn(pl.concat([frame["uncentred"], frame["centred"].rename("uncentred")]))])


def _counts(means: pl.DataFrame) -> Plot:
    domain = log_domain([*means["uncentred"], *means["centred"]])
    counts = alt.Chart().transform_fold(["uncentred", "centred"], as_=["which", "dimensions"])
    marks = (
        on_log_scale(counts, "dimensions", domain)
        .transform_calculate(seen=f"datum.which === 'uncentred' ? '{ABOUT['origin']}' : '{ABOUT['mean']}'")
        .encode(
            x=layer_axis(labelled=False),
            y=alt.Y("dimensions_drawn:Q", title=["effective dimensions", "mean over KV heads"])
            .scale(type="log", domain=domain, clamp=True, nice=False)
            .axis(values=log_ticks(domain), labelExpr=LABEL),
            color=tensor_colour(),
            strokeDash=_with_mean(),
        )
    )
    tips = [alt.Tooltip("layer:O"), alt.Tooltip("tensor:N"), alt.Tooltip("seen:N")]
    points = marks.mark_point(filled=True, size=26, opacity=1, cursor="pointer").encode(
        strokeDash=alt.StrokeDash(), tooltip=[*tips, alt.Tooltip("dimensions:Q", format=".3~g")]
    )
    return alt.layer(layer_columns(), picked_outline(), marks.mark_line(strokeWidth=1.5), points)


def _mean_shares() -> Plot:
    marks = alt.Chart().encode(
        x=layer_axis(labelled=True),
        y=alt.Y("mean_share:Q", title=["mean vector's", "share of energy"])
        .scale(domain=[0, 1])
        .axis(format="%", tickCount=3),
        color=tensor_colour(legend=False),
    )
    tips = [alt.Tooltip("layer:O"), alt.Tooltip("tensor:N"), alt.Tooltip("mean_share:Q", format=".1%")]
    points = marks.mark_point(filled=True, size=26, opacity=1, cursor="pointer").encode(tooltip=tips)
    return alt.layer(layer_columns(), picked_outline(), marks.mark_line(strokeWidth=1.5), points)


def _with_mean() -> alt.StrokeDash:
    dash: alt.StrokeDash = alt.StrokeDash("seen:N", title=None).scale(domain=list(ABOUT.values()), range=list(DASHES))
    return dash.legend(symbolType="stroke")
