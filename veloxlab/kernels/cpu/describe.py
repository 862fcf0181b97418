"""Descriptions of a layer's tokens for the loops, made once for each set of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from veloxlab.kernels.call import Exact
from veloxlab.kernels.cpu import readers as loops
from veloxlab.kernels.cpu import trellis, turned
from veloxlab.kernels.cpu.rows import BFLOAT16, FLOAT16, FLOAT32
from veloxlab.kernels.readers import (
    GroupsReader,
    PlanReader,
    PolarReader,
    Reader,
    SumsReader,
    TableReader,
    TrellisReader,
    WidthsReader,
)

Numbers = list[int]
Array = np.ndarray[Any, Any]

KINDS: Final = {mx.float32: FLOAT32, mx.float16: FLOAT16, mx.bfloat16: BFLOAT16}
_BYTE: Final = 8  # bits of an index; the look-up of whole bytes is fastest
_TILE = 32  # most tokens that are expanded together
_LEVEL = 17  # first bit of a coordinate's first level in its word, in `PlanReader`


class Description(NamedTuple):
    """Numbers for a loop and their address, addresses of a rotation's signs and Hartley matrix or 0, and the arrays."""

    numbers: Array
    address: int
    rotation: tuple[int, int]
    kept: tuple[object, ...]


NOTHING: Final = Description(np.zeros(0, np.int64), 0, (0, 0), ())
"""The description of no tokens."""
_known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def arrays_of(tokens: Reader | Exact) -> list[mx.array]:
    """Arrays to evaluate before the tokens are described; empty after that."""
    if tokens in _known:
        return []
    if isinstance(tokens, Exact):
        return [as_bits(tokens.keys), as_bits(tokens.values)]
    return [a for a in vars(tokens).values() if isinstance(a, mx.array)]


def as_bits(x: mx.array) -> mx.array:
    """An array that NumPy can read: bfloat16 as its bits."""
    return x.view(mx.uint16) if x.dtype == mx.bfloat16 else x


def numpy_of(x: mx.array) -> Array:
    """The same memory as a NumPy array; ``x`` is evaluated."""
    return np.asarray(as_bits(x))


def address_of(x: Array) -> int:
    """The address of an array."""
    return int(x.__array_interface__["data"][0])


def described_exact(tokens: Exact) -> tuple[Description, Description]:
    """The descriptions of keys and of values."""
    if tokens not in _known:
        _known[tokens] = described_array(tokens.keys), described_array(tokens.values)
    both: tuple[Description, Description] = _known[tokens]
    return both


def described_array(x: mx.array) -> Description:
    """The description of exact vectors."""
    seen = vectors_of(x)
    return _made(exact_numbers(seen, KINDS[x.dtype]), seen)


def vectors_of(x: mx.array) -> Array:
    """The same memory ``[B, H, S, D]``; a copy if vectors are not contiguous, for example after a gather."""
    seen = numpy_of(x)
    return seen if seen.strides[3] == seen.itemsize else np.ascontiguousarray(seen)


def exact_numbers(x: Array, kind: int) -> Numbers:
    """The numbers of exact vectors ``[B, H, S, D]`` of one of `KINDS`, for a loop."""
    return [loops.exact(), x.shape[3], address_of(x), *x.strides[:3], 0, 0, 0, 0, 0, kind]


def described(reader: Reader) -> Description:
    """The description of a reader's packed tokens."""
    if reader not in _known:
        rows = numpy_of(reader.rows)
        own = _LAYOUTS[type(reader)](reader)
        scales = None if reader.scales is None or own.scaled else numpy_of(reader.scales)
        numbers = [own.function, reader.dim, *_placed(rows), *_placed(scales), own.places, *own.numbers]
        rotation = () if reader.signs is None else (numpy_of(reader.signs), hartley(reader.dim))
        _known[reader] = _made(numbers, rows, scales, *own.kept, rotation=rotation)
    known: Description = _known[reader]
    return known


def _made(numbers: Numbers, *kept: object, rotation: tuple[Array, ...] = ()) -> Description:
    array, addresses = np.array(numbers, np.int64), [address_of(each) for each in rotation] or [0, 0]
    return Description(array, address_of(array), (addresses[0], addresses[1]), (*kept, *rotation))


@lru_cache
def hartley(dim: int) -> Array:
    """The m-point Hartley matrix times 1/√dim ``[m, m]``, for dim = m·2^k with m odd."""
    odd = dim // (dim & -dim)
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    return np.asarray((np.cos(angle) + np.sin(angle)) / math.sqrt(dim), np.float32)


def _placed(x: Array | None) -> Numbers:
    """Address and strides of batch entry, head and token of ``[B, H, S, n]``; zeros for None."""
    return [0, 0, 0, 0] if x is None else [address_of(x), *x.strides[:3]]


class _Own(NamedTuple):
    """A layout's own part: function, address of the heads' places among the scales, numbers, arrays.

    If its function scales the vectors, attention does not.
    """

    function: int
    places: int
    numbers: Numbers
    kept: tuple[object, ...]
    scaled: bool = False


def _table(reader: TableReader) -> _Own:
    table = reader.table
    if reader.fine is not None:
        fine, entries = numpy_of(reader.fine), numpy_of(table)
        numbers = [reader.bits, entries.shape[1], address_of(entries), *_placed(fine)]
        return _Own(loops.stages(), 0, numbers, (entries, fine))
    wide = _wide_table(reader.bits, table, reader.dim)
    numbers = [wide.bits, wide.numbers.shape[1], address_of(wide.numbers)]
    if reader.shifts is None:
        return _Own(loops.table(), 0, [*numbers, 0], (wide,))
    shifts = np.ascontiguousarray(numpy_of(reader.shifts))
    scales = None if reader.scales is None else numpy_of(reader.scales)
    return _Own(loops.table(), 0, [*numbers, address_of(shifts), *_placed(scales)], (wide, shifts, scales), scaled=True)


class _Table(NamedTuple):
    """Entries ``[2**bits, n]`` float32, or of two stages ``[4**bits, n]``."""

    bits: int
    numbers: Array


@lru_cache(maxsize=256)
def _wide_table(bits: int, table: mx.array, dim: int) -> _Table:
    """The entries of all codes in a byte, if codes are narrow and the vector has whole bytes."""
    return _widened(bits, np.ascontiguousarray(numpy_of(table), np.float32), dim)


def _widened(bits: int, entries: Array, dim: int) -> _Table:
    while 2 * bits <= _BYTE and _BYTE % bits == 0 and dim % (2 * entries.shape[1]) == 0:
        count, width = entries.shape
        low, high = np.tile(entries, (count, 1)), np.repeat(entries, count, axis=0)
        bits, entries = 2 * bits, np.ascontiguousarray(np.concatenate([low, high], axis=1).reshape(-1, 2 * width))
    return _Table(bits, entries)


def _widths(reader: WidthsReader) -> _Own:
    own, places, tables = _head_tables(reader.heads, reader.table, reader.dim)
    return _Own(loops.widths(), address_of(places), [address_of(own)], (own, places, tables))


@lru_cache(maxsize=256)
def _head_tables(heads: mx.array, table: mx.array, dim: int) -> tuple[Array, Array, list[_Table]]:
    """For each head: the numbers for ``widths``, its place among the scales, and its table."""
    levels, tables, rows = np.asarray(table), [], []
    said = np.asarray(heads).astype(np.int64)
    for bits, first_word, _, first in said:
        paired = bits <= 4
        index, width = (2 * bits, 2) if paired else (bits, 1)
        entries = levels[first : first + (width << index)].reshape(-1, width)
        wide = _widened(int(index), np.ascontiguousarray(entries), dim)
        tables.append(wide)
        rows.append([wide.bits, wide.numbers.shape[1], 4 * first_word, address_of(wide.numbers)])
    return np.array(rows, np.int64), np.ascontiguousarray(said[:, 2]), tables


def _plan(reader: PlanReader) -> _Own:
    parts = _planned(reader.plan, reader.fit, reader.dim, 4 * reader.rows.shape[3])
    return _Own(loops.plan(), 0, [address_of(a) for a in parts], parts)


@lru_cache(maxsize=256)
def _planned(plan: mx.array, fit: mx.array, dim: int, row_bytes: int) -> tuple[Array, Array, Array]:
    """For each coordinate: the first of the four bytes of its code, shift, mask and first level; levels; fit."""
    words = np.asarray(plan)
    said, levels = words[:dim], words[dim:].view(np.float32).copy()
    begins, widths = said & 8191, said >> 13 & 15
    starts = np.minimum(begins >> 3, row_bytes - 4)
    own = np.stack([starts, begins - 8 * starts, (1 << widths) - 1, said >> _LEVEL]).astype(np.int32)
    return own, levels, np.ascontiguousarray(numpy_of(fit).swapaxes(1, 2))


def _groups(reader: GroupsReader) -> _Own:
    half_steps, leasts = numpy_of(reader.half_steps), numpy_of(reader.leasts)
    numbers = [reader.bits, reader.group, int(reader.centred), *_placed(half_steps), *_placed(leasts)]
    return _Own(loops.groups(), 0, numbers, (half_steps, leasts))


def _polar(reader: PolarReader) -> _Own:
    other, radii = None if reader.other is None else numpy_of(reader.other), numpy_of(reader.radii)
    levels, tables = _angle_levels(reader.widths, reader.table, reader.dim)
    numbers = [len(reader.widths), *_placed(other), *_placed(radii), address_of(levels)]
    return _Own(loops.polar(), 0, numbers, (other, radii, levels, tables))


@lru_cache(maxsize=256)
def _angle_levels(widths: tuple[int, ...], table: mx.array, dim: int) -> tuple[Array, list[Array]]:
    """For each level: its bits, whether they are in the other row, the first bit there, entry size, table."""
    circles, used = np.asarray(table), dict.fromkeys(widths, 0)
    firsts = [0, *accumulate(1 << bits for bits in widths)]
    rows, tables = [], []
    for level, bits in enumerate(widths, 1):
        first = firsts[level - 1]
        own = np.ascontiguousarray(circles[first : first + (1 << bits)])
        wide = _widened(bits, own, dim >> level - 1)
        of_bytes = wide.bits == _BYTE and used[bits] % _BYTE == 0
        tables.append(wide.numbers if of_bytes else own)
        width = tables[-1].shape[1] if of_bytes else 0
        rows.append([bits, int(bits != widths[0]), used[bits], width, address_of(tables[-1])])
        used[bits] += (dim >> level) * bits
    return np.array(rows, np.int64), tables


def _sums(reader: SumsReader) -> _Own:
    table = np.ascontiguousarray(numpy_of(reader.table))
    angles = None if reader.angles is None else np.ascontiguousarray(numpy_of(reader.angles))
    numbers = [table.shape[1], reader.rotated, int(reader.traditional), address_of(table)]
    return _Own(turned.sums(), 0, [*numbers, 0 if angles is None else address_of(angles)], (table, angles))


def _trellis(reader: TrellisReader) -> _Own:
    (places, coded), sizes = _windows(reader.windows, reader.table, 4 * reader.rows.shape[3]), _scale_sizes()
    table, shifts = numpy_of(reader.table), None if reader.shifts is None else numpy_of(reader.shifts)
    first, turned = (-1, ()) if reader.angles is None else _turned(reader.angles)
    numbers = [reader.windows.shape[1], coded, *map(address_of, (places, table, sizes))]
    positions = [0 if shifts is None else address_of(shifts), first, *(map(address_of, turned) if turned else (0, 0))]
    return _Own(trellis.trellis(), 0, [*numbers, *positions], (places, sizes, table, shifts, turned), scaled=True)


@lru_cache
def _scale_sizes() -> Array:
    """The values of the codes of scales."""
    return np.asarray(2.0 ** (np.arange(1 << trellis.SCALE_BITS) / trellis.STEPS), np.float32)


@lru_cache(maxsize=512)
def _windows(windows: mx.array, table: mx.array, row_bytes: int) -> tuple[Array, int]:
    """For each coordinate ``[H, 5, D]``: byte, shift, mask, shift up and first level; the end of those with bits."""
    begins, masks, lifts, levels = np.moveaxis(np.asarray(windows).astype(np.int64), -1, 0)
    starts = np.minimum(begins >> 3, row_bytes - 4)
    own = np.stack([starts, begins - 8 * starts, masks, lifts, levels], axis=1).astype(np.int32)
    return np.ascontiguousarray(own), int(np.flatnonzero((masks > 0).any(axis=0)).max(initial=-1)) + 1


@lru_cache(maxsize=512)
def _turned(angles: mx.array) -> tuple[int, tuple[Array, Array]]:
    """Position of the first token, angles of pairs, and cosines and sines of a tile's tokens ``[TILE, 2 · P]``."""
    both = np.asarray(angles)
    turn = np.arange(_TILE)[:, None] * both[1:].astype(np.float64)
    fine = np.concatenate([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    return int(both[0]), (np.ascontiguousarray(both[1:]), fine)


_LAYOUTS: Final[dict[type, Callable[[Any], _Own]]] = {
    TableReader: _table,
    WidthsReader: _widths,
    PlanReader: _plan,
    GroupsReader: _groups,
    PolarReader: _polar,
    SumsReader: _sums,
    TrellisReader: _trellis,
}
