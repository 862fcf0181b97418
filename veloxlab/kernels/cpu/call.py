"""Attention on a CPU, as `veloxlab.kernels.attend` is on a GPU: arrays in, arrays out, at once and not lazily."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
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
        rows = batch * query_heads * length
        self.sizes = rows * dim, rows * values.dim, 2 * rows * max(dim, values.dim), 2 * rows  # a split's, the last two
        self.coded_form = None if values.signs is not None else (heads, group * length, values.dim)
        self.pieces = batch * heads  # of a split
        self._counts = tokens.exact_counts[0], keys.tokens
        self._token_numbers = batch * heads * (keys.dim + values.dim)
        self._job = np.zeros(loops.NUMBERS, np.int64)
        self._job[: loops.SPLITS] = batch, heads, group, length, key_dim, dim, keys.dim, values.dim
        self._job[loops.K_SIGNS : loops.MASK] = *packed.rotation, *packed_values.rotation
        self._job[loops.KEYS : loops.VALUES] = sinks[0].address, packed.address, recent_keys
        self._job[loops.VALUES :] = sinks[1].address, packed_values.address, recent_values

    def __call__(
        self, queries: Queries, recent: Exact | None, _: int | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """See `veloxlab.kernels.call.PreparedCall`; the answer is float32."""
        return together([self], queries, [recent])

    def place(self, recent: Sequence[Array], count: int, kind: int, splits: int, addresses: Sequence[int]) -> int:
        """Complete what the loops are told, and give its address; the caller keeps all arrays.

        ``count`` recent keys and values, if any, are of one of `KINDS`. ``addresses`` are of the queries as they are
        and coded, mask, logits, sums, weights' sums and both answers; with them come the strides of queries and mask.
        """
        for numbers, x in zip(self._recent, recent, strict=False):
            place_exact(numbers, x, kind)
        job = self._job
        job[loops.SPLITS : loops.K_SIGNS] = splits, *addresses[:2]
        job[loops.MASK : loops.KEYS] = *addresses[2:], *self._counts, count
        return address_of(job)

    def numbers(self, recent: Exact | None) -> int:
        """Keys' and values' numbers that are read."""
        return self._token_numbers * (sum(self._counts) + (0 if recent is None else recent.tokens))


def together(
    calls: Sequence[PreparedCall], queries: Queries, recents: Sequence[Exact | None], columns: Sequence[int] = (0,)
) -> tuple[mx.array, mx.array | None]:
    """Attention of a batch by one call, or of each of its entries by one, with tokens of its own.

    ``columns`` are where in the mask the tokens of each call begin. All calls are alike but for their tokens.
    """
    q, others = queries.q.astype(mx.float32), (queries.coded, queries.mask, queries.logits)
    exact = [[] if run is None else [as_bits(run.keys), as_bits(run.values)] for run in recents]
    mx.eval(q, exact, [x for x in others if x is not None])
    seen, (coded, mask, logits) = numpy_of(q), [None if x is None else numpy_of(x) for x in others]
    total = sum(call.numbers(recent) for call, recent in zip(calls, recents, strict=True))
    parts = min(threads(), max(1, total // _SHARED_NUMBERS))
    sizes = [len(calls) * size for size in calls[0].sizes]
    room, first = _room(sizes[0] + sizes[1] + parts * (sizes[2] + sizes[3]))
    starts = [*accumulate((sizes[0], sizes[1], parts * sizes[2]), initial=0)]
    each = [_FLOAT * size * times for size, times in zip(calls[0].sizes, (1, 1, parts, parts), strict=True)]
    strides = *seen.strides[:3], *((0, 0, 0, 0) if mask is None else mask.strides)
    jobs = []
    for i, (call, recent, own, column) in enumerate(zip(calls, recents, exact, columns, strict=True)):
        out, of_coded, mixed, sums = (first + _FLOAT * at + i * size for at, size in zip(starts, each, strict=True))
        masked = 0 if mask is None else address_of(mask) + i * mask.strides[0] + column * mask.strides[3]
        given = address_of(seen) + i * seen.strides[0], 0 if coded is None else address_of(coded) + i * coded.strides[0]
        addresses = *given, masked, 0 if logits is None else address_of(logits), mixed, sums, out, of_coded, *strides
        count, kind = (0, 0) if recent is None else (recent.tokens, KINDS[recent.keys.dtype])
        jobs.append(call.place([numpy_of(x) for x in own], count, kind, parts, addresses))
    scale, pieces = np.float32(queries.scale), calls[0].pieces

    def attend(first: int, last: int) -> None:
        for job in jobs:
            loops.attend(job, scale, first * pieces, last * pieces)

    shared(attend, parts, parts)
    for job in jobs:
        loops.combine(job)
    batch, heads, length, _ = queries.q.shape
    answer = mx.array(room[: sizes[0]].reshape(batch, heads, length, -1))
    if calls[0].coded_form is None:
        return answer, None
    return answer, mx.array(room[sizes[0] : sizes[0] + sizes[1]].reshape(batch, *calls[0].coded_form))


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


def _room(size: int) -> tuple[Array, int]:
    """Room for so many numbers, and its address."""
    if _ROOM.numbers.size < size:
        _ROOM.numbers = np.empty(size, np.float32)
        _ROOM.address = address_of(_ROOM.numbers)
    return _ROOM.numbers, _ROOM.address
