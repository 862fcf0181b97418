"""Errors of single tokens, pooled: along the text, and how they are distributed. Frames in, frames out."""

from __future__ import annotations

import numpy as np
import polars as pl

from veloxlab.errors import InputError
from veloxlab.measure.ratios import ratio_of

PROFILE = {
    "tensor": pl.String,
    "bits": pl.Int32,
    "position": pl.Int32,  # first of a block of positions
    "position_end": pl.Int32,  # the one behind it
    "low": pl.Float64,  # relative squared error ‖x − x̂‖² / ‖x‖²: a tenth of layers, heads and tokens lies below
    "median": pl.Float64,
    "high": pl.Float64,  # a tenth lies above
    "not_finite": pl.Int64,  # vectors whose error is NaN or infinite
}
"""Columns of `errors_along_position`; quantiles are null where no error is finite."""

ERROR_DENSITIES = {
    "tensor": pl.String,
    "bits": pl.Int32,
    "least": pl.Float64,  # ends of a bin of relative squared error, equal on a log scale
    "most": pl.Float64,
    "share": pl.Float64,  # of the vectors with an error above 0
    "zero": pl.Int64,  # vectors without error, which a log scale cannot show
    "not_finite": pl.Int64,
}
"""Columns of `error_densities`."""

ERRORS_BY_BITS = {
    "tensor": pl.String,
    "bits": pl.Int32,
    "error": pl.Float64,  # Σ‖x − x̂‖² / Σ‖x‖² over all vectors whose error is finite; null of none
    "true_bits": pl.Float64,  # that a value really takes
    "not_finite": pl.Int64,
}
"""Columns of `errors_by_bits`."""

BLOCKS, BINS = 64, 60
SIDE = ["tensor", "bits"]
RELATIVE = ratio_of(pl.col("squared_error").cast(pl.Float64), pl.col("squared_norm").cast(pl.Float64))


def errors_along_position(tokens: pl.DataFrame, *, blocks: int = BLOCKS) -> pl.DataFrame:
    """Quantiles of the relative error of `veloxlab.token_errors` in blocks of positions: `PROFILE`.

    Raises
    ------
    InputError : no block, or no row.
    """
    if blocks < 1 or tokens.is_empty():
        raise InputError(f"There is nothing to pool: give token_errors with rows, and blocks={BLOCKS} or so.")
    size = -(-(tokens["position"].max() + 1) // blocks)  # type: ignore[operator]
    last = pl.col("position").max() + 1
    error = pl.col("error").filter(pl.col("error").is_finite())
    return (
        tokens.with_columns(error=RELATIVE, block=pl.col("position") // size * size)
        .group_by(*SIDE, "block")
        .agg(
            position_end=last,
            low=error.quantile(0.1),
            median=error.median(),
            high=error.quantile(0.9),
            not_finite=(~pl.col("error").is_finite()).sum(),
        )
        .rename({"block": "position"})
        .sort(*SIDE, "position")
        .select(pl.col(name).cast(dtype) for name, dtype in PROFILE.items())
    )


def errors_by_bits(tokens: pl.DataFrame, true_bits: pl.DataFrame) -> pl.DataFrame:
    """The error at each width of `veloxlab.token_errors`, beside what a value takes by `veloxlab.code_bits`.

    Columns: `ERRORS_BY_BITS`. Both frames have rows of several widths; the second one a column ``bits`` too.

    Raises
    ------
    InputError : no row.
    """
    if tokens.is_empty():
        raise InputError("There is nothing to pool: give token_errors with rows.")
    finite = pl.col("squared_error").is_finite()
    sums = (pl.col(f"squared_{of}").filter(finite).cast(pl.Float64).sum() for of in ("error", "norm"))
    errors = tokens.group_by(SIDE).agg(error=pl.when(finite.any()).then(ratio_of(*sums)), not_finite=(~finite).sum())
    layers = true_bits.group_by(*SIDE, "layer").agg(true_bits=pl.col("bits_per_value").sum())
    taken = layers.group_by(SIDE).agg(pl.col("true_bits").mean())
    joined = errors.join(taken, on=SIDE).sort(SIDE)
    return joined.select(pl.col(name).cast(dtype) for name, dtype in ERRORS_BY_BITS.items())


def error_densities(tokens: pl.DataFrame, *, bins: int = BINS) -> pl.DataFrame:
    """How relative errors of single vectors of `veloxlab.token_errors` are distributed: `ERROR_DENSITIES`.

    Raises
    ------
    InputError : fewer than two bins, or no row.
    """
    errors = tokens.select(*SIDE, error=RELATIVE)
    if bins < 2 or errors.is_empty():
        raise InputError(
            f"There is nothing to draw: bins={bins} of {errors.height} errors. Give rows and 2 bins or more."
        )
    drawn = errors.filter(pl.col("error").is_finite() & (pl.col("error") > 0))["error"]
    low, high = (float(end) for end in (drawn.min() or 1.0, drawn.max() or 1.0))  # type: ignore[arg-type]
    edges = np.geomspace(low / 1.01, high * 1.01, bins + 1)  # a little room, so that the ends lie inside
    frames = []
    for (tensor, bits), own in errors.sort(SIDE, maintain_order=True).group_by(SIDE, maintain_order=True):
        error = own["error"].to_numpy()
        positive = error[np.isfinite(error) & (error > 0)]
        counts, _ = np.histogram(positive, edges)
        columns = {"least": edges[:-1], "most": edges[1:], "share": counts / max(positive.size, 1)}
        place = {
            "tensor": tensor,
            "bits": bits,
            "zero": int((error == 0).sum()),
            "not_finite": int((~np.isfinite(error)).sum()),
        }
        frames.append(pl.DataFrame(columns).with_columns(pl.lit(value).alias(name) for name, value in place.items()))
    return pl.concat([f.select(pl.col(name).cast(dtype) for name, dtype in ERROR_DENSITIES.items()) for f in frames])
