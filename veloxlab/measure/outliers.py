"""Outlier channels: how much louder the loudest channel of a head is than an ordinary one, in any space."""

from __future__ import annotations

import numpy as np
import polars as pl

from veloxlab.measure.activations import Capture
from veloxlab.measure.distributions import seen
from veloxlab.measure.errors import Side
from veloxlab.measure.spaces import Space

OUTLIERS = {
    "layer": pl.Int32,
    "head": pl.Int32,
    "tensor": pl.String,
    "space": pl.String,
    "loudest": pl.Int32,  # the channel of greatest root-mean-square over the tokens
    "loudest_ratio": pl.Float64,  # its root-mean-square, in those of the median channel
    "outlier_channels": pl.Int32,  # channels of more than `LOUD` times the median channel's
    "peak_ratio": pl.Float64,  # greatest |coordinate| of the head, in root-mean-squares of all its coordinates
    "not_finite": pl.Int32,  # coordinates that are NaN or infinite, and do not count
}
"""Columns of `outlier_channels`; ratios are null where the median channel, or the head, is zero."""

LOUD = 3.0


def outlier_channels(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Side, ...] | None = None
) -> pl.DataFrame:
    """How far single channels and single coordinates of each head stand out: `OUTLIERS`.

    A uniform quantizer's steps are as wide as the loudest coordinate asks for, so ``peak_ratio`` is what it pays.

    Raises
    ------
    InputError : as `veloxlab.measure.spaces.vectors`.
    """
    rows = []
    for layer, side, x in seen(capture, space, tensors):
        for head, own in enumerate(x.astype(np.float64)):
            finite = np.isfinite(own)
            known = np.where(finite, own, 0.0)
            rms = np.sqrt(np.square(known).sum(axis=0) / np.maximum(finite.sum(axis=0), 1))
            usual, whole = float(np.median(rms)), float(np.sqrt(np.square(known).sum() / max(finite.sum(), 1)))
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "tensor": side,
                    "space": space,
                    "loudest": int(rms.argmax()),
                    "loudest_ratio": float(rms.max()) / usual if usual else None,
                    "outlier_channels": int((rms > LOUD * usual).sum()),
                    "peak_ratio": float(np.abs(known).max()) / whole if whole else None,
                    "not_finite": int(own.size - finite.sum()),
                }
            )
    return pl.DataFrame(rows, schema=OUTLIERS)
