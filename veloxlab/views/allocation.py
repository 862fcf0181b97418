"""Charts of allocations: bits of each KV head, predicted losses, and the worth of bits for keys and for values."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.measure.frames import in_schema
from veloxlab.views import columns, marks, theme

EXACT = "none"
KINDS = {  # of plans: colour and shape; any other kind is the name of a method
    "allocated": (theme.CHOSEN, theme.METHODS["ratequant"][1]),
    "uniform": (theme.NEUTRAL, theme.METHODS["turboquant"][1]),
}
FAINTEST = 0.12  # opacity of the fewest bits, at which a cell is still visible


def kinds_of(frame: pl.DataFrame) -> list[str]:
    """Return the kinds of plans in a frame."""
    own = frame["kind"].unique(maintain_order=True).to_list()
    return [kind for kind in KINDS if kind in own] + [kind for kind in own if kind not in KINDS]


def _looks(frame: pl.DataFrame, part: int) -> dict[str, str]:
    return {kind: (KINDS.get(kind) or theme.look_of(kind))[part] for kind in kinds_of(frame)}


def allocation_map(
    frame: pl.DataFrame, *, least: int | None = None, most: int | None = None, caption: str = ""
) -> alt.VConcatChart:
    """Draw the code bits of every layer and KV head, keys above values: the fuller the colour, the more bits.

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``), ``method`` and ``bits``. Cells of the method
    ``"none"`` are kept exact, and are grey. Tooltips show the column ``predicted_loss`` if the frame has it. ``least``,
    ``most``: ends of the scale in code bits; set them to keep the colours steady while a slider moves.
    """
    told = "predicted_loss" in frame.columns
    needed = "layer head tensor method bits" + " predicted_loss" * told
    shown = columns.require(frame, "allocation_map", needed).sort("tensor", "layer", "head")
    bits = shown.filter(pl.col("method") != EXACT)["bits"].to_list() or [1]
    low, high = min(bits) if least is None else least, max(bits) if most is None else most
    widths = list(range(low, high + 1))
    grid = marks.HeadMap(shown)
    pooled = {"bits": "mean(bits)", "exact": "mean(is_exact)", "lost": "sum(predicted_loss)" if told else "count()"}

    def draw(tensor: str, last: bool) -> marks.Plot:
        colour = theme.TENSORS[tensor]
        base = grid.cells(tensor, {"is_exact": f"datum.method === '{EXACT}' ? 1 : 0"}, pooled, last=last, gap=0.06)
        tooltip = columns.tips("layer", ("group", grid.words), ("bits", f"bits of {tensor}"), "lost" * told)
        legend = alt.Legend(
            title="bits", values=widths, format="d", symbolFillColor=colour, symbolType="square", symbolSize=120,
            symbolStrokeWidth=0, direction="vertical", columns=1 if len(widths) <= 3 else 2,
        )  # fmt: skip
        scale = alt.Scale(domain=[low, max(high, low + 1)], range=[FAINTEST, 1], clamp=True)
        base = base.encode(tooltip=tooltip)
        coded = base.transform_filter("datum.exact < 1").mark_rect(color=colour, cursor="pointer")
        exact = base.transform_filter("datum.exact === 1").mark_rect(color=theme.NEUTRAL, cursor="pointer")
        opacity = alt.Opacity("bits:Q", legend=legend, scale=scale)
        return marks.layered(coded.encode(opacity=opacity), exact, marks.picked_outline())

    maps = marks.panels(grid.tensors, draw, grid.width, grid.height)
    said = caption or allocation_caption(frame)
    return marks.framed(maps, shown, "Code bits of each layer and KV head", said, pickable=True)


def allocation_caption(frame: pl.DataFrame) -> str:
    """State the mean code bits of keys and of values, the least and most of each, and how many heads are exact."""
    coded = frame.filter(pl.col("method") != EXACT)
    said = [
        f"{tensor} {sum(bits) / len(bits):.2f} bits on average, {min(bits):.3g} to {max(bits):.3g}"
        for tensor, bits in ((tensor, own["bits"].to_list()) for tensor, own in marks.by_tensor(coded))
    ]
    exact = frame.height - coded.height
    return marks.sentence(*said, f"grey: {exact} kept exact" if exact else "")


def loss_by_layer(frame: pl.DataFrame, *, unit: str = "nats a token", caption: str = "") -> alt.VConcatChart:
    """Draw the predicted loss of each layer, allocated and with uniform bits side by side.

    Rows of ``layer``, ``kind`` (``"allocated"``, ``"uniform"`` or a method) and ``predicted_loss``; rows of a
    layer and kind add up. ``unit``: of the loss.
    """
    needed = columns.require(frame, "loss_by_layer", "layer kind predicted_loss")
    shown = needed.group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
    bars = alt.Chart().mark_bar(cursor="pointer")
    bars = bars.encode(
        x=marks.layer_axis(gap=0.2),
        xOffset=alt.XOffset("kind:N").scale(domain=kinds_of(shown)),
        y=columns.y("predicted_loss", ["predicted loss", unit], tickCount=4, format="~g", zero=True),
        color=marks.scaled(alt.Color, "kind", _looks(shown, 0)),
        tooltip=columns.tips("layer kind", ("predicted_loss", f"predicted ({unit})", ".3g")),
    )
    plot = marks.beside_layers(shown["layer"].n_unique(), 100, bars)
    said = caption or loss_caption(frame, unit=unit)
    return marks.framed([plot], shown, "Predicted loss of each layer, at equal bytes", said, pickable=True)


def loss_caption(frame: pl.DataFrame, *, unit: str = "nats a token") -> str:
    """State the predicted losses of all layers, and the ratio of the loss of uniform bits to ours."""
    sums = dict(frame.group_by("kind").agg(pl.col("predicted_loss").sum()).iter_rows())
    said = [f"{kind} {sums[kind]:.3g}" for kind in kinds_of(frame)]
    ours = next((sums[kind] for kind in kinds_of(frame) if kind != "uniform"), 0.0)
    times = f": {sums['uniform'] / ours:.2f} times as much" if "uniform" in sums and ours else ""
    return f"Predicted, {unit}: {', '.join(said)}{times}"


STEPS = 160  # points drawn of a predicted line; a page shows no more
ROWS = {
    "role": pl.String,  # "line", "now" or "measured"
    "kind": pl.String,  # "allocated", "uniform" or a method
    "true_bits": pl.Float64,
    "loss": pl.Float64,
    "name": pl.String,  # of a measured plan
}
"""Columns of `frontier_rows`."""


def budget_frontier(
    rows: pl.DataFrame,
    *,
    unit: str = "nats a token",
    bits: tuple[float, float] | None = None,
    domain: columns.Domain | None = None,
    caption: str = "",
) -> alt.VConcatChart:
    """Draw the least predicted loss at each number of bits, that of uniform bits, one plan, and measurements.

    Dashed lines and hollow points are predicted. Full points are measured. A loss of zero is drawn at the floor.
    ``rows``: from `frontier_rows`. ``unit``: of the loss. ``bits``, ``domain``: ends of the scales of true bits and of
    the loss; set them to keep the scales steady while a slider moves.
    """
    columns.require(rows, "budget_frontier", *ROWS)
    scale = domain or columns.log_domain(rows["loss"])
    ends = list(bits or rows.select(pl.min("true_bits"), most=pl.max("true_bits")).row(0))
    title = "true bits per packed value, scales included"
    base = columns.on_log_scale(alt.Chart(), "loss", scale).encode(
        x=columns.x("true_bits", title, domain=ends, nice=False, padding=8, tickCount=7, grid=True),
        y=columns.log_y("loss", ["loss", unit], scale),
        color=marks.scaled(alt.Color, "kind", _looks(rows, 0)),
    )
    lines, now, measured = (base.transform_filter(f"datum.role === '{role}'") for role in ("line", "now", "measured"))
    gap = now.transform_aggregate(low="min(loss_drawn)", high="max(loss_drawn)", at="mean(true_bits)")
    gap = gap.mark_rule(strokeWidth=1).encode(
        x=alt.X("at:Q"), y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=alt.value(theme.NEUTRAL)
    )
    told = {
        "shape": marks.scaled(alt.Shape, "kind", _looks(rows, 1)),
        "tooltip": columns.tips(("said", "loss"), "name true_bits", ("loss", unit, ".3g")),
    }
    now, measured = (
        rows.transform_calculate(said=f"'{how}, ' + datum.kind")
        for rows, how in ((now, "predicted"), (measured, "measured"))
    )
    words = now.transform_calculate(short="format(datum.loss, '.3~g')").mark_text(align="left", dx=11, fontWeight=600)
    plot = marks.layered(
        lines.mark_line(strokeWidth=1.5, strokeDash=[5, 4], clip=True),
        gap,
        now.mark_point(filled=False, strokeWidth=2.5, size=110, opacity=1).encode(**told),
        measured.mark_point(filled=True, size=60, opacity=1).encode(**told),
        words.encode(text=alt.Text("short:N")),
    )
    plots = [marks.sized(plot, theme.WIDTH - 20, 230)]
    said = caption or marks.sentence(*columns.not_drawn(rows["loss"]))
    return marks.framed(plots, rows, "Loss against bits: dashed and hollow predicted, full measured", said)


def frontier_rows(
    lines: pl.DataFrame, now: pl.DataFrame | None = None, measured: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Put the data of `budget_frontier` into one frame with the columns `ROWS`.

    ``lines``: rows of ``kind``, ``true_bits`` and ``predicted_loss``, such as `veloxlab.RateBudget.frontier`. A kind
    with more than `STEPS` rows is thinned to about that many, evenly, with the first and the last. ``now``: the same
    columns for the selected plan, and for uniform bits in the same bytes. ``measured``: rows of ``kind``,
    ``true_bits``, ``kl_mean`` (nats) and ``name``.
    """
    columns.require(lines, "frontier_rows", "kind true_bits predicted_loss")
    place, count = pl.int_range(pl.len()).over("kind"), pl.len().over("kind")
    stride = (count / STEPS).ceil()
    thin = lines.sort("kind", "true_bits").filter((place % stride == 0) | (place == count - 1))
    lost, nameless = "predicted_loss", pl.lit("")
    parts = (thin, "line", lost, nameless), (now, "now", lost, nameless), (measured, "measured", "kl_mean", "name")
    return pl.concat(
        in_schema(frame.with_columns(role=pl.lit(role), loss=loss, name=name), ROWS)
        for frame, role, loss, name in parts
        if frame is not None
    )


def sensitivity_by_layer(
    frame: pl.DataFrame, *, unit: str = "nats a unit of error", domain: columns.Domain | None = None, caption: str = ""
) -> alt.VConcatChart:
    """Draw the sensitivities of each layer's KV heads: a point at the mean, and a line from the least to the greatest.

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``) and ``sensitivity``. Values that are not above
    zero are not drawn, and the caption counts them. ``unit``: of a sensitivity; the unit of an error is ½·E‖x − x̂‖²/D.
    ``domain``: least and greatest value of the scale.
    """
    columns.require(frame, "sensitivity_by_layer", "layer head tensor sensitivity")
    value = pl.col("sensitivity")
    above = frame.filter(value.is_finite() & (value > 0))
    shown = above.group_by("layer", "tensor").agg(mean=value.mean(), least=value.min(), greatest=value.max())
    shown = shown.sort("tensor", "layer")
    scale = domain or columns.log_domain(above["sensitivity"])
    rows = alt.Chart()
    for field in ("mean", "least", "greatest"):
        rows = columns.on_log_scale(rows, field, scale)
    base = rows.encode(
        x=marks.layer_axis(gap=0.12),
        xOffset=alt.XOffset("tensor:N").scale(domain=list(theme.TENSORS)),
        color=marks.tensor_colour(),
    )
    spans = base.mark_rule(strokeWidth=2, opacity=0.55).encode(y=alt.Y("least_drawn:Q"), y2=alt.Y2("greatest_drawn:Q"))
    dots = base.mark_point(filled=True, size=34, opacity=1, cursor="pointer").encode(
        y=columns.log_y("mean", ["sensitivity", unit], scale),
        tooltip=columns.tips("layer tensor", ("mean", "mean of its heads"), "least greatest"),
        shape=marks.scaled(alt.Shape, "tensor", theme.TENSOR_SHAPES),
    )
    plot = marks.beside_layers(shown["layer"].n_unique(), 130, spans, dots)
    said = caption or sensitivity_caption(frame)
    return marks.framed([plot], shown, "Sensitivity of the loss to errors in keys and values", said, pickable=True)


def sensitivity_caption(frame: pl.DataFrame) -> str:
    """State the unevenness of each tensor's heads (mean over geometric mean), and the greatest sensitivity."""
    value, said = pl.col("sensitivity"), []
    for tensor, own in marks.by_tensor(frame.filter(value.is_finite(), value > 0)):
        ratio = own.select(value.mean() / value.log().mean().exp()).item()
        most = own.sort("sensitivity").row(-1, named=True)
        said.append(
            f"{tensor}: mean {ratio:.2f}× the geometric mean, most in layer {most['layer']}, head {most['head']}"
        )
    return marks.sentence(*said, *columns.not_drawn(frame["sensitivity"], zero=True))


CELL = 62  # pixels
SIZE = 900  # square pixels


def bit_plane(frame: pl.DataFrame, *, domain: columns.Domain | None = None, caption: str = "") -> alt.VConcatChart:
    """Draw the divergence of each pair of widths, and outline the best pair of each budget.

    Rows of ``key_bits`` and ``value_bits`` (bits of a code) and ``kl`` (nats), one for each pair. Pairs with the same
    sum of bits share a budget. A divergence of zero is drawn at the floor; a value that is not finite is left out.
    ``domain``: least and greatest KL of the scale; set it to compare charts.
    """
    needed = columns.require(frame, "bit_plane", "key_bits value_bits kl")
    best = best_pairs(needed).select("key_bits", "value_bits", best=True)
    shown = needed.join(best, on=["key_bits", "value_bits"], how="left").with_columns(pl.col("best").fill_null(False))
    scale = domain or columns.log_domain(shown["kl"])
    base = columns.on_log_scale(alt.Chart(), "kl", scale).encode(
        x=columns.x("value_bits:O", "code bits of values"),
        y=columns.y("key_bits:O", "code bits of keys", reverse=True),
        tooltip=columns.tips("key_bits value_bits kl"),
    )
    cells = base.mark_square(size=SIZE, opacity=1).encode(color=columns.log_colour("kl", "nats", scale))
    outlined = base.transform_filter("datum.best").mark_square(
        size=SIZE, filled=False, stroke=theme.PICKED, strokeWidth=3, strokeOpacity=1
    )
    # below the square: no text colour is legible on all colours of the scale
    words = base.mark_text(fontSize=11, dy=24).encode(text=alt.Text("kl:Q", format=".2~g"))
    widths = [needed[name].n_unique() for name in ("value_bits", "key_bits")]
    plot = marks.sized(marks.layered(cells, outlined, words), *(CELL * count for count in widths))
    return marks.framed([plot], shown, "KL divergence by bits of keys and of values", caption or plane_caption(frame))


def best_pairs(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the pair with the least finite ``kl`` for each sum of bits that several pairs have, sorted by the sum."""
    sums = frame.filter(pl.col("kl").is_finite()).with_columns(sum=pl.col("key_bits") + pl.col("value_bits"))
    several = sums.filter(pl.len().over("sum") > 1)
    return several.sort("sum", "kl").group_by("sum", maintain_order=True).first()


def plane_caption(frame: pl.DataFrame) -> str:
    """State the best pair of each budget, and the number of pairs that are not drawn."""
    pairs = [f"K{key} V{value}" for key, value in best_pairs(frame).select("key_bits", "value_bits").iter_rows()]
    said = f"Outlined, the best pair of each sum of bits: {', '.join(pairs)}" if pairs else ""
    return marks.sentence(said, *columns.not_drawn(frame["kl"]))
