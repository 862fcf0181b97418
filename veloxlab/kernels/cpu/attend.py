"""Attention of a few queries over sinks, packed and recent tokens in one pass, with an online softmax.

A piece of work is a split of the tokens of one KV head. It expands a tile of tokens at a time, once for all query heads
that share them, and keeps sums of values; `combine` joins the splits. Pieces are shared among threads.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import carray

from veloxlab.kernels.cpu.machine import call_expander, compiled, f32_at, float_of_bits, i64_at, part
from veloxlab.kernels.cpu.readers import FUNCTION, scale_of

TILE: Final = 32  # tokens that are expanded together
LEAST: Final = np.float32(np.finfo(np.float32).min)
_LOG2_E: Final = np.float32(math.log2(math.e))

# where a call's numbers are: sizes, addresses, and strides in bytes
(BATCH, KV_HEADS, SHARED, LENGTH, KEY, VALUE, CODED_KEY, CODED_VALUE, SPLITS) = range(9)
(Q, Q_CODED, K_SIGNS, V_SIGNS, MASK, LOGITS, MIXED, SUMS, OUT, OUT_CODED) = range(9, 19)
Q_STRIDES, MASK_STRIDES, COUNTS, KEYS, VALUES, SIZE = 19, 22, 26, 29, 32, 35


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
def rotate(x, rows, dim):
    """Orthonormal Hadamard transform of each row of ``x``, with a Hartley transform of its blocks if dim is m·2^k."""
    block = dim & -dim
    odd = dim // block
    scale = np.float32(1 / math.sqrt(dim))
    mixed = np.empty(odd, np.float32)
    for r in range(rows):
        step = 1
        while step < block:
            for i in range(0, dim, 2 * step):
                for j in range(i, i + step):
                    a, b = x[r, j], x[r, j + step]
                    x[r, j], x[r, j + step] = a + b, a - b
            step *= 2
        if odd > 1:
            for j in range(block):
                for m in range(odd):
                    total = np.float32(0)
                    for n in range(odd):
                        angle = 2 * math.pi * (m * n % odd) / odd
                        total += np.float32(math.cos(angle) + math.sin(angle)) * x[r, n * block + j]
                    mixed[m] = total
                for m in range(odd):
                    x[r, m * block + j] = mixed[m]
        for j in range(dim):
            x[r, j] *= scale


@part
def load_queries(job, scale, b, h, plain, coded):
    """The scaled queries of a KV head, as they are, and in the space of the keys' codes."""
    length, dim, codes = job[LENGTH], job[KEY], job[CODED_KEY]
    rows = job[SHARED] * length
    for r in range(rows):
        head, token = h * job[SHARED] + r // length, r % length
        x = f32_at(job[Q] + b * job[Q_STRIDES] + head * job[Q_STRIDES + 1] + token * job[Q_STRIDES + 2])
        for i in range(dim):
            plain[r, i] = x[i] * scale
    if job[K_SIGNS] != 0:
        signs = f32_at(job[K_SIGNS])
        for r in range(rows):
            for i in range(dim):
                coded[r, i] = plain[r, i] * signs[i]
        rotate(coded, rows, dim)
    elif job[Q_CODED] != 0:
        x = f32_at(job[Q_CODED] + (b * job[KV_HEADS] + h) * rows * codes * 4)
        for r in range(rows):
            for i in range(codes):
                coded[r, i] = x[r * codes + i] * scale


@part
def score(queries, keys, r, count, dim, scores):
    """Inner products of a query with keys."""
    for t in range(count):
        total = np.float32(0)
        for i in range(dim):
            total += queries[r, i] * keys[t, i]
        scores[r, t] = total


@part
def add_mask(job, b, h, r, position, count, scores):
    """Add the mask to the scores of a query row."""
    head, token = h * job[SHARED] + r // job[LENGTH], r % job[LENGTH]
    row = job[MASK] + b * job[MASK_STRIDES] + head * job[MASK_STRIDES + 1] + token * job[MASK_STRIDES + 2]
    for t in range(count):
        scores[r, t] += f32_at(row + (position + t) * job[MASK_STRIDES + 3])[0]


@compiled
def attend(job, scale, first, last):
    """Do pieces ``first`` to ``last``."""
    job = i64_at(job)
    heads, rows = job[KV_HEADS], job[SHARED] * job[LENGTH]
    largest_key, largest_value = max(job[KEY], job[CODED_KEY]), max(job[VALUE], job[CODED_VALUE])
    plain, coded = np.empty((rows, job[KEY]), np.float32), np.empty((rows, job[CODED_KEY]), np.float32)
    sums = np.empty((2, rows, largest_value), np.float32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    tile = np.empty(TILE * max(largest_key, largest_value), np.float32)
    weights = np.empty((rows, TILE), np.float32)
    scales = np.empty(TILE, np.float32)
    address = tile.ctypes.data
    tokens = job[COUNTS] + job[COUNTS + 1] + job[COUNTS + 2]
    for piece in range(first, last):
        split, b, h = piece // (job[BATCH] * heads), piece // heads % job[BATCH], piece % heads
        load_queries(job, scale, b, h, plain, coded)
        sums[:] = 0
        top[:] = LEAST
        total[:] = 0
        begin, end, start = tokens * split // job[SPLITS], tokens * (split + 1) // job[SPLITS], 0
        for run in range(3):
            packed = run == 1
            d, v = i64_at(job[KEYS + run]), i64_at(job[VALUES + run])
            key_dim = job[CODED_KEY] if packed else job[KEY]
            value_dim = job[CODED_VALUE] if packed else job[VALUE]
            queries, mixed = coded if packed else plain, sums[1 if packed else 0]
            stop = min(end, start + job[COUNTS + run])
            for t0 in range(max(begin, start), stop, TILE):
                count, token = min(TILE, stop - t0), t0 - start
                call_expander(d[FUNCTION], job[KEYS + run], b, h, token, count, address)
                keys = carray(f32_at(address), (TILE, key_dim))
                for r in range(rows):
                    score(queries, keys, r, count, key_dim, weights)
                if packed:
                    for t in range(count):
                        scales[t] = scale_of(d, b, h, token + t)
                    for r in range(rows):
                        for t in range(count):
                            weights[r, t] *= scales[t]
                if job[MASK] != 0:
                    for r in range(rows):
                        add_mask(job, b, h, r, t0, count, weights)
                for r in range(rows):
                    most = top[r]
                    for t in range(count):
                        most = weights[r, t] if weights[r, t] > most else most
                    shrink = exponential(top[r] - most)
                    top[r] = most
                    if shrink != 1:
                        for i in range(largest_value):
                            sums[0, r, i] *= shrink
                            sums[1, r, i] *= shrink
                    part_total = np.float32(0)
                    for t in range(count):
                        weights[r, t] = exponential(weights[r, t] - most)
                        part_total += weights[r, t]
                    total[r] = total[r] * shrink + part_total
                call_expander(v[FUNCTION], job[VALUES + run], b, h, token, count, address)
                values = carray(f32_at(address), (TILE, value_dim))
                for t in range(count):
                    scales[t] = scale_of(v, b, h, token + t) if packed else np.float32(1)
                for r in range(rows):
                    for t in range(count):
                        weight = weights[r, t] * scales[t]
                        for i in range(value_dim):
                            mixed[r, i] += weight * values[t, i]
            start += job[COUNTS + run]
        row = (split * job[BATCH] + b) * heads + h
        out, out_sums = f32_at(job[MIXED] + row * rows * 2 * largest_value * 4), f32_at(job[SUMS] + row * rows * 8)
        for r in range(rows):
            out_sums[2 * r], out_sums[2 * r + 1] = top[r], total[r]
            for i in range(largest_value):
                out[2 * r * largest_value + i] = sums[0, r, i]
                out[(2 * r + 1) * largest_value + i] = sums[1, r, i]
    return tile.size  # Numba frees an array after its last use, and an address is none


@compiled
def combine(job):
    """Join the splits: the exact part, to which the packed part is added if it can be rotated back here."""
    job = i64_at(job)
    heads, rows, dim, codes = job[KV_HEADS], job[SHARED] * job[LENGTH], job[VALUE], job[CODED_VALUE]
    largest, all_rows = max(dim, codes), job[BATCH] * job[KV_HEADS] * rows
    mixed, sums, out = f32_at(job[MIXED]), f32_at(job[SUMS]), f32_at(job[OUT])
    coded = np.empty((1, codes), np.float32)
    for row in range(all_rows):
        head = row // rows % heads * job[SHARED] + row % rows // job[LENGTH]
        top, total = LEAST, np.float32(0)
        for split in range(job[SPLITS]):
            most = sums[2 * (split * all_rows + row)]
            top = most if most > top else top
        if job[LOGITS] != 0:
            logit = f32_at(job[LOGITS])[head]
            top = logit if logit > top else top
            total = exponential(logit - top)
        coded[:] = 0
        y = row * dim
        for i in range(dim):
            out[y + i] = 0
        for split in range(job[SPLITS]):
            at = split * all_rows + row
            factor = exponential(sums[2 * at] - top)
            total += factor * sums[2 * at + 1]
            for i in range(dim):
                out[y + i] += factor * mixed[2 * at * largest + i]
            for i in range(codes):
                coded[0, i] += factor * mixed[(2 * at + 1) * largest + i]
        for i in range(dim):
            out[y + i] /= total
        for i in range(codes):
            coded[0, i] /= total
        if job[V_SIGNS] != 0:
            rotate(coded, 1, codes)
            signs = f32_at(job[V_SIGNS])
            for i in range(dim):
                out[y + i] += coded[0, i] * signs[i]
        else:
            packed = f32_at(job[OUT_CODED] + row * codes * 4)
            for i in range(codes):
                packed[i] = coded[0, i]
