"""Parts that algorithms are made of: packing, transforms, quantizers, tables."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def constant(array: np.ndarray | mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """A table as an evaluated array, which any thread can use."""
    table = mx.array(array).astype(dtype)
    mx.eval(table)
    return table
