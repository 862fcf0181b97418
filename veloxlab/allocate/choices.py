"""What an allocation chooses from: methods and widths of each layer's keys and values, with their bytes and losses.

A layer's keys have one codec, and so one method; its values too. With ``"ratequant"`` each head has a width of its own:
of all combinations those on the convex hull are offered, which are enough for every budget but for what one head's bit
costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple, Self

import numpy as np
import polars as pl

from veloxlab.allocate.budget import Bounds
from veloxlab.allocate.solve import ROUNDING, Floats, Ints, Problem
from veloxlab.cache.plan import Plan
from veloxlab.codecs.method import TENSORS, Tensor
from veloxlab.errors import InputError
from veloxlab.measure.frames import PLACE, schema
from veloxlab.mlxlm.probe import LayerFacts

PER_HEAD = "ratequant"  # the method whose heads may differ
EXACT = "none"
Place = tuple[int, Tensor]  # a layer, and its keys or values
Chosen = Mapping[Place, "Choice"]


CURVES = schema(PLACE + "method bits head_dim distortion relative true_bits bytes_per_token")
"""Columns of `vl.allocate.distortion_curves`: ``bits`` are code bits; ``distortion`` is E‖x − x̂‖² over the tokens
behind the sinks, ``relative`` Σ‖x − x̂‖² / Σ‖x‖² over the same; ``true_bits`` are stored bits per coordinate, scales and
padding included, ``bytes_per_token`` those stored for one token of this head."""


class Choice(NamedTuple):
    """A method and a width for each head of one layer's keys or values."""

    method: str  # id; "none" is exact
    widths: tuple[int, ...]  # code bits of each head
    nbytes: float  # of one packed token
    losses: Floats  # predicted for each head [H], in the unit of the sensitivities

    @classmethod
    def exact(cls, size: LayerFacts, tensor: Tensor) -> Self:
        """A layer's keys or values left as they are."""
        widths = (size.exact_bits,) * size.kv_heads
        return cls(EXACT, widths, size.dims[tensor] * sum(widths) / 8, np.zeros(size.kv_heads))

    @property
    def mean_width(self) -> float:
        """Code bits, mean over the heads."""
        return sum(self.widths) / len(self.widths)

    @property
    def predicted_loss(self) -> float:
        """Of all heads."""
        return float(self.losses.sum())

    @property
    def settings(self) -> tuple[str, int, dict[str, object]]:
        """Method, bits and options of a layer's settings."""
        return self.method, round(self.mean_width), {"head_bits": list(self.widths)} if self.method == PER_HEAD else {}


class HeadTable(NamedTuple):
    """Bytes and predicted losses ``[H, W]`` of one layer's keys or values by one method, at ``widths`` ``[W]``."""

    method: str
    widths: tuple[int, ...]
    nbytes: Floats
    losses: Floats

    def choice(self, columns: Ints | Sequence[int] | int) -> Choice:
        """The choice with a column for each head, or one column for all."""
        columns = np.broadcast_to(columns, len(self.nbytes))
        at, widths = (np.arange(len(columns)), columns), tuple(self.widths[c] for c in columns)
        return Choice(self.method, widths, float(self.nbytes[at].sum()), self.losses[at])

    def choices(self, bounds: Bounds) -> Iterator[Choice]:
        """All that a plan can hold within the bounds."""
        kept = np.flatnonzero([bounds.least_bits <= width <= bounds.most_bits for width in self.widths])
        if self.method == PER_HEAD and kept.size:
            hull = Problem(self.nbytes[:, kept], self.losses[:, kept]).frontier
            yield from (self.choice(kept[hull.choice(step)]) for step in range(len(hull.costs)))
        else:
            yield from (self.choice(int(column)) for column in kept)


class Choices(NamedTuple):
    """Choices of a whole model as the columns of a `Problem`."""

    rows: Sequence[Sequence[Chosen]]  # for one layer's keys or values, or for both together
    problem: Problem  # their costs and losses [N, M], of which keys' losses are weighted
    losses: Floats  # as they are predicted

    def chosen(self, columns: Ints) -> Chosen:
        """The choices of a solution, by layer and tensor."""
        return {place: c for row, j in zip(self.rows, columns, strict=True) for place, c in row[int(j)].items()}


@dataclass(frozen=True, eq=False)
class Offer:
    """Tables by method of each layer's keys and values, in the order of `sizes`; ``known`` are choices made of them."""

    sizes: Sequence[LayerFacts]
    tables: Mapping[Place, Sequence[HeadTable]]
    known: dict[tuple[Bounds, tuple[float, ...], float], Choices] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes: Sequence[LayerFacts], sensitivities: pl.DataFrame, curves: pl.DataFrame) -> Self:
        """The tables from `SENSITIVITIES` and `CURVES`.

        A head loses its sensitivity times ½·E‖x − x̂‖²/D; by ``"key_norm"``, whose unit is that of E‖x‖², times the
        relative distortion. Raises `InputError` if the two are not of the same layers and heads.
        """
        by = sensitivities["by"].unique().to_list()
        if len(by) != 1:
            raise InputError(f"The sensitivities are of {len(by)} kinds, {by}: give one kind.")
        share = pl.col("relative") if by == ["key_norm"] else pl.col("distortion") / (2 * pl.col("head_dim"))
        head = ["layer", "head", "tensor"]
        joined = curves.join(sensitivities.select(*head, "sensitivity"), on=head, how="left", maintain_order="left")
        heads = curves.select(head).unique().height
        if joined["sensitivity"].null_count() or heads != sensitivities.height:
            wrong = f"The sensitivities are of {sensitivities.height} heads and the curves of {heads}, not all the same"
            raise InputError(f"{wrong}: measure both on one model.")
        tables: dict[Place, list[HeadTable]] = {(size.layer, tensor): [] for tensor in TENSORS for size in sizes}
        rows = joined.with_columns(loss=pl.col("sensitivity") * share).sort("head", "bits", maintain_order=True)
        for (layer, tensor, method), own in rows.group_by("layer", "tensor", "method", maintain_order=True):
            widths = tuple(own["bits"].unique().sort())
            nbytes, losses = (own[name].to_numpy().reshape(-1, len(widths)) for name in ("bytes_per_token", "loss"))
            tables[layer, tensor].append(HeadTable(str(method), widths, nbytes, losses))
        return cls(sizes, tables)

    def choices(self, bounds: Bounds, tokens: tuple[float, ...] = (), key_weight: float = 1.0) -> Choices:
        """All that a plan may give within ``bounds``, at so many packed ``tokens`` of each layer, alike by default."""
        tokens = tokens or (1.0,) * len(self.sizes)
        if (bounds, tokens, key_weight) in self.known:
            return self.known[bounds, tokens, key_weight]
        found, last = self._within(bounds), dict(zip((size.layer for size in self.sizes), tokens, strict=True))
        rows: list[list[Chosen]] = [[{place: choice} for choice in own] for place, own in found.items()]
        if bounds.keys_over_values:
            rows = [
                [
                    {(layer, "keys"): k, (layer, "values"): v}
                    for k, v in product(found[layer, "keys"], found[layer, "values"])
                    if k.mean_width >= v.mean_width
                ]
                for layer in last
            ]
        costs, losses, weighted = np.full((3, len(rows), max(map(len, rows))), np.inf)
        for i, row in enumerate(rows):
            for j, chosen in enumerate(row):
                costs[i, j] = sum(last[layer] * choice.nbytes for (layer, _), choice in chosen.items())
                lost = {tensor: choice.predicted_loss for (_, tensor), choice in chosen.items()}
                losses[i, j] = sum(lost.values())
                weighted[i, j] = losses[i, j] + (key_weight - 1) * lost.get("keys", 0.0)
        made = self.known[bounds, tokens, key_weight] = Choices(rows, Problem(costs, weighted), losses)
        return made

    def _within(self, bounds: Bounds) -> dict[Place, list[Choice]]:
        """What may be given to each layer's keys and values; `InputError` if no measured width is within the bounds."""
        count = len(self.sizes)
        found: dict[Place, list[Choice]] = {}
        for i, size in enumerate(self.sizes):
            for tensor in TENSORS:
                choices = [choice for table in self.tables[size.layer, tensor] for choice in table.choices(bounds)]
                if not choices:
                    raise InputError(
                        f"No width from {bounds.least_bits} to {bounds.most_bits} bits was measured for {tensor} of "
                        f"layer {size.layer}: widen the bounds, or measure those widths."
                    )
                if i < bounds.protected_first or i >= count - bounds.protected_last:
                    widest = min(choices, key=lambda choice: (-choice.mean_width, choice.predicted_loss))
                    choices = [Choice.exact(size, tensor) if bounds.protection == "exact" else widest]
                found[size.layer, tensor] = choices
        return found

    @property
    def first(self) -> dict[Place, HeadTable]:
        """Tables of the method that was measured first, keys' before values'."""
        return {place: tables[0] for place, tables in self.tables.items()}

    def uniform(self, tokens: Sequence[float], room: float) -> Chosen | None:
        """One width for all heads, or two neighbouring ones evenly mixed; None if the least takes more than ``room``.

        Keys' heads are taken in the order of the layers, then values'. Where the first method has one width for a
        layer's keys, all heads of a layer count as one.
        """
        costs = [
            many * (t.nbytes if t.method == PER_HEAD else t.nbytes.sum(axis=0, keepdims=True))
            for many, t in zip([*tokens, *tokens], self.first.values(), strict=True)
        ]
        columns = even_widths(np.concatenate(costs), room)
        if columns is None:
            return None
        of_place = np.split(columns, np.cumsum([len(cost) for cost in costs])[:-1])
        return {place: table.choice(own) for (place, table), own in zip(self.first.items(), of_place, strict=True)}

    def chosen(self, plan: Plan) -> Chosen:
        """What a plan gives each layer's keys and values; `InputError` if a method or a width was not measured."""
        return {
            (size.layer, tensor): self._choice(size, tensor, method, plan.widths(size.layer, tensor))
            for size in self.sizes
            for tensor, method, _, _ in plan.layers[size.layer].tensors
        }

    def _choice(self, size: LayerFacts, tensor: Tensor, method: str, widths: tuple[float, ...]) -> Choice:
        if method == EXACT:
            return Choice.exact(size, tensor)
        table = next((t for t in self.tables[size.layer, tensor] if t.method == method), None)
        if table is None or not {*widths} <= {*table.widths}:
            missing = f"{method} at {widths} bits was not measured for the {tensor} of layer {size.layer}"
            raise InputError(f"{missing}: measure the method's curves at these widths.")
        return table.choice([table.widths.index(width) for width in widths])


def even_widths(costs: Floats, room: float) -> Ints | None:
    """Columns ``[N]`` of ``costs`` ``[N, W]``: the last that fits all, evenly one more where it fits; None if none."""
    count, every = len(costs), np.arange(len(costs))
    fitting = np.flatnonzero(costs.sum(axis=0) <= room * (1 + ROUNDING))
    if not fitting.size:
        return None
    columns = np.full(count, fitting[-1])
    for some in range(count - 1, 0, -1) if fitting[-1] + 1 < costs.shape[1] else ():
        more = columns + np.diff(np.arange(count + 1) * some // count)
        if costs[every, more].sum() <= room * (1 + ROUNDING):
            return more
    return columns
