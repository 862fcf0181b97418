"""The spaces in which methods see keys and values: as they are, before RoPE, spread, smoothed, on learned axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.spectralquant import SpectralQuant
from veloxlab.codecs.vecinfer import smoothing_factors
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.errors import Side

Floats = NDArray[np.float32]
Space = Literal["raw", "before_rope", "rotated", "smoothed", "smoothed_rotated", "eigenbasis"]
SPACES: tuple[Space, ...] = get_args(Space)
SIDES: tuple[Side, ...] = get_args(Side)


def check_space(space: str) -> None:
    """Raise `InputError` unless ``space`` is one of `SPACES`."""
    if space not in SPACES:
        raise InputError(f"There is no space {space!r}: choose one of {', '.join(SPACES)}.")


def sides_of(space: Space) -> tuple[Side, ...]:
    """Which of keys and values there are in a space: RoPE turns keys alone."""
    check_space(space)
    return ("keys",) if space == "before_rope" else SIDES


def vectors(layer: LayerCapture, side: Side, space: Space = "raw") -> Floats:
    """Keys or values of a layer in one of the spaces ``[H, S, D]``, float32.

    ``raw``               As they go into the cache: keys after RoPE.
    ``before_rope``       Keys with their rotary embedding undone, as CommVQ codes them.
    ``rotated``           Random signs, then Hadamard: what TurboQuant, RVQ, RaBitQ and PolarQuant code.
    ``smoothed``          Each channel over λ = √(max |x|), VecInfer's first step; in units of λ.
    ``smoothed_rotated``  The same, then signs and Hadamard: what VecInfer codes of keys.
    ``eigenbasis``        SpectralQuant's axes, learned from these very vectors: of root-mean-square 1, the mean taken
                          off, the largest variance first.

    Raises
    ------
    InputError : an unknown space; values, or a layer without a known RoPE, before RoPE; too few tokens, or numbers that
        are not finite, for an eigenbasis.
    """
    check_space(space)
    x = (layer.keys if side == "keys" else layer.values).astype(mx.float32)
    if space == "before_rope":
        if side == "values":
            raise InputError("Values go through no RoPE: choose keys, or the space 'raw'.")
        if layer.rope is None:
            raise InputError(f"Layer {layer.layer} has no rotary embedding that is known: choose the space 'raw'.")
        x = layer.rope.inverse(x, 0)
    elif space == "eigenbasis":
        x = _on_axes(x, layer.layer)
    elif space in ("smoothed", "smoothed_rotated"):
        x = x / smoothing_factors(x)[:, None]
    if space in ("rotated", "smoothed_rotated"):
        x = SignedHadamard(x.shape[-1], seed=0).forward(x)
    return np.array(x[0])


def _on_axes(x: mx.array, layer: int) -> mx.array:
    if not mx.isfinite(x).all().item():
        raise InputError(f"Layer {layer} holds numbers that are NaN or infinite, which have no axes: see it in 'raw'.")
    heads = mx.array([head for head in range(x.shape[1]) if x[:, head].any().item()])  # one of zeros stays where it is
    if not heads.size:
        return x
    own = x[:, heads]
    fitted = SpectralQuant(x.shape[-1], bits=4).fit(Sample(own))  # axes and mean do not depend on the bits
    assert fitted.forward is not None
    assert fitted.mean is not None
    rms = mx.sqrt(mx.square(own).mean(axis=-1, keepdims=True))
    moved = mx.zeros_like(x)
    moved[:, heads] = own / mx.where(rms == 0, 1.0, rms) @ fitted.forward - fitted.mean
    return moved


CHANNELS = {
    "layer": pl.Int32,
    "head": pl.Int32,  # KV head
    "tensor": pl.String,  # "keys" or "values"
    "space": pl.String,  # see `veloxlab.measure.distributions.vectors`
    "channel": pl.Int32,
    "mean": pl.Float64,  # over the tokens that are finite, as all that follows; in the space's own unit
    "rms": pl.Float64,
    "least": pl.Float64,
    "low": pl.Float64,  # 1 % of the tokens lie below
    "median": pl.Float64,
    "high": pl.Float64,  # 1 % lie above
    "most": pl.Float64,
    "not_finite": pl.Int32,  # tokens that are NaN or infinite
}
"""Columns of `channel_distributions`; null where no token is finite."""

DENSITIES = {
    "layer": pl.Int32,
    "head": pl.Int32,
    "tensor": pl.String,
    "space": pl.String,
    "value": pl.Float64,  # middle of a bin
    "width": pl.Float64,  # of the bin
    "density": pl.Float64,  # share of the finite coordinates a unit of the space
    "below": pl.Float64,  # share of them under the first bin, the same in every row of a head
    "above": pl.Float64,  # over the last one
    "not_finite": pl.Int32,
}
"""Columns of `densities`."""

BINS = 80
TAIL = 5e-4  # share of coordinates that a density may leave out at either end, and says so
SUMMARY = ("mean", "rms", "least", "low", "median", "high", "most")


def channel_distributions(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Side, ...] | None = None
) -> pl.DataFrame:
    """Mean, size and quantiles of every channel over the tokens of a capture: `CHANNELS`.

    ``tensors`` is keys, values or both; by default all that the space has. `dataclasses.replace` of a capture's layers
    measures some of them.

    Raises
    ------
    InputError : as `veloxlab.measure.distributions.vectors`.
    """
    frames = []
    for layer, side, x in seen(capture, space, tensors):
        heads, tokens, dim = x.shape
        finite = np.isfinite(x)
        columns = dict(zip(SUMMARY, (c.reshape(-1) for c in summary(x)), strict=True))
        place = {
            "layer": np.full(heads * dim, layer),
            "head": np.repeat(np.arange(heads), dim),
            "tensor": [side] * (heads * dim),
            "space": [space] * (heads * dim),
            "channel": np.tile(np.arange(dim), heads),
        }
        broken = (tokens - finite.sum(axis=1)).reshape(-1)
        frames.append(pl.DataFrame(place | columns | {"not_finite": broken}, schema=CHANNELS))
    return pl.concat(frames).with_columns(pl.col(SUMMARY).fill_nan(None))


def densities(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Side, ...] | None = None, bins: int = BINS
) -> pl.DataFrame:
    """Histogram of all coordinates of each head, as a density: `DENSITIES`.

    The bins leave out at most one coordinate of two thousand at either end: ``below`` and ``above`` say how many.

    Raises
    ------
    InputError : as `veloxlab.measure.distributions.vectors`; fewer than two bins, or a head with no finite coordinate.
    """
    check_bins(bins)
    frames = []
    for layer, side, x in seen(capture, space, tensors):
        for head, coordinates in enumerate(x.reshape(len(x), -1)):
            finite = coordinates[np.isfinite(coordinates)]
            if not finite.size:
                raise InputError(
                    f"Head {head} of the {side} of layer {layer} has no finite coordinate: load the model with "
                    "dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
                )
            edges = bin_edges(finite, bins)
            place = {"layer": layer, "head": head, "tensor": side, "space": space}
            outside = {"below": (finite < edges[0]).mean(), "above": (finite > edges[-1]).mean()}
            counts = {"not_finite": coordinates.size - finite.size}
            frames.append(
                histogram(finite, edges).with_columns(pl.lit(v).alias(k) for k, v in (place | outside | counts).items())
            )
    return pl.concat([frame.select(pl.col(name).cast(dtype) for name, dtype in DENSITIES.items()) for frame in frames])


def seen(capture: Capture, space: Space, tensors: tuple[Side, ...] | None) -> Iterator[tuple[int, Side, Floats]]:
    """Layer, tensor and vectors ``[H, S, D]`` in a space, of all layers of a capture."""
    sides = sides_of(space) if tensors is None else tensors
    for layer in capture.layers:
        for side in sides:
            yield layer.layer, side, vectors(layer, side, space)


def summary(x: Floats) -> list[NDArray[np.float64]]:
    """Mean, root-mean-square, least, 1 %, median, 99 % and most over axis 1 of ``x`` ``[H, S, D]``: each ``[H, D]``.

    Numbers that are not finite do not count; NaN where none is.
    """
    finite = np.isfinite(x)
    count = finite.sum(axis=1)
    known = np.where(finite, x, 0.0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, rms = known.sum(axis=1) / count, np.sqrt(np.square(known).sum(axis=1) / count)
    in_order = np.sort(np.where(finite, x, np.nan), axis=1)  # NaN comes last
    quantiles = []
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        at = np.floor(share * np.maximum(count - 1, 0) + 0.5).astype(int)  # a token that is there, none between two
        quantiles.append(np.take_along_axis(in_order, at[:, None], axis=1)[:, 0].astype(np.float64))
    return [mean, rms, *quantiles]


def bin_edges(coordinates: Floats, bins: int) -> NDArray[np.float64]:
    """Edges of equal bins that hold all finite ``coordinates`` but `TAIL` at either end, and have some width."""
    low, high = (float(end) for end in np.quantile(coordinates, (TAIL, 1 - TAIL)))
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = max(abs(low), 1.0) / 2
        low, high = low - room, high + room
    return np.linspace(low, high, bins + 1)


def histogram(coordinates: Floats, edges: NDArray[np.float64]) -> pl.DataFrame:
    """``value, width, density`` of each bin; what lies outside counts in the whole of which densities are shares."""
    counts, _ = np.histogram(coordinates, edges)
    width = np.diff(edges)
    return pl.DataFrame(
        {"value": (edges[1:] + edges[:-1]) / 2, "width": width, "density": counts / (coordinates.size * width)}
    )


def check_bins(bins: int) -> None:
    """Raise `InputError` unless a histogram can have so many bins."""
    if bins < 2:
        raise InputError(f"A density of bins={bins} shows nothing: give 2 or more, such as {BINS}.")


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
    InputError : as `veloxlab.measure.distributions.vectors`.
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
