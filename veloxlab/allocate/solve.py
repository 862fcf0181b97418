"""Choosing one of several costs and losses for each of many components, within a budget: exactly, and at once.

A component may be one KV head's keys at one of several widths, or a layer's values by one of several methods. The best
choices for every budget lie on the lower convex hulls of the components' points: their steps are sorted once by the
loss that a byte saves there, and a budget is then a place in that order, found by bisection. It is the Lagrangian
solution (H. Everett, 1963; Y. Shoham and A. Gersho, 1988, for bit allocation), with λ the slope at that place.

What is guaranteed
    Where the steps end exactly at the budget, no other choice within it loses less. Elsewhere what is left over is
    filled with the best moves that fit, and `Solution.bound` says what no choice within the budget can fall below.
    For convex curves with steps of one cost it is RateQuant's greedy rule (arXiv 2605.06675, .4), and optimal always.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from veloxlab.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

_ROUNDING = 1e-9  # of sums of costs, relative to the budget


@dataclass(frozen=True, eq=False)
class Solution:
    """One choice for each component.

    Attributes
    ----------
    choice : ``[N]``, the column that each component takes.
    cost, loss : their sums.
    bound : no choice of at most the budget's cost loses less; of at most the loss asked for, none costs less.
    """

    choice: Ints
    cost: float
    loss: float
    bound: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Components and their choices.

    Parameters
    ----------
    costs, losses : ``[N, M]``, both infinite where a component does not have that choice.

    Raises
    ------
    InputError : the tables differ in shape, are empty, or a component has no choice.
    """

    costs: Floats
    losses: Floats

    def __post_init__(self) -> None:
        if self.costs.ndim != 2 or self.costs.shape != self.losses.shape or not self.costs.size:
            raise InputError(
                f"Costs and losses are tables of one shape, components by choices, and have the shapes "
                f"{self.costs.shape} and {self.losses.shape}."
            )
        there = np.isfinite(self.costs) & np.isfinite(self.losses)
        if (none := np.flatnonzero(~there.any(axis=1))).size:
            raise InputError(f"Component {none[0]} has no choice left: widen the bounds, or measure more widths.")

    @cached_property
    def _steps(self) -> _Steps:
        return _hull_steps(self.costs, self.losses)

    @property
    def least_cost(self) -> float:
        """Cost of the cheapest choices."""
        return float(self._steps.costs[0])

    @property
    def frontier(self) -> tuple[Floats, Floats]:
        """Costs, ascending, and losses at every place where a step ends: the best that those costs can do."""
        return self._steps.costs, self._steps.losses

    def at_step(self, step: int) -> Ints:
        """Columns at a place of the `frontier`."""
        return self._steps.choice(step)

    def within(self, budget: float) -> Solution:
        """The least loss for at most ``budget``; see the module for what is guaranteed.

        Raises
        ------
        InputError : even the cheapest choices cost more.
        """
        steps = self._steps
        room = budget * (1 + _ROUNDING)
        if room < steps.costs[0]:
            raise InputError(
                f"A budget of {budget:,.6g} is too small: the cheapest choices cost {steps.costs[0]:,.6g}. Give that "
                "or more, or allow fewer bits."
            )
        taken = int(np.searchsorted(steps.costs, room, side="right")) - 1
        left = max(0.0, budget - float(steps.costs[taken]))
        slope = float(steps.slopes[taken]) if taken < len(steps.slopes) else 0.0
        choice = self._filled(steps.choice(taken), room)
        return self._solution(choice, float(steps.losses[taken]) - slope * left)

    def reaching(self, loss: float, losses: Floats | None = None) -> Solution:
        """The first place in the order with a loss of at most ``loss``; of ``losses``, if those of the problem are
        weighted. It costs at most one step more than the best. `Solution.bound` is a cost here, 0 with ``losses``.

        Raises
        ------
        InputError : even the best choices lose more.
        """
        table, steps = self.losses if losses is None else losses, self._steps
        rows, last = np.arange(len(table)), len(steps.slopes)

        def lost(step: int) -> float:
            return float(table[rows, steps.choice(step)].sum())

        if lost(last) > loss * (1 + _ROUNDING):
            raise InputError(
                f"A loss of {loss:.6g} cannot be reached: the most bits lose {lost(last):.6g}. Allow that or more, or "
                "allow more bits."
            )
        taken = bisect_left(range(last), True, key=lambda step: lost(step) <= loss * (1 + _ROUNDING))
        bound = 0.0
        if losses is None:
            over = max(0.0, loss - float(steps.losses[taken]))
            bound = float(steps.costs[taken]) - over / (float(steps.slopes[taken - 1]) if taken else np.inf)
        return self._solution(steps.choice(taken), bound)

    def _filled(self, choice: Ints, room: float) -> Ints:
        """Spend what is left on the moves that save most for their cost, among all that fit."""
        rows = np.arange(len(choice))
        while True:
            cost, loss = self.costs[rows, choice], self.losses[rows, choice]
            extra, gain = self.costs - cost[:, None], loss[:, None] - self.losses
            fits = (extra <= room - cost.sum()) & (gain > 0)
            if not fits.any():
                return choice
            worth = np.where(fits, np.inf, -np.inf)  # a move that costs nothing is worth most
            np.divide(gain, extra, out=worth, where=fits & (extra > 0))
            row, column = np.unravel_index(np.argmax(worth), worth.shape)
            choice = choice.copy()
            choice[row] = column

    def _solution(self, choice: Ints, bound: float) -> Solution:
        rows = np.arange(len(choice))
        cost, loss = float(self.costs[rows, choice].sum()), float(self.losses[rows, choice].sum())
        return Solution(choice, cost, loss, bound)


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of all hulls in the order of their slopes.

    ``vertices`` ``[N, V]`` are the columns of each component's hull; ``rows`` and ``slopes`` ``[K]`` say whose step is
    next and what it saves for its cost; ``costs`` and ``losses`` ``[K + 1]`` are the sums before the first step and
    after each.
    """

    vertices: Ints
    rows: Ints
    slopes: Floats
    costs: Floats
    losses: Floats

    def choice(self, taken: int) -> Ints:
        """Columns after the first ``taken`` steps."""
        steps = np.bincount(self.rows[:taken], minlength=len(self.vertices))
        return self.vertices[np.arange(len(self.vertices)), steps]


def _hull_steps(costs: Floats, losses: Floats) -> _Steps:
    """Walk all hulls at once, from the cheapest choice to the steepest one beyond it, and so on."""
    count = len(costs)
    everyone = np.arange(count)
    cheapest = costs.min(axis=1, keepdims=True)
    at = np.where(costs == cheapest, losses, np.inf).argmin(axis=1)
    vertices, rows, slopes, more_cost, less_loss = [at], [], [], [], []
    before = np.full((count, 1), np.inf)
    while True:
        cost, loss = costs[everyone, at], losses[everyone, at]
        further = (costs > cost[:, None]) & np.isfinite(losses)
        extra = np.where(further, costs - cost[:, None], np.inf)
        slope = np.where(further, (loss[:, None] - np.where(further, losses, 0)) / extra, -np.inf)
        steepest = slope.max(axis=1, keepdims=True)
        following = np.where(slope == steepest, extra, np.inf).argmin(axis=1)
        before = np.minimum(before, steepest)  # slopes of a hull fall; rounding may have it otherwise
        moving = np.flatnonzero(before[:, 0] > 0)
        if not moving.size:
            break
        at = at.copy()
        at[moving] = following[moving]
        vertices.append(at)
        rows.append(moving)
        slopes.append(before[moving, 0])
        more_cost.append((costs[everyone, at] - cost)[moving])
        less_loss.append((loss - losses[everyone, at])[moving])
    all_slopes = np.concatenate(slopes) if slopes else np.zeros(0)
    # steps of one component keep their order where their slopes are equal
    depth = np.concatenate([np.full(len(r), i) for i, r in enumerate(rows)]) if rows else np.zeros(0, np.intp)
    order = np.lexsort((depth, -all_slopes))
    empty = np.zeros(0)
    costs_by_step, losses_by_step, rows_by_step = (
        np.concatenate(part)[order] if part else empty for part in (more_cost, less_loss, rows)
    )
    # losses are summed from the small end, so that those of many bits are not the rounding of those of few
    first_cost, last_loss = costs[everyone, vertices[0]].sum(), losses[everyone, vertices[-1]].sum()
    return _Steps(
        np.stack(vertices, axis=1),
        rows_by_step.astype(np.intp),
        all_slopes[order],
        first_cost + np.concatenate([[0.0], np.cumsum(costs_by_step)]),
        last_loss + np.concatenate([np.cumsum(losses_by_step[::-1])[::-1], [0.0]]),
    )
