"""Log scales: every chart leaves out, floors and labels numbers in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable

import altair as alt
import polars as pl

Domain = tuple[float, float]

LABEL = "format(datum.value, datum.value < 0.001 ? '~e' : '~g')"  # of a tick, in Vega: 0.002 and 2e-5
NEAR = 1e-9  # relative room for rounding errors
DEEP = 1e-6  # what lies further under the greatest value is drawn at the floor


def on_log_scale(chart: alt.Chart, field: str, domain: Domain | None = None) -> alt.Chart:
    """Give the rows of a chart the field ``{field}_drawn``, which a log scale can show; the page computes it.

    Rows in which the field is null, NaN or infinite are left out; `not_drawn` counts them for a caption. What is below
    ``domain``, the ends of the scale, is drawn at its floor; without a domain, zero and less is left out.
    """
    value = f"datum.{field}"
    there = chart.transform_filter(f"isValid({value}) && isFinite({value})" + ("" if domain else f" && {value} > 0"))
    return there.transform_calculate(**{f"{field}_drawn": f"max({value}, {domain[0]!r})" if domain else value})


def not_drawn(values: pl.Series, *, zero: bool = False) -> list[str]:
    """Say how many values are null, NaN or infinite, or, with ``zero``, not above zero; nothing if there are none."""
    numbers = values.cast(pl.Float64)
    drawn = numbers.is_finite() & ((numbers > 0) | (not zero))
    count = len(numbers) - int(drawn.sum())
    return [f"{count} not drawn: {'not above zero, or ' * zero}not finite"] if count else []


def log_domain(values: Iterable[float | None]) -> Domain:
    """Give round ends of a log scale, at least a factor of five apart, that hold the finite values above zero.

    What lies under a millionth of the greatest value does not count.
    """
    drawn = [value for value in values if value is not None and 0 < value < math.inf]
    greatest = max(drawn, default=1.0)
    least = min((value for value in drawn if value > greatest * DEEP), default=greatest)
    first, last = (math.floor(math.log10(end)) for end in (least, greatest))
    steps = log_steps(1, 2, 5, low=first - 1, high=last + 1)
    low = max(step for step in steps if step <= least * (1 + NEAR))
    high = min(step for step in steps if step >= greatest * (1 - NEAR))
    return (low, high) if high / low >= 5 else (low / 5, high)


def log_ticks(domain: Domain) -> list[float]:
    """Give round values within a domain, decades alone where there are more than three."""
    low, high = (math.floor(math.log10(end) + NEAR) for end in domain)
    values = log_steps(*((1, 2, 5) if high - low <= 3 else (1,)), low=low, high=high)
    return [value for value in values if domain[0] * (1 - NEAR) <= value <= domain[1] * (1 + NEAR)]


def log_steps(*steps: int, low: int = -12, high: int = 6) -> list[float]:
    """Give such steps of decades, for an axis whose ends its rows make: only those between them are drawn."""
    return [float(f"{step}e{power}") for power in range(low, high + 1) for step in steps]


def log_y(field: str, title: list[str], domain: Domain) -> alt.Y:
    """Give the y axis of a field of `on_log_scale`, with round labels."""
    y: alt.Y = alt.Y(f"{field}_drawn:Q", title=title).scale(type="log", domain=domain, nice=False, clamp=True)
    return y.axis(values=log_ticks(domain), labelExpr=LABEL)


def log_colour(field: str, title: str | list[str], domain: Domain) -> alt.Color:
    """Give the colour of a field of `on_log_scale`, with a gradient as its legend."""
    legend = alt.Legend(values=log_ticks(domain), labelExpr=LABEL, gradientLength=110, gradientThickness=10)
    colour: alt.Color = alt.Color(f"{field}_drawn:Q", title=title, legend=legend)
    return colour.scale(type="log", domain=domain, clamp=True)
