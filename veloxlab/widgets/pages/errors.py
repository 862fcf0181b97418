"""The page of errors: what a method does to one KV head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import polars as pl

from veloxlab import views
from veloxlab.measure import code_bits, token_errors
from veloxlab.measure.errors import attention_map, error_densities, errors_along_position, errors_by_bits
from veloxlab.progress import Progress
from veloxlab.widgets.pages.charts import ChartPage, HeadPage, Look, Measure, head_chart, plain

BLOCKS = 32  # of positions: a tenth and nine tenths need some vectors each
MAP = 20  # blocks of a side of an attention map: three triangles of 210 cells, which a page draws at once
CODED = ("layer", "method", "bits")


def _attention(page: ChartPage, progress: Progress, number: int, method: str, bits: int) -> pl.DataFrame:
    (layer,) = page.of_layer(number).layers
    kv_heads = layer.keys.shape[1]
    group = 1 if layer.queries is None else layer.queries.shape[1] // kv_heads
    calibration = page.selection.fitting.calibration(method, [bits], progress)
    given: dict[str, Any] = {"bits": bits, "calibration": calibration, "blocks": MAP}
    maps = [attention_map(layer, head * group, method, **given) for head in range(kv_heads)]
    return pl.concat(own.with_columns(head=pl.lit(head)) for head, own in enumerate(maps))


def _by_head(errors: pl.DataFrame, pool: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    heads = errors["head"].unique().sort()
    return pl.concat(pool(errors.filter(head=head)).with_columns(head=pl.lit(head)) for head in heads)


def _token_errors(page: ChartPage, progress: Progress, layer: int, method: str, bits: int) -> pl.DataFrame:
    calibration = page.selection.fitting.calibration(method, [bits], progress)
    return token_errors(page.of_layer(layer), method, bits=bits, calibration=calibration)


def _by_bits(page: ChartPage, progress: Progress, layer: int, method: str, widths: tuple[int, ...]) -> pl.DataFrame:
    calibration = page.selection.fitting.calibration(method, widths, progress)
    tokens, taken = [], []
    for done, bits in enumerate(widths):
        progress(done, len(widths), f"measuring {bits} bits")
        tokens.append(_token_errors(page, progress, layer, method, bits))
        spent = code_bits(page.of_layer(layer), method, bits=bits, calibration=calibration)
        taken.append(spent.with_columns(bits=pl.lit(bits, pl.Int32)))
    return _by_head(pl.concat(tokens), lambda own: errors_by_bits(own, pl.concat(taken)))


def _attention_caption(frame: pl.DataFrame, look: Look) -> str:
    where = f"layer {look.layer}, KV head {look.head}"
    return f"{look.method} at {look.bits} bits, {where}: {views.attention_caption(frame)}"


class ErrorExplorer(HeadPage):
    """See what a method at a number of bits does to one KV head: its attention map, and errors of keys and values.

    Every token is seen through its codes. ``method``, ``bits``: what codes the keys and values. The attention map is
    that of the first query head of ``head``. All else is as `KeyExplorer` has it; the ``charts`` are ``attention``,
    ``positions``, ``distribution`` and ``by_bits``.
    """

    NAME = "errors"
    SETTINGS = ("layer", "head", "method", "bits")
    MEASURES: ClassVar[dict[str, Measure]] = {
        "attention": _attention,
        "positions": lambda *of: _by_head(_token_errors(*of), lambda own: errors_along_position(own, blocks=BLOCKS)),
        "distribution": lambda *of: _by_head(_token_errors(*of), error_densities),
        "by_bits": _by_bits,
    }
    CHARTS = (
        head_chart(
            "attention",
            CODED,
            lambda frame, look: views.attention_maps(frame, caption=_attention_caption(frame, look)),
            _attention_caption,
        ),
        head_chart("positions", CODED, plain(views.errors_along_position), plain(views.profile_caption)),
        head_chart("distribution", CODED, plain(views.error_distribution), plain(views.distribution_caption)),
        head_chart("by_bits", ("layer", "method", "widths"), plain(views.errors_by_bits), plain(views.by_bits_caption)),
    )
    RARE = "attention", "queries", "Not every layer shows its queries, so there are no attention maps."

    @property
    def summary(self) -> str:
        """Layer, head and method, and what their profile of errors says."""
        said = self.charts["positions"].content["params"]["caption"]
        return f"layer {self.layer}, KV head {self.head}, {self.method}: {said}"

    def _look(self, **changed: Any) -> Look:
        look, fitting = super()._look(**changed), self.selection.fitting
        widths = fitting.widths(look.method)
        look.widths = tuple(w for w in widths if w == look.bits or fitting.is_ready(look.method, w))
        return look
