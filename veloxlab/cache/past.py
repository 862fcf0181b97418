"""What comes before a layer's newest tokens: it stays for many of them, and so does what attention prepares of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from veloxlab.cache.expand import reader_of
from veloxlab.codecs import Code, Codec
from veloxlab.codecs.base import per_kv_head
from veloxlab.codecs.none import Exact
from veloxlab.kernels.call import Exact as ExactTokens
from veloxlab.kernels.call import PreparedCall
from veloxlab.kernels.readers import Reader


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens in one form: the codes of their keys and values, and the codecs that read them."""

    key_codec: Codec
    keys: Code
    value_codec: Codec
    values: Code


def exact_run(s: Segment) -> ExactTokens:
    """Tokens that are exact, for a kernel."""
    return ExactTokens(s.keys.arrays["values"], s.values.arrays["values"])


class Past:
    """Segments that stay for many tokens, and what attention has prepared to read them, from token to token."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        self.calls: dict[tuple[object, ...], PreparedCall | None] = {}  # for queries of some shape, type and scale

    @cached_property
    def packed_at(self) -> int | None:
        """Which segment is packed."""
        for i, segment in enumerate(self.segments):
            if not isinstance(segment.key_codec, Exact):
                return i
        return None

    @cached_property
    def packed(self) -> Segment | None:
        """The segment that is packed."""
        return None if self.packed_at is None else self.segments[self.packed_at]

    @cached_property
    def sinks(self) -> ExactTokens | None:
        """What comes before that, for a kernel."""
        first = self.segments[0]  # its own object lasts: a CPU describes that once
        return first.keys.once("exact", lambda: exact_run(first)) if self.packed_at else None

    @cached_property
    def readers(self) -> tuple[Reader, Reader] | None:
        """How a kernel reads the packed keys and values, or None where no kernel does, or not such segments."""
        at, packed = self.packed_at, self.packed
        if packed is None or at is None or at > 1 or len(self.segments) > at + 1:
            return None
        keys, values = reader_of(packed.key_codec, packed.keys), reader_of(packed.value_codec, packed.values)
        return None if keys is None or values is None else (keys, values)

    @cached_property
    def brings_in(self) -> Callable[[mx.array], mx.array] | None:
        """What makes queries those that a kernel compares with codes, where it does not do that by itself."""
        packed, readers = self.packed, self.readers
        if packed is None or readers is None or readers[0].signs is not None:
            return None
        codec, kv_heads = packed.key_codec, readers[0].kv_heads
        # a gather, as of a codec that reorders coordinates, gives a view that a kernel would misread
        return lambda q: mx.contiguous(codec.query_to_codes(per_kv_head(q.astype(mx.float32), kv_heads)))
