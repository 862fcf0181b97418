"""The pairs of coordinates that RoPE turns: what energy each holds, and how a pair looks before and after.

Paper: *RoFormer: Enhanced Transformer with Rotary Position Embedding*, J. Su et al., 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.codecs.commvq_training import pairs
from veloxlab.codecs.rope import Rope
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.ratios import ratio
from veloxlab.measure.spaces import vectors

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
