"""Uniform bits against allocated bits in the same bytes, on a text that nothing was fitted to.

They are compared window by window. The confidence interval is that of the paired differences, because windows differ
much more than caches do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import Bounds, BytesPerToken
from veloxlab.allocate.ratequant import USUAL, rate_budget
from veloxlab.allocate.rates import RateBudget
from veloxlab.allocate.sensitivity import By, sensitivities
from veloxlab.cache.make import make_cache
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.experiments import Experiment, mean_interval
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.quality import Reference, fidelity_to, reference
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.progress import Progress, silent
from veloxlab.store import Unfinished, digest
from veloxlab.texts import Tokenizer

FORMAT = "veloxlab sweep 1"
UNIFORM = "uniform"
Job = tuple[float, str]  # mean code bits, and what the allocation is by
BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
MEASURED_BITS = range(1, 8)
SINKS, WINDOW = 4, 0  # tokens; no window, so that the codes are compared

SWEEP = schema(
    "bits allocation window positions kl_mean top1_flips nll nll_exact held_bytes key_bits value_bits predicted_loss"
)
SWEEP |= {"bits": pl.Float64, "allocation": pl.String}
"""Columns of `sweep`: mean code bits of the uniform plan; "uniform", or the kind of sensitivity; predictions;
KL(exact ‖ compressed) of the next token in nats; share of predictions whose most likely token changed; mean −log p of
the text in nats a token; bytes of all layers at the end of the window; code bits, means over layers and heads; the loss
of a token in the unit of the row's sensitivities, uniform's by the first of them."""

SWEPT = schema(
    "bits allocation windows kl_mean kl_change kl_change_low kl_change_high top1_flips perplexity perplexity_exact "
    "held_bytes key_bits value_bits predicted_loss"
)
SWEPT |= {"bits": pl.Float64, "allocation": pl.String, "windows": pl.Int32}
"""Columns of `swept`: ``kl_change`` is against uniform bits, the mean over windows, with the ends of its interval of
95 %, Student's t over the windows' differences; null for uniform bits, and for one window. The rest as in `SWEEP`."""


def sweep(
    model: Module,
    tokenizer: Tokenizer,
    *,
    bits: Sequence[float] = BITS,
    by: Sequence[By] = ("gradient", "key_norm"),
    text: str | None = None,
    calibration_text: str | None = None,
    tokens: int = 512,
    windows: int = 8,
    sequences: int = 8,
    unfinished: Path | None = None,
    folder: str | Path | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure uniform TurboQuant and RateQuant's allocations at equal bytes, every token through its codes: `SWEEP`.
    Raises `InputError`: as `veloxlab.rate_budget` and `vl.measure.reference`; or a number of bits is out of range.

    Parameters
    ----------
    bits : code bits on average, 1 to 7; between whole widths uniform bits are those of `RateBudget.uniform`.
    by : kinds of sensitivity to allocate by; the first predicts the loss of uniform bits.
    text, tokens, windows : for the evaluation, by default the WikiText-2 test excerpt; length and number of windows.
    calibration_text, sequences : of sensitivities and curves, by default the validation excerpt; 512 tokens each.
    unfinished, folder : the file for a run that was stopped, which then continues; the folder of sensitivities.
    """
    least, most = MEASURED_BITS[0], MEASURED_BITS[-1]
    if wrong := [b for b in bits if not least <= b <= most]:
        raise InputError(f"bits={wrong[0]} are out of range: give from {least} to {most} code bits on average.")
    given: dict[str, Any] = {"sequences": sequences, "sinks": SINKS, "folder": folder, "progress": progress}
    first = rate_budget(model, tokenizer, text=calibration_text, bits=MEASURED_BITS, by=by[0], window=WINDOW, **given)
    rates: dict[str, RateBudget] = {by[0]: first}
    for kind in by[1:]:
        weights = sensitivities(model, tokenizer, calibration_text, by=kind, **given)
        rates[kind] = replace(first, sensitivities=weights)
    exact = reference(model, tokenizer, text=text, tokens=tokens, windows=windows, progress=progress)
    facts = {"version": find_method(USUAL[0]).version, "model": fingerprint(model), "by": list(by)}
    facts |= {"calibration": digest([calibration_text, sequences]), "stretches": list(exact.stretches)}
    measuring = Experiment[Job, pl.DataFrame](
        partial(_measured, exact, rates), lambda job: f"{job[0]:g} bits, {job[1]}", progress=progress
    )
    measuring.go_on(
        Unfinished(unfinished, FORMAT, facts),
        lambda frames: pl.concat(frames.values()).to_dict(as_series=False),
        lambda rows: pl.DataFrame(rows, schema=SWEEP).partition_by("bits", "allocation", as_dict=True),
    )
    jobs = [(float(b), allocation) for b in bits for allocation in (UNIFORM, *by)]
    frames = dict(measuring.run(jobs))
    return pl.concat(frames[job] for job in jobs)


def usual_bounds(mean_bits: float) -> Bounds:
    """The paper's bounds (its Tables): of a width between two, one below the upper and two above the lower."""
    return Bounds(max(1, int(np.ceil(mean_bits)) - 1), int(np.floor(mean_bits)) + 2)


def swept(frame: pl.DataFrame) -> pl.DataFrame:
    """Means over the windows of `sweep`, and the change of each allocation against uniform bits: `SWEPT`."""
    uniform = frame.filter(allocation=UNIFORM).select("bits", "window", uniform="kl_mean")
    weight = pl.col("positions") / pl.col("positions").sum()
    means = frame.sort("window", maintain_order=True).join(uniform, on=["bits", "window"], maintain_order="left")
    summary = means.group_by("bits", "allocation", maintain_order=True).agg(
        pl.len().alias("windows"),
        *[(pl.col(name) * weight).sum() for name in ("kl_mean", "top1_flips", "nll", "nll_exact")],
        pl.col("held_bytes", "key_bits", "value_bits", "predicted_loss").first(),
        changes=pl.col("kl_mean") - pl.col("uniform"),
    )
    ends = [
        mean_interval(changes) if allocation != UNIFORM and len(changes) > 1 else (None, None, None)
        for allocation, changes in summary.select("allocation", "changes").iter_rows()
    ]
    intervals = pl.DataFrame(ends, schema=["kl_change", "kl_change_low", "kl_change_high"], orient="row")
    named = summary.with_columns(perplexity=pl.col("nll").exp(), perplexity_exact=pl.col("nll_exact").exp())
    return in_schema(pl.concat([named, intervals], how="horizontal"), SWEPT)


def _measured(exact: Reference, rates: Mapping[str, RateBudget], job: Job) -> pl.DataFrame:
    mean_bits, allocation = job
    own = rates.get(allocation) or next(iter(rates.values()))
    uniform = own.frontier().filter(kind=UNIFORM)["bytes_per_token"].to_numpy()
    budget = BytesPerToken(float(np.interp(mean_bits, list(MEASURED_BITS), uniform)))
    plan = own.uniform(budget) if allocation == UNIFORM else own.plan(budget, usual_bounds(mean_bits))
    cache: list[Any] = []

    def make(model: Module) -> list[Any]:
        cache[:] = make_cache(model, plan, chunk="codes")
        return cache

    means = {"kl_mean": "kl", "top1_flips": "flip", "nll": "nll", "nll_exact": "nll_exact"}
    found = fidelity_to(exact, make, per_token=True).group_by("window", maintain_order=True)
    coded = plan.frame.filter(pl.col("key_method") != "none").select(pl.col("key_bits", "value_bits").mean())
    said = {"bits": mean_bits, "allocation": allocation, **coded.row(0, named=True)}
    said |= {"held_bytes": sum(entry.nbytes for entry in cache), "predicted_loss": own.predicted_loss(plan)}
    rows = found.agg(positions=pl.len(), **{name: pl.col(column).mean() for name, column in means.items()})
    return in_schema(rows.with_columns(**{name: pl.lit(value) for name, value in said.items()}), SWEEP)
