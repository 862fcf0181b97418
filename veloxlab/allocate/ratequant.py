"""RateQuant from a model to a plan: measure sensitivities and distortion curves, then allocate (arXiv 2605.06675)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import BOUNDS, BUDGET, Bounds, Budget, PlannedModel, layer_sizes
from veloxlab.allocate.rates import FORMAT, RateBudget
from veloxlab.allocate.sensitivity import By, mean_square, sensitivities
from veloxlab.allocate.tables import CURVES
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import DEFAULT_SINKS, DEFAULT_WINDOW, Plan
from veloxlab.checks import CALIBRATION, MAPPING, checked, choice, many, whole
from veloxlab.codecs import TENSORS, find_method
from veloxlab.codecs.base import fitted_online
from veloxlab.errors import InputError
from veloxlab.measure.activations import capture_layers, first_tokens
from veloxlab.measure.errors import ratio
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.quality import FIDELITY, fidelity
from veloxlab.mlxlm.identity import fingerprint, name_of
from veloxlab.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in
from veloxlab.texts import Tokenizer, excerpt

USUAL = ("ratequant",)  # methods
USUAL_BITS = range(1, 7)  # the paper's, and 1 bit for budgets near 2


@checked(bits=many(whole()), calibrations=MAPPING)
def distortion_curves(
    model: Module,
    tokenizer: Tokenizer,
    methods: Sequence[str] = USUAL,
    text: str | None = None,
    *,
    bits: Sequence[int] = USUAL_BITS,
    tokens: int = 1024,
    sinks: int = DEFAULT_SINKS,
    calibrations: Mapping[str, Calibration] | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure the distortion of every KV head's keys and values by method and width: `CURVES`.
    Raises `InputError`: unknown method or none of its widths, a calibration is missing, or the text is too short.

    Parameters
    ----------
    methods : ids; ``"ratequant"`` is TurboQuant, whose widths may differ from head to head.
    text, tokens : the text that the model reads in one call, and its length; by default the validation excerpt.
    bits : code widths to measure; a method is measured at those that it has.
    sinks : first tokens that are not counted, as the cache keeps them exact.
    calibrations : results of `veloxlab.calibrate` at these widths, for methods that must be fitted.
    """
    widths = {method: sorted({*bits} & {*find_method(method).bits}) for method in methods}
    if none := [method for method, own in widths.items() if not own]:
        raise InputError(f"{none[0]} has none of the widths {sorted({*bits})}: choose among those of vl.methods().")
    ids = first_tokens(tokenizer, excerpt("validation") if text is None else text, tokens)
    if len(ids) - sinks < 2:
        raise InputError(f"The text has {len(ids)} tokens, too few behind {sinks} sinks: give a longer text.")
    layers = len(layer_sizes(model))
    rows: list[tuple[object, ...]] = []
    for done, seen in enumerate(capture_layers(model, ids)):  # one layer's activations are held at a time
        progress(done, layers, f"distortion of layer {seen.layer}")
        for tensor, (method, own) in product(TENSORS, widths.items()):
            x = seen.vectors(tensor)[:, :, sinks:]
            norm, dim = mean_square(x), x.shape[-1]
            for width in own:
                codec = fitted_online(seen.codec(tensor, method, width, (calibrations or {}).get(method), {}), x)
                code = codec.encode(x, sinks)
                lost = mean_square(x - codec.decode(code).astype(mx.float32))
                stored = code.nbytes / (x.shape[1] * x.shape[2])
                rows += [
                    (seen.layer, head, tensor, method, width, dim, d, r, 8 * stored / dim, stored)
                    for head, (d, r) in enumerate(zip(lost, ratio(lost, norm), strict=True))
                ]
    progress(layers, layers, "done")
    return pl.DataFrame(rows, schema=CURVES, orient="row")


@checked(bits=many(whole()), by=choice(*get_args(By)), calibrations=many(CALIBRATION, empty=True))
def rate_budget(
    model: Module,
    tokenizer: Tokenizer,
    methods: Sequence[str] = USUAL,
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

    Other arguments, and errors, are those of `vl.allocate.sensitivities` and `vl.allocate.distortion_curves`.

    Parameters
    ----------
    methods : ids of the methods that a budget may choose from. ``"ratequant"`` has a width for each head,
        ``"fisherquant"`` for each coordinate: its losses are predicted from its calibration, and not measured.
    sinks, window : of the plans to be made; sinks are left out of the measurements.
    calibrations : results of `veloxlab.calibrate` at the widths ``bits``, for methods that must be fitted.
    """
    sizes, fitted = layer_sizes(model), {calibration.method: calibration for calibration in calibrations}
    for calibration in calibrations:
        calibration.check_model(model)
    from_calibration = [method for method in methods if find_method(method).prediction]
    if missing := [method for method in from_calibration if method not in fitted]:
        way_out = f"give calibrations=[vl.calibrate(model, tokenizer, {missing[0]!r})]"
        raise InputError(f"Losses of {missing[0]} are read from its calibration: {way_out}.")
    ours = [method for method in methods if method not in from_calibration]
    given: dict[str, Any] = {"sinks": sinks, "progress": progress}
    weights = sensitivities(model, tokenizer, text, sequences=sequences, tokens=tokens, by=by, folder=folder, **given)
    given |= {"bits": bits, "tokens": 2 * tokens, "calibrations": fitted}
    curves = distortion_curves(model, tokenizer, ours, text, **given) if ours else pl.DataFrame(schema=CURVES)
    shape = PlannedModel.of(model)
    identities = {method: one.identity for method, one in fitted.items() if method in ours}
    facts = shape.model, shape.model_hash, shape.entries, sizes
    rates = RateBudget(*facts, weights, curves, sinks, window, identities)
    for method in from_calibration:
        rates = rates.with_calibration(fitted[method])
    return rates


@checked(budget=BUDGET, bounds=BOUNDS, bits=many(whole()))
def allocate_bits(
    model: Module, tokenizer: object, budget: Budget | float, bounds: Bounds | None = None, **measured: Any
) -> Plan:
    """Call `rate_budget` with the arguments ``measured``, and allocate one budget. For several, call `rate_budget`."""
    return rate_budget(model, tokenizer, **measured).plan(budget, bounds)


def kept_rate_budget(
    model: Module, tokenizer: object, *, folder: str | Path | None = None, progress: Progress = silent, **measured: Any
) -> RateBudget:
    """`rate_budget` with the arguments ``measured``, cached in ``folder`` (by default the user's cache folder).

    With a method that was registered (`veloxlab.register`) it is measured each time: its code may have changed.
    """
    make = partial(rate_budget, model, tokenizer, folder=folder, progress=progress, **measured)
    path = rate_budget_place(model, folder=folder, **measured)
    return make() if path is None else kept(path, partial(_of_model, name_of(model)), make, RateBudget.save)


def rate_budget_place(model: Module, *, folder: str | Path | None = None, **measured: Any) -> Path | None:
    """Where `kept_rate_budget` keeps its result; None where it keeps none."""
    methods = [find_method(method) for method in measured.get("methods", USUAL)]
    if any(method.codecs for method in methods):
        return None
    facts: dict[str, Any] = {n: list(given) if isinstance(given, range) else given for n, given in measured.items()}
    if "calibrations" in facts:
        facts["calibrations"] = [calibration.identity for calibration in facts["calibrations"]]
    versions = {method.id: method.version for method in methods}
    return kept_in("rates", folder) / f"{digest([FORMAT, versions, fingerprint(model), facts])[:16]}.json"


def _of_model(name: str, path: Path) -> RateBudget:
    rates = RateBudget.load(path)
    if rates.model != name:
        raise InputError(f"The measurements {path} are of {rates.model}, and this model is {name}.")
    return rates


EVALUATED = schema("kind true_bits bytes_per_token predicted_loss") | FIDELITY
"""Columns of `evaluated`: "allocated", "uniform", or the `predicted_method` for a plan of that alone; bits of each
packed value; predicted loss if all tokens after the sinks are codes. The measured loss is with the plan's exact
window, so it is smaller than without one."""


def evaluated(
    rates: RateBudget, plan: Plan, model: Module, tokenizer: object, *, kind: str = "allocated", **options: Any
) -> pl.DataFrame:
    """Measure a plan by `veloxlab.fidelity`, with its ``options``, and add the prediction of ``rates``: `EVALUATED`."""
    predicted = {name: getattr(rates, name)(plan) for name in ("true_bits", "bytes_per_token", "predicted_loss")}
    said = {name: pl.lit(value) for name, value in ({"kind": kind} | predicted).items()}
    return in_schema(fidelity(model, tokenizer, plan, name=plan.name, **options).with_columns(**said), EVALUATED)
