"""How many directions hold the energy of keys and values, and how much of it is one vector: their mean."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.codecs.commvq_training import pairs
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.spectralquant import effective_dimensions
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.distributions import SIDES, seen, vectors
from veloxlab.measure.errors import Side, ratio

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


PAIRS = {
    "layer": pl.Int32,
    "head": pl.Int32,
    "pair": pl.Int32,  # from 0, the fastest
    "first": pl.Int32,  # its channels
    "second": pl.Int32,
    "wavelength": pl.Float64,  # tokens for one full turn
    "energy_share": pl.Float64,  # of the head's Σx², the same before and after RoPE
    "mean_share": pl.Float64,  # of the pair's energy before RoPE: what its mean vector holds
}
"""Columns of `rope_pairs`; channels that RoPE leaves alone are in no pair."""

PAIR_POINTS = {
    "position": pl.Int32,  # of the token in the text
    "stage": pl.String,  # "before RoPE", what CommVQ codes, or "after RoPE", what a cache is given
    "x": pl.Float64,  # the pair's first coordinate
    "y": pl.Float64,
}
"""Columns of `pair_points`."""

POINTS = 800  # tokens at most: of more, every nth is shown
STAGES = {"before RoPE": "before_rope", "after RoPE": "raw"}


def rope_pairs(capture: Capture) -> pl.DataFrame:
    """Energy of every pair of the keys' channels that RoPE turns: `PAIRS`.

    Raises
    ------
    InputError : no layer has a rotary embedding that is known.
    """
    frames = []
    for layer in capture.layers:
        if layer.rope is None:
            continue
        x = vectors(layer, "keys", "before_rope").astype(np.float64)
        heads, _, dim = x.shape
        first, second = turned_pairs(layer.rope, dim)
        energy = pair_energy(x, first, second)
        mean = pair_energy(x.mean(axis=1, keepdims=True), first, second)
        count = heads * len(first)
        columns = {
            "layer": np.full(count, layer.layer),
            "head": np.repeat(np.arange(heads), len(first)),
            "pair": np.tile(np.arange(len(first)), heads),
            "first": np.tile(first, heads),
            "second": np.tile(second, heads),
            "wavelength": np.tile(2 * math.pi / layer.rope.angles, heads),
            "energy_share": ratio(energy, np.square(x).sum(axis=2).mean(axis=1)[:, None]).reshape(-1),
            "mean_share": ratio(mean, energy).reshape(-1),
        }
        frames.append(pl.DataFrame(columns, schema=PAIRS))
    if not frames:
        raise InputError("No layer of this capture has a rotary embedding that is known, so there are no pairs to see.")
    return pl.concat(frames)


def pair_points(layer: LayerCapture, head: int, pair: int) -> pl.DataFrame:
    """One pair of one head's keys over the tokens, before and after RoPE: `PAIR_POINTS`.

    Raises
    ------
    InputError : a layer without a known RoPE; no such head or pair.
    """
    before = vectors(layer, "keys", "before_rope")
    assert layer.rope is not None, "vectors() refuses a layer without one"
    heads, tokens, dim = before.shape
    first, second = turned_pairs(layer.rope, dim)
    for what, number, count in (("KV head", head, heads), ("pair", pair, len(first))):
        if not 0 <= number < count:
            raise InputError(f"There is no {what} {number}: choose one from 0 to {count - 1}.")
    shown = np.arange(0, tokens, -(-tokens // POINTS))
    frames = []
    for stage, x in zip(STAGES, (before, vectors(layer, "keys", "raw")), strict=True):
        own = x[head][shown]
        columns = {
            "position": shown,
            "stage": [stage] * len(shown),
            "x": own[:, first[pair]],
            "y": own[:, second[pair]],
        }
        frames.append(pl.DataFrame(columns, schema=PAIR_POINTS))
    return pl.concat(frames)


def turned_pairs(rope: Rope, head_dim: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and second channel of each pair that RoPE turns, the fastest first."""
    first, second = pairs(head_dim, rope)
    return first[: rope.dims // 2], second[: rope.dims // 2]


def pair_energy(x: NDArray[np.float64], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean over tokens of each pair's squared length, of vectors ``[H, S, D]``: ``[H, pairs]``."""
    return np.asarray((np.square(x[..., first]) + np.square(x[..., second])).mean(axis=1))
