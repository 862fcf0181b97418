"""Scalar codes of two stages, each in a row of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

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
from veloxlab.kernels.readers.table import shared_table


@dataclass(frozen=True, eq=False)
class StagesReader(Reader):
    """Codes of a coarse stage, ``rows``, and of a fine one, of ``bits`` bits each, which a table joins.

    Attributes
    ----------
    fine : the second stage's codes ``[B, H, S, words]``, uint32.
    bits : of an index of either stage.
    table : ``[4**bits, n]`` float32, with n 1 or 2: levels of n neighbouring coordinates, the coarse index in the high
        bits.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_table.h", "read_stages.h")
    stored: ClassVar[tuple[str, ...]] = ("rows", "fine", "root_scale")

    fine: mx.array
    bits: int
    table: mx.array

    @property
    def table_identity(self) -> object | None:
        """The table itself."""
        return self.table

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "stages", self.bits, self.table.shape[1], self.rows.shape[3]

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: two coordinates are read at once."""
        return self.dim % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return {
            f"{prefix}_rows": self.rows,
            f"{prefix}_fine": self.fine,
            **scale_arrays(prefix, self),
            f"{prefix}_table": self.table,
        }

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        table = shared_table(self.table, prefix, home, room)
        rows, fine = (with_stride(f"{prefix}_{name}") for name in ("rows", "fine"))
        kinds = f"{scales_type(self)}, {table.type_name}"
        type_name = f"StagesReader<{self.bits}, {self.table.shape[1]}, {self.rows.shape[3]}, {kinds}>"
        return Fragment(
            table.declaration, table.filled + made(prefix, type_name, rows, fine, scales(prefix, self), table.made)
        )

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        first = mx.arange(self.dim // self.table.shape[1], dtype=mx.uint32) * self.bits
        coarse, fine = (bits_at(rows, first, self.bits) for rows in (self.rows, self.fine))
        return mx.take(self.table, coarse << self.bits | fine, axis=0).reshape(*self.rows.shape[:3], self.dim)
