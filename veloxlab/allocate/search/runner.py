"""One candidate on one window of text, as a job that any process can do: it loads the model by name, and keeps it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from mlx.nn.layers.base import Module

from veloxlab.allocate.search.candidates import Candidate, PlannedModel, bytes_per_token
from veloxlab.cache.calibration import Calibration
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure.activations import stretches
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.quality import Mode, Reference, judge
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
    text : what candidates are judged on; None is the shipped WikiText-2 test excerpt.
    tokens, windows : length and number of its stretches.
    mode, prompt : as for `veloxlab.judge`.
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


@dataclass(eq=False)
class Bench:
    """A model that is here, the text as windows of tokens, and the exact run of the window that is being judged."""

    trials: Trials
    model: Module
    tokenizer: Any
    _exact: dict[int, Reference] = field(default_factory=dict, repr=False)
    _fitted: dict[str, Calibration] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._windows = stretches(self.tokenizer, self.trials.text, self.trials.tokens, self.trials.windows)

    def shape(self) -> PlannedModel:
        """Of the model."""
        return self._shape

    def identity(self) -> str:
        """Checksum of model, text and versions of methods, but for what is calibrated."""
        versions = {method.id: method.version for method in METHODS.values()}
        return digest([versions, fingerprint(self.model), self._windows])

    @cached_property
    def _shape(self) -> PlannedModel:
        return PlannedModel.of(self.model)

    def weigh(self, some: Sequence[Candidate]) -> Weighed:
        """Count the bytes of candidates of one method, which is calibrated first if need be."""
        shape, fitted = self.shape(), self._calibration(some[0].method)
        identity = None if fitted is None else fitted.identity
        held = [bytes_per_token(self.model, c.plan(shape, identity), self.trials.context, fitted) for c in some]
        return Weighed(tuple(held), identity)

    def measure(self, candidate: Candidate, window: int) -> Trial:
        """Judge a candidate on a window, every token seen as the cache holds it."""
        exact, plan = self._reference(window), candidate.plan(self.shape())
        fitted = self._calibration(candidate.method)
        start = time.perf_counter()
        row = judge(exact, plan, mode=self.trials.mode, prompt=self.trials.prompt, calibration=fitted).row(
            0, named=True
        )
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


# jobs -----------------------------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()  # a worker may have threads, and there is one model and one window


def shape(trials: Trials) -> PlannedModel:
    """`Bench.shape`, in a worker."""
    with _one_at_a_time:
        return _bench(trials).shape()


def identity(trials: Trials) -> str:
    """`Bench.identity`, in a worker."""
    with _one_at_a_time:
        return _bench(trials).identity()


def weigh(trials: Trials, some: Sequence[Candidate]) -> Weighed:
    """`Bench.weigh`, in a worker."""
    with _one_at_a_time:
        return _bench(trials).weigh(some)


def measure(trials: Trials, candidate: Candidate, window: int) -> Trial:
    """`Bench.measure`, in a worker."""
    with _one_at_a_time:
        return _bench(trials).measure(candidate, window)


@lru_cache(maxsize=1)
def _bench(trials: Trials) -> Bench:
    return Bench(trials, *_loaded(trials.model))


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Module, Any]:
    return load(name)


Kind = Literal["shape", "identity", "weigh", "measure"]
_JOBS: dict[Kind, Callable[..., Any]] = {"shape": shape, "identity": identity, "weigh": weigh, "measure": measure}


@dataclass(eq=False)
class Crew:
    """Does jobs, tells of them, and gives results in the order that they were asked for.

    If a process of the executor dies, one new process does what is left. To be closed in the end.

    Attributes
    ----------
    trials : what all jobs share.
    worker : the executor, or what does the jobs here.
    progress : told of each job; what it raises cancels those that wait.
    """

    trials: Trials
    worker: Executor | Bench
    progress: Progress
    _measured: int = 0
    _spare: ProcessPoolExecutor | None = None
    _unfinished: Unfinished | None = None
    _known: dict[tuple[Candidate, int], Trial] = field(default_factory=dict)

    def close(self) -> None:
        """End the process that was started in the place of dead ones, if there is one."""
        if self._spare is not None:
            self._spare.shutdown(cancel_futures=True)

    def shape(self) -> PlannedModel:
        """Of the model."""
        self.progress(0, 1, "loading the model")
        found: PlannedModel
        ((_, found),) = self._results("shape", [()])
        return found

    def identity(self) -> str:
        """Of the model and the text, as `Bench.identity`."""
        found: str
        ((_, found),) = self._results("identity", [()])
        return found

    def go_on(self, unfinished: Unfinished) -> None:
        """Take over what was measured before, and keep there what is measured from now on."""
        self._unfinished = unfinished
        for known, window, trial in unfinished.read() or ():
            candidate = replace(Candidate(*known), protected=tuple(known[-1]))
            self._known[candidate, window] = Trial(*trial)

    def weigh(self, some: Sequence[Candidate]) -> tuple[list[float], dict[str, str]]:
        """Bytes per token of each candidate, and identities of the calibrations of methods that have one."""
        methods = list(dict.fromkeys(c.method for c in some))
        by_method = [[c for c in some if c.method == method] for method in methods]
        held: dict[Candidate, float] = {}
        identities: dict[str, str] = {}
        self.progress(0, len(methods), "counting bytes, calibrating")
        weighed: Weighed
        for done, (i, weighed) in enumerate(self._results("weigh", [(own,) for own in by_method]), start=1):
            held |= dict(zip(by_method[i], weighed.bytes_per_token, strict=True))
            if weighed.calibration is not None:
                identities[methods[i]] = weighed.calibration
            self.progress(done, len(methods), f"{methods[i]}: bytes counted")
        return [held[c] for c in some], {m: identities[m] for m in methods if m in identities}

    def measure(self, some: Sequence[Candidate], window: int) -> list[Trial]:
        """What each candidate does on a window."""
        windows = self.trials.windows
        most = self._measured + len(some) * (windows - window)  # fewer if some are dropped
        self.progress(self._measured, most, f"window {window + 1} of {windows}")
        left = [(c, window) for c in some if (c, window) not in self._known]
        self._measured += len(some) - len(left)
        for i, trial in self._results("measure", left):
            self._known[left[i]] = trial
            if self._unfinished is not None:
                self._unfinished.put([[astuple(c), w, astuple(known)] for (c, w), known in self._known.items()])
            self._measured += 1
            self.progress(self._measured, most, f"window {window + 1} of {windows}: {left[i][0].name}")
        return [self._known[c, window] for c in some]

    def _results(self, kind: Kind, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Number and result of each job, as it is done."""
        left = dict(enumerate(jobs))
        while left:
            try:
                for i, result in self._tried(kind, dict(left)):
                    del left[i]
                    yield i, result
            except BrokenExecutor as error:
                self._replace_worker(error, kind, next(iter(left.values())))

    def _tried(self, kind: Kind, jobs: Mapping[int, tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """As `_results`; if the executor breaks that is raised once the jobs that it finished are given."""
        if isinstance(self.worker, Bench):
            do = getattr(self.worker, kind)
            yield from ((i, do(*job)) for i, job in jobs.items())
            return
        futures: dict[Future[Any], int] = {}
        broken: BrokenExecutor | None = None
        try:
            for i, job in jobs.items():
                futures[self.worker.submit(_JOBS[kind], self.trials, *job)] = i
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenExecutor as error:
                    broken = error
                else:
                    yield futures[future], result
        finally:  # whoever reads this may stop at any time
            for future in futures:
                future.cancel()
        if broken is not None:
            raise broken

    def _replace_worker(self, error: BrokenExecutor, kind: Kind, job: tuple[Any, ...]) -> None:
        """Start a process for the jobs that are left, of which ``job`` is the first.

        Raises
        ------
        InputError : such a process died too. It does one job at a time, so it died of this one.
        """
        if self._spare is not None:
            raise InputError(
                f"A worker process died again, alone and while it was {_doing(kind, job)}: leave that out, or look for "
                "what ended it, such as too little memory. The same search then goes on with what was measured."
            ) from error
        warnings.warn(
            "A worker process of this search died, perhaps for want of memory, and its executor takes no more jobs. "
            "What was measured is kept, and one new process does the rest.",
            stacklevel=2,
        )
        # spawned, not forked: MLX has threads
        self._spare = self.worker = ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _doing(kind: Kind, job: tuple[Any, ...]) -> str:
    """A job in words."""
    if kind == "measure":
        return f"measuring {job[0].name}"
    return f"weighing {job[0][0].method}" if kind == "weigh" else "loading the model"


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
