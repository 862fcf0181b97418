"""The recursive polar transform and the quantizer of its angles (PolarQuant, arXiv 2502.02617).

Coordinates are paired into radius and angle, the radii are paired again, L times: ``2**L`` coordinates become one
radius and ``2**L − 1`` angles. Of a randomly rotated vector all angles are independent. Those of level 1 are uniform on
the circle, those of level ℓ have the density sin^(2^(ℓ−1) − 1)(2ψ) on [0, π/2].
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from veloxlab.codecs.parts import Floats, constant
from veloxlab.codecs.parts.codebooks import lloyd_max
from veloxlab.codecs.parts.packing import BITS, Layout, pack_bytes, packed_bytes, unpack
from veloxlab.errors import InputError

_ROUNDS = 100  # of k-means in one dimension


class PolarTree:
    """Quantizes the directions of blocks of ``2**len(levels)`` coordinates; ``dim`` is a multiple of that.

    For ``levels`` and ``centroids`` see `PolarQuant`; by default centroids are those of the known densities. A
    ``block`` of coordinates shares a radius. ``layout`` has rows of bytes, level 1 first; levels of equal width are
    packed together. Kernels take the tables of all levels one after the other, float32: ``circles``, cosine and sine of
    the angles ``[entries, 2]``, and ``edges`` between angles, without level 1. ``nbytes`` are the bytes of the tables.
    """

    def __init__(self, dim: int, levels: tuple[int, ...], centroids: tuple[float, ...] = ()) -> None:
        self.dim, self.levels, self.block = dim, levels, 1 << len(levels)
        if not levels or dim % self.block:
            most = halvings(dim)
            counts = "one level" if most == 1 else f"1 to {most} levels"
            give = f"give the bits of {counts}, such as levels={(4, 2, 2, 2)[:most]}"
            raise InputError(
                f"{len(levels)} levels of angles do not fit a head dimension of {dim}: "
                f"{give if most else 'it is odd, so choose another method'}."
            )
        self._counts = dict.fromkeys(levels, 0)  # codes of a vector, by width
        for level, bits in enumerate(levels, 1):
            self._counts[BITS("bits", bits)] += dim >> level
        self.layout: Layout = {f"angles_{bits}": packed_bytes(count, bits) for bits, count in self._counts.items()}
        angles = [(np.arange(1 << levels[0]) + 0.5) * 2 * math.pi / (1 << levels[0])]  # uniform: cells are equal
        if centroids:
            angles += np.split(np.array(centroids), np.cumsum([1 << bits for bits in levels[1:]])[:-1])
        else:
            angles += [angle_codebook(level, bits)[0] for level, bits in enumerate(levels[1:], 2)]
        self._edges = [constant((a[1:] + a[:-1]) / 2) for a in angles]
        self._circles = [constant(np.stack([np.cos(a), np.sin(a)], axis=-1)) for a in angles]
        self.nbytes = sum(array.nbytes for array in (*self._edges, *self._circles))
        self.circles = constant(mx.concatenate(self._circles))
        self.edges = constant(mx.concatenate([mx.zeros(0), *self._edges[1:]]))

    @property
    def expected_cosine(self) -> float:
        """Mean of ⟨u, û⟩ over unit vectors u: a product, since the angles of the levels are independent."""
        half_cell = math.pi / 2 ** self.levels[0]
        rest = (angle_codebook(level, bits)[1] for level, bits in enumerate(self.levels[1:], 2))
        return float(math.sin(half_cell) / half_cell * math.prod(rest))

    def angles(self, y: mx.array) -> tuple[list[mx.array], mx.array]:
        """Angles of ``y`` ``[..., dim]``, of each level ``[..., dim / 2^ℓ]``, and the radii ``[..., dim / block]``."""
        angles = []
        for _ in self.levels:
            pairs = mx.unflatten(y, -1, (-1, 2))
            angles.append(mx.arctan2(pairs[..., 1], pairs[..., 0]))
            y = mx.sqrt(mx.square(pairs).sum(axis=-1))
        return angles, y

    def assign(self, angles: list[mx.array]) -> list[mx.array]:
        """Index of the nearest centroid of each angle, by level."""
        count = 1 << self.levels[0]
        around = mx.floor(angles[0] * (count / (2 * math.pi))).astype(mx.int32) & (count - 1)  # a circle has no end
        return [around, *map(mx.searchsorted, self._edges[1:], angles[1:])]

    def directions(self, codes: list[mx.array]) -> mx.array:
        """Unit vectors of the blocks ``[..., dim / block, block]``: cosines and sines multiplied down the tree."""
        y = mx.ones((*codes[-1].shape, 1))
        for level, circle in zip(reversed(codes), reversed(self._circles), strict=True):
            y = mx.flatten(mx.take(circle, level.reshape(y.shape), axis=0) * y[..., None], -2)
        return y

    def pack(self, codes: list[mx.array]) -> dict[str, mx.array]:
        """Rows of bytes, one for each width."""
        by_width = {b: [c for c, own in zip(codes, self.levels, strict=True) if own == b] for b in self._counts}
        return {f"angles_{b}": pack_bytes(mx.concatenate(some, axis=-1), b) for b, some in by_width.items()}

    def unpack(self, arrays: dict[str, mx.array]) -> list[mx.array]:
        """Codes by level, from the rows of `pack`."""
        rows = {bits: unpack(arrays[f"angles_{bits}"], bits, count) for bits, count in self._counts.items()}
        codes, used = [], dict.fromkeys(rows, 0)
        for level, bits in enumerate(self.levels, 1):
            begin, used[bits] = used[bits], used[bits] + (self.dim >> level)
            codes.append(rows[bits][..., begin : used[bits]])
        return codes


@lru_cache
def angle_codebook(level: int, bits: int) -> tuple[Floats, float]:
    """Lloyd–Max angles of a level from 2 on, ascending ``[2**bits]``, and their mean of cos(ψ − ψ̂)."""
    t = np.linspace(0, math.pi / 2, 2**16 + 1)
    density = angle_density(t, level)
    angles = lloyd_max(lambda t: angle_density(t, level), 0, math.pi / 2, bits).levels
    angles = (angles + math.pi / 2 - angles[::-1]) / 2  # the density is even about π/4, and so is the optimum
    cosine = np.cos(t - angles[np.searchsorted((angles[1:] + angles[:-1]) / 2, t)])
    return angles, float((density * cosine).sum() / density.sum())


def angle_density(t: Floats, level: int) -> Floats:
    """Density of a rotated vector's angles ``t`` on [0, π/2], of a level from 2 on, not normalized."""
    return np.asarray(np.clip(np.sin(2 * t), 0, None) ** (2 ** (level - 1) - 1))


def fitted_angles(seen: Floats, level: int, bits: int) -> Floats:
    """K-means of the angles ``seen``, sorted, from the level's Lloyd–Max angles; an empty centroid stays."""
    angles, total = angle_codebook(level, bits)[0], np.concatenate([[0.0], np.cumsum(seen)])
    for _ in range(_ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(seen, (angles[1:] + angles[:-1]) / 2), [len(seen)]])
        count = np.diff(ends)
        moved = np.where(count > 0, np.diff(total[ends]) / np.maximum(count, 1), angles)
        if np.array_equal(moved, angles):
            break
        angles = np.sort(moved)
    return angles


def halvings(dim: int) -> int:
    """How often ``dim`` can be halved: the most levels it has."""
    return (dim & -dim).bit_length() - 1


tree_for = lru_cache(PolarTree)
