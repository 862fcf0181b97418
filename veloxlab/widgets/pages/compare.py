"""The page that compares: what whole caches change in the model's predictions, and a list of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import ipywidgets
import polars as pl

from veloxlab.checks import real, whole
from veloxlab.measure.equal import EQUAL, at_equal_bits
from veloxlab.views import frontier
from veloxlab.views.picture import Section
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.layout import button, columns, controls
from veloxlab.widgets.pages.equal_bits import Layouts, around, comparable, equal_said, held_bits, layouts, points
from veloxlab.widgets.pages.experiment import Experiment, OfExperiment
from veloxlab.widgets.selection import Choice
from veloxlab.widgets.worker import Progress, Worker


class Comparison(OfExperiment):
    """Measure the fidelity of caches, see them in one chart, rank methods at equal bits, and choose a cache again.

    ``ranked`` are the methods where each holds ``equal_bits`` for a value: `veloxlab.measure.equal.EQUAL`.
    """

    NAME = "compare"
    HELP = "11_search_pareto.ipynb#Use one of the results"
    WHY: ClassVar[dict[str, str]] = {
        "frontier": "Which cache loses least in as many bytes.",
    }
    context = Checked(whole(1), 4096, help="tokens at which the bytes of caches are compared")
    equal_bits = Checked(
        real(above=0), 3.0, help="bits held for a value, at which methods are ranked; scales are included"
    )
    frontier = property(lambda page: page.charts.get("frontier"), doc="The chart, once something was measured.")

    def __init__(self, experiment: Experiment, worker: Worker) -> None:
        super().__init__(experiment.selection, worker)
        self.experiment, self.points = experiment, experiment.points
        self._slot, self._layouts = columns(), list[Layouts]()  # of each point
        self.ranked, self._equal = pl.DataFrame(schema=EQUAL), ipywidgets.HTML()
        self._list = ipywidgets.Dropdown(description="measured", tooltip="A point of the chart")
        self._take = button("Use it", "Choose the settings of this point", self._use)
        one = button("Measure this cache", "Compare its predictions with those of the exact cache", self.measure)
        tip = "At these bits, each method that needs no fitting"
        every = button("Measure all methods", tip, self.compare, width="auto")
        tip = "Each method that needs no fitting, with just more and just fewer bits than are chosen beside"
        equal = button("Measure at equal bits", tip, self.compare_equal, width="auto")
        self._list.observe(self._pick, "value")
        context = self._control(ipywidgets.BoundedIntText, "context", min=1, max=2**24)
        bits = self._control(ipywidgets.BoundedFloatText, "equal_bits", "equal bits", min=0.5, max=16, step=0.5)
        self.observe(lambda _: self._draw_points(), ["context", "equal_bits"])
        head = controls(one, every, context, bits, equal, self._list, self._take)
        self._laid_out([head], self._slot, self._equal)
        self._watch(self.points, "every", self._show_points)
        self._show_points()

    @property
    def summary(self) -> str:
        return f"{len(self.points.every)} caches were measured"

    @property
    def sections(self) -> list[Section]:
        if not self.charts:
            return []
        ranked = Section(f"At {self.equal_bits:g} bits held a value, {self.context:,} tokens", table=self.ranked)
        return [*super().sections, Section("Fidelity", table=self.measured), *[ranked] * (self.ranked.height > 0)]

    def compare(self) -> None:
        """Ask for the fidelity of every method that needs no fitting, at the present bits or those next to them."""
        chosen = self.selection
        every = [chosen.changed(method=method, own_bits={}) for method in chosen.methods]
        ready = [c for c in every if all(chosen.fitting.is_ready(c.method, width) for width in c.widths)]
        self._submit("comparison", lambda progress: self._measure_each(ready, progress), first=True)

    def compare_equal(self) -> None:
        """Ask for what the ranking lacks: of every method that needs no fitting, the caches around the equal bits."""
        chosen, bits, tokens = self.selection, self.equal_bits, self.context
        runs, windows = self.points.every, self.points.windows
        known = [run.choice.cache for run in runs if comparable(run, runs[-1]) and run.kl.windows == windows]
        of_method = [
            [
                chosen.changed(method=method, key_bits=width, value_bits=width, own_bits={})
                for width in chosen.fitting.widths(method)
                if chosen.fitting.is_ready(method, width)
            ]
            for method in chosen.methods
        ]

        def job(progress: Progress) -> None:
            wanted = []
            for choices in of_method:
                held = [held_bits(layouts(self.experiment.model, choice), tokens) for choice in choices]
                wanted += around(bits, choices, held)
            self._measure_each([choice for choice in wanted if choice.cache not in known], progress)

        self._submit("equal bits", job, first=True)

    def _measure_each(self, choices: Sequence[Choice], progress: Progress) -> None:
        exact = self.experiment.reference(progress) if choices else None
        for done, choice in enumerate(choices):
            progress(done, len(choices), f"measuring {choice.name}")
            self.points.add(self.experiment.fidelity(choice, lambda *_: progress.check(), exact))

    def _show_points(self, _: object = None) -> None:
        runs = self.points.every
        self._take.disabled = not runs
        if not runs:
            return
        self._layouts += [layouts(self.experiment.model, run.choice) for run in runs[len(self._layouts) :]]
        self._draw_points()
        self._list.options = [
            (f"{i + 1}: {run.name}, {run.choice.sinks} sinks, window {run.choice.window}", i)
            for i, run in enumerate(runs)
        ]
        self._list.value = len(runs) - 1
        self.say(self.points.newest)

    def _draw_points(self) -> None:
        """Draw what was measured at the bytes of the chosen context, the exact cache beside it, and rank methods."""
        if self._layouts:
            held = [ours.held(self.context) for ours, _ in self._layouts]
            rows = self.measured.with_columns(held_bytes=pl.Series(held), point=pl.int_range(pl.len(), dtype=pl.Int32))
            exact = self._layouts[0][1].held(self.context)
            chart = frontier(rows, x="held_bytes", tokens=self.context, exact_bytes=exact)
            first = not self.charts
            self._put({"frontier": chart}, self._slot)
            if first:
                self._watch(self.charts["frontier"], "picked_point", self._pick)
            known = points(self.points.every, self._layouts, self.context)
            self.ranked = at_equal_bits(known, self.equal_bits)
            given = self.points.every[-1], self.equal_bits, self.context, exact * self.equal_bits / 16
            self._equal.value = equal_said(self.ranked, known, *given)

    def _pick(self, change: dict[str, Any]) -> None:
        """Choose a measured cache: its point in the chart, and its line in the list."""
        point = change["new"]
        if point is not None and self.charts and point < len(self.points.every):
            self._list.value = self.charts["frontier"].picked_point = point

    def _use(self) -> None:
        taken = self.points.every[self._list.value].choice
        now = self.selection.choice
        self.selection.choice = replace(taken, token=now.token, ids=now.ids)
        self.say(f"All pages now show {taken.name}, sinks={taken.sinks}, window={taken.window}.")
