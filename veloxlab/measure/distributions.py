"""Distributions of keys and values in the spaces that methods see: before RoPE, rotated, smoothed, on learned axes."""

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
"""Columns of `channel_distributions`, in the space's unit, over the tokens that are finite, null of none: mean,
root-mean-square, least, what 1 % lie below, median, what 1 % lie above, most; and tokens that are NaN or infinite."""

DENSITIES = schema(PLACE + "space value width density below above not_finite")
"""Columns of `densities`: middle and width of a bin; share of the finite coordinates a unit of the space; shares of
them under the first bin and over the last, and coordinates that are not finite, the same in every row of a head."""

OUTLIERS = schema(PLACE + "space loudest loudest_ratio outlier_channels peak_ratio not_finite")
"""Columns of `outlier_channels`: the channel of greatest root-mean-square over the tokens, and that in those of the
median channel; channels of more than `OUTLIER` times the median one's; greatest |coordinate| of the head in
root-mean-squares of all. Coordinates that are not finite do not count. Null where the median, or the head, is zero."""

BINS = 80
TAIL = 5e-4  # share of coordinates that a density may leave out at either end
OUTLIER = 3.0
SUMMARY = {"least": 0.0, "low": 0.01, "median": 0.5, "high": 0.99, "most": 1.0}  # quantiles


def vectors(layer: LayerCapture, tensor: Tensor, space: Space = "raw") -> Floats:
    """Keys or values of a layer in one of the spaces ``[H, S, D]``, float32.

    ``raw``               As they go into the cache: keys after RoPE.
    ``before_rope``       Keys with their rotary embedding undone, as CommVQ codes them.
    ``rotated``           Random signs, then Hadamard: what TurboQuant, RVQ, RaBitQ and PolarQuant code.
    ``smoothed``          Each channel over λ = √(max |x|), VecInfer's first step; in units of λ.
    ``smoothed_rotated``  The same, then signs and Hadamard: what VecInfer codes of keys.
    ``eigenbasis``        SpectralQuant's axes, learned from these vectors: root-mean-square 1, without the mean, the
                          largest variance first.

    Raises `InputError`: an unknown space; values, or a layer without a known RoPE, before RoPE; too few tokens, or
    numbers that are not finite, for an eigenbasis.
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


def _by_head(
    columns: Mapping[str, Any],
    capture: Capture,
    space: Space,
    tensors: Tensors,
    blocks: Callable[[Floats, str], Iterable[Columns]],
) -> pl.DataFrame:
    """Rows of what ``blocks`` gives of the vectors ``[H, S, D]`` of each layer, whose name it is told; NaN is null."""

    def in_space(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        for block in blocks(vectors(layer, tensor, space), f"the {tensor} of layer {layer.layer}"):
            yield {"space": space, **block}

    own = ("keys",) if tensors is None and space == "before_rope" else tensors
    return by_head(columns, capture.layers, in_space, own).fill_nan(None)


def channel_distributions(capture: Capture, space: Space = "raw", *, tensors: Tensors = None) -> pl.DataFrame:
    """Mean, size and quantiles of every channel over the tokens of a capture: `CHANNELS`.

    ``tensors`` is keys, values or both; by default all that the space has. Raises `InputError` as `vectors`.
    """

    def blocks(x: Floats, _: str) -> Iterator[Columns]:
        finite = np.isfinite(x)
        known = np.ma.masked_invalid(x.astype(np.float64))
        found = {"channel": np.arange(x.shape[2]), "not_finite": (~finite).sum(axis=1)}
        found |= {"mean": known.mean(axis=1).filled(np.nan), "rms": np.sqrt((known**2).mean(axis=1)).filled(np.nan)}
        in_order = np.sort(np.where(finite, x, np.nan), axis=1)  # NaN comes last
        for name, share in SUMMARY.items():
            at = np.floor(share * np.maximum(finite.sum(axis=1) - 1, 0) + 0.5).astype(int)  # a token, none between two
            found[name] = np.take_along_axis(in_order, at[:, None], axis=1)[:, 0]
        yield found

    return _by_head(CHANNELS, capture, space, tensors, blocks)


@checked(bins=whole(2))
def densities(capture: Capture, space: Space = "raw", *, tensors: Tensors = None, bins: int = BINS) -> pl.DataFrame:
    """Histogram of all coordinates of each head, as a density: `DENSITIES`.

    The bins leave out at most one coordinate of two thousand at either end. Raises `InputError` as `vectors`, and for a
    head with no finite coordinate.
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
    """How far single channels and single coordinates of each head stand out: `OUTLIERS`.

    The steps of a uniform quantizer are as wide as the greatest coordinate needs: ``peak_ratio`` is this cost. Raises
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
