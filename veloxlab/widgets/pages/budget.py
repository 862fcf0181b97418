"""The page of a budget: which heads get the bits, and what that is predicted to cost."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.allocate import budget as budgets
from veloxlab.allocate.budget import Allocation, AverageBits, Bounds, Budget, Setting, Spans, TokensInMemory
from veloxlab.allocate.ratequant import EVALUATED, evaluated, kept_rate_budget, rate_budget_place
from veloxlab.allocate.rates import RateBudget
from veloxlab.allocate.sensitivity import NATS
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import model_hash
from veloxlab.checks import MAPPING, MODEL, TOKENIZER, checked, either, instance, maybe, whole
from veloxlab.codecs import METHODS, find_method
from veloxlab.codecs.parts.packing import WIDEST
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import probe
from veloxlab.widgets.chart_view import link
from veloxlab.widgets.chosen import Chosen
from veloxlab.widgets.layout import button, controls
from veloxlab.widgets.pages import budget_charts as drawn
from veloxlab.widgets.pages.budget_controls import PlanFile, SettingControl, history, measuring
from veloxlab.widgets.pages.charts import ChartPage, Look
from veloxlab.widgets.selection import Fitting, Selection
from veloxlab.widgets.worker import Progress, Worker

T = TypeVar("T")
TOKENS = 4096  # of a text, until one is asked for


def _part(name: str, doc: str) -> Any:  # noqa: ANN401 - a property
    return property(lambda tuner: getattr(tuner._now, name), lambda tuner, value: tuner.tune(**{name: value}), doc=doc)


class BudgetTuner(ChartPage):
    """Choose a budget and its bounds, and see which heads get the bits and what that is predicted to cost.

    Everything but *Measure* answers from tables: of a `veloxlab.RateBudget`; or measured at a press of *Measure tables*
    or by `start`, with progress, and kept on disk. Tables that are kept there are found again by themselves. Losses are
    predictions unless they are said to be measured. Nothing here needs a network.

    ``rates``: what `veloxlab.rate_budget` measured, or `veloxlab.RateBudget.load` read; or a model, then its tokenizer.
    ``model``, ``tokenizer``: as `veloxlab.load` gives them, to measure plans with; without them all else works.
    ``budget``: to begin with, of true bits if it is a number; by default half of what can be spent. ``bounds``,
    ``key_weight``: as `veloxlab.allocate.budget.Setting` has them. ``text``, ``tokens``, ``windows``: of measurements,
    as for `veloxlab.fidelity`. ``rate_settings``: further arguments of `veloxlab.rate_budget`, where tables are to be
    measured. ``calibration``: what `veloxlab.calibrate` gave; else it is made when it is needed. ``layer``: the
    picked one. Raises `InputError` if the tables are of another model, if the budget cannot
    be, or if a model came without its tokenizer.

    ``setting`` and ``layer`` are traits; ``budget``, ``bounds`` and ``key_weight`` are the setting's parts and can be
    set alone. ``rates`` are the tables; None until they are measured. ``measured`` has a row for each plan that was
    measured, `veloxlab.allocate.ratequant.EVALUATED`. ``charts``: each a `ChartView`, by name: ``bits``, ``losses``,
    ``frontier`` and ``sensitivity``, once there are tables.
    """

    NAME = "tuner"
    HELP = "10_ratequant_budget.ipynb#Predicted and measured"
    SETTINGS = ("setting",)
    TALL = ("frontier",)

    setting = t.Instance(Setting, allow_none=True, help="budget, bounds and weight of keys")
    layer = Chosen("layer", help="the picked layer")
    budget = _part("budget", "What is asked for; set it to another budget, or to a number of true bits.")
    bounds = _part("bounds", "What the allocation may do.")
    key_weight = _part("key_weight", "How many times as much an error in keys counts in the choice.")
    allocation = property(lambda tuner: _there(tuner._found), doc="The plan and what is predicted of it.")
    plan = property(lambda tuner: tuner.allocation.plan, doc="For `veloxlab.make_cache`, or a file.")
    _tables: RateBudget = property(lambda tuner: _there(tuner.rates))  # type: ignore[assignment]
    _now: Setting = property(lambda tuner: _there(tuner.setting))  # type: ignore[assignment]

    @checked(
        rates=either(instance(RateBudget, "what vl.rate_budget measured"), MODEL),
        model=either(MODEL, TOKENIZER),
        budget=budgets.BUDGET,
        bounds=budgets.BOUNDS,
        tokens=whole(2),
        rate_settings=MAPPING,
    )
    def __init__(
        self,
        rates: RateBudget | Module,
        model: Any = None,  # noqa: ANN401 - a model; or the tokenizer, where rates are to be measured
        tokenizer: Any = None,  # noqa: ANN401
        *,
        budget: Budget | float | None = None,
        bounds: Bounds | None = None,
        key_weight: float = 1.0,
        text: str | None = None,
        tokens: int = 512,
        windows: int = 1,
        rate_settings: Mapping[str, Any] | None = None,
        calibration: Calibration | None = None,
        layer: int | None = None,
        selection: Selection | None = None,
        worker: Worker | None = None,
    ) -> None:
        if isinstance(rates, RateBudget):
            self._model, self._tokenizer = maybe(MODEL)("model", model), tokenizer
            if rate_settings:
                raise InputError("The tables are measured already, so rate_settings have no use: leave them out.")
            if model is not None and model_hash(model) != rates.model_hash:
                raise InputError(f"These tables are of {rates.model}, not of this model: measure this one's.")
            layers = [size.layer for size in rates.sizes]
        else:
            self._model, self._tokenizer = rates, tokenizer or model
            layers = [facts.layer for facts in probe(rates) if facts.compressible]
        if self._model is not None and self._tokenizer is None:
            raise InputError("To measure, a model needs its tokenizer: give both, as vl.load gives them.")
        self._sample: dict[str, Any] = {"text": text, "tokens": tokens, "windows": windows}
        self._first, self._rate_settings = (budget, bounds or Bounds(), key_weight), dict(rate_settings or {})
        self._found: Allocation | None = None
        self._ready = False
        self.rates: RateBudget | None = None
        self.measured = pl.DataFrame(schema=EVALUATED)
        fitting = Fitting(self._model, self._tokenizer, calibration)
        super().__init__(selection or Selection(fitting, layers=layers, layer=layer), worker)
        if isinstance(rates, RateBudget):
            self._build(rates)
        else:
            self._offer()
        self.follow()

    def tune(self, **parts: Any) -> None:
        """Change some of ``budget``, ``bounds`` and ``key_weight`` at once; `InputError` if they do not go together."""
        self.setting = replace(self._now, **parts)

    @property
    def spent(self) -> str:
        """What the allocation takes."""
        return drawn.spent_said(self.allocation, self.bounds, self._tables)

    @property
    def predicted(self) -> str:
        """What the allocation, and uniform bits in the same bytes, are predicted to lose."""
        return drawn.predicted_said(self.allocation, self._tables)

    def start(self) -> None:
        """Measure the tables, or find them on disk, and show the tuner once they are there; nothing if they are."""
        if self.rates is None:
            measure = partial(kept_rate_budget, self._model, self._tokenizer, **self._rate_settings)
            self._submit("tables", lambda progress: measure(progress=progress), on_done=self._build, first=True)

    def _offer(self) -> None:
        """Offer to measure the tables; take them if they are on disk."""
        words, cost = measuring(self._rate_settings)
        self._laid_out([controls(button(words, "Sensitivities and distortions of this model", self.start))])
        self.say(cost)
        place = partial(rate_budget_place, self._model, **self._rate_settings)
        self._submit("kept tables", lambda _: place(), on_done=lambda at: self.start() if at and at.is_file() else None)

    def add(self, method: str) -> None:
        """Ask for a method in the tables whose calibration, which is kept on disk, says what every bit saves."""
        name = find_method(method).name
        if self._model is None:
            raise InputError(f"{name} is calibrated on a model: give vl.widgets.BudgetTuner one and its tokenizer.")

        def make(progress: Progress) -> RateBudget:
            fitted = self.selection.fitting.calibration(method, [1], progress)
            assert fitted is not None
            return self._tables.with_calibration(fitted)

        def done(rates: RateBudget) -> None:
            bounds = replace(self._now.bounds, methods=(method,))
            self._first = self._now.budget, bounds, self._now.key_weight
            self._build(rates)

        self._submit(method, make, on_done=done)

    def measure(self, kind: str = "allocated") -> None:
        """Ask for the fidelity of the present plan, or of uniform bits in its bytes; the row joins `measured`."""
        if self._model is None:
            way_out = "vl.widgets.BudgetTuner(rates, model, tokenizer)"
            raise InputError(f"To measure a plan the tuner needs the model: {way_out}.")
        self.selection.fitting.held.clear()
        found = self.allocation
        plan = found.uniform if kind == "uniform" else found.plan
        if plan is None:
            raise InputError("No uniform bits take as few bytes as this plan: measure it at a larger budget.")
        kind = kind if kind == "uniform" else drawn.kind_of(plan, self._tables)
        plan = replace(plan, name=f"{kind if kind == 'uniform' else drawn.names_of(plan)} {found.true_bits:.2f} bits")
        fitting, sample = self.selection.fitting, self._sample

        def evaluate(progress: Progress) -> pl.DataFrame:
            fitted = [fitting.calibration(method, [1], progress) for method in plan.calibrations]
            given = sample | {"calibration": fitted, "progress": progress}
            return evaluated(self._tables, plan, self._model, self._tokenizer, kind=kind, **given)

        def done(row: pl.DataFrame) -> None:
            self.measured = pl.concat([self.measured, row])
            self._history.value = history(self.measured)
            self._show()

        self._submit("fidelity", evaluate, on_done=done, first=True)

    def save(self, path: str | Path) -> Path:
        """Write the present plan, whole or not at all, and give the file's full path."""
        return self._file.save(path)

    @property
    def summary(self) -> str:
        return "no tables yet" if self.setting is None else f"{self.spent}. {self.predicted}"

    def _build(self, rates: RateBudget) -> None:
        """Show the tuner of these tables. On the worker's thread, where they were measured."""
        self._ready = False
        self.widths = rates.curves["bits"].unique().sort().to_list() or [*range(1, WIDEST + 1)]
        least = None if rates.predicted_method else self.widths[0]
        self.everything = drawn.frontiers(rates, Bounds(least, self.widths[-1]))
        budget, bounds, key_weight = self._first
        if budget is None:
            budget = AverageBits(round(sum(rates.spans(bounds, TOKENS).bits) / 2, 1))
        setting = Setting(budget, bounds, key_weight)  # type: ignore[arg-type]  # a number becomes a budget
        rates.solve(setting.budget, bounds, key_weight=key_weight)  # if it cannot be, there are no tables yet
        self.rates = rates
        self.set_trait("setting", setting)
        self._draw([*drawn.CHARTS, drawn.COORDINATES] if rates.predicted_method else drawn.CHARTS)
        link(*(view for name, view in self.charts.items() if name not in ("frontier", "coordinates")))
        t.link((self, "layer"), (self.charts["bits"], "picked"))
        known = self.widths, len(rates.sizes), rates.methods
        self._controls = SettingControl(self._asked, self._converted, TOKENS, *known)
        self._file = PlanFile(lambda: self.plan)
        self._told, self._history = ipywidgets.HTML(), ipywidgets.HTML()
        why = "" if self._model is not None else ": give the tuner the model and its tokenizer"
        acts: dict[str, tuple[str, Callable[[], None]]] = {
            words: (
                f"Run the model with the {kind} plan, and compare its predictions{why}",
                partial(self.measure, kind),
            )
            for words, kind in {"Measure": "allocated", "Measure uniform": "uniform"}.items()
        }
        if not rates.predicted_method and drawn.by_of(rates) in NATS:
            said = f"Calibrate it, some minutes at first, and see its predictions{why}"
            addable = [method for method in METHODS.values() if method.prediction]
            acts |= {f"Add {method.name}": (said, partial(self.add, method.id)) for method in addable}
        buttons = [button(words, tip, partial(self._saying, act), width="140px") for words, (tip, act) in acts.items()]
        for one in buttons:
            one.disabled = self._model is None
        head = [self._controls, controls(*buttons)]
        self._laid_out(head, self._grid, self._history, self._file, told=self._told)
        self._ready = True
        self._redraw()
        self.add_class("ready")

    @t.validate("setting")
    def _setting_can_be_allocated(self, proposal: dict[str, Any]) -> Setting:
        setting: Setting = proposal["value"]
        self._found = self._tables.solve(setting.budget, setting.bounds, key_weight=setting.key_weight)
        return setting

    def _asked(self, parts: Callable[[], dict[str, Any]]) -> None:
        """Do what a control asks for, or what comes nearest; an error is said, and everything stays as it was."""

        def ask() -> None:
            wanted = replace(self._now, **parts())
            self.setting = replace(wanted, budget=self._spans(wanted).nearest(wanted.budget))
            moved = self.setting != wanted
            self.say("These bounds cannot spend that: the budget is the nearest that they can." if moved else "")

        self._saying(ask)
        self._controls.show(self._now, self._spans(self._now))

    def _converted(self, kind: type) -> Budget:
        found, tokens = self.allocation, self._controls.tokens.value
        if kind is TokensInMemory:
            return TokensInMemory(tokens, self._tables.held_bytes(found.plan, tokens) / budgets.MEGABYTE * (1 + 1e-9))
        amounts: dict[type, float] = {AverageBits: found.true_bits, budgets.BytesPerToken: found.bytes_per_token}
        return kind(amounts.get(kind, found.predicted_loss))  # type: ignore[no-any-return]

    def _look(self, **_: Any) -> Look:
        return self

    def _redraw(self) -> None:
        if self._ready:
            super()._redraw()
            words = f"<b>{html.escape(self.predicted)}</b><br>{html.escape(self.spent)}"
            self._told.value = f"<div style='line-height: 1.5'>{words}</div>"
            self._controls.show(self._now, self._spans(self._now))
            self._file.tell_code()

    def _spans(self, setting: Setting) -> Spans:
        tokens = setting.budget.tokens if isinstance(setting.budget, TokensInMemory) else self._controls.tokens.value
        return self._tables.spans(setting.bounds, tokens)


def _there(part: T | None) -> T:
    if part is None:
        raise InputError("The tables are not measured yet: wait for them with wait().")
    return part
