"""Generation from one prompt with the exact and with a compressed cache, token by token; and a passkey test.

Decoding is greedy. A divergence compares two predictions for the same text: after the texts differ, the exact model
also reads the compressed cache's text, in another cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.cache.counts import calls
from veloxlab.cache.plan import Plan
from veloxlab.checks import CACHE_MAKER, CALIBRATIONS, FLAG, FUNCTION, WORDS, checked, either, many, real, whole
from veloxlab.errors import InputError
from veloxlab.measure.activations import first_tokens
from veloxlab.measure.frames import schema
from veloxlab.measure.quality import CacheMaker, divergence, log_probabilities, maker, of_targets
from veloxlab.mlxlm.probe import LayerFacts, own_cache, probe
from veloxlab.progress import Progress, silent
from veloxlab.texts import Tokenizer

Side = Literal["exact", "compressed"]
SIDES: tuple[Side, Side] = ("exact", "compressed")
USUAL_TOKENS = 64
PROMPT = either(WORDS, many(whole(0), empty=True))  # a text, or token ids
PLAIN = {"add_special_tokens": False}  # a text without tokens for its beginning or end

GENERATION = schema("side position token text probability exact_probability kl held_bytes fp16_bytes")
"""Columns of `side_by_side`: whose text it is, "exact" or "compressed"; position of the token in the generated text,
its id, and the text that it adds; its probability with its own cache, and with the exact cache after the same text;
KL(exact ‖ compressed) of that prediction in nats, null on the exact side; bytes then held, in buffers that grow in
steps; and bytes of exact keys and values of these tokens in 16 bits a number."""

PASSKEY = schema("depth context passkey side answer hit")
"""Columns of `passkey`: depth of the needle in the text, 0 to 1; tokens of the text, with the needle; the passkey; the
cache, "exact" or "compressed"; its answer, and whether that begins with the passkey."""

OnToken = Callable[[pl.DataFrame], object]


@dataclass
class Reader:
    """A model that has read a text into its own cache."""

    model: Module
    cache: list[Any]
    log_probs: mx.array = field(init=False)  # of the next token [vocabulary]

    def read(self, tokens: Sequence[int], chunks: Iterable[int] = ()) -> Reader:
        """Read more of the text, in calls of ``chunks`` tokens; by default in one call."""
        left = iter(tokens)
        for count in chunks or [len(tokens)]:
            ids = mx.array([list(islice(left, count))])
            logits = self.model(ids, cache=self.cache)[0, -1]
            mx.eval([entry.state for entry in self.cache])
        self.log_probs = log_probabilities(logits)
        mx.eval(self.log_probs)
        return self

    def twin(self) -> Reader:
        """Return an independent copy that has read the same text."""
        made = copy.copy(self)
        made.cache = copy.deepcopy(self.cache)
        return made

    def best(self) -> int:
        """The most probable next token."""
        return int(np.asarray(self.log_probs.argmax()))

    def nll(self, tokens: Sequence[int]) -> float:
        """Return −log p of ``tokens`` as the next ones, in nats; the state does not change."""
        log_probs, ids = self.log_probs[None], mx.array([*tokens])
        if len(tokens) > 1:
            logits = self.model(ids[None, :-1], cache=copy.deepcopy(self.cache))[0]
            log_probs = mx.concatenate([log_probs, log_probabilities(logits)])
        return float(np.asarray(of_targets(log_probs, ids).sum()))

    def probability(self, token: int) -> float:
        """Return the probability that a token is the next one."""
        return float(np.asarray(mx.exp(self.log_probs[token])))


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS, prompt=PROMPT, chat=FLAG, on_token=FUNCTION)
def side_by_side(
    model: Module,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    method_or_plan: str | Plan | CacheMaker = "turboquant",
    *,
    tokens: int = USUAL_TOKENS,
    chat: bool = True,
    on_token: OnToken = silent,
    progress: Progress = silent,
    **settings: Any,
) -> pl.DataFrame:
    """Continue a prompt with the model's own cache and with a compressed one, greedily: `GENERATION`.

    Raises `InputError`: as `veloxlab.make_cache`; or for an empty prompt.

    Parameters
    ----------
    prompt : a text, or token ids.
    method_or_plan : a method's id or a `veloxlab.Plan`, or any function from the model to a prompt cache.
    tokens : most tokens to generate; a side stops at the end of its text.
    chat : whether a text is a user's message, in the tokenizer's template if there is one; otherwise it is continued.
    on_token : called with the rows so far after each position.
    settings : further arguments of `veloxlab.make_cache`, such as ``bits``, ``sinks`` and ``window``.
    """
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    made = maker(method_or_plan, settings)(model)
    progress(0, tokens, "reading the prompt")
    exact, compressed = (Reader(model, cache).read(ids, calls(len(ids))) for cache in (own_cache(model), made))
    checker = exact  # the exact model after the compressed cache's text: the same reader until the texts differ
    going: dict[Side, Reader] = {"exact": exact, "compressed": compressed}
    texts: dict[Side, list[int]] = {side: [] for side in SIDES}
    rows: list[tuple[object, ...]] = []
    facts = probe(model)
    for position in range(tokens):
        best = {side: reader.best() for side, reader in going.items()}
        if checker is exact and len(set(best.values())) > 1:
            checker = exact.twin()
        for side, reader in going.items():
            token, other = best[side], exact if side == "exact" else checker
            chances = reader.probability(token), other.probability(token)
            kl = None if side == "exact" else float(np.asarray(divergence(checker.log_probs, reader.log_probs)))
            sizes = sum(entry.nbytes for entry in reader.cache), _fp16_bytes(facts, len(ids) + position)
            rows.append((side, position, token, added_text(tokenizer, texts[side], token), *chances, kl, *sizes))
            texts[side].append(token)
        on_token(pl.DataFrame(rows, schema=GENERATION, orient="row"))
        progress(position + 1, tokens, "generating")
        going = {side: reader for side, reader in going.items() if best[side] not in stops(tokenizer)}
        if not going or position + 1 == tokens:
            break
        for side, reader in going.items():
            reader.read([best[side]])
        if "compressed" in going and checker is not exact:
            checker.read([best["compressed"]])
    return pl.DataFrame(rows, schema=GENERATION, orient="row")


def first_parting(generation: pl.DataFrame) -> int | None:
    """Return the first position at which the two texts of `side_by_side` differ, or None."""
    texts = [generation.filter(side=side)["token"].to_list() for side in SIDES]
    return next((i for i, (one, other) in enumerate(zip_longest(*texts)) if one != other), None)


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int], *, chat: bool = True) -> list[int]:
    """Return token ids of a prompt as in `side_by_side`; raises `InputError` if there are none."""
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt]
    elif chat and prompt.strip() and getattr(tokenizer, "has_chat_template", False):
        ids = list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))
    else:
        ids = list(tokenizer.encode(prompt)) if prompt.strip() else []
    if not ids:
        raise InputError("The prompt is empty: give some words to continue.")
    return ids


def _fp16_bytes(layers: Sequence[LayerFacts], tokens: int) -> int:
    """Return bytes of exact keys and values of ``tokens`` in 16 bits a number; a sliding layer keeps the newest."""
    return sum(2 * facts.values_per_token * min(tokens, facts.max_size or tokens) for facts in layers)


def added_text(tokenizer: Tokenizer, before: Sequence[int], token: int) -> str:
    """Return the text that a token adds; a character of several tokens appears at the last of them."""
    shown = [str(tokenizer.decode(part)).rstrip("\ufffd") for part in (before, [*before, token])]
    return shown[1][len(shown[0]) :]


def stops(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text."""
    return set(getattr(tokenizer, "eos_token_ids", ()))


TASK = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\n\nThe pass key is {0}. Remember it: {0} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS, depths=many(real(least=0, most=1)))
def passkey(
    model: Module,
    tokenizer: Tokenizer,
    method_or_plan: str | Plan | CacheMaker = "turboquant",
    *,
    context: int = 512,
    depths: Sequence[float] = DEPTHS,
    text: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> pl.DataFrame:
    """Hide a number in a text at several depths, and ask the exact and a compressed cache for it: `PASSKEY`.

    The text is read first, and the question after it in another call. So the question and the answer see the
    needle through its codes, unless it is in the window (Mohtashami and Jaggi 2023, arXiv 2305.16300, section 4.2).
    Raises `InputError`: as `veloxlab.make_cache`; for a context too short for the needle, or longer than the text.

    Parameters
    ----------
    method_or_plan, settings : as for `side_by_side`.
    context : tokens of the text, needle and task included.
    depths : places of the needle as shares of the text, 0 to 1.
    text : text around the needle; the shipped WikiText-2 test excerpt by default.
    seed : for the numbers, one for each depth.
    """
    numbers = np.random.default_rng(seed).integers(10 ** (DIGITS - 1), 10**DIGITS, len(depths))
    filler = first_tokens(tokenizer, text, context, **PLAIN)
    question = tokenizer.encode(QUESTION, **PLAIN)
    makers: dict[Side, CacheMaker] = {"exact": own_cache, "compressed": maker(method_or_plan, settings)}
    rows: list[tuple[object, ...]] = []
    for depth, number in zip(depths, map(str, numbers), strict=True):
        ids = hidden(tokenizer, filler, context, depth, number)
        for side, make in makers.items():
            progress(len(rows), len(depths) * len(makers), f"needle at {depth:.0%}: {side}")
            reader = Reader(model, make(model)).read(ids, calls(len(ids))).read(question)
            answer = written(reader, tokenizer, DIGITS + 2)
            rows.append((depth, len(ids), number, side, answer, answer.strip().startswith(number)))
    progress(len(rows), len(rows), "done")
    return pl.DataFrame(rows, schema=PASSKEY, orient="row")


def hidden(tokenizer: Tokenizer, filler: Sequence[int], context: int, depth: float, number: str) -> list[int]:
    """Return ids of the task and a text, ``context`` tokens in all, with the needle at a depth of the text."""
    task, needle = (list(tokenizer.encode(words, **PLAIN)) for words in (TASK, NEEDLE.format(number)))
    room = context - len(task) - len(needle)
    if room < 1:
        taken = f"the task and the needle, which take {len(task) + len(needle)} tokens"
        raise InputError(f"context={context} has no room for a text beside {taken}: give more.")
    if room > len(filler):
        text = f"the text, which has {len(filler)} tokens"
        raise InputError(f"context={context} is longer than {text}: give a longer text or less.")
    at = round(depth * room)
    return [*task, *filler[:at], *needle, *filler[at:room]]


def written(reader: Reader, tokenizer: Tokenizer, most: int) -> str:
    """Return the model's greedy continuation of the text, at most ``most`` tokens."""
    ids: list[int] = []
    while len(ids) < most and (token := reader.best()) not in stops(tokenizer):
        ids.append(token)
        reader.read([token])
    return str(tokenizer.decode(ids))
