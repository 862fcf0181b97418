"""Calibration: fits codecs to a model's activations, and keeps them on disk, so that this is done once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from itertools import product
from pathlib import Path

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.cache.calibration import FORMAT, Calibration, Place
from veloxlab.cache.plan import DEFAULT_BITS, DEFAULT_SINKS
from veloxlab.checks import BITS, checked, either, many, whole
from veloxlab.codecs import TENSORS, Codec, Method, Tensor, find_method
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.measure.activations import LayerCapture, capture_layers, first_tokens
from veloxlab.measure.gradients import WINDOW, with_gradients
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in
from veloxlab.texts import Tokenizer, excerpt

USUAL_TOKENS, USUAL_WINDOWS = 1024, 32  # tokens, and windows for gradients
LEAST_TOKENS, LEAST_DISTINCT = 64, 16


@checked(bits=either(BITS, many(BITS)), tokens=whole(LEAST_TOKENS))
def calibrate(
    model: Module,
    tokenizer: Tokenizer,
    method: str,
    text: str | None = None,
    *,
    bits: float | Sequence[float] = DEFAULT_BITS,
    tokens: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress = silent,
    **options: object,
) -> Calibration:
    """Fit a method's codecs to every layer of a model, on the model's activations.

    The result is saved, and reused while everything that it depends on is the same: weights, method and options, text,
    tokens, bits and seed. The activations of one layer at a time are held. A registered method
    (`veloxlab.codecs.register`) is fitted each time, because its code can change. FisherQuant plans the bits of the
    whole model later, so it is fitted once for all widths, to gradients of the loss.

    Times on one core, SmolLM2 (1,024 tokens, float32), for each width: below 20 s for methods that learn channels,
    means or levels, 30 s for SpectralQuant, 45 to 75 s for VecInfer, and 70 to 170 s for CommVQ at 1 to 4 bits.
    FisherQuant takes 130 s or more for its 32 windows, once.
    Raises `InputError`: unknown method or option, bits out of range, a text that is too short or too uniform, or
    activations that are not finite.

    Parameters
    ----------
    text : text that the model reads; by default the WikiText-2 validation excerpt, or, for gradients, the mixed text.
    bits : the width, or all widths, to fit keys and values for; no effect if one fit serves all widths.
    tokens : how much of the text, 64 or more; by default 1,024, or 32 windows of 512 for gradients. SpectralQuant,
        VecInfer and RaBitQ's ``centroid`` learn keys after RoPE, so they fit these positions alone: give as many tokens
        as your longest text has (the default text has some 28,000). A cache warns when it encodes later keys.
    seed : of everything random.
    folder : where to keep the result; by default the user's cache folder. A warning reports a folder without write
    access.
    progress : called for each layer. An exception from it ends the work, and only windows with gradients are saved.
    options : the method's own.
    """
    found, widths = find_method(method), sorted(set(bits) if isinstance(bits, Sequence) else {bits})
    for width, tensor in product(widths, TENSORS):
        found.check(width, tensor, options)
    text = excerpt("calibration" if found.planned else "validation") if text is None else text
    ids = first_tokens(tokenizer, text, tokens or (USUAL_WINDOWS * WINDOW if found.planned else USUAL_TOKENS))
    _check_text(ids)
    read = {"model": fingerprint(model), "text": digest(ids), "tokens": len(ids), "seed": seed}
    of_widths: dict[str, object] = {"bits": [] if found.planned else widths, "options": _as_json(options)}
    facts = {"version": found.version, **read, **of_widths}
    own = {"seed": seed} if seed and "seed" in found.options else {}  # seed of the codec's rotation

    def made() -> Calibration:
        if found.planned:
            place = kept_in("calibrations", folder) / f"windows-{digest({'version': found.version, **read})[:16]}"
            samples = with_gradients(model, _windows(ids), DEFAULT_SINKS, seed, place, progress)
            fitted = _to_gradients(found, samples, options | own)
        else:
            fitted = _to_activations(
                found, capture_layers(model, ids, progress, "fitting"), widths, seed, options | own
            )
        return Calibration(method, facts, dict(fitted))

    if found.codecs:  # registered: a file cannot record the version of the code
        return made()
    key = digest([FORMAT, method, facts])[:16]
    path = kept_in("calibrations", folder) / f"{method}-{key}.safetensors"
    return kept(path, partial(_loaded, facts), made, Calibration.save)


def _to_gradients(
    found: Method, samples: Iterable[tuple[int, Tensor, Sample]], options: Mapping[str, object]
) -> Iterator[tuple[Place, Codec]]:
    """Yield a codec for each layer's keys and values, which serves all widths; both are fitted at the same time."""
    with runtime.blas_shared_by(len(TENSORS)), ThreadPoolExecutor(len(TENSORS)) as pool:
        for pair in zip(*[iter(samples)] * len(TENSORS), strict=True):
            begun = []
            for layer, tensor, sample in pair:
                codec = found.codec(sample.x.shape[-1], found.bits[0], tensor, **options)
                begun.append((layer, tensor, pool.submit(copy_context().run, codec.fit, sample)))
            for layer, tensor, fit in begun:
                yield (layer, tensor, 0), fit.result()


def _to_activations(
    found: Method, layers: Iterable[LayerCapture], widths: Sequence[float], seed: int, options: Mapping[str, object]
) -> Iterator[tuple[Place, Codec]]:
    """Yield a codec for each layer's keys and values, for each width."""
    for seen in layers:
        seen.check_finite("to which nothing can be fitted", "queries", *TENSORS)
        queries = None if seen.queries is None else seen.queries.astype(mx.float32)
        for tensor in TENSORS:
            sample = Sample(seen.vectors(tensor), queries, seen.rope, seed)
            for width in widths:
                codec = found.codec(sample.x.shape[-1], width, tensor, **options)
                yield (seen.layer, tensor, int(width)), codec.fit(sample)


def _windows(ids: Sequence[int]) -> list[Sequence[int]]:
    """Split a text into windows of about `WINDOW` tokens."""
    count = max(1, len(ids) // WINDOW)
    return [ids[i * len(ids) // count : (i + 1) * len(ids) // count] for i in range(count)]


def _loaded(facts: Mapping[str, object], path: Path) -> Calibration:
    calibration = Calibration.load(path)
    if calibration.facts != facts:
        raise InputError(f"The calibration {path} has other content than its name states.")
    return calibration


def _as_json(options: Mapping[str, object]) -> dict[str, object]:
    try:
        return dict(json.loads(json.dumps(options)))
    except (TypeError, ValueError) as error:
        said = f"The options {dict(options)} cannot be written to a calibration's file ({error})"
        raise InputError(f"{said}: give plain numbers and words, or lists and mappings of them.") from None


def _check_text(ids: Sequence[int]) -> None:
    usual = f"give natural text of at least {LEAST_TOKENS} tokens; {USUAL_TOKENS:,} are usual"
    count = f"{len(ids)} token{'s' * (len(ids) != 1)}"
    if len(ids) < LEAST_TOKENS:
        raise InputError(f"The calibration text has {count}, too few to fit anything to: {usual}.")
    if (different := len(set(ids))) < LEAST_DISTINCT:
        said = f"{different} different tokens among {len(ids)}, and at least {LEAST_DISTINCT} are needed"
        raise InputError(f"The calibration text has {said}: {usual}.")
