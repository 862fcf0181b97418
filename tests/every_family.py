"""Every family of models in mlx-lm on a compressed cache, checked with a small model of its own classes.

``uv run python -m tests.every_family`` writes the table to ``data/results``. A process measures several families,
because its start takes longer than a measurement. If a family ends its process, or takes too long, its row reports
that, and a new process measures the next ones. Each has a file in the folder of ``--into``, so that a run can continue.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl

from veloxlab.progress import in_words
from veloxlab.store import write_atomically

RESULTS = Path(__file__).parents[1] / "data" / "results"
SECONDS, CPU_SECONDS = 3600, 120  # for a family: about two CPU seconds are usual, and much more on a busy machine
TOGETHER, IN_ROW = 2, 12  # processes at a time, and families for each
SCHEMA: dict[str, Any] = {
    "family": pl.String,
    "path": pl.String,  # of its caches, in order, with equal neighbours merged
    "reasons": pl.String,
    "reads": pl.String,  # result of `reads`
    "own_keys": pl.Int64,  # caches of keys and values that are not replaced
    "exact_error": pl.Float64,  # largest difference from the model's own cache, with method "none"
    "chunked_error": pl.Float64,  # the same of a prompt in pieces, and drafts of several tokens
    "codes_error": pl.Float64,  # largest difference between reading 8-bit codes and decoding them
    "eight_bit_error": pl.Float64,  # root-mean-square difference from the model's own cache, everything at 8 bits
    "four_bit_error": pl.Float64,
    "batch": pl.String,  # "yes", or the error, after "mlx-lm: " if its own cache raises too
    "trim": pl.String,
    "saved": pl.String,
    "rope": pl.String,  # for each cache, as `path`
    "rope_error": pl.Float64,  # relative difference of keys at two positions after the inverse rotation
    "queries": pl.String,
    "lab": pl.String,
    "raised": pl.String,  # error of mlx-lm itself
    "faults": pl.String,  # errors of veloxlab
}


FINE = ("yes", "mlx-lm: ", "no keys")
# errors, in the unit of each: rounding of float32; a step of 8 bits, if that moves a key to another code
BOUNDS = {"exact_error": 1e-3, "chunked_error": 1e-3, "codes_error": 0.1, "eight_bit_error": 0.3, "rope_error": 1e-4}
Row = dict[str, Any]


def models_folder() -> Path:
    """Return mlx-lm's folder with a file for each family."""
    (folder,) = find_spec("mlx_lm.models").submodule_search_locations
    return Path(folder)


def families() -> list[str]:
    """Return the names of all files of mlx-lm with a class ``Model``; other files are shared code."""
    has = re.compile(r"^class Model\(|^from \.\w+ import Model\b(?! as)", re.MULTILINE)
    return [file.stem for file in sorted(models_folder().glob("*.py")) if has.search(file.read_text())]


# in a separate process --------------------------------------------------------------------------------------------


def measured(family: str, folder: Path) -> None:
    """Write a family's row to ``folder``; until it is complete, the file names the current check."""
    row: Row = {"family": family, "doing": "own"}

    def keep() -> None:
        write_atomically(folder / f"{family}.json", json.dumps(row).encode())

    keep()
    signal.alarm(SECONDS)  # both end the process
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    printed = io.StringIO()
    try:
        from tests.families import CHECKS, Subject

        with redirect_stdout(printed):
            subject = Subject(family)
        assert subject.whole.std() > 0 < subject.chunked.std()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a family fails in its own way
        row["raised"] = (
            in_words(error) if isinstance(error, Exception) else f"it ends Python: {printed.getvalue().strip()}"
        )
        CHECKS = ()
    faults = []
    for check in CHECKS:
        row["doing"] = check.__name__
        keep()
        try:
            row |= check(subject)
        except Exception as error:  # noqa: BLE001
            faults.append(f"{check.__name__}: {in_words(error)}")
            row["faults"] = "; ".join(faults)
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    del row["doing"]
    keep()
    print(f"{family}: {row.get('raised') or row.get('faults') or row['path']}", flush=True)


# all of them ----------------------------------------------------------------------------------------------------------


def measure_all(names: list[str], folder: Path) -> None:
    """Measure the families without a complete row in ``folder``."""
    waiting = unmeasured(names, folder)
    groups = [waiting[first : first + IN_ROW] for first in range(0, len(waiting), IN_ROW)]
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(lambda group: _apart(group, folder), groups))


def _apart(group: list[str], folder: Path) -> None:
    """Measure families in a separate process, and in another one those after a family that ends it."""
    while left := unmeasured(group, folder):
        command = [sys.executable, "-m", "tests.every_family", "--here", *left, "--into", str(folder)]
        ended = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        for family in unmeasured(left, folder)[:1]:
            row = row_in(folder, family)
            doing = row.pop("doing")
            late = ended in (-signal.SIGALRM, -signal.SIGPROF)
            how = (
                "it takes too long"
                if late
                else f"it ends the process ({signal.Signals(-ended).name if ended < 0 else ended})"
            )
            row |= {"raised": how} if doing == "own" else {"faults": f"{doing}: {how}"}
            write_atomically(folder / f"{family}.json", json.dumps(row).encode())
            print(f"{family}: {how}", flush=True)


def row_in(folder: Path, family: str) -> Row:
    """Return the row of a family in ``folder``, which may be incomplete."""
    file = folder / f"{family}.json"
    row: Row = json.loads(file.read_text()) if file.exists() else {"family": family, "doing": "own"}
    return row


def unmeasured(names: list[str], folder: Path) -> list[str]:
    """Return the families without a complete row in ``folder``."""
    return [name for name in names if "doing" in row_in(folder, name)]


def wrong(row: Row) -> list[str]:
    """Return the faults in a family's row that are not mlx-lm's; none for a family that mlx-lm itself cannot run."""
    if row["raised"]:
        return []
    found = [row["faults"]] if row["faults"] else []
    found += [f"{name} {row[name]:.1e}" for name, most in BOUNDS.items() if not (row[name] or 0.0) <= most]
    texts = {name: row[name] or "" for name in ("batch", "trim", "saved", "lab")}
    return found + [f"{name}: {said}" for name, said in texts.items() if not said.startswith(FINE)]


def reads(row: Row) -> str:
    """Return in a word or two how attention reads the family's caches."""
    if row["raised"]:
        return "not run by mlx-lm"
    paths = {path.rpartition(" ")[2] for path in (row["path"] or "").split(", ")}
    compressed = paths & {"codes", "latents"}
    if not compressed:
        return "arrays" if "arrays" in paths else "own" if row["own_keys"] else "states"
    return "some codes" if "arrays" in paths or row["own_keys"] else "codes"


def counts(frame: pl.DataFrame) -> dict[str, int]:
    """Return the number of families of each kind of `reads`."""
    kinds = frame["reads"].to_list()
    return {kind: kinds.count(kind) for kind in ("codes", "some codes", "arrays", "own", "states", "not run by mlx-lm")}


def page(frame: pl.DataFrame) -> str:
    """Return the table with its counts above."""
    said = ", ".join(f"{kind} {count}" for kind, count in counts(frame).items() if count)
    return f"{frame.height} of {len(families())} families: {said}.\n\n{table(frame)}\n"


def table(frame: pl.DataFrame) -> str:
    """Return the rows as Markdown."""
    heads = ["family", "paths of its caches", "`none`", "in pieces", "codes", "8 bit", "4 bit"]
    heads += ["batch", "trim", "file", "rope", "turned back", "queries", "lab", "why"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}{'---:|' * 5}{'---|' * 4}---:|{'---|' * 3}"]
    for row in frame.iter_rows(named=True):
        cells = [row["family"], row["path"]]
        cells += [_number(row[name], ".0e") for name in ("exact_error", "chunked_error", "codes_error")]
        cells += [_number(row[name], ".3f") for name in ("eight_bit_error", "four_bit_error")]
        cells += [row[name] for name in ("batch", "trim", "saved", "rope")]
        cells += [_number(row["rope_error"], ".0e"), row["queries"], row["lab"]]
        cells += [
            "; ".join(x for x in (row["raised"] and f"mlx-lm: {row['raised']}", row["faults"], row["reasons"]) if x)
        ]
        lines.append(f"| {' | '.join('' if cell is None else cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: list[str] | None = None) -> None:
    """Measure all families, or those named, and write them down."""
    parser = argparse.ArgumentParser(prog="tests.every_family", description=__doc__)
    parser.add_argument("families", nargs="*", help="all, if none is named: only then are the results written")
    parser.add_argument("--into", type=Path, help="folder of a file for each family; one that is there is kept")
    parser.add_argument("--so-far", action="store_true", help="write down what the folder has, and measure nothing")
    parser.add_argument("--here", action="store_true", help="measure the families in this process, and no more")
    given = parser.parse_args(arguments)
    if given.here:
        for name in given.families:
            measured(name, given.into)
        return
    folder = given.into or Path(tempfile.mkdtemp(prefix="every_family-"))
    print(f"Rows are kept in {folder}: if this is stopped, --into {folder} goes on.")
    folder.mkdir(parents=True, exist_ok=True)
    names = given.families or families()
    if not given.so_far:
        measure_all(names, folder)
    missing = set(unmeasured(names, folder))
    rows = pl.DataFrame([row_in(folder, name) for name in names if name not in missing], schema=SCHEMA)
    frame = rows.with_columns(reads=pl.Series([reads(row) for row in rows.iter_rows(named=True)]))
    if not given.families:
        frame.write_parquet(RESULTS / "families.parquet")
        write_atomically(RESULTS / "families.md", page(frame).encode())
    print(page(frame))


if __name__ == "__main__":
    main()
