"""Where the sequences of a batch are in buffers that they share: numbers, the same for all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import get_ident
from typing import NamedTuple
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask

from veloxlab.cache.counts import BLOCK, SLACK_SHARE
from veloxlab.kernels.attend import AttendKernel
from veloxlab.kernels.backend import few_numbers
from veloxlab.kernels.splits import Places, Splits, numbers_of, splits_of


class Part(NamedTuple):
    """Where one sequence is."""

    place: int  # entry of sinks and windows
    start: int  # column of the window's oldest token
    packed: int  # tokens
    base: int  # of the first packed token
    room: int  # for packed tokens


@dataclass(frozen=True, eq=False)
class Form:
    """Where all sequences are. It is one object for the layers that have the same: `form_of` remembers the last."""

    sinks: int  # of every sequence
    parts: tuple[Part, ...]

    @cached_property
    def oldest(self) -> int:
        """The first column of a window that has a token."""
        return min(part.start for part in self.parts)

    @cached_property
    def end(self) -> int:
        """Behind all packed tokens and their room."""
        return max(part.base + part.room for part in self.parts)

    @cached_property
    def order(self) -> mx.array | None:
        """The sequence of each place, any for a free one; None where each is in its own."""
        places = tuple(part.place for part in self.parts)
        return None if places == (*range(len(places)),) else _order(places, get_ident())

    def lengths(self, column: int) -> list[int]:
        """Tokens of each sequence, the newest of which is before ``column``."""
        return [self.sinks + part.packed + column - part.start for part in self.parts]

    def fitting(self, packed: Sequence[int], recent: Sequence[int], column: int, room: tuple[int, int]) -> Form | None:
        """With more sequences, of so many tokens, in free places of so many, and of so much room for packed tokens."""
        used = {part.place for part in self.parts}
        free = [i for i in range(room[0]) if i not in used]
        if len(free) < len(packed) or max(recent) > column:
            return None
        parts = [*self.parts]
        for place, count, exact in zip(free, packed, recent, strict=False):
            base, needed = 0, count + slack(count)
            for other in sorted(parts, key=lambda part: part.base):
                if other.base - base >= needed:
                    break
                base = other.base + other.room
            if base + needed > room[1]:
                return None
            parts.append(Part(place, column - exact, count, base, needed))
        return form_of(self.sinks, tuple(parts))


form_of = lru_cache(maxsize=64)(Form)


@lru_cache(maxsize=16)
def _order(places: tuple[int, ...], _: int) -> mx.array:
    return mx.array([places.index(i) if i in places else 0 for i in range(max(places) + 1)])


def apart(sinks: int, packed: Sequence[int], recent: Sequence[int], column: int) -> Form:
    """Sequences one after the other, with the same room for the tokens to come."""
    parts, base, more = [], 0, slack(max(packed))
    for place, (count, exact) in enumerate(zip(packed, recent, strict=True)):
        parts.append(Part(place, column - exact, count, base, count + more))
        base += count + more
    return form_of(sinks, tuple(parts))


def slack(packed: int) -> int:
    """Room for tokens to come, where the longest sequence has so many packed ones."""
    return max(2 * BLOCK, packed // SLACK_SHARE)


def offsets(form: Form, column: int) -> mx.array:
    """Tokens of each sequence ``[B]``: one array for layers that have them in other places."""
    lengths = form.lengths(column)
    shortest = min(lengths)
    return _offsets(tuple(length - shortest for length in lengths), shortest, get_ident())


@lru_cache(maxsize=64)
def _offsets(beyond: tuple[int, ...], shortest: int, thread: int) -> mx.array:
    """The same for one thread: MLX computes what a thread has asked for when that thread asks for more."""
    return _beyond(beyond, thread) + shortest


@lru_cache(maxsize=64)
def _beyond(tokens: tuple[int, ...], _: int) -> mx.array:
    """Those that each has more than the shortest, which stay: a GPU moves what Python makes, and waits for that."""
    return mx.array(tokens) + 0


@lru_cache(maxsize=64)
def columns(form: Form, column: int, padding: int) -> tuple[int, ...]:
    """Columns of a mask before the oldest token of each sequence, of which the newest are in one column."""
    lengths = form.lengths(column)
    return tuple(max(lengths) + padding - length for length in lengths)


def mask_of_all(before: tuple[int, ...], width: int) -> mx.array:
    """The mask of one more token of each sequence, which sees all of its own; one object for layers of one step."""
    mask: mx.array | None = _masks.get((before, width))
    if mask is None:
        mask = create_causal_mask(1, width, left_padding=_beyond(before, get_ident()))
        _masks[before, width] = mask
    return mask


# while a step uses them: those of past steps would be bytes that no cache counts
_masks: WeakValueDictionary[tuple[tuple[int, ...], int], mx.array] = WeakValueDictionary()


def numbers(form: Form, padding: int, room: int) -> mx.array:
    """What a kernel has to know of each sequence, in windows of so many columns: `veloxlab.kernels.splits.Sizes`."""
    both = zip(form.parts, columns(form, room, padding), strict=True)
    return numbers_of(
        [Places(form.sinks, part.packed, 0, part.base, part.place, part.start, own) for part, own in both]
    )


@lru_cache(maxsize=64)
def splits(form: Form, room: int, kernel: AttendKernel) -> Splits:
    """How a kernel shares out the tokens of all sequences among threadgroups."""
    return splits_of(form.sinks, [part.packed for part in form.parts], room, kernel)


@lru_cache(maxsize=16)
def sources(old: Form, new: Form) -> mx.array:
    """Where each packed token of ``new`` is in ``old``, whose sequences are the first of ``new``; any for room."""
    index = np.zeros(new.end, np.uint32)
    for before, after in zip(old.parts, new.parts, strict=False):
        index[after.base : after.base + after.packed] = np.arange(before.base, before.base + after.packed)
    return mx.array(index)


@lru_cache(maxsize=16)
def stretches(firsts: tuple[int, ...], count: int) -> mx.array:
    """The places ``first .. first + count`` of all."""
    return (few_numbers(firsts)[:, None] + mx.arange(count, dtype=mx.uint32)).flatten()


def taken(array: mx.array, index: mx.array, axis: int) -> mx.array:
    """Some of an array; zeros of one that is empty."""
    if array.size:
        return mx.take(array, index, axis=axis)
    return mx.zeros((*array.shape[:axis], index.size, *array.shape[axis + 1 :]), array.dtype)


def put(held: mx.array, firsts: tuple[int, ...], new: mx.array) -> None:
    """Write tokens ``[rows, H, block, ...]`` to stretches of ``held`` ``[1, H, S, ...]``, where they begin."""
    rows, heads, block, numbers = new.shape
    if rows == 1:
        held[:, :, firsts[0] : firsts[0] + block] = new
    else:
        by_head = new.swapaxes(0, 1).reshape(1, heads, rows * block, numbers)
        held[:, :, stretches(firsts, block)] = by_head
