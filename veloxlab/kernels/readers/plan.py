"""Scalar codes with a width for each coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

_LEVELS = 511  # of widths 0 to 8 together: 2**width each
_FIRST, _WIDTH, _LEVEL = 0, 13, 17  # bit of a coordinate's word where each field begins
_PADDED = 32  # coordinates after which a word is left out, as source/read_plan.h does


@dataclass(frozen=True, eq=False)
class PlanReader(Reader):
    """Codes of 0 to 8 bits, each coordinate's own, in one row of bits: level · factor + shift.

    Attributes
    ----------
    plan : `planned` widths and levels. The layers of a model differ in it: it is data, and one kernel is for all.
    fit : of every coordinate of each KV head a factor and a shift ``[H, dim, 2]``, float32.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_plan.h",)

    plan: mx.array
    fit: mx.array

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "plan", self.rows.shape[3]

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: two coordinates are read at once."""
        return self.dim % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return {
            f"{prefix}_rows": self.rows,
            **scale_arrays(prefix, self),
            f"{prefix}_plan": self.plan,
            f"{prefix}_fit": self.fit,
        }

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        padded = self.dim + self.dim // _PADDED
        copies = room._replace(words=room.words - 3 * padded).copies(_LEVELS, pairs=0)
        of_coordinates = [(f"{prefix}_{name}", kind) for name, kind in (("planned", "uint"), ("factors", "float"))]
        of_coordinates.append((f"{prefix}_shifts", "float"))
        levels, (planned, factors, shifts) = f"{prefix}_levels", (name for name, _ in of_coordinates)
        declarations = [f"threadgroup {kind} {name}[{padded}];" for name, kind in of_coordinates]
        declarations.append(f"threadgroup float {levels}[{_LEVELS * copies}];")
        fill = (
            f"fill_plan<{self.dim}, {_LEVELS}, {copies}>({planned}, {levels}, {factors}, {shifts}, {prefix}_plan, "
            f"{prefix}_fit + head * {2 * self.dim}, thread_id, THREADS);\n"
        )
        members = (
            with_stride(f"{prefix}_rows"),
            scales(prefix, self),
            *(planned, levels, factors, shifts),
            f"lane % {copies}",
        )
        made_reader = made(prefix, f"PlanReader<{self.rows.shape[3]}, {copies}, {scales_type(self)}>", *members)
        return Fragment("\n".join(declarations), fill + made_reader)

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        words = self.plan[: self.dim]
        first, width = words >> _FIRST & ((1 << _WIDTH) - 1), words >> _WIDTH & ((1 << (_LEVEL - _WIDTH)) - 1)
        codes = bits_at(self.rows, first, width.astype(mx.uint64))
        levels = mx.take(self.plan[self.dim :].view(mx.float32), codes + (words >> _LEVEL))
        factor, shift = (self.fit[None, :, None, :, i] for i in (0, 1))
        return levels * factor + shift


def planned(widths: tuple[int, ...], first_level: np.ndarray, levels: np.ndarray) -> mx.array:
    """What `PlanReader` needs of a plan, in one array ``[dim + 511]`` uint32.

    Parameters
    ----------
    widths : bits of each coordinate, 0 to 8.
    first_level : where the levels of each coordinate begin in ``levels`` ``[dim]``.
    levels : of all widths in use, 511 or fewer.
    """
    bits = np.array(widths, np.uint32)
    words = (np.cumsum(bits) - bits).astype(np.uint32) << _FIRST | bits << _WIDTH
    words |= first_level.astype(np.uint32) << _LEVEL
    padded = np.zeros(_LEVELS, np.float32)
    padded[: len(levels)] = levels
    array = mx.array(np.concatenate([words, padded.view(np.uint32)]))
    mx.eval(array)
    return array
