"""How the tokens of sequences are shared out among a kernel's threadgroups, and the numbers that tell it so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from veloxlab.kernels.backend import few_numbers
from veloxlab.kernels.text import SIMD

SIMDGROUPS = 4  # of a threadgroup
NUMBERS = 7  # that the kernels get of a sequence
_TILE = 16  # tokens of one turn of a simdgroup
_EXACT_SPLIT, _MOST_EXACT_SPLITS = 128, 64  # exact tokens of one split at least; splits of either run at most
_LEAST_SPLIT = 2 * SIMD * SIMDGROUPS  # packed tokens: a table is not filled for fewer


@dataclass(frozen=True, eq=False)
class Threadgroups:
    """How a kernel is launched."""

    kv_heads: int
    rows: int  # of a KV head's queries that a threadgroup takes
    row_tiles: int  # threadgroups for all of them
    groups: int  # of all splits of packed tokens, at most
    simdgroups: int

    @property
    def blocks(self) -> int:
        """Threadgroups that a split of a sequence takes."""
        return self.kv_heads * self.row_tiles


class Places(NamedTuple):
    """How many tokens a sequence has, and where: the entry and the first of packed, of exact and of a mask's tokens.

    Sinks are the first tokens of their entry. Recent tokens of all sequences end at the same one of their arrays, which
    a kernel is told at each call: all that is here stays until a block of tokens leaves the window.
    """

    sinks: int
    packed: int
    packed_entry: int
    first_packed: int
    exact_entry: int
    first_recent: int = 0
    column: int = 0

    @property
    def moving(self) -> tuple[int, int]:
        """The first of the numbers that kernels get: what another block of packed tokens changes."""
        return self.packed, self.first_recent

    @property
    def lasting(self) -> tuple[int, ...]:
        """The others."""
        return self.sinks, self.packed_entry, self.first_packed, self.exact_entry, self.column


class Splits(NamedTuple):
    """Tokens of a split, and the most splits of a sequence."""

    of_packed: int
    of_exact: int
    most: int


class Sizes(NamedTuple):
    """What kernels have to know of the tokens of each sequence."""

    numbers: mx.array  # of `Places` [B, 7], uint32
    splits: Splits


def most_splits(groups: int) -> int:
    """More splits than any history has: those of packed tokens are so many ``groups``, those of exact ones are few."""
    return groups + 1 + 2 * _MOST_EXACT_SPLITS


def sizes_of(sequences: Sequence[Places], columns: int, kernel: Threadgroups) -> Sizes:
    """What the kernels have to know of each sequence, in arrays of so many recent tokens."""
    if len(sequences) == 1:
        numbers = few_numbers([*sequences[0].moving, *sequences[0].lasting])[None]
        mx.async_eval(numbers)
    else:
        numbers = numbers_of(sequences)
    sinks = max(each.sinks for each in sequences)
    return Sizes(numbers, splits_of(sinks, [each.packed for each in sequences], columns, kernel))


def numbers_of(sequences: Sequence[Places]) -> mx.array:
    """`Sizes.numbers` of several sequences, which takes a GPU long: it moves what Python makes, and waits for that."""
    numbers = mx.array([(*each.moving, *each.lasting) for each in sequences], mx.uint32)
    return numbers + mx.array(0, mx.uint32)  # what a GPU computes is in its own memory


def splits_of(sinks: int, packed: Sequence[int], columns: int, kernel: Threadgroups) -> Splits:
    """How the tokens of sequences are shared out among threadgroups: sinks at most, packed of each, recent at most."""
    turn = _TILE * kernel.simdgroups  # of which all simdgroups of a threadgroup have the same number of tiles
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
def common_numbers(recent_end: int, splits: Splits, _: int) -> mx.array:
    """The numbers that are the same for all sequences, as the kernels get them; of one thread."""
    numbers = few_numbers([recent_end, splits.most, splits.of_packed, splits.of_exact])
    mx.async_eval(numbers)  # a wait would be for all that the device has to do
    return numbers
