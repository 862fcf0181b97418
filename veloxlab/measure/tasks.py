"""Questions asked through a cache: the number of answers that stay right when the context is compressed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.cache.plan import Plan
from veloxlab.checks import CACHE, CACHE_MAKER, CALIBRATIONS, WORDS, checked, either, instance, many, maybe, whole
from veloxlab.errors import InputError
from veloxlab.measure import harness
from veloxlab.measure.activations import first_tokens
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.generation import PLAIN, SIDES, Reader, Side, written
from veloxlab.measure.memory import coded_tokens
from veloxlab.measure.paired import Mean
from veloxlab.measure.quality import CacheMaker, maker
from veloxlab.measure.questions import BUILT_IN, Question, Task, build
from veloxlab.mlxlm.probe import own_cache
from veloxlab.progress import Progress, silent
from veloxlab.texts import Tokenizer

ANSWERS = schema("task group question side answer right hit nll context coded_tokens")
"""Columns of `evaluate` with ``per_question``: task; number of the context, which neighbours share; question;
cache, "exact" or "compressed"; its answer, the right one, and whether they agree; −log p of the right
one in nats, null if a harness scored it; tokens of the context, and those in codes when the question was read."""

EVALUATION = schema("task questions chance exact compressed difference low high same nll_exact nll coded_share")
"""Columns of `evaluate`: task, its questions, the share of right guesses, null if unknown; shares of right
answers with the exact and the compressed cache, compressed − exact, and the ends of its 95 % interval, paired by
context, null for a single one; share of equal answers; mean −log p of the right answer with either, in nats; share of
the contexts' tokens that were in codes."""

Row = tuple[object, ...]


@checked(
    cache=either(CACHE_MAKER, CACHE),
    calibration=CALIBRATIONS,
    tasks=maybe(many(either(WORDS, instance(Task, "a vl.measure.Task")))),
    questions=whole(1),
)
def evaluate(
    model: Module,
    tokenizer: Tokenizer,
    cache: str | Plan | CacheMaker | Sequence[Any] = "turboquant",
    *,
    tasks: Sequence[str | Task] | None = None,
    questions: int = 32,
    context: int = 512,
    text: str | None = None,
    seed: int = 0,
    per_question: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> pl.DataFrame:
    """Ask questions about texts in the exact and in a compressed cache: one row for each task, `EVALUATION`.

    A context is read first, and the question after it, so the question sees the context through its codes. With
    choices, the most probable one is the answer. A warning names a task that never reads codes. For predictions along a
    text, use `vl.fidelity`. Raises `InputError`: as `veloxlab.make_cache`; for a cache that already holds tokens; an
    unknown task; a context that is too short for a task, or longer than the text.

    Parameters
    ----------
    cache : a method's id or a `veloxlab.Plan`, as for `veloxlab.make_cache`; an empty cache from that function; or a
        function from the model to a prompt cache. ``settings`` are further arguments of `veloxlab.make_cache`.
    tasks : names in `veloxlab.measure.questions.BUILT_IN`, by default all; tasks of your own, such as
        ``vl.measure.Task.of_lines`` reads; and ``"lm_eval:NAME"``
        for a task of lm-evaluation-harness, if that is installed.
    questions : number for each named task.
    context : tokens before a question of a built-in task: the facts, followed by ``text``.
    text : text that fills a context; the shipped WikiText-2 test excerpt by default.
    seed : of the built-in questions.
    per_question : return one row for each question and cache, `ANSWERS`.
    """
    given: dict[str, Any] = {"questions": questions, "context": context, "text": text, "seed": seed}
    answers, chances = ask(model, tokenizer, _maker(cache, settings), tasks or BUILT_IN, progress=progress, **given)
    found = summary(answers, chances)
    for sentence in unread(found):
        warnings.warn(sentence, stacklevel=3)
    return answers if per_question else found


def ask(
    model: Module,
    tokenizer: Tokenizer,
    make: CacheMaker,
    tasks: Sequence[str | Task],
    *,
    questions: int,
    context: int,
    text: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[pl.DataFrame, dict[str, float]]:
    """Return the answers of `evaluate` with the exact cache and those of ``make``: `ANSWERS`, and chances by task.

    The chances are the shares of right guesses, where known.
    """
    make(model)  # raises for wrong settings before the model runs
    makers: dict[Side, CacheMaker] = {"exact": own_cache, "compressed": make}
    asked = [_known(task) for task in tasks]
    filler = first_tokens(tokenizer, text, context, **PLAIN) if {*BUILT_IN} & {*asked} else []
    frames, chances = [], dict[str, float]()
    for task in asked:
        if isinstance(task, str) and task in BUILT_IN:
            task = build(task, tokenizer, filler, questions=questions, context=context, seed=seed)
        if isinstance(task, Task):
            chances[task.name] = task.chance
            rows = [*_answers(model, tokenizer, task, makers, progress)]
        else:
            rows = [*harness.answers(model, tokenizer, task, makers, questions, progress)]
        frames.append(pl.DataFrame(rows, schema=ANSWERS, orient="row"))
    return pl.concat(frames), chances


def unread(frame: pl.DataFrame) -> list[str]:
    """Return a sentence for each task of `EVALUATION` whose contexts were all exact, so that it tests no codes."""
    way_out = "take longer contexts, or fewer sinks and a smaller window"
    return [
        f"The task {name!r} never reads codes, for its contexts were held exactly: {way_out}."
        for name in frame.filter(coded_share=0)["task"]
    ]


def _maker(cache: str | Plan | CacheMaker | Sequence[Any], settings: Mapping[str, Any]) -> CacheMaker:
    if not isinstance(cache, list | tuple):
        return maker(cache, settings)  # type: ignore[arg-type]  # strings are no list
    if settings:
        raise InputError(f"An existing cache takes no settings, but {min(settings)!r} was given.")
    if not all(entry.empty() for entry in cache):
        raise InputError("The cache holds tokens already: give a new one, or a method's id.")
    return lambda _: copy.deepcopy([*cache])


def _known(task: str | Task) -> str | Task:
    if isinstance(task, Task) or task in BUILT_IN or task.startswith(harness.PREFIX):
        return task
    known = ", ".join(BUILT_IN)
    raise InputError(
        f"There is no task {task!r}: take one of {known}, or {harness.PREFIX}NAME of lm-evaluation-harness."
    )


def _answers(
    model: Module, tokenizer: Tokenizer, task: Task, makers: Mapping[Side, CacheMaker], progress: Progress
) -> Iterator[Row]:
    """Yield rows of `ANSWERS`. Each cache reads a context once, and is copied for each of its questions."""
    done, total = 0, len(task.questions) * len(makers)
    for group, (context, same) in enumerate(groupby(task.questions, lambda question: question.context)):
        ids, questions = list(tokenizer.encode(context)), list(same)
        for side, make in makers.items():
            progress(done, total, f"{task.name}: {side}")
            reader = Reader(model, make(model)).read(ids)
            coded = coded_tokens(reader.cache)
            for question in questions:
                found = _asked(reader.twin(), tokenizer, question)
                yield (task.name, group, question.question, side, *found, len(ids), coded)
                done += 1
    progress(total, total, "done")


def _asked(reader: Reader, tokenizer: Tokenizer, question: Question) -> tuple[str, str, bool, float]:
    """Return the answer, the right one, whether they agree, and −log p of the right one."""
    reader.read(list(tokenizer.encode(question.question, **PLAIN)))
    choices = question.choices or (question.answer,)
    nlls = {choice: reader.nll(list(tokenizer.encode(choice, **PLAIN))) for choice in choices}
    nll = nlls[question.answer]
    if question.choices:
        answer = min(choices, key=lambda choice: nlls[choice])
        return answer, question.answer, answer == question.answer and bool(np.isfinite(nll)), nll
    answer = written(reader, tokenizer, len(tokenizer.encode(question.answer, **PLAIN)) + 2)
    return answer, question.answer, answer.strip().startswith(question.answer.strip()), nll


def summary(answers: pl.DataFrame, chances: Mapping[str, float]) -> pl.DataFrame:
    """Return a row for each task, `EVALUATION`, from rows of `ANSWERS`; ``chances`` are shares of right guesses."""
    exact, compressed = (answers.filter(side=side) for side in SIDES)
    both = exact.rename({"hit": "hit_exact", "nll": "nll_exact"})
    both = both.with_columns(compressed.select("hit", "nll", "coded_tokens", other="answer"))
    rows = []
    for (task,), own in both.group_by("task", maintain_order=True):
        gained = own["hit"].cast(pl.Int8) - own["hit_exact"].cast(pl.Int8)
        by_context = own.select("group", gained=gained).group_by("group").agg(pl.col("gained").mean())["gained"]
        ends = Mean.of(by_context.to_list())
        rows.append({"task": task, "questions": own.height, "chance": chances.get(str(task))})
        rows[-1] |= {"exact": own["hit_exact"].mean(), "compressed": own["hit"].mean()}
        rows[-1] |= {"difference": gained.mean(), "low": ends.low, "high": ends.high}
        rows[-1] |= {"same": (own["answer"] == own["other"]).mean()}
        rows[-1] |= {name: own[name].mean() for name in ("nll_exact", "nll")}
        rows[-1]["coded_share"] = float(own["coded_tokens"].sum()) / float(own["context"].sum())
    return in_schema(pl.DataFrame(rows), EVALUATION)
