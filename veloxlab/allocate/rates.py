"""RateQuant's allocation: sensitivities times distortion curves, solved at once for any budget, into a `Plan`.

Paper: *RateQuant: Optimal Mixed-Precision KV Cache Quantization via Rate-Distortion Theory*, F. Zuo et al., 2026, arXiv
2605.06675.

Where we differ
    * Curves are measured for every head, and not α·β^−b with one α for all.
    * The budget is of bytes that are held, scales and padding included, and may choose among methods too.
    * Sinks, which the cache keeps exact, count neither in sensitivities nor in curves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from veloxlab.allocate.budget import BUDGET, Budget, LayerSize, Limit, held_tokens
from veloxlab.allocate.choices import Choices, spread_widths
from veloxlab.allocate.curves import CURVES
from veloxlab.allocate.points import (
    BOUNDS,
    EXACT,
    PER_HEAD,
    Bounds,
    Chosen,
    HeadTable,
    Tables,
    exact_point,
    head_tables,
    side_points,
)
from veloxlab.allocate.sensitivity import SENSITIVITIES, SIDES, frame_of
from veloxlab.cache.layer import DEFAULT_SINKS, DEFAULT_WINDOW
from veloxlab.cache.make import LayerSettings
from veloxlab.cache.plan import Plan
from veloxlab.checks import FILE, checked
from veloxlab.codecs import Role
from veloxlab.errors import InputError
from veloxlab.store import digest, read_sealed, write_sealed

FORMAT = "veloxlab rate budget 1"
SHORT = 19 / 18  # 2 1/8 code bits at a head dimension of 64
"""A budget of fewer times the bytes that 2 bits for every head take may give some heads 1 bit, where no bounds are
given. Measured on SmolLM2-135M, KL in nats of 4 windows of 512 tokens, from 2 bits up / from 1 bit up: 0.99 / 0.73 at 2
code bits, 0.65 / 0.64 at 2 1/8, 0.48 / 0.58 at 2 1/4, 0.28 / 0.38 at 2 1/2."""

FRONTIER = {
    "kind": pl.String,  # "allocated", or "uniform": one width for all heads
    "bytes_per_token": pl.Float64,  # of one packed token in all layers
    "true_bits": pl.Float64,  # for each value, scales included
    "predicted_loss": pl.Float64,  # a token, in the unit of the sensitivities
}
"""Columns of `RateBudget.frontier`."""

HEADS = {
    "layer": pl.Int32,
    "head": pl.Int32,  # KV head
    "tensor": pl.String,  # "keys" or "values"
    "method": pl.String,
    "bits": pl.Int32,  # code bits; those of an exact value where the method is "none"
    "predicted_loss": pl.Float64,  # a token, of this head's side alone; 0 where it is exact
}
"""Columns of `RateBudget.heads`."""


@dataclass(frozen=True)
class Allocation:
    """A plan, and what is predicted of it.

    Attributes
    ----------
    plan : for `veloxlab.make_cache`.
    bytes_per_token : of one packed token in all layers.
    true_bits : for each packed value, scales included; ``key_bits`` and ``value_bits`` are means of code bits.
    predicted_loss : a token; by gradients or divergences, in nats.
    predicted_least : no plan of these choices and this budget is predicted to lose less; with a `QualityFloor`, None.
    uniform : one width for all heads, or two neighbouring ones evenly mixed, in no more bytes than ``plan`` takes; None
        where even the least measured width takes more.
    predicted_uniform_loss : of that one.
    bounds : within which it was allocated.
    only_least : whether the least widths within them are all that the budget pays for, so that nothing was allocated.
    """

    plan: Plan
    bytes_per_token: float
    true_bits: float
    key_bits: float
    value_bits: float
    predicted_loss: float
    predicted_least: float | None
    uniform: Plan | None
    predicted_uniform_loss: float | None
    bounds: Bounds
    only_least: bool


@dataclass(frozen=True, eq=False)
class RateBudget:
    """Everything that was measured of a model for allocating bits, so that a budget costs no further run.

    Attributes
    ----------
    model, model_hash, entries : its name, the hash of its shapes, and the length of its prompt cache.
    sizes : of its layers with keys and values.
    sensitivities, curves : `SENSITIVITIES` and `CURVES`.
    sinks, window : of the plans to be made.
    calibrations : identities of those that the curves were measured with, by method.
    """

    model: str
    model_hash: str
    entries: int
    sizes: tuple[LayerSize, ...]
    sensitivities: pl.DataFrame
    curves: pl.DataFrame
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    calibrations: dict[str, str] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """Sixteen hex digits over all that was measured."""
        return digest(self._content())[:16]

    @cached_property
    def _tables(self) -> Tables:
        return head_tables(self.sensitivities, self.curves)

    @cached_property
    def _solved(self) -> dict[tuple[Bounds, tuple[float, ...]], Choices]:
        return {}

    @checked(bounds=BOUNDS)
    def solve(self, budget: Budget | float, bounds: Bounds | None = None, *, name: str = "") -> Allocation:
        """Allocate a budget, of true bits if it is a number.

        The first budget within some ``bounds`` takes a fraction of a second, others are a bisection. The bounds are
        `Bounds` by default; a budget that 2 bits for every head would all but spend may then give some heads 1 bit.

        Raises
        ------
        InputError : the budget is too small, or too good, for what was measured within the bounds.
        """
        limit = self._limit(budget)
        bounds = bounds or self._usual_bounds(limit)
        choices = self._choices(bounds, limit)
        if limit.nbytes is None:
            assert limit.predicted_loss is not None
            solution = choices.problem.reaching(limit.predicted_loss)
        else:
            least = choices.problem.least_cost
            if limit.nbytes * (1 + 1e-9) < least:
                raise InputError(_too_little(limit.nbytes, f"the least widths within the bounds take {least:,.1f}"))
            solution = choices.problem.within(limit.nbytes)
        chosen = choices.chosen(solution.choice)
        nbytes = sum(point.nbytes for point in chosen.values())
        uniform = self._uniform(Limit(limit.tokens, solution.cost))
        return Allocation(
            self._plan(chosen, name or f"allocated, {8 * nbytes / self._values:.2f} bits"),
            nbytes,
            8 * nbytes / self._values,
            float(np.mean([chosen[size.layer, "keys"].width for size in self.sizes])),
            float(np.mean([chosen[size.layer, "values"].width for size in self.sizes])),
            solution.loss,
            None if limit.nbytes is None else solution.bound,
            None if uniform is None else self._uniform_plan(uniform),
            None if uniform is None else sum(point.predicted_loss for point in uniform.values()),
            bounds,
            bool(solution.cost <= choices.problem.least_cost * (1 + 1e-9)),
        )

    def plan(self, budget: Budget | float, bounds: Bounds | None = None, *, name: str = "") -> Plan:
        """The plan of `solve`."""
        return self.solve(budget, bounds, name=name).plan

    @checked()
    def uniform(self, budget: Budget | float, *, name: str = "") -> Plan:
        """One width for all heads, and, for what is left, one bit more for some of them, evenly spread: no sensitivity
        has a say.

        Keys' heads are taken in the order of the layers, then values': each side gets the same bits, which matters, as
        keys are worth more. The method is the first that was measured; where it
        has one width for a layer's keys, whole sides are taken.

        Raises
        ------
        InputError : the budget is too small, or is one of quality.
        """
        limit = self._limit(budget)
        if limit.nbytes is None:
            raise InputError("A uniform plan is made for a budget of bytes or bits: give one of those.")
        chosen = self._uniform(limit)
        if chosen is None:
            raise InputError(_too_little(limit.nbytes, "the least width that was measured takes more for all heads"))
        return self._uniform_plan(chosen, name)

    def predicted_loss(self, plan: Plan) -> float:
        """What a plan that holds measured methods and widths is predicted to lose a token; 0 for exact sides.

        Raises as `heads`.
        """
        return float(self.heads(plan)["predicted_loss"].sum())

    def heads(self, plan: Plan) -> pl.DataFrame:
        """What each KV head's keys and values get from a plan, and are predicted to lose: `HEADS`.

        Raises
        ------
        InputError : the plan is of another model, or a method or a width of it was not measured.
        """
        self._check(plan)
        rows: list[tuple[object, ...]] = []
        for size in self.sizes:
            for side, method, bits, _ in plan.layers[size.layer].sides:
                if method == EXACT:
                    rows += [(size.layer, head, side, EXACT, bits, 0.0) for head in range(size.kv_heads)]
                    continue
                table, columns = self._columns(plan, size, side, method)
                rows += [
                    (size.layer, head, side, method, table.widths[c], float(table.losses[head, c]))
                    for head, c in enumerate(columns)
                ]
        return pl.DataFrame(rows, schema=HEADS, orient="row")

    def held_bytes(self, plan: Plan, tokens: int) -> float:
        """Bytes that the compressed layers hold at most after a text of ``tokens``: what `TokensInMemory` counts.

        Raises as `heads`.
        """
        total = 0.0
        for size, nbytes in self._layer_bytes(plan):
            held = held_tokens(size, tokens, sinks=plan.sinks, window=plan.window)
            total += held.exact * size.exact_bytes + held.packed * nbytes
        return total

    def bytes_per_token(self, plan: Plan) -> float:
        """Bytes of one packed token in all layers; exact layers are counted as they are. Raises as `heads`."""
        return sum(nbytes for _, nbytes in self._layer_bytes(plan))

    def true_bits(self, plan: Plan) -> float:
        """Bits of each packed value on average, scales included. Raises as `heads`."""
        return 8 * self.bytes_per_token(plan) / self._values

    @checked(bounds=BOUNDS)
    def frontier(self, bounds: Bounds | None = None) -> pl.DataFrame:
        """The least predicted loss at every number of bytes where it is certain, and uniform widths: `FRONTIER`."""
        one = Limit({size.layer: 1 for size in self.sizes})
        costs, losses = self._choices(bounds or Bounds(), one).problem.frontier
        rows = [("allocated", float(c), float(loss)) for c, loss in zip(costs, losses, strict=True)]
        tables = [self._tables[size.layer, side][0] for size in self.sizes for side in SIDES]
        for column in range(len(tables[0].widths)):
            points = [t.point([column] * len(t.nbytes)) for t in tables]
            rows.append(("uniform", sum(p.nbytes for p in points), sum(p.predicted_loss for p in points)))
        frame = pl.DataFrame(rows, schema=["kind", "bytes_per_token", "predicted_loss"], orient="row")
        return frame.with_columns(true_bits=8 * pl.col("bytes_per_token") / self._values).select(list(FRONTIER))

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write it as JSON under a seal, whole or not at all, and return the path; `InputError` where it cannot be."""
        path = Path(path)
        write_sealed(path, {"format": FORMAT, **self._content()})
        return path

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `InputError` for a file that is missing or was altered."""
        try:
            content = read_sealed(Path(path), FORMAT)
            del content["format"]
            parts = {
                "sensitivities": frame_of(content["sensitivities"], SENSITIVITIES),
                "curves": frame_of(content["curves"], CURVES),
                "sizes": tuple(LayerSize(**size) for size in content["sizes"]),
            }
            return cls(**(content | parts))
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise InputError(
                f"The measurements {path} cannot be read ({reason}): make them again with vl.rate_budget."
            ) from error

    # inside ---------------------------------------------------------------------------------------------------------

    def _check(self, plan: Plan) -> None:
        if plan.model_hash != self.model_hash:
            raise InputError(
                f"The plan {plan.name!r} was made for another model than these measurements, which are of {self.model} "
                f"({self.model_hash}): give a plan for it, or measure {plan.model or 'the plan’s model'} "
                f"({plan.model_hash})."
            )

    def _columns(self, plan: Plan, size: LayerSize, side: Role, method: str) -> tuple[HeadTable, list[int]]:
        """The table of a method, and the column of each head of a layer's side."""
        widths = plan.widths(size.layer, side)
        table = next((t for t in self._tables[size.layer, side] if t.method == method), None)
        if table is None or not set(widths) <= set(table.widths):
            raise InputError(
                f"{method} at {widths} bits was not measured for the {side} of layer {size.layer}: measure "
                "the method's curves at these widths."
            )
        return table, np.broadcast_to([table.widths.index(w) for w in widths], size.kv_heads).tolist()

    def _layer_bytes(self, plan: Plan) -> Iterator[tuple[LayerSize, float]]:
        """Layers, and the bytes of one packed token in each."""
        self._check(plan)
        for size in self.sizes:
            nbytes = 0.0
            for side, method, _, _ in plan.layers[size.layer].sides:
                if method == EXACT:
                    nbytes += exact_point(size, side).nbytes
                else:
                    table, columns = self._columns(plan, size, side, method)
                    nbytes += table.point(columns).nbytes
            yield size, nbytes

    @property
    def _values(self) -> int:
        return sum(size.values_per_token for size in self.sizes)

    def _content(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_hash": self.model_hash,
            "entries": self.entries,
            "sizes": [asdict(size) for size in self.sizes],
            "sensitivities": self.sensitivities.to_dict(as_series=False),
            "curves": self.curves.to_dict(as_series=False),
            "sinks": self.sinks,
            "window": self.window,
            "calibrations": self.calibrations,
        }

    def _limit(self, budget: Budget | float) -> Limit:
        wanted: Budget = BUDGET("budget", budget)
        return wanted.limit(self.sizes, self.sinks, self.window).per_token()

    def _usual_bounds(self, limit: Limit) -> Bounds:
        """`Bounds`, and from 1 bit up where a budget is `SHORT`."""
        usual = Bounds()
        if limit.nbytes is None or limit.nbytes >= SHORT * self._choices(usual, limit).problem.least_cost:
            return usual
        return Bounds(least_bits=1)

    def _choices(self, bounds: Bounds, limit: Limit) -> Choices:
        key = bounds, tuple(limit.tokens[size.layer] for size in self.sizes)
        if key not in self._solved:
            self._solved[key] = Choices.of(side_points(self._tables, self.sizes, bounds), limit, bounds)
        return self._solved[key]

    def _uniform(self, limit: Limit) -> Chosen | None:
        """Points of one width, or of two neighbouring ones; None if the least is too much."""
        assert limit.nbytes is not None
        places = [(size.layer, side) for side in SIDES for size in self.sizes]
        tables = [self._tables[place][0] for place in places]
        tokens = [limit.tokens[layer] for layer, _ in places]
        parts = [len(t.nbytes) if t.method == PER_HEAD else 1 for t in tables]
        costs = np.concatenate(
            [n * (t.nbytes if t.method == PER_HEAD else t.nbytes.sum(axis=0, keepdims=True))
             for t, n in zip(tables, tokens, strict=True)]
        )  # fmt: skip
        columns = spread_widths(costs, limit.nbytes)
        if columns is None:
            return None
        by_place = np.split(columns, np.cumsum(parts)[:-1])
        return {
            place: table.point(np.broadcast_to(own, len(table.nbytes)).tolist())
            for place, table, own in zip(places, tables, by_place, strict=True)
        }

    def _uniform_plan(self, chosen: Chosen, name: str = "") -> Plan:
        width = np.mean([point.width for point in chosen.values()])
        return self._plan(chosen, name or f"uniform, {width:.2f} code bits")

    def _plan(self, chosen: Chosen, name: str) -> Plan:
        idle = LayerSettings("none", self.sizes[0].exact_bits, "none", self.sizes[0].exact_bits)
        layers = [idle] * self.entries
        for size in self.sizes:
            keys, values = (chosen[size.layer, side] for side in SIDES)
            layers[size.layer] = LayerSettings(
                keys.method, keys.bits, values.method, values.bits, {}, keys.options, values.options
            )
        methods = {point.method for point in chosen.values()}
        return Plan(
            self.model_hash,
            tuple(layers),
            self.sinks,
            self.window,
            name=name,
            model=self.model,
            allocation=self.identity,
            calibrations={m: i for m, i in self.calibrations.items() if m in methods},
        )


def _too_little(nbytes: float, least: str) -> str:
    return (
        f"This budget leaves {nbytes:,.1f} bytes a token for the codes of all layers, and {least}: give more, or allow "
        "fewer bits."
    )
