"""Choose one of several costs and losses for each of many components, within a budget.

A component may be one KV head's keys at one of several widths, or a layer's values by one of several methods. The best
choices lie on the lower convex hulls of the components' points. The steps of all hulls are sorted once by the loss
that a byte saves, and a budget is a position in that order. It is the Lagrangian solution (H. Everett, 1963; Y. Shoham
and A. Gersho, 1988, for bit allocation), with λ the slope at that position.

If a step ends exactly at the budget, no other choice within it loses less. Otherwise the rest of the budget is filled
with the best moves that fit, and `Solution.bound` is a lower bound for all choices within the budget. For convex
curves with steps of one cost this is RateQuant's greedy rule (arXiv 2605.06675, .4), which is then optimal.
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
    """The chosen column of each component ``[N]``, and the sums of costs and losses.

    No choice within the budget loses less than ``bound``. It is 0 if the request was a loss.
    """

    choice: Ints
    cost: float
    loss: float
    bound: float


class Frontier(NamedTuple):
    """The steps of all hulls in the order of their slopes: the optimum at each cost where a step ends."""

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
    """``costs`` and ``losses`` ``[N, M]`` of N components, infinite if missing; `InputError` if one has no choice."""

    costs: Floats
    losses: Floats

    def __post_init__(self) -> None:
        there = np.isfinite(self.costs) & np.isfinite(self.losses)
        if (none := np.flatnonzero(~there.any(axis=1))).size:
            raise InputError(f"Component {none[0]} has no choice left: widen the bounds, or measure more widths.")

    @cached_property
    def frontier(self) -> Frontier:
        """Walk all hulls in parallel, from the cheapest choice to the next vertex, and so on."""
        costs, losses, everyone = self.costs, self.losses, np.arange(len(self.costs))
        at = np.where(costs == costs.min(axis=1, keepdims=True), losses, np.inf).argmin(axis=1)
        walked, walked_slopes, before = [at], [], np.full(len(costs), np.inf)
        while True:
            cost, loss = costs[everyone, at, None], losses[everyone, at, None]
            further = (costs > cost) & np.isfinite(losses)
            extra = np.where(further, costs - cost, np.inf)
            slope = np.where(further, (loss - np.where(further, losses, 0)) / extra, -np.inf)
            steepest = slope.max(axis=1)
            before = np.minimum(before, steepest)  # slopes of a hull fall, but for rounding
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
        """The least loss for at most ``budget``, which is enough for the cheapest choices; see the module."""
        frontier, room = self.frontier, budget * (1 + ROUNDING)
        taken = int(np.searchsorted(frontier.costs, room, side="right")) - 1
        left = max(0.0, budget - float(frontier.costs[taken]))
        slope = float(frontier.slopes[taken]) if taken < len(frontier.slopes) else 0.0
        return self._solution(self._filled(frontier.choice(taken), room), float(frontier.losses[taken]) - slope * left)

    def reaching(self, loss: float, losses: Floats) -> Solution:
        """The first position in the order with a loss of at most ``loss``, at most one step above the least cost.

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
        """Spend the rest of the budget on the moves that save most for their cost, among those that fit."""
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
