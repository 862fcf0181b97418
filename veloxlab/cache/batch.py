"""Several sequences of different lengths in one layer: what mlx-lm's batch generator and server work with.

Each sequence keeps a `CompressedKVCache` of its own. So nothing is padded, a sequence gets the same tokens in a batch
as it does alone, and leaving or joining a batch moves no token. What attention is given is padded as mlx-lm pads: on
the left, so that the newest tokens of all sequences stand in one column.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from veloxlab.cache import saved
from veloxlab.cache.attention import History, causal_mask
from veloxlab.cache.counts import token_count
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import Handle, Mask, loadable


@dataclass(frozen=True)
class BatchRow:
    """What one sequence of a batch attends to, and where that stands in the batch's padded arrays.

    Attributes
    ----------
    history : its own, or None if none of the new tokens is its.
    first, last : its own new tokens are ``first:last`` of those that came; the others are padding.
    column : where its oldest token stands.
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
        parts: list[mx.array | None] = []
        for i, row in enumerate(self.rows):
            if row.history is None:
                parts.append(None)
                continue
            own = q[i : i + 1, :, row.first : row.last]
            done = row.history.attend(own, scale, _own_mask(mask, i, row, row.history.tokens), sinks)
            parts.append(mx.pad(done, [(0, 0), (0, 0), (row.first, q.shape[2] - row.last), (0, 0)]))
        like = next(part for part in parts if part is not None)
        return mx.concatenate([mx.zeros_like(like) if part is None else part for part in parts])


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
        spans, coming = [], []
        for i, cache in enumerate(self.rows):
            first, left = min(self._skip[i], count), self._left[i]
            last = count if left is None else max(first, min(count, left))
            own_keys, own_values = (x[i : i + 1, :, first:last] for x in (keys, values))
            spans.append((first, last, width - cache.visible + first))
            coming.append(cache.check(own_keys, own_values) if last > first else None)
        read = [cache.store(own) if own else None for cache, own in zip(self.rows, coming, strict=True)]
        self._skip = [skip - first for skip, (first, _, _) in zip(self._skip, spans, strict=True)]
        self._left = [None if left is None else max(0, left - count) for left in self._left]
        self._padding += min(first for first, _, _ in spans)
        fetched: tuple[Any, Any]
        if self.rows[0].path == "arrays":
            fetched = _stacked(read, [column for _, _, column in spans], width + count)
        else:
            history = BatchHistory(
                tuple(BatchRow(own[0] if own else None, *span) for own, span in zip(read, spans, strict=True))
            )
            fetched = history, history
        self._lent = fetched if self.rows[0].lends else None
        return fetched

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Boolean ``[B, 1, N, S]``: each row sees its own past, and of its new tokens itself and those before."""
        window_size = window_size or self.rows[0].max_size
        return causal_mask(N, self._width + N, window_size, self.left_padding)

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

        Raises
        ------
        InputError : padding on the left of a row that already holds tokens.
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
        content: saved.Content = {"rows": [], "skip": self._skip, "left": self._left, "padding": self._padding}
        arrays: list[mx.array] = []
        for row in self.rows:
            said, own = row.describe()
            content["rows"].append({"arrays": len(own), "content": said})
            arrays += own
        return content, arrays

    @classmethod
    def rebuild(cls, content: saved.Content, arrays: Sequence[mx.array]) -> Self:
        """See `veloxlab.cache.saved.Saved`."""
        rows, left = [], list(arrays)
        for said in content["rows"]:
            own, left = left[: said["arrays"]], left[said["arrays"] :]
            rows.append(CompressedKVCache.rebuild(said["content"], own))
        self = cls(rows)
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

        Raises
        ------
        InputError : as `CompressedKVCache.trim`, of any row. Then no row lost a token.
        """
        token_count("n", n)
        for row in self.rows:
            row.check_trimmable()
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
    sides = zip(*(pair or none for pair in pairs), strict=True)
    keys, values = (mx.concatenate([placed(x, c) for x, c in zip(side, columns, strict=True)]) for side in sides)
    return keys, values
