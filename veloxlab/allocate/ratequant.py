"""RateQuant from a model to a plan: measure sensitivities and curves once, then allocate (arXiv 2605.06675)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import BOUNDS, BUDGET, Bounds, Budget, layer_sizes
from veloxlab.allocate.choices import PER_HEAD
from veloxlab.allocate.curves import USUAL_BITS, distortion_curves
from veloxlab.allocate.rates import FORMAT, RateBudget
from veloxlab.allocate.sensitivity import By, sensitivities
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import DEFAULT_SINKS, DEFAULT_WINDOW, Plan, model_hash
from veloxlab.checks import CALIBRATION, checked, choice, many, whole
from veloxlab.codecs import find_method
from veloxlab.measure.quality import FIDELITY, fidelity
from veloxlab.mlxlm.identity import fingerprint, name_of
from veloxlab.mlxlm.probe import probe
from veloxlab.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in


@checked(bits=many(whole()), by=choice(*get_args(By)), calibrations=many(CALIBRATION, empty=True))
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
    by, sequences, tokens, folder : as for `vl.allocate.sensitivities`.
    sinks, window : of the plans to be made; sinks are left out of the measurements.
    calibrations : what `veloxlab.calibrate` gave at these widths, for methods that have to be fitted.
    progress : told of each step.

    Raises
    ------
    InputError : as `vl.allocate.sensitivities` and `vl.allocate.distortion_curves`.
    """
    sizes = layer_sizes(model)
    for calibration in calibrations:
        calibration.check_model(model)
    given: dict[str, Any] = {"sinks": sinks, "progress": progress}
    weights = sensitivities(model, tokenizer, text, sequences=sequences, tokens=tokens, by=by, folder=folder, **given)
    fitted = {calibration.method: calibration for calibration in calibrations}
    curves = distortion_curves(
        model, tokenizer, methods, text, bits=bits, tokens=2 * tokens, calibrations=fitted, **given
    )
    entries = 1 + max(f.layer for f in probe(model))
    identities = {method: one.identity for method, one in fitted.items() if method in methods}
    return RateBudget(name_of(model), model_hash(model), entries, sizes, weights, curves, sinks, window, identities)


@checked(budget=BUDGET, bounds=BOUNDS, bits=many(whole()))
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


def kept_rate_budget(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    *,
    folder: str | Path | None = None,
    progress: Progress = silent,
    **measured: Any,
) -> RateBudget:
    """`rate_budget` with the arguments ``measured``, kept in ``folder`` (by default the user's cache) and found again.

    With a method that was registered (`veloxlab.register`) it is measured each time: its code may have changed. A
    damaged file is told of in a warning, and made again.
    """
    make = partial(rate_budget, model, tokenizer, folder=folder, progress=progress, **measured)
    methods = [find_method(method) for method in measured.get("methods", (PER_HEAD,))]
    if any(method.codecs for method in methods):
        return make()
    facts: dict[str, Any] = {
        name: list(given) if isinstance(given, range) else given for name, given in measured.items()
    }
    if "calibrations" in facts:
        facts["calibrations"] = [calibration.identity for calibration in facts["calibrations"]]
    versions = {method.id: method.version for method in methods}
    path = kept_in("rates", folder) / f"{digest([FORMAT, versions, fingerprint(model), facts])[:16]}.json"
    return kept(path, RateBudget.load, make, RateBudget.save)


PlanKind = Literal["allocated", "uniform"]

EVALUATED = {
    "kind": pl.String,  # "allocated" or "uniform"
    "true_bits": pl.Float64,  # of each packed value
    "bytes_per_token": pl.Float64,
    "predicted_loss": pl.Float64,  # in the unit of the sensitivities, were all tokens behind the sinks codes
    **FIDELITY,  # measured with the plan's window, which is exact: less is lost than without
}
"""Columns of `evaluated`."""


def evaluated(
    rates: RateBudget,
    plan: Plan,
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    *,
    kind: PlanKind = "allocated",
    text: str | None = None,
    tokens: int = 512,
    windows: int = 1,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure a plan by `veloxlab.fidelity`, and say what ``rates`` predict of it: one row, `EVALUATED`.

    ``kind`` is how the plan came about; other arguments are those of `veloxlab.fidelity`. Raises as that, and as
    `RateBudget.heads`.
    """
    given: dict[str, Any] = {"text": text, "tokens": tokens, "windows": windows, "progress": progress}
    return (
        fidelity(model, tokenizer, plan, name=plan.name, **given)
        .with_columns(
            kind=pl.lit(kind),
            true_bits=pl.lit(rates.true_bits(plan)),
            bytes_per_token=pl.lit(rates.bytes_per_token(plan)),
            predicted_loss=pl.lit(rates.predicted_loss(plan)),
        )
        .match_to_schema(EVALUATED)
    )
