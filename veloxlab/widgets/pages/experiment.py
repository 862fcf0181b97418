"""The base of pages of whole caches: one model and text, the runs measured on them, and a state to restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import checked
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture, by_window, capture, reference
from veloxlab.measure.quality import Reference, both
from veloxlab.measure.reproduce import calibration_code, notebook, steps
from veloxlab.mlxlm.identity import name_of
from veloxlab.models.loading import loaded_as
from veloxlab.progress import Progress as Tell
from veloxlab.store import digest
from veloxlab.widgets.panel import Panel
from veloxlab.widgets.runs import Run, Runs
from veloxlab.widgets.selection import Bits, Choice, Fitting, Selection

SHOWN = 40  # first characters of a text, which name it in a run


@dataclass(frozen=True)
class Experiment:
    """The model, text, capture, selection and runs that pages of whole caches share."""

    model: Module
    tokenizer: Any
    text: str | None  # the text that the model reads; None for the shipped test excerpt
    capture: Capture  # of this text
    selection: Selection
    points: Runs = field(default_factory=Runs)  # the runs of all pages

    def reference(self, progress: Tell) -> Reference:
        """The model's predictions with its own cache."""
        read: dict[str, Any] = {"text": self.text, "tokens": len(self.capture.tokens), "windows": self.points.windows}
        return reference(self.model, self.tokenizer, progress=progress, **read)

    def fidelity(self, choice: Choice, progress: Tell, exact: Reference | None = None) -> Run:
        """Measure a cache against a `reference` of this experiment, by default one that is measured now."""
        calibration = self.selection.fitting.calibration(choice.method, choice.widths, progress, choice.seed)
        exact = exact or self.reference(progress)
        given: dict[str, Any] = {"name": choice.name, "calibration": calibration, "progress": progress}
        row, predictions = both(exact, choice.plan(self.model), **given)
        begin = "the shipped test excerpt" if self.text is None else self.text[:SHOWN]
        said = f"{begin} ({digest(exact.stretches[0])[:8]}), windows of {len(self.capture.tokens)} tokens"
        seed = choice.seed if "seed" in find_method(choice.method).options else None
        seed = seed if calibration is None else calibration.facts["seed"]
        return Run.now(choice, said, seed, row, by_window(predictions))


_kept: dict[tuple[str, tuple[int, ...]], dict[str, dict[Any, Any]]] = {}
MOST_KEPT = 4  # pairs of model and text with kept frames


def kept_of(model: Module, ids: tuple[int, ...]) -> dict[str, dict[Any, Any]]:
    """Results of pages by model (with its present weights) and text, so that a cell that runs again finds them."""
    place = name_of(model), ids
    found = _kept[place] = _kept.pop(place, {})
    for oldest in [*_kept][:-MOST_KEPT]:
        del _kept[oldest]
    return found


class OfExperiment(Panel):
    """A panel of whole caches of one experiment."""

    STATE: ClassVar[tuple[str, ...]] = ()  # traits in a `state`, in addition to those that all pages share
    experiment: Experiment
    points: Runs
    name = property(lambda page: page.selection.choice.name, doc="A short name of the cache.")
    measured = property(lambda page: page.points.frame, doc="`veloxlab.fidelity` of each measured cache.")

    @property
    def plan(self) -> Plan:
        """The settings as a plan, for `veloxlab.make_cache` or a file."""
        return self.selection.choice.plan(self.experiment.model)

    @property
    def layer_bits(self) -> dict[int, Bits]:
        """Code bits of keys and values, by layer."""
        return {layer: self.selection.choice.bits_of(layer) for layer in self.selection.layers}

    def measure(self) -> None:
        """Start to measure the fidelity of the present settings; `measured` and the frontier chart get the result."""
        experiment, choice = self.experiment, self.selection.choice
        self.selection.fitting.held.clear()

        def done(run: Run) -> None:
            experiment.points.add(run)
            self.say(experiment.points.newest)

        self._submit("fidelity", lambda progress: experiment.fidelity(choice, progress), on_done=done, first=True)

    @property
    def notebook(self) -> bytes:  # type: ignore[override]  # a page of a whole cache can be measured again
        """A notebook that measures the present settings on the same text; `export` puts it into its page."""
        experiment, plan = self.experiment, self.plan
        read: dict[str, Any] = {"tokens": len(experiment.capture.tokens), "windows": self.points.windows}
        cells = steps(
            self._model, plan, calibration_code(plan, seed=self.selection.choice.seed), text=experiment.text, **read
        )
        return notebook(self.title, [*cells])

    @property
    def _model(self) -> str:
        return loaded_as(self.experiment.model) or "the model that was measured"

    @property
    def title(self) -> str:
        return f"{self.name} on {self._model}"

    @property
    def state(self) -> dict[str, Any]:
        """The settings in types of JSON, for `restore`."""
        choice = self.selection.choice
        shared: dict[str, Any] = {
            name: getattr(choice, name) for name in ("method", "sinks", "window", "layer", "seed")
        }
        shared["bits"] = list(choice.bits_of(None))
        shared["layers"] = {str(layer): list(bits) for layer, bits in choice.own_bits.items()}
        return shared | {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Choose the settings of a `state`; raises `InputError`, and changes nothing, if they are not valid here."""
        before, state = self.state, {"seed": 0, **state}
        missing = sorted({*before} - {*state})
        if missing:
            raise InputError(f"The state has no {', '.join(missing)}: use a value of the attribute state.")
        key_bits, value_bits = state["bits"]
        parts = {name: state[name] for name in ("method", "sinks", "window", "layer", "seed")}
        own = {int(layer): tuple(bits) for layer, bits in state["layers"].items()}
        try:
            for name in self.STATE:
                setattr(self, name, state[name])
            self.selection.choose(key_bits=key_bits, value_bits=value_bits, own_bits=own, **parts)
        except InputError:
            for name in self.STATE:
                setattr(self, name, before[name])
            raise


class Experimenter:
    """A widget that starts with a model: it first captures a text."""

    _begin: Callable[[Experiment], None]

    @checked()
    def __init__(
        self,
        model: Module,
        tokenizer: Any = None,  # noqa: ANN401
        *,
        method: str = "turboquant",
        bits: int = 4,
        key_bits: int | None = None,
        value_bits: int | None = None,
        sinks: int = 4,
        window: int = 64,
        text: str | None = None,
        tokens: int = 256,
        calibration: Calibration | None = None,
    ) -> None:
        if tokenizer is None:
            raise InputError("The tokenizer is missing: give both results of vl.load, as in vl.Lab(*vl.load(...)).")
        chosen: dict[str, Any] = {"method": method, "sinks": sinks, "window": window}
        chosen["key_bits"] = bits if key_bits is None else key_bits
        chosen["value_bits"] = bits if value_bits is None else value_bits
        Plan.uniform(model, **chosen)  # raises for bad settings before any work
        seen = capture(model, tokenizer, text, tokens=tokens)
        selection = Selection.of(seen, Fitting(model, tokenizer, calibration), **chosen)
        if calibration is None:
            selection.kept = kept_of(model, seen.tokens)
        self._begin(Experiment(model, tokenizer, text, seen, selection))
