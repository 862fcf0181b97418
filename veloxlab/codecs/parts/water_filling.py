"""Water-filling: how components of different weight best share a budget of bits."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.parts import Floats
from veloxlab.codecs.parts.packing import WIDEST
from veloxlab.errors import InputError

Integers = NDArray[np.int64]


def greedy_bits(
    weights: Sequence[float], budget: int, *, rates: float | Sequence[float] = 4.0, least: int = 0, most: int = WIDEST
) -> tuple[int, ...]:
    """Integer water-filling: the widths of total ``budget`` with the least Σ wᵢ·rᵢ^−bᵢ, one bit at a time.

    Each bit goes where it saves most, wᵢ·rᵢ^−bᵢ·(1 − 1/rᵢ); ties to the lowest index. Optimal, as every term is convex
    in its width. With r = 4 and variances as weights it is SpectralQuant's rule argmax λᵢ / 4^bᵢ; with fitted ``rates``
    above 1, one for all or one each, RateQuant's. Raises `InputError` if the budget does not fit widths from ``least``
    to ``most``.
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
    """Widths of the coordinates of several rows of whole 32-bit words, ``budget`` words in all, that save most.

    ``savings`` are of each row what one more bit of a coordinate of 0, 1, … bits saves ``[n, most]``, falling along the
    last axis, and ``overheads`` the bits that it has besides. Each row has `LEAST_WORDS` or more. The best bits of a
    row come first, 32 at a time, and words go where they save most: that is the optimum, as every row is convex.
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
    """Widths where all heads share alike: of rows of words as in `shared_words`, ``savings`` ``[H, D, most]`` of each.

    Every head has ``overhead`` bits besides.
    """
    ends = np.rint(np.cumsum([own[..., 0].size for own in savings]) * budget / sum(own[..., 0].size for own in savings))
    widths = []
    for own, words in zip(savings, np.diff(ends, prepend=0).astype(int), strict=True):
        bits, more = divmod(words * _WORD_BITS - overhead * len(own), len(own))
        orders = [np.argsort(-head.ravel(), kind="stable")[: bits + (h < more)] for h, head in enumerate(own)]
        widths.append(np.stack([np.bincount(order // own.shape[2], minlength=own.shape[1]) for order in orders]))
    return widths


class RowCurve(NamedTuple):
    """What a row's heads get of each number of 32-bit words, from the least to the most that it can use, and lose."""

    words: Integers  # [W]
    bits: Integers  # [H, W], of all coordinates of a head
    losses: Floats  # [H, W]


class Rows(NamedTuple):
    """Rows of 32-bit words: each has a token of all KV heads, and each head ``overhead`` bits besides its coordinates'.

    A coordinate of variance σ² and b bits loses ½·σ²·``distortion[b]``. Variances of a row are ``[H, D]``.
    """

    distortion: Floats
    overhead: int

    def curve(self, variances: Floats) -> RowCurve:
        """What a row gets and loses with each number of words."""
        (savings,), overhead = self.savings([variances]), self.overhead * len(variances)
        order = np.argsort(-savings.reshape(-1), kind="stable")
        first = max(LEAST_WORDS, -(-overhead // _WORD_BITS))
        words = np.arange(first, max(first, -(-(savings.size + overhead) // _WORD_BITS)) + 1)
        counts = np.minimum(words * _WORD_BITS - overhead, savings.size)
        own = order // savings[0].size == np.arange(len(savings))[:, None]  # [H, bits of the row], in order
        saved = np.where(own, savings.reshape(-1)[order], 0.0)
        # summed from the small end, so that losses of many bits are no rounding of those of few
        left = np.cumsum(np.pad(saved, ((0, 0), (0, 1)))[:, ::-1], axis=1)[:, ::-1]
        least_lost = variances.sum(axis=1)[:, None] * self.distortion[-1] / 2
        bits = np.cumsum(np.pad(own, ((0, 0), (1, 0))), axis=1)
        return RowCurve(words, bits[:, counts], least_lost + left[:, counts])

    def savings(self, variances: Sequence[Floats]) -> list[Floats]:
        """What one more bit of each coordinate saves ``[H, D, most]``."""
        return [own[..., None] * (self.distortion[:-1] - self.distortion[1:]) / 2 for own in variances]

    def widths(self, variances: Sequence[Floats], words: int) -> list[Integers]:
        """Bits of all coordinates ``[H, D]`` of each row, so that rows lose least in so many words together."""
        savings = [own.reshape(-1, len(self.distortion) - 1) for own in self.savings(variances)]
        found = shared_words(savings, [self.overhead * len(own) for own in variances], words)
        return [bits.reshape(own.shape) for bits, own in zip(found, variances, strict=True)]

    def words(self, widths: Integers) -> int:
        """Words of a row with these bits of coordinates ``[H, D]``."""
        return max(LEAST_WORDS, -(-int(self.overhead * len(widths) + widths.sum()) // _WORD_BITS))


class DistortionFit(NamedTuple):
    """A quantizer's distortion at b bits, ``alpha · beta ** -b``, relative to the variance."""

    alpha: float
    beta: float


def fit_distortion(bits: Sequence[float], distortions: Sequence[float]) -> DistortionFit:
    """Least squares of ln D on b, over measured ``distortions`` > 0 at two or more ``bits`` (the paper: 2 to 6)."""
    widths, values = np.asarray(bits, np.float64), np.asarray(distortions, np.float64)
    if len(widths) != len(values) or len(set(widths.tolist())) < 2 or not (values > 0).all():
        raise InputError(
            f"A fit takes as many distortions above 0 as widths, at two widths or more: it was given widths "
            f"{widths.tolist()} and distortions {values.tolist()}."
        )
    slope, intercept = np.polyfit(widths, np.log(values), 1)
    return DistortionFit(float(np.exp(intercept)), float(np.exp(-slope)))


def continuous_bits(
    weights: Sequence[float],
    mean_bits: float,
    beta: float | Sequence[float],
    *,
    least: float = -np.inf,
    most: float = np.inf,
) -> Floats:
    """Widths, not whole, that lose least: bᵢ = b̄ + (ln wᵢ − mean ln w)/ln β, kept within bounds (RateQuant, Thm 2).

    ``weights`` are wᵢ·αᵢ > 0; ``beta`` above 1 is what one bit divides the distortion by, one for all or one each. One
    more bit saves the same everywhere, wᵢ·ln βᵢ·βᵢ^−bᵢ, but on the bounds.
    """
    logs = np.log(_positive(weights))
    rates = np.log(np.broadcast_to(_rates(beta), len(logs)))
    if not least <= mean_bits <= most:
        raise InputError(f"A mean of {mean_bits} bits does not fit widths from {least} to {most}: choose between them.")
    worth = logs + np.log(rates)  # ln of what a bit saves at 0 bits; bits are (worth + level) / rate
    level = (mean_bits * len(logs) - (worth / rates).sum()) / (1 / rates).sum()
    free = (worth + level) / rates
    low = least if np.isfinite(least) else free.min()  # others that meet the upper bound only leave it more
    high = most if np.isfinite(most) else free.max()
    # Σ clip((worth + level) / rate) is straight between the levels at which a component meets a bound
    bends = np.sort(np.concatenate([low * rates - worth, high * rates - worth]))
    totals = [np.clip((worth + bend) / rates, low, high).sum() for bend in bends]
    level = np.interp(mean_bits * len(logs), totals, bends)
    return np.asarray(np.clip((worth + level) / rates, low, high))


def integer_bits(
    weights: Sequence[float], mean_bits: float, beta: float | Sequence[float], *, least: int = 2, most: int = 8
) -> tuple[int, ...]:
    """Whole widths that lose least, by marginal gain (RateQuant, .4): `greedy_bits` with a budget of ⌊b̄·N⌋ bits."""
    budget = int(np.floor(mean_bits * len(weights) + 1e-9))  # 2.7 · 10 is 27 bits, whatever the float says
    return greedy_bits([float(w) for w in weights], budget, rates=_rates(beta), least=least, most=most)


def loss(weights: Sequence[float], bits: Sequence[float], beta: float | Sequence[float]) -> float:
    """Σ wᵢ·βᵢ^−bᵢ: what the widths ``bits`` lose, by the model."""
    rates, widths = np.asarray(beta, np.float64), np.asarray(bits, np.float64)
    return float((np.asarray(weights, np.float64) * rates**-widths).sum())


def water_filling_gain(weights: Sequence[float]) -> float:
    """AM/GM of the weights: by how much one width for all loses more than the continuous optimum (RateQuant, Thm 3)."""
    positive = _positive(weights)
    return float(positive.mean() / np.exp(np.log(positive).mean()))


def _positive(weights: Sequence[float]) -> Floats:
    array = np.asarray(weights, np.float64)
    if array.size == 0 or not (np.isfinite(array) & (array > 0)).all():
        raise InputError(f"Water-filling takes one or more weights above 0, and was given {array.tolist()}.")
    return array


def _rates(beta: float | Sequence[float]) -> Any:  # noqa: ANN401 - one number, or an array of them
    rates = np.asarray(beta, np.float64)
    if not (rates > 1).all():
        raise InputError(f"beta={beta} does not fall: one more bit has to divide the distortion by more than 1.")
    return rates
