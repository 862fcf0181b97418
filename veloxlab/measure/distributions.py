"""The spaces in which methods see keys and values: as they are, before RoPE, rotated, smoothed, on learned axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.codecs import ROLES, Role
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.spectralquant import SpectralQuant
from veloxlab.codecs.vecinfer import smoothing_factors
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.frames import PLACE, by_head

Floats = NDArray[np.float32]
Space = Literal["raw", "before_rope", "rotated", "smoothed", "smoothed_rotated", "eigenbasis"]
SPACES: tuple[Space, ...] = get_args(Space)

CHANNELS = PLACE | {
    "space": pl.String,  # see `vectors`
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

DENSITIES = PLACE | {
    "space": pl.String,
    "value": pl.Float64,  # middle of a bin
    "width": pl.Float64,  # of the bin
    "density": pl.Float64,  # share of the finite coordinates a unit of the space
    "below": pl.Float64,  # share of them under the first bin, the same in every row of a head
    "above": pl.Float64,  # over the last one
    "not_finite": pl.Int32,
}
"""Columns of `densities`."""

OUTLIERS = PLACE | {
    "space": pl.String,
    "loudest": pl.Int32,  # the channel of greatest root-mean-square over the tokens
    "loudest_ratio": pl.Float64,  # its root-mean-square, in those of the median channel
    "outlier_channels": pl.Int32,  # channels of more than `OUTLIER` times the median channel's
    "peak_ratio": pl.Float64,  # greatest |coordinate| of the head, in root-mean-squares of all its coordinates
    "not_finite": pl.Int32,  # coordinates that are NaN or infinite, and do not count
}
"""Columns of `outlier_channels`; ratios are null where the median channel, or the head, is zero."""

BINS = 80
TAIL = 5e-4  # share of coordinates that a density may leave out at either end, and says so
OUTLIER = 3.0
SUMMARY = ("mean", "rms", "least", "low", "median", "high", "most")


def check_space(space: str) -> None:
    """Raise `InputError` unless ``space`` is one of `SPACES`."""
    if space not in SPACES:
        raise InputError(f"There is no space {space!r}: choose one of {', '.join(SPACES)}.")


def vectors(layer: LayerCapture, tensor: Role, space: Space = "raw") -> Floats:
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
    x = layer.vectors(tensor)
    if space == "before_rope":
        if tensor == "values":
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


def seen(
    capture: Capture, space: Space = "raw", tensors: Sequence[Role] | None = None
) -> Iterator[tuple[int, Role, Floats]]:
    """Layer, tensor and vectors ``[H, S, D]`` in a space, of all layers; by default of all tensors that it has."""
    check_space(space)
    usual = ROLES[:1] if space == "before_rope" else ROLES
    for layer in capture.layers:
        for tensor in usual if tensors is None else tensors:
            yield layer.layer, tensor, vectors(layer, tensor, space)


def channel_distributions(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Role, ...] | None = None
) -> pl.DataFrame:
    """Mean, size and quantiles of every channel over the tokens of a capture: `CHANNELS`.

    ``tensors`` is keys, values or both; by default all that the space has. `dataclasses.replace` of a capture's layers
    measures some of them.

    Raises
    ------
    InputError : as `vectors`.
    """
    frames = []
    for layer, tensor, x in seen(capture, space, tensors):
        columns: dict[str, Any] = {"space": space, "channel": np.arange(x.shape[2])}
        columns |= dict(zip(SUMMARY, summary(x), strict=True))
        columns["not_finite"] = (~np.isfinite(x)).sum(axis=1)
        frames.append(by_head(CHANNELS, layer, tensor, columns))
    return pl.concat(frames).with_columns(pl.col(SUMMARY).fill_nan(None))


def densities(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Role, ...] | None = None, bins: int = BINS
) -> pl.DataFrame:
    """Histogram of all coordinates of each head, as a density: `DENSITIES`.

    The bins leave out at most one coordinate of two thousand at either end: ``below`` and ``above`` say how many.

    Raises
    ------
    InputError : as `vectors`; fewer than two bins, or a head with no finite coordinate.
    """
    check_bins(bins)
    frames = []
    for layer, tensor, x in seen(capture, space, tensors):
        for head, coordinates in enumerate(x.reshape(len(x), -1)):
            finite = coordinates[np.isfinite(coordinates)]
            if not finite.size:
                raise InputError(
                    f"Head {head} of the {tensor} of layer {layer} has no finite coordinate: load the model with "
                    "dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
                )
            edges = bin_edges(finite, bins)
            columns = histogram(finite, edges) | {
                "head": head,
                "space": space,
                "below": (finite < edges[0]).mean(),
                "above": (finite > edges[-1]).mean(),
                "not_finite": coordinates.size - finite.size,
            }
            frames.append(by_head(DENSITIES, layer, tensor, columns))
    return pl.concat(frames)


def outlier_channels(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Role, ...] | None = None
) -> pl.DataFrame:
    """How far single channels and single coordinates of each head stand out: `OUTLIERS`.

    The steps of a uniform quantizer are as wide as the greatest coordinate needs: ``peak_ratio`` is this cost.

    Raises
    ------
    InputError : as `vectors`.
    """
    frames = []
    for layer, tensor, x in seen(capture, space, tensors):
        finite = np.isfinite(x)
        known = np.where(finite, x, 0.0).astype(np.float64)
        squares, counts = np.square(known).sum(axis=1), finite.sum(axis=1)  # [H, D]
        rms = np.sqrt(squares / np.maximum(counts, 1))
        usual = np.median(rms, axis=1)
        whole = np.sqrt(squares.sum(axis=1) / np.maximum(counts.sum(axis=1), 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            columns = {
                "loudest": rms.argmax(axis=1),
                "loudest_ratio": np.where(usual > 0, rms.max(axis=1) / usual, np.nan),
                "outlier_channels": (rms > OUTLIER * usual[:, None]).sum(axis=1),
                "peak_ratio": np.where(whole > 0, np.abs(known).max(axis=(1, 2)) / whole, np.nan),
                "not_finite": (~finite).sum(axis=(1, 2)),
            }
        rows = {name: column[:, None] for name, column in columns.items()}
        frames.append(by_head(OUTLIERS, layer, tensor, rows | {"space": space}))
    return pl.concat(frames).with_columns(pl.col("loudest_ratio", "peak_ratio").fill_nan(None))


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


def histogram(coordinates: Floats, edges: NDArray[np.float64]) -> dict[str, Any]:
    """``value, width, density`` of each bin; what lies outside counts in the whole of which densities are shares."""
    counts, _ = np.histogram(coordinates, edges)
    width = np.diff(edges)
    return {"value": (edges[1:] + edges[:-1]) / 2, "width": width, "density": counts / (coordinates.size * width)}


def check_bins(bins: int) -> None:
    """Raise `InputError` unless a histogram can have so many bins."""
    if bins < 2:
        raise InputError(f"A density of bins={bins} shows nothing: give 2 or more, such as {BINS}.")
