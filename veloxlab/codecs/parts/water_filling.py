"""Water-filling: the best allocation of a budget of bits to components of different weight."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.parts import Floats
from veloxlab.codecs.parts.packing import WIDEST
from veloxlab.errors import InputError

Integers = NDArray[np.int64]


def greedy_bits(
    weights: Sequence[float], budget: int, *, rates: float | Sequence[float] = 4.0, least: int = 0, most: int = WIDEST
) -> tuple[int, ...]:
    """Integer water-filling: the widths of total ``budget`` with the least Σ wᵢ·rᵢ^−bᵢ, found one bit at a time.

    Each bit goes where it saves most, wᵢ·rᵢ^−bᵢ·(1 − 1/rᵢ); ties go to the lowest index. This is optimal, because every
    term is convex in its width. With r = 4 and variances as weights it is SpectralQuant's rule argmax λᵢ / 4^bᵢ. With
    fitted ``rates`` above 1, one for all or one each, it is RateQuant's. Raises `InputError` if the budget does not fit
    widths from ``least`` to ``most``.
    """
    count = len(weights)
    each = [float(r) for r in np.broadcast_to(rates, count)]
    if not count * least <= budget <= count * most:
        raise InputError(
            f"A budget of {budget} bits does not fit {count} components of {least} to {most} bits each: "
            f"give from {count * least} to {count * most}."
        )
    widths = [least] * count
    saving = [w * r**-least * (1 - 1 / r) for w, r in zip(weights, each, strict=True)]
    heap = [(-s, i) for i, s in enumerate(saving)] if most > least else []
    heapq.heapify(heap)
    for _ in range(budget - count * least):
        saved, i = heapq.heappop(heap)
        widths[i] += 1
        if widths[i] < most:
            heapq.heappush(heap, (saved / each[i], i))
    return tuple(widths)


_WORD_BITS = 32
LEAST_WORDS = 2  # of a row: loops read eight bytes at a time


def shared_words(savings: Sequence[Floats], overheads: Sequence[int], budget: int) -> list[Integers]:
    """The best widths of the coordinates of several rows of 32-bit words, with ``budget`` words in all.

    ``savings`` ``[n, most]`` of each row are the savings of one more bit for a coordinate of 0, 1, … bits, falling
    along the last axis. ``overheads`` are the other bits of each row. Each row has `LEAST_WORDS` or more. The best bits
    of a row come first, 32 at a time, and words go where they save most. This is optimal, because every row is convex.
    """
    orders, blocks, begins = [], [], []
    for own, overhead in zip(savings, overheads, strict=True):
        orders.append(np.argsort(-own.ravel(), kind="stable"))
        saved = np.concatenate([[0.0], np.cumsum(own.ravel()[orders[-1]])])
        begins.append(max(LEAST_WORDS, -(-overhead // _WORD_BITS)))
        words = np.arange(begins[-1], max(begins[-1], -(-(own.size + overhead) // _WORD_BITS)) + 1)
        blocks.append(np.diff(saved[np.minimum(words * _WORD_BITS - overhead, own.size)]))
    row_of = np.repeat(np.arange(len(blocks)), [len(own) for own in blocks])
    best = np.argsort(-np.concatenate(blocks), kind="stable")[: max(0, budget - sum(begins))]
    words = np.array(begins) + np.bincount(row_of[best], minlength=len(blocks))
    counts = [
        min(count * _WORD_BITS - overhead, own.size)
        for count, overhead, own in zip(words, overheads, savings, strict=True)
    ]
    return [
        np.bincount(order[:count] // own.shape[1], minlength=len(own))
        for order, count, own in zip(orders, counts, savings, strict=True)
    ]


def equal_words(savings: Sequence[Floats], overhead: int, budget: int) -> list[Integers]:
    """Widths with equal bits for all heads; rows as in `shared_words`, each with ``savings`` ``[H, D, most]``.

    Every head has ``overhead`` other bits.
    """
    ends = np.rint(np.cumsum([own[..., 0].size for own in savings]) * budget / sum(own[..., 0].size for own in savings))
    widths = []
    for own, words in zip(savings, np.diff(ends, prepend=0).astype(int), strict=True):
        bits, more = divmod(words * _WORD_BITS - overhead * len(own), len(own))
        orders = [np.argsort(-head.ravel(), kind="stable")[: bits + (h < more)] for h, head in enumerate(own)]
        widths.append(np.stack([np.bincount(order // own.shape[2], minlength=own.shape[1]) for order in orders]))
    return widths


class RowCurve(NamedTuple):
    """Bits and losses of a row's heads at each number of 32-bit words, from the least to the most that it can use."""

    words: Integers  # [W]
    bits: Integers  # [H, W], of all coordinates of a head
    losses: Floats  # [H, W]


class Rows(NamedTuple):
    """Rows of 32-bit words: a row has one token of all KV heads, each with ``overhead`` bits and its coordinates' bits.

    A coordinate of variance σ² and b bits loses ½·σ²·``distortion[b]``. Variances of a row are ``[H, D]``.
    """

    distortion: Floats
    overhead: int

    def curve(self, variances: Floats) -> RowCurve:
        """Bits and losses of a row at each number of words."""
        (savings,), overhead = self.savings([variances]), self.overhead * len(variances)
        order = np.argsort(-savings.reshape(-1), kind="stable")
        first = max(LEAST_WORDS, -(-overhead // _WORD_BITS))
        words = np.arange(first, max(first, -(-(savings.size + overhead) // _WORD_BITS)) + 1)
        counts = np.minimum(words * _WORD_BITS - overhead, savings.size)
        own = order // savings[0].size == np.arange(len(savings))[:, None]  # [H, bits of the row], in order
        saved = np.where(own, savings.reshape(-1)[order], 0.0)
        # summed from the small end, so that losses of many bits are not lost in rounding
        left = np.cumsum(np.pad(saved, ((0, 0), (0, 1)))[:, ::-1], axis=1)[:, ::-1]
        least_lost = variances.sum(axis=1)[:, None] * self.distortion[-1] / 2
        bits = np.cumsum(np.pad(own, ((0, 0), (1, 0))), axis=1)
        return RowCurve(words, bits[:, counts], least_lost + left[:, counts])

    def savings(self, variances: Sequence[Floats]) -> list[Floats]:
        """Savings of one more bit for each coordinate ``[H, D, most]``."""
        return [own[..., None] * (self.distortion[:-1] - self.distortion[1:]) / 2 for own in variances]

    def widths(self, variances: Sequence[Floats], words: int) -> list[Integers]:
        """Bits of all coordinates ``[H, D]`` of each row with the least loss in ``words`` words together."""
        savings = [own.reshape(-1, len(self.distortion) - 1) for own in self.savings(variances)]
        found = shared_words(savings, [self.overhead * len(own) for own in variances], words)
        return [bits.reshape(own.shape) for bits, own in zip(found, variances, strict=True)]

    def words(self, widths: Integers) -> int:
        """Words of a row with these bits of coordinates ``[H, D]``."""
        return max(LEAST_WORDS, -(-int(self.overhead * len(widths) + widths.sum()) // _WORD_BITS))
