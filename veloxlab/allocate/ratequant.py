"""RateQuant from a model to a plan: measure sensitivities and curves once, then allocate (arXiv 2605.06675)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import BUDGET, Budget, layer_sizes
from veloxlab.allocate.curves import USUAL_BITS, distortion_curves
from veloxlab.allocate.plan import Plan, model_hash
from veloxlab.allocate.points import BOUNDS, PER_HEAD, Bounds
from veloxlab.allocate.rate_budget import RateBudget
from veloxlab.allocate.sensitivity import By, sensitivities
from veloxlab.cache import DEFAULT_SINKS, DEFAULT_WINDOW
from veloxlab.calibration import Calibration
from veloxlab.checks import CALIBRATION, checked, choice, many, whole
from veloxlab.identity import name_of
from veloxlab.measure.progress import Progress, silent
from veloxlab.probing import probe

MEASURED = {
    "bits": many(whole()),
    "by": choice(*get_args(By)),
    "calibrations": many(CALIBRATION, empty=True),
}
"""Checks of the arguments that say what is measured."""


@checked(**MEASURED)
def rate_budget(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    methods: Sequence[str] = (PER_HEAD,),
    text: str | None = None,
    *,
    bits: Sequence[int] = USUAL_BITS,
    by: By = "gradient",
    sequences: int = 8,
    tokens: int = 512,
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    calibrations: Sequence[Calibration] = (),
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> RateBudget:
    """Measure a model's sensitivities and distortion curves, for any number of budgets.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    methods : that a layer's keys or values may get; only ``"ratequant"`` has a width for each head.
    text : what the model reads; the shipped WikiText-2 validation excerpt by default.
    bits : code widths to measure, those of them that a method has.
    by, sequences, tokens, folder : as for `veloxlab.sensitivities`.
    sinks, window : of the plans to be made; sinks are left out of the measurements.
    calibrations : what `veloxlab.calibrate` gave at these widths, for methods that have to be fitted.
    progress : told of each step.

    Raises
    ------
    InputError : as `veloxlab.sensitivities` and `distortion_curves`.
    """
    sizes = layer_sizes(model)
    for calibration in calibrations:
        calibration.check_model(model)
    weights = sensitivities(
        model, tokenizer, text, sequences=sequences, tokens=tokens, by=by, sinks=sinks, folder=folder, progress=progress
    )
    curves = distortion_curves(
        model,
        tokenizer,
        methods,
        text,
        bits=bits,
        tokens=2 * tokens,
        sinks=sinks,
        calibrations={calibration.method: calibration for calibration in calibrations},
        progress=progress,
    )
    return RateBudget(
        name_of(model),
        model_hash(model),
        1 + max(f.layer for f in probe(model)),
        sizes,
        weights,
        curves,
        sinks,
        window,
        {c.method: c.identity for c in calibrations if c.method in methods},
    )


@checked(budget=BUDGET, bounds=BOUNDS, **MEASURED)
def allocate_bits(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    budget: Budget | float,
    bounds: Bounds | None = None,
    **measured: Any,
) -> Plan:
    """Measure a model, by `rate_budget` with the arguments ``measured``, and allocate one budget within ``bounds``.

    To try several budgets, keep the `RateBudget`.
    """
    return rate_budget(model, tokenizer, **measured).plan(budget, bounds)
