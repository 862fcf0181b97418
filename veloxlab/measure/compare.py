"""Comparison of all methods with mlx-lm's quantized cache: divergence, bytes, and times to store and to attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.make import make_cache
from veloxlab.checks import number_of_bits
from veloxlab.codecs import METHODS, TENSORS, Method, find_method
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.measure.activations import LayerCapture, capture
from veloxlab.measure.bench.timing import FIRST_TRIES, seconds
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.experiments import Attempt, possible_rows
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.quality import FIDELITY, CacheMaker, Reference, fidelity_to, reference
from veloxlab.mlxlm.probe import probe, slot_of
from veloxlab.mlxlm.quantized import quantized_cache
from veloxlab.progress import OnRows, Progress, silent
from veloxlab.texts import Tokenizer

COMPARED = FIDELITY | schema("store_us store_ratio attend_us attend_ratio")
"""Columns of `compare`: microseconds to store one token's key and value in one layer, in a block of 512, and for one
query to attend to 512 tokens in one layer; each also as a ratio to the exact cache; null if times are not measured."""

RATIOS = schema("name tokens head_dim key_ratio value_ratio ratio")
"""Columns of `byte_ratios`: bytes in 16 bits over bytes held, tables included, for keys, for values and for both."""

REPEATS = 9
PRESETS = (("vecinfer", 1, 1), ("rvq", 2, 2), ("rabitq", 1, 4), ("turboquant", 2, 2), ("turboquant", 4, 4))
"""Methods, with bits of keys and of values, of `byte_ratios`."""


def compare(
    model: Module,
    tokenizer: Tokenizer,
    *,
    methods: Sequence[str] | None = None,
    bits: tuple[int, ...] = (1, 2, 3, 4),
    text: str | None = None,
    tokens: int = 512,
    windows: int = 3,
    sinks: int = 0,
    seed: int = 0,
    progress: Progress = silent,
    on_rows: OnRows = silent,
) -> pl.DataFrame:
    """Measure every method at the ``bits`` that it supports, and mlx-lm's quantized cache: one row each, `COMPARED`.

    ``methods``: only these of ours. Another processor or number of threads changes the order of sums, which moves some
    codes across a boundary: divergences differed by up to 2 %.
    A method with fractional bits gets a quarter of a bit more, which is what most others need for scales. All tokens
    are compressed and read through codes; with ``sinks``, our caches keep that many first tokens exact, and times are
    not measured. ``seed``: for random parts of our codes and their calibration. Methods that need it are calibrated on
    their usual text. A cache that this model does not support is left out, and ``progress`` and ``on_rows`` get the
    reason. mlx-lm's cache is filled once, because `mx.quantize` of its own decoded
    output gives another cache (``findings/mlx_quantize_twice_is_not_once.sh``).
    Raises `InputError`: as `veloxlab.reference` and `veloxlab.capture`; or if every cache is left out.
    """
    exact = reference(model, tokenizer, text=text, tokens=tokens, windows=windows)
    seen = None if sinks else capture(model, tokenizer, text, tokens=tokens).layers[0]
    makers = _makers(model, tokenizer, bits, sinks, methods, seed)
    attempts = [Attempt(name, partial(_row, exact, seen, name, maker)) for name, maker in makers.items()]
    frame, left_out = possible_rows(attempts, len(attempts), COMPARED, progress, on_rows)
    if frame.is_empty():
        first, reason = next(iter(left_out.items()))
        raise InputError(f"No cache can be compared with this model's own; {first}: {reason}")
    return frame


def _row(
    exact: Reference,
    seen: LayerCapture | None,
    name: str,
    maker: Callable[[], CacheMaker],
) -> pl.DataFrame:
    make = maker()
    chunk = pl.lit(None if name.startswith("mlx-lm") else "codes")
    found = fidelity_to(exact, make, name=name).with_columns(chunk=chunk)
    if seen is None:
        return in_schema(found, COMPARED)
    return found.with_columns(**_times(exact.model, seen, make)).match_to_schema(COMPARED)


def timed_again(
    frame: pl.DataFrame, model: Module, tokenizer: Tokenizer, *, tokens: int = 512, progress: Progress = silent
) -> pl.DataFrame:
    """Return the rows of `compare` with times measured again: only times need a machine without other work.

    Raises `InputError`: as `veloxlab.capture`.
    """
    seen, makers = capture(model, tokenizer, tokens=tokens).layers[0], _makers(model, tokenizer, (1, 2, 3, 4), 0)
    rows = []
    for done, row in enumerate(frame.iter_rows(named=True)):
        progress(done, frame.height, row["name"])
        rows.append(row | _times(model, seen, makers[row["name"]]()))
    return pl.DataFrame(rows, schema=COMPARED)


def _times(model: Module, seen: LayerCapture, make: CacheMaker) -> dict[str, float]:
    """Return the columns of `COMPARED` that are times."""
    facts = next(found for found in probe(model) if found.compressible)  # of the first captured layer
    plain, own = cache_seconds(seen, KVCache, lambda: slot_of(make(model), facts))
    times = {"store_us": 1e6 * own.store / seen.keys.shape[2], "attend_us": 1e6 * own.attend}
    return times | {"store_ratio": own.store / plain.store, "attend_ratio": own.attend / plain.attend}


def _makers(
    model: Module,
    tokenizer: Tokenizer,
    bits: tuple[int, ...],
    sinks: int,
    methods: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Callable[[], CacheMaker]]:
    """Return by name of the cache a function that calibrates it if needed, and returns its maker."""
    wanted = METHODS.values() if methods is None else [find_method(method) for method in methods]
    ours = ((m, b + m.fractional / 4) for m in wanted for b in bits if m.id != "none" and b in m.bits)
    makers: dict[str, Callable[[], CacheMaker]] = {
        f"{m.id} {b:g} bit": partial(_ours, model, tokenizer, m, number_of_bits(b), sinks, seed) for m, b in ours
    }
    theirs = (b for b in (2, 3, 4, 8) if b in bits or b == 8)
    return makers | {f"mlx-lm {b} bit": partial(partial, quantized_cache, bits=b) for b in theirs}


def _ours(model: Module, tokenizer: Tokenizer, method: Method, bits: float, sinks: int, seed: int) -> CacheMaker:
    fitted = calibrate(model, tokenizer, method.id, bits=bits, seed=seed) if method.calibrated else None
    settings: dict[str, Any] = {"chunk": "codes", "sinks": sinks, "window": 0, **method.seeded(seed)}
    return partial(make_cache, method_or_plan=method.id, bits=bits, calibration=fitted, **settings)


class CacheSeconds(NamedTuple):
    """Median times to store a layer's capture in an empty cache, and of one query's attention to it."""

    store: float
    attend: float


def cache_seconds(layer: LayerCapture, *makes: Callable[[], Any]) -> list[CacheSeconds]:
    """Time the caches of ``makes`` in turn, so that other work on the device slows each of them equally."""
    works = [_works(layer, make) for make in makes]
    rounds = [[[seconds(work) for work in own] for own in works] for _ in range(FIRST_TRIES + REPEATS)][FIRST_TRIES:]
    return [CacheSeconds(*map(median, zip(*own, strict=True))) for own in zip(*rounds, strict=True)]


def _works(layer: LayerCapture, make: Callable[[], Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a function that stores a capture in an empty cache and waits, and one that attends to a full cache."""
    keys, values = layer.keys, layer.values
    heads, head_dim = (keys if layer.queries is None else layer.queries).shape[1], keys.shape[-1]
    query = mx.random.normal((1, heads, 1, head_dim), dtype=keys.dtype, key=mx.random.key(0))
    cache = make()
    k, v = cache.update_and_fetch(keys, values)
    mx.eval(cache.state, query)
    empty = [make() for _ in range(FIRST_TRIES + REPEATS)]

    def store() -> object:
        fresh = empty.pop()
        fresh.update_and_fetch(keys, values)
        return fresh.state

    def attend() -> object:
        own = mx.array(query)  # mlx-lm's quantized attention scales its query in place
        return scaled_dot_product_attention(own, k, v, cache=cache, scale=head_dim**-0.5, mask=None)

    return store, attend


def byte_ratios(kv_heads: int = 8, head_dim: int = 128, tokens: int = 8192) -> pl.DataFrame:
    """Bytes of the caches of `PRESETS` filled with random keys and values, codebooks included: `RATIOS`."""
    x = mx.random.normal((1, kv_heads, tokens, head_dim), key=mx.random.key(0)).astype(mx.float16)
    sample = Sample(x[:, :, :1024].astype(mx.float32))
    rows = []
    for method, *widths in PRESETS:
        kinds = zip(widths, TENSORS, strict=True)
        codecs = [find_method(method).codec(head_dim, bits, tensor).fit(sample) for bits, tensor in kinds]
        cache = CompressedKVCache(*codecs, sinks=0, window=0)
        cache.update_and_fetch(x, x)
        mx.eval(cache.state)
        keys, values = (cache.tensor_nbytes(t) + codec.shared_bytes for t, codec in zip(TENSORS, codecs, strict=True))
        ratios = (x.nbytes / keys, x.nbytes / values, 2 * x.nbytes / (keys + values))
        rows.append((f"{method} K{widths[0]} V{widths[1]}", tokens, head_dim, *ratios))
    return pl.DataFrame(rows, schema=RATIOS, orient="row")
