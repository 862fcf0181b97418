"""The Cache page: errors by layer, use of bits, and memory, on the model's own keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab import views
from veloxlab.checks import choice
from veloxlab.codecs import TENSORS, find_method
from veloxlab.errors import InputError
from veloxlab.measure import code_bits, layer_errors, memory_growth, predicted_growth, relative_errors, token_errors
from veloxlab.mlxlm.probe import LayerFacts, probe
from veloxlab.widgets.chart_view import ChartView, link
from veloxlab.widgets.chosen import Checked, Chosen, OfLayers
from veloxlab.widgets.layout import CodeLines, button, controls, wide
from veloxlab.widgets.lifetime import loosen
from veloxlab.widgets.pages.charts import Chart, ChartPage, Look, Measure, Request, coded
from veloxlab.widgets.pages.compare import Comparison
from veloxlab.widgets.pages.experiment import Experiment, Experimenter, OfExperiment
from veloxlab.widgets.selection import MOST_SEED, Bits
from veloxlab.widgets.worker import Worker

NO_QUERIES = (
    "This model computes attention by itself and does not show its queries: errors of keys and values can be measured, "
    "errors of attention cannot."
)
LIKELY_WIDTHS = (2, 3, 4, 5, 6, 8, 1, 7)  # order of measurements ahead: first the widths that people usually try
METRICS = {
    "output_error": ("attention output (relative MSE)", (1e-6, 1.0)),
    "logit_error": ("attention logits (nats)", (1e-3, 10.0)),
    "rel_mse": ("keys and values (relative MSE)", (1e-5, 1.0)),
}
PATHS = {"own": "keep the model's own cache, exact", "arrays": "are decoded to arrays before attention"}
ALL = -1  # means all layers in a dropdown, which cannot show None
GREATEST = 9  # the axis of bits ends here, or higher
MEASURED_UPTO = 4096  # tokens up to which caches are filled and measured
DRAWN_UPTO = 16384  # tokens up to which the memory chart predicts


def unusual(layers: Sequence[LayerFacts]) -> list[str]:
    """Sentences: which layers attention does not read as codes, why, and their share of an exact cache's bytes."""
    whole, said = sum(facts.exact_bytes for facts in layers), list[str]()
    kinds: dict[tuple[str, str], list[LayerFacts]] = {}
    for facts in layers:
        kind: str = facts.path if facts.compressible else "own"
        if kind in PATHS:
            kinds.setdefault((kind, facts.reason), []).append(facts)
    for (kind, reason), found in kinds.items():
        does = PATHS[kind]
        share = f"{sum(facts.exact_bytes for facts in found) / whole:.0%} of an exact token's bytes" if whole else ""
        said.append(f"{len(found)} of {len(layers)} layers {does} ({', '.join(filter(None, (share, reason)))}).")
    return said


def _of_list(layer: int | None) -> int:
    return ALL if layer is None else layer


def at_bits(frames: Sequence[pl.DataFrame], layer_bits: Mapping[int, Bits]) -> pl.DataFrame:
    """Rows of each layer's keys and values at their bits, from a frame for each of `widths`, in that order."""
    rows = [(layer, *pair) for layer, bits in layer_bits.items() for pair in zip(TENSORS, bits, strict=True)]
    wanted = pl.DataFrame(rows, {"layer": pl.Int32, "tensor": pl.String, "wanted": pl.Float64}, orient="row")
    parts = [
        frame.join(wanted.filter(wanted=width), on=["layer", "tensor"], how="semi")
        for width, frame in zip(widths(layer_bits), frames, strict=True)
    ]
    return pl.concat(parts).sort("tensor", "layer", maintain_order=True)


def widths(layer_bits: Mapping[int, Bits]) -> list[float]:
    """All numbers of bits that occur, in rising order."""
    return sorted({width for bits in layer_bits.values() for width in bits})


def _asks(name: str, *exact: str) -> Callable[[Look], list[Request]]:
    return lambda look: [
        (name, None, look.method, width, look.seed, *(getattr(look, setting) for setting in exact))
        for width in widths(look.layer_bits)
    ]


ASKS_TOKENS, ASKS_ATTENTION = _asks("token errors"), _asks("attention errors", "sinks", "window")


def relative(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    """Relative errors of keys and values, from the errors of single tokens."""
    return relative_errors(at_bits(frames, look.layer_bits), sinks=look.sinks, window=look.window)


def _error_rows(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    half = len(frames) // 2
    return relative(frames[:half], look) if look.metric == "rel_mse" else at_bits(frames[half:], look.layer_bits)


def _memory_rows(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    # the method's name alone: the chart has a colour for each name, and a name with bits would change with the sliders
    name = pl.when(pl.col("cache") == "fp16").then("cache").otherwise(pl.lit(look.method))
    return predicted_growth(at_bits(frames, look.layer_bits).with_columns(cache=name), DRAWN_UPTO)


CHARTS = (
    Chart(
        "errors",
        ("method", "layer_bits", "sinks", "window", "metric", "seed"),
        _error_rows,
        lambda frame, look: views.error_map(frame, metric=look.metric, domain=METRICS[look.metric][1]),
        lambda frame, look: views.error_caption(frame, look.metric),
        lambda _, look: look.metric,
        lambda look: [*ASKS_TOKENS(look), *ASKS_ATTENTION(look)],  # both, so that another metric is drawn at once
        "Which layers and heads lose most: give these more bits.",
    ),
    Chart(
        "bits",
        ("method", "layer_bits"),
        lambda frames, look: at_bits(frames, look.layer_bits),
        lambda frame, look: views.bit_allocation(frame, greatest=max(GREATEST, find_method(look.method).bits[-1] + 1)),
        lambda frame, _: views.bit_caption(frame),
        lambda _, look: look.method,
        _asks("bits"),
        "Stored bits of a value in each layer: its code, and its share of scales.",
    ),
    Chart(
        "memory",
        ("method", "layer_bits", "sinks", "window"),
        _memory_rows,
        lambda frame, _: views.memory_growth(frame),
        lambda frame, _: views.memory_caption(frame),
        lambda _, look: look.method,
        _asks("memory", "sinks", "window"),
        "How many bytes the cache saves as the context grows.",
        "measured, then predicted",
    ),
)


class CachePage(OfExperiment, OfLayers, ChartPage):
    """Errors, bits and memory of one cache; see `CacheExplorer`."""

    NAME = "explorer"
    SETTINGS = ("method", "layer_bits", "sinks", "window", "metric", "seed")
    MEASURES: ClassVar[dict[str, Measure]] = {
        "token errors": coded(token_errors),
        "bits": coded(code_bits),
        "attention errors": coded(layer_errors, "sinks", "window"),
        "memory": coded(memory_growth, "sinks", "window", upto=MEASURED_UPTO),
    }
    TALL = ("errors",)
    STATE = ("metric",)

    errors = property(lambda page: page._of_drawn(page.charts, "errors"), doc="The chart of errors.")
    bits = property(lambda page: page._of_drawn(page.charts, "bits"), doc="The chart of bits.")
    memory = property(lambda page: page._of_drawn(page.charts, "memory"), doc="The chart of memory.")
    _listed: Mapping[int, str] | None = None
    head = Chosen("head", help="the picked KV head")
    metric = Checked(choice(*METRICS), "output_error", help="the drawn error: of attention, or of keys and values")

    def __init__(self, experiment: Experiment, worker: Worker | None = None, *, now: bool = False) -> None:
        shown = any(c.queries is not None for c in experiment.capture.layers)
        self._metrics = [metric for metric in METRICS if shown or metric == "rel_mse"]
        super().__init__(experiment.selection, worker, experiment.capture, metric=self._metrics[0])
        self.experiment, self.points = experiment, experiment.points
        self._shown, self._unusual = shown, unusual(probe(experiment.model))
        self._draw(CHARTS, now=now)
        self._code = CodeLines()
        self._own = ipywidgets.HBox(layout={"flex_flow": "row wrap"})  # a button for each layer with bits of its own
        self._laid_out([self._controls(), self._own], self._grid, self._code)
        self.follow()

    def _added(self, name: str, view: ChartView) -> None:
        link(*[each for each in self.charts.values() if each is not view][:1], view)
        if name == "errors":
            t.link((self, "layer"), (view, "picked"))
            self._watch(view, "picked_head", self._head_picked)
            view.picked_head = self.head

    def _head_picked(self, change: dict[str, Any]) -> None:
        if change["new"] is None:  # Escape clears the layer; other pages always show some head
            self._mark()
        else:
            self.head = change["new"]

    def _mark(self) -> None:
        super()._mark()
        if errors := self.charts.get("errors"):
            errors.picked_head = self.head

    @property
    def summary(self) -> str:
        look, choice = self._look(), self.selection.choice
        asked, means = ASKS_TOKENS(look), dict[str, float]()
        if all(request in self.found for request in asked):
            errors = relative([self.found[request] for request in asked], look)
            means = dict(errors.group_by("tensor").agg(pl.col("rel_mse").mean()).iter_rows())
        lost = [means.get(tensor, float("nan")) for tensor in TENSORS]
        rows = self.memory.frame.filter(kind="measured") if "memory" in self.charts else None
        held = "memory not measured yet" if rows is None else views.memory_caption(rows)
        said = f"relative MSE of keys {lost[0]:.4f}, of values {lost[1]:.4f}; {held}"
        return f"{choice.name}, sinks={choice.sinks}, window={choice.window}: {said}"

    @property
    def notes(self) -> list[str]:
        in_codes = self.selection.choice.in_codes(len(self.experiment.capture.tokens))
        return [in_codes, *super().notes, *self._unusual, "" if self._shown else NO_QUERIES]

    def _controls(self) -> ipywidgets.Widget:
        layers = [("all layers", ALL), *((str(layer), layer) for layer in self.selection.layers)]
        tip = "Bits of one layer: choose it here or in a chart"
        layer = ipywidgets.Dropdown(description="layer", tooltip=tip, options=layers, value=_of_list(self.layer))
        t.link((self, "layer"), (layer, "value"), transform=(_of_list, lambda each: None if each == ALL else each))
        metrics = [(METRICS[name][0], name) for name in self._metrics]
        metric = wide(self._control(ipywidgets.Dropdown, "metric", "error of", options=metrics))
        forget = partial(self.selection.choose, own_bits={}, layer=None)
        self._reset = button("Same for all", "Remove the bits of single layers: all layers get the same", forget)
        measure = button("Measure fidelity", "Run the model with this cache and compare its predictions", self.measure)
        method, *others = self._of_cache(step=16)
        return controls(
            method,
            metric,
            others,
            layer,
            self._reset,
            self._control(ipywidgets.BoundedIntText, "seed", min=0, max=MOST_SEED),
            self._all_codes(),
            measure,
        )

    @t.validate("metric")
    def _metric_is_there(self, proposal: dict[str, Any]) -> str:
        if proposal["value"] not in self._metrics:
            raise InputError(f"There is no metric {proposal['value']} here. {NO_QUERIES}")
        return str(proposal["value"])

    def _likely(self) -> Iterable[Look]:
        chosen = self.selection
        ready = [width for width in chosen.widths if chosen.fitting.is_ready(self.method, width)]
        for width in LIKELY_WIDTHS:
            if width in ready:
                yield self._look(layer_bits=dict.fromkeys(chosen.layers, (width, width)))

    def _redraw(self) -> None:
        super()._redraw()
        choice = self.selection.choice
        plan = f"{'explorer' if self._owns_worker else 'lab'}.plan"
        self._code.value = "\n".join(choice.lines(plan if choice.own_bits else ""))
        self._list(choice.exceptions)

    def _list(self, exceptions: Mapping[int, str]) -> None:
        """Show a button for each layer with bits of its own; a press removes these bits."""
        if exceptions != self._listed:
            self._listed, self._reset.disabled = exceptions, not exceptions
            tip = "Remove the bits of this layer: it gets those of all layers again"
            self._own.children = [
                button(f"layer {layer}: {bits} \u2715", tip, partial(self._forget, layer), width="auto")
                for layer, bits in exceptions.items()
            ]
            loosen(self._own)

    def _forget(self, layer: int) -> None:
        own = self.selection.choice.own_bits
        self.selection.choose(own_bits={each: bits for each, bits in own.items() if each != layer})


class CacheExplorer(Experimenter, CachePage):
    """Choose a compressed cache, and see its errors, bits and memory on the model's own keys and values.

    The first settings are measured at once, other bits ahead, so that sliders answer from tables. A method that learns
    is fitted when it is first chosen, with progress. A click on a layer in a chart marks that layer in all charts, and
    the bit sliders then set that layer alone. No network is needed.

    ``model``, ``tokenizer``: as `veloxlab.load` returns them. ``method``, ``bits``, ``key_bits``, ``value_bits``,
    ``sinks``, ``window``: first settings, as for `veloxlab.make_cache`. ``text``, ``tokens``: the text that the model
    reads (by default the shipped WikiText-2 test excerpt), and how many of its tokens. ``calibration``: from
    `veloxlab.calibrate`, for a method that has to be fitted; sliders have its widths. Raises `InputError` for an
    unknown method, bits out of range, or a text that is too short.

    ``method``, ``key_bits``, ``value_bits``, ``sinks``, ``window``, ``seed``, ``layer`` and ``metric`` are traits: set
    them and the charts follow. If a model does not show its queries, the only metric is ``"rel_mse"``. The charts
    ``errors``, ``bits``, ``memory`` and ``frontier`` are each a `ChartView`.
    """

    frontier = property(lambda page: page.comparison.frontier, doc="The chart of measured caches, or None.")

    def _begin(self, experiment: Experiment) -> None:
        CachePage.__init__(self, experiment)
        self.comparison = Comparison(experiment, self.worker)
        *above, line = self.children
        self.children = [*above, self.comparison, line]

    @property
    def named(self) -> Mapping[str, ChartView]:
        return {**self.charts, **self.comparison.charts}
