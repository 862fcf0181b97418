"""Scalar codes with a width for each KV head, or for each coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, made, with_stride
from veloxlab.kernels.vectors import words_per_row

_NARROW, _WIDEST = 4, 8  # bits: there are two kernels, one for layers whose codes are all narrow
_FIELDS = 4  # of a head's description
_LEVELS = 511  # of widths 0 to 8 together, 2**width each
_WIDTH, _LEVEL = 13, 17  # first bits of width and first level in a coordinate's word, whose low bits are its first bit
_PADDED = 32  # coordinates after which a word is left out, as source/read_plan.h does


def head_widths(bits: tuple[int, ...], dim: int, levels: Mapping[int, mx.array]) -> tuple[int, mx.array, mx.array]:
    """Describe heads of ``bits`` each, 1 to 8, whose vectors of ``dim`` coordinates are sorted by width.

    The results are the last three fields of a `WidthsReader`. ``levels`` of each width in use are ``[2**bits, 1]``, or
    ``[4**bits, 2]`` for two neighbouring codes of 4 bits or fewer.
    """
    widths, words = np.array(bits), np.array([words_per_row(dim, width) for width in bits])
    stored = np.argsort(widths, kind="stable")
    place = np.argsort(stored)
    first_word = (np.cumsum(words[stored]) - words[stored])[place]
    sizes = np.array([array.size for array in levels.values()])
    first_level = dict(zip(levels, np.cumsum(sizes) - sizes, strict=True))
    heads = mx.array(
        np.stack([widths, first_word, place, [first_level[width] for width in bits]], -1).astype(np.uint32)
    )
    table = mx.concatenate([array.flatten() for array in levels.values()])
    mx.eval(heads, table)
    return max(bits), heads, table


@dataclass(frozen=True, eq=False)
class WidthsReader(Reader):
    """Codes with a width for each KV head, LSB first and without gaps.

    ``rows`` ``[B, 1, S, words]`` has the words of all heads of a token, sorted by width, and ``scales``
    ``[B, H, S, 1]`` are in the same order. Widths differ by layer, so they are data, and one kernel is for all layers.
    """

    name: ClassVar[str] = "widths"
    headers = ("read_widths.h",)
    tables: ClassVar[tuple[str, ...]] = ("heads", "table")

    widest: int  # bits of a code, at most
    heads: mx.array  # of each [H, 4], uint32: bits, first word, place among those stored, first number of its levels
    table: mx.array  # the levels of all widths, one after the other, float32

    @property
    def kv_heads(self) -> int:
        return self.heads.shape[0]

    @property
    def constants(self) -> tuple[int, ...]:
        return (_NARROW if self.widest <= _NARROW else _WIDEST,)

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        entries = 1 << 2 * _NARROW  # pairs of the widest narrow codes; as many single levels of the widest of all
        pairs = entries * room.copies(entries, pairs=1)
        name, head = f"{prefix}_entries", f"{prefix}_head"
        scales_type, scales = self.scaled(prefix, f"{head}[2]")
        fill = (
            f"const global_memory uint* {head} = {prefix}_heads + {_FIELDS} * head;\n"
            f"fill_widths<{pairs}>({name}, {prefix}_table + {head}[3], {head}[0], thread_id, THREADS);\n"
        )
        first = f"{prefix}_rows + batch * {prefix}_rows_strides[0] + {head}[1]"
        members = first, f"uint({prefix}_rows_strides[2])", scales, f"{head}[0]", name, "lane"
        type_name = f"WidthsReader<{self.constants[0]}, {pairs}, {scales_type}>"
        return Fragment(f"threadgroup pair_t {name}[{pairs}];", fill + made(prefix, type_name, *members))


def planned(widths: tuple[int, ...], first_level: np.ndarray, levels: np.ndarray) -> mx.array:
    """A plan for `PlanReader`, in one array ``[dim + 511]`` uint32.

    Parameters
    ----------
    widths : bits of each coordinate, 0 to 8.
    first_level : the index in ``levels`` of each coordinate's first level ``[dim]``.
    levels : of all widths in use, 511 or fewer.
    """
    bits = np.array(widths, np.uint32)
    words = (np.cumsum(bits) - bits).astype(np.uint32) | bits << _WIDTH | first_level.astype(np.uint32) << _LEVEL
    padded = np.zeros(_LEVELS, np.float32)
    padded[: len(levels)] = levels
    array = mx.array(np.concatenate([words, padded.view(np.uint32)]))
    mx.eval(array)
    return array


@dataclass(frozen=True, eq=False)
class PlanReader(Reader):
    """Codes with a width of 0 to 8 bits for each coordinate, in one row of bits: level · factor + shift."""

    name: ClassVar[str] = "plan"
    headers = ("read_plan.h",)
    tables: ClassVar[tuple[str, ...]] = ("plan", "fit")

    plan: mx.array  # `planned` widths and levels, as data, so that one kernel is for all layers
    fit: mx.array  # factor and shift of each coordinate of each KV head [H, dim, 2], float32

    @property
    def constants(self) -> tuple[int, ...]:
        return (self.rows.shape[3],)

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        padded = self.dim + self.dim // _PADDED
        copies = room._replace(words=room.words - 3 * padded).copies(_LEVELS, pairs=0)
        sizes = {"planned": padded, "factors": padded, "shifts": padded, "levels": _LEVELS * copies}
        coordinates, factors, shifts, levels = (f"{prefix}_{name}" for name in sizes)
        declarations = [
            f"threadgroup {'uint' if name == 'planned' else 'float'} {prefix}_{name}[{size}];"
            for name, size in sizes.items()
        ]
        fill = (
            f"fill_plan<{self.dim}, {_LEVELS}, {copies}>({coordinates}, {levels}, {factors}, {shifts}, {prefix}_plan, "
            f"{prefix}_fit + head * {2 * self.dim}, thread_id, THREADS);\n"
        )
        scales_type, scales = self.scaled(prefix)
        members = with_stride(f"{prefix}_rows"), scales, coordinates, levels, factors, shifts, f"lane % {copies}"
        made_reader = made(prefix, f"PlanReader<{self.rows.shape[3]}, {copies}, {scales_type}>", *members)
        return Fragment("\n".join(declarations), fill + made_reader)
