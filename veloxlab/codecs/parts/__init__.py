"""Parts that algorithms are made of: packing, transforms, quantizers, tables."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def constant(array: np.ndarray | mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """A table as an evaluated array, which any thread can use."""
    table = mx.array(array).astype(dtype)
    mx.eval(table)
    return table


def in_turn(function: Callable[[mx.array], mx.array], x: mx.array, size: int) -> mx.array:
    """``function`` on ``size`` rows of ``x`` ``[N, ...]`` at a time, joined: MLX would evaluate all in parallel."""
    parts = [function(x[:size])]
    for start in range(size, len(x), size):
        (chunk,) = mx.depends([x[start : start + size]], [parts[-1]])
        parts.append(function(chunk))
    return mx.concatenate(parts)
