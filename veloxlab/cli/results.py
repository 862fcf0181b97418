"""``veloxlab results``: the sources of all figures in the README and the notebooks, and the commands that measure them.

``data/results/index.toml`` says which command writes which file, and which sentences quote a file. A figure is a number
with a decimal point, or with a unit. The figures in a notebook's outputs come from its execution.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veloxlab import runtime
from veloxlab.errors import InputError
from veloxlab.store import Unfinished, kept_in
from veloxlab.texts import shipped_folder

INDEX = "index.toml"
UNFINISHED = "veloxlab unfinished results 1"
UNITS = "%|×|times|nats|seconds|µs|ms|KB|MB|GB|dB"
FIGURE = re.compile(rf"(?<![\w.,/-])(?:\d[\d,]*\.\d+|\d[\d,]*(?=\s?(?:{UNITS})))(?![\w.]*\d)")
_ARXIV = re.compile(r"\d{4}\.\d{5}")
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]*>|(?m:^    [^\n]*)", re.DOTALL)
_GENERATED = "18_reference.ipynb"  # by ``python -m tests.reference``
_WORDS = ("text/plain", "text/html", "text/markdown")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A number in a document, and its source: a file or a reason, and a command; both empty if unknown."""

    document: str
    number: str
    around: str
    source: str = ""
    command: str = ""


@dataclass(frozen=True)
class Index:
    """The content of `INDEX`, for the files in ``root / "data" / "results"``."""

    root: Path
    result: Sequence[Row] = ()
    figure: Sequence[Row] = ()
    known: Sequence[Row] = ()
    commands: dict[str, str] = field(default_factory=dict)  # by file

    @classmethod
    def read(cls, root: Path | None = None) -> Index:
        """Read the index of a clone; raises `InputError` if there is none."""
        root = root or shipped_folder("data").parent
        path = root / "data" / "results" / INDEX
        if not path.is_file() or not (root / "README.md").is_file():
            raise InputError(f"There is no README.md and {INDEX} in {root}: run this in a clone of the repository.")
        said = tomllib.loads(path.read_text())
        return cls(
            root,
            **said,
            commands={file: one.get("command", "by hand") for one in said["result"] for file in one["files"]},
        )

    @property
    def folder(self) -> Path:
        """The folder of results."""
        return self.root / "data" / "results"

    def documents(self) -> list[Path]:
        """The README, and the notebooks that people write."""
        notebooks = sorted((self.root / "notebooks").glob("*.ipynb"))
        return [self.root / "README.md", *(path for path in notebooks if path.name != _GENERATED)]


def show_results(check: bool, costs: bool, every: Sequence[str] | None) -> int:
    """Print the source of each figure, or run all commands; returns 1 if a figure has no source or a command fails.

    ``every``: the files whose commands run; an empty list for all; None for none. With ``costs`` print the commands and
    their CPU time.
    """
    if check + costs + (every is not None) != 1:
        raise InputError("Say what to do: give one of --check, --costs and --all.")
    index = Index.read()
    if every is not None:
        return _run_all(index, every)
    return _print_costs(index) if costs else _print_checked(index)


def _print_costs(index: Index) -> int:
    for one in index.result:
        cost = f"{one['cpu_minutes']:g}" if "cpu_minutes" in one else "?"
        needs = f" (needs {one['needs']})" if "needs" in one else ""
        if "command" in one:
            print(f"{cost:>5}  {one['command']}{needs}")
    known = sum(one.get("cpu_minutes", 0) for one in index.result)
    print(f"{known:>5g}  CPU minutes in all, without the commands with ?, which were not timed", file=sys.stderr)
    return 0


def _print_checked(index: Index) -> int:
    found = [figure for path in index.documents() for figure in figures(index, path)]
    for figure in found:
        print(f"{figure.document}: {figure.number} <- {figure.source or 'NOTHING'} <- {figure.command or 'no command'}")
    wrong = [*problems(index)]
    wrong += [f"{f.document}: {f.number} has no source (…{f.around}…)" for f in found if not f.source]
    for problem in wrong:
        print(problem, file=sys.stderr)
    print(f"{len(found)} figures, {len(wrong)} problems", file=sys.stderr)
    return int(bool(wrong))


def problems(index: Index) -> Iterator[str]:
    """Problems of the index itself: missing files and sentences, and files that it does not name."""
    there = {path.name for path in index.folder.iterdir() if path.name != INDEX}
    yield from (f"{name}: no command in {INDEX} writes it" for name in sorted(there - index.commands.keys()))
    yield from (f"{name}: {INDEX} names it, but it is missing" for name in sorted(index.commands.keys() - there))
    for entry in (*index.figure, *index.known):
        text = plain(_prose(index.root / entry["document"])[0])
        for words in _said(index, entry):
            if words not in text:
                yield f"{entry['document']}: it does not have the words {words!r} of {INDEX}"


def figures(index: Index, path: Path) -> Iterator[Figure]:
    """All figures of a document, in their order."""
    name, (prose, outputs) = path.relative_to(index.root).as_posix(), _prose(path)
    rows = _table_rows(index)
    shown = {row: rows[row] for row in prose.splitlines() if row in rows}
    for row, file in shown.items():
        yield from (Figure(name, number, row, file, index.commands[file]) for number in numbers(row))
        prose = prose.replace(row, "")
    text = plain(prose)
    sources = [_places(index, text, entry) for entry in (*index.figure, *index.known) if entry["document"] == name]
    execute = f"python -m tests.execute_notebooks {name}"
    for match in FIGURE.finditer(_ARXIV.sub(lambda found: " " * len(found[0]), text)):
        around = text[max(0, match.start() - 40) : match.end() + 20]
        at = next((said for places, *said in sources if any(match.start() in place for place in places)), None)
        if at is None and any(same_number(match[0], number) for number in outputs):
            at = ["its code and outputs", execute]
        yield Figure(name, match[0], around, *(at or ()))


def numbers(text: str) -> list[str]:
    """The figures of a text."""
    return FIGURE.findall(text)


def plain(text: str) -> str:
    """A text without code, addresses and line ends."""
    return " ".join(_CODE.sub(" ", text).split())


def same_number(said: str, number: str) -> bool:
    """Whether the number ``said`` in a text is a rounded ``number`` of an output."""
    decimals = len(said.partition(".")[2])
    value = float(said.replace(",", ""))
    return said == number or (decimals > 0 and len(number) > len(said) and round(float(number), decimals) == value)


def _prose(path: Path) -> tuple[str, set[str]]:
    """The prose of a document, and the numbers in its code and outputs."""
    if path.suffix != ".ipynb":
        return path.read_text(), set()
    written, made = [], []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            written.append(source)
            continue
        made.append(source)
        for output in cell["outputs"]:
            data = output.get("data", {})
            made += ["".join(output.get("text", "")), *("".join(data.get(kind, "")) for kind in _WORDS)]
    return "\n\n".join(written), set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)", "\n".join(made)))


def _table_rows(index: Index) -> dict[str, str]:
    """Rows of the committed tables, with their files."""
    files = sorted(index.folder.glob("*.md"))
    return {line: path.name for path in files for line in path.read_text().splitlines() if line.startswith("| ")}


def _said(index: Index, entry: Row) -> list[str]:
    """The sentences of an entry as its document must have them."""
    if "result" not in entry:
        return [plain(words) for words in entry["says"]]
    row = _row(index, entry)
    return [plain(entry["says"].format(*(row[column] for column in entry["columns"])))]


def _row(index: Index, entry: Row) -> Row:
    """The one row of a result that an entry names."""
    import polars as pl

    path = index.folder / entry["result"]
    if path.suffix == ".parquet":
        rows = pl.read_parquet(path).to_dicts()
    else:
        rows = json.loads(path.read_text())[entry["part"]]["rows"]
    found = [row for row in rows if all(row.get(name) == value for name, value in entry["row"].items())]
    if len(found) != 1:
        raise InputError(f"{entry['result']} has {len(found)} rows of {entry['row']}: correct {INDEX}.")
    return found[0]


def _places(index: Index, text: str, entry: Row) -> tuple[list[range], str, str]:
    """The places of an entry's words in a document, and the source of its figures."""
    places = []
    for words in _said(index, entry):
        starts = (match.start() for match in re.finditer(re.escape(words), text))
        places += [range(start, start + len(words)) for start in starts]
    if "result" in entry:
        return places, entry["result"], index.commands[entry["result"]]
    return places, entry["why"], "none needed"


def _run_all(index: Index, files: Sequence[str]) -> int:
    """Run the command of each result that this machine can measure. A run that was stopped continues."""
    for unknown in (name for name in files if name not in index.commands):
        raise InputError(f"There is no result {unknown!r}: give names of files in {index.folder.name}, as in {INDEX}.")
    measured = [one for one in index.result if "command" in one and (not files or {*files} & {*one["files"]})]
    commands = [one["command"] for one in measured]
    unfinished = Unfinished(kept_in("results") / "all.json", UNFINISHED, {"commands": commands})
    done: list[str] = unfinished.read() or []
    for one in measured:
        command = one["command"]
        if command in done:
            print(f"already done: {command}", flush=True)
        elif "needs" in one and runtime.backend() == "cpu":
            print(f"not run here, because it needs {one['needs']}: {command}", flush=True)
        else:
            print(command, flush=True)
            before = _cpu_seconds()
            ended = subprocess.run(_words(command), cwd=index.root, check=False).returncode
            print(f"{(_cpu_seconds() - before) / 60:.1f} CPU minutes", flush=True)
            if ended:
                print(f"It ended with status {ended}; `veloxlab results --all` continues here.", file=sys.stderr)
                return 1
            done.append(command)
            unfinished.put(done)
    unfinished.remove()
    return 0


def _cpu_seconds() -> float:
    """CPU time of all ended child processes."""
    times = os.times()
    return times.children_user + times.children_system


def _words(command: str) -> list[str]:
    program, *words = shlex.split(command)
    return [sys.executable, *(("-m", "veloxlab.cli") if program == "veloxlab" else ()), *words]
