"""Loops that find nearest centroids, and move levels; ``‖c‖²/2 − x·c`` orders centroids as ``‖x − c‖`` does."""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, part
from veloxlab.kernels.cpu.rows import bits_of_float, load, pack

_POINTS = 128  # that are compared with every centroid together
_INFINITE = np.uint32(0x7F800000)


@part
def finite(number):
    """Whether a number is neither NaN nor infinite."""
    return bits_of_float(number) & _INFINITE != _INFINITE


@part
def nearest(points, count, centroids, half, least, index):
    """The nearest of ``centroids`` ``[C, d]`` to ``points`` ``[d, count]``, the first of equal ones; 0 for NaN."""
    for p in range(count):
        least[p], index[p] = np.float32(np.inf), 0
    dim = len(points)
    if dim == 2:
        for c in range(len(centroids)):
            size, c0, c1 = half[c], centroids[c, 0], centroids[c, 1]
            for p in range(count):
                distance = size - points[0, p] * c0 - points[1, p] * c1
                better = distance < least[p]
                least[p] = distance if better else least[p]
                index[p] = np.int32(c) if better else index[p]
        return
    if dim == 4:
        for c in range(len(centroids)):
            size, c0, c1, c2, c3 = half[c], centroids[c, 0], centroids[c, 1], centroids[c, 2], centroids[c, 3]
            for p in range(count):
                distance = size - points[0, p] * c0 - points[1, p] * c1 - points[2, p] * c2 - points[3, p] * c3
                better = distance < least[p]
                least[p] = distance if better else least[p]
                index[p] = np.int32(c) if better else index[p]
        return
    distances = np.empty(count, np.float32)
    for c in range(len(centroids)):
        for p in range(count):
            distances[p] = half[c]
        for k in range(dim):
            for p in range(count):
                distances[p] -= points[k, p] * centroids[c, k]
        for p in range(count):
            better = distances[p] < least[p]
            least[p] = distances[p] if better else least[p]
            index[p] = np.int32(c) if better else index[p]


@compiled
def assign(first, last, x, parts, centroids, bits, packed):
    """Packed indices of the nearest centroids of the ``parts`` sub-vectors of each vector."""
    dim = centroids.shape[1]
    together = max(1, _POINTS // parts)
    half = np.empty(len(centroids), np.float32)
    for c in range(len(centroids)):
        total = np.float32(0)
        for k in range(dim):
            total += centroids[c, k] * centroids[c, k]
        half[c] = total / 2
    points, row = np.empty((dim, together * parts), np.float32), np.empty(parts * dim, np.float32)
    least, index = np.empty(together * parts, np.float32), np.empty(together * parts, np.int32)
    for begin in range(first, last, together):
        vectors = min(together, last - begin)
        for v in range(vectors):
            load(x, begin + v, parts * dim, row)
            for p in range(parts):
                at, whole = v * parts + p, True
                for k in range(dim):
                    points[k, at] = row[p * dim + k]
                    whole = whole and finite(row[p * dim + k])
                if not whole:
                    points[0, at] = np.float32(np.nan)
        nearest(points, vectors * parts, centroids, half, least, index)
        for v in range(vectors):
            words = packed.shape[1]
            pack(index[v * parts :], parts, 0, bits, packed.ctypes.data + 4 * (begin + v) * words, words)


@compiled
def nearest_centroids(first, last, points, centroids, half, codes, distances):
    """Index of the nearest centroid of each of ``points`` ``[N, d]``, and the squared distance to it."""
    dim = points.shape[1]
    block, least, index = (
        np.empty((dim, _POINTS), np.float32),
        np.empty(_POINTS, np.float32),
        np.empty(_POINTS, np.int32),
    )
    squares = np.empty(_POINTS, np.float32)
    for begin in range(first, last, _POINTS):
        count = min(_POINTS, last - begin)
        for p in range(count):
            squares[p] = 0
            for k in range(dim):
                number = points[begin + p, k]
                block[k, p] = number
                squares[p] += number * number
        nearest(block, count, centroids, half, least, index)
        for p in range(count):
            distance = squares[p] + 2 * least[p]
            codes[begin + p] = index[p]
            distances[begin + p] = distance if distance > 0 else np.float32(0)


@part
def on_line(x, cell, t, sums):
    """The function with values ``sums`` ``[T]`` at ``t``, interpolated at x in this cell."""
    return (sums[cell + 1] - sums[cell]) / (t[cell + 1] - t[cell]) * (x - t[cell]) + sums[cell]


@compiled
def settle_levels(levels, t, mass, first, least, rounds):
    """Move ascending levels to the means of their cells until none moves by ``least``; ``t`` is in even steps."""
    count, last = len(levels), len(t) - 1
    steps = last / (t[last] - t[0])
    for _ in range(rounds):
        mass_before, first_before, largest = mass[0], first[0], 0.0
        for i in range(count):
            mass_here, first_here = mass[last], first[last]
            if i < count - 1:
                edge = (levels[i] + levels[i + 1]) / 2
                cell = min(max(int((edge - t[0]) * steps), 0), last - 1)
                mass_here, first_here = on_line(edge, cell, t, mass), on_line(edge, cell, t, first)
            inside = mass_here - mass_before
            if inside > 0:
                mean = (first_here - first_before) / inside
                largest = max(largest, abs(mean - levels[i]))
                levels[i] = mean
            mass_before, first_before = mass_here, first_here
        if largest < least[0]:
            return
