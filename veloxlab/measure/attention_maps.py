"""The attention map of one head, exact and with compressed keys, in blocks of tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import polars as pl
from mlx_lm.models.base import create_causal_mask
from numpy.typing import NDArray

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import usual_bits
from veloxlab.checks import checked, instance, whole
from veloxlab.errors import InputError
from veloxlab.measure.activations import LayerCapture
from veloxlab.measure.errors import exact_and_decoded
from veloxlab.measure.frames import in_schema, schema

ATTENTION_MAP = schema("kind query query_end key key_end weight moved")
"""Columns of `attention_map`: "exact", "compressed", or "difference", compressed less exact; first position of a block
of queries and the one behind it; of a block of keys, at or before the queries; attention that the keys get, mean over
the queries of the block, so that rows add up to 1; and ½ Σ|p − p̂| over single keys, mean over the queries, as their
row."""

BLOCKS = 32  # per side: three triangles of 528 cells


@checked(layer=instance(LayerCapture, "a layer of what vl.measure.capture gave"), blocks=whole(2))
def attention_map(
    layer: LayerCapture,
    head: int,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    calibration: Calibration | None = None,
    blocks: int = BLOCKS,
    **options: object,
) -> pl.DataFrame:
    """Causal attention of one query head over exact keys, over keys that ``method`` compressed, and the difference.

    Every key is compressed. Attention is causal over all tokens, as if the layer had no window. Columns:
    `ATTENTION_MAP`. Raises `InputError` as `layer_errors`, for a layer that does not show its queries, and if there is
    no such head.
    """
    if layer.queries is None or layer.scale is None:
        raise InputError(f"Layer {layer.layer} does not show its queries, so there is no attention map: take another.")
    heads, kv_heads = layer.queries.shape[1], layer.keys.shape[1]
    if not 0 <= head < heads:
        raise InputError(f"There is no query head {head}: choose one from 0 to {heads - 1}.")
    width = usual_bits(method, 8 * layer.keys.dtype.size, bits)
    both = exact_and_decoded(layer, "keys", method, width, calibration, options)
    q = layer.queries[0, head].astype(mx.float32)
    exact, compressed = (_weights(q, x[0, head * kv_heads // heads], layer.scale) for x in both)
    edges = block_edges(len(exact), blocks)
    moved = np.add.reduceat(np.abs(exact - compressed).sum(axis=1) / 2, edges[:-1]) / np.diff(edges)
    pooled = {"exact": pooled_weights(exact, edges), "compressed": pooled_weights(compressed, edges)}
    pooled["difference"] = pooled["compressed"] - pooled["exact"]
    rows, columns = np.tril_indices(len(edges) - 1)
    queries = {"query": edges[rows], "query_end": edges[rows + 1], "moved": moved[rows]}
    cells = pl.DataFrame(queries | {"key": edges[columns], "key_end": edges[columns + 1]})
    frames = [cells.with_columns(kind=pl.lit(k), weight=pl.Series(w[rows, columns])) for k, w in pooled.items()]
    return in_schema(pl.concat(frames), ATTENTION_MAP)


def block_edges(tokens: int, blocks: int) -> NDArray[np.int64]:
    """Where blocks begin, and where the last one ends: as equal as whole tokens allow, none empty."""
    return np.round(np.linspace(0, tokens, min(blocks, tokens) + 1)).astype(np.int64)


def pooled_weights(weights: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum over the keys of each block, mean over its queries: of ``[S, S]``, ``[blocks, blocks]``."""
    summed = np.add.reduceat(np.add.reduceat(weights, edges[:-1], axis=1), edges[:-1], axis=0)
    return np.asarray(summed / np.diff(edges)[:, None])


def _weights(q: mx.array, k: mx.array, scale: float) -> NDArray[np.float64]:
    """Causal attention weights ``[S, S]`` of queries and keys ``[S, D]``."""
    scores = mx.where(create_causal_mask(len(q), len(k) - len(q)), (q @ k.T) * scale, -mx.inf)
    return np.array(mx.softmax(scores, axis=-1, precise=True)).astype(np.float64)
