"""Loops that rotate vectors and quantize their coordinates, or undo that: those of `veloxlab.kernels.rotated`."""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, half, part, u16_at
from veloxlab.kernels.cpu.rows import (
    MSE,
    load,
    pack,
    root_mean_square,
    row_at,
    scale_factor,
    to_half,
    transform,
    unpack,
)

_LINEAR_BITS = 4  # of an index that is found by comparing with all boundaries, before the search halves what is left
_TINY = np.float32(1e-30)
_GREATEST = np.float32(3.4028234663852886e38)


@part
def nearest_levels(y, dim, boundaries, bits, codes):
    """Index of the nearest level of each coordinate: how many boundaries lie below it, all of them below NaN."""
    coarse = min(bits, _LINEAR_BITS)
    step = 1 << (bits - coarse)
    for i in range(dim):
        codes[i] = 0
    for b in range(step - 1, len(boundaries), step):
        bound = boundaries[b]
        for i in range(dim):
            codes[i] += np.int32(0) if y[i] <= bound else np.int32(step)
    while step > 1:
        step //= 2
        for i in range(dim):
            codes[i] += np.int32(0) if y[i] <= boundaries[codes[i] + step - 1] else np.int32(step)


@part
def best_stretch(sizes, dim, tries, top):
    """Of ``tries``, times the stretch at which the largest of ``sizes`` leaves the grid, that of the least angle."""
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
def grid_points(y, sizes, dim, tries, bits, codes, levels):
    """Codes of the grid's steps, and the levels that they stand for; of one try the stretch itself."""
    top = 1 << (bits - 1)
    for i in range(dim):
        sizes[i] = abs(y[i])
    stretch = best_stretch(sizes, dim, tries, top) if len(tries) > 1 else tries[0]
    last = np.float32(top - 1)
    for i in range(dim):
        step = np.floor(stretch * sizes[i])
        step = step if step < last else last
        level = step + np.float32(0.5)
        level = level if y[i] >= 0 else -level
        levels[i] = level
        codes[i] = np.int32(np.float32(top) + level - np.float32(0.5))


@compiled
def encode(first, last, x, signs, hartley, boundaries, table, tries, fields, scale, root_scale, sine):
    """Vectors ``first`` to ``last``. ``fields`` are of each the address, words, bits, and bits below it.

    By ``boundaries`` and the levels in ``table``, or, without these, by the ``tries`` of a stretched grid. What is None
    is not compiled.
    """
    dim = len(signs)
    bits = fields[0, 2] + fields[0, 3]
    y, spare, levels = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    codes = np.empty(dim, np.int32)
    for vector in range(first, last):
        load(x, vector, dim, y)
        rms = root_mean_square(y, dim)
        unit = np.float32(1) if rms == 0 else rms
        for i in range(dim):
            y[i] = y[i] / unit * signs[i]
        transform(np.int64(y.ctypes.data), dim, np.int64(hartley.ctypes.data), np.int64(spare.ctypes.data))
        if tries is not None:
            grid_points(y, spare, dim, tries, bits, codes, levels)
        if table is not None:
            nearest_levels(y, dim, boundaries, bits, codes)
            for i in range(dim):
                levels[i] = table[codes[i]]
        inner, squares = np.float32(0), np.float32(0)
        for i in range(dim):
            inner += y[i] * levels[i]
            squares += levels[i] * levels[i]
        root_scale[vector] = to_half(np.sqrt(rms * scale_factor(scale, inner, squares, dim)))
        if sine is not None:
            rest, ratio = np.float32(0), scale_factor(MSE, inner, squares, dim)
            for i in range(dim):
                off = y[i] - ratio * levels[i]
                rest += off * off
            sine[vector] = to_half(np.sqrt(rest / np.float32(dim)))
        for f in range(len(fields)):
            pack(codes, dim, fields[f, 3], fields[f, 2], fields[f, 0] + 4 * vector * fields[f, 1], fields[f, 1])
    return spare.size  # Numba frees an array after its last use, and an address is none


@compiled
def decode(first, last, packed, root_scale, signs, hartley, table, bits, out):
    """Levels of the codes, rotated back and scaled."""
    dim = len(signs)
    codes, spare = np.empty(dim, np.uint8), np.empty(dim, np.float32)
    for vector in range(first, last):
        unpack(row_at(packed, vector), packed[4], bits, dim, codes)
        y = out[vector]
        for i in range(dim):
            y[i] = table[codes[i]]
        transform(np.int64(y.ctypes.data), dim, np.int64(hartley.ctypes.data), np.int64(spare.ctypes.data))
        root = half(u16_at(row_at(root_scale, vector))[0])
        size = root * root
        for i in range(dim):
            y[i] *= signs[i] * size
    return spare.size


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
