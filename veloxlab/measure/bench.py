"""Times of attention and decoding on this device, compressed against exact and against mlx-lm's own quantized cache.

All rows of one call are of one run on one device, to be read as ratios. Times are medians, in microseconds. Calls are
timed many at once, as the layers of a model are, and alone. Every one of many has a cache of its own, as far as memory
allows, so that none is left in the GPU's second-level cache.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.models.llama import Model

from veloxlab import runtime
from veloxlab.attention import History, Segment
from veloxlab.codecs import METHODS
from veloxlab.codecs.codec import Code, Codec, Sample
from veloxlab.codecs.method import Role
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.kernels.checked import states
from veloxlab.kernels.launch import gpu
from veloxlab.measure.lengths import random_model
from veloxlab.measure.speed import median_seconds
from veloxlab.prompt_cache import make_cache

Row = dict[str, Any]
Progress = Callable[[str], None]
REPEATS = 9
IN_A_ROW = 32  # calls that are evaluated together: as many as a model of 8 billion parameters has layers
_CACHE_BYTES = 2 << 30  # of the caches that the calls of a row take in turn
_SIXTEEN = 2  # bytes of a number of the exact cache


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dimension of a layer."""

    query_heads: int
    kv_heads: int
    head_dim: int


SHAPES = (Shape(32, 8, 128), Shape(16, 2, 128), Shape(8, 1, 256))
TOKENS = (4096, 32768, 131072)
BITS = (2, 3, 4, 8)
LONGEST_DECODE = 32768  # tokens behind which whole models are timed
CHUNK = 2048  # tokens of a prefill that are encoded at once
ENCODED = ("turboquant", "rvq", "rabitq", "ratequant", "spectralquant", "qjl")  # methods whose encoding is timed
_ENCODED_BITS = 4
_ROLES: tuple[Role, Role] = ("keys", "values")


def facts() -> Row:
    """Device, versions, date, and what was found of the kernels."""
    device = runtime.device()
    versions = runtime.installed_versions(("veloxlab", "mlx", "mlx-lm"))
    return {
        "device": device.name,
        "backend": device.backend,
        "memory_gib": round(device.memory_bytes / 2**30, 1),
        "kernels": gpu() or "none",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "kernel_states": states(),
    }


def decode_attention(
    shapes: Sequence[Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    bits: Sequence[int] = BITS,
    progress: Progress = print,
) -> list[Row]:
    """One query token that attends to ``tokens`` others: exact in 16 bits, mlx-lm at 4 and 8 bits, ours.

    Rows: ``cache, query_heads, kv_heads, head_dim, tokens, microseconds, alone_microseconds, bytes,
    gigabytes_per_second, ratio`` (to the exact cache's time of the same shape).
    """
    rows: list[Row] = []
    for shape in shapes:
        for count in tokens:
            ways: list[tuple[str, Callable[[], list[Callable[[], mx.array]]]]] = [
                ("exact 16 bit", lambda s=shape, n=count: _exact(s, n)),  # type: ignore[misc]
                *((f"mlx-lm {b} bit", lambda b=b, s=shape, n=count: _mlx_lm(s, n, b)) for b in (4, 8)),
                *((f"turboquant {b} bit", lambda b=b, s=shape, n=count: _ours(s, n, b)) for b in bits),
            ]
            exact_time = 0.0
            for name, make in ways:
                calls = make()
                in_a_row, alone = _microseconds(calls)
                exact_time = exact_time or in_a_row
                size = _bytes(name, shape, count)
                rows.append(
                    {
                        "cache": name,
                        "query_heads": shape.query_heads,
                        "kv_heads": shape.kv_heads,
                        "head_dim": shape.head_dim,
                        "tokens": count,
                        "microseconds": in_a_row,
                        "alone_microseconds": alone,
                        "bytes": size,
                        "gigabytes_per_second": size / in_a_row / 1e3,
                        "ratio": in_a_row / exact_time,
                    }
                )
                progress(f"{shape.query_heads}/{shape.kv_heads}×{shape.head_dim}, {count}: {name}, {in_a_row:.0f} µs")
                del calls
                mx.clear_cache()
    return rows


def copy_bandwidth() -> float:
    """Gigabytes a second of a large copy, read and written: what a roofline is made of."""
    source = mx.zeros((1 << 28,), mx.float32)
    mx.eval(source)
    seconds = median_seconds(lambda: source + 1, REPEATS)
    return 2 * source.nbytes / seconds / 1e9


def decode_steps(
    layers: int = 8, tokens: Sequence[int] = (4096, 32768), bits: Sequence[int] = (4, 3), progress: Progress = print
) -> list[Row]:
    """Decoding with a random model of an 8-billion-parameter's layer shape: milliseconds a token, and against exact.

    The caches are filled with random keys and values; nothing is prefilled. Rows: ``cache, layers, tokens,
    milliseconds, ratio`` (exact time over this one's: more than 1 is faster), ``held_bytes``. A cache that MLX cannot
    read on this device is told to ``progress`` and left out.
    """
    model = _model(layers)
    rows: list[Row] = []
    for count in tokens:
        exact_time = 0.0
        for name in ("exact 16 bit", "mlx-lm 4 bit", *(f"turboquant {b} bit" for b in bits)):
            caches = _filled(model, name, count)
            try:
                seconds = _step_seconds(model, caches)
            except RuntimeError as error:
                # MLX 0.32.4 on CUDA has no product of one row with quantized ones for some numbers of tokens
                progress(f"decode step behind {count} tokens: {name} fails: {error}")
                continue
            exact_time = exact_time or seconds
            held = sum(cache.nbytes for cache in caches)
            rows.append(
                {
                    "cache": name,
                    "layers": layers,
                    "tokens": count,
                    "milliseconds": seconds * 1e3,
                    "ratio": exact_time / seconds,
                    "held_bytes": held,
                }
            )
            progress(f"decode step behind {count} tokens: {name}, {seconds * 1e3:.2f} ms")
            del caches
            mx.clear_cache()
    return rows


def encode_steps(
    shape: Shape = SHAPES[0],
    behind: int = LONGEST_DECODE,
    chunk: int = CHUNK,
    methods: Sequence[str] = ENCODED,
    progress: Progress = print,
) -> list[Row]:
    """What it takes to encode the keys and values of all layers: of one decoded token, and of a chunk of a prefill.

    Rows: ``cache, query_heads, kv_heads, head_dim, layers, tokens, microseconds, attention_microseconds, ratio``. Both
    times are of all layers, evaluated together; ``attention`` is that of one token to ``behind`` others, in 4-bit
    codes, and ``ratio`` is to it. Calibrated methods are fitted to random vectors, once for all layers.
    """
    attention, _ = _microseconds(_ours(shape, behind, _ENCODED_BITS))
    rows: list[Row] = []
    for name in methods:
        codecs = [_encoder(name, shape, role) for role in _ROLES]
        for count in (1, chunk):
            pairs = [[_normal(shape, count) for _ in codecs] for _ in range(IN_A_ROW)]
            mx.eval(pairs)
            calls = [partial(_encode, codecs, pair) for pair in pairs]
            each, _ = _microseconds(calls)
            rows.append(
                {
                    "cache": f"{name} {_ENCODED_BITS} bit",
                    "query_heads": shape.query_heads,
                    "kv_heads": shape.kv_heads,
                    "head_dim": shape.head_dim,
                    "layers": IN_A_ROW,
                    "tokens": count,
                    "microseconds": each * IN_A_ROW,
                    "attention_microseconds": attention * IN_A_ROW,
                    "ratio": each / attention,
                }
            )
            progress(f"encoding {count} tokens of {IN_A_ROW} layers: {name}, {each * IN_A_ROW:.0f} µs")
            del calls, pairs
            mx.clear_cache()
    return rows


def _encode(codecs: Sequence[Codec], vectors: Sequence[mx.array]) -> list[dict[str, mx.array]]:
    return [codec.encode(x).arrays for codec, x in zip(codecs, vectors, strict=True)]


def _encoder(name: str, shape: Shape, role: Role) -> Codec:
    """A codec of a method, fitted to random vectors; of RateQuant with heads of two widths."""
    bits = _ENCODED_BITS
    options: Row = {}
    if name == "ratequant":
        options["head_bits"] = tuple(bits + (-1) ** head for head in range(shape.kv_heads))
    return METHODS[name].codec(shape.head_dim, bits, role, **options).fit(Sample(_normal(shape, 8 * shape.head_dim)))


def _copies(bytes_each: int) -> int:
    """How many caches the calls of a row take in turn."""
    return max(1, min(IN_A_ROW, _CACHE_BYTES // bytes_each))


def _query(shape: Shape) -> mx.array:
    return mx.random.normal((1, shape.query_heads, 1, shape.head_dim)).astype(mx.float16)


def _normal(shape: Shape, tokens: int) -> mx.array:
    return mx.random.normal((1, shape.kv_heads, tokens, shape.head_dim)).astype(mx.float16)


def _exact(shape: Shape, tokens: int) -> list[Callable[[], mx.array]]:
    q, scale = _query(shape), shape.head_dim**-0.5
    count = _copies(2 * _SIXTEEN * shape.kv_heads * tokens * shape.head_dim)
    pairs = [(_normal(shape, tokens), _normal(shape, tokens)) for _ in range(count)]
    mx.eval(q, pairs)
    return [lambda k=k, v=v: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale) for k, v in pairs]  # type: ignore[misc]


def _mlx_lm(shape: Shape, tokens: int, bits: int) -> list[Callable[[], mx.array]]:
    q, scale, group = _query(shape), shape.head_dim**-0.5, 64
    count = _copies(2 * shape.kv_heads * tokens * shape.head_dim * bits // 8)
    pairs = [
        tuple(mx.quantize(_normal(shape, tokens), group_size=group, bits=bits) for _ in range(2)) for _ in range(count)
    ]
    mx.eval(q, pairs)
    attention = base.quantized_scaled_dot_product_attention
    return [
        lambda k=k, v=v: attention(q, k, v, scale=scale, mask=None, group_size=group, bits=bits)  # type: ignore[misc]
        for k, v in pairs
    ]


def _ours(shape: Shape, tokens: int, bits: int) -> list[Callable[[], mx.array]]:
    q, scale = _query(shape), shape.head_dim**-0.5
    keys, values = TurboQuant(shape.head_dim, bits), TurboQuant(shape.head_dim, bits, "mse")
    count = _copies(2 * shape.kv_heads * tokens * shape.head_dim * bits // 8)
    histories = [
        History((Segment(keys, _code(keys, shape, tokens), values, _code(values, shape, tokens)),))
        for _ in range(count)
    ]
    mx.eval(q)
    return [lambda h=h: h.attend(q, scale, None) for h in histories]  # type: ignore[misc]


def _code(codec: TurboQuant, shape: Shape, tokens: int) -> Code:
    """A code of random bits and scales: how long it takes to read depends on neither."""
    made_up = codec.reader(codec.encode(_normal(shape, 1))).made_up(tokens, seed=tokens)
    mx.eval(made_up.rows, made_up.root_scale)
    assert made_up.root_scale is not None
    return Code({"codes": made_up.rows, "root_scale": made_up.root_scale})


def _bytes(name: str, shape: Shape, tokens: int) -> int:
    """Bytes of keys and values that one call has to read."""
    values = 2 * shape.kv_heads * tokens * shape.head_dim
    if name.startswith("exact"):
        return values * _SIXTEEN
    bits = int(name.split()[1])
    per_value = bits + (32 / 64 if name.startswith("mlx-lm") else 16 / shape.head_dim)
    return round(values * per_value / 8)


def _microseconds(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Median time of a call, of many evaluated together and of one alone."""
    calls = [calls[i % len(calls)] for i in range(IN_A_ROW)]
    return (
        median_seconds(lambda: [call() for call in calls], REPEATS) / IN_A_ROW * 1e6,
        median_seconds(calls[0], REPEATS) * 1e6,
    )


def _model(layers: int) -> Model:
    """Layers of the shape of an 8B model with random weights in half precision, and a small vocabulary."""
    return random_model("one layer of 7B", num_hidden_layers=layers, vocab_size=4096)


def _filled(model: Model, name: str, tokens: int) -> list[Any]:
    """Caches that hold ``tokens`` random keys and values in every layer."""
    layers = len(model.layers)
    if name.startswith("exact"):
        caches: list[Any] = [KVCache() for _ in range(layers)]
    elif name.startswith("mlx-lm"):
        caches = [QuantizedKVCache(group_size=64, bits=int(name.split()[1])) for _ in range(layers)]
    else:
        caches = make_cache(model, "turboquant", bits=int(name.split()[1]))
    shape = Shape(32, 8, 128)
    for cache in caches:
        for start in range(0, tokens, 4096):
            count = min(4096, tokens - start)
            cache.update_and_fetch(_normal(shape, count), _normal(shape, count))
            mx.eval(cache.state)
    return caches


def _step_seconds(model: Model, caches: list[Any], steps: int = 24) -> float:
    """Median seconds of decoding one token, after a few."""
    token, seconds = mx.array([[1]]), []
    for step in range(steps + 4):
        start = time.perf_counter()
        token = mx.argmax(model(token, cache=caches)[:, -1:], axis=-1)
        mx.eval(token)
        if step >= 4:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
