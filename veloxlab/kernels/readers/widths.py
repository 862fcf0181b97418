"""Scalar codes with a width for each KV head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import mlx.core as mx
import numpy as np

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, bits_at, made, scale_arrays, scales, scales_type

_NARROW, _WIDEST = 4, 8  # bits: there are two kernels, one for layers whose codes are all narrow
_FIELDS = 4  # of a head's description


@dataclass(frozen=True, eq=False)
class HeadWidths:
    """Where the codes of each KV head of a layer are, and what they stand for.

    Attributes
    ----------
    bits : of a code of each head, in order, 1 to 8.
    dim : coordinates of a vector, a code for each.
    levels : for each width in use, the levels ``[2**bits, 1]``, or of two neighbouring codes ``[4**bits, 2]`` where
        they have 4 bits or fewer.
    """

    bits: tuple[int, ...]
    dim: int
    levels: Mapping[int, mx.array]

    @cached_property
    def stored(self) -> tuple[int, ...]:
        """Heads in the order that they are stored in: by width."""
        return tuple(sorted(range(len(self.bits)), key=self.bits.__getitem__))

    @cached_property
    def words(self) -> tuple[int, ...]:
        """uint32 words of a vector of each head, in order."""
        return tuple(-(-self.dim * bits // 32) for bits in self.bits)

    @cached_property
    def first_word(self) -> tuple[int, ...]:
        """Where each head's words begin in a token's row, in order."""
        first, place = [0] * len(self.bits), 0
        for head in self.stored:
            first[head], place = place, place + self.words[head]
        return tuple(first)

    @cached_property
    def heads(self) -> mx.array:
        """Of each head ``[H, 4]``, uint32: bits, first word, place among those stored, first number of its levels."""
        first_level = dict(
            zip(self.levels, np.cumsum([0, *(a.size for a in self.levels.values())]).tolist(), strict=False)
        )
        heads = [
            [bits, self.first_word[head], self.stored.index(head), first_level[bits]]
            for head, bits in enumerate(self.bits)
        ]
        return _held(mx.array(heads, mx.uint32))

    @cached_property
    def tables(self) -> mx.array:
        """The levels of all widths, one after the other, float32."""
        return _held(mx.concatenate([levels.flatten() for levels in self.levels.values()]))


@dataclass(frozen=True, eq=False)
class WidthsReader(Reader):
    """Codes whose width the KV head says, LSB first and without gaps.

    ``rows`` ``[B, 1, S, words]`` has the words of all heads of a token, by width; ``root_scale`` ``[B, H, S, 1]`` is in
    the same order. The layers of a model differ in their heads' widths: those are data, and one kernel is for all.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_widths.h",)

    widths: HeadWidths

    @property
    def kv_heads(self) -> int:
        """H."""
        return len(self.widths.bits)

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "widths", self._most

    @property
    def _most(self) -> int:
        return _NARROW if max(self.widths.bits) <= _NARROW else _WIDEST

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: two codes are read at once."""
        return self.dim % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return {
            f"{prefix}_rows": self.rows,
            **scale_arrays(prefix, self),
            f"{prefix}_heads": self.widths.heads,
            f"{prefix}_table": self.widths.tables,
        }

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        entries = 1 << 2 * _NARROW  # pairs of the widest narrow codes; as many single levels of the widest of all
        pairs = entries * room.copies(entries, pairs=1)
        name, described = f"{prefix}_entries", f"{prefix}_heads + {_FIELDS} * head"
        fill = (
            f"const global_memory uint* {prefix}_head = {described};\n"
            f"fill_widths<{pairs}>({name}, {prefix}_table + {prefix}_head[3], {prefix}_head[0], thread_id, THREADS);\n"
        )
        members = (
            f"{prefix}_rows + batch * {prefix}_rows_strides[0] + {prefix}_head[1]",
            f"uint({prefix}_rows_strides[2])",
            scales(prefix, self, f"{prefix}_head[2]"),
            f"{prefix}_head[0]",
            name,
            "lane",
        )
        made_reader = made(prefix, f"WidthsReader<{self._most}, {pairs}, {scales_type(self)}>", *members)
        return Fragment(f"threadgroup pair_t {name}[{pairs}];", fill + made_reader)

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        widths, parts = self.widths, []
        for bits, first, words in zip(widths.bits, widths.first_word, widths.words, strict=True):
            levels = widths.levels[bits]
            together = levels.shape[1]
            index = bits * together
            row = self.rows[:, 0, :, first : first + words]
            codes = bits_at(row, mx.arange(self.dim // together, dtype=mx.uint32) * index, index)
            parts.append(mx.take(levels, codes, axis=0).reshape(*row.shape[:2], self.dim))
        return mx.stack(parts, axis=1)

    def expand(self) -> mx.array:
        """See `Reader.expand`."""
        levels = self.levels()
        if self.root_scale is None:
            return levels
        in_order = mx.array([self.widths.stored.index(head) for head in range(self.kv_heads)])
        return levels * mx.square(self.root_scale[:, in_order].astype(mx.float32))


def _held(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
