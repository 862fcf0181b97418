"""Measurements of a search as jobs that any process can do: it loads the model by name, and keeps it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from mlx.nn.layers.base import Module

from veloxlab.allocate.search.candidates import Candidate, PlannedModel, bytes_per_token
from veloxlab.cache.calibration import Calibration
from veloxlab.codecs import METHODS
from veloxlab.measure.activations import stretches
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.quality import Mode, Reference, evaluate
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.models.loading import load
from veloxlab.store import digest


@dataclass(frozen=True)
class Trials:
    """What all jobs of a search share, as arguments of `search`; words and numbers only, to travel to any process.

    ``widths`` are the code widths to fit, for each method that has to be calibrated.
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
    """What one candidate did on one window."""

    kl: float  # mean KL(exact ‖ compressed) of the next token, nats
    top1_flips: float  # share of predictions whose most likely token changed
    seconds: float  # without the exact run and the calibration


@dataclass(frozen=True)
class Weighed:
    """Bytes per token of some candidates of one method, and what a search has to know of the model.

    ``identity`` is the checksum of all that trials depend on: weights, text, and versions of the methods.
    """

    nbytes: tuple[float, ...]
    calibration: str | None
    shape: PlannedModel
    identity: str


@dataclass(frozen=True)
class Job:
    """Count the bytes of ``some`` candidates of one method, a `Weighed`; or run the only one on a window, a `Trial`."""

    some: tuple[Candidate, ...]
    window: int | None = None

    def __str__(self) -> str:
        """For progress and messages."""
        if self.window is None:
            return f"counting bytes of {self.some[0].method}"
        return f"window {self.window + 1}: {self.some[0].name}"


@dataclass(eq=False)
class Bench:
    """A model that is loaded, the text as windows of tokens, and the exact run of the window that is measured."""

    trials: Trials
    model: Module
    tokenizer: Any
    _exact: dict[int, Reference] = field(default_factory=dict, repr=False)
    _fitted: dict[str, Calibration] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._windows = stretches(self.tokenizer, self.trials.text, self.trials.tokens, self.trials.windows)
        self._shape = PlannedModel.of(self.model)

    def do(self, job: Job) -> Weighed | Trial:
        """Do a job of either kind."""
        return self.weigh(job.some) if job.window is None else self.measure(job.some[0], job.window)

    def weigh(self, some: Sequence[Candidate]) -> Weighed:
        """Count the bytes of candidates of one method, which is calibrated first if need be."""
        fitted = self._calibration(some[0].method)
        calibration = None if fitted is None else fitted.identity
        plans = [candidate.plan(self._shape, calibration) for candidate in some]
        nbytes = tuple(bytes_per_token(self.model, plan, self.trials.context, fitted) for plan in plans)
        return Weighed(nbytes, calibration, self._shape, self._identity)

    def measure(self, candidate: Candidate, window: int) -> Trial:
        """Evaluate a candidate on a window, every token seen as the cache holds it."""
        if window not in self._exact:  # one at a time: a window's log-probabilities are tens of megabytes
            self._exact = {window: Reference.of(self.model, [self._windows[window]])}
        given: Any = {"mode": self.trials.mode, "prompt": self.trials.prompt}
        plan, fitted = candidate.plan(self._shape), self._calibration(candidate.method)
        start = time.perf_counter()
        row = evaluate(self._exact[window], plan, calibration=fitted, **given).row(0, named=True)
        return Trial(row["kl_mean"], row["top1_flips"], time.perf_counter() - start)

    @cached_property
    def _identity(self) -> str:
        versions = {method.id: method.version for method in METHODS.values()}
        return digest([versions, fingerprint(self.model), self._windows])

    def _calibration(self, method: str) -> Calibration | None:
        widths = dict(self.trials.widths).get(method)
        if widths is not None and method not in self._fitted:
            self._fitted[method] = calibrate(self.model, self.tokenizer, method, bits=widths, folder=self.trials.folder)
        return self._fitted.get(method)


_one_at_a_time = threading.Lock()  # a worker may have threads, and there is one model and one window


def do_in_worker(trials: Trials, job: Job) -> Weighed | Trial:
    """`Bench.do` in a process that has loaded nothing yet, or has kept what it loaded."""
    with _one_at_a_time:
        return _kept_bench(trials).do(job)


@lru_cache(maxsize=1)
def _kept_bench(trials: Trials) -> Bench:
    return Bench(trials, *_loaded(trials.model))


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Module, Any]:
    return load(name)
