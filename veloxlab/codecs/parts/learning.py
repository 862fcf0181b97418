"""The vectors of each KV head that a method learns from, with a check that they suffice."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.parts import Floats
from veloxlab.errors import InputError

_LEAST_TOKENS = 16  # of a layer's statistic; with fewer its own error is above a quarter of the spread
_SAME = 1e-6  # variance at a mean square of 1, below which vectors count as equal


def per_head(x: mx.array) -> Floats:
    """``[B, H, S, D]`` to ``[H, B·S, D]``, float64."""
    array = np.array(x.astype(mx.float32), np.float64).swapaxes(0, 1)
    return np.asarray(array.reshape(array.shape[0], -1, array.shape[-1]))


def learnable(x: mx.array, method: str, least: int = _LEAST_TOKENS) -> Floats:
    """As `per_head`; raises `InputError` as `check_learnable`."""
    array = per_head(x)
    check_learnable(array, method, least)
    return array


def check_learnable(array: NDArray[Any], method: str, least: int = _LEAST_TOKENS) -> None:
    """Raise `InputError` unless each head ``[H, N, D]`` has ``least`` tokens that are not zero, and these vary."""
    tokens = int(array.any(axis=-1).sum(axis=-1).min()) if array.size else 0
    if tokens < least:
        raise InputError(
            f"{method} cannot learn from {tokens} tokens that are not zero in a KV head: "
            f"calibrate with a text of {least} such tokens or more, better {8 * least}."
        )
    if (array.var(axis=1).mean(axis=-1) < _SAME * np.square(array).mean(axis=(1, 2))).any():
        raise InputError("All tokens of the sample are the same in one KV head: calibrate with a text that varies.")


def damped(moment: Floats, share: float) -> Floats:
    """Matrices ``[H, D, D]`` plus a share of their mean diagonal (of 1 for zero matrices) in each direction."""
    mean = np.trace(moment, axis1=1, axis2=2) / moment.shape[-1]
    return np.asarray(moment + share * np.where(mean == 0, 1.0, mean)[:, None, None] * np.eye(moment.shape[-1]))
