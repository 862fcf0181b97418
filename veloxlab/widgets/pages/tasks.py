"""The page of tasks: questions that a model answers with the exact cache and with the chosen one."""

from __future__ import annotations

import html
from functools import partial
from typing import Any, ClassVar

import ipywidgets
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.checks import WORDS, checked, choice, many, whole
from veloxlab.errors import InputError
from veloxlab.measure.generation import SIDES
from veloxlab.measure.quality import maker
from veloxlab.measure.questions import BUILT_IN, EXAMPLE, Task
from veloxlab.measure.tasks import ANSWERS as SINGLE
from veloxlab.measure.tasks import EVALUATION, ask, summary, unread
from veloxlab.views.generation import task_caption, task_scores
from veloxlab.views.picture import Section, html_table
from veloxlab.widgets.chosen import Checked, OfCache
from veloxlab.widgets.layout import button, columns, controls
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.selection import CACHE, Fitting, Selection
from veloxlab.widgets.worker import Progress, Worker

USUAL, MOST = 512, 2**20  # tokens of a context
WHY = (
    "If a model answers as well with the compressed cache, that cache has kept the text. The model reads the text, "
    "then the question. A small model may guess on a task even with the exact cache: such a task shows nothing."
)
FEW = 20  # fewer questions show little
FORMAT = "One question in each line, as JSON; without choices the model writes its answer."
ANSWERS = ["task", "question", "right answer", "exact", "compressed"]
TITLES = ["task", "questions", "guess", "exact", "compressed", "difference", "95 % interval", "in codes"]


class Tasks(OfCache, Panel):
    """Ask questions with the exact cache and with a compressed one, and count the right answers.

    ``model``, ``tokenizer``: as `veloxlab.load` returns them. ``settings``: first values of the traits, such as
    ``questions=64`` or ``method="rabitq"``. Raises `InputError` for an unknown method, task or setting.

    The traits are ``tasks``, names in `veloxlab.measure.questions.BUILT_IN`; ``questions``, the number for each task;
    ``context``, tokens that are read before a question; ``own``, text for `veloxlab.measure.Task.of_lines`: these
    questions replace the built-in tasks, which can be chosen again; and ``method``, ``key_bits``, ``value_bits``,
    ``sinks`` and ``window``, as for `veloxlab.make_cache`. *Ask* starts a run. ``answered`` has the newest results,
    rows of `veloxlab.measure.tasks.EVALUATION`; ``answers`` has one row for each answer, of
    `veloxlab.measure.tasks.ANSWERS`.
    """

    NAME = "tasks"
    HELP = "15_side_by_side_generation.ipynb#Find a number in a long text"
    WHY: ClassVar[dict[str, str]] = {"scores": "Whether answers that need the text are still right."}
    SETTINGS = ("tasks", "questions", "context", "own", *CACHE)

    tasks = Checked(many(choice(*BUILT_IN), empty=True), BUILT_IN, help="the tasks to ask; hold Ctrl to choose several")
    questions = Checked(whole(1, 1000), 16, help="questions of each task; more make a difference more certain")
    context = Checked(whole(1, MOST), USUAL, help="tokens that are read before a question is asked")
    own = Checked(WORDS, "", help="your own questions, one in each line, as JSON; asked in addition to chosen tasks")

    @checked(tasks=many(choice(*BUILT_IN), empty=True), own=WORDS, questions=whole(1, 1000), context=whole(1, MOST))
    def __init__(
        self,
        model: Module,
        tokenizer: Any,  # noqa: ANN401
        *,
        selection: Selection | None = None,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        chosen = {name: settings.pop(name) for name in CACHE if name in settings}
        if "own" in settings:
            settings.setdefault("tasks", ())
        super().__init__(selection or Selection(Fitting(model, tokenizer), **chosen), worker, **settings)
        self._model, self._tokenizer = model, tokenizer
        self.answered, self._of, self.answers = pl.DataFrame(schema=EVALUATION), "", pl.DataFrame(schema=SINGLE)
        self._slot, self._table, self._checked = columns(), ipywidgets.HTML(), ipywidgets.HTML()
        why = ipywidgets.HTML(f"<div>{WHY}</div>")
        self._laid_out([self._controls()], why, self._own_questions(), self._slot, self._table)
        self.follow()

    def run(self) -> None:
        """Ask with the present settings; this ends an older run. Raises `InputError` if there is nothing to ask."""
        choice, asked = self.selection.choice, {"questions": self.questions, "context": self.context}
        tasks = [*self.tasks, *([Task.of_lines(self.own)] if self.own.strip() else [])]
        if not tasks:
            raise InputError("No task is chosen: choose one in the list, or write questions of your own.")
        self.selection.fitting.held.clear()
        self.say("")

        def job(progress: Progress) -> tuple[pl.DataFrame, pl.DataFrame]:
            calibration = self.selection.fitting.calibration(choice.method, choice.widths, progress, choice.seed)
            make = maker(choice.plan(self._model), {"calibration": calibration})
            answers, chances = ask(self._model, self._tokenizer, make, tasks, progress=progress, **asked)
            return summary(answers, chances), answers

        self._submit("questions", job, on_done=lambda found: self._show(found, choice.name), first=True)

    @property
    def summary(self) -> str:
        return f"{self._of}: {task_caption(self.answered)}" if self._of else "nothing was asked yet"

    @property
    def sections(self) -> list[Section]:
        return [*super().sections, Section(self._of, table=self.answered)] if self._of else []

    def _show(self, found: tuple[pl.DataFrame, pl.DataFrame], of: str) -> None:
        answered, answers = found
        self.answered, self.answers, self._of = answered, answers, of
        self._put({"scores": task_scores(answered, caption=f"{of}. {task_caption(answered)}")}, self._slot)
        own = answered.filter(pl.col("task") == "own", pl.col("questions") < FEW)["questions"]
        few = [too_few(count) for count in own]
        self.say(" ".join([*unread(answered), *few]))
        single = f"<details><summary>Single answers</summary>{answers_table(answers)}</details>"
        self._table.value = f"<b>{html.escape(of)}</b>{task_table(answered)}{single}"

    def _controls(self) -> ipywidgets.Widget:
        several: dict[str, Any] = {"options": BUILT_IN, "rows": len(BUILT_IN)}
        return controls(
            self._control(ipywidgets.SelectMultiple, "tasks", **several),
            self._slider("questions", 4, 128),
            self._control(ipywidgets.BoundedIntText, "context", min=1, max=MOST),
            self._of_cache(),
            button("Ask", "Ask with both caches; this takes a minute or two on a CPU", partial(self._saying, self.run)),
            self._all_codes(),
        )

    def _own_questions(self) -> ipywidgets.Widget:
        """A box for the user's own questions, and a button that fills it from a file."""
        box = self._control(ipywidgets.Textarea, "own", "questions", rows=6)
        box.placeholder, box.layout.width = EXAMPLE, "auto"
        tip = "A file with one question in each line, as JSON"
        file = ipywidgets.FileUpload(description="From a file", accept=".jsonl,.json,.txt", tooltip=tip)
        file.observe(self._read, "value")
        self.observe(self._check_own, "own")
        said = ipywidgets.HTML(f"<div>{FORMAT} For example:<br><code>{html.escape(EXAMPLE)}</code></div>")
        parts = ipywidgets.VBox([said, box, self._checked, file])
        return ipywidgets.Accordion([parts], titles=["Questions of your own"], selected_index=None)

    def _check_own(self, change: dict[str, Any]) -> None:
        """Show how many questions the box has, or which line is not a question."""
        if change["new"].strip() and not change["old"].strip():
            self.tasks = ()
        try:
            count = len(Task.of_lines(self.own).questions) if self.own.strip() else 0
            said = "" if count == 0 else too_few(count) if count < FEW else f"{count} questions."
        except InputError as error:
            said = str(error)
        self._checked.value = f"<em>{html.escape(said)}</em>"

    def _read(self, change: dict[str, Any]) -> None:
        for file in change["new"]:
            try:
                self.own = bytes(file["content"]).decode()
            except UnicodeDecodeError:
                self.say(f"{file['name']} is not a text in UTF-8: save it in UTF-8.")


def too_few(count: int) -> str:
    """A sentence: these are too few questions."""
    return f"{count} question{'s are' if count != 1 else ' is'} too few to tell."


def answers_table(frame: pl.DataFrame) -> str:
    """HTML of `veloxlab.measure.tasks.ANSWERS`: a row for each question."""
    sides = [frame.filter(side=side).to_dicts() for side in SIDES]
    rows = [
        (
            one["task"],
            one["question"].strip(),
            *(said.strip() for said in (one["right"], one["answer"], other["answer"])),
        )
        for one, other in zip(*sides, strict=True)
    ]
    return html_table(ANSWERS, rows, cell="padding: 1px 14px 1px 0", left=len(ANSWERS))


def task_table(frame: pl.DataFrame) -> str:
    """HTML of `veloxlab.measure.tasks.EVALUATION`."""

    def share(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.0%}"

    rows = [
        (
            row["task"],
            str(row["questions"]),
            *(share(row[name]) for name in ("chance", "exact", "compressed")),
            share(row["difference"], "+"),
            "" if row["low"] is None else f"{share(row['low'], '+')} to {share(row['high'], '+')}",
            share(row["coded_share"]),
        )
        for row in frame.to_dicts()
    ]
    return html_table(TITLES, rows, cell="padding: 1px 14px 1px 0")
