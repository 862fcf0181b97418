"""Measurements as Markdown tables, for the commands and the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

Row = dict[str, Any]
SHAPE = ("query_heads", "kv_heads", "head_dim")


def markdown(titles: str, cells: str, frame: pl.DataFrame | Sequence[Row], **more: Callable[[Row], object]) -> str:
    """Return a Markdown table of a frame, or of rows.

    ``titles`` are separated by ``" | "``; a colon after a title aligns its column to the right. ``cells`` is the
    template of a line, with the fields of a row, and those that ``more`` computes from the row.
    """
    columns = titles.split(" | ")
    marks = ["---:" if title.endswith(":") else "---" for title in columns]
    head = " | ".join(title.removesuffix(":") for title in columns)
    given = frame if isinstance(frame, Sequence) else frame.iter_rows(named=True)
    rows = [row | {name: made(row) for name, made in more.items()} for row in given]
    return "\n".join([f"| {head} |", f"|{'|'.join(marks)}|", *(f"| {cells.format(**row)} |" for row in rows)])


def left_out_lines(left_out: Mapping[str, str]) -> str:
    """Return one line for each cache without some of its rows, with the reason; empty if no row is missing."""
    return "".join(f"\n\n{name} is left out: {reason}" for name, reason in left_out.items())


def _scaled(name: str, scale: float = 1, form: str = "{:,.1f}") -> Callable[[Row], str]:
    """A function that writes a column in another unit. A null is a failed step, and a row may lack the column."""
    return lambda row: "" if name not in row else "fails" if row[name] is None else form.format(row[name] * scale)


_PERCENT = _scaled("top1_flips", 100)
_KILOBYTES = {  # of cells
    "held": _scaled("held_bytes", 1e-3, "{:,.0f}"),
    "tables": _scaled("table_bytes", 1e-3, "{:,.0f}"),
    "held_ours": _scaled("held_bytes_ours", 1e-3, "{:,.0f}"),
    "tables_ours": _scaled("table_bytes_ours", 1e-3, "{:,.0f}"),
}


def front_table(frame: pl.DataFrame) -> str:
    """Return the Pareto front of a search as a Markdown table."""
    return markdown(
        "cache | K / V bits | sinks: | window: | exact layers | bytes a token: | KL (nats), 95 %: | top-1 flips:",
        "{method} | {key_bits:g} / {value_bits:g} | {sinks} | {window} | {layers} | {bytes_per_token:,.1f} | "
        "{kl:.4f}{interval} | {flips} %",
        frame,
        layers=lambda row: ", ".join(map(str, row["protected"])),
        interval=lambda row: "" if row["low"] is None else " ({low:.4f} to {high:.4f})".format(**row),
        flips=_PERCENT,
    )


def tasks_table(frame: pl.DataFrame) -> str:
    """Return `measure.tasks.EVALUATION` as a Markdown table."""
    return markdown(
        "task | questions: | by guessing: | exact: | compressed: | difference, 95 %: | of the contexts in codes:",
        "{task} | {questions} | {guess} | {exact:.0%} | {compressed:.0%} | {difference:+.0%}{interval} | "
        "{coded_share:.0%}",
        frame,
        guess=lambda row: "" if row["chance"] is None else f"{row['chance']:.0%}",
        interval=lambda row: "" if row["low"] is None else " ({low:+.0%} to {high:+.0%})".format(**row),
    )


def compared_table(frame: pl.DataFrame) -> str:
    """Return the comparison as a Markdown table, by true bits; attention's time in brackets, against the exact one."""
    exact = frame.row(0, named=True)
    of_each = (frame.select(f"{name}_us", f"{name}_ratio").iter_rows() for name in ("store", "attend"))
    stored, attended = (median(own / ratio for own, ratio in rows) for rows in of_each)
    first = (
        f"| exact, 16 bits | 16 | 0 | 0 % | {exact['perplexity_exact']:.2f} | {exact['fp16_bytes'] / 1000:,.0f} | | "
        f"{stored:.2f} | {attended:,.0f} |"
    )
    titles, marks, *lines = markdown(
        "cache | true bits a value: | KL (nats): | top-1 flips: | perplexity: | held, KB: | tables, KB: | store, µs: | "
        "attend, µs:",
        "{name} | {held_bits:.2f} | {kl_mean:.4f} | {flips} % | {perplexity:.2f} | {held} | {tables} | "
        "{store_us:.1f} | {attend_us:,.0f} ({attend_ratio:.1f}×)",
        frame.sort("held_bits", "name"),
        flips=_PERCENT,
        **_KILOBYTES,
    ).splitlines()
    return "\n".join([titles, marks, first, *lines])


def peers_table(frame: pl.DataFrame) -> str:
    """Return the rows of `measure.peers` as a Markdown table, by true bits."""
    return markdown(
        "cache | true bits a value: | KL (nats): | top-1 flips: | perplexity: | held, KB: | tables, KB: | read",
        "{name} | {held_bits:.2f} | {kl_mean:.4f} | {flips} % | {perplexity:.2f} | {held} | {tables} | {read}",
        frame.sort("held_bits", "name"),
        flips=_PERCENT,
        **_KILOBYTES,
        read=lambda row: "in one call" if row["mode"] == "oneshot" else "token by token",
    )


def beside_table(frame: pl.DataFrame) -> str:
    """Return the rows of `measure.peers.beside` as a Markdown table."""
    return markdown(
        "their cache | held, KB: | KL (nats): | ours in no more bytes | held, KB: | tables, KB: | KL (nats): | "
        "of theirs:",
        "{name} | {held} | {kl_mean:.4f} | {name_ours} | {held_ours} | {tables_ours} | {kl_mean_ours:.4f} | "
        "{ratio:.2f}×",
        frame,
        **_KILOBYTES,
    )


def ratio_table(frame: pl.DataFrame) -> str:
    """Return the byte ratios as a Markdown table."""
    cells = "{name} | {key_ratio:.2f}× | {value_ratio:.2f}× | {ratio:.2f}×"
    return markdown("cache | keys: | values: | whole cache:", cells, frame)


def against_table(frame: pl.DataFrame) -> str:
    """Return `measure.bench.against.AGAINST` as one line of counts, and a Markdown table of the ratios that moved."""
    moved, unknown = frame.filter("moved"), frame["noise"].null_count()
    said = f"{moved.height} of {frame.height} ratios moved beyond their noise."
    if unknown:
        said += f" Of {unknown} neither run measured the noise: give a newer file, or measure again."
    if moved.is_empty():
        return said
    titles = "part | row | ratio | before: | now: | change: | noise:"
    cells = "{part} | {case} | {name} | {before:.3g} | {now:.3g} | {change:.2f}× | ± {noise:.2f}"
    return f"{said}\n\n{markdown(titles, cells, moved)}"


def bench_tables(results: dict[str, Any]) -> str:
    """Return the times of attention of every shape that ``veloxlab bench`` wrote, each with a heading."""
    facts = results["attention"]["facts"]
    if facts["backend"] == "cpu":
        parts = {part: of for part, of in _CPU_TABLES.items() if part in results}
        tables = [
            f"## {heading}\n\n{_CPU_FACTS.format(**results[part]['facts'])}\n\n{_of_part(results[part], titles, cells)}"
            for part, (heading, titles, cells) in parts.items()
        ]
        return "\n\n".join(tables)
    import polars as pl

    tables = [f"Attention of one query token on an {facts['device']}, {facts['date']}"]
    for shape, rows in pl.DataFrame(results["attention"]["rows"]).group_by(*SHAPE, maintain_order=True):
        times = rows.pivot("tokens", index="cache", values=["microseconds", "ratio"], sort_columns=True)
        tokens = rows["tokens"].unique().sort().to_list()
        titles = " | ".join(["cache", *(f"{n:,} tokens:" for n in tokens)])
        cells = " | ".join(["{cache}", *(f"{{microseconds_{n}:.0f}} µs ({{ratio_{n}:.2f}}×)" for n in tokens)])
        named = "{} query heads, {} KV heads, head dimension {}".format(*shape)
        if "date" in rows.columns:  # of a shape that was measured before the others
            named = ", ".join([named, *rows["date"].drop_nulls().unique()])
        tables.append(f"{named}\n\n{markdown(titles, cells, times.fill_null(float('nan')))}")
    for part, (heading, titles, cells) in _GPU_TABLES.items():
        if part in results:
            tables.append(f"{heading}, {results[part]['facts']['date']}\n\n{_of_part(results[part], titles, cells)}")
    return "\n\n".join(tables)


def _of_part(part: dict[str, Any], titles: str, cells: str) -> str:
    return markdown(titles, cells, part["rows"], **_CELLS)


_CPU_FACTS = (
    "{device}, {cores} cores, {threads} threads of kernels, {blas_threads} of OpenBLAS, {gigabytes_per_second:.1f} "
    "GB/s from memory, {date}. Times of one run, in turn; less than 1× is faster."
)
_CPU_TABLES = {  # part: heading, titles, cells
    "decode": (
        "A token of a model of SmolLM2's shape, behind so many others",
        "cache | tokens: | ms, median: | ms, least: | of exact: | of mlx-lm: | held, MB: | ms, memory alone: | "
        "with a core busy:",
        "{cache} | {tokens:,} | {milliseconds:.1f} | {least_milliseconds:.1f} | {ratio:.2f}× | {of_mlx_lm:.2f}× | "
        "{held_bytes} | {roofline_milliseconds:.1f} | {busy_ratio}",
    ),
    "attention": (
        "Attention of one token in one layer",
        "cache | tokens: | µs, median: | µs, least: | of exact: | slope, of exact: | of MLX operations: | "
        "µs, memory alone: | GB/s:",
        "{cache} | {tokens:,} | {microseconds:,.0f} | {least_microseconds:,.0f} | {ratio:.2f}× | {slope_ratio} | "
        "{of_ops} | {roofline_microseconds:,.0f} | {gigabytes_per_second:.1f}",
    ),
    "encode": (
        "Encoding of the keys and values of one layer",
        "cache | tokens: | µs, median: | µs, least: | by MLX operations, µs: | of MLX operations:",
        "{cache} | {tokens:,} | {microseconds:,.0f} | {least_microseconds:,.0f} | {ops_microseconds:,.0f} | {of_ops}",
    ),
}
_CPU_TABLES["host"] = (
    "Python of a layer and step on a GPU, without MLX's launches",
    "cache | sequences: | µs, median: | µs more than exact: | µs, mean: | µs, most:",
    "{cache} | {sequences} | {microseconds:.0f} | {beyond_exact:.0f} | "
    "{mean_microseconds:.0f} | {most_microseconds:.0f}",
)
_CPU_TABLES["fit"] = ("Fitting to the keys and values of one layer", *_CPU_TABLES["encode"][1:])
_GPU_TABLES = {  # the same
    "decode": (
        "A token behind so many others, in mlx-lm's order of work; layers of an 8B model's shape, or of SmolLM2's",
        "shape | layers: | cache | tokens: | ms, median: | ms, slowest: | of exact: | held, MB:",
        "{shape} | {layers} | {cache} | {tokens:,} | {milliseconds:.2f} | {slowest_milliseconds:.2f} | {ratio:.2f}× | "
        "{held_bytes}",
    ),
    "batch": (
        "A step of a batch of sequences, of which the longest has so many tokens",
        "cache | sequences: | tokens: | ms, median: | ms, slowest: | of exact: | held, MB:",
        "{cache} | {sequences} | {tokens:,} | {milliseconds:.2f} | {slowest_milliseconds:.2f} | {ratio:.2f}× | "
        "{held_bytes}",
    ),
    "read": (
        "Reading a prompt in chunks of 2,048 tokens",
        "cache | tokens: | seconds: | of exact: | peak, MB: | of exact:",
        "{cache} | {tokens:,} | {seconds:.3f} | {ratio:.2f}× | {peak_bytes} | {peak_ratio:.2f}×",
    ),
    "encode": (
        "Encoding the keys and values of 32 layers, as a share of the attention of 32 tokens to 32,768 others",
        "cache | tokens: | µs: | share:",
        "{cache} | {tokens:,} | {microseconds:,.0f} | {ratio:.2f}",
    ),
    "builds": (
        "Kernels that a session of a method builds and checks, the first time: it reads a prompt, and decodes",
        "cache | kernels: | seconds:",
        "{cache} | {kernels} | {seconds:.1f}",
    ),
    "host": _CPU_TABLES["host"],
}
_CELLS = {
    "held_bytes": _scaled("held_bytes", 1e-6),
    "peak_bytes": _scaled("peak_bytes", 1e-6),
    **{name: _scaled(name, form="{:.2f}×") for name in ("slope_ratio", "busy_ratio")},
    "of_ops": _scaled("of_ops", form="{:.3f}×"),
}


def lengths_table(frame: pl.DataFrame) -> str:
    """Return `measure.bench.models.LENGTHS` as a Markdown table."""
    return markdown(
        "cache | tokens: | held, MB: | peak in prefill, MB: | peak in decoding, MB: | a token, ms:",
        "{cache} | {tokens:,} | {held} | {prefill} | {decoding} | {time}",
        frame.sort("tokens", maintain_order=True),
        held=_scaled("held_bytes", 1e-6),
        prefill=_scaled("prefill_peak_bytes", 1e-6),
        decoding=_scaled("decode_peak_bytes", 1e-6),
        time=_scaled("decode_seconds", 1e3),
    )


def swept_table(frame: pl.DataFrame) -> str:
    """Return `veloxlab.allocate.sweep.SWEPT` as a Markdown table."""
    from veloxlab.allocate.sensitivity import NATS
    from veloxlab.allocate.sweep import UNIFORM

    first = next((by for by in frame["allocation"] if by != UNIFORM), UNIFORM)  # it predicts uniform bits' loss too

    def predicted(row: Row) -> str:
        by = first if row["allocation"] == UNIFORM else row["allocation"]
        return f"{row['predicted_loss']:.3f}" if by in NATS else ""  # the unit of a proxy is not nats

    change = "{kl_change:+.4f} ({kl_change_low:+.4f} to {kl_change_high:+.4f})"
    return markdown(
        "bits: | allocation | KL (nats): | against uniform, 95 %: | predicted: | top-1 flips: | perplexity: | "
        "K / V bits: | held, KB:",
        "{bits:g} | {allocation} | {kl_mean:.4f} | {change} | {predicted} | {flips} % | {perplexity:.2f} | "
        "{key_bits:.2f} / {value_bits:.2f} | {held}",
        frame,
        change=lambda row: "" if row["kl_change"] is None else change.format(**row),
        predicted=predicted,
        flips=_PERCENT,
        held=_scaled("held_bytes", 1e-3),
    )
