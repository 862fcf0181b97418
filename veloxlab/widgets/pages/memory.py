"""The memory planner: whether a model's cache fits, for any context, batch and method, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from math import log2
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.checks import WORDS, maybe, real, whole
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure.advise import KEPT, weights_bytes
from veloxlab.measure.known import EXACT, UNKNOWN, Loss, expected_loss
from veloxlab.measure.planned_memory import CONTEXT, MOST_TOKENS, CacheLayout, cache_layouts, largest, planned
from veloxlab.models.shapes import MODEL_OR_CONFIG, SIZES, ModelOrConfig, ModelShape, shape_of
from veloxlab.runtime import device
from veloxlab.views import memory_plan, plan_caption
from veloxlab.views.memory import amount
from veloxlab.views.picture import html_table
from veloxlab.widgets.chosen import Checked, OfCache
from veloxlab.widgets.layout import CodeLines, button, controls
from veloxlab.widgets.pages.charts import Chart, ChartPage, Look
from veloxlab.widgets.runs import Runs
from veloxlab.widgets.selection import CACHE, Choice, Fitting, Selection
from veloxlab.widgets.worker import Worker

TYPED_IN = "typed in"
TITLES = ["cache", "bytes held", "most tokens", "nats a token", "other first choice", "", "source"]
GIGABYTE = 1e9
HERE = "this model"
TYPED = {"layers": "layers", "kv_heads": "KV heads", "head_dim": "head dim"}
TYPED |= {"sliding_window": "sliding", "full_every": "full every"}
OWN = ("context", "batch", "memory_gb", "model", *TYPED)


class Count(Checked):
    """A whole number between two ends."""

    def __init__(self, least: int, most: int, default: int, words: str) -> None:
        super().__init__(whole(least, most), default, help=words)
        self.ends = {"min": least, "max": most}


def _layouts(page: Any, _: object, method: str, *numbers: Any) -> tuple[CacheLayout | int, ...]:  # noqa: ANN401
    """Runs on the worker: codecs build tables as MLX arrays, which belong to the thread that created them."""
    settings: dict[str, Any] = dict(zip(CACHE[1:], numbers, strict=False))
    own, model, *typed = numbers[len(settings) :]
    shape = page._shape(model, typed)
    ours, *others = cache_layouts(shape, method, layer_bits=dict(own), **settings)
    name = Choice(method, own_bits=dict(own), **settings).name
    return (replace(ours, name=name), *others, shape.trained_tokens)


CHART = Chart(
    "memory_plan",
    (*CACHE, "own_bits", *OWN),
    lambda found, look: (
        planned(found[0][:-1], [look.context], look.batch),
        largest(found[0][:-1], look.memory_gb * GIGABYTE, look.batch),
        found[0][-1],
    ),
    lambda plan, _: memory_plan(*plan[:2], trained=plan[2]),
    asks=lambda look: [("layouts", *(getattr(look, name) for name in (*CACHE, "own_bits", "model", *TYPED)))],
    why="Whether this context fits, and the longest context that does.",
    badge="predicted",
)


def _of_chart(place: int, doc: str) -> Any:  # noqa: ANN401 - a property
    return property(lambda page: page._of_drawn(page.shown, "memory_plan")[place], doc=doc)


class MemoryPlanner(OfCache, ChartPage):
    """See how much memory a context needs, and the longest context that fits, as the layout of the codes predicts.

    ``model_or_config``: as for `veloxlab.models.shapes.shape_of`: a model, a ``config.json`` or its folder, the id of a
    cached repository. Without it, the page has boxes for layers, KV heads and head dimensions. ``settings``: first
    values of the traits, such as ``method="rabitq"`` or ``memory_gb=24``. ``runs``: measured on this model; the page
    shows their losses, and for other caches the losses predicted from the demo model. Raises `InputError` if the model
    is not on this machine, for an unknown method, or for bits or another number out of range.

    The traits are ``context`` (tokens of each sequence), ``batch`` (sequences) and ``memory_gb`` (memory for the cache,
    10^9 bytes); ``method``, ``key_bits``, ``value_bits``, ``sinks`` and ``window``, as for `veloxlab.make_cache`; and
    if ``model`` is ``"typed in"``: ``layers``, ``kv_heads``, ``head_dim``, ``sliding_window`` and ``full_every``, the
    last two as for `veloxlab.ModelShape.typed`, with 0 for none. Other values of ``model`` are ``"this model"``, if one
    was given, a usual size, or text as for ``model_or_config``. ``machine_gb`` and ``weight_bits`` are for
    `leave_room`. ``chart`` is the `ChartView`.
    """

    NAME = "planner"
    HELP = "13_memory_planner.ipynb#Is the prediction correct?"
    SETTINGS = (*CACHE, *OWN, "weight_bits", "machine_gb")
    MEASURES = {"layouts": _layouts}  # noqa: RUF012

    model = Checked(WORDS, help="which model: this one, a usual size, typed in, or a folder, config.json or cached id")
    weight_bits = Checked(whole(1, 32), 4, help="bits of a weight, usually 4, 8 or 16; known for a loaded model")
    machine_gb = Checked(real(above=0), help="memory of the whole machine, 10^9 bytes; the system keeps a quarter")
    context = Checked(CONTEXT, 32_768, help="tokens of each sequence, its prompt and the generated text; 32k is 32,768")
    batch = Count(1, 100_000, 1, "sequences that are held at once")
    memory_gb = Checked(
        real(above=0), help="memory for the cache alone, 10^9 bytes; at first 8, or all memory of a smaller machine"
    )
    layers = Count(1, 1000, 32, "layers that keep keys and values")
    kv_heads = Count(1, 1000, 8, "KV heads of a layer")
    head_dim = Count(1, 10_000, 128, "numbers of a key or value of one head")
    sliding_window = Count(0, MOST_TOKENS, 0, "tokens that a sliding layer sees; 0: no layer slides")
    full_every = Count(0, 1000, 0, "each n-th layer sees all tokens; 0: no layer does")
    plan = _of_chart(0, "Bytes by part at this context: `veloxlab.measure.planned_memory.PLANNED`.")
    largest = _of_chart(1, "The largest contexts that fit: `veloxlab.measure.planned_memory.LARGEST`.")
    chart = property(lambda page: page._of_drawn(page.charts, "memory_plan"), doc="The chart of the plan.")

    def __init__(
        self,
        model_or_config: ModelOrConfig | None = None,
        *,
        selection: Selection | None = None,
        worker: Worker | None = None,
        runs: Runs | None = None,
        **settings: Any,
    ) -> None:
        chosen = {name: settings.pop(name) for name in CACHE if name in settings}
        selection = selection or Selection(Fitting(), methods=list(METHODS), **chosen)
        given = maybe(MODEL_OR_CONFIG)("model_or_config", model_or_config)
        self._given = given
        self._loaded = given if isinstance(given, Module) else None
        super().__init__(selection, worker, **{"model": TYPED_IN if given is None else HERE} | settings)
        self._draw([CHART])
        self._code, self._losses, self._runs = CodeLines(), ipywidgets.HTML(), runs or Runs()
        self._laid_out([self._controls()], self._grid, self._losses, self._code)
        self._watch(self._runs, "every", self._tell_losses)
        self.follow()

    @property
    def shape(self) -> ModelShape:
        """The shape of the chosen model: the given one, a named one, or the numbers that are typed in."""
        return self._shape(self.model, [getattr(self, name) for name in TYPED])

    @property
    def summary(self) -> str:
        if not self.charts:
            return "no plan yet"
        name = self._shape_given.name if self._given is not None and self.model == HERE else self.model
        return f"{name}: {plan_caption(self.plan, self.largest)}"

    def loss(self, cache: str) -> Loss:
        """The loss of a cache of the chart: measured on this model in ``runs``, or predicted from the demo model."""
        if cache == "fp16":
            return EXACT
        if cache.startswith("mlx-lm"):
            name, bits, _ = cache.split()
            return expected_loss(name, float(bits), float(bits))
        choice = self._planned
        for run in reversed(self._runs.every if self.model == HERE else ()):
            if run.choice.cache == choice.cache:
                lost, flips = run.kl.mean, run.row["top1_flips"].item()
                return Loss((lost, lost), (flips, flips), "measured", f"this model: {run.text}")
        return UNKNOWN if choice.own_bits else expected_loss(choice.method, choice.key_bits, choice.value_bits)

    def leave_room(self) -> None:
        """Set the memory for the cache: three quarters of the machine's memory, less the bytes of the weights."""
        if not self.charts:
            self.say("There is no plan yet: wait for its chart, and press the button again.")
            return
        shape, total = self.shape, self.machine_gb
        given = self._loaded if self.model == HERE and self._loaded is not None else shape
        try:
            weights = weights_bytes(given, shape.parameters, self.weight_bits) / GIGABYTE
        except InputError:
            self.say(
                f"The weights of a model that is {self.model} are not known: set the memory for the cache yourself."
            )
            return
        left = total * (1 - KEPT) - weights
        said = f"{total:g} GB: {total * KEPT:.3g} for the system, {weights:.3g} for the weights, "
        if left > 0:
            self.memory_gb = round(left, 3)
        self.say(said + (f"{left:.3g} for the cache." if left > 0 else "none for the cache: use fewer weight bits."))

    @property
    def _planned(self) -> Choice:
        """The planned cache: with the bits of single layers only if the plan is for the model that has these layers."""
        choice = self.selection.choice
        return choice if self.model == HERE else replace(choice, own_bits={})

    @property
    def notes(self) -> list[str]:
        left_out = self._planned.name if self._planned.own_bits != self.selection.choice.own_bits else ""
        said = f"Bits of single layers belong to the loaded model only: the plan is for {left_out}."
        return [*super().notes, said if left_out else ""]

    def _look(self, **changed: Any) -> Look:
        own = tuple(sorted(self._planned.own_bits.items()))
        return super()._look(**{"own_bits": own} | changed)

    @cached_property
    def _shape_given(self) -> ModelShape:
        """The shape of the given model. This may run the model, so the worker asks for it first."""
        assert self._given is not None
        return shape_of(self._given)

    def _shape(self, model: str, typed: Sequence[int]) -> ModelShape:
        if model == HERE and self._given is not None:
            return self._shape_given
        if model != TYPED_IN:
            return shape_of(model)
        sizes: dict[str, Any] = dict(zip(TYPED, typed, strict=True))
        optional = {name: sizes[name] or None for name in ("sliding_window", "full_every")}
        return ModelShape.typed(**sizes | optional)

    def _show(self) -> None:
        super()._show()
        self._tell_losses()

    def _tell_losses(self, _: object = None) -> None:
        (self._losses.remove_class if self._complete else self._losses.add_class)("veloxlab-stale")
        if self._complete:
            self._losses.value = losses_table(self.plan, self.largest, self.loss)

    def _redraw(self) -> None:
        super()._redraw()
        self._code.value = "\n".join(self._planned.lines())
        self._typed.layout.display = "" if self.model == TYPED_IN else "none"

    def _controls(self) -> ipywidgets.Widget:
        context = ipywidgets.FloatLogSlider(
            self.context, base=2, min=0, max=log2(MOST_TOKENS), step=0.25, description="context", readout_format=",.0f"
        )
        context.tooltip = f"Tokens of each sequence (1 to {MOST_TOKENS:,})"
        t.link((self, "context"), (context, "value"), transform=(float, round))

        def box(trait: str, words: str) -> ipywidgets.Widget:
            ends = self.traits()[trait].ends  # type: ignore[attr-defined]  # it is a `Count`
            return self._control(ipywidgets.BoundedIntText, trait, words, **ends)

        wide: dict[str, Any] = {"min": 1e-3, "max": 1e5, "step": 1, "style": {"description_width": "initial"}}
        memory = self._control(ipywidgets.BoundedFloatText, "memory_gb", "memory (GB)", **wide)
        self._typed = controls(box(name, words) for name, words in TYPED.items())
        self._typed.add_class("veloxlab-broad")
        names = [*([HERE] if self._given is not None else []), *SIZES, TYPED_IN]
        models = self._control(ipywidgets.Combobox, "model", options=names, continuous_update=False)
        models.placeholder = "a folder, a config.json, an id"
        tip = "Set the memory to what the system and the weights do not use"
        room = button("Leave room for weights", tip, self.leave_room)
        return controls(
            models,
            context,
            box("batch", "batch"),
            memory,
            self._of_cache(256, 1024),
            self._control(ipywidgets.BoundedFloatText, "machine_gb", "RAM (GB)", min=1e-3, max=1e5, step=1),
            self._control(ipywidgets.BoundedIntText, "weight_bits", "weight bits", min=1, max=32),
            room,
            self._typed,
        )

    @t.default("machine_gb")
    def _machine_here(self) -> float:
        return round(device().memory_bytes / GIGABYTE, 1)

    @t.default("memory_gb")
    def _memory_here(self) -> float:
        return min(8.0, device().memory_bytes // (GIGABYTE // 10) / 10)


def losses_table(plan: pl.DataFrame, largest: pl.DataFrame, loss: Callable[[str], Loss]) -> str:
    """HTML: a row for each cache of `veloxlab.measure.planned_memory.LARGEST`, with bytes from the `PLANNED` rows."""
    held = dict(plan.group_by("cache").agg(pl.col("bytes").sum()).iter_rows())
    rows = []
    for row in largest.to_dicts():
        lost = loss(row["cache"])
        said = _range(lost.kl, "{:.2g}"), _range(lost.flips, "{:.0%}")
        rows.append(
            (
                row["cache"],
                amount(held[row["cache"]]).replace(" ", "\u00a0"),
                f"{row['tokens']:,}",
                *said,
                lost.kind,
                lost.source,
            )
        )
    return html_table(TITLES, rows, cell="padding: 1px 14px 1px 0")


def _range(ends: tuple[float | None, float | None], form: str) -> str:
    least, most = ends
    if most is None:
        return "?"
    if least is None:
        return f"less than {form.format(most)}"
    return form.format(most) if least == most else f"{form.format(least)} to {form.format(most)}"
