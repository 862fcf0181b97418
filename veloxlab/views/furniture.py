"""Parts that charts share: checks of a frame's columns, axes, colours, tooltips, marks by layer, and the frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import theme

# Columns that hold text, whichever frame they are in; all others that a chart asks for hold numbers.
NAMES = ("answer", "cache", "method", "name", "passkey", "text")
SORTS = ("about", "kind", "part", "role", "side", "space", "stage", "state", "tensor")
TEXTS = frozenset((*NAMES, *SORTS))


def require(frame: pl.DataFrame, chart: str, *columns: str) -> None:
    """Raise `InputError` for a frame that lacks a column, holds another kind of value in one, or has no rows."""
    for name in columns:
        if name not in frame.columns:
            raise InputError(f"{chart} needs a column {name!r}: the frame has {', '.join(frame.columns) or 'none'}.")
        dtype = frame.schema[name]
        if not (dtype in (pl.String, pl.Categorical, pl.Enum) if name in TEXTS else dtype.is_numeric()):
            kind = "text" if name in TEXTS else "number"
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


def tensors_of(frame: pl.DataFrame) -> list[str]:
    """Name the tensors that a frame has, keys before values."""
    return [tensor for tensor in theme.TENSORS if tensor in frame["tensor"]]


def by_tensor(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Give the rows of keys and of values, where there are any."""
    for tensor in tensors_of(frame):
        yield tensor, frame.filter(pl.col("tensor") == tensor)


PICKED = "picked_layer"
IS_PICKED = f"datum.layer === {PICKED}"
ALTAIR_ROWS = 5_000
CROSS: dict[str, Any] = {"text": "×", "fontSize": 13, "fontWeight": "bold", "color": theme.PICKED}  # not finite
Plot = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart | alt.HConcatChart


def framed(
    plots: Sequence[Plot],
    data: pl.DataFrame,
    heading: str,
    caption: str | None,
    usual: str,
    *,
    pickable: bool = False,
    dashed: bool = False,
) -> alt.VConcatChart:
    """Stack plots of the same rows under a heading and the param ``caption``, which is ``usual`` where none is given.

    ``pickable`` plots mark the param ``picked_layer``; ``dashed`` ones tell lines apart by dashes.
    """
    params = [alt.param(name="caption", value=usual if caption is None else caption)]
    if pickable:
        params.append(alt.param(name=PICKED, value=None))
    dashes: dict[str, Any] = {"strokeDash": "independent"} if dashed else {}
    first = plots[0].properties(title=alt.TitleParams(text=alt.expr("caption"), style="caption"))
    chart: alt.VConcatChart = (
        alt.vconcat(first, *plots[1:], title=alt.TitleParams(text=heading), spacing=10)
        .add_params(*params)
        .resolve_scale(color="independent", opacity="independent", shape="independent", **dashes)
    )
    # Altair refuses longer frames for the marks they might become; ours are pooled before they are drawn
    chart.data = data if data.height <= ALTAIR_ROWS else alt.InlineData(values=data.to_dicts())
    return chart


def tips(*fields: str | tuple[str, str] | tuple[str, str | None, str]) -> list[alt.Tooltip]:
    """Give a tooltip's lines: a field alone, with a title, or with a title (``None``: its own name) and a format."""
    lines = []
    for field in fields:
        name, title, form = (*((field,) if isinstance(field, str) else field), None, None)[:3]
        said = {key: value for key, value in (("title", title), ("format", form)) if value is not None}
        lines.append(alt.Tooltip(name, **said))
    return lines


def cache_colour(caches: Sequence[str], legend: alt.Legend | None = None) -> alt.Color:
    """Give caches the colours of their methods."""
    colours = [theme.colour_of(name) for name in caches]
    return alt.Color("cache:N", legend=legend).scale(domain=caches, range=colours)


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


def over_layers(*marks: alt.Chart) -> alt.LayerChart:
    """Lay marks over clickable layers, and a frame around the picked one over them."""
    return alt.layer(layer_columns(), *marks, picked_outline())  # type: ignore[return-value]


def lines_by_layer(base: alt.Chart, points: alt.Chart, *more: alt.Chart) -> alt.LayerChart:
    """Lay lines and points over clickable layers and the frame around the picked one."""
    return alt.layer(layer_columns(), picked_outline(), base.mark_line(strokeWidth=1.5), points, *more)  # type: ignore[return-value]
