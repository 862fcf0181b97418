"""The Compare page: how whole caches change the model's predictions, and a list of measured caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.checks import real
from veloxlab.errors import InputError
from veloxlab.measure.equal import EQUAL, at_equal_bits
from veloxlab.measure.planned_memory import CONTEXT, MOST_TOKENS
from veloxlab.views import frontier
from veloxlab.views.picture import Section
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.layout import button, columns, controls, wide
from veloxlab.widgets.pages.equal_bits import (
    CALIBRATE,
    Layouts,
    around,
    beyond_said,
    calibrating_said,
    comparable,
    equal_said,
    held_bits,
    layouts,
    points,
    to_calibrate,
)
from veloxlab.widgets.pages.experiment import Experiment, OfExperiment
from veloxlab.widgets.selection import Choice
from veloxlab.widgets.worker import Progress, Worker


class Comparison(OfExperiment):
    """Measure the fidelity of caches, see them in one chart, rank methods at equal bits, and choose a cache again.

    ``calibrate``, a trait: whether methods that need a calibration are calibrated and measured; else they are left out.
    ``ranked`` has the methods at ``equal_bits`` held bits for each value: `veloxlab.measure.equal.EQUAL`.
    """

    NAME = "compare"
    HELP = "11_search_pareto.ipynb#Use one of the results"
    WHY: ClassVar[dict[str, str]] = {
        "frontier": "Which cache loses least at the same bytes.",
    }
    context = Checked(CONTEXT, 4096, help="tokens at which the bytes of caches are compared")
    equal_bits = Checked(real(above=0), 3.0, help="held bits of a value at which methods are ranked, including scales")
    calibrate = t.Bool(False, help="first calibrate the methods that need it; finished calibrations are on disk")
    frontier = property(lambda page: page.charts.get("frontier"), doc="The chart; None before the first measurement.")

    def __init__(self, experiment: Experiment, worker: Worker) -> None:
        super().__init__(experiment.selection, worker)
        self.experiment, self.points = experiment, experiment.points
        self._slot, self._layouts = columns(), list[Layouts]()  # one for each point
        self._left_out = ipywidgets.HTML()
        self.ranked, self._equal = pl.DataFrame(schema=EQUAL), ipywidgets.HTML()
        self._list = ipywidgets.Dropdown(description="measured", tooltip="A measured cache, a point of the chart")
        self._take = button("Use it", "Choose the settings of this point", self._use)
        one = button("Measure this cache", "Compare its predictions with those of the exact cache", self.measure)
        tip = "Measure each method that is calibrated or needs no calibration, at the present bits"
        every = button("Measure all methods", tip, self.compare, width="auto")
        tip = "Measure each of these methods at the widths just below and just above the equal bits"
        equal = button("Measure at equal bits", tip, self.compare_equal, width="auto")
        self._list.observe(self._pick, "value")
        context = self._control(ipywidgets.BoundedIntText, "context", min=1, max=MOST_TOKENS)
        bits = self._control(ipywidgets.BoundedFloatText, "equal_bits", "equal bits", min=0.5, max=16, step=0.5)
        self.observe(lambda _: self._draw_points(), ["context", "equal_bits"])
        fit = self._control(ipywidgets.Checkbox, "calibrate", CALIBRATE, indent=False)
        self.observe(lambda _: self._redraw(), "calibrate")
        head = controls(one, every, context, bits, equal, fit, wide(self._list), self._take)
        self._laid_out([head, self._left_out], self._slot)
        self._watch(self.points, "every", self._show_points)
        self.follow()
        self._show_points()

    @property
    def summary(self) -> str:
        return f"{len(self.points.every)} caches were measured"

    @property
    def sections(self) -> list[Section]:
        if not self.charts:
            return []
        ranked = Section(f"At {self.equal_bits:g} held bits a value, {self.context:,} tokens", table=self.ranked)
        return [*super().sections, Section("Fidelity", table=self.measured), *[ranked] * (self.ranked.height > 0)]

    def compare(self) -> None:
        """Start to measure the fidelity of each method at the present or nearest bits; see ``calibrate``."""
        chosen = self.selection
        every = [chosen.changed(method=method, own_bits={}) for method in chosen.methods]
        ready = [choice for choice in every if all(self._may_run(choice.method, width) for width in choice.widths)]
        chosen.fitting.held.clear()
        self._submit("comparison", lambda progress: self._measure_each(ready, progress), first=True)

    def compare_equal(self) -> None:
        """Start to measure what the ranking lacks: each method's caches around the equal bits; see ``calibrate``."""
        chosen, bits, tokens = self.selection, self.equal_bits, self.context
        chosen.fitting.held.clear()
        runs, windows = self.points.every, self.points.windows
        known = [run.choice.cache for run in runs if comparable(run, runs[-1]) and run.kl.windows == windows]
        of_method = {
            method: [
                chosen.changed(method=method, key_bits=width, value_bits=width, own_bits={})
                for width in chosen.fitting.widths(method)
                if self._may_run(method, width)
            ]
            for method in chosen.methods
        }

        def job(progress: Progress) -> str:
            wanted, beyond = list[Choice](), []
            for method, choices in of_method.items():
                progress.check()
                held = [held_bits(layouts(self.experiment.model, choice), tokens) for choice in choices]
                found = around(bits, choices, held)
                wanted += found
                beyond += [] if found else [beyond_said(method, held, bits, tokens)]
            self._measure_each([choice for choice in wanted if choice.cache not in known], progress)
            return " ".join(filter(None, beyond))

        self._submit("equal bits", job, on_done=lambda said: self.say(said) if said else None, first=True)

    def _may_run(self, method: str, width: float) -> bool:
        return self.calibrate or self.selection.fitting.is_ready(method, width)

    def _measure_each(self, choices: Sequence[Choice], progress: Progress) -> None:
        """Measure each choice; at the end raises `InputError` that lists the failed ones."""
        exact = self.experiment.reference(progress) if choices else None
        refused = []
        for done, choice in enumerate(choices):

            def tell(_: int, __: int, doing: str, done: int = done, name: str = choice.name) -> None:
                progress(done, len(choices), f"{name}: {doing}")

            try:
                self.points.add(self.experiment.fidelity(choice, tell, exact))
            except InputError as error:
                refused.append(f"{choice.name} was left out: {error}")
        if refused:
            raise InputError(" ".join(refused))

    def _redraw(self) -> None:
        missing = to_calibrate(self.selection.fitting, self.selection.methods)
        self._left_out.value = calibrating_said(missing, self.calibrate)

    def _show_points(self, _: object = None) -> None:
        runs = self.points.every
        self._take.disabled = not runs
        if not runs:
            self.say("Press one of the buttons that measure: a chart of loss against bytes then compares the caches.")
            return
        self._layouts += [layouts(self.experiment.model, run.choice) for run in runs[len(self._layouts) :]]
        self._draw_points()
        self._list.options = [
            (f"{i + 1}: {run.name}, {run.choice.sinks} sinks, window {run.choice.window}", i)
            for i, run in enumerate(runs)
        ]
        self._list.value = len(runs) - 1
        self.say(self.points.newest)
        self._redraw()

    def _draw_points(self) -> None:
        """Draw the measured caches and the exact one at their bytes for the context, and rank methods."""
        if self._layouts:
            held = [ours.held(self.context) for ours, _ in self._layouts]
            rows = self.measured.with_columns(held_bytes=pl.Series(held), point=pl.int_range(pl.len(), dtype=pl.Int32))
            exact = self._layouts[0][1].held(self.context)
            chart = frontier(rows, x="held_bytes", tokens=self.context, exact_bytes=exact)
            first = not self.charts
            self._put({"frontier": chart}, self._slot)
            if first:
                self._slot.children = [*self.views, self._equal]
                self._watch(self.charts["frontier"], "picked_point", self._pick)
            known = points(self.points.every, self._layouts, self.context)
            self.ranked = at_equal_bits(known, self.equal_bits)
            given = self.points.every[-1], self.equal_bits, self.context, exact * self.equal_bits / 16
            self._equal.value = equal_said(self.ranked, known, *given)

    def _pick(self, change: dict[str, Any]) -> None:
        """Mark a measured cache in the chart and in the list."""
        point = change["new"]
        if point is not None and self.charts and point < len(self.points.every):
            self._list.value = self.charts["frontier"].picked_point = point

    def _use(self) -> None:
        taken = self.points.every[self._list.value].choice
        now = self.selection.choice
        self.selection.choice = replace(taken, token=now.token, ids=now.ids)
        self.say(f"All pages now show {taken.name}, sinks={taken.sinks}, window={taken.window}.")
