"""What each layer loses: its error by KV head, for keys and values, and the mean over heads above it."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import columns, marks, scales, theme

# column: words for a tooltip, the unit for an axis, the loss that is drawn (0 where nothing is lost), and the heading
METRICS = {
    "rel_mse": ("relative MSE", "relative MSE", "datum.rel_mse", "Relative squared error of decoded keys and values"),
    "cosine": (
        "1 − cosine",
        "1 − cosine",
        "isValid(datum.cosine) ? 1 - datum.cosine : null",
        "1 − cosine between decoded and exact keys and values",
    ),
    "logit_error": ("error of logits (nats)", "nats", "datum.logit_error", "Error of attention logits (nats)"),
    "output_error": (
        "relative MSE of attention output",
        "relative MSE",
        "datum.output_error",
        "Relative squared error of the output of attention",
    ),
}


def error_map(
    frame: pl.DataFrame, *, metric: str = "rel_mse", domain: scales.Domain | None = None, caption: str | None = None
) -> alt.VConcatChart:
    """Draw the error of every layer and KV head.

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``) and the metric's column. A value that is not
    finite is marked with a cross; one that is null is left out. ``metric``: ``"rel_mse"``, ``"cosine"``,
    ``"logit_error"`` or ``"output_error"``. ``domain``: least and greatest loss of the scales; give one to compare
    charts or to keep a slider's colours steady. Raises `InputError` if the frame does not fit, or holds no value of
    the metric.
    """
    columns.known(metric, METRICS, "metric")
    needed = columns.require(frame, "error_map", "layer", "head", "tensor", metric)
    shown = needed.drop_nulls(metric).sort("tensor", "layer", "head")
    if shown.is_empty():
        raise InputError(f"error_map has no {metric} to draw: take 'rel_mse', which every model shows.")
    grid, scale = marks.HeadMap(shown), domain or error_domain(frame, metric)
    maps = marks.panels(grid.tensors, lambda t, last: _cells(grid, t, metric, scale, last), grid.width, grid.height)
    means = _means(metric, scale).properties(width=grid.width, height=110)
    usual = error_caption(frame, metric)
    return marks.framed(
        [means, alt.vconcat(*maps, spacing=10)], shown, METRICS[metric][3], caption, usual, pickable=True
    )


def error_domain(frame: pl.DataFrame, metric: str = "rel_mse") -> scales.Domain:
    """Give the ends of a scale that holds every loss in a frame, for instance of all budgets of a slider."""
    return scales.log_domain(_finite(frame, metric)["loss"])


def error_caption(frame: pl.DataFrame, metric: str = "rel_mse") -> str:
    """Say the mean loss of keys and of values, which layer loses most, and how many values are not finite."""
    said, lost = [], 0
    for tensor, own in marks.by_tensor(frame):
        finite = _finite(own, metric)
        lost += 0 if own[metric].is_null().all() else own.height - finite.height
        loss = finite.group_by("layer", maintain_order=True).agg(pl.col("loss").mean())
        if not loss.is_empty():
            worst = loss.sort("loss", "layer").row(-1, named=True)
            mean = sum(loss["loss"]) / loss.height
            said.append(f"{tensor}: mean {mean:.2g}, most in layer {worst['layer']} ({worst['loss']:.2g})")
    return marks.sentence(*said, marks.broken(lost))


def _means(metric: str, domain: scales.Domain) -> marks.Plot:
    name, unit, expression, _ = METRICS[metric]
    means = alt.Chart().transform_calculate(loss=expression)
    means = means.transform_aggregate(loss="mean(loss)", groupby=["layer", "tensor"])
    base = scales.on_log_scale(means, "loss", domain).encode(
        x=marks.layer_axis(labelled=False),
        y=scales.log_y("loss", [unit, "mean over heads"], domain),
        color=marks.tensor_colour(),
    )
    return marks.lines_by_layer(
        base, columns.tips("layer", "tensor", ("loss", name, ".3g")), size=36, shape=marks.tensor_shape()
    )


def _cells(grid: marks.HeadMap, tensor: str, metric: str, domain: scales.Domain, last: bool) -> marks.Plot:
    name, unit, expression, _ = METRICS[metric]
    pooled = grid.cells(
        tensor,
        {"loss": expression},
        {"loss": "mean(loss)", "rows": "count()", "finite": "valid(loss)"},
        x=marks.layer_axis(labelled=last),
    )
    place = ("layer", ("group", grid.words))
    cells = scales.on_log_scale(pooled, "loss", domain).mark_rect(cursor="pointer")
    lost = (
        pooled.transform_filter("datum.finite < datum.rows")
        .transform_calculate(note="'not finite in ' + (datum.rows - datum.finite) + ' of ' + datum.rows")
        .mark_text(**marks.CROSS, cursor="pointer")
        .encode(tooltip=columns.tips(*place, ("note", name)))
    )
    told = columns.tips(*place, ("loss", f"{tensor}: {name}", ".3g"))
    return alt.layer(
        cells.encode(color=scales.log_colour("loss", unit, domain), tooltip=told), lost, marks.picked_outline()
    )


def _finite(frame: pl.DataFrame, metric: str) -> pl.DataFrame:
    loss = 1 - pl.col(metric) if metric == "cosine" else pl.col(metric)
    return frame.select("layer", loss=loss.cast(pl.Float64)).filter(pl.col("loss").is_finite())


def errors_along_position(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the relative error of keys and values along the text: medians, and bands that hold eight tenths.

    Rows of `veloxlab.measure.errors.PROFILE`; a panel for each width. Blocks with an error that is not finite are
    marked with a cross.
    """
    numbers = ("bits", "position", "position_end", "low", "median", "high", "not_finite")
    shown = columns.require(frame, "errors_along_position", "tensor", *numbers)
    widths = shown["bits"].unique().sort().to_list()
    plots = marks.panels(widths, lambda bits, last: _along(bits, widths, last), theme.WIDTH - 90, 110)
    return marks.framed(plots, shown, "Relative error along the text", caption, profile_caption(frame))


def profile_caption(frame: pl.DataFrame) -> str:
    """Say the mean of the blocks' medians for each width, and how many vectors have no finite error."""
    medians = frame.group_by("bits", "tensor").agg(pl.col("median").mean()).sort("bits", "tensor").drop_nulls("median")
    said = [f"{tensor} at {bits} bits {median:.2g}" for bits, tensor, median in medians.iter_rows()]
    return "Median: " + marks.sentence(*said, marks.broken(int(frame["not_finite"].sum())))


def error_distribution(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw how the relative errors of single vectors are distributed, a panel for each width.

    Rows of `veloxlab.measure.errors.ERROR_DENSITIES`.
    """
    numbers = ("bits", "least", "most", "share", "zero", "not_finite")
    shown = columns.require(frame, "error_distribution", "tensor", *numbers).drop("zero", "not_finite")
    widths = shown["bits"].unique().sort().to_list()
    axis = alt.X("middle_drawn:Q", title="relative squared error of a vector").scale(type="log", nice=False)
    axis = axis.axis(values=scales.log_steps(1, 2, 5), labelExpr=scales.LABEL)
    if len(widths) > 1:  # one axis for all; alone, a width's own rows make its axis, whichever come
        bins = shown.filter(pl.col("least").is_finite() & pl.col("most").is_finite() & (pl.col("least") > 0))
        ends = [*bins["least"], *bins["most"]]
        domain = (min(ends), max(ends)) if ends else scales.log_domain(ends)
        axis = axis.scale(type="log", domain=domain, nice=False).axis(
            values=scales.log_ticks(domain), labelExpr=scales.LABEL
        )

    def draw(bits: int, last: bool) -> marks.Plot:
        rows = _of_width(bits, widths).transform_calculate(middle="sqrt(datum.least * datum.most)")
        y = alt.Y("share:Q", title=_titled(bits, widths, "share of vectors"), stack=None)
        return marks.step_area(scales.on_log_scale(rows, "middle")).encode(
            x=axis if last else axis.title(None),
            y=y.axis(format="%", tickCount=3),
            color=marks.tensor_colour(legend=bits == widths[0]),
            tooltip=columns.tips("tensor", ("middle", "error", ".3~g"), "share"),
        )

    plots = marks.panels(widths, draw, theme.WIDTH - 90, 100)
    return marks.framed(plots, shown, "Relative errors of single vectors", caption, distribution_caption(frame))


def distribution_caption(frame: pl.DataFrame) -> str:
    """Say how many vectors are without error, which a log scale cannot show, and how many have none that is finite."""
    counts = frame.group_by("tensor", "bits").agg(pl.col("zero", "not_finite").first())
    zero = f"{zeros} vectors without error are not drawn" if (zeros := int(counts["zero"].sum())) else ""
    left_out = scales.not_drawn(frame["least"] * frame["most"], zero=True)
    said = marks.sentence(zero, marks.broken(int(counts["not_finite"].sum())), *left_out)
    return said or "Every vector of the capture is counted"


def errors_by_bits(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw how the error of keys and of values falls with the true bits of a value.

    Rows of `veloxlab.measure.errors.ERRORS_BY_BITS`; errors of 0 have no place on a log scale.
    """
    shown = columns.require(frame, "errors_by_bits", "tensor", "bits", "error", "true_bits", "not_finite")
    axis = alt.Y("error_drawn:Q", title=["relative", "squared error"]).scale(type="log")
    base = scales.on_log_scale(alt.Chart(), "error").encode(
        x=alt.X("true_bits:Q", title="true bits per value, scales included")
        .scale(zero=False, nice=False, padding=12)
        .axis(tickMinStep=1),
        y=axis.axis(values=scales.log_steps(1), labelExpr=scales.LABEL),
        color=marks.tensor_colour(),
    )
    plot = marks.line_points(base, columns.tips("tensor", ("bits", "code bits"), "true_bits", "error"), 50)
    plot = plot.properties(width=theme.WIDTH - 90, height=150)
    return marks.framed(
        [plot], shown, "Relative squared error against true bits per value", caption, by_bits_caption(frame)
    )


def by_bits_caption(frame: pl.DataFrame) -> str:
    """Say by what factor an error falls with a bit, on average, how many are not finite, and how many not drawn."""
    said = []
    for tensor, own in marks.by_tensor(
        frame.filter(pl.col("error").is_finite(), pl.col("error") > 0).sort("true_bits")
    ):
        spent = own["true_bits"][-1] - own["true_bits"][0]
        if spent > 0:
            said.append(f"{tensor} {(own['error'][0] / own['error'][-1]) ** (1 / spent):.1f}×")
    alone = "One width alone" if (frame["error"] > 0).any() else "Nothing is lost"
    words = f"One more bit divides the error by: {', '.join(said)}" if said else alone
    return marks.sentence(
        words, marks.broken(int(frame["not_finite"].sum())), *scales.not_drawn(frame["error"], zero=True)
    )


def _of_width(bits: int, widths: list[int]) -> alt.Chart:
    """The rows of one width: all rows where there is no other, so that rows of another may take their place."""
    return marks.only(bits=bits) if len(widths) > 1 else alt.Chart().transform_filter("true")


def _titled(bits: int, widths: list[int], what: str) -> list[str]:
    return [f"{bits} bits", what] if len(widths) > 1 else [what]


def _along(bits: int, widths: list[int], last: bool) -> marks.Plot:
    x = alt.X("middle:Q", title="position in the text, tokens" if last else None).scale(nice=False)
    rows = _of_width(bits, widths).transform_calculate(middle="(datum.position + datum.position_end - 1) / 2")
    base = rows.encode(x=x)
    finite = base.transform_filter("isValid(datum.median)").encode(color=marks.tensor_colour(legend=bits == widths[0]))
    y = alt.Y("low:Q", title=_titled(bits, widths, "relative error")).scale(zero=True).axis(tickCount=4)
    band = finite.mark_area(opacity=0.25).encode(y=y, y2="high:Q")
    line = finite.mark_line(strokeWidth=1.5).encode(
        y=alt.Y("median:Q"), tooltip=columns.tips("tensor", "position", "median")
    )
    return alt.layer(band, line, marks.crosses(base, tooltip=columns.tips("tensor", "not_finite")))
