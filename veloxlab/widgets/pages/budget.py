"""What was measured so far, as a table that a page can show."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import (
    BOUNDS,
    BUDGET,
    MEGABYTE,
    AverageBits,
    Bounds,
    Budget,
    BytesPerToken,
    QualityFloor,
    Setting,
    Spans,
    TokensInMemory,
)
from veloxlab.allocate.ratequant import JUDGED, PlanKind, judged, kept_rate_budget
from veloxlab.allocate.rates import Allocation, RateBudget
from veloxlab.cache.plan import Plan, model_hash
from veloxlab.checks import MAPPING, MODEL, TOKENIZER, checked, either, instance, maybe, whole
from veloxlab.errors import InputError
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.pages.budget_charts import TunerCharts
from veloxlab.widgets.pages.budget_controls import BoundsControl, BudgetControl
from veloxlab.widgets.panel import Panel, ProgressBar
from veloxlab.widgets.traits import Whole
from veloxlab.widgets.worker import Progress, Worker

COLUMNS = {
    "plan": "name",
    "true bits": "true_bits",
    "predicted loss": "predicted_loss",
    "measured KL (nats)": "kl_mean",
    "top-1 flips": "top1_flips",
    "perplexity": "perplexity",
    "held, MB": "held_bytes",
}
FORMATS = {
    "true_bits": "{:.2f}",
    "predicted_loss": "{:.3g}",
    "kl_mean": "{:.3g}",
    "top1_flips": "{:.1%}",
    "perplexity": "{:.2f}",
}


def history(measured: pl.DataFrame) -> str:
    """HTML of `veloxlab.allocate.ratequant.JUDGED` rows, the newest first; nothing where there are none."""
    if measured.is_empty():
        return ""
    head = "".join(f"<th style='{_cell(i)}'>{words}</th>" for i, words in enumerate(COLUMNS))
    rows = "".join(f"<tr>{_row(row)}</tr>" for row in measured.reverse().iter_rows(named=True))
    return f"<table style='border-collapse: collapse; margin: 4px 0'><tr>{head}</tr>{rows}</table>"


def _row(row: dict[str, object]) -> str:
    return "".join(f"<td style='{_cell(i)}'>{_said(name, row[name])}</td>" for i, name in enumerate(COLUMNS.values()))


def _said(name: str, value: object) -> str:
    if name == "held_bytes":
        return f"{value / 1e6:.3f}"  # type: ignore[operator]
    return FORMATS[name].format(value) if name in FORMATS else escape(str(value))


def _cell(place: int) -> str:
    return f"text-align: {'right' if place else 'left'}; padding: 1px 10px 1px 0"


class TakeAway(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Save a plan, and show how to use it.

    Parameters
    ----------
    plan : gives the plan as it is now.
    path : of the file to begin with.
    """

    def __init__(self, plan: Callable[[], Plan], path: str = "budget_plan.json") -> None:
        self._plan = plan
        self.path = ipywidgets.Text(
            path, description="file", tooltip="Where to save the plan", style={"description_width": "104px"},
            layout={"width": "352px"},
        )  # fmt: skip
        self.button = ipywidgets.Button(description="Save plan", tooltip="Write the plan as JSON, whole or not at all")
        self.said = ipywidgets.HTML()
        self.code = ipywidgets.HTML()
        self.button.on_click(lambda _: self._clicked())
        self.path.observe(lambda _: self._tell_code(), "value")
        self._tell_code()
        super().__init__([ipywidgets.HBox([self.path, self.button]), self.said, self.code])

    def save(self, path: str | Path | None = None) -> Path:
        """Write the plan and give the file's full path.

        Raises
        ------
        InputError : there is no such folder, it is no place for a file, or it cannot be written.
        """
        return self._plan().save(Path(self.path.value.strip() if path is None else path).expanduser().absolute())

    def _clicked(self) -> None:
        try:
            said = f"Saved to {self.save()}"
        except InputError as error:
            said = str(error)
        self.said.value = f"<em>{html.escape(said)}</em>"

    def _tell_code(self) -> None:
        lines = [
            f"plan = vl.Plan.load({json.dumps(self.path.value.strip(), ensure_ascii=False)})",
            "cache = vl.make_cache(model, plan)",
            "mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)",
        ]
        self.code.value = f"<pre style='line-height: 1.4; margin: 4px 0'>{html.escape(chr(10).join(lines))}</pre>"


TOKENS = 4096  # of a text, until one is asked for


class BudgetTuner(Panel):
    """Turn a budget and its bounds, and see which heads get the bits and what that is predicted to cost.

    Everything but *Measure* answers from tables: of a `veloxlab.RateBudget`, or measured first, with progress, and kept
    on disk. Losses are predictions unless they are said to be measured. Nothing here needs a network.

    Parameters
    ----------
    rates : what `veloxlab.rate_budget` measured, or `veloxlab.RateBudget.load` read; or a model, then its tokenizer.
    model, tokenizer : as `veloxlab.load` gives them, to measure plans with; without them all else works.
    budget : to begin with, of true bits if it is a number; by default half of what can be spent.
    bounds, key_weight : as `veloxlab.allocate.budget.Setting` has them.
    text, tokens, windows : of measurements, as for `veloxlab.fidelity`.
    rate_settings : further arguments of `veloxlab.rate_budget`, where tables are to be measured.
    layer : the picked one.
    worker : of the laboratory that it is a page of.

    Attributes
    ----------
    setting, layer : traits; ``budget``, ``bounds`` and ``key_weight`` are the setting's parts and can be set alone.
    rates : the tables; None until they are measured.
    allocation, plan : what is allocated now.
    measured : a row for each plan that was measured, `veloxlab.allocate.ratequant.JUDGED`.
    charts : `TunerCharts`.

    Raises
    ------
    InputError : the tables are of another model; the budget cannot be; or a model came without its tokenizer.
    """

    setting = t.Instance(Setting, allow_none=True, help="budget, bounds and weight of keys")
    layer = Whole(None, allow_none=True, help="the picked layer")

    @checked(
        rates=either(instance(RateBudget, "what vl.rate_budget measured"), MODEL),
        model=either(MODEL, TOKENIZER),
        budget=BUDGET,
        bounds=BOUNDS,
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
        layer: int | None = None,
        worker: Worker | None = None,
    ) -> None:
        if isinstance(rates, RateBudget):
            self._model, self._tokenizer, found = maybe(MODEL)("model", model), tokenizer, rates
            if rate_settings:
                raise InputError("The tables are measured already, so rate_settings have no use: leave them out.")
            if model is not None and model_hash(model) != rates.model_hash:
                raise InputError(f"These tables are of {rates.model}, not of this model: measure this one's.")
        else:
            self._model, self._tokenizer, found = rates, tokenizer or model, None
        if self._model is not None and self._tokenizer is None:
            raise InputError("To measure, a model needs its tokenizer: give both, as vl.load gives them.")
        self._text, self._sample = text, {"tokens": tokens, "windows": windows}
        self._first = budget, bounds or Bounds(), key_weight
        self._rate_settings = dict(rate_settings or {})
        self.rates: RateBudget | None = None
        self._drawing = threading.Lock()
        self.measured = pl.DataFrame(schema=JUDGED)
        super().__init__("tuner", worker, layer=layer)
        self.observe(lambda _: self._redraw(), "setting")
        if found is None:
            self.start()
        else:
            self._build(found)

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget:
        """What is asked for; set it to another budget, or to a number of true bits."""
        return self._now.budget

    @budget.setter
    def budget(self, budget: Budget | float) -> None:
        self.tune(budget=budget)

    @property
    def bounds(self) -> Bounds:
        """What the allocation may do."""
        return self._now.bounds

    @bounds.setter
    def bounds(self, bounds: Bounds) -> None:
        self.tune(bounds=bounds)

    @property
    def key_weight(self) -> float:
        """How many times as much an error in keys counts in the choice."""
        return self._now.key_weight

    @key_weight.setter
    def key_weight(self, weight: float) -> None:
        self.tune(key_weight=weight)

    def tune(self, **parts: Any) -> None:
        """Change some of ``budget``, ``bounds`` and ``key_weight`` at once.

        Raises
        ------
        InputError : they do not go together; nothing is changed then.
        """
        self.setting = replace(self._now, **parts)

    @property
    def allocation(self) -> Allocation:
        """The plan and what is predicted of it."""
        return _solved(self._rates, self._now)

    @property
    def plan(self) -> Plan:
        """For `veloxlab.make_cache`, or a file."""
        return self.allocation.plan

    def start(self) -> None:
        """Measure the tables, or find them on disk, and show the tuner once they are there; nothing if they are."""
        if self.rates is not None:
            return
        self.children = [self._waiting(), self._message]
        self.say(
            "How much each head matters is measured once, by gradients, and kept on disk. That takes a minute or more; "
            "then every move of a knob is answered from tables."
        )

        def job(progress: Progress) -> RateBudget:
            return kept_rate_budget(self._model, self._tokenizer, progress=progress, **self._rate_settings)

        self._submit("tables", job, on_done=self._build)

    def measure(self, kind: PlanKind = "allocated") -> None:
        """Ask for the fidelity of the present plan, or of uniform bits in its bytes; the row joins `measured`.

        Raises
        ------
        InputError : the tuner has no model; or there are no uniform bits in so few bytes.
        """
        if self._model is None:
            raise InputError(
                "To measure a plan the tuner needs the model: vl.widgets.BudgetTuner(rates, model, tokenizer)."
            )
        rates, plan = self._rates, self._plan_of(kind)

        def job(progress: Progress) -> pl.DataFrame:
            given: dict[str, Any] = {"kind": kind, "text": self._text, "progress": progress, **self._sample}
            return judged(rates, plan, self._model, self._tokenizer, **given)

        self._submit("fidelity", job, on_done=self._add_measured)

    def save(self, path: str | Path) -> Path:
        """Write the present plan, whole or not at all, and give the file's full path."""
        return self._take_away.save(path)

    # how it looks where no kernel runs ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        if self.rates is None:
            return "BudgetTuner(no tables yet)"
        found = self.allocation
        return f"BudgetTuner({self.charts.spent(found)}. {self.charts.predicted(found)})"

    @property
    def named(self) -> dict[str, ChartView]:
        """The charts, once there are tables."""
        return {} if self.rates is None else self.charts.named

    # building -------------------------------------------------------------------------------------------------------

    def _waiting(self) -> ipywidgets.Widget:
        again = ipywidgets.Button(description="Measure tables", tooltip="Sensitivities and distortions of this model")
        again.on_click(lambda _: self.start())
        return ipywidgets.HBox([again, ProgressBar(self.worker)])

    def _build(self, rates: RateBudget) -> None:
        """Show the tuner of these tables. On the worker's thread, where they were measured."""
        budget, bounds, key_weight = self._first
        if budget is None:
            budget = AverageBits(round(sum(rates.spans(bounds, TOKENS).bits) / 2, 1))
        setting = Setting(budget, bounds, key_weight)  # type: ignore[arg-type]  # a number becomes a budget
        self.charts = TunerCharts(rates, setting, _solved(rates, setting))
        self.rates = rates  # once the charts are there: a page may ask for them meanwhile
        t.link((self, "layer"), (self.charts.bits, "picked"))
        self._make_controls()
        self.set_trait("setting", setting)
        self.add_class("ready")

    def _make_controls(self) -> None:
        rates = self._rates
        self._budget = BudgetControl(self._budget_asked, self._converted, TOKENS)
        self._bounds = BoundsControl(self._bounds_asked, self.say, self._widths, len(rates.sizes))
        self._take_away = TakeAway(lambda: self.plan)
        self._told = ipywidgets.HTML()
        self._history = ipywidgets.HTML()
        why = "" if self._model is not None else ": give the tuner the model and its tokenizer"
        buttons = []
        kinds: Sequence[tuple[str, PlanKind]] = (("Measure", "allocated"), ("Measure uniform", "uniform"))
        for words, kind in kinds:
            button = ipywidgets.Button(
                description=words, disabled=self._model is None, layout={"width": "140px"},
                tooltip=f"Run the model with the {kind} plan, and compare its predictions{why}",
            )  # fmt: skip
            button.on_click(lambda _, kind=kind: self._measure_asked(kind))
            buttons.append(button)
        self.children = [
            ipywidgets.HBox([self._budget, self._bounds], layout={"flex_flow": "row wrap"}),
            ipywidgets.HBox([*buttons, ProgressBar(self.worker, flex="1 1 auto")]),
            self._message,
            self._told,
            *self.charts.named.values(),
            self._history,
            self._take_away,
        ]

    # turning the knobs ----------------------------------------------------------------------------------------------

    @t.validate("setting")
    def _setting_can_be_allocated(self, proposal: dict[str, Any]) -> Setting:
        setting: Setting = proposal["value"]
        _solved(self._rates, setting)
        return setting

    @t.validate("layer")
    def _layer_is_there(self, proposal: dict[str, Any]) -> int | None:
        layers = [] if self.rates is None else [size.layer for size in self.rates.sizes]
        if layers and proposal["value"] is not None and proposal["value"] not in layers:
            raise InputError(f"There is no layer {proposal['value']}: pick one from {layers[0]} to {layers[-1]}.")
        return None if proposal["value"] is None else int(proposal["value"])

    def _budget_asked(self, budget: Budget) -> None:
        self._asked(replace(self._now, budget=budget))

    def _bounds_asked(self, bounds: Bounds, key_weight: float) -> None:
        self._asked(replace(self._now, bounds=bounds, key_weight=key_weight))

    def _asked(self, setting: Setting) -> None:
        """Do what a hand asks for, or what comes nearest; an error is said, and everything stays as it was."""
        try:
            nearest = replace(setting, budget=self._spans(setting).nearest(setting.budget))
            self.setting = nearest
            moved = nearest.budget != setting.budget
            self.say("These bounds cannot spend that: the budget is the nearest that they can." if moved else "")
        except InputError as error:
            self.say(str(error))
        self._show_controls()

    def _measure_asked(self, kind: PlanKind) -> None:
        try:
            self.measure(kind)
        except InputError as error:
            self.say(str(error))

    def _converted(self, kind: type) -> Budget:
        """The budget of a kind that holds what is held now."""
        found, tokens = self.allocation, self._budget.tokens.value
        if kind is AverageBits:
            return AverageBits(found.true_bits)
        if kind is BytesPerToken:
            return BytesPerToken(found.bytes_per_token)
        if kind is TokensInMemory:
            return TokensInMemory(tokens, self._rates.held_bytes(found.plan, tokens) / MEGABYTE * (1 + 1e-9))
        return QualityFloor(found.predicted_loss)

    def _redraw(self) -> None:
        """Show the present setting, from tables alone."""
        with self._drawing:  # the one who comes last reads the newest
            setting, found = self._now, self.allocation
            self.charts.show(setting, found, self.measured)
        self.say("")
        words = f"<b>{html.escape(self.charts.predicted(found))}</b><br>{html.escape(self.charts.spent(found))}"
        self._told.value = f"<div style='line-height: 1.5'>{words}</div>"
        self._show_controls()

    def _show_controls(self) -> None:
        setting = self._now
        self._budget.show(setting.budget, self._spans(setting))
        self._bounds.show(setting.bounds, setting.key_weight)

    # what is shown --------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> Setting:
        if self.setting is None:
            raise InputError("The tables are not measured yet: wait for them with wait().")
        return self.setting

    @property
    def _rates(self) -> RateBudget:
        if self.rates is None:
            raise InputError("The tables are not measured yet: wait for them with wait().")
        return self.rates

    @property
    def _widths(self) -> list[int]:
        return self._rates.curves["bits"].unique().sort().to_list()

    def _spans(self, setting: Setting) -> Spans:
        tokens = setting.budget.tokens if isinstance(setting.budget, TokensInMemory) else self._budget.tokens.value
        return self._rates.spans(setting.bounds, tokens)

    def _plan_of(self, kind: PlanKind) -> Plan:
        found = self.allocation
        if kind == "allocated":
            return replace(found.plan, name=f"ratequant {found.true_bits:.2f} bits")
        if found.uniform is None:
            raise InputError("No uniform bits take as few bytes as this plan: measure it at a larger budget.")
        return replace(found.uniform, name=f"uniform {found.true_bits:.2f} bits")

    def _add_measured(self, row: pl.DataFrame) -> None:
        self.measured = pl.concat([self.measured, row])
        self._history.value = history(self.measured)
        with self._drawing:
            self.charts.show(self._now, self.allocation, self.measured)


def _solved(rates: RateBudget, setting: Setting) -> Allocation:
    return rates.solve(setting.budget, setting.bounds, key_weight=setting.key_weight)
