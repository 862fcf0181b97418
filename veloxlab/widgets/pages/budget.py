"""The page of a budget: which heads get the bits, and the predicted loss."""

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
TOKENS = 4096  # of a text, until the user sets a number


def _part(name: str, doc: str) -> Any:  # noqa: ANN401 - a property
    return property(lambda tuner: getattr(tuner._now, name), lambda tuner, value: tuner.tune(**{name: value}), doc=doc)


class BudgetTuner(ChartPage):
    """Choose a budget and its bounds, and see which heads get the bits and the predicted loss.

    All numbers except those of *Measure* come from tables: of a `veloxlab.RateBudget`, or measured by *Measure tables*
    or `start`, with progress, and kept on disk, where they are found again. Losses are predictions unless the page
    marks them as measured. No network is needed.

    ``rates``: from `veloxlab.rate_budget` or `veloxlab.RateBudget.load`; or a model, followed by its tokenizer.
    ``model``, ``tokenizer``: as `veloxlab.load` returns them, to measure plans; without them all else works.
    ``budget``: the first budget, a number for true bits; by default the middle of the possible range. ``bounds``,
    ``key_weight``: as in `veloxlab.allocate.budget.Setting`. ``text``, ``tokens``, ``windows``: for measurements, as
    for `veloxlab.fidelity`. ``rate_settings``: further arguments of `veloxlab.rate_budget`, if tables have to be
    measured. ``calibration``: from `veloxlab.calibrate`; without it the method is calibrated when needed. ``layer``:
    the picked layer. Raises `InputError` if the tables are of another model, if the budget is not possible, or if a
    model has no tokenizer.

    ``setting`` and ``layer`` are traits; ``budget``, ``bounds`` and ``key_weight`` are parts of the setting, and each
    can be set. ``rates`` are the tables; None until they are measured. ``measured`` has a row for each measured plan,
    `veloxlab.allocate.ratequant.EVALUATED`. ``charts``: each a `ChartView`, by name: ``bits``, ``losses``, ``frontier``
    and ``sensitivity``, when there are tables.
    """

    NAME = "tuner"
    HELP = "10_ratequant_budget.ipynb#Predicted and measured"
    SETTINGS = ("setting",)
    TALL = ("frontier",)

    setting = t.Instance(Setting, allow_none=True, help="budget, bounds and weight of keys")
    layer = Chosen("layer", help="the picked layer")
    budget = _part("budget", "The budget; set it to another budget, or to a number of true bits.")
    bounds = _part("bounds", "The limits of the allocation.")
    key_weight = _part("key_weight", "Weight of errors in keys against errors in values.")
    allocation = property(lambda tuner: _there(tuner._found), doc="The plan and its predictions.")
    plan = property(lambda tuner: tuner.allocation.plan, doc="The plan, for `veloxlab.make_cache` or a file.")
    _tables: RateBudget = property(lambda tuner: _there(tuner.rates))  # type: ignore[assignment]
    _now: Setting = property(lambda tuner: _there(tuner.setting))  # type: ignore[assignment]

    @checked(
        rates=either(instance(RateBudget, "the result of vl.rate_budget"), MODEL),
        model=either(MODEL, TOKENIZER),
        budget=budgets.BUDGET,
        bounds=budgets.BOUNDS,
        tokens=whole(2),
        rate_settings=MAPPING,
    )
    def __init__(
        self,
        rates: RateBudget | Module,
        model: Any = None,  # noqa: ANN401 - a model; or the tokenizer, if ``rates`` is a model
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
                raise InputError(f"These tables are of {rates.model}: measure the tables of this model.")
            layers = [size.layer for size in rates.sizes]
        else:
            self._model, self._tokenizer = rates, tokenizer or model
            layers = [facts.layer for facts in probe(rates) if facts.compressible]
        if self._model is not None and self._tokenizer is None:
            raise InputError("To measure, a model needs its tokenizer: give both, as vl.load returns them.")
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
        """Change some of ``budget``, ``bounds``, ``key_weight`` at once; raises `InputError` if they do not fit."""
        self.setting = replace(self._now, **parts)

    @property
    def spent(self) -> str:
        """A sentence: the bits and bytes of the allocation."""
        return drawn.spent_said(self.allocation, self.bounds, self._tables)

    @property
    def predicted(self) -> str:
        """A sentence: the predicted losses of the allocation and of uniform bits in the same bytes."""
        return drawn.predicted_said(self.allocation, self._tables)

    def start(self) -> None:
        """Measure the tables, or read them from disk, then show the tuner; without effect if it has tables."""
        if self.rates is None:
            measure = partial(kept_rate_budget, self._model, self._tokenizer, **self._rate_settings)
            self._submit("tables", lambda progress: measure(progress=progress), on_done=self._build, first=True)

    def _offer(self) -> None:
        """Show a button that measures the tables; use the tables on disk if there are any."""
        words, cost = measuring(self._rate_settings)
        self._laid_out([controls(button(words, "Sensitivities and distortions of this model", self.start))])
        self.say(cost)
        place = partial(rate_budget_place, self._model, **self._rate_settings)
        self._submit("kept tables", lambda _: place(), on_done=lambda at: self.start() if at and at.is_file() else None)

    def add(self, method: str) -> None:
        """Add a method to the tables: its calibration, kept on disk, predicts how much each bit reduces the loss."""
        name = find_method(method).name
        if self._model is None:
            raise InputError(f"{name} is calibrated on a model: give vl.widgets.BudgetTuner a model and its tokenizer.")

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
        """Start to measure the present plan, or uniform bits in its bytes; `measured` gets the row."""
        if self._model is None:
            way_out = "vl.widgets.BudgetTuner(rates, model, tokenizer)"
            raise InputError(f"To measure a plan the tuner needs the model: {way_out}.")
        self.selection.fitting.held.clear()
        found = self.allocation
        plan = found.uniform if kind == "uniform" else found.plan
        if plan is None:
            raise InputError("No uniform bits need as few bytes as this plan: choose a larger budget.")
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
        """Write the present plan, whole or not at all, and return the file's full path."""
        return self._file.save(path)

    @property
    def summary(self) -> str:
        return "no tables yet" if self.setting is None else f"{self.spent}. {self.predicted}"

    def _build(self, rates: RateBudget) -> None:
        """Show the tuner for these tables. Runs on the worker's thread, which measured them."""
        self._ready = False
        self.widths = rates.curves["bits"].unique().sort().to_list() or [*range(1, WIDEST + 1)]
        least = None if rates.predicted_method else self.widths[0]
        self.everything = drawn.frontiers(rates, Bounds(least, self.widths[-1]))
        budget, bounds, key_weight = self._first
        if budget is None:
            budget = AverageBits(round(sum(rates.spans(bounds, TOKENS).bits) / 2, 1))
        setting = Setting(budget, bounds, key_weight)  # type: ignore[arg-type]  # a number becomes a budget
        rates.solve(setting.budget, bounds, key_weight=key_weight)  # raises before the page changes
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
                f"Run the model with the {kind} plan, and compare its predictions with those of the exact cache{why}",
                partial(self.measure, kind),
            )
            for words, kind in {"Measure": "allocated", "Measure uniform": "uniform"}.items()
        }
        if not rates.predicted_method and drawn.by_of(rates) in NATS:
            said = f"Calibrate this method, some minutes the first time, and see its predictions{why}"
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
        """Apply the changed ``parts``, or the nearest possible ones; show an error, and change nothing then."""

        def ask() -> None:
            wanted = replace(self._now, **parts())
            self.setting = replace(wanted, budget=self._spans(wanted).nearest(wanted.budget))
            moved = self.setting != wanted
            self.say("These bounds do not allow that budget: it was set to the nearest one." if moved else "")

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
