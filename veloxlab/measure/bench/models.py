"""Times and memory of whole models: costs by length of text, decoding after a context, and reading a prompt.

A peak is the most memory that MLX had allocated, without the weights. Models of random weights have fewer layers and a
smaller vocabulary than real ones. All rows of one call are from one run on one device: compare times as ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.models.llama import Model

from veloxlab.cache.counts import CHUNK
from veloxlab.cache.make import make_cache
from veloxlab.codecs import TENSORS
from veloxlab.errors import InputError
from veloxlab.measure.bench.shapes import random_model
from veloxlab.measure.bench.timing import TOKENS, Row, Tell, spread
from veloxlab.measure.bench.turns import Maker, Times, in_turn
from veloxlab.measure.experiments import Attempt, possible_rows
from veloxlab.measure.frames import schema
from veloxlab.mlxlm.probe import exact_width, own_cache, slots_of
from veloxlab.mlxlm.quantized import quantized_cache
from veloxlab.progress import OnRows, Progress, silent

LENGTHS = schema("cache tokens held_bytes prefill_peak_bytes decode_peak_bytes decode_seconds")
"""Columns of `costs_by_length`: bytes of the cache after ``tokens`` tokens; peak bytes while reading tokens after the
previous length; peak bytes while computing the next token, and its median seconds, null if that fails."""

STEPS = 7  # timed tokens at a length
WARM_UP = 2  # tokens before the timed ones
LAYERS = 8
DECODED = {"one layer of 7B": LAYERS, "smollm2-135m": 30}  # shapes, and their numbers of layers
SHORT = 1024  # tokens before the timed ones, for a small model
BATCHES = (8, 4096), (32, 1024)  # sequences, and tokens of the longest one
UNLIKE = 13  # difference of their lengths in tokens
READ = 32768  # tokens of the timed prompt
RUNS = 3


def makers(model: Module, bits: Sequence[int] = (4,), theirs: Sequence[int] = (4, 8)) -> dict[str, Maker]:
    """Return makers of the model's own cache, mlx-lm's quantized at widths ``theirs``, and TurboQuant at ``bits``."""
    made: dict[str, Maker] = {f"exact {exact_width(model)} bit": partial(own_cache, model)}
    made |= {f"mlx-lm {b} bit": partial(quantized_cache, model, b) for b in theirs}
    return made | {f"turboquant {b} bit": partial(make_cache, model, "turboquant", bits=b) for b in bits}


def costs_by_length(
    model: Module,
    caches: Mapping[str, Maker],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    progress: Progress = silent,
    on_rows: OnRows = silent,
) -> pl.DataFrame:
    """Fill ``caches`` with random tokens up to ``lengths``: `LENGTHS`; a cache that fails is left out from there on."""
    wanted = {name: set(lengths[name] if isinstance(lengths, Mapping) else lengths) for name in caches}
    ids = mx.random.randint(0, 90, (1, max(max(own, default=1) for own in wanted.values())), key=mx.random.key(0))
    mx.eval(ids)

    def attempts() -> Iterator[Attempt]:  # holds one cache at a time
        for name, make in caches.items():
            filling = _Filling(model, make, ids)
            yield from (Attempt(name, partial(filling.row, name, n), f"{n:,} tokens") for n in sorted(wanted[name]))

    return possible_rows(attempts(), sum(map(len, wanted.values())), LENGTHS, progress, on_rows)[0]


def read(model: Module, ids: mx.array, cache: list[Any]) -> None:
    """Feed ``ids`` ``[1, S]`` in mlx-lm's chunks, up to the last layer, without logits, as mlx-lm's generator does."""
    layers: Any = getattr(model, "model", model)
    for start in range(0, ids.shape[1], CHUNK):
        hidden = layers(ids[:, start : start + CHUNK], cache=cache)
        mx.eval(hidden, [entry.state for entry in cache])


@dataclass(eq=False)
class _Filling:
    """One cache that grows from length to length."""

    model: Module
    make: Maker
    ids: mx.array
    done: int = 0  # tokens that it has read

    def row(self, name: str, tokens: int) -> pl.DataFrame:
        if not self.done:
            self.cache = self.make()
            _settle()
            self.weights = mx.get_active_memory()
        if tokens <= self.done:
            raise InputError(f"it cannot be trimmed, and has read {self.done} tokens: give lengths further apart.")
        _settle()
        read(self.model, self.ids[:, self.done : tokens], self.cache)
        self.done, prefill = tokens, mx.get_peak_memory() - self.weights
        held = sum(entry.nbytes for entry in self.cache)
        return pl.DataFrame([(name, tokens, held, prefill, *self._decoding())], schema=LENGTHS, orient="row")

    def _decoding(self) -> tuple[int | None, float | None]:
        """Return peak bytes and median seconds of a token, None if it fails; the cache is trimmed if possible."""
        seconds: list[float] = []
        slots = slots_of(self.cache)
        before = [getattr(slot, "offset", 0) for slot in slots]
        failed: RuntimeError | None = None
        mx.clear_cache()
        try:
            for step in range(WARM_UP + STEPS):
                if step == WARM_UP:
                    mx.reset_peak_memory()
                start = time.perf_counter()
                mx.eval(self.model(mx.array([[1]]), cache=self.cache))
                mx.synchronize()
                seconds.append(time.perf_counter() - start)
        except RuntimeError as error:  # on CUDA, mlx-lm's quantized cache has no product for some shapes
            failed = error
        peak = mx.get_peak_memory() - self.weights
        if can_trim_prompt_cache(self.cache):
            for slot, offset in zip(slots, before, strict=True):
                slot.trim(slot.offset - offset)
            mx.eval([entry.state for entry in self.cache])
        elif failed is None:
            self.done += len(seconds)
        else:
            raise failed
        return (None, None) if failed else (peak, statistics.median(seconds[WARM_UP:]))


def _settle() -> None:
    mx.clear_cache()
    mx.synchronize()
    mx.reset_peak_memory()


def decode_steps(
    tokens: Sequence[int] = TOKENS, shapes: Mapping[str, int] = DECODED, runs: int = RUNS, progress: Tell = print
) -> list[Row]:
    """Time decoding after ``tokens`` tokens, as mlx-lm does: the next token's graph is built while one is computed.

    ``shapes``: models and their numbers of layers; models with few layers also have shorter caches. Caches are filled
    with random keys and values. Rows: ``shape, layers, cache, tokens, milliseconds`` (of a token: the median over
    ``runs`` of the median of each), ``slowest_milliseconds`` (of the slowest token, where each token's time is its
    median over ``runs``: a step that does more work is slow in all of them, one that other work delays is not),
    ``ratio`` (to the exact cache's time in neighbouring turns, see `in_turn`), ``held_bytes, spread``. A cache that MLX
    cannot read on this device is reported to ``progress`` and left out.
    """
    rows: list[Row] = []
    for shape, layers in shapes.items():
        model, small = random_model(shape, num_hidden_layers=layers, vocab_size=4096), layers > LAYERS
        for count in [SHORT] if small else tokens:
            made = makers(model, (4,) if small else (4, 3), theirs=() if small else (4,))
            seconds = in_turn(
                model, {name: partial(_filled, make, model, count) for name, make in made.items()}, runs, progress
            )
            for name, times in seconds.items():
                row = {"shape": shape, "layers": layers, "cache": name, "tokens": count, **_columns(times)}
                rows.append(row)
                progress(f"{shape}, a token behind {count}: {name}, {_said(row)}")
    return rows


def batch_steps(
    batches: Sequence[tuple[int, int]] = BATCHES, layers: int = LAYERS, runs: int = RUNS, progress: Tell = print
) -> list[Row]:
    """Time a step of a batch of sequences with nearly the same number of tokens, but no two with the same number.

    Rows: ``layers, cache, sequences, tokens, milliseconds, slowest_milliseconds, ratio, held_bytes, spread``, as those
    of `decode_steps`.
    """
    model = _model(layers)
    rows: list[Row] = []
    for sequences, count in batches:
        counts = [count - UNLIKE * i for i in range(sequences)]
        made = {name: partial(_batch, make, model, counts) for name, make in makers(model, theirs=()).items()}
        seconds = in_turn(model, made, runs, progress, sequences)
        for name, times in seconds.items():
            row = {"layers": layers, "cache": name, "sequences": sequences, "tokens": count, **_columns(times)}
            rows.append(row)
            progress(f"a step of {sequences} x {count}: {name}, {_said(row)}")
    return rows


def _columns(times: Times) -> Row:
    row = {"milliseconds": 1e3 * times.typical, "slowest_milliseconds": 1e3 * times.slowest, "ratio": times.ratio}
    return row | {"held_bytes": times.held_bytes, "spread": times.spread}


def _said(row: Row) -> str:
    return f"{row['milliseconds']:.2f} ms, {row['ratio']:.2f} of exact"


def read_prompts(
    layers: int = LAYERS, tokens: int = READ, bits: Sequence[int] = (4, 3), runs: int = RUNS, progress: Tell = print
) -> list[Row]:
    """Time reading a prompt of ``tokens`` random tokens in mlx-lm's chunks.

    Rows: ``cache, layers, tokens, seconds`` (the median of ``runs``, after one that compiles), ``ratio`` (to the exact
    cache's), ``peak_bytes`` without the weights, ``peak_ratio, spread``.
    """
    model = _model(layers)
    ids = mx.random.randint(0, 90, (1, tokens), key=mx.random.key(0))
    mx.eval(ids)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in makers(model, bits, theirs=())}
    for _ in range(1 + runs):
        for name, make in makers(model, bits, theirs=()).items():
            caches = make()
            _settle()
            weights, start = mx.get_active_memory(), time.perf_counter()
            read(model, ids, caches)
            found[name].append((time.perf_counter() - start, mx.get_peak_memory() - weights))
    rows: list[Row] = []
    for name, measured in found.items():
        seconds, peak = (statistics.median(part) for part in zip(*measured[1:], strict=True))
        row: Row = {"cache": name, "layers": layers, "tokens": tokens, "seconds": seconds, "peak_bytes": peak}
        row["spread"] = spread([spent for spent, _ in measured[1:]])
        first = rows[0] if rows else row
        rows.append(row | {"ratio": seconds / first["seconds"], "peak_ratio": peak / first["peak_bytes"]})
        progress(f"reading {tokens} tokens: {name}, {seconds:.3f} s, {rows[-1]['ratio']:.2f} of exact")
    return rows


def _model(layers: int) -> Model:
    return random_model("one layer of 7B", num_hidden_layers=layers, vocab_size=4096)


def _filled(make: Maker, model: Model, tokens: int) -> list[Any]:
    attention = model.layers[0].self_attn
    heads = attention.n_kv_heads
    dim = attention.k_proj.weight.shape[0] // heads
    caches = make()
    for cache in caches:
        for start in range(0, tokens, CHUNK):
            some = [mx.random.normal((1, heads, min(CHUNK, tokens - start), dim)).astype(mx.float16) for _ in TENSORS]
            cache.update_and_fetch(*some)
            mx.eval(cache.state)
    return caches


def _batch(make: Maker, model: Model, counts: Sequence[int]) -> list[Any]:
    """Return caches of a batch, merged from caches of single sequences as mlx-lm's server does."""
    rows = [_filled(make, model, count) for count in counts]
    return [type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)]
