"""The charts of a budget: bits by head, losses by layer, what bits buy, and sensitivities; a look is the tuner."""

from __future__ import annotations

import polars as pl

from veloxlab import views
from veloxlab.allocate.rates import Allocation, RateBudget
from veloxlab.allocate.sensitivity import NATS
from veloxlab.views.columns import Domain, log_domain, not_drawn
from veloxlab.widgets.pages.charts import Chart, Look


def by_of(rates: RateBudget) -> str:
    """What its sensitivities are measured by."""
    return str(rates.sensitivities["by"][0])


def unit_of(rates: RateBudget, a: str = "token") -> str:
    """The unit of a predicted loss, of a token or of something else."""
    return f"nats a {a}" if by_of(rates) in NATS else f"in the unit of {by_of(rates)}"


def _heads(look: Look) -> pl.DataFrame:
    """What each head gets, allocated and by uniform bits in the same bytes, where there are such."""
    plans = {"allocated": look.allocation.plan, "uniform": look.allocation.uniform}
    rates: RateBudget = look.rates
    given = [(kind, plan) for kind, plan in plans.items() if plan is not None]
    return pl.concat(rates.heads(plan).with_columns(kind=pl.lit(kind)) for kind, plan in given)


def _frontier(look: Look) -> pl.DataFrame:
    found: Allocation = look.allocation
    losses = {"allocated": found.predicted_loss, "uniform": found.predicted_uniform_loss}
    rows = [(kind, found.true_bits, loss) for kind, loss in losses.items() if loss is not None]
    now = pl.DataFrame(rows, {"kind": pl.String, "true_bits": float, "predicted_loss": float}, orient="row")
    drawn = look.measured if by_of(look.rates) in NATS and look.measured.height else None
    return views.frontier_rows(look.rates.frontier(look.setting.bounds), now, drawn)


def _ends(rows: pl.DataFrame, look: Look) -> dict[str, Domain]:
    """Ends of the axes of true bits and of loss, between which all that the widest bounds can do and these rows lie."""
    bits = [*look.everything["true_bits"], *rows["true_bits"]]
    domain = log_domain([*look.everything["predicted_loss"], *rows["loss"]])
    return {"bits": (min(bits), max(bits)), "domain": domain}


def _frontier_caption(rows: pl.DataFrame, look: Look) -> str:
    said = "The hollow square is this plan, predicted for codes alone; measured is the mean KL, its window exact"
    if by_of(look.rates) not in NATS:
        said = f"Losses by {by_of(look.rates)} are no divergences: what is measured stands in the table below"
    return "; ".join([said, *not_drawn(rows["loss"])])


CHARTS = (
    Chart(
        "bits",
        ("allocation",),
        lambda _, look: look.rates.heads(look.allocation.plan),
        lambda rows, look: views.allocation_map(rows, least=look.widths[0], most=look.widths[-1]),
        lambda rows, _: views.allocation_caption(rows),
    ),
    Chart(
        "losses",
        ("allocation",),
        lambda _, look: (
            _heads(look).group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
        ),
        lambda rows, look: views.loss_by_layer(rows, unit=unit_of(look.rates)),
        lambda rows, look: views.loss_caption(rows, unit=unit_of(look.rates)),
    ),
    Chart(
        "frontier",
        ("setting", "allocation", "measured.height"),
        lambda _, look: _frontier(look),
        lambda rows, look: views.budget_frontier(
            rows, unit=unit_of(look.rates), caption=_frontier_caption(rows, look), **_ends(rows, look)
        ),
        _frontier_caption,
        _ends,
    ),
    Chart(
        "sensitivity",
        (),
        lambda _, look: look.rates.sensitivities,
        lambda rows, look: views.sensitivity_by_layer(rows, unit=unit_of(look.rates, "unit of error")),
    ),
)
