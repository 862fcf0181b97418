"""Which KV head gets how many bits, and what each layer is predicted to lose by it, beside uniform bits."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.errors import MARKS
from veloxlab.views.furniture import (
    Plot,
    framed,
    layer_axis,
    layer_step,
    layer_width,
    over_layers,
    picked_outline,
    require,
    tips,
)
from veloxlab.views.scales import Domain, log_domain, log_y, not_drawn, on_log_scale

EXACT = "none"
KINDS = {"allocated": "ratequant", "uniform": "turboquant"}  # whose colours they have
FAINTEST = 0.12  # opacity of the fewest bits: still a cell


def allocation_map(
    frame: pl.DataFrame, *, least: int | None = None, most: int | None = None, caption: str | None = None
) -> alt.VConcatChart:
    """Draw the code bits of every layer and KV head, keys above values: the fuller the colour, the more bits.

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``), ``method`` and ``bits``; cells of the method
    ``"none"`` are kept exact, and grey. A column ``predicted_loss`` is told of each cell where there is one. ``least``,
    ``most``: ends of the scale in code bits; give them to keep a slider's colours steady.
    """
    needed = ("layer", "head", "tensor", "method", "bits")
    require(frame, "allocation_map", *needed)
    told = [name for name in ("predicted_loss",) if name in frame.columns]
    shown = frame.select(*needed, *told).sort("tensor", "layer", "head")
    coded = shown.filter(pl.col("method") != EXACT)["bits"]
    widths = coded.to_list() or [1]
    low, high = min(widths) if least is None else least, max(widths) if most is None else most
    tensors = [tensor for tensor in theme.TENSORS if tensor in set(shown["tensor"])]
    layers, heads = shown["layer"].n_unique(), shown["head"].n_unique()
    group = math.ceil(layers * heads * len(tensors) / MARKS)
    step = layer_step(layers)
    tall = max(min(step, 18), 6, 40 / heads)
    maps = [
        _cells(tensor, (low, high), group, last=tensor == tensors[-1], told=bool(told)).properties(
            width=alt.Step(step), height=alt.Step(tall)
        )
        for tensor in tensors
    ]
    return framed(maps, shown, "Code bits of each layer and KV head", caption, allocation_caption(frame), pickable=True)


def allocation_caption(frame: pl.DataFrame) -> str:
    """Say the mean code bits of keys and of values, the least and most of each, and how many heads are exact."""
    said = []
    for tensor in theme.TENSORS:
        bits = frame.filter(pl.col("tensor") == tensor, pl.col("method") != EXACT)["bits"]
        if not bits.is_empty():
            widths = bits.to_list()
            mean = sum(widths) / len(widths)
            said.append(f"{tensor} {mean:.2f} bits on average, {min(widths):g} to {max(widths):g}")
    exact = frame.filter(pl.col("method") == EXACT).height
    return "; ".join([*said, *([f"grey: {exact} kept exact"] if exact else [])])


def _cells(tensor: str, scale: tuple[int, int], group: int, *, last: bool, told: bool) -> Plot:
    heads = "KV head" if group == 1 else f"KV heads, by {group}"
    lost = "sum(predicted_loss)" if told else "count()"
    pooled = (
        alt.Chart()
        .transform_filter(f"datum.tensor === '{tensor}'")
        .transform_calculate(
            group=f"floor(datum.head / {group}) * {group}", is_exact=f"datum.method === '{EXACT}' ? 1 : 0"
        )
        .transform_aggregate(bits="mean(bits)", exact="mean(is_exact)", lost=lost, groupby=["layer", "group"])
        .encode(
            x=layer_axis(labelled=last, gap=0.06), y=alt.Y("group:O", title=[tensor, heads]).scale(paddingInner=0.06)
        )
    )
    tooltip = tips("layer:O", ("group:O", heads), ("bits:Q", f"bits of {tensor}", ".3~g"))
    if told:
        tooltip.append(alt.Tooltip("lost:Q", title="predicted loss", format=".2g"))
    low, high = scale
    widths = list(range(low, high + 1))
    legend = alt.Legend(
        title="bits", values=widths, format="d", symbolFillColor=theme.TENSORS[tensor], symbolType="square",
        symbolSize=120, symbolStrokeWidth=0, direction="vertical", columns=1 if len(widths) <= 3 else 2,
    )  # fmt: skip
    opacity = alt.Opacity("bits:Q", legend=legend).scale(
        domain=[low, max(high, low + 1)], range=[FAINTEST, 1], clamp=True
    )
    coded = (
        pooled.transform_filter("datum.exact < 1")
        .mark_rect(color=theme.TENSORS[tensor], cursor="pointer")
        .encode(opacity=opacity, tooltip=tooltip)
    )
    exact = (
        pooled.transform_filter("datum.exact === 1")
        .mark_rect(color=theme.NEUTRAL, cursor="pointer")
        .encode(tooltip=tooltip)
    )
    return alt.layer(coded, exact, picked_outline())


def loss_by_layer(frame: pl.DataFrame, *, unit: str = "nats a token", caption: str | None = None) -> alt.VConcatChart:
    """Draw what each layer is predicted to lose, allocated and with uniform bits side by side.

    Rows of ``layer``, ``kind`` (``"allocated"`` or ``"uniform"``) and ``predicted_loss``; rows of a layer and kind add
    up. ``unit``: of the loss.
    """
    require(frame, "loss_by_layer", "layer", "kind", "predicted_loss")
    shown = frame.group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
    colours = [theme.METHODS[method][0] for method in KINDS.values()]
    bars = (
        alt.Chart()
        .mark_bar(cursor="pointer")
        .encode(
            x=layer_axis(labelled=True, gap=0.2),
            xOffset=alt.XOffset("kind:N").scale(domain=list(KINDS)),
            y=alt.Y("predicted_loss:Q", title=["predicted loss", unit]).axis(tickCount=4, format="~g").scale(zero=True),
            color=alt.Color("kind:N", title=None).scale(domain=list(KINDS), range=colours),
            tooltip=tips("layer:O", "kind:N", ("predicted_loss:Q", f"predicted ({unit})", ".3g")),
        )
    )
    plot = over_layers(bars).properties(width=layer_width(shown["layer"].n_unique()), height=100)
    usual = loss_caption(frame, unit=unit)
    return framed([plot], shown, "Predicted loss of each layer, at equal bytes", caption, usual, pickable=True)


def loss_caption(frame: pl.DataFrame, *, unit: str = "nats a token") -> str:
    """Say the predicted losses of all layers, and how many times as much uniform bits lose."""
    sums = dict(frame.group_by("kind").agg(pl.col("predicted_loss").sum()).iter_rows())
    said = [f"{kind} {sums[kind]:.3g}" for kind in KINDS if kind in sums]
    times = f": {sums['uniform'] / sums['allocated']:.2f} times as much" if len(said) == 2 and sums["allocated"] else ""
    return f"Predicted, {unit}: {', '.join(said)}{times}"


STEPS = 160  # of the predicted line that are drawn: a page shows no more
ROWS = {
    "role": pl.String,  # "line", "now" or "measured"
    "kind": pl.String,  # "allocated" or "uniform"
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
    domain: Domain | None = None,
    caption: str | None = None,
) -> alt.VConcatChart:
    """Draw the least predicted loss at every number of bits and uniform bits' beside it, one plan, and measurements.

    Dashed lines and hollow points are predicted; full points are measured. A loss of zero is drawn at the floor.

    What `frontier_rows` gives. ``unit``: of the loss. ``bits``, ``domain``: ends of the scales of true bits and of the
    loss; give them to keep them steady while a slider moves.
    """
    require(rows, "budget_frontier", "role", "kind", "true_bits", "loss", "name")
    scale = domain or log_domain(rows["loss"])
    width = bits or (float(rows["true_bits"].min()), float(rows["true_bits"].max()))  # type: ignore[arg-type]
    colours = [theme.METHODS[method][0] for method in KINDS.values()]
    shapes = [theme.METHODS[method][1] for method in KINDS.values()]
    base = on_log_scale(alt.Chart(), "loss", scale).encode(
        x=alt.X("true_bits:Q", title="true bits a packed value, scales included")
        .scale(domain=list(width), nice=False, padding=8)
        .axis(tickCount=7, grid=True),
        y=log_y("loss", ["loss", unit], scale),
        color=alt.Color("kind:N", title=None).scale(domain=list(KINDS), range=colours),
    )
    shape = alt.Shape("kind:N", title=None).scale(domain=list(KINDS), range=shapes)
    tooltip = tips(("said:N", "loss"), "name:N", ("true_bits:Q", "true bits", ".3f"), ("loss:Q", unit, ".3g"))
    lines = base.transform_filter("datum.role === 'line'").mark_line(strokeWidth=1.5, strokeDash=[5, 4], clip=True)
    now = base.transform_filter("datum.role === 'now'").transform_calculate(said="'predicted, ' + datum.kind")
    gap = (
        now.transform_aggregate(low="min(loss_drawn)", high="max(loss_drawn)", at="mean(true_bits)")
        .mark_rule(strokeWidth=1, color=theme.NEUTRAL)
        .encode(x="at:Q", y="low:Q", y2="high:Q", color=alt.value(theme.NEUTRAL))
    )
    predicted = now.mark_point(filled=False, strokeWidth=2.5, size=110, opacity=1).encode(shape=shape, tooltip=tooltip)
    words = now.transform_calculate(short="format(datum.loss, '.3~g')").mark_text(align="left", dx=11, fontWeight=600)
    measured = (
        base.transform_filter("datum.role === 'measured'")
        .transform_calculate(said="'measured, ' + datum.kind")
        .mark_point(filled=True, size=60, opacity=1)
        .encode(shape=shape, tooltip=tooltip)
    )
    plot = alt.layer(lines, gap, predicted, measured, words.encode(text="short:N")).properties(
        width=theme.WIDTH - 20, height=230
    )
    usual = "; ".join(not_drawn(rows["loss"]))
    return framed([plot], rows, "Loss against bits: dashed and hollow predicted, full measured", caption, usual)


def frontier_rows(
    lines: pl.DataFrame, now: pl.DataFrame | None = None, measured: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Put what the chart reads into one frame, `ROWS`.

    ``lines``: rows of ``kind``, ``true_bits`` and ``predicted_loss``, such as `veloxlab.RateBudget.frontier`; of more
    than `STEPS` steps of a kind, about as many are taken, evenly spread, with the first and the last. ``now``: the same
    columns, of the plan that is looked at, and of uniform bits in its bytes. ``measured``: rows of ``kind``,
    ``true_bits``, ``kl_mean`` (nats) and ``name``.
    """
    require(lines, "frontier_rows", "kind", "true_bits", "predicted_loss")
    place, count = pl.int_range(pl.len()).over("kind"), pl.len().over("kind")
    stride = (count / STEPS).ceil()
    thin = lines.sort("kind", "true_bits").filter((place % stride == 0) | (place == count - 1))
    parts = [_part(thin, "line", "predicted_loss")]
    if now is not None:
        parts.append(_part(now, "now", "predicted_loss"))
    if measured is not None:
        parts.append(_part(measured, "measured", "kl_mean"))
    return pl.concat(parts)


def _part(frame: pl.DataFrame, role: str, loss: str) -> pl.DataFrame:
    name = pl.col("name") if "name" in frame.columns else pl.lit("")
    return frame.select(role=pl.lit(role), kind="kind", true_bits="true_bits", loss=loss, name=name).cast(ROWS)  # type: ignore[arg-type]


def sensitivity_by_layer(
    frame: pl.DataFrame,
    *,
    unit: str = "nats a unit of error",
    domain: Domain | None = None,
    caption: str | None = None,
) -> alt.VConcatChart:
    """Draw the sensitivities of each layer's KV heads: their mean as a point, from the least head to the greatest.

    Rows of ``layer``, ``head``, ``tensor`` (``"keys"`` or ``"values"``) and ``sensitivity``. What is not above zero has
    no place on the scale and is counted in the caption. ``unit``: of a sensitivity; an error's unit is ½·E‖x − x̂‖²/D.
    ``domain``: least and greatest value of the scale.
    """
    require(frame, "sensitivity_by_layer", "layer", "head", "tensor", "sensitivity")
    above = frame.filter(pl.col("sensitivity").is_finite() & (pl.col("sensitivity") > 0))
    value = pl.col("sensitivity")
    shown = above.group_by("layer", "tensor").agg(mean=value.mean(), least=value.min(), greatest=value.max())
    shown = shown.sort("tensor", "layer")
    scale = domain or log_domain(above["sensitivity"])
    tensors = list(theme.TENSORS)
    rows = alt.Chart()
    for field in ("mean", "least", "greatest"):
        rows = on_log_scale(rows, field, scale)
    marks = rows.encode(
        x=layer_axis(labelled=True, gap=0.12),
        xOffset=alt.XOffset("tensor:N").scale(domain=tensors),
        color=alt.Color("tensor:N", title=None).scale(domain=tensors, range=list(theme.TENSORS.values())),
    )
    y = log_y("mean", ["sensitivity", unit], scale)
    tooltip = tips(
        "layer:O",
        "tensor:N",
        ("mean:Q", "mean of its heads", ".3g"),
        ("least:Q", None, ".3g"),
        ("greatest:Q", None, ".3g"),
    )
    spans = marks.mark_rule(strokeWidth=2, opacity=0.55).encode(y=alt.Y("least_drawn:Q"), y2="greatest_drawn:Q")
    points = marks.mark_point(filled=True, size=34, opacity=1, cursor="pointer").encode(
        y=y, tooltip=tooltip, shape=alt.Shape("tensor:N", title=None).scale(domain=tensors, range=["circle", "square"])
    )
    plot = over_layers(spans, points).properties(width=layer_width(shown["layer"].n_unique()), height=130)
    usual = sensitivity_caption(frame)
    return framed([plot], shown, "Sensitivity of the loss to errors in keys and values", caption, usual, pickable=True)


def sensitivity_caption(frame: pl.DataFrame) -> str:
    """Say the spread of each tensor's heads, as the ratio of the arithmetic to the geometric mean, and the greatest."""
    said = []
    for tensor in theme.TENSORS:
        own = frame.filter(pl.col("tensor") == tensor, pl.col("sensitivity").is_finite(), pl.col("sensitivity") > 0)
        if not own.is_empty():
            ratio = own.select(pl.col("sensitivity").mean() / pl.col("sensitivity").log().mean().exp()).item()
            most = own.sort("sensitivity").row(-1, named=True)
            said.append(f"{tensor}: AM/GM {ratio:.2f}, most in layer {most['layer']}, head {most['head']}")
    return "; ".join([*said, *not_drawn(frame["sensitivity"], zero=True)])
