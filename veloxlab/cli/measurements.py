"""The commands that measure quality and bytes of caches on text; `veloxlab.cli.times` measures the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxlab.cli import tables
from veloxlab.errors import InputError
from veloxlab.progress import say
from veloxlab.store import make_folder, reading, write_atomically, write_parquet

if TYPE_CHECKING:
    import polars as pl


def advise_cache(model: str, **given: Any) -> None:
    """Print the recommended cache, and all candidates."""
    import veloxlab as vl
    from veloxlab.models.shapes import taken_as

    advice = vl.advise(model, **given)
    print("\n".join(filter(None, [taken_as(model), repr(advice)])))


def ask_tasks(
    model: str,
    method: str | None,
    plan: Path | None,
    calibration: Sequence[Path],
    tasks: Sequence[str],
    own: Path | None,
    questions: int,
    context: int,
    **settings: Any,
) -> None:
    """Print how many questions of each task get the right answer with the exact cache and with a compressed one."""
    import veloxlab as vl
    from veloxlab.cache.plan import plan_of
    from veloxlab.serve.commands import Wanted

    given = {name: value for name, value in settings.items() if value is not None}
    wanted = Wanted(plan_of(plan) or method, given, [*map(vl.Calibration.load, calibration)])
    every: list[str | vl.measure.Task] = [*tasks]
    if own is not None:
        with reading("list of questions", own, "give a file of JSON lines"):
            lines = own.read_text("utf-8")
        every.append(vl.measure.Task.of_lines(lines))
    loaded, tokenizer = vl.load(model)
    make = wanted.maker(loaded, tokenizer, say)
    asked: dict[str, Any] = {"tasks": every, "questions": questions, "context": context, "progress": say}
    print(tables.tasks_table(vl.evaluate(loaded, tokenizer, lambda _: make(), **asked)))


def compare_caches(
    model: str,
    out: Path,
    sinks: int = 0,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    peers: bool = False,
    times: bool = False,
    **text: Any,
) -> None:
    """Measure, print the tables, and write them as Parquet (unfinished at first), as Markdown and as a chart.

    With ``sinks`` there are no times and no tables. With ``peers`` other projects' caches are measured. With ``times``
    only the times of an earlier comparison are measured again; the machine must be idle. ``methods`` selects ours.
    Files of a ``seed`` other than 0 have their own names.
    """
    if seed and (peers or times):
        raise InputError(f"With --peers or --times nothing has a seed: leave out --seed {seed}.")
    if methods and (peers or times):
        raise InputError("--methods has no effect with --peers or --times: leave it out.")
    if times:
        _time_again(model, out, text["tokens"])
        return
    if peers:
        if sinks:
            raise InputError(f"Caches of other projects keep no sinks: leave out --sinks {sinks}.")
        _compare_peers(model, out, **text)
        return
    import veloxlab as vl
    from veloxlab.measure.compare import byte_ratios, compare
    from veloxlab.views import frontier, picture

    stem = make_folder(out) / f"compare_{results_name(model)}{f'_{sinks}_sinks' if sinks else ''}"
    stem = Path(f"{stem}{f'_seed_{seed}' if seed else ''}")
    unfinished = Path(f"{stem}.unfinished.parquet")
    missing: dict[str, str] = {}

    def keep(rows: pl.DataFrame, left_out: Mapping[str, str]) -> None:
        write_parquet(unfinished, rows)
        missing.update(left_out)

    frame = compare(*vl.load(model), methods=methods, sinks=sinks, seed=seed, **text, progress=say, on_rows=keep)
    write_parquet(Path(f"{stem}.parquet"), frame)
    write_atomically(Path(f"{stem}.png"), picture.png(frontier(frame).to_dict(), width=2 * picture.WIDTH))
    if not sinks:
        ratios = byte_ratios()
        write_parquet(out / "byte_ratios.parquet", ratios)
        _tell(stem, f"{tables.compared_table(frame)}{tables.left_out_lines(missing)}\n\n{tables.ratio_table(ratios)}")
    unfinished.unlink()


def _time_again(model: str, out: Path, tokens: int) -> None:
    """Measure the times of an earlier comparison again, and write them into its files."""
    import polars as pl

    import veloxlab as vl
    from veloxlab.measure.compare import timed_again

    stem = out / f"compare_{results_name(model)}"
    rows, page = Path(f"{stem}.parquet"), Path(f"{stem}.md")
    with reading("comparison", rows, "run `veloxlab compare` without --times first"):
        before, text = pl.read_parquet(rows), page.read_text()
    after = timed_again(before, *vl.load(model), tokens=tokens, progress=say)
    write_parquet(rows, after)
    _tell(stem, text.replace(tables.compared_table(before), tables.compared_table(after)).rstrip())


def _compare_peers(model: str, out: Path, **text: Any) -> None:
    """Measure other projects' caches; the table and the chart also show `compare_caches` of the same folder."""
    import veloxlab as vl
    from veloxlab.measure.peers import compare_peers

    stem = make_folder(out) / f"compare_{results_name(model)}_peers"
    frame, left_out = compare_peers(*vl.load(model), **text, progress=say)
    if frame.is_empty():
        raise InputError(f"No other project's cache could be measured; {' '.join(left_out.values())}")
    write_parquet(Path(f"{stem}.parquet"), frame)
    tell_peers(stem, frame, left_out)


def tell_peers(stem: Path, frame: pl.DataFrame, left_out: Mapping[str, str]) -> None:
    """Print and write the table and the chart of other projects' caches, with ours of the same folder."""
    import polars as pl

    from veloxlab.codecs import METHODS
    from veloxlab.measure.peers import beside
    from veloxlab.views import frontier, picture

    shown = pl.concat([frame, _compared_before(Path(str(stem).removesuffix("_peers")))])
    ours = pl.col("name").str.split(" ").list.first().is_in(METHODS.keys())
    table = tables.beside_table(beside(shown.filter(~ours), shown.filter(ours)))
    _tell(stem, f"{tables.peers_table(frame)}{tables.left_out_lines(left_out)}\n\n{table}")
    chart = frontier(shown, x="held_bytes")
    write_atomically(Path(f"{stem}.png"), picture.png(chart.to_dict(), width=2 * picture.WIDTH))


def _compared_before(stem: Path) -> pl.DataFrame:
    """Rows that `compare_caches` wrote; for each method those with the usual sinks, if there are any."""
    import polars as pl

    from veloxlab.cache.plan import DEFAULT_SINKS
    from veloxlab.measure.quality import FIDELITY

    with_sinks, without = (
        pl.read_parquet(path).select(*FIDELITY) if path.exists() else pl.DataFrame(schema=FIDELITY)
        for path in (Path(f"{stem}_{DEFAULT_SINKS}_sinks.parquet"), Path(f"{stem}.parquet"))
    )
    method = pl.col("name").str.split(" ").list.first()
    with_sinks = with_sinks.filter(method != "mlx-lm")  # which keeps no sinks
    again = method.is_in(with_sinks.select(method).to_series().to_list())
    return pl.concat([with_sinks.with_columns(pl.col("name") + f", {DEFAULT_SINKS} sinks"), without.filter(~again)])


def sweep_bits(model: str, out: Path, **settings: Any) -> None:
    """Measure, print the table, and write it as Parquet and Markdown; a stopped run continues."""
    import veloxlab as vl
    from veloxlab.allocate.sweep import sweep, swept

    stem = make_folder(out) / f"ratequant_{results_name(model)}"
    unfinished = Path(f"{stem}.unfinished.json")
    frame = sweep(*vl.load(model), **settings, unfinished=unfinished, progress=say)
    write_parquet(Path(f"{stem}.parquet"), frame)
    _tell(stem, tables.swept_table(swept(frame)))
    unfinished.unlink(missing_ok=True)


def search_front(model: str, out: Path, workers: int, **settings: Any) -> None:
    """Search, print the Pareto front, and write it as Markdown and all candidates as Parquet."""
    import veloxlab as vl

    stem = make_folder(out) / f"search_{results_name(model)}"
    fresh = multiprocessing.get_context("spawn")  # MLX's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=fresh) if workers > 1 else nullcontext() as executor:
        result = vl.search(model, **settings, executor=executor, progress=say)
    result.save(f"{stem}.parquet")
    _tell(stem, tables.front_table(result.front))


def _tell(stem: Path, table: str) -> None:
    write_atomically(Path(f"{stem}.md"), f"{table}\n".encode())
    print(table)


def results_name(model: str) -> str:
    """Return the name of a model's result files: its name, without the suffix ``.gguf``."""
    path = Path(model)
    return path.stem if path.suffix.lower() == ".gguf" else path.name
