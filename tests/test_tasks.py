"""Questions asked through a cache: scores equal those of a run without a cache, and questions see the codes."""

import json
import re
import sys
from datetime import UTC, datetime
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
import pytest
from mlx_lm.models.cache import KVCache

import veloxlab as vl
from tests.knobs import controls
from tests.letters import Readable
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.questions import BUILT_IN, EXAMPLE, Question, Task, build
from veloxlab.measure.tasks import ANSWERS, EVALUATION, summary
from veloxlab.views import task_caption, task_scores

CHOICES = (" abc", " xyz", " q")
CONTEXT = "the quick brown fox jumps over the lazy dog; " * 3  # 135 tokens


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def task():
    questions = [Question(CONTEXT, f"what of {n}?", " xyz", CHOICES) for n in "12"]
    return Task("own", (*questions, Question(CONTEXT[::-1], "and now?", " abc", CHOICES)))


def asked(model: Any, task: Task, *cache: Any, **settings: Any) -> pl.DataFrame:
    return vl.evaluate(model, Readable(), *cache, tasks=[task], per_question=True, **settings)


def nll(model: Any, before: str | list[int], answer: str) -> float:
    """Return −log p of an answer, by one run without any cache."""
    first = Readable().encode(before) if isinstance(before, str) else before
    ids, start = [*first, *Readable().encode(answer)], len(first)
    logits = np.array(model(mx.array([ids[:-1]]))[0, start - 1 :], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(-log_probs[range(len(answer)), ids[start:]].sum())


def test_answers_are_those_of_a_run_without_a_cache(model, task):
    exact = asked(model, task).filter(side="exact")
    assert exact.schema == ANSWERS
    for row, question in zip(exact.to_dicts(), task.questions, strict=True):
        nlls = [nll(model, question.context + question.question, choice) for choice in CHOICES]
        # float32 sums of 96 terms in another order, four tokens long
        assert row["nll"] == pytest.approx(nlls[CHOICES.index(question.answer)], abs=1e-4)
        assert row["answer"] == CHOICES[int(np.argmin(nlls))]
        assert row["hit"] == (row["answer"] == question.answer)
    assert exact["group"].to_list() == [0, 0, 1]


def test_a_question_sees_its_context_through_the_codes(model, task):
    every: dict[str, Any] = {"sinks": 0, "window": 0}
    with pytest.warns(UserWarning, match="held exactly"):
        same = asked(model, task, "none", **every)
    coarse = asked(model, task, "rvq", bits=2, **every)
    # the exact codes of "none" give the same sums in another order
    assert np.allclose(same.filter(side="compressed")["nll"], same.filter(side="exact")["nll"], atol=1e-4)
    assert not np.allclose(coarse.filter(side="compressed")["nll"], same.filter(side="exact")["nll"], atol=1e-2)
    codes = asked(model, task, bits=4, sinks=4, window=32).filter(side="compressed")["coded_tokens"]
    assert set(codes) == {96}  # of 135: 4 are sinks, 32 are the window, and blocks have 32


def test_a_task_that_never_reads_codes_is_named(model, task):
    with pytest.warns(UserWarning, match="'own' never reads codes"):
        found = vl.evaluate(model, Readable(), tasks=[task], window=256)
    assert found["coded_share"].item() == 0
    assert (found["difference"].item(), found["same"].item()) == (0, 1)


class Poisoned(KVCache):
    """Returns values that are NaN."""

    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys, values)
        return keys, values * mx.nan


def test_a_cache_that_returns_nan_is_never_right(model):
    first = Task("first", (Question(CONTEXT, "?", CHOICES[0], CHOICES),))  # the choice of a comparison with NaN
    with pytest.warns(UserWarning, match="held exactly"):
        found = asked(model, first, lambda m: [Poisoned() for _ in m.layers])
    assert not found.filter(side="compressed")["hit"].any()


def test_a_context_is_read_once_for_all_its_questions(model, task):
    made = []

    def make(m: Any) -> list[Any]:
        made.append(vl.make_cache(m, bits=8))
        return made[-1]

    by_function = asked(model, task, make)
    assert len(made) == 3  # one to check the settings, and one for each of two contexts
    cache = vl.make_cache(model, bits=8)
    assert by_function.equals(asked(model, task, cache))
    assert all(layer.empty() for layer in cache)


def test_impossible_questions_get_one_sentence(model, task):
    used = vl.make_cache(model)
    model(mx.array([[1, 2, 3]]), cache=used)
    for cache, settings, words in (
        (used, {}, "holds tokens already"),
        (vl.make_cache(model), {"bits": 3}, "takes no settings, but 'bits'"),
        ("turboquant", {"tasks": ["arithmetics"]}, "no task 'arithmetics': take one of copy"),
        ("turboquant", {"tasks": ["lookup"], "context": 64}, "no room for the task 'lookup': give"),
        ("turboquant", {"tasks": ["copy"], "context": 4096, "text": "short"}, "longer than the text"),
    ):
        with pytest.raises(InputError, match=words):
            vl.evaluate(model, Readable(), cache, **{"tasks": [task], **settings})
    with pytest.raises(InputError, match="none of the choices"):
        Question("a", "b", "c", ("d",))
    with pytest.raises(InputError, match="question of a question is empty"):
        Question("a", " ", "c")


LINES = """
{"context": "a b c. ", "question": "it is", "answer": "b", "choices": ["b", " c"]}

{"context": "a b c. ", "question": "Answer:\\n", "answer": "b"}
"""


def test_questions_of_ones_own_are_lines_of_json():
    first, second = Task.of_lines(LINES).questions
    assert first == Question("a b c. ", "it is", " b", (" b", " c"))  # an answer is a separate word
    assert second == Question("a b c. ", "Answer:\n", "b")
    assert Task.of_lines(EXAMPLE).name == "own"
    for line, words in (
        ("[1", r"Line 2 is no question\. It is not JSON"),
        ("5", "It needs context, question, answer"),
        ('{"context": "a", "question": "b"}', "It needs context, question, answer"),
        ('{"context": "a", "question": "b", "answer": "c", "choice": []}', "and may have choices"),
        ('{"context": "a", "question": "b", "answer": "c", "choices": ["d"]}', "Line 2 .*'c' is none of the choices"),
        ('{"context": "a", "question": "b", "answer": 5}', "answer=5"),
    ):
        with pytest.raises(InputError, match=words):
            Task.of_lines(f"{EXAMPLE}\n{line}")
    with pytest.raises(InputError, match="There are no questions"):
        Task.of_lines(" \n")


def test_the_page_asks_questions_of_ones_own(model):
    page = vl.widgets.Tasks(model, Readable(), window=0, sinks=0)
    knobs = controls(page)
    ask, file = knobs["Ask"], knobs["From a file"]
    page.tasks = []
    ask.click()
    page.tasks = BUILT_IN
    assert "No task is chosen" in page._message.value
    file.value = ({"name": "own", "type": "", "size": 1, "content": b"\xff", "last_modified": datetime.now(UTC)},)
    assert "own is not a text in UTF-8" in page._message.value
    line = json.dumps({"context": CONTEXT, "question": "and?", "answer": "abc", "choices": ["abc", "xyz"]})
    file.value = ({**file.value[0], "content": f"{line}\n{line}".encode()},)
    assert "2 questions are too few to tell." in page._checked.value
    assert page.tasks == ()  # only the typed questions are asked
    ask.click()
    assert page.wait(60)
    assert page.answered.select("task", "questions", "chance").rows() == [("own", 2, 0.5)]
    assert "2 questions are too few to tell." in page._message.value
    answers = page.answers.filter(side="exact")["answer"].to_list()
    row = "<td[^>]*>own</td><td[^>]*>and\\?</td><td[^>]*>abc</td><td[^>]*>"
    assert re.findall(f"{row}([^<]*)<", page._table.value) == [answer.strip() for answer in answers]
    page.own = "\n".join([line] * 20)
    assert "20 questions." in page._checked.value
    page.own = "x"
    assert "Line 1 is no question" in page._checked.value
    with pytest.raises(InputError, match="Line 1 is no question"):
        page.run()
    page.close()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_questions_have_one_right_answer_in_their_context(name):
    filler = Readable().encode("so it goes. " * 200)
    made = [build(name, Readable(), filler, questions=6, context=1200, seed=seed) for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
    assert len(made[0].questions) == 6
    for each in made[0].questions:
        assert len(Readable().encode(each.context)) == 1200
        assert len(set(each.choices)) == len(each.choices) == (0 if name == "passkey" else 4)
        if name == "arithmetic":
            one, other = each.question.split("=")[0].split("+")
            assert int(each.answer) == int(one) + int(other)
            assert f"\n{each.question.strip()} " not in f"\n{each.context}"
        else:
            begin = {"copy": lambda q: f"{q.split(',')[-2].strip()},", "lookup": lambda q: q.split(": ")[-1]}
            place = each.context.find(begin.get(name, lambda q: "The pass key is")(each.question))
            assert each.answer.strip() in each.context[place : place + 60]
            assert each.context.rfind(each.answer) < 1100  # before the filler, so outside a window
    assert made[0].chance == (0 if name == "passkey" else 0.25)


def test_a_written_answer_can_continue_after_the_right_one(model):
    ids = Readable().encode(CONTEXT + "?")
    right = int(np.asarray(model(mx.array([ids]))[0, -1].argmax()))
    answer = Readable().decode([right])
    written = Task("written", (Question(CONTEXT, "?", answer), Question(CONTEXT, "?", answer + answer + "~")))
    found = asked(model, written).filter(side="exact")
    assert found["hit"].to_list() == [True, False]
    assert found["nll"][0] == pytest.approx(nll(model, CONTEXT + "?", answer), abs=1e-4)


def answered(hits: dict[str, list[int]], groups: list[int]) -> pl.DataFrame:
    """Return rows of one task with these hits."""
    rows = [
        ("t", group, "?", side, f"{side if group == 3 else ''}{hit}", "1", bool(hit), 1.0 + hit, 100, 50)
        for side, own in hits.items()
        for group, hit in zip(groups, own, strict=True)
    ]
    return pl.DataFrame(rows, schema=ANSWERS, orient="row")


def test_the_interval_is_paired_and_counts_a_context_once():
    hits = {"exact": [1, 1, 1, 0, 1, 1], "compressed": [0, 0, 1, 1, 1, 0]}
    found = summary(answered(hits, [0, 0, 1, 1, 2, 3]), {"t": 0.25}).row(0, named=True)
    assert (found["exact"], found["compressed"]) == (pytest.approx(5 / 6), 0.5)
    assert found["difference"] == pytest.approx(-1 / 3)
    by_context = np.array([-1, 0.5, 0, -1])
    half = 3.182446 * by_context.std(ddof=1) / 2  # Student's t, 3 degrees, 97.5 %
    assert found["low"] == pytest.approx(by_context.mean() - half, abs=1e-4)
    assert found["high"] == pytest.approx(by_context.mean() + half, abs=1e-4)
    assert found["same"] == pytest.approx(2 / 6)
    assert found["coded_share"] == 0.5
    assert summary(answered(hits, [0] * 6), {}).row(0, named=True)["low"] is None


def test_the_caption_has_significant_differences_and_tasks_without_information():
    row = {"task": "copy", "questions": 8, "chance": 0.25, "exact": 0.9, "compressed": 0.5, "difference": -0.4}
    row |= {"low": -0.6, "high": -0.2, "same": 0.5, "nll_exact": 1.0, "nll": 2.0, "coded_share": 0.8}
    frame = pl.DataFrame([row, row | {"task": "sums", "exact": 0.25, "low": None, "high": None}], schema=EVALUATION)
    said = task_caption(frame)
    assert "fewer right answers on copy" in said
    assert "sums: the exact cache guesses too" in said
    assert "One context has no interval" in task_caption(frame.filter(task="sums"))
    assert "No difference is decisive" in task_caption(frame.with_columns(high=pl.lit(0.1)))
    assert next(iter(task_scores(frame).to_dict()["datasets"].values()))[0]["task"] == "copy"


class Harness(ModuleType):
    """Replaces lm-evaluation-harness: its public calls, with one task of two documents."""

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.__spec__ = ModuleSpec("lm_eval", None)
        self.found: list[Any] = []

    def simple_evaluate(self, model: Any, tasks: list[str], limit: int, log_samples: bool, bootstrap_iters: int) -> Any:
        assert (tasks, limit, log_samples) == (["toy"], 2, True)

        def ask(kind: str, *given: tuple[Any, ...]) -> Any:
            return getattr(model, kind)([SimpleNamespace(args=each) for each in given])

        scores = ask("loglikelihood", (CONTEXT, " xyz"), (f"{CONTEXT} ", "xyz"), ("", "abc"))
        texts = ask("generate_until", (CONTEXT, {"until": "\x00", "max_gen_toks": 3}), (CONTEXT, {"until": []}))
        self.found.append((scores, texts, ask("loglikelihood_rolling", (CONTEXT,))))
        samples = [
            {
                "doc_id": i,
                "target": "A",
                "filtered_resps": [(-len(self.found), 1), (-2.0, 0)],
                "metrics": ["acc"],
                "acc": 1.0 - i,
            }
            for i in (1, 0)
        ]
        return {"samples": {"toy": samples}}


def test_tasks_of_a_harness_are_asked_through_the_cache(model, monkeypatch):
    harness = Harness()
    parts = ModuleType("lm_eval.api.model")
    parts.LM = type("LM", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", parts)
    settings: dict[str, Any] = {"tasks": ["lm_eval:toy"], "questions": 2, "bits": 2, "sinks": 0, "window": 0}
    found = vl.evaluate(model, Readable(), **settings).row(0, named=True)
    assert (found["task"], found["questions"], found["exact"], found["chance"]) == ("lm_eval:toy", 2, 0.5, None)
    assert found["coded_share"] > 0.5
    assert found["same"] == 1  # the first of two choices, at −1 with the exact cache and at −2 with the other
    exact, compressed = harness.found
    (first, greedy), spaced, (empty, _) = exact[0]
    assert first == pytest.approx(-nll(model, CONTEXT.rstrip(), "  xyz"), abs=2e-4)  # the space goes to the word
    assert spaced == (pytest.approx(first, abs=1e-5), greedy)
    assert empty == pytest.approx(-nll(model, [95], "abc"), abs=1e-4)
    assert len(exact[1][0]) == 3
    assert exact[2][0] == pytest.approx(-nll(model, [95], CONTEXT), rel=1e-4)
    for one, other in zip(exact, compressed, strict=True):
        assert one != other  # each kind of call reads the codes


def test_the_message_on_a_missing_harness_says_how_to_install_it(model):
    with pytest.raises(InputError, match="lm-evaluation-harness: run `uv pip install lm-eval`"):
        vl.evaluate(model, Readable(), tasks=["lm_eval:arc_easy"])
