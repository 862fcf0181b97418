"""RateQuant's allocation: sensitivities times distortion curves, solved for any budget, as a `Plan`.

Paper: *RateQuant: Optimal Mixed-Precision KV Cache Quantization via Rate-Distortion Theory*, F. Zuo et al., 2026, arXiv
2605.06675. Where we differ: curves are measured for every head, where the paper has α·β^−b with one α; the budget is
in held bytes, scales and padding included; it may choose among methods; sinks are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from veloxlab.allocate.budget import (
    BOUNDS,
    BUDGET,
    LEAST,
    MEGABYTE,
    Allocation,
    Bounds,
    Budget,
    Limit,
    PlannedModel,
    Spans,
)
from veloxlab.allocate.choices import Chosen, Offer, loss_of, mean_width, nbytes_of
from veloxlab.allocate.sensitivity import NATS, SENSITIVITIES, frame_of
from veloxlab.allocate.solve import ROUNDING
from veloxlab.allocate.tables import CURVES, SPECTRA, Spectra, spectra_of
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.counts import Windows
from veloxlab.cache.plan import DEFAULT_SINKS, DEFAULT_WINDOW, LayerSettings, Plan
from veloxlab.checks import FILE, checked
from veloxlab.codecs import find_method
from veloxlab.codecs.method import TENSORS
from veloxlab.errors import InputError
from veloxlab.measure.frames import PLACE, in_schema, schema
from veloxlab.mlxlm.probe import LayerFacts
from veloxlab.store import digest, read_json, reading, write_json

FORMAT = "veloxlab rate budget 1"
SIZES = ("layer", "kv_heads", "key_dim", "value_dim", "max_size", "keep", "exact_bits")  # facts of a layer in a file
_TOO_LITTLE = "This budget leaves {:,.1f} bytes a token for all layers' codes, and {}: give more, or allow fewer bits."
SHORT = 19 / 18  # 2 1/8 code bits at a head dimension of 64
"""Up to this multiple of the bytes that 2 bits for every head take, an allocation may give some heads 1 bit, if bounds
have no least width. Measured on SmolLM2-135M, KL in nats of 4 windows of 512 tokens, from 2 bits up / from 1 bit up:
0.99 / 0.73 at 2 code bits, 0.65 / 0.64 at 2 1/8, 0.48 / 0.58 at 2 1/4, 0.28 / 0.38 at 2 1/2."""

FRONTIER = schema("kind bytes_per_token true_bits predicted_loss")
"""Columns of `RateBudget.frontier`: ``kind`` is "allocated", or "uniform", one width for all heads; bytes are of one
packed token in all layers, bits of each value, scales included; losses of a token, in the unit of the sensitivities."""

HEADS = schema(PLACE + "method bits predicted_loss")
"""Columns of `RateBudget.heads`: code bits, or those of an exact value where the method is "none"; the loss of a token
for this head's keys or values alone, 0 where they are exact."""

COORDINATES = schema(PLACE + "coordinate method bits")
"""Columns of `RateBudget.coordinates`, the coordinates of each method's own space."""


@dataclass(frozen=True, eq=False)
class RateBudget:
    """Measurements of a model, from which any number of budgets can be allocated without running it again.

    It has `SENSITIVITIES` and `CURVES`. A method with a `prediction` has no curves: its calibration gives ``spectra``,
    `SPECTRA`. ``calibrations`` has the identities, by method, of the calibrations that were used. ``entries`` is the
    length of the prompt cache, and ``sizes`` are those of layers with keys and values.
    """

    model: str
    model_hash: str
    entries: int
    sizes: tuple[LayerFacts, ...]
    sensitivities: pl.DataFrame
    curves: pl.DataFrame
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    calibrations: Mapping[str, str] = field(default_factory=dict)
    spectra: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=SPECTRA))

    @checked()
    def with_calibration(self, calibration: Calibration) -> Self:
        """Add the method of a calibration of the same model, without running the model again.

        Raises `InputError` for a method that predicts no losses, a second such method, or losses that are not in nats.
        """
        method, by = calibration.method, set(self.sensitivities["by"])
        if not by <= {*NATS}:
            raise InputError(f"Losses of {method} are in nats, and these by {by.pop()!r} are not: take by='gradient'.")
        rows = spectra_of(calibration, {(size.layer, tensor) for size in self.sizes for tensor in TENSORS})
        if self.predicted_method not in (None, method):
            raise InputError(f"These tables have {self.predicted_method} already: make others for {method}.")
        identities = {**self.calibrations, method: calibration.identity}
        return replace(self, spectra=rows, calibrations=identities)

    @property
    def predicted_method(self) -> str | None:
        """Id of the method that ``spectra`` are of; None without them."""
        known = () if self.spectra.is_empty() else self.calibrations
        return next((method for method in known if find_method(method).prediction), None)

    @property
    def methods(self) -> list[str]:
        """Ids of what was measured, in the order of the measurements."""
        return [*self.curves["method"].unique(maintain_order=True), *filter(None, [self.predicted_method])]

    @checked(bounds=BOUNDS)
    def solve(
        self, budget: Budget | float, bounds: Bounds | None = None, *, key_weight: float = 1.0, name: str = ""
    ) -> Allocation:
        """Allocate a budget, of true bits if it is a number; raises `InputError` if the bounds do not allow it.

        Keys' losses are multiplied by ``key_weight`` in the choice, but not in the prediction.
        """
        limit, bounds = self._limit(budget), bounds or Bounds()
        usual = self._usual(bounds, limit)
        choices = self._offer.choices(bounds, limit.tokens, key_weight, usual)
        least = float(choices.problem.frontier.costs[0])
        if limit.nbytes is None:
            solution = choices.problem.reaching(limit.predicted_loss, choices.losses)
        elif limit.nbytes * (1 + ROUNDING) < least:
            raise InputError(_TOO_LITTLE.format(limit.nbytes, f"the least widths within the bounds take {least:,.1f}"))
        else:
            solution = choices.problem.within(limit.nbytes)
        chosen = choices.chosen(solution.choice)
        even = self._offer.uniform(limit.tokens, solution.cost)
        key_bits, value_bits = (mean_width(chosen, tensor) for tensor in TENSORS)
        nbytes, loss = nbytes_of(chosen), loss_of(chosen)
        bits = 8 * nbytes / self._values
        plan = self._plan(chosen, name or f"allocated, {bits:.2f} bits")
        bound = solution.bound if limit.nbytes is not None and key_weight == 1 else None
        uniform, uniform_loss = (None, None) if even is None else (self._uniform_plan(even), loss_of(even))
        only_least = bool(solution.cost <= least * (1 + ROUNDING))
        return Allocation(
            plan, nbytes, bits, key_bits, value_bits, loss, bound, uniform, uniform_loss, usual, only_least
        )

    def plan(self, budget: Budget | float, bounds: Bounds | None = None, *, name: str = "") -> Plan:
        """The plan of `solve`."""
        return self.solve(budget, bounds, name=name).plan

    @checked()
    def uniform(self, budget: Budget | float, *, name: str = "") -> Plan:
        """One width for all heads, and one more bit for as many evenly spaced heads as the budget allows.

        Keys and values get the same bits by the method that was measured first. Sensitivities are not used. Raises
        `InputError` for a budget that is too small, or for a `QualityFloor`.
        """
        limit = self._limit(budget)
        if limit.nbytes is None:
            raise InputError("A uniform plan is made for a budget of bytes or bits: give one of those.")
        chosen = self._offer.uniform(limit.tokens, limit.nbytes)
        if chosen is None:
            least = "the least width that was measured takes more for all heads"
            raise InputError(_TOO_LITTLE.format(limit.nbytes, least))
        return self._uniform_plan(chosen, name)

    @checked(bounds=BOUNDS)
    def frontier(self, bounds: Bounds | None = None) -> pl.DataFrame:
        """The least predicted loss, at each number of bytes where it is exact, and uniform widths: `FRONTIER`."""
        bounds = bounds or Bounds()
        few, best = (self._offer.choices(bounds, usual=usual).problem.frontier for usual in (1, LEAST))
        short = SHORT * best.costs[0] if bounds.least_bits is None else 0.0  # below which heads may get 1 bit
        parts = (few.costs < short, few), (best.costs >= short, best)
        costs, losses = (np.concatenate([getattr(of, name)[at] for at, of in parts]) for name in ("costs", "losses"))
        first = self._offer.first.values()
        uniform = sum(table.nbytes.sum(axis=0) for table in first), sum(table.losses.sum(axis=0) for table in first)
        frames = [
            pl.DataFrame({"kind": kind, "bytes_per_token": nbytes, "predicted_loss": lost})
            for kind, (nbytes, lost) in (("allocated", (costs, losses)), ("uniform", uniform))
        ]
        bits = 8 * pl.col("bytes_per_token") / self._values
        return pl.concat(frames).with_columns(true_bits=bits).select(list(FRONTIER))

    def spans(self, bounds: Bounds, tokens: int) -> Spans:
        """The least and the most that budgets can ask for within ``bounds``; megabytes are of a text of ``tokens``."""
        choices = self._offer.choices(bounds, usual=1)
        best = choices.problem.frontier
        ends = [choices.chosen(best.choice(step)) for step in (0, len(best.slopes))]
        # a little more than a plan holds, so that rounding refuses neither end
        least, most = (self._held(end, tokens, self.sinks, self.window) / MEGABYTE * (1 + ROUNDING) for end in ends)
        nbytes = float(best.costs[0]), float(best.costs[-1])
        bits = 8 * nbytes[0] / self._values, 8 * nbytes[1] / self._values
        return Spans(bits, nbytes, (least, most), (float(best.losses[-1]), float(best.losses[0])))

    def heads(self, plan: Plan) -> pl.DataFrame:
        """Bits and predicted loss of each KV head: `HEADS`; `InputError` for a plan that was not measured."""
        rows = [
            (layer, head, tensor, choice.method, width, float(loss))
            for (layer, tensor), choice in self._chosen(plan).items()
            for head, (width, loss) in enumerate(zip(choice.widths, choice.losses, strict=True))
        ]
        return pl.DataFrame(rows, schema=HEADS, orient="row")

    def coordinates(self, plan: Plan) -> pl.DataFrame:
        """Code bits of each coordinate that a plan gives: `COORDINATES`. Raises as `heads`."""
        rows = [
            (*place, head, coordinate, choice.method, width)
            for place, choice in self._chosen(plan).items()
            for head, own in enumerate(self._offer.coordinates(place, choice).tolist())
            for coordinate, width in enumerate(own)
        ]
        named = pl.DataFrame(rows, ["layer", "tensor", "head", "coordinate", "method", "bits"], orient="row")
        return in_schema(named, COORDINATES)

    def predicted_loss(self, plan: Plan) -> float:
        """Predicted loss of a plan for each token; exact layers lose nothing. Raises as `heads`."""
        return loss_of(self._chosen(plan))

    def bytes_per_token(self, plan: Plan) -> float:
        """Bytes of one packed token in all layers; exact layers are counted as they are. Raises as `heads`."""
        return nbytes_of(self._chosen(plan))

    def true_bits(self, plan: Plan) -> float:
        """Bits of each packed value on average, scales included. Raises as `heads`."""
        return 8 * self.bytes_per_token(plan) / self._values

    def held_bytes(self, plan: Plan, tokens: int) -> float:
        """The most bytes that compressed layers hold after a text, as `TokensInMemory` counts. Raises as `heads`."""
        return self._held(self._chosen(plan), tokens, plan.sinks, plan.window)

    @cached_property
    def identity(self) -> str:
        """Sixteen hex digits of a checksum over all measurements."""
        return digest(self._content())[:16]

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write JSON with a checksum, atomically, and return the path; `InputError` if it cannot be written."""
        return write_json(path, FORMAT, self._content())

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raises `InputError` if it is missing or was changed."""
        with reading("measurements", Path(path), "make them again with vl.rate_budget"):
            content = read_json(Path(path), FORMAT)
            content["sensitivities"] = frame_of(content["sensitivities"], SENSITIVITIES)
            content["curves"] = frame_of(content["curves"], CURVES)
            content["sizes"] = tuple(LayerFacts(native="", compressible=True, **size) for size in content["sizes"])
            content["spectra"] = pl.DataFrame(content.get("spectra"), schema=SPECTRA)
            return cls(**content)

    def _content(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.spectra.is_empty():  # the form of files without spectra
            del own["spectra"]
        frames = {n: table.to_dict(as_series=False) for n, table in own.items() if isinstance(table, pl.DataFrame)}
        return own | frames | {"sizes": [{name: getattr(size, name) for name in SIZES} for size in self.sizes]}

    @cached_property
    def _offer(self) -> Offer:
        spectra = Spectra.of(self.predicted_method, self.spectra) if self.predicted_method else None
        return Offer.of(self.sizes, self.sensitivities, self.curves, spectra)

    @cached_property
    def _values(self) -> int:
        return sum(size.values_per_token for size in self.sizes)

    def _usual(self, bounds: Bounds, limit: Limit) -> int:
        """The least width of a head if the bounds have none."""
        usual = self._offer.choices(bounds, limit.tokens).problem.frontier.costs[0]
        return LEAST if limit.nbytes is None or limit.nbytes >= SHORT * usual else 1

    def _limit(self, budget: Budget | float) -> Limit:
        return Limit.of(BUDGET("budget", budget), self.sizes, self.sinks, self.window)

    def _chosen(self, plan: Plan) -> Chosen:
        """What a plan gives each layer's keys and values: the inverse of `_plan`."""
        if plan.model_hash != self.model_hash:
            raise InputError(
                f"The plan {plan.name!r} was made for another model than these measurements, which are of {self.model} "
                f"({self.model_hash}): give a plan for it, or measure {plan.model or 'the plan’s model'} "
                f"({plan.model_hash})."
            )
        return self._offer.chosen(plan)

    def _held(self, chosen: Chosen, tokens: int, sinks: int, window: int) -> float:
        held = {size.layer: Windows.of_layer(size, sinks, window).most_held(tokens) for size in self.sizes}
        exact = sum(held[size.layer].exact * size.exact_bytes for size in self.sizes)
        return exact + sum(held[layer].packed * choice.nbytes for (layer, _), choice in chosen.items())

    def _plan(self, chosen: Chosen, name: str) -> Plan:
        layers = {}
        for size in self.sizes:
            keys, values = (chosen[size.layer, tensor].settings for tensor in TENSORS)
            layers[size.layer] = LayerSettings(*keys[:2], *values[:2], key_options=keys[2], value_options=values[2])
        methods = {choice.method for choice in chosen.values()}
        calibrations = {method: one for method, one in self.calibrations.items() if method in methods}
        shape = PlannedModel(self.model, self.model_hash, self.entries, self.sizes[0].exact_bits)
        said: dict[str, Any] = {"name": name, "calibrations": calibrations, "allocation": self.identity}
        return shape.plan(layers, self.sinks, self.window, **said)

    def _uniform_plan(self, chosen: Chosen, name: str = "") -> Plan:
        return self._plan(chosen, name or f"uniform, {mean_width(chosen, *TENSORS):.2f} code bits")
