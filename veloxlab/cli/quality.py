"""``compare``, ``sweep`` and ``search``: measure the quality and the bytes of caches on text; write to a folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from veloxlab.cli.tables import compared_table, front_table, left_out_lines, ratio_table, swept_table
from veloxlab.errors import InputError
from veloxlab.progress import say
from veloxlab.store import make_folder, write_atomically, write_parquet

if TYPE_CHECKING:
    import polars as pl


def compare_caches(options: argparse.Namespace) -> int:
    """Measure, print the tables, and write them as Parquet and Markdown beside a chart as PNG.

    An unfinished Parquet file holds the rows until all are measured.
    """
    import veloxlab as vl
    from veloxlab.measure.compare import byte_ratios, compare
    from veloxlab.views import frontier, picture

    place = _place(options, "compare")
    unfinished = _beside(place, "unfinished.parquet")
    missing: dict[str, str] = {}

    def keep(rows: pl.DataFrame, left_out: Mapping[str, str]) -> None:
        write_parquet(unfinished, rows)
        missing.update(left_out)

    text = {"tokens": options.tokens, "windows": options.windows}
    frame = compare(*vl.load(options.model), **text, progress=say, on_rows=keep)
    ratios = byte_ratios()
    _write(place, f"{compared_table(frame)}{left_out_lines(missing)}\n\n{ratio_table(ratios)}", frame)
    write_parquet(options.out / "byte_ratios.parquet", ratios)
    drawn = picture.png(frontier(frame, x="bits").to_dict(), width=2 * picture.WIDTH)
    write_atomically(_beside(place, "png"), drawn)
    unfinished.unlink()
    return 0


def sweep_bits(options: argparse.Namespace) -> int:
    """Measure, print the table, and write it as Parquet and Markdown; a stopped run continues."""
    import veloxlab as vl
    from veloxlab.allocate.sweep import BITS, sweep, swept

    place = _place(options, "ratequant")
    unfinished = _beside(place, "unfinished.json")
    frame = sweep(
        *vl.load(options.model),
        bits=options.bits or BITS,
        by=options.by,
        tokens=options.tokens,
        windows=options.windows,
        sequences=options.sequences,
        unfinished=unfinished,
        progress=say,
    )
    _write(place, swept_table(swept(frame)), frame)
    unfinished.unlink(missing_ok=True)
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
    place = _place(options, "search")
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
    result.save(_beside(place, "parquet"))
    _write(place, front_table(result.front))
    return 0


def _place(options: argparse.Namespace, kind: str) -> Path:
    """Where the results of a command go, without a suffix; its folder is made."""
    return make_folder(options.out) / f"{kind}_{results_name(options.model)}"


def _beside(place: Path, suffix: str) -> Path:
    return place.with_name(f"{place.name}.{suffix}")  # not `with_suffix`: names of models have dots


def _write(place: Path, table: str, frame: pl.DataFrame | None = None) -> None:
    """Print a table, and write it as Markdown, and its frame as Parquet."""
    if frame is not None:
        write_parquet(_beside(place, "parquet"), frame)
    write_atomically(_beside(place, "md"), f"{table}\n".encode())
    print(table)


def results_name(model: str) -> str:
    """Return the name of a model's result files: its name, without the suffix ``.gguf``."""
    path = Path(model)
    return path.stem if path.suffix.lower() == ".gguf" else path.name
