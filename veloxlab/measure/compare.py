"""Caches side by side: what they change on the same tokens, how long they take, and the bytes they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from veloxlab.cache import CompressedKVCache
from veloxlab.calibration import calibrate
from veloxlab.codecs import METHODS, Method, Role, find_method
from veloxlab.codecs.codec import Sample
from veloxlab.integrate import probe
from veloxlab.measure.activations import capture
from veloxlab.measure.progress import Progress, silent
from veloxlab.measure.quality import FIDELITY, judge, reference
from veloxlab.measure.speed import cache_speed
from veloxlab.prompt_cache import make_cache

GROUP_SIZE = 64  # mlx-lm's default
EVERYTHING: dict[str, Any] = {"sinks": 0, "window": 0}  # no token is kept exact

COMPARED = FIDELITY | {
    "store_us": pl.Float64,  # microseconds to store one token's key and value in one layer, in a block of 512
    "store_ratio": pl.Float64,  # times the exact cache's
    "attend_us": pl.Float64,  # microseconds for one query to attend to 512 tokens in one layer
    "attend_ratio": pl.Float64,  # times the exact cache's
}
"""Columns of `compare`."""

RATIOS = {
    "name": pl.String,
    "tokens": pl.Int64,
    "head_dim": pl.Int64,
    "key_ratio": pl.Float64,  # bytes of 16-bit keys / bytes held for keys, tables included
    "value_ratio": pl.Float64,
    "ratio": pl.Float64,  # of keys and values together
}
"""Columns of `byte_ratios`."""


def compare(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    *,
    bits: tuple[int, ...] = (1, 2, 3, 4),
    text: str | None = None,
    tokens: int = 512,
    windows: int = 3,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure every method at those of ``bits`` that it has, and mlx-lm's quantized cache: a row each, `COMPARED`.

    Everything is compressed, no token is kept exact, and each is seen through its codes. Methods that have to be
    calibrated are, on the validation text.
    """
    jobs = [(m, b) for m in METHODS.values() if m.id != "none" for b in bits if b in m.bits]
    theirs = [b for b in (2, 3, 4, 8) if b in bits or b == 8]
    steps = len(jobs) + len(theirs)
    exact = reference(model, tokenizer, text=text, tokens=tokens, windows=windows)
    seen = capture(model, tokenizer, text, tokens=tokens).layers[0]
    plain = cache_speed(seen, KVCache)

    def row(name: str, make: Callable[[Module], list[Any]]) -> pl.DataFrame:
        store, attend = cache_speed(seen, lambda: make(model)[seen.layer])
        return judge(exact, make, name=name).with_columns(
            store_us=pl.lit(1e6 * store / len(exact.stretches[0])),
            store_ratio=pl.lit(store / plain[0]),
            attend_us=pl.lit(1e6 * attend),
            attend_ratio=pl.lit(attend / plain[1]),
        )

    rows = []
    for i, (method, width) in enumerate(jobs):
        name = f"{method.id} {width} bit"
        progress(i, steps, name)
        rows.append(row(name, _ours(model, tokenizer, method, width)).with_columns(chunk=pl.lit("codes")))
    for i, width in enumerate(theirs, start=len(jobs)):
        name = f"mlx-lm {width} bit"
        progress(i, steps, name)
        rows.append(row(name, _quantized(width)))
    progress(steps, steps, "done")
    return pl.concat(rows).match_to_schema(COMPARED)


def _ours(model: Module, tokenizer: Any, method: Method, bits: int) -> Callable[[Module], list[Any]]:  # noqa: ANN401
    fitted = calibrate(model, tokenizer, method.id, bits=bits) if method.calibrated else None
    return lambda m: make_cache(m, method.id, bits=bits, calibration=fitted, chunk="codes", **EVERYTHING)


def _quantized(bits: int) -> Callable[[Module], list[Any]]:
    return lambda model: [QuantizedKVCache(group_size=GROUP_SIZE, bits=bits) for _ in probe(model)]


@dataclass(frozen=True)
class Shape:
    """A layer's cache: KV heads, head dimension and tokens."""

    kv_heads: int = 8
    head_dim: int = 128
    tokens: int = 8192


LONG = Shape()
PRESETS = (("vecinfer", 1, 1), ("rvq", 2, 2), ("rabitq", 1, 4), ("turboquant", 2, 2), ("turboquant", 4, 4))


def byte_ratios(shape: Shape = LONG) -> pl.DataFrame:
    """Fill real caches of one layer with random keys and values, and read their bytes: `RATIOS`.

    Presets are a method, bits of keys and bits of values. Codebooks are counted; they are fitted to random vectors.
    """
    key = mx.random.key(0)
    x = mx.random.normal((1, shape.kv_heads, shape.tokens, shape.head_dim), key=key).astype(mx.float16)
    mx.eval(x)
    rows = []
    for name, key_bits, value_bits in PRESETS:
        sides: tuple[tuple[Role, int], ...] = (("keys", key_bits), ("values", value_bits))
        codecs = []
        for role, width in sides:
            codec = find_method(name).codec(shape.head_dim, width, role)
            codecs.append(codec.fit(Sample(x[:, :, :1024].astype(mx.float32))))
        cache = CompressedKVCache(codecs[0], codecs[1], sinks=0, window=0)
        cache.update_and_fetch(x, x)
        mx.eval(cache.state)
        keys = cache.side_nbytes("keys") + codecs[0].shared_bytes
        values = cache.side_nbytes("values") + codecs[1].shared_bytes
        rows.append(
            {
                "name": f"{name} K{key_bits} V{value_bits}",
                "tokens": shape.tokens,
                "head_dim": shape.head_dim,
                "key_ratio": x.nbytes / keys,
                "value_ratio": x.nbytes / values,
                "ratio": 2 * x.nbytes / (keys + values),
            }
        )
    return pl.DataFrame(rows, schema=RATIOS)
