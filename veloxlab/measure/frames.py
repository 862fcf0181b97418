"""Column types of measurement frames: a name has the same type everywhere. A description follows each schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

_TYPES: dict[Any, str] = {
    pl.String: (
        "about answer cache chunk kind method mode name part passkey path question reason right role side space "
        "stage state task tensor text"
    ),
    pl.Int32: (
        "channel coordinate first group head head_dim key key_end layer level loudest not_finite outlier_channels pair "
        "place position position_end query query_end rank second token window"
    ),
    pl.Int64: (
        "batch bytes coded_tokens context decode_peak_bytes exact_tokens fp16_bytes held_bytes memory_bytes "
        "most_tokens positions prefill_peak_bytes questions table_bytes tokens zero"
    ),
    pl.Float32: "squared_error squared_norm",
    pl.Boolean: "came fits flip hit may",
}
TYPES = {name: kind for kind, names in _TYPES.items() for name in names.split()}
"""Types of columns; all others are Float64."""

PLACE = "layer head tensor "
"""First columns of measurements by head: index in the prompt cache, KV head, and "keys" or "values"."""


def schema(names: str) -> dict[str, Any]:
    """Return the types of columns by their names, in order."""
    return {name: TYPES.get(name, pl.Float64) for name in names.split()}


def in_schema(frame: pl.DataFrame, columns: Mapping[str, Any]) -> pl.DataFrame:
    """Return the columns of a schema, in its order and types; missing columns are null."""
    return frame.select(
        (pl.col(n) if n in frame.columns else pl.lit(None).alias(n)).cast(t) for n, t in columns.items()
    )
