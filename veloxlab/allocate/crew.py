"""Who does the jobs of a search: this process with the model that is here, or the workers of an executor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from mlx.nn.layers.base import Module

from veloxlab.allocate import trials
from veloxlab.allocate.candidates import Candidate, PlannedModel
from veloxlab.allocate.trials import Bench, Trial, Trials, Weighed
from veloxlab.errors import InputError
from veloxlab.integrate import name_of
from veloxlab.measure.progress import Progress
from veloxlab.models import load
from veloxlab.store import Unfinished

Kind = Literal["shape", "identity", "weigh", "measure"]


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
                futures[self.worker.submit(getattr(trials, kind), self.trials, *job)] = i
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
