"""The buffers that the sequences of a batch share: the positions of their tokens, and their description for kernels.

Sinks and windows are entries of arrays ``[places, H, S, D]``. The newest tokens of all windows are in one column, so
one slice adds a token to each sequence. Packed tokens are in arrays ``[1, H, S, ...]``, where each sequence has a range
of its own: a long one needs no padding behind a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from veloxlab.cache import places
from veloxlab.cache.counts import BLOCK, Windows
from veloxlab.cache.places import Part
from veloxlab.cache.run import Arrays, named
from veloxlab.codecs import TENSORS, Codec
from veloxlab.codecs.base import empty_code
from veloxlab.codecs.none import Exact
from veloxlab.kernels.attend import AttendKernel
from veloxlab.kernels.checked import ahead
from veloxlab.kernels.splits import Sizes


class Call(NamedTuple):
    """Attention for queries of one form, without a reference to the stack."""

    attend: Callable[[mx.array, mx.array | None, mx.array | None, Sizes, int], mx.array]
    kernel: AttendKernel


Calls = dict[tuple[object, ...], Call | None]


class Buffers:
    """Sinks, packed tokens and windows of several sequences, none at first."""

    def __init__(self, windows: Windows, codecs: tuple[Codec, Codec], heads: int, dtype: mx.Dtype) -> None:
        self.codecs, self._windows = codecs, windows
        self.padding = 0  # columns of the past that hold no token of any sequence
        self.exact = Exact(codecs[0].head_dim), Exact(codecs[1].head_dim)
        self.column, self.form = 0, places.form_of(windows.sinks, ())
        self.room = windows.most_recent + 1 + BLOCK  # columns of a window
        self.calls: Calls = {}  # prepared calls, valid until a buffer is replaced
        self._numbers: tuple[int, mx.array] | None = None  # the description for kernels, and the `padding` in it
        self._packed = named([empty_code(codec, 1, heads, dtype) for codec in codecs])
        dims = {f"{tensor}/values": codec.head_dim for tensor, codec in zip(TENSORS, codecs, strict=True)}
        self._sinks, self._recent = (
            {name: mx.zeros((0, heads, count, dim), dtype) for name, dim in dims.items()}
            for count in (windows.sinks, self.room)
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.form.lengths(self.column)

    @property
    def offsets(self) -> mx.array:
        """`lengths` as an array ``[B]``."""
        return places.offsets(self.form, self.column)

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of the mask before the oldest token of each row."""
        return places.columns(self.form, self.padding)

    def mask_of_all(self, past: int) -> mx.array:
        """The mask of one token after ``past`` columns, which sees all tokens of its row."""
        return places.mask_of_all(self.columns, past)

    def sizes(self, kernel: AttendKernel) -> Sizes:
        """The description of all sequences for a kernel."""
        if self._numbers is None or self._numbers[0] != self.padding:
            self._numbers = self.padding, places.numbers(self.form, self._windows, self.padding)
        return Sizes(self._numbers[1], places.splits(self.form, self.room, kernel))

    @property
    def held(self) -> tuple[Arrays, Arrays, Arrays]:
        """The buffers of sinks, packed tokens and windows, as `Runs.runs`."""
        return self._sinks, self._packed, self._recent

    def _spans(self, part: Part) -> tuple[tuple[slice, slice], ...]:
        """Entry and tokens of a row in each of `held`."""
        entry = slice(part.place, part.place + 1)
        packed = slice(0, 1), slice(part.base, part.base + part.packed)
        return (entry, slice(0, self.form.sinks)), packed, (entry, slice(part.start, self.column))

    def _advance(self) -> None:
        """Bring `form` to the present column: attention alone needs no more than the form of an earlier one."""
        self.form = places.advanced(self.form, self._windows, self.column)

    def _regrow(self, packed: Sequence[int] = (), recent: Sequence[int] = ()) -> None:
        """Move all rows into larger buffers, in their order, with room for more rows of these numbers of tokens."""
        old = self.form.parts
        tokens = [(part.packed, part.ahead, self.column - part.start) for part in old]
        tokens += [(count, 0, exact) for count, exact in zip(packed, recent, strict=True)]
        self._slide(max(exact for *_, exact in tokens))
        form = places.apart(self.form.sinks, tokens, self.column)
        entries = mx.array([*(part.place for part in old), *[0] * len(recent)])
        self._sinks = {name: places.taken(array, entries, 0) for name, array in self._sinks.items()}
        self._recent = {name: places.taken(array, entries, 0) for name, array in self._recent.items()}
        index = places.sources(self.form, form)
        self._packed = {name: places.taken(array, index, 2) for name, array in self._packed.items()}
        self.form, self.calls, self._numbers = form, {}, None
        ahead(*self._sinks.values(), *self._recent.values())

    def _slide(self, column: int) -> None:
        """Move the windows so that they end before this column."""
        by = column - self.column
        if by and self.form.parts:
            for held in self._recent.values():  # in place: prepared calls read these arrays
                held[:] = mx.roll(held, by, 2)
            parts = tuple(part._replace(start=part.start + by) for part in self.form.parts)
            self.form = places.form_of(self.form.sinks, parts)
            if self._numbers is not None:
                starts = self._numbers[1][:, 1:2]
                self._numbers[1][:, 1:2] = starts + mx.array(by).astype(mx.uint32)
            ahead(*self._recent.values(), *(() if self._numbers is None else self._numbers[1:]))
        self.column = column
