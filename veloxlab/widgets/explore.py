"""One slider over measured frames, and the chart of the chosen one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import altair as alt
import ipywidgets
import polars as pl

from veloxlab.errors import InputError
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.lifetime import Ending, loosen


class Explore(Ending, ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Show one of several frames as a chart; a slider chooses which. A move of the slider measures nothing.

    ``frames``: frames by the value of the setting that they were measured with; these are the slider's values.
    ``draw``: a function from a frame to its chart. ``description``: the slider's label. ``value``: where the slider
    starts; by default the first. The chart, ``view``, follows ``slider.value``. Raises `InputError` if there are no
    frames, or if ``value`` is not among them.
    """

    def __init__(
        self,
        frames: Mapping[Any, pl.DataFrame],
        draw: Callable[[pl.DataFrame], alt.TopLevelMixin],
        *,
        description: str,
        value: object = None,
    ) -> None:
        if not frames:
            raise InputError("There is nothing to explore: give at least one frame.")
        frames = dict(frames)
        start = next(iter(frames)) if value is None else value
        if start not in frames:
            raise InputError(f"There is no frame for {start!r}: choose one of {', '.join(map(str, frames))}.")
        self.slider = ipywidgets.SelectionSlider(options=list(frames), value=start, description=description)
        self.view = view = ChartView(draw(frames[start]))
        self.slider.observe(lambda change: view.show(draw(frames[change["new"]])), "value")
        super().__init__([self.slider, view])
        loosen(self)

    @property
    def views(self) -> tuple[ChartView, ...]:
        return (self.view,)

    def __repr__(self) -> str:
        return f"Explore({self.slider.description} = {self.slider.value} of {', '.join(map(str, self.slider.options))})"
