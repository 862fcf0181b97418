"""Effects of compression: errors by layer, head, position and width, and the attention of one head."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.checks import choice
from veloxlab.errors import InputError
from veloxlab.views import columns, marks, theme

# column: words for a tooltip, lines for the title of an axis, and heading
METRICS = {
    "rel_mse": (
        "relative MSE of vectors",
        ["relative MSE", "of vectors"],
        "Relative squared error of decoded keys and values",
    ),
    "cosine": ("1 − cosine", ["1 − cosine"], "1 − cosine between decoded and exact keys and values"),
    "logit_error": ("error of logits (nats)", ["nats"], "Error of attention logits (nats)"),
    "output_error": (
        "relative MSE of attention output",
        ["relative MSE of", "attention output"],
        "Relative squared error of the output of attention",
    ),
}


def error_map(
    frame: pl.DataFrame, *, metric: str = "rel_mse", domain: columns.Domain | None = None, caption: str = ""
) -> alt.VConcatChart:
    """Draw the error of every layer and KV head.

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``) and the metric's column. A cross marks a value
    that is not finite; a null value is left out. ``metric``: ``"rel_mse"``, ``"cosine"``,
    ``"logit_error"`` or ``"output_error"``. ``domain``: least and greatest loss of the scales; set it to compare charts
    or to keep the colours steady while a slider moves. Raises `InputError` if the frame has a wrong column, or no value
    of the metric.
    """
    choice(*METRICS)("metric", metric)
    needed = columns.require(frame, "error_map", "layer head tensor", metric)
    shown = needed.drop_nulls(metric).sort("tensor", "layer", "head")
    if shown.is_empty():
        raise InputError(f"error_map has no {metric} to draw: take 'rel_mse', which every model shows.")
    grid, scale = marks.HeadMap(shown), domain or error_domain(frame, metric)
    name, unit, heading = METRICS[metric]
    # a cosine of 1 is no loss
    loss = {"loss": "isValid(datum.cosine) ? 1 - datum.cosine : null" if metric == "cosine" else f"datum.{metric}"}

    def cells(tensor: str, last: bool) -> marks.Plot:
        pooled = grid.cells(tensor, loss, {"loss": "mean(loss)", "rows": "count()", "finite": "valid(loss)"}, last=last)
        place = ("layer", ("group", grid.words))
        drawn = columns.on_log_scale(pooled, "loss", scale).mark_rect(cursor="pointer")
        told = columns.tips(*place, ("loss", f"{tensor}: {name}", ".3g"))
        note = "'not finite in ' + (datum.rows - datum.finite) + ' of ' + datum.rows"
        lost = pooled.transform_filter("datum.finite < datum.rows").transform_calculate(note=note)
        return marks.layered(
            drawn.encode(color=columns.log_colour("loss", unit, scale), tooltip=told),
            lost.mark_text(**marks.CROSS, cursor="pointer").encode(tooltip=columns.tips(*place, ("note", name))),
            pooled.transform_filter(f"isFinite(datum.loss) && datum.loss > {scale[1]!r}")
            .mark_text(text="\u25b2", fontSize=9, color="white", cursor="pointer")
            .encode(tooltip=told),
            marks.picked_outline(unless=marks.PICKED_HEAD),
            marks.picked_cell(pooled, grid.group),
        )

    means = alt.Chart().transform_calculate(**loss)
    means = means.transform_aggregate(loss="mean(loss)", groupby=["layer", "tensor"])
    base = columns.on_log_scale(means, "loss", scale).encode(
        x=marks.layer_axis(labelled=False),
        y=columns.log_y("loss", [*unit, "mean over heads"], scale),
        color=marks.tensor_colour(),
    )
    told = columns.tips("layer tensor", ("loss", name, ".3g"))
    higher = marks.above(means, "loss", scale[1], x=marks.layer_axis(labelled=False), tooltip=told)
    shapes = marks.scaled(alt.Shape, "tensor", theme.TENSOR_SHAPES)
    lines = marks.lines_by_layer(base, told, 36, higher, shape=shapes)
    maps = marks.stacked(alt.VConcatChart, marks.panels(grid.tensors, cells, grid.width, grid.height), 10)
    plots: list[marks.Plot] = [marks.sized(lines, grid.width, 110), maps]
    picks = [marks.PICKED, marks.PICKED_HEAD]
    return marks.framed(plots, shown, heading, caption or error_caption(frame, metric), picks=picks)


def error_domain(frame: pl.DataFrame, metric: str = "rel_mse") -> columns.Domain:
    """Return the ends of a scale for all losses in a frame, for instance of all budgets of a slider."""
    return columns.log_domain(_finite(frame, metric)["loss"])


def error_caption(frame: pl.DataFrame, metric: str = "rel_mse") -> str:
    """State the mean loss of keys and of values, the layer with the most, and how many values are not finite."""
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


def _finite(frame: pl.DataFrame, metric: str) -> pl.DataFrame:
    loss = 1 - pl.col(metric) if metric == "cosine" else pl.col(metric)
    return frame.select("layer", loss=loss.cast(pl.Float64)).filter(pl.col("loss").is_finite())


def errors_along_position(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the relative error of keys and values along the text: medians, and bands of the middle 80 %.

    Rows of `veloxlab.measure.errors.PROFILE`; a panel for each width. A cross marks a block with an error that is not
    finite.
    """
    needed = "tensor bits position position_end low median high not_finite"
    shown = columns.require(frame, "errors_along_position", needed)
    widths = shown["bits"].unique().sort().to_list()

    def draw(bits: float, last: bool) -> marks.Plot:
        rows = _of_width(bits, widths).transform_calculate(middle="(datum.position + datum.position_end - 1) / 2")
        base = rows.encode(x=columns.x("middle", "" if last else None, nice=False))
        colour = marks.tensor_colour(legend=bits == widths[0])
        finite = base.transform_filter("isValid(datum.median)").encode(color=colour)
        low = columns.y("low", _titled(bits, widths, "relative error"), zero=True, tickCount=4)
        told = columns.tips("tensor position median")
        return marks.layered(
            finite.mark_area(opacity=0.25).encode(y=low, y2=alt.Y2("high:Q")),
            finite.mark_line(strokeWidth=1.5).encode(y=alt.Y("median:Q"), tooltip=told),
            marks.crosses(base, tooltip=columns.tips("tensor not_finite")),
            marks.token_rule(),
            rows.mark_rect(opacity=0, cursor="pointer").encode(x=alt.X("position:Q"), x2=alt.X2("position_end:Q")),
        )

    plots, heading = marks.panels(widths, draw, theme.WIDTH - 90, 110), "Relative error along the text"
    said = caption or profile_caption(frame)
    return marks.framed(plots, shown, heading, said, picks=[marks.PICKED_TOKEN])


def profile_caption(frame: pl.DataFrame) -> str:
    """State the mean of the blocks' medians for each width, and how many vectors have no finite error."""
    medians = frame.group_by("bits", "tensor").agg(pl.col("median").mean()).sort("bits", "tensor").drop_nulls("median")
    said = [f"{tensor} at {marks.bits_said(bits)} {median:.2g}" for bits, tensor, median in medians.iter_rows()]
    return "Median: " + marks.sentence(*said, marks.broken(frame["not_finite"].sum()))


def error_distribution(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the distribution of the relative errors of single vectors, a panel for each width.

    Rows of `veloxlab.measure.errors.ERROR_DENSITIES`.
    """
    shown = columns.require(frame, "error_distribution", "tensor bits least most share zero not_finite")
    shown = shown.drop("zero", "not_finite")
    widths = shown["bits"].unique().sort().to_list()
    axis: marks.Look = {"values": columns.log_steps(1, 2, 5)}
    if len(widths) > 1:  # one axis for all widths; a single width has an axis from its rows
        bins = shown.filter(pl.col("least").is_finite() & pl.col("most").is_finite() & (pl.col("least") > 0))
        ends = [*bins["least"], *bins["most"]]
        domain = (min(ends), max(ends)) if ends else columns.log_domain(ends)
        axis = {"domain": domain, "values": columns.log_ticks(domain)}

    def draw(bits: float, last: bool) -> marks.Plot:
        rows = _of_width(bits, widths).transform_calculate(middle="sqrt(datum.least * datum.most)")
        title = "" if last else None
        share = _titled(bits, widths, "share of vectors")
        area: alt.Chart = columns.on_log_scale(rows, "middle").mark_area(**marks.STEP_AREA)
        return area.encode(
            x=columns.x("middle_drawn", title, type="log", nice=False, labelExpr=columns.LABEL, **axis),
            y=columns.y("share", share, stack=None, format="%", tickCount=3),
            color=marks.tensor_colour(legend=bits == widths[0]),
            tooltip=columns.tips("tensor", ("middle", "error", ".3~g"), "share"),
        )

    plots = marks.panels(widths, draw, theme.WIDTH - 90, 100)
    return marks.framed(plots, shown, "Relative errors of single vectors", caption or distribution_caption(frame))


def distribution_caption(frame: pl.DataFrame) -> str:
    """State the numbers of vectors without error, which a log scale cannot show, and without a finite error."""
    zeros, broken = frame.group_by("tensor", "bits").agg(pl.col("zero", "not_finite").first()).sum().row(0)[2:]
    zero = f"{zeros} vectors without error are not drawn" if zeros else ""
    left_out = columns.not_drawn(frame["least"] * frame["most"], zero=True)
    return marks.sentence(zero, marks.broken(broken), *left_out) or "Every vector of the capture is counted"


def errors_by_bits(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the error of keys and of values against true bits per value.

    Rows of `veloxlab.measure.errors.ERRORS_BY_BITS`; errors of 0 are not drawn, because the scale is logarithmic.
    """
    shown = columns.require(frame, "errors_by_bits", "tensor bits error true_bits not_finite")
    axis: marks.Look = {"type": "log", "values": columns.log_steps(1), "labelExpr": columns.LABEL}
    base = columns.on_log_scale(alt.Chart(), "error").encode(
        x=columns.x("true_bits", zero=False, nice=False, padding=12, tickMinStep=1),
        y=columns.y("error_drawn", **axis),
        color=marks.tensor_colour(),
    )
    plot = marks.line_points(base, columns.tips("tensor", ("bits", "code bits"), "true_bits error"), 50)
    plots = [marks.sized(plot, theme.WIDTH - 90, 150)]
    heading = "Relative squared error against true bits per value"
    return marks.framed(plots, shown, heading, caption or by_bits_caption(frame))


def by_bits_caption(frame: pl.DataFrame) -> str:
    """State the mean factor by which one bit reduces the error, and the numbers of errors not finite and not drawn."""
    said, above = [], frame.filter(pl.col("error").is_finite(), pl.col("error") > 0)
    for tensor, own in marks.by_tensor(above.sort("true_bits")):
        spent = own["true_bits"][-1] - own["true_bits"][0]
        if spent > 0:
            said.append(f"{tensor} {(own['error'][0] / own['error'][-1]) ** (1 / spent):.1f}×")
    alone = "One width alone" if (frame["error"] > 0).any() else "Nothing is lost"
    words = f"One more bit divides the error by: {', '.join(said)}" if said else alone
    lost = [marks.broken(frame["not_finite"].sum()), *columns.not_drawn(frame["error"], zero=True)]
    return marks.sentence(words, *lost)


def _of_width(bits: float, widths: list[float]) -> alt.Chart:
    """Return the rows of one width; all rows if there is one width, so that rows of another width can replace them."""
    return marks.only(bits=bits) if len(widths) > 1 else alt.Chart().transform_filter("true")


def _titled(bits: float, widths: list[float], what: str) -> list[str]:
    return [marks.bits_said(bits), what] if len(widths) > 1 else [what]


KINDS = {"exact": "exact keys", "compressed": "compressed keys", "difference": "|difference|"}
WEIGHTS = (1e-3, 1.0)  # ends of the scale of attention
SIDE = 160  # pixels of a map


def attention_maps(
    frame: pl.DataFrame, *, heading: str = "Attention of one head", caption: str = ""
) -> alt.VConcatChart:
    """Draw attention weights of blocks of queries over blocks of keys, exact and compressed, and the difference.

    Rows of `veloxlab.measure.errors.ATTENTION_MAP`. A cross marks a weight that is not finite. ``heading``: for
    instance layer, head and method.
    """
    shown = columns.require(frame, "attention_maps", "kind query query_end key key_end weight moved").drop("moved")
    below = {"nice": False, "tickCount": 4, "labelSeparation": 6}  # pixels: "100 200", not "100200"

    def draw(kind: str, last: bool) -> marks.Plot:
        own, first, words = marks.only(kind=kind), kind == "exact", KINDS[kind]
        size = own.transform_calculate(size="isValid(datum.weight) ? abs(datum.weight) : null")
        left = {"nice": False, "reverse": True, "tickCount": 4, "labels": first, "minExtent": 40 if first else 0}
        # no text for a screen reader on each of 630 cells; the caption has the important numbers
        cells = columns.on_log_scale(size, "size", WEIGHTS).mark_rect(cursor="pointer", aria=False)
        cells = cells.encode(
            x=columns.x("key", "" if kind == "compressed" else None, **below),
            x2=alt.X2("key_end:Q"),
            y=columns.y("query", "" if first else None, **left),
            y2=alt.Y2("query_end:Q"),
            color=columns.log_colour(
                "size",
                "attention weight",
                WEIGHTS,
                orient="bottom",
                gradientLength=220,
                values=columns.log_steps(1, low=-3, high=0),
            ),
            tooltip=columns.tips("query key", ("size", words, ".3~g")),
        )
        lost = own.transform_filter("!isValid(datum.weight)").mark_text(text="×", fontWeight="bold")
        name = alt.Chart().transform_aggregate(cells="count()").mark_text(text=words, align="left", baseline="bottom")
        name = name.encode(x=alt.value(0), y=alt.value(-5))
        crosses = lost.encode(x=alt.X("key:Q"), y=alt.Y("query:Q"))
        return marks.layered(cells, crosses, name, marks.token_rule(alt.Y))

    maps = marks.stacked(alt.HConcatChart, marks.panels(list(KINDS), draw, SIDE, SIDE), 12)
    said = caption or attention_caption(frame)
    return marks.framed([maps], shown, heading, said, shared=["color"], picks=[marks.PICKED_TOKEN])


def attention_caption(frame: pl.DataFrame) -> str:
    """State the share of attention that moves to other keys: the mean over queries, and the worst block."""
    lost = marks.broken(frame.height - frame.filter(pl.col("weight").is_finite()).height)
    rows = frame.filter(pl.col("kind") == "exact").group_by("query", "query_end").agg(pl.col("moved").first())
    rows = rows.filter(pl.col("moved").is_finite())
    if rows.is_empty():
        return lost
    queries = rows["query_end"] - rows["query"]
    mean = sum(rows["moved"] * queries) / sum(queries)
    worst = rows.sort("moved", "query").row(-1, named=True)
    most = f"most, {100 * worst['moved']:.1f} %, for queries {worst['query']} to {worst['query_end'] - 1}"
    return marks.sentence(f"{100 * mean:.1f} % of attention moves to other keys", most, lost)
