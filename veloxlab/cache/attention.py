"""Attention over a history that is partly exact and partly compressed.

A history is a list of segments in token order. A few query tokens (decoding) read every segment in its own form: codes
are expanded tile by tile, and the tiles are dropped. For many query tokens (prefill) one layer's past is expanded for
MLX's fused attention, whose memory does not grow with queries times keys, and is then dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
from threading import get_ident

import mlx.core as mx

from veloxlab.cache.arithmetic import as_added, attend_exactly, capped, narrowed, weights_of
from veloxlab.cache.expand import expanded, made_up_code, take_turn
from veloxlab.cache.past import (
    Past,
    Segment,
    exact_codes,
    exact_run,
    exact_segment,
    with_exact_arrays,
)
from veloxlab.codecs import TENSORS
from veloxlab.codecs.none import Exact
from veloxlab.kernels.backend import Backend
from veloxlab.kernels.call import AttentionKernel, PreparedCall, Queries, Tokens
from veloxlab.kernels.call import Exact as ExactTokens
from veloxlab.kernels.checked import agrees, difference, differentiable, evaluated, made_up
from veloxlab.kernels.devices import current_backend, expanded_bytes
from veloxlab.mlxlm.hooks import Handle, Mask, shape_in_common

_TRIAL = 3, 333, 70  # tokens before, in and after codes in a trial of a kernel: multiples of nothing
_LARGEST_SCORE = 4  # in a trial; a code of random bits may have a scale far above the others
_HIDDEN = 0.2  # share of tokens that the trial's mask hides
FEW_QUERIES = 16  # up to here scores [L, S] are smaller than an expanded history


class History(Handle):
    """All tokens that a layer's queries may attend to, oldest first.

    The result for many queries depends on the ``stored`` buffers. Otherwise MLX would postpone the encoding of all
    layers to the end of a prefill, and keep their keys and values until then. In place of ``segments`` a layer can
    give its unchanged ``past`` and the ``newest`` exact tokens after it.
    """

    def __init__(
        self,
        segments: tuple[Segment, ...] = (),
        stored: tuple[mx.array, ...] = (),
        past: Past | None = None,
        newest: ExactTokens | None = None,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        if past is None:
            past, behind = Past(segments), segments[-1:]
            if len(segments) > 1 and all(isinstance(c, Exact) for c in (behind[0].key_codec, behind[0].value_codec)):
                past, newest = Past(segments[:-1]), exact_run(behind[0])
        self.past, self.newest, self.stored, self._dtype = past, newest, stored, dtype

    @property
    def dtype(self) -> mx.Dtype:
        """See `Handle.dtype`."""
        return self._dtype if self.newest is None else self.newest.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Handle.shape`."""
        last = self.segments[-1]
        batch, heads = next(iter(last.keys.arrays.values())).shape[0], last.key_codec.heads_of(last.keys)
        return shape_in_common((batch, heads, self.tokens), last.key_codec.head_dim, last.value_codec.head_dim)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of all tokens."""
        if self.newest is None:
            return self.past.segments
        keys, values = (x[:, :, : self.newest.tokens] for x in (self.newest.keys, self.newest.values))
        return *self.past.segments, exact_segment(exact_codes(keys, values))

    @property
    def tokens(self) -> int:
        """Tokens in all segments."""
        behind = 0 if self.newest is None else self.newest.tokens
        return behind + sum(segment.keys.tokens for segment in self.past.segments)

    def expand(
        self, dtype: mx.Dtype, heads: slice = slice(None), after: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Keys ``[B, H, S, Dk]`` and values ``[B, H, S, Dv]`` of all tokens and some KV heads, decoded.

        They are computed only after ``after``: MLX evaluates many branches of a graph at the same time, and would
        otherwise expand the past of many layers together.
        """
        keys = expanded([(s.key_codec, s.keys) for s in self.segments], dtype, heads, after)
        return keys, self.expand_values(dtype, heads, keys)

    def expand_values(self, dtype: mx.Dtype, heads: slice = slice(None), after: mx.array | None = None) -> mx.array:
        """Values of all tokens, decoded: see `expand`."""
        return expanded([(s.value_codec, s.values) for s in self.segments], dtype, heads, after)

    def of_latents(self) -> History:
        """The same tokens with their keys, which are latents, as keys and values."""
        latents = tuple(replace(s, value_codec=s.key_codec, values=s.keys) for s in self.segments)
        return History(latents, dtype=self.dtype)

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        if q.shape[2] > FEW_QUERIES:
            out = self._attend_expanded(q, scale, mask, sinks, cap)
            return mx.depends([out], list(self.stored))[0] if self.stored else out
        fused = self._attend_in_kernel(q, scale, mask, sinks, cap)
        return self._attend_codes(q, scale, mask, sinks, cap) if fused is None else fused

    def _attend_expanded(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None, cap: float | None
    ) -> mx.array:
        """Attend to decoded tokens, some KV heads at a time if the arrays are large and of one shape."""
        codecs = [codec for s in self.segments for codec in (s.key_codec, s.value_codec)]
        kv_heads = together = self.segments[-1].key_codec.heads_of(self.segments[-1].keys)
        head_bytes = q.shape[0] * self.tokens * sum(codec.head_dim for codec in codecs[-2:]) * q.dtype.size
        take_turn(q, kv_heads * head_bytes)
        if all(codec.heads_alike for codec in codecs):
            together = min(kv_heads, max(1, expanded_bytes() // head_bytes))
        queries = q.shape[1] // kv_heads  # of a KV head
        parts = [q]
        for first in range(0, kv_heads, together):
            keys, values = self.expand(q.dtype, slice(first, first + together), after=parts[-1])
            heads = slice(first * queries, (first + together) * queries)
            own: Mask = mask
            if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1:
                own = mask[:, heads]
            logits = None if sinks is None else sinks[heads]
            parts.append(attend_exactly(q[:, heads], keys, values, scale, own, logits, cap))
        return mx.concatenate(parts[1:], axis=1)

    def _attend_in_kernel(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array | None:
        """Attend by a kernel; None if there is none for this device, these segments and these codecs."""
        newest, like, last = self.newest, _like(q, scale, cap, self._joins), self.past.last
        if last is not None and last[0] == like and mask is None and sinks is None:
            backend, call = last[1:]
            brings_in = self.past.brings_in if backend.lazy else None
            queries = Queries(q, scale, None if brings_in is None else brings_in(q), cap=cap)
            if backend.lazy:
                found = call(queries, newest, self.past.filled)
                return found[0] if found[1] is None else self._brought_out(found, q.dtype)
        else:
            current, call = current_backend(), None
            if current is None:
                return None
            backend = current
            if not backend.lazy and self.past.filled is not None:  # the device has changed since it was made
                self.past = Past(self.past.segments)
            if self.past.readers is None:
                return None
            added = None if mask is None else as_added(mask, q, self.tokens)
            queries = self._queries(q if backend.lazy else q.astype(mx.float32), scale, added, sinks, cap)
        beside = [x for x in (queries.coded, queries.mask, queries.logits) if x is not None]
        if not backend.lazy:
            exact = () if newest is None else newest.complete()
            if not evaluated(queries.q, *beside, *exact):
                return None
        call = call or self._call(backend, queries)
        if call is None:
            return None
        found = call(queries, newest, self.past.filled)
        out = self._brought_out(found, q.dtype)
        if mask is None and sinks is None and (backend.lazy or not (beside or found[1] is not None)):
            self.past.last = like, backend, call  # the next token uses this directly
        return out if backend.lazy else self._with_derivatives(out, q, queries)

    def _call(self, backend: Backend, queries: Queries) -> PreparedCall | None:
        """A prepared call of a kernel that agrees with the reference, or None. Each thread has its own."""
        q, calls = queries.q, self.past.calls
        like = get_ident(), backend, q.shape, q.dtype, self._joins, *queries.kind
        if like not in calls:
            calls[like], tokens = None, self._tokens()
            kernel = None if tokens is None else backend.attention(queries, tokens, backend)
            if tokens is None or kernel is None:
                return None
            if agrees(kernel, kernel.name, backend, lambda: self._disagreement(kernel, queries, tokens)):
                calls[like] = kernel.prepared(queries, tokens)
        return calls[like]

    def _with_derivatives(self, out: mx.array, q: mx.array, queries: Queries) -> mx.array:
        """The result of a kernel outside MLX's graph, with the derivatives of the reference."""
        past, newest, beside = self.past, self.newest, [x for x in (queries.mask, queries.logits) if x is not None]
        like = queries.kind
        if like not in past.derivatives:
            past.derivatives[like] = differentiable(_reference(past.segments, *like))
        behind = () if newest is None else (_number(newest.tokens), newest.keys, newest.values)
        return past.derivatives[like](out, q, *beside, *past.exact_arrays, *behind)[0]

    @property
    def _spaces(self) -> tuple[object, ...] | None:
        """What the histories of a batch must share: dimensions of codes, and codecs that kernels do not replace."""
        packed, readers = self.past.packed, self.past.readers
        if packed is None or readers is None:
            return None
        brings_in, brings_out = (reader.signs is None for reader in readers)
        return readers[0].dim, readers[1].dim, brings_in and packed.key_codec, brings_out and packed.value_codec

    @property
    def _joins(self) -> bool:
        """Whether the newest token is in no buffer yet, so that a kernel can write it there."""
        return self.newest is not None and self.newest.coming is not None

    def _tokens(self) -> Tokens | None:
        """The tokens in the form that a kernel reads; None if no kernel reads these segments and codecs."""
        past, readers, packed = self.past, self.past.readers, self.past.packed
        if readers is None or packed is None:
            return None
        key_dim, value_dim = packed.key_codec.head_dim, packed.value_codec.head_dim
        return Tokens(*readers, past.sinks, self.newest, key_dim, value_dim)

    def _queries(
        self, q: mx.array, scale: float, added: mx.array | None, sinks: mx.array | None, cap: float | None
    ) -> Queries:
        brings_in = self.past.brings_in
        logits = None if sinks is None else sinks.astype(mx.float32)
        return Queries(q, scale, None if brings_in is None else brings_in(q), added, logits, cap)

    def _brought_out(self, found: tuple[mx.array, mx.array | None], dtype: mx.Dtype) -> mx.array:
        """The result of a kernel, plus the part that it left in the space of the values' codes."""
        out, mixed = found
        if mixed is not None:
            assert self.past.packed is not None
            out = out + self.past.packed.value_codec.from_codes(mixed).reshape(out.shape).astype(out.dtype)
        return out if out.dtype == dtype else narrowed(out, dtype)

    def _disagreement(self, kernel: AttentionKernel, queries: Queries, tokens: Tokens) -> str:
        """Compare a kernel with its reference on a random history; a description of the difference, empty if none."""
        lengths, like = _TRIAL[0 if tokens.sinks else 1 :], (tokens.keys.kv_heads, tokens.exact_type)
        newest = () if self.newest is None else (exact_segment(exact_codes(*self.newest.buffers)),)
        segments = zip((*self.past.segments, *newest), lengths, strict=False)
        history = History(tuple(_made_up(s, count, *like) for s, count in segments))
        q = made_up(queries.q, queries.q.shape[2], seed=1)
        scores = history._scores(q, queries.scale)
        size = mx.maximum(mx.sqrt(mx.square(scores).mean()), mx.abs(scores).max() / _LARGEST_SCORE)
        q = (q / mx.maximum(size, 1.0)).astype(q.dtype)  # large scores have no fraction in half precision
        hidden = mx.random.bernoulli(_HIDDEN, (*q.shape[:3], history.tokens), key=mx.random.key(2))
        mask = None if queries.mask is None else mx.where(hidden, -1e9, 0.0)
        sinks = None if queries.logits is None else made_up(queries.logits, 1, seed=3)
        some, given = history._tokens(), history._queries(q, queries.scale, mask, sinks, queries.cap)
        assert some is not None
        wanted = {"out": history._attend_codes(q.astype(mx.float32), queries.scale, mask, sinks, queries.cap)}
        if tokens.joins and some.recent is not None:
            wanted |= dict(zip(TENSORS, some.recent.buffers, strict=True))
            some = replace(some, recent=some.recent.parted())
        found = {"out": history._brought_out(kernel.prepared(given, some)(given, some.recent), q.dtype)}
        if some.recent is not None:
            found |= dict(zip(TENSORS, some.recent.complete(), strict=True))
        return difference(found, wanted)

    def _scores(self, q: mx.array, scale: float) -> mx.array:
        scaled = q.astype(mx.float32) * scale
        return mx.concatenate([s.key_codec.scores(scaled, s.keys) for s in self.segments], axis=-1)

    def _attend_codes(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        weights = weights_of(capped(self._scores(q, scale), cap), as_added(mask, q, self.tokens), sinks)
        mixed, start = mx.array(0.0), 0
        for s in self.segments:
            part = weights[..., start : start + s.values.tokens]
            mixed, start = mixed + s.value_codec.mix(part, s.values), start + s.values.tokens
        return narrowed(mixed, q.dtype)


def _like(q: mx.array, scale: float, cap: float | None, joins: bool) -> tuple[object, ...]:
    """The key of a prepared call, which serves queries of the same form, on the same device, in the same thread."""
    return q.shape, q.dtype, scale, cap, joins, get_ident(), mx.default_device()


def _reference(
    segments: tuple[Segment, ...], scale: float, cap: float | None, no_mask: bool, no_logits: bool
) -> Callable[..., list[mx.array]]:
    """Attention of queries by MLX operations, over these segments and the new tokens.

    Its arguments: the queries, mask and logits, `exact_arrays`, and the number of new tokens with their buffers.
    """

    def by_graph(q: mx.array, *given: mx.array) -> list[mx.array]:
        arrays = iter(given)
        mask, logits = (None if none else next(arrays) for none in (no_mask, no_logits))
        own, behind = with_exact_arrays(segments, arrays), [*arrays]
        if behind:
            keys, values = (x[:, :, : behind[0].item()] for x in behind[1:])
            own = *own, exact_segment(exact_codes(keys, values))
        return [History(own)._attend_codes(q, scale, mask, logits, cap)]

    return by_graph


_number = lru_cache(mx.array)


def _made_up(s: Segment, tokens: int, kv_heads: int, dtype: mx.Dtype) -> Segment:
    """A segment of random codes like ``s``, for the trial of a kernel."""
    keys = made_up_code(s.key_codec, s.keys.start, tokens, kv_heads, dtype, seed=4)
    return replace(s, keys=keys, values=made_up_code(s.value_codec, s.values.start, tokens, kv_heads, dtype, seed=5))
