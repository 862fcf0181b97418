"""The search for a cache: which methods, widths, exact tokens and layers give the least divergence for their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import altair as alt
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import views
from veloxlab.allocate.search.candidates import (
    COMBINED,
    USUAL_BITS,
    Candidate,
    PlannedModel,
    calibrated_widths,
    candidates,
)
from veloxlab.allocate.search.race import race
from veloxlab.allocate.search.runner import Runner, Trial, Trials, bench, do_in_worker, model_name
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import FILE, MODEL, PATH, checked, either, having, real, whole
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.intervals import mean_interval
from veloxlab.measure.quality import Mode
from veloxlab.progress import Progress, silent
from veloxlab.store import Unfinished, digest, kept_in, read_parquet, reading, write_parquet

FORMAT = "veloxlab search 2"
UNFINISHED = "veloxlab unfinished search 1"
OVER_BUDGET = "over budget"
SEARCH = {
    **COMBINED,
    "model": either(MODEL, PATH),
    "most_bytes_per_token": real(above=0),
    "most_kl": real(above=0),
    "tokens": whole(2),
    "confidence": real(above=0, below=1),
    "executor": having("an executor of concurrent.futures, or Dask's", "submit"),
}
"""Checks of the arguments of `search`."""

SEARCHED: dict[str, type[pl.DataType] | pl.DataType] = {
    "row": pl.Int32,  # of the candidate, for `SearchResult.plan`
    "method": pl.String,
    "key_bits": pl.Int32,  # code bits per coordinate
    "value_bits": pl.Int32,
    "sinks": pl.Int32,  # tokens
    "window": pl.Int32,
    "protected": pl.List(pl.Int32),  # layers left exact
    "bytes_per_token": pl.Float64,  # held at the context's length, tables included
    "windows": pl.Int32,  # of text that it was measured on, before it was dropped or the text ended
    "kl": pl.Float64,  # mean KL(exact ‖ compressed) of the next token over those windows, nats; null if not measured
    "low": pl.Float64,  # ends of its interval, Student's t over the windows; null below two windows
    "high": pl.Float64,
    "top1_flips": pl.Float64,  # share of predictions whose most likely token changed
    "seconds": pl.Float64,  # that its measurements took
    "state": pl.String,  # "over budget", which was not run, or as `veloxlab.allocate.search.race.Entrant`
}
"""Columns of `SearchResult.frame`."""


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """What `search` found.

    Attributes
    ----------
    frame : all candidates, `SEARCHED`, by their bytes.
    shape : of the model.
    calibrations : identities of the calibrations that were used, by method.
    settings : arguments of `search` that the numbers depend on; of a text of one's own, sixteen hex digits.
    """

    frame: pl.DataFrame
    shape: PlannedModel
    calibrations: Mapping[str, str]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """A stable line."""
        return f"SearchResult(candidates={self.frame.height}, front={self.front.height})"

    @property
    def front(self) -> pl.DataFrame:
        """The measured Pareto front, from the fewest bytes up."""
        return self.frame.filter(state="front")

    def chart(self) -> alt.VConcatChart:
        """The front, and behind it all else that was measured; a point's tooltip says its settings."""
        return views.pareto_front(self.frame)

    @checked(row=whole(0))
    def plan(self, row: int) -> Plan:
        """The plan of a candidate, by its number in the column ``row``; raises `InputError` if there is none.

        If its method is calibrated, `veloxlab.make_cache` wants the `calibration` beside it.
        """
        found = self.frame.filter(row=row)
        if found.is_empty():
            raise InputError(f"This search has no row {row!r}: take a number of its frame's column 'row'.")
        row_of = found.row(0, named=True)
        candidate = Candidate(**{f.name: row_of[f.name] for f in fields(Candidate)})
        candidate = replace(candidate, protected=tuple(candidate.protected))
        return candidate.plan(self.shape, self.calibrations.get(candidate.method))

    @checked()
    def calibration(
        self,
        model: Module,
        tokenizer: Any,  # noqa: ANN401
        method: str,
        *,
        folder: str | Path | None = None,
    ) -> Calibration:
        """The calibration that the plans of a ``method`` want: kept since the search, or made again."""
        rows = self.frame.filter(method=method)
        if method not in self.calibrations:
            raise InputError(f"{method} was not calibrated in this search: its plans need none.")
        widths = sorted({*rows["key_bits"].to_list(), *rows["value_bits"].to_list()})
        return calibrate(model, tokenizer, method, bits=widths, folder=folder)

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write it as Parquet with a checksum, and return the path; raises `InputError` where it cannot be written."""
        path = Path(path)
        said = {"shape": asdict(self.shape), "calibrations": dict(self.calibrations), "settings": dict(self.settings)}
        write_parquet(path, self.frame, FORMAT, said)
        return path

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `InputError` for a file that is missing, damaged or no search."""
        with reading("search", Path(path), "make it again with vl.search"):
            frame, said = read_parquet(Path(path), FORMAT)
            return cls(
                frame.match_to_schema(SEARCHED), PlannedModel(**said["shape"]), said["calibrations"], said["settings"]
            )


@checked(**SEARCH)
def search(
    model: Module | str | Path,
    tokenizer: Any = None,  # noqa: ANN401
    *,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = USUAL_BITS,
    key_bits: Sequence[int] | None = None,
    value_bits: Sequence[int] | None = None,
    sinks: Sequence[int] = (4,),
    window: Sequence[int] = (0,),
    protected: Sequence[Sequence[int]] = ((),),
    most_bytes_per_token: float | None = None,
    most_kl: float | None = None,
    context: int = 4096,
    text: str | None = None,
    tokens: int = 256,
    windows: int = 8,
    mode: Mode | None = None,
    prompt: int = 64,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Find the caches that nothing else beats in both bytes and divergence, by measuring them.

    All candidates are evaluated on one window of text after another, and those that are surely beaten stop early
    (`veloxlab.allocate.search.race`). Nothing is drawn at random: the same arguments give the same result, with any
    executor.
    What was measured is kept on disk until the end, and a search that was stopped goes on from there.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them; or a name or path for it, which an ``executor`` needs.
    methods, bits, key_bits, value_bits, sinks, window, protected : what to combine; see
        `veloxlab.allocate.search.candidates.candidates`. Methods that have to be calibrated are, if they are named.
    most_bytes_per_token : a budget; candidates above it are never run.
    most_kl : a quality floor in nats. Cheaper candidates then run first, and costlier ones not at all once it is met;
        the front is of those that meet it.
    context : tokens of the text that bytes are counted at; exact tokens and tables are shared by so many.
    text : what candidates are evaluated on; the shipped WikiText-2 test excerpt by default.
    tokens, windows : length and number of its stretches.
    mode, prompt : as for `vl.measure.evaluate`. By default ``"oneshot"`` if no candidate has a window, and else
        ``"decode"``: read in one call, most tokens would see their neighbours through codes and not in the window.
    confidence : of the intervals, and of what is dropped.
    folder : where calibrations are kept, and measurements until the end; the user's cache folder by default. Workers
        share it by its path. With a method that was registered (`veloxlab.register`) no measurements are kept.
    executor : any `concurrent.futures.Executor`, such as a pool of processes (spawned, not forked: MLX has threads) or
        Dask's ``client.get_executor()``; its workers load the model by its name. By default all runs in this process.
        If a process of a pool dies, a warning says so, and one new process does what is left.
    progress : told of each measurement; what it raises ends the search, and what is waiting is cancelled.

    Raises
    ------
    InputError : nothing to search, no candidate within the budget or the floor, a text that is too short, a loaded
        model beside an executor, processes that die; or as `veloxlab.load` and `veloxlab.calibrate`.
    """
    asked = candidates(
        methods,
        bits=bits,
        key_bits=key_bits,
        value_bits=value_bits,
        sinks=sinks,
        window=window,
        protected=protected,
    )
    job = Trials(
        model_name(model, executor),
        text,
        tokens,
        windows,
        mode or ("decode" if any(c.window for c in asked) else "oneshot"),
        prompt,
        context,
        calibrated_widths(asked),
        None if folder is None else str(Path(folder).resolve()),
    )
    do = partial(do_in_worker, job) if executor else bench(job, model, tokenizer).do
    with closing(Runner(do, executor, windows, progress)) as runner:
        shape, identity = runner.model()
        asked = tuple(dict.fromkeys(c.within(shape) for c in asked))
        nbytes, calibrations = runner.weigh(asked)
        order = sorted(range(len(asked)), key=lambda i: nbytes[i])
        asked, nbytes = tuple(asked[i] for i in order), [nbytes[i] for i in order]
        affordable = sum(most_bytes_per_token is None or n <= most_bytes_per_token for n in nbytes)
        if not affordable:
            raise InputError(
                f"No candidate holds at most {most_bytes_per_token:,.1f} bytes a token at {context:,} tokens; the "
                f"least is {nbytes[0]:,.1f}, of {asked[0].name}: give more bytes, or candidates of fewer bits."
            )
        unfinished = _unfinished(job, asked, [identity, job.mode, prompt, calibrations])
        runner.go_on(unfinished)
        measured: list[list[Trial]] = [[] for _ in asked]

        def round_of(numbers: Sequence[int], window: int) -> list[float]:
            found = runner.measure([asked[i] for i in numbers], window)
            for i, trial in zip(numbers, found, strict=True):
                measured[i].append(trial)
            return [trial.kl for trial in found]

        entrants = race(nbytes[:affordable], round_of, windows, most_kl=most_kl, confidence=confidence)
    states = [entrant.state for entrant in entrants] + [OVER_BUDGET] * (len(asked) - affordable)
    if most_kl is not None and "front" not in states:
        kls = [entrant.mean_kl for entrant in entrants]
        best = min(range(affordable), key=kls.__getitem__)
        raise InputError(
            f"No candidate has a KL of at most {most_kl:g} nats; the least is {kls[best]:.4g}, of {asked[best].name}: "
            "allow more, or give candidates of more bits."
        )
    rows = [
        _row(i, c, n, own, state, confidence)
        for i, (c, n, own, state) in enumerate(zip(asked, nbytes, measured, states, strict=True))
    ]
    settings = {
        "model": job.model,
        "text": None if text is None else digest(text)[:16],
        "context": context,
        "tokens": tokens,
        "windows": windows,
        "mode": job.mode,
        "prompt": prompt,
        "confidence": confidence,
        "most_bytes_per_token": most_bytes_per_token,
        "most_kl": most_kl,
    }
    unfinished.remove()
    return SearchResult(pl.DataFrame(rows, schema=SEARCHED, orient="row"), shape, calibrations, settings)


def _unfinished(job: Trials, asked: Sequence[Candidate], facts: Sequence[Any]) -> Unfinished:
    """Where a search keeps what it measured until its end; ``facts`` are all that decides what a candidate does."""
    if any(find_method(c.method).codecs for c in asked):  # registered: its code may have changed
        return Unfinished(None, UNFINISHED, {})
    path = kept_in("searches", job.folder) / f"search-{digest(facts)[:16]}.unfinished.json"
    return Unfinished(path, UNFINISHED, {"facts": facts})


def _row(
    number: int, c: Candidate, nbytes: float, own: Sequence[Trial], state: str, confidence: float
) -> tuple[object, ...]:
    """One of `SEARCHED`."""
    kls = [trial.kl for trial in own]
    sure = len(kls) > 1 and all(map(math.isfinite, kls))
    _, low, high = mean_interval(kls, confidence) if sure else (None, None, None)
    means = [sum(kls) / len(kls), low, high, sum(t.top1_flips for t in own) / len(own)] if own else [None] * 4
    return (
        number,
        c.method,
        c.key_bits,
        c.value_bits,
        c.sinks,
        c.window,
        list(c.protected),
        nbytes,
        len(own),
        *means,
        sum(trial.seconds for trial in own),
        state,
    )
