"""The charts of the laboratory: what each layer loses, how bits are spent, what is held, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

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
from veloxlab.views.report import Section
from veloxlab.widgets.chart_view import ChartView, link
from veloxlab.widgets.tables import Bits, Tables

METRICS = {
    "attention output (relative MSE)": "output_error",
    "attention logits (nats)": "logit_error",
    "keys and values (relative MSE)": "rel_mse",
}
DOMAINS = {"rel_mse": (1e-5, 1.0), "output_error": (1e-6, 1.0), "logit_error": (1e-3, 10.0)}
DRAWN_UPTO = 16384  # tokens to which the memory chart goes on
HEADINGS = {
    "errors": "What each layer loses",
    "bits": "How the bits are spent",
    "memory": "What is held",
    "frontier": "What was measured",
}


@dataclass(frozen=True)
class Knobs:
    """What the charts depend on: code bits of each layer, tokens kept exact, and which error is drawn."""

    layer_bits: Bits
    sinks: int
    window: int
    metric: str


class LabCharts:
    """Draw one setting of the knobs, and redraw others, from `Tables`.

    Parameters
    ----------
    tables : which hold what the first setting needs.
    method : id of the method, by which the cache is named.
    greatest : bits to which the axis of spent bits goes.
    knobs : the first setting.

    Attributes
    ----------
    errors, bits, memory, frontier : the charts; there is a frontier once something was measured.
    """

    def __init__(self, tables: Tables, method: str, greatest: int, knobs: Knobs) -> None:
        self._tables, self._method = tables, method
        errors, spent, held = self._rows(knobs)
        assert errors is not None, "the first settings are measured before anything is built"
        assert spent is not None
        assert held is not None
        self.errors = ChartView(error_map(errors, metric=knobs.metric, domain=DOMAINS[knobs.metric]))
        self.bits = ChartView(bit_allocation(spent, greatest=greatest))
        self.memory = ChartView(memory_growth(held))
        self.frontier: ChartView | None = None
        link(self.errors, self.bits, self.memory)

    @property
    def named(self) -> dict[str, ChartView]:
        """Those that there are, from top to bottom."""
        charts = {"errors": self.errors, "bits": self.bits, "memory": self.memory}
        return charts | ({"frontier": self.frontier} if self.frontier else {})

    def show(self, knobs: Knobs, *, new_metric: bool = False) -> bool:
        """Redraw what is measured of a setting, and tell whether that was all; the rest shows the last one."""
        rows = errors, spent, held = self._rows(knobs)
        if errors is not None and new_metric:
            self.errors.show(error_map(errors, metric=knobs.metric, domain=DOMAINS[knobs.metric]))
        elif errors is not None:
            self.errors.put(errors, caption=error_caption(errors, knobs.metric))
        if spent is not None:
            self.bits.put(spent, caption=bit_caption(spent))
        if held is not None:
            self.memory.put(held, caption=memory_caption(held))
        return all(part is not None for part in rows)

    def show_measured(self, measured: pl.DataFrame, place: Callable[[ChartView], None]) -> None:
        """Draw what was measured so far (`veloxlab.fidelity`); the chart is given to ``place`` when it is made."""
        chart = frontier(measured, x="held_bytes")
        if self.frontier is None:
            self.frontier = ChartView(chart)
            place(self.frontier)
        else:
            self.frontier.show(chart)

    def relative_error(self, knobs: Knobs, tensor: str) -> float:
        """Mean relative error of all keys or values; NaN while it is not measured."""
        errors = self._tables.errors(knobs.layer_bits, "rel_mse", knobs.sinks, knobs.window)
        return float("nan") if errors is None else float(errors.filter(tensor=tensor)["rel_mse"].mean())  # type: ignore[arg-type]

    def save(self, folder: Path) -> list[Path]:
        """Write each chart as SVG and PNG and its rows as Parquet, and give the files."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, view in self.named.items():
            files += [view.to_svg(folder / f"{name}.svg"), view.to_png(folder / f"{name}.png")]
            files.append(view.to_parquet(folder / f"{name}.parquet"))
        return files

    @property
    def sections(self) -> list[Section]:
        """The charts as parts of a report."""
        return [Section(HEADINGS[name], chart=view.to_dict()) for name, view in self.named.items()]

    def _rows(self, knobs: Knobs) -> tuple[pl.DataFrame | None, pl.DataFrame | None, pl.DataFrame | None]:
        """What the charts of errors, bits and memory show, as far as it is measured."""
        bits, exact = knobs.layer_bits, (knobs.sinks, knobs.window)
        # by the method's name alone: a name that moved with the sliders would leave the chart's colours
        held = self._tables.memory(bits, *exact, self._method)
        return (
            self._tables.errors(bits, knobs.metric, *exact),
            self._tables.code_bits(bits),
            None if held is None else predicted_growth(held, DRAWN_UPTO),
        )
