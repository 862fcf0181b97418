"""Two texts from one prompt while they are generated: with the exact cache and with a compressed one."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import ipywidgets
import polars as pl
import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.checks import WORDS, checked, whole
from veloxlab.measure.generation import GENERATION, first_parting, prompt_ids, side_by_side
from veloxlab.views import held_while_generating, strip_caption, token_strip
from veloxlab.views.generation import lines_for
from veloxlab.views.marks import bits_said
from veloxlab.widgets.chosen import Checked, OfCache
from veloxlab.widgets.layout import broad, button, columns, controls
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.selection import CACHE, Choice, Fitting, Selection, pair_said
from veloxlab.widgets.worker import Progress, Worker

PROMPT = "Tell me about the history of the city of Paris."
USUAL = Choice(key_bits=3, value_bits=3, window=16)
LATE = 2.0  # seconds after a press of Generate in which a page may still send an earlier choice


class SideBySide(OfCache, Panel):
    """Continue a prompt with the exact cache and with a compressed one, and see token by token where they differ.

    Generation is greedy, so that a run repeats. *Generate* starts it, each token appears at once, and *Cancel* ends it.

    ``model``, ``tokenizer``: as `veloxlab.load` returns them. ``calibration``: from `veloxlab.calibrate`; without it a
    method that has to be fitted is fitted at its first run. ``settings``: first values of the traits, such as
    ``prompt="…"`` or ``method="rabitq"``; ``bits`` sets both key and value bits. Raises `InputError` for an unknown
    method or setting, or a number out of range.

    The traits are ``prompt``, a user's message, or a text to continue if the tokenizer has no chat template;
    ``tokens``, the most to generate; and ``method``, ``key_bits``, ``value_bits``, ``sinks`` and ``window``, as for
    `veloxlab.make_cache`. ``generated`` has the rows of the newest run: `veloxlab.measure.generation.GENERATION`.
    ``charts``: each a `ChartView`, by name: ``texts`` and ``held``, after the first token.
    """

    NAME = "side-by-side"
    HELP = "15_side_by_side_generation.ipynb#The numbers"
    WHY: ClassVar[dict[str, str]] = {
        "texts": "Whether the answer changes, and where. Click a token.",
        "held": "How many bytes each cache holds at each token.",
    }
    SETTINGS = ("prompt", "tokens", "bits", *CACHE)
    _pressed = -LATE
    parting = property(lambda page: first_parting(page.generated), doc="The first position at which the texts differ.")

    prompt = Checked(WORDS, PROMPT, help="the message to answer, or the text to continue")
    tokens = Checked(whole(1, 512), 64, help="the most tokens that each cache generates")

    @checked(prompt=WORDS, tokens=whole(1, 512))
    def __init__(
        self,
        model: Module,
        tokenizer: Any,  # noqa: ANN401
        *,
        calibration: Calibration | None = None,
        selection: Selection | None = None,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        bits = dict.fromkeys(("key_bits", "value_bits"), settings.pop("bits")) if "bits" in settings else {}
        chosen = bits | {name: settings.pop(name) for name in CACHE if name in settings}
        self._model, self._tokenizer = model, tokenizer
        self._prompt_ids: list[int] = []
        self.generated, self._outcome = pl.DataFrame(schema=GENERATION), "nothing is generated yet."
        selection = selection or Selection(Fitting(model, tokenizer, calibration), USUAL, **chosen)
        super().__init__(selection, worker, **settings)
        self._slot = columns()
        self._laid_out([self._controls()], self._slot)
        self.follow()
        self.say("Press Generate: the answers with the exact and with the compressed cache then appear side by side.")

    @property
    def name(self) -> str:
        """A short name of the compressed cache."""
        key, value = self.key_bits, self.value_bits
        return f"{self.method} at {bits_said(key) if key == value else f'{pair_said((key, value))} bits'}"

    def run(self) -> None:
        """Generate with the present settings; this ends an older run."""
        prompt, tokens, name, choice = self.prompt, self.tokens, self.name, self.selection.choice
        settings: dict[str, Any] = {each: getattr(choice, each) for each in CACHE if each != "method"} | choice.options
        self.selection.fitting.held.clear()

        def job(progress: Progress) -> None:
            def show(rows: pl.DataFrame) -> None:
                progress.check()
                self._show(rows, tokens, name)

            self._prompt_ids = prompt_ids(self._tokenizer, prompt)
            bits = {choice.key_bits, choice.value_bits}
            calibration = self.selection.fitting.calibration(choice.method, bits, progress, choice.seed)
            given: dict[str, Any] = {"tokens": tokens, "calibration": calibration, **settings}
            rows = side_by_side(
                self._model, self._tokenizer, prompt, choice.method, on_token=show, progress=progress, **given
            )
            self.say(choice.in_codes(len(self._prompt_ids) + rows.filter(side="compressed").height))

        self.say("")
        self._submit("generation", job, first=True)

    def _press(self) -> None:
        self._pressed = time.monotonic()
        self.run()

    @t.observe("prompt", "tokens")
    def _redraw(self, _: object = None) -> None:
        """Start again if Generate was pressed a moment ago and still runs.

        A page delays a second change of a control until the kernel answers the first, but never a press of a button.
        """
        super()._redraw()
        if time.monotonic() - self._pressed < LATE and not self.wait(0):
            self.run()

    @property
    def _text(self) -> tuple[int, ...]:
        """Token ids of the prompt and of the text that the compressed cache generated."""
        return (*self._prompt_ids, *self.generated.filter(side="compressed")["token"])

    @property
    def _token(self) -> int | None:
        choice = self.selection.choice
        ours = choice.ids and choice.token is not None and choice.ids == self._text[: len(choice.ids)]
        return choice.token - len(self._prompt_ids) if ours else None  # type: ignore[operator]

    def _pick_token(self, place: int | None) -> None:
        if place is not None:
            self.selection.choose(token=len(self._prompt_ids) + place, ids=self._text)
            self.say(f"Token {place + 1} is picked: the page Tokens shows its causes.")

    def cancel(self) -> None:
        """End the run; the generated text stays."""
        self.worker.cancel()

    @property
    def summary(self) -> str:
        return f"{self.name}: {self._outcome}"

    def _controls(self) -> ipywidgets.Widget:
        large: dict[str, Any] = {"rows": 2, "continuous_update": False}
        *coded, sinks, window = self._of_cache()
        generate = button("Generate", "Continue the prompt with both caches", self._press)
        return controls(
            broad(self._control(ipywidgets.Textarea, "prompt", **large)),
            coded,
            self._slider("tokens", 1, 512),
            sinks,
            window,
            generate,
            self._all_codes(),
        )

    def _show(self, rows: pl.DataFrame, tokens: int, name: str) -> None:
        self.generated, parting = rows, first_parting(rows)
        both = parting is not None and rows.filter(position=parting).height == 2
        framed = parting if both else None  # only if both texts have a token there
        self._outcome = strip_caption(rows, framed)
        charts = {
            "texts": token_strip(rows, parting=framed, lines=lines_for(tokens), caption=f"{name}. {self._outcome}"),
            "held": held_while_generating(rows, tokens=tokens),
        }
        self._put(charts, self._slot)
