"""The stored scale of each vector: one 16-bit number, of three kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx

from veloxlab.codecs.parts.packing import Row

ScaleName = Literal["unbiased", "mse", "norm"]
"""``"unbiased"``: inner products right on average; ``"mse"``: least squared error; ``"norm"``: the vector's length."""
SCALE = Row(mx.float16, 1)  # of `store_scale`


def unbiased_keys(tensor: str, options: Mapping[str, object]) -> dict[str, Any]:
    """``options``, with the unbiased scale for keys and the MSE scale for values as defaults."""
    return {"scale": "unbiased" if tensor == "keys" else "mse", **options}


def scale_factor(scale: ScaleName, y: mx.array, quantized: mx.array) -> mx.array:
    """The factor of ``quantized`` that approximates ``y``, both ``[..., D]`` with ``‖y‖ = √D``: ``[..., 1]``."""
    dim = y.shape[-1]
    if scale == "norm":
        return mx.ones((*y.shape[:-1], 1))
    inner = (y * quantized).sum(axis=-1, keepdims=True)
    # the codes of a zero vector are arbitrary: its root-mean-square of 0 makes the scale 0, if the factor is finite
    inner = mx.where(inner == 0, float(dim), inner)
    return dim / inner if scale == "unbiased" else inner / mx.square(quantized).sum(axis=-1, keepdims=True)


def root_mean_square(x: mx.array) -> mx.array:
    """The root-mean-square of each vector ``[..., D]``: ``[..., 1]``, float32."""
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True) / math.sqrt(x.shape[-1])


def over(x: mx.array, size: mx.array) -> mx.array:
    """``x / size``, or ``x`` where the size is 0, float32."""
    return x.astype(mx.float32) / mx.where(size == 0, 1.0, size)


def store_scale(scale: mx.array) -> mx.array:
    """Store a positive scale as the float16 of its square root: 10 bits of precision from 4e-9 to 4e9."""
    return mx.sqrt(scale).astype(mx.float16)


def load_scale(root: mx.array) -> mx.array:
    """Undo `store_scale`, in float32."""
    return mx.square(root.astype(mx.float32))
