"""What each layer loses: its error by KV head, for keys and values, and the mean over heads above it."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import theme
from veloxlab.views.furniture import (
    CROSS,
    Plot,
    framed,
    known,
    layer_axis,
    layer_step,
    lines_by_layer,
    picked_outline,
    require,
    tensor_colour,
    tensors_of,
    tips,
)
from veloxlab.views.scales import LABEL, Domain, log_colour, log_domain, log_steps, log_ticks, not_drawn, on_log_scale

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

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``) and the metric's column. A value that is not
    finite is marked with a cross; one that is null is left out. ``metric``: ``"rel_mse"``, ``"cosine"``,
    ``"logit_error"`` or ``"output_error"``. ``domain``: least and greatest loss of the scales; give one to compare
    charts or to keep a slider's colours steady. Raises `InputError` if the
    frame does not fit, or holds no value of the metric.
    """
    known(metric, METRICS, "metric")
    require(frame, "error_map", "layer", "head", "tensor", metric)
    shown = frame.select("layer", "head", "tensor", metric).drop_nulls(metric).sort("tensor", "layer", "head")
    tensors = tensors_of(shown)
    if not tensors:
        raise InputError(f"error_map has no {metric} to draw: take 'rel_mse', which every model shows.")
    layers, heads = shown["layer"].n_unique(), shown["head"].n_unique()
    group = math.ceil(layers * heads * len(tensors) / MARKS)
    scale = domain or error_domain(frame, metric)
    step = layer_step(layers)
    means = _means(metric, scale, tensors).properties(width=alt.Step(step), height=110)
    tall = max(min(step, 18), 6, 40 / heads)
    maps = [
        _cells(tensor, metric, scale, group, last=tensor == tensors[-1]).properties(
            width=alt.Step(step), height=alt.Step(tall)
        )
        for tensor in tensors
    ]
    usual = error_caption(frame, metric)
    return framed([means, alt.vconcat(*maps, spacing=10)], shown, HEADINGS[metric], caption, usual, pickable=True)


def error_domain(frame: pl.DataFrame, metric: str = "rel_mse") -> Domain:
    """Give the ends of a scale that holds every loss in a frame, for instance of all budgets of a slider."""
    return log_domain(_finite(frame, metric)["loss"])


def error_caption(frame: pl.DataFrame, metric: str = "rel_mse") -> str:
    """Say the mean loss of keys and of values, which layer loses most, and how many values are not finite."""
    said, broken = [], 0
    for tensor in theme.TENSORS:
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
    names = list(theme.TENSORS)
    means = (
        alt.Chart()
        .transform_calculate(loss=expression)
        .transform_aggregate(loss="mean(loss)", groupby=["layer", "tensor"])
    )
    marks = on_log_scale(means, "loss", domain).encode(
        x=layer_axis(labelled=False),
        y=y.axis(values=log_ticks(domain), labelExpr=LABEL),
        color=alt.Color("tensor:N", title=None).scale(domain=names, range=list(theme.TENSORS.values())),
    )
    shape = alt.Shape("tensor:N", title=None).scale(domain=names, range=["circle", "square"])
    tooltip = tips("layer:O", "tensor:N", ("loss:Q", name, ".3g"))
    points = marks.mark_point(filled=True, size=36, opacity=1, cursor="pointer").encode(shape=shape, tooltip=tooltip)
    return lines_by_layer(marks, points)


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
    colour = log_colour("loss", unit, domain)
    cells = (
        on_log_scale(pooled, "loss", domain)
        .mark_rect(cursor="pointer")
        .encode(
            color=colour,
            tooltip=tips("layer:O", ("group:O", heads), ("loss:Q", f"{tensor}: {name}", ".3g")),
        )
    )
    broken = (
        pooled.transform_filter("datum.finite < datum.rows")
        .transform_calculate(note="'not finite in ' + (datum.rows - datum.finite) + ' of ' + datum.rows")
        .mark_text(**CROSS, cursor="pointer")
        .encode(tooltip=tips("layer:O", ("group:O", heads), ("note:N", name)))
    )
    return alt.layer(cells, broken, picked_outline())


def _finite(frame: pl.DataFrame, metric: str) -> pl.DataFrame:
    loss = 1 - pl.col(metric) if metric == "cosine" else pl.col(metric)
    return frame.select("layer", loss=loss.cast(pl.Float64)).filter(pl.col("loss").is_finite())


def errors_along_position(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the relative error of keys and values along the text: medians, and bands that hold eight tenths.

    Rows of `veloxlab.measure.errors.PROFILE`; a panel for each width. Blocks with an error that is not finite are
    marked with a cross.
    """
    numbers = ("bits", "position", "position_end", "low", "median", "high", "not_finite")
    require(frame, "errors_along_position", "tensor", *numbers)
    shown = frame.select("tensor", *numbers)
    widths = shown["bits"].unique().sort().to_list()
    plots = [_along(bits, widths).properties(width=theme.WIDTH - 90, height=110) for bits in widths]
    return framed(plots, shown, "Error of keys and values along the text", caption, profile_caption(frame))


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

    Rows of `veloxlab.measure.errors.ERROR_DENSITIES`.
    """
    numbers = ("bits", "least", "most", "share", "zero", "not_finite")
    require(frame, "error_distribution", "tensor", *numbers)
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
            tooltip=tips("tensor:N", ("middle:Q", "error", ".3~g"), ("share:Q", None, ".2%")),
        )
        .properties(width=theme.WIDTH - 90, height=100)
        for bits in widths
    ]
    return framed(plots, shown, "How errors of single vectors are distributed", caption, distribution_caption(frame))


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

    Rows of `veloxlab.measure.errors.ERRORS_BY_BITS`; errors of 0 have no place on a log scale.
    """
    numbers = ("bits", "error", "true_bits", "not_finite")
    require(frame, "errors_by_bits", "tensor", *numbers)
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
    tooltip = tips("tensor:N", ("bits:Q", "code bits"), ("true_bits:Q", "true bits", ".2f"), ("error:Q", None, ".3~g"))
    points = base.mark_point(filled=True, size=50, opacity=1).encode(tooltip=tooltip)
    plot = alt.layer(base.mark_line(strokeWidth=1.5), points).properties(width=theme.WIDTH - 90, height=150)
    return framed([plot], shown, "Error of keys and values against bits", caption, by_bits_caption(frame))


def by_bits_caption(frame: pl.DataFrame) -> str:
    """Say by what factor an error falls with a bit, on average, how many are not finite, and how many not drawn."""
    said = []
    for tensor in theme.TENSORS:
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
    tooltip = tips("tensor:N", "position:Q", ("median:Q", None, ".3~g"))
    line = finite.mark_line(strokeWidth=1.5).encode(y=alt.Y("median:Q"), color=colour, tooltip=tooltip)
    broken = (
        base.transform_filter("datum.not_finite > 0")
        .mark_text(**CROSS)
        .encode(y=alt.value(6), tooltip=tips("tensor:N", ("not_finite:Q", "not finite")))
    )
    return alt.layer(band, line, broken)
