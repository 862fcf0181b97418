"""Several sequences of different lengths in one layer, for mlx-lm's batch generator and server.

Each sequence has its own `CompressedKVCache`, so it generates the same tokens in a batch as alone, and no tokens move
when a sequence joins or leaves. While a GPU decodes, their tokens are in shared buffers (`veloxlab.cache.stack`). The
input of attention is padded on the left, as mlx-lm does it, so that the newest tokens are in one column.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from veloxlab.cache import places, saved
from veloxlab.cache.attention import History
from veloxlab.cache.histories import BatchHistory, BatchRow, StackHistory
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.stack import Stack, can_share
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import loadable

Pads = Sequence[int] | None  # of each row


@loadable
class BatchCompressedKVCache(saved.Saved):
    """One layer of a batch, for mlx-lm's ``BatchKVCache`` and ``BatchRotatingKVCache``; ``rows`` are of one path."""

    def __init__(self, rows: Iterable[CompressedKVCache]) -> None:
        self._rows = list(rows)
        self._stack: Stack | None = None  # the buffers of the rows, while they are decoded together
        for row in self._rows:
            count = next((buffer.shape[0] for buffer in row.buffers), 1)
            if count > 1:
                raise InputError(f"A cache of {count} sequences cannot join a batch: make one cache for each sequence.")
        self._skip = [0] * len(self._rows)  # columns of padding still to come before the first token of a row
        self._left: list[int | None] = [None] * len(self._rows)  # tokens to come before padding on the right
        self._padded = True  # whether some tokens to come may be padding
        self._padding = 0  # columns of the past that hold no token of any row
        self._lent: tuple[Any, Any] | None = None  # the last result of `update_and_fetch`
        if self._rows and self._rows[0].path == "codes":
            self.bits, self.group_size = 0, 0

    @property
    def rows(self) -> list[CompressedKVCache]:
        """The sequences. Their buffers may be views until the next token comes."""
        if self._stack is not None:
            self._stack.show()
        return self._rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """`CompressedKVCache.update_and_fetch` of each row with its own tokens; if one raises, no row stores any."""
        stack = self._stacked(keys, values)
        if stack is not None:
            stack.padding = self._padding
            stack.join(keys, values)
            together = StackHistory(stack)
            return together, together
        count, width = keys.shape[2], self._width
        firsts = [min(skip, count) for skip in self._skip]
        lasts = [count if left is None else min(count, left) for left in self._left]
        spans = [slice(first, max(first, last)) for first, last in zip(firsts, lasts, strict=True)]
        columns = [width - row.visible + own.start for row, own in zip(self.rows, spans, strict=True)]
        coming = [
            row.check(keys[i : i + 1, :, own], values[i : i + 1, :, own]) if own.stop > own.start else None
            for i, (row, own) in enumerate(zip(self.rows, spans, strict=True))
        ]
        read = [row.store(new) if new else None for row, new in zip(self.rows, coming, strict=True)]
        for row in self.rows:
            row.begin()
        self._skip = [skip - first for skip, first in zip(self._skip, firsts, strict=True)]
        self._left = [None if left is None else max(0, left - count) for left in self._left]
        self._padding += min(firsts)
        pairs = [None if seen is None else row.handed(seen, count) for row, seen in zip(self.rows, read, strict=True)]
        fetched = _together(pairs, spans, columns, width + count)
        self._lent = fetched if self.rows[0].lends else None
        return fetched

    def _stacked(self, keys: mx.array, values: mx.array) -> Stack | None:
        """The shared buffers of all rows, if one token of each row comes, and the device can read them."""
        if self._padded:
            self._padded = any(self._skip) or any(left is not None for left in self._left)
        if self._stack is None and keys.shape[2] == 1 and not self._padded and can_share(self._rows):
            self._stack = Stack(self._rows)
        if self._stack is not None and (self._padded or self._stack.refused or not self._stack.takes(keys, values)):
            self._unstack()
        return self._stack

    def _unstack(self) -> None:
        """Give each row its own buffers again."""
        if self._stack is not None:
            self._stack.release()
            self._stack = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Boolean mask ``[B, 1, N, S]``: a token sees the past of its own row, and the new tokens up to itself."""
        reach = window_size or self._rows[0].max_size
        if N == 1 and reach is None:
            return places.mask_of_all(self._before, self._width)
        mask: mx.array = create_causal_mask(N, self._width, reach, left_padding=self.left_padding)
        return mask

    def keys_and_values(self) -> tuple[Any, Any]:
        """The last input of attention, for a layer that shares keys and values with this one; else all, as arrays."""
        if self._lent:
            return self._lent
        shown = [None if row.empty() else row.arrays() for row in self.rows]
        lengths = [pair[0].shape[2] if pair else 0 for pair in shown]
        width = max(lengths) + self._padding
        columns = [width - length for length in lengths]
        return _together(shown, [slice(0)] * len(shown), columns, width)

    @property
    def offset(self) -> mx.array:
        """Position of the next token of each row ``[B]``; negative while padding comes first."""
        if self._stack is not None and not self._padded:
            return self._stack.offsets
        return mx.array([row.offset - skip for row, skip in zip(self.rows, self._skip, strict=True)])

    @property
    def left_padding(self) -> mx.array:
        """Columns before the oldest token of each row ``[B]``."""
        return mx.array(self._before)

    @property
    def _before(self) -> tuple[int, ...]:
        if self._stack is not None and not self._padded:
            self._stack.padding = self._padding
            return self._stack.columns
        width = self._width
        return tuple(width - row.visible + skip for row, skip in zip(self.rows, self._skip, strict=True))

    def prepare(self, *, left_padding: Pads = None, lengths: Pads = None, right_padding: Pads = None) -> None:
        """Announce padding among the tokens to come; raises `InputError` for left padding of a row that has tokens."""
        if left_padding is not None:
            if any(pad and not row.empty() for pad, row in zip(left_padding, self.rows, strict=True)):
                raise InputError("Padding on the left can only come before the first token: use an empty cache.")
            self._skip = [skip + pad for skip, pad in zip(self._skip, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise InputError("right_padding was given without lengths: give both.")
            self._left = list(lengths)
        self._padded = True

    def finalize(self) -> None:
        """End the padding that `prepare` announced."""
        self._left = [None] * len(self._rows)

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep only these rows, in this order."""
        indices = [int(i) for i in batch_indices]
        self._rows = [self._rows[i] for i in indices]
        if self._stack is not None and indices:
            self._stack.keep(indices)
        elif not indices:
            self._stack = None
        self._skip, self._left = [self._skip[i] for i in indices], [self._left[i] for i in indices]
        self._padding, self._lent = 0, None

    def extend(self, other: BatchCompressedKVCache) -> None:
        """Append the rows of ``other``."""
        width = max(self._width, other._width)
        other._unstack()
        if self._stack is not None and other._rows and not self._stack.add(other._rows):
            self._unstack()
        self._rows += other._rows
        self._skip += other._skip
        self._left += other._left
        self._padding, self._lent, self._padded = 0, None, True
        self._padding = width - self._width

    def extract(self, idx: int) -> CompressedKVCache:
        """A copy of one row."""
        return copy.deepcopy(self._rows[idx]) if self._stack is None else self._stack.taken(idx)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with its own tokens."""
        other = copy.copy(self)
        other._rows, other._stack, other._lent = [self.extract(i) for i in range(len(self._rows))], None, None
        other._skip, other._left = list(self._skip), list(self._left)
        return other

    def settle(self) -> None:
        """`CompressedKVCache.settle` of all rows."""
        if self._stack is not None:
            self._stack.settle()
        else:
            for row in self._rows:
                row.settle()

    def describe(self) -> tuple[saved.Content, list[mx.array]]:
        self._lent, described = None, [row.describe() for row in self.rows]
        rows = [{"arrays": len(own), "content": said} for said, own in described]
        content = {"rows": rows, "skip": self._skip, "left": self._left, "padding": self._padding}
        return content, [array for _, own in described for array in own]

    @classmethod
    def rebuild(cls, content: saved.Content, arrays: Iterator[mx.array]) -> Self:
        self = cls([CompressedKVCache.rebuild(said["content"], arrays) for said in content["rows"]])
        self._skip, self._left, self._padding = content["skip"], content["left"], content["padding"]
        return self

    @property
    def buffers(self) -> list[mx.array]:
        """The live buffers."""
        if self._stack is not None:
            return [buffer for held in self._stack.held for buffer in held.values()]
        return [buffer for row in self._rows for buffer in row.buffers]

    @property
    def nbytes(self) -> int:
        """Bytes held for all rows. Shared buffers may include room for more rows."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def size(self) -> int:
        """Tokens of the longest row."""
        if self._stack is not None:
            return max(self._stack.lengths)
        return max((row.size() for row in self._rows), default=0)

    def empty(self) -> bool:
        """Whether no row holds a token."""
        return self._stack is None and all(row.empty() for row in self._rows)

    def is_trimmable(self) -> bool:
        """Whether the newest tokens of all rows can be dropped."""
        return all(row.is_trimmable() for row in self._rows)

    def trim(self, n: int) -> int:
        """`CompressedKVCache.trim` of each row, or of none if one raises; returns the most tokens that a row lost."""
        for row in self._rows:
            row.check_trim(n)
        self._lent = None
        if self._stack is not None:
            if self._stack.trim(n):
                return n
            self._unstack()
        return max((row.trim(n) for row in self.rows), default=0)

    @property
    def _width(self) -> int:
        """Columns of the past of all rows."""
        stack, most = self._stack, self._rows[0].max_size if self._rows else None
        visible = [row.visible for row in self._rows] if stack is None else stack.lengths
        width = max(visible, default=0) + self._padding
        return width if most is None else min(width, most - 1)


def _together(
    pairs: Sequence[tuple[Any, Any] | None], spans: Sequence[slice], columns: Sequence[int], width: int
) -> tuple[Any, Any]:
    """Join the inputs of attention of all rows (None for a row without one): histories, arrays, or one of each."""

    def joined(some: Sequence[Any]) -> Any:  # noqa: ANN401
        if any(isinstance(one, History) for one in some):
            return BatchHistory(tuple(map(BatchRow, some, spans, columns)))
        return _stacked(some, columns, width)

    keys, values = zip(*(pair or (None, None) for pair in pairs), strict=True)
    of_keys = joined(keys)
    return of_keys, of_keys if all(map(operator.is_, keys, values)) else joined(values)


def _stacked(rows: Sequence[mx.array | None], columns: Sequence[int], width: int) -> mx.array:
    """Keys or values ``[1, H, S, D]`` of each row, or None, as ``[B, H, width, D]``, each beginning at its column."""
    none = next(x for x in rows if x is not None)[:, :, :0]
    padded = []
    for x, column in zip((none if x is None else x for x in rows), columns, strict=True):
        padded.append(mx.pad(x, [(0, 0), (0, 0), (column, width - column - x.shape[2]), (0, 0)]))
    return mx.concatenate(padded)
