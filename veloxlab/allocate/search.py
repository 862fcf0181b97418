"""The search for a cache: the methods, widths, exact tokens and exact layers of least divergence for their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, fields, replace
from itertools import groupby
from math import inf, isfinite
from pathlib import Path
from typing import Any, Self

import altair as alt
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import views
from veloxlab.allocate.budget import PlannedModel
from veloxlab.allocate.race import Entrant, race
from veloxlab.allocate.trials import USUAL_BITS, Candidate, Job, Trial, Trials, candidates, doer
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import BITS, FILE, MODEL, PATH, WORDS, checked, either, having, many, number_of_bits, real, whole
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.experiments import Experiment, mean_interval
from veloxlab.measure.frames import schema
from veloxlab.measure.quality import Mode
from veloxlab.mlxlm.identity import name_of
from veloxlab.progress import Progress, silent
from veloxlab.store import Unfinished, digest, kept_in, read_parquet, reading, write_parquet
from veloxlab.texts import Tokenizer

FORMAT = "veloxlab search 2"
UNFINISHED = "veloxlab unfinished search 1"

SEARCHED = schema(
    "row method key_bits value_bits sinks window protected bytes_per_token windows kl low high top1_flips seconds state"
)
SEARCHED |= dict.fromkeys(("row", "sinks", "windows"), pl.Int32)
SEARCHED["protected"] = pl.List(pl.Int32)
"""Columns of `SearchResult.frame`: number of the candidate; code bits; exact tokens and layers; bytes held at the
context's length, tables included; windows of text that it was measured on, their mean KL in nats, and the ends of its
confidence interval (Student's t over the windows; null for one window); share of predictions whose most likely token
changed; time of its measurements; state, see `veloxlab.allocate.race.Entrant`."""

_Experiment = Experiment[Job, Any]


@checked(
    model=either(MODEL, PATH),
    methods=many(WORDS),
    **dict.fromkeys(("bits", "key_bits", "value_bits"), many(BITS)),
    **dict.fromkeys(("sinks", "window"), many(whole(0))),
    protected=many(many(whole(), empty=True)),
    **dict.fromkeys(("most_bytes_per_token", "most_kl"), real(above=0)),
    tokens=whole(2),
    confidence=real(above=0, below=1),
    executor=having("an executor of concurrent.futures, or Dask's", "submit"),
)
def search(
    model: Module | str | Path,
    tokenizer: Tokenizer = None,
    *,
    methods: Sequence[str] | None = None,
    bits: Sequence[float] = USUAL_BITS,
    key_bits: Sequence[float] | None = None,
    value_bits: Sequence[float] | None = None,
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
    """Find the Pareto front of bytes and divergence among many caches, by measuring them.

    Caches that are significantly beaten stop early (`veloxlab.allocate.race`). The same arguments give the same
    result, with any executor. A search that was stopped continues.
    Raises `InputError`: no candidate within the limits; a worker process that dies; as `load` and `calibrate`.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` returns them; or its argument, a name or path. An ``executor`` needs that.
    methods : ids; by default those of methods that need no calibration.
    bits, key_bits, value_bits : code widths to try; the last two override the first. Fractions are for
        methods that take them, such as FisherQuant.
    sinks, window : numbers of exact tokens to try.
    protected : sets of exact layers to try, such as ``[(), (0, -1)]``.
    most_bytes_per_token : candidates that hold more do not run.
    most_kl : in nats. The cheapest candidates run first, and the search ends when some have no more than this.
    context : number of tokens for which bytes are counted.
    text, tokens, windows : by default the WikiText-2 test excerpt; the length and number of its windows.
    mode, prompt : as for `vl.measure.fidelity_to`; by default ``"decode"`` if a candidate has a window, else
        ``"oneshot"``.
    confidence : of the intervals, and of the decision to drop a candidate.
    folder : for calibrations and unfinished measurements; by default the user's cache folder. Workers share it.
    executor : a `concurrent.futures.Executor` (processes spawned, not forked) or Dask's ``client.get_executor()``.
    progress : called for each measurement; an exception that it raises ends the search.
    """
    asked = candidates(methods, key_bits or bits, value_bits or bits, sinks, window, protected)
    name, mode = _model_name(model, tokenizer, executor), mode or ("decode" if any(window) else "oneshot")
    kept, limits = None if folder is None else str(Path(folder).resolve()), (most_bytes_per_token, most_kl, confidence)
    trials = Trials(name, text, tokens, windows, mode, prompt, context, asked, kept, *limits)
    with closing(_Experiment(doer(trials, model, tokenizer, executor), str, executor, progress)) as experiment:
        return _searched(experiment, trials)


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """The result of `search`: ``frame`` has all candidates, `SEARCHED`, by their bytes.

    ``calibrations`` are identities by method. ``settings`` is all that the numbers depend on, with a hash of the text.
    """

    frame: pl.DataFrame
    shape: PlannedModel
    calibrations: Mapping[str, str]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"SearchResult(candidates={self.frame.height}, front={self.front.height})"

    @property
    def front(self) -> pl.DataFrame:
        """The measured Pareto front, from the fewest bytes up."""
        return self.frame.filter(state="front")

    def chart(self) -> alt.VConcatChart:
        """The front, and all other candidates in the background; a point's tooltip shows its settings."""
        return views.pareto_front(self.frame)

    @checked(row=whole(0))
    def plan(self, row: int) -> Plan:
        """The plan of a candidate, by its number in the column ``row``; raises `InputError` if there is none.

        If its method is calibrated, pass the `calibration` to `veloxlab.make_cache` too.
        """
        found = self.frame.filter(row=row)
        if found.is_empty():
            raise InputError(f"This search has no row {row!r}: take a number of its frame's column 'row'.")
        candidate = Candidate(*found.select(f.name for f in fields(Candidate)).row(0))
        return candidate.plan(self.shape, self.calibrations.get(candidate.method))

    @checked()
    def calibration(
        self, model: Module, tokenizer: object, method: str, *, folder: str | Path | None = None
    ) -> Calibration:
        """The calibration for the plans of a ``method``: read from disk, or made again."""
        if method not in self.calibrations:
            raise InputError(f"{method} was not calibrated in this search: its plans need none.")
        rows = self.frame.filter(method=method)
        widths = sorted(map(number_of_bits, {*rows["key_bits"], *rows["value_bits"]}))
        return calibrate(model, tokenizer, method, bits=widths, folder=folder)

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write Parquet with a checksum, and return the path; raises `InputError` if it cannot be written."""
        said = {"shape": asdict(self.shape), "calibrations": dict(self.calibrations), "settings": dict(self.settings)}
        return write_parquet(path, self.frame, FORMAT, said)

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raises `InputError` if it is missing, damaged or not a search."""
        with reading("search", Path(path), "make it again with vl.search"):
            frame, said = read_parquet(Path(path), FORMAT)
            shape = PlannedModel(**said["shape"])
            frame = frame.with_columns(pl.col("key_bits", "value_bits").cast(pl.Float64))  # older ones were whole
            return cls(frame.match_to_schema(SEARCHED), shape, said["calibrations"], said["settings"])


def _searched(experiment: _Experiment, trials: Trials) -> SearchResult:
    found, *others = _results(experiment, [Job(tuple(own)) for _, own in groupby(trials.asked, lambda c: c.method)])
    for weighed in others:
        found.nbytes.update(weighed.nbytes)
        found.calibrations.update(weighed.calibrations)
    most_bytes = trials.most_bytes_per_token or inf
    nbytes: dict[Candidate, float] = dict(sorted(found.nbytes.items(), key=lambda pair: pair[1]))
    racing = [c for c, n in nbytes.items() if n <= most_bytes]
    if not racing:
        of, least = next(iter(nbytes.items()))
        wrong = f"No candidate holds at most {most_bytes:,.1f} bytes a token at {trials.context:,} tokens"
        way_out = "give more bytes, or candidates of fewer bits"
        raise InputError(f"{wrong}; the least is {least:,.1f}, of {of.name}: {way_out}.")
    facts = [found.identity, trials.mode, trials.prompt, found.calibrations]
    path = kept_in("searches", trials.folder) / f"search-{digest(facts)[:16]}.unfinished.json"
    registered = any(find_method(c.method).codecs for c in racing)  # the code of these may have changed
    unfinished = Unfinished(None if registered else path, UNFINISHED, {"facts": facts})
    experiment.go_on(
        unfinished,
        lambda known: [[astuple(job.some[0]), job.window, r] for job, r in known.items() if isinstance(r, Trial)],
        lambda rows: {Job((Candidate(*of),), window): Trial(*trial) for of, window, trial in rows},
    )
    done = 0

    def measure(numbers: Sequence[int], window: int) -> list[float]:
        nonlocal done
        jobs = [Job((racing[i],), window) for i in numbers]
        most = done + len(jobs) * (trials.windows - window)  # fewer if some are dropped
        measured = _results(experiment, jobs, done=done, total=most)
        done += len(jobs)
        return [trial.kl for trial in measured]

    entrants = race([nbytes[c] for c in racing], measure, trials.windows, trials.most_kl, trials.confidence)
    if trials.most_kl is not None and all(entrant.state != "front" for entrant in entrants):
        best, of = min(zip(entrants, racing, strict=True), key=lambda pair: pair[0].mean_kl)
        wrong = (
            f"No candidate has a KL of at most {trials.most_kl:g} nats; the least is {best.mean_kl:.4g}, of {of.name}"
        )
        raise InputError(f"{wrong}: allow more, or give candidates of more bits.")
    entrants += tuple(Entrant(n, state="over budget") for n in nbytes.values() if n > most_bytes)
    rows: list[dict[str, Any]] = []
    for row, (c, entrant) in enumerate(zip(nbytes, entrants, strict=True)):
        own = [experiment.known[Job((c,), window)] for window in range(len(entrant.kls))]
        said = {"row": row, "bytes_per_token": entrant.nbytes, "windows": len(own), "state": entrant.state}
        rows.append(asdict(c) | said | _means(own, trials.confidence))
    unfinished.remove()
    settings = asdict(replace(trials, text=None if trials.text is None else digest(trials.text)[:16]))
    del settings["asked"], settings["folder"]
    return SearchResult(pl.DataFrame(rows, schema=SEARCHED), found.shape, found.calibrations, settings)


def _results(experiment: _Experiment, jobs: Sequence[Job], **counts: int) -> list[Any]:
    found = dict(experiment.run(jobs, **counts))
    return [found[job] for job in jobs]


def _means(trials: Sequence[Trial], confidence: float) -> dict[str, float]:
    if not trials:
        return {"seconds": 0.0}
    kls, flips, seconds = zip(*trials, strict=True)
    said = {"kl": sum(kls) / len(kls), "top1_flips": sum(flips) / len(flips), "seconds": sum(seconds)}
    if len(kls) > 1 and all(map(isfinite, kls)):
        _, said["low"], said["high"] = mean_interval(kls, confidence)
    return said


def _model_name(model: Module | str | Path, tokenizer: object, executor: Executor | None) -> str:
    """The name that workers load; for a loaded model, its name in messages."""
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        return str(path.resolve()) if path.exists() else str(model)
    if executor is not None:
        raise InputError("A loaded model was given with an executor, which loads its own: give its name or path.")
    if tokenizer is None:
        raise InputError("The model's tokenizer is missing: give both, as vl.load gives them.")
    return name_of(model)
