"""The kernel that searches a bitshift trellis."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.kernels.backend import SIMD
from veloxlab.kernels.vectors import VectorKernel

_SCALE_BITS = 4
_SIMDGROUPS = 8  # of a threadgroup: each searches for a head at a time


def trellis_kernel(
    widths: NDArray[np.int64],
    weights: NDArray[np.float32],
    headroom: NDArray[np.float32],
    levels: NDArray[np.float32],
    backwards: NDArray[np.int64],
    words: int,
    steps: int,
) -> VectorKernel:
    """Rows of bits of tokens ``[B, 1, S, H·D]``, whose coordinates have ``widths`` ``[H, D]``, and squared errors
    ``weights``, both in the order of a string: from each head's last coordinate to its first.

    ``levels`` ``[9, states]`` are by width and state, the newest bits lowest; ``backwards`` turns eight bits round. It
    has one number where every coordinate is coded alone. A scale is of ``steps`` an octave, and ``headroom`` ``[H]``
    steps above the root-mean-square; of no steps all are 1.
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
    simdgroups = min(heads, _SIMDGROUPS)
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
