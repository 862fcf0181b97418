"""How the loops read codes: a function for each layout, which expands some tokens of a head to float32.

A description is an array of int64: the function's address, the dimension, then address and three strides in bytes (of
batch entry, head and token) of the rows and of the scales, then what the layout needs, in the order of its function.
"""

from __future__ import annotations

import math
from typing import Final

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

FUNCTION, DIM, ROWS, SCALES, PLACES, OWN = 0, 1, 2, 6, 10, 11  # where they are in a description
_TURN: Final = math.pi / 2


@part
def place(d, at, batch, head, token):
    """Address of a token's row of the array that is described at ``at``."""
    return d[at] + batch * d[at + 1] + head * d[at + 2] + token * d[at + 3]


@part
def stored_scale(d, at, batch, head, token):
    """The scale of a token whose root is in the array that is described at ``at``; 1 if there is none."""
    if d[at] == 0:
        return np.float32(1)
    x = half(u16_at(place(d, at, batch, head, token))[0])
    return x * x


@part
def scale_of(d, batch, head, token):
    """What an expanded token is to be multiplied with."""
    place_of_head = head if d[PLACES] == 0 else i64_at(d[PLACES])[head]
    return stored_scale(d, SCALES, batch, place_of_head, token)


@expander
def exact(description, batch, head, first, count, out):
    """Tokens that are not compressed. Own: their type."""
    d = i64_at(description)
    dim, kind, y = d[DIM], d[OWN], f32_at(out)
    for t in range(count):
        row, at = place(d, ROWS, batch, head, first + t), t * dim
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
def next_code(x, bits, state):
    """The next code of a row of bits, and the state: bits that are left of the words read, how many, the next word."""
    left, have, word = state
    if have < bits:
        left |= np.uint64(x[word]) << np.uint64(have)
        word += 1
        have += 32
    code = left & np.uint64((1 << bits) - 1)
    return np.int64(code), (left >> np.uint64(bits), have - bits, word)


@part
def look_up(row, bits, codes, width, table, out):
    """Entries of ``width`` numbers for each of the ``codes`` of a row."""
    if width > 1:
        look_up_pairs(row, bits, codes, width // 2, u64_at(table), u64_at(out))
        return
    entries, y = f32_at(table), f32_at(out)
    if bits == 8:
        x = u8_at(row)
        for i in range(codes):
            y[i] = entries[x[i]]
        return
    words, state = u32_at(row), (np.uint64(0), 0, 0)
    for i in range(codes):
        code, state = next_code(words, bits, state)
        y[i] = entries[code]


@part
def look_up_pairs(row, bits, codes, pairs, entries, y):
    """The same for entries of so many pairs of numbers, which are moved together."""
    x = u8_at(row)
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
    elif bits == 6 and pairs == 1 and codes % 4 == 0:
        for i in range(codes // 4):
            four = np.int64(x[3 * i]) | np.int64(x[3 * i + 1]) << 8 | np.int64(x[3 * i + 2]) << 16
            y[4 * i] = entries[four & 63]
            y[4 * i + 1] = entries[four >> 6 & 63]
            y[4 * i + 2] = entries[four >> 12 & 63]
            y[4 * i + 3] = entries[four >> 18]
    else:
        words, state = u32_at(row), (np.uint64(0), 0, 0)
        for i in range(codes):
            code, state = next_code(words, bits, state)
            for j in range(pairs):
                y[i * pairs + j] = entries[code * pairs + j]


@expander
def table(description, batch, head, first, count, out):
    """Codes of one width. Own: bits, numbers of an entry, table, a second stage's rows, shifts [H, dim], their scales.

    Zeros stand for what is not there. Where vectors are shifted, the scale goes before the sum.
    """
    d = i64_at(description)
    dim, bits, width, entries, shifts = d[DIM], d[OWN], d[OWN + 1], d[OWN + 2], d[OWN + 7]
    for t in range(count):
        row, y = place(d, ROWS, batch, head, first + t), out + t * dim * 4
        if d[OWN + 3] == 0:
            look_up(row, bits, dim // width, width, entries, y)
        else:
            fine = place(d, OWN + 3, batch, head, first + t)
            look_up_stages(row, fine, bits, dim // width, width, f32_at(entries), f32_at(y))
        if shifts != 0:
            scale, shift, z = (
                stored_scale(d, OWN + 8, batch, head, first + t),
                f32_at(shifts + head * dim * 4),
                f32_at(y),
            )
            for i in range(dim):
                z[i] = z[i] * scale + shift[i]


@part
def look_up_stages(row, fine, bits, codes, width, entries, y):
    """Entries of pairs of codes of two rows, the first one's in the high bits."""
    x, z = u32_at(row), u32_at(fine)
    state, fine_state = (np.uint64(0), 0, 0), (np.uint64(0), 0, 0)
    for i in range(codes):
        code, state = next_code(x, bits, state)
        fine_code, fine_state = next_code(z, bits, fine_state)
        at = (code << bits | fine_code) * width
        y[i * width] = entries[at]
        if width == 2:
            y[i * 2 + 1] = entries[at + 1]


@expander
def widths(description, batch, head, first, count, out):
    """A width for each head. Own: of each head bits of an index, numbers of an entry, first byte, table."""
    d = i64_at(description)
    own, dim = i64_at(d[OWN] + head * 32), d[DIM]
    for t in range(count):
        row = place(d, ROWS, batch, 0, first + t) + own[2]
        look_up(row, own[0], dim // own[1], own[1], own[3], out + t * dim * 4)


@expander
def plan(description, batch, head, first, count, out):
    """A width for each coordinate. Own: words of a row, [dim] first bits, widths, first levels; levels, [H, dim, 2]."""
    d = i64_at(description)
    dim, last = d[DIM], d[OWN] - 1
    begins, bits, first_levels, levels = i32_at(d[OWN + 1]), i32_at(d[OWN + 2]), i32_at(d[OWN + 3]), f32_at(d[OWN + 4])
    fit, y = f32_at(d[OWN + 5] + head * dim * 8), f32_at(out)
    for t in range(count):
        x, at = u32_at(place(d, ROWS, batch, head, first + t)), t * dim
        for i in range(dim):
            word = begins[i] >> 5
            both = np.uint64(x[word]) | np.uint64(x[min(word + 1, last)]) << np.uint64(32)
            code = np.int64(both >> np.uint64(begins[i] & 31)) & ((1 << bits[i]) - 1)
            y[at + i] = levels[first_levels[i] + code] * fit[2 * i] + fit[2 * i + 1]


@expander
def groups(description, batch, head, first, count, out):
    """Equal steps. Own: bits, coordinates of a group, 1 if levels are in the middle, half steps, least numbers."""
    d = i64_at(description)
    dim, bits, group, y = d[DIM], d[OWN], d[OWN + 1], f32_at(out)
    shift = np.float32(0.5) if d[OWN + 2] == 1 else np.float32(0)
    for t in range(count):
        x, at, state = u32_at(place(d, ROWS, batch, head, first + t)), t * dim, (np.uint64(0), 0, 0)
        half_steps = u16_at(place(d, OWN + 3, batch, head, first + t))
        leasts = u16_at(place(d, OWN + 7, batch, head, first + t))
        for g in range((dim + group - 1) // group):
            step = 2 * signed_square(half(half_steps[g]))
            begin = signed_square(half(leasts[g])) + shift * step
            for i in range(g * group, min(g * group + group, dim)):
                code, state = next_code(x, bits, state)
                y[at + i] = begin + step * np.float32(code)


@expander
def polar(description, batch, head, first, count, out):
    """Radii and trees of angles. Own: levels, circles [entries, 2], other rows, radii, of each level bits and row."""
    d = i64_at(description)
    dim, levels, circles, y = d[DIM], d[OWN], f32_at(d[OWN + 1]), f32_at(out)
    of_levels, blocks = i64_at(d[OWN + 10]), d[DIM] >> d[OWN]
    size = np.float32(math.sqrt(1 << levels))
    for t in range(count):
        at, token = t * dim, first + t
        radii = u16_at(place(d, OWN + 6, batch, head, token))
        for i in range(blocks):
            root = half(radii[i])
            y[at + i] = root * root * size
        for level in range(levels, 0, -1):
            # bits of an angle, which row, the level's first bit there, its first entry
            own = 4 * (level - 1)
            bits, other, bit, entry = of_levels[own], of_levels[own + 1], of_levels[own + 2], of_levels[own + 3]
            x = u8_at(place(d, OWN + 2 if other == 1 else ROWS, batch, head, token))
            for node in range((dim >> level) - 1, -1, -1):  # in place: from the last on
                begin = bit + node * bits
                shift = begin & 7
                code = np.int64(x[begin >> 3]) >> shift
                if shift + bits > 8:
                    code |= np.int64(x[(begin >> 3) + 1]) << (8 - shift)
                circle = 2 * (entry + (code & ((1 << bits) - 1)))
                radius = y[at + node]
                y[at + 2 * node + 1] = radius * circles[circle + 1]
                y[at + 2 * node] = radius * circles[circle]


@part
def cosine_and_sine(angle):
    """Of an angle in radians, to 3e-7."""
    whole = np.floor(np.float64(angle) * (1 / _TURN) + 0.5)
    x = np.float32(np.float64(angle) - whole * _TURN)
    quarter = np.int64(whole) & 3
    z = x * x
    s = ((np.float32(-1.9515296e-4) * z + np.float32(8.3321609e-3)) * z + np.float32(-1.6666655e-1)) * z * x + x
    c = (np.float32(2.443316e-5) * z + np.float32(-1.3887316e-3)) * z + np.float32(4.1666646e-2)
    c = c * z * z - np.float32(0.5) * z + np.float32(1)
    cosine, sine = (s, c) if quarter & 1 else (c, s)
    return -cosine if quarter == 1 or quarter == 2 else cosine, -sine if quarter >= 2 else sine


@expander
def sums(description, batch, head, first, count, out):
    """Sums of entries, turned to their positions. Own: stages, rotated coordinates, 1 if neighbours, table, angles."""
    d = i64_at(description)
    dim, stages, rotated, neighbours = d[DIM], d[OWN], d[OWN + 1], d[OWN + 2]
    entries = d[OWN + 3] + head * stages * 64 * dim * 2
    y, pairs = f32_at(out), dim // 2
    total = np.empty(dim, np.float32)  # in the order of the table
    for t in range(count):
        x, at = u8_at(place(d, ROWS, batch, head, first + t)), t * dim
        total[:] = 0
        for stage in range(stages):
            byte = 12 * stage >> 3
            codes = (np.int64(x[byte]) | np.int64(x[byte + 1]) << 8) >> (12 * stage & 7)
            table = entries + stage * 128 * dim
            a, b = u16_at(table + (codes & 63) * dim * 2), u16_at(table + (codes >> 6 & 63) * dim * 2)
            if neighbours == 1:
                for i in range(0, rotated, 2):
                    total[i] += half(a[i]) - half(b[i + 1])
                    total[i + 1] += half(a[i + 1]) + half(b[i])
            else:
                add_halves(total, a, b, 0, rotated // 2)
            add_halves(total, a, b, rotated, (dim - rotated) // 2)
        for pair in range(pairs):
            if pair < rotated // 2:
                i = 2 * pair if neighbours == 1 else pair
                j = i + 1 if neighbours == 1 else i + rotated // 2
            else:
                i, j = pair + rotated // 2, pair + pairs
            y[at + 2 * pair], y[at + 2 * pair + 1] = total[i], total[j]
        if d[OWN + 4] != 0:
            turn(f32_at(out + at * 4), pairs, f32_at(d[OWN + 4]), first + t)


@part
def add_halves(total, a, b, begin, pairs):
    """Add entry a and i times entry b, whose pairs are halves of what begins at ``begin``."""
    for i in range(begin, begin + pairs):
        total[i] += half(a[i]) - half(b[i + pairs])
    for i in range(begin, begin + pairs):
        total[i + pairs] += half(a[i + pairs]) + half(b[i])


@part
def turn(y, pairs, angles, token):
    """Turn pairs of neighbours to a token's position; the first of ``angles`` is the position of token 0."""
    position = angles[0] + np.float32(token)
    for pair in range(pairs):
        cosine, sine = cosine_and_sine(position * angles[1 + pair])
        x = y[2 * pair]
        y[2 * pair] = x * cosine - y[2 * pair + 1] * sine
        y[2 * pair + 1] = x * sine + y[2 * pair + 1] * cosine
