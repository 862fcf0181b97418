"""Measurements of SmolLM2 for bit budgets: ``python -m tests.budget_results`` writes rates, sensitivities and spectra.

They are results of `vl.rate_budget`, `vl.allocate.sensitivities` and `vl.calibrate`, for notebooks 10 and 19.
"""

from __future__ import annotations

from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import polars as pl

from veloxlab.progress import say
from veloxlab.store import write_parquet
from veloxlab.texts import shipped_folder

FOLDER = shipped_folder("data") / "results"
MODEL = "smollm2-135m"
BITS = range(1, 8)
TRIED: dict[str, Any] = {"sequences": 1, "tokens": 256}  # kinds that try each layer take long


def main() -> None:
    """Measure, and write the three files."""
    both = vl.load(MODEL)
    rates = vl.rate_budget(*both, bits=BITS, window=0, progress=say)
    rates.save(FOLDER / f"rates_{MODEL}.json")
    kinds: dict[str, dict[str, Any]] = {"gradient": {}, "key_norm": {}, "attention_output": TRIED, "forward_kl": TRIED}
    frames = [
        vl.allocate.sensitivities(*both, by=by, per_sequence=True, progress=say, **given) for by, given in kinds.items()
    ]
    write_parquet(FOLDER / f"sensitivities_{MODEL}.parquet", pl.concat(frames))
    calibration = vl.calibrate(*both, "fisherquant", progress=say)
    write_parquet(FOLDER / "fisherquant_spectra.parquet", rates.with_calibration(calibration).spectra)


if __name__ == "__main__":
    main()
