"""One choice of method, bits, exact tokens, layer and head, which all pages share; and traits that belong to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import ARGUMENTS, BITS, MAPPING, maybe, number_of_bits, whole
from veloxlab.codecs import METHODS, TENSORS, find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.measure.calibrate import calibrate
from veloxlab.progress import Progress, silent

EXACT = "none"  # the method that compresses nothing
Bits = tuple[float, float]  # of keys and of values
STEP = 0.25  # of bits, where a method takes fractions
CACHE = ("method", "key_bits", "value_bits", "sinks", "window")  # parts that describe a cache of equal layers
INTEGER = whole()
CHECKS = ARGUMENTS | {"layer": maybe(INTEGER), "own_bits": MAPPING}


@dataclass
class Fitting:
    """Calibrations of one model: each width of a method is fitted when it is first needed, and kept on disk.

    Without a model nothing can be fitted. The method of a calibration that was given has its widths and no others.
    """

    model: Module | None = None
    tokenizer: Any = None
    given: Calibration | None = None
    _made: dict[str, Calibration] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Ids of the methods that can be had, the exact one left out."""
        given = self.given.method if self.given else None
        fits = self.model is not None
        return [m.id for m in METHODS.values() if m.id != EXACT and (fits or not m.calibrated or m.id == given)]

    def widths(self, method: str) -> list[float]:
        """Code bits at which a method can be had; of one that takes fractions, by quarters."""
        given, found = self._given(method), find_method(method)
        if found.fractional:
            least, most = found.bits[0], found.bits[-1]
            return [number_of_bits(least + STEP * i) for i in range(int((most - least) / STEP) + 1)]
        return list(found.bits if given is None else given.widths)

    def is_ready(self, method: str, width: float) -> bool:
        """Whether nothing has to be fitted first."""
        return not self._missing(method, [width])

    def calibration(self, method: str, widths: Iterable[float], progress: Progress = silent) -> Calibration | None:
        """Give what holds a method at these widths, fitted now by `calibrate`; None for one that needs nothing."""
        for width in self._missing(method, widths):
            if self.model is None:
                way_out = "give calibration=vl.calibrate(model, tokenizer, ...)"
                raise InputError(f"{method} has to be fitted first: {way_out}.")
            fitted = calibrate(self.model, self.tokenizer, method, bits=width, progress=progress)
            self._made[method] = self._made[method].joined(fitted) if method in self._made else fitted
        return self._made.get(method) or self._given(method)

    def _given(self, method: str) -> Calibration | None:
        return self.given if self.given and self.given.method == method else None

    def _missing(self, method: str, widths: Iterable[float]) -> list[float]:
        planned = find_method(method).planned and method in self._made  # one is for all widths
        if not find_method(method).calibrated or self._given(method) is not None or planned:
            return []
        return sorted({*widths} - {*(self._made[method].widths if method in self._made else ())})


@dataclass(frozen=True)
class Choice:
    """What is chosen at one moment."""

    method: str = "turboquant"
    key_bits: float = 4  # code bits of all layers that have none of their own
    value_bits: float = 4
    sinks: int = 4
    window: int = 64
    layer: int | None = None  # the picked one; None for all
    head: int = 0
    own_bits: Mapping[int, Bits] = field(default_factory=dict)  # by layer
    shown_layer: int = 0  # on pages of a single layer: the picked one, or the last that was picked

    @property
    def name(self) -> str:
        """The cache in a few words."""
        changed = f" +{len(self.own_bits)} layers" if self.own_bits else ""
        return f"{self.method} K{self.key_bits} V{self.value_bits}{changed}"

    @property
    def pairs(self) -> list[Bits]:
        """Bits of all layers that have none of their own, then those of the others."""
        return [(self.key_bits, self.value_bits), *self.own_bits.values()]

    @property
    def widths(self) -> list[float]:
        """Every number of bits that occurs."""
        return sorted({width for bits in self.pairs for width in bits})

    def lines(self, plan: str = "") -> list[str]:
        """Lines of Python that make the cache: of what they call its ``plan``, or of its settings for all layers."""
        bits = f"key_bits={self.key_bits}, value_bits={self.value_bits}"
        made = plan or f'"{self.method}", {bits}, sinks={self.sinks}, window={self.window}'
        if not find_method(self.method).calibrated:
            return [f"cache = vl.make_cache(model, {made})"]
        return [
            f'calibration = vl.calibrate(model, tokenizer, "{self.method}", bits={self.widths})',
            f"cache = vl.make_cache(model, {made}, calibration=calibration)",
        ]

    def bits_of(self, layer: int | None) -> Bits:
        """Code bits of keys and values of one layer; with None, of the layers that have none of their own."""
        return self.own_bits.get(layer, self.pairs[0])  # type: ignore[arg-type]

    def plan(self, model: Module) -> Plan:
        """The cache as a plan."""
        exact: dict[str, Any] = {"sinks": self.sinks, "window": self.window}
        plan = Plan.uniform(model, self.method, key_bits=self.key_bits, value_bits=self.value_bits, **exact)
        for layer, (key, value) in self.own_bits.items():
            plan = plan.with_layer(layer, key_bits=key, value_bits=value)
        return plan


class Selection(t.HasTraits):
    """The choice that pages share, a trait that changes as a whole. Each part is checked here and nowhere else.

    ``fitting`` says which methods and widths can be had; ``methods`` are those of them that can be chosen. The first
    choice is ``usual`` with other ``parts``; its bits become the nearest that the method has.
    """

    choice = t.Instance(Choice)
    widths = property(lambda self: self.fitting.widths(self.choice.method), doc="Code bits that the method can have.")

    def __init__(
        self,
        fitting: Fitting,
        usual: Choice = Choice(),
        *,
        layers: Iterable[int] = (0,),
        heads: int = 1,
        methods: Sequence[str] = (),
        **parts: Any,
    ) -> None:
        super().__init__()
        self.fitting, self.layers, self.heads = fitting, list(layers), heads
        self.methods = list(methods or fitting.methods)
        self.lock = threading.RLock()  # held while the choice changes and those who follow are told
        self.choice = replace(usual, shown_layer=self.layers[0])
        self.choice = self.changed(**{"method": usual.method, **parts})

    @classmethod
    def of(cls, capture: Capture, fitting: Fitting, **parts: Any) -> Selection:
        """A selection among the layers and heads of a capture."""
        heads = min(layer.keys.shape[1] for layer in capture.layers)
        return cls(fitting, layers=[layer.layer for layer in capture.layers], heads=heads, **parts)

    def choose(self, **parts: Any) -> None:
        """Change parts of the choice, all at once, or none: `InputError` if one cannot be."""
        with self.lock:
            self.choice = self.changed(**parts)

    def changed(self, **parts: Any) -> Choice:
        """The choice with other parts. Another method takes the nearest widths that it has, unless they are given."""
        parts = {name: CHECKS[name](name, value) for name, value in parts.items()}
        if "method" in parts:
            parts = self._of_method(parts["method"]) | parts
        if parts.get("layer") is not None:
            parts["shown_layer"] = parts["layer"]
        choice = replace(self.choice, **parts)
        widths = self.fitting.widths(choice.method)
        for bits in choice.pairs:
            for tensor, width in zip(TENSORS, bits, strict=True):
                find_method(choice.method).check(width, tensor, {})
                if width not in widths:
                    only = f"The calibration holds no {tensor} at {width} bits, only at {widths}: fit that too."
                    by_steps = (
                        f"{tensor.capitalize()} at {width} bits cannot be chosen here: choose a multiple of {STEP}."
                    )
                    raise InputError(by_steps if find_method(choice.method).fractional else only)
        for layer in (*choice.own_bits, choice.shown_layer):
            if layer not in self.layers:
                ends = f"{self.layers[0]} to {self.layers[-1]}"
                raise InputError(f"There is no layer {layer}: choose one from {ends}.")
        if not 0 <= choice.head < self.heads:
            raise InputError(f"There is no KV head {choice.head}: choose one from 0 to {self.heads - 1}.")
        return choice

    def _of_method(self, method: str) -> dict[str, Any]:
        if find_method(method).id not in self.methods:
            fit = " A method that has to be fitted needs calibration=vl.calibrate(...)."
            hint = fit if find_method(method).calibrated else ""
            raise InputError(f"{method!r} cannot be chosen here: choose one of {', '.join(self.methods)}.{hint}")
        widths, own_bits = self.fitting.widths(method), self.choice.own_bits
        (key_bits, value_bits), *own = [
            tuple(min(widths, key=lambda each: abs(each - width)) for width in bits) for bits in self.choice.pairs
        ]
        return {"key_bits": key_bits, "value_bits": value_bits, "own_bits": dict(zip(own_bits, own, strict=True))}


class Chosen(t.TraitType[Any, Any]):
    """A part of a page's selection as a trait of the page: it is read there, set there, and kept nowhere else."""

    def __init__(self, part: str, *, read: str = "", help: str = "") -> None:  # noqa: A002 - traitlets' word
        super().__init__(help=help)
        self.part, self.read = part, read or part

    def get(self, obj: Any, cls: Any = None) -> Any:  # noqa: ANN401
        return getattr(obj.selection.choice, self.read)

    def set(self, obj: Any, value: Any) -> None:  # noqa: ANN401
        obj.selection.choose(**{self.part: value})


class ChosenBits(Chosen):
    """Code bits of a page's keys or values; with an empty ``tensor`` of the one that the page shows.

    ``part`` is the layer that they are of: ``"layer"``, the picked one, which then has bits of its own;
    ``"shown_layer"``, unless it has no bits of its own; or empty for all layers.
    """

    def __init__(self, tensor: str, part: str = "", *, help: str = "") -> None:  # noqa: A002
        super().__init__(part, help=help)
        self.tensor = tensor

    def _of(self, page: Any) -> tuple[int | None, int]:  # noqa: ANN401
        """The layer that they are of, None for all, and their place in a pair."""
        choice = page.selection.choice
        layer = getattr(choice, self.part) if self.part else None
        one = self.part == "layer" or layer in choice.own_bits
        return layer if one else None, TENSORS.index(self.tensor or page.tensor)

    def get(self, obj: Any, cls: Any = None) -> Any:  # noqa: ANN401
        layer, place = self._of(obj)
        return obj.selection.choice.bits_of(layer)[place]

    def set(self, obj: Any, value: Any) -> None:  # noqa: ANN401
        width = BITS(str(self.name), value)
        with obj.selection.lock:
            layer, place = self._of(obj)
            if layer is None:
                obj.selection.choose(**{("key_bits", "value_bits")[place]: width})
            else:
                choice = obj.selection.choice
                bits = [*choice.bits_of(layer)]
                bits[place] = width
                obj.selection.choose(own_bits={**choice.own_bits, layer: tuple(bits)})


class OfCache(t.HasTraits):
    """Traits of a page of whole caches; the bits are those of all layers."""

    method = Chosen("method", help="a method's id")
    key_bits = ChosenBits("keys", help="code bits of each key coordinate")
    value_bits = ChosenBits("values", help="code bits of each value coordinate")
    sinks = Chosen("sinks", help="first tokens, kept exact")
    window = Chosen("window", help="newest tokens, kept exact")


class OfLayers(OfCache):
    """The same, of a page on which a layer can be picked; the bits are then those of that layer."""

    layer = Chosen("layer", help="the picked layer")
    key_bits = ChosenBits("keys", "layer", help="code bits of each key coordinate, of the picked layer or of all")
    value_bits = ChosenBits("values", "layer", help="code bits of each value coordinate, of the picked layer or of all")


class Checked(t.Any):
    """A trait of what a check of `veloxlab.checks` takes; raises `InputError` for anything else."""

    def __init__(self, check: Callable[[str, object], Any], default: object = t.Undefined, *, help: str = "") -> None:  # noqa: A002
        super().__init__(default, help=help)
        self.check = check

    def validate(self, obj: Any, value: Any) -> Any:  # noqa: ANN401
        return self.check(str(self.name), value)
