"""The page of errors: how a method changes the attention of one KV head, and its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import polars as pl

from veloxlab import views
from veloxlab.measure import Capture, code_bits, token_errors
from veloxlab.measure.errors import attention_map, error_densities, errors_along_position, errors_by_bits
from veloxlab.measure.scores import score_errors
from veloxlab.progress import Progress
from veloxlab.views.marks import bits_said
from veloxlab.views.scores import logits_data
from veloxlab.widgets.pages.charts import ChartPage, Look, Measure, coded
from veloxlab.widgets.pages.heads import CODED, HeadPage, head_chart

BLOCKS = 32  # of positions; few, because the quantiles 0.1 and 0.9 need enough vectors in each
MAP = 20  # blocks on each side of an attention map: three triangles of 210 cells, which a page draws at once
TOKEN_ERRORS = coded(token_errors)


def _attention(seen: Capture, **given: Any) -> pl.DataFrame:
    (layer,) = seen.layers
    kv_heads = layer.keys.shape[1]
    group = 1 if layer.queries is None else layer.queries.shape[1] // kv_heads
    maps = [attention_map(layer, head * group, blocks=MAP, **given) for head in range(kv_heads)]
    return pl.concat(own.with_columns(head=pl.lit(head)) for head, own in enumerate(maps))


def _by_head(errors: pl.DataFrame, pool: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    heads = errors["head"].unique().sort()
    return pl.concat(pool(errors.filter(head=head)).with_columns(head=pl.lit(head)) for head in heads)


def _by_bits(
    page: ChartPage, progress: Progress, layer: int, method: str, widths: Sequence[float], seed: int
) -> pl.DataFrame:
    tokens, taken = [], []
    for done, bits in enumerate(widths):
        progress(done, len(widths), f"measuring {bits_said(bits)}")
        of = page, progress, layer, method, bits, seed
        tokens.append(TOKEN_ERRORS(*of))
        taken.append(coded(code_bits)(*of).with_columns(bits=pl.lit(bits, pl.Float64)))
    return _by_head(pl.concat(tokens), lambda own: errors_by_bits(own, pl.concat(taken)))


def _attention_caption(frame: pl.DataFrame, where: str) -> str:
    return f"{where}: {views.attention_caption(frame)}"


class ErrorExplorer(HeadPage):
    """See how a method at a number of bits changes one KV head: its attention map, and the sources of errors.

    All tokens are coded; none is exact. ``method``, ``bits``: these code the keys and values. The attention map is that
    of the first query head of ``head``. All else is as in `KeyExplorer`; the ``charts`` are ``attention``,
    ``positions``, ``distribution``, ``logits`` and ``by_bits``.
    """

    NAME = "errors"
    HELP = "00_tour.ipynb#3. Where are the errors?"
    SETTINGS = ("layer", "head", "method", "bits", "seed")
    TALL = ("attention",)
    MEASURES: ClassVar[dict[str, Measure]] = {
        "attention": coded(_attention),
        "positions": lambda *of: _by_head(TOKEN_ERRORS(*of), lambda own: errors_along_position(own, blocks=BLOCKS)),
        "distribution": lambda *of: _by_head(TOKEN_ERRORS(*of), error_densities),
        "by_bits": _by_bits,
        "logits": coded(score_errors),
    }
    CHARTS = (
        head_chart(
            "attention",
            CODED,
            lambda frame, where: views.attention_maps(frame, caption=_attention_caption(frame, where)),
            _attention_caption,
            why="Whether queries still attend to the same keys.",
            more=lambda at: {"where": f"{at.method} at {bits_said(at.bits)}, layer {at.layer}, KV head {at.head}"},
        ),
        head_chart(
            "positions",
            CODED,
            views.errors_along_position,
            views.profile_caption,
            why="Whether early or late tokens lose more.",
        ),
        head_chart(
            "distribution",
            CODED,
            views.error_distribution,
            views.distribution_caption,
            why="Whether a few vectors lose far more than most.",
        ),
        head_chart(
            "logits",
            CODED,
            views.logit_errors,
            views.logits_caption,
            why="Where this head's logits get their error: more bits help there.",
            data=logits_data,
        ),
        head_chart(
            "by_bits",
            ("layer", "method", "widths", "seed"),
            views.errors_by_bits,
            views.by_bits_caption,
            why="How much one more bit reduces the errors.",
        ),
    )
    RARE = ("attention", "logits"), "queries", "Some layers do not show their queries, so there are no attention maps."

    @property
    def summary(self) -> str:
        return f"layer {self.layer}, KV head {self.head}, {self.method}: {self._caption('positions')}"

    @property
    def notes(self) -> list[str]:
        key_bits, value_bits = self.selection.choice.bits_of(self.layer)
        both = f"Values are shown at {bits_said(key_bits)} too; in the cache they have {value_bits}."
        some = f"Errors by bits are drawn where {self.method} is calibrated: choose other bits to calibrate them."
        shown = len(self._look().widths) >= sum(isinstance(width, int) for width in self.selection.widths)
        every = f"On this page all {self.selection.tokens} tokens are in codes, also those of sinks and window."
        return [every, *super().notes, both if key_bits != value_bits else "", "" if shown else some]

    def _look(self, **changed: Any) -> Look:
        look, fitting = super()._look(**changed), self.selection.fitting
        widths = fitting.widths(look.method)
        whole = [w for w in widths if isinstance(w, int) and fitting.is_ready(look.method, w)]
        look.widths = tuple(sorted({look.bits, *whole}))
        return look
