"""Sums of table entries, as complex numbers, turned to the position of the token.

A table of the query's products with all entries, made once for a query, is no way around the sums here: it would have
to be turned to every token's position, 64 entries of every stage, where the sum of a token's own is turned once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from veloxlab.kernels.readers.reader import (
    Fragment,
    Reader,
    Room,
    bits_at,
    made,
    scale_arrays,
    scales,
    scales_type,
    with_stride,
)

_BITS, _ENTRIES = 6, 64  # of an index, and what it chooses from


class PairOrder(NamedTuple):
    """Which coordinates of a table are pairs: of the first ``rotated`` neighbours or halves, of the others halves."""

    rotated: int
    traditional: bool

    def pairs(self, dim: int) -> np.ndarray:
        """Both coordinates of each pair ``[dim/2, 2]``."""
        rotated, rest = np.arange(self.rotated), np.arange(self.rotated, dim)
        own = rotated.reshape(-1, 2) if self.traditional else rotated.reshape(2, -1).T
        return np.concatenate([own, rest.reshape(2, -1).T])


@dataclass(frozen=True, eq=False)
class SumsReader(Reader):
    """Two indices of 6 bits a stage, in rows of bytes: Σ entry a + i · entry b, whose pairs of neighbours are complex.

    Attributes
    ----------
    tables : entries of every stage ``[H, stages, 64, dim]``, float16, whose pairs are in ``order``.
    angles : of the first token the position, and of each pair the angle for one position ``[1 + dim/2]``, float32;
        None where nothing is turned.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_sums.h",)

    tables: mx.array
    order: PairOrder
    angles: mx.array | None

    @property
    def _stages(self) -> int:
        return self.tables.shape[1]

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "sums", self._stages, self.order.rotated, int(self.order.traditional), int(self.angles is not None)

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: no pair may be cut."""
        return self.dim % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        angles = {} if self.angles is None else {f"{prefix}_angles": self.angles}
        return {f"{prefix}_rows": self.rows, **scale_arrays(prefix, self), f"{prefix}_table": self.tables} | angles

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`: tables of some hundred kilobytes stay where they are."""
        rotated, traditional = self.order.rotated, int(self.order.traditional)
        turned = int(self.angles is not None)
        return Fragment(
            "",
            made(
                prefix,
                f"SumsReader<{self._stages}, {self.dim}, {rotated}, {traditional}, {turned}, {scales_type(self)}>",
                with_stride(f"{prefix}_rows"),
                scales(prefix, self),
                f"{prefix}_table + head * {self._stages * _ENTRIES * self.dim}",
                f"{prefix}_angles" if turned else "0",
            ),
        )

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        count, heads = 2 * self._stages, self.kv_heads
        indices = bits_at(self.rows, mx.arange(count, dtype=mx.uint32) * _BITS, _BITS)
        pairs = self.order.pairs(self.dim)
        x, y = (self.tables.astype(mx.float32)[..., mx.array(pairs[:, i])] for i in (0, 1))
        both = mx.stack([mx.stack([x, y], axis=-1), mx.stack([-y, x], axis=-1)], axis=2)  # entry, i · entry
        flat = both.reshape(heads * count * _ENTRIES, self.dim)
        first = _ENTRIES * mx.arange(heads * count, dtype=mx.uint32).reshape(heads, 1, count)
        total = mx.take(flat, indices + first, axis=0).sum(axis=-2)
        if self.angles is None:
            return total
        turn = (self.angles[0] + mx.arange(self.tokens))[:, None] * self.angles[1:]
        cosine, sine = mx.cos(turn), mx.sin(turn)
        x, y = total[..., 0::2], total[..., 1::2]
        return mx.flatten(mx.stack([x * cosine - y * sine, x * sine + y * cosine], axis=-1), -2)
