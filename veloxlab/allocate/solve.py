"""Choosing one of several costs and losses for each of many components, within a budget: exactly, and at once.

A component may be one KV head's keys at one of several widths, or a layer's values by one of several methods. The best
choices lie on the lower convex hulls of the components' points: their steps are sorted once by the loss that a byte
saves there, and a budget is a place in that order. It is the Lagrangian solution (H. Everett, 1963; Y. Shoham and A.
Gersho, 1988, for bit allocation), with λ the slope at that place.

Where the steps end exactly at the budget, no other choice within it loses less. Elsewhere what is left over is filled
with the best moves that fit, and `Solution.bound` says what no choice within the budget can fall below. For convex
curves with steps of one cost it is RateQuant's greedy rule (arXiv 2605.06675, .4), and optimal always.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from veloxlab.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

ROUNDING = 1e-9  # of sums of costs, relative to the budget


class Solution(NamedTuple):
    """The column ``[N]`` that each component takes, and the sums of their costs and losses.

    No choice of at most the budget's cost loses less than ``bound``, which is 0 where a loss was asked for.
    """

    choice: Ints
    cost: float
    loss: float
    bound: float


class Frontier(NamedTuple):
    """The steps of all hulls in the order of their slopes: the best that a cost can do wherever a step ends."""

    costs: Floats  # [K + 1], the sums before the first step and after each, ascending
    losses: Floats  # [K + 1], likewise
    slopes: Floats  # [K], what each step saves for its cost
    rows: Ints  # [K], the component that it is of
    vertices: Ints  # [V, N], the columns of each component's hull

    def choice(self, taken: int) -> Ints:
        """Columns after the first ``taken`` steps."""
        count = self.vertices.shape[1]
        return self.vertices[np.bincount(self.rows[:taken], minlength=count), np.arange(count)]


@dataclass(frozen=True, eq=False)
class Problem:
    """``costs`` and ``losses`` ``[N, M]`` of N components, infinite for no choice; `InputError` if one has none."""

    costs: Floats
    losses: Floats

    def __post_init__(self) -> None:
        there = np.isfinite(self.costs) & np.isfinite(self.losses)
        if (none := np.flatnonzero(~there.any(axis=1))).size:
            raise InputError(f"Component {none[0]} has no choice left: widen the bounds, or measure more widths.")

    @cached_property
    def frontier(self) -> Frontier:
        """Walk all hulls at once, from the cheapest choice to the steepest one beyond it, and so on."""
        costs, losses, everyone = self.costs, self.losses, np.arange(len(self.costs))
        at = np.where(costs == costs.min(axis=1, keepdims=True), losses, np.inf).argmin(axis=1)
        walked, walked_slopes, before = [at], [], np.full(len(costs), np.inf)
        while True:
            cost, loss = costs[everyone, at, None], losses[everyone, at, None]
            further = (costs > cost) & np.isfinite(losses)
            extra = np.where(further, costs - cost, np.inf)
            slope = np.where(further, (loss - np.where(further, losses, 0)) / extra, -np.inf)
            steepest = slope.max(axis=1)
            before = np.minimum(before, steepest)  # slopes of a hull fall; rounding may have it otherwise
            if not (before > 0).any():
                break
            following = np.where(slope == steepest[:, None], extra, np.inf).argmin(axis=1)
            at = np.where(before > 0, following, at)
            walked.append(at)
            walked_slopes.append(before)
        vertices, slopes = np.stack(walked), np.reshape(walked_slopes, (-1, len(costs)))
        depth, rows = np.nonzero(slopes > 0)
        order = np.lexsort((depth, -slopes[depth, rows]))  # equal steps of one component keep their order
        depth, rows = depth[order], rows[order]
        more_cost, more_loss = (np.diff(t[everyone, vertices], axis=0)[depth, rows] for t in (costs, losses))
        # losses are summed from the small end, so that those of many bits are not the rounding of those of few
        less_loss = np.cumsum(-more_loss[::-1])[::-1]
        spent = costs[everyone, vertices[0]].sum() + np.concatenate([[0.0], np.cumsum(more_cost)])
        lost = losses[everyone, vertices[-1]].sum() + np.concatenate([less_loss, [0.0]])
        return Frontier(spent, lost, slopes[depth, rows], rows, vertices)

    def within(self, budget: float) -> Solution:
        """The least loss for at most ``budget``, no less than the cheapest choices cost, as the module says."""
        frontier, room = self.frontier, budget * (1 + ROUNDING)
        taken = int(np.searchsorted(frontier.costs, room, side="right")) - 1
        left = max(0.0, budget - float(frontier.costs[taken]))
        slope = float(frontier.slopes[taken]) if taken < len(frontier.slopes) else 0.0
        return self._solution(self._filled(frontier.choice(taken), room), float(frontier.losses[taken]) - slope * left)

    def reaching(self, loss: float, losses: Floats) -> Solution:
        """The first place in the order with a loss of at most ``loss``; it costs at most one step more than the best.

        ``losses`` are those without weights. Raises `InputError` if even the best choices lose more.
        """
        everyone, last, allowed = np.arange(len(losses)), len(self.frontier.slopes), loss * (1 + ROUNDING)

        def lost(step: int) -> float:
            return float(losses[everyone, self.frontier.choice(step)].sum())

        if lost(last) > allowed:
            wrong = f"A loss of {loss:.6g} cannot be reached: the most bits lose {lost(last):.6g}"
            raise InputError(f"{wrong}. Allow that or more, or allow more bits.")
        taken = bisect_left(range(last), True, key=lambda step: lost(step) <= allowed)
        return self._solution(self.frontier.choice(taken), 0.0)

    def _filled(self, choice: Ints, room: float) -> Ints:
        """Spend what is left on the moves that save most for their cost, among all that fit."""
        choice, everyone = choice.copy(), np.arange(len(choice))
        while True:
            cost, loss = self.costs[everyone, choice], self.losses[everyone, choice]
            extra, gain = self.costs - cost[:, None], loss[:, None] - self.losses
            fits = (extra <= room - cost.sum()) & (gain > 0)
            if not fits.any():
                return choice
            worth = np.where(fits, np.inf, -np.inf)  # a move that costs nothing is worth most
            np.divide(gain, extra, out=worth, where=fits & (extra > 0))
            row, column = np.unravel_index(np.argmax(worth), worth.shape)
            choice[row] = column

    def _solution(self, choice: Ints, bound: float) -> Solution:
        cost, loss = (float(table[np.arange(len(choice)), choice].sum()) for table in (self.costs, self.losses))
        return Solution(choice, cost, loss, bound)
