"""The division of the tokens of sequences among a kernel's threadgroups, and the numbers that describe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import NamedTuple

import mlx.core as mx

from veloxlab.kernels.backend import few_numbers
from veloxlab.kernels.text import SIMD

SIMDGROUPS = 4  # of a threadgroup
_TILE = 16  # tokens of one step of a simdgroup
_EXACT_SPLIT, _MOST_EXACT_SPLITS = 128, 64  # least exact tokens of a split; most splits of either run
_LEAST_SPLIT = 2 * SIMD * SIMDGROUPS  # packed tokens: fewer are not worth filling a table
_NEXT = 256  # counts of tokens whose numbers are computed together
_COUNTERS = 64  # calls of kernels whose counters are made together


@dataclass(frozen=True, eq=False)
class Threadgroups:
    """The launch of a kernel."""

    kv_heads: int
    rows: int  # of a KV head's queries in a threadgroup
    row_tiles: int  # threadgroups for all of them
    groups: int  # of all splits of packed tokens, at most
    simdgroups: int

    @property
    def blocks(self) -> int:
        """The number of threadgroups for a split of a sequence."""
        return self.kv_heads * self.row_tiles


class Places(NamedTuple):
    """The tokens of a sequence, and their places: entry and first index of packed, exact and mask tokens.

    Sinks are the first tokens of their entry. The recent tokens of all sequences end at the same index, which is an
    argument of each call. If they are ``window + block`` or more, their oldest blocks are packed tokens, whose codes
    come after the others: so these numbers remain valid when a block leaves the window.
    """

    packed: int
    first_recent: int
    sinks: int
    packed_entry: int
    first_packed: int
    exact_entry: int
    column: int
    window: int = 1 << 31  # more than any recent tokens, so that none leave
    block: int = 1
    less: int = 0  # by how much the first block is smaller


NUMBERS = len(Places._fields)


class Splits(NamedTuple):
    """The tokens of a split, and the most splits of a sequence."""

    of_packed: int
    of_exact: int
    most: int


class Sizes(NamedTuple):
    """The description of the tokens of each sequence for kernels."""

    numbers: mx.array  # of `Places` [B, NUMBERS], uint32
    splits: Splits


def sizes_of(sequences: Sequence[Places], columns: int, kernel: Threadgroups) -> Sizes:
    """The description of sequences in arrays with ``columns`` recent tokens."""
    if len(sequences) == 1:
        packed, *others = sequences[0]
        place = packed % _NEXT
        numbers = _with_next(packed - place, tuple(others), get_ident())[place : place + 1]
    else:
        numbers = numbers_of(sequences)
    sinks = max(each.sinks for each in sequences)
    return Sizes(numbers, splits_of(sinks, [each.packed for each in sequences], columns, kernel))


@lru_cache(maxsize=64)
def _with_next(first: int, others: tuple[int, ...], _: int) -> mx.array:
    """Numbers of which the first is a count of tokens, for ``first`` and the next counts, for all layers; by thread.

    So a step or a layer that has more tokens takes a view, without a computation of its own.
    """
    counts = mx.arange(first, first + _NEXT, dtype=mx.uint32)[:, None]
    numbers = mx.concatenate([counts, mx.broadcast_to(few_numbers(others), (_NEXT, len(others)))], axis=1)
    mx.async_eval(numbers)
    return numbers


def numbers_of(sequences: Sequence[Places]) -> mx.array:
    """`Sizes.numbers` of several sequences. This is slow on a GPU, which waits to copy arrays from Python."""
    numbers = mx.array([*sequences], mx.uint32)
    return numbers + mx.array(0, mx.uint32)  # a computed array is in the GPU's own memory


def splits_of(sinks: int, packed: Sequence[int], columns: int, kernel: Threadgroups) -> Splits:
    """The division among threadgroups, for at most ``sinks`` and ``columns`` exact tokens, and ``packed`` of each."""
    turn = _TILE * kernel.simdgroups  # tokens in one step of all simdgroups of a threadgroup
    of_exact, of_packed = (
        -(-max(least, tokens) // turn) * turn
        for least, tokens in (
            (_EXACT_SPLIT, -(-max(sinks, columns) // _MOST_EXACT_SPLITS)),
            (_LEAST_SPLIT, -(-kernel.blocks * sum(packed) // kernel.groups)),
        )
    )
    most = -(-sinks // of_exact) - (-columns // of_exact) - (-max(packed) // of_packed)
    return Splits(of_packed, of_exact, max(1, most))


@lru_cache(maxsize=4096)
def common_numbers(recent_end: int, columns: int, splits: Splits, thread: int) -> mx.array:
    """The kernels' numbers that are the same for all sequences, with ``columns`` of a window; cached by thread."""
    place = recent_end % _NEXT
    others = splits.most, splits.of_packed, splits.of_exact, columns
    return _with_next(recent_end - place, others, thread)[place : place + 1]


def unused_counters(count: int, thread: int) -> mx.array:
    """As many counters of threadgroups that have come, all 0, which no other call of a kernel gets."""
    unused = _unused_counters(count, thread)
    if not unused:
        together = mx.zeros((_COUNTERS, count), mx.uint32)
        mx.async_eval(together)
        unused += mx.split(together, _COUNTERS)
    return unused.pop()


@lru_cache(maxsize=64)
def _unused_counters(_count: int, _thread: int) -> list[mx.array]:
    return []
