"""Two texts from one prompt, as they come: the exact cache's and a compressed one's."""

from __future__ import annotations

from typing import Any

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.checks import WORDS, checked, whole
from veloxlab.codecs import Role, find_method
from veloxlab.errors import InputError
from veloxlab.measure.generation import GENERATION, first_parting, side_by_side
from veloxlab.views import held_while_generating, strip_caption, token_strip
from veloxlab.views.generation import lines_for
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.panel import Panel, ProgressBar, inside, offer
from veloxlab.widgets.traits import Whole, Words
from veloxlab.widgets.worker import Progress, Worker

PROMPT = "Tell me about the history of the city of Paris."
WIDTHS = ("key_bits", "value_bits")
RANGES = {"tokens": (1, 512), "sinks": (0, 64), "window": (0, 256)}


class SideBySide(Panel):
    """Continue a prompt with the exact cache and with a compressed one, and see token by token where they part.

    Greedy, so that a run repeats. *Generate* starts it, the text comes as it is made, and *Cancel* ends it.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    calibration : what `veloxlab.calibrate` gave; else a method that has to be fitted is fitted when it first runs.
    fitting, worker : of the laboratory that it is a page of; the first stands in for the calibration.
    knobs : first values of the traits, such as ``prompt="…"`` or ``method="rabitq"``; ``bits=2`` is of both sides.

    Attributes
    ----------
    prompt : trait: a user's message, or a text to continue where the tokenizer has no template.
    method, key_bits, value_bits, sinks, window : traits, as for `veloxlab.make_cache`.
    tokens : trait: to generate at most.
    generated : rows of `veloxlab.measure.generation.GENERATION`, of the newest run so far.
    charts : by name ``texts`` and ``held``, once something was generated.

    Raises
    ------
    InputError : an unknown method or knob, a number that cannot be.
    """

    prompt = Words(PROMPT, help="what is continued")
    method = Words("turboquant", help="a method's id")
    key_bits = Whole(3, help="code bits of keys")
    value_bits = Whole(3, help="code bits of values")
    tokens = Whole(64, help="tokens to generate at most")
    sinks = Whole(4, help="tokens at the start kept exact")
    window = Whole(16, help="newest tokens kept exact")

    @checked(prompt=WORDS, **{name: whole(*ends) for name, ends in RANGES.items()})
    def __init__(
        self,
        model: Module,
        tokenizer: Any,  # noqa: ANN401
        *,
        calibration: Calibration | None = None,
        fitting: Fitting | None = None,
        worker: Worker | None = None,
        **knobs: Any,
    ) -> None:
        known = ("prompt", "method", "bits", *WIDTHS, *RANGES)
        unknown = sorted(set(knobs) - {*known})
        if unknown:
            raise InputError(f"SideBySide has no knob {unknown[0]!r}. Its knobs are: {', '.join(known)}.")
        if "bits" in knobs:
            knobs = dict.fromkeys(WIDTHS, knobs["bits"]) | {name: knobs[name] for name in knobs if name != "bits"}
        self._model, self._tokenizer = model, tokenizer
        self._fitting = fitting or Fitting(model, tokenizer, calibration)
        self.generated = pl.DataFrame(schema=GENERATION)
        self.charts: dict[str, ChartView] = {}
        super().__init__("side-by-side", worker, **knobs)
        self._slot = ipywidgets.VBox()
        self.children = [self._controls(), self._message, self._slot]
        self.observe(lambda _: self._offer(), "method")

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the compressed cache is, in a few words."""
        widths = f"{self.key_bits}" if self.key_bits == self.value_bits else f"K{self.key_bits} V{self.value_bits}"
        return f"{self.method} at {widths} bits"

    @property
    def parting(self) -> int | None:
        """The first position at which the texts differ."""
        return first_parting(self.generated)

    def run(self) -> None:
        """Generate with the present settings; an older run is ended."""
        prompt, method, tokens, name = self.prompt, self.method, self.tokens, self.name
        settings: dict[str, Any] = {
            "tokens": tokens,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "sinks": self.sinks,
            "window": self.window,
        }

        def job(progress: Progress) -> None:
            def show(rows: pl.DataFrame) -> None:
                progress.check()
                self._show(rows, tokens, name)

            calibration = self._fitting.calibration(method, {settings["key_bits"], settings["value_bits"]}, progress)
            given: dict[str, Any] = {"on_token": show, "progress": progress, "calibration": calibration, **settings}
            side_by_side(self._model, self._tokenizer, prompt, method, **given)

        self.say("")
        self._submit("generation", job)

    def cancel(self) -> None:
        """End the run; what was generated stays."""
        self.worker.cancel()

    # how it looks where no kernel runs ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        said = strip_caption(self.generated, self._framed) if len(self.generated) else "nothing is generated yet."
        return f"SideBySide({self.name}: {said})"

    @property
    def named(self) -> dict[str, ChartView]:
        """The charts, once something was generated."""
        return self.charts

    # building -------------------------------------------------------------------------------------------------------

    def _controls(self) -> ipywidgets.Widget:
        prompt = ipywidgets.Textarea(
            value=self.prompt, description="prompt", rows=3, layout={"width": "640px"}, continuous_update=False
        )
        self._knob("prompt", prompt)
        method = self._choice("method", self._fitting.methods, tip="How vectors are coded")
        widths, tip = self._fitting.widths(self.method), "Code bits of each coordinate"
        self._widths = [
            self._steps(trait, widths, words, tip) for trait, words in zip(WIDTHS, ("K bits", "V bits"), strict=True)
        ]
        numbers = [self._number(name, ends) for name, ends in RANGES.items()]
        generate = ipywidgets.Button(description="Generate", tooltip="Continue the prompt with both caches")
        generate.on_click(lambda _: self.run())
        rows = [[method, *self._widths], numbers, [generate, ProgressBar(self.worker)]]
        return ipywidgets.VBox([prompt, *(ipywidgets.HBox(row) for row in rows)])

    # turning the knobs ----------------------------------------------------------------------------------------------

    def _offer(self) -> None:
        for slider in self._widths:
            offer(slider, self._fitting.widths(self.method))

    @property
    def _framed(self) -> int | None:
        """Where the texts part, once both have a token there."""
        parting = self.parting
        both = parting is not None and self.generated.filter(pl.col("position") == parting).height == 2
        return parting if both else None

    @t.validate("method")
    def _method_is_known(self, proposal: dict[str, Any]) -> str:
        return find_method(proposal["value"]).id

    @t.validate(*WIDTHS)
    def _bits_are_the_methods(self, proposal: dict[str, Any]) -> int:
        side: Role = "keys" if proposal["trait"].name == "key_bits" else "values"
        find_method(self.method).check(proposal["value"], side, {})
        return int(proposal["value"])

    @t.validate(*RANGES)
    def _number_is_in_range(self, proposal: dict[str, Any]) -> int:
        return inside(proposal, RANGES[proposal["trait"].name])

    def _show(self, rows: pl.DataFrame, tokens: int, name: str) -> None:
        self.generated = rows
        said = f"{name}. {strip_caption(rows, self._framed)}"
        charts = {
            "texts": token_strip(rows, parting=self._framed, lines=lines_for(tokens), caption=said),
            "held": held_while_generating(rows, tokens=tokens),
        }
        if self.charts:
            for name, chart in charts.items():
                self.charts[name].show(chart)
        else:
            self.charts = {name: ChartView(chart) for name, chart in charts.items()}
            self._slot.children = [*self.charts.values()]
