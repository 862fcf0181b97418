"""Attention on a CPU, as `veloxlab.kernels.attend` is on a GPU: arrays in, arrays out, at once and not lazily."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import mlx.core as mx
import numpy as np

from veloxlab.kernels.call import Exact, Queries, Tokens
from veloxlab.kernels.cpu import attend as loops
from veloxlab.kernels.cpu.describe import (
    EXACT_NUMBERS,
    KINDS,
    NOTHING,
    Array,
    address_of,
    arrays_of,
    as_bits,
    described,
    described_exact,
    numpy_of,
    place_exact,
)
from veloxlab.kernels.cpu.threads import shared
from veloxlab.runtime import threads

_SHARED_NUMBERS: Final = 3 << 16  # of keys and values, from which on a second thread gains more than it costs
_FLOAT: Final = 4  # bytes


@dataclass(frozen=True)
class CpuAttendKernel:
    """Softmax attention over sinks, packed and recent tokens, in that order, for calls of one kind."""

    name: str
    kind: tuple[object, ...]

    def prepared(self, queries: Queries, tokens: Tokens) -> PreparedCall:
        """See `veloxlab.kernels.call.AttentionKernel`."""
        return PreparedCall(queries, tokens)


class PreparedCall:
    """Attention of queries of one form over sinks and packed tokens that stay, while recent tokens change and grow."""

    def __init__(self, queries: Queries, tokens: Tokens) -> None:
        keys, values = tokens.keys, tokens.values
        mx.eval([array for run in (keys, values, tokens.sinks) if run is not None for array in arrays_of(run)])
        batch, query_heads, length, key_dim = queries.q.shape
        heads, dim, group = keys.kv_heads, tokens.value_dim, query_heads // keys.kv_heads
        packed, packed_values = described(keys), described(values)
        sinks = described_exact(tokens.sinks) if tokens.sinks is not None else (NOTHING, NOTHING)
        self._kept = packed, packed_values, sinks
        self._recent = np.zeros((2, EXACT_NUMBERS), np.int64)
        recent_keys, recent_values = map(address_of, self._recent)
        self._form = batch, query_heads, length, dim
        self._coded_form = (batch, heads, group * length, values.dim) if values.signs is None else None
        rows = batch * query_heads * length
        self._sizes = rows * dim, rows * values.dim, 2 * rows * max(dim, values.dim), 2 * rows
        self._counts, self._blocks = (tokens.exact_counts[0], keys.tokens), batch * heads
        self._token_numbers = batch * heads * (keys.dim + values.dim)
        self._job = np.zeros(loops.NUMBERS, np.int64)
        self._job[: loops.SPLITS] = batch, heads, group, length, key_dim, dim, keys.dim, values.dim
        self._job[loops.K_SIGNS : loops.MASK] = *packed.rotation, *packed_values.rotation
        self._job[loops.KEYS : loops.VALUES] = sinks[0].address, packed.address, recent_keys
        self._job[loops.VALUES :] = sinks[1].address, packed_values.address, recent_values

    def __call__(self, queries: Queries, recent: Exact | None) -> tuple[mx.array, mx.array | None]:
        """See `veloxlab.kernels.call.PreparedCall`; the answer is float32."""
        q = queries.q.astype(mx.float32)
        exact = () if recent is None else (as_bits(recent.keys), as_bits(recent.values))
        others = queries.coded, queries.mask, queries.logits
        mx.eval(q, exact, [x for x in others if x is not None])
        if recent is not None:
            for numbers, x in zip(self._recent, exact, strict=True):
                place_exact(numbers, numpy_of(x), KINDS[recent.keys.dtype])
        count = 0 if recent is None else recent.keys.shape[2]
        tokens = sum(self._counts) + count
        parts = min(threads(), max(1, tokens * self._token_numbers // _SHARED_NUMBERS))
        out, coded, mixed, sums = self._sizes
        room, places = _room(out, coded, parts * mixed, parts * sums)
        seen, (coded_seen, mask, logits) = numpy_of(q), [None if x is None else numpy_of(x) for x in others]
        job, address, scale = self._job, address_of(self._job), np.float32(queries.scale)
        job[loops.SPLITS : loops.K_SIGNS] = parts, address_of(seen), _address(coded_seen)
        job[loops.MASK : loops.KEYS] = (
            *(_address(mask), _address(logits), *places),
            *(*seen.strides[:3], *((0, 0, 0, 0) if mask is None else mask.strides)),
            *(*self._counts, count),
        )
        pieces = parts * self._blocks
        if parts == 1:
            loops.attend(address, scale, 0, pieces)
        else:
            shared(lambda first, last: loops.attend(address, scale, first, last), pieces, parts)
        loops.combine(address)
        answer = mx.array(room[:out].reshape(self._form))
        if self._coded_form is None:
            return answer, None
        return answer, mx.array(room[out : out + coded].reshape(self._coded_form))


def attend_kernel(queries: Queries, tokens: Tokens) -> CpuAttendKernel:
    """The kernel of such a call: one for all calls with the same dimensions, types and layouts."""
    keys, values, q = tokens.keys, tokens.values, queries.q
    shape = q.shape[1], q.shape[2], tokens.key_dim, tokens.value_dim
    kind = (keys.key, values.key, *shape, q.dtype, tokens.exact_type, queries.mask is None, queries.logits is None)
    return _kernel(f"attend ({keys.name} keys, {values.name} values)", kind)


@lru_cache(maxsize=512)
def _kernel(name: str, kind: tuple[object, ...]) -> CpuAttendKernel:
    return CpuAttendKernel(name, kind)


class _Room(threading.local):
    """Memory of a thread, of float32, that its calls use again."""

    numbers: Array = np.empty(0, np.float32)
    address = 0


_ROOM: Final = _Room()


def _room(out: int, packed: int, mixed: int, sums: int) -> tuple[Array, tuple[int, int, int, int]]:
    """Room for so many numbers of each kind, the answer first; and the addresses of sums, weights' sums and answers."""
    size = out + packed + mixed + sums
    if _ROOM.numbers.size < size:
        _ROOM.numbers = np.empty(size, np.float32)
        _ROOM.address = address_of(_ROOM.numbers)
    first = _ROOM.address
    of_packed, of_mixed, of_sums = (first + _FLOAT * n for n in (out, out + packed, out + packed + mixed))
    return _ROOM.numbers, (of_mixed, of_sums, first, of_packed)


def _address(x: Array | None) -> int:
    return 0 if x is None else address_of(x)
