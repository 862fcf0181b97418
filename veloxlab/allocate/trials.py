"""The candidates of a search, and its measurements as jobs for any process, which loads the model by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import PlannedModel, layer_sizes
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.counts import Windows
from veloxlab.cache.make import make_cache
from veloxlab.cache.plan import LayerSettings, Plan
from veloxlab.checks import number_of_bits
from veloxlab.codecs import METHODS, find_method
from veloxlab.errors import InputError
from veloxlab.measure.activations import stretches
from veloxlab.measure.calibrate import calibrate
from veloxlab.measure.memory import report
from veloxlab.measure.quality import Mode, Reference, fidelity_to
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.mlxlm.probe import slots_of
from veloxlab.models.loading import load
from veloxlab.store import digest
from veloxlab.texts import Tokenizer

USUAL_BITS = (2, 3, 4)


@dataclass(frozen=True)
class Candidate:
    """One way to make a whole cache.

    ``sinks`` and ``window`` are the tokens kept exact at the start and at the end; ``protected`` layers are not
    compressed, and negative numbers count from the last.
    """

    method: str
    key_bits: float
    value_bits: float
    sinks: int = 4
    window: int = 0
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "protected", tuple(self.protected))  # in files it is a list
        for name in ("key_bits", "value_bits"):  # and there all widths are of one type
            object.__setattr__(self, name, number_of_bits(getattr(self, name)))

    @property
    def name(self) -> str:
        """The name in messages and tables."""
        said = f"{self.method} K{self.key_bits} V{self.value_bits}, {self.sinks} sinks, window {self.window}"
        if self.protected:
            *first, last = map(str, self.protected)
            said += f", exact layers {', '.join(first)} and {last}" if first else f", exact layer {last}"
        return said

    def within(self, shape: PlannedModel) -> Candidate:
        """The same with layers counted from 0, in their order; raises `InputError` if there is no such layer."""
        n = shape.entries
        if wrong := [layer for layer in self.protected if not -n <= layer < n]:
            raise InputError(f"There is no layer {wrong[0]} to protect: {shape.model} has layers 0 to {n - 1}.")
        return replace(self, protected=tuple(sorted({layer % n for layer in self.protected})))

    def plan(self, shape: PlannedModel, calibration: str | None = None) -> Plan:
        """The plan for a model; ``calibration`` is the identity of the calibration of its codecs."""
        coded = LayerSettings(self.method, self.key_bits, self.method, self.value_bits)
        layers = dict.fromkeys({*range(shape.entries)} - {*self.within(shape).protected}, coded)
        fitted = {} if calibration is None else {self.method: calibration}
        return shape.plan(layers, self.sinks, self.window, name=self.name, calibrations=fitted)


def candidates(
    methods: Sequence[str] | None = None,
    key_bits: Sequence[float] = USUAL_BITS,
    value_bits: Sequence[float] = USUAL_BITS,
    sinks: Sequence[int] = (4,),
    window: Sequence[int] = (0,),
    protected: Sequence[Sequence[int]] = ((),),
) -> tuple[Candidate, ...]:
    """All combinations, sorted by method. Each method is tried at those of the widths that it has.

    By default the methods are those that need no calibration, but for RateQuant, which at one width is TurboQuant.
    Raises `InputError` for an unknown method, or one that has none of the widths.
    """
    usual = [m.id for m in METHODS.values() if not (m.calibrated or m.per_head or m.id == "none")]
    found: list[Candidate] = []
    for name in dict.fromkeys(usual if methods is None else methods):
        takes = find_method(name).takes
        keys, values = ([b for b in widths if takes(b)] for widths in (key_bits, value_bits))
        if not (keys and values):
            which, widths = ("value_bits", value_bits) if keys else ("key_bits", key_bits)
            raise InputError(f"{name} has none of the widths {sorted(widths)} of {which}: vl.methods() lists its own.")
        combined = product(protected, sinks, window, keys, values)
        found += [Candidate(name, k, v, s, w, tuple(p)) for p, s, w, k, v in combined]
    return tuple(dict.fromkeys(found))


def bytes_per_token(model: Module, plan: Plan, context: int, calibration: Calibration | None = None) -> float:
    """Held bytes of a cache of ``plan`` after a text of ``context`` tokens, read in one call, for each token.

    Exact tokens, scales and shared tables are counted. Layers without plain keys and values are not. The result is
    that of `veloxlab.report`, or a little more for sliding layers.
    """
    cache = make_cache(model, plan, calibration=calibration)
    layers = [slot for slot in slots_of(cache) if hasattr(slot, "key_codec")]
    total = float(report(cache).filter(path="shared")["held_bytes"].sum())
    for size, slot in zip(layer_sizes(model), layers, strict=True):
        held = Windows.of_layer(size, plan.sinks, plan.window).most_held(context, decoded=False)
        coded = sum(codec.bits_per_value * codec.head_dim / 8 for codec in (slot.key_codec, slot.value_codec))
        total += held.exact * size.exact_bytes + held.packed * size.kv_heads * coded
    return total / context


@dataclass(frozen=True)
class Trials:
    """The candidates ``asked`` of a `search`, and its other arguments, in a form that any process can receive."""

    model: str
    text: str | None
    tokens: int
    windows: int
    mode: Mode
    prompt: int
    context: int
    asked: tuple[Candidate, ...] = ()
    folder: str | None = None
    most_bytes_per_token: float | None = None
    most_kl: float | None = None
    confidence: float = 0.95


class Trial(NamedTuple):
    """The result of one candidate on one window."""

    kl: float  # mean KL(exact ‖ compressed) of the next token, nats
    top1_flips: float  # share of predictions whose most likely token changed
    seconds: float  # without the exact run and the calibration


class Weighed(NamedTuple):
    """Bytes per token of candidates, with layers counted from 0, and the facts of the model that a search needs.

    ``calibrations`` are identities, by method; ``identity`` is the checksum of all that trials depend on: weights,
    text, and versions of the methods.
    """

    nbytes: dict[Candidate, float]
    calibrations: dict[str, str]
    shape: PlannedModel
    identity: str


class Job(NamedTuple):
    """Count the bytes of ``some`` candidates of one method, a `Weighed`; or run the only one on a window, a `Trial`."""

    some: tuple[Candidate, ...]
    window: int | None = None

    def __str__(self) -> str:
        if self.window is None:
            return f"counting bytes of {self.some[0].method}"
        return f"window {self.window + 1}: {self.some[0].name}"


class Bench:
    """A model that is loaded, the text as windows of tokens, and the exact run of the window that is measured."""

    def __init__(self, trials: Trials, model: Module, tokenizer: Tokenizer) -> None:
        self.trials, self.model, self.tokenizer = trials, model, tokenizer
        self._windows = stretches(tokenizer, trials.text, trials.tokens, trials.windows)
        self._shape = PlannedModel.of(model)
        self._exact: dict[int, Reference] = {}
        self._fitted: dict[str, Calibration] = {}

    def do(self, job: Job) -> Weighed | Trial:
        """Do a job of either kind."""
        return self.weigh(job.some) if job.window is None else self.measure(job.some[0], job.window)

    def weigh(self, some: Sequence[Candidate]) -> Weighed:
        """Count the bytes of candidates of one method, which is calibrated first if need be."""
        fitted = self._calibration(some[0].method)
        nbytes = {
            c.within(self._shape): bytes_per_token(self.model, c.plan(self._shape), self.trials.context, fitted)
            for c in some
        }
        calibrations = {} if fitted is None else {fitted.method: fitted.identity}
        versions = {method.id: method.version for method in METHODS.values()}
        return Weighed(nbytes, calibrations, self._shape, digest([versions, fingerprint(self.model), self._windows]))

    def measure(self, candidate: Candidate, window: int) -> Trial:
        """Evaluate a candidate on a window, where every token is read as the cache holds it."""
        if window not in self._exact:  # one at a time: a window's log-probabilities are tens of megabytes
            self._exact = {window: Reference.of(self.model, [self._windows[window]])}
        given: Any = {"mode": self.trials.mode, "prompt": self.trials.prompt}
        plan, fitted = candidate.plan(self._shape), self._calibration(candidate.method)
        start = time.perf_counter()
        row = fidelity_to(self._exact[window], plan, calibration=fitted, **given).row(0, named=True)
        return Trial(row["kl_mean"], row["top1_flips"], time.perf_counter() - start)

    def _calibration(self, method: str) -> Calibration | None:
        if find_method(method).calibrated and method not in self._fitted:
            widths = {bits for c in self.trials.asked if c.method == method for bits in (c.key_bits, c.value_bits)}
            given: dict[str, Any] = {"bits": sorted(widths), "folder": self.trials.folder}
            self._fitted[method] = calibrate(self.model, self.tokenizer, method, **given)
        return self._fitted.get(method)


def doer(
    trials: Trials, model: Module | str | Path, tokenizer: object, executor: Executor | None
) -> Callable[[Job], Weighed | Trial]:
    """A function that runs jobs: on a `Bench` of this process, or on one in each process of an executor."""
    if executor is not None:
        return partial(_do_in_worker, trials)
    return Bench(trials, *(load(model) if isinstance(model, str | Path) else (model, tokenizer))).do


_one_at_a_time = threading.Lock()  # a worker may have threads, and there is one model and one window
_loaded = lru_cache(maxsize=1)(load)
_kept_bench = lru_cache(maxsize=1)(lambda trials: Bench(trials, *_loaded(trials.model)))


def _do_in_worker(trials: Trials, job: Job) -> Weighed | Trial:
    with _one_at_a_time:
        return _kept_bench(trials).do(job)
