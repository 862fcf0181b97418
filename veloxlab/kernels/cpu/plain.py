"""Loops that encode vectors without a rotation: signs, steps of groups, and widths by a plan."""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, half
from veloxlab.kernels.cpu.rows import (
    MSE,
    UNBIASED,
    bits_of_float,
    head_of,
    load,
    pack,
    push,
    root_mean_square,
    signed_square,
    to_half,
)

_ABOVE_INFINITE = np.uint32(0x7F800000)


@compiled
def encode_signs(first, last, x, y, dim, rows, signs, root_rms):
    """Bits that are 1 for projections ``y`` of 0 or more, and the root of the size of the vectors ``x``."""
    own, projected = np.empty(dim, np.float32), np.empty(rows, np.float32)
    bits = np.empty(rows, np.int32)
    for vector in range(first, last):
        load(x, vector, dim, own)
        load(y, vector, rows, projected)
        for i in range(rows):
            bits[i] = np.int32(1) if projected[i] >= 0 else np.int32(0)
        words = signs.shape[1]
        pack(bits, rows, 0, 1, signs.ctypes.data + 4 * vector * words, words)
        root_rms[vector] = to_half(np.sqrt(root_mean_square(own, dim)))


@compiled
def encode_groups(first, last, x, dim, group, steps, shift, bits, codes, half_step, least):
    """Equal ``steps`` from the least to the largest of every ``group`` coordinates; levels at ``shift`` in a step."""
    y, found = np.empty(dim, np.float32), np.empty(dim, np.int32)
    most, words = np.float32((1 << bits) - 1), codes.shape[1]
    for vector in range(first, last):
        load(x, vector, dim, y)
        for g in range(least.shape[1]):
            begin, end = g * group, min(dim, (g + 1) * group)
            low, high, special = y[begin], y[begin], np.uint32(0)
            for i in range(begin, end):
                low = y[i] if y[i] < low else low
                high = y[i] if y[i] > high else high
                size = bits_of_float(y[i]) & np.uint32(0x7FFFFFFF)
                special = size if size > special else special
            if special > _ABOVE_INFINITE:
                low, high = np.float32(np.nan), np.float32(np.nan)
            root = to_half(-np.sqrt(-low) if low < 0 else np.sqrt(low))
            low = signed_square(half(root))  # codes are relative to the rounded number
            left = high - low
            left = np.float32(0) if left < 0 else left
            root_half = to_half(np.sqrt(left / np.float32(2 * steps)))
            step = np.float32(2) * signed_square(half(root_half))
            step = np.float32(1) if step == 0 else step
            least[vector, g], half_step[vector, g] = root, root_half
            for i in range(begin, end):
                level = np.rint((y[i] - low) / step - shift)
                level = level if level > 0 else np.float32(0)
                found[i] = np.int32(level if level < most else most)
        pack(found, dim, 0, bits, codes.ctypes.data + 4 * vector * words, words)


@compiled
def encode_by_plan(first, last, x, y, begins, boundaries, levels, mean, deviation, scale, largest, codes, root_scale):
    """Codes of each coordinate's own width, mean and deviation; tables of 2^n levels begin at 2^n − 1."""
    dim = len(begins) - 1
    own, number = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for vector in range(first, last):
        load(x, vector, dim, own)
        load(y, vector, dim, number)
        head = head_of(x, vector)
        rms = root_mean_square(own, dim)
        unit = np.float32(1) if rms == 0 else rms
        inner, squares, energy = np.float32(0), np.float32(0), np.float32(0)
        held, have, word = np.uint64(0), 0, 0
        for i in range(dim):
            width = np.int64(begins[i + 1]) - np.int64(begins[i])
            table = (1 << width) - 1
            scaled = number[i] / unit
            wanted = (scaled - mean[head, 0, i]) / deviation[head, 0, i]
            code, step = 0, (1 << width) >> 1
            while step > 0:
                code += 0 if wanted <= boundaries[table + code + step - 1] else step
                step >>= 1
            level = levels[table + code] * deviation[head, 0, i] + mean[head, 0, i]
            inner += scaled * level
            squares += level * level
            energy += scaled * scaled
            held, have, word = push(codes[vector], code, width, held, have, word)
        if have > 0:
            codes[vector, word] = np.uint32(held)
        squares = np.float32(1) if squares == 0 else squares
        energy = np.float32(1) if energy == 0 else energy
        factor = np.float32(1)
        if scale == MSE:
            factor = (np.float32(0) if inner < 0 else inner) / squares
        elif scale == UNBIASED:
            least = energy / largest
            factor = energy / (least if inner < least else inner)
        root_scale[vector] = to_half(np.sqrt(rms * factor))
