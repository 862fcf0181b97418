"""Kernels of the Hadamard rotation: rotate and encode vectors, decode and rotate them back, or rotate alone.

A vector is in the registers of a simdgroup's lanes (``source/lanes.h``): it is read once, and only results are
written. The results are those of ``RotatedCodec.encode`` and ``decode``, and of `SignedHadamard`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import mlx.core as mx

from veloxlab.kernels.vectors import (
    IN_LANES,
    THREADS,
    Loss,
    VectorKernel,
    fits_lanes,
    hartley_row,
    lanes,
    words_per_row,
)

# the factor of a vector's root-mean-square, from sums over y, of length √D, and its levels
FACTORS: Final = {"norm": "1.0f", "mse": "inner / squares", "unbiased": "HEAD_DIM / inner"}
_FILL_LEVELS: Final = (
    "threadgroup float table[1 << CODE_BITS], bounds[1 << CODE_BITS];\n"
    "for (uint i = thread_id; i < 1 << CODE_BITS; i += THREADS) {\n"
    "  table[i] = levels[i * levels_strides[0]];\n"
    "  if (i < (1 << CODE_BITS) - 1) bounds[i] = boundaries[i * boundaries_strides[0]];\n"
    "}\n"
    "group_barrier();"
)
# the residual of a vector of length √D after the nearest multiple of its grid point
_REST: Final = (
    "float rest = 0.0f;\n"
    "UNROLL for (uint i = 0; i < each; i++) {\n"
    "  const float off = y[i] - inner / squares * quantizer.level(own[i * lanes + lane]);\n"
    "  rest += off * off;\n"
    "}\n"
    "rest = total_of<int(lanes)>(rest);"
)
_KEEP_REST: Final = "if (lane == 0) sines[vector] = half(square_root(rest / float(HEAD_DIM)));"


class Quantizer(NamedTuple):
    """The quantizer of a coordinate of a rotated vector of root-mean-square 1, in a kernel."""

    bits: int  # of a code, 1 to 8
    tried: int  # number of stretches; 0 by levels, or if all that matter are tried
    arrays: Mapping[str, mx.array]  # inputs of the kernel
    fill: str  # text that declares and fills threadgroup variables
    made: str  # text of the quantizer, for a rotated vector in ``y``


def nearest_level(boundaries: mx.array, levels: mx.array, bits: int) -> Quantizer:
    """The nearest of ascending ``levels`` ``[2**bits]``, by ``boundaries`` ``[2**bits - 1]``, some equal; float32."""
    arrays = {"boundaries": boundaries, "levels": levels}
    return Quantizer(bits, 0, arrays, _FILL_LEVELS, "const NearestLevel<CODE_BITS> quantizer = {bounds, table};")


def stretched_grid(stretches: mx.array, bits: int, *, tried: bool) -> Quantizer:
    """The steps ±½, ±1½ … ±(2^(bits − 1) − ½), to which stretched coordinates are rounded down in size.

    The first of ``stretches`` ``[n]`` float32 is for all vectors. With ``tried`` they are relative to the stretch at
    which a vector's largest coordinate leaves the grid, and the one of the largest cosine between vector and grid point
    is taken.
    """
    best = f"best_stretch<HEAD_DIM, CODE_BITS>(y, stretches, stretches_strides[0], {stretches.size})"
    stretch = best if tried else "stretches[0]"
    made = f"const StretchedGrid<CODE_BITS> quantizer = {{{stretch}}};"
    return Quantizer(bits, stretches.size, {"stretches": stretches}, "", made)


def best_grid(bits: int) -> Quantizer:
    """The same steps, with the best of all stretches; only CPUs have it."""
    return Quantizer(bits, 0, {}, "", "")


def encode_kernel(
    dim: int,
    signs: mx.array | None,
    quantizer: Quantizer,
    scale: str,
    fields: Mapping[str, int],
    *,
    sine: bool = False,
    sketch: mx.array | None = None,
    loss: Loss | None = None,
) -> VectorKernel | None:
    """Rotates vectors ``[B, H, S, dim]``, quantizes each coordinate, and packs.

    Parameters
    ----------
    signs : ±1 of each coordinate ``[dim]``, float32, of `veloxlab.codecs.parts.transforms.SignedHadamard`; None for
        rotated vectors, which only CPUs take.
    quantizer : of coordinates.
    scale : ``"norm"``, ``"mse"`` or ``"unbiased"``; see `veloxlab.codecs.parts.scales.scale_factor`.
    fields : name and bits of each part of a code, from its high bits down; parts are packed separately.
    sine : whether to store the sine of the angle between a vector and its decoded codes.
    sketch : a matrix ``[rows, dim]``; the signs of its products with the residual of a vector of length √dim are stored
        as ``signs``, and the residual's length as ``residual_norm``; only CPUs have this.
    loss : see `VectorKernel`.

    Returns
    -------
    A kernel that gives each field's codes ``[B, H, S, ⌈D·bits / 32⌉]`` uint32, LSB first without gaps, and
    ``root_scale``, the square root of each vector's scale, and perhaps ``sine``, both ``[B, H, S, 1]`` float16. None
    for vectors that do not fit the registers.
    """
    if not fits_lanes(dim):
        return None
    widths, rows = list(fields.values()), _rows(dim, fields, sketch, sine=sine)
    given = {"signs": signs, **quantizer.arrays, "sketch": sketch}
    tables = {name: table for name, table in given.items() if table is not None}
    variant = {"fields": tuple(widths), "scale": scale, "tried": quantizer.tried, "tables": tuple(tables), "sine": sine}
    if signs is None or sketch is not None or not quantizer.made:
        return VectorKernel("encode", None, ("x",), rows, variant=variant, tables=tables, loss=loss)
    packed, pack = _packing(dim, widths)
    return VectorKernel(
        name="encode",
        file="encode.metal",
        given=("x",),
        rows=rows,
        outputs=(*packed, "root_scale", *(["sines"] if sine else [])),
        variant=variant,
        defines={"HEAD_DIM": dim, "CODE_BITS": quantizer.bits, "FACTOR": FACTORS[scale]},
        headers=(*IN_LANES, "quantizers.h", "packing.h"),
        texts={
            "hartley": hartley_row(dim),
            "tables": quantizer.fill,
            "quantizer": quantizer.made,
            "rest": _REST if sine else "",
            "keep_rest": _KEEP_REST if sine else "",
            "pack": pack,
        },
        tables=tables,
        at_once=THREADS // lanes(dim),
    )


def _rows(
    dim: int, fields: Mapping[str, int], sketch: mx.array | None, *, sine: bool
) -> dict[str, tuple[int, mx.Dtype]]:
    """The stored rows of a vector; see `VectorKernel`."""
    number = 1, mx.float16
    rows = {name: (words_per_row(dim, width), mx.uint32) for name, width in fields.items()}
    if sketch is not None:
        rows |= {"signs": (words_per_row(len(sketch), 1), mx.uint32), "residual_norm": number}
    return rows | {"root_scale": number} | ({"sine": number} if sine else {})


def _packing(dim: int, widths: Sequence[int]) -> tuple[list[str], str]:
    """Names of the rows for the parts of a code, high bits first, and the text that packs them."""
    rows = [f"row_{width}_{i}" for i, width in enumerate(widths)]
    below = [sum(widths[i + 1 :]) for i in range(len(widths))]  # bits of a code under the field
    return rows, "\n  ".join(
        f"pack_row<HEAD_DIM, {width}, {low}>(own, {row} + vector * {words_per_row(dim, width)}u, lane, lanes);"
        for row, width, low in zip(rows, widths, below, strict=True)
    )


def decode_kernel(signs: mx.array, levels: mx.array, dtype: mx.Dtype) -> VectorKernel | None:
    """Undoes `encode_kernel` with one field: levels of the codes, rotated back, times the scale.

    Its inputs are codes and roots of scales. It gives ``out`` ``[B, H, S, D]`` in ``dtype``. ``levels`` are
    ``[2**bits]`` float32. None for vectors that do not fit the registers.
    """
    dim = signs.shape[0]
    if not fits_lanes(dim):
        return None
    return VectorKernel(
        name="decode",
        file="decode.metal",
        given=("codes", "root_scale"),
        rows={"out": (dim, dtype)},
        defines={"HEAD_DIM": dim, "BITS": levels.size.bit_length() - 1, "OUT_TYPE": dtype},
        types={},
        texts={"hartley": hartley_row(dim)},
        tables={"signs": signs, "levels": levels},
        at_once=THREADS // lanes(dim),
    )


def rotate_kernel(signs: mx.array, *, inverse: bool) -> VectorKernel | None:
    """Signs, then an orthonormal Hadamard transform of vectors ``[B, H, S, D]``; ``inverse`` undoes it.

    It gives ``out`` ``[B, H, S, D]`` float32. None for vectors that do not fit the registers.
    """
    dim = signs.shape[0]
    if not fits_lanes(dim):
        return None
    return VectorKernel(
        name="rotate",
        file="rotate.metal",
        given=("x",),
        rows={"out": (dim, mx.float32)},
        defines={"HEAD_DIM": dim, "INVERSE": int(inverse)},
        variant={"inverse": inverse},
        texts={"hartley": hartley_row(dim)},
        tables={"signs": signs},
        at_once=THREADS // lanes(dim),
    )
