"""The page of runs: all measured runs, two of them side by side, and how certain their difference is."""

from __future__ import annotations

import html
from functools import partial
from typing import Any, ClassVar

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.errors import InputError
from veloxlab.views.fidelity import window_losses
from veloxlab.views.picture import Section, html_table
from veloxlab.widgets.chosen import Seeded
from veloxlab.widgets.layout import button, columns, controls, wide
from veloxlab.widgets.pages.experiment import Experiment, OfExperiment
from veloxlab.widgets.runs import Run, apart
from veloxlab.widgets.selection import MOST_SEED
from veloxlab.widgets.worker import Worker

FILE = "runs.parquet"
TITLES = [
    "",
    "run",
    "KL (nats)",
    "95 % interval",
    "windows",
    "other first choice",
    "MB held",
    "sinks + window",
    "seed",
    "measured, UTC",
]
CELL = "padding: 1px 14px 1px 0"
ABOUT = (
    "Two runs on the same text are compared window by window. A difference whose interval contains 0 may be chance: "
    "then measure on more windows. Runs end with this laboratory, also when its cell runs again: save them first."
)


PARTS = {
    "method": "method",
    "key_bits": "code bits of keys",
    "value_bits": "code bits of values",
    "own_bits": "layers with bits of their own",
    "sinks": "sinks",
    "window": "window",
    "seed": "seed",
}
MEASURED = {
    "perplexity": "perplexity",
    "key_bits": "true bits of keys",
    "value_bits": "true bits of values",
    "held_bits": "held bits a value",
    "held_bytes": "bytes held",
    "positions": "predictions",
}
PAIR = ("first", "second")


class RunsPage(Seeded, OfExperiment):
    """Keep and name runs, and compare two of them window by window.

    ``first`` and ``second`` are traits: the numbers of the two compared runs; the oldest is 0. ``points`` has all runs:
    see `veloxlab.widgets.runs.Runs`.
    """

    NAME = "runs"
    WHY: ClassVar[dict[str, str]] = {"windows": "Whether one cache loses more in every window."}

    first = t.Int(0, help="the run that the second is compared with")
    second = t.Int(0, help="the second run; you can rename it and use its settings")

    def __init__(self, experiment: Experiment, worker: Worker) -> None:
        super().__init__(experiment.selection, worker)
        self.experiment, self.points = experiment, experiment.points
        tips = [(each, self.traits()[each].help.capitalize()) for each in PAIR]
        self._lists = [ipywidgets.Dropdown(description=each, tooltip=tip) for each, tip in tips]
        tip = "A name for the second run"
        self._name = ipywidgets.Text(description="name", tooltip=tip, continuous_update=False)
        self._said, self._pair, self._table = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._slot = columns()
        why = ipywidgets.HTML(f"<div>{ABOUT}</div>")
        self._laid_out([self._controls()], why, self._said, self._slot, self._pair, self._table)
        for each, control in zip(PAIR, self._lists, strict=True):
            control.observe(lambda change, each=each: self.set_trait(each, change["new"] or 0), "value")
        self._name.observe(self._rename, "value")
        self.observe(lambda _: self._show_pair(), list(PAIR))
        self._watch(self.points, "every", self._show_runs)
        self._show_runs()
        self.follow()

    @property
    def pair(self) -> tuple[Run, Run]:
        """The two compared runs; raises `InputError` if nothing was measured yet."""
        runs = self.points.every
        if not runs:
            raise InputError("Nothing was measured yet: measure a cache first.")
        last = len(runs) - 1
        return runs[min(self.first, last)], runs[min(self.second, last)]

    @property
    def summary(self) -> str:
        return apart(*self.pair) if len(self.points.every) > 1 else f"{len(self.points.every)} caches were measured"

    @property
    def sections(self) -> list[Section]:
        return [*super().sections, Section("Runs", table=self.points.table.drop("windows"))] if self.charts else []

    def use(self) -> None:
        """Choose the settings of the second run on all pages."""
        run = self.pair[1]
        self.selection.choose(**{name: getattr(run.choice, name) for name in PARTS})
        self.say(f"All pages now show {run.name}.")

    def save(self) -> None:
        """Write all runs into a file in the kernel's folder."""
        self.say(f'The runs are in {self.points.save(FILE)}. To read them again: lab.points.open("{FILE}").')

    def _rename(self, change: dict[str, Any]) -> None:
        if self.points.every and change["new"] and change["new"] != self.pair[1].name:
            self.points.rename(min(self.second, len(self.points.every) - 1), change["new"])

    def _show_runs(self, _: object = None) -> None:
        runs = self.points.every
        options = [(f"{i + 1}: {run.name}", i) for i, run in enumerate(runs)]
        known = len(self._lists[0].options)
        for control, value in zip(self._lists, (self.first, self.second), strict=True):
            kept = value if len(runs) == known else len(runs) - 1 if control is self._lists[1] else value
            control.options = options
            control.value = min(kept, len(runs) - 1) if runs else None
        self._table.value = html_table(TITLES, map(_line, range(len(runs)), runs), cell=CELL, left=2) if runs else ""
        self._show_pair()

    def _show_pair(self) -> None:
        if not self.points.every:
            return
        first, second = self.pair
        same = first is second
        self._name.value = second.name
        self._said.value = "" if same else f"<div class='veloxlab-verdict'>{html.escape(apart(first, second))}</div>"
        named = [("" if first.name != second.name else "first: ") + first.name, second.name]
        frames = [
            run.windows.with_columns(cache=pl.lit(name)) for run, name in zip((first, second), named, strict=True)
        ]
        self._put({"windows": window_losses(frames[1] if same else pl.concat(frames))}, self._slot)
        self._pair.value = "" if same else _beside(first, second)

    def _controls(self) -> ipywidgets.Widget:
        windows = ipywidgets.IntSlider(description="windows", min=1, max=16, value=self.points.windows)
        windows.tooltip = f"{self.points.traits()['windows'].help.capitalize()} (1 to 16)"
        t.link((self.points, "windows"), (windows, "value"))
        measure = button("Measure this cache", "Compare its predictions with those of the exact cache", self.measure)
        use = button("Use the second", "Choose its settings on all pages", partial(self._saying, self.use))
        save = button(
            "Save", f"Write all runs to {FILE}, in the folder of this notebook", partial(self._saying, self.save)
        )
        seed = self._control(ipywidgets.BoundedIntText, "seed", min=0, max=MOST_SEED)
        return controls(measure, windows, seed, *map(wide, (*self._lists, self._name)), use, save)


def _line(number: int, run: Run) -> tuple[str, ...]:
    row, kl = run.row.row(0, named=True), run.kl
    interval = "" if kl.low is None or kl.high is None else f"{kl.low:.3g} to {kl.high:.3g}"
    shares = f"{kl.mean:.4g}", interval, str(kl.windows), f"{row['top1_flips']:.1%}", f"{row['held_bytes'] / 1e6:.3g}"
    return (
        str(number + 1),
        run.name,
        *shares,
        f"{run.choice.sinks} + {run.choice.window}",
        "none" if run.seed is None else str(run.seed),
        run.measured[:16].replace("T", " "),
    )


def _beside(first: Run, second: Run) -> str:
    """HTML of both runs side by side: settings that differ, and the measured numbers."""
    settings = [(words, str(first.settings[name]), str(second.settings[name])) for name, words in PARTS.items()]
    rows = [row for row in settings if row[1] != row[2]]
    both = first.row.row(0, named=True), second.row.row(0, named=True)
    for name, words in MEASURED.items():
        said = "{:,}" if isinstance(both[0][name], int) else "{:.4g}"
        rows.append((words, said.format(both[0][name]), said.format(both[1][name])))
    return html_table(["", first.name, second.name], rows, cell=CELL)
