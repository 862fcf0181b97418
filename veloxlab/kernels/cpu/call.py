"""Attention on a CPU, as `veloxlab.kernels.attend` on a GPU, but eager."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Final

import mlx.core as mx
import numpy as np

from veloxlab.kernels.call import Answer, Exact, Queries, Tokens
from veloxlab.kernels.cpu import attend as loops
from veloxlab.kernels.cpu.describe import (
    KINDS,
    NOTHING,
    Array,
    address_of,
    arrays_of,
    as_bits,
    described,
    described_exact,
    exact_numbers,
    numpy_of,
    vectors_of,
)
from veloxlab.kernels.cpu.readers import OWN
from veloxlab.kernels.cpu.threads import shared
from veloxlab.runtime import threads

_SHARED_NUMBERS: Final = 3 << 16  # of keys and values, from which on a second thread is faster
_FLOAT: Final = 4  # bytes
_RECENT: Final = OWN + 1  # numbers of recent keys
_NUMBERS: Final = Struct(f"={loops.NUMBERS - loops.CHANGING + 2 * _RECENT}q")
_NO_RECENT: Final = [0] * 2 * _RECENT


@dataclass(frozen=True)
class CpuAttendKernel:
    """Softmax attention over sinks, packed and recent tokens, in that order, for calls of one kind."""

    name: str
    kind: tuple[object, ...]

    def prepared(self, queries: Queries, tokens: Tokens) -> PreparedCall:
        """See `veloxlab.kernels.call.AttentionKernel`."""
        return PreparedCall(queries, tokens)


class PreparedCall:
    """Attention of queries of one form over fixed sinks and packed tokens, while recent tokens change."""

    def __init__(self, queries: Queries, tokens: Tokens) -> None:
        keys, values = tokens.keys, tokens.values
        mx.eval([array for run in (keys, values, tokens.sinks) if run is not None for array in arrays_of(run)])
        batch, query_heads, length, key_dim = queries.q.shape
        heads, dim, group = keys.kv_heads, tokens.value_dim, query_heads // keys.kv_heads
        packed, packed_values = described(keys), described(values)
        sinks = described_exact(tokens.sinks) if tokens.sinks is not None else (NOTHING, NOTHING)
        self._kept = packed, packed_values, sinks
        rows = batch * query_heads * length
        # sizes of a result, of its part in the space of codes, of a split's sums of values and of weights
        self.sizes = rows * dim, rows * values.dim, 2 * rows * max(dim, values.dim), 2 * rows
        self.scale, self.cap = np.float32(queries.scale), np.float32(queries.cap or 0)
        self.form = (batch, query_heads, length, dim)
        self.coded_form = None if values.signs is not None else (heads, group * length, values.dim)
        self.pieces = batch * heads  # of a split
        counts = tokens.exact_counts[0], keys.tokens
        self.tokens, self.numbers = sum(counts), batch * heads * (keys.dim + values.dim)  # that are read, of each
        self._job = np.zeros(loops.NUMBERS + 2 * _RECENT, np.int64)
        self._address = address_of(self._job)
        recent = self._address + 8 * loops.NUMBERS, self._address + 8 * (loops.NUMBERS + _RECENT)
        self._job[: loops.CHANGING] = [
            *(batch, heads, group, length, key_dim, dim, keys.dim, values.dim),
            *(*packed.rotation, *packed_values.rotation, sinks[0].address, packed.address, recent[0]),
            *(sinks[1].address, packed_values.address, recent[1], *counts),
        ]

    def __call__(self, queries: Queries, recent: Exact | None, _: int | None = None) -> Answer:
        """See `veloxlab.kernels.call.PreparedCall`; the result is float32."""
        return together([self], queries, [recent])

    def place(self, *numbers: int) -> int:
        """Complete the job of the loops and return its address; the caller keeps the arrays alive."""
        _NUMBERS.pack_into(self._job.data, 8 * loops.CHANGING, *numbers)
        return self._address


def together(
    calls: Sequence[PreparedCall], queries: Queries, recents: Sequence[Exact | None], columns: Sequence[int] = (0,)
) -> Answer:
    """Attention of a batch whose entries have their own tokens, with one prepared call for each entry.

    ``columns`` are the first columns of each call's tokens in the mask. The calls differ only in their tokens.
    """
    q, coded, mask, logits = queries.q.astype(mx.float32), queries.coded, queries.mask, queries.logits
    exact = [() if run is None else (as_bits(run.keys), as_bits(run.values)) for run in recents]
    count, one = len(calls), calls[0]
    tokens = sum([call.tokens for call in calls]) + sum([0 if run is None else run.tokens for run in recents])
    parts = min(threads(), max(1, one.numbers * tokens // _SHARED_NUMBERS))
    outs, codes, mixed, sums = one.sizes
    room, begin = _room(count * (outs + codes + parts * (mixed + sums)))
    (own_q, at_q, of_q), (own_coded, at_coded, of_coded) = _placed(vectors_of(q)), _placed(coded)
    (own_mask, at_mask, of_mask), (own_logits, at_logits, _) = _placed(mask), _placed(logits)
    jobs, kept = [], [own_q, own_coded, own_mask, own_logits]
    for i, (call, recent, arrays) in enumerate(zip(calls, recents, exact, strict=True)):
        numbers = _NO_RECENT
        if recent is not None:
            keys, values = own = [vectors_of(x) for x in arrays]
            kept += own
            kind = KINDS[recent.keys.dtype]
            numbers = exact_numbers(keys, kind) + exact_numbers(values, kind)
        job = call.place(
            *(0 if recent is None else recent.tokens, parts, at_mask + i * of_mask[0] + columns[i] * of_mask[3]),
            *(at_logits, begin + _FLOAT * (count * (outs + codes) + i * parts * mixed)),
            *(begin + _FLOAT * (count * (outs + codes + parts * mixed) + i * parts * sums), begin + _FLOAT * i * outs),
            *(begin + _FLOAT * (count * outs + i * codes), at_coded + i * of_coded[0], at_q + i * of_q[0]),
            *(*of_q[:3], *of_mask, *numbers),
        )
        jobs.append(job)

    def attend(first: int, last: int) -> None:
        for job in jobs:
            loops.attend(job, one.scale, one.cap, first * one.pieces, last * one.pieces)

    shared(attend, parts, parts)
    for job in jobs:
        loops.combine(job)
    batch, *form = one.form
    answer = mx.array(room[: count * outs].reshape(count * batch, *form))
    if one.coded_form is None:
        return answer, None
    return answer, mx.array(room[count * outs : count * (outs + codes)].reshape(count * batch, *one.coded_form))


def _placed(x: mx.array | Array | None) -> tuple[Array | None, int, tuple[int, ...]]:
    """A NumPy array, its address, and its strides in bytes."""
    if x is None:
        return None, 0, (0, 0, 0, 0)
    seen = x if isinstance(x, np.ndarray) else numpy_of(x)
    return seen, address_of(seen), seen.strides


def attend_kernel(queries: Queries, tokens: Tokens) -> CpuAttendKernel:
    """The kernel of a call: one for all calls with the same dimensions, types and layouts."""
    keys, values, q = tokens.keys, tokens.values, queries.q
    shape = q.shape[1], q.shape[2], tokens.key_dim, tokens.value_dim
    kind = (keys.key, values.key, *shape, q.dtype, tokens.exact_type, *queries.kind)
    return _kernel(f"attend ({keys.name} keys, {values.name} values)", kind)


@lru_cache(maxsize=512)
def _kernel(name: str, kind: tuple[object, ...]) -> CpuAttendKernel:
    return CpuAttendKernel(name, kind)


class _Room(threading.local):
    """Float32 memory of a thread, which its calls reuse."""

    numbers: Array = np.empty(0, np.float32)
    address = 0


_ROOM: Final = _Room()


def _room(size: int) -> tuple[Array, int]:
    """Room for ``size`` numbers, and its address."""
    if _ROOM.numbers.size < size:
        _ROOM.numbers = np.empty(size, np.float32)
        _ROOM.address = address_of(_ROOM.numbers)
    return _ROOM.numbers, _ROOM.address
