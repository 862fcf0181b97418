"""The charts of a cache: errors by layer, how bits are spent, and memory; and what is measured for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from veloxlab.codecs import TENSORS, find_method
from veloxlab.measure import code_bits, layer_errors, memory_growth, predicted_growth, relative_errors, token_errors
from veloxlab.progress import Progress
from veloxlab.views import bit_allocation, bit_caption, error_caption, error_map, memory_caption
from veloxlab.views import memory_growth as memory_chart
from veloxlab.widgets.pages.charts import Chart, ChartPage, Look, Measure, Request
from veloxlab.widgets.selection import Bits

METRICS = {
    "attention output (relative MSE)": "output_error",
    "attention logits (nats)": "logit_error",
    "keys and values (relative MSE)": "rel_mse",
}
DOMAINS = {"rel_mse": (1e-5, 1.0), "output_error": (1e-6, 1.0), "logit_error": (1e-3, 10.0)}
GREATEST = 9  # bits to which the axis of spent bits goes, at least
MEASURED_UPTO = 4096  # tokens to which caches are really filled
DRAWN_UPTO = 16384  # tokens to which the memory chart goes on


def _coded(measure: Measure, **given: Any) -> Measure:
    """A measurement of the whole capture, under a method at a number of bits, perhaps with tokens kept exact."""

    def run(page: ChartPage, progress: Progress, method: str, width: int, *exact: int) -> pl.DataFrame:
        kept = dict(zip(("sinks", "window"), exact, strict=False))
        calibration = page.calibration(method, [width], progress)
        frame: pl.DataFrame = measure(page.capture, method=method, bits=width, calibration=calibration, **kept, **given)
        return frame

    return run


MEASURES = {
    "token errors": _coded(token_errors),
    "bits": _coded(code_bits),
    "attention errors": _coded(layer_errors),
    "memory": _coded(memory_growth, upto=MEASURED_UPTO),
}


def at_bits(frames: Sequence[pl.DataFrame], layer_bits: Mapping[int, Bits]) -> pl.DataFrame:
    """Rows of each layer's keys and values at their bits, from frames of each of `widths`, the fewest bits first."""
    wanted = pl.DataFrame(
        [(layer, tensor, bits[place]) for layer, bits in layer_bits.items() for place, tensor in enumerate(TENSORS)],
        schema={"layer": pl.Int32, "tensor": pl.String, "wanted": pl.Int32},
        orient="row",
    )
    parts = [
        frame.join(wanted.filter(wanted=width), on=["layer", "tensor"], how="semi")
        for width, frame in zip(widths(layer_bits), frames, strict=True)
    ]
    return pl.concat(parts).sort("tensor", "layer", maintain_order=True)


def widths(layer_bits: Mapping[int, Bits]) -> list[int]:
    """Numbers of bits that occur."""
    return sorted({width for bits in layer_bits.values() for width in bits})


def _asks(name: str, *exact: str) -> Callable[[Look], list[Request]]:
    return lambda look: [
        (name, look.method, width, *(getattr(look, setting) for setting in exact)) for width in widths(look.layer_bits)
    ]


ASKS_TOKENS, ASKS_ATTENTION = _asks("token errors"), _asks("attention errors", "sinks", "window")


def relative(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    """Relative errors of keys and values, from the errors of single tokens."""
    return relative_errors(at_bits(frames, look.layer_bits), sinks=look.sinks, window=look.window)


def _error_rows(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    half = len(frames) // 2
    return relative(frames[:half], look) if look.metric == "rel_mse" else at_bits(frames[half:], look.layer_bits)


def _memory_rows(frames: Sequence[pl.DataFrame], look: Look) -> pl.DataFrame:
    # by the method's name alone: a name that moved with the sliders would leave the chart's colours
    name = pl.when(pl.col("cache") == "fp16").then("cache").otherwise(pl.lit(look.method))
    return predicted_growth(at_bits(frames, look.layer_bits).with_columns(cache=name), DRAWN_UPTO)


CHARTS = (
    Chart(
        "errors",
        ("method", "layer_bits", "sinks", "window", "metric"),
        _error_rows,
        lambda frame, look: error_map(frame, metric=look.metric, domain=DOMAINS[look.metric]),
        lambda frame, look: error_caption(frame, look.metric),
        lambda _, look: look.metric,
        lambda look: [*ASKS_TOKENS(look), *ASKS_ATTENTION(look)],  # both: another metric is seen at once
    ),
    Chart(
        "bits",
        ("method", "layer_bits"),
        lambda frames, look: at_bits(frames, look.layer_bits),
        lambda frame, look: bit_allocation(frame, greatest=max(GREATEST, find_method(look.method).bits[-1] + 1)),
        lambda frame, _: bit_caption(frame),
        lambda _, look: look.method,
        _asks("bits"),
    ),
    Chart(
        "memory",
        ("method", "layer_bits", "sinks", "window"),
        _memory_rows,
        lambda frame, _: memory_chart(frame),
        lambda frame, _: memory_caption(frame),
        lambda _, look: look.method,
        _asks("memory", "sinks", "window"),
    ),
)
