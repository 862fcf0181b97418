"""The laboratory: pages about one cache, which share one selection."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import ipywidgets
import traitlets as t

from veloxlab.checks import choice
from veloxlab.errors import InputError
from veloxlab.views.picture import Section
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.chosen import Checked, Chosen, OfLayers
from veloxlab.widgets.layout import button, glossary, styled
from veloxlab.widgets.pages import (
    advise,
    budget,
    cache,
    compare,
    errors,
    generation,
    keys,
    memory,
    runs,
    tasks,
    times,
    tokens,
)
from veloxlab.widgets.pages.experiment import Experiment, Experimenter, OfExperiment
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.runs import Steps, change_said
from veloxlab.widgets.worker import sentence

# One line for each page: its name, its title, and a function that makes it from a laboratory.
PAGES: dict[str, tuple[str, Callable[[Lab], Panel]]] = {
    "cache": ("Cache", lambda lab: cache.CachePage(lab.experiment, lab.worker)),
    "advise": ("Advise", lambda lab: advise.Advisor(lab.experiment, **lab.shared)),
    "errors": ("Errors", lambda lab: errors.ErrorExplorer(lab.experiment.capture, **lab.shared)),
    "keys": ("Keys and values", lambda lab: keys.KeyExplorer(lab.experiment.capture, **lab.shared)),
    "tokens": ("Tokens", lambda lab: tokens.TokenPage(lab.experiment, **lab.shared)),
    "compare": ("Compare", lambda lab: compare.Comparison(lab.experiment, lab.worker)),
    "generation": ("Generation", lambda lab: generation.SideBySide(*lab.loaded, **lab.shared)),
    "runs": ("Runs", lambda lab: runs.RunsPage(lab.experiment, lab.worker)),
    "times": ("Time", lambda lab: times.Times(lab.experiment, lab.worker)),
    "tasks": ("Tasks", lambda lab: tasks.Tasks(*lab.loaded, **lab.shared)),
    "budget": ("Budget", lambda lab: budget.BudgetTuner(*lab.loaded, **lab.shared)),
    "memory": ("Memory", lambda lab: memory.MemoryPlanner(lab.experiment.model, runs=lab.points, **lab.shared)),
}
NAMES = tuple(PAGES)


def _of(page: str, name: str) -> Any:  # noqa: ANN401 - a property
    get = attrgetter(name)
    return property(lambda lab: get(lab.page_of(page)), lambda lab, value: setattr(lab.page_of(page), name, value))


class Lab(Experimenter, OfExperiment, OfLayers):
    """The laboratory: pages that measure and show one model's compressed cache.

    All pages share method, bits, exact tokens, layer, head and token. A page is made when it is opened, and again
    after it was closed; each of its charts appears when it is measured. One thread does all work, with progress; each
    page can cancel it. No network is needed.

    Parameters, errors and attributes are those of `CacheExplorer`. More attributes:

    - ``page``, a trait: the open page, one of ``cache``, ``advise``, ``errors``, ``keys``, ``tokens``, ``compare``,
      ``generation``, ``runs``, ``times``, ``tasks``, ``budget`` and ``memory``. ``pages``: those made so far, by name.
    - ``seed``, a trait: seed of the random parts of codes and calibrations; each run records it.
    - ``head``, ``token``, traits: the chosen KV head, and the chosen token by its position in the text; None for the
      token that lost most. ``compact``, a trait: small charts, so that a page fits one screen.
    - ``points``: all measured runs. ``points.windows`` is the number of windows of text, ``points.table`` a frame of
      the runs; ``points.save(path)`` writes it, and ``points.open(path)`` adds the runs of a file.
    - ``compare()`` measures each method that needs no fitting.
    """

    NAME = "lab"
    IS_PAGE = False
    STATE = ("metric", "head", "page")

    page = Checked(choice(*PAGES), "cache", help="the open page")
    head = Chosen("head", help="the chosen KV head")
    token = Chosen("token", help="the picked token, by its position in the text; None for the one that lost most")
    compact = t.Bool(False, help="small charts and tight rows, so that a page fits one screen")
    errors, bits, memory = _of("cache", "errors"), _of("cache", "bits"), _of("cache", "memory")
    metric, measure = _of("cache", "metric"), _of("cache", "measure")
    comparison = property(lambda lab: lab.page_of("compare"))
    frontier, compare = _of("compare", "frontier"), _of("compare", "compare")

    def _begin(self, experiment: Experiment) -> None:
        Panel.__init__(self, experiment.selection)
        self.experiment, self.points = experiment, experiment.points
        self.loaded: tuple[Any, Any] = (experiment.model, experiment.tokenizer)
        self.shared: dict[str, Any] = {"selection": self.selection, "worker": self.worker}
        self._pages: dict[str, Panel] = {}  # never changed in place: threads add pages while others read them
        self._places = {name: ipywidgets.VBox() for name in PAGES}
        self._unmade = ""  # why the page that was opened last could not be made
        self._show_page("cache", cache.CachePage(experiment, self.worker, now=True))
        self._show_page("compare", PAGES["compare"][1](self))
        titles = [title for title, _ in PAGES.values()]
        self._tabs = ipywidgets.Tab([*self._places.values()], titles=titles)
        t.link((self, "page"), (self._tabs, "selected_index"), transform=(NAMES.index, lambda i: NAMES[i or 0]))
        self.observe(lambda _: self._open(), "page")
        tight = ipywidgets.ToggleButton(description="Compact", tooltip="Small charts, so that a page fits one screen")
        t.link((self, "compact"), (tight, "value"))
        self._steps = Steps(self.selection)
        self._undo, self._redo = (
            button(words, "", act, width="34px") for words, act in (("\u21b6", self.undo), ("\u21b7", self.redo))
        )
        self._name_steps()
        self._watch(self.selection, "choice", self._step)
        corner = ipywidgets.HBox([self._undo, self._redo, tight])
        corner.add_class("veloxlab-corner")
        self.children = [styled(), corner, self._tabs, self._message, ipywidgets.HTML(glossary())]
        self.follow()

    def _step(self, change: dict[str, Any]) -> None:
        self._steps.follow(change)
        self._name_steps()

    def _name_steps(self) -> None:
        """Say on the buttons what they change; a button without a step cannot be pressed."""
        steps = self._steps
        for pressed, verb, kept in ((self._undo, "Undo", steps.before), (self._redo, "Redo", steps.undone)):
            pressed.disabled = not kept
            what = change_said(self.selection.choice, kept[-1]) if kept else "there is nothing"
            pressed.tooltip = f"{verb}: {what}"

    def undo(self) -> None:
        """Undo the last change of the choice, on all pages; moves of one control within a second are one change."""
        self._steps.undo()

    def redo(self) -> None:
        """Redo the change that was undone last."""
        self._steps.redo()

    @property
    def pages(self) -> dict[str, Panel]:
        """The open pages, including hidden ones, by name."""
        return {name: panel for name, panel in self._pages.items() if panel.comm is not None}

    def page_of(self, name: str) -> Any:  # noqa: ANN401 - a panel of any kind
        """A page of `pages`; raises `InputError` if it was not made, or if it is closed."""
        if name not in self.pages:
            raise InputError(f"The page {name!r} is not open: open it with turn_to({name!r}).")
        return self.pages[name]

    def turn_to(self, page: str) -> Panel:
        """Open a page, wait for its first measurements, and return it; raises `InputError` if it cannot be made."""
        if self.page != page:
            self.page = page  # this opens it; a second page of one kind would end the work of the first
        elif page not in self.pages:
            self._open()
        if page not in self.pages:
            raise InputError(f"The page {page!r} could not be made: {self._unmade}")
        self.worker.wait()
        return self.pages[page]

    def _open(self) -> None:
        """Draw the open page only; make it if it is new, or was closed. The worker does its measurements."""
        name = self.page
        for each, panel in self.pages.items():
            panel.activate(each == name)
        if name not in self.pages:
            try:
                self._show_page(name, PAGES[name][1](self))
            except Exception as error:  # noqa: BLE001 - any error of a page is shown, and the other pages go on
                self._unmade = sentence(error)
                self.say(self._unmade)

    def _settle(self, timeout: float | None = None) -> bool:
        return all(panel._settle(timeout) for panel in self.pages.values() if panel.active)

    def _show_page(self, name: str, panel: Panel) -> None:
        self._pages = self._pages | {name: panel}
        self.worker.titles[panel.NAME] = PAGES[name][0]
        self._places[name].children = (panel,)
        if name != self.page:
            panel.activate(False)

    @t.observe("compact")
    def _tighten(self, _: object) -> None:
        (self.add_class if self.compact else self.remove_class)("veloxlab-compact")

    @property
    def summary(self) -> str:
        return self.pages["cache"].summary if "cache" in self.pages else self.name

    @property
    def named(self) -> dict[str, ChartView]:
        """The charts of all pages so far, by page and name; those of the Cache and Compare pages by name alone."""
        return {
            name if page in ("cache", "compare") else f"{page}_{name}": view
            for page, panel in self.pages.items()
            for name, view in panel.named.items()
        }

    @property
    def sections(self) -> list[Section]:
        """The content of a report: the newest result, the charts of all pages so far, the plan and its use."""
        words = f"{len(self.experiment.capture.tokens)} tokens of text, sinks={self.sinks}, window={self.window}."
        said = [Section(self.name, words)]
        if self.points.every:
            run = self.points.every[-1]
            asked = f"What does {run.name} change, and what does it hold?"
            held, exact = (run.row[each].item() / 1e6 for each in ("held_bytes", "fp16_bytes"))
            kept = f"It holds {held:,.3g} MB; exact keys and values in 16 bits take {exact:,.3g} MB."
            said.insert(0, Section(asked, f"{self.points.newest} {kept}", table=self.points.frame))
        for name, panel in self.pages.items():
            own = panel.sections
            said += [Section(PAGES[name][0], panel.summary), *own] if own else []
        plan = Section("The plan", "Save it as plan.json.", code=self.plan.to_json(), folded="The plan as JSON")
        use = Section("To use it", code="\n".join(self.selection.choice.lines('vl.Plan.load("plan.json")')))
        return [*said, plan, use]

    @property
    def views(self) -> tuple[ChartView, ...]:
        return self.pages[self.page].views if self.page in self.pages else ()
