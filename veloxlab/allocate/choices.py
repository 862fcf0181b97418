"""What an allocation chooses from: methods and widths of each layer's keys and values, with their bytes and losses.

A layer's keys have one codec, and so one method; its values too. Where each head has a width of its own,
only the combinations on the convex hull are offered. They are enough for every budget, up to the cost of one bit of
one head. See `veloxlab.allocate.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import fsum
from statistics import fmean
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl

from veloxlab.allocate.budget import LEAST, Bounds
from veloxlab.allocate.solve import ROUNDING, Floats, Ints, Problem
from veloxlab.allocate.tables import EXACT, Choice, HeadTable, Place, Spectra
from veloxlab.cache.plan import Plan
from veloxlab.codecs import find_method
from veloxlab.codecs.method import TENSORS, Tensor
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import LayerFacts

Chosen = Mapping[Place, Choice]


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
    """Tables by method of each layer's keys and values, in the order of `sizes`; ``known`` keeps their choices."""

    sizes: Sequence[LayerFacts]
    tables: Mapping[Place, Sequence[HeadTable]]
    spectra: Spectra | None = None
    known: dict[tuple[Bounds, tuple[float, ...], float, int], Choices] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        sizes: Sequence[LayerFacts],
        sensitivities: pl.DataFrame,
        curves: pl.DataFrame,
        spectra: Spectra | None = None,
    ) -> Self:
        """The tables from `SENSITIVITIES` and `CURVES`, and from spectra.

        A head loses its sensitivity times ½·E‖x − x̂‖²/D; by ``"key_norm"``, whose unit is that of E‖x‖², times the
        relative distortion. Raises `InputError` if they are not of the same layers and heads.
        """
        by = sensitivities["by"].unique().to_list()
        if len(by) != 1:
            raise InputError(f"The sensitivities are of {len(by)} kinds, {by}: give one kind.")
        share = pl.col("relative") if by == ["key_norm"] else pl.col("distortion") / (2 * pl.col("head_dim"))
        head = ["layer", "head", "tensor"]
        joined = curves.join(sensitivities.select(*head, "sensitivity"), on=head, how="left", maintain_order="left")
        heads = curves.select(head).unique().height or sensitivities.height
        if joined["sensitivity"].null_count() or heads != sensitivities.height:
            wrong = f"The sensitivities are of {sensitivities.height} heads and the curves of {heads}, not all the same"
            raise InputError(f"{wrong}: measure both on one model.")
        tables: dict[Place, list[HeadTable]] = {(size.layer, tensor): [] for tensor in TENSORS for size in sizes}
        rows = joined.with_columns(loss=pl.col("sensitivity") * share).sort("head", "bits", maintain_order=True)
        for (layer, tensor, method), own in rows.group_by("layer", "tensor", "method", maintain_order=True):
            widths = tuple(own["bits"].unique().sort())
            nbytes, losses = (own[name].to_numpy().reshape(-1, len(widths)) for name in ("bytes_per_token", "loss"))
            tables[layer, tensor].append(HeadTable(str(method), widths, nbytes, losses))
        if spectra:
            for place, variances in spectra.variances.items():
                tables[place].append(HeadTable.of_words(spectra.method, spectra.rows, variances))
        return cls(sizes, tables, spectra)

    def choices(
        self, bounds: Bounds, tokens: tuple[float, ...] = (), key_weight: float = 1.0, usual: int = LEAST
    ) -> Choices:
        """All choices within ``bounds``, for these numbers of packed ``tokens`` in each layer (equal by default).

        If the bounds have no least width, it is ``usual``.
        """
        tokens = tokens or (1.0,) * len(self.sizes)
        if (bounds, tokens, key_weight, usual) in self.known:
            return self.known[bounds, tokens, key_weight, usual]
        found, last = self._within(bounds, usual), dict(zip((size.layer for size in self.sizes), tokens, strict=True))
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
        made = self.known[bounds, tokens, key_weight, usual] = Choices(rows, Problem(costs, weighted), losses)
        return made

    def _within(self, bounds: Bounds, usual: int) -> dict[Place, list[Choice]]:
        """The choices for each layer's keys and values; `InputError` if no measured width is within the bounds."""
        count = len(self.sizes)
        found: dict[Place, list[Choice]] = {}
        for i, size in enumerate(self.sizes):
            for tensor in TENSORS:
                tables = [t for t in self.tables[size.layer, tensor] if t.method in (bounds.methods or (t.method,))]
                choices = [choice for table in tables for choice in table.choices(bounds, usual)]
                if not choices:
                    of = f" of {' or '.join(bounds.methods)}" if bounds.methods else ""
                    raise InputError(
                        f"No width{of} from {bounds.least_bits or usual} to {bounds.most_bits} bits was measured for "
                        f"{tensor} of layer {size.layer}: widen the bounds, or measure those widths."
                    )
                if i < bounds.protected_first or i >= count - bounds.protected_last:
                    widest = min(choices, key=lambda choice: (-choice.mean_width, choice.predicted_loss))
                    choices = [Choice.exact(size, tensor) if bounds.protection == "exact" else widest]
                found[size.layer, tensor] = choices
        return found

    @property
    def first(self) -> dict[Place, HeadTable]:
        """Tables of the method that was measured first, keys' before values'."""
        return {place: tables[0].at_whole_widths for place, tables in self.tables.items()}

    def uniform(self, tokens: Sequence[float], room: float) -> Chosen | None:
        """One width for all heads, or two neighbouring ones evenly mixed; None if the least takes more than ``room``.

        Keys' heads are taken in the order of the layers, then values'. Where the first method has one width for a
        layer's keys, all heads of a layer count as one.
        """
        costs = [
            many * (t.nbytes if find_method(t.method).per_head else t.nbytes.sum(axis=0, keepdims=True))
            for many, t in zip([*tokens, *tokens], self.first.values(), strict=True)
        ]
        columns = even_widths(np.concatenate(costs), room)
        if columns is None:
            return None
        of_place = np.split(columns, np.cumsum([len(cost) for cost in costs])[:-1])
        return {place: table.choice(own) for (place, table), own in zip(self.first.items(), of_place, strict=True)}

    def chosen(self, plan: Plan) -> Chosen:
        """What a plan gives each layer's keys and values; `InputError` if a method or a width was not measured."""
        found: dict[Place, Choice] = {}
        for size in self.sizes:
            settings = plan.layers[size.layer]
            alone = (settings.key_method, settings.key_bits) != (settings.value_method, settings.value_bits)
            for tensor, method, bits, options in settings.tensors:
                widths = plan.widths(size.layer, tensor)
                if self.spectra and method == self.spectra.method:
                    words: Any = options.get("words")
                    shared = None if words else self.spectra.words(bits, tensor if alone else None)
                    widths = (words if shared is None else shared[size.layer, tensor],)
                found[size.layer, tensor] = self._choice(size, tensor, method, widths)
        return found

    def _choice(self, size: LayerFacts, tensor: Tensor, method: str, widths: tuple[float, ...]) -> Choice:
        if method == EXACT:
            return Choice.exact(size, tensor)
        table = next((t for t in self.tables[size.layer, tensor] if t.method == method), None)
        known = () if table is None else table.words or table.widths
        if table is None or not {*widths} <= {*known}:
            missing = f"{method} at {widths} bits was not measured for the {tensor} of layer {size.layer}"
            raise InputError(f"{missing}: measure the method's curves at these widths.")
        return table.choice([known.index(width) for width in widths])

    def coordinates(self, place: Place, chosen: Choice) -> Floats:
        """Code bits of each coordinate ``[H, D]``: of a row of words its own, else those of its head."""
        if chosen.words and self.spectra:
            return self.spectra.bits(place, chosen.words)
        (size,) = (size for size in self.sizes if size.layer == place[0])
        return np.repeat(np.array(chosen.widths, float)[:, None], size.dims[place[1]], axis=1)


def even_widths(costs: Floats, room: float) -> Ints | None:
    """Columns ``[N]`` of ``costs`` ``[N, W]``: the last that all can have, then one more for some, evenly; or None."""
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


def nbytes_of(chosen: Chosen) -> float:
    """Bytes of one packed token."""
    return sum(choice.nbytes for choice in chosen.values())


def loss_of(chosen: Chosen) -> float:
    """The predicted loss, which is the same in any order."""
    return fsum(choice.predicted_loss for choice in chosen.values())


def mean_width(chosen: Chosen, *tensors: Tensor) -> float:
    """Code bits of these tensors."""
    return fmean(choice.mean_width for (_, tensor), choice in chosen.items() if tensor in tensors)
