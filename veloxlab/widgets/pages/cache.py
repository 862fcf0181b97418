"""The page of the cache: errors by layer, how bits are spent, and memory, on the model's own keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.checks import choice
from veloxlab.codecs import TENSORS
from veloxlab.errors import InputError
from veloxlab.views import memory_caption
from veloxlab.widgets.chart_view import ChartView, link
from veloxlab.widgets.pages.cache_charts import ASKS_TOKENS, CHARTS, DOMAINS, MEASURES, METRICS, relative
from veloxlab.widgets.pages.charts import ChartPage, Look
from veloxlab.widgets.pages.compare import Comparison, Experiment, Experimenter, OfExperiment
from veloxlab.widgets.panel import ProgressBar, button, code, rows
from veloxlab.widgets.selection import Checked, OfLayers
from veloxlab.widgets.worker import Worker

NO_QUERIES = (
    "This model computes attention by itself and does not show its queries: errors of keys and values can be seen, "
    "those of attention cannot."
)
LIKELY_WIDTHS = (2, 3, 4, 5, 6, 8, 1, 7)  # the order in which widths are measured ahead: those that people try first
ALL = "all layers"


class CachePage(OfExperiment, OfLayers, ChartPage):
    """Errors, bits and memory of one cache; see `CacheExplorer`.

    Parameters
    ----------
    experiment : the text, the model, what is chosen and what was measured.
    worker : of the laboratory that it is a page of.
    """

    NAME = "explorer"
    SETTINGS = ("method", "layer_bits", "sinks", "window", "metric")
    MEASURES = MEASURES

    metric = Checked(choice(*DOMAINS), "output_error", help="which error is drawn")

    def __init__(self, experiment: Experiment, worker: Worker | None = None) -> None:
        shown = any(c.queries is not None for c in experiment.capture.layers)
        self._metrics = {words: metric for words, metric in METRICS.items() if shown or metric == "rel_mse"}
        metric = next(iter(self._metrics.values()))
        super().__init__(experiment.selection, worker, experiment.capture, metric=metric)
        self.experiment, self.points = experiment, experiment.points
        self.lasting = "" if shown else NO_QUERIES
        self._draw(CHARTS)
        self.errors, self.bits, self.memory = self.charts.values()
        link(*self.charts.values())
        t.link((self, "layer"), (self.errors, "picked"))
        self._code = ipywidgets.HTML()
        self.children = [self._controls(), self._message, *self.charts.values(), self._code]
        self.follow()

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

    @property
    def summary(self) -> str:
        """One line of numbers."""
        look, choice = self._look(), self.selection.choice
        found = [self.found.get(request) for request in ASKS_TOKENS(look)]
        errors = None if any(frame is None for frame in found) else relative(found, look)  # type: ignore[arg-type]
        means = {} if errors is None else dict(errors.group_by("tensor").agg(pl.col("rel_mse").mean()).iter_rows())
        lost = [means.get(tensor, float("nan")) for tensor in TENSORS]
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
        self.comparison = Comparison(experiment, self.worker)
        *above, line = self.children
        self.children = [*above, self.comparison, line]

    @property
    def named(self) -> Mapping[str, ChartView]:
        """The charts."""
        return {**self.charts, **self.comparison.charts}

    @property
    def frontier(self) -> ChartView | None:
        """What was measured, once something was."""
        return self.comparison.frontier
