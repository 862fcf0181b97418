"""Caches in use, on SmolLM2: ``python -m tests.surprises_in_use [EXPERIMENT ...]`` adds missing rows.

Passkeys, sampled texts, reused prompt caches, speculative decoding, adapters and 8,192 tokens. A row, with its
settings and results, is written to ``data/results/surprises_in_use.ndjson`` after its measurement. The earlier
guesses are in ``surprises_guesses.json``. Texts, model and sizes are those of `tests.surprises_results`.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import numpy as np

from tests.surprises_adapters import adapters
from tests.surprises_drafts import drafts
from tests.surprises_results import ANSWER, PROMPT, PROMPTS, model
from veloxlab.allocate import AverageBits, RateBudget
from veloxlab.cache.counts import CHUNK
from veloxlab.measure.activations import first_tokens, stretches
from veloxlab.measure.generation import DIGITS, PLAIN, QUESTION, Reader, hidden
from veloxlab.measure.quality import divergence, log_probabilities, of_targets
from veloxlab.mlxlm.probe import own_cache
from veloxlab.mlxlm.quantized import quantized_cache
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FOLDER = shipped_folder("data") / "results"
FILE = FOLDER / "surprises_in_use.ndjson"
CODES: dict[str, Any] = {"sinks": 0, "window": 0, "chunk": "codes"}  # as for the greedy texts
METHODS = ("turboquant", "ratequant", "fisherquant", "commvq", "mlx-lm")
BEHIND_4096 = [("none", 16), ("fisherquant", 2), ("turboquant", 4), ("mlx-lm", 4)]  # they take 3 CPU minutes a text
DEPTHS = 10
TEMPERATURE = 0.7
SAMPLED = [*product(["turboquant"], [2, 3, 4]), ("rabitq", 4), ("mlx-lm", 4), ("mlx-lm", 8)]
PREFIX, NEW, ENDING = 256, 16, 128  # tokens: common prefix, new text, ending that is trimmed between
LONG, ALONE, CALL = 8192, 1024, 512  # tokens of a long text, of its windows, and of one call
IN_LONG = [("turboquant", 2), ("turboquant", 4), ("fisherquant", 2), ("mlx-lm", 4)]
ALL_IN_LONG = [
    (method, bits) for method, bits in product(vl.codecs.METHODS, (2, 3, 4)) if bits in vl.codecs.METHODS[method].bits
]
RELEARNED = [("spectralquant", 4), ("vecinfer", 4)]  # calibrated with as many tokens
Row = dict[str, Any]


def made(method: str, bits: int, **settings: Any) -> list[Any]:
    """Return an empty cache for the model. RateQuant gets the bytes of the same bits for each head."""
    net, tokenizer = model()
    if method == "none":
        return own_cache(net)
    if method == "mlx-lm":
        return quantized_cache(net, bits)
    if method == "ratequant":
        rates = RateBudget.load(FOLDER / "rates_smollm2-135m.json")
        return vl.make_cache(net, rates.plan(AverageBits(bits + 0.25)), **{"sinks": 4, "window": 64} | settings)
    fitted = vl.codecs.METHODS[method].calibrated
    tokens = settings.pop("calibrated", None)
    basis = {"basis": settings["basis"]} if "basis" in settings else {}
    calibration = vl.calibrate(net, tokenizer, method, bits=bits, tokens=tokens, **basis) if fitted else None
    return vl.make_cache(net, method, bits=bits, calibration=calibration, **settings)


# passkeys -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def with_passkey(context: int, depth: int) -> tuple[list[int], list[int], list[int], list[Any]]:
    """Return the text after its first call, the question, the answer, and the exact cache after that call."""
    net, tokenizer = model()
    number = str(np.random.default_rng([context, depth]).integers(10 ** (DIGITS - 1), 10**DIGITS))
    ids = hidden(tokenizer, first_tokens(tokenizer, None, context, **PLAIN), context, depth / DEPTHS, number)
    question, answer = (list(tokenizer.encode(words, **PLAIN)) for words in (QUESTION, f" {number}"))
    first = min(CHUNK, context - 1)
    return ids[first:], question, answer, Reader(net, own_cache(net)).read(ids[:first]).cache


def hand_over(exact: list[Any], cache: list[Any]) -> None:
    """Store in an empty cache the tokens that the exact one holds."""
    for own, ours in zip(exact, cache, strict=True):
        ours.update_and_fetch(*own.keys_and_values())
    mx.eval([ours.state for ours in cache])


def passkey(context: int, depth: int, method: str, bits: int) -> Row:
    """Return nats of the answer, and whether each of its tokens is the most probable one. Default sinks and window.

    The first 2,048 tokens of a prompt are read in one call, whose tokens see each other exactly: their keys and
    values are those of the exact cache, for every cache. Each cache reads the others in another call.
    """
    rest, question, answer, exact = with_passkey(context, depth)
    cache = copy.deepcopy(exact) if method == "none" else made(method, bits)
    if method != "none":
        hand_over(exact, cache)
    if len(rest) > 1:
        Reader(model()[0], cache).read(rest[:-1])
    logits = model()[0](mx.array([[rest[-1], *question, *answer[:-1]]]), cache=cache)[0, -len(answer) :]
    said, wanted = log_probabilities(logits), mx.array(answer)
    return {"nll": of_targets(said, wanted).sum().item(), "hit": (said.argmax(axis=-1) == wanted).all().item()}


def passkeys() -> Iterator[Row]:
    """Yield first the losses of two bits, 1,024 tokens before 2,048, all caches of a text together; 4,096 last."""
    for context, widths in product((1024, 2048), ((16, 2), (3, 4))):
        every = [cache for bits in widths for cache in ([("none", 16)] if bits == 16 else product(METHODS, [bits]))]
        for depth, (method, bits) in product(range(DEPTHS), every):
            yield {"context": context, "depth": depth, "method": method, "bits": bits}
    for depth, (method, bits) in product([*range(0, DEPTHS, 2), *range(1, DEPTHS, 2)], BEHIND_4096):
        yield {"context": 4096, "depth": depth, "method": method, "bits": bits}


# sampled texts --------------------------------------------------------------------------------------------------------


def drawn(logits: mx.array, part: int) -> tuple[mx.array, mx.array]:
    """Draw tokens with a seed from ``logits`` ``[S, vocabulary]``: by rows, as mlx-lm's sampler does, and by vectors.

    MLX has two ways to draw (``findings/mlx_draws_from_rows_by_another_way.sh``).
    """
    keys = [mx.random.key(part * ANSWER + step) for step in range(len(logits))]
    warm = [row / TEMPERATURE for row in logits]
    of_rows = [mx.random.categorical(row[None], key=key)[0] for row, key in zip(warm, keys, strict=True)]
    return mx.stack(of_rows), mx.stack(
        [mx.random.categorical(row, key=key) for row, key in zip(warm, keys, strict=True)]
    )


@lru_cache(maxsize=1)
def sampled_texts() -> list[list[int]]:
    """Return the prompts of the greedy texts, each continued by tokens that are sampled with the exact cache."""
    net, tokenizer = model()
    ids = mx.array(stretches(tokenizer, None, PROMPT, PROMPTS))
    state, read, texts = own_cache(net), ids, [ids]
    for step in range(ANSWER):
        warm = net(read, cache=state)[:, -1] / TEMPERATURE
        keys = [mx.random.key(part * ANSWER + step) for part in range(PROMPTS)]
        read = mx.stack([mx.random.categorical(warm[part][None], key=key) for part, key in enumerate(keys)])
        mx.eval(read)
        texts.append(read)
    found: Any = mx.concatenate(texts, axis=1).tolist()
    return [list(text) for text in found]


def predicted(ids: list[int], cache: list[Any]) -> mx.array:
    """Return log-probabilities of the tokens after the prompt, in one call."""
    return log_probabilities(model()[0](mx.array([ids[:-1]]), cache=cache)[0, PROMPT - 1 :])


@lru_cache(maxsize=1)
def exactly_predicted(part: int) -> mx.array:
    return predicted(sampled_texts()[part], own_cache(model()[0]))


def sampled(part: int, method: str, bits: int) -> Row:
    """Return how often a cache samples another token than the exact one with one seed, and where first (or null)."""
    ids, exact = sampled_texts()[part], exactly_predicted(part)
    said = predicted(ids, made(method, bits, **({} if method == "mlx-lm" else CODES)))
    rows, vectors = (np.array(ours != own) for ours, own in zip(drawn(said, part), drawn(exact, part), strict=True))
    first = {"parted": rows, "parted_of_vectors": vectors}
    return {
        "kl": divergence(exact, said).mean().item(),
        **{name: int(other.argmax()) if other.any() else None for name, other in first.items()},
        **{name.replace("parted", "differs"): float(other.mean()) for name, other in first.items()},
    }


def all_sampled() -> Iterator[Row]:
    for part, (method, bits) in product(range(PROMPTS), SAMPLED):
        yield {"part": part, "method": method, "bits": bits}


# reused prompt caches ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def with_ending(part: int) -> tuple[list[int], list[int], list[int], mx.array]:
    """Return a prefix, the text after it, another ending, and the exact cache's predictions after the prefix."""
    net, tokenizer = model()
    ids = stretches(tokenizer, None, PREFIX + NEW + ENDING, part + 1)[part]
    prefix, new, ending = ids[:PREFIX], ids[PREFIX : PREFIX + NEW], ids[PREFIX + NEW :]
    return prefix, new, ending, log_probabilities(net(mx.array([prefix + new]))[0, PREFIX:])


def reuse(part: int, bits: int, window: int, trimmed: bool) -> Row:
    """Return the loss of new tokens after a prefix, with a cache that has read and trimmed another ending, or not."""
    prefix, new, ending, exact = with_ending(part)
    reader = Reader(model()[0], made("turboquant", bits, window=window)).read(prefix)
    if trimmed:
        for layer in reader.read(ending).cache:
            layer.trim(ENDING)
    kl = divergence(exact, log_probabilities(reader.model(mx.array([new]), cache=reader.cache)[0]))
    return {"kl": kl.mean().item()}


def all_reused() -> Iterator[Row]:
    for part, bits, window, trimmed in product(range(4), (2, 4), (0, 64), (False, True)):
        if window or part < 2:  # without a window both caches are the same
            yield {"part": part, "bits": bits, "window": window, "trimmed": trimmed}


# a long text ----------------------------------------------------------------------------------------------------------


def read_in_calls(first: int, count: int, cache: list[Any]) -> Iterator[mx.array]:
    """Yield log-probabilities after ``count`` tokens of the text, from ``first`` on: an array for each call."""
    net, tokenizer = model()
    ids = first_tokens(tokenizer, None, LONG, **PLAIN)[first : first + count]
    for start in range(0, count, CALL):
        said = log_probabilities(net(mx.array([ids[start : start + CALL]]), cache=cache)[0])
        mx.eval(said)
        mx.clear_cache()
        print(f"  {start + CALL} of {count} tokens", flush=True)
        yield said


@lru_cache(maxsize=1)
def exactly_read(first: int, count: int) -> list[mx.array]:
    return [*read_in_calls(first, count, own_cache(model()[0]))]  # 1.6 GB for the whole text


def losses(first: int, count: int, method: str, bits: int, **settings: Any) -> Row:
    """Return the mean loss of each call's tokens. All but sinks are read through codes."""
    cache = made(method, bits, **({} if method == "mlx-lm" else {"window": 0, "chunk": "codes", **settings}))
    both = zip(exactly_read(first, count), read_in_calls(first, count, cache), strict=True)
    return {"kl": [divergence(exact, said).mean().item() for exact, said in both]}


def longest() -> Iterator[Row]:
    """Yield windows of the text alone, its end first, and then the whole text."""
    alone = [(first, ALONE) for first in range(LONG - ALONE, 0, -2 * ALONE)]
    for (first, count), (method, bits) in product([*alone, (0, LONG)], IN_LONG):
        yield {"first": first, "count": count, "method": method, "bits": bits}
    for first, count in (alone[0], (0, LONG)):  # not guessed: asked after FisherQuant's loss was seen to grow
        yield {"first": first, "count": count, "method": "fisherquant", "bits": 2, "basis": "before_rope"}
    for (first, count), (method, bits) in product((alone[0], (0, LONG)), ALL_IN_LONG):
        if (method, bits) not in IN_LONG:
            yield {"first": first, "count": count, "method": method, "bits": bits}
    for (first, count), (method, bits) in product((alone[0], (0, LONG)), RELEARNED):  # not guessed either
        yield {"first": first, "count": count, "method": method, "bits": bits, "calibrated": LONG}


# the runner -----------------------------------------------------------------------------------------------------------

Measure = Callable[..., Row]
EXPERIMENTS: dict[str, tuple[Callable[[], Iterator[Row]], Measure]] = {
    "reuse": (all_reused, reuse),
    "sampled": (all_sampled, sampled),
    "drafts": drafts,
    "passkeys": (passkeys, passkey),
    "adapters": adapters,
    "longest": (longest, losses),
}


def kept() -> list[Row]:
    """Return the existing rows."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def missing(names: list[str], known: list[Row]) -> Iterator[tuple[Measure, Row]]:
    """Yield the missing measurements of the named experiments, or of all, in their order."""
    there = [row["asked"] for row in known]
    for name, (every, measure) in EXPERIMENTS.items():
        if name in names or not names:
            yield from ((measure, row) for job in every() if (row := {"experiment": name} | job) not in there)


def main(names: list[str]) -> None:
    """Measure the missing rows of the named experiments, or of all."""
    known = kept()
    for measure, asked in missing(names, known):
        begun = time.process_time()
        found = measure(**{name: value for name, value in asked.items() if name != "experiment"})
        row = {"asked": asked, "found": found | {"cpu_seconds": round(time.process_time() - begun, 1)}}
        known = [*kept(), row]  # another process may measure another experiment
        write_atomically(FILE, ("\n".join(json.dumps(one) for one in known) + "\n").encode())
        print(json.dumps(row)[:200], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
