"""Measurements as Markdown tables, for the commands and the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

SHAPE = ("query_heads", "kv_heads", "head_dim")


def markdown(titles: str, cells: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table.

    ``titles`` are parted by ``" | "``; a colon behind one aligns its column to the right. ``cells`` is the template of
    a line, with the fields of ``rows``.
    """
    columns = titles.split(" | ")
    marks = ["---:" if title.endswith(":") else "---" for title in columns]
    head = " | ".join(title.removesuffix(":") for title in columns)
    return "\n".join([f"| {head} |", f"|{'|'.join(marks)}|", *(f"| {cells.format(**row)} |" for row in rows)])


def left_out_lines(left_out: Mapping[str, str]) -> str:
    """Return one line for each cache without some of its rows, with the reason; empty if no row is missing."""
    return "".join(f"\n\n{name} is left out: {reason}" for name, reason in left_out.items())


def front_table(frame: pl.DataFrame) -> str:
    """Return the Pareto front of a search as a Markdown table."""
    rows = [
        {
            **row,
            "layers": ", ".join(map(str, row["protected"])),
            "interval": "" if row["low"] is None else f" ({row['low']:.4f} to {row['high']:.4f})",
            "flips": 100 * row["top1_flips"],
        }
        for row in frame.iter_rows(named=True)
    ]
    return markdown(
        "cache | K / V bits | sinks: | window: | exact layers | bytes a token: | KL (nats), 95 %: | top-1 flips:",
        "{method} | {key_bits} / {value_bits} | {sinks} | {window} | {layers} | {bytes_per_token:,.1f} | "
        "{kl:.4f}{interval} | {flips:.1f} %",
        rows,
    )


def compared_table(frame: pl.DataFrame) -> str:
    """Give the comparison as a Markdown table, by true bits; attention's time in brackets, against the exact one."""
    exact = frame.row(0, named=True)
    stored, attended = (exact[f"{name}_us"] / exact[f"{name}_ratio"] for name in ("store", "attend"))
    first = (
        f"exact, 16 bits | 16 | 0 | 0 % | {exact['perplexity_exact']:.2f} | {exact['fp16_bytes'] / 1000:,.0f} | | "
        f"{stored:.2f} | {attended:,.0f}"
    )
    rows = [
        row | {"flips": 100 * row["top1_flips"], "held": row["held_bytes"] / 1000, "tables": row["table_bytes"] / 1000}
        for row in frame.sort("held_bits", "name").iter_rows(named=True)
    ]
    titles, marks, *lines = markdown(
        "cache | true bits a value: | KL (nats): | top-1 flips: | perplexity: | held, KB: | tables, KB: | store, µs: | "
        "attend, µs:",
        "{name} | {held_bits:.2f} | {kl_mean:.4f} | {flips:.1f} % | {perplexity:.2f} | {held:,.0f} | {tables:,.0f} | "
        "{store_us:.1f} | {attend_us:,.0f} ({attend_ratio:.1f}×)",
        rows,
    ).splitlines()
    return "\n".join([titles, marks, f"| {first} |", *lines])


def ratio_table(frame: pl.DataFrame) -> str:
    """Give the byte ratios as a Markdown table."""
    cells = "{name} | {key_ratio:.2f}× | {value_ratio:.2f}× | {ratio:.2f}×"
    return markdown("cache | keys: | values: | whole cache:", cells, frame.iter_rows(named=True))


def bench_tables(results: dict[str, Any]) -> str:
    """Give the times of attention of every shape that ``veloxlab bench`` wrote, each under a line that names it."""
    import polars as pl

    facts = results["attention"]["facts"]
    tables = [f"Attention of one query token on an {facts['device']}, {facts['date']}"]
    for shape, rows in pl.DataFrame(results["attention"]["rows"]).group_by(*SHAPE, maintain_order=True):
        times: dict[str, dict[str, str]] = {}
        for row in rows.iter_rows(named=True):
            time = "{microseconds:.0f} µs ({ratio:.2f}×)".format(**row)
            times.setdefault(row["cache"], {"cache": row["cache"]})[f"n{row['tokens']}"] = time
        tokens = rows["tokens"].unique().sort().to_list()
        titles = " | ".join(["cache", *(f"{n:,} tokens:" for n in tokens)])
        cells = " | ".join(["{cache}", *(f"{{n{n}}}" for n in tokens)])
        table = markdown(titles, cells, times.values())
        tables.append("{} query heads, {} KV heads, head dimension {}\n\n".format(*shape) + table)
    return "\n\n".join(tables)


def lengths_table(frame: pl.DataFrame) -> str:
    """Give `measure.lengths.LENGTHS` as a Markdown table."""
    scales = dict.fromkeys(("held_bytes", "prefill_peak_bytes", "decode_peak_bytes"), 1e-6) | {"decode_seconds": 1e3}
    rows = [
        row | {n: "fails" if row[n] is None else f"{row[n] * scale:,.1f}" for n, scale in scales.items()}
        for row in frame.sort("tokens", maintain_order=True).iter_rows(named=True)
    ]
    return markdown(
        "cache | tokens: | held, MB: | peak in prefill, MB: | peak in decoding, MB: | a token, ms:",
        "{cache} | {tokens:,} | {held_bytes} | {prefill_peak_bytes} | {decode_peak_bytes} | {decode_seconds}",
        rows,
    )


def swept_table(frame: pl.DataFrame) -> str:
    """Give `veloxlab.allocate.sweep.SWEPT` as a Markdown table."""
    from veloxlab.allocate.sensitivity import NATS
    from veloxlab.allocate.sweep import UNIFORM

    first = next((by for by in frame["allocation"] if by != UNIFORM), UNIFORM)  # which predicts uniform bits' loss too
    rows = []
    for row in frame.iter_rows(named=True):
        by = first if row["allocation"] == UNIFORM else row["allocation"]
        change = "{kl_change:+.4f} ({kl_change_low:+.4f} to {kl_change_high:+.4f})"
        rows.append(
            {
                **row,
                "change": "" if row["kl_change"] is None else change.format(**row),
                "predicted": f"{row['predicted_loss']:.3f}" if by in NATS else "",  # the unit of a proxy is not nats
                "flips": 100 * row["top1_flips"],
                "held": row["held_bytes"] / 1000,
            }
        )
    return markdown(
        "bits: | allocation | KL (nats): | against uniform, 95 %: | predicted: | top-1 flips: | perplexity: | "
        "K / V bits: | held, KB:",
        "{bits:g} | {allocation} | {kl_mean:.4f} | {change} | {predicted} | {flips:.1f} % | {perplexity:.2f} | "
        "{key_bits:.2f} / {value_bits:.2f} | {held:,.1f}",
        rows,
    )
