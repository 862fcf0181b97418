"""Layers of a plan that can have fewer bits: each is tried alone, then as many together as a limit allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.errors import InputError
from veloxlab.measure.frames import schema
from veloxlab.measure.quality import Reference, fidelity_to
from veloxlab.progress import Progress, silent

NARROW = schema("layer bits kl_mean may")
"""Columns of `Narrow.frame`: a layer; the bits of its keys and values; the mean KL divergence of the plan with only
that layer changed, in nats; and whether the layer is one of those that can have these bits together."""


@dataclass(frozen=True)
class Narrow:
    """Result of `narrow_layers`; ``print`` shows it in a sentence."""

    bits: float  # that layers were tried with
    limit: float  # nats a token that the plan may lose
    before: float  # loss of the unchanged plan, nats
    flips: float  # share of changed top-1 tokens of the unchanged plan
    together: float  # loss with all allowed layers changed, nats
    frame: pl.DataFrame  # `NARROW`: one row for each layer, the least loss first

    @property
    def layers(self) -> list[int]:
        """Layers that can have these bits, all together."""
        return self.frame.filter("may")["layer"].sort().to_list()

    def __str__(self) -> str:
        lost = f"{self.before:.3f} nats a token before"
        if not self.layers:
            least = self.frame.row(0, named=True)
            alone = f"layer {least['layer']} alone makes it {least['kl_mean']:.3f}"
            return f"No layer may go to {self.bits} bits within {self.limit} nats: {lost}, and {alone}."
        named = ", ".join(map(str, self.layers))
        count = f"{len(self.layers)} of {self.frame.height} layers may go to {self.bits} bits within {self.limit} nats"
        return f"{count}: {named}. Measured with all of them: {self.together:.3f} nats a token; {lost}."


def narrow_layers(
    exact: Reference,
    plan: Plan,
    *,
    bits: float = 2,
    limit: float = 0.05,
    layers: Iterable[int] | None = None,
    calibration: Calibration | None = None,
    progress: Progress = silent,
) -> Narrow:
    """Find the layers of a plan whose keys and values can have ``bits`` bits.

    Each of ``layers`` (by default all) is changed alone and measured. Then the layers with the least loss change
    together: as many as keep the plan within ``limit`` nats a token, found by bisection, with a measurement at each
    step. Raises `InputError` as `fidelity_to`; or if the method does not support these bits, or there is no such layer.
    """
    tried = list(range(len(plan.layers)) if layers is None else layers)
    if not tried:
        raise InputError("There are no layers to try: give at least one.")
    most, done = len(tried) + 1 + len(tried).bit_length(), 0

    def lost(changed: Sequence[int], said: str) -> dict[str, Any]:
        nonlocal done
        progress(done, most, said)
        done += 1
        made = plan
        for layer in changed:
            made = made.with_layer(layer, key_bits=bits, value_bits=bits)
        given: dict[str, Any] = {} if calibration is None else {"calibration": calibration}
        return fidelity_to(exact, made, **given).row(0, named=True)

    whole = lost([], "the plan unchanged")
    alone = sorted((lost([layer], f"layer {layer} at {bits} bits")["kl_mean"], layer) for layer in tried)
    before, flips = whole["kl_mean"], whole["top1_flips"]
    together, low, high = before, 0, len(alone) + 1  # `low` layers fit, `high` do not
    while high - low > 1:
        count = (low + high) // 2
        found = lost([layer for _, layer in alone[:count]], f"{count} layers at {bits} bits")["kl_mean"]
        if found <= limit:
            low, together = count, found
        else:
            high = count
    rows = [(layer, float(bits), kl, place < low) for place, (kl, layer) in enumerate(alone)]
    return Narrow(bits, limit, before, flips, together, pl.DataFrame(rows, schema=NARROW, orient="row"))
