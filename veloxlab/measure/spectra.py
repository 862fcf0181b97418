"""Directions that hold the energy of keys and values, and the share of energy in their mean vector."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.codecs import Tensor
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.spectralquant import effective_dimensions
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, Columns, LayerCapture, Tensors, by_head
from veloxlab.measure.distributions import vectors
from veloxlab.measure.errors import ratio
from veloxlab.measure.frames import PLACE, in_schema, schema

SPECTRUM = schema(PLACE + "about rank share")
"""Columns of `spectra`: about the "origin", second moments unchanged, or about the "mean", second moments without
the mean vector; rank from 1, the strongest direction; its share of the sum over all."""

DIMENSIONS = schema(PLACE + "head_dim uncentred centred mean_share")
"""Columns of `dimensions`: effective dimensions (Σλ)² / Σλ² of the second moments, 1 to D, 0 for a head of zeros; of
those about the mean; ‖mean vector‖² / mean ‖x‖²."""

PAIRS = schema("layer head pair first second wavelength energy_share mean_share")
"""Columns of `rope_pairs`: pair from 0, the fastest, and its channels; tokens for one full turn; share of the head's
Σx², the same before and after RoPE; share of the pair's energy before RoPE in its mean vector. Channels that
RoPE does not rotate are in no pair."""

PAIR_POINTS = schema("position stage x y")
"""Columns of `pair_points`: position of the token in the text; "before RoPE", as CommVQ codes it, or "after RoPE", as
a cache gets it; the pair's coordinates."""

POINTS = 800  # tokens at most; of more, every nth is returned


def spectra(capture: Capture, *, tensors: Tensors = None) -> pl.DataFrame:
    """Return eigenvalues of the second moments of each head, with and without its mean vector, as shares: `SPECTRUM`.

    Raises `InputError` for numbers that are NaN or infinite, or a head that does not vary and is not zero.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x = _checked_vectors(layer, tensor)
        for head, own in enumerate(x):
            for about, y in (("origin", own), ("mean", own - own.mean(axis=0))):
                yield {"head": head, "about": about, "rank": np.arange(x.shape[2]) + 1, "share": spectrum_shares(y)}

    return by_head(SPECTRUM, capture.layers, columns, tensors)


def dimensions(capture: Capture, *, tensors: Tensors = None) -> pl.DataFrame:
    """Return effective dimensions of each head with and without its mean vector, and the mean's share: `DIMENSIONS`.

    *3 % Is All You Need* (A. Gopinath, 2026) counts them about the origin. Raises `InputError` as `spectra`.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x = _checked_vectors(layer, tensor)
        found = effective_dimensions(mx.array(x[None]))
        mean, energy = np.square(x.mean(axis=1)).sum(axis=1), np.square(x).sum(axis=2).mean(axis=1)
        numbers = {"uncentred": found.uncentred, "centred": found.centred, "mean_share": ratio(mean, energy)}
        yield {"head_dim": x.shape[2]} | {name: np.asarray(column)[:, None] for name, column in numbers.items()}

    return by_head(DIMENSIONS, capture.layers, columns, tensors)


def spectrum_shares(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return eigenvalues of xᵀx of vectors ``[S, D]``, as shares of their sum, largest first ``[D]``; 0 for zeros."""
    values = np.clip(np.linalg.eigvalsh(x.T @ x)[::-1], 0.0, None)  # rounding makes some slightly negative
    return ratio(values, values.sum())


def _checked_vectors(layer: LayerCapture, tensor: Tensor) -> NDArray[np.float64]:
    x = vectors(layer, tensor)
    layer.check_finite("which have no spectrum", tensor)
    if ((x == x[:, :1]) & (x[:, :1] != 0).any(axis=2, keepdims=True)).all(axis=(1, 2)).any():
        of = f"the {tensor} of layer {layer.layer}"
        raise InputError(f"A head of {of} does not vary over the tokens: capture a longer text.")
    return x.astype(np.float64)


def rope_pairs(capture: Capture) -> pl.DataFrame:
    """Return the energy of each pair of key channels that RoPE rotates: `PAIRS`; `InputError` if RoPE is unknown."""

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x = vectors(layer, tensor, "before_rope").astype(np.float64)
        assert layer.rope is not None, "vectors() refuses a layer without one"
        first, second = turned_pairs(layer.rope, x.shape[2])
        energy = pair_energy(x, first, second)
        mean = pair_energy(x.mean(axis=1, keepdims=True), first, second)
        yield {
            "pair": np.arange(len(first)),
            "first": first,
            "second": second,
            "wavelength": 2 * math.pi / np.asarray(layer.rope.angles),
            "energy_share": ratio(energy, np.square(x).sum(axis=2).mean(axis=1)[:, None]),
            "mean_share": ratio(mean, energy),
        }

    layers = [layer for layer in capture.layers if layer.rope is not None]
    if not layers:
        raise InputError("No layer of this capture has a rotary embedding that is known, so there are no pairs to see.")
    return by_head(PAIRS, layers, columns, ("keys",))


def pair_points(layer: LayerCapture, head: int, pair: int) -> pl.DataFrame:
    """Return one pair of a head's keys before and after RoPE: `PAIR_POINTS`; `InputError` if it does not exist."""
    before = vectors(layer, "keys", "before_rope")
    assert layer.rope is not None, "vectors() refuses a layer without one"
    heads, tokens, dim = before.shape
    first, second = turned_pairs(layer.rope, dim)
    for what, number, count in (("KV head", head, heads), ("pair", pair, len(first))):
        if not 0 <= number < count:
            raise InputError(f"There is no {what} {number}: choose one from 0 to {count - 1}.")
    shown = np.arange(0, tokens, -(-tokens // POINTS))
    frames = []
    for stage, x in (("before RoPE", before), ("after RoPE", vectors(layer, "keys"))):
        own = x[head][shown]
        rows = pl.DataFrame({"position": shown, "x": own[:, first[pair]], "y": own[:, second[pair]]})
        frames.append(in_schema(rows.with_columns(stage=pl.lit(stage)), PAIR_POINTS))
    return pl.concat(frames)


def turned_pairs(rope: Rope, head_dim: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and second channel of each pair that RoPE rotates, the fastest first."""
    first, second = rope.pairs(head_dim).T
    return first[: rope.dims // 2], second[: rope.dims // 2]


def pair_energy(x: NDArray[np.float64], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean over tokens of each pair's squared length, of vectors ``[H, S, D]``: ``[H, pairs]``."""
    return np.asarray((np.square(x[..., first]) + np.square(x[..., second])).mean(axis=1))
