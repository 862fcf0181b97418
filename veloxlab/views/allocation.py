"""Which KV head gets how many bits, and what each layer is predicted to lose by it, beside uniform bits."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.errors import MARKS
from veloxlab.views.furniture import (
    Plot,
    caption_title,
    framed,
    layer_axis,
    layer_columns,
    layer_step,
    layer_width,
    picked_outline,
)

EXACT = "none"
SIDES = palette.TENSORS  # a side is drawn in its tensor's colour
KINDS = {"allocated": "ratequant", "uniform": "turboquant"}  # whose colours they have
FAINTEST = 0.12  # opacity of the fewest bits: still a cell


def allocation_map(
    frame: pl.DataFrame, *, least: int | None = None, most: int | None = None, caption: str | None = None
) -> alt.VConcatChart:
    """Draw the code bits of every layer and KV head, keys above values: the fuller the colour, the more bits.

    Parameters
    ----------
    frame
        Rows of ``layer``, ``head``, ``side`` (``"keys"`` or ``"values"``), ``method`` and ``bits``; cells of the method
        ``"none"`` are kept exact, and grey. A column ``predicted_loss`` is told of each cell where there is one.
    least, most
        Ends of the scale in code bits; give them to keep a slider's colours steady.
    caption
        The line under the heading; by default the means of keys and of values.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    needed = {"layer": "number", "head": "number", "side": "text", "method": "text", "bits": "number"}
    require(frame, needed, "allocation_map")  # type: ignore[arg-type]
    told = [name for name in ("predicted_loss",) if name in frame.columns]
    shown = frame.select(*needed, *told).sort("side", "layer", "head")
    coded = shown.filter(pl.col("method") != EXACT)["bits"]
    widths = coded.to_list() or [1]
    low, high = min(widths) if least is None else least, max(widths) if most is None else most
    sides = [side for side in SIDES if side in set(shown["side"])]
    layers, heads = shown["layer"].n_unique(), shown["head"].n_unique()
    group = math.ceil(layers * heads * len(sides) / MARKS)
    step = layer_step(layers)
    tall = max(min(step, 18), 6, 40 / heads)
    maps = [
        _cells(side, (low, high), group, last=side == sides[-1], told=bool(told)).properties(
            width=alt.Step(step), height=alt.Step(tall)
        )
        for side in sides
    ]
    maps[0] = maps[0].properties(title=caption_title())
    words = allocation_caption(frame) if caption is None else caption
    return framed(maps, shown, "Code bits of each layer and KV head", words, pickable=True)


def allocation_caption(frame: pl.DataFrame) -> str:
    """Say the mean code bits of keys and of values, the least and most of each, and how many heads are exact."""
    said = []
    for side in SIDES:
        bits = frame.filter(pl.col("side") == side, pl.col("method") != EXACT)["bits"]
        if not bits.is_empty():
            widths = bits.to_list()
            mean = sum(widths) / len(widths)
            said.append(f"{side} {mean:.2f} bits on average, {min(widths):g} to {max(widths):g}")
    exact = frame.filter(pl.col("method") == EXACT).height
    return "; ".join([*said, *([f"grey: {exact} kept exact"] if exact else [])])


def _cells(side: str, scale: tuple[int, int], group: int, *, last: bool, told: bool) -> Plot:
    heads = "KV head" if group == 1 else f"KV heads, by {group}"
    lost = "sum(predicted_loss)" if told else "count()"
    pooled = (
        alt.Chart()
        .transform_filter(f"datum.side === '{side}'")
        .transform_calculate(
            group=f"floor(datum.head / {group}) * {group}", is_exact=f"datum.method === '{EXACT}' ? 1 : 0"
        )
        .transform_aggregate(bits="mean(bits)", exact="mean(is_exact)", lost=lost, groupby=["layer", "group"])
        .encode(x=layer_axis(labelled=last, gap=0.06), y=alt.Y("group:O", title=[side, heads]).scale(paddingInner=0.06))
    )
    tooltip = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("group:O", title=heads),
        alt.Tooltip("bits:Q", title=f"bits of {side}", format=".3~g"),
    ]
    if told:
        tooltip.append(alt.Tooltip("lost:Q", title="predicted loss", format=".2g"))
    low, high = scale
    widths = list(range(low, high + 1))
    legend = alt.Legend(
        title="bits", values=widths, format="d", symbolFillColor=SIDES[side], symbolType="square", symbolSize=120,
        symbolStrokeWidth=0, direction="vertical", columns=1 if len(widths) <= 3 else 2,
    )  # fmt: skip
    opacity = alt.Opacity("bits:Q", legend=legend).scale(
        domain=[low, max(high, low + 1)], range=[FAINTEST, 1], clamp=True
    )
    coded = (
        pooled.transform_filter("datum.exact < 1")
        .mark_rect(color=SIDES[side], cursor="pointer")
        .encode(opacity=opacity, tooltip=tooltip)
    )
    exact = (
        pooled.transform_filter("datum.exact === 1")
        .mark_rect(color=palette.NEUTRAL, cursor="pointer")
        .encode(tooltip=tooltip)
    )
    return alt.layer(coded, exact, picked_outline())


def loss_by_layer(frame: pl.DataFrame, *, unit: str = "nats a token", caption: str | None = None) -> alt.VConcatChart:
    """Draw what each layer is predicted to lose, allocated and with uniform bits side by side.

    Parameters
    ----------
    frame
        Rows of ``layer``, ``kind`` (``"allocated"`` or ``"uniform"``) and ``predicted_loss``; rows of a layer and kind
        add up.
    unit
        Of the loss.
    caption
        The line under the heading; by default the sums.

    Returns
    -------
    alt.VConcatChart
        A chart with the params ``caption`` and ``picked_layer``.
    """
    require(frame, {"layer": "number", "kind": "text", "predicted_loss": "number"}, "loss_by_layer")
    shown = frame.group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
    colours = [palette.METHODS[method][0] for method in KINDS.values()]
    bars = (
        alt.Chart()
        .mark_bar(cursor="pointer")
        .encode(
            x=layer_axis(labelled=True, gap=0.2),
            xOffset=alt.XOffset("kind:N").scale(domain=list(KINDS)),
            y=alt.Y("predicted_loss:Q", title=["predicted loss", unit]).axis(tickCount=4, format="~g").scale(zero=True),
            color=alt.Color("kind:N", title=None).scale(domain=list(KINDS), range=colours),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("kind:N"),
                alt.Tooltip("predicted_loss:Q", title=f"predicted ({unit})", format=".3g"),
            ],
        )
    )
    plot = alt.layer(layer_columns(), bars, picked_outline()).properties(
        width=layer_width(shown["layer"].n_unique()), height=100, title=caption_title()
    )
    words = loss_caption(frame, unit=unit) if caption is None else caption
    return framed([plot], shown, "Predicted loss of each layer, in equal bytes", words, pickable=True)


def loss_caption(frame: pl.DataFrame, *, unit: str = "nats a token") -> str:
    """Say the predicted losses of all layers, and how many times as much uniform bits lose."""
    sums = dict(frame.group_by("kind").agg(pl.col("predicted_loss").sum()).iter_rows())
    said = [f"{kind} {sums[kind]:.3g}" for kind in KINDS if kind in sums]
    times = f": {sums['uniform'] / sums['allocated']:.2f} times as much" if len(said) == 2 and sums["allocated"] else ""
    return f"Predicted, {unit}: {', '.join(said)}{times}"
