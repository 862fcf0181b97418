"""Whole models: what a length of text costs, decoding behind a context, and reading a prompt.

A peak is the most that MLX had allocated, without the weights. Models of random weights have fewer layers than they
would, and a small vocabulary. All rows of one call are of one run on one device: read times as ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from veloxlab.errors import InputError
from veloxlab.measure.bench.shapes import random_model
from veloxlab.measure.bench.timing import SHAPES, TOKENS, Row, Tell, vectors
from veloxlab.measure.experiments import Attempt, possible_rows
from veloxlab.measure.frames import schema
from veloxlab.mlxlm.probe import exact_width, own_cache, quantized_cache, slots_of
from veloxlab.progress import OnRows, Progress, silent

LENGTHS = schema("cache tokens held_bytes prefill_peak_bytes decode_peak_bytes decode_seconds")
"""Columns of `costs_by_length`: bytes of the cache after so many tokens; at the peak while reading those since the
length before; at the peak while computing the next token, and its median seconds, null where that fails."""

STEPS = 7  # tokens that are timed at a length
WARM_UP = 2  # tokens that are computed before those that are timed
LAYERS = 8
READ = 16384  # tokens of a prompt whose reading is timed
_STEPS = 64  # tokens that are timed: two blocks of them leave the window
_FIRST = 40  # tokens before them: one block, so that every kernel is compiled

Maker = Callable[[], list[Any]]


def makers(model: Module, bits: Sequence[int] = (4,), theirs: Sequence[int] = (4, 8)) -> dict[str, Maker]:
    """The model's own cache, mlx-lm's quantized one at the widths ``theirs``, and TurboQuant at some ``bits``."""
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
    """Fill ``caches`` with random tokens up to ``lengths``: `LENGTHS`; one that fails is left out from there."""
    wanted = {name: set(lengths[name] if isinstance(lengths, Mapping) else lengths) for name in caches}
    ids = mx.random.randint(0, 90, (1, max(max(own, default=1) for own in wanted.values())), key=mx.random.key(0))
    mx.eval(ids)

    def attempts() -> Iterator[Attempt]:  # one cache at a time is held
        for name, make in caches.items():
            filling = _Filling(model, make, ids)
            yield from (Attempt(name, partial(filling.row, name, n), f"{n:,} tokens") for n in sorted(wanted[name]))

    return possible_rows(attempts(), sum(map(len, wanted.values())), LENGTHS, progress, on_rows)[0]


def read(model: Module, ids: mx.array, cache: list[Any]) -> None:
    """Feed ``ids`` ``[1, S]`` in mlx-lm's chunks, up to the last layer: mlx-lm's generator makes no logits there."""
    layers: Any = getattr(model, "model", model)
    for start in range(0, ids.shape[1], CHUNK):
        hidden = layers(ids[:, start : start + CHUNK], cache=cache)
        mx.eval(hidden, [entry.state for entry in cache])


@dataclass(eq=False)
class _Filling:
    """One cache, which grows from length to length."""

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
        """Bytes at the peak and median seconds of a token, None where it fails; the cache is trimmed if it can be."""
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
        except RuntimeError as error:  # on CUDA mlx-lm's quantized cache has no product for some shapes
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
    layers: int = LAYERS, tokens: Sequence[int] = TOKENS, bits: Sequence[int] = (4, 3), progress: Tell = print
) -> list[Row]:
    """Decoding behind ``tokens`` tokens, as mlx-lm does: the graph of a token is made while the one before is computed.

    The caches are filled with random keys and values. Rows: ``cache, layers, tokens, milliseconds`` (of a token),
    ``ratio`` (exact time over this one's: more than 1 is faster), ``held_bytes``. A cache that MLX cannot read on this
    device is told to ``progress`` and left out.
    """
    model = _model(layers)
    rows: list[Row] = []
    for count in tokens:
        exact_time = 0.0
        for name, make in makers(model, bits, theirs=(4,)).items():
            caches = _filled(make, count)
            try:
                spent = 1e3 * _token_seconds(model, caches)
            except RuntimeError as error:
                # MLX 0.32.4 on CUDA has no product of one row with quantized ones for some numbers of tokens
                progress(f"decoding behind {count} tokens: {name} fails: {error}")
                continue
            exact_time = exact_time or spent
            row = {"cache": name, "layers": layers, "tokens": count, "milliseconds": spent, "ratio": exact_time / spent}
            rows.append(row | {"held_bytes": sum(cache.nbytes for cache in caches)})
            progress(f"decoding behind {count} tokens: {name}, {spent:.2f} ms a token")
            del caches
            mx.clear_cache()
    return rows


def read_prompts(
    layers: int = LAYERS, tokens: int = READ, bits: Sequence[int] = (4, 3), progress: Tell = print
) -> list[Row]:
    """Reading a prompt of ``tokens`` random tokens in mlx-lm's chunks.

    Rows: ``cache, layers, tokens, seconds, ratio`` (exact time over this one's), ``peak_bytes`` beside the weights.
    """
    model = _model(layers)
    ids = mx.random.randint(0, 90, (1, tokens), key=mx.random.key(0))
    mx.eval(ids)
    rows: list[Row] = []
    for name, make in makers(model, bits, theirs=()).items():
        for _ in range(2):  # the first time compiles
            caches = make()
            _settle()
            weights = mx.get_active_memory()
            start = time.perf_counter()
            read(model, ids, caches)
            seconds = time.perf_counter() - start
        ratio = (rows[0]["seconds"] if rows else seconds) / seconds
        row = {"cache": name, "layers": layers, "tokens": tokens, "seconds": seconds, "ratio": ratio}
        rows.append(row | {"peak_bytes": mx.get_peak_memory() - weights})
        progress(f"reading {tokens} tokens: {name}, {seconds:.2f} s")
    return rows


def _model(layers: int) -> Model:
    return random_model("one layer of 7B", num_hidden_layers=layers, vocab_size=4096)


def _filled(make: Maker, tokens: int) -> list[Any]:
    caches = make()
    for cache in caches:
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            cache.update_and_fetch(vectors(SHAPES[0], count), vectors(SHAPES[0], count))
            mx.eval(cache.state)
    return caches


def _token_seconds(model: Model, caches: list[Any]) -> float:
    """Seconds of a token, over some in a row, each handed to the GPU while the one before is still computed."""
    token = mx.array([[1]])
    for step in range(_FIRST + _STEPS):
        if step == _FIRST:
            mx.synchronize()
            start = time.perf_counter()
        following = mx.argmax(model(token, cache=caches)[:, -1:], axis=-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return (time.perf_counter() - start) / _STEPS
