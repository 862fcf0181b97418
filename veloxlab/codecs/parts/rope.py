"""Rotary position embedding (RoPE; J. Su et al., 2021, arXiv 2104.09864), and its inverse for CommVQ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Start = int | mx.array  # position in the text of the first token of each sequence: the same, or each [B]


@dataclass(frozen=True, eq=False)
class Rope:
    """A layer's own rotation of pairs of coordinates by angles that grow with the position.

    A head's first ``dims`` coordinates are rotated, in pairs of neighbours (2i, 2i + 1) if ``traditional``, else
    (i, i + dims/2). Frequencies are a geometric series from ``base``, or ``freqs``, tokens per radian of each pair
    ``[dims / 2]``. Positions are multiplied with ``scale``.
    """

    dims: int
    traditional: bool = False
    base: float | None = 10_000.0
    freqs: mx.array | None = None
    scale: float = 1.0

    @property
    def angles(self) -> np.ndarray:
        """The angle of each pair from one position to the next ``[dims / 2]``, float64 radians."""
        if self.freqs is not None:
            return self.scale / np.array(self.freqs.astype(mx.float32), np.float64)
        assert self.base is not None
        pairs = self.dims // 2
        return np.asarray(self.scale * self.base ** (-np.arange(pairs) / pairs))

    def pairs(self, head_dim: int) -> NDArray[np.int64]:
        """Both coordinates of each pair ``[head_dim / 2, 2]``; those that are not rotated are paired by halves."""
        turned, rest = np.arange(self.dims), np.arange(self.dims, head_dim)
        own = turned.reshape(-1, 2) if self.traditional else turned.reshape(2, -1).T
        return np.concatenate([own, rest.reshape(2, -1).T])

    def forward(self, x: mx.array, start: Start, direction: int = 1) -> mx.array:
        """Rotate ``x`` ``[B, H, S, D]``, whose first token is at position ``start``."""
        if x.size == 0:
            return x
        x = mx.contiguous(x)  # MLX 0.32.4 on CUDA turns a broadcast in place, many tokens in the memory of one
        scale, traditional = direction * self.scale, self.traditional
        return mx.fast.rope(
            x, self.dims, traditional=traditional, base=self.base, scale=scale, offset=start, freqs=self.freqs
        )

    def inverse(self, x: mx.array, start: Start) -> mx.array:
        """Undo `forward`: the same angles, with the other sign."""
        return self.forward(x, start, direction=-1)


@lru_cache(maxsize=4096)  # some hundred sequences of a batch, in every layer
def angles_from(rope: Rope, head_dim: int, start: int) -> mx.array:
    """For readers: the position of the first token, and the angle of each pair at a token ``[1 + D/2]``."""
    both = np.zeros(1 + head_dim // 2, np.float32)
    both[0], both[1 : 1 + rope.dims // 2] = start, rope.angles
    return mx.array(both)


def by_angles(rope: Rope, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Matrices ``[H, D, D]`` of ``x`` ``[H, D]``: (q @ one) · (cosines, sines of a position's angles) is q · R_t x."""
    (i, j), pairs = rope.pairs(x.shape[-1]).T, np.arange(x.shape[-1] // 2)
    cosines, sines = np.zeros((2, *x.shape, len(pairs)), np.float32)
    cosines[:, i, pairs], cosines[:, j, pairs] = x[:, i], x[:, j]
    sines[:, i, pairs], sines[:, j, pairs] = -x[:, j], x[:, i]
    return np.concatenate([cosines, sines], axis=-1)
