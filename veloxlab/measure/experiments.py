"""Jobs that run once, here or in an executor's processes; jobs that may fail; and intervals of means."""

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
    """Runs jobs, and keeps all results, which a file can store. Close it at the end.

    If a process of the executor dies, one new process does the remaining jobs. ``progress`` is called before the first
    job and after each; an exception from it ends the run and cancels waiting jobs.
    """

    measure: Callable[[J], R]  # does one job; an executor needs a function that can be pickled
    name: Callable[[J], str] = str  # a job in words, for progress and messages
    executor: Executor | None = None  # runs the jobs; None for this process
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
        """Load the results in a file, and save later results there, as JSON made by ``to_rows``."""
        rows = unfinished.read()
        if rows is not None:
            self.known |= from_rows(rows)
        self._keep = lambda: unfinished.put(to_rows(self.known))

    def run(self, jobs: Sequence[J], *, done: int = 0, total: int | None = None) -> Iterator[tuple[J, R]]:
        """Yield each job and its result, known ones first; ``done`` of ``total`` jobs came before, for ``progress``.

        Raises `InputError` with the job's name if the new process dies too; it does one job at a time.
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
        """Yield each job and its result when it ends; of a broken executor, first its finished jobs, then the error."""
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
        finally:  # the caller may stop at any time
            for future in futures:
                future.cancel()
        if broken is not None:
            raise broken

    def _replace_executor(self, error: BrokenExecutor, doing: str) -> None:
        if self._spare is not None:
            raise InputError(
                f"A worker process died again, with only this job: {doing}. Leave that out, or find "
                "the cause, such as too little memory. The same run then continues from what was measured."
            ) from error
        warnings.warn(
            "A worker process died, perhaps for lack of memory, and its executor takes no more jobs. All results "
            "are kept, and one new process does the rest.",
            stacklevel=3,
        )
        self._spare = self.executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # a fork has no threads


class Attempt(NamedTuple):
    """Measures rows of one cache, at a length that ``at`` names, if any; it may fail."""

    cache: str
    measure: Callable[[], pl.DataFrame]
    at: str = ""


def possible_rows(
    attempts: Iterable[Attempt], total: int, schema: Mapping[str, Any], progress: Progress, on_rows: OnRows
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return the rows of the ``total`` attempts that succeed, and the reason for each cache that is left out."""
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
    """Return the quantile of Student's t with ``freedom`` degrees at a ``probability`` from ½ to below 1; error 1e-6.

    With t = √ν·tan θ the density is proportional to cos^(ν−1) θ; the trapezoid rule integrates it.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        said = f"Student's t has no quantile at a probability of {probability} with {freedom} degrees of freedom"
        raise InputError(f"{said}: take from 0.5 to below 1, and 1 degree or more.")
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * probability - 1) * below[-1], below, angles)))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and the ends of its two-sided t interval; for paired comparisons, pass the differences."""
    numbers = np.asarray(values, np.float64)
    low, mean = float(lower_ends(numbers, confidence)), float(numbers.mean())
    return mean, low, 2 * mean - low


def lower_ends(values: NDArray[np.float64], confidence: float = 0.95) -> NDArray[np.float64]:
    """Return lower ends ``[...]`` of t intervals of means over ``values`` ``[..., N]``; `InputError` for one value."""
    count = values.shape[-1]
    if count < 2:
        raise InputError(f"An interval takes two values or more, and there are {count}: measure more windows.")
    half = student_quantile((1 + confidence) / 2, count - 1) * values.std(axis=-1, ddof=1) / math.sqrt(count)
    return np.asarray(values.mean(axis=-1) - half)
