"""Attention of a few queries over sinks, packed and recent tokens in one pass, with an online softmax.

A piece of work is a split of the tokens of one KV head. It expands tile by tile, once for all query heads that share
the tokens, and sums values; `combine` joins the splits. Threads share the pieces.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from veloxlab.kernels.cpu.machine import call_expander, compiled, f32_at, float_of_bits, i64_at, part
from veloxlab.kernels.cpu.readers import FUNCTION, load_scales
from veloxlab.kernels.cpu.rows import transform

TILE: Final = 32  # tokens that are expanded together
LEAST: Final = np.float32(np.finfo(np.float32).min)
_TANH_IS_ONE: Final = np.float32(20)  # from there on, in float32
_LOG2_E: Final = np.float32(math.log2(math.e))

# indices of a call's numbers: sizes, addresses, and strides in bytes; those from `CHANGING` on differ by call
(BATCH, KV_HEADS, SHARED, LENGTH, KEY, VALUE, CODED_KEY, CODED_VALUE, K_SIGNS, K_HARTLEY, V_SIGNS, V_HARTLEY) = range(
    12
)
KEYS, VALUES, COUNTS, CHANGING = 12, 15, 18, 20
(SPLITS, MASK, LOGITS, MIXED, SUMS, OUT, OUT_CODED, Q_CODED, Q) = range(21, 30)
Q_STRIDES, MASK_STRIDES, NUMBERS = 30, 33, 37


@part
def exponential(x):
    """e^x of x at most 0, to 3e-7."""
    y = x * _LOG2_E
    small = y < np.float32(-126)
    y = np.float32(-126) if small else y
    whole = np.floor(y + np.float32(0.5))
    f = y - whole
    p = np.float32(1.5316464e-4)
    p = p * f + np.float32(1.3393044e-3)
    p = p * f + np.float32(9.6180735e-3)
    p = p * f + np.float32(5.5503293e-2)
    p = p * f + np.float32(2.4022652e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    power = float_of_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    return np.float32(0) if small else p * power


@part
def load_queries(job, scale, b, h, plain, coded, spare):
    """The scaled queries of a KV head, plain and in the space of the keys' codes."""
    length, dim, codes = job[LENGTH], job[KEY], job[CODED_KEY]
    rows = job[SHARED] * length
    for r in range(rows):
        head, token = h * job[SHARED] + r // length, r % length
        x = f32_at(job[Q] + b * job[Q_STRIDES] + head * job[Q_STRIDES + 1] + token * job[Q_STRIDES + 2])
        y, z = f32_at(plain + 4 * r * dim), f32_at(coded + 4 * r * codes)
        for i in range(dim):
            y[i] = x[i] * scale
        if job[K_SIGNS] != 0:
            signs = f32_at(job[K_SIGNS])
            for i in range(dim):
                z[i] = y[i] * signs[i]
            transform(coded + 4 * r * dim, dim, job[K_HARTLEY], spare)
        elif job[Q_CODED] != 0:
            x = f32_at(job[Q_CODED] + 4 * ((b * job[KV_HEADS] + h) * rows + r) * codes)
            for i in range(codes):
                z[i] = x[i] * scale


@part
def score_tile(job, cap, b, h, queries, keys, dim, scales, position, count, scores):
    """Scores of all query rows and a tile of keys, of which the first is at ``position``."""
    length, factors = job[LENGTH], f32_at(scales)
    for r in range(job[SHARED] * length):
        q, y = f32_at(queries + 4 * r * dim), f32_at(scores + 4 * r * TILE)
        for t in range(count):
            x, total = f32_at(keys + 4 * t * dim), np.float32(0)
            for i in range(dim):
                total += q[i] * x[i]
            y[t] = total
        for t in range(count):
            y[t] *= factors[t]
        if cap > 0:
            for t in range(count):
                x = min(abs(y[t] / cap), _TANH_IS_ONE)
                power = exponential(np.float32(-2) * x)
                bent = cap * (np.float32(1) - power) / (np.float32(1) + power)
                y[t] = bent if y[t] > 0 else -bent
        if job[MASK] != 0:
            head, token = h * job[SHARED] + r // length, r % length
            row = job[MASK] + b * job[MASK_STRIDES] + head * job[MASK_STRIDES + 1] + token * job[MASK_STRIDES + 2]
            for t in range(count):
                y[t] += f32_at(row + (position + t) * job[MASK_STRIDES + 3])[0]


@part
def weigh_tile(scores, count, found, largest):
    """Convert a row's scores to weights relative to the largest score so far, and rescale the earlier sums."""
    x, y = f32_at(scores), f32_at(found)
    most, total = y[0], np.float32(0)
    for t in range(count):
        most = x[t] if x[t] > most else most
    shrink = exponential(y[0] - most)
    if shrink != 1:
        for i in range(2, 2 * largest + 2):
            y[i] *= shrink
    for t in range(count):
        x[t] = exponential(x[t] - most)
        total += x[t]
    y[0], y[1] = most, y[1] * shrink + total


@part
def mix_tile(weights, scales, values, count, dim, mixed):
    """Add a tile's values with a row of weights."""
    factors, own, z = f32_at(weights), f32_at(scales), f32_at(mixed)
    for t in range(count):
        weight, x = factors[t] * own[t], f32_at(values + 4 * t * dim)
        for i in range(dim):
            z[i] += weight * x[i]


@compiled
def attend(job, scale, cap, first, last):
    """Do pieces ``first`` to ``last``. The result of a query row: the largest score, the sum of weights, and sums.

    The sums are of plain values and of values in the space of the codes, each with room for the larger of both.
    """
    job = i64_at(job)
    heads, rows = job[KV_HEADS], job[SHARED] * job[LENGTH]
    largest = max(job[VALUE], job[CODED_VALUE])
    widest, each = max(largest, max(job[KEY], job[CODED_KEY])), 2 * largest + 2
    room = np.empty(rows * (2 * widest + each + TILE) + (TILE + 1) * widest + TILE, np.float32)
    plain = np.int64(room.ctypes.data)
    coded, found = plain + 4 * rows * widest, plain + 8 * rows * widest
    weights = found + 4 * rows * each
    scales = weights + 4 * rows * TILE
    spare, tile = scales + 4 * TILE, scales + 4 * (TILE + widest)
    tokens = job[COUNTS] + job[COUNTS + 1] + job[COUNTS + 2]
    for piece in range(first, last):
        split, b, h = piece // (job[BATCH] * heads), piece // heads % job[BATCH], piece % heads
        load_queries(job, scale, b, h, plain, coded, spare)
        y = f32_at(found)
        for i in range(rows * each):
            y[i] = np.float32(0) if i % each else LEAST
        begin, end, start = tokens * split // job[SPLITS], tokens * (split + 1) // job[SPLITS], 0
        for run in range(3):
            keys, values, queries = job[KEYS + run], job[VALUES + run], coded if run == 1 else plain
            key_dim, value_dim = job[CODED_KEY if run == 1 else KEY], job[CODED_VALUE if run == 1 else VALUE]
            stop = min(end, start + job[COUNTS + run])
            for position in range(max(begin, start), stop, TILE):
                count, token = min(TILE, stop - position), position - start
                call_expander(i64_at(keys)[FUNCTION], keys, b, h, token, count, tile)
                load_scales(keys, b, h, token, count, scales)
                score_tile(job, cap, b, h, queries, tile, key_dim, scales, position, count, weights)
                call_expander(i64_at(values)[FUNCTION], values, b, h, token, count, tile)
                load_scales(values, b, h, token, count, scales)
                for r in range(rows):
                    own = found + 4 * r * each
                    weigh_tile(weights + 4 * r * TILE, count, own, largest)
                    mixed = own + 8 + 4 * largest * (run & 1)
                    mix_tile(weights + 4 * r * TILE, scales, tile, count, value_dim, mixed)
            start += job[COUNTS + run]
        row = ((split * job[BATCH] + b) * heads + h) * rows
        z, sums = f32_at(job[MIXED] + 8 * row * largest), f32_at(job[SUMS] + 8 * row)
        for r in range(rows):
            sums[2 * r], sums[2 * r + 1] = y[r * each], y[r * each + 1]
            for i in range(2 * largest):
                z[2 * r * largest + i] = y[r * each + 2 + i]
    return room.size  # Numba frees an array after its last use, and an address is none


@compiled
def combine(job):
    """Join the splits of the exact part; add the packed part if it can be rotated back here."""
    job = i64_at(job)
    heads, rows, dim, codes = job[KV_HEADS], job[SHARED] * job[LENGTH], job[VALUE], job[CODED_VALUE]
    largest, all_rows = max(dim, codes), job[BATCH] * job[KV_HEADS] * rows
    room, sums, signs = np.empty(2 * codes, np.float32), f32_at(job[SUMS]), f32_at(job[V_SIGNS])
    for row in range(all_rows):
        head = row // rows % heads * job[SHARED] + row % rows // job[LENGTH]
        coded_at = job[OUT_CODED] + 4 * row * codes if job[V_SIGNS] == 0 else np.int64(room.ctypes.data)
        out, coded = f32_at(job[OUT] + 4 * row * dim), f32_at(coded_at)
        top, total = LEAST, np.float32(0)
        for split in range(job[SPLITS]):
            most = sums[2 * (split * all_rows + row)]
            top = most if most > top else top
        if job[LOGITS] != 0:
            logit = f32_at(job[LOGITS])[head]
            top = logit if logit > top else top
            total = exponential(logit - top)
        for split in range(job[SPLITS]):
            at = split * all_rows + row
            total += exponential(sums[2 * at] - top) * sums[2 * at + 1]
        for i in range(dim):
            out[i] = 0
        for i in range(codes):
            coded[i] = 0
        for split in range(job[SPLITS]):
            at = split * all_rows + row
            factor, mixed = exponential(sums[2 * at] - top) / total, f32_at(job[MIXED] + 8 * at * largest)
            for i in range(dim):
                out[i] += factor * mixed[i]
            for i in range(codes):
                coded[i] += factor * mixed[largest + i]
        if job[V_SIGNS] != 0:
            transform(coded_at, codes, job[V_HARTLEY], coded_at + 4 * codes)
            for i in range(dim):
                out[i] += coded[i] * signs[i]
    return room.size
