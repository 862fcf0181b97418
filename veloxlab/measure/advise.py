"""Advice on which cache to take: those that fit in memory, ranked by losses on the demo model or a loaded one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import checks
from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.checks import (
    TOKENIZER,
    Check,
    checked,
    choice,
    either,
    maybe,
    number_of_bits,
    number_of_tokens_up_to,
    real,
    whole,
)
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.frames import schema
from veloxlab.measure.known import DEMO, known_losses
from veloxlab.measure.memory import bytes_of
from veloxlab.measure.planned_memory import MOST_TOKENS, CacheLayout, cache_layouts
from veloxlab.measure.quality import fidelity_to, reference
from veloxlab.models.shapes import MODEL_OR_CONFIG, ModelOrConfig, ModelShape, loaded, shape_of
from veloxlab.progress import Progress, may_end, silent
from veloxlab.runtime import device
from veloxlab.texts import Tokenizer

ADVICE = schema("name method bits held_bytes most_tokens fits kl_mean top1_flips kind reason")
"""Columns of `Advice.frame`: a cache, its method and bits (null for the exact one and mlx-lm's); bytes at the requested
context, and the most tokens that fit; mean KL divergence in nats, and the share of tokens with another top-1 token;
"measured" on this model, "predicted" from the demo model's results, or "exact"; and the reason."""

GOALS = {"chat": 0.05, "retrieval": 0.02, "draft": 0.2}
"""Loss in nats a token that a use can accept: our choice, not measured on that use. On SmolLM2-135M, one token in nine
has another first choice at .05, and one in four at .2."""

KEPT = 0.25  # of the memory, for the system, other programs and work space: macOS gives a GPU about three quarters
OVERHEAD_BITS = 0.5  # of a quantized weight: a scale and a bias of 16 bits for 64
EXACT = "fp16"
NARROWER = (8, 6, 5, 4, 3, 2)  # bits of weights that MLX quantizes to
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SIZE = re.compile(r"\s*(\d+\.?\d*)\s*(?:([kMGT]?)B)?\s*")


def _has_size(value: object) -> bool:
    return isinstance(value, str) and _SIZE.fullmatch(value) is not None


def _bytes(value: str) -> float:
    number, unit = _SIZE.fullmatch(value).groups("G")  # type: ignore[union-attr]
    return real(above=0).read(float(number) * UNITS[unit])  # type: ignore[no-any-return]


CONTEXT = number_of_tokens_up_to(MOST_TOKENS)
SIZE_WORDS = Check('a size such as "16 GB"', _has_size, _bytes)
SIZE = either(real(above=0), SIZE_WORDS)


@dataclass(frozen=True)
class Advice:
    """Result of `advise`. As the last line of a cell it shows sentences, a table and code."""

    context: int  # tokens of each sequence
    goal: str
    memory_bytes: int
    weights_bytes: int
    room_bytes: int  # for the cache: memory without weights, system and other programs
    frame: pl.DataFrame  # `ADVICE`: one row for each cache, best first
    trained_tokens: int = 0  # trained context length; 0 if unknown
    batch: int = 1  # sequences
    parameters: int = 0  # weights of a configuration, of which the bytes are assumed; 0 if the bytes are known
    weight_bits: int = 0  # the assumption

    @property
    def best(self) -> dict[str, Any]:
        """The first row, which is the recommended cache if it fits."""
        return self.frame.row(0, named=True)

    @property
    def code(self) -> str:
        """Python code that makes that cache."""
        name, method, bits = (self.best[key] for key in ("name", "method", "bits"))
        if name == EXACT:
            return "from mlx_lm.models.cache import make_prompt_cache\n\ncache = make_prompt_cache(model)"
        if method is None:
            return f"mlx_lm.generate(model, tokenizer, prompt, kv_bits={bits:g})"
        given = f"model, {method!r}, bits={bits:g}"
        if fitted(self.best):
            first = f"calibration = vl.calibrate(model, tokenizer, {method!r}, bits={bits:g})\n"
            return f"{first}cache = vl.make_cache({given}, calibration=calibration)"
        return f"cache = vl.make_cache({given})"

    def __str__(self) -> str:
        """Use of the memory, the recommended cache with the reason, and the code."""
        system = self.memory_bytes - self.weights_bytes - self.room_bytes
        left = max(self.room_bytes, 0)
        assumed = f"for {self.weight_bits}-bit weights" if self.parameters else "for the weights"
        uses = ((self.weights_bytes, assumed), (system, "for the system"), (left, "for the cache"))
        shares = ", ".join(f"{_said(nbytes)} {use}" for nbytes, use in uses)
        lines = [f"{_said(self.memory_bytes)} of memory: {shares}."]
        if 0 < self.trained_tokens < self.context:
            trained = f"The model was trained for texts of up to {self.trained_tokens:,} tokens"
            lines.append(f"{trained}: its output in a context of {self.context:,} is not reliable.")
        sequences = f"{self.batch:,} sequences of " if self.batch > 1 else ""
        held = f"for {sequences}{self.context:,} tokens"
        verdict = f"Take {self.best['name']} {held}"
        if not self.best["fits"]:
            verdict = f"No cache fits {held}; the smallest is {self.best['name']}"
        lines.append(f"{verdict}: {self.best['reason']}")
        lines += filter(None, [self.with_narrower_weights])
        at_once = next((row for row in self.frame.to_dicts() if row["fits"] and not fitted(row)), self.best)
        if at_once["name"] != self.best["name"]:
            lines.append(f"Without a calibration, {at_once['name']}: {at_once['reason']}")
        return "\n".join([*lines, "", self.code])

    @property
    def with_narrower_weights(self) -> str:
        """If no cache fits beside assumed weights, a sentence: what fits beside weights of fewer bits."""
        if self.best["fits"] or not self.parameters:
            return ""
        for bits in (bits for bits in NARROWER if bits < self.weight_bits):
            room = self.room_bytes + self.weights_bytes - quantized_bytes(self.parameters, bits)
            if fitting := [row for row in self.frame.to_dicts() if row["held_bytes"] <= room]:
                best = min(fitting, key=lambda row: (row["kl_mean"], row["held_bytes"]))
                return f"With {bits}-bit weights, {best['name']} fits."
        return "Fewer bits for the weights do not help: take a shorter context or more memory."

    @property
    def note(self) -> str:
        """What the table's most tokens and losses are."""
        said = f"Predicted losses are those of {DEMO}; other models lose other amounts."
        if self.trained_tokens:
            said = f"{said} Most tokens counts memory only: the model was trained for {self.trained_tokens:,} tokens."
        return said

    @property
    def table(self) -> str:
        """All caches as a Markdown table, best first."""
        lines = [
            "| cache | held, MB | most tokens | fits | KL (nats) | top-1 flips | loss is |",
            "|---|---:|---:|---|---:|---:|---|",
        ]
        for row in self.frame.to_dicts():
            fits = "yes" if row["fits"] else "no"
            lost = f"{row['kl_mean']:.4f} | {row['top1_flips']:.1%} | {loss_source(row)}"
            sizes = f"{row['held_bytes'] / 1e6:,.1f} | {row['most_tokens']:,} | {fits}"
            lines.append(f"| {row['name']} | {sizes} | {lost} |")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{self}\n\n{self.table}\n\n{self.note}"

    def _repr_markdown_(self) -> str:
        said = str(self).split("\n\n", maxsplit=1)[0].replace("\n", "  \n")
        return f"{said}\n\n{self.table}\n\n{self.note}\n\n```python\n{self.code}\n```"


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
    return replace(advice, frame=pl.DataFrame([row | {"reason": _reason(row, advice)} for row in rows], schema=ADVICE))


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


def quantized_bytes(parameters: int, bits: int) -> int:
    """Return the bytes of ``parameters`` weights of ``bits`` bits, with their scales."""
    return int(parameters * (bits + OVERHEAD_BITS * (bits < 16)) / 8)


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


def _reason(row: dict[str, Any], advice: Advice) -> str:
    takes = f"it takes {_said(row['held_bytes'])}"
    if not row["fits"]:
        return f"{takes}, and there are {_said(max(advice.room_bytes, 0))}, enough for {row['most_tokens']:,} tokens."
    if row["name"] == EXACT:
        return f"{takes}, and loses nothing."
    where = "on this model" if row["kind"] == "measured" else f"on {DEMO}"
    lost = f"loses {row['kl_mean']:.3f} nats a token {where}, where {row['top1_flips']:.0%} have another first choice"
    limit = GOALS[advice.goal]
    if row["method"] and row["kind"] == "predicted" and row["sinks"] < DEFAULT_SINKS:
        lost += f", without the {DEFAULT_SINKS} sinks that this cache has"
    verdict = "" if row["kl_mean"] <= limit else f": more than the limit of {limit} for {advice.goal}"
    return f"{takes}, and {lost}{verdict}.{' It needs a calibration, once.' if fitted(row) else ''}"


def loss_source(row: dict[str, Any]) -> str:
    """Where the loss in a row of `ADVICE` is from."""
    kind: str = row["kind"]
    return {"predicted": f"predicted from {DEMO}", "measured": "measured on this model"}.get(kind, kind)


def fitted(row: dict[str, Any]) -> bool:
    """Whether the cache of a row of `ADVICE` needs a calibration."""
    return row["method"] is not None and METHODS[row["method"]].calibrated


def _said(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
