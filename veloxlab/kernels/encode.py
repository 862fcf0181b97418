"""Kernels that encode vectors without a rotation: nearest centroids, signs, groups, widths by a plan, trellises.

Each writes the same as the codec of its layout computes with MLX operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.kernels.backend import Backend
from veloxlab.kernels.rotated import FACTORS
from veloxlab.kernels.text import SIMD
from veloxlab.kernels.vectors import IN_LANES, THREADS, Loss, VectorKernel, fits_lanes, lanes, words_per_row

_SIMDGROUPS = THREADS // SIMD  # of a threadgroup, each with one vector
_LARGEST_DIM = 4096  # at which the codes of a threadgroup take half of Metal's threadgroup memory
_WIDEST = 8  # bits of a code of a plan
# the factor of a vector's root-mean-square, from the sums of ``planned.metal``
_FACTORS: Final = {
    "norm": "1.0f",
    "mse": "(inner > 0.0f ? inner : 0.0f) / squares",
    "unbiased": "energy / (inner > energy / {largest}f ? inner : energy / {largest}f)",
}
# vectors of a threadgroup by their largest dimension, so that what is left of them fits Metal's threadgroup memory
_OF_SUMS = {256: 8, 576: 4}
_SEARCH_SIMDGROUPS = 8  # of a threadgroup that searches a codebook
_TRELLIS_SIMDGROUPS = 8  # of a threadgroup, each with one head at a time
_SCALE_BITS = 4  # of a head, in a row of a trellis
_TILE = 256  # centroids in threadgroup memory at a time
_CHUNK = 16  # coordinates of them
_QUAD = 4  # coordinates that are read together


@lru_cache
def sign_kernel(dim: int, rows: int) -> VectorKernel:
    """Signs of projections ``[B, H, S, rows]`` float32, and the size of their vectors ``[B, H, S, dim]``.

    Gives ``signs`` ``[B, H, S, ⌈rows / 32⌉]`` uint32, LSB first, 1 for 0 and above, and ``root_rms``, the square root
    of the root-mean-square, ``[B, H, S, 1]`` float16.
    """
    return VectorKernel(
        name="encode_signs",
        file="signs.metal",
        given=("x", "y"),
        rows={"signs": (words_per_row(rows, 1), mx.uint32), "root_rms": (1, mx.float16)},
        variant={"rows": rows},
        defines={"HEAD_DIM": dim, "ROWS": rows, "CODE_WORDS": words_per_row(rows, 1)},
        headers=("simd.h",),
        at_once=_SIMDGROUPS,
    )


@lru_cache
def group_kernel(dim: int, bits: int, group: int, steps: int, shift: float) -> VectorKernel | None:
    """Equal ``steps`` from the least to the largest of every ``group`` coordinates of ``[B, H, S, dim]``.

    A level is ``shift`` steps, 0 to 1, after the start of its step. The last group may be shorter. Gives ``codes``
    ``[B, H, S, ⌈dim·bits / 32⌉]`` uint32, LSB first without gaps, and roots ``half_step``, ``least``
    ``[B, H, S, groups]`` float16, that of a negative number negative. None for vectors that do not fit.
    """
    if dim > _LARGEST_DIM:
        return None
    groups = -(-dim // group)
    return VectorKernel(
        name="encode_groups",
        file="groups.metal",
        given=("x",),
        rows={
            "codes": (words_per_row(dim, bits), mx.uint32),
            "half_step": (groups, mx.float16),
            "least": (groups, mx.float16),
        },
        variant={"bits": bits, "group": group, "steps": steps, "shift": shift},
        defines={
            "HEAD_DIM": dim,
            "GROUP": group,
            "GROUPS": groups,
            "STEPS": steps,
            "SHIFT": f"{float(shift)}f",
            "CODE_BITS": bits,
            "CODE_WORDS": words_per_row(dim, bits),
        },
        headers=("simd.h", "packing.h"),
        at_once=_SIMDGROUPS,
    )


def plan_kernel(
    tables: Mapping[str, mx.array], mean: mx.array, deviation: mx.array, scale: str, largest: float
) -> VectorKernel | None:
    """Codes of each coordinate's own width, mean and deviation. The plan is data: all layers share one kernel.

    Parameters
    ----------
    tables : ``first_bits``, the first bit of each coordinate's code of 0 to 8 bits in a row, and the end of the last
    one
        ``[D + 1]`` uint32; ``first_codes``, the first coordinate that has bits in each word ``[words]`` uint32;
        ``boundaries`` and ``levels`` for coordinates of mean 0 and variance 1 ``[511]`` float32. Those of n bits begin
        at 2^n − 1; entries of unused widths are arbitrary.
    mean, deviation : of each KV head's coordinates ``[H, 1, D]`` float32, for vectors of root-mean-square 1.
    scale : ``"norm"``, ``"mse"`` or ``"unbiased"``, see `veloxlab.codecs.spectralquant`.
    largest : factor of an unbiased scale.

    Returns
    -------
    A kernel of vectors ``[B, H, S, D]`` and the same in the basis of the plan, float32. It gives ``codes``
    ``[B, H, S, words]`` uint32, one string of bits without gaps, and ``root_scale`` ``[B, H, S, 1]`` float16. None for
    vectors that do not fit the registers.
    """
    dim, count = mean.shape[-1], tables["first_codes"].size
    if not fits_lanes(dim):
        return None
    return VectorKernel(
        name="encode_by_plan",
        file="planned.metal",
        given=("x", "y"),
        rows={"codes": (count, mx.uint32), "root_scale": (1, mx.float16)},
        variant={"scale": scale, "largest": largest},
        defines={
            "HEAD_DIM": dim,
            "CODE_WORDS": count,
            "WIDEST": _WIDEST,
            "FACTOR": _FACTORS[scale].format(largest=float(largest)),
        },
        headers=(*IN_LANES, "quantizers.h", "packing.h"),
        tables={"mean": mean, "deviation": deviation, **tables},
        at_once=THREADS // lanes(dim),
    )


@lru_cache
def search_kernel(dim: int, parts: int, bits: int, backend: Backend) -> VectorKernel:
    """Packed indices of the nearest of ``2**bits`` centroids to each of the ``parts`` sub-vectors of a vector.

    Its inputs are vectors ``[B, H, S, parts · dim]`` and centroids ``[2**bits, dim]``. It gives ``packed``
    ``[B, H, S, ⌈parts·bits / 32⌉]`` uint32. If centroids have the same distance, the first is taken.

    A threadgroup takes a few dozen points and all centroids, tile by tile. Inner products are summed in float32
    registers, which also keep each point's least distance ``‖c‖²/2 − x·c``.
    """
    threads, points, count = _SEARCH_SIMDGROUPS * SIMD, _SEARCH_SIMDGROUPS * backend.points_each, 1 << bits
    tile = min(max(count, SIMD), _TILE)
    chunk = next(size for size in (_QUAD, 2 * _QUAD, _CHUNK) if size >= min(dim, _CHUNK))
    quads, chunks, lines = chunk // _QUAD, -(-dim // chunk), threads // chunk
    span = min(max(parts, 1), points)  # `points` is a multiple of 32: so many indices fill whole words
    return VectorKernel(
        name="assign",
        file="assign.metal",
        given=("points", "centroids"),
        rows={"packed": (words_per_row(parts, bits), mx.uint32)},
        variant={"parts": parts, "bits": bits},
        defines={
            "DIM": f"{dim}u",
            "PARTS": f"{parts}u",
            "BITS": f"{bits}u",
            "COUNT": f"{count}u",
            "EACH": f"{backend.points_each}u",
            "POINTS": f"{points}u",
            "TILE": f"{tile}u",
            "PER_LANE": f"{tile // SIMD}u",
            "CHUNK": f"{chunk}u",
            "CHUNKS": f"{chunks}u",
            "QUADS": f"{quads}u",
            "ROW_QUADS": f"{quads | 1}u",  # odd, so that lanes that read a row each use different banks
            "STEPS": f"{-(-count // tile) * chunks}u",
            "LINES": f"{lines}u",
            "CENTROID_LOADS": f"{-(-tile // lines)}u",
            "POINT_LOADS": f"{-(-points // lines)}u",
            "SPAN": f"{span}u",
            "ROWS": f"{points // span}u",
            "SPAN_WORDS": f"{words_per_row(span, bits)}u",
            "WORDS": f"{words_per_row(parts, bits)}u",
            "GROUPS_PER_PROCESSOR": 1,  # otherwise the compiler has too few registers
        },
        types={"POINT_TYPE": 0, "CENTROID_TYPE": 1},
        headers=(),
        at_once=points // span,
        spans=-(-parts // span),
        threads=threads,
        whole_numbers=True,
    )


def sums_kernel(
    table: mx.array, order: mx.array, scale: str, starts: int, rounds: int, largest: float, loss: Loss
) -> VectorKernel:
    """Indices of the entries whose sum approximates a vector: T_a + i·T_b for each stage.

    Parameters
    ----------
    table : entries of every KV head and stage ``[H, R, N, D]`` float16, N a power of two; ``order`` has the indices of
        their real parts, then of the imaginary ones ``[D]`` int32.
    scale : as for `veloxlab.kernels.rotated.encode_kernel`; the factor is 0 to ``largest``.
    starts, rounds : the number of descents of a search, and the rounds of each.
    loss : see `VectorKernel`.

    Returns
    -------
    A kernel of vectors ``[B, H, S, D]``. It gives ``codes`` ``[B, H, S, bytes]`` uint8, a and b of each stage in a
    string of bits, and ``root_scale`` ``[B, H, S, 1]`` float16. No GPU has it for vectors of more than 576 numbers.
    """
    _, stages, entries, dim = table.shape
    bits = entries.bit_length() - 1
    count = -(-2 * stages * bits // 8)
    at_once = next((vectors for most, vectors in _OF_SUMS.items() if dim <= most), 0)
    return VectorKernel(
        name="encode_sums",
        file="sums.metal" if at_once else None,
        given=("x",),
        rows={"codes": (count, mx.uint8), "root_scale": (1, mx.float16)},
        variant={"starts": starts, "rounds": rounds, "scale": scale, "largest": largest},
        defines={
            "HEAD_DIM": f"{dim}u",
            "ENTRIES": f"{entries}u",
            "INDEX_BITS": f"{bits}u",
            "CODE_BYTES": f"{count}u",
            "STAGES": f"{stages}u",
            "STARTS": f"{starts}u",
            "ROUNDS": f"{rounds}u",
            "FACTOR": FACTORS[scale],
            "MOST": f"{largest}f",
            "GROUPS_PER_PROCESSOR": 2,
        },
        headers=("simd.h", "least.h"),
        tables={"table": table, "order": order},
        transient={"joint": lambda: _joint(table, order)},
        at_once=at_once,
        of_head=True,
        threads=at_once * SIMD,
        loss=loss,
    )


def _joint(table: mx.array, order: mx.array) -> mx.array:
    """2·T_a·(i·T_b) of all pairs of entries ``[H·R·N·N]`` float32, see `sums_kernel`."""
    real, imaginary = mx.split(mx.take(table, order, axis=-1).astype(mx.float32), 2, axis=-1)
    product = 2 * imaginary @ real.swapaxes(-1, -2)
    return (product - product.swapaxes(-1, -2)).reshape(-1)


def trellis_kernel(
    widths: NDArray[np.int64],
    weights: NDArray[np.float32],
    headroom: NDArray[np.float32],
    levels: NDArray[np.float32],
    backwards: NDArray[np.int64],
    words: int,
    steps: int,
) -> VectorKernel:
    """Rows of bits of tokens ``[B, 1, S, H·D]`` whose coordinates have ``widths`` ``[H, D]`` and ``weights`` of squared
    errors, both in the order of a string: from each head's last coordinate to its first.

    ``levels`` ``[9, states]`` are by width and state, the newest bits lowest; ``backwards`` reverses eight bits, or has
    one number if every coordinate is coded alone. A scale has ``steps`` an octave, and is ``headroom`` ``[H]`` steps
    above the root-mean-square; with 0 steps all are 1.
    """
    heads, dim = widths.shape
    states, alone = levels.shape[1], len(backwards) == 1
    entries = np.concatenate([np.full(heads, _SCALE_BITS), widths.ravel()])  # of a row
    ends = np.cumsum(entries)
    arrays = {
        "widths": widths.astype(np.int32),
        "weights": weights,
        "headroom": headroom,
        "levels": levels,
        "backwards": backwards.astype(np.int32),
        "begins": (ends - entries).astype(np.uint32),
        "first_codes": np.searchsorted(ends, 32 * np.arange(words), side="right").astype(np.uint32),
    }
    tables = {name: mx.array(np.ascontiguousarray(array)) for name, array in arrays.items()}
    mx.eval(list(tables.values()))
    simdgroups = min(heads, _TRELLIS_SIMDGROUPS)
    return VectorKernel(
        name="encode_trellis",
        file="trellis.metal",
        given=("tokens",),
        rows={"codes": (words, mx.uint32)},
        variant={"states": states, "alone": alone, "steps": steps},
        defines={
            "HEADS": heads,
            "DIM": dim,
            "STATES": states,
            "REACH": states.bit_length() - 1,
            "ALONE": int(alone),
            "STEPS": steps,
            "SIMDGROUPS": simdgroups,
        },
        headers=("simd.h",),
        tables=tables,
        threads=SIMD * simdgroups,
    )
