"""Functions for gradients on a CPU, where MLX takes as long for an exponential as for 80 sums."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
from mlx import nn

from veloxlab import runtime

_LOG2_E = 1.4426950408889634
_LEAST = -126.0  # exponent of the least normal float32
_MOST = 87.0  # its exponential is finite in float32
_ROUNDING = 1.5 * 2**23  # added to a float32, it leaves a whole number in the lowest bits
_POWERS = (1.0, 0.6931472, 0.2402265, 0.05550411, 0.009618129, 0.0013333558)  # ln(2)^k / k!: of 2^f, |f| <= 1/2


def softmax(x: mx.array) -> mx.array:
    """Softmax of float32 rows ``[..., N]``, which can be differentiated once.

    On a CPU each exponential is right to 5e-6 of itself, and one below 2^-126 of the largest becomes 2^-126 of it.
    """
    return cast("mx.array", _quick(x)) if runtime.backend() == "cpu" else mx.softmax(x, axis=-1)


@mx.custom_function
def _quick(x: mx.array) -> mx.array:
    terms = _exponentials(x - x.max(axis=-1, keepdims=True))
    return terms * (1 / terms.sum(axis=-1, keepdims=True))


@_quick.vjp
def _gradients(x: mx.array, cotangent: mx.array, weights: mx.array) -> mx.array:
    weighted = cotangent * weights
    return weighted - weights * weighted.sum(axis=-1, keepdims=True)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SwiGLU, ``gate · x / (1 + exp(−gate))``, which can be differentiated once.

    On a CPU, the share of the gate in float32 is right to 5e-6 of itself, and not below 1e-38.
    """
    if runtime.backend() != "cpu" or gate.dtype != mx.float32 or x.dtype != mx.float32:
        return cast("mx.array", nn.silu(gate) * x)
    product, _ = cast("tuple[mx.array, mx.array]", _quick_swiglu(gate, x))
    return product


@mx.custom_function
def _quick_swiglu(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    share = 1 / (1 + _exponentials(mx.minimum(-gate, _MOST)))
    return share * gate * x, share


@_quick_swiglu.vjp
def _gradients_of_both(
    given: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    (gate, x), (cotangent, _), (_, share) = given, cotangents, outputs
    silu = share * gate
    return cotangent * x * (share + silu * (1 - share)), cotangent * silu


def _exponentials(x: mx.array) -> mx.array:
    """Compute exp(x) = 2^n · 2^f of x <= 87, n being whole: a polynomial of f, to whose exponent n is added."""
    y = mx.maximum(x * _LOG2_E, _LEAST)
    whole = y + _ROUNDING
    f = y - (whole - _ROUNDING)
    of_f = mx.array(_POWERS[-1])
    for power in _POWERS[-2::-1]:
        of_f = of_f * f + power
    return (of_f.view(mx.int32) + (whole.view(mx.int32) << 23)).view(mx.float32)
