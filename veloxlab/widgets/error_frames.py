"""What a look at the errors of one layer asks, and what measures it. No widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from veloxlab.measure import Capture, code_bits, token_errors
from veloxlab.measure.attention_maps import attention_map
from veloxlab.measure.error_profiles import error_densities, errors_along_position, errors_by_bits
from veloxlab.measure.progress import Progress
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.layer_explorer import Question

BLOCKS = 32  # of positions: a tenth and nine tenths need some vectors each
MAP = 20  # blocks of a side of an attention map: three triangles of 210 cells, which a page draws at once


@dataclass(frozen=True)
class ErrorLook:
    """What is looked at: a layer, a method at a width, and the widths that it is compared with."""

    layer: int
    method: str
    bits: int
    widths: tuple[int, ...]

    @property
    def questions(self) -> dict[str, Question]:
        """What has to be measured for each chart."""
        return {
            **{name: (name, self.layer, self.method, self.bits) for name in ("attention", "positions", "distribution")},
            "by_bits": ("by_bits", self.layer, self.method, self.widths),
        }


def _attention(fitting: Fitting, progress: Progress, seen: Capture, method: str, bits: int) -> pl.DataFrame:
    """The map of the first query head of each KV head."""
    (layer,) = seen.layers
    kv_heads = layer.keys.shape[1]
    group = 1 if layer.queries is None else layer.queries.shape[1] // kv_heads
    calibration = fitting.calibration(method, [bits], progress)
    maps = [
        attention_map(layer, head * group, method, bits=bits, calibration=calibration, blocks=MAP).with_columns(
            head=pl.lit(head)
        )
        for head in range(kv_heads)
    ]
    return pl.concat(maps)


def _pooled(pool: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[..., pl.DataFrame]:
    """Measures errors of single tokens, pooled for each head alone."""

    def measure(fitting: Fitting, progress: Progress, seen: Capture, method: str, bits: int) -> pl.DataFrame:
        calibration = fitting.calibration(method, [bits], progress)
        tokens = token_errors(seen, method, bits=bits, calibration=calibration)
        return _by_head(tokens, pool)

    return measure


def _by_head(errors: pl.DataFrame, pool: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    heads = errors["head"].unique().sort()
    return pl.concat(pool(errors.filter(head=head)).with_columns(head=pl.lit(head)) for head in heads)


def _by_bits(fitting: Fitting, progress: Progress, seen: Capture, method: str, widths: tuple[int, ...]) -> pl.DataFrame:
    calibration = fitting.calibration(method, widths, progress)
    tokens, taken = [], []
    for done, bits in enumerate(widths):
        progress(done, len(widths), f"measuring {bits} bits")
        tokens.append(token_errors(seen, method, bits=bits, calibration=calibration))
        spent = code_bits(seen, method, bits=bits, calibration=calibration)
        taken.append(spent.with_columns(bits=pl.lit(bits, pl.Int32)))
    true_bits = pl.concat(taken)
    return _by_head(pl.concat(tokens), lambda own: errors_by_bits(own, true_bits))


MEASURES: dict[str, Callable[..., pl.DataFrame]] = {
    "attention": _attention,
    "positions": _pooled(lambda own: errors_along_position(own, blocks=BLOCKS)),
    "distribution": _pooled(error_densities),
    "by_bits": _by_bits,
}
