"""Measured bytes: the live buffers of a cache, beside 16-bit keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import polars as pl
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.make import sequences_of
from veloxlab.cache.plan import DEFAULT_SINKS, DEFAULT_WINDOW, cache_name, tensor_bits, usual_bits
from veloxlab.checks import CACHE, checked, measured, whole
from veloxlab.codecs import TENSORS
from veloxlab.codecs.base import token_bytes
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.frames import in_schema, schema
from veloxlab.mlxlm.probe import slots_of
from veloxlab.progress import Progress, may_end, silent

REPORT = schema("layer path reason key_bits value_bits tokens exact_tokens held_bytes fp16_bytes")
"""Columns of `report`: layer, null for tables that all layers share; "codes", "latents", "arrays", "own" (the model's
own cache) or "shared", and the reason; true bits of a packed value with scales and padding; held tokens that it can
see, of all sequences, and those in sinks and window; held bytes, and bytes of the same tokens in 16 bits."""

GROWTH = schema("tokens cache layer tensor bytes kind")
"""Columns of `memory_growth`: bytes held for one tensor of one layer, "measured" or "predicted"."""

NO_CODES = "no token is in codes yet: sinks and window hold all, exactly, in the model's own type"
EXACT_BITS = 16  # of a value; fewer bits are a code

CODE_BITS = schema("layer tensor part bits_per_value")
"""Columns of `code_bits`: "codes", or "scales" for norms and scales; their bits of a packed value. They add up."""


def bytes_of(arrays: Any) -> int:  # noqa: ANN401 - a tree of arrays
    """Return the bytes of all arrays of a tree, such as a model's parameters."""
    leaves: Any = tree_flatten(arrays)
    return sum(array.nbytes for _, array in leaves)


@checked(cache=CACHE)
def report(cache: Sequence[Any]) -> pl.DataFrame:
    """Return bytes, path and reason of each layer of a cache: `REPORT`; shared tables are the last row.

    ``fp16_bytes`` counts 16 bits a number. Exact tokens of a model that computes in float32, as on a CPU, take 32, so a
    short text can hold more bytes than that.
    """
    rows = [{"layer": i} | _held(slot) for i, entry in enumerate(cache) for slot in slots_of([entry])]
    codecs = {codec for ours in _ours(cache) for codec in (ours.key_codec, ours.value_codec)}
    if codecs:
        reason = f"tables of {len(codecs)} codec{'s' if len(codecs) > 1 else ''}, held once for all layers"
        shared = sum(codec.shared_bytes for codec in codecs)
        rows.append({"path": "shared", "reason": reason, "tokens": 0, "held_bytes": shared, "fp16_bytes": 0})
    return pl.DataFrame(rows, schema=REPORT)


def coded_tokens(cache: Sequence[Any]) -> int:
    """Return the tokens that a cache holds in fewer than 16 bits, in the layer with the most of them."""
    held = report(cache).filter(pl.min_horizontal("key_bits", "value_bits") < EXACT_BITS)
    return int(held.select((pl.col("tokens") - pl.col("exact_tokens").fill_null(0)).max()).item() or 0)


def _ours(slots: Sequence[Any]) -> list[CompressedKVCache]:
    return [part for part in sequences_of(slots) if isinstance(part, CompressedKVCache)]


def _held(slot: Any) -> dict[str, object]:  # noqa: ANN401 - mlx-lm's caches have no common base with more
    if ours := _ours([slot]):
        held = {
            "layer": ours[0].layer,
            "path": ours[0].path,
            "reason": ours[0].reason,
            "key_bits": ours[0].key_codec.bits_per_value,
            "value_bits": ours[0].value_codec.bits_per_value,
            "tokens": sum(one.size() for one in ours),
            "exact_tokens": sum(one.sinks.tokens + one.recent.tokens for one in ours),
            "held_bytes": slot.nbytes,
            "fp16_bytes": sum(one.fp16_bytes for one in ours),
        }
        return held | ({"reason": NO_CODES} if held["tokens"] and held["tokens"] == held["exact_tokens"] else {})
    row = {"path": "own", "reason": getattr(slot, "reason", f"the model's own {type(slot).__name__}")}
    if slot.empty():
        return row | {"tokens": 0, "held_bytes": 0, "fp16_bytes": 0}
    row |= {"tokens": getattr(slot, "offset", None) or slot.size(), "held_bytes": slot.nbytes}
    if hasattr(slot, "keys_and_values"):
        bits = getattr(slot, "bits", None)
        stored = [x if bits else (x,) for x in slot.keys_and_values()]  # quantized: words, scales and biases
        counts = [parts[0].size * 32 // (bits or 32) for parts in stored]
        sizes = (8 * sum(part.nbytes for part in parts) for parts in stored)
        row["key_bits"], row["value_bits"] = (size / count for size, count in zip(sizes, counts, strict=True))
        row["fp16_bytes"] = 2 * sum(counts)
    return row


@checked()
def code_bits(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    calibration: Calibration | None = None,
    **options: object,
) -> pl.DataFrame:
    """Return true bits per value of packed keys and values in each layer, as `token_bytes` counts them: `CODE_BITS`."""
    width = usual_bits(method, capture.exact_bits, bits)
    rows = []
    for layer in capture.layers:
        heads = layer.keys.shape[1]
        for tensor in TENSORS:
            codec = layer.codec(tensor, method, width, calibration, options)
            sizes = zip(("codes", "scales"), token_bytes(codec, heads, capture.exact_bits // 8), strict=True)
            rows += [(layer.layer, tensor, part, 8 * nbytes / (heads * codec.head_dim)) for part, nbytes in sizes]
    return pl.DataFrame(rows, schema=CODE_BITS, orient="row")


@checked(growth=measured(GROWTH, "vl.measure.memory_growth"))
def predicted_growth(growth: pl.DataFrame, upto: int) -> pl.DataFrame:
    """Return `GROWTH` with rows at ``upto`` tokens, if not measured, on lines through the last two measured points."""
    if growth["tokens"].n_unique() < 2:
        raise InputError("A line needs two points: give a growth that was measured at two numbers of tokens or more.")
    groups = growth.sort("tokens").group_by("cache", "layer", "tensor", maintain_order=True)
    tokens, nbytes = pl.col("tokens"), pl.col("bytes")
    slope = (nbytes.last() - nbytes.get(-2)) / (tokens.last() - tokens.get(-2))
    ahead = groups.agg(
        bytes=(nbytes.last() + slope * (upto - tokens.last())).round().cast(pl.Int64),
        tokens=pl.lit(upto, pl.Int64),
        kind=pl.lit("predicted"),
        last=tokens.last(),
    )
    return pl.concat([growth, ahead.filter(pl.col("last") < upto).select(growth.columns)])


@checked(points=whole(1))
def memory_growth(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    upto: int = 4096,
    points: int = 8,
    name: str | None = None,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    **options: object,
) -> pl.DataFrame:
    """Fill real caches with the captured keys and values, repeated up to ``upto`` tokens, and read their bytes.

    Columns: `GROWTH`. Each tensor of each layer has ``points`` rows, at evenly spaced lengths. One cache is filled for
    each shape of layer. ``"fp16"`` is mlx-lm's own ``KVCache`` in 16 bits.
    """
    if upto < points:
        raise InputError(f"upto={upto} tokens have no {points} lengths: give more tokens, or fewer points.")
    widths = tensor_bits(method, capture.exact_bits, bits, key_bits, value_bits)
    lengths = [upto * (i + 1) // points for i in range(points)]
    filled: dict[tuple[int, ...], pl.DataFrame] = {}
    frames = []
    for layer in capture.layers:
        shape = (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
        if shape not in filled:
            codecs = [layer.codec(tensor, method, widths[tensor], calibration, options) for tensor in TENSORS]
            ours = CompressedKVCache(*codecs, sinks=sinks, window=window, layer=layer.layer)
            caches = ((name or cache_name(method, widths), ours), ("fp16", KVCache()))
            filled[shape] = pl.concat(_filled(label, cache, layer, lengths, progress) for label, cache in caches)
        frames.append(filled[shape].with_columns(layer=pl.lit(layer.layer), kind=pl.lit("measured")))
    return in_schema(pl.concat(frames), GROWTH)


def _filled(
    label: str, cache: CompressedKVCache | KVCache, layer: LayerCapture, lengths: Sequence[int], progress: Progress
) -> pl.DataFrame:
    """Return tokens, cache, tensor and bytes at each of ``lengths``; mlx-lm's cache is filled in 16 bits."""
    keys, values = layer.keys, layer.values
    if isinstance(cache, KVCache):
        keys, values = keys.astype(mx.float16), values.astype(mx.float16)
    rows = []
    for i, target in enumerate(lengths):
        while cache.offset < target:
            may_end()
            count = min(target - cache.offset, keys.shape[2])
            cache.update_and_fetch(keys[:, :, :count], values[:, :, :count])
        mx.eval(cache.state)
        for tensor in TENSORS:
            held = getattr(cache, tensor).nbytes if isinstance(cache, KVCache) else cache.tensor_nbytes(tensor)
            rows.append((target, label, tensor, held))
        progress(i + 1, len(lengths), f"filling {label} with {target} tokens")
    return pl.DataFrame(rows, schema=("tokens", "cache", "tensor", "bytes"), orient="row")
