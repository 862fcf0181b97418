"""The kernel that searches a bitshift trellis, of which only CPUs have one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.kernels.vectors import VectorKernel


def trellis_kernel(
    widths: NDArray[np.int64],
    weights: NDArray[np.float32],
    levels: NDArray[np.float32],
    backwards: NDArray[np.int64],
    words: int,
    steps: int,
) -> VectorKernel:
    """Rows of bits of tokens ``[B, 1, S, H·D]``, whose coordinates have ``widths`` ``[H, D]``, and squared errors
    ``weights``.

    ``levels`` ``[9, states]`` are by width and state, the newest bits lowest; ``backwards`` turns eight bits round. It
    has one number where every coordinate is coded alone. A scale is of ``steps`` an octave; of none all are 1.
    """
    tables = {"widths": mx.array(widths.astype(np.int32)), "weights": mx.array(weights), "levels": mx.array(levels)}
    tables["backwards"] = mx.array(backwards.astype(np.int32))
    mx.eval(list(tables.values()))
    return VectorKernel(
        name="encode_trellis",
        file=None,
        given=("tokens",),
        rows={"codes": (words, mx.uint32)},
        variant={"states": levels.shape[1], "alone": len(backwards) == 1, "steps": steps},
        tables=tables,
    )
