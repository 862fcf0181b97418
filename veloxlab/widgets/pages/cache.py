"""The page of the cache: errors by layer, how bits are spent, and memory, on the model's own keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.cache.plan import Plan
from veloxlab.checks import choice
from veloxlab.codecs import ROLES, find_method
from veloxlab.errors import InputError
from veloxlab.measure import (
    code_bits,
    layer_errors,
    memory_growth,
    predicted_growth,
    relative_errors,
    token_errors,
)
from veloxlab.progress import Progress
from veloxlab.views import bit_allocation, bit_caption, error_caption, error_map, memory_caption
from veloxlab.views import memory_growth as memory_chart
from veloxlab.widgets.chart_view import ChartView, link
from veloxlab.widgets.lifetime import weakly
from veloxlab.widgets.pages.charts import Chart, ChartPage, Frames, Look, Request
from veloxlab.widgets.pages.compare import Comparison, Experiment, Experimenter
from veloxlab.widgets.panel import ProgressBar, button, code, rows
from veloxlab.widgets.selection import Bits, Checked, Chosen, ChosenBits
from veloxlab.widgets.worker import Worker

METRICS = {
    "attention output (relative MSE)": "output_error",
    "attention logits (nats)": "logit_error",
    "keys and values (relative MSE)": "rel_mse",
}
DOMAINS = {"rel_mse": (1e-5, 1.0), "output_error": (1e-6, 1.0), "logit_error": (1e-3, 10.0)}
NO_QUERIES = (
    "This model computes attention by itself and does not show its queries: errors of keys and values can be seen, "
    "those of attention cannot."
)
GREATEST = 9  # bits to which the axis of spent bits goes, at least
MEASURED_UPTO = 4096  # tokens to which caches are really filled
DRAWN_UPTO = 16384  # tokens to which the memory chart goes on
LIKELY_WIDTHS = (2, 3, 4, 5, 6, 8, 1, 7)  # the order in which widths are measured ahead: those that people try first
ALL = "all layers"


def _coded(measure: Callable[..., pl.DataFrame]) -> Callable[..., pl.DataFrame]:
    """A measurement of the whole capture, under a method at a number of bits."""

    def run(frames: Frames, progress: Progress, method: str, width: int, **exact: int) -> pl.DataFrame:
        calibration = frames.fitting.calibration(method, [width], progress)
        return measure(frames.capture, method=method, bits=width, calibration=calibration, **exact)

    return run


def _exact(measure: Callable[..., pl.DataFrame], **given: Any) -> Callable[..., pl.DataFrame]:
    """The same, with tokens kept exact."""

    def run(frames: Frames, progress: Progress, method: str, width: int, sinks: int, window: int) -> pl.DataFrame:
        return _coded(measure)(frames, progress, method, width, sinks=sinks, window=window, **given)

    return run


MEASURES = {
    "token errors": _coded(token_errors),
    "bits": _coded(code_bits),
    "attention errors": _exact(layer_errors),
    "memory": _exact(memory_growth, upto=MEASURED_UPTO),
}


def at_bits(frames: Sequence[pl.DataFrame], layer_bits: Mapping[int, Bits]) -> pl.DataFrame:
    """Rows of each layer's keys and values at their bits, from frames of each of `widths`, the fewest bits first."""
    wanted = pl.DataFrame(
        [(layer, tensor, bits[place]) for layer, bits in layer_bits.items() for place, tensor in enumerate(ROLES)],
        schema={"layer": pl.Int32, "tensor": pl.String, "wanted": pl.Int32},
        orient="row",
    )
    parts = [
        frame.join(wanted.filter(wanted=width), on=["layer", "tensor"], how="semi")
        for width, frame in zip(widths(layer_bits), frames, strict=True)
    ]
    return pl.concat(parts).sort("tensor", "layer", maintain_order=True)


def widths(layer_bits: Mapping[int, Bits]) -> list[int]:
    """Numbers of bits that occur."""
    return sorted({width for bits in layer_bits.values() for width in bits})


def _asks(name: str, *exact: str) -> Callable[[Look], list[Request]]:
    return lambda look: [
        (name, look.method, width, *(getattr(look, setting) for setting in exact)) for width in widths(look.layer_bits)
    ]


ASKS_TOKENS, ASKS_ATTENTION = _asks("token errors"), _asks("attention errors", "sinks", "window")


def relative(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    """Relative errors of keys and values, from the errors of single tokens."""
    return relative_errors(at_bits(frames, look.layer_bits), sinks=look.sinks, window=look.window)


def _error_rows(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    half = len(frames) // 2
    return relative(frames[:half], look) if look.metric == "rel_mse" else at_bits(frames[half:], look.layer_bits)


def _memory_rows(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    # by the method's name alone: a name that moved with the sliders would leave the chart's colours
    name = pl.when(pl.col("cache") == "fp16").then("cache").otherwise(pl.lit(look.method))
    return predicted_growth(at_bits(frames, look.layer_bits).with_columns(cache=name), DRAWN_UPTO)


CHARTS = (
    Chart(
        "errors",
        ("method", "layer_bits", "sinks", "window", "metric"),
        _error_rows,
        lambda frame, look: error_map(frame, metric=look.metric, domain=DOMAINS[look.metric]),
        lambda frame, look: error_caption(frame, look.metric),
        lambda _, look: look.metric,
        lambda look: [*ASKS_TOKENS(look), *ASKS_ATTENTION(look)],  # both: another metric is seen at once
    ),
    Chart(
        "bits",
        ("method", "layer_bits"),
        lambda frames, look: at_bits(frames, look.layer_bits),
        lambda frame, look: bit_allocation(frame, greatest=max(GREATEST, find_method(look.method).bits[-1] + 1)),
        lambda frame, _: bit_caption(frame),
        lambda _, look: look.method,
        _asks("bits"),
    ),
    Chart(
        "memory",
        ("method", "layer_bits", "sinks", "window"),
        _memory_rows,
        lambda frame, _: memory_chart(frame),
        lambda frame, _: memory_caption(frame),
        lambda _, look: look.method,
        _asks("memory", "sinks", "window"),
    ),
)


class CachePage(ChartPage):
    """Errors, bits and memory of one cache; see `CacheExplorer`.

    Parameters
    ----------
    experiment : the text, the model and what is chosen.
    worker, comparison : of the laboratory that it is a page of; by default it has its own.
    """

    SETTINGS = ("method", "layer_bits", "sinks", "window", "metric")

    method = Chosen("method", help="a method's id")
    key_bits = ChosenBits("keys", "layer", help="code bits of each key coordinate, of the picked layer or of all")
    value_bits = ChosenBits("values", "layer", help="code bits of each value coordinate")
    sinks = Chosen("sinks", help="first tokens, kept exact")
    window = Chosen("window", help="newest tokens, kept exact")
    layer = Chosen("layer", help="the picked layer")
    metric = Checked(choice(*DOMAINS), "output_error", help="which error is drawn")

    def __init__(
        self, experiment: Experiment, worker: Worker | None = None, comparison: Comparison | None = None
    ) -> None:
        self._model = experiment.model
        shown = any(c.queries is not None for c in experiment.capture.layers)
        self._metrics = {words: metric for words, metric in METRICS.items() if shown or metric == "rel_mse"}
        frames = Frames(MEASURES, experiment.selection.fitting, experiment.capture)
        metric = next(iter(self._metrics.values()))
        super().__init__("explorer", frames, CHARTS, experiment.selection, worker, metric=metric)
        self.lasting = "" if shown else NO_QUERIES
        self.comparison = comparison or Comparison(experiment, self.worker)
        self.errors, self.bits, self.memory = self.charts.values()
        link(*self.charts.values())
        t.link((self, "layer"), (self.errors, "picked"))
        self._code = ipywidgets.HTML()
        own = [] if comparison else [self.comparison]
        self.children = [self._controls(), self._message, *self.charts.values(), *own, self._code]
        self.follow()

    @property
    def named(self) -> Mapping[str, ChartView]:
        """The charts."""
        return {**self.charts, **({} if self.comparison not in self.children else self.comparison.named)}

    @property
    def layer_bits(self) -> dict[int, Bits]:
        """Code bits of keys and values, by layer."""
        return {layer: self.selection.choice.bits_of(layer) for layer in self.selection.layers}

    @property
    def name(self) -> str:
        """The settings in a few words."""
        return self.selection.choice.name

    @property
    def plan(self) -> Plan:
        """The settings as a plan, for `veloxlab.make_cache` or a file."""
        return self.selection.choice.plan(self._model)

    @property
    def measured(self) -> pl.DataFrame:
        """`veloxlab.fidelity` of every setting that was measured."""
        return self.comparison.measured

    @property
    def frontier(self) -> ChartView | None:
        """What was measured, once something was."""
        return self.comparison.frontier

    def measure(self) -> None:
        """Ask for the fidelity of the present settings; the result joins `measured` and the frontier chart."""
        self.comparison.measure(told=weakly(self.say))

    @property
    def state(self) -> dict[str, Any]:
        """The settings as plain words and numbers: what `restore` takes, and JSON holds."""
        choice = self.selection.choice
        return {
            "method": choice.method,
            "bits": list(choice.bits_of(None)),
            "layers": {str(layer): list(bits) for layer, bits in choice.own_bits.items()},
            "sinks": choice.sinks,
            "window": choice.window,
            "layer": choice.layer,
            "metric": self.metric,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Choose the settings of a `state`.

        Raises
        ------
        InputError : it says what cannot be here; nothing is changed then.
        """
        missing = sorted(set(self.state) - set(state))
        if missing:
            raise InputError(f"The state says nothing of {', '.join(missing)}: give what the attribute state gave.")
        key_bits, value_bits = state["bits"]
        parts = {name: state[name] for name in ("method", "sinks", "window", "layer", "head") if name in state}
        own = {int(layer): tuple(bits) for layer, bits in state["layers"].items()}
        before, self.metric = self.metric, state["metric"]
        try:
            self.selection.choose(key_bits=key_bits, value_bits=value_bits, own_bits=own, **parts)
        except InputError:
            self.metric = before
            raise

    def lines(self, what: str) -> list[str]:
        """Lines of Python that make the cache of ``what``: a plan, or a method and its settings."""
        choice = self.selection.choice
        if not find_method(choice.method).calibrated:
            return [f"cache = vl.make_cache(model, {what})"]
        return [
            f'calibration = vl.calibrate(model, tokenizer, "{choice.method}", bits={choice.widths})',
            f"cache = vl.make_cache(model, {what}, calibration=calibration)",
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary})"

    @property
    def summary(self) -> str:
        """One line of numbers."""
        look, choice = self._look(), self.selection.choice
        found = [self._frames.found.get(request) for request in ASKS_TOKENS(look)]
        errors = None if any(frame is None for frame in found) else relative(found, look)  # type: ignore[arg-type]
        means = {} if errors is None else dict(errors.group_by("tensor").agg(pl.col("rel_mse").mean()).iter_rows())
        lost = [means.get(tensor, float("nan")) for tensor in ROLES]
        held = memory_caption(self.memory.frame.filter(kind="measured"))
        return (
            f"{choice.name}, sinks={choice.sinks}, window={choice.window}: relative MSE of keys {lost[0]:.4f}, of "
            f"values {lost[1]:.4f}; {held}"
        )

    def _controls(self) -> ipywidgets.Widget:
        layers = [(ALL, None), *((str(layer), layer) for layer in self.selection.layers)]
        layer = self._choice("layer", layers, tip="Bits of one layer: choose it here or in a chart")
        metric = self._choice("metric", list(self._metrics.items()), "error of")
        metric.layout.width = "340px"
        reset = button(
            "Same for all", "Forget the bits of single layers", lambda: self.selection.choose(own_bits={}, layer=None)
        )
        measure = button("Measure fidelity", "Run the model with this cache and compare its predictions", self.measure)
        return rows(
            [self._methods(), metric],
            [self._bits("key_bits", "K bits"), self._bits("value_bits", "V bits")],
            [self._slider("sinks", 0, 64), self._slider("window", 0, 256, step=16)],
            [layer, reset, measure],
            [ProgressBar(self.worker, flex="1 1 auto")],
        )

    @t.validate("metric")
    def _metric_is_there(self, proposal: dict[str, Any]) -> str:
        if proposal["value"] not in self._metrics.values():
            raise InputError(f"There is no {proposal['value']} here. {NO_QUERIES}")
        return str(proposal["value"])

    def _likely(self) -> Iterable[Look]:
        chosen = self.selection
        ready = [width for width in chosen.widths if chosen.fitting.is_ready(self.method, width)]
        for width in LIKELY_WIDTHS:
            if width in ready:
                yield self._look(layer_bits=dict.fromkeys(chosen.layers, (width, width)))

    def _redraw(self) -> None:
        super()._redraw()
        self._tell_code()

    def _tell_code(self) -> None:
        choice = self.selection.choice
        plan = f"{'explorer' if self._owns_worker else 'lab'}.plan"
        self._code.value = code("\n".join(self.lines(plan if choice.own_bits else choice.arguments)))


class CacheExplorer(Experimenter, CachePage):
    """Choose a compressed cache and see what it costs, on the model's own keys and values.

    A capture of ``tokens`` tokens and the first settings are measured at once; other bits are measured ahead, so that
    sliders answer from tables. A method that learns is fitted when it is first chosen, with progress. Clicking a layer
    in any chart marks it in all, and the bit sliders are then of that layer alone. Nothing here needs a network.

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

    def _begin(self, experiment: Experiment) -> None:
        CachePage.__init__(self, experiment)
