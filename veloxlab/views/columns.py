"""Columns of the frames that charts draw: the title, format and type of each, and the checks of a frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import altair as alt
import polars as pl

from veloxlab.errors import InputError


@dataclass(frozen=True)
class Column:
    """How a tooltip shows a column: its title with the unit, a d3 format, and its Vega-Lite type."""

    title: str = ""
    format: str = ""
    kind: str = "Q"


_NAMES = ("answer", "cache", "kind", "method", "name", "part", "passkey", "side", "space", "stage", "state", "tensor")
_LEVELS = ("mean", "rms", "least", "low", "high", "most", "median", "angle", "x", "y")
TEXTS = frozenset((*_NAMES, "about", "role", "text"))
"""Columns of a frame that hold text; all others that a chart asks for hold numbers."""

COLUMNS = (
    {name: Column(name, kind="N") for name in (*_NAMES, "text", "seen", "what", "said", "note")}
    | {name: Column(name, kind="O") for name in ("layer", "pair", "channel", "coordinate", "group")}
    | {name: Column(name, ".3~g") for name in _LEVELS}
    | {
        "bits": Column("bits", ".3~g"),
        "bits_per_value": Column("bits per value", ".3f"),
        "bytes": Column("bytes", ",d"),
        "bytes_per_token": Column("bytes per token", ",.1f"),
        "context": Column("tokens", ",d"),
        "density": Column("density", ".3~g"),
        "depth": Column("depth", ".0%"),
        "dimensions": Column("effective dimensions", ".3~g"),
        "error": Column("relative squared error", ".3~g"),
        "exact_probability": Column("probability, exact cache, same text", ".3f"),
        "first": Column("first channel", kind="O"),
        "greatest": Column("greatest", ".3g"),
        "held_bytes": Column("bytes held", ",d"),
        "key": Column("first key"),
        "key_bits": Column("bits per value of keys", ".3~g"),
        "kl": Column("KL divergence (nats)", ".3g"),
        "kl_mean": Column("mean KL divergence (nats)", ".3g"),
        "lost": Column("predicted loss", ".2g"),
        "mean_share": Column("share of the mean vector", ".1%"),
        "microseconds": Column("µs, measured", ".0f"),
        "not_finite": Column("not finite"),
        "perplexity": Column("perplexity", ".3f"),
        "position": Column("position"),
        "probability": Column("probability, this cache", ".3f"),
        "protected": Column("exact layers", kind="N"),
        "query": Column("first query"),
        "rank": Column("rank"),
        "ratio": Column("ratio", ".3~g"),
        "roofline_microseconds": Column("µs, memory traffic alone", ".0f"),
        "row": Column("row"),
        "second": Column("second channel", kind="O"),
        "share": Column("share", ".3~%"),
        "sinks": Column("sinks"),
        "tokens": Column("tokens", ",d"),
        "top1_flips": Column("top-1 tokens changed", ".2%"),
        "total": Column("bytes of all parts", ",d"),
        "true_bits": Column("true bits per value", ".3f"),
        "value": Column("coordinate", ".3~g"),
        "value_bits": Column("bits per value of values", ".3~g"),
        "wavelength": Column("tokens per turn", ",.3~g"),
        "window": Column("window (tokens)"),
        "windows": Column("windows of text measured"),
    }
)  # fmt: skip


def tips(*fields: str | tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """Give a tooltip's lines: a column of `COLUMNS`, alone or with another title and format."""
    lines = []
    for field in fields:
        name, *said = (field,) if isinstance(field, str) else field
        column = COLUMNS.get(name, Column())
        title, form = (*said, *(column.title, column.format)[len(said) :])
        lines.append(alt.Tooltip(f"{name}:{column.kind}", title=title, format=form or alt.Undefined))
    return lines


def require(frame: pl.DataFrame, chart: str, *columns: str) -> pl.DataFrame:
    """Give the columns that a chart needs.

    Raises `InputError` for a frame that lacks one, holds another kind of value in it, or has no rows.
    """
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


def require_head(frame: pl.DataFrame, chart: str, *columns: str) -> pl.DataFrame:
    """Give the columns that a chart of one head needs; refuse rows of more than one layer or head."""
    require(frame, chart, "layer", "head", *columns)
    for name in ("layer", "head"):
        if (found := frame[name].n_unique()) > 1:
            raise InputError(
                f"{chart} shows one head and the frame has {found} values of {name!r}: "
                f"choose with frame.filter(layer={frame['layer'][0]}, head={frame['head'][0]})."
            )
    return frame.select(columns)


def known(value: str, choices: Mapping[str, object], what: str) -> None:
    """Refuse a name that is not among the choices, and list them."""
    if value not in choices:
        raise InputError(f"There is no {what} {value!r}: choose one of {', '.join(choices)}.")
