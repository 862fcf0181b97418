"""The controls of a budget, a table of measured plans, and a widget that saves a plan."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import polars as pl

from veloxlab.allocate import budget as budgets
from veloxlab.allocate.budget import AverageBits, Bounds, Budget, BytesPerToken, QualityFloor, Setting, TokensInMemory
from veloxlab.cache.plan import Plan
from veloxlab.errors import InputError
from veloxlab.runtime import device
from veloxlab.views.picture import html_table
from veloxlab.widgets.layout import CodeLines, button

KINDS = {
    "average bits": AverageBits,
    "bytes a token": BytesPerToken,
    "tokens in memory": TokensInMemory,
    "predicted loss": QualityFloor,
}
STEPS = {AverageBits: 0.05, QualityFloor: 0.02}  # of sliders; the others have a hundred steps
LOOKS: dict[str, Any] = {"style": {"description_width": "104px"}}
ANY = "any of them"  # any method
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
    """HTML of `veloxlab.allocate.ratequant.EVALUATED` rows, the newest first; empty without rows."""
    rows = measured.reverse().select(**COLUMNS).iter_rows()
    return "" if measured.is_empty() else html_table(list(COLUMNS), rows, cell="padding: 1px 10px 1px 0")


def _control(kind: type[ipw.Widget], words: str, tip: str, **settings: Any) -> ipw.Widget:
    return kind(description=words, tooltip=tip, **LOOKS | settings)


def _slider(words: str, tip: str, form: str, kind: type[ipw.Widget] = ipw.FloatSlider, **settings: Any) -> ipw.Widget:
    return _control(kind, words, tip, readout_format=form, **settings)


STARTING = (
    "The sensitivity of each head is measured once, by gradients of {sequences} texts of {tokens} tokens. That takes "
    "some minutes for a small model on a CPU, and much longer for a large one. Finished texts are kept on disk: after "
    "Cancel, a new start goes on with the next text. When the tables are ready, the controls need no more measurements."
)


def measuring(rate_settings: Mapping[str, Any]) -> tuple[str, str]:
    """The label of the button that measures tables, and a text about the time that this takes."""
    asked = {name: rate_settings.get(name, usual) for name, usual in {"sequences": 8, "tokens": 512}.items()}
    return "Measure tables ({sequences} × {tokens} tokens)".format(**asked), STARTING.format(**asked)


class SettingControl(ipw.Box):  # type: ignore[misc]  # ipywidgets has no types
    """Choose a kind of budget and its number, the limits of the allocation, and the weight of keys against values.

    When the user changes a control, ``asked`` gets a function that returns the changed parts of a `Setting`.
    ``converted`` returns the budget of another kind that allows the present allocation. ``widths``, ``layers`` (their
    number) and ``methods`` are those of the tables.
    """

    def __init__(
        self,
        asked: Callable[[Callable[[], dict[str, Any]]], None],
        converted: Callable[[type], Budget],
        tokens: int,
        widths: Sequence[int],
        layers: int,
        methods: Sequence[str],
    ) -> None:
        self._asked, self._showing = asked, False
        self._least: int | None = None  # least width of the shown bounds
        self.kind = _control(ipw.Dropdown, "budget", "What the budget is counted in", options=KINDS)
        limits = {"value": tokens, "min": 1, "max": 1_000_000, "step": 256}
        self.tokens = _control(
            ipw.BoundedIntText, "tokens", "Tokens of the text that has to fit (1 to 1,000,000)", **limits
        )
        self.megabytes = _slider("megabytes", "Bytes that the compressed layers hold, including exact tokens", ".3f")
        most = "The greatest predicted loss of a token: the plan has the fewest bytes within it"
        self.numbers: dict[type, list[ipw.Widget]] = {
            AverageBits: [_slider("true bits", "Stored bits of a value, including scales", ".2f")],
            BytesPerToken: [
                _slider("bytes a token", "Bytes of one packed token's keys and values in all layers", ",.0f")
            ],
            TokensInMemory: [self.tokens, self.megabytes],
            QualityFloor: [_slider("nats a token", most, ".3g", ipw.FloatLogSlider)],
        }  # the last control of each is the amount
        self.slot = ipw.VBox()

        tip = "The methods that may code keys and values"
        self.method = _control(ipw.Dropdown, "method", tip, options=[ANY, *methods])
        ends = {"options": list(widths), "index": (0, len(widths) - 1)}
        self.widths = _control(ipw.SelectionRangeSlider, "bits allowed", "Least and most code bits of a head", **ends)
        self.first, self.last = (
            _control(
                ipw.IntSlider,
                f"{end} layers",
                f"How many {end} layers are left out of the budget (0 to {layers // 2})",
                min=0,
                max=layers // 2,
            )
            for end in ("first", "last")
        )
        tip = "What the first and last layers that are left out get"
        self.protection = _control(ipw.Dropdown, "these get", tip, options=PROTECTIONS)
        tip = "A layer's keys get at least as many bits as its values, on average over its heads"
        beside = {"indent": False}
        self.keys_first = _control(ipw.Checkbox, "keys no fewer than values", tip, **beside)
        tip = "Weight of an error in keys against one in values (1/16 to 16)"
        scale = {"value": 1.0, "base": 2, "min": -4, "max": 4, "step": 0.25}
        self.key_weight = _slider("weight of keys", tip, ".2f", ipw.FloatLogSlider, **scale)
        bounds = [self.widths, self.first, self.last, self.protection, self.keys_first, self.key_weight]
        bounds = [self.method, *bounds] if len(methods) > 1 else bounds

        self._on_change([self.kind], lambda: {"budget": converted(self.kind.value)})
        amounts = [control for controls in self.numbers.values() for control in controls]
        self._on_change(amounts, lambda: {"budget": self.kind.value(*(c.value for c in self.numbers[self.kind.value]))})
        self._on_change(bounds, self._bounds)
        super().__init__([self.kind, self.slot, *bounds])
        self.add_class("veloxlab-controls")

    def show(self, setting: Setting, spans: budgets.Spans) -> None:
        """Show a setting and the ends of each control, without a call of ``asked``."""
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
            slider.max = max(high, slider.max)  # ipywidgets raises if the least end passes the greatest
            slider.min, slider.max = low, high
            slider.step = STEPS.get(type(budget)) or (most - least) / 100 or 1.0
            slider.value = value
            self.kind.value, self.slot.children = type(budget), numbers
            self._least, lowest = bounds.least_bits, bounds.least_bits or 1
            inside = [width for width in self.widths.options if lowest <= width <= bounds.most_bits]
            if inside:
                self.widths.value = inside[0], inside[-1]
            self.method.value = bounds.methods[0] if bounds.methods and len(bounds.methods) == 1 else ANY
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
        least = self._least if least == (self._least or self.widths.options[0]) else least
        keys_first = bool(self.keys_first.value)
        methods = None if self.method.value == ANY else (self.method.value,)
        bounds = Bounds(least, most, *kept, self.protection.value, keys_first, methods)
        return {"bounds": bounds, "key_weight": self.key_weight.value}


class PlanFile(ipw.VBox):  # type: ignore[misc]
    """Save the plan that ``plan`` returns to a file, and show how to use it."""

    def __init__(self, plan: Callable[[], Plan], path: str = "budget_plan.json") -> None:
        self._plan = plan
        self.path = _control(ipw.Text, "file", "Where to save the plan", value=path)
        self.button = button("Save plan", "Write the plan as JSON, whole or not at all", self._clicked)
        self.said, self.code = ipw.HTML(), CodeLines()
        self.path.observe(self.tell_code, "value")
        self.tell_code()
        super().__init__([ipw.HBox([self.path, self.button]), self.said, self.code])

    def save(self, path: str | Path | None = None) -> Path:
        """Write the plan and return the file's full path; raises `InputError` if it cannot be written there."""
        return self._plan().save(Path(self.path.value.strip() if path is None else path).expanduser().absolute())

    def _clicked(self) -> None:
        try:
            said = f"Saved to {self.save()}"
        except InputError as error:
            said = str(error)
        self.said.value = f"<em>{html.escape(said)}</em>"

    def tell_code(self, _: object = None) -> None:
        """Show the lines of Python that use the present plan."""
        fitted = [f'vl.calibrate(model, tokenizer, "{method}")' for method in self._plan().calibrations]
        given = f", calibration=[{', '.join(fitted)}]" if fitted else ""
        lines = [
            f"plan = vl.Plan.load({json.dumps(self.path.value.strip(), ensure_ascii=False)})",
            f"cache = vl.make_cache(model, plan{given})",
            "mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)",
        ]
        self.code.value = "\n".join(lines)
