"""What a chart asks of its frame, said in a sentence where it is not met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import polars as pl

from veloxlab.errors import InputError

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
