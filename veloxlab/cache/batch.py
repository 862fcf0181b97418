"""Several sequences of different lengths in one layer: what mlx-lm's batch generator and server work with.

Each sequence keeps a `CompressedKVCache` of its own. So nothing is padded, a sequence gets the same tokens in a batch
as it does alone, and leaving or joining a batch moves no token. What attention is given is padded as mlx-lm pads: on
the left, so that the newest tokens of all sequences stand in one column.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from veloxlab.cache import saved
from veloxlab.cache.attention import History
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import Handle, Mask, loadable


@dataclass(frozen=True)
class BatchRow:
    """What one sequence of a batch attends to, if any of the new tokens is its own, and where that stands.

    Its new tokens are ``first:last`` of those that came, and the others padding; its oldest token is at ``column``.
    """

    history: History | None
    first: int
    last: int
    column: int


@dataclass(frozen=True)
class BatchHistory(Handle):
    """The histories of a batch's sequences."""

    rows: tuple[BatchRow, ...]

    def attend(self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None) -> mx.array:
        """See `Handle.attend`; ``q`` ``[B, Hq, L, Dk]`` is padded, and what it gives for padding is 0."""
        parts: dict[int, mx.array] = {}
        for i, row in enumerate(self.rows):
            if row.history is not None:
                own = q[i : i + 1, :, row.first : row.last]
                done = row.history.attend(own, scale, _own_mask(mask, i, row, row.history.tokens), sinks)
                parts[i] = mx.pad(done, [(0, 0), (0, 0), (row.first, q.shape[2] - row.last), (0, 0)])
        padding = mx.zeros_like(next(iter(parts.values())))
        return mx.concatenate([parts.get(i, padding) for i in range(len(self.rows))])


def _own_mask(mask: Mask, index: int, row: BatchRow, tokens: int) -> Mask:
    """The part of a batch's mask that is about one row's own queries and tokens."""
    if mask is None or isinstance(mask, str):
        return mask
    whole = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    at = index if whole.shape[0] > 1 else 0
    return whole[at : at + 1, :, row.first : row.last, row.column : row.column + tokens]


@loadable
class BatchCompressedKVCache(saved.Saved):
    """One layer of a batch; a drop-in for mlx-lm's ``BatchKVCache`` and ``BatchRotatingKVCache``.

    ``rows`` are the caches of its sequences, each of one sequence and all of one path. `CompressedKVCache.merge` makes
    it of copies.
    """

    def __init__(self, rows: Iterable[CompressedKVCache]) -> None:
        self.rows = list(rows)
        for row in self.rows:
            if row.sequences > 1:
                raise InputError(
                    f"A cache of {row.sequences} sequences cannot join a batch: make one cache for each sequence."
                )
        self._skip = [0] * len(self.rows)  # places of padding that are still to come before the first token of a row
        self._padding = 0  # columns of the past that hold no token of any row
        self._left: list[int | None] = [None] * len(self.rows)  # tokens of a row to come before padding; None: all
        self._lent: tuple[Any, Any] | None = None  # what was fetched last
        if self.rows and self.rows[0].path == "codes":
            self.bits, self.group_size = 0, 0

    # what attention layers call -------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Give each row its own of the tokens ``[B, H, S, D]``; see `CompressedKVCache.update_and_fetch`.

        Where that raises for one row, nothing is stored in any.
        """
        count, width = keys.shape[2], self._width
        firsts = [min(skip, count) for skip in self._skip]
        lasts = [
            count if left is None else max(first, min(count, left))
            for first, left in zip(firsts, self._left, strict=True)
        ]
        columns = [width - row.visible + first for row, first in zip(self.rows, firsts, strict=True)]
        coming = [
            row.check(*(x[i : i + 1, :, first:last] for x in (keys, values))) if last > first else None
            for i, (row, first, last) in enumerate(zip(self.rows, firsts, lasts, strict=True))
        ]
        read = [row.store(own) if own else None for row, own in zip(self.rows, coming, strict=True)]
        self._skip = [skip - first for skip, first in zip(self._skip, firsts, strict=True)]
        self._left = [None if left is None else max(0, left - count) for left in self._left]
        self._padding += min(firsts)
        if self.rows[0].path == "arrays":
            fetched: tuple[Any, Any] = _stacked(read, columns, width + count)
        else:
            histories = [own and own[0] for own in read]
            history = BatchHistory(tuple(map(BatchRow, histories, firsts, lasts, columns)))
            fetched = history, history
        self._lent = fetched if self.rows[0].lends else None
        return fetched

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Boolean ``[B, 1, N, S]``: each row sees its own past, and of its new tokens itself and those before."""
        window_size = window_size or self.rows[0].max_size
        mask: mx.array = create_causal_mask(N, self._width, window_size, left_padding=self.left_padding)
        return mask

    def keys_and_values(self) -> tuple[Any, Any]:
        """What attention read last, for a layer that shares keys and values with this one; else all, as arrays."""
        if self._lent:
            return self._lent
        shown = [None if row.empty() else row.arrays() for row in self.rows]
        lengths = [pair[0].shape[2] if pair else 0 for pair in shown]
        width = max(lengths) + self._padding
        return _stacked(shown, [width - length for length in lengths], width)

    @property
    def offset(self) -> mx.array:
        """Position of the next token of each row ``[B]``; negative while padding comes first."""
        return mx.array([row.offset - skip for row, skip in zip(self.rows, self._skip, strict=True)])

    @property
    def left_padding(self) -> mx.array:
        """Places before the oldest token of each row ``[B]``."""
        return mx.array([self._width - row.visible + skip for row, skip in zip(self.rows, self._skip, strict=True)])

    # what mlx-lm's generator calls ----------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say where padding is among the tokens to come, up to `finalize`.

        Raises `InputError` for padding on the left of a row that already holds tokens.
        """
        if left_padding is not None:
            if any(pad and not row.empty() for pad, row in zip(left_padding, self.rows, strict=True)):
                raise InputError("Padding on the left can only come before the first token: use an empty cache.")
            self._skip = [skip + pad for skip, pad in zip(self._skip, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise InputError("right_padding was given without lengths: give both.")
            self._left = list(lengths)

    def finalize(self) -> None:
        """The padding announced by `prepare` is over."""
        self._left = [None] * len(self.rows)

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep only these rows, in this order."""
        indices = [int(i) for i in batch_indices]
        self.rows = [self.rows[i] for i in indices]
        self._skip = [self._skip[i] for i in indices]
        self._left = [self._left[i] for i in indices]
        self._padding, self._lent = 0, None

    def extend(self, other: BatchCompressedKVCache) -> None:
        """Take over the rows of ``other``, behind these."""
        width = max(self._width, other._width)
        self.rows += other.rows
        self._skip += other._skip
        self._left += other._left
        self._padding, self._lent = width - max((row.visible for row in self.rows), default=0), None

    def extract(self, idx: int) -> CompressedKVCache:
        """A copy of one row."""
        return copy.deepcopy(self.rows[idx])

    # what the rest of mlx-lm calls ----------------------------------------------------------------------------------

    def end_of_step(self) -> None:
        """See `veloxlab.cache.saved.Saved`."""
        self._lent = None
        for row in self.rows:
            row.end_of_step()

    def describe(self) -> tuple[saved.Content, list[mx.array]]:
        """See `veloxlab.cache.saved.Saved`."""
        described = [row.describe() for row in self.rows]
        rows = [{"arrays": len(own), "content": said} for said, own in described]
        content = {"rows": rows, "skip": self._skip, "left": self._left, "padding": self._padding}
        return content, [array for _, own in described for array in own]

    @classmethod
    def rebuild(cls, content: saved.Content, arrays: Iterator[mx.array]) -> Self:
        """See `veloxlab.cache.saved.Saved`."""
        self = cls([CompressedKVCache.rebuild(said["content"], arrays) for said in content["rows"]])
        self._skip, self._left, self._padding = content["skip"], content["left"], content["padding"]
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held for all rows."""
        return sum(row.nbytes for row in self.rows)

    def size(self) -> int:
        """Tokens of the longest row."""
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        """Whether no row holds a token."""
        return all(row.empty() for row in self.rows)

    def is_trimmable(self) -> bool:
        """Whether the newest tokens of all rows can be dropped."""
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Drop the newest ``n`` tokens of each row (at most all), and return how many the longest lost.

        Raises as `CompressedKVCache.trim`, of any row. Then no row lost a token.
        """
        for row in self.rows:
            row.check_trim(n)
        self._lent = None
        return max((row.trim(n) for row in self.rows), default=0)

    @property
    def _width(self) -> int:
        """Columns that the past of all rows takes."""
        width = max((row.visible for row in self.rows), default=0) + self._padding
        most = self.rows[0].max_size if self.rows else None
        return width if most is None else min(width, most - 1)


def _stacked(
    pairs: Sequence[tuple[mx.array, mx.array] | None], columns: Sequence[int], width: int
) -> tuple[mx.array, mx.array]:
    """Keys and values ``[1, H, S, D]`` of each row, or None, as ``[B, H, width, D]`` each: from their column on."""

    def placed(x: mx.array, column: int) -> mx.array:
        return mx.pad(x, [(0, 0), (0, 0), (column, width - column - x.shape[2]), (0, 0)])

    like = next(pair for pair in pairs if pair)
    none = tuple(x[:, :, :0] for x in like)
    both = zip(*(pair or none for pair in pairs), strict=True)
    keys, values = (mx.concatenate([placed(x, c) for x, c in zip(rows, columns, strict=True)]) for rows in both)
    return keys, values
