"""What the laboratory has measured so far, and the frames that its charts read from it. No widgets, no MLX work."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import checked
from veloxlab.codecs import ROLES, Role, find_method
from veloxlab.errors import InputError
from veloxlab.measure import (
    Capture,
    capture,
    code_bits,
    fidelity,
    layer_errors,
    memory_growth,
    predicted_growth,
    relative_errors,
    token_errors,
)
from veloxlab.progress import Progress as Tell
from veloxlab.progress import silent
from veloxlab.views import (
    bit_allocation,
    bit_caption,
    error_caption,
    error_map,
    frontier,
    memory_caption,
)
from veloxlab.views import memory_growth as memory_chart
from veloxlab.widgets.chart_view import ChartView, link
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.lifetime import weakly
from veloxlab.widgets.panel import Panel, ProgressBar, nearest, offer
from veloxlab.widgets.traits import Whole, Words
from veloxlab.widgets.worker import Progress, Status

Bits = dict[int, tuple[int, int]]  # layer → code bits of keys and of values
ATTENTION = ("logit_error", "output_error")


@dataclass
class Tables:
    """Measurements by code bits, each taken once. Frames are never changed, so any thread may read them.

    The worker adds frames while a page reads others, so nothing here loops over a dictionary.

    Attributes
    ----------
    tokens : `token_errors` by bits.
    codes : `code_bits` by bits.
    attention : `layer_errors` by (bits, sinks, window).
    growth : `memory_growth` by (bits, sinks, window), keys and values at the same bits.
    """

    tokens: dict[int, pl.DataFrame] = field(default_factory=dict)
    codes: dict[int, pl.DataFrame] = field(default_factory=dict)
    attention: dict[tuple[int, int, int], pl.DataFrame] = field(default_factory=dict)
    growth: dict[tuple[int, int, int], pl.DataFrame] = field(default_factory=dict)

    def errors(self, bits: Bits, metric: str, sinks: int, window: int) -> pl.DataFrame | None:
        """``layer, head, tensor`` and the metric, each layer at its bits; None if some of it is not measured yet."""
        if metric in ATTENTION:
            return _choose(lambda width: self.attention.get((width, sinks, window)), bits)
        chosen = _choose(self.tokens.get, bits)
        return None if chosen is None else relative_errors(chosen, sinks=sinks, window=window)

    def relative_error(self, bits: Bits, sinks: int, window: int, tensor: str) -> float:
        """Mean relative error of all keys or values; NaN while it is not measured."""
        errors = self.errors(bits, "rel_mse", sinks, window)
        return float("nan") if errors is None else float(errors.filter(tensor=tensor)["rel_mse"].mean())  # type: ignore[arg-type]

    def code_bits(self, bits: Bits) -> pl.DataFrame | None:
        """``layer, tensor, part, bits_per_value``, each layer at its bits."""
        return _choose(self.codes.get, bits)

    def memory(self, bits: Bits, sinks: int, window: int, name: str) -> pl.DataFrame | None:
        """`memory_growth` rows of the cache called ``name`` and of fp16, each layer at its bits."""
        chosen = _choose(lambda width: self.growth.get((width, sinks, window)), bits)
        if chosen is None:
            return None
        ours = pl.col("cache") != "fp16"
        return chosen.with_columns(cache=pl.when(ours).then(pl.lit(name)).otherwise("cache"))


def _choose(measured: Callable[[int], pl.DataFrame | None], bits: Bits) -> pl.DataFrame | None:
    """Rows of each layer's keys and values from the frame measured at their bits; None if one is missing."""
    wanted = pl.DataFrame(
        [
            {"layer": layer, "tensor": tensor, "wanted": width}
            for layer, widths in bits.items()
            for tensor, width in zip(("keys", "values"), widths, strict=True)
        ],
        schema={"layer": pl.Int32, "tensor": pl.String, "wanted": pl.Int32},
    )
    parts = []
    for width in wanted["wanted"].unique().to_list():
        frame = measured(width)
        if frame is None:
            return None
        parts.append(frame.join(wanted.filter(wanted=width), on=["layer", "tensor"], how="semi"))
    return pl.concat(parts).sort("tensor", "layer", maintain_order=True)


MEASURED_UPTO = 4096  # tokens to which caches are really filled
LIKELY_WIDTHS = (2, 3, 4, 5, 6, 8, 1, 7)  # the order in which widths are measured: those that people try first


class Measuring:
    """Fills `Tables` from a capture's keys and values.

    Attributes
    ----------
    method : the method's id.
    tables : what is measured so far.
    widths : code bits that can be measured.
    """

    def __init__(self, capture: Capture, method: str, fitting: Fitting) -> None:
        self._capture, self._fitting = capture, fitting
        self.method, self.widths = method, fitting.widths(method)
        self.tables = Tables()

    def likely(self, wanted: Iterable[int]) -> list[int]:
        """Widths that may be wanted next and need no fitting first."""
        ready = [width for width in self.widths if self._fitting.is_ready(self.method, width)]
        return [width for width in LIKELY_WIDTHS if width in ready and width not in wanted]

    def width(self, width: int, sinks: int, window: int, progress: Tell = silent) -> None:
        """Measure one width, but for what is measured already; what has to be fitted first tells its progress."""
        tables, at = self.tables, (width, sinks, window)
        calibration = self._fitting.calibration(self.method, [width], progress)
        given: dict[str, Any] = {"method": self.method, "calibration": calibration, "bits": width}
        exact: dict[str, Any] = {"sinks": sinks, "window": window}
        if width not in tables.tokens:
            tables.codes[width] = code_bits(self._capture, **given)
            tables.tokens[width] = token_errors(self._capture, **given)  # last: it says that both are there
        if at not in tables.growth:
            tables.growth[at] = memory_growth(self._capture, **exact, upto=MEASURED_UPTO, **given)
        if at not in tables.attention:
            tables.attention[at] = layer_errors(self._capture, **exact, **given)


METRICS = {
    "attention output (relative MSE)": "output_error",
    "attention logits (nats)": "logit_error",
    "keys and values (relative MSE)": "rel_mse",
}
DOMAINS = {"rel_mse": (1e-5, 1.0), "output_error": (1e-6, 1.0), "logit_error": (1e-3, 10.0)}
GREATEST = 9  # bits to which the axis of spent bits goes, at least
DRAWN_UPTO = 16384  # tokens to which the memory chart goes on


@dataclass(frozen=True)
class Knobs:
    """What the charts depend on: method, code bits of each layer, tokens kept exact, and which error is drawn."""

    method: str
    layer_bits: Bits
    sinks: int
    window: int
    metric: str


class CacheCharts:
    """Draw one setting of the knobs, and redraw others, from `Tables`.

    Parameters
    ----------
    tables : of the method, which hold what the first setting needs.
    knobs : the first setting.

    Attributes
    ----------
    errors, bits, memory, frontier : the charts; there is a frontier once something was measured.
    """

    def __init__(self, tables: Tables, knobs: Knobs) -> None:
        errors, spent, held = _rows(tables, knobs)
        assert errors is not None, "the first settings are measured before anything is built"
        assert spent is not None
        assert held is not None
        self.errors = ChartView(error_map(errors, metric=knobs.metric, domain=DOMAINS[knobs.metric]))
        self.bits = ChartView(bit_allocation(spent, greatest=_greatest(knobs.method)))
        self.memory = ChartView(memory_chart(held))
        self.frontier: ChartView | None = None
        self._shape = {"errors": knobs.metric, "bits": knobs.method, "memory": knobs.method}
        link(self.errors, self.bits, self.memory)

    @property
    def named(self) -> dict[str, ChartView]:
        """Those that there are, from top to bottom."""
        charts = {"errors": self.errors, "bits": self.bits, "memory": self.memory}
        return charts | ({"frontier": self.frontier} if self.frontier else {})

    def show(self, tables: Tables, knobs: Knobs) -> bool:
        """Redraw what is measured of a setting, and tell whether that was all; the rest shows the last one."""
        rows = errors, spent, held = _rows(tables, knobs)
        if errors is not None:
            if self._is_new("errors", knobs.metric):
                self.errors.show(error_map(errors, metric=knobs.metric, domain=DOMAINS[knobs.metric]))
            else:
                self.errors.put(errors, caption=error_caption(errors, knobs.metric))
        if spent is not None:
            if self._is_new("bits", knobs.method):
                self.bits.show(bit_allocation(spent, greatest=_greatest(knobs.method)))
            else:
                self.bits.put(spent, caption=bit_caption(spent))
        if held is not None:
            if self._is_new("memory", knobs.method):
                self.memory.show(memory_chart(held))
            else:
                self.memory.put(held, caption=memory_caption(held))
        return all(part is not None for part in rows)

    def _is_new(self, chart: str, shape: str) -> bool:
        """Whether a chart's spec changes, and not its numbers alone."""
        before, self._shape[chart] = self._shape[chart], shape
        return before != shape

    def show_measured(self, measured: pl.DataFrame, place: Callable[[ChartView], None]) -> None:
        """Draw what was measured so far (`veloxlab.fidelity`); the chart is given to ``place`` when it is made."""
        chart = frontier(measured, x="held_bytes")
        if self.frontier is None:
            self.frontier = ChartView(chart)
            place(self.frontier)
        else:
            self.frontier.show(chart)


def _rows(tables: Tables, knobs: Knobs) -> tuple[pl.DataFrame | None, pl.DataFrame | None, pl.DataFrame | None]:
    """What the charts of errors, bits and memory show, as far as it is measured."""
    bits, exact = knobs.layer_bits, (knobs.sinks, knobs.window)
    # by the method's name alone: a name that moved with the sliders would leave the chart's colours
    held = tables.memory(bits, *exact, knobs.method)
    return (
        tables.errors(bits, knobs.metric, *exact),
        tables.code_bits(bits),
        None if held is None else predicted_growth(held, DRAWN_UPTO),
    )


def _greatest(method: str) -> int:
    return max(GREATEST, find_method(method).bits[-1] + 1)


ALL = "all layers"
WIDTHS = ("key_bits", "value_bits")
NO_QUERIES = (
    "This model computes attention by itself and does not show its queries: errors of keys and values can be seen, "
    "those of attention cannot."
)


class CacheExplorer(Panel):
    """Turn the knobs of a compressed cache and see what they cost, on the model's own keys and values.

    A capture of ``tokens`` tokens and the first settings are measured at once; other bit widths are measured behind the
    scenes, so that sliders answer from tables. A method that learns is fitted when it is first chosen, with progress.
    Clicking a layer in any chart marks it in all, and the bit sliders then speak of that layer alone. Nothing here
    needs a network.

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
    method, key_bits, value_bits, sinks, window, layer, metric : traits; set them and the charts follow. Where a model
        does not show its queries, the metric is ``"rel_mse"`` and no other.
    measured : `veloxlab.fidelity` of every setting that was measured.
    plan : the settings as a `veloxlab.Plan`.
    errors, bits, memory, frontier : the charts, each with ``frame``, ``to_parquet``, ``to_csv``, ``to_png`` and
        ``to_svg``; there is a frontier once something was measured.

    Raises
    ------
    InputError : unknown method, bits out of range, a text that is too short.
    """

    NAME = "explorer"
    WHERE = "The chart below has every measured point."

    method = Words("turboquant", help="a method's id")
    key_bits = Whole(4, help="code bits of keys, of the picked layer or of all")
    value_bits = Whole(4, help="code bits of values")
    sinks = Whole(4, help="tokens at the start kept exact")
    window = Whole(64, help="newest tokens kept exact")
    layer = Whole(None, allow_none=True, help="the picked layer")
    metric = Words("output_error", help="which error is drawn")

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
        self._model, self._tokenizer, self._text = model, tokenizer, text
        self._fitting = Fitting(model, tokenizer, calibration)
        base = (bits if key_bits is None else key_bits, bits if value_bits is None else value_bits)
        # refuses what cannot be, before any work
        Plan.uniform(model, method, key_bits=base[0], value_bits=base[1], sinks=sinks, window=window)
        self._capture: Capture = capture(model, tokenizer, text, tokens=tokens)
        self._measurings: dict[str, Measuring] = {}
        self._base, self._overrides = base, Bits()  # never changed in place: the worker reads them
        self._turning = False
        self._complete = True
        self._drawing = threading.Lock()
        self.measured = pl.DataFrame()
        self._settings_measured: list[dict[str, Any]] = []
        for width in set(base):
            self._measuring_of(method).width(width, sinks, window)
        metric = next(
            m for m in (type(self).metric.default_value, *self._metrics.values()) if m in self._metrics.values()
        )
        knobs = {"method": method, "key_bits": base[0], "value_bits": base[1], "sinks": sinks, "window": window}
        super().__init__(self.NAME, None, **knobs, metric=metric)
        self._charts = CacheCharts(self._measuring.tables, self._knobs)
        t.link((self, "layer"), (self.errors, "picked"))
        self._code = ipywidgets.HTML()
        self._slot = ipywidgets.VBox()
        self._tell_code()
        # before those of a page that follows: it comes to widths that the method has
        self.observe(lambda _: self._method_chosen(), "method")
        self.observe(self._knob_turned, [*WIDTHS, "sinks", "window", "metric"])
        self.observe(lambda _: self._layer_picked(), "layer")
        self._arrange()
        if len(self._metrics) < len(METRICS):
            self.say_always(NO_QUERIES)
        self.worker.watch(weakly(self._follow))
        self._measure_rest()

    @property
    def _metrics(self) -> dict[str, str]:
        """The errors that can be drawn, by their words: those of attention take its queries."""
        shown = any(c.queries is not None for c in self._capture.layers)
        return {words: metric for words, metric in METRICS.items() if shown or metric not in ATTENTION}

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
        return f"{self.method} K{key} V{value}{changed}"

    @property
    def plan(self) -> Plan:
        """The settings as a plan, for `veloxlab.make_cache` or a file."""
        plan = self._uniform(self.method, *self._base)
        for layer, (key, value) in self._overrides.items():
            plan = plan.with_layer(layer, key_bits=key, value_bits=value)
        return plan

    def _uniform(self, method: str, key_bits: int, value_bits: int) -> Plan:
        """A plan of these widths for all layers, at the present sinks and window."""
        exact: dict[str, Any] = {"sinks": self.sinks, "window": self.window}
        return Plan.uniform(self._model, method, key_bits=key_bits, value_bits=value_bits, **exact)

    def measure(self) -> None:
        """Ask for the fidelity of the present settings; the result joins `measured` and the frontier chart."""
        plan, name, state = self.plan, self.name, self.state
        widths = {width for pair in self.layer_bits.values() for width in pair}

        def job(progress: Progress) -> pl.DataFrame:
            return self._fidelity(plan, name, state["method"], widths, progress)

        self._submit("fidelity", job, on_done=lambda row: self._add_measured(row, state))

    @property
    def state(self) -> dict[str, Any]:
        """The settings as plain words and numbers: what `restore` takes, and JSON holds."""
        return {
            "method": self.method,
            "bits": list(self._base),
            "layers": {str(layer): list(widths) for layer, widths in self._overrides.items()},
            "sinks": self.sinks,
            "window": self.window,
            "layer": self.layer,
            "metric": self.metric,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Turn the knobs to a `state`.

        Raises
        ------
        InputError : it says what cannot be here; nothing is changed then.
        """
        missing = sorted(set(self.state) - set(state))
        if missing:
            raise InputError(f"The state says nothing of {', '.join(missing)}: give what {self.NAME}.state gave.")
        method = self._known(state["method"])
        overrides: Bits = {int(layer): (widths[0], widths[1]) for layer, widths in state["layers"].items()}
        for layer in overrides:
            self._check_layer(layer)
        for widths in (tuple(state["bits"]), *overrides.values()):
            for side, width in zip(ROLES, widths, strict=True):
                self._check_width(width, side, method)
        before, overrides_before = self.state, self._overrides
        try:
            self._turn_to(state, overrides)
        except Exception:
            self._turn_to(before, overrides_before)
            raise

    def _turn_to(self, state: Mapping[str, Any], overrides: Bits) -> None:
        self.layer = None
        self.method = state["method"]
        self._overrides = overrides
        self.key_bits, self.value_bits = state["bits"]
        self.sinks, self.window, self.metric = state["sinks"], state["window"], state["metric"]
        self.layer = state["layer"]
        self._redraw()

    # how it looks where no kernel runs ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        tables, at = self._measuring.tables, (self.layer_bits, self.sinks, self.window)
        key, value = (tables.relative_error(*at, tensor) for tensor in ROLES)
        return (
            f"{type(self).__name__}({self.name}, sinks={self.sinks}, window={self.window}: relative MSE of keys "
            f"{key:.4f}, of values {value:.4f}; {memory_caption(self.memory.frame.filter(kind='measured'))})"
        )

    @property
    def named(self) -> dict[str, ChartView]:
        """The charts."""
        return self._charts.named

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

    def _arrange(self) -> None:
        """Put the parts together."""
        self.children = [self._controls(), self._message, self.errors, self.bits, self.memory, self._slot, self._code]

    def _controls(self) -> ipywidgets.Widget:
        layers = [ALL, *(str(c.layer) for c in self._capture.layers)]
        widths = self._measuring.widths
        method = self._choice("method", self._fitting.methods, tip="How vectors are coded")
        key = self._steps("key_bits", widths, "K bits", "Code bits of each key coordinate")
        value = self._steps("value_bits", widths, "V bits", "Code bits of each value coordinate")
        self._width_sliders = key, value
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
        metric = self._choice("metric", list(self._metrics.items()), "error of", "Which error is drawn")
        metric.layout.width = "340px"
        reset = ipywidgets.Button(description="Same for all", tooltip="Forget the bits of single layers")
        reset.on_click(lambda _: self._reset())
        measure = ipywidgets.Button(
            description="Measure fidelity", tooltip="Run the model with this cache and compare its predictions"
        )
        measure.on_click(lambda _: self.measure())
        rows = [
            [method, metric],
            [key, value],
            [sinks, window],
            [layer, reset, measure],
            [ProgressBar(self.worker, flex="1 1 auto")],
        ]
        return ipywidgets.VBox([ipywidgets.HBox(row) for row in rows])

    # turning the knobs ----------------------------------------------------------------------------------------------

    @t.validate("method")
    def _method_can_be_had(self, proposal: dict[str, Any]) -> str:
        return self._known(proposal["value"])

    @t.validate(*WIDTHS)
    def _bits_are_the_methods(self, proposal: dict[str, Any]) -> int:
        self._check_width(proposal["value"], "keys" if proposal["trait"].name == "key_bits" else "values", self.method)
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
        if proposal["value"] not in self._metrics.values():
            raise InputError(f"There is no {proposal['value']} here. {NO_QUERIES}")
        return str(proposal["value"])

    def _known(self, method: str) -> str:
        found = find_method(method).id
        if found not in self._fitting.methods:
            raise InputError(f"{found!r} compresses nothing: choose one of {', '.join(self._fitting.methods)}.")
        return found

    def _check_width(self, width: int, side: Role, method: str) -> None:
        find_method(method).check(width, side, {})
        widths = self._fitting.widths(method)
        if width not in widths:
            raise InputError(f"The calibration holds no {side} at {width} bits, only at {widths}: fit that too.")

    def _check_layer(self, layer: int) -> None:
        layers = [c.layer for c in self._capture.layers]
        if layer not in layers:
            raise InputError(f"There is no layer {layer}: pick one from {layers[0]} to {layers[-1]}.")

    def _method_chosen(self) -> None:
        """Bring every width to the nearest that the method has."""
        widths = self._measuring.widths
        self._base = (nearest(widths, self._base[0]), nearest(widths, self._base[1]))
        self._overrides = {
            layer: (nearest(widths, key), nearest(widths, value)) for layer, (key, value) in self._overrides.items()
        }
        self._turning = True
        try:
            for slider in self._width_sliders:
                offer(slider, widths)
        finally:
            self._turning = False
        self._layer_picked()
        self._redraw()

    def _knob_turned(self, change: dict[str, Any]) -> None:
        if self._turning:
            return
        if change["name"] in WIDTHS:
            widths = (self.key_bits, self.value_bits)
            if self.layer is None:
                self._base = widths
            else:
                self._overrides = self._overrides | {self.layer: widths}
        self._redraw()

    def _layer_picked(self) -> None:
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
        self._layer_picked()
        self._redraw()

    @property
    def _knobs(self) -> Knobs:
        return Knobs(self.method, self.layer_bits, self.sinks, self.window, self.metric)

    def _redraw(self) -> None:
        """Show what is measured of the present settings, and ask for what is not."""
        with self._drawing:  # the one who comes last reads the newest settings
            self._complete = self._charts.show(self._measuring.tables, self._knobs)
            self._tell_code()
            self.say("" if self._complete else "Measuring these settings: a chart that waits shows the last ones.")
        if not self._complete:
            self._measure_rest()

    def lines(self, what: str) -> list[str]:
        """Lines of Python that make the cache of ``what``: a plan, or a method and its settings."""
        if not find_method(self.method).calibrated:
            return [f"cache = vl.make_cache(model, {what})"]
        widths = sorted({width for pair in self.layer_bits.values() for width in pair})
        return [
            f'calibration = vl.calibrate(model, tokenizer, "{self.method}", bits={widths})',
            f"cache = vl.make_cache(model, {what}, calibration=calibration)",
        ]

    def _tell_code(self) -> None:
        key, value = self._base
        settings = f'"{self.method}", key_bits={key}, value_bits={value}, sinks={self.sinks}, window={self.window}'
        lines = self.lines(f"{self.NAME}.plan" if self._overrides else settings)
        self._code.value = f"<code>{'<br>'.join(html.escape(line, quote=False) for line in lines)}</code>"

    # measuring ------------------------------------------------------------------------------------------------------

    @property
    def _measuring(self) -> Measuring:
        return self._measuring_of(self.method)

    def _measuring_of(self, method: str) -> Measuring:
        if method not in self._measurings:  # one for all threads, whichever comes first
            self._measurings.setdefault(method, Measuring(self._capture, method, self._fitting))
        return self._measurings[method]

    def _follow(self, status: Status) -> None:
        if status.state == "cancelled" and status.key == f"{self._name}: tables" and not self._complete:
            self.say("Cancelled: charts show the last settings that were measured. Move a knob to measure these.")

    def _measure_rest(self) -> None:
        """Measure what the present settings lack; and behind all else, what the next ones may need."""
        measuring, sinks, window = self._measuring, self.sinks, self.window
        wanted = sorted({width for pair in self.layer_bits.values() for width in pair})

        def job(progress: Progress) -> None:
            for i, width in enumerate(wanted):
                progress(i, len(wanted), f"measuring {width} bits")
                measuring.width(width, sinks, window, progress)
            if not self._complete:
                self._redraw()

        def ahead(progress: Progress) -> None:
            likely = measuring.likely(wanted)
            for i, width in enumerate(likely):
                progress(i, len(likely), f"measuring {width} bits")
                measuring.width(width, sinks, window)

        self._submit("tables", job)
        self._submit("ahead", ahead, ahead=True)

    def _fidelity(self, plan: Plan, name: str, method: str, widths: Collection[int], progress: Tell) -> pl.DataFrame:
        calibration = self._fitting.calibration(method, widths, progress)
        given: dict[str, Any] = {"text": self._text, "tokens": len(self._capture.tokens), "calibration": calibration}
        return fidelity(self._model, self._tokenizer, plan, name=name, progress=progress, **given)

    def _add_measured(self, row: pl.DataFrame, state: dict[str, Any]) -> None:
        self.measured = pl.concat([self.measured, row]) if len(self.measured) else row
        self._settings_measured.append(state)
        self._charts.show_measured(self.measured, self._place)
        name, kl, perplexity = row.select("name", "kl_mean", "perplexity").row(0)
        self.say(
            f"Measured {name}: mean KL {kl:.3g} nats from the exact cache, perplexity {perplexity:.2f}. {self.WHERE}"
        )

    def _place(self, chart: ChartView) -> None:
        self._slot.children = [chart]
