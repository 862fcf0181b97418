"""Loops over stages with pairs of entries: a vector is approximated by Σ T_a + i·T_b; its first half are real parts.

A stage's table ``T`` is ``[D, 64]``, first the real parts, then the imaginary ones, one column for an entry. Because
``i·T`` is a rotation of ``T``, one pass over the table gives the products of a vector with both. The joint term of a
and b, ``2·T_a·(i·T_b)``, is antisymmetric.
"""

from __future__ import annotations

import numpy as np

from veloxlab.kernels.cpu.machine import compiled, part
from veloxlab.kernels.cpu.rows import head_of, load, pack_bytes, root_mean_square, scale_factor, to_half
from veloxlab.kernels.cpu.wide import COUNT as ENTRIES
from veloxlab.kernels.cpu.wide import least_of_differences, least_of_sums, turned_products

INDEX_BITS = 6
_F32_BYTES = 4
_TOGETHER = 32  # vectors that use a stage's table one after the other
_GREATEST = np.float32(3.4028234663852886e38)


@part
def distances(r, table, norms, of_a, of_b):
    """The terms in a and in b of ‖r − T_a − i·T_b‖² − ‖r‖², without the joint term."""
    turned_products(r.ctypes.data, table.ctypes.data, len(r) // 2, of_a.ctypes.data, of_b.ctypes.data)
    for j in range(ENTRIES):
        of_a[j] = norms[j] - 2 * of_a[j]
        of_b[j] = norms[j] - 2 * of_b[j]


@part
def search(of_a, of_b, both, means, rounds, likely, a, b):
    """The best (a, b) of several descents from the likeliest a, which alternate between the best a and the best b.

    Descents that meet are merged.
    """
    of_a_at, of_b_at, both_at, likely_at = of_a.ctypes.data, of_b.ctypes.data, both.ctypes.data, likely.ctypes.data
    count, row = len(a), _F32_BYTES * ENTRIES
    for j in range(ENTRIES):
        likely[j] = of_a[j]
    for s in range(count):
        a[s] = least_of_sums(likely_at, means.ctypes.data)
        likely[a[s]] = _GREATEST
    for _ in range(rounds):
        for s in range(count):
            b[s] = least_of_sums(of_b_at, both_at + row * a[s])
        for s in range(count):
            a[s] = least_of_differences(of_a_at, both_at + row * b[s])
        different = 0
        for s in range(count):
            own = True
            for t in range(different):
                own = own and (a[t] != a[s] or b[t] != b[s])
            if own:
                a[different], b[different] = a[s], b[s]
                different += 1
        count = different
    best, least = 0, _GREATEST
    for s in range(count):
        distance = of_a[a[s]] - both[b[s], a[s]] + of_b[b[s]]
        if distance < least:
            best, least = s, distance
    return a[best], b[best]


@part
def subtract(r, table, a, b):
    """Subtract ``T_a + i·T_b`` from a vector."""
    half = len(r) // 2
    for p in range(half):
        r[p] -= table[p, a] - table[half + p, b]
        r[half + p] -= table[half + p, a] + table[p, b]


@compiled
def encode_sums(first, last, x, order, tables, norms, both, means, starts, rounds, scale, most, codes, root_scale):
    """Codes of each stage, 6 bits for a and 6 for b, and the scale of their sum.

    For each head and stage there are ``tables`` ``[H, R, D, 64]``, ``norms`` and ``means`` ``[H, R, 64]``, and ``both``
    ``[H, R, 64, 64]``. ``order`` has the indices of the real parts, then of the imaginary ones.
    """
    stages, dim = tables.shape[1], tables.shape[2]
    row, y = np.empty(dim, np.float32), np.empty((_TOGETHER, dim), np.float32)
    left, rms = np.empty((_TOGETHER, dim), np.float32), np.empty(_TOGETHER, np.float32)
    found = np.empty((_TOGETHER, 2 * stages), np.int32)
    of_a, of_b = np.empty(ENTRIES, np.float32), np.empty(ENTRIES, np.float32)
    likely, tried = np.empty(ENTRIES, np.float32), np.empty((2, starts), np.int64)
    begin = first
    while begin < last:
        head, count = head_of(x, begin), 0
        while count < _TOGETHER and begin + count < last and head_of(x, begin + count) == head:
            load(x, begin + count, dim, row)
            size = root_mean_square(row, dim)
            unit = np.float32(1) if size == 0 else size
            for i in range(dim):
                y[count, i] = row[order[i]] / unit
                left[count, i] = y[count, i]
            rms[count] = size
            count += 1
        for stage in range(stages):
            table = tables[head, stage]
            for v in range(count):
                distances(left[v], table, norms[head, stage], of_a, of_b)
                a, b = search(of_a, of_b, both[head, stage], means[head, stage], rounds, likely, tried[0], tried[1])
                subtract(left[v], table, a, b)
                found[v, 2 * stage], found[v, 2 * stage + 1] = a, b
        for v in range(count):
            inner, squares = np.float32(0), np.float32(0)
            for i in range(dim):
                coded = y[v, i] - left[v, i]
                inner += y[v, i] * coded
                squares += coded * coded
            factor = scale_factor(scale, inner, squares, dim)
            factor = np.float32(0) if factor < 0 else factor
            factor = most if factor > most else factor
            root_scale[begin + v] = to_half(np.sqrt(rms[v] * factor))
            pack_bytes(found[v], INDEX_BITS, codes[begin + v])
        begin += count


@compiled
def descend(first, last, x, table, norms, both, b, new_a, new_b):
    """The best a for each vector's b, then the best b for that."""
    of_a, of_b, nothing = np.empty(ENTRIES, np.float32), np.empty(ENTRIES, np.float32), np.zeros(ENTRIES, np.float32)
    row = _F32_BYTES * ENTRIES
    for v in range(first, last):
        distances(x[v], table, norms, of_a, of_b)
        start = b[v]
        if start < 0:  # the b that is best alone
            start = least_of_sums(of_b.ctypes.data, nothing.ctypes.data)
        new_a[v] = least_of_differences(of_a.ctypes.data, both.ctypes.data + row * start)
        new_b[v] = least_of_sums(of_b.ctypes.data, both.ctypes.data + row * new_a[v])


@compiled
def search_all(first, last, x, table, norms, both, means, starts, rounds, a, b):
    """A best (a, b) for each vector."""
    of_a, of_b = np.empty(ENTRIES, np.float32), np.empty(ENTRIES, np.float32)
    likely, tried = np.empty(ENTRIES, np.float32), np.empty((2, starts), np.int64)
    for v in range(first, last):
        distances(x[v], table, norms, of_a, of_b)
        a[v], b[v] = search(of_a, of_b, both, means, rounds, likely, tried[0], tried[1])


@compiled
def add_up(first, last, x, a, b, of_a, of_b, together):
    """Add vectors to the sums of their a and their b, and count the pairs."""
    for v in range(first, last):
        together[a[v], b[v]] += 1
        for i in range(x.shape[1]):
            of_a[a[v], i] += x[v, i]
        for i in range(x.shape[1]):
            of_b[b[v], i] += x[v, i]
