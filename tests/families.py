"""Every family of models on a compressed cache: what path its layers take, and what that changes in its logits.

``uv run python -m tests.families`` writes the table to ``data/results``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import numpy as np
import polars as pl

from tests.tiny_models import FAMILIES, stepwise, tiny
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.mlxlm import probe
from veloxlab.store import write_atomically

RESULTS = Path(__file__).parents[1] / "data" / "results"
CHUNKS = [20, 33, *[1] * 20, 5, 2]  # a prompt in two pieces, decoding, and drafts of several tokens
IDS = [7 * i % 90 for i in range(sum(CHUNKS))]
SOME_EXACT: dict[str, Any] = {"sinks": 2, "window": 8}  # so that all three runs hold tokens
ALL_CODED: dict[str, Any] = {"sinks": 0, "window": 0, "chunk": "codes"}


def as_arrays(cache: list[Any]) -> list[Any]:
    """The same caches on the path that decodes: what reading the codes has to agree with."""
    for slot in probe.slots_of(cache):
        if isinstance(slot, CompressedKVCache):
            slot.path = "arrays"
            for name in {"bits", "group_size"} & {*vars(slot)}:
                delattr(slot, name)
    return cache


@dataclasses.dataclass(frozen=True)
class Measured:
    """One family, with errors in units of the standard deviation of its logits."""

    family: str
    path: str  # of its layers, in order, with equal neighbours said once
    reasons: str
    exact_error: float  # largest difference from the model's own cache, with method "none"
    codes_error: float  # largest difference between reading 8-bit codes and decoding them
    eight_bit_error: float  # root-mean-square difference from the model's own cache, everything at 8 bits


def measure(family: str) -> Measured:
    """Run a family's small model on its own cache and on ours."""
    model = tiny(family)
    native = stepwise(model, IDS, probe.own_cache(model), CHUNKS)
    exact = vl.make_cache(model, "none", **SOME_EXACT)
    same = stepwise(model, IDS, exact, CHUNKS)
    coded = stepwise(model, IDS, vl.make_cache(model, bits=8, **ALL_CODED), CHUNKS)
    decoded = stepwise(model, IDS, as_arrays(vl.make_cache(model, bits=8, **ALL_CODED)), CHUNKS)
    report = vl.report(exact).filter(pl.col("layer").is_not_null())
    unit = native.std()
    return Measured(
        family,
        ", ".join(said_once(report["path"].to_list())),
        "; ".join(report["reason"].unique(maintain_order=True).to_list()),
        float(np.abs(same - native).max() / unit),
        float(np.abs(coded - decoded).max() / unit),
        float(np.sqrt(np.mean((coded - native) ** 2)) / unit),
    )


def said_once(words: list[str]) -> list[str]:
    """``["own", "own", "codes"]`` as ``["2 × own", "codes"]``."""
    runs: list[tuple[str, int]] = []
    for word in words:
        if runs and runs[-1][0] == word:
            runs[-1] = word, runs[-1][1] + 1
        else:
            runs.append((word, 1))
    return [word if count == 1 else f"{count} × {word}" for word, count in runs]


def table(frame: pl.DataFrame) -> str:
    """Markdown of `measure`'s rows."""
    lines = [
        "| family | paths of its caches | why | `none` | codes against decoded | 8 bit |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in frame.iter_rows(named=True):
        errors = [f"{row[name]:.0e}" for name in ("exact_error", "codes_error")]
        words = [row["family"], row["path"], row["reasons"]]
        lines.append(f"| {' | '.join([*words, *errors, format(row['eight_bit_error'], '.3f')])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all families and write them down."""
    frame = pl.DataFrame([dataclasses.asdict(measure(family)) for family in FAMILIES])
    frame.write_parquet(RESULTS / "families.parquet")
    write_atomically(RESULTS / "families.md", (table(frame) + "\n").encode())
    print(table(frame))


if __name__ == "__main__":
    main()
