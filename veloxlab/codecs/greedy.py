"""Integer water-filling: which of many components is best given the next bit."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from veloxlab.codecs.packing import WIDEST
from veloxlab.errors import InputError


def greedy_bits(
    weights: Sequence[float],
    budget: int,
    *,
    rates: float | Sequence[float] = 4.0,
    least: int = 0,
    most: int = WIDEST,
) -> tuple[int, ...]:
    """Integer water-filling: the widths of total ``budget`` with the least Σ wᵢ·rᵢ^−bᵢ, one bit at a time.

    Each bit goes where it saves most, wᵢ·rᵢ^−bᵢ·(1 − 1/rᵢ); ties to the lowest index. Optimal, since every term is
    convex in its width. With r = 4 and variances as weights it is the rule argmax λᵢ / 4^bᵢ of SpectralQuant; with
    fitted rates it is RateQuant's.

    Parameters
    ----------
    weights : w ≥ 0 of each component.
    budget : bits to give in all.
    rates : r > 1, by which one more bit divides a component's term; one for all, or one each.
    least, most : bounds of each width.

    Raises
    ------
    InputError : the budget does not fit between the bounds.
    """
    count = len(weights)
    each = [float(rates)] * count if isinstance(rates, int | float) else [float(r) for r in rates]
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
