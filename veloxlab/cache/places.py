"""The positions of a batch's sequences in their shared buffers: numbers, the same for all layers of a model."""

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

from veloxlab.cache.counts import BLOCK, SLACK_SHARE, Windows
from veloxlab.codecs.parts.rope import Start
from veloxlab.kernels.attend import AttendKernel
from veloxlab.kernels.backend import few_numbers
from veloxlab.kernels.splits import Places, Splits, numbers_of, splits_of


class Part(NamedTuple):
    """The position of one sequence, when some earlier token came: `advanced` gives the present one."""

    place: int  # entry of sinks and windows
    start: int  # column of the window's oldest token
    packed: int  # tokens
    base: int  # of the first packed token
    room: int  # for packed tokens
    ahead: int = 0  # oldest tokens of the window that have codes already, behind those of the packed tokens

    @property
    def coded(self) -> int:
        """Tokens that have codes."""
        return self.packed + self.ahead

    @property
    def uncoded(self) -> int:
        """The column of the oldest token that has no code."""
        return self.start + self.ahead


@dataclass(frozen=True, eq=False)
class Form:
    """The positions of all sequences. Layers with equal positions share one object: `form_of` keeps the last ones."""

    sinks: int  # of every sequence
    parts: tuple[Part, ...]

    @cached_property
    def oldest(self) -> int:
        """The first column of a window that has a token."""
        return min(part.start for part in self.parts)

    @cached_property
    def uncoded(self) -> int:
        """The first column with a token that has no code."""
        return min(part.uncoded for part in self.parts)

    @cached_property
    def end(self) -> int:
        """The end of all packed tokens and their room."""
        return max(part.base + part.room for part in self.parts)

    @cached_property
    def order(self) -> mx.array | None:
        """The sequence of each place, an arbitrary one for a free place; None if sequence i is in place i."""
        places = tuple(part.place for part in self.parts)
        return None if places == (*range(len(places)),) else _order(places, get_ident())

    @cached_property
    def before(self) -> tuple[int, ...]:
        """Tokens of each sequence before column 0, less than 0 if it begins after that. They do not change."""
        return tuple(self.sinks + part.packed - part.start for part in self.parts)

    @cached_property
    def beyond(self) -> tuple[int, ...]:
        """Tokens of each sequence beyond those of the shortest."""
        shortest = min(self.before)
        return tuple(tokens - shortest for tokens in self.before)

    def lengths(self, column: int) -> list[int]:
        """Tokens of each sequence, the newest of which is before ``column``."""
        return [tokens + column for tokens in self.before]

    def fitting(self, packed: Sequence[int], recent: Sequence[int], column: int, room: tuple[int, int]) -> Form | None:
        """The form with more sequences, of these numbers of tokens, if there are free places and room; else None.

        ``room`` is the number of places, and of packed tokens that fit into the buffers.
        """
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


def advanced(form: Form, windows: Windows, column: int) -> Form:
    """The form when the newest tokens are before ``column``: blocks that have left the windows are packed tokens."""
    parts = []
    for part in form.parts:
        gone = windows.aged(column - part.start, first=not part.packed)
        left = {"start": part.start + gone, "packed": part.packed + gone, "ahead": part.ahead - gone}
        parts.append(part._replace(**left) if gone else part)
    return form_of(form.sinks, tuple(parts))


def apart(sinks: int, tokens: Sequence[tuple[int, int, int]], column: int) -> Form:
    """The form of sequences one after the other, with equal room for later tokens.

    ``tokens`` are packed ones, those with codes ahead and all recent ones of each sequence.
    """
    parts, base, more = [], 0, slack(max(packed + ahead for packed, ahead, _ in tokens))
    for place, (packed, ahead, recent) in enumerate(tokens):
        parts.append(Part(place, column - recent, packed, base, packed + ahead + more, ahead))
        base += packed + ahead + more
    return form_of(sinks, tuple(parts))


def slack(packed: int) -> int:
    """Room for later tokens, if the longest sequence has this many packed ones."""
    return max(2 * BLOCK, packed // SLACK_SHARE)


def offsets(form: Form, column: int) -> mx.array:
    """Tokens of each sequence ``[B]``: one array for all layers, wherever their tokens lie."""
    return _offsets(form.beyond, min(form.before) + column, get_ident())


@lru_cache(maxsize=64)
def _offsets(beyond: tuple[int, ...], shortest: int, thread: int) -> mx.array:
    """One array for each thread, because MLX evaluates a thread's graph in that thread."""
    return _beyond(beyond, thread) + shortest


@lru_cache(maxsize=64)
def _beyond(tokens: tuple[int, ...], _: int) -> mx.array:
    """Tokens of each sequence beyond the shortest, cached because a GPU waits to copy an array from Python."""
    return mx.array(tokens) + 0


@lru_cache(maxsize=64)
def columns(form: Form, padding: int) -> tuple[int, ...]:
    """Columns of a mask before the oldest token of each sequence; the newest tokens are in one column."""
    longest = max(form.before)
    return tuple(longest + padding - tokens for tokens in form.before)


def mask_of_all(before: tuple[int, ...], width: int) -> mx.array:
    """The mask of one more token, which sees its whole sequence; one object for all layers in a step."""
    mask: mx.array | None = _masks.get((before, width))
    if mask is None:
        mask = create_causal_mask(1, width, left_padding=_beyond(before, get_ident()))
        _masks[before, width] = mask
    return mask


# weak: masks of past steps would be memory that no cache counts
_masks: WeakValueDictionary[tuple[tuple[int, ...], int], mx.array] = WeakValueDictionary()


def numbers(form: Form, windows: Windows, padding: int) -> mx.array:
    """The description of each sequence for a kernel: `kernels.splits.Sizes`. It remains valid when blocks leave."""
    window, block, less = windows.window, windows.block, windows.less
    both = zip(form.parts, columns(form, padding), strict=True)
    return numbers_of(
        [
            Places(p.packed, p.start, form.sinks, 0, p.base, p.place, own, window, block, 0 if p.packed else less)
            for p, own in both
        ]
    )


@lru_cache(maxsize=64)
def splits(form: Form, room: int, kernel: AttendKernel) -> Splits:
    """How a kernel shares out the tokens of all sequences among threadgroups."""
    return splits_of(form.sinks, [part.coded for part in form.parts], room, kernel)


@lru_cache(maxsize=16)
def sources(old: Form, new: Form) -> mx.array:
    """The index in ``old`` of each code in ``new``; ``old`` has the first sequences of ``new``."""
    index = np.zeros(new.end, np.uint32)
    for before, after in zip(old.parts, new.parts, strict=False):
        index[after.base : after.base + after.coded] = np.arange(before.base, before.base + after.coded)
    return mx.array(index)


@lru_cache(maxsize=16)
def indices_of(firsts: tuple[int, ...], count: int, _: int) -> mx.array:
    """The indices ``first .. first + count`` for each of ``firsts``, flat."""
    return (few_numbers(firsts)[:, None] + mx.arange(count, dtype=mx.uint32)).flatten()


def one_or_each(numbers: tuple[int, ...]) -> Start:
    """The number, if all are equal; else an array of them."""
    if numbers == numbers[:1] * len(numbers):
        return numbers[0]
    return indices_of(numbers, 1, get_ident()).astype(mx.int32)


def taken(array: mx.array, index: mx.array, axis: int) -> mx.array:
    """Entries of an array at ``index``; zeros if it is empty."""
    if array.size:
        return mx.take(array, index, axis=axis)
    return mx.zeros((*array.shape[:axis], index.size, *array.shape[axis + 1 :]), array.dtype)


def blocks(held: mx.array, entries: tuple[int, ...], firsts: tuple[int, ...], count: int) -> mx.array:
    """``count`` tokens of ``held`` ``[places, H, S, D]`` for each of ``entries``, from its first index on."""
    columns = indices_of(firsts, count, get_ident()).reshape(-1, count)
    return held[indices_of(entries, 1, get_ident())[:, None], :, columns].swapaxes(1, 2)


def put(held: mx.array, firsts: tuple[int, ...], new: mx.array) -> None:
    """Write tokens ``[rows, H, block, ...]`` to ``held`` ``[1, H, S, ...]``, each row from its first index on."""
    rows, heads, block, numbers = new.shape
    if rows == 1:
        held[:, :, firsts[0] : firsts[0] + block] = new
    else:
        by_head = new.swapaxes(0, 1).reshape(1, heads, rows * block, numbers)
        held[:, :, indices_of(firsts, block, get_ident())] = by_head
