"""What a length of text costs: memory at its peak while it is read and while it is continued, and a token's time.

A peak is what MLX had allocated at most, less the model's weights: keys, values and codes, and everything that is
computed from them on the way. All caches of one call are measured in one run on one device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.models.llama import Model, ModelArgs

from veloxlab.integrate import exact_width, own_cache
from veloxlab.measure.buffers import CHUNK
from veloxlab.measure.progress import Progress, silent
from veloxlab.prompt_cache import make_cache

LENGTHS = {
    "cache": pl.String,
    "tokens": pl.Int64,
    "held_bytes": pl.Int64,  # by the cache after the prompt
    "prefill_peak_bytes": pl.Int64,  # while reading the tokens since the length before
    "decode_peak_bytes": pl.Int64,  # while computing the next token; null where that fails
    "decode_seconds": pl.Float64,  # of one token behind so many, median; null where that fails
}
"""Columns of `costs_by_length`."""

STEPS = 7

Maker = Callable[[], list[Any]]


def makers(model: Module, bits: Sequence[int] = (4,), theirs: Sequence[int] = (4, 8)) -> dict[str, Maker]:
    """The model's own cache, TurboQuant at some ``bits``, and mlx-lm's quantized cache at the widths ``theirs``."""
    own = {f"exact {exact_width(model)} bit": lambda: own_cache(model)}
    ours = {f"turboquant {b} bit": lambda b=b: make_cache(model, "turboquant", bits=b) for b in bits}
    quantized = {
        f"mlx-lm {b} bit": lambda b=b: [QuantizedKVCache(group_size=64, bits=b) for _ in model.layers] for b in theirs
    }
    return {**own, **quantized, **ours}


def costs_by_length(
    model: Module,
    caches: Mapping[str, Maker],
    lengths: Sequence[int],
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Fill each of ``caches`` up to each of ``lengths`` (ascending), with tokens at random; rows are `LENGTHS`."""
    ids = mx.random.randint(0, 90, (1, max(lengths)), key=mx.random.key(0))
    mx.eval(ids)
    rows: list[dict[str, object]] = []
    for name, make in caches.items():
        cache, done = make(), 0
        for tokens in lengths:
            progress(len(rows), len(caches) * len(lengths), f"{name}, {tokens:,} tokens")
            mx.clear_cache()
            mx.synchronize()
            if done == 0:
                weights = mx.get_active_memory()
            mx.reset_peak_memory()
            try:
                read(model, ids[:, done:tokens], cache, chunk)
            except RuntimeError as error:  # on CUDA mlx-lm's quantized cache has no product for some shapes
                progress(len(rows), len(caches) * len(lengths), f"{name} fails at {tokens:,} tokens: {error}")
                break
            done, prefill = tokens, mx.get_peak_memory() - weights
            held = sum(entry.nbytes for entry in cache)
            seconds, decode = _decoding(model, cache, weights)
            rows.append(
                {
                    "cache": name,
                    "tokens": tokens,
                    "held_bytes": held,
                    "prefill_peak_bytes": prefill,
                    "decode_peak_bytes": decode,
                    "decode_seconds": seconds,
                }
            )
        del cache
    return pl.DataFrame(rows, schema=LENGTHS)


def read(model: Module, ids: mx.array, cache: list[Any], chunk: int = CHUNK) -> None:
    """Feed ``ids`` ``[1, S]``, ``chunk`` at a time, up to the last layer: mlx-lm's generator makes no logits there."""
    layers: Any = getattr(model, "model", model)
    for start in range(0, ids.shape[1], chunk):
        hidden = layers(ids[:, start : start + chunk], cache=cache)
        mx.eval(hidden, [entry.state for entry in cache])


def _decoding(model: Module, cache: list[Any], weights: int) -> tuple[float | None, int | None]:
    """Median seconds of a token, and the bytes at the peak, or None where it fails; the cache is as before."""
    seconds = []
    mx.clear_cache()
    before = cache[0].offset
    try:
        for step in range(STEPS + 2):
            if step == 2:
                mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(model(mx.array([[1]]), cache=cache))
            mx.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:]), mx.get_peak_memory() - weights
    except RuntimeError:  # see above
        return None, None
    finally:
        for entry in cache:
            entry.trim(entry.offset - before)
        mx.eval([entry.state for entry in cache])


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 1e5,
    },
    "one layer of 7B": {  # of Mistral's
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
    },
}
"""Shapes of models that can be measured without their weights."""


def random_model(shape: str, **changes: Any) -> Model:
    """A model of one of `SHAPES`, but for ``changes``, with random weights in half precision and a small vocabulary."""
    model = Model(
        ModelArgs(**{"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 96, **SHAPES[shape], **changes})
    )
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model
