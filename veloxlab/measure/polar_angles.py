"""The angles that PolarQuant codes, level by level, beside the density that its codebooks are made for.

Paper: *PolarQuant*, I. Han et al., 2025, arXiv 2502.02617: after a random rotation the angles of level 1 are uniform on
the circle, those of level ℓ have the density sin^(2^(ℓ−1) − 1)(2ψ) on [0, π/2].
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import polars as pl

from veloxlab.codecs.codebooks import Floats
from veloxlab.codecs.polar import PolarTree, angle_density, halvings
from veloxlab.codecs.polarquant import BLOCK_LEVELS
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture
from veloxlab.measure.distributions import check_bins, histogram, seen
from veloxlab.measure.errors import Side
from veloxlab.measure.spaces import SIDES

ANGLES = {
    "layer": pl.Int32,
    "head": pl.Int32,
    "tensor": pl.String,
    "level": pl.Int32,  # from 1: of pairs of coordinates, of pairs of radii, ...
    "angle": pl.Float64,  # radians, middle of a bin
    "density": pl.Float64,  # share of the level's angles a radian
    "expected": pl.Float64,  # what the random rotation is to make of it: the density of the offline codebooks
}
"""Columns of `polar_angles`."""

BINS = 48


def polar_angles(
    capture: Capture,
    *,
    levels: int = BLOCK_LEVELS,
    rotated: bool = True,
    tensors: tuple[Side, ...] = SIDES,
    bins: int = BINS,
) -> pl.DataFrame:
    """Histogram of each head's polar angles by level, as densities: `ANGLES`.

    ``rotated=False`` shows why PolarQuant rotates first.

    Raises
    ------
    InputError : more levels than the head dimension can be halved, fewer than two bins, or a capture that is not
        finite.
    """
    check_bins(bins)
    frames = []
    for layer, side, x in seen(capture, "rotated" if rotated else "raw", tensors):
        if not 1 <= levels <= halvings(x.shape[-1]):
            raise InputError(
                f"levels={levels} does not fit a head dimension of {x.shape[-1]}: choose 1 to {halvings(x.shape[-1])}."
            )
        if not np.isfinite(x).all():
            raise InputError(f"The {side} of layer {layer} hold numbers that are NaN or infinite, which have no angle.")
        angles, _ = PolarTree(x.shape[-1], (1,) * levels).angles(mx.array(x))
        for level, found in enumerate(angles, 1):
            low, high = (-math.pi, math.pi) if level == 1 else (0.0, math.pi / 2)
            edges = np.linspace(low, high, bins + 1)
            for head, own in enumerate(np.array(found)):
                rows = histogram(own.reshape(-1), edges).select(angle="value", density="density")
                place = {"layer": layer, "head": head, "tensor": side, "level": level}
                expected = pl.Series(expected_density(rows["angle"].to_numpy(), level))
                frames.append(rows.with_columns(*(pl.lit(v).alias(k) for k, v in place.items()), expected=expected))
    return pl.concat([frame.select(pl.col(name).cast(dtype) for name, dtype in ANGLES.items()) for frame in frames])


def expected_density(angle: Floats, level: int) -> Floats:
    """Density of a randomly rotated vector's angles (radians) of a level, from 1 on."""
    if level == 1:
        return np.full(len(angle), 1 / (2 * math.pi))
    grid = np.linspace(0, math.pi / 2, 4097)
    return np.asarray(angle_density(angle, level) / np.trapezoid(angle_density(grid, level), grid))
