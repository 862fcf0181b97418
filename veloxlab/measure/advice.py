"""An advice on caches as sentences, as a Markdown table and as code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.cache.reach import others
from veloxlab.checks import number_of_bits
from veloxlab.codecs import METHODS
from veloxlab.measure.calibrate import USUAL_TOKENS
from veloxlab.measure.frames import schema
from veloxlab.measure.known import DEMO

ADVICE = schema("name method bits held_bytes most_tokens fits kl_mean top1_flips kind reason")
"""Columns of `Advice.frame`: a cache, its method and bits (null for the exact one and mlx-lm's); bytes at the requested
context, and the most tokens that fit; mean KL divergence in nats, and the share of tokens with another top-1 token;
"measured" on this model, "predicted" from the demo model's results, or "exact"; and the reason."""

GOALS = {"chat": 0.05, "retrieval": 0.02, "draft": 0.2}
"""Loss in nats a token that a use can accept: our choice, not measured on that use. On SmolLM2-135M, one token in nine
gets another first choice at .05, and one in four at .2."""

OVERHEAD_BITS = 0.5  # of a quantized weight: a scale and a bias of 16 bits for 64
EXACT = "fp16"
_ANY_DIM = 128  # a head dimension that all methods support
NARROWER = (8, 6, 5, 4, 3, 2)  # bits of weights that MLX quantizes to


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
            further = beyond(self.best, self.context)
            own = f", {further[1]}" if further else ""
            first = f"calibration = vl.calibrate(model, tokenizer, {method!r}, bits={bits:g}{own})\n"
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


def quantized_bytes(parameters: int, bits: int) -> int:
    """Return the bytes of ``parameters`` weights of ``bits`` bits, with their scales."""
    return int(parameters * (bits + OVERHEAD_BITS * (bits < 16)) / 8)


def reason(row: dict[str, Any], advice: Advice) -> str:
    """Return why to take, or not to take, the cache of a row of `ADVICE`, in one sentence or two."""
    takes = f"it takes {_said(row['held_bytes'])}"
    if not row["fits"]:
        return f"{takes}, and there are {_said(max(advice.room_bytes, 0))}, enough for {row['most_tokens']:,} tokens."
    if row["name"] == EXACT:
        return f"{takes}, and loses nothing."
    where = "on this model" if row["kind"] == "measured" else f"on {DEMO}"
    flips = f"{row['top1_flips']:.0%} of tokens get another first choice"
    lost = f"loses {row['kl_mean']:.3f} nats a token {where}, where {flips}"
    limit = GOALS[advice.goal]
    if row["method"] and row["kind"] == "predicted" and row["sinks"] < DEFAULT_SINKS:
        lost += f", without the {DEFAULT_SINKS} sinks that this cache has"
    verdict = "" if row["kl_mean"] <= limit else f": more than the limit of {limit} for {advice.goal}"
    said = f"{takes}, and {lost}{verdict}.{' It needs a calibration, once.' if fitted(row) else ''}"
    if further := beyond(row, advice.context):
        reach, option = further
        fits = f"The usual one fits the keys of {reach:,} positions, and later keys lose more"
        return f"{said} {fits}: calibrate with {option}, or take {others(row['method'])}."
    return said


def loss_source(row: dict[str, Any]) -> str:
    """Where the loss in a row of `ADVICE` is from."""
    kind: str = row["kind"]
    return {"predicted": f"predicted from {DEMO}", "measured": "measured on this model"}.get(kind, kind)


def fitted(row: dict[str, Any]) -> bool:
    """Whether the cache of a row of `ADVICE` needs a calibration."""
    return row["method"] is not None and METHODS[row["method"]].calibrated


def beyond(row: dict[str, Any], context: int) -> tuple[int, str] | None:
    """The positions that the usual calibration of a row of `ADVICE` fits, and the option for ``context`` tokens.

    None if it fits that many, or if there is none.
    """
    if not fitted(row):
        return None
    codec = METHODS[row["method"]].codec(_ANY_DIM, number_of_bits(row["bits"]), "keys")
    reach = codec.reach(USUAL_TOKENS)
    return None if reach is None or context <= reach else (reach, codec.reaches_by.format(N=context))


def _said(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
