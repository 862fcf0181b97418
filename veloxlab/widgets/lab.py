"""The laboratory: what each layer loses, how bits are spent and what is held, while the knobs are turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.allocate.plan import Plan
from veloxlab.calibration import Calibration
from veloxlab.codecs import ROLES, Role, find_method
from veloxlab.errors import InputError
from veloxlab.files import write_atomically
from veloxlab.measure import Capture, capture, fidelity
from veloxlab.views import memory_caption
from veloxlab.views.report import Section, report
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.lab_charts import DOMAINS, METRICS, Knobs, LabCharts
from veloxlab.widgets.measuring import Measuring
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.progress import ProgressBar
from veloxlab.widgets.tables import Bits
from veloxlab.widgets.vega_bundle import ensure_bundle
from veloxlab.widgets.worker import Progress

ALL = "all layers"


class Lab(Panel):
    """Turn the knobs of a compressed cache and see what they cost, on the model's own keys and values.

    A capture of ``tokens`` tokens and the first settings are measured at once; other bit widths are measured behind the
    scenes, so that sliders answer from tables. Clicking a layer in any chart marks it in all, and the bit sliders
    then speak of that layer alone. Nothing here needs a network.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    method : a method's id.
    bits, key_bits, value_bits : code bits to begin with; the last two override the first.
    sinks, window : tokens kept exact to begin with.
    text : what the model reads; the shipped WikiText-2 test excerpt by default.
    tokens : how much of it.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted; sliders have its widths.

    Attributes
    ----------
    key_bits, value_bits, sinks, window, layer, metric : traits; set them and the charts follow.
    measured : `veloxlab.fidelity` of every setting that was measured.
    plan : the settings as a `veloxlab.Plan`.
    errors, bits, memory, frontier : the charts, each with ``frame``, ``to_parquet``, ``to_csv``, ``to_png`` and
        ``to_svg``; there is a frontier once something was measured.

    Raises
    ------
    InputError : unknown method, bits out of range, a text that is too short.
    """

    key_bits = t.Int(4, help="code bits of keys, of the picked layer or of all")
    value_bits = t.Int(4, help="code bits of values")
    sinks = t.Int(4, help="tokens at the start kept exact")
    window = t.Int(64, help="newest tokens kept exact")
    layer = t.Int(None, allow_none=True, help="the picked layer")
    metric = t.Unicode("output_error", help="which error is drawn")

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
        self._model, self._tokenizer, self._text = model, tokenizer, text
        self._method, self._calibration = find_method(method), calibration
        settings = {"key_bits": key_bits or bits, "value_bits": value_bits or bits, "sinks": sinks, "window": window}
        Plan.uniform(model, method, **settings)  # type: ignore[arg-type]  # refuses what cannot be, before any work
        self._capture: Capture = capture(model, tokenizer, text, tokens=tokens)
        self._measuring = Measuring(self._capture, self._method, calibration)
        self._base = (settings["key_bits"], settings["value_bits"])
        self._overrides: Bits = {}
        self._turning = False
        self._complete = True
        self.measured = pl.DataFrame()
        for width in set(self._base):
            self._measuring.width(width, sinks, window)
        super().__init__("lab", **settings)
        self._build()
        self.observe(self._knob_turned, ["key_bits", "value_bits", "sinks", "window", "metric"])
        self.observe(self._layer_picked, "layer")
        self._measure_rest()

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def layer_bits(self) -> Bits:
        """Code bits of keys and values, by layer."""
        return {c.layer: self._overrides.get(c.layer, self._base) for c in self._capture.layers}

    @property
    def name(self) -> str:
        """The settings in a few words."""
        key, value = self._base
        changed = f" +{len(self._overrides)} layers" if self._overrides else ""
        return f"{self._method.id} K{key} V{value}{changed}"

    @property
    def plan(self) -> Plan:
        """The settings as a plan, for `veloxlab.make_cache` or a file."""
        plan = Plan.uniform(
            self._model,
            self._method.id,
            key_bits=self._base[0],
            value_bits=self._base[1],
            sinks=self.sinks,
            window=self.window,
        )
        for layer, (key, value) in self._overrides.items():
            plan = plan.with_layer(layer, key_bits=key, value_bits=value)
        return plan

    def measure(self) -> None:
        """Ask for the fidelity of the present settings; the result joins `measured` and the frontier chart."""
        plan, name = self.plan, self.name

        def job(progress: Progress) -> pl.DataFrame:
            tokens = len(self._capture.tokens)
            given: dict[str, Any] = {"text": self._text, "tokens": tokens, "calibration": self._calibration}
            return fidelity(self._model, self._tokenizer, plan, name=name, progress=progress, **given)

        self.worker.submit("fidelity", job, on_done=self._add_measured, on_error=self._say)

    def save_pictures(self, folder: str | Path) -> list[Path]:
        """Write each chart as SVG and PNG and its rows as Parquet into ``folder``, and give the files."""
        return self._charts.save(Path(folder))

    def export(self, path: str | Path) -> Path:
        """Write what is seen as one HTML file that needs no network, and give its path.

        It holds the charts, live and in light and dark, what was measured, the plan and the lines that use it.
        """
        words = f"{len(self._capture.tokens)} tokens of text, sinks={self.sinks}, window={self.window}."
        measured = [Section("Fidelity", table=self.measured)] if len(self.measured) else []
        plan = Section("The plan", "Save it as plan.json.", code=self.plan.to_json())
        use = Section("To use it", code='cache = vl.make_cache(model, vl.Plan.load("plan.json"))')
        page = report(
            f"veloxlab: {self.name}",
            [Section(self.name, words), *self._charts.sections, *measured, plan, use],
            ensure_bundle().read_text("utf-8"),
        )
        write_atomically(Path(path), page.encode())
        return Path(path)

    @property
    def state(self) -> dict[str, Any]:
        """The settings as plain words and numbers: what `restore` takes, and JSON holds."""
        return {
            "method": self._method.id,
            "bits": list(self._base),
            "layers": {str(layer): list(widths) for layer, widths in self._overrides.items()},
            "sinks": self.sinks,
            "window": self.window,
            "layer": self.layer,
            "metric": self.metric,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Turn the knobs to a `state` of a laboratory of the same method.

        Raises
        ------
        InputError : another method's state, or one that says what this laboratory cannot be; nothing is changed then.
        """
        if state.get("method") != self._method.id:
            raise InputError(
                f"This laboratory is of {self._method.id}, and the state of {state.get('method')}: make a "
                f"vl.Lab(model, tokenizer, method={state.get('method')!r})."
            )
        missing = sorted(set(self.state) - set(state))
        if missing:
            raise InputError(f"The state says nothing of {', '.join(missing)}: give what lab.state gave.")
        overrides: Bits = {int(layer): (widths[0], widths[1]) for layer, widths in state["layers"].items()}
        for layer, widths in overrides.items():
            self._check_layer(layer)
            for side, width in zip(ROLES, widths, strict=True):
                self._check_width(width, side)
        before, overrides_before = self.state, self._overrides
        try:
            self._turn_to(state, overrides)
        except Exception:
            self._turn_to(before, overrides_before)
            raise

    def _turn_to(self, state: dict[str, Any], overrides: Bits) -> None:
        self.layer = None
        self._overrides = overrides
        self.key_bits, self.value_bits = state["bits"]
        self.sinks, self.window, self.metric = state["sinks"], state["window"], state["metric"]
        self.layer = state["layer"]
        self._redraw()

    # how it looks where no kernel runs ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        key, value = (self._charts.relative_error(self._knobs, tensor) for tensor in ("keys", "values"))
        return (
            f"Lab({self.name}, sinks={self.sinks}, window={self.window}: relative MSE of keys {key:.4f}, "
            f"of values {value:.4f}; {memory_caption(self.memory.frame.filter(kind='measured'))})"
        )

    @property
    def views(self) -> list[ChartView]:
        """The charts."""
        return list(self._charts.named.values())

    @property
    def errors(self) -> ChartView:
        """What each layer loses."""
        return self._charts.errors

    @property
    def bits(self) -> ChartView:
        """How the bits are spent."""
        return self._charts.bits

    @property
    def memory(self) -> ChartView:
        """What is held."""
        return self._charts.memory

    @property
    def frontier(self) -> ChartView | None:
        """What was measured, once something was."""
        return self._charts.frontier

    # building -------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        greatest = self._measuring.widths[-1] + 1
        self._charts = LabCharts(self._measuring.tables, self._method.id, greatest, self._knobs)
        t.link((self, "layer"), (self.errors, "picked"))
        self._code = ipywidgets.HTML()
        self._slot = ipywidgets.VBox()
        self._tell_code()
        self.children = [self._controls(), self._message, *self.views, self._slot, self._code]

    def _controls(self) -> ipywidgets.Widget:
        layers = [ALL, *(str(c.layer) for c in self._capture.layers)]
        widths = self._measuring.widths
        key = self._steps("key_bits", widths, "K bits", "Code bits of each key coordinate")
        value = self._steps("value_bits", widths, "V bits", "Code bits of each value coordinate")
        sinks = self._number("sinks", (0, 64), tip="First tokens, kept exact")
        window = self._number("window", (0, 256), tip="Newest tokens, kept exact", step=16)
        layer = ipywidgets.Dropdown(
            options=layers, description="layer", tooltip="Bits of one layer: pick it here or in a chart"
        )
        t.link(
            (self, "layer"),
            (layer, "value"),
            transform=(lambda n: ALL if n is None else str(n), lambda s: None if s == ALL else int(s)),
        )
        metric = self._choice("metric", list(METRICS.items()), "error of", "What is drawn above")
        metric.layout.width = "340px"
        reset = ipywidgets.Button(description="Same for all", tooltip="Forget the bits of single layers")
        reset.on_click(lambda _: self._reset())
        measure = ipywidgets.Button(
            description="Measure fidelity", tooltip="Run the model with this cache and compare its predictions"
        )
        measure.on_click(lambda _: self.measure())
        return ipywidgets.VBox(
            [
                ipywidgets.HBox([key, value]),
                ipywidgets.HBox([sinks, window]),
                ipywidgets.HBox([layer, metric]),
                ipywidgets.HBox([reset, measure, ProgressBar(self.worker)]),
            ]
        )

    # turning the knobs ----------------------------------------------------------------------------------------------

    @t.validate("key_bits", "value_bits")
    def _bits_are_the_methods(self, proposal: dict[str, Any]) -> int:
        self._check_width(proposal["value"], "keys" if proposal["trait"].name == "key_bits" else "values")
        return int(proposal["value"])

    @t.validate("sinks", "window")
    def _tokens_are_counted(self, proposal: dict[str, Any]) -> int:
        if proposal["value"] < 0:
            name = proposal["trait"].name
            raise InputError(f"{name}={proposal['value']} is not a number of tokens: give a whole number, 0 or more.")
        return int(proposal["value"])

    @t.validate("layer")
    def _layer_is_there(self, proposal: dict[str, Any]) -> int | None:
        if proposal["value"] is None:
            return None
        self._check_layer(proposal["value"])
        return int(proposal["value"])

    @t.validate("metric")
    def _metric_is_known(self, proposal: dict[str, Any]) -> str:
        if proposal["value"] not in DOMAINS:
            raise InputError(f"There is no metric {proposal['value']!r}: choose one of {', '.join(DOMAINS)}.")
        return str(proposal["value"])

    def _check_width(self, width: int, side: Role) -> None:
        self._method.check(width, side, {})
        if width not in self._measuring.widths:
            raise InputError(
                f"The calibration holds no {side} at {width} bits, only at {self._measuring.widths}: fit that too."
            )

    def _check_layer(self, layer: int) -> None:
        layers = [c.layer for c in self._capture.layers]
        if layer not in layers:
            raise InputError(f"There is no layer {layer}: pick one from {layers[0]} to {layers[-1]}.")

    def _knob_turned(self, change: dict[str, Any]) -> None:
        if self._turning:
            return
        if change["name"] in ("key_bits", "value_bits"):
            widths = (self.key_bits, self.value_bits)
            if self.layer is None:
                self._base = widths
            else:
                self._overrides[self.layer] = widths
        self._redraw(new_metric=change["name"] == "metric")

    def _layer_picked(self, _: object) -> None:
        """The bit sliders speak of the picked layer; showing its bits changes none."""
        self._turning = True
        try:
            picked = self._base if self.layer is None else self._overrides.get(self.layer, self._base)
            self.key_bits, self.value_bits = picked
        finally:
            self._turning = False

    def _reset(self) -> None:
        self._overrides = {}
        self.layer = None
        self._layer_picked(None)
        self._redraw()

    @property
    def _knobs(self) -> Knobs:
        return Knobs(self.layer_bits, self.sinks, self.window, self.metric)

    def _redraw(self, *, new_metric: bool = False) -> None:
        """Show what is measured of the present settings, and ask for what is not."""
        self._complete = self._charts.show(self._knobs, new_metric=new_metric)
        self._tell_code()
        self._say("" if self._complete else "Measuring these settings: a chart that waits shows the last ones.")
        if not self._complete:
            self._measure_rest()

    def _tell_code(self) -> None:
        key, value = self._base
        call = (
            f'vl.make_cache(model, "{self._method.id}", key_bits={key}, value_bits={value}, '
            f"sinks={self.sinks}, window={self.window})"
        )
        if self._overrides:
            call = "vl.make_cache(model, lab.plan)"
        self._code.value = f"<code>cache = {call}</code>"

    # measuring ------------------------------------------------------------------------------------------------------

    def _measure_rest(self) -> None:
        """Measure what the present settings lack, then what the next ones may need, one width after another."""
        sinks, window = self.sinks, self.window
        wanted = {width for pair in self.layer_bits.values() for width in pair}
        order = self._measuring.order(wanted)

        def job(progress: Progress) -> None:
            for i, width in enumerate(order):
                progress(i, len(order), f"measuring {width} bits")
                self._measuring.width(width, sinks, window)
                if not self._complete and wanted <= {*order[: i + 1]}:
                    self._redraw(new_metric=True)

        self.worker.submit("tables", job, on_error=self._say)

    def _add_measured(self, row: pl.DataFrame) -> None:
        self.measured = pl.concat([self.measured, row]) if len(self.measured) else row
        self._charts.show_measured(self.measured, self._place)

    def _place(self, chart: ChartView) -> None:
        self._slot.children = [chart]
