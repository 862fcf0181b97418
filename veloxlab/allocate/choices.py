"""What an allocation chooses from: methods and widths of each layer's keys and values, with their bytes and losses.

A layer's keys have one codec, and so one method; its values too. With ``"ratequant"`` each head has a width of its own:
of all combinations those on the convex hull are offered, which are enough for every budget but for what one head's bit
costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Self

import numpy as np
import polars as pl

from veloxlab.allocate.budget import Bounds, LayerSize, Limit
from veloxlab.allocate.solve import Floats, Ints, Problem
from veloxlab.codecs.method import TENSORS, Tensor
from veloxlab.errors import InputError

PER_HEAD = "ratequant"  # the method whose heads may differ
EXACT = "none"
Place = tuple[int, Tensor]  # a layer, and its keys or values
Chosen = Mapping[Place, "Choice"]


@dataclass(frozen=True, eq=False)
class Choice:
    """A method and a width for each head of one layer's keys or values."""

    method: str  # id; "none" is exact
    widths: tuple[int, ...]  # code bits of each head
    nbytes: float  # of one packed token
    losses: Floats  # predicted for each head [H], in the unit of the sensitivities

    @cached_property
    def mean_width(self) -> float:
        """Code bits, mean over the heads."""
        return sum(self.widths) / len(self.widths)

    @cached_property
    def predicted_loss(self) -> float:
        """Of all heads."""
        return float(self.losses.sum())

    @property
    def settings(self) -> tuple[str, int, dict[str, object]]:
        """Method, bits and options of a layer's settings."""
        return self.method, round(self.mean_width), {"head_bits": list(self.widths)} if self.method == PER_HEAD else {}


@dataclass(frozen=True, eq=False)
class HeadTable:
    """Bytes and predicted losses ``[H, W]`` of one layer's keys or values by one method, at ``widths`` ``[W]``."""

    method: str
    widths: tuple[int, ...]
    nbytes: Floats
    losses: Floats

    def choice(self, columns: Ints | int) -> Choice:
        """The choice with a column for each head, or one column for all."""
        columns = np.broadcast_to(columns, len(self.nbytes))
        at = np.arange(len(columns)), columns
        return Choice(
            self.method, tuple(self.widths[c] for c in columns), float(self.nbytes[at].sum()), self.losses[at]
        )

    def choices(self, bounds: Bounds) -> Iterator[Choice]:
        """All that a plan can hold within the bounds."""
        kept = np.flatnonzero([bounds.least_bits <= width <= bounds.most_bits for width in self.widths])
        if self.method == PER_HEAD and kept.size:
            hull = Problem(self.nbytes[:, kept], self.losses[:, kept]).frontier
            yield from (self.choice(kept[hull.choice(step)]) for step in range(len(hull.costs)))
        else:
            yield from (self.choice(int(column)) for column in kept)


Tables = Mapping[Place, Sequence[HeadTable]]


def exact_choice(size: LayerSize, tensor: Tensor) -> Choice:
    """A layer's keys or values left as they are."""
    dim = size.key_dim if tensor == "keys" else size.value_dim
    widths, heads = (size.exact_bits,) * size.kv_heads, size.kv_heads
    return Choice(EXACT, widths, heads * dim * size.exact_bits / 8, np.zeros(heads))


def head_tables(sensitivities: pl.DataFrame, curves: pl.DataFrame) -> Tables:
    """Tables of every layer's keys and values, one for each method, from `SENSITIVITIES` and `CURVES`.

    A head loses its sensitivity times ½·E‖x − x̂‖²/D; by ``"key_norm"``, whose unit is that of E‖x‖², times the
    relative distortion. Raises `InputError` if the two are not of the same layers and heads.
    """
    by = sensitivities["by"].unique().to_list()
    if len(by) != 1:
        raise InputError(f"The sensitivities are of {len(by)} kinds, {by}: give one kind.")
    share = pl.col("relative") if by == ["key_norm"] else pl.col("distortion") / (2 * pl.col("head_dim"))
    head = ["layer", "head", "tensor"]
    weights = sensitivities.select(*head, "sensitivity")
    joined = curves.join(weights, on=head, how="left", maintain_order="left")
    heads = curves.select(head).unique().height
    if joined["sensitivity"].null_count() or heads != weights.height:
        raise InputError(
            f"The sensitivities are of {weights.height} heads and the curves of {heads}, not all the same: measure "
            "both on one model."
        )
    tables: dict[Place, list[HeadTable]] = {}
    ordered = joined.with_columns(loss=pl.col("sensitivity") * share).sort("head", "bits", maintain_order=True)
    for (layer, tensor, method), rows in ordered.group_by("layer", "tensor", "method", maintain_order=True):
        widths = tuple(rows["bits"].unique().sort())
        nbytes, losses = (rows[name].to_numpy().reshape(-1, len(widths)) for name in ("bytes_per_token", "loss"))
        place: Place = int(layer), TENSORS[TENSORS.index(tensor)]  # methods stay as they were named
        tables.setdefault(place, []).append(HeadTable(str(method), widths, nbytes, losses))
    return tables


def offered(tables: Tables, sizes: Sequence[LayerSize], bounds: Bounds) -> dict[Place, list[Choice]]:
    """All that a plan may give each layer's keys and values; raises `InputError` if no measured width is in bounds."""
    last = sizes[max(0, len(sizes) - bounds.protected_last) :]
    protected = {size.layer for size in (*sizes[: bounds.protected_first], *last)}
    found: dict[Place, list[Choice]] = {}
    for size in sizes:
        for tensor in TENSORS:
            choices = [choice for table in tables[size.layer, tensor] for choice in table.choices(bounds)]
            if not choices:
                raise InputError(
                    f"No width from {bounds.least_bits} to {bounds.most_bits} bits was measured for {tensor} of layer "
                    f"{size.layer}: widen the bounds, or measure those widths."
                )
            if size.layer in protected:
                widest = min(choices, key=lambda choice: (-choice.mean_width, choice.predicted_loss))
                choices = [exact_choice(size, tensor) if bounds.protection == "exact" else widest]
            found[size.layer, tensor] = choices
    return found


@dataclass(frozen=True, eq=False)
class Choices:
    """The choices of a whole model as the columns of a `Problem`."""

    rows: Sequence[Sequence[Chosen]]  # for one layer's keys or values, or for both together
    problem: Problem  # their costs and losses [N, M], of which keys' losses are weighted
    losses: Floats  # as they are predicted

    @classmethod
    def of(
        cls, choices: Mapping[Place, Sequence[Choice]], tokens: Mapping[int, float], bounds: Bounds, key_weight: float
    ) -> Self:
        """All ``choices``, at so many packed ``tokens`` of each layer; of ``bounds``, whether keys go before values."""
        rows: list[list[Chosen]] = [[{place: choice} for choice in own] for place, own in choices.items()]
        if bounds.keys_over_values:
            layers = dict.fromkeys(layer for layer, _ in choices)
            pairs = ((layer, product(choices[layer, "keys"], choices[layer, "values"])) for layer in layers)
            rows = [
                [{(layer, "keys"): k, (layer, "values"): v} for k, v in own if k.mean_width >= v.mean_width]
                for layer, own in pairs
            ]
        costs, losses, weighted = np.full((3, len(rows), max(map(len, rows))), np.inf)
        for i, row in enumerate(rows):
            for j, chosen in enumerate(row):
                costs[i, j] = sum(tokens[layer] * choice.nbytes for (layer, _), choice in chosen.items())
                lost = {tensor: choice.predicted_loss for (_, tensor), choice in chosen.items()}
                losses[i, j] = sum(lost.values())
                weighted[i, j] = losses[i, j] + (key_weight - 1) * lost.get("keys", 0.0)
        return cls(rows, Problem(costs, weighted), losses)

    def chosen(self, columns: Ints) -> Chosen:
        """The choices of a solution, by layer and tensor."""
        return {place: c for row, j in zip(self.rows, columns, strict=True) for place, c in row[int(j)].items()}


def uniform_choices(tables: Tables, sizes: Sequence[LayerSize], limit: Limit) -> Chosen | None:
    """One width for all heads, or two neighbouring ones evenly mixed; None if the least takes more than the limit.

    Keys' heads are taken in the order of the layers, then values'. The method is the first that was measured; where it
    has one width for a layer's keys, all heads of a layer count as one.
    """
    assert limit.nbytes is not None
    first = {(size.layer, tensor): tables[size.layer, tensor][0] for tensor in TENSORS for size in sizes}
    costs = [
        limit.tokens[layer] * (t.nbytes if t.method == PER_HEAD else t.nbytes.sum(axis=0, keepdims=True))
        for (layer, _), t in first.items()
    ]
    columns = even_widths(np.concatenate(costs), limit.nbytes)
    if columns is None:
        return None
    of_place = np.split(columns, np.cumsum([len(cost) for cost in costs])[:-1])
    return {place: table.choice(own) for (place, table), own in zip(first.items(), of_place, strict=True)}


def even_widths(costs: Floats, room: float) -> Ints | None:
    """Columns ``[N]`` of ``costs`` ``[N, W]``: the last that fits for all, and the next for as many rows as still fit.

    These are evenly spaced. None if the first column does not fit.
    """
    room *= 1 + 1e-9
    totals = costs.sum(axis=0)
    if totals[0] > room:
        return None
    column, count = int(np.flatnonzero(totals <= room)[-1]), len(costs)
    columns = np.full(count, column)
    if column + 1 < costs.shape[1]:
        more = costs[:, column + 1] - costs[:, column]
        for some in range(count - 1, 0, -1):
            even = np.diff(np.arange(count + 1) * some // count) == 1
            if totals[column] + more[even].sum() <= room:
                columns[even] += 1
                break
    return columns
