"""Expected results of kernels, written a second time with MLX operations: codes by their readers, and attention."""

import math
from itertools import accumulate

import mlx.core as mx
import numpy as np

from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels.readers import (
    GroupsReader,
    PlanReader,
    PolarReader,
    SumsReader,
    TableReader,
    TrellisReader,
    WidthsReader,
)


def expand(reader):
    """Return vectors ``[B, H, S, dim]``, float32."""
    levels = LEVELS[type(reader)](reader)
    if reader.scales is not None:
        scales = reader.scales
        if isinstance(reader, WidthsReader):  # they are in the order that heads are stored in
            scales = scales[:, reader.heads[:, 2]]
        levels = levels * mx.square(scales.astype(mx.float32))
    shifts = getattr(reader, "shifts", None)
    return levels if shifts is None else levels + shifts[None, :, None]


def bits_at(rows, first, bits):
    """Return numbers of ``bits`` bits (one width, or ``[n]``) that begin at bits ``first`` ``[n]``, uint32, LSB first.

    ``rows``: words ``[..., words]`` or bytes. The numbers are ``[..., n]``, uint32. A number of no bits is 0.
    """
    if rows.dtype == mx.uint8:
        rows = mx.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 4)]).view(mx.uint32)
    last = rows.shape[-1] - 1
    word, shift = first // 32, (first % 32).astype(mx.uint64)
    following = mx.take(rows, mx.minimum(word + 1, last), axis=-1).astype(mx.uint64) << 32
    both = mx.take(rows, mx.minimum(word, last), axis=-1).astype(mx.uint64) | following
    mask = (mx.array(1, mx.uint64) << mx.array(bits, mx.uint64)) - 1
    return ((both >> shift) & mask).astype(mx.uint32)


def codes_of(rows, count, bits):
    return bits_at(rows, mx.arange(count, dtype=mx.uint32) * bits, bits)


def table_levels(reader):
    count = reader.dim // reader.table.shape[1]
    index = codes_of(reader.rows, count, reader.bits)
    if reader.fine is not None:
        index = index << reader.bits | codes_of(reader.fine, count, reader.bits)
    return mx.take(reader.table, index, axis=0).reshape(*reader.rows.shape[:3], reader.dim)


def widths_levels(reader):
    parts = []
    for bits, first, _, level in reader.heads.tolist():
        together = 2 if bits <= 4 else 1
        index, count = bits * together, together << (bits * together)
        row = reader.rows[:, 0, :, first : first + -(-reader.dim * bits // 32)]
        levels = reader.table[level : level + count].reshape(-1, together)
        codes = codes_of(row, reader.dim // together, index)
        parts.append(mx.take(levels, codes, axis=0).reshape(*row.shape[:2], reader.dim))
    return mx.stack(parts, axis=1)


def plan_levels(reader):
    words = reader.plan[: reader.dim]
    first, width = words & 0x1FFF, words >> 13 & 0xF
    codes = bits_at(reader.rows, first, width.astype(mx.uint64))
    levels = mx.take(reader.plan[reader.dim :].view(mx.float32), codes + (words >> 17))
    factor, shift = (reader.fit[None, :, None, :, i] for i in (0, 1))
    return levels * factor + shift


def groups_levels(reader):
    codes = codes_of(reader.rows, reader.dim, reader.bits).astype(mx.float32)
    group = mx.arange(reader.dim) // reader.group
    roots = (mx.take(a, group, axis=-1).astype(mx.float32) for a in (reader.half_steps, reader.leasts))
    half_step, least = (root * mx.abs(root) for root in roots)
    return least + (codes + (0.5 if reader.centred else 0.0)) * (2 * half_step)


def polar_levels(reader):
    first = dict.fromkeys(reader.widths, 0)  # bit of each row where the next level begins
    codes = []
    entries = accumulate((1 << bits for bits in reader.widths), initial=0)
    for (level, bits), entry in zip(enumerate(reader.widths, 1), entries, strict=False):
        row = reader.rows if bits == reader.widths[0] else reader.other
        count = reader.dim >> level
        codes.append(entry + bits_at(row, first[bits] + mx.arange(count, dtype=mx.uint32) * bits, bits))
        first[bits] += count * bits
    y = mx.square(reader.radii.astype(mx.float32)) * math.sqrt(2 ** len(reader.widths))
    for of_level in reversed(codes):
        y = mx.flatten(y[..., None] * mx.take(reader.table, of_level, axis=0), -2)
    return y


def sums_levels(reader):
    count, heads = 2 * reader.table.shape[1], reader.kv_heads
    indices = codes_of(reader.rows, count, 6)
    pairs = Rope(reader.rotated, reader.traditional).pairs(reader.dim)
    x, y = (reader.table.astype(mx.float32)[..., mx.array(pairs[:, i])] for i in (0, 1))
    both = mx.stack([mx.stack([x, y], axis=-1), mx.stack([-y, x], axis=-1)], axis=2)  # entry, i · entry
    flat = both.reshape(heads * count * 64, reader.dim)
    first = 64 * mx.arange(heads * count, dtype=mx.uint32).reshape(heads, 1, count)
    total = mx.take(flat, indices + first, axis=0).sum(axis=-2)
    if reader.angles is None:
        return total
    turn = (reader.angles[0] + mx.arange(reader.tokens))[:, None] * reader.angles[1:]
    cosine, sine = mx.cos(turn), mx.sin(turn)
    x, y = total[..., 0::2], total[..., 1::2]
    return mx.flatten(mx.stack([x * cosine - y * sine, x * sine + y * cosine], axis=-1), -2)


def trellis_levels(reader):
    """Walk each head's string of bits from its begin, the last coordinate; only widths are read from the windows."""
    states = reader.table.size // 9
    table, widths = reader.table.reshape(9, states), np.array(reader.windows)[..., 3] // states
    alone = (np.array(reader.windows)[..., 1] + 1 == 1 << widths).all()  # windows of the scalar form are the codes
    heads, begin, scales = [], 4 * len(widths), codes_of(reader.rows[:, 0], len(widths), 4)
    for head, own in enumerate(widths.tolist()):
        state, levels = mx.zeros(reader.rows[:, 0].shape[:2], mx.uint32), []
        for width in reversed(own):
            code = bits_at(reader.rows[:, 0], mx.array([begin], mx.uint32), width)[..., 0]
            begin += width
            state = code if alone else (state >> width) | code * (states >> width)
            levels.append(mx.take(table[width], state) if width else mx.zeros(state.shape))
        heads.append(mx.stack(levels[::-1], axis=-1) * mx.power(2.0, scales[..., head, None] / 4))
    y = mx.stack(heads, axis=1)
    if reader.angles is None:
        return y
    angles = np.array(reader.angles, np.float64)  # in float32 1,000,000 radians have an error of 0.03
    turn = (angles[0] + np.arange(reader.tokens))[:, None] * angles[1:]
    turned = mx.array(np.concatenate([np.cos(turn), np.sin(turn)], axis=-1).astype(np.float32))
    return mx.concatenate([y, mx.broadcast_to(turned, (*y.shape[:3], turned.shape[-1]))], axis=-1)


LEVELS = {
    TableReader: table_levels,
    WidthsReader: widths_levels,
    PlanReader: plan_levels,
    GroupsReader: groups_levels,
    PolarReader: polar_levels,
    SumsReader: sums_levels,
    TrellisReader: trellis_levels,
}


def attend(queries, tokens):
    """Return the exact and the coded part of attention over expanded tokens, in float32, each ``[B, H, Hq/H · L, ·]``.

    ``queries.coded`` must be given.
    """
    q, coded_queries = queries.q, queries.coded
    grouped = q.astype(mx.float32).reshape(*coded_queries.shape[:3], -1)
    runs = [run for run in (tokens.sinks, tokens.recent) if run is not None]
    scores = [grouped @ run.keys.astype(mx.float32).swapaxes(-1, -2) for run in runs]
    scores.insert(int(tokens.sinks is not None), coded_queries @ expand(tokens.keys).swapaxes(-1, -2))
    joined = mx.concatenate(scores, axis=-1) * queries.scale
    if queries.cap is not None:
        joined = mx.tanh(joined / queries.cap) * queries.cap
    if queries.mask is not None:
        full = mx.broadcast_to(queries.mask, (*q.shape[:3], joined.shape[-1]))
        joined = joined + full.reshape(joined.shape)
    if queries.logits is not None:  # after the tokens, so that their places stay
        beside = mx.broadcast_to(queries.logits[None, :, None, None], (*q.shape[:3], 1))
        joined = mx.concatenate([joined, beside.reshape(*joined.shape[:-1], 1)], axis=-1)
    weights = mx.softmax(joined, axis=-1)
    sinks, recent = tokens.exact_counts
    packed_end = sinks + tokens.keys.tokens
    coded = weights[..., sinks:packed_end] @ expand(tokens.values)
    plain = mx.zeros((*grouped.shape[:-1], tokens.value_dim))
    end = packed_end + recent
    for run, part in ((tokens.sinks, weights[..., :sinks]), (tokens.recent, weights[..., packed_end:end])):
        if run is not None:
            plain = plain + part @ run.values.astype(mx.float32)
    return plain, coded
