"""``bench`` and ``memory``: times and peak memory on this device, with exact and mlx-lm's own caches as baselines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxlab.cli.tables import SHAPE, bench_tables, left_out_lines, lengths_table
from veloxlab.progress import say
from veloxlab.store import check_place, write_atomically

if TYPE_CHECKING:
    import polars as pl

PARTS = ("attention", "methods", "encode", "decode", "read")


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
    written = _checked_place(options)
    kept = json.loads(written.read_text()) if options.only and written and written.exists() else {}
    for name in options.only or parts:
        kept[name] = {"facts": bench.facts(), "rows": parts[name]()}
        if written:
            _write_json(written, kept)
    if written and "attention" in kept:
        write_atomically(written.with_suffix(".png"), bench_picture(kept))
        write_atomically(written.with_suffix(".md"), f"{bench_tables(kept)}\n".encode())
    return 0


def bench_picture(results: dict[str, Any]) -> bytes:
    """Draw the times of attention of the first shape that ``veloxlab bench`` wrote, as a PNG."""
    import polars as pl

    from veloxlab.views import attention_times, picture

    shape, times = next(iter(pl.DataFrame(results["attention"]["rows"]).group_by(*SHAPE, maintain_order=True)))
    heading = "Attention of one token: {} query heads, {} KV heads, head dimension {}".format(*shape)
    return picture.png(attention_times(times, heading=heading).to_dict())


def measure_lengths(options: argparse.Namespace) -> int:
    """Measure memory and time for each length, print the tables, and write them as JSON.

    An unfinished file holds the rows until all are measured.
    """
    import veloxlab as vl
    from veloxlab.measure import bench, lengths

    written = _checked_place(options)
    unfinished = written and written.with_suffix(".unfinished.json")
    results: dict[str, Any] = {"facts": bench.facts()}
    left_out: dict[str, Mapping[str, str]] = {}  # by model: why a cache has no row, or not all
    tables: list[str] = []

    def keep(name: str, rows: pl.DataFrame, missing: Mapping[str, str]) -> None:
        results[name], left_out[name] = rows.to_dicts(), dict(missing)
        if unfinished:
            _write_json(unfinished, results | {"left_out": left_out})

    jobs = {options.model: options.tokens, "one layer of 7B": options.layer_tokens}
    for name, tokens in jobs.items():
        if not tokens:
            continue
        random = options.random or name != options.model
        model = lengths.random_model(name) if random else vl.load(name)[0]
        caches = lengths.makers(model, theirs=options.quantized)
        few = [n for n in tokens if n <= options.quantized_upto]
        lengths_of = {cache: few if cache.startswith("mlx-lm") else tokens for cache in caches}
        frame = lengths.costs_by_length(model, caches, lengths_of, progress=say, on_rows=partial(keep, name))
        tables.append(f"{name}\n\n{lengths_table(frame)}{left_out_lines(left_out[name])}\n")
        print(tables[-1])
    if written and unfinished:
        unfinished.replace(written)
        write_atomically(written.with_suffix(".md"), "\n".join(tables).encode())
    return 0


def _checked_place(options: argparse.Namespace) -> Path | None:
    """The file for the results, if one was named; it can be written."""
    if options.json is not None:
        check_place(options.json)
    place: Path | None = options.json
    return place


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1).encode())
