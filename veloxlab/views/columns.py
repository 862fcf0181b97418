"""Columns of the frames that charts draw: the titles, format and type of each, and the checks of a frame."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.measure.frames import TYPES

Axis = TypeVar("Axis", alt.X, alt.Y)
TEXTS = frozenset(name for name, kind in TYPES.items() if kind == pl.String)
"""Columns of a frame that hold text; all others that a chart asks for hold numbers."""

_OTHERS = {"N": "note protected said seen what", "O": "channel coordinate first group layer pair second"}
KINDS = dict.fromkeys(TEXTS, "N") | {name: kind for kind, names in _OTHERS.items() for name in names.split()}
"""Vega-Lite types of columns; all others are quantitative."""

TITLES = {
    "bits_per_value": "bits per value",
    "bytes_per_token": "bytes per token",
    "context": "tokens",
    "dimensions": "effective dimensions",
    "error": "relative squared error",
    "exact_probability": "probability, exact cache, same text",
    "first": "first channel",
    "held_bytes": "bytes held",
    "key": "first key",
    "key_bits": "bits per value of keys",
    "kl": "KL divergence (nats)",
    "kl_mean": "mean KL divergence (nats)",
    "lost": "predicted loss",
    "mean_share": "share of the mean vector",
    "microseconds": "µs, measured",
    "probability": "probability, this cache",
    "protected": "exact layers",
    "query": "first query",
    "roofline_microseconds": "µs, memory traffic alone",
    "second": "second channel",
    "seen": "shown",
    "top1_flips": "top-1 tokens changed",
    "total": "bytes of all parts",
    "true_bits": "true bits per value",
    "value": "coordinate",
    "value_bits": "bits per value of values",
    "wavelength": "tokens per turn",
    "window": "window (tokens)",
    "windows": "windows of text measured",
}
"""Titles of columns in tooltips, with the unit; that of any other is its name."""

_FORMATS = {
    ".3~g": "bits density dimensions error high key_bits least low mean median most ratio rms value value_bits x y",
    ".3g": "angle greatest kl kl_mean",
    ".2g": "lost",
    ".3f": "bits_per_value exact_probability perplexity probability true_bits",
    ".0f": "microseconds roofline_microseconds",
    ",d": "bytes context held_bytes tokens total",
    ",.1f": "bytes_per_token",
    ",.3~g": "wavelength",
    ".0%": "depth",
    ".1%": "mean_share",
    ".2%": "top1_flips",
    ".3~%": "share",
}
FORMATS = {name: form for form, names in _FORMATS.items() for name in names.split()}
"""d3 formats of columns in tooltips; any other is written as it is."""

AXES: dict[str, str | list[str]] = {
    "angle": "angle, radians",
    "context": "largest context that fits (tokens of each sequence)",
    "depth:O": "depth of the needle in the text",
    "error_drawn": ["relative", "squared error"],
    "key": "position of the key",
    "mean_share": ["mean vector's", "share of energy"],
    "megabytes": ["bytes held", "MB"],
    "middle": "position in the text, tokens",
    "middle_drawn": "relative squared error of a vector",
    "position": "tokens generated",
    "query": "position of the query",
    "rank": "direction, by decreasing energy",
    "tokens": "tokens of context",
    "tokens_drawn": "tokens of text",
    "true_bits": "true bits per value, scales included",
    "value": "coordinate in the space of the codes, over the stored scale",
}
"""Titles of axes that say more than a tooltip, with the unit."""

_PLACES = {
    "axis": "format grid labelExpr labelLimit labelOverlap labels minExtent tickCount tickMinStep ticks values",
    "scale": "base clamp domain domainMin nice padding paddingInner paddingOuter reverse type zero",
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names.split()}


def _axis(channel: type[Axis], name: str, title: str | list[str] | None = "", **settings: Any) -> Axis:
    own: dict[str, Any] = {"title": AXES.get(name) or TITLES.get(name, name) if title == "" else title}
    for setting, value in settings.items():
        if setting in _PLACE:
            own.setdefault(_PLACE[setting], {})[setting] = value
        else:
            own[setting] = value
    return channel(field(name), **own)


x, y = partial(_axis, alt.X), partial(_axis, alt.Y)
"""Give a column's axis, with settings of its scale and axis by their names; "" stands for the column's title."""


def field(name: str) -> str:
    """Give a column with its Vega-Lite type."""
    return name if ":" in name else f"{name}:{KINDS.get(name, 'Q')}"


def tips(*fields: str | tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """Give a tooltip's lines: columns, or one with another title and format than in every chart."""
    lines = []
    for given in fields:
        for name, *said in map(str.split, given.split()) if isinstance(given, str) else [given]:
            title, form = (*said, *(TITLES.get(name, name.replace("_", " ")), FORMATS.get(name, ""))[len(said) :])
            lines.append(alt.Tooltip(field(name), title=title, format=form or alt.Undefined))
    return lines


def require(frame: pl.DataFrame, chart: str, *names: str) -> pl.DataFrame:
    """Give the columns that a chart needs; `InputError` if one is missing or of another kind, or there are no rows."""
    columns = " ".join(names).split()
    for name in columns:
        if name not in frame.columns:
            raise InputError(f"{chart} needs a column {name!r}: the frame has {', '.join(frame.columns) or 'none'}.")
        dtype = frame.schema[name]
        if not (dtype in (pl.String, pl.Categorical, pl.Enum) if name in TEXTS else dtype.is_numeric()):
            kind = "text" if name in TEXTS else "number"
            raise InputError(f"{chart} needs {kind} in column {name!r}: the frame has {dtype} there.")
    if frame.is_empty():
        raise InputError(f"{chart} needs at least one row: the frame is empty.")
    return frame.select(columns)


def require_head(frame: pl.DataFrame, chart: str, names: str) -> pl.DataFrame:
    """Give the columns that a chart of one head needs; refuse rows of more than one layer or head."""
    require(frame, chart, "layer head", names)
    for name in ("layer", "head"):
        if (found := frame[name].n_unique()) > 1:
            place = f"layer={frame['layer'][0]}, head={frame['head'][0]}"
            words = f"{chart} shows one head and the frame has {found} values of {name!r}"
            raise InputError(f"{words}: choose with frame.filter({place}).")
    return frame.select(names.split())
