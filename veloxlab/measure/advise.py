"""Advice on which cache to take: those that fit in memory, ranked by losses on the demo model or a loaded one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import inf
from typing import Any

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import checks
from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.checks import TOKENIZER, Check, checked, choice, either, maybe, number_of_bits, real, whole
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure.advice import ADVICE, EXACT, GOALS, Advice, fitted, quantized_bytes, reason
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.known import known_losses
from veloxlab.measure.memory import bytes_of
from veloxlab.measure.planned_memory import CONTEXT, CacheLayout, cache_layouts
from veloxlab.measure.quality import fidelity_to, reference
from veloxlab.models.shapes import MODEL_OR_CONFIG, ModelOrConfig, ModelShape, loaded, shape_of
from veloxlab.progress import Progress, may_end, silent
from veloxlab.runtime import device
from veloxlab.texts import Tokenizer

KEPT = 0.25  # of the memory, for the system, other programs and work space: macOS gives a GPU about three quarters
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SIZE = re.compile(r"\s*(\d+\.?\d*)\s*(?:([kMGT]?)B)?\s*")


def _has_size(value: object) -> bool:
    return isinstance(value, str) and _SIZE.fullmatch(value) is not None


def _bytes(value: str) -> float:
    number, unit = _SIZE.fullmatch(value).groups("G")  # type: ignore[union-attr]
    return real(above=0).read(float(number) * UNITS[unit])  # type: ignore[no-any-return]


SIZE_WORDS = Check('a size such as "16 GB"', _has_size, _bytes)
SIZE = either(real(above=0), SIZE_WORDS)


@checked(
    model_or_config=MODEL_OR_CONFIG,
    tokenizer=maybe(TOKENIZER),
    context=CONTEXT,
    memory=maybe(SIZE),
    goal=choice(*GOALS),
    weights=maybe(SIZE),
    weight_bits=whole(1, 32),
    most=whole(1),
    measured=maybe(checks.measured(ADVICE, "vl.advise")),
)
def advise(
    model_or_config: ModelOrConfig,
    tokenizer: Tokenizer | None = None,
    *,
    context: int | str = 32_768,
    memory: str | float | None = None,
    goal: str = "chat",
    batch: int = 1,
    weights: str | float | None = None,
    weight_bits: int = 4,
    tokens: int = 256,
    most: int = 3,
    measured: pl.DataFrame | None = None,
    progress: Progress = silent,
) -> Advice:
    """Recommend a cache: the one with the least loss of those that fit in memory.

    Bytes are those of the layout (`plan_memory`). Losses are predicted from the committed results of SmolLM2-135M.
    These rank caches; the losses of other models have other sizes. With a loaded model and its ``tokenizer``, the
    ``most`` first that fit are measured on it, over ``tokens`` tokens, after a calibration if the method needs one.
    Raises `InputError`: as `plan_memory`; or if a typed-in shape comes without ``weights``.

    Parameters
    ----------
    model_or_config : a model, a ``config.json`` or its folder, a `veloxlab.models.ModelShape`, or a usual size, such as
        ``"8B, as Llama 3.1"`` or ``"llama 8b"``.
    context, batch : tokens of each sequence, such as 32768 or ``"32k"``; and sequences.
    memory : of the machine, in bytes or as ``"16 GB"`` or ``"16"`` (10^9 bytes); by default this device's. A
        quarter of it is kept for the system.
    goal : a name in `GOALS`, which has the acceptable loss in nats a token.
    weights : their bytes, or a text such as ``"4.5 GB"``; by default those of the loaded model, or of a configuration
        at ``weight_bits`` bits.
    measured : earlier `ADVICE` rows of this model; its measurements are reused.
    """
    model_or_config = loaded(model_or_config)
    if tokenizer is not None and not isinstance(model_or_config, Module):
        raise InputError("tokenizer is for a loaded model, on which caches are measured: leave it out here.")
    shape = shape_of(model_or_config)
    held = weights_bytes(model_or_config, shape.parameters, weight_bits) if weights is None else int(weights)
    total = int(device().memory_bytes if memory is None else memory)
    room, context = int(total * (1 - KEPT)) - held, int(context)
    assumed = 0 if isinstance(model_or_config, Module) or weights is not None else shape.parameters
    facts = shape.trained_tokens, batch, assumed, weight_bits
    advice = Advice(context, goal, total, held, room, pl.DataFrame(), *facts)

    known = known_losses()
    rows = []
    for layout, found in _candidates(shape, known):
        nbytes, longest = layout.held(context, batch), layout.largest_context(max(advice.room_bytes, 0), batch)
        row = {"held_bytes": nbytes, "most_tokens": longest, "fits": nbytes <= advice.room_bytes, "kind": "predicted"}
        rows.append(row | found)
    before = {} if measured is None else {row["name"]: row for row in measured.filter(kind="measured").to_dicts()}
    for row in rows:
        if row["name"] in before:
            row |= {name: before[row["name"]][name] for name in ("kl_mean", "top1_flips", "kind")}
    rows = _ranked(rows)
    if tokenizer is not None and isinstance(model_or_config, Module):
        _measure(model_or_config, tokenizer, to_measure(rows, most), tokens, progress)
        rows = _ranked(rows)
    return replace(advice, frame=pl.DataFrame([row | {"reason": reason(row, advice)} for row in rows], schema=ADVICE))


def _measure(model: Module, tokenizer: Tokenizer, rows: list[dict[str, Any]], tokens: int, progress: Progress) -> None:
    """Replace predictions by losses measured on this model, with all tokens but sinks in codes."""
    exact = reference(model, tokenizer, tokens=tokens, progress=progress)
    for i, row in enumerate(rows):

        def tell(_: int, __: int, doing: str, i: int = i, name: str = row["name"]) -> None:
            progress(i, len(rows), f"{name}: {doing}")

        settings: dict[str, Any] = {"bits": number_of_bits(row["bits"]), "sinks": DEFAULT_SINKS, "window": 0}
        if fitted(row):
            settings["calibration"] = calibrate(model, tokenizer, row["method"], bits=settings["bits"], progress=tell)
        found = fidelity_to(exact, row["method"], progress=tell, **settings).row(0, named=True)
        row |= {"kl_mean": found["kl_mean"], "top1_flips": found["top1_flips"], "kind": "measured"}


def weights_bytes(model_or_config: ModelOrConfig, parameters: int, bits: int) -> int:
    """Return the bytes of a loaded model's weights, or of ``parameters`` quantized weights."""
    if isinstance(model_or_config, Module):
        return bytes_of(model_or_config.parameters())
    if not parameters:
        raise InputError('A shape that was typed in has no weights: give their size, such as weights="4.5 GB".')
    return quantized_bytes(parameters, bits)


def _candidates(shape: ModelShape, known: dict[str, dict[str, Any]]) -> Iterator[tuple[CacheLayout, dict[str, Any]]]:
    """Yield layouts of the exact cache, mlx-lm's, and ours that lose less than a nat a token, with known losses."""
    _, exact, *theirs = cache_layouts(shape)
    yield exact, {"name": EXACT, "method": None, "kl_mean": 0.0, "top1_flips": 0.0, "kind": "exact"}
    for layout in theirs:
        yield layout, known[layout.name] | {"method": None, "bits": float(layout.name.split()[1])}
    for name, row in known.items():
        may_end()
        method, bits, _ = name.split()
        if method in METHODS and row["kl_mean"] < 1:
            with_bits = number_of_bits(bits)
            try:
                ours, *_ = cache_layouts(shape, method, bits=with_bits)
            except InputError:  # a method that does not support this head dimension
                continue
            yield ours, row | {"method": method, "bits": float(with_bits)}


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows: those that fit first, by loss, then by bytes."""
    return sorted(rows, key=lambda row: (not row["fits"], row["kl_mean"] if row["fits"] else inf, row["held_bytes"]))


def to_measure(rows: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return those of the ``most`` first of our fitting caches without a measurement; ``rows``: ranked `ADVICE`."""
    first = [row for row in rows if row["fits"] and row["method"]][:most]
    return [row for row in first if row["kind"] == "predicted"]
