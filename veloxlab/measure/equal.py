"""Methods at equal bits: the loss of each at the same bits per value, interpolated between measured caches."""

from __future__ import annotations

import numpy as np
import polars as pl

from veloxlab.measure.frames import schema
from veloxlab.measure.paired import Mean

POINTS = schema("method held_bits window kl_mean")
"""Columns of `at_equal_bits`'s input: method of each measured cache; bits that it holds for a value, with scales,
tables and exact tokens; window of the text, the same for all caches; mean KL of the window in nats."""

EQUAL = schema("method kl_mean below above difference low high")
"""Columns of `at_equal_bits`: method; mean KL in nats at these bits; bits held by the two measured caches below and
above, equal if one cache holds exactly these bits; KL minus that of the first row, and the ends of its 95 %
interval, paired by window, null for a single window."""


def at_equal_bits(points: pl.DataFrame, bits: float) -> pl.DataFrame:
    """Rank methods by their loss at ``bits`` held for a value, the least first: `EQUAL`.

    Between the two nearest measured caches of a method, the logarithm of KL is interpolated linearly in the bits, in
    each window separately: every bit reduces the error by about the same factor. A method without a cache on both sides
    is left out, and so is a cache with a KL of 0 or NaN. ``points``: `POINTS`.
    """
    kl = pl.col("kl_mean")
    whole = (kl.is_finite() & (kl > 0)).all().over("method", "held_bits")
    found: dict[str, tuple[float, float, list[float]]] = {}
    for (method,), own in points.filter(whole).group_by("method", maintain_order=True):
        below, above = (
            own.filter(side)["held_bits"] for side in (pl.col("held_bits") <= bits, pl.col("held_bits") >= bits)
        )
        if below.is_empty() or above.is_empty():
            continue
        low, high = float(below.max()), float(above.min())  # type: ignore[arg-type]  # numbers, for there are rows
        part = (bits - low) / (high - low) if high > low else 0.0
        ends = (own.filter(held_bits=end).unique("window", keep="last").sort("window") for end in (low, high))
        first, second = (np.log(end["kl_mean"].to_numpy()) for end in ends)
        found[str(method)] = low, high, np.exp(first + part * (second - first)).tolist()
    ranked = sorted(found.items(), key=lambda item: float(np.mean(item[1][2])))
    rows = []
    for method, (low, high, own_kl) in ranked:
        more = Mean.of([one - best for one, best in zip(own_kl, ranked[0][1][2], strict=True)])
        rows.append((method, float(np.mean(own_kl)), low, high, more.mean, more.low, more.high))
    return pl.DataFrame(rows, schema=EQUAL, orient="row")
