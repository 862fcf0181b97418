"""The page of advice: a ranked list of caches for given constraints, and three checks of the picked cache."""

from __future__ import annotations

import html
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.cache.plan import DEFAULT_SINKS, DEFAULT_WINDOW
from veloxlab.checks import WORDS, number_of_bits
from veloxlab.errors import InputError
from veloxlab.measure.advice import ADVICE, GOALS, Advice, fitted
from veloxlab.measure.advise import advise, to_measure
from veloxlab.measure.narrow import Narrow
from veloxlab.measure.quality import Reference, reference
from veloxlab.models.shapes import taken_as
from veloxlab.views.picture import Section
from veloxlab.widgets.chosen import Checked
from veloxlab.widgets.layout import CodeLines, broad, controls, wide
from veloxlab.widgets.pages.advice_acts import Act
from veloxlab.widgets.pages.advice_asked import ASKED, Constraints
from veloxlab.widgets.pages.advice_runs import NARROWEST, answered, narrowed
from veloxlab.widgets.pages.advice_words import ALL_CODES, ROWS, advice_table, narrow_lines, narrow_said
from veloxlab.widgets.pages.experiment import Experiment
from veloxlab.widgets.pages.generation import PROMPT
from veloxlab.widgets.pages.memory import HERE
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.selection import Bits, Choice, Selection
from veloxlab.widgets.worker import Progress, Worker

DEPENDS = {"advice": ASKED, "narrow": ("model", "goal", "picked"), "answer": ("model", "prompt", "picked", "all_codes")}
MOST = 3  # caches that *Measure* measures


class Advisor(Constraints, Panel):
    """Set your constraints and your goal, and see which cache to use, and why.

    Bytes are those of the layout of codes. The loss of a cache is predicted from the committed results of SmolLM2-135M,
    and marked so, until it is measured on the loaded model. The page answers three questions about the picked cache:
    how it compares, which layers may go to 2 bits, and whether an answer changes.

    The traits are ``model`` (``"this model"``, one of `SIZES`, or a path or id as for `veloxlab.advise`), ``context``
    (tokens of each sequence), ``batch`` (sequences), ``memory_gb`` (of the machine, 10^9 bytes), ``weight_bits``,
    ``goal`` (a name in `veloxlab.measure.advice.GOALS`), ``prompt``, and ``picked``, the name of a cache in
    ``advice.frame``. ``advice`` is the newest result of `veloxlab.advise`, ``narrow`` that of `narrow_layers`.
    """

    NAME = "advisor"
    HELP = "13_memory_planner.ipynb#Which cache is best for my memory?"
    SETTINGS = (*ASKED, "prompt", "all_codes")

    prompt = Checked(
        WORDS, PROMPT, help="a message, or a whole chat as text; a longer text has a larger share in codes"
    )
    all_codes = t.Bool(False, help="answer with every token except the sinks in codes: no window stays exact")
    picked = t.Unicode("", help="the cache of the table that the buttons act on")

    def __init__(
        self,
        experiment: Experiment,
        *,
        selection: Selection | None = None,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(selection or experiment.selection, worker, **settings)
        self.experiment = experiment
        self.advice: Advice | None = None
        self.narrow: Narrow | None = None
        self._with_layers = dict[str, Choice]()  # by the names of caches: the choice with layers of fewer bits
        self._exact: Reference | None = None
        self._measured = pl.DataFrame(schema=ADVICE)  # rows measured on this model
        self._verdict, self._table, self._code = ipywidgets.HTML(), ipywidgets.HTML(), CodeLines()
        self._narrowed, self._answered = ipywidgets.HTML(), ipywidgets.HTML()
        self._said = {"advice": [self._verdict, self._table], "narrow": [self._narrowed], "answer": [self._answered]}
        self._of = dict[str, list[Any]]()  # by part: the settings of the shown result, values of DEPENDS
        self._caches = wide(ipywidgets.Dropdown(description="cache", tooltip=self.traits()["picked"].help.capitalize()))
        below = self._verdict, self._acts(), self._narrowed, self._answered, self._table, self._code
        self._laid_out([self._constraints()], *below)
        self.observe(lambda _: self._compare_with_chosen(), list({"picked", *self.SETTINGS}))
        self.observe(lambda _: self._ask(), list(ASKED))
        self.observe(lambda _: self._tell(), "picked")
        self._caches.observe(lambda change: self.set_trait("picked", change["new"] or ""), "value")
        self.follow()
        self._compare_with_chosen()
        self._ask()

    @property
    def row(self) -> dict[str, Any]:
        """The picked row of ``advice.frame``; raises `InputError` if there is no advice yet."""
        if self.advice is None:
            raise InputError("There is no advice yet: wait for it with wait().")
        return self.advice.frame.filter(name=self.picked).row(0, named=True)

    @property
    def summary(self) -> str:
        return "no advice yet" if self.advice is None else str(self.advice).split("\n\n")[0].replace("\n", " ")

    def _settle(self, timeout: float | None = None) -> bool:
        return self._is_of_chosen("advice") or (self.wait(timeout) and self._is_of_chosen("advice"))

    @property
    def sections(self) -> list[Section]:
        if self.advice is None:
            return []
        said = [str(self.narrow)] if self._is_of_chosen("narrow") else []
        frame = self.advice.frame.drop("reason").head(ROWS)
        return [Section(words=" ".join([self.row["reason"], *said]), table=frame, code=self._lines())]

    def take(self) -> None:
        """Set the controls of all pages to the picked cache."""
        self._fits_none()
        row = self._coded_row()
        self.selection.choose(**self._parts(row), layer=None)
        self._with_layers.pop(row["name"], None)
        self._tell()
        self.say(f"All pages now show {self.selection.choice.name}, sinks={DEFAULT_SINKS}, window={DEFAULT_WINDOW}.")

    def measure(self) -> None:
        """Start to measure on the loaded model how much the first caches that fit lose."""
        self._check_here()
        self._ask(measure=True)

    def try_narrow(self) -> None:
        """Start to find the layers of the picked cache that may go to 2 bits on the loaded model."""
        self.selection.fitting.held.clear()
        row, goal, asked = self._row_to_run(), self.goal, self._chosen_for("narrow")

        def job(progress: Progress) -> Narrow:
            choice = self.selection.changed(**self._parts(row, window=0))
            return narrowed(self.experiment, self._reference(progress), choice, GOALS[goal], progress)

        def done(found: Narrow) -> None:
            self.narrow, self._narrow_of, self._of["narrow"] = found, row, asked
            self._narrowed.value = narrow_said(row["name"], found, goal)
            measured = row | {"kl_mean": found.before, "top1_flips": found.flips, "kind": "measured"}
            others = self._measured.filter(pl.col("name") != row["name"])
            self._measured = pl.concat([others, pl.DataFrame([measured], schema=ADVICE)])
            self._compare_with_chosen()
            if self.model == HERE:
                self._ask(keep=self.picked)

        self._submit("narrow", job, on_done=done, first=True)

    def take_narrow(self) -> None:
        """Set the controls of all pages to the picked cache, with fewer bits in the layers that may have them."""
        self._check_narrow()
        assert self.narrow is not None
        own: dict[int, Bits] = dict.fromkeys(self.narrow.layers, (NARROWEST, NARROWEST))
        name = self._narrow_of["name"]
        self.selection.choose(**self._parts(self._narrow_of) | {"own_bits": own}, layer=None)
        self._with_layers[name] = self.selection.choice
        self.picked = name
        self._tell()
        self.say(f"All pages now show {self.selection.choice.name}.")

    def compare_answers(self) -> None:
        """Start to find whether the answer to the prompt changes with the picked cache, made as in the code."""
        self.selection.fitting.held.clear()
        row, prompt, asked = self._row_to_run(), self.prompt, self._chosen_for("answer")
        window = 0 if self.all_codes else DEFAULT_WINDOW

        def job(progress: Progress) -> str:
            choice = self.selection.changed(**self._parts(row, window))
            return answered(self.experiment, choice, prompt, progress)

        def done(said: str) -> None:
            self._answered.value = f"<b>{html.escape(row['name'])}</b>: {said}"
            self._of["answer"] = asked
            self._compare_with_chosen()

        self._submit("answer", job, on_done=done, first=True)

    def _check_here(self) -> None:
        if self.model != HERE:
            raise InputError(f"Only the loaded model can be run: choose {HERE!r} as the model.")

    def _check_narrow(self) -> list[str]:
        if self.narrow is None:
            raise InputError("No layers were tried yet: press the button that tries them.")
        if not self.narrow.layers:
            raise InputError(str(self.narrow))
        return []

    def _fits_none(self) -> list[str]:
        row = self._coded_row()
        if not row["fits"]:
            raise InputError(f"{row['name']} does not fit: {row['reason']}")
        return []

    def _fits(self, *more: float) -> list[str]:
        """The method of the picked cache, if it must be fitted before this model can run with it."""
        row, fitting = self._row_to_run(), self.selection.fitting
        ready = all(fitting.is_ready(row["method"], width) for width in (number_of_bits(row["bits"]), *more))
        return [] if ready else [row["method"]]

    def _fits_narrow(self) -> list[str]:
        return self._fits(NARROWEST)

    def _fits_measured(self) -> list[str]:
        self._check_here()
        rows = [] if self.advice is None else to_measure(self.advice.frame.to_dicts(), MOST)
        return [row["method"] for row in rows if fitted(row)]

    def _row_to_run(self) -> dict[str, Any]:
        self._check_here()
        return self._coded_row()

    def _coded_row(self) -> dict[str, Any]:
        row = self.row
        if row["method"] is None:
            raise InputError(f"{row['name']} is not a method of veloxlab: pick another cache.")
        if row["method"] not in self.selection.methods:
            raise InputError(f"{row['method']} cannot be chosen here: it has to be fitted, which needs the model.")
        return row

    def _parts(self, row: dict[str, Any], window: int = DEFAULT_WINDOW) -> dict[str, Any]:
        """Parts of the selection for a cache, the same as in `Advice.code`."""
        bits = number_of_bits(row["bits"])
        exact = {"sinks": DEFAULT_SINKS, "window": window, "own_bits": {}}
        return {"method": row["method"], "key_bits": bits, "value_bits": bits} | exact

    def _reference(self, progress: Progress) -> Reference:
        if self._exact is None:
            given: dict[str, Any] = {"text": self.experiment.text, "tokens": len(self.experiment.capture.tokens)}
            self._exact = reference(self.experiment.model, self.experiment.tokenizer, progress=progress, **given)
        return self._exact

    def _ask(self, *, measure: bool = False, keep: str = "") -> None:
        """Start to compute advice; an older request is dropped."""
        asked, here = self._chosen_for("advice"), self.model == HERE
        settings = self.wanted | {"measured": self._measured if here else None}
        given = self.experiment.model if here else self.model

        def job(progress: Progress) -> Advice:
            if not measure:
                return advise(given, **settings)
            tokens = len(self.experiment.capture.tokens)
            return advise(given, self.experiment.tokenizer, tokens=tokens, most=MOST, progress=progress, **settings)

        def done(advice: Advice) -> None:
            if here:
                self._measured = advice.frame.filter(kind="measured")
            self._of["advice"] = asked
            self._show(advice, keep)

        self._submit("advice", job, on_done=done, first=not measure, kept=self.advice is None)

    def _show(self, advice: Advice, keep: str) -> None:
        by_hand = self.advice is not None and self.picked != self.advice.best["name"]
        self.advice = advice
        names = advice.frame["name"].to_list()
        keep = keep or (self.picked if by_hand else "")
        picked = keep if keep in names else advice.best["name"]
        self._caches.options = names
        self._caches.value = self.picked = picked
        self.say(taken_as(self.model))
        self._tell()

    def _chosen_for(self, part: str) -> list[Any]:
        return [getattr(self, name) for name in DEPENDS[part]]

    def _is_of_chosen(self, part: str) -> bool:
        return self._of.get(part) == self._chosen_for(part)

    def _compare_with_chosen(self) -> None:
        """Fade results of other settings, and update each button: whether it can act on the present settings."""
        for part in self._of:
            for said in self._said[part]:
                (said.remove_class if self._is_of_chosen(part) else said.add_class)("veloxlab-stale")
        for act in self._buttons:
            act.look()

    def _tell(self) -> None:
        """Write the verdict, the table and the code of the picked cache."""
        if self.advice is None or not self.picked:
            return
        advice, row = self.advice, self.row
        said = str(advice).split("\n\n")[0].split("\n")
        lines = "<br>".join(html.escape(line) for line in said)
        reason = "" if row["name"] == advice.best["name"] else f"{row['name']}: {row['reason']}"
        self._verdict.value = f"<div class='veloxlab-verdict'>{lines}<br>{html.escape(reason)}</div>"
        self._table.value = advice_table(advice.frame, self.picked, advice.note)
        self._code.value, self._caches.value = self._lines(), self.picked
        self._compare_with_chosen()

    def _lines(self) -> str:
        assert self.advice is not None
        if self.picked in self._with_layers:
            return narrow_lines(self._with_layers[self.picked])
        return replace(self.advice, frame=self.advice.frame.filter(name=self.picked)).code

    def _acts(self) -> ipywidgets.Widget:
        prompt = self._control(ipywidgets.Textarea, "prompt", "your chat", rows=2, continuous_update=False)
        acts = {
            "Set the controls": ("All pages then show the picked cache", self.take, self._fits_none),
            f"Measure the first {MOST}": (
                f"Run this model with the first {MOST} caches that fit",
                self.measure,
                self._fits_measured,
            ),
            f"Which layers may go to {NARROWEST} bits?": (
                "Try each layer, then many together",
                self.try_narrow,
                self._fits_narrow,
            ),
            "Use these layers": ("Give these layers fewer bits, on all pages", self.take_narrow, self._check_narrow),
            "Does the answer change?": ("Answer the chat with both caches", self.compare_answers, self._fits),
        }
        self._buttons = [Act(words, tip, partial(self._saying, act), fits) for words, (tip, act, fits) in acts.items()]
        *made, answer = (act.button for act in self._buttons)
        return controls(
            self._caches, *made, broad(prompt), answer, self._control(ipywidgets.Checkbox, "all_codes", ALL_CODES)
        )
