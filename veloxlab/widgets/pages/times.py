"""The page of times: how long each layer takes to store, decode and attend to tokens, and its bytes."""

from __future__ import annotations

import html
from typing import Any, ClassVar

import ipywidgets
import polars as pl

from veloxlab.measure.times import LAYER_TIMES, layer_times
from veloxlab.views.fidelity import times_by_layer, times_by_layer_caption
from veloxlab.views.picture import Section, table_of
from veloxlab.widgets.layout import button, columns, controls
from veloxlab.widgets.pages.experiment import Experiment, OfExperiment
from veloxlab.widgets.worker import Progress, Worker

ABOUT = (
    "A compressed cache needs time to store a token, and saves time where attention reads fewer bytes. Times are "
    "measured when you press the button, on this machine, with the captured text; other work makes them longer."
)


class Times(OfExperiment):
    """Time each layer of the chosen cache and of the exact cache, at the press of a button.

    ``timed`` has the newest times, rows of `veloxlab.measure.times.LAYER_TIMES`.
    """

    NAME = "times"
    WHY: ClassVar[dict[str, str]] = {"times": "In which layers a compressed cache takes more time, and in which less."}

    def __init__(self, experiment: Experiment, worker: Worker) -> None:
        super().__init__(experiment.selection, worker)
        self.experiment, self.points = experiment, experiment.points
        self.timed, self._of = pl.DataFrame(schema=LAYER_TIMES), ""
        self._slot = columns()
        ask = button("Time this cache", "Store, decode and attend in every layer, nine times each", self.time)
        self._laid_out([controls(ask)], ipywidgets.HTML(f"<div>{html.escape(ABOUT)}</div>"), self._slot)
        self.follow()

    def time(self) -> None:
        """Start to time the present settings."""
        experiment, choice = self.experiment, self.selection.choice
        self.selection.fitting.held.clear()

        def job(progress: Progress) -> pl.DataFrame:
            calibration = self.selection.fitting.calibration(choice.method, choice.widths, progress, choice.seed)
            given: dict[str, Any] = {"calibration": calibration, "progress": progress}
            return layer_times(experiment.model, experiment.capture, choice.plan(experiment.model), **given)

        self._submit("times", job, on_done=lambda timed: self._show(timed, choice.name), first=True)

    @property
    def summary(self) -> str:
        return f"{self._of}: {times_by_layer_caption(self.timed)}" if self._of else "nothing was timed yet"

    @property
    def sections(self) -> list[Section]:
        table = Section(self._of, table=self.timed, folded=table_of(self.timed))
        return [*super().sections, table] if self._of else []

    def _show(self, timed: pl.DataFrame, of: str) -> None:
        self.timed, self._of = timed, of
        chart = times_by_layer(timed, caption=f"{of}. {times_by_layer_caption(timed)}")
        self._put({"times": chart}, self._slot)
