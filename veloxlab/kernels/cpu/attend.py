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
from veloxlab.kernels.cpu.rows import transform

TILE: Final = 32  # tokens that are expanded together
LEAST: Final = np.float32(np.finfo(np.float32).min)
_LOG2_E: Final = np.float32(math.log2(math.e))

# where a call's numbers are: sizes, addresses, and strides in bytes
(BATCH, KV_HEADS, SHARED, LENGTH, KEY, VALUE, CODED_KEY, CODED_VALUE, SPLITS) = range(9)
(Q, Q_CODED, K_SIGNS, K_HARTLEY, V_SIGNS, V_HARTLEY, MASK, LOGITS, MIXED, SUMS, OUT, OUT_CODED) = range(9, 21)
Q_STRIDES, MASK_STRIDES, COUNTS, KEYS, VALUES, NUMBERS = 21, 24, 28, 31, 34, 37


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
def hartley_of(address, dim):
    """The Hartley matrix at an address, of vectors of ``dim`` = m·2^k numbers, m odd: ``[m, m]``."""
    odd = dim // (dim & -dim)
    return carray(f32_at(address), (odd, odd))


@part
def load_queries(job, scale, b, h, plain, coded, spare):
    """The scaled queries of a KV head, as they are, and in the space of the keys' codes."""
    length, dim, codes = job[LENGTH], job[KEY], job[CODED_KEY]
    rows = job[SHARED] * length
    for r in range(rows):
        head, token = h * job[SHARED] + r // length, r % length
        x = f32_at(job[Q] + b * job[Q_STRIDES] + head * job[Q_STRIDES + 1] + token * job[Q_STRIDES + 2])
        for i in range(dim):
            plain[r, i] = x[i] * scale
    if job[K_SIGNS] != 0:
        signs, hartley = f32_at(job[K_SIGNS]), hartley_of(job[K_HARTLEY], dim)
        for r in range(rows):
            for i in range(dim):
                coded[r, i] = plain[r, i] * signs[i]
            transform(coded[r], dim, hartley, spare)
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


@part
def score_tile(job, b, h, packed, queries, keys, scales, position, count, scores):
    """Scores of all query rows and a tile of keys, of which the first is at ``position``."""
    rows, dim = scores.shape[0], keys.shape[1]
    for r in range(rows):
        score(queries, keys, r, count, dim, scores)
        if packed:
            for t in range(count):
                scores[r, t] *= scales[t]
        if job[MASK] != 0:
            add_mask(job, b, h, r, position, count, scores)


@part
def weigh_tile(scores, count, top, total, sums):
    """Make the scores of a tile weights, of the largest score so far, and scale what was summed before down to it."""
    for r in range(scores.shape[0]):
        most, part_total = top[r], np.float32(0)
        for t in range(count):
            most = scores[r, t] if scores[r, t] > most else most
        shrink = exponential(top[r] - most)
        top[r] = most
        if shrink != 1:
            for i in range(sums.shape[2]):
                sums[0, r, i] *= shrink
                sums[1, r, i] *= shrink
        for t in range(count):
            scores[r, t] = exponential(scores[r, t] - most)
            part_total += scores[r, t]
        total[r] = total[r] * shrink + part_total


@part
def mix_tile(weights, scales, values, count, mixed):
    """Add a tile's weighted values."""
    for r in range(weights.shape[0]):
        for t in range(count):
            weight = weights[r, t] * scales[t]
            for i in range(values.shape[1]):
                mixed[r, i] += weight * values[t, i]


@part
def load_scales(d, packed, b, h, first, count, scales):
    """Scales of some tokens; 1 of exact ones."""
    for t in range(count):
        scales[t] = scale_of(d, b, h, first + t) if packed else np.float32(1)


@part
def keep_sums(job, split, b, h, top, total, sums):
    """Write what a piece of work found, for `combine`."""
    rows, largest = sums.shape[1], sums.shape[2]
    row = ((split * job[BATCH] + b) * job[KV_HEADS] + h) * rows
    out, out_sums = f32_at(job[MIXED] + row * 2 * largest * 4), f32_at(job[SUMS] + row * 8)
    for r in range(rows):
        out_sums[2 * r], out_sums[2 * r + 1] = top[r], total[r]
        for i in range(largest):
            out[2 * r * largest + i] = sums[0, r, i]
            out[(2 * r + 1) * largest + i] = sums[1, r, i]


@compiled
def attend(job, scale, first, last):
    """Do pieces ``first`` to ``last``."""
    job = i64_at(job)
    heads, rows = job[KV_HEADS], job[SHARED] * job[LENGTH]
    largest_key, largest_value = max(job[KEY], job[CODED_KEY]), max(job[VALUE], job[CODED_VALUE])
    plain, coded = np.empty((rows, job[KEY]), np.float32), np.empty((rows, job[CODED_KEY]), np.float32)
    sums, spare = np.empty((2, rows, largest_value), np.float32), np.empty(largest_key, np.float32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    weights, scales = np.empty((rows, TILE), np.float32), np.empty(TILE, np.float32)
    tile = np.empty(TILE * max(largest_key, largest_value), np.float32)
    address, tokens = tile.ctypes.data, job[COUNTS] + job[COUNTS + 1] + job[COUNTS + 2]
    for piece in range(first, last):
        split, b, h = piece // (job[BATCH] * heads), piece // heads % job[BATCH], piece % heads
        load_queries(job, scale, b, h, plain, coded, spare)
        sums[:], top[:], total[:] = 0, LEAST, 0
        begin, end, start = tokens * split // job[SPLITS], tokens * (split + 1) // job[SPLITS], 0
        for run in range(3):
            packed = run == 1
            keys, values = job[KEYS + run], job[VALUES + run]
            key_dim, value_dim = job[CODED_KEY if packed else KEY], job[CODED_VALUE if packed else VALUE]
            stop = min(end, start + job[COUNTS + run])
            for position in range(max(begin, start), stop, TILE):
                count, token = min(TILE, stop - position), position - start
                call_expander(i64_at(keys)[FUNCTION], keys, b, h, token, count, address)
                load_scales(i64_at(keys), packed, b, h, token, count, scales)
                expanded = carray(f32_at(address), (TILE, key_dim))
                queries = coded if packed else plain
                score_tile(job, b, h, packed, queries, expanded, scales, position, count, weights)
                weigh_tile(weights, count, top, total, sums)
                call_expander(i64_at(values)[FUNCTION], values, b, h, token, count, address)
                load_scales(i64_at(values), packed, b, h, token, count, scales)
                mix_tile(weights, scales, carray(f32_at(address), (TILE, value_dim)), count, sums[run & 1])
            start += job[COUNTS + run]
        keep_sums(job, split, b, h, top, total, sums)
    return tile.size  # Numba frees an array after its last use, and an address is none


@compiled
def combine(job):
    """Join the splits: the exact part, to which the packed part is added if it can be rotated back here."""
    job = i64_at(job)
    heads, rows, dim, codes = job[KV_HEADS], job[SHARED] * job[LENGTH], job[VALUE], job[CODED_VALUE]
    largest, all_rows = max(dim, codes), job[BATCH] * job[KV_HEADS] * rows
    mixed, sums, out = f32_at(job[MIXED]), f32_at(job[SUMS]), f32_at(job[OUT])
    coded, spare = np.empty(codes, np.float32), np.empty(codes, np.float32)
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
                coded[i] += factor * mixed[(2 * at + 1) * largest + i]
        for i in range(dim):
            out[y + i] /= total
        for i in range(codes):
            coded[i] /= total
        if job[V_SIGNS] != 0:
            transform(coded, codes, hartley_of(job[V_HARTLEY], codes), spare)
            signs = f32_at(job[V_SIGNS])
            for i in range(dim):
                out[y + i] += coded[i] * signs[i]
        else:
            packed = f32_at(job[OUT_CODED] + row * codes * 4)
            for i in range(codes):
                packed[i] = coded[i]
