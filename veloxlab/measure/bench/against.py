"""Comparison of two benchmark runs: ratios that moved by more than the measured noise.

Times of two runs are not compared, because other work on a machine slows a whole run. A ratio is of two times of one
run, taken in turn. Its noise is that of both: half the interquartile range of the repeats, over their median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from veloxlab.measure.bench.timing import Row
from veloxlab.measure.frames import schema

RATIOS = ("ratio", "of_mlx_lm", "of_ops", "peak_ratio")
PLACES = ("shape", "query_heads", "kv_heads", "head_dim", "layers", "sequences", "tokens", "cache")
WIDER = 2.0  # least change of a ratio, in units of its noise
LEAST = 0.02  # least noise of a ratio

AGAINST = schema("part case name") | dict.fromkeys(("before", "now", "change", "noise"), pl.Float64)
AGAINST |= {"part": pl.String, "case": pl.String, "name": pl.String, "moved": pl.Boolean}
"""Columns of `against`: part of the benchmark; the row in words; the ratio's name, and its values; ``now`` over
``before``; the difference from 1 that noise explains, null if no run measured it; whether the change is greater."""


def against(before: Mapping[str, Any], now: Mapping[str, Any]) -> pl.DataFrame:
    """Return ratios that are in both results of ``veloxlab bench``: `AGAINST`, those that moved first."""
    rows = []
    for part in now.keys() & before.keys():
        olds = {_place(row): row for row in before[part]["rows"]}
        for row in now[part]["rows"]:
            old = olds.get(_place(row), {})
            for name in RATIOS:
                if not (row.get(name) and old.get(name)) or row[name] == old[name] == 1:
                    continue
                change = row[name] / old[name]
                spreads = _noise(now[part]["rows"], row, name), _noise(before[part]["rows"], old, name)
                known = [spread for spread in spreads if spread is not None]
                noise = WIDER * math.hypot(*(known * 2)[:2]) if known else None
                moved = noise is not None and abs(math.log(change)) > noise
                rows.append((part, _words(row), name, old[name], row[name], change, noise, moved))
    frame = pl.DataFrame(rows, schema=AGAINST, orient="row")
    return frame.sort("moved", pl.col("change").log().abs(), descending=True)


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in PLACES)


def _words(row: Row) -> str:
    said = (f"{row[name]:,} {name.replace('_', ' ')}" for name in PLACES[1:-1] if name in row)
    return ", ".join([row["cache"], *([row["shape"]] if "shape" in row else []), *said])


def _noise(rows: Sequence[Row], row: Row, name: str) -> float | None:
    """Return the noise of a ratio; None if the run measured none."""
    if name == "peak_ratio":  # a ratio of bytes
        return LEAST
    of = {"ratio": "exact", "of_mlx_lm": "mlx-lm", "of_ops": row["cache"]}[name]
    alike = [other for other in rows if _place(other)[:-1] == _place(row)[:-1] and other["cache"].startswith(of)]
    spreads = [one["spread"] for one in (row, *alike[:1]) if one.get("spread") is not None]
    return max(LEAST, math.hypot(*spreads)) if len(spreads) == 1 + len(alike[:1]) else None
