"""The loop of the recursive polar transform: angles of pairs, of pairs of radii, and so on."""

from __future__ import annotations

import numpy as np
from numba import carray

from veloxlab.kernels.cpu.encode import nearest_levels
from veloxlab.kernels.cpu.machine import compiled, part, u8_at
from veloxlab.kernels.cpu.rows import MSE, NORM, load, pack_bytes, to_half, transform

_PI, _HALF_PI, _QUARTER_PI = np.float32(np.pi), np.float32(np.pi / 2), np.float32(np.pi / 4)
_EIGHTH = np.float32(np.tan(np.pi / 8))  # up to which the polynomial is accurate to 1e-7


@part
def angle(y, x):
    """The angle of (x, y), from −π to π; 0 of (0, 0)."""
    wide, high = abs(x), abs(y)
    large, small = (high, wide) if high > wide else (wide, high)
    t = small / (np.float32(1) if large == 0 else large)
    t = np.float32(1) if small == large and large > 0 else t  # of infinite ones too
    far = t > _EIGHTH
    t = (t - np.float32(1)) / (t + np.float32(1)) if far else t
    z = t * t
    p = np.float32(8.05374449538e-2) * z - np.float32(1.38776856032e-1)
    p = (p * z + np.float32(1.99777106478e-1)) * z - np.float32(3.33329491539e-1)
    found = p * z * t + t + (_QUARTER_PI if far else np.float32(0))
    found = _HALF_PI - found if high > wide else found
    found = _PI - found if x < 0 else found
    return -found if y < 0 else found


@part
def halve(radii, count, angles):
    """Angles of ``count`` pairs of radii; the radii of the pairs replace them."""
    for i in range(count):
        angles[i] = angle(radii[2 * i + 1], radii[2 * i])
    for i in range(count):
        radii[i] = np.sqrt(radii[2 * i] * radii[2 * i] + radii[2 * i + 1] * radii[2 * i + 1])


@part
def assign(radii, dim, widths, edges, angles, codes):
    """Codes of the angles of all levels of a vector, level by level; the radii of its blocks remain."""
    begin, edge, around = 0, 0, 1 << widths[0]
    for level in range(len(widths)):
        count, bounds = dim >> (level + 1), (1 << widths[level]) - 1
        halve(radii, count, angles)
        own = codes[begin : begin + count]
        if level == 0:  # a circle has no end
            for i in range(count):
                own[i] = np.int32(np.floor(angles[i] * (np.float32(around) / (2 * _PI)))) & np.int32(around - 1)
        else:
            nearest_levels(angles, count, edges[edge : edge + bounds], widths[level], own)
            edge += bounds
        begin += count


@part
def rescale(y, codes, widths, circles, scale, directions, inner, radii):
    """The radii of a vector's blocks for the decoded directions."""
    dim, levels, blocks = len(y), len(widths), len(inner)
    begin, entry, block = dim - (dim >> levels), len(circles), dim // blocks
    for b in range(blocks):
        directions[b] = np.float32(1)
    for level in range(levels - 1, -1, -1):
        count, entry = dim >> (level + 1), entry - (1 << widths[level])
        begin -= count
        for i in range(count - 1, -1, -1):
            size, place = directions[i], entry + codes[begin + i]
            directions[2 * i], directions[2 * i + 1] = size * circles[place, 0], size * circles[place, 1]
    squares, kept = np.float32(0), np.float32(0)
    for b in range(blocks):
        total = np.float32(0)
        for i in range(b * block, (b + 1) * block):
            total += y[i] * directions[i]
        inner[b] = total
        squares += radii[b] * radii[b]
        kept += radii[b] * total
    for b in range(blocks):
        if scale == MSE:
            radii[b] = inner[b]
        else:  # unbiased: one factor for the whole vector
            radii[b] *= squares / (np.float32(1) if kept == 0 else kept)


@part
def gather(codes, dim, widths, bits, together):
    """Join the codes of the levels of one width, and count them."""
    begin, filled = 0, 0
    for level in range(len(widths)):
        count = dim >> (level + 1)
        if widths[level] == bits:
            for i in range(count):
                together[filled + i] = codes[begin + i]
            filled += count
        begin += count
    return filled


@compiled
def encode_angles(first, last, x, dim, signs, hartley, widths, edges, circles, fields, scale, root_rms):
    """Codes of the angles of each level, and the radius of each block of ``2**len(widths)`` coordinates.

    ``edges`` between angles are of all levels but the first, level by level, and ``circles``, cosine and sine, of all.
    ``fields`` have address, bytes and bits for each width: levels of one width are packed together.
    """
    blocks = root_rms.shape[1]
    y, spare, radii = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    angles, directions, inner = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(blocks, np.float32)
    codes, together = np.empty(dim, np.int32), np.empty(dim, np.int32)
    size = np.sqrt(np.float32(dim // blocks))
    for vector in range(first, last):
        load(x, vector, dim, y)
        if signs is not None:  # otherwise vectors are rotated already
            for i in range(dim):
                y[i] *= signs[i]
            transform(np.int64(y.ctypes.data), dim, np.int64(hartley.ctypes.data), np.int64(spare.ctypes.data))
        for i in range(dim):
            radii[i] = y[i]
        assign(radii, dim, widths, edges, angles, codes)
        if scale != NORM:
            rescale(y, codes, widths, circles, scale, directions, inner, radii)
        for b in range(blocks):
            root_rms[vector, b] = to_half(np.sqrt(radii[b] / size))
        for f in range(len(fields)):
            width, bits = fields[f, 1], fields[f, 2]
            filled = gather(codes, dim, widths, bits, together)
            pack_bytes(together[:filled], bits, carray(u8_at(fields[f, 0] + vector * width), width))
    return spare.size  # Numba frees an array after its last use, and an address is none
