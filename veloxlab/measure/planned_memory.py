"""Predicted layout of a cache, from the arrays that codecs store: bytes by layer, and at any context."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from mlx_lm.models.cache import ChunkedKVCache

from veloxlab.cache.calibration import Calibration, layer_codec
from veloxlab.cache.counts import Windows, own_room
from veloxlab.cache.plan import DEFAULT_SINKS, DEFAULT_SLIDING, DEFAULT_WINDOW, Sliding, cache_name, tensor_bits
from veloxlab.cache.runs import compressed_room
from veloxlab.checks import checked, either, many, number_of_tokens_up_to, real
from veloxlab.codecs import TENSORS, Codec, find_method
from veloxlab.codecs.base import token_bytes
from veloxlab.errors import InputError
from veloxlab.measure.frames import schema
from veloxlab.mlxlm.probe import LayerFacts
from veloxlab.mlxlm.quantized import GROUP, why_not_quantized
from veloxlab.models.shapes import MODEL_OR_CONFIG, ModelOrConfig, ModelShape, shape_of

PLANNED = schema("cache tokens batch part bytes kind")
"""Columns of `plan_memory`: the requested cache, first, or one for comparison; tokens of each
sequence, and sequences; one of `PARTS`; its bytes in all layers and sequences, which add up; and "predicted"."""

LARGEST = schema("cache memory_bytes batch tokens bytes kind")
"""Columns of `largest_contexts`: available bytes; the largest context, in steps of `GRAIN`; its bytes."""

PARTS = ("codes", "scales", "sinks", "window", "exact", "states", "tables")
"""Parts of a cache: codes of packed tokens, and their scales and norms; exact first and newest tokens; tokens in the
model's own caches; states of constant size; and constant tables, which all sequences share."""

GRAIN, MOST_TOKENS = 256, 2**24  # tokens: the largest context is a multiple of the first, up to the second
CONTEXT = number_of_tokens_up_to(MOST_TOKENS)  # bounded, because a prediction takes time for each chunk of tokens


@dataclass(frozen=True)
class LayerLayout:
    """One layer: bytes of a token's keys and values, and which tokens are exact."""

    exact: int = 0  # bytes of an exact token
    codes: int = 0  # and of a packed one
    scales: int = 0
    windows: Windows | None = None  # None for mlx-lm's own caches
    max_size: int | None = None  # tokens that a sliding cache of mlx-lm sees
    chunked: bool = False  # whether that cache works in chunks

    def parts(self, tokens: int, decoded: int) -> dict[str, int]:
        """Return bytes by part after ``tokens`` tokens of one sequence."""
        if self.windows is None:
            count = own_room(tokens, decoded, self.max_size, chunked=self.chunked)
            return {"codes": count * self.codes, "scales": count * self.scales, "exact": count * self.exact}
        room = compressed_room(self.windows, tokens, decoded)
        packed = {"codes": room.packed * self.codes, "scales": room.packed * self.scales}
        return packed | {"sinks": room.sinks * self.exact, "window": room.recent * self.exact}


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a whole model."""

    name: str  # such as "turboquant K4 V4", "fp16" or "mlx-lm 4 bit"
    layers: Mapping[LayerLayout, int]  # number of layers with each layout
    states: int  # bytes of the states of one sequence; they do not grow
    tables: int = 0  # bytes of constant tables, held once

    def parts(self, tokens: int, batch: int = 1, decoded: int = 0) -> dict[str, int]:
        """Return bytes by part of ``batch`` sequences of ``tokens`` tokens, the last ``decoded`` of them generated."""
        total: Counter[str] = Counter(states=batch * self.states, tables=self.tables)
        for layer, count in self.layers.items():
            total.update({part: batch * count * nbytes for part, nbytes in layer.parts(tokens, decoded).items()})
        return {part: total[part] for part in PARTS}

    def held(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes of all parts after texts were read."""
        return sum(self.parts(tokens, batch).values())

    def largest_context(self, memory_bytes: float, batch: int = 1) -> int:
        """Return the most tokens of each sequence in ``memory_bytes``: a multiple of `GRAIN` up to `MOST_TOKENS`."""
        steps = range(GRAIN, MOST_TOKENS + 1, GRAIN)
        return GRAIN * bisect_right(steps, memory_bytes, key=lambda tokens: self.held(tokens, batch))


def cache_layouts(
    model_or_config: ModelOrConfig,
    method: str = "turboquant",
    *,
    bits: float | None = None,
    key_bits: float | None = None,
    value_bits: float | None = None,
    layer_bits: Mapping[int, tuple[float, float]] | None = None,
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    sliding: Sliding = DEFAULT_SLIDING,
    calibration: Calibration | None = None,
    **options: object,
) -> tuple[CacheLayout, ...]:
    """Return layouts of a compressed cache, of the exact one in 16 bits, and of mlx-lm's quantized ones if possible.

    Arguments and errors are as for `veloxlab.make_cache` and `shape_of`; no method needs a ``calibration``.
    ``layer_bits``: bits of keys and of values for layers that differ.
    """
    shape, found = shape_of(model_or_config), find_method(method)
    widths = tensor_bits(method, 8 * shape.exact_bytes, bits, key_bits, value_bits)
    codecs: set[Codec] = set()

    def layout(facts: LayerFacts) -> LayerLayout:
        if not facts.compressible or (facts.max_size is not None and sliding == "exact"):
            return _own(facts, shape.exact_bytes)
        sizes, own = [], dict(zip(TENSORS, (layer_bits or {}).get(facts.layer, ()), strict=False))
        for tensor, head_dim in facts.dims.items():
            width = own.get(tensor, widths[tensor])
            if calibration is None:
                codec = found.codec(head_dim, width, tensor, **options).blank(facts.kv_heads)
            else:
                codec = layer_codec(found, facts.layer, head_dim, width, tensor, options, calibration)
            codecs.add(codec)
            sizes.append(token_bytes(codec, facts.kv_heads, shape.exact_bytes))
        codes, scales = (sum(part) for part in zip(*sizes, strict=True))
        windows = Windows.of_layer(facts, sinks, window)
        return LayerLayout(shape.exact_bytes * facts.values_per_token, codes, scales, windows)

    layers = Counter(map(layout, shape.caches))
    tables = sum(codec.shared_bytes for codec in codecs)
    ours = CacheLayout(cache_name(method, widths), layers, shape.state_bytes, tables)
    fp16 = CacheLayout("fp16", Counter(_own(facts, 2) for facts in shape.caches), shape.state_bytes)
    return ours, fp16, *(_quantized(shape, b) for b in (4, 8) if why_not_quantized(shape.caches, b) is None)


def _own(facts: LayerFacts, exact_bytes: int) -> LayerLayout:
    chunked = facts.native == ChunkedKVCache.__name__
    return LayerLayout(exact_bytes * facts.values_per_token, max_size=facts.max_size, chunked=chunked)


def _quantized(shape: ModelShape, bits: int) -> CacheLayout:
    """Return the layout of mlx-lm's quantized cache: codes, and a scale and bias of the keys' type for each group."""
    sizes = (facts.values_per_token for facts in shape.caches if facts.kv_heads)
    layers = Counter(LayerLayout(0, n * bits // 8, 2 * shape.exact_bytes * n // GROUP) for n in sizes)
    return CacheLayout(f"mlx-lm {bits} bit", layers, shape.state_bytes)


@checked(model_or_config=MODEL_OR_CONFIG, context=either(CONTEXT, many(CONTEXT)))
def plan_memory(
    model_or_config: ModelOrConfig,
    method: str = "turboquant",
    *,
    context: int | str | Sequence[int | str] = 32_768,
    batch: int = 1,
    decoded: int = 0,
    **settings: Any,
) -> pl.DataFrame:
    """Predict the bytes that a compressed cache will hold, beside the exact one and mlx-lm's quantized ones: `PLANNED`.

    Exact to the byte for a text that mlx-lm's generator reads, in chunks of 2,048 tokens and its last token alone.
    Exceptions are the tables of SpectralQuant (see its ``blank``), and FisherQuant without a calibration: its layers
    differ in bits, so some hold up to a block of packed tokens more. Generated text leaves free space in
    the buffers. Raises `InputError`: as `veloxlab.make_cache`; if the model is not found; if ``decoded`` exceeds the
    context.

    Parameters
    ----------
    model_or_config : a model, a ``config.json`` or its folder, or a `veloxlab.ModelShape`.
    context : tokens of each sequence, up to 2^24, such as 32768 or ``"32k"``; or several such numbers.
    batch : sequences; tables are held once for all.
    decoded : number of the newest tokens that were generated, one at a time.
    settings : ``bits``, ``key_bits``, ``value_bits``, ``sinks``, ``window``, ``sliding``, ``calibration`` and the
        method's own, as for `veloxlab.make_cache`.
    """
    lengths = [int(tokens) for tokens in ([context] if isinstance(context, int | str) else context)]
    if min(lengths) < decoded:
        raise InputError(f"context={min(lengths)} has fewer tokens than decoded={decoded}: give no less than those.")
    return planned(cache_layouts(model_or_config, method, **settings), lengths, batch, decoded)


def planned(layouts: Sequence[CacheLayout], contexts: Sequence[int], batch: int = 1, decoded: int = 0) -> pl.DataFrame:
    """Return bytes by part of each layout at each context: `PLANNED`."""
    rows = [
        (layout.name, tokens, batch, part, nbytes, "predicted")
        for layout in layouts
        for tokens in contexts
        for part, nbytes in layout.parts(tokens, batch, decoded).items()
        if nbytes
    ]
    return pl.DataFrame(rows, schema=PLANNED, orient="row")


@checked(model_or_config=MODEL_OR_CONFIG, memory_bytes=real(above=0))
def largest_contexts(
    model_or_config: ModelOrConfig,
    memory_bytes: float,
    method: str = "turboquant",
    *,
    batch: int = 1,
    **settings: Any,
) -> pl.DataFrame:
    """Predict the largest context whose cache fits in ``memory_bytes`` alone: `LARGEST`; arguments as `plan_memory`."""
    return largest(cache_layouts(model_or_config, method, **settings), memory_bytes, batch)


def largest(layouts: Sequence[CacheLayout], memory_bytes: float, batch: int = 1) -> pl.DataFrame:
    """Return the largest context of each layout that fits in ``memory_bytes``: `LARGEST`."""
    rows = []
    for layout in layouts:
        tokens = layout.largest_context(memory_bytes, batch)
        rows.append((layout.name, int(memory_bytes), batch, tokens, layout.held(tokens, batch), "predicted"))
    return pl.DataFrame(rows, schema=LARGEST, orient="row")
