"""The loops of `veloxlab.kernels.rotated`: rotate vectors and quantize their coordinates, or undo that."""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, f32_at, i32_at, part
from veloxlab.kernels.cpu.rows import (
    MSE,
    load,
    pack,
    root_mean_square,
    scale_factor,
    to_half,
    transform,
)

_LINEAR_BITS = 4  # of an index that is found by comparison with all boundaries; more bits are found by bisection
_TOGETHER = 24  # steps of sizes that are sorted together
_TINY = np.float32(1e-30)
_GREATEST = np.float32(3.4028234663852886e38)


@part
def nearest_levels(y, dim, boundaries, bits, codes):
    """Index of the nearest level of each coordinate: the number of boundaries below it; all are below NaN."""
    coarse = min(bits, _LINEAR_BITS)
    step = 1 << (bits - coarse)
    c, x = i32_at(codes.ctypes.data), f32_at(y.ctypes.data)
    for i in range(dim):
        c[i] = np.int32(0)
    for b in range(step - 1, len(boundaries), step):
        bound = boundaries[b]
        for i in range(dim):
            c[i] += np.int32(0) if x[i] <= bound else np.int32(step)
    while step > 1:
        step //= 2
        for i in range(dim):
            c[i] += np.int32(0) if x[i] <= boundaries[c[i] + step - 1] else np.int32(step)


@part
def best_stretch(sizes, dim, tries, top):
    """The best of ``tries`` times the stretch at which the largest of ``sizes`` leaves the grid, by angle."""
    largest, squares = _TINY, np.float32(0)
    for i in range(dim):
        largest = sizes[i] if sizes[i] > largest else largest
        squares += sizes[i] * sizes[i]
    squares = squares if squares > _TINY else _TINY
    leaves, last = np.float32(top) / largest, np.float32(top - 1)
    best, least = leaves * tries[0], _GREATEST
    for t in range(len(tries)):
        stretch = leaves * tries[t]
        errors, along, grid = np.float32(0), np.float32(0), np.float32(0)
        for i in range(dim):
            reach = stretch * sizes[i]
            step = np.floor(reach)
            step = (step if step < last else last) + np.float32(0.5)
            error = step - reach
            errors += error * error
            along += error * sizes[i]
            grid += step * step
        sine = (errors - along * along / squares) / grid
        if sine < least:
            best, least = stretch, sine
    return best


@part
def best_step(sizes, dim, top):
    """The best stretch by angle, among all at which one of ``sizes`` steps, and 0.

    Step j of a size adds the size to the product with the grid point, and 2j to the square of the grid point. Some
    steps at a time are sorted. The search ends when even real numbers for the remaining steps would not be better.
    """
    room = 2 * dim + _TOGETHER
    times, places = np.empty(room, np.float32), np.empty((room, 2), np.int64)
    coming, steps = np.full(dim, np.float32(np.inf)), np.ones(dim, np.int64)
    total, left, inner_at_end, square_at_end = 0.0, 0.0, 0.0, 0.0
    for i in range(dim):
        total += sizes[i]
        left += sizes[i] * sizes[i]
        if top > 1 and sizes[i] > _TINY:
            coming[i] = np.float32(1) / sizes[i]
    inner, square, width = total / 2, dim / 4, _TOGETHER / (total if total > _TINY else _TINY)
    best, most, end = np.float32(0), inner * inner / square, np.float32(width)
    while square_at_end == 0 or inner_at_end * inner_at_end / square_at_end + left >= most:
        count = 0
        for i in range(dim):
            while coming[i] <= end:
                at = count
                while at > 0 and times[at - 1] > coming[i]:
                    times[at], places[at] = times[at - 1], places[at - 1]
                    at -= 1
                times[at], places[at, 0], places[at, 1] = coming[i], i, steps[i]
                count += 1
                steps[i] += 1
                coming[i] = np.float32(steps[i]) / sizes[i]
                if steps[i] == top:
                    coming[i] = np.float32(np.inf)
                    inner_at_end += (top - 0.5) * sizes[i]
                    square_at_end += (top - 0.5) * (top - 0.5)
                    left -= sizes[i] * sizes[i]
        for e in range(count):
            inner += sizes[places[e, 0]]
            square += 2 * places[e, 1]
            if inner * inner > most * square:
                best, most = times[e], inner * inner / square
        begin = end if count > 0 else coming.min()
        if not begin < np.inf:
            break
        end = np.float32(min(begin + width, _GREATEST))
    return best * np.float32(1 + 1e-6)  # so that rounding does not fall below the step


@part
def grid_points(y, sizes, dim, stretch, top, codes, levels):
    """Codes of the grid's steps, and their levels."""
    last = np.float32(top - 1)
    for i in range(dim):
        step = np.floor(stretch * sizes[i])
        step = step if step < last else last
        level = step + np.float32(0.5)
        level = level if y[i] >= 0 else -level
        levels[i] = level
        codes[i] = np.int32(np.float32(top) + level - np.float32(0.5))


@part
def rest_of(y, levels, dim, ratio):
    """Subtract levels times a ratio from a vector, and return the sum of squares of the residual."""
    squares = np.float32(0)
    for i in range(dim):
        y[i] -= ratio * levels[i]
        squares += y[i] * y[i]
    return squares


@part
def signs_of(y, dim, matrix, bits):
    """1 where the product of a row of a matrix with a vector is 0 or more."""
    for row in range(len(matrix)):
        product = np.float32(0)
        for i in range(dim):
            product += matrix[row, i] * y[i]
        bits[row] = np.int32(1) if product >= 0 else np.int32(0)


@compiled
def encode(
    first, last, x, dim, bits, signs, hartley, boundaries, table, tries, sketch, fields, scale, root_scale, sine, norm
):
    """Encode vectors ``first`` to ``last``. ``fields`` have address, words, bits, and lower bits of each field.

    Codes are by ``boundaries`` and the levels in ``table``, or by the ``tries`` of a stretched grid, or by its best
    stretch. Without ``signs`` vectors are rotated already. With ``sketch``, a matrix, the last field has the signs of
    its products with the residual. Parts that are None are not compiled.
    """
    y, spare, levels = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    codes, top = np.empty(dim, np.int32), 1 << bits >> 1
    for vector in range(first, last):
        load(x, vector, dim, y)
        rms = root_mean_square(y, dim)
        unit = np.float32(1) if rms == 0 else rms
        for i in range(dim):
            y[i] /= unit
        if signs is not None:
            for i in range(dim):
                y[i] *= signs[i]
            transform(np.int64(y.ctypes.data), dim, np.int64(hartley.ctypes.data), np.int64(spare.ctypes.data))
        if table is not None:
            nearest_levels(y, dim, boundaries, bits, codes)
            for i in range(dim):
                levels[i] = table[codes[i]]
        else:
            for i in range(dim):
                spare[i] = abs(y[i])
            if tries is None:
                stretch = best_step(spare, dim, top)
            else:
                stretch = best_stretch(spare, dim, tries, top) if len(tries) > 1 else tries[0]
            grid_points(y, spare, dim, stretch, top, codes, levels)
        inner, squares = np.float32(0), np.float32(0)
        for i in range(dim):
            inner += y[i] * levels[i]
            squares += levels[i] * levels[i]
        root_scale[vector] = to_half(np.sqrt(rms * scale_factor(scale, inner, squares, dim)))
        own = len(fields)
        if sketch is not None:
            own -= 1
        for f in range(own):
            pack(codes, dim, fields[f, 3], fields[f, 2], fields[f, 0] + 4 * vector * fields[f, 1], fields[f, 1])
        if sine is not None:
            rest = rest_of(y, levels, dim, scale_factor(MSE, inner, squares, dim))
            sine[vector] = to_half(np.sqrt(rest / np.float32(dim)))
        if sketch is not None:
            norm[vector] = to_half(np.sqrt(rest_of(y, levels, dim, np.float32(1))))
            signs_of(y, dim, sketch, codes)
            pack(codes, len(sketch), 0, 1, fields[own, 0] + 4 * vector * fields[own, 1], fields[own, 1])
    return spare.size  # Numba frees an array after its last use, and an address is none


@compiled
def rotate(first, last, x, signs, hartley, inverse, out):
    """Signs, then the transform; ``inverse``: the transform, then signs."""
    dim = len(signs)
    spare = np.empty(dim, np.float32)
    for vector in range(first, last):
        y = out[vector]
        load(x, vector, dim, y)
        if not inverse:
            for i in range(dim):
                y[i] *= signs[i]
        transform(np.int64(y.ctypes.data), dim, np.int64(hartley.ctypes.data), np.int64(spare.ctypes.data))
        if inverse:
            for i in range(dim):
                y[i] *= signs[i]
    return spare.size
