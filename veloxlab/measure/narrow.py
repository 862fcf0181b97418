"""Which layers of a plan may have fewer bits: each is tried alone, then as many together as a limit bears."""

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
"""Columns of `Narrow.frame`: a layer; the bits that its keys and values got; the mean KL divergence of the whole plan
with that layer alone changed, in nats; and whether it is one of those that may have so few bits together."""


@dataclass(frozen=True)
class Narrow:
    """What `narrow_layers` found; ``print`` says it in a sentence."""

    bits: float  # that layers were tried with
    limit: float  # nats a token that the plan may lose
    before: float  # nats that it loses unchanged
    flips: float  # share of tokens whose first choice is then another
    together: float  # and with all that may
    frame: pl.DataFrame  # a row a layer, the least loss first: `NARROW`

    @property
    def layers(self) -> list[int]:
        """Those that may have so few bits, all together."""
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
    """Find the layers of a plan whose keys and values may have ``bits`` bits.

    Each of ``layers`` (by default all) is changed alone and measured. Those that lose least then change together: as
    many as the whole plan bears within ``limit`` nats a token, found by bisection, each step of it measured. Raises
    `InputError` as `fidelity_to`; or if the method does not have so few bits, or there is no such layer.
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
    together, low, high = before, 0, len(alone) + 1  # so many layers fit, so many do not
    while high - low > 1:
        count = (low + high) // 2
        found = lost([layer for _, layer in alone[:count]], f"{count} layers at {bits} bits")["kl_mean"]
        if found <= limit:
            low, together = count, found
        else:
            high = count
    rows = [(layer, float(bits), kl, place < low) for place, (kl, layer) in enumerate(alone)]
    return Narrow(bits, limit, before, flips, together, pl.DataFrame(rows, schema=NARROW, orient="row"))
