"""Measurements of a search as jobs that any process can do: it loads the model by name, and keeps it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mlx.nn.layers.base import Module

from veloxlab.allocate.search.candidates import Candidate, PlannedModel, bytes_per_token
from veloxlab.cache.calibration import Calibration
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure.activations import stretches
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.experiments import Experiment
from veloxlab.measure.quality import Mode, Reference, evaluate
from veloxlab.mlxlm.identity import fingerprint, name_of
from veloxlab.models.loading import load
from veloxlab.progress import Progress
from veloxlab.store import Unfinished, digest


@dataclass(frozen=True)
class Trials:
    """What all jobs of a search share; plain words and numbers, so that it travels to any process.

    Attributes
    ----------
    model : name or path for `veloxlab.load`.
    text : what candidates are evaluated on; None is the shipped WikiText-2 test excerpt.
    tokens, windows : length and number of its stretches.
    mode, prompt : as for `vl.measure.evaluate`.
    context : tokens that held bytes are counted at.
    widths : for each method that has to be calibrated, the code widths to fit.
    folder : where calibrations are kept; None is the user's cache folder.
    """

    model: str
    text: str | None
    tokens: int
    windows: int
    mode: Mode
    prompt: int
    context: int
    widths: tuple[tuple[str, tuple[int, ...]], ...] = ()
    folder: str | None = None


@dataclass(frozen=True)
class Trial:
    """What one candidate did on one window.

    Attributes
    ----------
    kl : mean KL(exact ‖ compressed) of the next token, nats.
    top1_flips : share of predictions whose most likely token changed.
    seconds : that it took, without the exact run and the calibration.
    """

    kl: float
    top1_flips: float
    seconds: float


@dataclass(frozen=True)
class Weighed:
    """Bytes per token of some candidates of one method, and the identity of its calibration, if it has one."""

    bytes_per_token: tuple[float, ...]
    calibration: str | None


@dataclass(frozen=True)
class Job:
    """One step of a search.

    Attributes
    ----------
    kind : ``"model"`` gives a `PlannedModel` and the checksum of all that trials depend on; ``"weigh"`` gives the
        `Weighed` of ``some`` candidates of one method; ``"measure"`` gives the `Trial` of one on a ``window``.
    """

    kind: Literal["model", "weigh", "measure"]
    some: tuple[Candidate, ...] = ()
    window: int = 0

    def __str__(self) -> str:
        """For progress and messages."""
        if self.kind == "measure":
            return f"window {self.window + 1}: {self.some[0].name}"
        return f"counting bytes of {self.some[0].method}" if self.some else "loading the model"


@dataclass(eq=False)
class Bench:
    """A model that is here, the text as windows of tokens, and the exact run of the window that is measured."""

    trials: Trials
    model: Module
    tokenizer: Any
    _exact: dict[int, Reference] = field(default_factory=dict, repr=False)
    _fitted: dict[str, Calibration] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._windows = stretches(self.tokenizer, self.trials.text, self.trials.tokens, self.trials.windows)
        self._shape = PlannedModel.of(self.model)

    def do(self, job: Job) -> Any:  # noqa: ANN401 - see `Job`
        """Do a job of any kind."""
        if job.kind == "model":
            versions = {method.id: method.version for method in METHODS.values()}
            return self._shape, digest([versions, fingerprint(self.model), self._windows])
        return self.weigh(job.some) if job.kind == "weigh" else self.measure(job.some[0], job.window)

    def weigh(self, some: Sequence[Candidate]) -> Weighed:
        """Count the bytes of candidates of one method, which is calibrated first if need be."""
        fitted = self._calibration(some[0].method)
        identity = None if fitted is None else fitted.identity
        held = [bytes_per_token(self.model, c.plan(self._shape, identity), self.trials.context, fitted) for c in some]
        return Weighed(tuple(held), identity)

    def measure(self, candidate: Candidate, window: int) -> Trial:
        """Evaluate a candidate on a window, every token seen as the cache holds it."""
        trials, exact, plan = self.trials, self._reference(window), candidate.plan(self._shape)
        fitted = self._calibration(candidate.method)
        start = time.perf_counter()
        row = evaluate(exact, plan, mode=trials.mode, prompt=trials.prompt, calibration=fitted).row(0, named=True)
        return Trial(row["kl_mean"], row["top1_flips"], time.perf_counter() - start)

    def _reference(self, window: int) -> Reference:
        if window not in self._exact:
            self._exact.clear()  # one at a time: a window's log-probabilities are tens of megabytes
            self._exact[window] = Reference.of(self.model, [self._windows[window]])
        return self._exact[window]

    def _calibration(self, method: str) -> Calibration | None:
        widths: Mapping[str, tuple[int, ...]] = dict(self.trials.widths)
        if method not in widths:
            return None
        if method not in self._fitted:
            self._fitted[method] = calibrate(
                self.model, self.tokenizer, method, bits=widths[method], folder=self.trials.folder
            )
        return self._fitted[method]


_one_at_a_time = threading.Lock()  # a worker may have threads, and there is one model and one window


def do_in_worker(trials: Trials, job: Job) -> Any:  # noqa: ANN401 - see `Job`
    """`Bench.do` in a process that has loaded nothing yet, or has kept what it loaded."""
    with _one_at_a_time:
        return _bench(trials).do(job)


@lru_cache(maxsize=1)
def _bench(trials: Trials) -> Bench:
    return Bench(trials, *_loaded(trials.model))


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Module, Any]:
    return load(name)


class Runner:
    """Does the jobs of a search, and gives results in the order that they were asked for.

    Parameters
    ----------
    do : does one `Job`: `Bench.do`, or with an executor a `functools.partial` of `do_in_worker`.
    executor : where jobs are done; None for this process.
    windows : how many windows the text has.
    progress : told of each job; what it raises cancels those that wait.
    """

    def __init__(self, do: Callable[[Job], Any], executor: Executor | None, windows: int, progress: Progress) -> None:
        self._experiment: Experiment[Job, Any] = Experiment(do, str, executor, progress)
        self._windows, self._measured = windows, 0
        self.close = self._experiment.close

    def model(self) -> tuple[PlannedModel, str]:
        """The model's shape, and the checksum of the model, the text and the versions of the methods."""
        found: tuple[PlannedModel, str]
        ((_, found),) = self._experiment.run([Job("model")])
        return found

    def go_on(self, unfinished: Unfinished) -> None:
        """Take over what was measured before, and keep there what is measured from now on."""
        self._experiment.go_on(unfinished, _to_rows, _from_rows)

    def weigh(self, some: Sequence[Candidate]) -> tuple[list[float], dict[str, str]]:
        """Bytes per token of each candidate, and identities of the calibrations of methods that have one."""
        methods = dict.fromkeys(c.method for c in some)
        jobs = [Job("weigh", tuple(c for c in some if c.method == method)) for method in methods]
        weighed: dict[Job, Weighed] = dict(self._experiment.run(jobs))
        held = {c: nbytes for job in jobs for c, nbytes in zip(job.some, weighed[job].bytes_per_token, strict=True)}
        found = {job.some[0].method: weighed[job].calibration for job in jobs}
        return [held[c] for c in some], {m: identity for m, identity in found.items() if identity is not None}

    def measure(self, some: Sequence[Candidate], window: int) -> list[Trial]:
        """What each candidate does on a window."""
        jobs = [Job("measure", (c,), window) for c in some]
        most = self._measured + len(jobs) * (self._windows - window)  # fewer if some are dropped
        found: dict[Job, Trial] = dict(self._experiment.run(jobs, done=self._measured, total=most))
        self._measured += len(jobs)
        return [found[job] for job in jobs]


def _to_rows(known: Mapping[Job, Any]) -> list[Any]:
    return [[astuple(job.some[0]), job.window, astuple(found)] for job, found in known.items() if job.kind == "measure"]


def _from_rows(rows: Sequence[Any]) -> dict[Job, Any]:
    known = {}
    for of, window, trial in rows:
        candidate = replace(Candidate(*of), protected=tuple(of[-1]))
        known[Job("measure", (candidate,), window)] = Trial(*trial)
    return known


def model_name(model: Module | str | Path, executor: Executor | None) -> str:
    """What workers load, or, of a model that is here, what people read.

    Raises
    ------
    InputError : the model is loaded, and there is an executor.
    """
    if not isinstance(model, str | Path):
        if executor is not None:
            raise InputError(
                "A loaded model was given beside an executor, whose workers load it for themselves: give its name or "
                "path, as for vl.load."
            )
        return name_of(model)
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else str(model)


def bench(job: Trials, model: Module | str | Path, tokenizer: Any) -> Bench:  # noqa: ANN401
    """What does the jobs in this process; raises `InputError` for a loaded model without a tokenizer."""
    if isinstance(model, str | Path):
        return Bench(job, *load(model))
    if tokenizer is None:
        raise InputError("The model's tokenizer is missing: give both, as vl.load gives them.")
    return Bench(job, model, tokenizer)
