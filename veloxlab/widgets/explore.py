"""One slider over frames that are already measured, and the chart of the one it points at."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import altair as alt
import ipywidgets
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import picture
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.lifetime import Ending, keep_shown, loosen


class Explore(Ending, ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Show one of several frames as a chart; a slider chooses which. Nothing is computed when it moves.

    Parameters
    ----------
    frames : what the slider can point at: frames by the values of the setting that they were measured with.
    draw : makes the chart of a frame.
    description : what the values are, in a word.
    value : where the slider begins; the first by default.

    Attributes
    ----------
    slider : the control; set ``slider.value`` and the chart follows.
    view : the `ChartView`.

    Raises
    ------
    InputError : there are no frames, or ``value`` is not among them.
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
        start = next(iter(frames)) if value is None else value
        if start not in frames:
            raise InputError(f"There is no frame for {start!r}: choose one of {', '.join(map(str, frames))}.")
        self._frames, self._draw = dict(frames), draw
        self.slider = ipywidgets.SelectionSlider(options=list(frames), value=start, description=description)
        self.view = ChartView(draw(self._frames[start]))
        self.slider.observe(lambda _: self._show(), "value")
        super().__init__([self.slider, self.view])
        loosen(self)

    def _show(self) -> None:
        self.view.show(self._draw(self._frames[self.slider.value]))

    def __repr__(self) -> str:
        return f"Explore({self.slider.description} = {self.slider.value} of {', '.join(map(str, self._frames))})"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        keep_shown(self)
        bundle = super()._repr_mimebundle_(**kwargs)
        still = base64.b64encode(picture.png(self.view.to_dict())).decode()
        return {**bundle, "image/png": still, "text/plain": repr(self)}
