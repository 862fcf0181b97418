"""The history of measured runs, with settings and windows, also as a file; and the earlier settings, for undo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import polars as pl
import traitlets as t

from veloxlab.errors import InputError
from veloxlab.measure.advice import GOALS
from veloxlab.measure.frames import schema
from veloxlab.measure.paired import WINDOWS, Mean, difference
from veloxlab.measure.quality import FIDELITY
from veloxlab.store import read_parquet, reading, write_parquet
from veloxlab.widgets.selection import Choice, Selection

FORMAT = "veloxlab runs 2"
# parts of a choice that decide a cache
SETTINGS = ("method", "key_bits", "value_bits", "sinks", "window", "own_bits", "seed")
TOGETHER = 1.0  # seconds in which moves of one control are one step
MOST = 100  # steps kept for undo

RUNS = (
    {"name": pl.String, "measured": pl.String, "text": pl.String, "settings": pl.String}
    | {"seed": pl.Int64}
    | {name: kind for name, kind in FIDELITY.items() if name != "name"}
    | schema("low high")
    | {"windows": pl.List(pl.Struct(WINDOWS))}
)
"""Columns of `Runs.table`: a name that can be changed; the time of measurement (UTC); the text; the settings, as JSON;
the seed of the random parts of the codec or its calibration, null if there are none; the columns of
`veloxlab.fidelity`; the ends of the 95 % interval of the mean KL, null for one window; and the rows of
`veloxlab.measure.by_window`, one for each window of the text."""


@dataclass(frozen=True)
class Run:
    """One measurement of a cache."""

    name: str
    choice: Choice
    measured: str  # when, ISO 8601 in UTC
    text: str  # names the text that was read
    seed: int | None  # of the random parts of the codec or its calibration; None if there are none
    row: pl.DataFrame  # of `FIDELITY`
    windows: pl.DataFrame  # `WINDOWS`

    @classmethod
    def now(cls, choice: Choice, *measured: Any) -> Run:
        """A run measured just now; ``measured`` is its text, seed, row and windows."""
        return cls(choice.name, choice, datetime.now(UTC).isoformat(timespec="seconds"), *measured)

    @property
    def kl(self) -> Mean:
        """Mean KL over the windows, in nats a token."""
        return Mean.of(self.windows["kl_mean"].to_list())

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its cache, in types of JSON."""
        found = {name: getattr(self.choice, name) for name in SETTINGS}
        return found | {"own_bits": {str(layer): list(bits) for layer, bits in self.choice.own_bits.items()}}

    def as_row(self) -> dict[str, Any]:
        """A row of `RUNS`."""
        said = {"measured": self.measured, "text": self.text, "settings": json.dumps(self.settings), "seed": self.seed}
        interval = {"low": self.kl.low, "high": self.kl.high, "windows": self.windows.to_dicts()}
        return self.row.row(0, named=True) | {"name": self.name} | said | interval

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Run:
        """Undo `as_row`."""
        settings = json.loads(row["settings"])
        own = {int(layer): tuple(bits) for layer, bits in settings.pop("own_bits").items()}
        measured = pl.DataFrame([{name: row[name] for name in FIDELITY}], schema=FIDELITY)
        windows = pl.DataFrame(row["windows"], schema=WINDOWS)
        choice, about = Choice(**settings, own_bits=own), {name: row[name] for name in ("measured", "text", "seed")}
        return cls(row["name"], choice, **about, row=measured, windows=windows)


class Runs(t.HasTraits):
    """Runs, the oldest first, and how much text the next run reads."""

    every = t.Tuple(help="each a `Run`; it changes as a whole")
    windows = t.Int(1, help="windows of text that a measurement reads; two or more give an interval")

    @property
    def frame(self) -> pl.DataFrame:
        """The `veloxlab.fidelity` of each run: rows of `veloxlab.measure.quality.FIDELITY`."""
        return pl.concat([run.row for run in self.every]) if self.every else pl.DataFrame()

    @property
    def table(self) -> pl.DataFrame:
        """All facts of each run: rows of `RUNS`."""
        return pl.DataFrame([run.as_row() for run in self.every], schema=RUNS)

    @property
    def newest(self) -> str:
        """A sentence about the newest run."""
        run = self.every[-1]
        found = f"mean KL {run.kl.mean:.3g} nats from the exact cache ({run.kl.interval})"
        return f"Measured {run.name}: {found}, perplexity {run.row['perplexity'].item():.2f}. {verdict(run.kl.mean)}"

    def add(self, run: Run) -> None:
        """Add a run."""
        self.every = (*self.every, run)

    def rename(self, number: int, name: str) -> None:
        """Give a run another name."""
        self.every = tuple(replace(run, name=name) if i == number else run for i, run in enumerate(self.every))

    def save(self, path: str | Path) -> Path:
        """Write `table` as Parquet, which `open` reads, as can other programs; return the path."""
        return write_parquet(path, self.table, FORMAT, {})

    def open(self, path: str | Path) -> pl.DataFrame:
        """Add the runs of a file that `save` wrote, and return a summary; raises `InputError` for other files."""
        with reading("history of runs", Path(path), "save it again with runs.save"):
            frame, _ = read_parquet(Path(path), FORMAT)
            self.every = (*self.every, *map(Run.of_row, frame.to_dicts()))
        return frame.select("name", "measured", "kl_mean", "low", "high", "held_bytes")


def verdict(kl: float) -> str:
    """A sentence: the uses that accept a loss of ``kl`` nats a token, or a way to lose less."""
    above = [f"{goal} ({limit:g})" for goal, limit in GOALS.items() if not kl <= limit]
    if not above:
        return f"This is within the limits of the page Advise for all uses: {', '.join(GOALS)}."
    return f"This is above the limits of the page Advise for {', '.join(above)}: try more K bits, or the page Compare."


def apart(first: Run, second: Run) -> str:
    """A sentence: how much more the second run lost than the first, paired by window, and whether that is decisive."""
    try:
        if first.text != second.text:
            raise InputError("They read different texts.")
        found = difference(first.windows, second.windows)
    except InputError as error:
        return f"{first.name} and {second.name} cannot be paired: {error}"
    more = "more" if found.mean >= 0 else "less"
    said = f"{second.name} loses {abs(found.mean):.3g} nats a token {more} than {first.name}"
    return f"{said} ({found.interval}){'' if found.decisive else ': not decisive'}."


WORDS = {"method": "method", "key_bits": "K bits", "value_bits": "V bits"}
WORDS |= {name: name for name in ("sinks", "window", "layer", "head", "token", "seed")}
NOT_CHOSEN = {"layer": "all", "token": "the one that lost most"}
MOST_SAID = 3  # changes in a tooltip


def change_said(now: Choice, then: Choice) -> str:
    """What changes from one choice to another, in words such as ``"K bits of layer 26, 5 to 3"``."""
    said = list[str]()
    for name, words in WORDS.items():
        old, new = getattr(now, name), getattr(then, name)
        if old != new:
            ends = (NOT_CHOSEN[name] if value is None else value for value in (old, new))
            said.append(f"{words}, {' to '.join(map(str, ends))}")
    for layer in sorted({*now.own_bits} | {*then.own_bits}):
        if now.own_bits.get(layer) != then.own_bits.get(layer):
            bits = zip("KV", now.bits_of(layer), then.bits_of(layer), strict=True)
            said += [f"{one} bits of layer {layer}, {old} to {new}" for one, old, new in bits if old != new]
    if now.ids != then.ids:
        said.append("text")
    more = [f"{len(said) - MOST_SAID} more"] if len(said) > MOST_SAID else []
    return "; ".join(said[:MOST_SAID] + more) or "a setting that has no effect now"


class Steps:
    """Earlier choices, and those that were undone. Moves of one control within a second are one step."""

    def __init__(self, selection: Selection) -> None:
        self._selection, self._moving, self._last = selection, False, (0.0, frozenset[str]())
        self.before: list[Choice] = []
        self.undone: list[Choice] = []

    def follow(self, change: Mapping[str, Any]) -> None:
        """Record a change of the selection's choice."""
        if self._moving:
            return
        old, new = asdict(change["old"]), asdict(change["new"])
        now = monotonic(), frozenset(name for name in new if new[name] != old[name])
        if not (self.before and now[1] == self._last[1] and now[0] - self._last[0] < TOGETHER):
            self.before = [*self.before[1 - MOST :], change["old"]]
        self._last, self.undone = now, []

    def undo(self) -> None:
        """Undo the last step."""
        self._move(self.before, self.undone)

    def redo(self) -> None:
        """Redo the step that was undone last."""
        self._move(self.undone, self.before)

    def _move(self, source: list[Choice], target: list[Choice]) -> None:
        if not source:
            return
        with self._selection.lock:
            target.append(self._selection.choice)
            self._moving, self._last = True, (0.0, frozenset())
            try:
                self._selection.choice = source.pop()
            finally:
                self._moving = False
