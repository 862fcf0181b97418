"""Measurements as Markdown tables, for the commands and the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a Markdown table; all columns but the first ``left`` are aligned to the right."""
    marks = ["---" if i < left else "---:" for i in range(len(titles))]
    return "\n".join([_line(titles), f"|{'|'.join(marks)}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def front_table(frame: pl.DataFrame) -> str:
    """Return the Pareto front of a search as a Markdown table."""
    lines = ["| cache | K / V bits | sinks | window | exact layers | bytes a token | KL (nats), 95 % | top-1 flips |"]
    lines.append("|---|---|---:|---:|---|---:|---:|---:|")
    for row in frame.iter_rows(named=True):
        kl = f"{row['kl']:.4f}"
        if row["low"] is not None:
            kl += f" ({row['low']:.4f} to {row['high']:.4f})"
        cells = [f"{row['key_bits']} / {row['value_bits']}", str(row["sinks"]), str(row["window"])]
        cells += [", ".join(map(str, row["protected"])), f"{row['bytes_per_token']:,.1f}", kl]
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {100 * row['top1_flips']:.1f} % |")
    return "\n".join(lines)


def compared_table(frame: pl.DataFrame) -> str:
    """Give the comparison as a Markdown table, by true bits; attention's time in brackets, against the exact one."""
    stored, attended = ((frame[f"{name}_us"] / frame[f"{name}_ratio"])[0] for name in ("store", "attend"))
    exact_bytes = frame["fp16_bytes"][0]
    lines = [
        "| cache | true bits a value | KL (nats) | top-1 flips | perplexity | held, KB | tables, KB | store, µs "
        "| attend, µs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| exact, 16 bits | 16 | 0 | 0 % | {frame['perplexity_exact'][0]:.2f} | {exact_bytes / 1000:,.0f} | "
        f"| {stored:.2f} | {attended:,.0f} |",
    ]
    for row in frame.sort("held_bits", "name").iter_rows(named=True):
        numbers = [f"{row['held_bits']:.2f}", f"{row['kl_mean']:.4f}", f"{100 * row['top1_flips']:.1f} %"]
        numbers += [f"{row['perplexity']:.2f}", f"{row['held_bytes'] / 1000:,.0f}", f"{row['table_bytes'] / 1000:,.0f}"]
        numbers += [f"{row['store_us']:.1f}", f"{row['attend_us']:,.0f} ({row['attend_ratio']:.1f}×)"]
        lines.append(f"| {row['name']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def left_out_lines(left_out: Mapping[str, str]) -> str:
    """Return one line for each cache without some of its rows, with the reason; empty if no row is missing."""
    return "".join(f"\n\n{name} is left out: {reason}" for name, reason in left_out.items())


def ratio_table(frame: pl.DataFrame) -> str:
    """Give the byte ratios as a Markdown table."""
    rows = [
        [row["name"], *(f"{row[name]:.2f}×" for name in ("key_ratio", "value_ratio", "ratio"))]
        for row in frame.iter_rows(named=True)
    ]
    return markdown(["cache", "keys", "values", "whole cache"], rows)


def bench_table(results: dict[str, Any], query_heads: int, kv_heads: int, head_dim: int) -> str:
    """Give the times of attention of one shape, as ``veloxlab bench`` wrote them, as a Markdown table."""
    shape = (query_heads, kv_heads, head_dim)
    rows = [r for r in results["attention"]["rows"] if (r["query_heads"], r["kv_heads"], r["head_dim"]) == shape]
    tokens = sorted({row["tokens"] for row in rows})
    times = {(r["cache"], r["tokens"]): f"{r['microseconds']:.0f} µs ({r['ratio']:.2f}×)" for r in rows}
    cells = [
        [name, *(times[name, n] for n in tokens if (name, n) in times)]
        for name in dict.fromkeys(r["cache"] for r in rows)
    ]
    return markdown(["cache", *(f"{n:,} tokens" for n in tokens)], cells)


def bench_tables(results: dict[str, Any]) -> str:
    """Give the times of attention of every shape that ``veloxlab bench`` wrote, each under a line that names it."""
    facts = results["attention"]["facts"]
    shapes = dict.fromkeys((r["query_heads"], r["kv_heads"], r["head_dim"]) for r in results["attention"]["rows"])
    tables = [
        f"{query_heads} query heads, {kv_heads} KV heads, head dimension {dim}\n\n"
        + bench_table(results, query_heads, kv_heads, dim)
        for query_heads, kv_heads, dim in shapes
    ]
    return "\n\n".join([f"Attention of one query token on an {facts['device']}, {facts['date']}", *tables])


def lengths_table(frame: pl.DataFrame) -> str:
    """Give `measure.lengths.LENGTHS` as a Markdown table."""
    names = ("held_bytes", "prefill_peak_bytes", "decode_peak_bytes")
    rows = []
    for row in frame.sort("tokens", maintain_order=True).iter_rows(named=True):
        sizes = ["fails" if row[name] is None else f"{row[name] / 1e6:,.1f}" for name in names]
        time = "fails" if row["decode_seconds"] is None else f"{1e3 * row['decode_seconds']:.1f}"
        rows.append([row["cache"], f"{row['tokens']:,}", *sizes, time])
    titles = ["cache", "tokens", "held, MB", "peak in prefill, MB", "peak in decoding, MB", "a token, ms"]
    return markdown(titles, rows)


def swept_table(frame: pl.DataFrame) -> str:
    """Give `veloxlab.allocate.sweep.SWEPT` as a Markdown table."""
    from veloxlab.allocate.sensitivity import NATS
    from veloxlab.allocate.sweep import UNIFORM

    lines = [
        "| bits | allocation | KL (nats) | against uniform, 95 % | predicted | top-1 flips | perplexity | K / V bits "
        "| held, KB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = next((by for by in frame["allocation"] if by != UNIFORM), UNIFORM)  # which predicts uniform bits' loss too
    for row in frame.iter_rows(named=True):
        change = ""
        if row["kl_change"] is not None:
            change = f"{row['kl_change']:+.4f} ({row['kl_change_low']:+.4f} to {row['kl_change_high']:+.4f})"
        by = first if row["allocation"] == UNIFORM else row["allocation"]
        predicted = f"{row['predicted_loss']:.3f}" if by in NATS else ""  # the unit of a proxy is not nats
        numbers = [f"{row['kl_mean']:.4f}", change, predicted, f"{100 * row['top1_flips']:.1f} %"]
        numbers += [f"{row['perplexity']:.2f}", f"{row['key_bits']:.2f} / {row['value_bits']:.2f}"]
        numbers.append(f"{row['held_bytes'] / 1000:,.1f}")
        lines.append(f"| {row['bits']:g} | {row['allocation']} | {' | '.join(numbers)} |")
    return "\n".join(lines)
