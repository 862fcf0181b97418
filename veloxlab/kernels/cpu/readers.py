"""The readers of codes in loops: a function for each layout, which expands some tokens of a head to float32.

A description is an array of int64: the function's address, the dimension, then address and three strides in bytes (of
batch entry, head and token) of the rows and of the scales, then the layout's own numbers, in its function's order.
"""

from __future__ import annotations

import math

import numpy as np

from veloxlab.kernels.cpu.machine import (
    expander,
    f32_at,
    float_of_bits,
    half,
    i32_at,
    i64_at,
    part,
    u8_at,
    u16_at,
    u32_at,
    u64_at,
)
from veloxlab.kernels.cpu.rows import FLOAT16, FLOAT32, signed_square

FUNCTION, DIM, ROWS, SCALES, PLACES, OWN = 0, 1, 2, 6, 10, 11  # indices in a description


@part
def place(at, batch, head, token):
    """Address of a token's row, in the array whose address and strides are at ``at``."""
    d = i64_at(at)
    return d[0] + batch * d[1] + head * d[2] + token * d[3]


@part
def load_scales(description, batch, head, first, count, scales):
    """The factors of expanded tokens: the squares of the stored roots, or 1."""
    d, y = i64_at(description), f32_at(scales)
    place_of_head = head if d[PLACES] == 0 else i64_at(d[PLACES])[head]
    row = place(description + 8 * SCALES, batch, place_of_head, first)
    for t in range(count):
        x = np.float32(1) if d[SCALES] == 0 else half(u16_at(row + t * d[SCALES + 3])[0])
        y[t] = x * x


@expander
def exact(description, batch, head, first, count, out):
    """Exact tokens. Own: their type."""
    d = i64_at(description)
    dim, kind, y = d[DIM], d[OWN], f32_at(out)
    for t in range(count):
        row, at = place(description + 8 * ROWS, batch, head, first + t), t * dim
        if kind == FLOAT32:
            x = f32_at(row)
            for i in range(dim):
                y[at + i] = x[i]
        elif kind == FLOAT16:
            x16 = u16_at(row)
            for i in range(dim):
                y[at + i] = half(x16[i])
        else:
            x16 = u16_at(row)
            for i in range(dim):
                y[at + i] = float_of_bits(np.uint32(x16[i]) << np.uint32(16))


@part
def next_code(x, bits, left, have, word):
    """The next code of a row of bits, and the state: remaining bits, their number, the next word."""
    if have < bits:
        left |= np.uint64(x[word]) << np.uint64(have)
        word += 1
        have += 32
    code = left & np.uint64((1 << bits) - 1)
    return np.int64(code), left >> np.uint64(bits), have - bits, word


@part
def look_up(row, bits, codes, width, table, out):
    """Look up an entry of ``width`` numbers, 1 or even, for each of the ``codes`` of a row."""
    x, words, pairs, entries, y = u8_at(row), u32_at(row), width >> 1, u64_at(table), u64_at(out)
    numbers, z, left, have, word = f32_at(table), f32_at(out), np.uint64(0), bits - bits, bits - bits
    if bits == 8 and pairs == 1:
        for i in range(codes):
            y[i] = entries[x[i]]
    elif bits == 8 and pairs == 2:
        for i in range(codes):
            code = np.int64(x[i])
            y[2 * i] = entries[2 * code]
            y[2 * i + 1] = entries[2 * code + 1]
    elif bits == 8 and pairs == 4:
        for i in range(codes):
            code = np.int64(x[i])
            for j in range(4):
                y[4 * i + j] = entries[4 * code + j]
    elif bits == 8 and pairs > 0:
        for i in range(codes):
            for j in range(pairs):
                y[pairs * i + j] = entries[pairs * x[i] + j]
    elif bits == 8:
        for i in range(codes):
            z[i] = numbers[x[i]]
    elif bits == 6 and pairs == 1 and codes % 4 == 0:
        for i in range(codes // 4):
            four = np.int64(x[3 * i]) | np.int64(x[3 * i + 1]) << 8 | np.int64(x[3 * i + 2]) << 16
            y[4 * i] = entries[four & 63]
            y[4 * i + 1] = entries[four >> 6 & 63]
            y[4 * i + 2] = entries[four >> 12 & 63]
            y[4 * i + 3] = entries[four >> 18]
    else:
        for i in range(codes):
            code, left, have, word = next_code(words, bits, left, have, word)
            if pairs == 0:
                z[i] = numbers[code]
            for j in range(pairs):
                y[i * pairs + j] = entries[code * pairs + j]


@expander
def table(description, batch, head, first, count, out):
    """Codes of one width. Own: bits, entry size, table, shifts [H, dim] or 0, place of their scales.

    If vectors are shifted, they are scaled before.
    """
    d = i64_at(description)
    dim, bits, width, entries, shifts = d[DIM], d[OWN], d[OWN + 1], d[OWN + 2], d[OWN + 3]
    for t in range(count):
        y = out + t * dim * 4
        look_up(place(description + 8 * ROWS, batch, head, first + t), bits, dim // width, width, entries, y)
        if shifts != 0:
            shift, z, scale = f32_at(shifts + head * dim * 4), f32_at(y), np.float32(1)
            if d[OWN + 4] != 0:
                root = half(u16_at(place(description + 8 * (OWN + 4), batch, head, first + t))[0])
                scale = root * root
            for i in range(dim):
                z[i] = z[i] * scale + shift[i]


@expander
def stages(description, batch, head, first, count, out):
    """Codes of two rows; those of the first are the high bits of an index. Own: bits, entry size, table, rows."""
    d = i64_at(description)
    dim, bits, width, entries, y = d[DIM], d[OWN], d[OWN + 1], f32_at(d[OWN + 2]), f32_at(out)
    for t in range(count):
        x = u32_at(place(description + 8 * ROWS, batch, head, first + t))
        fine = u32_at(place(description + 8 * (OWN + 3), batch, head, first + t))
        left, have, word = np.uint64(0), bits - bits, bits - bits
        fine_left, at = np.uint64(0), t * dim
        for i in range(dim // width):
            code, left, _, _ = next_code(x, bits, left, have, word)
            fine_code, fine_left, have, word = next_code(fine, bits, fine_left, have, word)
            entry = (code << bits | fine_code) * width
            y[at + i * width] = entries[entry]
            if width == 2:
                y[at + i * 2 + 1] = entries[entry + 1]


@expander
def widths(description, batch, head, first, count, out):
    """A width for each head. Own: for each head bits of an index, entry size, first byte, table."""
    d = i64_at(description)
    own, dim = i64_at(d[OWN] + head * 32), d[DIM]
    for t in range(count):
        row = place(description + 8 * ROWS, batch, 0, first + t) + own[2]
        look_up(row, own[0], dim // own[1], own[1], own[3], out + t * dim * 4)


@expander
def plan(description, batch, head, first, count, out):
    """A width for each coordinate. Own: for each [dim] byte, shift, mask and first level; levels, fit [H, 2, dim]."""
    d = i64_at(description)
    dim = d[DIM]
    starts, shifts, masks, first_levels = (
        i32_at(d[OWN]),
        u32_at(d[OWN] + 4 * dim),
        u32_at(d[OWN] + 8 * dim),
        u32_at(d[OWN] + 12 * dim),
    )
    levels, factors, sums = (
        f32_at(d[OWN + 1]),
        f32_at(d[OWN + 2] + head * dim * 8),
        f32_at(d[OWN + 2] + head * dim * 8 + 4 * dim),
    )
    for t in range(count):
        row, y = place(description + 8 * ROWS, batch, head, first + t), f32_at(out + 4 * t * dim)
        for i in range(dim):
            code = (u32_at(row + starts[i])[0] >> shifts[i]) & masks[i]
            y[i] = levels[first_levels[i] + code] * factors[i] + sums[i]


@expander
def groups(description, batch, head, first, count, out):
    """Equal steps. Own: bits, coordinates of a group, 1 if levels are in the middle, half steps, least numbers."""
    d = i64_at(description)
    dim, bits, group, y = d[DIM], d[OWN], d[OWN + 1], f32_at(out)
    shift = np.float32(0.5) if d[OWN + 2] == 1 else np.float32(0)
    for t in range(count):
        x, at = u32_at(place(description + 8 * ROWS, batch, head, first + t)), t * dim
        left, have, word = np.uint64(0), bits - bits, bits - bits
        half_steps = u16_at(place(description + 8 * (OWN + 3), batch, head, first + t))
        leasts = u16_at(place(description + 8 * (OWN + 7), batch, head, first + t))
        for g in range((dim + group - 1) // group):
            step = 2 * signed_square(half(half_steps[g]))
            begin = signed_square(half(leasts[g])) + shift * step
            for i in range(g * group, min(g * group + group, dim)):
                code, left, have, word = next_code(x, bits, left, have, word)
                y[at + i] = begin + step * np.float32(code)


@expander
def polar(description, batch, head, first, count, out):
    """Radii and trees of angles. Own: levels, other rows, radii, and for each level bits, row, first bit and table.

    If bytes hold whole angles, the table has cosines and sines of all angles in a byte, ``width`` numbers; else of one.
    """
    d = i64_at(description)
    dim, levels, of_levels = d[DIM], d[OWN], i64_at(d[OWN + 9])
    blocks, size = dim >> levels, np.float32(math.sqrt(1 << levels))
    room = np.empty(2 * count * dim, np.float32)
    source = np.int64(room.ctypes.data)
    factors, target = source + 4 * count * dim, out
    if levels & 1 == 0:
        source, target = target, source
    y = f32_at(source)
    for t in range(count):
        radii = u16_at(place(description + 8 * (OWN + 5), batch, head, first + t))
        for i in range(blocks):
            root = half(radii[i])
            y[t * blocks + i] = root * root * size
    for level in range(levels, 0, -1):
        own, nodes = 5 * (level - 1), dim >> level
        bits, bit, width, entries = of_levels[own], of_levels[own + 2], of_levels[own + 3], of_levels[own + 4]
        rows = description + 8 * (OWN + 1 if of_levels[own + 1] == 1 else ROWS)
        for t in range(count):
            row, found = place(rows, batch, head, first + t), factors + 8 * t * nodes
            if width > 0:
                look_up(row + (bit >> 3), 8, 2 * nodes // width, width, entries, found)
            else:
                x, circles, last, f = u8_at(row), f32_at(entries), bit + nodes * bits - 1 >> 3, f32_at(found)
                for node in range(nodes):
                    begin = bit + node * bits
                    both = np.int64(x[begin >> 3]) | np.int64(x[min((begin >> 3) + 1, last)]) << 8
                    code = both >> (begin & 7) & ((1 << bits) - 1)
                    f[2 * node], f[2 * node + 1] = circles[2 * code], circles[2 * code + 1]
        y, z, f = f32_at(source), f32_at(target), f32_at(factors)
        for i in range(count * nodes):
            z[2 * i], z[2 * i + 1] = y[i] * f[2 * i], y[i] * f[2 * i + 1]
        source, target = target, source
    room[0] = 0  # Numba frees an array after its last use, and an address is none
