"""How many code bits each coordinate of a fitted codec gets."""

from __future__ import annotations

import polars as pl

from veloxlab.calibration import Calibration
from veloxlab.errors import InputError

COORDINATE_BITS = {
    "layer": pl.Int32,
    "tensor": pl.String,
    "coordinate": pl.Int32,  # in the codec's own space: for SpectralQuant the axes of its basis, by variance
    "bits": pl.Int32,
}
"""Columns of `coordinate_bits`."""


def coordinate_bits(calibration: Calibration, bits: int) -> pl.DataFrame:
    """Code bits of each coordinate, of all layers at one width: `COORDINATE_BITS`.

    A codec without a bit plan gives every coordinate the same.

    Raises
    ------
    InputError : nothing was fitted at this width.
    """
    if bits not in calibration.widths:
        raise InputError(f"The calibration holds nothing at {bits} bits: choose one of {calibration.widths}.")
    frames = []
    for (layer, role, width), codec in calibration.codecs.items():
        if width == bits:
            plan = list(getattr(codec, "plan", ())) or [bits] * codec.head_dim
            place = {"layer": [layer] * len(plan), "tensor": [role] * len(plan)}
            frames.append(pl.DataFrame({**place, "coordinate": range(len(plan)), "bits": plan}, schema=COORDINATE_BITS))
    return pl.concat(frames).sort("tensor", "layer", "coordinate")
