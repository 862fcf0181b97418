"""How a cache lays out its tokens: bytes that each one takes in each layer, and so what any context takes in all.

Predicted from what the codecs store, and not measured; tests hold it to the bytes of real caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from veloxlab.cache.counts import Windows
from veloxlab.cache.layer import DEFAULT_CHUNK, DEFAULT_SINKS, DEFAULT_WINDOW
from veloxlab.cache.make import DEFAULT_SLIDING, Exactness, Sliding, cache_name, side_bits
from veloxlab.cache.room import compressed_room, own_room
from veloxlab.checks import checked, either, many, real, whole
from veloxlab.codecs import ROLES, Codec, Role, find_method
from veloxlab.codecs.base import token_bytes
from veloxlab.codecs.method import Calibrated, Method, layer_codec
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import LayerFacts
from veloxlab.mlxlm.quantized import GROUP, why_not_quantized
from veloxlab.models.shapes import MODEL_OR_CONFIG, ModelOrConfig, ModelShape, shape_of

PLANNED = {
    "cache": pl.String,  # the one that was asked for first, then those that it is compared with
    "tokens": pl.Int64,  # of each sequence
    "batch": pl.Int64,  # sequences
    "part": pl.String,  # one of `veloxlab.measure.planned_memory.PARTS`
    "bytes": pl.Int64,  # of the part, in all layers and sequences; parts add up
    "kind": pl.String,  # "predicted"
}
"""Columns of `plan_memory`."""

LARGEST = {
    "cache": pl.String,
    "memory_bytes": pl.Int64,  # that there are
    "batch": pl.Int64,
    "tokens": pl.Int64,  # the largest context, in steps of 256
    "bytes": pl.Int64,  # that it takes
    "kind": pl.String,  # "predicted"
}
"""Columns of `largest_contexts`."""

PARTS = ("codes", "scales", "sinks", "window", "exact", "states", "tables")
"""Parts of what a cache holds: codes, and scales and norms, of packed tokens; exact first and newest tokens; tokens of
layers whose cache is the model's own; states that do not grow; and constant tables, which all sequences share."""

GRAIN = 256  # tokens: the largest context that fits is found in such steps
MOST_TOKENS = 2**24  # and not looked for beyond
THEIR_BITS = (4, 8)


@dataclass(frozen=True)
class LayerLayout:
    """Layers of one kind.

    Attributes
    ----------
    layers : how many.
    exact : bytes of the keys and values of an exact token.
    codes, scales : bytes of those of a packed token; with codes and no ``windows`` every token is packed.
    windows : which tokens are exact; None for a cache of mlx-lm's own.
    max_size : tokens that an own cache which slides sees.
    """

    layers: int
    exact: int = 0
    codes: int = 0
    scales: int = 0
    windows: Windows | None = None
    max_size: int | None = None

    def parts(self, tokens: int, decoded: int) -> Mapping[str, int]:
        """Bytes by part after ``tokens`` tokens of one sequence."""
        if self.windows is None:
            counts = dict.fromkeys(("codes", "scales", "exact"), own_room(tokens, decoded, self.max_size))
        else:
            room = compressed_room(self.windows, tokens, decoded)
            counts = {"codes": room.packed, "scales": room.packed, "sinks": room.sinks, "window": room.recent}
        per_token = {"codes": self.codes, "scales": self.scales}
        return {part: self.layers * per_token.get(part, self.exact) * count for part, count in counts.items()}


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a whole model.

    Attributes
    ----------
    name : such as ``"turboquant K4 V4"``, ``"fp16"`` or ``"mlx-lm 4 bit"``.
    kinds : its layers, by kind.
    tables : bytes of constant tables, held once.
    states : bytes of the states of one sequence, which do not grow.
    """

    name: str
    kinds: tuple[LayerLayout, ...]
    tables: int = 0
    states: int = 0

    def parts(self, tokens: int, batch: int = 1, decoded: int = 0) -> dict[str, int]:
        """Bytes by part of ``batch`` sequences of ``tokens`` tokens, the last ``decoded`` of them generated."""
        total: Counter[str] = Counter(states=batch * self.states, tables=self.tables)
        for kind in self.kinds:
            for part, nbytes in kind.parts(tokens, decoded).items():
                total[part] += batch * nbytes
        return {part: total[part] for part in PARTS}

    def held(self, tokens: int, batch: int = 1, decoded: int = 0) -> int:
        """Bytes of all parts."""
        return sum(self.parts(tokens, batch, decoded).values())

    def largest_context(self, memory_bytes: float, batch: int = 1) -> int:
        """The most tokens of each sequence, a multiple of `GRAIN`, that ``memory_bytes`` hold; at most `MOST_TOKENS`.

        So many fit and `GRAIN` more do not. 0 if not even `GRAIN` do.
        """
        fits, fails = 0, MOST_TOKENS // GRAIN + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self.held(middle * GRAIN, batch) <= memory_bytes:
                fits = middle
            else:
                fails = middle
        return fits * GRAIN


def cache_layouts(
    model_or_config: ModelOrConfig,
    method: str = "turboquant",
    *,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    sliding: Sliding = DEFAULT_SLIDING,
    calibration: Calibrated | None = None,
    **options: object,
) -> tuple[CacheLayout, ...]:
    """Layouts of a compressed cache, and of those that it is compared with.

    These are the model's own with 16 bits a value, and mlx-lm's quantized ones, where mlx-lm can quantize the model's.
    A method that has to be fitted needs no ``calibration`` here: what it would learn has a size that is known before.
    Further arguments as for `veloxlab.make_cache`.

    Raises
    ------
    InputError : as `veloxlab.models.shapes.shape_of` and `veloxlab.make_cache`.
    """
    shape = shape_of(model_or_config)
    found = find_method(method)
    exact = Exactness(sinks, window, DEFAULT_CHUNK, sliding)
    widths = side_bits(method, 8 * shape.exact_bytes, bits, key_bits, value_bits)
    codecs: set[Codec] = set()
    known: dict[object, tuple[int, int]] = {}
    kinds: Counter[LayerLayout] = Counter()
    for facts in shape.caches:
        if not facts.compressible or (facts.max_size is not None and exact.sliding == "exact"):
            kinds[_own(facts, shape.exact_bytes)] += 1
            continue
        codes = scales = 0
        for tensor in ROLES:
            codec = _codec(found, facts, widths[tensor], tensor, options, calibration)
            codecs.add(codec)
            place = (facts.layer if calibration else None, facts.kv_heads, facts.dims[tensor], tensor)
            if place not in known:
                known[place] = token_bytes(codec, facts.kv_heads, shape.exact_bytes)
            codes, scales = codes + known[place][0], scales + known[place][1]
        windows = Windows.of(exact.sinks if facts.max_size is None else facts.keep, exact.window, facts.max_size)
        kinds[replace(_own(facts, shape.exact_bytes), codes=codes, scales=scales, windows=windows, max_size=None)] += 1
    tables = sum(codec.shared_bytes for codec in codecs)
    ours = CacheLayout(cache_name(method, widths), _counted(kinds), tables, shape.state_bytes)
    return ours, *_others(shape)


def _codec(
    method: Method,
    facts: LayerFacts,
    bits: int,
    tensor: Role,
    options: Mapping[str, object],
    calibration: Calibrated | None,
) -> Codec:
    if calibration is not None:
        return layer_codec(method, facts.layer, facts.dims[tensor], bits, tensor, options, calibration)
    return method.codec(facts.dims[tensor], bits, tensor, **options).blank(facts.kv_heads)


def _token_values(facts: LayerFacts) -> int:
    return facts.kv_heads * (facts.key_dim + facts.value_dim)


def _own(facts: LayerFacts, exact_bytes: int) -> LayerLayout:
    return LayerLayout(1, exact_bytes * _token_values(facts), max_size=facts.max_size)


def _counted(kinds: Counter[LayerLayout]) -> tuple[LayerLayout, ...]:
    return tuple(replace(kind, layers=count) for kind, count in kinds.items())


def _others(shape: ModelShape) -> Iterator[CacheLayout]:
    """The exact cache in 16 bits, and mlx-lm's quantized ones: it has none for layers that slide or store latents."""
    own = Counter(_own(facts, 2) for facts in shape.caches)
    yield CacheLayout("fp16", _counted(own), states=shape.state_bytes)
    for bits in (b for b in THEIR_BITS if why_not_quantized(shape.caches, b) is None):
        # a scale and a bias for each group, of the type that the keys have
        quantized = Counter(
            LayerLayout(1, codes=values * bits // 8, scales=2 * shape.exact_bytes * values // GROUP)
            for values in (_token_values(facts) for facts in shape.caches if facts.kv_heads)
        )
        yield CacheLayout(f"mlx-lm {bits} bit", _counted(quantized), states=shape.state_bytes)


@checked(model_or_config=MODEL_OR_CONFIG, context=either(whole(1), many(whole(1))))
def plan_memory(
    model_or_config: ModelOrConfig,
    method: str = "turboquant",
    *,
    context: int | Sequence[int] = 32_768,
    batch: int = 1,
    decoded: int = 0,
    **settings: Any,
) -> pl.DataFrame:
    """Predict the bytes that a compressed cache will hold, beside the exact one and mlx-lm's quantized ones: `PLANNED`.

    Exact to the byte for a text that mlx-lm's generator reads, in chunks of 2,048 tokens and its last token by itself,
    but for the tables of SpectralQuant (see its ``blank``). A text that is generated leaves buffers room to grow: say
    how much of it was.

    Parameters
    ----------
    model_or_config : as for `veloxlab.models.shapes.shape_of`: a model, a ``config.json`` or its folder, or a
        `veloxlab.ModelShape`.
    method : a method's id.
    context : tokens of each sequence, or several such numbers.
    batch : sequences; tables are held once for all.
    decoded : how many of the newest tokens were generated, one at a time.
    settings : ``bits``, ``key_bits``, ``value_bits``, ``sinks``, ``window``, ``sliding``, ``calibration`` and the
        method's own, as for `veloxlab.make_cache`.

    Raises
    ------
    InputError : as `veloxlab.make_cache`; a model that is not here; numbers of tokens or sequences below 0 or 1.
    """
    lengths = [context] if isinstance(context, int) else list(context)
    if min(lengths) < decoded:
        raise InputError(f"context={min(lengths)} has fewer tokens than decoded={decoded}: give no less than those.")
    return planned(cache_layouts(model_or_config, method, **settings), lengths, batch, decoded)


def planned(layouts: Sequence[CacheLayout], contexts: Sequence[int], batch: int = 1, decoded: int = 0) -> pl.DataFrame:
    """Bytes by part of each layout at each context: `PLANNED`."""
    rows = [
        {"cache": layout.name, "tokens": tokens, "batch": batch, "part": part, "bytes": nbytes, "kind": "predicted"}
        for layout in layouts
        for tokens in contexts
        for part, nbytes in layout.parts(tokens, batch, decoded).items()
        if nbytes
    ]
    return pl.DataFrame(rows, schema=PLANNED)


@checked(model_or_config=MODEL_OR_CONFIG, memory_bytes=real(above=0))
def largest_contexts(
    model_or_config: ModelOrConfig,
    memory_bytes: float,
    method: str = "turboquant",
    *,
    batch: int = 1,
    **settings: Any,
) -> pl.DataFrame:
    """Predict the largest context that fits in so much memory for the cache alone: `LARGEST`.

    ``memory_bytes`` is what is left beside weights and all else. Further arguments as for `plan_memory`.

    Raises
    ------
    InputError : as `plan_memory`; or no memory.
    """
    return largest(cache_layouts(model_or_config, method, **settings), memory_bytes, batch)


def largest(layouts: Sequence[CacheLayout], memory_bytes: float, batch: int = 1) -> pl.DataFrame:
    """The largest context of each layout that fits in so much memory: `LARGEST`."""
    rows = []
    for layout in layouts:
        tokens = layout.largest_context(memory_bytes, batch)
        rows.append((layout.name, int(memory_bytes), batch, tokens, layout.held(tokens, batch), "predicted"))
    return pl.DataFrame(rows, schema=LARGEST, orient="row")
