"""The page that compares: what whole caches change in the model's predictions, and a list of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ipywidgets
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import checked
from veloxlab.measure import Capture, capture, fidelity
from veloxlab.progress import Progress as Tell
from veloxlab.views import frontier
from veloxlab.views.report import Section
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.panel import Panel, ProgressBar, button, rows
from veloxlab.widgets.selection import Choice, Selection
from veloxlab.widgets.worker import Progress, Worker


@dataclass(frozen=True)
class Experiment:
    """What pages of whole caches share.

    Attributes
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    text : what the model reads; None for the shipped test excerpt.
    capture : of this text.
    selection : what is chosen.
    """

    model: Module
    tokenizer: Any
    text: str | None
    capture: Capture
    selection: Selection


class Experimenter:
    """A widget that begins with a model, and captures a text before anything else."""

    experiment: Experiment

    def _begin(self, experiment: Experiment) -> None:
        raise NotImplementedError

    @checked()
    def __init__(
        self,
        model: Module,
        tokenizer: Any,  # noqa: ANN401
        *,
        method: str = "turboquant",
        bits: int = 4,
        key_bits: int | None = None,
        value_bits: int | None = None,
        sinks: int = 4,
        window: int = 64,
        text: str | None = None,
        tokens: int = 256,
        calibration: Calibration | None = None,
    ) -> None:
        given = {"key_bits": key_bits, "value_bits": value_bits}
        chosen: dict[str, Any] = {"method": method, "sinks": sinks, "window": window}
        chosen |= {name: bits if width is None else width for name, width in given.items()}
        Plan.uniform(model, **chosen)  # refuses what cannot be, before any work
        seen = capture(model, tokenizer, text, tokens=tokens)
        selection = Selection.of(seen, Fitting(model, tokenizer, calibration), **chosen)
        self._begin(Experiment(model, tokenizer, text, seen, selection))


class Comparison(Panel):
    """Measure the fidelity of caches, see them in one chart, and choose one of them again.

    Parameters
    ----------
    experiment : the text, the model and what is chosen.
    worker : of the laboratory, or of the widget, that it is a part of.

    Attributes
    ----------
    measured : `veloxlab.fidelity` of every cache that was measured.
    choices : what was chosen for each.
    frontier : the chart, once something was measured.
    """

    def __init__(self, experiment: Experiment, worker: Worker) -> None:
        self._experiment = experiment
        self.measured = pl.DataFrame()
        self.choices: list[Choice] = []
        self.frontier: ChartView | None = None
        super().__init__("compare", experiment.selection, worker)
        self._slot = ipywidgets.VBox()
        self._list = ipywidgets.Dropdown(
            options=[], description="measured", tooltip="A point of the chart", layout={"width": "520px"}
        )
        self._take = button("Use it", "Choose the settings of this point", self._use)
        self._take.disabled = True
        one = button("Measure this cache", "Compare its predictions with those of the exact cache", self.measure)
        every = button(
            "Measure all methods", "At these bits, each method that needs no fitting", self.compare, width="auto"
        )
        self.children = [
            ipywidgets.HBox([one, every, ProgressBar(self.worker, flex="1 1 auto")]),
            self._message,
            self._slot,
            rows([self._list, self._take]),
        ]

    def __repr__(self) -> str:
        return f"{len(self.choices)} caches were measured."

    @property
    def named(self) -> dict[str, ChartView]:
        """The chart, once something was measured."""
        return {} if self.frontier is None else {"frontier": self.frontier}

    @property
    def sections(self) -> list[Section]:
        """What a report says of it: its chart, and the table."""
        return [*super().sections, Section("Fidelity", table=self.measured)] if self.choices else []

    def measure(self, told: Callable[[str], None] = lambda _: None) -> None:
        """Ask for the fidelity of the present choice; ``told`` is given a sentence of it."""
        choice = self.selection.choice

        def done(row: pl.DataFrame) -> None:
            told(self._add(row, choice))

        self._submit("fidelity", lambda progress: self._fidelity(choice, progress), on_done=done)

    def compare(self) -> None:
        """Ask for the fidelity of every method that needs no fitting, at the present bits or those next to them."""
        chosen = self.selection
        every = [chosen.changed(method=method, own_bits={}) for method in chosen.methods]
        ready = [c for c in every if all(chosen.fitting.is_ready(c.method, width) for width in c.widths)]

        def job(progress: Progress) -> None:
            for done, choice in enumerate(ready):
                progress(done, len(ready), f"measuring {choice.method}")
                self._add(self._fidelity(choice, lambda *_: progress.check()), choice)

        self._submit("comparison", job)

    def _fidelity(self, choice: Choice, progress: Tell) -> pl.DataFrame:
        of = self._experiment
        calibration = of.selection.fitting.calibration(choice.method, choice.widths, progress)
        given: dict[str, Any] = {"calibration": calibration, "name": choice.name, "progress": progress}
        given |= {"text": of.text, "tokens": len(of.capture.tokens)}
        return fidelity(of.model, of.tokenizer, choice.plan(of.model), **given)

    def _add(self, row: pl.DataFrame, choice: Choice) -> str:
        """Show one more cache, and give a sentence of it."""
        self.measured = pl.concat([self.measured, row]) if self.choices else row
        self.choices = [*self.choices, choice]
        chart = frontier(self.measured, x="held_bytes")
        if self.frontier is None:
            self.frontier = ChartView(chart)
            self._slot.children = [self.frontier]
        else:
            self.frontier.show(chart)
        named = zip(self.measured["name"], self.choices, strict=True)
        self._list.options = [
            (f"{i + 1}: {name}, {c.sinks} sinks, window {c.window}", i) for i, (name, c) in enumerate(named)
        ]
        self._list.value = len(self.choices) - 1
        self._take.disabled = False
        name, kl, perplexity = row.select("name", "kl_mean", "perplexity").row(0)
        said = f"Measured {name}: mean KL {kl:.3g} nats from the exact cache, perplexity {perplexity:.2f}."
        self.say(said)
        return said

    def _use(self) -> None:
        self.selection.choice = self.choices[self._list.value]
