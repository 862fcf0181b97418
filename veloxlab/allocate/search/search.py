"""The search for a cache: which methods, widths, exact tokens and layers give the least divergence for their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.allocate.search.candidates import USUAL_BITS, Candidate, candidates
from veloxlab.allocate.search.race import Entrant, race
from veloxlab.allocate.search.result import SEARCHED, SearchResult
from veloxlab.allocate.search.runner import Bench, Job, Trial, Trials, Weighed, do_in_worker
from veloxlab.checks import MODEL, PATH, WORDS, checked, either, having, many, real, whole
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.experiments import Experiment
from veloxlab.measure.intervals import mean_interval
from veloxlab.measure.quality import Mode
from veloxlab.mlxlm.identity import name_of
from veloxlab.models.loading import load
from veloxlab.progress import Progress, silent
from veloxlab.store import Unfinished, digest, kept_in

UNFINISHED = "veloxlab unfinished search 1"
SEARCH = {
    "model": either(MODEL, PATH),
    "methods": many(WORDS),
    **dict.fromkeys(("bits", "key_bits", "value_bits"), many(whole())),
    **dict.fromkeys(("sinks", "window"), many(whole(0))),
    "protected": many(many(whole(), empty=True)),
    **dict.fromkeys(("most_bytes_per_token", "most_kl"), real(above=0)),
    "tokens": whole(2),
    "confidence": real(above=0, below=1),
    "executor": having("an executor of concurrent.futures, or Dask's", "submit"),
}
"""Checks of the arguments of `search`."""


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
    (`veloxlab.allocate.search.race`). Nothing is random: the same arguments give the same result, with any executor.
    Measurements are kept on disk until the end, and a search that was stopped continues from there.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them; or a name or path for it, which an ``executor`` needs.
    methods : ids; by default those that need no calibration. A method that has to be calibrated is, if it is named.
    bits, key_bits, value_bits : code widths to try; the last two override the first.
    sinks, window : numbers of exact tokens to try.
    protected : sets of layers to leave exact to try, such as ``[(), (0, -1)]``.
    most_bytes_per_token : a budget; candidates above it never run.
    most_kl : a quality floor in nats. Cheaper candidates then run first, and costlier ones not at all once it is met;
        the front is of those that meet it.
    context : tokens of the text at which bytes are counted; exact tokens and tables are shared by so many.
    text : what candidates are evaluated on; the shipped WikiText-2 test excerpt by default.
    tokens, windows : length and number of its stretches.
    mode, prompt : as for `vl.measure.evaluate`. By default ``"oneshot"`` if no candidate has a window, else
        ``"decode"``: in one call most tokens would see their neighbours through codes and not in the window.
    confidence : of the intervals, and of what is dropped.
    folder : where calibrations are kept, and measurements until the end; the user's cache folder by default. Workers
        share it by its path. With a method of `veloxlab.register` no measurements are kept.
    executor : any `concurrent.futures.Executor`, such as a pool of processes (spawned, not forked: MLX has threads) or
        Dask's ``client.get_executor()``; its workers load the model by its name. By default all runs in this process.
        If a process of a pool dies, a warning says so, and one new process does what is left.
    progress : told of each measurement; what it raises ends the search and cancels what waits.

    Raises
    ------
    InputError : no candidate within the budget or the floor, a text that is too short, a loaded model beside an
        executor, processes that die; or as `veloxlab.load`, `veloxlab.calibrate` and for methods without these widths.
    """
    asked = candidates(
        methods, bits=bits, key_bits=key_bits, value_bits=value_bits, sinks=sinks, window=window, protected=protected
    )
    trials = Trials(
        _model_name(model, tokenizer, executor),
        text,
        tokens,
        windows,
        mode or ("decode" if any(window) else "oneshot"),
        prompt,
        context,
        _widths_to_fit(asked),
        None if folder is None else str(Path(folder).resolve()),
    )
    if executor is None:
        do = Bench(trials, *(load(model) if isinstance(model, str | Path) else (model, tokenizer))).do
    else:
        do = partial(do_in_worker, trials)
    with closing(Experiment[Job, Any](do, str, executor, progress)) as experiment:
        return _searched(experiment, trials, asked, most_bytes_per_token or math.inf, most_kl, confidence)


def _searched(
    experiment: Experiment[Job, Any],
    trials: Trials,
    asked: Sequence[Candidate],
    most_bytes: float,
    most_kl: float | None,
    confidence: float,
) -> SearchResult:
    jobs = [Job(tuple(c for c in asked if c.method == m)) for m in dict.fromkeys(c.method for c in asked)]
    weighed: list[Weighed] = _results(experiment, jobs)
    shape, identity = weighed[0].shape, weighed[0].identity
    calibrations = {job.some[0].method: w.calibration for job, w in zip(jobs, weighed, strict=True) if w.calibration}
    counted = [pair for job, w in zip(jobs, weighed, strict=True) for pair in zip(job.some, w.nbytes, strict=True)]
    nbytes = dict(sorted(((c.within(shape), n) for c, n in counted), key=lambda pair: pair[1]))
    cheap = [c for c, n in nbytes.items() if n <= most_bytes]
    if not cheap:
        of, least = next(iter(nbytes.items()))
        raise InputError(
            f"No candidate holds at most {most_bytes:,.1f} bytes a token at {trials.context:,} tokens; the least is "
            f"{least:,.1f}, of {of.name}: give more bytes, or candidates of fewer bits."
        )
    unfinished = _unfinished(trials, cheap, [identity, trials.mode, trials.prompt, calibrations])
    experiment.go_on(unfinished, _to_rows, _from_rows)
    entrants = _raced(experiment, {c: nbytes[c] for c in cheap}, trials.windows, most_kl, confidence)
    if most_kl is not None and all(entrant.state != "front" for entrant in entrants):
        best, of = min(zip(entrants, cheap, strict=True), key=lambda pair: pair[0].mean_kl)
        raise InputError(
            f"No candidate has a KL of at most {most_kl:g} nats; the least is {best.mean_kl:.4g}, of {of.name}: allow "
            "more, or give candidates of more bits."
        )
    entrants += tuple(Entrant(n, state="over budget") for n in nbytes.values() if n > most_bytes)
    rows: list[dict[str, Any]] = []
    for c, entrant in zip(nbytes, entrants, strict=True):
        own = [experiment.known[Job((c,), window)] for window in range(len(entrant.kls))]
        rows.append({"row": len(rows)} | _row(c, entrant, own, confidence))
    unfinished.remove()
    settings = asdict(replace(trials, text=None if trials.text is None else digest(trials.text)[:16]))
    del settings["widths"], settings["folder"]
    limits = {"most_bytes_per_token": None if most_bytes == math.inf else most_bytes, "most_kl": most_kl}
    settings |= limits | {"confidence": confidence}
    return SearchResult(pl.DataFrame(rows, schema=SEARCHED), shape, calibrations, settings)


def _raced(
    experiment: Experiment[Job, Any],
    nbytes: Mapping[Candidate, float],
    windows: int,
    most_kl: float | None,
    confidence: float,
) -> tuple[Entrant, ...]:
    racing, done = list(nbytes), 0

    def measure(numbers: Sequence[int], window: int) -> list[float]:
        nonlocal done
        jobs = [Job((racing[i],), window) for i in numbers]
        most = done + len(jobs) * (windows - window)  # fewer if some are dropped
        found: list[Trial] = _results(experiment, jobs, done=done, total=most)
        done += len(jobs)
        return [trial.kl for trial in found]

    return race(list(nbytes.values()), measure, windows, most_kl=most_kl, confidence=confidence)


def _row(c: Candidate, entrant: Entrant, trials: Sequence[Trial], confidence: float) -> dict[str, Any]:
    sure, count = len(trials) > 1 and math.isfinite(entrant.mean_kl), len(trials)
    _, low, high = mean_interval(entrant.kls, confidence) if sure else (None, None, None)
    return asdict(c) | {
        "protected": list(c.protected),
        "bytes_per_token": entrant.nbytes,
        "windows": count,
        "kl": sum(entrant.kls) / count if count else None,
        "low": low,
        "high": high,
        "top1_flips": sum(trial.top1_flips for trial in trials) / count if count else None,
        "seconds": sum(trial.seconds for trial in trials),
        "state": entrant.state,
    }


def _results(experiment: Experiment[Job, Any], jobs: Sequence[Job], **counts: int) -> list[Any]:
    """Results in the order of the jobs."""
    found = dict(experiment.run(jobs, **counts))
    return [found[job] for job in jobs]


def _widths_to_fit(asked: Sequence[Candidate]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """All widths of each method that has to be calibrated."""
    widths: dict[str, set[int]] = {}
    for c in asked:
        if find_method(c.method).calibrated:
            widths.setdefault(c.method, set()).update((c.key_bits, c.value_bits))
    return tuple((method, tuple(sorted(own))) for method, own in widths.items())


def _unfinished(trials: Trials, some: Sequence[Candidate], facts: Sequence[Any]) -> Unfinished:
    """Where a search keeps its measurements until its end; ``facts`` are all that decides a candidate's trial."""
    if any(find_method(c.method).codecs for c in some):  # registered: its code may have changed
        return Unfinished(None, UNFINISHED, {})
    path = kept_in("searches", trials.folder) / f"search-{digest(facts)[:16]}.unfinished.json"
    return Unfinished(path, UNFINISHED, {"facts": facts})


def _to_rows(known: Mapping[Job, Any]) -> list[Any]:
    return [[astuple(job.some[0]), job.window, astuple(r)] for job, r in known.items() if isinstance(r, Trial)]


def _from_rows(rows: Sequence[Any]) -> dict[Job, Any]:
    return {Job((Candidate(*of),), window): Trial(*trial) for of, window, trial in rows}


def _model_name(model: Module | str | Path, tokenizer: object, executor: Executor | None) -> str:
    """What workers load; or, of a model that is loaded, its name for people."""
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        return str(path.resolve()) if path.exists() else str(model)
    if executor is not None:
        raise InputError(
            "A loaded model was given beside an executor, whose workers load it for themselves: give its name or "
            "path, as for vl.load."
        )
    if tokenizer is None:
        raise InputError("The model's tokenizer is missing: give both, as vl.load gives them.")
    return name_of(model)
