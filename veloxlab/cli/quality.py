"""``compare``, ``sweep`` and ``search``: measure the quality and the bytes of caches on text; write to a folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxlab.cli.tables import compared_table, front_table, left_out_lines, ratio_table, swept_table
from veloxlab.progress import say
from veloxlab.store import make_folder, write_atomically, write_parquet

if TYPE_CHECKING:
    import polars as pl


def compare_caches(model: str, out: Path, **text: Any) -> int:
    """Measure, print the tables, and write them as Parquet and Markdown beside a chart as PNG.

    An unfinished Parquet file holds the rows until all are measured.
    """
    import veloxlab as vl
    from veloxlab.measure.compare import byte_ratios, compare
    from veloxlab.views import frontier, picture

    stem = f"compare_{results_name(model)}"
    unfinished = make_folder(out) / f"{stem}.unfinished.parquet"
    missing: dict[str, str] = {}

    def keep(rows: pl.DataFrame, left_out: Mapping[str, str]) -> None:
        write_parquet(unfinished, rows)
        missing.update(left_out)

    frame = compare(*vl.load(model), **text, progress=say, on_rows=keep)
    ratios = byte_ratios()
    write_parquet(out / f"{stem}.parquet", frame)
    write_parquet(out / "byte_ratios.parquet", ratios)
    drawn = picture.png(frontier(frame, x="bits").to_dict(), width=2 * picture.WIDTH)
    write_atomically(out / f"{stem}.png", drawn)
    _tell(out / f"{stem}.md", f"{compared_table(frame)}{left_out_lines(missing)}\n\n{ratio_table(ratios)}")
    unfinished.unlink()
    return 0


def sweep_bits(model: str, out: Path, **settings: Any) -> int:
    """Measure, print the table, and write it as Parquet and Markdown; a stopped run continues."""
    import veloxlab as vl
    from veloxlab.allocate.sweep import sweep, swept

    stem = f"ratequant_{results_name(model)}"
    unfinished = make_folder(out) / f"{stem}.unfinished.json"
    frame = sweep(*vl.load(model), **settings, unfinished=unfinished, progress=say)
    write_parquet(out / f"{stem}.parquet", frame)
    _tell(out / f"{stem}.md", swept_table(swept(frame)))
    unfinished.unlink(missing_ok=True)
    return 0


def search_front(model: str, out: Path, workers: int, **settings: Any) -> int:
    """Search, print the Pareto front, and write it as Markdown and all candidates as Parquet."""
    import veloxlab as vl

    stem = make_folder(out) / f"search_{results_name(model)}"
    fresh = multiprocessing.get_context("spawn")  # MLX's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=fresh) if workers > 1 else nullcontext() as executor:
        result = vl.search(model, **settings, executor=executor, progress=say)
    result.save(f"{stem}.parquet")
    _tell(Path(f"{stem}.md"), front_table(result.front))
    return 0


def _tell(path: Path, table: str) -> None:
    """Print a table, and write it."""
    write_atomically(path, f"{table}\n".encode())
    print(table)


def results_name(model: str) -> str:
    """Return the name of a model's result files: its name, without the suffix ``.gguf``."""
    path = Path(model)
    return path.stem if path.suffix.lower() == ".gguf" else path.name
