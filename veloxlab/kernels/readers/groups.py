"""Scalar codes in equal steps, with a step and a least number for each group of coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, bits_at, made, with_stride


@dataclass(frozen=True, eq=False)
class GroupsReader(Reader):
    """Codes of ``bits`` bits, LSB first and without gaps: least + (code + 0 or ½) · 2 · half step, of each group.

    Attributes
    ----------
    half_step, least : of each group of a vector ``[B, H, S, groups]``, float16: the roots, with the number's sign.
    bits : of a code.
    group : coordinates that share both; the last ones of a vector may be fewer.
    centred : whether levels are in the middle of their steps, and not where those begin.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_groups.h",)
    stored: ClassVar[tuple[str, ...]] = ("rows", "half_step", "least")

    half_step: mx.array
    least: mx.array
    bits: int
    group: int
    centred: bool

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "groups", self.bits, self.group, int(self.centred), self.rows.shape[3]

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: two coordinates are read at once."""
        return self.dim % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return {f"{prefix}_rows": self.rows, f"{prefix}_half_steps": self.half_step, f"{prefix}_leasts": self.least}

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        members = (*(with_stride(f"{prefix}_{name}") for name in ("rows", "half_steps", "leasts")), f"{self._shift}f")
        type_name = f"GroupsReader<{self.bits}, {self.group}, {self.rows.shape[3]}>"
        return Fragment("", made(prefix, type_name, *members))

    @property
    def _shift(self) -> float:
        return 0.5 if self.centred else 0.0

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        codes = bits_at(self.rows, mx.arange(self.dim, dtype=mx.uint32) * self.bits, self.bits)
        group = mx.arange(self.dim) // self.group
        half_step, least = (_signed_square(mx.take(roots, group, axis=-1)) for roots in (self.half_step, self.least))
        return least + (codes.astype(mx.float32) + self._shift) * (2 * half_step)


def _signed_square(root: mx.array) -> mx.array:
    root = root.astype(mx.float32)
    return root * mx.abs(root)
