"""What was measured so far, as a table that a page can show."""

from __future__ import annotations

from html import escape

import polars as pl

COLUMNS = {
    "plan": "name",
    "true bits": "true_bits",
    "predicted loss": "predicted_loss",
    "measured KL (nats)": "kl_mean",
    "top-1 flips": "top1_flips",
    "perplexity": "perplexity",
    "held, MB": "held_bytes",
}
FORMATS = {
    "true_bits": "{:.2f}",
    "predicted_loss": "{:.3g}",
    "kl_mean": "{:.3g}",
    "top1_flips": "{:.1%}",
    "perplexity": "{:.2f}",
}


def history(measured: pl.DataFrame) -> str:
    """HTML of `veloxlab.allocate.judged.JUDGED` rows, the newest first; nothing where there are none."""
    if measured.is_empty():
        return ""
    head = "".join(f"<th style='{_cell(i)}'>{words}</th>" for i, words in enumerate(COLUMNS))
    rows = "".join(f"<tr>{_row(row)}</tr>" for row in measured.reverse().iter_rows(named=True))
    return f"<table style='border-collapse: collapse; margin: 4px 0'><tr>{head}</tr>{rows}</table>"


def _row(row: dict[str, object]) -> str:
    return "".join(f"<td style='{_cell(i)}'>{_said(name, row[name])}</td>" for i, name in enumerate(COLUMNS.values()))


def _said(name: str, value: object) -> str:
    if name == "held_bytes":
        return f"{value / 1e6:.3f}"  # type: ignore[operator]
    return FORMATS[name].format(value) if name in FORMATS else escape(str(value))


def _cell(place: int) -> str:
    return f"text-align: {'right' if place else 'left'}; padding: 1px 10px 1px 0"
