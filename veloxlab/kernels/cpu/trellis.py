"""Loops of a bitshift trellis: the search for a vector's bit string, and the reader."""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, expander, f32_at, i32_at, i64_at, part, u8_at, u32_at
from veloxlab.kernels.cpu.readers import DIM, OWN, ROWS, place
from veloxlab.kernels.cpu.rows import load, push
from veloxlab.kernels.cpu.turned import cosine_and_sine

_MOST = np.float32(np.inf)
SCALE_BITS, STEPS = 4, 4  # of a vector's scale: its bits, and steps in an octave


@part
def scale_code(y, widths, steps, headroom):
    """Code of a vector's scale, 0 or more: the root-mean-square of the coordinates with bits, plus a headroom."""
    squares, count = np.float32(0), np.float32(0)
    for i in range(len(y)):
        if widths[i] > 0:
            squares += y[i] * y[i]
            count += np.float32(1)
    if not (steps > 0 and squares > 0):  # NaN too
        return 0
    code = np.rint(np.float32(0.5) * steps * np.log2(squares / count) + headroom)
    return np.int64(min(max(code, np.float32(0)), np.float32((1 << SCALE_BITS) - 1)))


@part
def forget(costs, count, width, least, back):
    """For states that become one when their oldest bits are dropped: the least cost, and its state."""
    rest = count >> width
    for r in range(rest):
        least[r] = costs[r]
        back[r] = 0
    for j in range(1, 1 << width):
        base = j * rest
        for r in range(rest):
            better = costs[base + r] < least[r]
            least[r] = costs[base + r] if better else least[r]
            back[r] = np.uint8(j) if better else back[r]
    low = least[0]
    for r in range(1, rest):
        low = least[r] if least[r] < low else low
    for r in range(rest):  # otherwise the smaller costs of later coordinates would be lost in rounding
        least[r] -= low


@part
def extend(least, count, width, levels, number, weight, costs):
    """Costs of all states: the least cost of their predecessors plus their own distance."""
    rest = count >> width
    if width == 1:
        for r in range(rest):
            a, b = number - levels[2 * r], number - levels[2 * r + 1]
            costs[2 * r] = least[r] + weight * (a * a)
            costs[2 * r + 1] = least[r] + weight * (b * b)
    elif width == 2:
        for r in range(rest):
            a, b = number - levels[4 * r], number - levels[4 * r + 1]
            c, d = number - levels[4 * r + 2], number - levels[4 * r + 3]
            costs[4 * r] = least[r] + weight * (a * a)
            costs[4 * r + 1] = least[r] + weight * (b * b)
            costs[4 * r + 2] = least[r] + weight * (c * c)
            costs[4 * r + 3] = least[r] + weight * (d * d)
    else:
        size = 1 << width
        for r in range(rest):
            base, before = r * size, least[r]
            for u in range(size):
                distance = number - levels[base + u]
                costs[base + u] = before + weight * (distance * distance)


@part
def search(y, widths, weights, levels, costs, least, back, codes):
    """The bit string whose levels are nearest to a vector, as the code of each coordinate.

    A state is the newest bits, the first of them highest; ``levels`` ``[9, states]`` have a row for each width.
    """
    dim, count = len(y), levels.shape[1]
    for s in range(count):
        costs[s] = _MOST
    costs[0] = np.float32(0)
    for i in range(dim):
        if widths[i] > 0:
            forget(costs, count, widths[i], least, back[i])
            extend(least, count, widths[i], levels[widths[i]], y[i], weights[i], costs)
    state, best = 0, costs[0]
    for s in range(1, count):
        if costs[s] < best:
            state, best = s, costs[s]
    for i in range(dim - 1, -1, -1):
        width = widths[i]
        codes[i] = state & ((1 << width) - 1)
        if width > 0:
            rest = count >> width
            before = state >> width
            state = before + rest * np.int64(back[i, before])


@part
def nearest(y, widths, levels, codes):
    """The nearest level of each coordinate alone; levels ascend."""
    for i in range(len(y)):
        own, code, step = levels[widths[i]], 0, (1 << widths[i]) >> 1
        while step > 0:
            below = code + step
            code = below if y[i] > np.float32(0.5) * (own[below - 1] + own[below]) else code
            step >>= 1
        codes[i] = code


@compiled
def encode(first, last, x, widths, weights, headroom, levels, backwards, steps, rows):
    """Rows of tokens: the scales of all heads, then each head's bit string.

    ``x`` has the unit coordinates of all heads of a token. ``widths`` and ``weights`` ``[H, D]`` are in the order of a
    string, from each head's last coordinate to its first. ``backwards`` reverses eight bits, or has one number if each
    coordinate is coded alone. Scales have ``steps`` an octave and ``headroom`` ``[H]``, or are 1.
    """
    heads, dim, count = widths.shape[0], widths.shape[1], levels.shape[1]
    y, found = np.empty((heads, dim), np.float32), np.empty((heads, dim), np.int64)
    given = np.empty(heads * dim, np.float32)
    costs, least = np.empty(count, np.float32), np.empty(count, np.float32)
    back, scales = np.empty((dim, count), np.uint8), np.empty(heads, np.int64)
    for vector in range(first, last):
        load(x, vector, heads * dim, given)
        for h in range(heads):
            for i in range(dim):
                y[h, i] = given[h * dim + dim - 1 - i]
            scales[h] = scale_code(y[h], widths[h], steps, headroom[h])
            factor = np.float32(2) ** (-np.float32(scales[h]) / np.float32(STEPS))
            for i in range(dim):
                y[h, i] *= factor
            if len(backwards) > 1:
                search(y[h], widths[h], weights[h], levels, costs, least, back, found[h])
            else:
                nearest(y[h], widths[h], levels, found[h])
        held, have, word = np.uint64(0), 0, 0
        for h in range(heads):
            held, have, word = push(rows[vector], scales[h], SCALE_BITS, held, have, word)
        for h in range(heads):
            for i in range(dim):
                code, width = found[h, i], widths[h, i]
                if len(backwards) > 1:
                    code = np.int64(backwards[code]) >> (8 - width)
                held, have, word = push(rows[vector], code, width, held, have, word)
        if have > 0:
            rows[vector, word] = np.uint32(held)
            word += 1
        for rest in range(word, rows.shape[1]):
            rows[vector, rest] = 0


@compiled
def strings(first, last, x, widths, levels, states):
    """The states of each vector ``[N, D]``, for the training of levels."""
    dim, count = x.shape[1], levels.shape[1]
    costs, least = np.empty(count, np.float32), np.empty(count, np.float32)
    weights = np.ones(dim, np.float32)
    back, codes = np.empty((dim, count), np.uint8), np.empty(dim, np.int64)
    for vector in range(first, last):
        search(x[vector], widths, weights, levels, costs, least, back, codes)
        state = 0
        for i in range(dim):
            state = (state << widths[i] | codes[i]) & (count - 1)
            states[vector, i] = state


@expander
def trellis(description, batch, head, first, count, out):
    """Windows of a row of all heads. Own: coordinates, the most that have bits, and for each [H, 5, coordinates] byte,
    shift, mask, shift up and first level; table, sizes of scales, shifts [H, coordinates] or 0; for positions: that of
    the first token, or −1, angles, fine turns.
    """
    d = i64_at(description)
    dim, coordinates, coded, own = d[DIM], d[OWN], d[OWN + 1], d[OWN + 2] + 20 * d[OWN] * head
    starts, shifts, masks = i32_at(own), u32_at(own + 4 * coordinates), u32_at(own + 8 * coordinates)
    lifts, firsts = u32_at(own + 12 * coordinates), u32_at(own + 16 * coordinates)
    levels, sizes = f32_at(d[OWN + 3]), f32_at(d[OWN + 4])
    for t in range(count):
        row, y = place(description + 8 * ROWS, batch, 0, first + t), f32_at(out + 4 * t * dim)
        scale = sizes[u8_at(row + (head >> 1))[0] >> np.uint8(4 * (head & 1)) & np.uint8(15)]
        for i in range(coded):
            window = (u32_at(row + starts[i])[0] >> shifts[i] & masks[i]) << lifts[i]
            y[i] = levels[firsts[i] + window] * scale
        for i in range(coded, coordinates):
            y[i] = np.float32(0)
        if d[OWN + 5] != 0:
            shift = f32_at(d[OWN + 5] + 4 * head * coordinates)
            for i in range(coordinates):
                y[i] += shift[i]
    if d[OWN + 6] >= 0:
        turns(
            d[OWN + 6] + first, (dim - coordinates) >> 1, d[OWN + 7], d[OWN + 8], count, 4 * dim, out + 4 * coordinates
        )


@part
def turns(position, pairs, angles, fine, count, step, out):
    """Cosines and sines of the angles of tokens' positions, ``step`` bytes apart, by rotation of the first."""
    x, y = f32_at(angles), f32_at(out)
    for i in range(pairs):
        y[i], y[pairs + i] = cosine_and_sine(np.float32(position) * x[i])
    for t in range(1, count):
        turn, z = f32_at(fine + 8 * t * pairs), f32_at(out + t * step)
        for i in range(pairs):
            z[i] = y[i] * turn[i] - y[pairs + i] * turn[pairs + i]
            z[pairs + i] = y[pairs + i] * turn[i] + y[i] * turn[pairs + i]
