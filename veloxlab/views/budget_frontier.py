"""What bits are predicted to buy at every budget, where one plan stands, and what was measured of it and of others."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.allocation import KINDS
from veloxlab.views.columns import require
from veloxlab.views.furniture import caption_title, framed
from veloxlab.views.logscale import LABEL, Domain, log_domain, log_ticks, not_drawn, on_log_scale

STEPS = 160  # of the predicted line that are drawn: a page shows no more
ROWS = {
    "role": pl.String,  # "line", "now" or "measured"
    "kind": pl.String,  # "allocated" or "uniform"
    "true_bits": pl.Float64,
    "loss": pl.Float64,
    "name": pl.String,  # of a measured plan
}
"""Columns of `frontier_rows`."""


def budget_frontier(
    rows: pl.DataFrame,
    *,
    unit: str = "nats a token",
    bits: tuple[float, float] | None = None,
    domain: Domain | None = None,
    caption: str | None = None,
) -> alt.VConcatChart:
    """Draw the least predicted loss at every number of bits and uniform bits' beside it, one plan, and measurements.

    Dashed lines and hollow points are predicted; full points are measured. A loss of zero is drawn at the floor.

    Parameters
    ----------
    rows
        What `frontier_rows` gives.
    unit
        Of the loss.
    bits, domain
        Ends of the scales of true bits and of the loss; give them to keep them steady while a slider moves.
    caption
        The line under the heading; by default how many losses are not drawn.

    Returns
    -------
    alt.VConcatChart
        A chart with the param ``caption``.
    """
    needed = {"role": "text", "kind": "text", "true_bits": "number", "loss": "number", "name": "text"}
    require(rows, needed, "budget_frontier")  # type: ignore[arg-type]
    scale = domain or log_domain(rows["loss"])
    width = bits or (float(rows["true_bits"].min()), float(rows["true_bits"].max()))  # type: ignore[arg-type]
    colours = [palette.METHODS[method][0] for method in KINDS.values()]
    shapes = [palette.METHODS[method][1] for method in KINDS.values()]
    base = on_log_scale(alt.Chart(), "loss", scale).encode(
        x=alt.X("true_bits:Q", title="true bits a packed value, scales included")
        .scale(domain=list(width), nice=False, padding=8)
        .axis(tickCount=7, grid=True),
        y=alt.Y("loss_drawn:Q", title=["loss", unit])
        .scale(type="log", domain=scale, nice=False, clamp=True)
        .axis(values=log_ticks(scale), labelExpr=LABEL),
        color=alt.Color("kind:N", title=None).scale(domain=list(KINDS), range=colours),
    )
    shape = alt.Shape("kind:N", title=None).scale(domain=list(KINDS), range=shapes)
    tooltip = [
        alt.Tooltip("said:N", title="loss"),
        alt.Tooltip("name:N"),
        alt.Tooltip("true_bits:Q", title="true bits", format=".3f"),
        alt.Tooltip("loss:Q", title=unit, format=".3g"),
    ]
    lines = base.transform_filter("datum.role === 'line'").mark_line(strokeWidth=1.5, strokeDash=[5, 4], clip=True)
    now = base.transform_filter("datum.role === 'now'").transform_calculate(said="'predicted, ' + datum.kind")
    gap = (
        now.transform_aggregate(low="min(loss_drawn)", high="max(loss_drawn)", at="mean(true_bits)")
        .mark_rule(strokeWidth=1, color=palette.NEUTRAL)
        .encode(x="at:Q", y="low:Q", y2="high:Q", color=alt.value(palette.NEUTRAL))
    )
    predicted = now.mark_point(filled=False, strokeWidth=2.5, size=110, opacity=1).encode(shape=shape, tooltip=tooltip)
    words = now.transform_calculate(short="format(datum.loss, '.3~g')").mark_text(align="left", dx=11, fontWeight=600)
    measured = (
        base.transform_filter("datum.role === 'measured'")
        .transform_calculate(said="'measured, ' + datum.kind")
        .mark_point(filled=True, size=60, opacity=1)
        .encode(shape=shape, tooltip=tooltip)
    )
    plot = alt.layer(lines, gap, predicted, measured, words.encode(text="short:N")).properties(
        width=palette.WIDTH - 20, height=230, title=caption_title()
    )
    said = "; ".join(not_drawn(rows["loss"])) if caption is None else caption
    return framed([plot], rows, "What bits buy: dashed and hollow is predicted, full is measured", said, pickable=False)


def frontier_rows(
    lines: pl.DataFrame, now: pl.DataFrame | None = None, measured: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Put what the chart reads into one frame, `ROWS`.

    Parameters
    ----------
    lines
        Rows of ``kind``, ``true_bits`` and ``predicted_loss``, such as `veloxlab.RateBudget.frontier`; of more than
        `STEPS` steps of a kind, about as many are taken, evenly spread, with the first and the last.
    now
        The same columns, of the plan that is looked at, and of uniform bits in its bytes.
    measured
        Rows of ``kind``, ``true_bits``, ``kl_mean`` (nats) and ``name``.
    """
    require(lines, {"kind": "text", "true_bits": "number", "predicted_loss": "number"}, "frontier_rows")
    place, count = pl.int_range(pl.len()).over("kind"), pl.len().over("kind")
    stride = (count / STEPS).ceil()
    thin = lines.sort("kind", "true_bits").filter((place % stride == 0) | (place == count - 1))
    parts = [_part(thin, "line", "predicted_loss")]
    if now is not None:
        parts.append(_part(now, "now", "predicted_loss"))
    if measured is not None:
        parts.append(_part(measured, "measured", "kl_mean"))
    return pl.concat(parts)


def _part(frame: pl.DataFrame, role: str, loss: str) -> pl.DataFrame:
    name = pl.col("name") if "name" in frame.columns else pl.lit("")
    return frame.select(role=pl.lit(role), kind="kind", true_bits="true_bits", loss=loss, name=name).cast(ROWS)  # type: ignore[arg-type]
