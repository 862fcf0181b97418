"""Codes of blocks of coordinates, each with its own step and least number, or radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, made

MOST_LEVELS = 8  # of angles: their widths are digits of 4 bits of one uint
MOST_ROWS = 2  # of bytes: Metal has no room for the arrays of more


@dataclass(frozen=True, eq=False)
class GroupsReader(Reader):
    """Codes of ``bits`` bits, LSB first and without gaps: least + (code + 0 or ½) · 2 · half step, of each group."""

    name: ClassVar[str] = "groups"
    headers = ("read_groups.h",)
    stored: ClassVar[tuple[str, ...]] = ("rows", "half_steps", "leasts")

    half_steps: mx.array  # of each group of a vector [B, H, S, groups], float16: the roots, with the number's sign
    leasts: mx.array  # the same
    bits: int
    group: int  # coordinates that share both; the last group may be smaller
    centred: bool  # whether levels are in the middle of their steps, or at the start

    @property
    def constants(self) -> tuple[int, ...]:
        return self.bits, self.group, self.rows.shape[3], int(self.centred)

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        type_name = f"GroupsReader<{', '.join(map(str, self.constants[:3]))}>"
        return Fragment("", made(prefix, type_name, *self.begins(prefix), "0.5f" if self.centred else "0.0f"))


@dataclass(frozen=True, eq=False)
class PolarReader(Reader):
    """Blocks of ``2**len(widths)`` coordinates, each with a radius and a binary tree of angles.

    Levels of one width share a row of bytes, level after level. ``rows`` has those that are as wide as level 1.
    """

    name: ClassVar[str] = "polar"
    headers = ("read_polar.h",)
    stored: ClassVar[tuple[str, ...]] = ("rows", "other", "radii")
    tables: ClassVar[tuple[str, ...]] = ("table",)
    one_copy: ClassVar[bool] = True

    other: mx.array | None  # codes of the other width [B, H, S, bytes], uint8, or None where there is none
    radii: mx.array  # of each block the root of radius / √(coordinates of a block) [B, H, S, blocks], float16
    widths: tuple[int, ...]  # bits of the angles of each level, that of pairs of coordinates first; two widths at most
    table: mx.array  # cosine and sine of the angles of all levels, one after the other [entries, 2], float32

    @property
    def constants(self) -> tuple[int, ...]:
        return self.widths

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        entries, name = self.table.shape[0], f"{home}_circles"
        declaration = fill = ""
        if 2 * entries > room.words:
            kind, circles = "GlobalCircles", f"{{{home}_table}}"
        else:
            copies = room._replace(pair_words=2).copies(entries, pairs=1)
            kind, circles = f"SharedCircles<{copies}>", f"{{{name}, lane % {copies}}}"
            if home == prefix:
                count, step = 2 * entries * copies, 2 * copies
                declaration = f"threadgroup float {name}[{count}];"
                fill = (
                    f"for (uint i = thread_id; i < {count}; i += THREADS) "
                    f"{name}[i] = {prefix}_table[i / {step} * 2 + i % 2];\n"
                )
        begins = self.begins(prefix)
        if self.other is None:  # never read
            begins.insert(1, begins[0])
        size = f"{math.sqrt(2 ** len(self.widths))!r}f"
        digits = sum(bits << (4 * level) for level, bits in enumerate(self.widths))
        type_name = f"PolarReader<{digits}u, {len(self.widths)}, {self.dim}, {kind}>"
        return Fragment(declaration, fill + made(prefix, type_name, *begins, size, circles))
