"""Shares and relative errors, where nothing of nothing is nothing: a KV head of zeros is held without an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray


def ratio(part: ArrayLike, whole: ArrayLike) -> NDArray[Any]:
    """``part / whole`` by element: 0 where ``part`` is 0, and infinite where ``whole`` alone is."""
    part, whole = np.asarray(part), np.asarray(whole)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(part == 0, 0, part / whole))


def ratio_of(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    """`ratio` of two columns."""
    return pl.when(part == 0).then(0.0).otherwise(part / whole)
