"""Memory before it is taken: the bytes of any context, by part, and the largest context that fits. Predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from veloxlab.checks import checked, either, many, real, whole
from veloxlab.errors import InputError
from veloxlab.measure.layouts import CacheLayout, cache_layouts
from veloxlab.shapes import MODEL_OR_CONFIG, ModelOrConfig

PLANNED = {
    "cache": pl.String,  # the one that was asked for first, then those that it is compared with
    "tokens": pl.Int64,  # of each sequence
    "batch": pl.Int64,  # sequences
    "part": pl.String,  # one of `veloxlab.measure.layouts.PARTS`
    "bytes": pl.Int64,  # of the part, in all layers and sequences; parts add up
    "kind": pl.String,  # "predicted"
}
"""Columns of `plan_memory`."""

LARGEST = {
    "cache": pl.String,
    "memory_bytes": pl.Int64,  # that there are
    "batch": pl.Int64,
    "tokens": pl.Int64,  # the largest context, in steps of 256
    "bytes": pl.Int64,  # that it takes
    "kind": pl.String,  # "predicted"
}
"""Columns of `largest_contexts`."""


@checked(model_or_config=MODEL_OR_CONFIG, context=either(whole(1), many(whole(1))))
def plan_memory(
    model_or_config: ModelOrConfig,
    method: str = "turboquant",
    *,
    context: int | Sequence[int] = 32_768,
    batch: int = 1,
    decoded: int = 0,
    **settings: Any,
) -> pl.DataFrame:
    """Predict the bytes that a compressed cache will hold, beside the exact one and mlx-lm's quantized ones: `PLANNED`.

    Exact to the byte for a text that mlx-lm's generator reads, in chunks of 2,048 tokens and its last token by itself,
    but for the tables of SpectralQuant (see its ``blank``). A text that is generated leaves buffers room to grow: say
    how much of it was.

    Parameters
    ----------
    model_or_config : as for `veloxlab.shapes.shape_of`: a model, a ``config.json`` or its folder, or a
        `veloxlab.ModelShape`.
    method : a method's id.
    context : tokens of each sequence, or several such numbers.
    batch : sequences; tables are held once for all.
    decoded : how many of the newest tokens were generated, one at a time.
    settings : ``bits``, ``key_bits``, ``value_bits``, ``sinks``, ``window``, ``sliding``, ``calibration`` and the
        method's own, as for `veloxlab.make_cache`.

    Raises
    ------
    InputError : as `veloxlab.make_cache`; a model that is not here; numbers of tokens or sequences below 0 or 1.
    """
    lengths = [context] if isinstance(context, int) else list(context)
    if min(lengths) < decoded:
        raise InputError(f"context={min(lengths)} has fewer tokens than decoded={decoded}: give no less than those.")
    return planned(cache_layouts(model_or_config, method, **settings), lengths, batch, decoded)


def planned(layouts: Sequence[CacheLayout], contexts: Sequence[int], batch: int = 1, decoded: int = 0) -> pl.DataFrame:
    """Bytes by part of each layout at each context: `PLANNED`."""
    rows = [
        {"cache": layout.name, "tokens": tokens, "batch": batch, "part": part, "bytes": nbytes, "kind": "predicted"}
        for layout in layouts
        for tokens in contexts
        for part, nbytes in layout.parts(tokens, batch, decoded).items()
        if nbytes
    ]
    return pl.DataFrame(rows, schema=PLANNED)


@checked(model_or_config=MODEL_OR_CONFIG, memory_bytes=real(above=0))
def largest_contexts(
    model_or_config: ModelOrConfig,
    memory_bytes: float,
    method: str = "turboquant",
    *,
    batch: int = 1,
    **settings: Any,
) -> pl.DataFrame:
    """Predict the largest context that fits in so much memory for the cache alone: `LARGEST`.

    ``memory_bytes`` is what is left beside weights and all else. Further arguments as for `plan_memory`.

    Raises
    ------
    InputError : as `plan_memory`; or no memory.
    """
    return largest(cache_layouts(model_or_config, method, **settings), memory_bytes, batch)


def largest(layouts: Sequence[CacheLayout], memory_bytes: float, batch: int = 1) -> pl.DataFrame:
    """The largest context of each layout that fits in so much memory: `LARGEST`."""
    rows = []
    for layout in layouts:
        tokens = layout.largest_context(memory_bytes, batch)
        rows.append((layout.name, int(memory_bytes), batch, tokens, layout.held(tokens, batch), "predicted"))
    return pl.DataFrame(rows, schema=LARGEST, orient="row")
