"""What a look at the errors of one layer asks, and what measures it. No widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from veloxlab.measure import Capture, code_bits, token_errors
from veloxlab.measure.attention_maps import attention_map
from veloxlab.measure.error_profiles import errors_by_bits
from veloxlab.measure.progress import Progress
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.layer_explorer import Question


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
        tokens = ("tokens", self.layer, self.method, self.bits)
        return {
            "attention": ("attention", self.layer, self.method, self.bits),
            "positions": tokens,
            "distribution": tokens,
            "by_bits": ("by_bits", self.layer, self.method, self.widths),
        }


def _attention(fitting: Fitting, progress: Progress, seen: Capture, method: str, bits: int) -> pl.DataFrame:
    """The map of the first query head of each KV head."""
    (layer,) = seen.layers
    kv_heads = layer.keys.shape[1]
    group = 1 if layer.queries is None else layer.queries.shape[1] // kv_heads
    calibration = fitting.calibration(method, [bits], progress)
    maps = [
        attention_map(layer, head * group, method, bits=bits, calibration=calibration).with_columns(head=pl.lit(head))
        for head in range(kv_heads)
    ]
    return pl.concat(maps)


def _tokens(fitting: Fitting, progress: Progress, seen: Capture, method: str, bits: int) -> pl.DataFrame:
    return token_errors(seen, method, bits=bits, calibration=fitting.calibration(method, [bits], progress))


def _by_bits(fitting: Fitting, progress: Progress, seen: Capture, method: str, widths: tuple[int, ...]) -> pl.DataFrame:
    calibration = fitting.calibration(method, widths, progress)
    tokens, taken = [], []
    for done, bits in enumerate(widths):
        progress(done, len(widths), f"measuring {bits} bits")
        tokens.append(token_errors(seen, method, bits=bits, calibration=calibration))
        spent = code_bits(seen, method, bits=bits, calibration=calibration)
        taken.append(spent.with_columns(bits=pl.lit(bits, pl.Int32)))
    errors, true_bits = pl.concat(tokens), pl.concat(taken)
    heads = errors["head"].unique().sort()
    return pl.concat(
        errors_by_bits(errors.filter(head=head), true_bits).with_columns(head=pl.lit(head)) for head in heads
    )


MEASURES: dict[str, Callable[..., pl.DataFrame]] = {
    "attention": _attention,
    "tokens": _tokens,
    "by_bits": _by_bits,
}
