"""What a plan really changes in a model's predictions, beside what was predicted of it."""

from __future__ import annotations

from typing import Any, Literal

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.allocate.plan import Plan
from veloxlab.allocate.rate_budget import RateBudget
from veloxlab.measure.progress import Progress, silent
from veloxlab.measure.quality import FIDELITY, fidelity

PlanKind = Literal["allocated", "uniform"]

JUDGED = {
    "kind": pl.String,  # "allocated" or "uniform"
    "true_bits": pl.Float64,  # of each packed value
    "bytes_per_token": pl.Float64,
    "predicted_loss": pl.Float64,  # in the unit of the sensitivities, were all tokens behind the sinks codes
    **FIDELITY,  # measured with the plan's window, which is exact: less is lost than without
}
"""Columns of `judged`."""


def judged(
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
    """Measure a plan by `veloxlab.fidelity`, and say what ``rates`` predict of it: one row, `JUDGED`.

    Parameters
    ----------
    rates : the measurements that the plan was made from.
    plan : of this model.
    model, tokenizer, text, tokens, windows, progress : as for `veloxlab.fidelity`.
    kind : how the plan came about.

    Raises
    ------
    InputError : as `veloxlab.fidelity`, and as `RateBudget.heads`.
    """
    predicted = {
        "kind": [kind],
        "true_bits": [rates.true_bits(plan)],
        "bytes_per_token": [rates.bytes_per_token(plan)],
        "predicted_loss": [rates.predicted_loss(plan)],
    }
    given: dict[str, Any] = {"text": text, "tokens": tokens, "windows": windows, "progress": progress}
    row = fidelity(model, tokenizer, plan, name=plan.name, **given)
    return pl.concat([pl.DataFrame(predicted), row], how="horizontal").match_to_schema(JUDGED)
