"""Tasks of lm-evaluation-harness (the package ``lm_eval``) through a cache. The package is imported on first use.

The harness calls a model in three ways. Each reads its context, except the last token, in one call, and the rest after
it, so that scored tokens see the context through codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from veloxlab.cache.counts import calls
from veloxlab.errors import InputError
from veloxlab.measure.generation import PLAIN, Reader, Side, stops
from veloxlab.measure.memory import coded_tokens
from veloxlab.measure.quality import CacheMaker, log_probabilities, of_targets
from veloxlab.progress import Progress
from veloxlab.texts import Tokenizer

PREFIX = "lm_eval:"  # of names of its tasks
MOST = 256  # tokens of an answer, if a task sets no end
BLOCK = 32  # tokens of a text scored in one call; earlier ones are read through the cache


class Scorer:
    """A model and a cache with the three calls of the harness; each handles one request at a time."""

    def __init__(self, model: Module, tokenizer: Tokenizer, make: CacheMaker) -> None:
        self.model, self.tokenizer, self.make = model, tokenizer, make
        self.tokens, self.coded = [0], [0]  # tokens of each context, and how many were in codes
        self._ids: list[int] = []
        self._reader: Reader | None = None  # for the newest context, which all choices of a question share

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return log p of a continuation in nats, and whether it is the model's greedy continuation."""
        first, rest = self._split(context, continuation)
        reader = self._read(first)
        greedy = reader.best() == rest[0]
        total = reader.nll(rest[:1])
        for token, following in pairwise(rest):
            reader.read([token])
            greedy &= reader.best() == following
            total += reader.nll([following])
        return -total, greedy

    def rolling(self, text: str) -> float:
        """Return log p of a whole text in nats, block by block."""
        ids = [self._start, *self.tokenizer.encode(text, **PLAIN)]
        cache, total = self.make(self.model), 0.0
        for at in range(0, len(ids) - 1, BLOCK):
            targets = mx.array(ids[at + 1 : at + 1 + BLOCK])
            logits = self.model(mx.array([ids[at : at + len(targets)]]), cache=cache)[0]
            total -= float(np.asarray(of_targets(log_probabilities(logits), targets).sum()))
        self._tell(cache, len(ids))
        return total

    def generate(self, context: str, until: list[str], most: int) -> str:
        """Return the model's greedy text up to the first of ``until``."""
        reader, ids, said = self._read(list(self.tokenizer.encode(context)) or [self._start]), list[int](), ""
        while len(ids) < most and (token := reader.best()) not in stops(self.tokenizer):
            ids.append(token)
            said = str(self.tokenizer.decode(ids))
            if any(end in said for end in until):
                break
            reader.read([token])
        return min((said.split(end, 1)[0] for end in until), key=len, default=said)

    @property
    def _start(self) -> int:
        """The token before a text without context."""
        start = getattr(self.tokenizer, "bos_token_id", None)
        return min(stops(self.tokenizer), default=0) if start is None else int(start)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both; spaces between them go to the continuation's first word, as in a text."""
        stripped = context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        first = list(self.tokenizer.encode(stripped)) or [self._start]
        whole = list(self.tokenizer.encode(stripped + continuation))
        rest = whole[len(first) :] if whole[: len(first)] == first else []
        return first, rest or list(self.tokenizer.encode(continuation, **PLAIN))

    def _read(self, ids: list[int]) -> Reader:
        if self._reader is None or ids != self._ids:
            self._ids, self._reader = ids, Reader(self.model, self.make(self.model)).read(ids, calls(len(ids)))
            self._tell(self._reader.cache, len(ids))
        return self._reader.twin()

    def _tell(self, cache: list[Any], tokens: int) -> None:
        self.tokens.append(tokens)
        self.coded.append(coded_tokens(cache))


def _as_model(scorer: Scorer, tell: Callable[[int, int], object]) -> Any:  # noqa: ANN401 - a class of another package
    """Return a model with the interface of the harness."""
    base = import_module("lm_eval.api.model").LM

    def each(score: Callable[..., Any], requests: list[Any]) -> list[Any]:
        found = []
        for i, request in enumerate(requests):
            tell(i, len(requests))
            found.append(score(*request.args))
        return found

    def generate(context: str, settings: Mapping[str, Any]) -> str:
        until = settings.get("until", [])
        until = [end for end in ([until] if isinstance(until, str) else until) if end]
        return scorer.generate(context, until, settings.get("max_gen_toks", MOST))

    class Model(base):  # type: ignore[misc, valid-type]  # imported above
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return each(scorer.loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return each(scorer.rolling, requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return each(generate, requests)

    return Model()


def _answer(responses: Sequence[Any]) -> str:
    """Return the answer: for choices with a log-likelihood each, the number of the most likely one."""
    if len(responses) > 1 and all(isinstance(each, list | tuple) for each in responses):
        return str(max(range(len(responses)), key=lambda choice: float(responses[choice][0])))
    return str(responses[0]) if responses else ""


def _told(progress: Progress, label: str, done: int, total: int) -> None:
    progress(done, total, label)


def answers(
    model: Module,
    tokenizer: Tokenizer,
    name: str,
    makers: Mapping[Side, CacheMaker],
    questions: int,
    progress: Progress,
) -> Iterator[tuple[object, ...]]:
    """Yield rows of `veloxlab.measure.tasks.ANSWERS` of a task; its own first metric counts the right answers.

    Raises `InputError` if the harness is not installed, or the task has no metric of right and wrong answers.
    """
    if find_spec("lm_eval") is None:
        raise InputError(f"The task {name!r} needs lm-evaluation-harness: run `uv pip install lm-eval`.")
    for side, make in makers.items():
        scorer = Scorer(model, tokenizer, make)
        seen = _as_model(scorer, partial(_told, progress, f"{name}: {side}"))
        found = import_module("lm_eval").simple_evaluate(
            model=seen, tasks=[name.removeprefix(PREFIX)], limit=questions, log_samples=True, bootstrap_iters=0
        )
        context, coded = (round(sum(counts) / max(1, len(counts) - 1)) for counts in (scorer.tokens, scorer.coded))
        for task, samples in found["samples"].items():
            for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
                metric = next((m for m in sample.get("metrics", ()) if sample.get(m) in (0, 1)), None)
                if metric is None:
                    raise InputError(f"The task {PREFIX}{task} does not count right answers: take another one.")
                said = _answer(sample.get("filtered_resps", ())), str(sample.get("target", ""))
                place = f"{PREFIX}{task}", sample["doc_id"], f"{metric} of document {sample['doc_id']}", side
                yield (*place, *said, bool(sample[metric]), None, context, coded)
