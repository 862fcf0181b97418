"""Tight bit packing: codes of any width from 1 to 8 bits, LSB first, in rows of uint32 words.

Code ``i`` of a row with width ``b`` occupies bits ``i·b … i·b + b − 1`` of the row's little-endian bit string, so a
width that does not divide 32 straddles words: 3 bits cost 3 bits. Eight codes of any width fill whole bytes, which is
what both directions are built on. Only the end of a row is padded, to a whole word.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce

import mlx.core as mx

from veloxlab.errors import InputError

WIDEST = 8
_GROUP = 8  # codes that fill `bits` whole bytes, whatever the width
_WORD_BYTES = 4
_BYTE = 8


@dataclass(frozen=True)
class Row:
    """One array of a code, ``[B, H, S, count]``, as a codec declares it in its `Codec.layout`.

    Attributes
    ----------
    dtype : of its numbers: packed codes are unsigned, scales and norms floating. None for exact vectors as they came.
    count : numbers (packed: words) that it keeps of one vector; if ``joint``, of all KV heads' vectors.
    joint : whether the KV heads of a token share one row: ``[B, 1, S, count]``.
    """

    dtype: mx.Dtype | None
    count: int
    joint: bool = False

    def nbytes(self, exact_bytes: int = 2) -> int:
        """Bytes of the row, where an exact number takes ``exact_bytes``."""
        return self.count * (exact_bytes if self.dtype is None else self.dtype.size)


Layout = dict[str, Row]


def check_word(name: str, value: object, *known: str) -> None:
    """Raise `InputError` unless ``value``, of the option ``name``, is one of the words ``known``."""
    if value not in known:
        *first, last = map(repr, known)
        raise InputError(f"Unknown {name} {value!r}: choose {', '.join(first)} or {last}.")


def words_per_row(count: int, bits: int) -> int:
    """uint32 words that hold ``count`` codes of ``bits`` bits each."""
    return -(-count * bits // (8 * _WORD_BYTES))


def packed(count: int, bits: int) -> Row:
    """The row that `pack` makes of ``count`` codes of ``bits`` bits, in whole words."""
    return Row(mx.uint32, words_per_row(count, bits))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack ``codes`` ``[..., D]`` (integers below ``2**bits``) into uint32 words ``[..., words_per_row(D, bits)]``."""
    *lead, count = codes.shape
    groups = -(-count // _GROUP)
    codes = _pad_last(codes.astype(mx.uint64), groups * _GROUP - count).reshape(*lead, groups, _GROUP)
    shifts = mx.arange(0, _GROUP * bits, bits, dtype=mx.uint64)
    joined = (codes << shifts).sum(axis=-1)  # disjoint bits: the sum is their union
    byte = (joined[..., None] >> mx.arange(0, 8 * bits, 8, dtype=mx.uint64)).astype(mx.uint8)
    row = byte.reshape(*lead, groups * bits)
    padding = words_per_row(count, bits) * _WORD_BYTES - groups * bits
    row = _pad_last(row, padding) if padding > 0 else row[..., : words_per_row(count, bits) * _WORD_BYTES]
    return row.view(mx.uint32)


def unpack(words: mx.array, bits: int, count: int, together: int = 1) -> mx.array:
    """Codes ``[..., count]`` of packed ``words`` ``[..., words_per_row(count, bits)]``, as uint32.

    With ``together = g`` (1, 2, 4 or 8; ``count`` a multiple of 8) each returned number holds ``g`` neighbouring codes,
    the first in its low bits, in ``[..., count / g]``: an index into a table of ``g`` values at a time.
    """
    if together == 1:
        return spread(words, bits, count).astype(mx.uint32)
    joined = _joined(words, bits, count)
    step = bits * together
    wide = joined.dtype
    codes = (joined[..., None] >> mx.arange(0, _GROUP * bits, step, dtype=wide)) & mx.array((1 << step) - 1, wide)
    per_group = _GROUP // together
    return codes.astype(mx.uint32).reshape(*words.shape[:-1], joined.shape[-1] * per_group)[
        ..., : -(-count // together)
    ]


def spread(words: mx.array, bits: int, count: int) -> mx.array:
    """Codes ``[..., count]`` of packed ``words`` ``[..., words_per_row(count, bits)]``, each in a byte.

    Some bytes together become a wider number, shifts and masks move each code to a byte of its own, and the number is
    read as bytes again: one pass of fused arithmetic over few numbers, where a shift for each code would be many.
    """
    if bits == WIDEST:
        return words.view(mx.uint8)[..., :count]
    if bits in _WHOLE:
        return _spread(_WHOLE[bits], bits)(words.view(mx.uint8)).view(mx.uint8)[..., :count]
    groups = -(-count // _GROUP)
    return _spread(mx.uint64, bits)(_joined(words, bits, count)).view(mx.uint8)[..., : groups * _GROUP][..., :count]


_WHOLE = {1: mx.uint64, 2: mx.uint32, 4: mx.uint16}  # widths whose codes fill a byte, and what they spread into


@cache
def _spread(wide: mx.Dtype, bits: int) -> Callable[[mx.array], mx.array]:
    """A function that moves code ``i`` of each number, at bit ``i·bits``, to byte ``i`` of one of type ``wide``."""

    @mx.compile
    def moved(codes: mx.array) -> mx.array:
        codes = codes.astype(wide)
        parts = [
            (codes << mx.array((_BYTE - bits) * i, wide)) & mx.array(((1 << bits) - 1) << (_BYTE * i), wide)
            for i in range(wide.size)
        ]
        return reduce(operator.or_, parts)

    return moved


def _joined(words: mx.array, bits: int, count: int) -> mx.array:
    """Eight codes in each number: bytes of ``words``, ``bits`` at a time, ``[..., count / 8]``."""
    *lead, _ = words.shape
    groups = -(-count // _GROUP)
    byte = words.view(mx.uint8)
    missing = groups * bits - byte.shape[-1]
    byte = _pad_last(byte, missing) if missing > 0 else byte[..., : groups * bits]
    byte = byte.reshape(*lead, groups, bits)
    wide = mx.uint32 if bits <= _WORD_BYTES else mx.uint64
    joined = byte[..., 0].astype(wide)
    for i in range(1, bits):
        joined = joined | (byte[..., i].astype(wide) << (_BYTE * i))
    return joined


def _pad_last(x: mx.array, count: int) -> mx.array:
    return x if count == 0 else mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)])
