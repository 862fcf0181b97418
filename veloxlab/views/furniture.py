"""What a chart asks of its frame, said in a sentence where it is not met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import theme

Kind = Literal["number", "text"]


def require(frame: pl.DataFrame, columns: Mapping[str, Kind], chart: str) -> None:
    """Refuse a frame that lacks a column, holds another kind of value in one, or has no rows.

    Parameters
    ----------
    frame
        What a chart was given.
    columns
        Names and kinds of the columns that it needs.
    chart
        The chart's name, for the sentence.

    Raises
    ------
    InputError
        If the frame does not fit.
    """
    for name, kind in columns.items():
        if name not in frame.columns:
            raise InputError(f"{chart} needs a column {name!r}: the frame has {', '.join(frame.columns) or 'none'}.")
        dtype = frame.schema[name]
        if not (dtype.is_numeric() if kind == "number" else dtype in (pl.String, pl.Categorical, pl.Enum)):
            raise InputError(f"{chart} needs {kind} in column {name!r}: the frame has {dtype} there.")
    if frame.is_empty():
        raise InputError(f"{chart} needs at least one row: the frame is empty.")


def one_head(frame: pl.DataFrame, chart: str) -> None:
    """Refuse a frame with rows of more than one layer or head, and say how to choose."""
    for name in ("layer", "head"):
        found = frame[name].unique().sort().to_list()
        if len(found) > 1:
            raise InputError(
                f"{chart} shows one head and the frame has {len(found)} values of {name!r}: "
                f"choose with frame.filter(layer={frame['layer'][0]}, head={frame['head'][0]})."
            )


def known(value: str, choices: Mapping[str, object], what: str) -> None:
    """Refuse a name that is not among the choices, and list them."""
    if value not in choices:
        raise InputError(f"There is no {what} {value!r}: choose one of {', '.join(choices)}.")


Domain = tuple[float, float]

LABEL = "format(datum.value, datum.value < 0.001 ? '~e' : '~g')"  # of a tick, in Vega: 0.002 and 2e-5
NEAR = 1e-9  # relative room for rounding errors
DEEP = 1e-6  # what lies further under the greatest value is drawn at the floor


def on_log_scale(chart: alt.Chart, field: str, domain: Domain | None = None) -> alt.Chart:
    """Give the rows of a chart a field that a log scale can show, named ``{field}_drawn``: all log scales read such.

    Rows in which the field is null, NaN or infinite are left out; `not_drawn` counts them for a caption.

    Parameters
    ----------
    chart
        Its rows may change later: this is done in the page.
    field
        A number of each row.
    domain
        Ends of the scale: what is below, such as zero, is drawn at the floor. Without them zero and less is left out.
    """
    value = f"datum.{field}"
    there = chart.transform_filter(f"isValid({value}) && isFinite({value})" + ("" if domain else f" && {value} > 0"))
    return there.transform_calculate(**{f"{field}_drawn": f"max({value}, {domain[0]!r})" if domain else value})


def not_drawn(values: pl.Series, *, zero: bool = False) -> list[str]:
    """Say how many values are null, NaN or infinite, or, with ``zero``, not above zero; nothing if there are none."""
    numbers = values.cast(pl.Float64)
    drawn = numbers.is_finite() & ((numbers > 0) | (not zero))
    count = len(numbers) - int(drawn.sum())
    return [f"{count} not drawn: {'not above zero, or ' * zero}not finite"] if count else []


def log_domain(values: Iterable[float | None]) -> Domain:
    """Give round ends of a log scale that hold the values above zero, down to a millionth of the greatest.

    Parameters
    ----------
    values
        Numbers; those that are null, zero, negative or not finite have no place on a log scale and do not count.

    Returns
    -------
    tuple
        The least and the greatest value of the scale, at least a factor of five apart.
    """
    drawn = [value for value in values if value is not None and 0 < value < math.inf]
    greatest = max(drawn, default=1.0)
    least = min((value for value in drawn if value > greatest * DEEP), default=greatest)
    low = max(step for step in _round_numbers(least) if step <= least * (1 + NEAR))
    high = min(step for step in _round_numbers(greatest) if step >= greatest * (1 - NEAR))
    return (low, high) if high / low >= 5 else (low / 5, high)


def log_ticks(domain: Domain) -> list[float]:
    """Give round values within a domain, decades alone where there are more than three."""
    low, high = (math.floor(math.log10(end) + NEAR) for end in domain)
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    values = (float(f"{step}e{power}") for power in range(low, high + 1) for step in steps)
    return [value for value in values if domain[0] * (1 - NEAR) <= value <= domain[1] * (1 + NEAR)]


def log_steps(*steps: int) -> list[float]:
    """Give such steps of every decade, for an axis whose ends its rows make: only those between them are drawn."""
    return [float(f"{step}e{power}") for power in range(-12, 7) for step in steps]


def _round_numbers(value: float) -> list[float]:
    """Give round numbers from below a value to above it."""
    power = math.floor(math.log10(value))
    return [float(f"{step}e{power + decade}") for decade in (-1, 0, 1) for step in (1, 2, 5)]


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
    names, colours = list(theme.TENSORS), list(theme.TENSORS.values())
    colour: alt.Color = alt.Color("tensor:N", title=None).scale(domain=names, range=colours)
    return colour if legend else colour.legend(None)


def method_look(methods: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Give methods the colours and shapes that they have in every chart, with one legend, in this order."""
    legend = alt.Legend(symbolOpacity=1, symbolSize=60)
    colours, shapes = [theme.colour_of(m) for m in methods], [theme.shape_of(m) for m in methods]
    return (
        alt.Color("method:N", title=None, legend=legend).scale(domain=methods, range=colours),
        alt.Shape("method:N", title=None, legend=legend).scale(domain=methods, range=shapes),
    )


def head_words(frame: pl.DataFrame) -> str:
    """Name the one layer and KV head of a frame."""
    return f"Layer {frame['layer'][0]}, KV head {frame['head'][0]}"


def layer_step(layers: int) -> float:
    """Give the width of one layer in pixels, so that a chart of any model is about as wide."""
    return min(theme.WIDTH / max(layers, 1), 40)


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
            stroke=theme.PICKED,
            strokeWidth=2,
            y2Offset=-2,
            cornerRadius=2,
            cursor="pointer",
        )
        .encode(x="layer:O", y=alt.value(2), y2=alt.value("height"))
    )
    return outline
