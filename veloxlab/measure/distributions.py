"""Distributions of keys and values in the spaces that methods see: before RoPE, rotated, smoothed, on learned axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.checks import checked, whole
from veloxlab.codecs import Tensor
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.spectralquant import SpectralQuant
from veloxlab.codecs.vecinfer import smoothing_factors
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, LayerCapture
from veloxlab.measure.frames import PLACE, Columns, by_head

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
TAIL = 5e-4  # share of coordinates that a density may leave out at either end
OUTLIER = 3.0
SUMMARY = {"least": 0.0, "low": 0.01, "median": 0.5, "high": 0.99, "most": 1.0}  # quantiles


def check_space(space: str) -> None:
    """Raise `InputError` unless ``space`` is one of `SPACES`."""
    if space not in SPACES:
        raise InputError(f"There is no space {space!r}: choose one of {', '.join(SPACES)}.")


def vectors(layer: LayerCapture, tensor: Tensor, space: Space = "raw") -> Floats:
    """Keys or values of a layer in one of the spaces ``[H, S, D]``, float32.

    ``raw``               As they go into the cache: keys after RoPE.
    ``before_rope``       Keys with their rotary embedding undone, as CommVQ codes them.
    ``rotated``           Random signs, then Hadamard: what TurboQuant, RVQ, RaBitQ and PolarQuant code.
    ``smoothed``          Each channel over λ = √(max |x|), VecInfer's first step; in units of λ.
    ``smoothed_rotated``  The same, then signs and Hadamard: what VecInfer codes of keys.
    ``eigenbasis``        SpectralQuant's axes, learned from these vectors: root-mean-square 1, without the mean, the
                          largest variance first.

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
    heads = mx.array([head for head in range(x.shape[1]) if x[:, head].any().item()])  # a head of zeros stays as it is
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


def tensors_in(space: Space, tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """The ``tensors`` that were asked for; by default those that a space has, None for both."""
    return ("keys",) if tensors is None and space == "before_rope" else tensors


def channel_distributions(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Tensor, ...] | None = None
) -> pl.DataFrame:
    """Mean, size and quantiles of every channel over the tokens of a capture: `CHANNELS`.

    ``tensors`` is keys, values or both; by default all that the space has. Raises `InputError` as `vectors`.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x = vectors(layer, tensor, space)
        counts = {"not_finite": (~np.isfinite(x)).sum(axis=1)}
        yield counts | {"space": space, "channel": np.arange(x.shape[2]), **summary(x)}

    frame = by_head(CHANNELS, capture.layers, columns, tensors_in(space, tensors))
    return frame.with_columns(pl.col("mean", "rms", *SUMMARY).fill_nan(None))


@checked(bins=whole(2))
def densities(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Tensor, ...] | None = None, bins: int = BINS
) -> pl.DataFrame:
    """Histogram of all coordinates of each head, as a density: `DENSITIES`.

    The bins leave out at most one coordinate of two thousand at either end. Raises `InputError` as `vectors`, and for a
    head with no finite coordinate.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        for head, own in enumerate(vectors(layer, tensor, space)):
            finite = own[np.isfinite(own)]
            if not finite.size:
                raise InputError(
                    f"Head {head} of the {tensor} of layer {layer.layer} has no finite coordinate: load the model with "
                    "dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
                )
            edges = bin_edges(finite, bins)
            yield histogram(finite, edges) | {
                "head": head,
                "space": space,
                "below": (finite < edges[0]).mean(),
                "above": (finite > edges[-1]).mean(),
                "not_finite": own.size - finite.size,
            }

    return by_head(DENSITIES, capture.layers, columns, tensors_in(space, tensors))


def outlier_channels(
    capture: Capture, space: Space = "raw", *, tensors: tuple[Tensor, ...] | None = None
) -> pl.DataFrame:
    """How far single channels and single coordinates of each head stand out: `OUTLIERS`.

    The steps of a uniform quantizer are as wide as the greatest coordinate needs: ``peak_ratio`` is this cost. Raises
    `InputError` as `vectors`.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x = vectors(layer, tensor, space)
        finite = np.isfinite(x)
        known = np.where(finite, x, 0.0).astype(np.float64)
        squares, counts = np.square(known).sum(axis=1), finite.sum(axis=1)  # [H, D]
        rms = np.sqrt(squares / np.maximum(counts, 1))
        usual = np.median(rms, axis=1, keepdims=True)
        of_head = np.sqrt(squares.sum(axis=1, keepdims=True) / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            yield {
                "space": space,
                "loudest": rms.argmax(axis=1, keepdims=True),
                "loudest_ratio": np.where(usual > 0, rms.max(axis=1, keepdims=True) / usual, np.nan),
                "outlier_channels": (rms > OUTLIER * usual).sum(axis=1, keepdims=True),
                "peak_ratio": np.where(of_head > 0, np.abs(known).max(axis=(1, 2))[:, None] / of_head, np.nan),
                "not_finite": (~finite).sum(axis=(1, 2))[:, None],
            }

    frame = by_head(OUTLIERS, capture.layers, columns, tensors_in(space, tensors))
    return frame.with_columns(pl.col("loudest_ratio", "peak_ratio").fill_nan(None))


def summary(x: Floats) -> dict[str, NDArray[np.float64]]:
    """Mean, root-mean-square and the quantiles of `SUMMARY` over axis 1 of ``x`` ``[H, S, D]``: each ``[H, D]``.

    Numbers that are not finite do not count; NaN where none is finite.
    """
    finite = np.isfinite(x)
    count = finite.sum(axis=1)
    known = np.where(finite, x, 0.0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"mean": known.sum(axis=1) / count, "rms": np.sqrt(np.square(known).sum(axis=1) / count)}
    in_order = np.sort(np.where(finite, x, np.nan), axis=1)  # NaN comes last
    for name, share in SUMMARY.items():
        at = np.floor(share * np.maximum(count - 1, 0) + 0.5).astype(int)  # a token that is there, none between two
        found[name] = np.take_along_axis(in_order, at[:, None], axis=1)[:, 0].astype(np.float64)
    return found


def bin_edges(coordinates: Floats, bins: int) -> NDArray[np.float64]:
    """Edges of equal bins that hold all finite ``coordinates`` but `TAIL` at either end, and have some width."""
    low, high = (float(end) for end in np.quantile(coordinates, (TAIL, 1 - TAIL)))
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = max(abs(low), 1.0) / 2
        low, high = low - room, high + room
    return np.linspace(low, high, bins + 1)


def histogram(coordinates: Floats, edges: NDArray[np.float64]) -> dict[str, Any]:
    """``value, width, density`` of each bin; densities are shares of all coordinates, those outside too."""
    counts, _ = np.histogram(coordinates, edges)
    width = np.diff(edges)
    return {"value": (edges[1:] + edges[:-1]) / 2, "width": width, "density": counts / (coordinates.size * width)}
