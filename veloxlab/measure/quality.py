"""Predictions of a model with a compressed cache, compared with those of its own uncompressed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.cache import make
from veloxlab.cache.plan import Chunk, Plan, cache_name, plan_of, tensor_bits
from veloxlab.checks import CACHE_MAKER, CALIBRATIONS, checked, having, whole
from veloxlab.errors import InputError
from veloxlab.measure.activations import stretches
from veloxlab.measure.frames import in_schema, schema
from veloxlab.measure.memory import report
from veloxlab.progress import Progress, silent
from veloxlab.texts import Tokenizer

Mode = Literal["oneshot", "decode"]
CacheMaker = Callable[[Module], list[Any]]

FIDELITY = schema(
    "name mode chunk positions kl_mean kl_median kl_p99 kl_max top1_flips perplexity perplexity_exact key_bits "
    "value_bits held_bits held_bytes table_bytes fp16_bytes"
)
"""Columns of `fidelity` and `fidelity_to`: name of the cache; how it was read, "oneshot" or "decode"; whether tokens of
one call attended to one another "exact" or through their "codes"; compared predictions; KL(exact ‖ compressed) of the
next token in nats; share of predictions whose most likely token changed; perplexity of the text with this cache and
with mlx-lm's own; true bits of a packed value, mean over layers, null for caches of other projects; held bytes · 8 /
held values, with exact tokens and free space; bytes of all layers at the end of a window, of rotations and codebooks,
and of 16-bit keys and values of the same tokens."""

TOKEN_FIDELITY = schema("window position token kl flip nll nll_exact")
"""Columns of `fidelity_to` with ``per_token``: window of the text; position in it of the token that predicts; the
token that came next; KL in nats; whether the most likely token changed; −log p(token) in nats, compressed and exact."""

_OF_EVALUATE = ("mode", "prompt", "chunk", "name", "per_token")  # options that are not for the cache


def log_probabilities(logits: mx.array) -> mx.array:
    """Return log-probabilities of ``logits`` ``[S, vocabulary]``, float32, in nats."""
    logits = logits.astype(mx.float32)
    if runtime.backend() != "cpu":
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    rows = np.array(logits, copy=False).reshape(-1, logits.shape[-1])  # NumPy takes a tenth of MLX's time, by rows too
    with np.errstate(invalid="ignore"):
        sums = [top + np.log(np.exp(row - top).sum()) for row, top in zip(rows, rows.max(axis=-1), strict=True)]
    return logits - mx.array(np.array(sums, np.float32)).reshape(*logits.shape[:-1], 1)


def of_targets(log_probs: mx.array, targets: mx.array) -> mx.array:
    """Return −log p ``[S]`` of the tokens ``[S]`` that came next, in nats."""
    return -mx.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]


def divergence(exact: mx.array, changed: mx.array) -> mx.array:
    """Return KL(exact ‖ changed) ``[S]`` of log-probabilities ``[S, vocabulary]``, in nats; NaN if either is NaN."""
    if runtime.backend() == "cpu":  # as above: a row stays in a core's cache
        rows = (np.array(x, copy=False).reshape(-1, x.shape[-1]) for x in (exact, changed))
        with np.errstate(invalid="ignore"):
            sums = [np.dot(np.exp(p), p - q) for p, q in zip(*rows, strict=True)]
        kl = mx.array(np.array(sums, np.float32)).reshape(exact.shape[:-1])
    else:
        kl = (mx.exp(exact) * (exact - changed)).sum(axis=-1)
    return mx.maximum(kl, 0.0)  # rounding of float32 sums can leave −1e-8; NaN stays


def predicted_bytes(model: Module, lengths: Sequence[int]) -> int:
    """Return the least bytes for log-probabilities over windows of ``lengths``, and for a second run of the last."""
    vocabulary: int = model(mx.array([[0]])).shape[-1]  # builds a graph only
    longest = max(lengths)
    # held together: logits, also in float32, and the compared log-probabilities. On a CPU most logits are in float32,
    # but MLX computes the attention logits of a layer's heads, length times length
    on_cpu = runtime.backend() == "cpu"
    heads: int = getattr(getattr(model, "args", None), "num_attention_heads", 0) if on_cpu else 0
    return 4 * (vocabulary * sum(lengths) + max((2 if on_cpu else 3) * vocabulary * longest, heads * longest**2))


def check_room(model: Module, lengths: Sequence[int]) -> None:
    """Raise `InputError` if the predictions of windows of these ``lengths`` do not fit into memory."""
    needed = predicted_bytes(model, lengths)
    free = runtime.device().memory_bytes - mx.get_active_memory()
    if needed > free:
        tokens = f"{len(lengths)} window{'s' * (len(lengths) > 1)} of up to {max(lengths):,} tokens"
        said = f"The predictions of {tokens} take {needed:,} bytes at least, and {max(0, free):,} are left here"
        raise InputError(f"{said}: take fewer or shorter ones.")


@dataclass(frozen=True)
class Reference:
    """A model's predictions with its own cache, computed once for comparison with many others."""

    model: Module
    stretches: tuple[list[int], ...]  # token ids of each window of the text
    log_probs: tuple[mx.array, ...]  # for each, of the next token [S - 1, vocabulary], float32, in nats

    @classmethod
    def of(cls, model: Module, stretches: Sequence[list[int]], progress: Progress = silent) -> Self:
        """Run the model with its own cache over windows of token ids; raises `InputError` if memory is too small."""
        check_room(model, [len(tokens) for tokens in stretches])
        log_probs = []
        for w, tokens in enumerate(stretches):
            progress(w, len(stretches), f"window {w + 1} of {len(stretches)}: exact")
            log_probs.append(_log_probs(model(mx.array([tokens[:-1]]))))
        return cls(model, tuple(stretches), tuple(log_probs))


@checked(tokens=whole(2))
def reference(
    model: Module,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
    tokens: int = 512,
    windows: int = 1,
    progress: Progress = silent,
) -> Reference:
    """Run the model with its own cache over windows of text, as `fidelity`; a warning reports a short last window."""
    return Reference.of(model, stretches(tokenizer, text, tokens, windows, last=2), progress)


@checked(method_or_plan=CACHE_MAKER, calibration=CALIBRATIONS, tokens=whole(2))
def fidelity(
    model: Module,
    tokenizer: Tokenizer,
    method_or_plan: str | Plan | CacheMaker = "turboquant",
    *,
    text: str | None = None,
    tokens: int = 512,
    windows: int = 1,
    progress: Progress = silent,
    **options: Any,
) -> pl.DataFrame:
    """Compare the model's predictions with a compressed cache and with its own, on the same text: one row, `FIDELITY`.

    Raises `InputError`: as `fidelity_to`; or if the text is too short, or the predictions do not fit into memory.

    Parameters
    ----------
    method_or_plan : a method's id or a `veloxlab.Plan`, as for `veloxlab.make_cache`; or any function from the model
        to a prompt cache, such as one that makes mlx-lm's ``QuantizedKVCache``.
    text : the shipped WikiText-2 test excerpt by default.
    tokens, windows : length and number of windows of text, one after the other, each with a new cache.
    options : those of `fidelity_to`, and further arguments of `veloxlab.make_cache`, such as ``bits``, ``window`` and
        ``seed``, which is for random parts of the codec; for a fitted codec, give the seed to `veloxlab.calibrate`.
    """
    make_one = maker(method_or_plan, {n: v for n, v in options.items() if n not in _OF_EVALUATE})
    if not callable(method_or_plan):
        make_one(model)  # raises for wrong settings before the model runs
    exact = reference(model, tokenizer, text=text, tokens=tokens, windows=windows, progress=progress)
    return fidelity_to(exact, method_or_plan, progress=progress, **options)


@checked(
    method_or_plan=CACHE_MAKER,
    calibration=CALIBRATIONS,
    exact=having("the result of vl.measure.reference", "stretches", "log_probs"),
)
def fidelity_to(
    exact: Reference,
    method_or_plan: str | Plan | CacheMaker = "turboquant",
    *,
    mode: Mode = "oneshot",
    prompt: int = 64,
    chunk: Chunk = "codes",
    name: str | None = None,
    per_token: bool = False,
    progress: Progress = silent,
    **settings: object,
) -> pl.DataFrame:
    """Compare a compressed cache with an existing `reference`: one row, `FIDELITY`.

    Raises `InputError`: as `veloxlab.make_cache`; or if ``prompt`` leaves nothing to decode.

    Parameters
    ----------
    method_or_plan : as for `fidelity`; ``settings`` are further arguments of `veloxlab.make_cache`.
    mode : ``"oneshot"`` reads each window in one call; ``"decode"`` reads ``prompt`` tokens in one call, then feeds the
        true tokens one at a time, as generation would, and compares those predictions only.
    chunk : as for `veloxlab.make_cache`, but ``"codes"`` by default, also for plans: every token is then seen as the
        cache holds it. With ``"exact"``, a one-shot run only compares an exact window with itself.
    name : of the row; by default the method and its bits.
    per_token : return one row for each prediction, `TOKEN_FIDELITY`, instead of their summary.
    """
    given: dict[str, Any] = {"mode": mode, "prompt": prompt, "chunk": chunk, "name": name, "progress": progress}
    row, tokens = both(exact, method_or_plan, **given | settings)
    return tokens if per_token else row


def both(
    exact: Reference,
    method_or_plan: str | Plan | CacheMaker,
    *,
    mode: Mode = "oneshot",
    prompt: int = 64,
    chunk: Chunk = "codes",
    name: str | None = None,
    progress: Progress = silent,
    **settings: object,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return both results of `fidelity_to` from one run: `FIDELITY`, one row, and `TOKEN_FIDELITY`, by prediction."""
    method_or_plan = plan_of(method_or_plan)
    shortest = min(len(tokens) for tokens in exact.stretches)
    if mode == "decode" and not 1 <= prompt < shortest - 1:
        raise InputError(f"prompt={prompt} leaves nothing to decode of {shortest} tokens: take fewer, at least 1.")
    make = maker(method_or_plan, settings, chunk=chunk)
    start, windows = prompt if mode == "decode" else 0, len(exact.stretches)
    frames, cache = list[pl.DataFrame](), list[Any]()
    for w, (tokens, log_probs) in enumerate(zip(exact.stretches, exact.log_probs, strict=True)):
        cache = make(exact.model)
        progress(w, windows, f"window {w + 1} of {windows}: compressed")
        if start:
            mx.eval(exact.model(mx.array([tokens[:start]]), cache=cache))
        changed = []
        calls = [[token] for token in tokens[start:-1]] if start else [tokens[:-1]]
        for i, ids in enumerate(calls):
            changed.append(_log_probs(exact.model(mx.array([ids]), cache=cache)))
            if start:
                progress(i + 1, len(calls), f"window {w + 1} of {windows}: decoding")
        frames.append(_rows(w, start, tokens[start + 1 :], log_probs[start:], mx.concatenate(changed)))
    progress(windows, windows, "done")
    frame = pl.concat(frames)
    chunk_said = None if callable(method_or_plan) else chunk
    head = pl.DataFrame({"name": [name or _name(method_or_plan, settings)], "mode": [mode], "chunk": [chunk_said]})
    return in_schema(pl.concat([head, _summary(frame, cache)], how="horizontal"), FIDELITY), frame


def judged(
    exact: Reference, logits: Iterable[mx.array], *, name: str, mode: Mode, held_bytes: int, **sizes: int
) -> pl.DataFrame:
    """Compare logits ``[S - 1, vocabulary]`` of each window, made elsewhere, with a `reference`: one row, `FIDELITY`.

    ``held_bytes``: of a window's tokens in all layers. ``sizes``: its ``table_bytes`` and ``fp16_bytes``.
    """
    windows = enumerate(zip(exact.stretches, exact.log_probs, logits, strict=True))
    frame = pl.concat(_rows(w, 0, ids[1:], own, log_probabilities(theirs)) for w, (ids, own, theirs) in windows)
    head = {"name": name, "mode": mode, "held_bytes": held_bytes, "held_bits": 16 * held_bytes / sizes["fp16_bytes"]}
    held = pl.DataFrame(head | sizes)
    return in_schema(pl.concat([_predicted(frame), held], how="horizontal"), FIDELITY)


def _summary(frame: pl.DataFrame, cache: list[Any]) -> pl.DataFrame:
    layers, sums = report(cache), pl.col("held_bytes", "fp16_bytes").sum()
    tables = layers.filter(path="shared")["held_bytes"].sum()
    held = layers.filter(pl.col("tokens") > 0).select(pl.col("key_bits", "value_bits").mean(), sums)
    held = held.with_columns(held_bits=16 * pl.col("held_bytes") / pl.col("fp16_bytes"), table_bytes=pl.lit(tables))
    return pl.concat([_predicted(frame), held], how="horizontal")


def _predicted(frame: pl.DataFrame) -> pl.DataFrame:
    kl = pl.col("kl")
    return frame.select(
        positions=pl.len(),
        kl_mean=kl.mean(),
        kl_median=kl.median(),
        kl_p99=kl.quantile(0.99),
        kl_max=kl.nan_max(),  # `max` ignores NaN
        top1_flips=pl.col("flip").mean(),
        perplexity=pl.col("nll").mean().exp(),
        perplexity_exact=pl.col("nll_exact").mean().exp(),
    )


def maker(method_or_plan: str | Plan | CacheMaker, settings: Mapping[str, object], **usual: Chunk) -> CacheMaker:
    """Return a cache's maker with ``settings`` and defaults ``usual``; `InputError` for a function with settings."""
    if callable(method_or_plan):
        if settings:
            raise InputError(f"A cache of your own takes no settings, but {sorted(settings)[0]!r} was given.")
        return method_or_plan
    return lambda model: make.make_cache(model, method_or_plan, **usual, **settings)  # type: ignore[arg-type]


def _name(method_or_plan: str | Plan | CacheMaker, settings: dict[str, object]) -> str:
    if not isinstance(method_or_plan, str):
        return getattr(method_or_plan, "name", None) or type(method_or_plan).__name__
    given = (settings.get(name) for name in ("bits", "key_bits", "value_bits"))
    return cache_name(method_or_plan, tensor_bits(method_or_plan, 16, *given))  # type: ignore[arg-type]


def _log_probs(logits: mx.array) -> mx.array:
    """Return `log_probabilities` of the one sequence of ``logits`` ``[1, S, vocabulary]``, evaluated."""
    log_probs = log_probabilities(logits[0])
    mx.eval(log_probs)
    return log_probs


def _rows(window: int, start: int, targets: list[int], exact: mx.array, changed: mx.array) -> pl.DataFrame:
    columns = {
        "kl": divergence(exact, changed),
        "flip": exact.argmax(axis=-1) != changed.argmax(axis=-1),
        "nll": of_targets(changed, mx.array(targets)),
        "nll_exact": of_targets(exact, mx.array(targets)),
    }
    place = {"window": window, "position": np.arange(start, start + len(targets)), "token": targets}
    return in_schema(pl.DataFrame(place | {name: np.array(c) for name, c in columns.items()}), TOKEN_FIDELITY)
