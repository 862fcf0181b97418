"""Tight bit packing: codes of any width from 1 to 8 bits, LSB first, in rows of uint32 words.

Code ``i`` of a row with width ``b`` has bits ``i·b … i·b + b − 1`` of the row's little-endian bit string, so codes of a
width that does not divide 32 can straddle words. Eight codes of any width fill whole bytes, and packing and unpacking
use that. Only the end of a row is padded, to a whole word.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.checks import whole
from veloxlab.kernels.vectors import words_per_row

WIDEST = 8
BITS = whole(1, WIDEST)
_GROUP = 8  # codes that fill `bits` whole bytes, whatever the width
_WORD_BYTES, _WORD_BITS = 4, 32


@dataclass(frozen=True)
class Row:
    """One array of a code, ``[B, H, S, count]``, as a codec declares it in its `Codec.layout`.

    Packed codes are unsigned, scales and norms floating; ``dtype`` is None for exact vectors. If ``joint``, the KV
    heads of a token share one row: ``[B, 1, S, count]``.
    """

    dtype: mx.Dtype | None
    count: int
    joint: bool = False

    @property
    def is_number(self) -> bool:
        """Whether it holds scales or norms."""
        return self.dtype is not None and mx.issubdtype(self.dtype, mx.floating)

    def nbytes(self, exact_bytes: int = 2) -> int:
        """Bytes of the row, where an exact number takes ``exact_bytes``."""
        return self.count * (exact_bytes if self.dtype is None else self.dtype.size)


Layout = dict[str, Row]


def packed(count: int, bits: int) -> Row:
    """The row that `pack` makes of ``count`` codes of ``bits`` bits, in whole words."""
    return Row(mx.uint32, words_per_row(count, bits))


def packed_bytes(count: int, bits: int) -> Row:
    """The row that `pack_bytes` makes of ``count`` codes of ``bits`` bits, in whole bytes."""
    return Row(mx.uint8, -(-count * bits // 8))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack ``codes`` ``[..., D]`` (integers below ``2**bits``) into uint32 words ``[..., words_per_row(D, bits)]``."""
    *lead, count = codes.shape
    groups = -(-count // _GROUP)
    codes = _resized(codes.astype(mx.uint64), groups * _GROUP).reshape(*lead, groups, _GROUP)
    shifts = mx.arange(0, _GROUP * bits, bits, dtype=mx.uint64)
    joined = (codes << shifts).sum(axis=-1)  # disjoint bits: the sum is their union
    byte = (joined[..., None] >> mx.arange(0, 8 * bits, 8, dtype=mx.uint64)).astype(mx.uint8)
    return _resized(byte.reshape(*lead, groups * bits), words_per_row(count, bits) * _WORD_BYTES).view(mx.uint32)


def pack_bytes(codes: mx.array, bits: int) -> mx.array:
    """The same in whole bytes, uint8, without the padding to a whole word."""
    return pack(codes, bits).view(mx.uint8)[..., : packed_bytes(codes.shape[-1], bits).count]


def unpack(words: mx.array, bits: int, count: int, together: int = 1) -> mx.array:
    """Codes ``[..., count]`` of packed words or bytes ``[..., n]``, as uint32.

    With ``together = g`` (1, 2, 4 or 8; ``count`` a multiple of 8) each returned number holds ``g`` neighbouring codes,
    the first in its low bits, in ``[..., count / g]``: an index into a table of ``g`` values at a time.
    """
    if together == 1:
        return unpack_to_bytes(words, bits, count).astype(mx.uint32)
    joined, step = _groups(words, bits, count), bits * together
    codes = joined[..., None] >> mx.arange(0, _GROUP * bits, step, dtype=joined.dtype)
    codes = (codes & mx.array((1 << step) - 1, joined.dtype)).astype(mx.uint32)
    return mx.flatten(codes, -2)[..., : -(-count // together)]


def unpack_to_bytes(words: mx.array, bits: int, count: int) -> mx.array:
    """Codes ``[..., count]`` of packed words or bytes ``[..., n]``, each in a byte, by fused shifts and masks."""
    if bits == WIDEST:
        return words.view(mx.uint8)[..., :count]
    if bits in _WHOLE:
        return _mover(_WHOLE[bits], bits)(words.view(mx.uint8)).view(mx.uint8)[..., :count]
    return _mover(mx.uint64, bits)(_groups(words, bits, count)).view(mx.uint8)[..., :count]


_WHOLE = {1: mx.uint64, 2: mx.uint32, 4: mx.uint16}  # widths whose codes fill a byte, and what a byte of them widens to


@cache
def _mover(wide: mx.Dtype, bits: int) -> Callable[[mx.array], mx.array]:
    """A function that moves code ``i`` of each number, at bit ``i·bits``, to byte ``i`` of one of type ``wide``."""

    @mx.compile
    def moved(codes: mx.array) -> mx.array:
        wider, mask = codes.astype(wide), (1 << bits) - 1
        shifts = ((8 * i, wider << mx.array((8 - bits) * i, wide)) for i in range(wide.size))
        return reduce(operator.or_, (shifted & mx.array(mask << byte, wide) for byte, shifted in shifts))

    return moved


class Places:
    """Numbers of ``widths`` bits each ``[n]``, 0 to 32, that begin at bits ``first`` ``[n]`` of a row of ``words``.

    They may overlap, in any order. LSB first; a number of no bits is 0.
    """

    def __init__(self, first: NDArray[np.int64], widths: NDArray[np.int64], words: int) -> None:
        self.words, word = words, np.minimum(first // _WORD_BITS, max(words - 1, 0))
        self._word = mx.array(word.astype(np.uint32))
        self._shift = mx.array((first % _WORD_BITS).astype(np.uint64))
        self._mask = mx.array(((1 << widths) - 1).astype(np.uint64))
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """The stored arrays."""
        return [self._word, self._shift, self._mask]

    def read(self, words: mx.array) -> mx.array:
        """Numbers ``[..., n]``, uint32, of rows ``[..., words]``, which are not empty."""
        following = mx.take(words, mx.minimum(self._word + 1, self.words - 1), axis=-1).astype(mx.uint64) << _WORD_BITS
        both = mx.take(words, self._word, axis=-1).astype(mx.uint64) | following
        return ((both >> self._shift) & self._mask).astype(mx.uint32)

    def write(self, numbers: mx.array) -> mx.array:
        """Rows ``[..., words]`` of numbers ``[..., n]`` that do not overlap."""
        empty = mx.zeros((*numbers.shape[:-1], self.words + 1), mx.uint32)
        if numbers.size == 0:
            return empty[..., :-1]
        placed = numbers.astype(mx.uint64) << self._shift  # in its word and, where it straddles, the next
        low, high = placed.astype(mx.uint32), (placed >> _WORD_BITS).astype(mx.uint32)
        # disjoint bits: a sum is their union
        return empty.at[..., self._word].add(low).at[..., self._word + 1].add(high)[..., :-1]


def _groups(words: mx.array, bits: int, count: int) -> mx.array:
    """Eight codes in each number: ``bits`` bytes at a time, ``[..., count / 8]``."""
    groups = -(-count // _GROUP)
    byte = mx.unflatten(_resized(words.view(mx.uint8), groups * bits), -1, (groups, bits))
    wide = mx.uint32 if bits <= _WORD_BYTES else mx.uint64
    return reduce(operator.or_, (byte[..., i].astype(wide) << (8 * i) for i in range(bits)))


def _resized(x: mx.array, size: int) -> mx.array:
    """``x`` ``[..., n]`` cut, or filled up with zeros, to ``size`` numbers."""
    missing = size - x.shape[-1]
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing > 0 else x[..., :size]
