"""Every family of models that mlx-lm knows, on a compressed cache: a small model of its own classes, checked.

``uv run python -m tests.every_family`` writes the table to ``data/results``. Each family has a process of its own, which
ends after a time, and a file in the folder of ``--into``: a run that was stopped goes on with those that have none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl

from veloxlab.progress import in_words
from veloxlab.store import write_atomically

RESULTS = Path(__file__).parents[1] / "data" / "results"
SECONDS = 600  # for a family, of which one takes some ten
TOGETHER = 2
TEXTS = ("family", "path", "reasons", "batch", "trim", "saved", "rope", "queries", "lab", "raised", "faults")
NUMBERS = ("exact_error", "chunked_error", "codes_error", "eight_bit_error", "four_bit_error", "rope_error")
SCHEMA: dict[str, Any] = {
    "family": pl.String,
    "path": pl.String,  # of its caches, in order, with equal neighbours said once
    "reasons": pl.String,
    "own_keys": pl.Int64,  # caches of keys and values that stay the model's own
    "exact_error": pl.Float64,  # largest difference from the model's own cache, with method "none"
    "chunked_error": pl.Float64,  # the same of a prompt in pieces, and drafts of several tokens
    "codes_error": pl.Float64,  # largest difference between reading 8-bit codes and decoding them
    "eight_bit_error": pl.Float64,  # root-mean-square difference from the model's own cache, everything at 8 bits
    "four_bit_error": pl.Float64,
    "batch": pl.String,  # "yes", or what was raised, after "mlx-lm: " if its own cache raises too
    "trim": pl.String,
    "saved": pl.String,
    "rope": pl.String,  # for each cache, as `path`
    "rope_error": pl.Float64,  # of keys at two positions that are turned back, as a share of them
    "queries": pl.String,
    "lab": pl.String,
    "raised": pl.String,  # what mlx-lm itself raises
    "faults": pl.String,  # what veloxlab raised
}


def models_folder() -> Path:
    """Where mlx-lm keeps a file for each family."""
    (folder,) = find_spec("mlx_lm.models").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(folder)


def families() -> list[str]:
    """Names of all files of mlx-lm that have a class ``Model``; the others are code that these share."""
    files = sorted(models_folder().glob("*.py"))
    return [file.stem for file in files if any(text in file.read_text() for text in ("class Model(", " import Model\n"))]


# in a process of its own ----------------------------------------------------------------------------------------------


def measured(family: str, file: Path) -> None:
    """Write a family's row to ``file``, again after each check: what ends the process is known by it."""
    row: dict[str, Any] = {"family": family, "doing": "own"}

    def keep() -> None:
        write_atomically(file, json.dumps(row).encode())

    keep()
    try:
        from tests.families import CHECKS, Subject

        subject = Subject(family)
        assert subject.whole.std() > 0 < subject.chunked.std()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a family fails in its own way
        row["raised"] = in_words(error) if isinstance(error, Exception) else f"it ends Python: {error}"
        del row["doing"]
        return keep()
    faults = []
    for check in CHECKS:
        row["doing"] = check.__name__
        keep()
        try:
            row |= check(subject)
        except Exception as error:  # noqa: BLE001
            faults.append(f"{check.__name__}: {in_words(error)}")
            row["faults"] = "; ".join(faults)
    del row["doing"]
    return keep()


# all of them ----------------------------------------------------------------------------------------------------------


def measure_all(names: list[str], folder: Path) -> None:
    """Measure the families that have no row in ``folder``, some at once."""
    waiting = [name for name in names if not (folder / f"{name}.json").exists()]
    with ThreadPoolExecutor(TOGETHER) as pool:
        for done, said in enumerate(pool.map(lambda name: _apart(name, folder), waiting), 1):
            print(f"{done}/{len(waiting)} {said}", flush=True)


def _apart(family: str, folder: Path) -> str:
    """Measure a family in a process of its own, and say in a line how that went."""
    part, file = folder / f"{family}.part", folder / f"{family}.json"
    command = [sys.executable, "-m", "tests.every_family", "--one", family, "--into", str(part)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        ended = None
    row = json.loads(part.read_text()) if part.exists() else {"family": family, "doing": "own"}
    if doing := row.pop("doing", None):
        how = f"not done in {SECONDS} seconds" if ended is None else f"it ends the process ({ended})"
        row |= {"raised": how} if doing == "own" else {"faults": f"{doing}: {how}"}
    part.unlink(missing_ok=True)
    write_atomically(file, json.dumps(row).encode())
    return f"{family}: {row.get('raised') or row.get('faults') or row['path']}"


def table(frame: pl.DataFrame) -> str:
    """Markdown of the rows."""
    heads = ["family", "paths of its caches", "`none`", "in pieces", "codes", "8 bit", "4 bit"]
    heads += ["batch", "trim", "file", "rope", "turned back", "queries", "lab", "why"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}{'---:|' * 5}{'---|' * 4}---:|{'---|' * 3}"]
    for row in frame.iter_rows(named=True):
        cells = [row["family"], row["path"]]
        cells += [_number(row[name], ".0e") for name in ("exact_error", "chunked_error", "codes_error")]
        cells += [_number(row[name], ".3f") for name in ("eight_bit_error", "four_bit_error")]
        cells += [row[name] for name in ("batch", "trim", "saved", "rope")]
        cells += [_number(row["rope_error"], ".0e"), row["queries"], row["lab"]]
        cells += ["; ".join(x for x in (row["raised"] and f"mlx-lm: {row['raised']}", row["faults"], row["reasons"]) if x)]
        lines.append(f"| {' | '.join('' if cell is None else cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: list[str] | None = None) -> None:
    """Measure all families, or those named, and write them down."""
    parser = argparse.ArgumentParser(prog="tests.every_family", description=__doc__)
    parser.add_argument("families", nargs="*", help="all, if none is named: only then are the results written")
    parser.add_argument("--into", type=Path, help="folder of a file for each family; one that is there is kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        return measured(given.one, given.into)
    folder = given.into or Path(tempfile.gettempdir()) / f"every_family-{version('mlx-lm')}"
    folder.mkdir(parents=True, exist_ok=True)
    names = given.families or families()
    measure_all(names, folder)
    rows = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    frame = pl.DataFrame(rows, schema=SCHEMA)
    if not given.families:
        frame.write_parquet(RESULTS / "families.parquet")
        write_atomically(RESULTS / "families.md", (table(frame) + "\n").encode())
    print(table(frame))


if __name__ == "__main__":
    main()
