"""The runs of the page of advice on the loaded model."""

from __future__ import annotations

from typing import Any

import polars as pl

from veloxlab.measure.generation import prompt_ids, side_by_side, stops
from veloxlab.measure.narrow import Narrow, narrow_layers
from veloxlab.measure.quality import Reference
from veloxlab.progress import Progress
from veloxlab.widgets.pages.advice_words import answer_said
from veloxlab.widgets.pages.experiment import Experiment
from veloxlab.widgets.selection import Choice

NARROWEST = 2  # bits at which layers are tried
ANSWER = 64  # compared tokens of an answer


def narrowed(experiment: Experiment, exact: Reference, choice: Choice, limit: float, progress: Progress) -> Narrow:
    """Find the layers of a cache that can have `NARROWEST` bits with a loss of at most ``limit`` nats a token."""
    selection, widths = experiment.selection, sorted({*choice.widths, NARROWEST})
    given = selection.fitting.calibration(choice.method, widths, progress, choice.seed)
    settings: dict[str, Any] = {"bits": NARROWEST, "limit": limit, "layers": selection.layers, "calibration": given}
    return narrow_layers(exact, choice.plan(experiment.model), progress=progress, **settings)


def answered(experiment: Experiment, choice: Choice, prompt: str, progress: Progress) -> str:
    """Answer a prompt with the exact cache and with a compressed one; return HTML about whether the answers differ."""
    given = experiment.selection.fitting.calibration(choice.method, choice.widths, progress, choice.seed)
    model, tokenizer = experiment.model, experiment.tokenizer
    settings: dict[str, Any] = {"tokens": ANSWER, "calibration": given, "progress": progress}
    rows = side_by_side(model, tokenizer, prompt, choice.plan(model), **settings)
    read = len(prompt_ids(tokenizer, prompt)) + rows.filter(side="compressed").height
    shown = pl.when(pl.col("token").is_in(stops(tokenizer))).then(pl.lit("")).otherwise("text").alias("text")
    return answer_said(rows.with_columns(shown), choice, read)
