"""The memory planner: any model, context, batch and method, and whether it fits, before anything is loaded."""

from __future__ import annotations

import html
import threading
from typing import Any

import altair as alt
import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.checks import ARGUMENTS, checked, whole
from veloxlab.codecs import METHODS, Method, Role, find_method
from veloxlab.errors import InputError
from veloxlab.measure.layouts import CacheLayout, cache_layouts
from veloxlab.measure.planned_memory import largest, planned
from veloxlab.runtime import device
from veloxlab.shapes import MODEL_OR_CONFIG, ModelOrConfig, ModelShape, shape_of
from veloxlab.views import memory_plan, plan_caption
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.panel import Panel, inside, nearest, offer
from veloxlab.widgets.traits import Real, Whole, Words
from veloxlab.widgets.worker import Progress, Worker

GIGABYTE = 1e9
LEAST, MOST = 8, 21  # powers of two between which the context slider runs
TYPED = {
    "layers": "layers",
    "kv_heads": "KV heads",
    "head_dim": "head dim",
    "sliding_window": "sliding",
    "full_every": "full every",
}
RANGES = {
    "context": (2**LEAST, 2**MOST),
    "batch": (1, 100_000),
    "sinks": (0, 256),
    "window": (0, 1024),
    "layers": (1, 1000),
    "kv_heads": (1, 1000),
    "head_dim": (1, 10_000),
    "sliding_window": (0, 2**MOST),
    "full_every": (0, 1000),
}
KNOBS = ("context", "batch", "memory_gb")  # of them a chart is made by sums alone
WIDTHS = ("key_bits", "value_bits")
SETTINGS = ("method", *WIDTHS, "sinks", "window", *TYPED)


class MemoryPlanner(Panel):
    """See what a context will take, and how long one fits, as predicted by the layout of the codes.

    Parameters
    ----------
    model_or_config : as for `veloxlab.shapes.shape_of`: a model, a ``config.json`` or its folder, the id of a cached
        repository. Without one, boxes for layers, KV heads and head dimensions are shown.
    worker : of the laboratory that it is a page of.
    knobs : first values of the traits, such as ``method="rabitq"`` or ``memory_gb=24``.

    Attributes
    ----------
    context, batch, memory_gb : traits: tokens of each sequence, sequences, and memory for the cache in 10^9 bytes.
    method, key_bits, value_bits, sinks, window : traits, as for `veloxlab.make_cache`.
    layers, kv_heads, head_dim, sliding_window, full_every : traits: the shape, where none was given; the last two as
        for `veloxlab.ModelShape.typed`, and 0 for none.
    chart : the `ChartView`.

    Raises
    ------
    InputError : there is no such model here, an unknown method, bits out of range, a number that cannot be.
    """

    context = Whole(32_768, help="tokens of each sequence")
    batch = Whole(1, help="sequences")
    memory_gb = Real(help="memory for the cache alone, 10^9 bytes; at first 8, or what this machine may use")
    method = Words("turboquant", help="a method's id")
    key_bits = Whole(4, help="code bits of keys")
    value_bits = Whole(4, help="code bits of values")
    sinks = Whole(4, help="tokens at the start kept exact")
    window = Whole(64, help="newest tokens kept exact")
    layers = Whole(32, help="layers that keep keys and values")
    kv_heads = Whole(8, help="KV heads of a layer")
    head_dim = Whole(128, help="numbers of a key or value of one head")
    sliding_window = Whole(0, help="tokens that a sliding layer sees; 0: none slides")
    full_every = Whole(0, help="every so many-th layer sees all tokens; 0: none does")

    @checked(model_or_config=MODEL_OR_CONFIG, **{name: whole(*ends) for name, ends in RANGES.items()})
    def __init__(
        self, model_or_config: ModelOrConfig | None = None, *, worker: Worker | None = None, **knobs: Any
    ) -> None:
        unknown = sorted(set(knobs) - {*KNOBS, *SETTINGS})
        if unknown:
            raise InputError(
                f"MemoryPlanner has no knob {unknown[0]!r}. Its knobs are: {', '.join((*KNOBS, *SETTINGS))}."
            )
        self._given = None if model_or_config is None else shape_of(model_or_config)
        self._drawing = threading.Lock()
        super().__init__("planner", worker, **knobs)
        for trait in (width for width in WIDTHS if width not in knobs):
            setattr(self, trait, nearest(self._method.bits, getattr(self, trait)))
        self._layouts = self._lay_out()
        self._code = ipywidgets.HTML()
        self.chart = ChartView(self._drawn())
        self._tell_code()
        self.children = [self._controls(), self._message, self.chart, self._code]
        self.observe(lambda _: self._draw(), KNOBS)
        self.observe(self._settings_changed, SETTINGS)

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> ModelShape:
        """The model's shape: that which was given, or that which is typed in."""
        if self._given is not None:
            return self._given
        return ModelShape.typed(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            sliding_window=self.sliding_window or None,
            full_every=self.full_every or None,
        )

    @property
    def plan(self) -> pl.DataFrame:
        """Bytes by part at this context: `veloxlab.measure.planned_memory.PLANNED`."""
        return self._planned(self._layouts)

    @property
    def largest(self) -> pl.DataFrame:
        """The largest contexts that fit: `veloxlab.measure.planned_memory.LARGEST`."""
        return self._largest(self._layouts)

    # how it looks where no kernel runs ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"MemoryPlanner({self.shape.name}: {plan_caption(self.plan, self.largest)})"

    @property
    def named(self) -> dict[str, ChartView]:
        """The chart."""
        return {"memory_plan": self.chart}

    # building -------------------------------------------------------------------------------------------------------

    def _controls(self) -> ipywidgets.Widget:
        context = ipywidgets.FloatLogSlider(
            value=self.context,
            base=2,
            min=LEAST,
            max=MOST,
            step=0.25,
            description="context",
            readout_format=",.0f",
            tooltip="Tokens of each sequence",
        )
        t.link((self, "context"), (context, "value"), transform=(float, round))
        memory = ipywidgets.BoundedFloatText(
            min=1e-3,
            max=1e5,
            step=1,
            description="memory (GB)",
            tooltip="For the cache alone, in 10^9 bytes",
            style={"description_width": "initial"},
        )
        t.link((self, "memory_gb"), (memory, "value"))
        method = self._choice("method", list(METHODS), tip="How vectors are coded")
        widths, tip = list(self._method.bits), "Code bits of each coordinate"
        self._widths = [
            self._steps(trait, widths, words, tip) for trait, words in zip(WIDTHS, ("K bits", "V bits"), strict=True)
        ]
        sinks, window = (self._number(name, RANGES[name]) for name in ("sinks", "window"))
        batch = self._box("batch", "batch")
        rows = [[context, batch, memory], [method, *self._widths], [sinks, window]]
        if self._given is None:
            boxes = [self._box(name, words) for name, words in TYPED.items()]
            rows += [boxes[:3], boxes[3:]]
        return ipywidgets.VBox([ipywidgets.HBox(row) for row in rows])

    def _box(self, trait: str, words: str) -> ipywidgets.Widget:
        return self._number(trait, RANGES[trait], words, kind=ipywidgets.BoundedIntText)

    # turning the knobs ----------------------------------------------------------------------------------------------

    @property
    def _method(self) -> Method:
        return find_method(self.method)

    @t.validate("method")
    def _method_is_known(self, proposal: dict[str, Any]) -> str:
        return find_method(proposal["value"]).id

    @t.validate(*WIDTHS)
    def _bits_are_the_methods(self, proposal: dict[str, Any]) -> int:
        side: Role = "keys" if proposal["trait"].name == "key_bits" else "values"
        self._method.check(proposal["value"], side, {})
        return int(proposal["value"])

    @t.validate(*RANGES)
    def _number_is_in_range(self, proposal: dict[str, Any]) -> int:
        return inside(proposal, RANGES[proposal["trait"].name])

    @t.default("memory_gb")
    def _memory_here(self) -> float:
        return min(8.0, device().memory_bytes // (GIGABYTE // 10) / 10)

    @t.validate("memory_gb")
    def _there_is_memory(self, proposal: dict[str, Any]) -> float:
        number: float = ARGUMENTS["memory_gb"]("memory_gb", proposal["value"])
        return number

    def _settings_changed(self, change: dict[str, Any]) -> None:
        if change["name"] == "method":
            for slider in self._widths:
                offer(slider, self._method.bits)
        # codecs make tables, and those belong to the thread that made them
        self._submit("layouts", self._planned_anew, on_done=self._take)

    def _planned_anew(self, progress: Progress) -> tuple[CacheLayout, ...]:
        progress(0, 1, "planning")
        return self._lay_out()

    def _lay_out(self) -> tuple[CacheLayout, ...]:
        return cache_layouts(
            self.shape,
            self.method,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            sinks=self.sinks,
            window=self.window,
        )

    def _planned(self, layouts: tuple[CacheLayout, ...]) -> pl.DataFrame:
        return planned(layouts, [self.context], self.batch)

    def _largest(self, layouts: tuple[CacheLayout, ...]) -> pl.DataFrame:
        return largest(layouts, self.memory_gb * GIGABYTE, self.batch)

    def _take(self, layouts: tuple[CacheLayout, ...]) -> None:
        self._layouts = layouts
        self.say("")
        self._tell_code()
        self._draw()

    def _draw(self) -> None:
        with self._drawing:  # knobs and the worker come on threads of their own
            self.chart.show(self._drawn())

    def _drawn(self) -> alt.VConcatChart:
        layouts = self._layouts  # both halves of one chart: the worker may put others here meanwhile
        return memory_plan(self._planned(layouts), self._largest(layouts))

    def _tell_code(self) -> None:
        self._code.value = (
            f'<code>cache = vl.make_cache(model, "{html.escape(self.method)}", key_bits={self.key_bits}, '
            f"value_bits={self.value_bits}, sinks={self.sinks}, window={self.window})</code>"
        )
