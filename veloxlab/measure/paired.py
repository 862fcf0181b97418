"""Caches compared window by window on the same text, so that only the cache differs."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from veloxlab.checks import checked, measured
from veloxlab.errors import InputError
from veloxlab.measure.experiments import mean_interval
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.quality import TOKEN_FIDELITY

WINDOWS = schema("window positions kl_mean top1_flips perplexity perplexity_exact")
"""Columns of `by_window`: window of the text; compared predictions; their mean KL(exact ‖ compressed) in nats;
share of them whose most likely token changed; perplexity with this cache and with the exact one."""


@checked(tokens=measured(TOKEN_FIDELITY, "vl.measure.fidelity_to with per_token=True"))
def by_window(tokens: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each window of the result of `veloxlab.measure.fidelity_to` with ``per_token``: `WINDOWS`."""
    nll, exact = (pl.col(name).mean().exp() for name in ("nll", "nll_exact"))
    means = {"kl_mean": pl.col("kl").mean(), "top1_flips": pl.col("flip").mean()}
    found = tokens.group_by("window", maintain_order=True).agg(
        positions=pl.len(), **means, perplexity=nll, perplexity_exact=exact
    )
    return in_schema(found, WINDOWS)


@dataclass(frozen=True)
class Mean:
    """A mean over windows, and the ends of its 95 % interval, null for one window."""

    mean: float
    low: float | None
    high: float | None
    windows: int

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        """Return the mean of one value or more."""
        if len(values) > 1:
            return cls(*mean_interval(values), len(values))
        return cls(values[0], None, None, 1)

    @property
    def decisive(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "one window, so no interval"
        return f"95 % interval {self.low:.3g} to {self.high:.3g}, {self.windows} windows"


@checked(
    first=measured(WINDOWS, "vl.measure.by_window"),
    second=measured(WINDOWS, "vl.measure.by_window"),
)
def difference(first: pl.DataFrame, second: pl.DataFrame) -> Mean:
    """Return how much more KL the second cache has than the first, in nats a token, over their common windows.

    Frames of `by_window`, of one text. Raises `InputError` if they have no common window.
    """
    both = first.join(second, on=["window", "positions"], suffix="_second").sort("window")
    if both.is_empty():
        raise InputError("The two were measured on different windows: measure both on the same text.")
    return Mean.of((both["kl_mean_second"] - both["kl_mean"]).to_list())
