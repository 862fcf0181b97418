"""How much the loss feels an error in each layer's keys and values."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import caption_title, framed, layer_axis, layer_columns, layer_width, picked_outline
from veloxlab.views.logscale import LABEL, Domain, log_domain, log_ticks, not_drawn, on_log_scale


def sensitivity_by_layer(
    frame: pl.DataFrame,
    *,
    unit: str = "nats a unit of error",
    domain: Domain | None = None,
    caption: str | None = None,
) -> alt.VConcatChart:
    """Draw the sensitivities of each layer's KV heads: their mean as a point, from the least head to the greatest.

    Parameters
    ----------
    frame
        Rows of ``layer``, ``head``, ``side`` (``"keys"`` or ``"values"``) and ``sensitivity``. What is not above zero
        has no place on the scale and is counted in the caption.
    unit
        Of a sensitivity; an error's unit is ½·E‖x − x̂‖²/D.
    domain
        Least and greatest value of the scale.
    caption
        The line under the heading; by default how far the heads of each side differ.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    needed = {"layer": "number", "head": "number", "side": "text", "sensitivity": "number"}
    require(frame, needed, "sensitivity_by_layer")  # type: ignore[arg-type]
    above = frame.filter(pl.col("sensitivity").is_finite() & (pl.col("sensitivity") > 0))
    value = pl.col("sensitivity")
    shown = above.group_by("layer", "side").agg(mean=value.mean(), least=value.min(), greatest=value.max())
    shown = shown.sort("side", "layer")
    scale = domain or log_domain(above["sensitivity"])
    sides = list(palette.TENSORS)
    rows = alt.Chart()
    for field in ("mean", "least", "greatest"):
        rows = on_log_scale(rows, field, scale)
    marks = rows.encode(
        x=layer_axis(labelled=True, gap=0.12),
        xOffset=alt.XOffset("side:N").scale(domain=sides),
        color=alt.Color("side:N", title=None).scale(domain=sides, range=list(palette.TENSORS.values())),
    )
    y = (
        alt.Y("mean_drawn:Q", title=["sensitivity", unit])
        .scale(type="log", domain=scale, nice=False, clamp=True)
        .axis(values=log_ticks(scale), labelExpr=LABEL)
    )
    tooltip = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("side:N"),
        alt.Tooltip("mean:Q", title="mean of its heads", format=".3g"),
        alt.Tooltip("least:Q", format=".3g"),
        alt.Tooltip("greatest:Q", format=".3g"),
    ]
    spans = marks.mark_rule(strokeWidth=2, opacity=0.55).encode(y=alt.Y("least_drawn:Q"), y2="greatest_drawn:Q")
    points = marks.mark_point(filled=True, size=34, opacity=1, cursor="pointer").encode(
        y=y, tooltip=tooltip, shape=alt.Shape("side:N", title=None).scale(domain=sides, range=["circle", "square"])
    )
    plot = alt.layer(layer_columns(), spans, points, picked_outline()).properties(
        width=layer_width(shown["layer"].n_unique()), height=130, title=caption_title()
    )
    words = sensitivity_caption(frame) if caption is None else caption
    heading = "How much the loss feels an error in keys and in values"
    return framed([plot], shown, heading, words, pickable=True)


def sensitivity_caption(frame: pl.DataFrame) -> str:
    """Say the spread of each side's heads, as the ratio of the arithmetic to the geometric mean, and the greatest."""
    said = []
    for side in palette.TENSORS:
        own = frame.filter(pl.col("side") == side, pl.col("sensitivity").is_finite(), pl.col("sensitivity") > 0)
        if not own.is_empty():
            ratio = own.select(pl.col("sensitivity").mean() / pl.col("sensitivity").log().mean().exp()).item()
            most = own.sort("sensitivity").row(-1, named=True)
            said.append(f"{side}: AM/GM {ratio:.2f}, most in layer {most['layer']}, head {most['head']}")
    return "; ".join([*said, *not_drawn(frame["sensitivity"], zero=True)])
