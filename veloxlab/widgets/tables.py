"""What the laboratory has measured so far, and the frames that its charts read from it. No widgets, no MLX work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import polars as pl

from veloxlab.measure import relative_errors

Bits = dict[int, tuple[int, int]]  # layer → code bits of keys and of values
ATTENTION = ("logit_error", "output_error")


@dataclass
class Tables:
    """Measurements by code bits, each taken once. Frames are never changed, so any thread may read them.

    The worker adds frames while a page reads others, so nothing here loops over a dictionary.

    Attributes
    ----------
    tokens : `token_errors` by bits.
    codes : `code_bits` by bits.
    attention : `layer_errors` by (bits, sinks, window).
    growth : `memory_growth` by (bits, sinks, window), keys and values at the same bits.
    """

    tokens: dict[int, pl.DataFrame] = field(default_factory=dict)
    codes: dict[int, pl.DataFrame] = field(default_factory=dict)
    attention: dict[tuple[int, int, int], pl.DataFrame] = field(default_factory=dict)
    growth: dict[tuple[int, int, int], pl.DataFrame] = field(default_factory=dict)

    def errors(self, bits: Bits, metric: str, sinks: int, window: int) -> pl.DataFrame | None:
        """``layer, head, tensor`` and the metric, each layer at its bits; None if some of it is not measured yet."""
        if metric in ATTENTION:
            return _choose(lambda width: self.attention.get((width, sinks, window)), bits)
        chosen = _choose(self.tokens.get, bits)
        return None if chosen is None else relative_errors(chosen, sinks=sinks, window=window)

    def relative_error(self, bits: Bits, sinks: int, window: int, tensor: str) -> float:
        """Mean relative error of all keys or values; NaN while it is not measured."""
        errors = self.errors(bits, "rel_mse", sinks, window)
        return float("nan") if errors is None else float(errors.filter(tensor=tensor)["rel_mse"].mean())  # type: ignore[arg-type]

    def code_bits(self, bits: Bits) -> pl.DataFrame | None:
        """``layer, tensor, part, bits_per_value``, each layer at its bits."""
        return _choose(self.codes.get, bits)

    def memory(self, bits: Bits, sinks: int, window: int, name: str) -> pl.DataFrame | None:
        """`memory_growth` rows of the cache called ``name`` and of fp16, each layer at its bits."""
        chosen = _choose(lambda width: self.growth.get((width, sinks, window)), bits)
        if chosen is None:
            return None
        ours = pl.col("cache") != "fp16"
        return chosen.with_columns(cache=pl.when(ours).then(pl.lit(name)).otherwise("cache"))


def _choose(measured: Callable[[int], pl.DataFrame | None], bits: Bits) -> pl.DataFrame | None:
    """Rows of each layer's keys and values from the frame measured at their bits; None if one is missing."""
    wanted = pl.DataFrame(
        [
            {"layer": layer, "tensor": tensor, "wanted": width}
            for layer, widths in bits.items()
            for tensor, width in zip(("keys", "values"), widths, strict=True)
        ],
        schema={"layer": pl.Int32, "tensor": pl.String, "wanted": pl.Int32},
    )
    parts = []
    for width in wanted["wanted"].unique().to_list():
        frame = measured(width)
        if frame is None:
            return None
        parts.append(frame.join(wanted.filter(wanted=width), on=["layer", "tensor"], how="semi"))
    return pl.concat(parts).sort("tensor", "layer", maintain_order=True)
