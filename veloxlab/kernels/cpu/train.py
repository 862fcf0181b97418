"""The loops of training, over NumPy arrays; each gives the same as its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from veloxlab.kernels.cpu import leaves as leaves_of
from veloxlab.kernels.cpu import search, sums
from veloxlab.kernels.cpu.describe import Array
from veloxlab.kernels.cpu.run import share, stage_tables
from veloxlab.kernels.cpu.wide import COUNT

_PAIR, _NEAREST, _DESCENT = 0.2, 200, 4  # nanoseconds for a point and a centroid, a point in leaves, a coordinate
_LEAST_LEAVES, _FEW = 8, 4  # leaves and coordinates: with fewer leaves or more coordinates hardly any leaf is skipped


def nearest_centroids(points: Array, centroids: Array) -> tuple[Array, ...]:
    """Index of the nearest centroid of each of ``points`` ``[N, d]``, and the squared distance to it."""
    count, dim = centroids.shape
    codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    half = np.square(centroids).sum(axis=1) / 2
    if count % COUNT or not _LEAST_LEAVES * COUNT <= count <= COUNT**2 or dim > _FEW:
        given = points, centroids, half, codes, distances
        share(lambda first, last: search.nearest_centroids(first, last, *given), len(points), _PAIR * count)
        return codes, distances
    order, low, high = in_boxes(centroids)
    leaves, places = np.zeros((COUNT, dim, COUNT), np.float32), np.zeros((COUNT, COUNT), np.int64)
    halves, bounds = np.full((COUNT, COUNT), np.inf, np.float32), np.full((2, dim, COUNT), np.inf, np.float32)
    order = np.sort(order.reshape(-1, COUNT), axis=1)  # so that the first of equal ones is found
    full = len(order)
    leaves[:full] = centroids[order].swapaxes(1, 2)
    halves[:full], places[:full] = half[order], order
    bounds[0, :, :full], bounds[1, :, :full] = low, high
    bounds[1, :, full:] = -np.inf
    given = points, leaves, halves, places, *bounds, codes, distances
    share(lambda first, last: leaves_of.nearest_by_leaves(first, last, *given), len(points), _NEAREST)
    return codes, distances


def drawn_seeds(points: Array, uniform: Array, known_each: int) -> tuple[Array, ...]:
    """Indices of the ``points`` ``[N, d]`` that k-means++ draws by ``uniform`` numbers."""
    chosen = np.empty(len(uniform), np.int64)
    order, low, high = in_boxes(points)
    columns = np.ascontiguousarray(points[order].T)
    leaves_of.spread_seeds(columns, low, high, order, uniform, known_each, chosen)
    return (chosen,)


def in_boxes(points: Array) -> tuple[Array, Array, Array]:
    """An order of ``points`` ``[N, d]`` in boxes of 64 neighbours, and the bounds of the boxes ``[d, boxes]``.

    Points are halved at the middle of their widest coordinate, until 64 are together. Padding of the last boxes counts
    as the largest, and is removed at the end.
    """
    count, dim = points.shape
    levels = (-(-count // COUNT) - 1).bit_length()
    columns = np.concatenate([points.T, np.zeros((dim, (COUNT << levels) - count), np.float32)], axis=1)
    order = np.arange(COUNT << levels)
    for level in range(levels):
        order = order.reshape(1 << level, -1)
        own = columns[:, order]
        some = own[..., ::4]
        widest = np.argmax(some.max(axis=2) - some.min(axis=2), axis=0)
        numbers = np.where(order < count, own[widest, np.arange(1 << level)], np.inf)
        del own, some  # as large as all points: free them before the order is copied
        order = np.take_along_axis(order, np.argpartition(numbers, order.shape[1] // 2, axis=1), 1).ravel()
    order = order[:count]
    sorted_points, begins = points[order], np.arange(0, count, COUNT)
    low, high = (np.ascontiguousarray(f.reduceat(sorted_points, begins).T) for f in (np.minimum, np.maximum))
    return order, low, high


def descend(x: Array, table: Array, b: Array) -> tuple[Array, ...]:
    """The best a for each vector's b, then the best b for that a; a negative b stands for the best b alone."""
    x, tables, found = np.ascontiguousarray(x), stage_tables(table), np.empty((2, len(x)), np.int64)
    given = x, tables["stages"], tables["norms"], tables["both"], b, *found
    share(lambda first, last: sums.descend(first, last, *given), len(x), _DESCENT * x.shape[1])
    return found[0], found[1]


def search_sums(x: Array, table: Array, starts: int, rounds: int) -> tuple[Array, ...]:
    """A best (a, b) for each vector: descents from several starts."""
    x, tables, found = np.ascontiguousarray(x), stage_tables(table), np.empty((2, len(x)), np.int64)
    given = x, *(tables[name] for name in ("stages", "norms", "both", "means")), starts, rounds, *found
    share(lambda first, last: sums.search_all(first, last, *given), len(x), 2 * _DESCENT * x.shape[1])
    return found[0], found[1]


def add_up(x: Array, a: Array, b: Array, entries: int) -> tuple[Array, ...]:
    """Sums of the rows of ``x`` by a and by b ``[entries, D]``, and the counts of each (a, b)."""
    x = np.ascontiguousarray(x)
    of_a, of_b = np.zeros((2, entries, x.shape[1]), np.float32)
    together = np.zeros((entries, entries), np.int64)
    sums.add_up(0, len(x), x, a, b, of_a, of_b, together)
    return of_a, of_b, together


def settled_levels(levels: Array, t: Array, mass: Array, first: Array, least: Array, rounds: int) -> tuple[Array, ...]:
    """Levels after Lloyd's iteration, at the means of their cells."""
    levels = levels.copy()
    search.settle_levels(levels, t, mass, first, least, rounds)
    return (levels,)


LOOPS: Final[Mapping[str, Callable[..., tuple[Array, ...]]]] = {
    loop.__name__: loop for loop in (nearest_centroids, drawn_seeds, descend, search_sums, add_up, settled_levels)
}
