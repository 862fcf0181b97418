"""The page that compares: what whole caches change in the model's predictions, and a list of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import ipywidgets
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import checked, real, whole
from veloxlab.errors import InputError
from veloxlab.measure import Capture, by_window, capture, reference
from veloxlab.measure.equal import EQUAL, at_equal_bits
from veloxlab.measure.quality import Reference, both
from veloxlab.measure.reproduce import calibration_code, notebook, steps
from veloxlab.mlxlm.identity import name_of
from veloxlab.models.loading import loaded_as
from veloxlab.progress import Progress as Tell
from veloxlab.store import digest
from veloxlab.views import frontier
from veloxlab.views.picture import Section
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.layout import button, columns, controls, status
from veloxlab.widgets.pages.equal_bits import Layouts, around, comparable, equal_said, held_bits, layouts, points
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.runs import Run, Runs
from veloxlab.widgets.selection import Bits, Choice, Fitting, Selection
from veloxlab.widgets.worker import Progress, Worker

SHOWN = 40  # characters of a text that a run is known by


@dataclass(frozen=True)
class Experiment:
    """What pages of whole caches share."""

    model: Module
    tokenizer: Any
    text: str | None  # what the model reads; None for the shipped test excerpt
    capture: Capture  # of this text
    selection: Selection
    points: Runs = field(default_factory=Runs)  # what was measured, whichever page asked for it

    def reference(self, progress: Tell) -> Reference:
        """What the model predicts with its own cache."""
        read: dict[str, Any] = {"text": self.text, "tokens": len(self.capture.tokens), "windows": self.points.windows}
        return reference(self.model, self.tokenizer, progress=progress, **read)

    def fidelity(self, choice: Choice, progress: Tell, exact: Reference | None = None) -> Run:
        """Measure a cache against a `reference` of this experiment, which is run now if none is given."""
        calibration = self.selection.fitting.calibration(choice.method, choice.widths, progress)
        exact = exact or self.reference(progress)
        given: dict[str, Any] = {"name": choice.name, "calibration": calibration, "progress": progress}
        row, predictions = both(exact, choice.plan(self.model), **given)
        begin = "the shipped test excerpt" if self.text is None else self.text[:SHOWN]
        said = f"{begin} ({digest(exact.stretches[0])[:8]}), windows of {len(self.capture.tokens)} tokens"
        return Run.now(choice, said, row, by_window(predictions))


_kept: dict[tuple[str, tuple[int, ...]], dict[str, dict[Any, Any]]] = {}
MOST_KEPT = 4  # models and texts whose frames are kept


def kept_of(model: Module, ids: tuple[int, ...]) -> dict[str, dict[Any, Any]]:
    """What pages measured on a model, as its weights are now, and a text: a cell that is run again finds it."""
    place = name_of(model), ids
    found = _kept[place] = _kept.pop(place, {})
    for oldest in [*_kept][:-MOST_KEPT]:
        del _kept[oldest]
    return found


class OfExperiment(Panel):
    """A panel of whole caches of one experiment."""

    STATE: ClassVar[tuple[str, ...]] = ()  # traits that a state has beside what all pages share
    experiment: Experiment
    points: Runs
    name = property(lambda page: page.selection.choice.name, doc="The settings in a few words.")
    measured = property(lambda page: page.points.frame, doc="`veloxlab.fidelity` of every cache that was measured.")

    @property
    def plan(self) -> Plan:
        """The settings as a plan, for `veloxlab.make_cache` or a file."""
        return self.selection.choice.plan(self.experiment.model)

    @property
    def layer_bits(self) -> dict[int, Bits]:
        """Code bits of keys and values, by layer."""
        return {layer: self.selection.choice.bits_of(layer) for layer in self.selection.layers}

    def measure(self) -> None:
        """Ask for the fidelity of the present settings; the result joins `measured` and the frontier chart."""
        experiment, choice = self.experiment, self.selection.choice
        self.selection.fitting.held.clear()

        def done(run: Run) -> None:
            experiment.points.add(run)
            self.say(experiment.points.newest)

        self._submit("fidelity", lambda progress: experiment.fidelity(choice, progress), on_done=done, first=True)

    @property
    def notebook(self) -> bytes:  # type: ignore[override]  # a page of a whole cache can be measured again
        """Cells that measure the present settings on the same text, as `export` puts into its page."""
        experiment, plan = self.experiment, self.plan
        read: dict[str, Any] = {"tokens": len(experiment.capture.tokens), "windows": self.points.windows}
        model = loaded_as(experiment.model) or "the model that was measured"
        cells = steps(model, plan, calibration_code(plan, []), text=experiment.text, **read)
        return notebook(f"{self.name} on {model}", [*cells])

    @property
    def state(self) -> dict[str, Any]:
        """The settings as plain words and numbers: what `restore` takes, and JSON holds."""
        choice = self.selection.choice
        shared: dict[str, Any] = {name: getattr(choice, name) for name in ("method", "sinks", "window", "layer")}
        shared["bits"] = list(choice.bits_of(None))
        shared["layers"] = {str(layer): list(bits) for layer, bits in choice.own_bits.items()}
        return shared | {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Choose the settings of a `state`; raises `InputError` if they cannot be here, and changes nothing then."""
        before = self.state
        missing = sorted({*before} - {*state})
        if missing:
            raise InputError(f"The state says nothing of {', '.join(missing)}: give what the attribute state gave.")
        key_bits, value_bits = state["bits"]
        parts = {name: state[name] for name in ("method", "sinks", "window", "layer")}
        own = {int(layer): tuple(bits) for layer, bits in state["layers"].items()}
        try:
            for name in self.STATE:
                setattr(self, name, state[name])
            self.selection.choose(key_bits=key_bits, value_bits=value_bits, own_bits=own, **parts)
        except InputError:
            for name in self.STATE:
                setattr(self, name, before[name])
            raise


class Experimenter:
    """A widget that begins with a model, and captures a text before anything else."""

    _begin: Callable[[Experiment], None]

    @checked()
    def __init__(
        self,
        model: Module,
        tokenizer: Any = None,  # noqa: ANN401
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
        if tokenizer is None:
            raise InputError("The tokenizer is missing: give both that vl.load gave, as in vl.Lab(*vl.load(...)).")
        chosen: dict[str, Any] = {"method": method, "sinks": sinks, "window": window}
        chosen["key_bits"] = bits if key_bits is None else key_bits
        chosen["value_bits"] = bits if value_bits is None else value_bits
        Plan.uniform(model, **chosen)  # refuses what cannot be, before any work
        seen = capture(model, tokenizer, text, tokens=tokens)
        selection = Selection.of(seen, Fitting(model, tokenizer, calibration), **chosen)
        if calibration is None:
            selection.kept = kept_of(model, seen.tokens)
        self._begin(Experiment(model, tokenizer, text, seen, selection))


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
        self._laid_out([head, status([self._banner, self._message], self.progress())], self._slot, self._equal)
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
