"""The base of pages of one KV head: its charts, for a method and a number of bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import altair as alt
import ipywidgets
import polars as pl

from veloxlab.cache.calibration import Calibration
from veloxlab.checks import checked
from veloxlab.measure import Capture
from veloxlab.widgets.chosen import Chosen, ChosenBits, Seeded
from veloxlab.widgets.layout import controls
from veloxlab.widgets.pages.charts import Chart, ChartPage, Look
from veloxlab.widgets.selection import Fitting, Selection
from veloxlab.widgets.worker import Worker

CODED = ("layer", "method", "bits", "seed")  # settings of measurements of a method


def head_chart(
    name: str,
    depends: tuple[str, ...],
    draw: Callable[..., alt.TopLevelMixin],
    caption: Callable[..., str],
    shape: Callable[[pl.DataFrame, Look], object] = lambda rows, look: None,
    more: Callable[[Look], dict[str, Any]] = lambda look: {},
    why: str = "",
    data: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows,
) -> Chart:
    """A chart of one KV head, from a frame of all heads, which depends on the settings ``depends``.

    ``draw`` and ``caption`` take the rows, and the arguments that ``more`` returns.
    """
    return Chart(
        name,
        ("head", *depends),
        lambda frames, look: frames[0].filter(head=look.head),
        lambda rows, look: draw(rows, **more(look)),
        lambda rows, look: caption(rows, **more(look)),
        shape,
        lambda look: [(name, *(getattr(look, setting) for setting in depends))],
        why,
        data=data,
    )


class HeadPage(Seeded, ChartPage):
    """Charts of one KV head of one layer, for a method and a number of bits, measured on a capture.

    A subclass has ``CHARTS``, and ``RARE``: the names of charts that some models lack, the part of a layer's capture
    that they need, and a sentence for models without it.
    """

    CHARTS: ClassVar[Sequence[Chart]]
    RARE: ClassVar[tuple[tuple[str, ...], str, str]]

    tensor: Any = "keys"
    layer = Chosen("layer", read="shown_layer", help="the shown layer, by its index in the prompt cache")
    head = Chosen("head", help="the shown KV head of that layer")
    method = Chosen("method", help="a method's id")
    bits = ChosenBits(
        "", "shown_layer", help="code bits of each coordinate, 1 to 8 by the method; the label names the layers"
    )

    @checked()
    def __init__(
        self,
        capture: Capture,
        *,
        layer: int | None = None,
        head: int = 0,
        method: str = "turboquant",
        bits: int = 2,
        calibration: Calibration | None = None,
        selection: Selection | None = None,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        chosen: dict[str, Any] = {"layer": layer, "head": head, "method": method, "key_bits": bits, "value_bits": bits}
        selection = selection or Selection.of(capture, Fitting(given=calibration), **chosen)
        super().__init__(selection, worker, capture, **settings)
        self._width = self._bits("bits")
        rare, needs, self._missing = self.RARE
        if all(getattr(layer, needs) is not None for layer in capture.layers):
            rare, self._missing = (), ""
        self._draw(chart for chart in self.CHARTS if chart.name not in rare)
        self._laid_out([self._controls()], self._grid)
        self.follow()

    def _likely(self) -> Iterable[Look]:
        chosen, fitting = self.selection, self.selection.fitting
        looks = [self._look(layer=self.layer + step) for step in (1, -1) if self.layer + step in chosen.layers]
        ready = [b for b in chosen.widths if abs(b - self.bits) == 1 and fitting.is_ready(self.method, b)]
        looks += [self._look(bits=bits) for bits in ready]
        others = [m for m in chosen.methods if self.bits in fitting.widths(m) and fitting.is_ready(m, self.bits)]
        return looks + [self._look(method=method) for method in others if method != self.method]

    @property
    def notes(self) -> list[str]:
        """Sentences: which chart is missing, and of which layers the bits are."""
        own, note = self.selection.choice.own_bits, ""
        if self.layer in own:
            note = f"These are bits of layer {self.layer} alone."
        elif own:
            note = f"These are bits of all layers except {', '.join(map(str, sorted(own)))}."
        return [*super().notes, self._missing, note]

    def _redraw(self) -> None:
        super()._redraw()
        scope = f"layer {self.layer}" if self.layer in self.selection.choice.own_bits else "all"
        self._width.description = f"{self.tensor[0].upper()} bits ({scope})"

    def _controls(self, *own: ipywidgets.Widget) -> ipywidgets.Widget:
        layers, heads = self.selection.layers, range(self.selection.heads)
        steps = ipywidgets.SelectionSlider
        return controls(
            self._control(steps, "layer", options=layers),
            self._control(steps, "head", options=heads),
            *own,
            self._methods(),
            self._width,
        )
