"""Columns of the frames that charts draw: titles, formats and types, the checks of a frame, and log scales."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    "chance": "right by guessing",
    "coded_share": "of the context in codes",
    "compressed": "right, compressed cache",
    "context": "tokens",
    "dimensions": "effective dimensions",
    "difference": "compressed \u2212 exact",
    "error": "relative squared error",
    "exact": "right, exact cache",
    "exact_probability": "probability, exact cache, same text",
    "first": "first channel",
    "held_bytes": "bytes held",
    "key": "first key",
    "key_bits": "bits per value of keys",
    "kl": "KL divergence (nats)",
    "kl_mean": "mean KL divergence (nats)",
    "lost": "predicted loss",
    "nll": "\u2212log p of the answer, compressed (nats)",
    "nll_exact": "\u2212log p of the answer, exact (nats)",
    "mean_share": "share of the mean vector",
    "microseconds": "µs, measured",
    "probability": "probability, this cache",
    "protected": "exact layers",
    "query": "first query",
    "roofline_microseconds": "µs, memory traffic alone",
    "same": "equal answers",
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
"""Titles of columns in tooltips, with the unit; for any other column, its name."""

_FORMATS = {
    ".3~g": "bits density dimensions error high key_bits least low mean median most ratio rms value value_bits x y",
    ".3g": "angle greatest kl kl_mean nll nll_exact",
    ".2g": "lost",
    ".3f": "bits_per_value exact_probability perplexity probability true_bits",
    ".0f": "microseconds roofline_microseconds",
    ",d": "bytes context held_bytes tokens total",
    ",.1f": "bytes_per_token",
    ",.3~g": "wavelength",
    ".0%": "chance coded_share compressed depth difference exact same",
    ".1%": "mean_share",
    ".2%": "top1_flips",
    ".3~%": "share",
}
FORMATS = {name: form for form, names in _FORMATS.items() for name in names.split()}
"""d3 formats of columns in tooltips; any other column has no format."""

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
"""Titles of axes that are longer than the tooltip's, with the unit."""

_PLACES = {
    "axis": "format grid labelAngle labelExpr labelLimit labelOverlap labelSeparation labels minExtent tickCount "
    "tickMinStep ticks values",
    "scale": "base clamp domain domainMin nice padding paddingInner paddingOuter reverse type zero",
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names.split()}

Domain = tuple[float, float]

LABEL = "format(datum.value, datum.value < 0.001 ? '~e' : '~g')"  # of a tick, a Vega expression: 0.002 and 2e-5
NEAR = 1e-9  # relative tolerance for rounding errors
DEEP = 1e-6  # values below this share of the greatest are drawn at the floor


def _axis(channel: type[Axis], name: str, title: str | list[str] | None = "", **settings: Any) -> Axis:
    own: dict[str, Any] = {"title": AXES.get(name) or TITLES.get(name, name) if title == "" else title}
    for setting, value in settings.items():
        place = own.setdefault(_PLACE[setting], {}) if setting in _PLACE else own
        place[setting] = value
    return channel(field(name), **own)


x, y = partial(_axis, alt.X), partial(_axis, alt.Y)
"""Return a column's axis. Settings of its scale and axis are keywords; the title "" is the column's own title."""


def field(name: str) -> str:
    """Return a column name with its Vega-Lite type."""
    return name if ":" in name else f"{name}:{KINDS.get(name, 'Q')}"


def tips(*fields: str | tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """Return the lines of a tooltip: a column, or a tuple of column, title and format that replace the usual ones."""
    lines = []
    for given in fields:
        for name, *said in map(str.split, given.split()) if isinstance(given, str) else [given]:
            title, form = (*said, *(TITLES.get(name, name.replace("_", " ")), FORMATS.get(name, ""))[len(said) :])
            lines.append(alt.Tooltip(field(name), title=title, format=form or alt.Undefined))
    return lines


def require(frame: pl.DataFrame, chart: str, *names: str, one: str = "") -> pl.DataFrame:
    """Return the columns that a chart needs; `InputError` if one is missing or has another type, or there are no rows.

    The columns ``one`` are needed too, and must have a single value each.
    """
    columns = " ".join(names).split()
    for name in [*one.split(), *columns]:
        if name not in frame.columns:
            raise InputError(f"{chart} needs a column {name!r}: the frame has {', '.join(frame.columns) or 'none'}.")
        dtype = frame.schema[name]
        if not (dtype in (pl.String, pl.Categorical, pl.Enum) if name in TEXTS else dtype.is_numeric()):
            kind = "text" if name in TEXTS else "number"
            raise InputError(f"{chart} needs {kind} in column {name!r}: the frame has {dtype} there.")
    if frame.is_empty():
        raise InputError(f"{chart} needs at least one row: the frame is empty.")
    for name in one.split():
        if (found := frame[name].n_unique()) > 1:
            words = f"{chart} shows one value of {name!r} and the frame has {found}"
            raise InputError(f"{words}: choose with frame.filter({name}={frame[name][0]!r}).")
    return frame.select(columns)


require_head = partial(require, one="layer head")


def on_log_scale(chart: alt.Chart, field: str, domain: Domain | None = None) -> alt.Chart:
    """Add the field ``{field}_drawn``, which a log scale can show, to the rows of a chart; Vega computes it.

    Rows in which the field is null, NaN or infinite are left out; `not_drawn` counts them for a caption. A value below
    ``domain``, the ends of the scale, is drawn at its floor. Without a domain, rows of zero or less are left out.
    """
    value = f"datum.{field}"
    there = chart.transform_filter(f"isValid({value}) && isFinite({value})" + ("" if domain else f" && {value} > 0"))
    return there.transform_calculate(**{f"{field}_drawn": f"max({value}, {domain[0]!r})" if domain else value})


def not_drawn(values: pl.Series, *, zero: bool = False) -> list[str]:
    """State how many values are null, NaN or infinite, or, with ``zero``, not above zero; empty if there are none."""
    numbers = values.cast(pl.Float64)
    drawn = numbers.is_finite() & ((numbers > 0) | (not zero))
    count = len(numbers) - int(drawn.sum())
    return [f"{count} not drawn: {'not above zero, or ' * zero}not finite"] if count else []


def log_domain(values: Iterable[float | None]) -> Domain:
    """Return round ends of a log scale, at least a factor of five apart, around the finite values above zero.

    Values below a millionth of the greatest do not count.
    """
    drawn = [value for value in values if value is not None and 0 < value < math.inf]
    greatest = max(drawn, default=1.0)
    least = min((value for value in drawn if value > greatest * DEEP), default=greatest)
    first, last = (math.floor(math.log10(end)) for end in (least, greatest))
    steps = log_steps(1, 2, 5, low=first - 1, high=last + 1)
    low = max(step for step in steps if step <= least * (1 + NEAR))
    high = min(step for step in steps if step >= greatest * (1 - NEAR))
    return (low, high) if high / low >= 5 else (low / 5, high)


def log_ticks(domain: Domain) -> list[float]:
    """Return round values within a domain; only powers of ten if it has more than three decades."""
    low, high = (math.floor(math.log10(end) + NEAR) for end in domain)
    values = log_steps(*((1, 2, 5) if high - low <= 3 else (1,)), low=low, high=high)
    return [value for value in values if domain[0] * (1 - NEAR) <= value <= domain[1] * (1 + NEAR)]


def log_steps(*steps: float, low: int = -12, high: int = 6) -> list[float]:
    """Return these steps of each decade, for an axis with ends from its rows: only steps between them are drawn."""
    return [float(f"{step}e{power}") for power in range(low, high + 1) for step in steps]


def log_y(field: str, title: list[str], domain: Domain) -> alt.Y:
    """Return the y axis of a field of `on_log_scale`, with round labels."""
    axis = {"values": log_ticks(domain), "labelExpr": LABEL}
    return y(f"{field}_drawn", title, type="log", domain=domain, nice=False, clamp=True, **axis)


def log_colour(field: str, title: str | list[str], domain: Domain, **look: Any) -> alt.Color:
    """Return the colour of a field of `on_log_scale`; its legend is a gradient with the settings ``look``."""
    shown: dict[str, Any] = {"gradientLength": 110, "gradientThickness": 10, "values": log_ticks(domain)}
    legend = alt.Legend(labelExpr=LABEL, **shown | look)
    return alt.Color(f"{field}_drawn:Q", title=title, legend=legend).scale(type="log", domain=domain, clamp=True)
