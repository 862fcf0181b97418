"""Frames of measurements: their shared columns, and rows from arrays by KV head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from veloxlab.codecs import TENSORS, Tensor
from veloxlab.measure.activations import LayerCapture
from veloxlab.progress import Progress, silent

Columns = Mapping[str, Any]

PLACE: dict[str, Any] = {
    "layer": pl.Int32,  # index in the prompt cache
    "head": pl.Int32,  # KV head
    "tensor": pl.String,  # "keys" or "values"
}
"""First columns of what is measured for each layer, KV head and tensor."""


def by_head(
    schema: Mapping[str, Any],
    layers: Sequence[LayerCapture],
    columns: Callable[[LayerCapture, Tensor], Iterable[Columns]],
    tensors: Sequence[Tensor] | None = None,
    *,
    progress: Progress = silent,
    label: str = "",
) -> pl.DataFrame:
    """Measure keys and values of every layer, and give all rows in one frame with the columns of ``schema``.

    ``columns(layer, tensor)`` gives blocks of rows: arrays that broadcast to ``[H, N]``, or one value for all rows.
    ``"head"`` is 0 to H − 1 unless given, and missing columns are null. ``progress`` is told of each layer.
    """
    frames = []
    for i, layer in enumerate(layers):
        for tensor in tensors or TENSORS:
            frames += [in_schema(_rows(layer.layer, tensor, block), schema) for block in columns(layer, tensor)]
        progress(i + 1, len(layers), f"{label}layer {layer.layer}")
    return pl.concat(frames)


def _rows(layer: int, tensor: Tensor, block: Columns) -> pl.DataFrame:
    arrays = {name: np.asarray(column) for name, column in block.items()}
    shape = np.broadcast_shapes((1, 1), *(array.shape for array in arrays.values()))
    place = {"layer": np.asarray(layer), "head": np.arange(shape[0])[:, None], "tensor": np.asarray(tensor)}
    return pl.DataFrame({n: np.broadcast_to(array, shape).reshape(-1) for n, array in (place | arrays).items()})


def in_schema(frame: pl.DataFrame, schema: Mapping[str, Any]) -> pl.DataFrame:
    """The columns of a schema, in its order and types; those that the frame has not are null."""
    return frame.select((pl.col(n) if n in frame.columns else pl.lit(None).alias(n)).cast(t) for n, t in schema.items())
