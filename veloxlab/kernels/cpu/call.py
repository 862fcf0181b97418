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
from veloxlab.kernels.cpu.describe import Array, address_of, arrays_of, described, described_exact, numpy_of
from veloxlab.kernels.cpu.threads import shared
from veloxlab.runtime import threads

_SHARED_NUMBERS: Final = 1 << 17  # of keys and values, from which on a second thread gains more than it costs
_FLOAT: Final = 4  # bytes


@dataclass(frozen=True)
class CpuAttendKernel:
    """Softmax attention over sinks, packed and recent tokens, in that order, for calls of one kind."""

    name: str
    kind: tuple[object, ...]

    def __call__(self, queries: Queries, tokens: Tokens) -> tuple[mx.array, mx.array | None]:
        """See `veloxlab.kernels.call.AttentionKernel`; the answer is float32."""
        keys, values = tokens.keys, tokens.values
        q = queries.q.astype(mx.float32)
        others = [x for x in (queries.coded, queries.mask, queries.logits) if x is not None]
        runs = [run for run in (keys, values, tokens.sinks, tokens.recent) if run is not None]
        mx.eval(q, others, [array for run in runs for array in arrays_of(run)])
        batch, query_heads, length, key_dim = q.shape
        counts = (tokens.exact_counts[0], keys.tokens, tokens.exact_counts[1])
        heads, value_dim, largest = keys.kv_heads, tokens.value_dim, max(tokens.value_dim, values.dim)
        rows = batch * query_heads * length
        parts = min(threads(), max(1, sum(counts) * batch * heads * (keys.dim + values.dim) // _SHARED_NUMBERS))
        room, places = _room(rows * value_dim, rows * values.dim, parts * rows * 2 * largest, parts * rows * 2)
        seen = [None if x is None else numpy_of(x) for x in (q, queries.coded, queries.mask, queries.logits)]
        q_seen, coded_seen, mask_seen, logits_seen = seen
        assert q_seen is not None
        packed, packed_values = described(keys), described(values)
        (sink_keys, sink_values), (recent_keys, recent_values) = map(_addresses, (tokens.sinks, tokens.recent))
        numbers = [
            *(batch, heads, query_heads // heads, length, key_dim, value_dim, keys.dim, values.dim, parts),
            *(address_of(q_seen), _address(coded_seen), *packed.rotation, *packed_values.rotation),
            *(_address(mask_seen), _address(logits_seen), *places),
            *q_seen.strides[:3],
            *((0, 0, 0, 0) if mask_seen is None else mask_seen.strides),
            *counts,
            *(sink_keys, packed.address, recent_keys, sink_values, packed_values.address, recent_values),
        ]
        job = np.array(numbers, np.int64)
        address, scale, pieces = address_of(job), np.float32(queries.scale), parts * batch * heads
        if parts == 1:
            loops.attend(address, scale, 0, pieces)
        else:
            shared(lambda first, last: loops.attend(address, scale, first, last), pieces, parts)
        loops.combine(address)
        out = mx.array(room[: rows * value_dim].reshape(batch, query_heads, length, value_dim))
        if values.signs is not None:
            return out, None
        coded = room[rows * value_dim : rows * (value_dim + values.dim)]
        return out, mx.array(coded.reshape(batch, heads, -1, values.dim))


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


def _addresses(run: Exact | None) -> tuple[int, int]:
    """Of the descriptions of exact keys, and of exact values; none are read of no tokens."""
    if run is None:
        return 0, 0
    keys, values = described_exact(run)
    return keys.address, values.address
