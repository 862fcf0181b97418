"""``bench`` and ``memory``: times and peak memory on this device, with exact and mlx-lm's own caches as baselines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxlab.cli.arguments import Commands, add_json, add_model, say
from veloxlab.cli.tables import bench_tables, left_out_lines, lengths_table
from veloxlab.store import check_place, write_atomically

if TYPE_CHECKING:
    import polars as pl

PARTS = ("attention", "methods", "encode", "decode", "read")


def add(commands: Commands) -> None:
    """Add the commands."""
    timing = commands.add_parser("bench", help="time attention, encoding and decoding on this device")
    add_json(timing)
    timing.add_argument("--tokens", type=int, nargs="+", help="context lengths (default: 4096 32768 131072)")
    timing.add_argument(
        "--only", nargs="+", choices=PARTS, help="measure only these parts; keep the other parts of FILE"
    )
    timing.set_defaults(run=time_kernels, passes_on="nothing")

    memory = commands.add_parser("memory", help="measure peak memory and time per token, by length of text")
    add_model(memory)
    memory.add_argument("--random", action="store_true", help="random weights in the model's shape")
    memory.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="text lengths")
    memory.add_argument("--layer-tokens", type=int, nargs="*", default=[], help="lengths for one layer of a 7B model")
    memory.add_argument("--quantized", type=int, nargs="*", default=[4, 8], help="bits of mlx-lm's own quantized cache")
    memory.add_argument(
        "--quantized-upto", type=int, default=16384, metavar="TOKENS", help="maximum length for mlx-lm's cache"
    )
    add_json(memory)
    memory.set_defaults(run=measure_lengths, passes_on="nothing")


def time_kernels(options: argparse.Namespace) -> int:
    """Time attention, encoding, decoding and reading; write the times and the device as JSON."""
    from veloxlab.codecs import METHODS
    from veloxlab.measure import bench
    from veloxlab.measure.bench import attention

    tokens = tuple(options.tokens or attention.TOKENS)
    parts: dict[str, Callable[[], Any]] = {
        "attention": lambda: bench.decode_attention(tokens=tokens),
        "methods": lambda: bench.attention_of_methods([name for name in METHODS if name != "none"]),
        "encode": bench.encode_steps,
        "decode": lambda: bench.decode_steps(tokens=tokens),
        "read": bench.read_prompts,
    }
    written: Path | None = options.json
    if written:
        check_place(written)
    kept = json.loads(written.read_text()) if options.only and written and written.exists() else {}
    for name in options.only or parts:
        rows = parts[name]()
        kept[name] = {"facts": bench.facts(), "rows": rows}
        if written:
            write_atomically(written, json.dumps(kept, indent=1).encode())
    if written and "attention" in kept:
        write_atomically(written.with_suffix(".png"), bench_picture(kept))
        write_atomically(written.with_suffix(".md"), f"{bench_tables(kept)}\n".encode())
    return 0


def bench_picture(results: dict[str, Any]) -> bytes:
    """Draw the times of attention of the first shape that ``veloxlab bench`` wrote, as a PNG."""
    import polars as pl

    from veloxlab.views import attention_times, picture

    times = pl.DataFrame(results["attention"]["rows"])
    first = times.row(0, named=True)
    shape = ("query_heads", "kv_heads", "head_dim")
    heading = "Attention of one token: {} query heads, {} KV heads, head dimension {}".format(
        *(first[n] for n in shape)
    )
    chart = attention_times(times.filter(*(pl.col(n) == first[n] for n in shape)), heading=heading)
    return picture.png(chart.to_dict())


def measure_lengths(options: argparse.Namespace) -> int:
    """Measure memory and time for each length, print the tables, and write them as JSON.

    An unfinished file holds the rows until all are measured.
    """
    import veloxlab as vl
    from veloxlab.measure import bench, lengths

    if options.json:
        check_place(options.json)
    results: dict[str, Any] = {"facts": bench.facts()}
    left_out: dict[str, Mapping[str, str]] = {}  # by model: why a cache has no row, or not all
    tables: list[str] = []
    written: Path | None = options.json
    unfinished = written and written.with_suffix(".unfinished.json")

    def keep(name: str, rows: pl.DataFrame, missing: Mapping[str, str]) -> None:
        results[name], left_out[name] = rows.to_dicts(), dict(missing)
        if unfinished:
            write_atomically(unfinished, json.dumps(results | {"left_out": left_out}, indent=1).encode())

    jobs = {options.model: options.tokens, "one layer of 7B": options.layer_tokens}
    for name, tokens in jobs.items():
        if not tokens:
            continue
        random = options.random or name != options.model
        model = lengths.random_model(name) if random else vl.load(name)[0]
        caches = lengths.makers(model, theirs=options.quantized)
        few = [n for n in tokens if n <= options.quantized_upto]
        frame = lengths.costs_by_length(
            model,
            caches,
            {cache: few if cache.startswith("mlx-lm") else tokens for cache in caches},
            progress=say,
            on_rows=partial(keep, name),
        )
        tables.append(f"{name}\n\n{lengths_table(frame)}{left_out_lines(left_out[name])}\n")
        print(tables[-1])
    if written and unfinished:
        unfinished.replace(written)
        write_atomically(written.with_suffix(".md"), "\n".join(tables).encode())
    return 0
