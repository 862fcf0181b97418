"""Distributions of keys and values in the spaces that methods code: before RoPE, rotated, smoothed, on learned axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
from veloxlab.measure.activations import NOT_FINITE, Capture, Columns, LayerCapture, Tensors, by_head
from veloxlab.measure.frames import PLACE, schema

Floats = NDArray[np.float32]
Space = Literal["raw", "before_rope", "rotated", "smoothed", "smoothed_rotated", "eigenbasis"]
SPACES: tuple[Space, ...] = get_args(Space)

CHANNELS = schema(PLACE + "space channel mean rms least low median high most not_finite")
"""Columns of `channel_distributions`, in the space's unit, over finite tokens, null if there are none: mean, RMS,
least, 1 % quantile, median, 99 % quantile, most; and tokens that are NaN or infinite."""

DENSITIES = schema(PLACE + "space value width density below above not_finite")
"""Columns of `densities`: middle and width of a bin; share of the finite coordinates per unit of the space; shares of
them below the first bin and above the last, and coordinates that are not finite, the same in every row of a head."""

OUTLIERS = schema(PLACE + "space loudest loudest_ratio outlier_channels peak_ratio not_finite")
"""Columns of `outlier_channels`: the channel of greatest RMS over the tokens, and its ratio to the median channel's;
channels above `OUTLIER` times the median; greatest |coordinate| of the head over the RMS of all. Coordinates that are
not finite do not count. Null if the median, or the head, is zero."""

BINS = 80
TAIL = 5e-4  # greatest share of coordinates outside the bins at either end
OUTLIER = 3.0
SUMMARY = {"least": 0.0, "low": 0.01, "median": 0.5, "high": 0.99, "most": 1.0}  # quantiles


def vectors(layer: LayerCapture, tensor: Tensor, space: Space = "raw") -> Floats:
    """Return keys or values of a layer in one of the spaces ``[H, S, D]``, float32.

    ``raw``               As they enter the cache: keys after RoPE.
    ``before_rope``       Keys without their rotary embedding; CommVQ codes these.
    ``rotated``           Random signs, then Hadamard; TurboQuant, RVQ, RaBitQ and PolarQuant code these.
    ``smoothed``          Each channel over λ = √(max |x|), the first step of VecInfer; in units of λ.
    ``smoothed_rotated``  The same, then signs and Hadamard; VecInfer codes these for keys.
    ``eigenbasis``        SpectralQuant's axes, learned from these vectors: RMS 1, without the mean, the largest
                          variance first.

    Raises `InputError` for an unknown space; for values, or a layer without a known RoPE, in the space before RoPE; and
    for too few tokens, or numbers that are not finite, in an eigenbasis.
    """
    if space not in SPACES:
        raise InputError(f"There is no space {space!r}: choose one of {', '.join(SPACES)}.")
    x = layer.vectors(tensor)
    if space == "before_rope":
        if tensor == "values":
            raise InputError("Values go through no RoPE: choose keys, or the space 'raw' (as cached).")
        if layer.rope is None:
            raise InputError(
                f"Layer {layer.layer} has no rotary embedding that is known: choose the space 'raw' (as cached)."
            )
        x = layer.rope.inverse(x, 0)
    elif space == "eigenbasis":
        layer.check_finite("which have no axes", tensor)
        x = _on_axes(x)
    elif space in ("smoothed", "smoothed_rotated"):
        x = x / smoothing_factors(x)[:, None]
    if space in ("rotated", "smoothed_rotated"):
        x = SignedHadamard(x.shape[-1], seed=0).forward(x)
    return np.array(x[0])


def _on_axes(x: mx.array) -> mx.array:
    heads = mx.array([head for head in range(x.shape[1]) if x[:, head].any().item()])  # a head of zeros is unchanged
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


def _by_head(
    columns: Mapping[str, Any],
    capture: Capture,
    space: Space,
    tensors: Tensors,
    blocks: Callable[[Floats, str], Iterable[Columns]],
) -> pl.DataFrame:
    """Return the rows of ``blocks(vectors, name)`` for vectors ``[H, S, D]`` of each named layer; NaN becomes null."""

    def in_space(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        for block in blocks(vectors(layer, tensor, space), f"the {tensor} of layer {layer.layer}"):
            yield {"space": space, **block}

    own = ("keys",) if tensors is None and space == "before_rope" else tensors
    return by_head(columns, capture.layers, in_space, own).fill_nan(None)


def channel_distributions(capture: Capture, space: Space = "raw", *, tensors: Tensors = None) -> pl.DataFrame:
    """Return mean, RMS and quantiles of every channel over the tokens of a capture: `CHANNELS`.

    ``tensors``: keys, values or both; by default all that the space has. Raises `InputError` as `vectors`.
    """

    def blocks(x: Floats, _: str) -> Iterator[Columns]:
        finite = np.isfinite(x)
        known = np.ma.masked_invalid(x.astype(np.float64))
        found = {"channel": np.arange(x.shape[2]), "not_finite": (~finite).sum(axis=1)}
        found |= {"mean": known.mean(axis=1).filled(np.nan), "rms": np.sqrt((known**2).mean(axis=1)).filled(np.nan)}
        in_order = np.sort(np.where(finite, x, np.nan), axis=1)  # NaN comes last
        for name, share in SUMMARY.items():
            at = np.floor(share * np.maximum(finite.sum(axis=1) - 1, 0) + 0.5).astype(int)  # the nearest token
            found[name] = np.take_along_axis(in_order, at[:, None], axis=1)[:, 0]
        yield found

    return _by_head(CHANNELS, capture, space, tensors, blocks)


@checked(bins=whole(2))
def densities(capture: Capture, space: Space = "raw", *, tensors: Tensors = None, bins: int = BINS) -> pl.DataFrame:
    """Return a histogram of all coordinates of each head, as a density: `DENSITIES`.

    At most one coordinate in two thousand is outside the bins at either end. Raises `InputError` as `vectors`, and for
    a head with no finite coordinate.
    """

    def blocks(x: Floats, of: str) -> Iterator[Columns]:
        for head, own in enumerate(x):
            finite = own[np.isfinite(own)]
            if not finite.size:
                raise InputError(f"Head {head} of {of} has no finite coordinate: {NOT_FINITE}")
            edges = bin_edges(finite, bins)
            beyond = {"below": (finite < edges[0]).mean(), "above": (finite > edges[-1]).mean()}
            yield histogram(finite, edges) | beyond | {"head": head, "not_finite": own.size - finite.size}

    return _by_head(DENSITIES, capture, space, tensors, blocks)


def outlier_channels(capture: Capture, space: Space = "raw", *, tensors: Tensors = None) -> pl.DataFrame:
    """Measure the outlier channels and coordinates of each head: `OUTLIERS`.

    The greatest coordinate sets the step width of a uniform quantizer; ``peak_ratio`` is this cost. Raises
    `InputError` as `vectors`.
    """

    def blocks(x: Floats, _: str) -> Iterator[Columns]:
        known = np.ma.masked_invalid(x.astype(np.float64))
        rms = np.sqrt((known**2).mean(axis=1)).filled(0.0)  # [H, D]
        of_head = np.sqrt((known**2).mean(axis=(1, 2))).filled(0.0)
        usual = np.median(rms, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {
                "loudest": rms.argmax(axis=1),
                "loudest_ratio": np.where(usual > 0, rms.max(axis=1) / usual, np.nan),
                "outlier_channels": (rms > OUTLIER * usual[:, None]).sum(axis=1),
                "peak_ratio": np.where(of_head > 0, np.abs(known).max(axis=(1, 2)).filled(0.0) / of_head, np.nan),
                "not_finite": (~np.isfinite(x)).sum(axis=(1, 2)),
            }
        yield {name: column[:, None] for name, column in found.items()}

    return _by_head(OUTLIERS, capture, space, tensors, blocks)


def bin_edges(coordinates: Floats, bins: int) -> NDArray[np.float64]:
    """Return edges of equal bins around all finite ``coordinates`` but `TAIL` at either end, with a width above 0."""
    low, high = (float(end) for end in np.quantile(coordinates, (TAIL, 1 - TAIL)))
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = max(abs(low), 1.0) / 2
        low, high = low - room, high + room
    return np.linspace(low, high, bins + 1)


def histogram(coordinates: Floats, edges: NDArray[np.float64]) -> dict[str, Any]:
    """Return ``value, width, density`` of each bin; densities are shares of all coordinates, also of those outside."""
    counts, _ = np.histogram(coordinates, edges)
    width = np.diff(edges)
    return {"value": (edges[1:] + edges[:-1]) / 2, "width": width, "density": counts / (coordinates.size * width)}
