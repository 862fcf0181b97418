"""One candidate on one window of text, as a job that any process can do: it loads the model by name, and keeps it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from mlx.nn.layers.base import Module

from veloxlab.allocate.candidates import Candidate, PlannedModel, bytes_per_token
from veloxlab.calibrating import calibrate
from veloxlab.calibration import Calibration
from veloxlab.codecs import METHODS
from veloxlab.identity import fingerprint
from veloxlab.measure.activations import stretches
from veloxlab.measure.quality import Mode, Reference, judge
from veloxlab.models import load
from veloxlab.store import digest


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
