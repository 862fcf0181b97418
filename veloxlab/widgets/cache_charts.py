"""The charts of a cache: what each layer loses, how bits are spent, what is held, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from veloxlab.codecs import find_method
from veloxlab.measure import predicted_growth
from veloxlab.views import (
    bit_allocation,
    bit_caption,
    error_caption,
    error_map,
    frontier,
    memory_caption,
    memory_growth,
)
from veloxlab.widgets.chart_view import ChartView, link
from veloxlab.widgets.tables import Bits, Tables

METRICS = {
    "attention output (relative MSE)": "output_error",
    "attention logits (nats)": "logit_error",
    "keys and values (relative MSE)": "rel_mse",
}
DOMAINS = {"rel_mse": (1e-5, 1.0), "output_error": (1e-6, 1.0), "logit_error": (1e-3, 10.0)}
GREATEST = 9  # bits to which the axis of spent bits goes, at least
DRAWN_UPTO = 16384  # tokens to which the memory chart goes on


@dataclass(frozen=True)
class Knobs:
    """What the charts depend on: method, code bits of each layer, tokens kept exact, and which error is drawn."""

    method: str
    layer_bits: Bits
    sinks: int
    window: int
    metric: str


class CacheCharts:
    """Draw one setting of the knobs, and redraw others, from `Tables`.

    Parameters
    ----------
    tables : of the method, which hold what the first setting needs.
    knobs : the first setting.

    Attributes
    ----------
    errors, bits, memory, frontier : the charts; there is a frontier once something was measured.
    """

    def __init__(self, tables: Tables, knobs: Knobs) -> None:
        errors, spent, held = _rows(tables, knobs)
        assert errors is not None, "the first settings are measured before anything is built"
        assert spent is not None
        assert held is not None
        self.errors = ChartView(error_map(errors, metric=knobs.metric, domain=DOMAINS[knobs.metric]))
        self.bits = ChartView(bit_allocation(spent, greatest=_greatest(knobs.method)))
        self.memory = ChartView(memory_growth(held))
        self.frontier: ChartView | None = None
        self._shape = {"errors": knobs.metric, "bits": knobs.method, "memory": knobs.method}
        link(self.errors, self.bits, self.memory)

    @property
    def named(self) -> dict[str, ChartView]:
        """Those that there are, from top to bottom."""
        charts = {"errors": self.errors, "bits": self.bits, "memory": self.memory}
        return charts | ({"frontier": self.frontier} if self.frontier else {})

    def show(self, tables: Tables, knobs: Knobs) -> bool:
        """Redraw what is measured of a setting, and tell whether that was all; the rest shows the last one."""
        rows = errors, spent, held = _rows(tables, knobs)
        if errors is not None:
            if self._is_new("errors", knobs.metric):
                self.errors.show(error_map(errors, metric=knobs.metric, domain=DOMAINS[knobs.metric]))
            else:
                self.errors.put(errors, caption=error_caption(errors, knobs.metric))
        if spent is not None:
            if self._is_new("bits", knobs.method):
                self.bits.show(bit_allocation(spent, greatest=_greatest(knobs.method)))
            else:
                self.bits.put(spent, caption=bit_caption(spent))
        if held is not None:
            if self._is_new("memory", knobs.method):
                self.memory.show(memory_growth(held))
            else:
                self.memory.put(held, caption=memory_caption(held))
        return all(part is not None for part in rows)

    def _is_new(self, chart: str, shape: str) -> bool:
        """Whether a chart's spec changes, and not its numbers alone."""
        before, self._shape[chart] = self._shape[chart], shape
        return before != shape

    def show_measured(self, measured: pl.DataFrame, place: Callable[[ChartView], None]) -> None:
        """Draw what was measured so far (`veloxlab.fidelity`); the chart is given to ``place`` when it is made."""
        chart = frontier(measured, x="held_bytes")
        if self.frontier is None:
            self.frontier = ChartView(chart)
            place(self.frontier)
        else:
            self.frontier.show(chart)


def _rows(tables: Tables, knobs: Knobs) -> tuple[pl.DataFrame | None, pl.DataFrame | None, pl.DataFrame | None]:
    """What the charts of errors, bits and memory show, as far as it is measured."""
    bits, exact = knobs.layer_bits, (knobs.sinks, knobs.window)
    # by the method's name alone: a name that moved with the sliders would leave the chart's colours
    held = tables.memory(bits, *exact, knobs.method)
    return (
        tables.errors(bits, knobs.metric, *exact),
        tables.code_bits(bits),
        None if held is None else predicted_growth(held, DRAWN_UPTO),
    )


def _greatest(method: str) -> int:
    return max(GREATEST, find_method(method).bits[-1] + 1)
