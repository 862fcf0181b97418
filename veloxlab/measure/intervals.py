"""How sure a mean of few measurements is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from veloxlab.errors import InputError


@cache
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with ``freedom`` degrees, for a ``probability`` from ½ to below 1; to about 1e-6.

    With t = √ν·tan θ the density is proportional to cos^(ν−1) θ, which is integrated by the trapezoid rule.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise InputError(
            f"Student's t has no quantile at a probability of {probability} with {freedom} degrees of freedom: take "
            "from 0.5 to below 1, and 1 degree or more."
        )
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * probability - 1) * below[-1], below, angles)))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the ends of its two-sided t interval; for paired comparisons give the differences."""
    numbers = np.asarray(values, np.float64)
    low, mean = float(lower_ends(numbers, confidence)), float(numbers.mean())
    return mean, low, 2 * mean - low


def lower_ends(values: npt.NDArray[np.float64], confidence: float = 0.95) -> npt.NDArray[np.float64]:
    """Lower ends ``[...]`` of the two-sided t intervals of the means over the last axis of ``values`` ``[..., N]``.

    Raises `InputError` if there are fewer than two values.
    """
    count = values.shape[-1]
    if count < 2:
        raise InputError(f"An interval takes two values or more, and there are {count}: measure more windows.")
    half = student_quantile((1 + confidence) / 2, count - 1) * values.std(axis=-1, ddof=1) / math.sqrt(count)
    return np.asarray(values.mean(axis=-1) - half)
