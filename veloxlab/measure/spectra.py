"""How many directions hold the energy of keys and values, and how much of it is one vector: their mean."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.codecs.spectralquant import effective_dimensions
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture
from veloxlab.measure.distributions import seen
from veloxlab.measure.errors import Side
from veloxlab.measure.ratios import ratio
from veloxlab.measure.spaces import SIDES

SPECTRUM = {
    "layer": pl.Int32,
    "head": pl.Int32,
    "tensor": pl.String,
    "about": pl.String,  # "origin": second moments as they are; "mean": of what is left without the mean vector
    "rank": pl.Int32,  # from 1, the strongest direction
    "share": pl.Float64,  # of the sum over all directions
}
"""Columns of `spectra`."""

DIMENSIONS = {
    "layer": pl.Int32,
    "head": pl.Int32,
    "tensor": pl.String,
    "head_dim": pl.Int32,
    "uncentred": pl.Float64,  # effective dimensions (Σλ)² / Σλ² of the second moments, 1 to D; 0 of a head of zeros
    "centred": pl.Float64,  # of those about the mean
    "mean_share": pl.Float64,  # ‖mean vector‖² / mean ‖x‖²
}
"""Columns of `dimensions`."""

ABOUT = ("origin", "mean")


def spectra(capture: Capture, *, tensors: tuple[Side, ...] = SIDES) -> pl.DataFrame:
    """Eigenvalues of the second moments of each head, with and without its mean vector, as shares: `SPECTRUM`.

    Raises
    ------
    InputError : numbers that are NaN or infinite, or a head that does not vary and is not zero.
    """
    frames = []
    for layer, side, x in seen(capture, "raw", tensors):
        _check(x, layer, side)
        for head, own in enumerate(x.astype(np.float64)):
            for about, y in zip(ABOUT, (own, own - own.mean(axis=0)), strict=True):
                shares = spectrum_shares(y)
                place = {"layer": layer, "head": head, "tensor": side, "about": about}
                ranks = pl.DataFrame({"rank": np.arange(1, len(shares) + 1), "share": shares})
                frames.append(ranks.select(*(pl.lit(v).alias(k) for k, v in place.items()), "rank", "share"))
    return pl.concat(frames).cast(SPECTRUM)  # type: ignore[arg-type]


def dimensions(capture: Capture, *, tensors: tuple[Side, ...] = SIDES) -> pl.DataFrame:
    """Effective dimensions of each head with and without its mean vector, and what the mean vector holds: `DIMENSIONS`.

    *3 % Is All You Need* (A. Gopinath, 2026) counts them about the origin.

    Raises
    ------
    InputError : as `spectra`.
    """
    frames = []
    for layer, side, x in seen(capture, "raw", tensors):
        _check(x, layer, side)
        found = effective_dimensions(mx.array(x[None]))
        energy = np.square(x.astype(np.float64)).sum(axis=2).mean(axis=1)
        mean = np.square(x.astype(np.float64).mean(axis=1)).sum(axis=1)
        heads, _, dim = x.shape
        columns = {
            "layer": [layer] * heads,
            "head": np.arange(heads),
            "tensor": [side] * heads,
            "head_dim": [dim] * heads,
            "uncentred": found.uncentred,
            "centred": found.centred,
            "mean_share": ratio(mean, energy),
        }
        frames.append(pl.DataFrame(columns, schema=DIMENSIONS))
    return pl.concat(frames)


def spectrum_shares(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvalues of xᵀx of vectors ``[S, D]``, as shares of their sum, the largest first ``[D]``; 0 of zeros."""
    values = np.clip(np.linalg.eigvalsh(x.T @ x)[::-1], 0.0, None)  # rounding makes some slightly negative
    return ratio(values, values.sum())


def _check(x: NDArray[np.float32], layer: int, side: Side) -> None:
    if not np.isfinite(x).all():
        raise InputError(
            f"The {side} of layer {layer} hold numbers that are NaN or infinite, which have no spectrum: load the "
            "model with dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
        )
    if ((x == x[:, :1]) & (x[:, :1] != 0).any(axis=2, keepdims=True)).all(axis=(1, 2)).any():
        raise InputError(f"A head of the {side} of layer {layer} does not vary over the tokens: capture a longer text.")
