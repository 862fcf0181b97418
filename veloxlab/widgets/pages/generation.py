"""Two texts from one prompt, as they come: the exact cache's and a compressed one's."""

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
LATE = 2.0  # seconds in which a page may send, behind a press of Generate, what was chosen before it


class SideBySide(OfCache, Panel):
    """Continue a prompt with the exact cache and with a compressed one, and see token by token where they part.

    Greedy, so that a run repeats. *Generate* starts it, the text comes as it is made, and *Cancel* ends it.

    ``model``, ``tokenizer``: as `veloxlab.load` gives them. ``calibration``: what `veloxlab.calibrate` gave; else a
    method that has to be fitted is fitted when it first runs. ``settings``: first values of the traits, such as
    ``prompt="…"`` or ``method="rabitq"``; ``bits`` is of both. Raises `InputError` for an unknown method or setting, or
    a number that cannot be.

    The traits are ``prompt``, a user's message, or a text to continue where the tokenizer has no template; ``tokens``
    to generate at most; and ``method``, ``key_bits``, ``value_bits``, ``sinks`` and ``window``, as for
    `veloxlab.make_cache`. ``generated`` has rows of `veloxlab.measure.generation.GENERATION`, of the newest run so far.
    ``charts``: each a `ChartView`, by name: ``texts`` and ``held``, once something was generated.
    """

    NAME = "side-by-side"
    HELP = "15_side_by_side_generation.ipynb#The numbers"
    WHY: ClassVar[dict[str, str]] = {
        "texts": "Whether the answer changes, and where. Click a token.",
        "held": "What each cache holds meanwhile.",
    }
    SETTINGS = ("prompt", "tokens", "bits", *CACHE)
    _pressed = -LATE
    parting = property(lambda page: first_parting(page.generated), doc="The first position at which the texts differ.")

    prompt = Checked(WORDS, PROMPT, help="the message that is answered, or the text that is continued")
    tokens = Checked(whole(1, 512), 64, help="tokens that each side generates at most")

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

    @property
    def name(self) -> str:
        """What the compressed cache is, in a few words."""
        key, value = self.key_bits, self.value_bits
        return f"{self.method} at {bits_said(key) if key == value else f'{pair_said((key, value))} bits'}"

    def run(self) -> None:
        """Generate with the present settings; an older run is ended."""
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
        """Begin anew if Generate was pressed a moment ago and still runs.

        A page holds a second change of a control back until the first one is answered, and a press of a button never.
        """
        super()._redraw()
        if time.monotonic() - self._pressed < LATE and not self.wait(0):
            self.run()

    @property
    def _text(self) -> tuple[int, ...]:
        """Ids of the prompt and of what the compressed cache made of it."""
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
        """End the run; what was generated stays."""
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
        framed = parting if both else None  # once both texts have a token there
        self._outcome = strip_caption(rows, framed)
        charts = {
            "texts": token_strip(rows, parting=framed, lines=lines_for(tokens), caption=f"{name}. {self._outcome}"),
            "held": held_while_generating(rows, tokens=tokens),
        }
        self._put(charts, self._slot)
