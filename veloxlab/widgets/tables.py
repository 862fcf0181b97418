"""What the laboratory has measured so far, and the frames that its charts read from it. No widgets, no MLX work."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from veloxlab.measure import relative_errors

Bits = dict[int, tuple[int, int]]  # layer → code bits of keys and of values
ATTENTION = ("logit_error", "output_error")


@dataclass
class Tables:
    """Measurements by code bits, each taken once. Frames are never changed, so any thread may read them.

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
            return _choose(_at(self.attention, sinks, window), bits)
        chosen = _choose(self.tokens, bits)
        return None if chosen is None else relative_errors(chosen, sinks=sinks, window=window)

    def relative_error(self, bits: Bits, sinks: int, window: int, tensor: str) -> float:
        """Mean relative error of all keys or values; NaN while it is not measured."""
        errors = self.errors(bits, "rel_mse", sinks, window)
        return float("nan") if errors is None else float(errors.filter(tensor=tensor)["rel_mse"].mean())  # type: ignore[arg-type]

    def code_bits(self, bits: Bits) -> pl.DataFrame | None:
        """``layer, tensor, part, bits_per_value``, each layer at its bits."""
        return _choose(self.codes, bits)

    def memory(self, bits: Bits, sinks: int, window: int, name: str) -> pl.DataFrame | None:
        """`memory_growth` rows of the cache called ``name`` and of fp16, each layer at its bits."""
        chosen = _choose(_at(self.growth, sinks, window), bits)
        if chosen is None:
            return None
        ours = pl.col("cache") != "fp16"
        return chosen.with_columns(cache=pl.when(ours).then(pl.lit(name)).otherwise("cache"))


def _at(source: dict[tuple[int, int, int], pl.DataFrame], sinks: int, window: int) -> dict[int, pl.DataFrame]:
    return {bits: frame for (bits, s, w), frame in source.items() if (s, w) == (sinks, window)}


def _choose(source: dict[int, pl.DataFrame], bits: Bits) -> pl.DataFrame | None:
    """Rows of each layer's keys and values from the frame measured at their bits."""
    wanted = pl.DataFrame(
        [
            {"layer": layer, "tensor": tensor, "wanted": width}
            for layer, widths in bits.items()
            for tensor, width in zip(("keys", "values"), widths, strict=True)
        ],
        schema={"layer": pl.Int32, "tensor": pl.String, "wanted": pl.Int32},
    )
    widths = wanted["wanted"].unique().to_list()
    if any(width not in source for width in widths):
        return None
    parts = [source[w].join(wanted.filter(wanted=w), on=["layer", "tensor"], how="semi") for w in widths]
    return pl.concat(parts).sort("tensor", "layer", maintain_order=True)
