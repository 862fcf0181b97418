"""Decoding times on a CPU, by length, with a model of SmolLM2's shape and random weights, in float32.

Caches are filled with random keys and values, and decode in turn, by mlx-lm's own generator. All layers have the same
codecs, fitted to random vectors if the method needs a fit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.llama import Model

from veloxlab.cache.counts import CHUNK
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import TENSORS, find_method
from veloxlab.errors import InputError
from veloxlab.measure.bench.cpu import EXACT, MLX_LM, bandwidth, fitted, said, seconds, vectors
from veloxlab.measure.bench.shapes import random_model
from veloxlab.measure.bench.timing import Row, Tell, spread
from veloxlab.measure.memory import bytes_of
from veloxlab.mlxlm.probe import own_cache, with_caches
from veloxlab.mlxlm.quantized import quantized_cache

MODEL = "smollm2-135m"
VOCABULARY = 49152
CACHES = ("turboquant:4",)
TOKENS = (512, 2048, 8192, 32768)
BUSY_TOKENS = 8192  # after more tokens, caches that share a core take a quarter of an hour
ROUNDS = 8
STEPS = 5  # tokens that a cache decodes in a round, after one without timing
_SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"  # ends when this process ends, for any reason


def decode(
    tokens: Sequence[int] = TOKENS, caches: Sequence[str] = CACHES, busy: bool = False, progress: Tell = print
) -> list[Row]:
    """Time a token after ``tokens`` others with the exact cache, mlx-lm's at 4 bits, and ``caches`` such as "rabitq:4".

    Rows: ``cache, tokens, milliseconds, least_milliseconds, ratio`` (of the exact cache's time), ``of_mlx_lm`` (of
    mlx-lm's), ``spread, held_bytes, roofline_milliseconds`` (to read the weights and the cache once at `bandwidth`).
    With ``busy``, lengths up to `BUSY_TOKENS` are also timed while another process keeps a core busy:
    ``busy_milliseconds, busy_ratio`` (to idle).
    """
    model = random_model(MODEL, mx.float32, vocab_size=VOCABULARY)
    weights = bytes_of(model.parameters())
    held = {EXACT: own_cache(model), MLX_LM: quantized_cache(model, 4)}
    held |= {name.replace(":", " ") + " bit": _compressed(model, *_named(name)) for name in caches}
    rows: list[Row] = []
    with _other_process() as other:
        for count in sorted(tokens):
            for own in held.values():
                _fill(own, count)
            spent = _decoded(model, held, (None, other) if busy and count <= BUSY_TOKENS else (None,))
            times = {name: median(idle) for name, (idle, *_) in spent.items()}
            for name, (idle, *while_busy) in spent.items():
                size = sum(layer.nbytes for layer in held[name])
                row = {"cache": name, "tokens": count, "milliseconds": times[name], "least_milliseconds": min(idle)}
                row["spread"] = spread(idle)
                row |= {"ratio": times[name] / times[EXACT], "of_mlx_lm": times[name] / times[MLX_LM]}
                row |= {"held_bytes": size, "roofline_milliseconds": (weights + size) / bandwidth() / 1e6}
                for slow in while_busy:
                    row |= {"busy_milliseconds": median(slow), "busy_ratio": median(slow) / times[name]}
                rows.append(row)
                progress(f"decoding behind {count} tokens: {said(row, 'milliseconds', 'ms')}")
    return rows


def _decoded(
    model: Model, held: Mapping[str, list[Any]], others: Sequence[subprocess.Popen[bytes] | None]
) -> dict[str, list[list[float]]]:
    """Return milliseconds of tokens by cache, for each of ``others``, the work that runs at the same time."""
    spent: dict[str, list[list[float]]] = {name: [[] for _ in others] for name in held}
    for _ in range(ROUNDS):
        for name, own in held.items():
            for times, other in zip(spent[name], others, strict=True):
                tokens = generate_step(mx.array([1]), model, max_tokens=STEPS + 2, prompt_cache=own)
                with _running(other):
                    next(tokens)
                    times += [1e3 * seconds(lambda tokens=tokens: next(tokens)) for _ in range(STEPS)]  # type: ignore[misc]
    return spent


def _fill(caches: Sequence[Any], tokens: int) -> None:
    """Fill caches up to ``tokens`` tokens, with the same random keys and values in all layers."""
    x = vectors(CHUNK)
    for layer in caches:
        while layer.offset < tokens:
            some = x[:, :, : tokens - layer.offset]
            layer.update_and_fetch(some, some)
            mx.eval(layer.state)


def _named(cache: str) -> tuple[str, int]:
    """Return method and bits of a text such as "turboquant:4"."""
    method, _, bits = cache.partition(":")
    if not bits.isdecimal():
        raise InputError(f"{cache!r} is no compressed cache: give METHOD:BITS, such as {CACHES[0]}.")
    for tensor in TENSORS:
        find_method(method).check(int(bits), tensor, {})
    return method, int(bits)


def _compressed(model: Model, method: str, bits: int) -> list[Any]:
    key_codec, value_codec = fitted(method, bits)
    return with_caches(model, lambda facts: CompressedKVCache(key_codec, value_codec, layer=facts.layer))


@contextmanager
def _other_process() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that waits; `_running` lets it keep a core busy."""
    with subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid())]) as other:
        try:
            other.send_signal(signal.SIGSTOP)
            yield other
        finally:
            other.kill()


@contextmanager
def _running(other: subprocess.Popen[bytes] | None) -> Iterator[None]:
    if other is None:
        yield
        return
    other.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        other.send_signal(signal.SIGSTOP)
