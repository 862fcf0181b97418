"""Vector codebooks: k-means of sub-vectors, the nearest centroid, and packed indices of up to 16 bits.

Distances are ``‖c‖²/2 − x·c``, which order centroids as ``‖x − c‖`` does. They are matrix products, one chunk at a
time. The first centroid is fixed at zero, so that a zero vector is coded without error.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.parts import in_turn
from veloxlab.codecs.parts.packing import WIDEST, pack, unpack, unpack_to_bytes
from veloxlab.kernels.checked import by_loop, computed
from veloxlab.kernels.encode import search_kernel
from veloxlab.progress import may_end

Points = NDArray[np.float32]

ITERATIONS = 30  # of Lloyd, as VecInfer; fewer if `_MOST_WORK` ends them
RESTARTS, _TRIAL = 3, 5  # seedings that are tried, and their iterations; training continues with the best one
_MANY = 1024  # centroids from which on seedings hardly differ, so that only one is made
MOST_POINTS = 1 << 16  # in the training of one codebook
_MOST_PAIRS = 1 << 27  # of a point and a centroid, in one iteration: 32,768 points for 4096 centroids
# pairs in all iterations: 4 for 4096 centroids. All 30 take 3 times as long, for 0.5 % less squared error on other text
_MOST_WORK = 1 << 29
_SEEDING_POINTS = 8  # per centroid, in a trial
_KNOWN = 128  # known seeds for each one of a draw: the seeds of one draw are then rarely neighbours
_SETTLED = 3e-4  # relative gain of an iteration below which Lloyd ends
# multiply-adds of one product: its distances fit a second-level cache, and BLAS uses no threads for it
_PRODUCT = 1 << 18
_DISTANCES = 1 << 22  # floats in a chunk while encoding, of which MLX's CPU back end may hold ten


def train_codebook(points: Points, count: int, seed: int) -> Points:
    """K-means centroids ``[count, d]`` of ``points`` ``[N, d]``, more than ``count`` of them different; one is zero.

    Seeds by k-means++, several times on a part of the points, then Lloyd's iteration on all, or at most `MOST_POINTS`.
    """
    rng = np.random.default_rng(seed)
    most = min(MOST_POINTS, _MOST_PAIRS // count)
    if len(points) > most:
        points = points[rng.choice(len(points), most, replace=False)]
    start = _start(points, count, rng)
    return _lloyd(points, start, min(ITERATIONS, max(1, _MOST_WORK // (len(points) * count))))[0]


def nearest(points: mx.array, centroids: mx.array) -> mx.array:
    """Index ``[...]`` (uint32) of the nearest of ``centroids`` ``[C, d]`` to each of ``points`` ``[..., d]``."""
    *lead, dim = points.shape
    rows, half = points.reshape(-1, dim), mx.square(centroids).sum(axis=-1) / 2
    if not len(rows):
        return mx.zeros(lead, mx.uint32)
    size = _DISTANCES // len(centroids)
    return in_turn(lambda some: mx.argmin(mx.addmm(half, some, -centroids.T), axis=-1), rows, size).reshape(lead)


def packed_nearest(points: mx.array, centroids: mx.array, bits: int) -> mx.array:
    """Packed indices of the nearest centroids ``[2**bits, d]`` of the sub-vectors of ``points`` ``[B, H, S, J·d]``."""
    dim = centroids.shape[-1]
    parts = points.shape[-1] // dim

    def by_graph(points: mx.array, centroids: mx.array) -> dict[str, mx.array]:
        return {"packed": pack_indices(nearest(mx.unflatten(points, -1, (parts, dim)), centroids), bits)}

    return computed(lambda backend: search_kernel(dim, parts, bits, backend), by_graph, points, centroids)["packed"]


def pack_indices(indices: mx.array, bits: int) -> mx.array:
    """Pack ``indices`` ``[..., J]`` of 1 to 8, 10, 12, 14 or 16 bits, as `pack` does; wide ones as two halves."""
    if bits <= WIDEST:
        return pack(indices, bits)
    halves = mx.stack([indices & ((1 << bits // 2) - 1), indices >> bits // 2], axis=-1)
    return pack(mx.flatten(halves, -2), bits // 2)


def unpack_indices(words: mx.array, bits: int, count: int) -> mx.array:
    """Undo `pack_indices`: ``[..., count]``, uint32 (uint8 where an index is a byte)."""
    if bits == WIDEST:
        return unpack_to_bytes(words, bits, count)
    return unpack(words, bits, count) if bits < WIDEST else unpack(words, bits // 2, 2 * count, together=2)


def _start(points: Points, count: int, rng: np.random.Generator) -> Points:
    """The best of several seedings, from a part of the points, after a few iterations."""
    size = min(len(points), max(_SEEDING_POINTS * count, 8192))
    trials = []
    for _ in range(RESTARTS):
        part = points[rng.choice(len(points), size, replace=False)]
        seeds = _seeds(part, count, rng)
        if count >= _MANY:
            return seeds
        trials.append(_lloyd(part, seeds, _TRIAL))
    return min(trials, key=lambda trial: trial[1])[0]


def _seeds(points: Points, count: int, rng: np.random.Generator) -> Points:
    """K-means++: zero, then points drawn with probability ∝ their squared distance to the nearest seed so far."""
    # whole numbers: a draw depends on all earlier draws, and must not depend on rounding
    some = np.random.default_rng(0).integers(-8, 9, (8 * _KNOWN, points.shape[1])).astype(np.float32)
    trial = some, (np.arange(_KNOWN) + 0.37) / _KNOWN
    (chosen,) = by_loop("drawn_seeds", _drawn, points, rng.random(count - 1), trial=trial, known_each=_KNOWN)
    return np.concatenate([np.zeros((1, points.shape[1]), np.float32), points[chosen]])


def _drawn(points: Points, uniform: Points, known_each: int) -> tuple[NDArray[np.int64]]:
    """Indices of the drawn points, by ``uniform`` numbers from 0 to 1, some at a time."""
    norms = np.square(points).sum(axis=1)
    columns, left = np.ascontiguousarray(points.T), norms.copy()
    chosen, known = np.empty(len(uniform), np.int64), 0
    while known < len(uniform):
        cumulative = np.cumsum(left, dtype=np.float64)
        draws = uniform[known : known + max(1, (known + 1) // known_each)] * cumulative[-1]
        found = np.minimum(np.searchsorted(cumulative, draws, side="right"), len(points) - 1)
        chosen[known : known + len(draws)], drawn = found, points[found]
        squares, size = np.square(drawn).sum(axis=1)[:, None], _PRODUCT // drawn.size
        for at in range(0, len(points), size):
            span = slice(at, at + size)
            distances = norms[span] - 2 * (drawn @ columns[:, span]) + squares
            np.minimum(left[span], np.maximum(distances.min(axis=0), 0), out=left[span])
        known += len(drawn)
    return (chosen,)


def _lloyd(points: Points, centroids: Points, iterations: int) -> tuple[Points, float]:
    """Centroids after at most ``iterations``, and the mean squared distance to those before the last one."""
    count, error = len(centroids), math.inf
    for _ in range(iterations):
        may_end()
        codes, distances = by_loop("nearest_centroids", _assign, points, centroids)
        members = np.bincount(codes, minlength=count)
        sums = np.stack([np.bincount(codes, column, count) for column in points.T], axis=1)
        centroids = (sums / np.maximum(members, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(members == 0)
        if len(empty):
            worst_served = np.argsort(distances, kind="stable")[len(points) - len(empty) :]
            centroids[empty] = points[worst_served]
        centroids[0] = 0
        before, error = error, float(distances.mean())
        if before - error <= _SETTLED * error and not len(empty):
            break
    return centroids, error


def _assign(points: Points, centroids: Points) -> tuple[NDArray[np.int64], Points]:
    count, dim = centroids.shape
    half = np.square(centroids).sum(axis=1) / 2
    weights = np.concatenate([-centroids.T, half[None]])  # with a 1 behind each point, one product gives distances
    rows = np.concatenate([points, np.ones((len(points), 1), np.float32)], axis=1)
    size = max(8, _PRODUCT // (count * (dim + 1)))
    codes, least = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    room = np.empty((size, count), np.float32)
    for start in range(0, len(points), size):
        chunk = rows[start : start + size]
        distances = np.matmul(chunk, weights, out=room[: len(chunk)])
        found = distances.argmin(axis=1)
        codes[start : start + size] = found
        least[start : start + size] = distances[np.arange(len(chunk)), found]
    return codes, np.maximum(np.square(points).sum(axis=1) + 2 * least, 0)
