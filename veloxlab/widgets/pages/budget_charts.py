"""The charts of a budget: which heads get the bits, predicted and measured losses. Here a ``look`` is the tuner."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from veloxlab import views
from veloxlab.allocate.budget import Allocation, Bounds
from veloxlab.allocate.rates import RateBudget
from veloxlab.allocate.sensitivity import NATS
from veloxlab.allocate.tables import EXACT
from veloxlab.cache.plan import Plan
from veloxlab.views.allocation import kinds_of
from veloxlab.views.columns import Domain, log_domain, not_drawn
from veloxlab.widgets.pages.charts import Chart, Look


def by_of(rates: RateBudget) -> str:
    """The measure of its sensitivities."""
    return str(rates.sensitivities["by"][0])


def unit_of(rates: RateBudget, a: str = "token") -> str:
    """The unit of a predicted loss, for each token or for each ``a``."""
    return f"nats a {a}" if by_of(rates) in NATS else f"in the unit of {by_of(rates)}"


def kind_of(plan: Plan, rates: RateBudget) -> str:
    """The name of an allocated plan in charts."""
    return (
        rates.predicted_method if rates.predicted_method and names_of(plan) == rates.predicted_method else "allocated"
    )


def names_of(plan: Plan) -> str:
    """The methods of a plan."""
    methods = {method for layer in plan.layers for method in (layer.key_method, layer.value_method)}
    return " and ".join(sorted(methods - {EXACT})) or EXACT


def spent_said(found: Allocation, bounds: Bounds, rates: RateBudget) -> str:
    """A sentence: the bits and bytes of an allocation."""
    least = bounds.least_bits or found.least_bits
    bits = f"code bits: keys {found.key_bits:.2f}, values {found.value_bits:.2f}"
    said = f"{found.true_bits:.2f} true bits a value, {found.bytes_per_token:,.0f} bytes a token; {bits}"
    only = f"{said}. Nothing is allocated: this budget allows only the bounds' least width, {least}"
    return only if found.only_least and kind_of(found.plan, rates) == "allocated" else said


def predicted_said(found: Allocation, rates: RateBudget) -> str:
    """A sentence: the predicted losses of an allocation and of uniform bits in the same bytes."""
    said, uniform = f"Predicted loss {found.predicted_loss:.3g} {unit_of(rates)}", found.predicted_uniform_loss
    return said if uniform is None else f"{said}; of uniform bits in the same bytes {uniform:.3g}"


def _heads(look: Look) -> pl.DataFrame:
    """Rows of each head: of the allocated plan, and of uniform bits in the same bytes, if there are any."""
    found: Allocation = look.allocation
    rates: RateBudget = look.rates
    plans = {kind_of(found.plan, rates): found.plan, "uniform": found.uniform}
    given = [(kind, plan) for kind, plan in plans.items() if plan is not None]
    return pl.concat(rates.heads(plan).with_columns(kind=pl.lit(kind)) for kind, plan in given)


def frontiers(rates: RateBudget, bounds: Bounds) -> pl.DataFrame:
    """Lines of allocated plans and of uniform widths; with a `predicted_method`, of plans with it and without it."""
    predicted_method, asked = rates.predicted_method, list(bounds.methods or rates.methods)
    others = (
        [method for method in rates.methods if method != predicted_method] if asked == [predicted_method] else asked
    )
    lines = {"allocated": others} if others else {}
    if predicted_method:
        lines = {predicted_method: [predicted_method]} | lines
    parts = [rates.frontier(bounds).filter(kind="uniform")]
    for kind, methods in lines.items():
        own = rates.frontier(replace(bounds, methods=tuple(methods))).filter(kind="allocated")
        parts.append(own.with_columns(kind=pl.lit(kind)))
    return pl.concat(parts)


def _frontier(look: Look) -> pl.DataFrame:
    found: Allocation = look.allocation
    losses = {kind_of(found.plan, look.rates): found.predicted_loss, "uniform": found.predicted_uniform_loss}
    rows = [(kind, found.true_bits, loss) for kind, loss in losses.items() if loss is not None]
    now = pl.DataFrame(rows, {"kind": pl.String, "true_bits": float, "predicted_loss": float}, orient="row")
    drawn = look.measured if by_of(look.rates) in NATS and look.measured.height else None
    return views.frontier_rows(frontiers(look.rates, look.setting.bounds), now, drawn)


def _ends(rows: pl.DataFrame, look: Look) -> dict[str, Domain]:
    """Ends of the axes of true bits and of loss: they contain these rows and all plans of the widest bounds."""
    bits = [*look.everything["true_bits"], *rows["true_bits"]]
    domain = log_domain([*look.everything["predicted_loss"], *rows["loss"]])
    return {"bits": (min(bits), max(bits)), "domain": domain}


def _frontier_caption(rows: pl.DataFrame, look: Look) -> str:
    said = "The hollow mark is this plan, predicted for codes alone; measured is the mean KL, its window exact"
    if by_of(look.rates) not in NATS:
        said = f"Losses by {by_of(look.rates)} are not divergences: the table below has the measured KL"
    return "; ".join([said, *not_drawn(rows["loss"])])


CHARTS = (
    Chart(
        "bits",
        ("allocation",),
        lambda _, look: look.rates.heads(look.allocation.plan),
        lambda rows, look: views.allocation_map(rows, least=look.widths[0], most=look.widths[-1]),
        lambda rows, _: views.allocation_caption(rows),
        why="How many bits each head gets.",
        badge="predicted",
    ),
    Chart(
        "losses",
        ("allocation",),
        lambda _, look: (
            _heads(look).group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
        ),
        lambda rows, look: views.loss_by_layer(rows, unit=unit_of(look.rates)),
        lambda rows, look: views.loss_caption(rows, unit=unit_of(look.rates)),
        lambda rows, _: kinds_of(rows),
        why="The loss of each layer, next to that of uniform bits in the same bytes.",
        badge="predicted",
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
        why="How much additional bits reduce the loss, and whether measurements agree.",
        badge="predicted",
    ),
    Chart(
        "sensitivity",
        (),
        lambda _, look: look.rates.sensitivities,
        lambda rows, look: views.sensitivity_by_layer(rows, unit=unit_of(look.rates, "unit of error")),
        why="How much an error in each layer raises the model's loss: sensitive layers get more bits.",
    ),
)
COORDINATES = Chart(
    "coordinates",
    ("allocation",),
    lambda _, look: look.rates.coordinates(look.allocation.plan),
    lambda rows, _: views.coordinate_map(rows),
    why="How many bits each coordinate gets.",
    badge="predicted",
)
"""A chart for tables with a method that gives each coordinate its own bits."""
