"""Nearest centroids and k-means++ for many points with few coordinates: most boxes of points are too far away.

Points are divided into boxes of equal size by halving: see `veloxlab.kernels.cpu.train.in_boxes`.
"""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, part
from veloxlab.kernels.cpu.wide import COUNT, first_bit, least_of_sums, up_to

_ROUNDING = np.float32(1e-6)  # of a squared distance, relative to the point's square


@part
def nearest_in_leaves(x, leaves, half, places, low, high, room):
    """Index of the nearest centroid of ``x`` ``[d]``, the first of equal ones, and ``‖c‖²/2 − x·c``.

    ``leaves`` are ``[64, d, 64]``, ``half`` and indices, ``places``, ``[64, 64]``, ``low`` and ``high`` ``[d, 64]``.
    """
    bounds, products, dim = room[0], room[1], len(x)
    square = np.float32(0)
    for leaf in range(COUNT):
        bounds[leaf] = 0
    for k in range(dim):
        number = x[k]
        square += number * number
        for leaf in range(COUNT):
            below, above = low[k, leaf] - number, number - high[k, leaf]
            off = below if below > above else above
            off = off if off > 0 else np.float32(0)
            bounds[leaf] += off * off
    index, least, slack = 0, np.float32(np.inf), square * (1 + _ROUNDING)
    leaf = least_of_sums(bounds.ctypes.data, room[2].ctypes.data)
    left = np.uint64(1) << np.uint64(leaf)
    first = True
    while left:
        for j in range(COUNT):
            products[j] = 0
        for k in range(dim):
            number = x[k]
            for j in range(COUNT):
                products[j] -= number * leaves[leaf, k, j]
        found = least_of_sums(products.ctypes.data, half[leaf].ctypes.data)
        value, place = products[found] + half[leaf, found], places[leaf, found]
        if value < least or (value == least and place < index):
            index, least = place, value
        if first:
            left = up_to(bounds.ctypes.data, slack + 2 * least) & ~left
            first = False
        else:
            left &= left - np.uint64(1)
            left &= up_to(bounds.ctypes.data, slack + 2 * least)
        leaf = first_bit(left)
    return index, least


@compiled
def nearest_by_leaves(first, last, points, leaves, half, places, low, high, codes, distances):
    """Index of the nearest centroid of each of ``points`` ``[N, d]``, and the squared distance to it."""
    room = np.zeros((3, COUNT), np.float32)
    for p in range(first, last):
        x = points[p]
        codes[p], least = nearest_in_leaves(x, leaves, half, places, low, high, room)
        distance = 2 * least
        for k in range(len(x)):
            distance += x[k] * x[k]
        distances[p] = distance if distance > 0 else np.float32(0)


@part
def far_off(low, high, seeds, s, distances):
    """Squared distances of all boxes from a seed."""
    for box in range(len(distances)):
        distances[box] = 0
    for k in range(len(seeds)):
        number = seeds[k, s]
        for box in range(len(distances)):
            below, above = low[k, box] - number, number - high[k, box]
            off = below if below > above else above
            off = off if off > 0 else np.float32(0)
            distances[box] += off * off


@part
def nearer(points, begin, inside, seeds, s, distances, own):
    """Lower the squared distances of the points of a box to those from a seed; returns whether one changed."""
    for i in range(inside):
        distances[i] = 0
    for k in range(len(seeds)):
        number = seeds[k, s]
        for i in range(inside):
            off = points[k, begin + i] - number
            distances[i] += off * off
    lower = 0
    for i in range(inside):
        lower += 1 if distances[i] < own[i] else 0
        own[i] = distances[i] if distances[i] < own[i] else own[i]
    return lower > 0


@part
def sum_boxes(left, sums):
    """Sums of 64 numbers each; returns the total."""
    total = 0.0
    for box in range(len(sums)):
        own = 0.0
        for p in range(box * COUNT, min((box + 1) * COUNT, len(left))):
            own += left[p]
        sums[box] = own
        total += own
    return total


@part
def drawn(wanted, left, sums):
    """The index at which the cumulative sum reaches ``wanted``."""
    box = 0
    while box < len(sums) - 1 and wanted >= sums[box]:
        wanted -= sums[box]
        box += 1
    p, last = box * COUNT, min((box + 1) * COUNT, len(left)) - 1
    while p < last and wanted >= left[p]:
        wanted -= left[p]
        p += 1
    return p


@compiled
def spread_seeds(points, low, high, places, uniform, known_each, chosen):
    """K-means++ from zero: indices of the drawn points, by ``uniform`` numbers, some at a time.

    A point is drawn with probability ∝ its squared distance to the nearest seed so far. ``points`` ``[d, N]`` are in
    boxes of 64, between ``low`` and ``high`` ``[d, boxes]``; ``places`` ``[N]`` are their indices in the drawing order.
    """
    (dim, count), boxes = points.shape, low.shape[1]
    left, order = np.empty(count, np.float32), np.empty(count, np.int64)  # in drawing order; place in the boxes
    own, most = np.zeros((boxes, COUNT), np.float32), np.empty(boxes, np.float32)
    for p in range(count):
        for k in range(dim):
            own[p // COUNT, p % COUNT] += points[k, p] * points[k, p]
        left[places[p]], order[places[p]] = own[p // COUNT, p % COUNT], p
    for box in range(boxes):
        most[box] = own[box].max()
    seeds, sums = np.empty((dim, len(uniform)), np.float32), np.empty(boxes, np.float64)
    distances, off, changed = np.empty(COUNT, np.float32), np.empty(boxes, np.float32), np.zeros(boxes, np.bool_)
    known, latest = 0, 0  # seeds, and the number of them that `left` includes
    while known < len(uniform):
        for s in range(latest, known):
            far_off(low, high, seeds, s, off)
            for box in range(boxes):
                if off[box] < most[box]:
                    inside = min(COUNT, count - box * COUNT)
                    changed[box] |= nearer(points, box * COUNT, inside, seeds, s, distances, own[box])
        for box in range(boxes):
            if changed[box]:
                most[box], changed[box] = 0, False
                for i in range(min(COUNT, count - box * COUNT)):
                    distance = own[box, i]
                    left[places[box * COUNT + i]] = distance
                    most[box] = distance if distance > most[box] else most[box]
        latest, total = known, sum_boxes(left, sums)
        together = min(max(1, (known + 1) // known_each), len(uniform) - known)
        for s in range(known, known + together):
            chosen[s] = drawn(uniform[s] * total, left, sums)
            for k in range(dim):
                seeds[k, s] = points[k, order[chosen[s]]]
        known += together
