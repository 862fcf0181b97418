"""One runner for experiments: jobs, such as settings of a cache on windows of text, that are each measured once.

Jobs run in this process or in the workers of any executor, and results can be kept in a file from which a run that was
stopped goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from veloxlab.errors import InputError
from veloxlab.progress import Progress, in_words, silent
from veloxlab.store import Unfinished

J = TypeVar("J", bound=Hashable)
R = TypeVar("R")


@dataclass(eq=False)
class Workers:
    """Does jobs in this process, or in those of an executor. To be closed in the end.

    If a process of the executor dies, one new process does the jobs that are left.
    """

    executor: Executor | None = None
    _spare: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """End the process that was started in the place of a dead one, if there is one."""
        if self._spare is not None:
            self._spare.shutdown(cancel_futures=True)

    def results(
        self, work: Callable[[J], R], jobs: Sequence[J], name: Callable[[J], str] = str
    ) -> Generator[tuple[J, R]]:
        """Give each job and its result, as it is done; ``work`` is a function that can be sent to a process.

        Raises
        ------
        InputError : the new process died too. It does one job at a time, and the sentence gives the job's ``name``.
        """
        left = list(dict.fromkeys(jobs))
        while left:
            try:
                with closing(self._tried(work, tuple(left))) as done:
                    for job, result in done:
                        left.remove(job)
                        yield job, result
            except BrokenExecutor as error:
                self._replace_executor(error, name(left[0]))

    def _tried(self, work: Callable[[J], R], jobs: Sequence[J]) -> Generator[tuple[J, R]]:
        """As `results`; if the executor breaks, that is raised after the jobs that it finished were given."""
        if self.executor is None:
            yield from ((job, work(job)) for job in jobs)
            return
        futures: dict[Future[R], J] = {}
        broken: BrokenExecutor | None = None
        try:
            for job in jobs:
                futures[self.executor.submit(work, job)] = job
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenExecutor as error:
                    broken = error
                else:
                    yield futures[future], result
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
            stacklevel=2,
        )
        self._spare = self.executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # a fork loses threads


@dataclass(frozen=True)
class LeftOut:
    """In the place of a result: why a job has none, in one line."""

    reason: str


@dataclass(eq=False)
class Experiment(Generic[J, R]):
    """Measures jobs, and knows the results of all that it has measured.

    Attributes
    ----------
    measure : does one job: with an executor, a function of a module or a `functools.partial` of one.
    name : a job in words, for ``progress`` and messages.
    workers : where jobs are done.
    progress : told before the first job and after each; what it raises ends the run and cancels jobs that wait.
    known : results by job.
    """

    measure: Callable[[J], R]
    name: Callable[[J], str] = str
    workers: Workers = field(default_factory=Workers)
    progress: Progress = silent
    known: dict[J, R] = field(default_factory=dict)
    _keep: Callable[[], object] = field(default=lambda: None, repr=False)

    def go_on(
        self,
        unfinished: Unfinished,
        to_rows: Callable[[Mapping[J, R]], Any],
        from_rows: Callable[[Any], Mapping[J, R]],
    ) -> None:
        """Take over the results in a file, and keep there what is measured from now on.

        ``to_rows`` makes JSON of all results, and ``from_rows`` is its inverse.
        """
        rows = unfinished.read()
        if rows is not None:
            self.known |= from_rows(rows)
        self._keep = lambda: unfinished.put(to_rows(self.known))

    def run(self, jobs: Sequence[J], *, done: int = 0, total: int | None = None) -> Iterator[tuple[J, R]]:
        """Give each job and its result, known ones first.

        ``done`` of ``total`` jobs came before these, for ``progress``.
        """
        yield from self._run(self.measure, jobs, done, total)  # type: ignore[misc]  # none is left out

    def run_possible(self, jobs: Sequence[J]) -> Iterator[tuple[J, R | LeftOut]]:
        """As `run`, but a job that fails in any way is left out."""
        yield from self._run(partial(_result_or_reason, self.measure), jobs, 0, None)

    def _run(
        self, work: Callable[[J], R | LeftOut], jobs: Sequence[J], done: int, total: int | None
    ) -> Iterator[tuple[J, R | LeftOut]]:
        jobs = tuple(dict.fromkeys(jobs))
        new = [job for job in jobs if job not in self.known]
        total = done + len(jobs) if total is None else total
        for job in jobs:
            if job in self.known:
                done += 1
                yield job, self.known[job]
        labels = iter([*map(self.name, new), "done"])
        self.progress(done, total, next(labels))
        with closing(self.workers.results(work, new, self.name)) as results:
            for job, result in results:
                if isinstance(result, LeftOut):
                    self.progress(done, total, f"{self.name(job)} is left out: {result.reason}")
                else:
                    self.known[job] = result
                    self._keep()
                done += 1
                yield job, result
                self.progress(done, total, next(labels))


def _result_or_reason(measure: Callable[[J], R], job: J) -> R | LeftOut:
    try:
        return measure(job)
    except Exception as error:  # noqa: BLE001 - a method, a model or mlx-lm may refuse in any way
        return LeftOut(in_words(error))
