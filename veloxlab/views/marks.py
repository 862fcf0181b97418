"""Shared parts of charts: headings and captions, panels, axes, colours, common marks, and words of captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, TypeVar

import altair as alt
import polars as pl

from veloxlab.views import columns, theme

Look = dict[str, Any]  # properties of a mark, encodings or settings of an axis, by name
PICKED, PICKED_HEAD, PICKED_TOKEN, PICKED_POINT = "picked_layer", "picked_head", "picked_token", "picked_point"
IS_PICKED = f"datum.layer === {PICKED}"
ALTAIR_ROWS = 5_000
OWN_SCALES = ("color", "opacity", "shape", "strokeDash")
CELLS = 1_600  # of a map at most; more make a slider slow, so heads are then drawn in groups
CROSS: Look = {"text": "×", "fontSize": 13, "fontWeight": "bold", "color": theme.PICKED}  # not finite
ABOVE: Look = {"text": "\u25b2", "fontSize": 9, "color": theme.PICKED, "baseline": "bottom", "dy": -1}
STEP_AREA: Look = {"interpolate": "step", "opacity": 0.3, "line": {"interpolate": "step", "strokeWidth": 1.5}}
Channel = TypeVar("Channel", alt.Color, alt.Opacity, alt.Shape, alt.StrokeDash)
Stack = TypeVar("Stack", alt.VConcatChart, alt.HConcatChart)
Sized = TypeVar("Sized", bound="Plot")
Plot = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart | alt.HConcatChart


def framed(
    plots: Sequence[Plot],
    data: pl.DataFrame,
    heading: str,
    caption: str,
    *,
    pickable: bool = False,
    picks: Sequence[str] = (),
    shared: Sequence[str] = (),
) -> alt.VConcatChart:
    """Stack plots of the same rows under a heading and ``caption``; clicks in ``pickable`` plots set `PICKED`.

    ``picks``: params that other clicks set, such as `PICKED_TOKEN`.

    Each plot has its own scales of colour and shape, except for ``shared`` channels, which have one scale for all.
    """
    params = {"caption": caption} | dict.fromkeys([PICKED] * pickable + [*picks])
    plots[0].title = alt.TitleParams(text=alt.expr("caption"), style="caption")
    scales: Look = dict.fromkeys(shared, "shared") or dict.fromkeys(OWN_SCALES, "independent")
    chart: alt.VConcatChart = stacked(alt.VConcatChart, plots, 10)
    chart.title, chart.resolve = alt.TitleParams(text=heading), alt.Resolve(scale=alt.ScaleResolveMap(**scales))
    chart.params = [alt.VariableParameter(name, value=value) for name, value in params.items()]
    # Altair refuses long frames because of too many marks; our charts pool rows before they draw
    chart.data = data if data.height <= ALTAIR_ROWS else alt.InlineData(values=data.to_dicts())
    return chart


def stacked(kind: type[Stack], plots: Sequence[Plot], spacing: int) -> Stack:
    """Put plots below or beside each other. Altair's own functions copy each plot and its contents three times."""
    chart = kind(spacing=spacing)
    setattr(chart, "vconcat" if kind is alt.VConcatChart else "hconcat", [*plots])
    return chart


def layered(*marks: Plot, **encodings: Any) -> alt.LayerChart:
    """Lay marks over each other, with common ``encodings``, and without the copies that `alt.layer` makes."""
    chart: alt.LayerChart = alt.LayerChart().encode(**encodings) if encodings else alt.LayerChart()
    chart.layer = [*marks]
    return chart


def sized(plot: Sized, width: object, height: object) -> Sized:
    """Set the size of a new plot in place; ``plot.properties`` would copy its layers."""
    plot.width, plot.height = width, height
    return plot


def panels(items: Sequence[Any], draw: Callable[[Any, bool], Plot], width: object, height: object) -> list[Plot]:
    """Draw a panel of one size for each item; ``draw`` gets True for the last item, whose panel has the x axis."""
    return [sized(draw(item, item == items[-1]), width, height) for item in items]


def only(**values: object) -> alt.Chart:
    """Return a chart of the rows that have these values in these columns."""
    tests = (f"datum.{name} === {value!r}" for name, value in values.items())
    return alt.Chart().transform_filter(" && ".join(tests))


def scaled(channel: type[Channel], field: str, looks: Mapping[str, Any], *, legend: bool = True) -> Channel:
    """Return an encoding that maps each name in a field to its own look, with or without a legend."""
    scale: Channel = channel(f"{field}:N", title=None).scale(domain=list(looks), range=list(looks.values()))
    return scale if legend else scale.legend(None)


def cache_colour(caches: Sequence[str]) -> alt.Color:
    """Return the colour encoding of caches by their methods, without a legend."""
    return scaled(alt.Color, "cache", {name: theme.look_of(name)[0] for name in caches}, legend=False)


def tensor_colour(*, legend: bool = True) -> alt.Color:
    """Return the colour encoding of keys and values, which is the same in every chart."""
    return scaled(alt.Color, "tensor", theme.TENSORS, legend=legend)


def method_look(methods: Sequence[str]) -> dict[str, alt.Color | alt.Shape]:
    """Return the colour and shape encodings of methods, the same in every chart, with one legend in this order.

    Caches of other projects share a colour, and take the shapes `theme.OTHER_MARKS` in turn.
    """
    legend = alt.Legend(symbolOpacity=1, symbolSize=60)
    looks = {method: theme.look_of(method) for method in methods}
    others = [method for method, look in looks.items() if look == theme.OTHER_LOOK]
    looks |= {method: (theme.OTHER, mark) for method, mark in zip(others, cycle(theme.OTHER_MARKS), strict=False)}
    colours, shapes = ({method: look[i] for method, look in looks.items()} for i in (0, 1))
    colour, shape = scaled(alt.Color, "method", colours), scaled(alt.Shape, "method", shapes)
    return {"color": colour.legend(legend), "shape": shape.legend(legend)}


def part_opacity(field: str, parts: Mapping[str, float], colour: str) -> alt.Opacity:
    """Return the opacity encoding of the parts of a bar, with a legend."""
    opacity = scaled(alt.Opacity, field, parts)
    return opacity.legend(symbolFillColor=colour, symbolStrokeWidth=0, symbolType="square")


def points(base: alt.Chart, tooltip: list[alt.Tooltip], size: int = 34, **more: Any) -> alt.Chart:
    """Draw filled points with a tooltip; ``more`` are encodings."""
    return base.mark_point(filled=True, size=size, opacity=1).encode(tooltip=tooltip, **more)  # type: ignore[no-any-return]


def line_points(base: alt.Chart, tooltip: list[alt.Tooltip], size: int = 34, **more: Any) -> alt.LayerChart:
    """Draw a line and its points; ``more`` are encodings of the points."""
    return layered(base.mark_line(strokeWidth=1.5), points(base, tooltip, size, **more))


def crosses(base: alt.Chart, **encodings: Any) -> alt.Chart:
    """Mark the rows with values that are not finite, at the top of a plot unless ``y`` is given."""
    marks = base.transform_filter("datum.not_finite > 0").mark_text(**CROSS)
    return marks.encode(**({"y": alt.value(6)} | encodings))  # type: ignore[no-any-return]


def above(base: alt.Chart, field: str, most: float, **encodings: Any) -> alt.Chart:
    """Mark the rows whose field is above the scale with an arrow over the plot."""
    higher = base.transform_filter(f"isFinite(datum.{field}) && datum.{field} > {most!r}").mark_text(**ABOVE)
    return higher.encode(**({"y": alt.value(0)} | encodings))  # type: ignore[no-any-return]


def labels(base: alt.Chart, label: str, **more: Any) -> alt.Chart:
    """Write a text to the right of each mark; ``label`` is a Vega expression, ``more`` are encodings."""
    text = base.transform_calculate(label=label).mark_text(align="left", dx=6, fontWeight=600)
    return text.encode(text=alt.Text("label:N"), **more)  # type: ignore[no-any-return]


def layer_step(layers: int) -> float:
    """Return the width of one layer in pixels; charts of all models have about the same width."""
    return min(theme.WIDTH / max(layers, 1), 40)


def layer_axis(*, labelled: bool = True, gap: float = 0, **look: Any) -> alt.X:
    """Return the x axis of all plots by layer, with a gap between layers as a share of a step."""
    shown = look if labelled else look | {"labels": False}
    return columns.x("layer", "" if labelled else None, **shown, paddingInner=gap, paddingOuter=gap / 2)


def layer_columns() -> alt.Chart:
    """Return a transparent mark over the full height of each layer, which receives clicks."""
    each = alt.Chart().transform_aggregate(groupby=["layer"])
    return each.mark_rect(opacity=0, cursor="pointer", tooltip=None).encode(x=alt.X("layer:O"))  # type: ignore[no-any-return]


def picked_outline(unless: str = "") -> alt.Chart:
    """Draw a frame around the picked layer, inside the full height of the plot, so that the plot keeps its size.

    ``unless``: a param, such as `PICKED_HEAD`, with whose value there is no frame.
    """
    shown = f"{IS_PICKED} && !isValid({unless})" if unless else IS_PICKED
    picked = alt.Chart().transform_filter(shown).transform_aggregate(groupby=["layer"])
    look: Look = {"stroke": theme.PICKED, "strokeWidth": 2, "y2Offset": -2, "cornerRadius": 2, "cursor": "pointer"}
    outline = picked.mark_rect(filled=False, fill=None, **look)
    return outline.encode(x=alt.X("layer:O"), y=alt.value(2), y2=alt.value("height"))  # type: ignore[no-any-return]


def picked_cell(cells: alt.Chart, group: int) -> alt.Chart:
    """Draw a frame around the cell of the picked layer and head, in a map with ``group`` heads a cell."""
    head = f"floor({PICKED_HEAD} / {group}) * {group}"
    outline = cells.transform_filter(f"{IS_PICKED} && isValid({PICKED_HEAD}) && datum.group === {head}")
    look: Look = {"stroke": theme.PICKED, "strokeWidth": 2, "cursor": "pointer"}
    return outline.mark_rect(filled=False, fill=None, **look)  # type: ignore[no-any-return]


def token_rule(channel: type[alt.X | alt.Y] = alt.X) -> alt.Chart:
    """Draw a line at the position of the picked token, along `alt.X` or `alt.Y`."""
    one = alt.Chart().transform_aggregate(rows="count()").transform_calculate(at=PICKED_TOKEN)
    line = one.transform_filter("isValid(datum.at)").mark_rule(color=theme.PICKED, strokeWidth=1.5)
    return line.encode(channel("at:Q"))  # type: ignore[no-any-return]


def over_layers(*marks: alt.Chart) -> alt.LayerChart:
    """Lay marks over clickable layers, and the frame of the picked layer on top."""
    return layered(layer_columns(), *marks, picked_outline())


def beside_layers(layers: int, height: int, *marks: alt.Chart) -> alt.LayerChart:
    """Lay marks that stand side by side in a layer over clickable layers, in a plot of ``height`` pixels."""
    width = layer_step(layers) * max(layers, 1)  # `alt.Step` would be the width of one mark
    return sized(over_layers(*marks), width, height)


def lines_by_layer(
    base: alt.Chart, tooltip: list[alt.Tooltip], size: int = 30, *more: alt.Chart, **encodings: Any
) -> alt.LayerChart:
    """Lay lines and points over clickable layers and the frame of the picked layer; ``encodings`` are of the points."""
    dots = base.mark_point(filled=True, size=size, opacity=1, cursor="pointer").encode(tooltip=tooltip, **encodings)
    return layered(layer_columns(), picked_outline(), base.mark_line(strokeWidth=1.5), dots, *more)


class HeadMap:
    """The grid of a map of layers and KV heads, a map for each tensor; many heads are drawn in groups."""

    def __init__(self, rows: pl.DataFrame) -> None:
        layers, heads = rows["layer"].n_unique(), rows["head"].n_unique()
        self.tensors = tensors_of(rows)
        self.group, self.words = grouped(layers * heads * len(self.tensors), CELLS, "KV head")
        step = layer_step(layers)
        self.width = alt.Step(step)
        self.height = alt.Step(max(min(step, 18), 6, 40 / heads))

    def cells(
        self,
        tensor: str,
        calculated: Mapping[str, str],
        pooled: Mapping[str, Any],
        *,
        last: bool,
        gap: float = 0,
        words: str = "",
    ) -> alt.Chart:
        """Return one tensor's rows with ``calculated`` fields, ``pooled`` over the heads of a group.

        ``words``: name of the tensor on the axis.
        """
        first = f"floor(datum.head / {self.group}) * {self.group}"
        rows = only(tensor=tensor).transform_calculate(group=first, **calculated)
        y = columns.y("group", [words or tensor, self.words], paddingInner=gap)
        pools = rows.transform_aggregate(**pooled, groupby=["layer", "group"])
        return pools.encode(x=layer_axis(labelled=last, gap=gap), y=y)


def grouped(count: int, most: int, what: str) -> tuple[int, str]:
    """Return the group size that draws ``count`` items as at most ``most`` marks, and the axis title for it."""
    group = math.ceil(count / most)
    return group, what if group == 1 else f"{what}s, by {group}"


def tensors_of(frame: pl.DataFrame) -> list[str]:
    """Return the tensors in a frame, keys before values."""
    return [tensor for tensor in theme.TENSORS if tensor in frame["tensor"]]


def by_tensor(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield each tensor in a frame, keys before values, with its rows."""
    for tensor in tensors_of(frame):
        yield tensor, frame.filter(pl.col("tensor") == tensor)


def head_words(frame: pl.DataFrame) -> str:
    """Return the name of the only layer and KV head of a frame."""
    return f"Layer {frame['layer'][0]}, KV head {frame['head'][0]}"


def sentence(*parts: str) -> str:
    """Join the parts of a caption that are not empty."""
    return "; ".join(part for part in parts if part)


def bits_said(bits: float) -> str:
    """Return a number of bits in words, such as ``"1 bit"``."""
    return f"{bits:g} {'bit' if bits == 1 else 'bits'}"


def broken(count: object) -> str:
    """State how many values are not finite; empty if there are none."""
    return f"× {count} not finite" if count else ""
