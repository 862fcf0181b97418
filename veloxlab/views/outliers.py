"""Outlier channels by layer: how loud the loudest is, as vectors are cached and after each transform."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.distributions import SPACE_WORDS
from veloxlab.views.furniture import Plot, caption_title, framed, layer_axis, layer_columns, layer_step, picked_outline
from veloxlab.views.logscale import LABEL, Domain, log_domain, log_ticks, not_drawn, on_log_scale

RATIO = pl.col("loudest_ratio").filter(pl.col("loudest_ratio").is_finite()).mean()  # of the heads that have one


def outliers_by_layer(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the loudest channel of each layer over its median channel, a line for each space; mean over KV heads.

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.outliers.OUTLIERS`.
    caption
        The line under the heading; by default the mean over layers of each space.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    numbers = ("layer", "head", "loudest_ratio", "not_finite")
    require(frame, {"tensor": "text", "space": "text"} | dict.fromkeys(numbers, "number"), "outliers_by_layer")  # type: ignore[arg-type]
    means = frame.group_by("layer", "tensor", "space", maintain_order=True).agg(RATIO, pl.col("not_finite").sum())
    tensors = [tensor for tensor in palette.TENSORS if tensor in set(frame["tensor"])]
    spaces = [space for space in palette.SPACES if space in set(frame["space"])]
    domain = log_domain(means["loudest_ratio"])
    step = 0.85 * layer_step(means["layer"].n_unique())  # room for a broad legend
    plots = [
        _lines(tensor, spaces, domain, legend=tensor == tensors[0], last=tensor == tensors[-1]).properties(
            width=alt.Step(step), height=120
        )
        for tensor in tensors
    ]
    plots[0] = plots[0].properties(title=caption_title())
    words = outlier_caption(frame) if caption is None else caption
    return framed(plots, means, "How far the loudest channel stands out", words, pickable=True)


def outlier_caption(frame: pl.DataFrame) -> str:
    """Say the mean ratio of the keys' loudest channel in each space, and how many coordinates are not finite."""
    tensor = next(tensor for tensor in palette.TENSORS if tensor in set(frame["tensor"]))
    means = frame.filter(pl.col("tensor") == tensor).group_by("space").agg(RATIO)
    ratios = dict(means.iter_rows())
    said = [f"{SPACE_WORDS[space]} {ratios[space]:.1f}" for space in palette.SPACES if ratios.get(space) is not None]
    broken = int(frame["not_finite"].sum())
    words = f"{tensor.capitalize()}, mean: " + ", ".join(said) + (f"; × {broken} not finite" if broken else "")
    return "; ".join([words, *not_drawn(frame["loudest_ratio"])])


def _lines(tensor: str, spaces: list[str], domain: Domain, *, legend: bool, last: bool) -> Plot:
    words = [SPACE_WORDS[space] for space in spaces]
    named = "{" + ", ".join(f"{space}: '{SPACE_WORDS[space]}'" for space in spaces) + "}[datum.space]"
    colour = alt.Color("seen:N", title=None).scale(domain=words, range=[palette.SPACES[s][0] for s in spaces])
    base = (
        on_log_scale(alt.Chart(), "loudest_ratio", domain)
        .transform_filter(f"datum.tensor === '{tensor}'")
        .transform_calculate(seen=named)
        .encode(
            x=layer_axis(labelled=last),
            y=alt.Y("loudest_ratio_drawn:Q", title=[tensor, "loudest / median RMS"])
            .scale(type="log", domain=domain, nice=False, clamp=True)
            .axis(values=log_ticks(domain), labelExpr=LABEL),
            color=colour if legend else colour.legend(None),
        )
    )
    shape = alt.Shape("seen:N", title=None).scale(domain=words, range=[palette.SPACES[s][1] for s in spaces])
    shape = shape if legend else shape.legend(None)
    tips = [alt.Tooltip("layer:O"), alt.Tooltip("seen:N"), alt.Tooltip("loudest_ratio:Q", title=tensor, format=".3~g")]
    points = base.mark_point(filled=True, size=30, opacity=1, cursor="pointer").encode(shape=shape, tooltip=tips)
    broken = (
        alt.Chart()
        .transform_filter(f"datum.tensor === '{tensor}' && datum.not_finite > 0")
        .mark_text(text="×", fontSize=13, fontWeight="bold", color=palette.PICKED)
        .encode(x=alt.X("layer:O"), y=alt.value(6))
    )
    return alt.layer(layer_columns(), picked_outline(), base.mark_line(strokeWidth=1.5), points, broken)
