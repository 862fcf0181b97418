"""Who does the jobs of a search: this process with the model that is here, or the workers of an executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx.nn.layers.base import Module

from veloxlab.allocate import trials
from veloxlab.allocate.candidates import Candidate, PlannedModel
from veloxlab.allocate.trials import Bench, Trial, Trials, Weighed
from veloxlab.errors import InputError
from veloxlab.identity import name_of
from veloxlab.measure.progress import Progress
from veloxlab.models import load

Kind = Literal["shape", "weigh", "measure"]


@dataclass(eq=False)
class Crew:
    """Does jobs, tells of them, and gives results in the order that they were asked for.

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

    def shape(self) -> PlannedModel:
        """Of the model."""
        self.progress(0, 1, "loading the model")
        found: PlannedModel
        ((_, found),) = self._results("shape", [()])
        return found

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
        found: dict[int, Trial] = {}
        for i, trial in self._results("measure", [(c, window) for c in some]):
            found[i] = trial
            self._measured += 1
            self.progress(self._measured, most, f"window {window + 1} of {windows}: {some[i].name}")
        return [found[i] for i in range(len(some))]

    def _results(self, kind: Kind, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Number and result of each job, as it is done."""
        if isinstance(self.worker, Bench):
            do = getattr(self.worker, kind)
            yield from ((i, do(*job)) for i, job in enumerate(jobs))
            return
        futures = {self.worker.submit(getattr(trials, kind), self.trials, *job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # whoever reads this may stop at any time
            for future in futures:
                future.cancel()


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
