"""Jobs that are measured once, here or in an executor's processes; jobs that may fail; how sure a mean of few is."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from veloxlab.errors import InputError
from veloxlab.progress import OnRows, Progress, in_words, silent
from veloxlab.store import Unfinished

J = TypeVar("J", bound=Hashable)
R = TypeVar("R")


@dataclass(eq=False)
class Experiment(Generic[J, R]):
    """Measures jobs, and knows the results of all that it measured, which a file can keep. Close it at the end.

    If a process of the executor dies, one new process does the jobs that are left. ``progress`` is told before the
    first job and after each; what it raises ends the run and cancels waiting jobs.
    """

    measure: Callable[[J], R]  # does one job; with an executor, a function that can be sent to a process
    name: Callable[[J], str] = str  # a job in words, for progress and messages
    executor: Executor | None = None  # where jobs are done; None for this process
    progress: Progress = silent
    known: dict[J, R] = field(default_factory=dict)  # results
    _keep: Callable[[], object] = field(default=lambda: None, repr=False)
    _spare: ProcessPoolExecutor | None = field(default=None, repr=False)

    def close(self) -> None:
        """End the process that replaced a dead one, if there is one."""
        if self._spare is not None:
            self._spare.shutdown(cancel_futures=True)

    def go_on(
        self,
        unfinished: Unfinished,
        to_rows: Callable[[Mapping[J, R]], Any],
        from_rows: Callable[[Any], Mapping[J, R]],
    ) -> None:
        """Take over the results in a file, and keep there, as JSON by ``to_rows``, what is measured from now on."""
        rows = unfinished.read()
        if rows is not None:
            self.known |= from_rows(rows)
        self._keep = lambda: unfinished.put(to_rows(self.known))

    def run(self, jobs: Sequence[J], *, done: int = 0, total: int | None = None) -> Iterator[tuple[J, R]]:
        """Give each job and its result, known ones first; ``done`` of ``total`` jobs came before, for ``progress``.

        Raises `InputError` that names the job if the new process died too: it does one job at a time.
        """
        jobs = tuple(dict.fromkeys(jobs))
        known = [(job, self.known[job]) for job in jobs if job in self.known]
        left = [job for job in jobs if job not in self.known]
        total = done + len(jobs) if total is None else total
        done += len(known)
        labels = iter([*map(self.name, left), "done"])
        yield from known
        self.progress(done, total, next(labels))
        while left:
            try:
                with closing(self._results(left)) as results:
                    for job, result in results:
                        left.remove(job)
                        self.known[job] = result
                        self._keep()
                        done += 1
                        yield job, result
                        self.progress(done, total, next(labels))
            except BrokenExecutor as error:
                self._replace_executor(error, self.name(left[0]))

    def _results(self, jobs: Sequence[J]) -> Generator[tuple[J, R]]:
        """Give each job and its result as it is done; of a broken executor, first what it finished, then the error."""
        if self.executor is None:
            yield from ((job, self.measure(job)) for job in tuple(jobs))
            return
        futures: dict[Future[R], J] = {}
        broken: BaseException | None = None
        try:
            for job in jobs:
                futures[self.executor.submit(self.measure, job)] = job
            for future in as_completed(futures):
                if isinstance(failed := future.exception(), BrokenExecutor):
                    broken = failed
                else:
                    yield futures[future], future.result()
        finally:  # the reader may stop at any time
            for future in futures:
                future.cancel()
        if broken is not None:
            raise broken

    def _replace_executor(self, error: BrokenExecutor, doing: str) -> None:
        if self._spare is not None:
            raise InputError(
                f"A worker process died again, alone and while it was at this job: {doing}. Leave that out, or look "
                "for what ended it, such as too little memory. The same run then goes on with what was measured."
            ) from error
        warnings.warn(
            "A worker process died, perhaps for want of memory, and its executor takes no more jobs. What was measured "
            "is kept, and one new process does the rest.",
            stacklevel=3,
        )
        self._spare = self.executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # a fork loses threads


class Attempt(NamedTuple):
    """Measures rows of one cache, at some length if ``at`` says so; it may fail."""

    cache: str
    measure: Callable[[], pl.DataFrame]
    at: str = ""


def possible_rows(
    attempts: Iterable[Attempt], total: int, schema: Mapping[str, Any], progress: Progress, on_rows: OnRows
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Rows of the ``total`` attempts that succeed, and why each cache that failed was left out from there on."""
    frames = [pl.DataFrame(schema=schema)]
    left_out: dict[str, str] = {}
    for i, (cache, measure, at) in enumerate(attempts):
        if cache in left_out:
            continue
        label = f"{cache} at {at}" if at else cache
        progress(i, total, label)
        try:
            frames.append(measure())
        except Exception as error:  # noqa: BLE001 - a method, a model, mlx-lm or MLX may refuse in any way
            reason = in_words(error)
            left_out[cache] = f"from {at} on: {reason}" if at else reason
            progress(i, total, f"{label} is left out: {reason}")
        on_rows(pl.concat(frames), left_out)
    progress(total, total, "done")
    return pl.concat(frames), left_out


@functools.cache
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with ``freedom`` degrees, for a ``probability`` from ½ to below 1; to about 1e-6.

    With t = √ν·tan θ the density is proportional to cos^(ν−1) θ, which is integrated by the trapezoid rule.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        said = f"Student's t has no quantile at a probability of {probability} with {freedom} degrees of freedom"
        raise InputError(f"{said}: take from 0.5 to below 1, and 1 degree or more.")
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * probability - 1) * below[-1], below, angles)))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the ends of its two-sided t interval; for paired comparisons give the differences."""
    numbers = np.asarray(values, np.float64)
    low, mean = float(lower_ends(numbers, confidence)), float(numbers.mean())
    return mean, low, 2 * mean - low


def lower_ends(values: NDArray[np.float64], confidence: float = 0.95) -> NDArray[np.float64]:
    """Lower ends ``[...]`` of t intervals of the means over ``values`` ``[..., N]``; `InputError` below two values."""
    count = values.shape[-1]
    if count < 2:
        raise InputError(f"An interval takes two values or more, and there are {count}: measure more windows.")
    half = student_quantile((1 + confidence) / 2, count - 1) * values.std(axis=-1, ddof=1) / math.sqrt(count)
    return np.asarray(values.mean(axis=-1) - half)
