"""Bytes that are really held: the live buffers of a cache, beside what 16-bit keys and values would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import polars as pl
from mlx_lm.models.cache import KVCache

from veloxlab.cache import Chunk, CompressedKVCache
from veloxlab.codecs import find_method
from veloxlab.measure.activations import Capture
from veloxlab.measure.progress import Progress, silent

REPORT = {
    "layer": pl.Int32,  # null for tables that all layers share
    "path": pl.String,  # "codes", "arrays", "own" (the model's own cache) or "shared"
    "reason": pl.String,
    "key_bits": pl.Float64,  # true bits per packed value: codes, scales, padding
    "value_bits": pl.Float64,
    "tokens": pl.Int64,
    "exact_tokens": pl.Int64,  # sinks and window
    "held_bytes": pl.Int64,
    "fp16_bytes": pl.Int64,  # 16-bit keys and values of the same tokens
}
"""Columns of `report`."""

GROWTH = {
    "tokens": pl.Int64,
    "cache": pl.String,
    "layer": pl.Int32,
    "bytes": pl.Int64,  # held by this layer
    "kind": pl.String,  # "measured"
}
"""Columns of `memory_growth`."""


def report(cache: Sequence[Any]) -> pl.DataFrame:
    """What each layer of a prompt cache holds, how attention reads it, and why: `REPORT`.

    The last row holds the constant tables (rotations, codebooks) that equal codecs share in a process.
    """
    rows = [_row(i, layer) for i, layer in enumerate(cache)]
    ours = [layer for layer in cache if isinstance(layer, CompressedKVCache)]
    codecs = {codec for layer in ours for codec in (layer.key_codec, layer.value_codec)}
    if codecs:
        reason = f"tables of {len(codecs)} codec{'s' if len(codecs) > 1 else ''}, held once for all layers"
        shared = sum(codec.shared_bytes for codec in codecs)
        rows.append({"path": "shared", "reason": reason, "tokens": 0, "held_bytes": shared, "fp16_bytes": 0})
    return pl.DataFrame(rows, schema=REPORT)


def _row(index: int, layer: Any) -> dict[str, object]:  # noqa: ANN401 - mlx-lm's caches share no base that says more
    if isinstance(layer, CompressedKVCache):
        return {
            "layer": index,
            "path": layer.path,
            "reason": layer.reason,
            "key_bits": layer.key_codec.bits_per_value,
            "value_bits": layer.value_codec.bits_per_value,
            "tokens": layer.offset,
            "exact_tokens": layer.sinks.tokens + layer.recent.tokens,
            "held_bytes": layer.nbytes,
            "fp16_bytes": layer.fp16_bytes,
        }
    empty = layer.empty()
    keys_and_values = getattr(layer, "keys_and_values", None)
    bits = getattr(layer, "bits", None)
    fp16 = None
    if not empty and keys_and_values is not None:
        fp16 = _fp16_bytes(keys_and_values(), bits)
    return {
        "layer": index,
        "path": "own",
        "reason": f"the model's own {type(layer).__name__}",
        "tokens": 0 if empty else layer.size() or getattr(layer, "offset", 0),
        "held_bytes": 0 if empty else layer.nbytes,
        "fp16_bytes": fp16,
    }


def _fp16_bytes(keys_and_values: tuple[Any, Any], bits: int | None) -> int:
    """Bytes of the same values in 16 bits; mlx-lm's quantized caches hold (packed words, scales, biases)."""
    if bits:
        return sum(2 * words.size * 32 // bits for words, _, _ in keys_and_values)
    return sum(2 * x.size for x in keys_and_values)


def memory_growth(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int = 4,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int = 4,
    window: int = 64,
    upto: int = 4096,
    points: int = 8,
    chunk: Chunk = "exact",
    name: str | None = None,
    progress: Progress = silent,
    **options: object,
) -> pl.DataFrame:
    """Fill real caches with the captured keys and values, repeated up to ``upto`` tokens, and read their bytes.

    Columns: `GROWTH`. Each layer gets ``points`` rows at evenly spaced lengths. Layers of one shape hold the same, so
    one cache is filled for each shape. mlx-lm's own ``KVCache`` with the same tokens in 16 bits is there as ``"fp16"``.
    """
    name = name or f"{method} K{key_bits or bits} V{value_bits or bits}"
    lengths = [upto * (i + 1) // points for i in range(points)]
    shapes: dict[tuple[int, ...], dict[str, list[tuple[int, int]]]] = {}
    rows: list[dict[str, object]] = []
    for layer in capture.layers:
        shape = (*layer.keys.shape[1:2], layer.keys.shape[-1], layer.values.shape[-1])
        if shape not in shapes:
            cache = CompressedKVCache(
                find_method(method).codec(shape[1], key_bits or bits, "keys", **options),
                find_method(method).codec(shape[2], value_bits or bits, "values", **options),
                sinks=sinks,
                window=window,
                chunk=chunk,
                layer=layer.layer,
            )
            keys, values = layer.keys.astype(mx.float16), layer.values.astype(mx.float16)
            shapes[shape] = {
                name: _fill(cache, layer.keys, layer.values, lengths, progress),
                "fp16": _fill(KVCache(), keys, values, lengths, silent),
            }
        rows += [
            {"tokens": tokens, "cache": label, "layer": layer.layer, "bytes": held, "kind": "measured"}
            for label, fill in shapes[shape].items()
            for tokens, held in fill
        ]
    return pl.DataFrame(rows, schema=GROWTH)


def _fill(
    cache: CompressedKVCache | KVCache, keys: mx.array, values: mx.array, lengths: Sequence[int], progress: Progress
) -> list[tuple[int, int]]:
    held = []
    for i, target in enumerate(lengths):
        while cache.offset < target:
            count = min(target - cache.offset, keys.shape[2])
            cache.update_and_fetch(keys[:, :, :count], values[:, :, :count])
        mx.eval(cache.state)
        held.append((target, cache.nbytes))
        progress(i + 1, len(lengths), f"filling {target} tokens")
    return held
