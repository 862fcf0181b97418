"""Levels that are looked up by a window of the bits of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room


@dataclass(frozen=True, eq=False)
class TrellisReader(Reader):
    """Scale · table entry + shift, for each coordinate; behind them, cosines and sines of the token's position.

    ``rows`` ``[B, 1, S, words]`` have all heads of a token: first 4 bits of each for its scale, 2^(code / 4). Of each
    coordinate ``windows`` ``[H, D, 4]``, uint32, say at which bit of the row its window begins, its mask, by how much
    it is shifted up, and where in ``table`` the levels of its width begin. ``shifts`` are added to scaled vectors
    ``[H, D]``, float32. With ``angles``, as `SumsReader` has them, ``dim`` is D and twice the number of pairs: cosines
    of all pairs, then sines. No GPU has this reader yet.
    """

    name: ClassVar[str] = "trellis"
    headers = ()
    tables: ClassVar[tuple[str, ...]] = ("windows", "table", "shifts", "angles")

    windows: mx.array
    table: mx.array
    shifts: mx.array | None
    angles: mx.array | None

    @property
    def kv_heads(self) -> int:
        return self.windows.shape[0]

    @property
    def constants(self) -> tuple[int, ...]:
        return self.windows.shape[1], self.table.size, int(self.shifts is not None)

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: never."""
        return False

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        raise NotImplementedError("no GPU reads trellises")
