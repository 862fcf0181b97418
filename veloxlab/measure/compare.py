"""Caches side by side on the same tokens: the table and the chart that the README shows."""

from __future__ import annotations

from typing import Any

import polars as pl
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import QuantizedKVCache

from veloxlab.codecs import METHODS
from veloxlab.measure.progress import Progress, silent
from veloxlab.measure.quality import FIDELITY, fidelity

GROUP_SIZE = 64  # mlx-lm's default


def compare(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    *,
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8),
    text: str | None = None,
    tokens: int = 512,
    windows: int = 3,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure every method that needs no calibration at each of ``bits``, and mlx-lm's quantized cache at 4 and 8.

    Everything is compressed, no token is kept exact, and each is seen through its codes: a row each, `FIDELITY`.
    """
    methods = [m for m in METHODS.values() if not m.calibrated and m.id != "none"]
    jobs = [(f"{m.id} K{b} V{b}", m.id, b) for m in methods for b in bits if b in m.bits]
    rows = []
    for i, (name, method, width) in enumerate(jobs):
        progress(i, len(jobs) + 2, name)
        rows.append(
            fidelity(
                model,
                tokenizer,
                method,
                text=text,
                tokens=tokens,
                windows=windows,
                name=name,
                bits=width,
                sinks=0,
                window=0,
            )
        )
    for i, width in enumerate((4, 8)):
        name = f"mlx-lm {width} bit"
        progress(len(jobs) + i, len(jobs) + 2, name)
        rows.append(fidelity(model, tokenizer, _quantized(width), text=text, tokens=tokens, windows=windows, name=name))
    progress(len(jobs) + 2, len(jobs) + 2, "done")
    return pl.concat(rows).match_to_schema(FIDELITY)


def _quantized(bits: int) -> Any:  # noqa: ANN401
    return lambda model: [QuantizedKVCache(group_size=GROUP_SIZE, bits=bits) for _ in model.layers]
