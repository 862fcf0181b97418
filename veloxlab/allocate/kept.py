"""Measurements of a model kept on disk, and found again by its weights and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module

from veloxlab.allocate.rate_budget import FORMAT, RateBudget
from veloxlab.allocate.ratequant import rate_budget
from veloxlab.codecs import find_method
from veloxlab.codecs.saving import written
from veloxlab.integrate import fingerprint
from veloxlab.measure.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in


def kept_rate_budget(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    *,
    folder: str | Path | None = None,
    progress: Progress = silent,
    **measured: Any,
) -> RateBudget:
    """Give what `rate_budget` measured of this model with the same arguments before, or measure it and keep it.

    With a method that was registered (`veloxlab.register`) it is measured each time: its code may have changed.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    folder : where it is kept; the user's cache folder by default. Where it cannot be written a warning says so.
    progress : told of each step of measuring.
    measured : further arguments of `rate_budget`.

    Raises
    ------
    InputError : as `rate_budget`; a damaged file is told of in a warning, and made again.
    """
    if any(find_method(method).codecs for method in measured.get("methods", ())):
        return rate_budget(model, tokenizer, folder=folder, progress=progress, **measured)
    facts: dict[str, Any] = {
        name: list(given) if isinstance(given, range) else given for name, given in measured.items()
    }
    if "calibrations" in facts:
        facts["calibrations"] = [calibration.identity for calibration in facts["calibrations"]]
    path = kept_in("rates", folder) / f"{digest([FORMAT, written(), fingerprint(model), facts])[:16]}.json"
    return kept(
        path,
        RateBudget.load,
        lambda: rate_budget(model, tokenizer, folder=folder, progress=progress, **measured),
        RateBudget.save,
    )
