"""Quantized coordinates of a method and its levels, both in the space of its codes.

There, ``decode = from_codes(scale · expand)`` (`veloxlab.codecs.base.Codec`), and ``from_codes`` is linear. The inverse
of its matrix maps exact vectors to that space. Divided by their stored scale, they are on the axis of the levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import polars as pl

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import DEFAULT_BITS
from veloxlab.checks import checked, whole
from veloxlab.codecs import Codec, Tensor, find_method
from veloxlab.codecs.base import fitted_online
from veloxlab.codecs.none import Exact
from veloxlab.codecs.parts import Floats as Angles
from veloxlab.codecs.parts.polar import PolarTree, angle_density, halvings
from veloxlab.codecs.polarquant import BLOCK_LEVELS
from veloxlab.errors import InputError
from veloxlab.measure.activations import Capture, Columns, LayerCapture, Tensors, by_head
from veloxlab.measure.distributions import BINS, Floats, bin_edges, histogram, vectors
from veloxlab.measure.frames import PLACE, schema

LEVELS = schema(PLACE + "bits kind value width density share outside")
"""Columns of `level_densities`: kind is "exact", a bin of the quantized coordinates, "level", one value of a table, or
"decoded", a bin of decoded coordinates; middle of a bin or the level, in units of the vector's stored scale; width of
a bin, and share of coordinates per unit, null for a level; share of the coordinates in the bin or coded by the level;
and share of the exact coordinates outside the bins, the same in every row of a head."""

COORDINATE_BITS = schema("layer tensor coordinate bits")
"""Columns of `coordinate_bits`; coordinates are in the codec's space, such as SpectralQuant's axes by variance."""

ANGLES = schema(PLACE + "level angle density expected")
"""Columns of `polar_angles`: level from 1, of pairs of coordinates, of pairs of radii, ...; middle of a bin in radians;
share of the level's angles per radian, and the density after a random rotation, for which codebooks are made."""

MOST_LEVELS = 32  # with more levels, and for vector codes, the result is a density
ANGLE_BINS = 48


def coded_coordinates(
    layer: LayerCapture,
    tensor: Tensor,
    method: str = "turboquant",
    bits: int = DEFAULT_BITS,
    *,
    calibration: Calibration | None = None,
    **options: object,
) -> tuple[Floats, Floats]:
    """Return the quantized coordinates of a layer's keys or values, and their decoded values: each ``[H, S, m]``.

    Both are divided by the stored scale, if the method stores one. QJL's space is that of its sketch, m = bits·D.
    Raises `InputError` as `layer_errors`, and for a method without codes of coordinates, such as ``"none"``.
    """
    x = layer.vectors(tensor)
    codec = fitted_online(layer.codec(tensor, method, bits, calibration, options), x)
    if isinstance(codec, Exact):
        raise InputError(f"{method!r} keeps vectors as they are, so there are no levels to see: choose another method.")
    code = codec.encode(x)
    scale = codec.scales(code)
    exact = np.array(x[0]) @ np.linalg.pinv(code_axes(codec, x.shape[1]))
    if scale is not None:
        stored = np.array(scale[0])
        exact = exact / np.where(stored == 0, 1.0, stored)
    return exact.astype(np.float32), np.array(codec.expand(code)[0])


def code_axes(codec: Codec, kv_heads: int) -> Floats:
    """Return the model's vector of each coordinate in the space of the codes: ``[H, code_dim, D]``."""
    size = codec.code_dim
    return np.array(codec.from_codes(mx.broadcast_to(mx.eye(size), (1, kv_heads, size, size)))[0])


@checked(bins=whole(2))
def level_densities(
    capture: Capture,
    method: str = "turboquant",
    *,
    bits: int = DEFAULT_BITS,
    tensors: Tensors = None,
    calibration: Calibration | None = None,
    bins: int = BINS,
    **options: object,
) -> pl.DataFrame:
    """Return the density of each head's coordinates that ``method`` quantizes, and its levels: `LEVELS`.

    Up to `MOST_LEVELS` different values are listed, with the share of coordinates that each codes; with more values,
    the result is their density. Raises `InputError` as `coded_coordinates`.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        coded = coded_coordinates(layer, tensor, method, bits, calibration=calibration, **options)
        for head, (exact, decoded) in enumerate(zip(*coded, strict=True)):
            if not (np.isfinite(exact).all() and np.isfinite(decoded).all()):
                raise InputError("Some coordinates, or their codes, are NaN or infinite: see vl.measure.layer_errors.")
            edges = bin_edges(exact, bins)
            outside = ((exact < edges[0]) | (exact > edges[-1])).mean()
            values, counts = np.unique(decoded, return_counts=True)
            few = len(values) <= MOST_LEVELS
            for kind, x in [("exact", exact)] if few else [("exact", exact), ("decoded", decoded)]:
                bar = histogram(x.reshape(-1), edges)
                place = {"head": head, "bits": bits, "kind": kind, "outside": outside}
                yield place | bar | {"share": bar["density"] * bar["width"]}
            if few:
                yield place | {"kind": "level", "value": values, "share": counts / decoded.size}

    return by_head(LEVELS, capture.layers, columns, tensors)


def coordinate_bits(calibration: Calibration, bits: float) -> pl.DataFrame:
    """Return code bits of each coordinate of all layers at one width: `COORDINATE_BITS`.

    A codec without a bit plan gives every coordinate the same bits. Bits that are planned for the whole model are means
    over a layer's heads. Raises `InputError` if the calibration does not have this width.
    """
    found = find_method(calibration.method)
    if found.planned is not None:
        found.check(bits, "keys", {})
        planned = found.planned(calibration.codecs, bits)
        means = {place[:2]: np.mean(codec.head_plans, axis=0) for place, codec in planned.items()}
        rows = [(*place, i, own) for place, each in means.items() for i, own in enumerate(each.tolist())]
        return pl.DataFrame(rows, schema=COORDINATE_BITS, orient="row").sort("tensor", "layer", "coordinate")
    if bits not in calibration.widths:
        raise InputError(f"The calibration holds nothing at {bits} bits: choose one of {calibration.widths}.")
    rows = [
        (layer, tensor, coordinate, own)
        for (layer, tensor, width), codec in calibration.codecs.items()
        if width == bits
        for coordinate, own in enumerate(codec.plan or [bits] * codec.head_dim)
    ]
    return pl.DataFrame(rows, schema=COORDINATE_BITS, orient="row").sort("tensor", "layer", "coordinate")


@checked(bins=whole(2))
def polar_angles(
    capture: Capture,
    *,
    levels: int = BLOCK_LEVELS,
    rotated: bool = True,
    tensors: Tensors = None,
    bins: int = ANGLE_BINS,
) -> pl.DataFrame:
    """Return a histogram of each head's polar angles by level, as densities: `ANGLES`.

    ``rotated=False`` shows why PolarQuant rotates first. Raises `InputError` for more levels than halvings of the head
    dimension, and for a capture that is not finite.
    """

    def columns(layer: LayerCapture, tensor: Tensor) -> Iterator[Columns]:
        x = vectors(layer, tensor, "rotated" if rotated else "raw")
        most = halvings(x.shape[-1])
        if not 1 <= levels <= most:
            raise InputError(f"levels={levels} does not fit a head dimension of {x.shape[-1]}: choose 1 to {most}.")
        layer.check_finite("which have no angle", tensor)
        angles, _ = PolarTree(x.shape[-1], (1,) * levels).angles(mx.array(x))
        for level, found in enumerate(angles, 1):
            low, high = (-math.pi, math.pi) if level == 1 else (0.0, math.pi / 2)
            bars = [histogram(own.reshape(-1), np.linspace(low, high, bins + 1)) for own in np.array(found)]
            middle = bars[0]["value"]
            density = np.stack([bar["density"] for bar in bars])
            yield {"level": level, "angle": middle, "density": density, "expected": expected_density(middle, level)}

    return by_head(ANGLES, capture.layers, columns, tensors)


def expected_density(angle: Angles, level: int) -> Angles:
    """Return the density of a randomly rotated vector's angles (radians) at a level, from 1 on."""
    if level == 1:
        return np.full(len(angle), 1 / (2 * math.pi))
    grid = np.linspace(0, math.pi / 2, 4097)
    return np.asarray(angle_density(angle, level) / np.trapezoid(angle_density(grid, level), grid))
