"""Bits of FisherQuant: one reverse water-filling over the coordinates of all heads, layers, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from veloxlab.codecs.parts import Floats
from veloxlab.codecs.parts.packing import WIDEST
from veloxlab.codecs.parts.trellis import SCALE_BITS, CodeName, levels_of
from veloxlab.codecs.parts.water_filling import Rows, equal_words
from veloxlab.errors import InputError

if TYPE_CHECKING:
    from veloxlab.codecs.fisherquant import FisherQuant


def planned(
    codecs: Mapping[Any, FisherQuant], bits: float, words: int | None = None, **options: Any
) -> dict[Any, FisherQuant]:
    """The same codecs with the widths of least total loss at ``bits`` a value, and other ``options``.

    With ``words`` each codec has a row of this many 32-bit words, independent of the others.
    """
    some = [codec.switched(bits=bits, **options) for codec in codecs.values()]
    variances, rows = [np.array(codec.variances, np.float64) for codec in some], rows_of(some[0].code, some[0].entries)
    budget = round(sum(own.size for own in variances) * bits / 32)
    if words is not None:
        widths = [own for each in variances for own in rows.widths([each], words)]
    elif some[0].planning == "model":
        widths = rows.widths(variances, budget)
    else:
        savings = rows.savings(variances)
        if some[0].planning == "none":  # every coordinate saves the same, and less with each bit
            savings = [np.broadcast_to(-np.arange(WIDEST, dtype=np.float64), own.shape) for own in savings]
        widths = [
            w.reshape(own.shape[:2]) for w, own in zip(equal_words(savings, SCALE_BITS, budget), savings, strict=True)
        ]
    shares: list[Any] = [own.tolist() for own in widths]
    planned = [replace(codec, widths=tuple(map(tuple, own))) for codec, own in zip(some, shares, strict=True)]
    return dict(zip(codecs, planned, strict=True))


def rows_of(code: CodeName = "trellis", entries: int = 256) -> Rows:
    """The rows of words of this code, for allocation."""
    return Rows(levels_of(code, entries).distortion, SCALE_BITS)


def variances_of(codec: FisherQuant) -> Floats:
    """σ² of a fitted codec ``[H, D]``; `InputError` if it does not have the default code."""
    if (codec.code, codec.entries) != ("trellis", 256):
        raise InputError("Losses are predicted for FisherQuant's default code: calibrate without code and entries.")
    return np.array(codec.variances, np.float64)
