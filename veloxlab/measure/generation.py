"""The same prompt continued with the exact cache and with a compressed one, token by token; and a passkey test.

Decoding is greedy, so the same call gives the same text. The divergence of a token is that of two predictions of one
text: once the texts part, the exact model reads the compressed cache's text too, in a cache of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.cache.make import LayerPlan
from veloxlab.cache.room import calls
from veloxlab.checks import CACHE_MAKER, CALIBRATIONS, FLAG, FUNCTION, WORDS, checked, either, many, real, whole
from veloxlab.errors import InputError
from veloxlab.measure.activations import first_tokens
from veloxlab.measure.quality import CacheMaker, divergence, log_probabilities, maker
from veloxlab.mlxlm.probe import own_cache
from veloxlab.progress import Progress, silent
from veloxlab.texts import excerpt

Side = Literal["exact", "compressed"]
SIDES: tuple[Side, Side] = ("exact", "compressed")
USUAL_TOKENS = 64
PROMPT = either(WORDS, many(whole(0), empty=True))  # a text, or token ids
_PLAIN = {"add_special_tokens": False}  # a text without marks of its beginning or end

GENERATION = {
    "side": pl.String,  # whose text it is: "exact" or "compressed"
    "position": pl.Int32,  # of the token in the text that was generated, from 0
    "token": pl.Int32,  # its id
    "text": pl.String,  # what it adds to the text
    "probability": pl.Float64,  # that its own cache gave it
    "exact_probability": pl.Float64,  # that the exact cache gives it behind the same text
    "kl": pl.Float64,  # KL(exact ‖ compressed) of the prediction it was taken from, nats; null on the exact side
    "held_bytes": pl.Int64,  # that its own cache held when it was predicted
}
"""Columns of `side_by_side`."""

PASSKEY = {
    "depth": pl.Float64,  # where the needle is in the text, 0 to 1
    "context": pl.Int64,  # tokens of the text, the needle's among them
    "passkey": pl.String,  # what was hidden
    "side": pl.String,  # which cache was asked: "exact" or "compressed"
    "answer": pl.String,
    "hit": pl.Boolean,  # whether the answer begins with the passkey
}
"""Columns of `passkey`."""

OnToken = Callable[[pl.DataFrame], None]


@dataclass
class _Reader:
    """A model behind one text, with a cache of its own."""

    model: Module
    cache: list[Any]
    log_probs: mx.array  # of the next token [vocabulary]

    @classmethod
    def of(cls, model: Module, cache: list[Any], prompt: Sequence[int]) -> _Reader:
        """Read a prompt as mlx-lm's generator does: in chunks, and its last token by itself, which sees codes."""
        reader = cls(model, cache, mx.zeros(0))
        left = iter(prompt)
        for count in calls(len(prompt)):
            reader.read(*islice(left, count))
        return reader

    def read(self, *tokens: int) -> None:
        """Read these tokens in one call."""
        self.log_probs = log_probabilities(self.model(mx.array([tokens]), cache=self.cache)[0, -1])
        mx.eval(self.log_probs, [entry.state for entry in self.cache])

    @property
    def held_bytes(self) -> int:
        """Bytes of its cache's buffers."""
        return sum(entry.nbytes for entry in self.cache)

    def best(self) -> int:
        """The most likely next token."""
        return int(_number(self.log_probs.argmax()))

    def probability(self, token: int) -> float:
        """Of a next token."""
        return _number(mx.exp(self.log_probs[token]))

    def divergence_from(self, exact: _Reader) -> float:
        """KL of this prediction from that of a reader of the same text, in nats."""
        return _number(divergence(exact.log_probs, self.log_probs))

    def copy(self) -> _Reader:
        """Another reader behind the same text."""
        return _Reader(self.model, copy.deepcopy(self.cache), self.log_probs)


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS, prompt=PROMPT, chat=FLAG, on_token=FUNCTION)
def side_by_side(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    prompt: str | Sequence[int],
    method_or_plan: str | LayerPlan | CacheMaker = "turboquant",
    *,
    tokens: int = USUAL_TOKENS,
    chat: bool = True,
    on_token: OnToken | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> pl.DataFrame:
    """Continue a prompt with the model's own cache and with a compressed one, greedily: `GENERATION`.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    prompt : a text, or token ids.
    method_or_plan : a method's id or a `veloxlab.Plan`, or any function from the model to a prompt cache.
    tokens : to generate at most; a side that ends its text ends.
    chat : whether a text is a user's message, in the tokenizer's template if it has one, or to be continued as it is.
    on_token : given the rows so far after each position, for showing them as they come.
    progress : told of each position; what it raises ends the work.
    settings : further arguments of `veloxlab.make_cache`, such as ``bits``, ``sinks`` and ``window``.

    Raises
    ------
    InputError : as `veloxlab.make_cache`; or an empty prompt; or no tokens asked for.
    """
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    made = maker(method_or_plan, settings)(model)
    progress(0, tokens, "reading the prompt")
    exact = _Reader.of(model, own_cache(model), ids)
    compressed = _Reader.of(model, made, ids)
    checker = exact  # the exact model behind the compressed cache's text: the same reader until the texts part
    stops = _stops(tokenizer)
    texts: dict[Side, list[int]] = {side: [] for side in SIDES}
    going: dict[Side, bool] = dict.fromkeys(SIDES, True)
    rows: list[dict[str, object]] = []
    for position in range(tokens):
        best: dict[Side, int] = {"exact": exact.best(), "compressed": compressed.best()}
        if checker is exact and best["exact"] != best["compressed"]:
            checker = exact.copy()
        for side, own in zip(SIDES, (exact, compressed), strict=True):
            if not going[side]:
                continue
            token = best[side]
            other = exact if side == "exact" else checker
            rows.append(
                {
                    "side": side,
                    "position": position,
                    "token": token,
                    "text": _added(tokenizer, texts[side], token),
                    "probability": own.probability(token),
                    "exact_probability": other.probability(token),
                    "kl": None if side == "exact" else own.divergence_from(checker),
                    "held_bytes": own.held_bytes,
                }
            )
            texts[side].append(token)
            going[side] = token not in stops
        if on_token is not None:
            on_token(pl.DataFrame(rows, schema=GENERATION))
        progress(position + 1, tokens, "generating")
        if not any(going.values()) or position + 1 == tokens:
            break
        if going["exact"]:
            exact.read(best["exact"])
        if going["compressed"]:
            compressed.read(best["compressed"])
            if checker is not exact:
                checker.read(best["compressed"])
    return pl.DataFrame(rows, schema=GENERATION)


def first_parting(generation: pl.DataFrame) -> int | None:
    """The first position at which the two texts of `side_by_side` differ, or None."""
    texts = [generation.filter(pl.col("side") == side)["token"].to_list() for side in SIDES]
    shared = min(map(len, texts))
    parted = next((i for i in range(shared) if texts[0][i] != texts[1][i]), None)
    return shared if parted is None and len(texts[0]) != len(texts[1]) else parted


def prompt_ids(tokenizer: Any, prompt: str | Sequence[int], *, chat: bool = True) -> list[int]:  # noqa: ANN401
    """Token ids of a prompt, as `side_by_side` takes it; raises `InputError` if there are none."""
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt]
    elif chat and prompt.strip() and getattr(tokenizer, "has_chat_template", False):
        ids = list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))
    else:
        ids = list(tokenizer.encode(prompt)) if prompt.strip() else []
    if not ids:
        raise InputError("The prompt is empty: give some words to continue.")
    return ids


def _added(tokenizer: Any, before: Sequence[int], token: int) -> str:  # noqa: ANN401
    """What a token adds to a text: a character of several tokens is shown at the last of them."""
    shown = [str(tokenizer.decode(part)).rstrip("\ufffd") for part in (before, [*before, token])]
    return shown[1][len(shown[0]) :]


TASK = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\n\nThe pass key is {0}. Remember it: {0} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS, depths=many(real(least=0, most=1)))
def passkey(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    method_or_plan: str | LayerPlan | CacheMaker = "turboquant",
    *,
    context: int = 512,
    depths: Sequence[float] = DEPTHS,
    text: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> pl.DataFrame:
    """Hide a number in a text at several depths and ask for it, of the exact cache and of a compressed one: `PASSKEY`.

    The text is read first and the question after it, in calls of their own, so that the question and the answer see the
    needle through its codes, unless it lies in the window (Mohtashami and Jaggi 2023, arXiv 2305.16300, section 4.2).

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    method_or_plan, settings : as for `side_by_side`.
    context : tokens of the text, needle and task included.
    depths : where the needle is, as shares of the text, 0 to 1.
    text : what it is hidden in; the shipped WikiText-2 test excerpt by default.
    seed : of the numbers, one for each depth.
    progress : told of each depth and side; what it raises ends the work.

    Raises
    ------
    InputError : as `veloxlab.make_cache`; a depth outside of the text; a context too short for the needle, or longer
        than the text.
    """
    numbers = np.random.default_rng(seed).integers(10 ** (DIGITS - 1), 10**DIGITS, len(depths))
    filler = first_tokens(tokenizer, excerpt() if text is None else text, context, **_PLAIN)
    question = tokenizer.encode(QUESTION, **_PLAIN)
    makers: dict[Side, CacheMaker] = {"exact": own_cache, "compressed": maker(method_or_plan, settings)}
    rows: list[dict[str, object]] = []
    for depth, number in zip(depths, numbers, strict=True):
        hidden = _hidden(tokenizer, filler, context, depth, str(number))
        for side, make in makers.items():
            progress(len(rows), len(depths) * len(makers), f"needle at {depth:.0%}: {side}")
            reader = _Reader.of(model, make(model), hidden)
            reader.read(*question)
            answer = _answer(reader, tokenizer)
            hit = answer.strip().startswith(str(number))
            found: dict[str, object] = {"depth": depth, "context": len(hidden), "passkey": str(number)}
            rows.append({**found, "side": side, "answer": answer, "hit": hit})
    progress(len(rows), len(rows), "done")
    return pl.DataFrame(rows, schema=PASSKEY)


def _hidden(tokenizer: Any, filler: Sequence[int], context: int, depth: float, number: str) -> list[int]:  # noqa: ANN401
    """Ids of the task and of a text of ``context`` tokens in all, with the needle at a depth of it."""
    task, needle = (list(tokenizer.encode(words, **_PLAIN)) for words in (TASK, NEEDLE.format(number)))
    room = context - len(task) - len(needle)
    if room < 1:
        raise InputError(
            f"context={context} has no room for a text beside the task and the needle, which take "
            f"{len(task) + len(needle)} tokens: give more."
        )
    if room > len(filler):
        raise InputError(
            f"context={context} is longer than the text, which has {len(filler)} tokens: give a longer text or less."
        )
    at = round(depth * room)
    return [*task, *filler[:at], *needle, *filler[at:room]]


def _answer(reader: _Reader, tokenizer: Any) -> str:  # noqa: ANN401
    """What the model goes on with, greedily: as many tokens as a number takes at most, and two more."""
    ids: list[int] = []
    for _ in range(DIGITS + 2):
        token = reader.best()
        if token in _stops(tokenizer):
            break
        ids.append(token)
        reader.read(token)
    return str(tokenizer.decode(ids))


def _number(x: mx.array) -> float:
    return float(x.item())  # type: ignore[arg-type]  # real


def _stops(tokenizer: Any) -> set[int]:  # noqa: ANN401
    return set(getattr(tokenizer, "eos_token_ids", ()))
