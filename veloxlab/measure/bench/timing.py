"""Times of single calls: attention of one token (exact, mlx-lm's quantized, over codes), and encoding.

Calls are timed many at once, as in the layers of a model, and alone. Evaluation and building the graph are timed
separately, because a generator builds a token's graph while the GPU works on the one before. Each call has its own
cache, as far as memory allows, and its own query, because mlx-lm's quantized attention scales its query in place.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import base

from veloxlab import runtime
from veloxlab.cache.attention import History
from veloxlab.cache.counts import BLOCK, CHUNK
from veloxlab.cache.past import Segment
from veloxlab.codecs import METHODS, TENSORS, Tensor
from veloxlab.codecs.base import Code, Codec, Sample
from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels.checked import states
from veloxlab.kernels.devices import current_backend
from veloxlab.measure.bench.shapes import SHAPES, Shape
from veloxlab.measure.memory import bytes_of
from veloxlab.mlxlm.quantized import GROUP

Row = dict[str, Any]
Tell = Callable[[str], None]
REPEATS = 9
FIRST_TRIES = 2
IN_A_ROW = 32  # calls that are evaluated together: the layers of a model of 8 billion parameters
LONGER = 4  # factor of a longer row, for the time of one more call
TOKENS = (4096, 32768, 131072)
BITS = (2, 3, 4, 8)
METHOD_BITS = 4
FRACTION = 2.25  # bits of methods that take fractions
ENCODED = tuple(method.id for method in METHODS.values() if method.timed)
_TILE = 1024  # random tokens that are encoded once, and repeated
_CACHE_BYTES = 2 << 30  # of all caches that the calls of a row use in turn

Cache = tuple[Callable[[mx.array], mx.array], Any]
"""Attention of a query to a cache, and the cache's arrays."""


class Microseconds(NamedTuple):
    """Median times of a call: one more call after others, the build of its graph, and both for a single call.

    ``spread`` is of the evaluation.
    """

    evaluating: float
    making: float
    alone: float
    spread: float


def facts() -> Row:
    """Return device, driver, versions, date, and the state of the kernels."""
    device, backend = runtime.device(), current_backend()
    return {
        "device": device.name,
        "driver": runtime.driver(),
        "backend": device.backend,
        "memory_gib": round(device.memory_bytes / 2**30, 1),
        "kernels": "none" if backend is None else backend.name,
        "python": platform.python_version(),
        "versions": runtime.installed_versions(("veloxlab", "mlx", "mlx-lm")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "kernel_states": states(),
    }


def microseconds(calls: Sequence[Callable[[], object]]) -> Microseconds:
    """Time ``calls``, each of which returns a lazy result, in turn.

    A GPU is idle until it gets the first of them. So a row of `IN_A_ROW` calls is subtracted from a longer
    row, and the difference is the time of the others.
    """
    of_rows = []
    for count in (IN_A_ROW, LONGER * IN_A_ROW):
        row = [calls[i % len(calls)] for i in range(count)]
        times = [_timed(lambda row=row: [call() for call in row]) for _ in range(FIRST_TRIES + REPEATS)]  # type: ignore[misc]
        of_rows.append([statistics.median(part) for part in zip(*times[FIRST_TRIES:], strict=True)])
    making, evaluating = (1e6 * _one_more(*pair) for pair in zip(*of_rows, strict=True))
    noise = spread([late for _, late in times[FIRST_TRIES:]])
    return Microseconds(evaluating, making, 1e6 * median_seconds(calls[0], REPEATS), noise)


def spread(times: Sequence[float]) -> float:
    """Return half the interquartile range of repeats, over their median; 0 for one repeat."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


def _one_more(short: float, longer: float) -> float:
    """Return the seconds of one more call; an upper limit if other work slowed the short row."""
    more = (longer - short) / ((LONGER - 1) * IN_A_ROW)
    return more if more > 0 else longer / (LONGER * IN_A_ROW)


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median time of evaluating the result of ``work``, on an idle device, after `FIRST_TRIES`."""
    return statistics.median([seconds(work) for _ in range(FIRST_TRIES + repeats)][FIRST_TRIES:])


def seconds(work: Callable[[], object]) -> float:
    """Return the time of evaluating the result of ``work``, on an idle device."""
    return sum(_timed(work))


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    mx.synchronize()
    start = time.perf_counter()
    made = work()
    between = time.perf_counter()
    mx.eval(made)
    mx.synchronize()
    return between - start, time.perf_counter() - between


def vectors(shape: Shape, tokens: int, dtype: mx.Dtype = mx.float16) -> mx.array:
    """Return random keys or values."""
    return mx.random.normal((1, shape.kv_heads, tokens, shape.head_dim)).astype(dtype)


def decode_attention(
    shapes: Sequence[Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    bits: Sequence[int] = BITS,
    progress: Tell = print,
) -> list[Row]:
    """Time one query token that attends to ``tokens`` others: exact, mlx-lm at 4 and 8 bits, TurboQuant, others.

    Rows: ``cache, query_heads, kv_heads, head_dim, tokens, microseconds`` (evaluating, see `timing`),
    ``making_microseconds, alone_microseconds, bytes, gigabytes_per_second, ratio`` (to the time of the exact cache) and
    ``roofline_microseconds`` (time for the bytes alone at the highest measured bandwidth), `spread`.
    """
    rows: list[Row] = []
    for shape, count in product(shapes, tokens):
        ways = {f"mlx-lm {b} bit": partial(mlx_lm, shape, count, b) for b in (4, 8)}
        ways |= {f"turboquant {b} bit": partial(over_codes, shape, count, b) for b in bits}
        of_fractions = (method.id for method in METHODS.values() if method.fractional)
        ways |= {f"{name} {FRACTION} bit": partial(over_codes, shape, count, FRACTION, name) for name in of_fractions}
        rows += _rows(ways, shape, count, progress)
    return _with_roofline(rows)


def attention_of_methods(
    methods: Sequence[str], shape: Shape = SHAPES[0], tokens: int = TOKENS[1], progress: Tell = print
) -> list[Row]:
    """Time each of ``methods`` as `decode_attention`, at `METHOD_BITS`, fitted to random vectors."""
    ways = {f"{name} {METHOD_BITS} bit": partial(over_codes, shape, tokens, METHOD_BITS, name) for name in methods}
    return _with_roofline(list(_rows(ways, shape, tokens, progress)))


def _with_roofline(rows: Sequence[Row]) -> list[Row]:
    # a kernel that only reads moves bytes faster than a copy
    fastest = max(bandwidth(), *(row["gigabytes_per_second"] for row in rows))
    return [row | {"roofline_microseconds": row["bytes"] / fastest / 1e3} for row in rows]


def bandwidth() -> float:
    """Return the gigabytes a second at which MLX copies a large array, or reads it for a sum, whichever is greater."""
    source = mx.zeros((1 << 28,), mx.float32)
    mx.eval(source)
    copied, read = median_seconds(lambda: source + 1), median_seconds(source.sum)
    return max(2 * source.nbytes / copied, source.nbytes / read) / 1e9


def _rows(ways: Mapping[str, Callable[[], Cache]], shape: Shape, tokens: int, progress: Tell) -> Iterator[Row]:
    exact_time = 0.0
    for name, way in ({"exact 16 bit": partial(exact, shape, tokens)} | dict(ways)).items():
        made, size = calls(shape, way)
        times = microseconds(made)
        exact_time = exact_time or times.evaluating
        said = f"{shape.query_heads}/{shape.kv_heads}×{shape.head_dim}, {tokens} tokens: {name}"
        progress(f"{said}, {times.evaluating:.0f} µs, and {times.making:.0f} to make the graph")
        yield {
            "cache": name,
            **asdict(shape),
            "tokens": tokens,
            "microseconds": times.evaluating,
            "making_microseconds": times.making,
            "alone_microseconds": times.alone,
            "spread": times.spread,
            "bytes": size,
            "gigabytes_per_second": size / times.evaluating / 1e3,
            "ratio": times.evaluating / exact_time,
        }
        del made
        mx.clear_cache()


def calls(shape: Shape, make: Callable[[], Cache]) -> tuple[list[Callable[[], mx.array]], int]:
    """Return calls of attention to separate caches, too large for a GPU's L2 cache, and the bytes that each reads."""
    query = mx.random.normal((1, shape.query_heads, 1, shape.head_dim)).astype(mx.float16)
    made: list[Callable[[], mx.array]] = []
    size = 0
    while not made or len(made) < min(IN_A_ROW, _CACHE_BYTES // size):
        attend, arrays = make()
        mx.eval(query, arrays)
        size = bytes_of(arrays)
        made.append(lambda attend=attend: attend(mx.array(query)))  # type: ignore[misc]
    return made, size


def exact(shape: Shape, tokens: int, dtype: mx.Dtype = mx.float16) -> Cache:
    """Return attention to keys and values of a dtype."""
    k, v = vectors(shape, tokens, dtype), vectors(shape, tokens, dtype)
    return lambda q: mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.scale), (k, v)


def mlx_lm(shape: Shape, tokens: int, bits: int, dtype: mx.Dtype = mx.float16) -> Cache:
    """Return attention to mlx-lm's quantized cache."""
    k, v = (mx.quantize(vectors(shape, tokens, dtype), group_size=GROUP, bits=bits) for _ in TENSORS)
    settings: dict[str, Any] = {"scale": shape.scale, "mask": None, "group_size": GROUP, "bits": bits}
    return lambda q: base.quantized_scaled_dot_product_attention(q, k, v, **settings), (k, v)


def over_codes(shape: Shape, tokens: int, bits: float, method: str = "turboquant") -> Cache:
    """Return attention over the codes of a method: repeated codes of `_TILE` random vectors."""
    return repeated(shape, tokens, *_coded(shape, min(_TILE, tokens), bits, method))


def repeated(shape: Shape, tokens: int, codecs: Sequence[Codec], tiles: Sequence[Code]) -> Cache:
    """Return attention over copies of codes of keys and of values, ``tokens`` in all."""

    def copied(tile: mx.array) -> mx.array:
        return mx.contiguous(mx.concatenate([tile] * -(-tokens // tile.shape[2]), axis=2)[:, :, :tokens] + 0)

    keys, values = ({name: copied(tile) for name, tile in code.arrays.items()} for code in tiles)
    history = History((Segment(codecs[0], Code(keys), codecs[1], Code(values)),))
    return lambda q: history.attend(q, shape.scale, None), (keys, values)


@lru_cache(maxsize=8)  # of a shape: the same codes serve all lengths
def _coded(shape: Shape, tokens: int, bits: float, method: str) -> tuple[list[Codec], list[Code]]:
    codecs = [fitted(method, shape, tensor, bits) for tensor in TENSORS]
    return codecs, [codec.encode(vectors(shape, tokens)) for codec in codecs]


def fitted(method: str, shape: Shape, tensor: Tensor, bits: float = METHOD_BITS, tokens: int = 0) -> Codec:
    """Return a codec of a method, fitted to random vectors; for RateQuant with heads of two widths."""
    each = {"head_bits": tuple(bits + (-1) ** head for head in range(shape.kv_heads))}
    options: Row = each if METHODS[method].per_head else {}
    sample = Sample(vectors(shape, tokens or 2 * shape.head_dim), rope=Rope(shape.head_dim))
    return METHODS[method].codec(shape.head_dim, bits, tensor, **options).fit(sample)


def encode_steps(
    shape: Shape = SHAPES[0],
    behind: int = TOKENS[1],
    chunk: int = CHUNK,
    methods: Sequence[str] = ENCODED,
    progress: Tell = print,
) -> list[Row]:
    """Time the encoding of all layers' keys and values: of a block of decoded tokens, and of a chunk of a prefill.

    Rows: ``cache, query_heads, kv_heads, head_dim, layers, tokens, spread, microseconds, attention_microseconds,
    ratio``. Both times are of all layers, evaluated together. Attention is of one token to ``behind`` others,
    in 4-bit codes. ``ratio`` is to the attention of as many tokens as a block has, because a block is encoded once in
    as many steps. Calibrated methods are fitted to random vectors, once for all layers.
    """
    attention = IN_A_ROW * microseconds(calls(shape, partial(over_codes, shape, behind, METHOD_BITS))[0]).evaluating
    rows: list[Row] = []
    for name in methods:
        codecs = [fitted(name, shape, tensor) for tensor in TENSORS]
        for count in (BLOCK, chunk):
            pairs = [[vectors(shape, count) for _ in codecs] for _ in range(IN_A_ROW)]
            mx.eval(pairs)
            times = microseconds([partial(encoded, codecs, pair) for pair in pairs])
            row = {"cache": f"{name} {METHOD_BITS} bit", **asdict(shape), "layers": IN_A_ROW, "tokens": count}
            spent = {"spread": times.spread, "microseconds": IN_A_ROW * times.evaluating}
            ratio = spent["microseconds"] / (BLOCK * attention)
            rows.append(row | spent | {"attention_microseconds": attention, "ratio": ratio})
            progress(f"encoding {count} tokens of {IN_A_ROW} layers: {name}, {spent['microseconds']:.0f} µs")
            del pairs
            mx.clear_cache()
    return rows


def encoded(codecs: Sequence[Codec], pair: Sequence[mx.array]) -> list[dict[str, mx.array]]:
    """Return codes of keys and of values."""
    return [codec.encode(x).arrays for codec, x in zip(codecs, pair, strict=True)]
