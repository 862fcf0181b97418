"""Whole models with the layers of an 8B one and random weights: decoding behind a context, and reading one.

A model has fewer layers than it would, and a small vocabulary: read the times as ratios.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.llama import Model

from veloxlab.cache.counts import CHUNK
from veloxlab.measure.bench.timing import Progress, Row, Shape, vectors
from veloxlab.measure.lengths import Maker, makers, random_model, read

LAYERS = 8
TOKENS = (4096, 32768, 131072)
READ = 16384  # tokens of a prompt whose reading is timed
_STEPS = 64  # tokens that are timed: two blocks of them leave the window
_FIRST = 40  # tokens before them: one block, so that every kernel is compiled
_SHAPE = Shape(32, 8, 128)


def decode_steps(
    layers: int = LAYERS, tokens: Sequence[int] = TOKENS, bits: Sequence[int] = (4, 3), progress: Progress = print
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
    layers: int = LAYERS, tokens: int = READ, bits: Sequence[int] = (4, 3), progress: Progress = print
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
            mx.clear_cache()
            weights = mx.get_active_memory()
            mx.reset_peak_memory()
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
    """Caches that hold ``tokens`` random keys and values in every layer."""
    caches = make()
    for cache in caches:
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            cache.update_and_fetch(vectors(_SHAPE, count), vectors(_SHAPE, count))
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
