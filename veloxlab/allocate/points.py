"""What a plan can give one layer's keys or values: methods and widths, with their bytes and predicted losses.

A layer's side has one codec, and so one method. With ``"ratequant"`` its heads have widths of their own: of all their
combinations, those on the convex hull are given, which are enough for every budget but for what one head's bit costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl

from veloxlab.allocate.budget import LayerSize
from veloxlab.allocate.sensitivity import SIDES
from veloxlab.allocate.solve import Problem
from veloxlab.checks import FLAG, check_fields, choice, instance, whole
from veloxlab.codecs import Role
from veloxlab.errors import InputError

PER_HEAD = "ratequant"  # the method whose heads may differ
EXACT = "none"
Protection = Literal["widest", "exact"]


@dataclass(frozen=True)
class Bounds:
    """What an allocation may do.

    Attributes
    ----------
    least_bits, most_bits : code widths, of those that were measured. At 1 bit the second-order prediction is too low:
        allow it only where the budget leaves nothing else, as `RateBudget.solve` does where no bounds are given.
    protected_first, protected_last : so many first and last layers are left out, and are
    protection : ``"widest"``, at ``most_bits``, or ``"exact"``.
    keys_over_values : whether a layer's keys get as many bits as its values at least, on average over its heads.
    """

    least_bits: int = 2
    most_bits: int = 6
    protected_first: int = 0
    protected_last: int = 0
    protection: Protection = "widest"
    keys_over_values: bool = False

    def __post_init__(self) -> None:
        check_fields(self, least_bits=whole(1), most_bits=whole(1), protected_first=whole(0), protected_last=whole(0))
        check_fields(self, protection=choice(*get_args(Protection)), keys_over_values=FLAG)
        if self.least_bits > self.most_bits:
            raise InputError(f"Bounds of {self.least_bits} to {self.most_bits} bits hold no width: give least ≤ most.")


BOUNDS = instance(Bounds, "vl.Bounds, such as vl.Bounds(least_bits=2, most_bits=4)")


@dataclass(frozen=True)
class Point:
    """One choice for a layer's keys or values.

    Attributes
    ----------
    method, bits : as `veloxlab.cache.make.LayerSettings` has them; ``bits`` is rounded where heads differ.
    head_bits : the width of each head, or None where they are alike.
    width : mean code bits over the heads.
    nbytes : of one packed token.
    predicted_loss : of these heads, in the unit of the sensitivities.
    """

    method: str
    bits: int
    head_bits: tuple[int, ...] | None
    width: float
    nbytes: float
    predicted_loss: float

    @property
    def options(self) -> dict[str, object]:
        """Options of the method."""
        return {} if self.head_bits is None else {"head_bits": list(self.head_bits)}


@dataclass(frozen=True, eq=False)
class HeadTable:
    """Bytes and predicted losses ``[H, W]`` of one layer's side by one method, at ``widths`` ``[W]``."""

    method: str
    widths: tuple[int, ...]
    nbytes: np.ndarray
    losses: np.ndarray

    def bounded(self, least: int, most: int) -> HeadTable:
        """The columns of widths within bounds, none perhaps."""
        kept = [i for i, width in enumerate(self.widths) if least <= width <= most]
        return HeadTable(self.method, tuple(self.widths[i] for i in kept), self.nbytes[:, kept], self.losses[:, kept])

    def point(self, columns: Sequence[int]) -> Point:
        """A column for each head."""
        at = np.arange(len(columns)), np.asarray(columns)
        widths = tuple(self.widths[c] for c in columns)
        mean = sum(widths) / len(widths)
        return Point(
            self.method,
            round(mean),
            widths if self.method == PER_HEAD else None,
            mean,
            float(self.nbytes[at].sum()),
            float(self.losses[at].sum()),
        )

    def points(self) -> Iterator[Point]:
        """What a plan can hold of it."""
        heads, columns = self.nbytes.shape
        if self.method == PER_HEAD and columns:
            problem = Problem(self.nbytes, self.losses)
            for step in range(len(problem.frontier[0])):
                yield self.point(problem.at_step(step).tolist())
        else:
            for column in range(columns):
                yield self.point([column] * heads)


Place = tuple[int, Role]  # a layer and a side
Chosen = Mapping[Place, Point]
Tables = dict[Place, tuple[HeadTable, ...]]


def head_tables(sensitivities: pl.DataFrame, curves: pl.DataFrame) -> Tables:
    """Tables of every layer's keys and values, one for each method, from `SENSITIVITIES` and `CURVES`.

    A head loses its sensitivity times ½·E‖x − x̂‖²/D; by ``"key_norm"``, whose unit is that of E‖x‖², times the
    relative distortion.

    Raises
    ------
    InputError : the two are not of the same layers and heads.
    """
    by = sensitivities["by"].unique().to_list()
    if len(by) != 1:
        raise InputError(f"The sensitivities are of {len(by)} kinds, {by}: give one kind.")
    share = pl.col("relative") if by == ["key_norm"] else pl.col("distortion") / (2 * pl.col("head_dim"))
    weights = sensitivities.select("layer", "head", "tensor", "sensitivity")
    joined = curves.join(weights, on=["layer", "head", "tensor"], how="left", maintain_order="left").with_columns(
        predicted_loss=pl.col("sensitivity") * share
    )
    heads = curves.select("layer", "head", "tensor").unique()
    if joined["sensitivity"].null_count() or heads.height != weights.height:
        raise InputError(
            f"The sensitivities are of {weights.height} heads and the curves of {heads.height}, not all the same: "
            "measure both on one model."
        )
    tables: Tables = {}
    columns = ["layer", "tensor", "method"]
    ordered = joined.sort("head", "bits", maintain_order=True)  # methods stay as they were named
    for (layer, side, method), rows in ordered.group_by(columns, maintain_order=True):
        widths = rows["bits"].unique().sort().to_list()
        count = rows["head"].n_unique()
        nbytes, losses = (
            rows[name].to_numpy().reshape(count, len(widths)) for name in ("bytes_per_token", "predicted_loss")
        )
        role = SIDES[SIDES.index(side)]
        table = HeadTable(str(method), tuple(widths), nbytes, losses)
        tables[int(layer), role] = (*tables.get((int(layer), role), ()), table)
    return tables


def side_points(tables: Tables, sizes: Sequence[LayerSize], bounds: Bounds) -> dict[Place, list[Point]]:
    """All that a plan may give each layer's keys and values within ``bounds``.

    Raises
    ------
    InputError : no measured width is within the bounds.
    """
    last = sizes[max(0, len(sizes) - bounds.protected_last) :]
    protected = {size.layer for size in (*sizes[: bounds.protected_first], *last)}
    found: dict[Place, list[Point]] = {}
    for size in sizes:
        for side in SIDES:
            own = [t.bounded(bounds.least_bits, bounds.most_bits) for t in tables[size.layer, side]]
            points = [point for table in own for point in table.points()]
            if not points:
                raise InputError(
                    f"No width from {bounds.least_bits} to {bounds.most_bits} bits was measured for {side} of layer "
                    f"{size.layer}: widen the bounds, or measure those widths."
                )
            if size.layer in protected:
                points = [exact_point(size, side)] if bounds.protection == "exact" else _widest(points)
            found[size.layer, side] = points
    return found


def _widest(points: Sequence[Point]) -> list[Point]:
    width = max(point.width for point in points)
    return [min((p for p in points if p.width == width), key=lambda p: p.predicted_loss)]


def exact_point(size: LayerSize, side: Role) -> Point:
    """A layer's side left as it is."""
    dim = size.key_dim if side == "keys" else size.value_dim
    return Point(EXACT, size.exact_bits, None, size.exact_bits, size.kv_heads * dim * size.exact_bits / 8, 0.0)
