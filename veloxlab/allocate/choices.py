"""The choices of a whole model as one problem, and the uniform-width baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from veloxlab.allocate.budget import Limit
from veloxlab.allocate.points import Bounds, Chosen, Place, Point
from veloxlab.allocate.solve import Floats, Ints, Problem


@dataclass(frozen=True, eq=False)
class Choices:
    """Points as columns of a `Problem`; a row is a layer's side, or both sides together."""

    problem: Problem
    rows: Sequence[Sequence[Chosen]]

    @classmethod
    def of(cls, points: Mapping[Place, Sequence[Point]], limit: Limit, bounds: Bounds) -> Self:
        """The points of all layers, at the tokens of a ``limit``; of ``bounds``, whether keys go before values."""
        rows: list[list[Chosen]] = []
        if bounds.keys_over_values:
            for layer in dict.fromkeys(layer for layer, _ in points):
                pairs = [(k, v) for k in points[layer, "keys"] for v in points[layer, "values"] if k.width >= v.width]
                rows.append([{(layer, "keys"): k, (layer, "values"): v} for k, v in pairs])
        else:
            rows = [[{place: point} for point in own] for place, own in points.items()]
        tables = np.full((2, len(rows), max(map(len, rows))), np.inf)
        for i, row in enumerate(rows):
            for j, choice in enumerate(row):
                tables[0, i, j] = sum(limit.tokens[layer] * point.nbytes for (layer, _), point in choice.items())
                tables[1, i, j] = sum(point.predicted_loss for point in choice.values())
        return cls(Problem(tables[0], tables[1]), rows)

    def chosen(self, columns: Ints) -> Chosen:
        """The points of a solution."""
        return {place: p for row, j in zip(self.rows, columns, strict=True) for place, p in row[int(j)].items()}


def spread_widths(costs: Floats, room: float) -> Ints | None:
    """Columns ``[N]`` of ``costs`` ``[N, W]``: the largest that fits for all, and the next for as many as still fit,
    evenly spread over the rows; None if the first does not fit.
    """
    room *= 1 + 1e-9
    totals = costs.sum(axis=0)
    if totals[0] > room:
        return None
    column = int(np.flatnonzero(totals <= room)[-1])
    count = len(costs)
    columns = np.full(count, column)
    if column + 1 == costs.shape[1]:
        return columns
    more = costs[:, column + 1] - costs[:, column]
    for some in range(count - 1, 0, -1):
        spread = np.diff(np.arange(count + 1) * some // count) == 1
        if totals[column] + more[spread].sum() <= room:
            columns[spread] += 1
            break
    return columns
