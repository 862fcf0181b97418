"""Losses of caches that are known before a run, from the committed results of the demo model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import polars as pl

from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.texts import shipped_folder

DEMO = "SmolLM2-135M"
RESULTS = {"compare_smollm2-135m_4_sinks.parquet": DEFAULT_SINKS, "compare_smollm2-135m.parquet": 0}
"""Files of results, with the sinks of their caches; for each cache, the first file that has it counts."""


@cache
def known_losses() -> dict[str, dict[str, Any]]:
    """Return the losses of the demo model by the cache's name, such as ``"turboquant 4 bit"``."""
    found: dict[str, dict[str, Any]] = {}
    for file, sinks in RESULTS.items():
        frame = pl.read_parquet(shipped_folder("data") / "results" / file)
        for row in frame.select("name", "kl_mean", "top1_flips", sinks=sinks).to_dicts():
            found.setdefault(row["name"], row)
    return found


@dataclass(frozen=True)
class Loss:
    """Loss of a cache: mean KL in nats, and the share of changed top-1 tokens, each as a range of two ends.

    An end of None is unknown. ``kind`` is "measured", "predicted", "exact", or empty if nothing is known.
    """

    kl: tuple[float | None, float | None]
    flips: tuple[float | None, float | None]
    kind: str
    source: str


EXACT = Loss((0.0, 0.0), (0.0, 0.0), "exact", "")
UNKNOWN = Loss((None, None), (None, None), "", "not known before a run")


def expected_loss(name: str, key_bits: float, value_bits: float) -> Loss:
    """Predict the loss of a method or ``"mlx-lm"``: a range between the demo model's losses at more and fewer bits.

    Both ends are equal if keys and values have the same bits, and the demo model was measured at these bits.
    """
    widths = {float(cache.split()[1]): row for cache, row in known_losses().items() if cache.split()[0] == name}
    more = min((width for width in widths if width >= max(key_bits, value_bits)), default=None)
    fewer = max((width for width in widths if width <= min(key_bits, value_bits)), default=None)
    if fewer is None:
        return UNKNOWN
    ends = [widths.get(more) if more is not None else None, widths[fewer]]
    kl, flips = (tuple(None if end is None else end[column] for end in ends) for column in ("kl_mean", "top1_flips"))
    said = " and ".join(f"{width:g}" for width in dict.fromkeys((fewer, more)) if width is not None)
    sinks = widths[fewer]["sinks"]
    return Loss(kl, flips, "predicted", f"{DEMO} at {said} bits, {sinks} sinks, no window")  # type: ignore[arg-type]
