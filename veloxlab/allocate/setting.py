"""An allocation request as a whole, and answers to one request after another.

Keys' sensitivities may be weighed against values': the weight has a say in the choice alone. What a choice is predicted
to lose is told as it was measured, so that plans of different weights can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import polars as pl

from veloxlab.allocate.budget import BUDGET, MEGABYTE, AverageBits, Budget, BytesPerToken, QualityFloor, TokensInMemory
from veloxlab.allocate.points import BOUNDS, Bounds
from veloxlab.allocate.rates import Allocation, RateBudget
from veloxlab.checks import check_fields, real
from veloxlab.errors import InputError


@dataclass(frozen=True)
class Setting:
    """A budget, of true bits if it is a number; what is allowed; and how much keys count.

    Attributes
    ----------
    budget : `AverageBits`, `BytesPerToken`, `TokensInMemory` or `QualityFloor`.
    bounds : within which it is allocated.
    key_weight : times which keys' predicted losses count in the choice, against values'.

    Raises
    ------
    InputError : the weight is not a number above 0.
    """

    budget: Budget
    bounds: Bounds = field(default_factory=Bounds)
    key_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, budget=BUDGET, bounds=BOUNDS, key_weight=real(above=0))


@dataclass(frozen=True)
class Spans:
    """The least and the most that a budget of each kind can ask for, within some bounds.

    Attributes
    ----------
    bits : true bits for each packed value.
    nbytes : of one packed token in all layers.
    megabytes : of a text of ``tokens``.
    predicted_loss : a token.
    tokens : that ``megabytes`` is of.
    """

    bits: tuple[float, float]
    nbytes: tuple[float, float]
    megabytes: tuple[float, float]
    predicted_loss: tuple[float, float]
    tokens: int

    def nearest(self, budget: Budget) -> Budget:
        """The budget, or what comes nearest to it within the spans."""
        match budget:
            case AverageBits(bits):
                return AverageBits(_within(bits, self.bits))
            case BytesPerToken(nbytes):
                return BytesPerToken(_within(nbytes, self.nbytes))
            case TokensInMemory(tokens, megabytes):
                return TokensInMemory(tokens, _within(megabytes, self.megabytes))
            case QualityFloor(loss):
                return QualityFloor(_within(loss, self.predicted_loss))


class Allocator:
    """Allocate one model's measurements by one `Setting` after another; what can serve the next is kept.

    Parameters
    ----------
    rates : the measurements.
    """

    def __init__(self, rates: RateBudget) -> None:
        self.rates = rates
        self._weighed: dict[float, RateBudget] = {1.0: rates}
        self._spans: dict[tuple[Bounds, int], Spans] = {}
        self._last: tuple[Setting, Allocation] | None = None

    def solve(self, setting: Setting) -> Allocation:
        """Allocate. With a weight of keys, nothing is said of the least that any plan would lose.

        Raises
        ------
        InputError : as `RateBudget.solve`.
        """
        last = self._last
        if last is not None and last[0] == setting:
            return last[1]
        if setting.key_weight == 1:
            found = self.rates.solve(setting.budget, setting.bounds)
        else:
            found = self._solve_weighed(setting)
        self._last = setting, found
        return found

    def spans(self, bounds: Bounds, tokens: int) -> Spans:
        """What budgets can ask for within ``bounds``, and for a text of so many tokens.

        Raises
        ------
        InputError : no measured width is within the bounds.
        """
        if (bounds, tokens) not in self._spans:
            best = self.rates.frontier(bounds).filter(kind="allocated")
            bits, nbytes, losses = (_ends(best[name]) for name in ("true_bits", "bytes_per_token", "predicted_loss"))
            plans = [self.rates.plan(BytesPerToken(end), bounds) for end in nbytes]
            # a hair more than a plan holds, so that no end is refused for its rounding
            least, most = (self.rates.held_bytes(plan, tokens) / MEGABYTE * (1 + 1e-9) for plan in plans)
            self._spans[bounds, tokens] = Spans(bits, nbytes, (least, most), losses, tokens)
        return self._spans[bounds, tokens]

    def _solve_weighed(self, setting: Setting) -> Allocation:
        weighed, budget = self._rates(setting.key_weight), setting.budget
        if isinstance(budget, QualityFloor):
            budget = self._reaching(weighed, budget.predicted_loss, setting.bounds)
        found = weighed.solve(budget, setting.bounds)
        uniform = None if found.uniform is None else replace(found.uniform, allocation=self.rates.identity)
        return replace(
            found,
            plan=replace(found.plan, allocation=self.rates.identity),
            predicted_loss=self.rates.predicted_loss(found.plan),
            predicted_least=None,
            uniform=uniform,
            predicted_uniform_loss=None if uniform is None else self.rates.predicted_loss(uniform),
        )

    def _rates(self, key_weight: float) -> RateBudget:
        if key_weight not in self._weighed:
            keys = pl.when(pl.col("tensor") == "keys")
            weighed = keys.then(pl.col("sensitivity") * key_weight).otherwise("sensitivity")
            self._weighed[key_weight] = replace(
                self.rates, sensitivities=self.rates.sensitivities.with_columns(sensitivity=weighed)
            )
        return self._weighed[key_weight]

    def _reaching(self, weighed: RateBudget, loss: float, bounds: Bounds) -> BytesPerToken:
        """The fewest bytes at which a choice by weight loses no more than ``loss``, as measured."""
        costs = weighed.frontier(bounds).filter(kind="allocated")["bytes_per_token"].to_list()

        def lost(place: int) -> float:
            return self.rates.predicted_loss(weighed.plan(BytesPerToken(costs[place]), bounds))

        if lost(len(costs) - 1) > loss * (1 + 1e-9):
            raise InputError(
                f"A loss of {loss:.6g} cannot be reached: the most bits lose {lost(len(costs) - 1):.6g}. Allow that or "
                "more, or allow more bits."
            )
        low, high = 0, len(costs) - 1  # every step of the frontier gives some heads more bits, and takes none
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if lost(middle) <= loss * (1 + 1e-9) else (middle + 1, high)
        return BytesPerToken(costs[low])


def _ends(numbers: pl.Series) -> tuple[float, float]:
    return float(numbers.min()), float(numbers.max())  # type: ignore[arg-type]


def _within(number: float, span: tuple[float, float]) -> float:
    return min(max(number, span[0]), span[1])
