"""What two caches lose in each window of one text."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

LOOKS = ((theme.NEUTRAL, "circle"), (theme.CHOSEN, "diamond"))  # of the first cache, and of the second
STEP = 44  # pixels of a window


def window_losses(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the mean divergence of two caches in each window, those of one window joined.

    Rows of `veloxlab.measure.paired.WINDOWS` with a column ``cache``, a name of each.
    """
    shown = columns.require(frame, "window_losses", "window positions kl_mean top1_flips cache")
    scale = columns.log_domain(shown["kl_mean"])
    base = columns.on_log_scale(alt.Chart(), "kl_mean", scale)
    x, y = columns.x("window:O", "window of the text"), columns.log_y("kl_mean", ["mean KL", "nats"], scale)
    base = base.encode(x=x, y=y)
    names = shown["cache"].unique(maintain_order=True).to_list()
    looks = dict(zip(names, LOOKS, strict=False))
    colour = marks.scaled(alt.Color, "cache", {name: look[0] for name, look in looks.items()})
    shape = marks.scaled(alt.Shape, "cache", {name: look[1] for name, look in looks.items()})
    plot = marks.layered(
        base.mark_line(strokeWidth=1.5, color=theme.NEUTRAL, opacity=0.5).encode(detail=alt.Detail("window:O")),
        marks.points(base, columns.tips("cache window positions kl_mean top1_flips"), 80, color=colour, shape=shape),
    )
    plots = [marks.sized(plot, alt.Step(STEP), 160)]
    return marks.framed(plots, shown, "Divergence window by window", caption or window_caption(frame))


def window_caption(frame: pl.DataFrame) -> str:
    """Say the mean of each cache over its windows."""
    needed = columns.require(frame, "window_caption", "kl_mean cache")
    means = needed.group_by("cache", maintain_order=True).agg(pl.col("kl_mean").mean())
    return f"Mean KL in nats: {', '.join(f'{name} {kl:.3g}' for name, kl in means.iter_rows())}."
