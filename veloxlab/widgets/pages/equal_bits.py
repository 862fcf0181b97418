"""Methods at equal bits on the Compare page: which caches are used, which are missing, and a table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.measure.equal import POINTS
from veloxlab.measure.planned_memory import CacheLayout, cache_layouts
from veloxlab.views.memory import amount
from veloxlab.views.picture import html_table
from veloxlab.widgets.pages.advice_acts import FIT_TAKES
from veloxlab.widgets.runs import Run
from veloxlab.widgets.selection import CACHE, Choice, Fitting

Layouts = tuple[CacheLayout, CacheLayout]  # of a cache, and of the exact one in 16 bits
CALIBRATE = "calibrate too"
TITLES = ["", "method", "KL (nats)", "more than the first", "95 % interval", "interpolated between (held bits)"]


def layouts(model: Module, choice: Choice) -> Layouts:
    """The layouts of a cache and of the exact one in 16 bits."""
    given: dict[str, Any] = {name: getattr(choice, name) for name in CACHE[1:]}
    ours, exact, *_ = cache_layouts(model, choice.method, layer_bits=choice.own_bits, **given)
    return ours, exact


def held_bits(pair: Layouts, tokens: int) -> float:
    """Bits that a cache of ``tokens`` tokens holds for each value; the exact cache holds 16."""
    ours, exact = (layout.held(tokens) for layout in pair)
    return 16 * ours / exact


def to_calibrate(fitting: Fitting, methods: Sequence[str]) -> list[str]:
    """Methods with a width that is not calibrated yet."""
    return [name for name in methods if not all(fitting.is_ready(name, width) for width in fitting.widths(name))]


def calibrating_said(methods: Sequence[str], wanted: bool) -> str:
    """A sentence: whether ``methods`` are calibrated and measured too (``wanted``), and how long that takes."""
    if not methods:
        return ""
    takes = f"this takes {FIT_TAKES} at each width for SmolLM2-135M, longer for a larger model, and is kept on disk"
    if wanted:
        return f"Missing calibrations are made first, of {', '.join(methods)}; {takes}."
    return (
        f"Left out unless calibrated: {', '.join(methods)}. Tick \u201c{CALIBRATE}\u201d to measure them too; {takes}."
    )


def _is_uniform(choice: Choice) -> bool:
    return choice.key_bits == choice.value_bits and not choice.own_bits


def comparable(run: Run, other: Run) -> bool:
    """Whether both have equal bits for keys and values in all layers, and the same exact tokens, text and seed."""
    same = all(getattr(run.choice, name) == getattr(other.choice, name) for name in ("sinks", "window", "seed"))
    read = run.text == other.text and run.windows["positions"].equals(other.windows["positions"])
    return same and read and _is_uniform(run.choice)


def points(runs: Sequence[Run], each: Sequence[Layouts], tokens: int) -> pl.DataFrame:
    """`POINTS` of the runs that are `comparable` with the newest one."""
    frames = [
        run.windows.select(
            pl.lit(run.choice.method).alias("method"),
            pl.lit(held_bits(pair, tokens)).alias("held_bits"),
            "window",
            "kl_mean",
        )
        for run, pair in zip(runs, each, strict=True)
        if comparable(run, runs[-1])
    ]
    return pl.concat([pl.DataFrame(schema=POINTS), *frames])


def around(bits: float, choices: Sequence[Choice], held: Sequence[float]) -> list[Choice]:
    """The choices of one method whose held bits are just below and just above; empty if one of the two is missing."""
    order = sorted(zip(held, range(len(choices)), strict=True))
    below, above = [i for has, i in order if has <= bits][-1:], [i for has, i in order if has >= bits][:1]
    return [choices[i] for i in dict.fromkeys(below + above)] if below and above else []


def beyond_said(method: str, held: Sequence[float], bits: float, tokens: int) -> str:
    """A sentence: why a method has no caches on both sides of ``bits``; ``held``: the held bits of its caches."""
    if not held:
        return ""
    return f"{method} is not ranked at {bits:g} bits: it holds {min(held):.3g} to {max(held):.3g} at {tokens:,} tokens."


def equal_said(ranked: pl.DataFrame, known: pl.DataFrame, newest: Run, bits: float, tokens: int, nbytes: float) -> str:
    """HTML of the ranking. ``known``: the `POINTS` that it was made from. ``nbytes``: bytes held at ``bits``."""
    if ranked.is_empty():
        return f"No method is measured both below and above {bits:g} bits: press \u201cMeasure at equal bits\u201d."
    rows = [
        (
            i + 1,
            row["method"],
            f"{row['kl_mean']:.3g}",
            f"+{row['difference']:.2g}" if i else "",
            _interval(row) if i else "reference",
            f"{row['below']:.2f} and {row['above']:.2f}" if row["below"] < row["above"] else "measured there",
        )
        for i, row in enumerate(ranked.to_dicts())
    ]
    others = sorted({*known["method"]} - {*ranked["method"]})
    left = f" Not ranked, because not measured on both sides: {', '.join(others)}." if others else ""
    exact = f"sinks={newest.choice.sinks}, window={newest.choice.window}"
    said = (
        f"<b>At {bits:g} held bits a value: {amount(nbytes)} at {tokens:,} tokens, {exact}.</b> Held bits count codes, "
        "scales, sinks and window, so they are more than code bits. Interpolated between a method's two nearest "
        "measured caches, by the logarithm of KL. Caches with different bits for keys and values do not count."
        f"{html.escape(left)}"
    )
    return said + html_table(TITLES, rows, cell="padding: 1px 14px 1px 0", left=2)


def _interval(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return "none: one window"
    doubt = ", not decisive" if row["low"] <= 0 <= row["high"] else ""
    return f"{row['low']:.2g} to {row['high']:.2g}{doubt}"
