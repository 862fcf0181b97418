"""How frames of measurements are made: shared columns, rows from arrays by head, and a schema's order and types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from veloxlab.codecs import Role

Schema = Mapping[str, Any]

PLACE: dict[str, Any] = {
    "layer": pl.Int32,  # index in the prompt cache
    "head": pl.Int32,  # KV head
    "tensor": pl.String,  # "keys" or "values"
}
"""First columns of what is measured for each layer, KV head and tensor."""


def by_head(schema: Schema, layer: int, tensor: Role, columns: Mapping[str, Any]) -> pl.DataFrame:
    """Rows of one layer's keys or values.

    Parameters
    ----------
    schema : columns of the frame, those of `PLACE` among them.
    layer, tensor : the same in all rows.
    columns : the others: arrays that broadcast to ``[H, N]``, one value for all rows, or None. ``"head"`` is 0 to H − 1
        unless given.
    """
    known = {name: np.asarray(column) for name, column in columns.items() if column is not None}
    shape = np.broadcast_shapes((1, 1), *(column.shape for column in known.values()))
    known = {"layer": np.asarray(layer), "head": np.arange(shape[0])[:, None], "tensor": np.asarray(tensor)} | known
    rows = {name: np.broadcast_to(column, shape).reshape(-1) for name, column in known.items()}
    return in_schema(pl.DataFrame(rows).with_columns(pl.lit(None).alias(n) for n in schema if n not in rows), schema)


def in_schema(frame: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """The columns of a schema, in its order and types."""
    return frame.select(pl.col(name).cast(dtype) for name, dtype in schema.items())
