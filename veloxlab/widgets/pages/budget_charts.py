"""The charts of a tuner: bits by head, losses by layer, what bits buy, and sensitivities; all from tables."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.allocate.budget import Bounds, Setting
from veloxlab.allocate.rates import Allocation, RateBudget
from veloxlab.allocate.sensitivity import NATS
from veloxlab.views import (
    allocation_caption,
    allocation_map,
    budget_frontier,
    frontier_rows,
    loss_by_layer,
    loss_caption,
    sensitivity_by_layer,
)
from veloxlab.views.scales import Domain, log_domain, not_drawn
from veloxlab.widgets.chart_view import ChartView, link


class TunerCharts:
    """Draw one allocation, and redraw another.

    Parameters
    ----------
    rates : the tables.
    setting, found : what is asked for, and what it came to.

    Attributes
    ----------
    bits, losses, frontier, sensitivity : the charts, each with ``frame``, ``to_parquet``, ``to_csv``, ``to_png`` and
        ``to_svg``. A layer picked in one is marked in all but the frontier, which has none.
    unit : of a predicted loss.
    """

    def __init__(self, rates: RateBudget, setting: Setting, found: Allocation) -> None:
        self._rates, weights = rates, rates.sensitivities
        self._by = str(weights["by"][0])
        self.unit = "nats a token" if self._by in NATS else f"in the unit of {self._by}"
        widths = self._rates.curves["bits"].unique().to_list()
        everything = self._rates.frontier(Bounds(min(widths), max(widths)))
        true_bits = everything["true_bits"].to_list()
        heads = self._heads(found)
        allocated = heads.filter(kind="allocated")
        self.bits = ChartView(allocation_map(allocated, least=min(widths), most=max(widths)))
        self.losses = ChartView(loss_by_layer(heads, unit=self.unit))
        # what all of these bounds can do; others, and measurements, may lie beyond
        self._usual = (min(true_bits), max(true_bits)), everything["predicted_loss"].to_list()
        rows = self._frontier_rows(setting, found, pl.DataFrame())
        self._ends = self._ends_with(rows)
        self.frontier = ChartView(self._drawn(rows))
        unit = "nats a unit of error" if self._by in NATS else self.unit
        self.sensitivity = ChartView(sensitivity_by_layer(weights, unit=unit))
        link(self.bits, self.losses, self.sensitivity)

    @property
    def named(self) -> dict[str, ChartView]:
        """From top to bottom."""
        return {"bits": self.bits, "losses": self.losses, "frontier": self.frontier, "sensitivity": self.sensitivity}

    def show(self, setting: Setting, found: Allocation, measured: pl.DataFrame) -> None:
        """Redraw: an allocation, and what was measured so far (`veloxlab.allocate.ratequant.JUDGED`)."""
        heads = self._heads(found)
        allocated = heads.filter(kind="allocated")
        layers = heads.group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
        self.bits.put(allocated.select(self.bits.frame.columns), caption=allocation_caption(allocated))
        self.losses.put(layers, caption=loss_caption(layers, unit=self.unit))
        rows = self._frontier_rows(setting, found, measured)
        before, self._ends = self._ends, self._ends_with(rows)
        if before == self._ends:
            self.frontier.put(rows, caption=self._frontier_caption(rows))
        else:
            self.frontier.show(self._drawn(rows))

    def spent(self, found: Allocation) -> str:
        """Say what an allocation takes."""
        said = (
            f"{found.true_bits:.2f} true bits a value, {found.bytes_per_token:,.0f} bytes a token; code bits: keys "
            f"{found.key_bits:.2f}, values {found.value_bits:.2f}"
        )
        if not found.only_least:
            return said
        least = found.bounds.least_bits
        return f"{said}. Nothing is allocated: the bounds' least width, {least}, is all that this pays for"

    def predicted(self, found: Allocation) -> str:
        """Say what an allocation, and uniform bits in the same bytes, are predicted to lose."""
        said = f"Predicted loss {found.predicted_loss:.3g} {self.unit}"
        uniform = found.predicted_uniform_loss
        return said if uniform is None else f"{said}; of uniform bits in the same bytes {uniform:.3g}"

    def _heads(self, found: Allocation) -> pl.DataFrame:
        """What each head gets, allocated and by uniform bits in the same bytes, where there are such."""
        plans = {"allocated": found.plan, "uniform": found.uniform}
        return pl.concat(
            self._rates.heads(plan).with_columns(kind=pl.lit(kind)) for kind, plan in plans.items() if plan is not None
        )

    def _frontier_rows(self, setting: Setting, found: Allocation, measured: pl.DataFrame) -> pl.DataFrame:
        losses = {"allocated": found.predicted_loss, "uniform": found.predicted_uniform_loss}
        now = pl.DataFrame(
            [(kind, found.true_bits, loss) for kind, loss in losses.items() if loss is not None],
            schema={"kind": pl.String, "true_bits": pl.Float64, "predicted_loss": pl.Float64},
            orient="row",
        )
        drawn = measured if self._by in NATS and not measured.is_empty() else None
        return frontier_rows(self._rates.frontier(setting.bounds), now, drawn)

    def _ends_with(self, rows: pl.DataFrame) -> tuple[Domain, Domain]:
        """Ends of the frontier's axes, of true bits and of loss, between which all of these rows lie."""
        (low, high), losses = self._usual
        bits = rows["true_bits"].to_list()
        return (min(low, *bits), max(high, *bits)), log_domain([*losses, *rows["loss"].to_list()])

    def _drawn(self, rows: pl.DataFrame) -> alt.VConcatChart:
        bits, domain = self._ends
        return budget_frontier(rows, unit=self.unit, bits=bits, domain=domain, caption=self._frontier_caption(rows))

    def _frontier_caption(self, rows: pl.DataFrame) -> str:
        said = f"Losses by {self._by} are no divergences: what is measured stands in the table below"
        if self._by in NATS:
            said = (
                "The hollow square is this plan, predicted for codes alone; measured is the mean KL, its window exact"
            )
        return "; ".join([said, *not_drawn(rows["loss"])])
