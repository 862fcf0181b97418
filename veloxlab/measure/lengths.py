"""What a length of text costs: memory at its peak while it is read and while it is continued, and a token's time.

A peak is what MLX had allocated at most, less the model's weights: keys, values and codes, and everything that is
computed from them on the way. All caches of one call are measured in one run on one device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from veloxlab.cache.make import make_cache
from veloxlab.cache.room import CHUNK
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import exact_width, own_cache, slots_of
from veloxlab.mlxlm.quantized import quantized_cache
from veloxlab.progress import OnRows, Progress, in_words, silent, unseen

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
    made: dict[str, Maker] = {f"exact {exact_width(model)} bit": partial(own_cache, model)}
    made |= {f"mlx-lm {b} bit": partial(quantized_cache, model, b) for b in theirs}
    return made | {f"turboquant {b} bit": partial(make_cache, model, "turboquant", bits=b) for b in bits}


def costs_by_length(
    model: Module,
    caches: Mapping[str, Maker],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
    on_rows: OnRows = unseen,
) -> pl.DataFrame:
    """Fill each of ``caches`` up to each of ``lengths``, or of its own ones, with tokens at random: `LENGTHS`.

    A cache that a model, or mlx-lm on this device, cannot have is left out from the length on at which it fails;
    ``progress`` and ``on_rows`` are told why.
    """
    wanted = lengths if isinstance(lengths, Mapping) else dict.fromkeys(caches, lengths)
    total = sum(map(len, wanted.values()))
    ids = mx.random.randint(0, 90, (1, max(n for own in wanted.values() for n in own)), key=mx.random.key(0))
    mx.eval(ids)
    rows: list[dict[str, object]] = []
    left_out: dict[str, str] = {}
    for name, make in caches.items():
        filling = _Filling(model, make, ids, chunk)
        for tokens in sorted(set(wanted[name])):
            at = f"{name} at {tokens:,} tokens"
            progress(len(rows), total, at)
            try:
                rows.append({"cache": name, "tokens": tokens, **filling.costs(tokens)})
            except Exception as error:  # noqa: BLE001 - a model, mlx-lm or MLX may refuse in any way
                left_out[name] = f"from {tokens:,} tokens on: {in_words(error)}"
                progress(len(rows), total, f"{at} is left out: {in_words(error)}")
            on_rows(pl.DataFrame(rows, schema=LENGTHS), left_out)
            if name in left_out:
                break
    return pl.DataFrame(rows, schema=LENGTHS)


def read(model: Module, ids: mx.array, cache: list[Any], chunk: int = CHUNK) -> None:
    """Feed ``ids`` ``[1, S]``, ``chunk`` at a time, up to the last layer: mlx-lm's generator makes no logits there."""
    layers: Any = getattr(model, "model", model)
    for start in range(0, ids.shape[1], chunk):
        hidden = layers(ids[:, start : start + chunk], cache=cache)
        mx.eval(hidden, [entry.state for entry in cache])


class _Filling:
    """One cache, which grows from length to length."""

    def __init__(self, model: Module, make: Maker, ids: mx.array, chunk: int) -> None:
        self.model, self.make, self.ids, self.chunk = model, make, ids, chunk
        self.cache: list[Any] = []
        self.done = self.weights = 0  # tokens that it has read; bytes

    def costs(self, tokens: int) -> dict[str, object]:
        """Read up to so many tokens, and give the numbers of a row of `LENGTHS`."""
        if not self.cache:
            self.cache = self.make()
            mx.clear_cache()
            mx.synchronize()
            self.weights = mx.get_active_memory()
        if tokens <= self.done:
            raise InputError(f"it cannot be trimmed, and has read {self.done} tokens: give lengths further apart.")
        mx.clear_cache()
        mx.synchronize()
        mx.reset_peak_memory()
        read(self.model, self.ids[:, self.done : tokens], self.cache, self.chunk)
        self.done, prefill = tokens, mx.get_peak_memory() - self.weights
        held = sum(entry.nbytes for entry in self.cache)
        seconds, decode = self._decoding()
        columns = ("held_bytes", "prefill_peak_bytes", "decode_peak_bytes", "decode_seconds")
        return dict(zip(columns, (held, prefill, decode, seconds), strict=True))

    def _decoding(self) -> tuple[float | None, int | None]:
        """Median seconds of a token, and the bytes at the peak, or None where it fails.

        The cache is then as before; one that cannot be trimmed has read some tokens more.
        """
        seconds: list[float] = []
        slots = slots_of(self.cache)
        before = [getattr(slot, "offset", 0) for slot in slots]
        failed: RuntimeError | None = None
        mx.clear_cache()
        try:
            for step in range(STEPS + 2):
                if step == 2:
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
        return (statistics.median(seconds[2:]), peak) if failed is None else (None, None)


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
    """A model of one of `SHAPES`, but for ``changes``, with random weights in half precision and a small vocabulary.

    Raises
    ------
    InputError : no such shape.
    """
    if shape not in SHAPES:
        raise InputError(f"No shape of {shape!r} is known: choose one of {', '.join(map(repr, SHAPES))}.")
    model = Model(
        ModelArgs(**{"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 96, **SHAPES[shape], **changes})
    )
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model
