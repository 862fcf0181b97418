"""The controls and charts of a budget, a table of measured plans, and what saves a plan; a look is the tuner."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import polars as pl

from veloxlab import views
from veloxlab.allocate import budget as budgets
from veloxlab.allocate.budget import AverageBits, Bounds, Budget, BytesPerToken, QualityFloor, Setting, TokensInMemory
from veloxlab.allocate.rates import Allocation, RateBudget
from veloxlab.allocate.sensitivity import NATS
from veloxlab.cache.plan import Plan
from veloxlab.errors import InputError
from veloxlab.runtime import device
from veloxlab.views.columns import Domain, log_domain, not_drawn
from veloxlab.views.picture import html_table
from veloxlab.widgets.pages.charts import Chart, Look
from veloxlab.widgets.panel import button

KINDS = {
    "average bits": AverageBits,
    "bytes a token": BytesPerToken,
    "tokens in memory": TokensInMemory,
    "predicted loss": QualityFloor,
}
STEPS = {AverageBits: 0.05, QualityFloor: 0.02}  # of sliders; others have a hundred
LOOKS: dict[str, Any] = {"style": {"description_width": "104px"}, "layout": {"width": "352px"}}
COLUMN = {"width": "362px"}  # two of them fit into an output of JupyterLab beside its file browser
PROTECTIONS = {"the most bits": "widest", "no codes: kept exact": "exact"}
COLUMNS = {
    "plan": pl.col("name"),
    "true bits": pl.col("true_bits"),
    "predicted loss": pl.col("predicted_loss"),
    "measured KL (nats)": pl.col("kl_mean"),
    "top-1 flips (%)": 100 * pl.col("top1_flips"),
    "perplexity": pl.col("perplexity"),
    "held (MB)": pl.col("held_bytes") / budgets.MEGABYTE,
}


def history(measured: pl.DataFrame) -> str:
    """HTML of `veloxlab.allocate.ratequant.EVALUATED` rows, the newest first; nothing where there are none."""
    rows = measured.reverse().select(**COLUMNS).iter_rows()
    return "" if measured.is_empty() else html_table(list(COLUMNS), rows, cell="padding: 1px 10px 1px 0")


def _control(kind: type[ipw.Widget], words: str, tip: str, **settings: Any) -> ipw.Widget:
    return kind(description=words, tooltip=tip, **LOOKS | settings)


def _slider(words: str, tip: str, form: str, kind: type[ipw.Widget] = ipw.FloatSlider, **settings: Any) -> ipw.Widget:
    return _control(kind, words, tip, readout_format=form, **settings)


class SettingControl(ipw.HBox):  # type: ignore[misc]  # ipywidgets has no types
    """Choose a kind of budget and its number, what an allocation may do, and how much keys count against values.

    When a person changes a control, ``asked`` is given what gives the changed parts of a `Setting`; ``converted`` gives
    the budget of a kind that allows what is held now. ``widths`` were measured, of so many ``layers``.
    """

    def __init__(
        self,
        asked: Callable[[Callable[[], dict[str, Any]]], None],
        converted: Callable[[type], Budget],
        tokens: int,
        widths: Sequence[int],
        layers: int,
    ) -> None:
        self._asked, self._showing = asked, False
        self.kind = _control(ipw.Dropdown, "budget", "What the budget is counted in", options=KINDS)
        limits = {"value": tokens, "min": 1, "max": 1_000_000, "step": 256}
        self.tokens = _control(ipw.BoundedIntText, "tokens", "Length of the text that has to fit", **limits)
        self.megabytes = _slider("megabytes", "All that the compressed layers then hold, exact tokens too", ".3f")
        most = "The most that may be lost, as predicted: the fewest bytes are sought"
        self.numbers: dict[type, list[ipw.Widget]] = {
            AverageBits: [_slider("true bits", "Stored bits of a value, with scales", ".2f")],
            BytesPerToken: [
                _slider("bytes a token", "Bytes of one packed token's keys and values in all layers", ",.0f")
            ],
            TokensInMemory: [self.tokens, self.megabytes],
            QualityFloor: [_slider("nats a token", most, ".3g", ipw.FloatLogSlider)],
        }  # the last is the amount
        self.slot = ipw.VBox()

        ends = {"options": list(widths), "index": (0, len(widths) - 1)}
        self.widths = _control(ipw.SelectionRangeSlider, "bits allowed", "Least and most code bits of a head", **ends)
        self.first, self.last = (
            _control(ipw.IntSlider, f"{end} layers", f"How many {end} layers are left out", min=0, max=layers // 2)
            for end in ("first", "last")
        )
        tip = "What first and last layers that are left out get"
        self.protection = _control(ipw.Dropdown, "these get", tip, options=PROTECTIONS)
        tip = "A layer's keys get as many bits as its values at least, on average over its heads"
        beside = {"indent": False, "layout": {"margin": "0 0 0 112px", "width": "244px"}}
        self.keys_first = _control(ipw.Checkbox, "keys no fewer than values", tip, **beside)
        tip = "How many times as much an error in keys counts in the choice"
        scale = {"value": 1.0, "base": 2, "min": -4, "max": 4, "step": 0.25}
        self.key_weight = _slider("weight of keys", tip, ".2f", ipw.FloatLogSlider, **scale)
        bounds = [self.widths, self.first, self.last, self.protection, self.keys_first, self.key_weight]

        self._on_change([self.kind], lambda: {"budget": converted(self.kind.value)})
        amounts = [control for controls in self.numbers.values() for control in controls]
        self._on_change(amounts, lambda: {"budget": self.kind.value(*(c.value for c in self.numbers[self.kind.value]))})
        self._on_change(bounds, self._bounds)
        columns = [ipw.VBox(parts, layout=COLUMN) for parts in ([self.kind, self.slot], bounds)]
        super().__init__(columns, layout={"flex_flow": "row wrap"})

    def show(self, setting: Setting, spans: budgets.Spans) -> None:
        """Show a setting and how far each control goes, and ask for nothing."""
        budget, bounds = setting.budget, setting.bounds
        amount = fields(budget)[-1].name
        value, (least, most) = getattr(budget, amount), getattr(spans, amount)
        *_, slider = numbers = self.numbers[type(budget)]
        self._showing = True
        try:
            if isinstance(budget, TokensInMemory):
                self.tokens.value = budget.tokens
                most = max(least, min(most, device().memory_bytes / budgets.MEGABYTE))
            ends = min(least, value), max(most, value)
            low, high = map(math.log10, ends) if isinstance(budget, QualityFloor) else ends
            slider.max = max(high, slider.max)  # no end may ever cross the other
            slider.min, slider.max = low, high
            slider.step = STEPS.get(type(budget)) or (most - least) / 100 or 1.0
            slider.value = value
            self.kind.value, self.slot.children = type(budget), numbers
            inside = [width for width in self.widths.options if bounds.least_bits <= width <= bounds.most_bits]
            if inside:
                self.widths.value = inside[0], inside[-1]
            self.first.value, self.last.value = bounds.protected_first, bounds.protected_last
            self.protection.value, self.keys_first.value = bounds.protection, bounds.keys_over_values
            self.key_weight.value = setting.key_weight
        finally:
            self._showing = False

    def _on_change(self, controls: Sequence[ipw.Widget], parts: Callable[[], dict[str, Any]]) -> None:
        for control in controls:
            control.observe(lambda _: None if self._showing else self._asked(parts), "value")

    def _bounds(self) -> dict[str, Any]:
        (least, most), kept = self.widths.value, (self.first.value, self.last.value)
        bounds = Bounds(least, most, *kept, self.protection.value, bool(self.keys_first.value))
        return {"bounds": bounds, "key_weight": self.key_weight.value}


class PlanFile(ipw.VBox):  # type: ignore[misc]
    """Save what ``plan`` gives to a file, and show how to use it."""

    def __init__(self, plan: Callable[[], Plan], path: str = "budget_plan.json") -> None:
        self._plan = plan
        self.path = _control(ipw.Text, "file", "Where to save the plan", value=path)
        self.button = button("Save plan", "Write the plan as JSON, whole or not at all", self._clicked)
        self.said, self.code = ipw.HTML(), ipw.HTML()
        self.path.observe(self._tell_code, "value")
        self._tell_code()
        super().__init__([ipw.HBox([self.path, self.button]), self.said, self.code])

    def save(self, path: str | Path | None = None) -> Path:
        """Write the plan and give the file's full path; raises `InputError` if it cannot be written there."""
        return self._plan().save(Path(self.path.value.strip() if path is None else path).expanduser().absolute())

    def _clicked(self) -> None:
        try:
            said = f"Saved to {self.save()}"
        except InputError as error:
            said = str(error)
        self.said.value = f"<em>{html.escape(said)}</em>"

    def _tell_code(self, _: object = None) -> None:
        lines = [
            f"plan = vl.Plan.load({json.dumps(self.path.value.strip(), ensure_ascii=False)})",
            "cache = vl.make_cache(model, plan)",
            "mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)",
        ]
        self.code.value = f"<pre style='line-height: 1.4; margin: 4px 0'>{html.escape(chr(10).join(lines))}</pre>"


def by_of(rates: RateBudget) -> str:
    """What its sensitivities are measured by."""
    return str(rates.sensitivities["by"][0])


def unit_of(rates: RateBudget, a: str = "token") -> str:
    """The unit of a predicted loss, of a token or of something else."""
    return f"nats a {a}" if by_of(rates) in NATS else f"in the unit of {by_of(rates)}"


def _heads(look: Look) -> pl.DataFrame:
    """What each head gets, allocated and by uniform bits in the same bytes, where there are such."""
    plans = {"allocated": look.allocation.plan, "uniform": look.allocation.uniform}
    rates: RateBudget = look.rates
    given = [(kind, plan) for kind, plan in plans.items() if plan is not None]
    return pl.concat(rates.heads(plan).with_columns(kind=pl.lit(kind)) for kind, plan in given)


def _frontier(look: Look) -> pl.DataFrame:
    found: Allocation = look.allocation
    losses = {"allocated": found.predicted_loss, "uniform": found.predicted_uniform_loss}
    rows = [(kind, found.true_bits, loss) for kind, loss in losses.items() if loss is not None]
    now = pl.DataFrame(rows, {"kind": pl.String, "true_bits": float, "predicted_loss": float}, orient="row")
    drawn = look.measured if by_of(look.rates) in NATS and look.measured.height else None
    return views.frontier_rows(look.rates.frontier(look.setting.bounds), now, drawn)


def _ends(rows: pl.DataFrame, look: Look) -> dict[str, Domain]:
    """Ends of the axes of true bits and of loss, between which all that the widest bounds can do and these rows lie."""
    bits = [*look.everything["true_bits"], *rows["true_bits"]]
    domain = log_domain([*look.everything["predicted_loss"], *rows["loss"]])
    return {"bits": (min(bits), max(bits)), "domain": domain}


def _frontier_caption(rows: pl.DataFrame, look: Look) -> str:
    said = "The hollow square is this plan, predicted for codes alone; measured is the mean KL, its window exact"
    if by_of(look.rates) not in NATS:
        said = f"Losses by {by_of(look.rates)} are no divergences: what is measured stands in the table below"
    return "; ".join([said, *not_drawn(rows["loss"])])


CHARTS = (
    Chart(
        "bits",
        ("allocation",),
        lambda _, look: look.rates.heads(look.allocation.plan),
        lambda rows, look: views.allocation_map(rows, least=look.widths[0], most=look.widths[-1]),
        lambda rows, _: views.allocation_caption(rows),
    ),
    Chart(
        "losses",
        ("allocation",),
        lambda _, look: (
            _heads(look).group_by("layer", "kind").agg(pl.col("predicted_loss").sum()).sort("layer", "kind")
        ),
        lambda rows, look: views.loss_by_layer(rows, unit=unit_of(look.rates)),
        lambda rows, look: views.loss_caption(rows, unit=unit_of(look.rates)),
    ),
    Chart(
        "frontier",
        ("setting", "allocation", "measured.height"),
        lambda _, look: _frontier(look),
        lambda rows, look: views.budget_frontier(
            rows, unit=unit_of(look.rates), caption=_frontier_caption(rows, look), **_ends(rows, look)
        ),
        _frontier_caption,
        _ends,
    ),
    Chart(
        "sensitivity",
        (),
        lambda _, look: look.rates.sensitivities,
        lambda rows, look: views.sensitivity_by_layer(rows, unit=unit_of(look.rates, "unit of error")),
    ),
)
