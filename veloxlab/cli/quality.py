"""``compare``, ``sweep`` and ``search``: measure the quality and the bytes of caches on text; write to a folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from veloxlab.cli.arguments import Commands, add_model, add_out, add_text, say
from veloxlab.cli.tables import compared_table, front_table, left_out_lines, ratio_table, swept_table
from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically, write_parquet

if TYPE_CHECKING:
    import polars as pl


def add(commands: Commands) -> None:
    """Add the commands."""
    comparing = commands.add_parser("compare", help="measure quality, memory and time of all caches on WikiText-2")
    add_model(comparing)
    add_text(comparing, tokens=512, windows=3)
    add_out(comparing)
    comparing.set_defaults(run=compare_caches, passes_on="nothing")

    sweeping = commands.add_parser("sweep", help="compare uniform bits with RateQuant in equal bytes")
    add_model(sweeping)
    sweeping.add_argument("--bits", type=float, nargs="+", help="average code bits (default: 2 2.5 3 3.5 4)")
    sweeping.add_argument("--by", nargs="+", help="kinds of sensitivity (default: gradient key_norm)")
    add_text(sweeping, tokens=512, windows=8)
    sweeping.add_argument("--sequences", type=int, default=8, help="texts for sensitivities (default: %(default)s)")
    add_out(sweeping)
    sweeping.set_defaults(run=sweep_bits, passes_on="nothing")

    searching = commands.add_parser("search", help="search for the Pareto front of bytes and divergence")
    add_model(searching)
    searching.add_argument("--methods", nargs="+", help="method ids (default: all methods without calibration)")
    searching.add_argument(
        "--bits", type=int, nargs="+", default=[2, 3, 4], help="bits of keys and values (default: 2 3 4)"
    )
    searching.add_argument("--sinks", type=int, nargs="+", default=[0, 4], help="exact first tokens (default: 0 4)")
    searching.add_argument("--window", type=int, nargs="+", default=[0], help="exact newest tokens (default: 0)")
    searching.add_argument(
        "--protected", nargs="+", default=["none", "0"], help="exact layers, such as 0,-1 (default: none 0)"
    )
    searching.add_argument("--most-bytes", type=float, help="maximum bytes per token (default: no limit)")
    searching.add_argument("--most-kl", type=float, help="maximum KL divergence in nats (default: no limit)")
    add_text(searching, tokens=192, windows=8)
    searching.add_argument("--workers", type=int, default=1, help="number of processes (default: %(default)s)")
    add_out(searching)
    searching.set_defaults(run=search_front, passes_on="nothing")


def compare_caches(options: argparse.Namespace) -> int:
    """Measure, print the tables, and write them as Parquet and Markdown beside a chart as PNG.

    An unfinished Parquet file holds the rows until all are measured.
    """
    import veloxlab as vl
    from veloxlab.measure.compare import byte_ratios, compare
    from veloxlab.views import frontier, picture

    make_folder(options.out)
    stem = f"compare_{results_name(options.model)}"
    unfinished = options.out / f"{stem}.unfinished.parquet"
    missing: dict[str, str] = {}

    def keep(rows: pl.DataFrame, left_out: Mapping[str, str]) -> None:
        write_parquet(unfinished, rows)
        missing.update(left_out)

    model, tokenizer = vl.load(options.model)
    frame = compare(
        model,
        tokenizer,
        tokens=options.tokens,
        windows=options.windows,
        progress=say,
        on_rows=keep,
    )
    ratios = byte_ratios()
    write_parquet(options.out / f"{stem}.parquet", frame)
    write_parquet(options.out / "byte_ratios.parquet", ratios)
    drawn = picture.png(frontier(frame, x="bits").to_dict(), width=2 * picture.WIDTH)
    write_atomically(options.out / f"{stem}.png", drawn)
    tables = f"{compared_table(frame)}{left_out_lines(missing)}\n\n{ratio_table(ratios)}\n"
    write_atomically(options.out / f"{stem}.md", tables.encode())
    unfinished.unlink()
    print(tables, end="")
    return 0


def sweep_bits(options: argparse.Namespace) -> int:
    """Measure, print the table, and write it as Parquet and Markdown; a stopped run continues."""
    import veloxlab as vl
    from veloxlab.allocate.sweep import BITS, sweep, swept

    make_folder(options.out)
    model, tokenizer = vl.load(options.model)
    stem = f"ratequant_{results_name(options.model)}"
    unfinished = options.out / f"{stem}.unfinished.json"
    frame = sweep(
        model,
        tokenizer,
        bits=options.bits or BITS,
        by=options.by or ("gradient", "key_norm"),
        tokens=options.tokens,
        windows=options.windows,
        sequences=options.sequences,
        unfinished=unfinished,
        progress=say,
    )
    table = swept_table(swept(frame))
    write_parquet(options.out / f"{stem}.parquet", frame)
    write_atomically(options.out / f"{stem}.md", f"{table}\n".encode())
    unfinished.unlink(missing_ok=True)
    print(table)
    return 0


def search_front(options: argparse.Namespace) -> int:
    """Search, print the Pareto front, and write it as Markdown and all candidates as Parquet."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import ExitStack

    import veloxlab as vl

    try:
        protected = [() if word == "none" else tuple(map(int, word.split(","))) for word in options.protected]
    except ValueError:
        words = " ".join(options.protected)
        raise InputError(f"--protected {words} is not a list of layers: give numbers, as 0 or 0,-1, or none.") from None
    make_folder(options.out)
    with ExitStack() as stack:
        executor = None
        if options.workers > 1:
            fresh = multiprocessing.get_context("spawn")  # MLX's threads do not survive a fork
            executor = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=fresh))
        result = vl.search(
            options.model,
            methods=options.methods,
            bits=options.bits,
            sinks=options.sinks,
            window=options.window,
            protected=protected,
            most_bytes_per_token=options.most_bytes,
            most_kl=options.most_kl,
            tokens=options.tokens,
            windows=options.windows,
            executor=executor,
            progress=say,
        )
    table, stem = front_table(result.front), f"search_{results_name(options.model)}"
    result.save(options.out / f"{stem}.parquet")
    write_atomically(options.out / f"{stem}.md", f"{table}\n".encode())
    print(table)
    return 0


def results_name(model: str) -> str:
    """Return the name of a model's result files: its name, without the suffix ``.gguf``."""
    path = Path(model)
    return path.stem if path.suffix.lower() == ".gguf" else path.name
