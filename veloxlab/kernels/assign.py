"""Nearest centroids of sub-vectors, packed, in one launch: what `nearest` and `pack_indices` of
`veloxlab.codecs.parts.vector` do, which are its twin.

A threadgroup takes a few dozen points and all centroids, a tile of them at a time. Inner products are summed up in
registers, in float32, and each point's least distance ``‖c‖²/2 − x·c`` is kept there: only packed indices are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.backend import SIMD, GpuBackend, Source, launch, source_file, type_name

SIMDGROUPS = 8  # of a threadgroup
# points of a simdgroup, whose sums with 8 centroids each thread has in registers: Apple's GPUs have 128 a thread
EACH = {"cuda": 8, "metal": 4}
_TILE = 256  # centroids in threadgroup memory at a time
_CHUNK = 16  # coordinates of them
_QUAD = 4  # coordinates that are read at once
_WIDEST = 16  # bits of an index
_WORD = 32


def assign(points: mx.array, centroids: mx.array, bits: int, backend: GpuBackend) -> mx.array:
    """Indices of the nearest centroids of the sub-vectors of ``points``, packed tightly, LSB first.

    Parameters
    ----------
    points : ``[..., parts · d]``, rows of sub-vectors; float32, float16 or bfloat16, any strides.
    centroids : ``[2**bits, d]``, of one of these types.
    bits : of an index, 1 to 16.

    Returns
    -------
    ``[..., ceil(parts · bits / 32)]`` uint32. Of centroids at the same distance it is the first.

    Raises
    ------
    InputError : if the numbers of centroids and bits, or the lengths of points and centroids, do not go together.
    """
    count, dim = centroids.shape
    *lead, length = points.shape
    if not 1 <= bits <= _WIDEST or count != 1 << bits:
        raise InputError(
            f"{count} centroids cannot have indices of {bits} bits: give 2**bits of them, with 1 to {_WIDEST} bits."
        )
    if length % dim:
        raise InputError(f"Points of {length} coordinates are no whole sub-vectors of {dim}: give a multiple of {dim}.")
    built = _build(dim, length // dim, bits, points.dtype, centroids.dtype, backend)
    shape = (*lead, built.words)
    if points.size == 0:
        return mx.zeros(shape, mx.uint32)
    padded = (1, 1, 1, *points.shape)
    (packed,) = launch(
        built.source,
        {"points": points.reshape(prod(padded[:-3]), *padded[-3:]), "centroids": centroids},
        backend=backend,
        groups=(-(-prod(lead) // built.rows), built.spans, 1),
        threads=SIMDGROUPS * SIMD,
        shapes=[shape],
        dtypes=[mx.uint32],
    )
    return packed


@dataclass(frozen=True)
class _Built:
    """The kernel, and how its threadgroups share the work: ``rows`` each, of which they take one of ``spans``."""

    source: Source
    rows: int
    spans: int
    words: int  # of a packed row


@lru_cache
def _build(
    dim: int, parts: int, bits: int, point_type: mx.Dtype, centroid_type: mx.Dtype, backend: GpuBackend
) -> _Built:
    threads, points = SIMDGROUPS * SIMD, SIMDGROUPS * EACH[backend]
    tile = min(max(1 << bits, SIMD), _TILE)
    chunk = next(size for size in (_QUAD, 2 * _QUAD, _CHUNK) if size >= min(dim, _CHUNK))
    quads, chunks, lines = chunk // _QUAD, -(-dim // chunk), threads // chunk
    span = min(max(parts, 1), points)  # `points` is a multiple of 32: so many indices fill whole words
    rows, words = points // span, -(-parts * bits // _WORD)
    defines: dict[str, int | str] = {
        "DIM": f"{dim}u",
        "PARTS": f"{parts}u",
        "BITS": f"{bits}u",
        "POINT_TYPE": type_name(point_type, backend),
        "CENTROID_TYPE": type_name(centroid_type, backend),
        "COUNT": f"{1 << bits}u",
        "EACH": f"{EACH[backend]}u",
        "POINTS": f"{points}u",
        "TILE": f"{tile}u",
        "PER_LANE": f"{tile // SIMD}u",
        "CHUNK": f"{chunk}u",
        "CHUNKS": f"{chunks}u",
        "QUADS": f"{quads}u",
        "ROW_QUADS": f"{quads | 1}u",  # an odd number: lanes that read a row each then meet in no bank
        "STEPS": f"{-(-(1 << bits) // tile) * chunks}u",
        "LINES": f"{lines}u",
        "CENTROID_LOADS": f"{-(-tile // lines)}u",
        "POINT_LOADS": f"{-(-points // lines)}u",
        "SPAN": f"{span}u",
        "ROWS": f"{rows}u",
        "SPAN_WORDS": f"{-(-span * bits // _WORD)}u",
        "WORDS": f"{words}u",
        "THREADS": threads,
        "GROUPS_PER_PROCESSOR": 1,  # or the compiler has too few registers
    }
    source = Source(
        "assign", ("points", "centroids"), ("packed",), tuple(defines.items()), (), source_file("assign.metal")
    )
    return _Built(source, rows, -(-parts // span), words)
