"""Capture: queries, keys and values of a model's run, layer by layer, and frames of measurements on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import create_attention_mask

from veloxlab import runtime
from veloxlab.cache.arithmetic import attend_exactly, capped
from veloxlab.cache.calibration import Calibration, layer_codec
from veloxlab.checks import check_fields, checked, instance, many, whole
from veloxlab.codecs import TENSORS, Codec, Tensor, find_method
from veloxlab.codecs.parts.rope import Rope
from veloxlab.errors import InputError
from veloxlab.measure.frames import in_schema
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.hooks import Mask
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import Progress, ended_by, may_end, silent
from veloxlab.texts import Tokenizer, excerpt

NOT_FINITE = "load the model with dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
Columns = Mapping[str, Any]
Tensors = tuple[Tensor, ...] | None  # None: both


def softmax(logits: mx.array) -> mx.array:
    """Return weights that sum to 1 along the last axis of float32 ``logits``; each row needs a finite logit."""
    if runtime.backend() != "cpu":
        return mx.softmax(logits, axis=-1, precise=True)
    weights = np.array(logits)  # NumPy takes a tenth of MLX's time
    with np.errstate(invalid="ignore"):
        weights -= weights.max(axis=-1, keepdims=True)
        weights = np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
    return mx.array(weights)


@dataclass(frozen=True)
class LayerCapture:
    """Inputs of one layer's attention, as they enter the cache (after RoPE)."""

    layer: int  # index in the prompt cache
    queries: mx.array | None  # [1, Hq, S, Dk], or None if the model computes attention by itself
    keys: mx.array  # [1, H, S, Dk]
    values: mx.array  # [1, H, S, Dv]
    scale: float | None  # the model's factor of q·k; None if queries are None
    rope: Rope | None = None  # rotary embedding of keys and queries, if known
    cap: float | None = None  # soft cap of logits: see `Handle.attend`

    def vectors(self, tensor: Tensor) -> mx.array:
        """Return keys or values in float32."""
        return (self.keys if tensor == "keys" else self.values).astype(mx.float32)

    def shown_queries(self, lost: str) -> mx.array:
        """Return queries in float32; `InputError` without them, with ``lost``, what is then impossible."""
        if self.queries is None:
            raise InputError(f"Layer {self.layer} does not show its queries, so {lost}.")
        return self.queries.astype(mx.float32)

    def check_finite(self, why: str, *names: str) -> None:
        """Raise `InputError` if a named array has numbers that are not finite; ``why`` is the consequence."""
        for name, x in ((name, getattr(self, name)) for name in names):
            if x is not None and not mx.isfinite(x).all().item():
                said = f"The {name} of layer {self.layer} hold numbers that are NaN or infinite, {why}"
                raise InputError(f"{said}: {NOT_FINITE}")

    def logits(self, keys: mx.array) -> mx.array:
        """Return logits of the queries and of keys ``[1, H, S, Dk]``, float32, without a mask: ``[H, Hq/H, S, S]``."""
        _, kv_heads, tokens, head_dim = keys.shape
        queries = self.queries.astype(mx.float32).reshape(kv_heads, -1, tokens, head_dim)  # type: ignore[union-attr]
        return capped(queries @ keys[0][:, None].swapaxes(-1, -2) * self.scale, self.cap)  # type: ignore[operator]

    def attend(self, keys: mx.array, values: mx.array) -> mx.array:
        """Return causal attention of the queries to other keys and values in float32: ``[H, Hq/H, S, Dv]``."""
        logits = mx.where(create_causal_mask(keys.shape[2]), self.logits(keys), -mx.inf)
        return softmax(logits) @ values[0][:, None]

    @cached_property
    def output(self) -> mx.array:
        """Return causal attention to the layer's own keys and values, evaluated: the reference for all methods."""
        output = self.attend(self.vectors("keys"), self.vectors("values"))
        mx.eval(output)
        return output

    def codec(
        self, tensor: Tensor, method: str, bits: float, calibration: Calibration | None, options: Mapping[str, object]
    ) -> Codec:
        """Return the codec of a method for the keys or values; raises `InputError` as `layer_codec`."""
        head_dim = self.vectors(tensor).shape[-1]
        return layer_codec(find_method(method), self.layer, head_dim, bits, tensor, options, calibration)


@dataclass(frozen=True)
class Capture:
    """One causal run over ``tokens``, with evaluated arrays, so that any thread can use it."""

    layers: tuple[LayerCapture, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        check_fields(self, layers=many(instance(LayerCapture, "a captured layer")), tokens=many(whole(0)))

    @property
    def exact_bits(self) -> int:
        """Bits of each number in the keys."""
        return 8 * self.layers[0].keys.dtype.size

    def __repr__(self) -> str:
        _, kv_heads, _, head_dim = self.layers[0].keys.shape
        return f"Capture(layers={len(self.layers)}, tokens={len(self.tokens)}, {kv_heads=}, {head_dim=})"


@checked()
def capture(
    model: Module, tokenizer: Tokenizer, text: str | None = None, *, tokens: int = 512, progress: Progress = silent
) -> Capture:
    """Run ``model`` over the first ``tokens`` tokens of ``text``, and keep the inputs of every attention layer.

    ``text``: the shipped WikiText-2 test excerpt by default; a shorter text is read to its end. Raises `InputError` if
    it has fewer than two tokens.
    """
    ids = first_tokens(tokenizer, text, tokens)
    if len(ids) < min(2, tokens):
        raise InputError(f"The text has {len(ids)} tokens and at least 2 are needed: give a longer text.")
    return Capture(tuple(capture_layers(model, ids, progress)), tuple(ids))


def capture_layers(
    model: Module, ids: Sequence[int], progress: Progress = silent, doing: str = "capturing"
) -> Iterator[LayerCapture]:
    """Run ``model`` over the token ids ``ids``, and yield each layer's inputs, evaluated; only one layer is held.

    ``progress`` gets ``doing`` with the layer's number. Raises `InputError` if no layer keeps plain keys and values.
    """
    caches = probe.with_caches(model, Recorder)
    recorders = [slot for slot in probe.slots_of(caches) if isinstance(slot, Recorder)]
    if not recorders:
        raise InputError("No layer of this model keeps plain keys and values: there is nothing to capture.")
    ropes = ropes_of(model, ids)
    with ended_by(None):  # lazy: the computation starts with the layers below
        model(mx.array([ids]), cache=caches)
    del caches
    for done, rope in enumerate(ropes):
        own = recorders.pop(0)
        mx.eval([a for a in (own.queries, own.stored_keys, own.stored_values) if a is not None])
        seen = LayerCapture(own.facts.layer, own.queries, own.stored_keys, own.stored_values, own.scale, rope, own.cap)
        progress(done, len(ropes), f"{doing} layer {seen.layer}")
        yield seen
    progress(len(ropes), len(ropes), "done")


def by_head(
    schema: Mapping[str, Any],
    layers: Sequence[LayerCapture],
    columns: Callable[[LayerCapture, Tensor], Iterable[Columns]],
    tensors: Tensors = None,
    *,
    progress: Progress = silent,
    label: str = "",
) -> pl.DataFrame:
    """Return the rows of ``columns(layer, tensor)`` for the keys and values of every layer, by ``schema``.

    The function yields blocks of arrays that broadcast to ``[H, N]``. ``"head"`` is 0 to H − 1 by default. Missing
    columns are null.
    """
    frames = []
    for i, layer in enumerate(layers):
        for tensor in tensors or TENSORS:
            may_end()
            for block in columns(layer, tensor):
                arrays = {name: np.asarray(column) for name, column in block.items()}
                shape = np.broadcast_shapes((1, 1), *(array.shape for array in arrays.values()))
                place = {"layer": np.asarray(layer.layer), "head": np.arange(shape[0])[:, None]}
                arrays = place | {"tensor": np.asarray(tensor)} | arrays
                rows = {name: np.broadcast_to(array, shape).reshape(-1) for name, array in arrays.items()}
                frames.append(in_schema(pl.DataFrame(rows), schema))
        progress(i + 1, len(layers), f"{label}layer {layer.layer}")
    return pl.concat(frames)


def stretches(
    tokenizer: Tokenizer, text: str | None, tokens: int, count: int, *, last: int | None = None, name: str = "windows"
) -> list[list[int]]:
    """Return ``count`` windows of ``tokens`` token ids of a text; messages call them ``name``.

    The last one may be shorter, down to ``last``, with a warning. Raises `InputError` if the text is too short.
    """
    ids = first_tokens(tokenizer, text, tokens * count)
    if len(ids) < tokens * (count - 1) + (tokens if last is None else last):
        said = f"The text has {len(ids)} tokens, too few for {count} {name} of {tokens}"
        raise InputError(f"{said}: give a longer text or take fewer or shorter {name}.")
    if missing := tokens * count - len(ids):
        end = f"The text ends early: the last of {count} {name} has {tokens - missing} tokens, and not {tokens}."
        warnings.warn(end, stacklevel=3)
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


def first_tokens(tokenizer: Tokenizer, text: str | None, count: int, **options: bool) -> list[int]:
    """Return the first ``count`` token ids of ``text``, by default the test excerpt; ``options``: of the tokenizer."""
    text = excerpt("test") if text is None else text
    # a long text is not read to its end: the tokens of every tokenizer are shorter than this on average
    ids = list(tokenizer.encode(text[: 16 * count], **options))
    if len(ids) < count and len(text) > 16 * count:
        ids = list(tokenizer.encode(text, **options))
    return ids[:count]


class Recorder(probe.Probe):
    """Cache and handle in one. Attention is exact, and its inputs are kept. Subclasses may change keys and values."""

    def __init__(self, facts: probe.LayerFacts) -> None:
        super().__init__(facts)
        self.queries: mx.array | None = None
        self.scale: float | None = None
        self.cap: float | None = None

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """See `Handle.attend`; keeps the layer's own queries."""
        if self.queries is None:  # layers that share these keys and values attend later
            self.queries, self.scale, self.cap = q, scale, cap
        return attend_exactly(q, self.stored_keys, self.mixed, scale, mask, sinks, cap)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return the mask for ``N`` tokens in mlx-lm's form."""
        return cast("Mask", create_attention_mask(N, self.offset, return_array, window_size or self.facts.max_size))
