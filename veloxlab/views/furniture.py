"""What every chart has: a heading, a caption that can change, and where layers are drawn, an axis and a picked one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from veloxlab.views import palette

PICKED = "picked_layer"
IS_PICKED = f"datum.layer === {PICKED}"
ALTAIR_ROWS = 5_000
Plot = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart | alt.HConcatChart


def caption_title() -> alt.TitleParams:
    """Give the line under the heading, whose words are the param ``caption``."""
    return alt.TitleParams(text=alt.expr("caption"), style="caption")


def framed(
    plots: Sequence[Plot], data: pl.DataFrame, heading: str, caption: str, *, pickable: bool, dashed: bool = False
) -> alt.VConcatChart:
    """Stack plots under a heading and a caption.

    Parameters
    ----------
    plots
        The plots, from top to bottom; the first one carries ``caption_title()``.
    data
        The rows that all plots read.
    heading
        What is seen.
    caption
        First value of the param ``caption``.
    pickable
        Whether the plots mark the param ``picked_layer``.
    dashed
        Whether the plots tell lines apart by dashes, each in its own way.

    Returns
    -------
    alt.VConcatChart
        The chart, with its params.
    """
    params = [alt.param(name="caption", value=caption)]
    if pickable:
        params.append(alt.param(name=PICKED, value=None))
    dashes: dict[str, Any] = {"strokeDash": "independent"} if dashed else {}
    chart: alt.VConcatChart = (
        alt.vconcat(*plots, title=alt.TitleParams(text=heading), spacing=10)
        .add_params(*params)
        .resolve_scale(color="independent", opacity="independent", shape="independent", **dashes)
    )
    # Altair refuses longer frames for the marks they might become; ours are pooled before they are drawn
    chart.data = data if data.height <= ALTAIR_ROWS else alt.InlineData(values=data.to_dicts())
    return chart


def tensor_colour(*, legend: bool = True) -> alt.Color:
    """Give keys and values the colours that they have in every chart, and a legend where one is wanted."""
    names, colours = list(palette.TENSORS), list(palette.TENSORS.values())
    colour: alt.Color = alt.Color("tensor:N", title=None).scale(domain=names, range=colours)
    return colour if legend else colour.legend(None)


def method_look(methods: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Give methods the colours and shapes that they have in every chart, with one legend, in this order."""
    legend = alt.Legend(symbolOpacity=1, symbolSize=60)
    colours, shapes = [palette.colour_of(m) for m in methods], [palette.shape_of(m) for m in methods]
    return (
        alt.Color("method:N", title=None, legend=legend).scale(domain=methods, range=colours),
        alt.Shape("method:N", title=None, legend=legend).scale(domain=methods, range=shapes),
    )


def head_words(frame: pl.DataFrame) -> str:
    """Name the one layer and KV head of a frame."""
    return f"Layer {frame['layer'][0]}, KV head {frame['head'][0]}"


def layer_step(layers: int) -> float:
    """Give the width of one layer in pixels, so that a chart of any model is about as wide."""
    return min(palette.WIDTH / max(layers, 1), 40)


def layer_width(layers: int) -> float:
    """Give the width of all layers, for marks side by side in a layer: a step would be of one mark."""
    return layer_step(layers) * max(layers, 1)


def layer_axis(*, labelled: bool, gap: float = 0) -> alt.X:
    """Give the x axis that all plots by layer share, with a gap between layers as a share of a step."""
    axis = alt.Axis(title="layer") if labelled else alt.Axis(labels=False, title=None)
    return alt.X("layer:O", axis=axis).scale(paddingInner=gap, paddingOuter=gap / 2)


def layer_columns() -> alt.Chart:
    """Make every layer's full height something that can be clicked, whatever is drawn there."""
    columns: alt.Chart = (
        alt.Chart()
        .transform_aggregate(groupby=["layer"])
        .mark_rect(opacity=0, cursor="pointer", tooltip=None)
        .encode(x="layer:O")
    )
    return columns


def picked_outline() -> alt.Chart:
    """Draw a frame around the picked layer, over the full height of a plot and inside it, so that nothing moves."""
    outline: alt.Chart = (
        alt.Chart()
        .transform_filter(IS_PICKED)
        .transform_aggregate(groupby=["layer"])
        .mark_rect(
            filled=False,
            fill=None,
            stroke=palette.PICKED,
            strokeWidth=2,
            y2Offset=-2,
            cornerRadius=2,
            cursor="pointer",
        )
        .encode(x="layer:O", y=alt.value(2), y2=alt.value("height"))
    )
    return outline
