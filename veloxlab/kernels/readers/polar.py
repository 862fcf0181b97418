"""Radii, and angles of a binary tree of coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, bits_at, made, with_stride

MOST_LEVELS = 8  # of angles: their widths are digits of 4 bits of one uint
MOST_ROWS = 2  # of bytes: Metal has no room for the arrays of more


@dataclass(frozen=True, eq=False)
class PolarReader(Reader):
    """Blocks of ``2**len(widths)`` coordinates, each with a radius and a binary tree of angles.

    The codes of levels of one width are in one row of bytes, level after level: those as wide as level 1 in ``rows``.

    Attributes
    ----------
    other : codes of the other width ``[B, H, S, bytes]``, uint8, or None where there is none.
    root_radius : of each block the root of radius / √(coordinates of a block) ``[B, H, S, blocks]``, float16.
    widths : bits of the angles of each level, that of pairs of coordinates first; of two different widths at most.
    circles : cosine and sine of the angles of all levels, one after the other ``[entries, 2]``, float32.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_polar.h",)
    stored: ClassVar[tuple[str, ...]] = ("rows", "other", "root_radius")

    other: mx.array | None
    root_radius: mx.array
    widths: tuple[int, ...]
    circles: mx.array

    @property
    def table_identity(self) -> object | None:
        """Cosines and sines."""
        return self.circles

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "polar", *self.widths

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: an angle is of two coordinates."""
        return self.dim % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        other = {} if self.other is None else {f"{prefix}_other": self.other}
        radii = {f"{prefix}_radii": self.root_radius, f"{prefix}_table": self.circles}
        return {f"{prefix}_rows": self.rows} | other | radii

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        entries, name = self.circles.shape[0], f"{home}_circles"
        declaration = fill = ""
        if 2 * entries > room.words:
            kind, circles = "GlobalCircles", f"{{{home}_table}}"
        else:
            copies = Room(room.words, pair_words=2).copies(entries, pairs=1)
            kind, circles = f"SharedCircles<{copies}>", f"{{{name}, lane % {copies}}}"
            if home == prefix:
                count, step = 2 * entries * copies, 2 * copies
                declaration = f"threadgroup float {name}[{count}];"
                fill = (
                    f"for (uint i = thread_id; i < {count}; i += THREADS) "
                    f"{name}[i] = {prefix}_table[i / {step} * 2 + i % 2];\n"
                )
        rows = with_stride(f"{prefix}_rows")
        other = rows if self.other is None else with_stride(f"{prefix}_other")
        size = f"{math.sqrt(2 ** len(self.widths))!r}f"
        digits = sum(bits << (4 * level) for level, bits in enumerate(self.widths))
        type_name = f"PolarReader<{digits}u, {len(self.widths)}, {self.dim}, {kind}>"
        return Fragment(
            declaration, fill + made(prefix, type_name, rows, other, with_stride(f"{prefix}_radii"), size, circles)
        )

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        first = dict.fromkeys(self.widths, 0)  # bit of each row where the next level begins
        codes = []
        entries = accumulate((1 << bits for bits in self.widths), initial=0)
        for (level, bits), entry in zip(enumerate(self.widths, 1), entries, strict=False):
            row = self.rows if bits == self.widths[0] else self.other
            assert row is not None
            count = self.dim >> level
            codes.append(entry + bits_at(row, first[bits] + mx.arange(count, dtype=mx.uint32) * bits, bits))
            first[bits] += count * bits
        y = mx.square(self.root_radius.astype(mx.float32)) * math.sqrt(2 ** len(self.widths))
        for of_level in reversed(codes):
            y = mx.flatten(y[..., None] * mx.take(self.circles, of_level, axis=0), -2)
        return y
