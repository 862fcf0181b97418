"""Tables of one layer's keys or values by one method: bytes and predicted losses of its heads at each width.

If a method is `per_head`, each head has its own width. If it has a `prediction`, a choice is the number of 32-bit
words in a token's row, and the best bits of such a row are known. The allocation then equals the method's own
water-filling over the whole model. See `veloxlab.codecs.method`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import polars as pl

from veloxlab.allocate.budget import Bounds
from veloxlab.allocate.solve import Floats, Ints, Problem
from veloxlab.cache.calibration import Calibration
from veloxlab.codecs import find_method
from veloxlab.codecs.method import Tensor
from veloxlab.codecs.parts.packing import WIDEST
from veloxlab.codecs.parts.water_filling import Rows
from veloxlab.errors import InputError
from veloxlab.measure.frames import PLACE, schema
from veloxlab.mlxlm.probe import LayerFacts

MOST_STEPS = 64  # of a row's words that are offered
EXACT = "none"
Place = tuple[int, Tensor]  # a layer, and its keys or values


CURVES = schema(PLACE + "method bits head_dim distortion relative true_bits bytes_per_token") | {"bits": pl.Int32}
"""Columns of `vl.allocate.distortion_curves`: ``bits`` are code bits; ``distortion`` is E‖x − x̂‖² over the tokens
after the sinks, ``relative`` Σ‖x − x̂‖² / Σ‖x‖² over the same; ``true_bits`` are stored bits per coordinate, scales and
padding included, ``bytes_per_token`` those stored for one token of this head."""

SPECTRA = schema(PLACE + "coordinate variance")
"""Columns of `RateBudget.spectra`: σᵢ², twice the nats a token that a coordinate of 0 bits loses."""


class Choice(NamedTuple):
    """A method and a width for each head of one layer's keys or values."""

    method: str  # id; "none" is exact
    widths: tuple[float, ...]  # code bits of each head
    nbytes: float  # of one packed token
    losses: Floats  # predicted for each head [H], in the unit of the sensitivities
    words: int = 0  # of a token's row, where that is what is chosen

    @classmethod
    def exact(cls, size: LayerFacts, tensor: Tensor) -> Self:
        """The exact keys or values of a layer."""
        widths = (size.exact_bits,) * size.kv_heads
        return cls(EXACT, widths, size.dims[tensor] * sum(widths) / 8, np.zeros(size.kv_heads))

    @property
    def mean_width(self) -> float:
        """Code bits, mean over the heads."""
        return sum(self.widths) / len(self.widths)

    @property
    def predicted_loss(self) -> float:
        """The predicted loss of all heads."""
        return float(self.losses.sum())

    @property
    def settings(self) -> tuple[str, float, dict[str, object]]:
        """Method, bits and options of a layer's settings."""
        if self.words:
            return self.method, min(max(1.0, round(self.mean_width, 4)), float(WIDEST)), {"words": self.words}
        own_widths = find_method(self.method).per_head
        return self.method, round(self.mean_width), {"head_bits": list(self.widths)} if own_widths else {}


class HeadTable(NamedTuple):
    """Bytes and predicted losses ``[H, W]`` of one layer's keys or values by one method, at ``widths`` ``[W]``."""

    method: str
    widths: tuple[float, ...]  # of a row of words: of all heads together, true bits
    nbytes: Floats
    losses: Floats
    words: tuple[int, ...] = ()  # of a row, where these are chosen
    head_bits: Floats | None = None  # [H, W], code bits of each head of such a row

    @classmethod
    def of_words(cls, method: str, rows: Rows, variances: Floats) -> Self:
        """A row of words with coordinates of σ² ``[H, D]``."""
        words, bits, losses = rows.curve(variances)
        widths = tuple((32 * words / variances.size).tolist())
        nbytes = np.broadcast_to(4 * words / len(variances), losses.shape)
        return cls(method, widths, nbytes, losses, tuple(words.tolist()), bits / variances.shape[1])

    def choice(self, columns: Ints | Sequence[int] | int) -> Choice:
        """The choice with a column for each head, or one column for all."""
        columns = np.broadcast_to(columns, len(self.nbytes))
        at, widths = (np.arange(len(columns)), columns), tuple(self.widths[c] for c in columns)
        nbytes, losses = float(self.nbytes[at].sum()), self.losses[at]
        if self.head_bits is not None:
            return Choice(self.method, tuple(self.head_bits[at].tolist()), nbytes, losses, self.words[columns[0]])
        return Choice(self.method, widths, nbytes, losses)

    def choices(self, bounds: Bounds, usual: int) -> Iterator[Choice]:
        """All choices within the bounds. If these have no least width, it is ``usual``."""
        least = bounds.least_bits or (0 if self.words else usual)
        kept = np.flatnonzero([least <= width <= bounds.most_bits for width in self.widths])
        if find_method(self.method).per_head and kept.size:
            hull = Problem(self.nbytes[:, kept], self.losses[:, kept]).frontier
            yield from (self.choice(kept[hull.choice(step)]) for step in range(len(hull.costs)))
        else:
            yield from (self.choice(int(column)) for column in kept[:: -(-len(kept) // MOST_STEPS) or 1])

    @property
    def at_whole_widths(self) -> HeadTable:
        """The same at whole widths only, which all tables have."""
        if not self.words:
            return self
        at = [int(np.abs(np.array(self.widths) - width).argmin()) for width in range(1, WIDEST + 1)]
        assert self.head_bits is not None
        widths, words = tuple(self.widths[i] for i in at), tuple(self.words[i] for i in at)
        return HeadTable(self.method, widths, self.nbytes[:, at], self.losses[:, at], words, self.head_bits[:, at])


class Spectra(NamedTuple):
    """σ² of the coordinates ``[H, D]`` of each layer's keys and values, by a method with a `prediction`."""

    method: str
    rows: Rows
    variances: Mapping[Place, Floats]

    @classmethod
    def of(cls, method: str, frame: pl.DataFrame) -> Self:
        """The spectra of a method, from a frame of `SPECTRA`."""
        found = {}
        for (layer, tensor), own in frame.group_by("layer", "tensor", maintain_order=True):
            heads = own["head"].n_unique()
            found[layer, tensor] = own.sort("head", "coordinate")["variance"].to_numpy().reshape(heads, -1)
        prediction = find_method(method).prediction
        if prediction is None:
            raise InputError(f"{method} predicts no losses: measure its curves.")
        return cls(method, prediction.rows(), found)

    def words(self, bits: float, tensor: Tensor | None) -> dict[Place, int]:
        """Words of all rows, or of the rows of one tensor, at a mean of ``bits`` for each value."""
        own = {place: variances for place, variances in self.variances.items() if tensor in (None, place[1])}
        budget = round(sum(each.size for each in own.values()) * bits / 32)
        widths = self.rows.widths(list(own.values()), budget)
        return {place: self.rows.words(each) for place, each in zip(own, widths, strict=True)}

    def bits(self, place: Place, words: int) -> Floats:
        """Code bits of the coordinates ``[H, D]`` of a row."""
        return self.rows.widths([self.variances[place]], words)[0].astype(float)


def spectra_of(calibration: Calibration, places: Collection[Place]) -> pl.DataFrame:
    """`SPECTRA` of a calibration for these layers; `InputError` if its method or its code has no prediction."""
    prediction = find_method(calibration.method).prediction
    if prediction is None:
        wrong = f"A calibration of {calibration.method} predicts no losses"
        raise InputError(f"{wrong}: measure its curves, vl.rate_budget(..., calibrations=[calibration]).")
    if {*places} != {place[:2] for place in calibration.codecs}:
        raise InputError("This calibration is of other layers than these measurements: make it with this model.")
    rows = [
        (layer, head, tensor, coordinate, variance)
        for (layer, tensor, _), codec in calibration.codecs.items()
        for (head, coordinate), variance in np.ndenumerate(prediction.variances(codec))
    ]
    return pl.DataFrame(rows, schema=SPECTRA, orient="row")
