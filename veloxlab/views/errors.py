"""What each layer loses: its error by KV head, for keys and values, and the mean over heads above it."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import palette
from veloxlab.views.columns import known, require
from veloxlab.views.furniture import Plot, caption_title, framed, layer_axis, layer_columns, layer_step, picked_outline
from veloxlab.views.logscale import LABEL, Domain, log_domain, log_ticks, on_log_scale

# column: words for a tooltip, the unit for an axis, and the loss that is drawn (0 where nothing is lost)
METRICS = {
    "rel_mse": ("relative MSE", "relative MSE", "datum.rel_mse"),
    "cosine": ("1 − cosine", "1 − cosine", "isValid(datum.cosine) ? 1 - datum.cosine : null"),
    "logit_error": ("error of logits (nats)", "nats", "datum.logit_error"),
    "output_error": ("relative MSE of attention output", "relative MSE", "datum.output_error"),
}
HEADINGS = {
    "rel_mse": "How far decoded keys and values are from the exact ones",
    "cosine": "How far decoded keys and values turn from the exact ones",
    "logit_error": "How far compression moves attention logits",
    "output_error": "How far compression moves the output of attention",
}
MARKS = 1_600  # cells at most: more would make a slider stutter, so heads are then drawn in groups


def error_map(
    frame: pl.DataFrame, *, metric: str = "rel_mse", domain: Domain | None = None, caption: str | None = None
) -> alt.VConcatChart:
    """Draw the error of every layer and KV head.

    Parameters
    ----------
    frame
        Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``) and the metric's column. A value that is
        not finite is marked with a cross; one that is null is left out.
    metric
        ``"rel_mse"``, ``"cosine"``, ``"logit_error"`` or ``"output_error"``.
    domain
        Least and greatest loss of the scales; give one to compare charts or to keep a slider's colours steady.
    caption
        The line under the heading; by default means and the worst layer.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.

    Raises
    ------
    InputError
        If the frame does not fit, or holds no value of the metric.
    """
    known(metric, METRICS, "metric")
    require(frame, {"layer": "number", "head": "number", "tensor": "text", metric: "number"}, "error_map")
    shown = frame.select("layer", "head", "tensor", metric).drop_nulls(metric).sort("tensor", "layer", "head")
    tensors = [tensor for tensor in palette.TENSORS if tensor in shown["tensor"]]
    if not tensors:
        raise InputError(f"error_map has no {metric} to draw: take 'rel_mse', which every model shows.")
    layers, heads = shown["layer"].n_unique(), shown["head"].n_unique()
    group = math.ceil(layers * heads * len(tensors) / MARKS)
    scale = domain or error_domain(frame, metric)
    step = layer_step(layers)
    means = _means(metric, scale, tensors).properties(width=alt.Step(step), height=110, title=caption_title())
    tall = max(min(step, 18), 6, 40 / heads)
    maps = [
        _cells(tensor, metric, scale, group, last=tensor == tensors[-1]).properties(
            width=alt.Step(step), height=alt.Step(tall)
        )
        for tensor in tensors
    ]
    words = error_caption(frame, metric) if caption is None else caption
    return framed([means, alt.vconcat(*maps, spacing=10)], shown, HEADINGS[metric], words, pickable=True)


def error_domain(frame: pl.DataFrame, metric: str = "rel_mse") -> Domain:
    """Give the ends of a scale that holds every loss in a frame, for instance of all budgets of a slider."""
    return log_domain(_finite(frame, metric)["loss"])


def error_caption(frame: pl.DataFrame, metric: str = "rel_mse") -> str:
    """Say the mean loss of keys and of values, which layer loses most, and how many values are not finite."""
    said, broken = [], 0
    for tensor in palette.TENSORS:
        own = frame.filter(pl.col("tensor") == tensor)
        finite = _finite(own, metric)
        broken += 0 if own[metric].is_null().all() else own.height - finite.height
        loss = finite.group_by("layer", maintain_order=True).agg(pl.col("loss").mean())
        if not loss.is_empty():
            worst = loss.sort("loss", "layer").row(-1, named=True)
            mean = sum(loss["loss"]) / loss.height
            said.append(f"{tensor}: mean {mean:.2g}, most in layer {worst['layer']} ({worst['loss']:.2g})")
    return "; ".join([*said, *([f"× {broken} not finite"] if broken else [])])


def _means(metric: str, domain: Domain, tensors: list[str]) -> Plot:
    name, unit, expression = METRICS[metric]
    y = alt.Y("loss_drawn:Q", title=[unit, "mean over heads"]).scale(type="log", domain=domain, clamp=True, nice=False)
    names = list(palette.TENSORS)
    means = (
        alt.Chart()
        .transform_calculate(loss=expression)
        .transform_aggregate(loss="mean(loss)", groupby=["layer", "tensor"])
    )
    marks = on_log_scale(means, "loss", domain).encode(
        x=layer_axis(labelled=False),
        y=y.axis(values=log_ticks(domain), labelExpr=LABEL),
        color=alt.Color("tensor:N", title=None).scale(domain=names, range=list(palette.TENSORS.values())),
    )
    shape = alt.Shape("tensor:N", title=None).scale(domain=names, range=["circle", "square"])
    tooltip = [alt.Tooltip("layer:O"), alt.Tooltip("tensor:N"), alt.Tooltip("loss:Q", title=name, format=".3g")]
    points = marks.mark_point(filled=True, size=36, opacity=1, cursor="pointer").encode(shape=shape, tooltip=tooltip)
    return alt.layer(layer_columns(), picked_outline(), marks.mark_line(strokeWidth=1.5), points)


def _cells(tensor: str, metric: str, domain: Domain, group: int, *, last: bool) -> Plot:
    name, unit, expression = METRICS[metric]
    heads = "KV head" if group == 1 else f"KV heads, by {group}"
    pooled = (
        alt.Chart()
        .transform_filter(f"datum.tensor === '{tensor}'")
        .transform_calculate(loss=expression, group=f"floor(datum.head / {group}) * {group}")
        .transform_aggregate(loss="mean(loss)", rows="count()", finite="valid(loss)", groupby=["layer", "group"])
        .encode(x=layer_axis(labelled=last), y=alt.Y("group:O", title=[tensor, heads]))
    )
    key = alt.Legend(values=log_ticks(domain), labelExpr=LABEL, gradientLength=110, gradientThickness=10)
    colour = alt.Color("loss_drawn:Q", title=unit, legend=key).scale(type="log", domain=domain, clamp=True)
    cells = (
        on_log_scale(pooled, "loss", domain)
        .mark_rect(cursor="pointer")
        .encode(
            color=colour,
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("group:O", title=heads),
                alt.Tooltip("loss:Q", title=f"{tensor}: {name}", format=".3g"),
            ],
        )
    )
    broken = (
        pooled.transform_filter("datum.finite < datum.rows")
        .transform_calculate(note="'not finite in ' + (datum.rows - datum.finite) + ' of ' + datum.rows")
        .mark_text(text="×", fontSize=13, fontWeight="bold", color=palette.PICKED, cursor="pointer")
        .encode(
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("group:O", title=heads), alt.Tooltip("note:N", title=name)]
        )
    )
    return alt.layer(cells, broken, picked_outline())


def _finite(frame: pl.DataFrame, metric: str) -> pl.DataFrame:
    loss = 1 - pl.col(metric) if metric == "cosine" else pl.col(metric)
    return frame.select("layer", loss=loss.cast(pl.Float64)).filter(pl.col("loss").is_finite())
