"""The loops for sums of entries that are rotated to their positions, as in CommVQ."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from veloxlab.kernels.cpu.machine import expander, f32_at, half, i64_at, part, u8_at, u16_at
from veloxlab.kernels.cpu.readers import DIM, OWN, ROWS, place

_TURN: Final = math.pi / 2


@part
def cosine_and_sine(angle):
    """Cosine and sine of an angle in radians, to 3e-7."""
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
    """Sums of entries, rotated to their positions. Own: stages, rotated coordinates, 1 if neighbours, table, angles."""
    d = i64_at(description)
    dim, stages, rotated, neighbours = d[DIM], d[OWN], d[OWN + 1], d[OWN + 2]
    entries = d[OWN + 3] + head * stages * 64 * dim * 2
    y, pairs = f32_at(out), dim // 2
    total = np.empty(dim, np.float32)  # in the order of the table
    for t in range(count):
        x, at = u8_at(place(description + 8 * ROWS, batch, head, first + t)), t * dim
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
    """Add entry a and i times entry b; pairs are by halves of the coordinates from ``begin`` on."""
    for i in range(begin, begin + pairs):
        total[i] += half(a[i]) - half(b[i + pairs])
    for i in range(begin, begin + pairs):
        total[i + pairs] += half(a[i + pairs]) + half(b[i])


@part
def turn(y, pairs, angles, token):
    """Rotate pairs of neighbours to a token's position; the first of ``angles`` is the position of token 0."""
    position = angles[0] + np.float32(token)
    for pair in range(pairs):
        cosine, sine = cosine_and_sine(position * angles[1 + pair])
        x = y[2 * pair]
        y[2 * pair] = x * cosine - y[2 * pair + 1] * sine
        y[2 * pair + 1] = x * sine + y[2 * pair + 1] * cosine
