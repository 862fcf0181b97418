"""The tokens before a layer's newest ones: they stay for many steps, and so do the kernel calls prepared for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import mlx.core as mx

from veloxlab.cache.expand import reader_of
from veloxlab.cache.run import Codes, Run
from veloxlab.cache.runs import Runs
from veloxlab.codecs import Code, Codec
from veloxlab.codecs.base import per_kv_head
from veloxlab.codecs.none import Exact
from veloxlab.kernels.backend import Backend
from veloxlab.kernels.call import Exact as ExactTokens
from veloxlab.kernels.call import PreparedCall
from veloxlab.kernels.devices import device_backend
from veloxlab.kernels.readers import Reader


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens in one form: the codes of their keys and values, and the codecs that read them."""

    key_codec: Codec
    keys: Code
    value_codec: Codec
    values: Code


def exact_run(s: Segment) -> ExactTokens:
    """Exact tokens in a kernel's form."""
    return ExactTokens(s.keys.arrays["values"], s.values.arrays["values"])


class Past:
    """Segments that stay for many steps, and the calls that attention has prepared to read them.

    A GPU gets the whole buffers of the packed segment, of which only the first ``filled`` tokens are used. So a
    prepared call serves until the buffers are full.
    """

    def __init__(self, segments: tuple[Segment, ...], filled: int | None = None) -> None:
        self._whole, self.filled = segments, filled
        self.calls: dict[tuple[object, ...], PreparedCall | None] = {}  # for queries of some shape, type and scale
        self.last: tuple[tuple[object, ...], Backend, PreparedCall] | None = None  # the last, for queries like these
        self.derivatives: dict[tuple[object, ...], Callable[..., list[mx.array]]] = {}  # of their answers

    def refilled(self, filled: int) -> Past:
        """The same buffers with more tokens; the next call checks again which kernels run."""
        other = Past.__new__(Past)
        other.__dict__.update(self.__dict__, filled=filled, last=None)
        other.__dict__.pop("segments", None)
        return other

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, with the filled tokens alone."""
        if self.filled is None or self.packed is None:
            return self._whole
        keys, values = (code[: self.filled] for code in (self.packed.keys, self.packed.values))
        cut = replace(self.packed, keys=keys, values=values)
        return tuple(cut if segment is self.packed else segment for segment in self._whole)

    @cached_property
    def packed_at(self) -> int | None:
        """Index of the packed segment, or None."""
        for i, segment in enumerate(self._whole):
            if not isinstance(segment.key_codec, Exact):
                return i
        return None

    @cached_property
    def packed(self) -> Segment | None:
        """The packed segment, with whole buffers."""
        return None if self.packed_at is None else self._whole[self.packed_at]

    @cached_property
    def sinks(self) -> ExactTokens | None:
        """The exact tokens before the packed segment, for a kernel."""
        first = self._whole[0]  # the same object at each call: a CPU describes it once
        return first.keys.once("exact", lambda: exact_run(first)) if self.packed_at else None

    @cached_property
    def readers(self) -> tuple[Reader, Reader] | None:
        """The readers of the packed keys and values; None if no kernel reads these segments."""
        at, packed = self.packed_at, self.packed
        if packed is None or at is None or at > 1 or len(self._whole) > at + 1:
            return None
        keys, values = reader_of(packed.key_codec, packed.keys), reader_of(packed.value_codec, packed.values)
        return None if keys is None or values is None else (keys, values)

    @cached_property
    def exact_arrays(self) -> list[mx.array]:
        """See `exact_arrays`."""
        return exact_arrays(self.segments)

    @cached_property
    def brings_in(self) -> Callable[[mx.array], mx.array] | None:
        """A function that brings queries into the space of the codes, or None if the kernel does that itself."""
        packed, readers = self.packed, self.readers
        if packed is None or readers is None or readers[0].signs is not None:
            return None
        codec, kv_heads = packed.key_codec, readers[0].kv_heads
        # a gather, as of a codec that reorders coordinates, gives a view that a kernel would misread
        return lambda q: mx.contiguous(codec.query_to_codes(per_kv_head(q.astype(mx.float32), kv_heads)))


def before_window(held: Runs, codecs: tuple[Codec, Codec], last: Past | None) -> Past:
    """The past before a layer's window. On a GPU the ``last`` one is used again while its buffers have room."""
    packed = held.packed
    if not packed.tokens or not device_backend().lazy:
        return Past(segments_of(held, held.runs[:2], codecs))
    first = next(iter(packed.buffers.values()))
    if last is not None and last.packed is not None and next(iter(last.packed.keys.arrays.values())) is first:
        return last.refilled(packed.tokens)
    keys, values = packed.whole(held.sinks.tokens)
    whole = Segment(codecs[0], keys, codecs[1], values)
    return Past((*segments_of(held, held.runs[:1], codecs), whole), packed.tokens)


def segments_of(held: Runs, runs: Sequence[Run], codecs: tuple[Codec, Codec], hidden: int = 0) -> tuple[Segment, ...]:
    """Segments of the first ``runs`` of a layer, without the ``hidden`` oldest tokens after the sinks."""
    segments, start = [], 0
    for run in runs:
        skip = 0 if run is held.sinks else min(hidden, run.tokens)
        hidden -= skip
        if run.tokens > skip:
            codes = run.codes(start, skip)
            packed = run is held.packed
            segments.append(Segment(codecs[0], codes[0], codecs[1], codes[1]) if packed else exact_segment(codes))
        start += run.tokens + (held.evicted if run is held.sinks else 0)
    return tuple(segments)


def exact_arrays(segments: Sequence[Segment]) -> list[mx.array]:
    """Keys and values of the exact segments."""
    exact = (s for s in segments if isinstance(s.key_codec, Exact))
    return [code.arrays["values"] for s in exact for code in (s.keys, s.values)]


def with_exact_arrays(segments: Sequence[Segment], arrays: Iterator[mx.array]) -> tuple[Segment, ...]:
    """The same segments with these arrays in place of `exact_arrays`."""
    return tuple(
        replace(s, keys=Code({"values": next(arrays)}), values=Code({"values": next(arrays)}))
        if isinstance(s.key_codec, Exact)
        else s
        for s in segments
    )


def exact_segment(codes: Codes) -> Segment:
    """A segment of exact tokens."""
    keys, values = (_exact(code.arrays["values"].shape[-1]) for code in codes)
    return Segment(keys, codes[0], values, codes[1])


def exact_codes(keys: mx.array, values: mx.array, first: int = 0) -> Codes:
    """The codes of exact tokens, from index ``first`` on."""
    if first:
        keys, values = keys[:, :, first:], values[:, :, first:]
    return Code({"values": keys}), Code({"values": values})


_exact = lru_cache(Exact)
