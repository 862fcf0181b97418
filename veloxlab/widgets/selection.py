"""One choice of method, bits, exact tokens, layer and head, which all pages share; and traits that belong to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.cache.plan import Plan
from veloxlab.checks import MAPPING, WORDS, maybe, whole
from veloxlab.codecs import TENSORS, Tensor, find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.widgets.fitting import Fitting

Bits = tuple[int, int]  # of keys and of values
CACHE = ("method", "key_bits", "value_bits", "sinks", "window")  # parts that describe a cache of equal layers
COUNT, INTEGER = whole(0), whole()
CHECKS = {
    "method": WORDS,
    "key_bits": INTEGER,
    "value_bits": INTEGER,
    "sinks": COUNT,
    "window": COUNT,
    "layer": maybe(INTEGER),
    "head": INTEGER,
    "own_bits": MAPPING,
}


@dataclass(frozen=True)
class Choice:
    """What is chosen at one moment.

    Attributes
    ----------
    key_bits, value_bits : code bits of all layers that have no bits of their own.
    layer : the picked layer; None for all.
    own_bits : code bits of keys and values, by layer.
    shown_layer : the layer that pages of a single layer show: the picked one, or the last that was picked.
    """

    method: str = "turboquant"
    key_bits: int = 4
    value_bits: int = 4
    sinks: int = 4
    window: int = 64
    layer: int | None = None
    head: int = 0
    own_bits: Mapping[int, Bits] = field(default_factory=dict)
    shown_layer: int = 0

    @property
    def name(self) -> str:
        """The cache in a few words."""
        changed = f" +{len(self.own_bits)} layers" if self.own_bits else ""
        return f"{self.method} K{self.key_bits} V{self.value_bits}{changed}"

    @property
    def widths(self) -> list[int]:
        """Every number of bits that occurs."""
        return sorted({width for bits in (self.bits_of(None), *self.own_bits.values()) for width in bits})

    @property
    def arguments(self) -> str:
        """What `veloxlab.make_cache` takes behind the model, as Python; own bits of layers need a plan."""
        bits = f"key_bits={self.key_bits}, value_bits={self.value_bits}"
        return f'"{self.method}", {bits}, sinks={self.sinks}, window={self.window}'

    def bits_of(self, layer: int | None) -> Bits:
        """Code bits of keys and values of one layer; with None, of the layers that have no bits of their own."""
        everywhere = self.key_bits, self.value_bits
        return everywhere if layer is None else self.own_bits.get(layer, everywhere)

    def plan(self, model: Module) -> Plan:
        """The cache as a plan."""
        exact: dict[str, Any] = {"sinks": self.sinks, "window": self.window}
        plan = Plan.uniform(model, self.method, key_bits=self.key_bits, value_bits=self.value_bits, **exact)
        for layer, (key, value) in self.own_bits.items():
            plan = plan.with_layer(layer, key_bits=key, value_bits=value)
        return plan


class Selection(t.HasTraits):
    """The choice that pages share, a trait that changes as a whole. Each part is checked here and nowhere else.

    Parameters
    ----------
    fitting : which methods and widths can be had.
    usual : the first choice but for ``parts``; its bits become the nearest that the method has.
    layers, heads : those that there are.
    methods : ids that can be chosen; by default all that ``fitting`` has.

    Raises
    ------
    InputError : a part cannot be.
    """

    choice = t.Instance(Choice)

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

    @property
    def widths(self) -> list[int]:
        """Code bits that the chosen method can have."""
        return self.fitting.widths(self.choice.method)

    def choose(self, **parts: Any) -> None:
        """Change parts of the choice, all at once.

        Raises
        ------
        InputError : a part cannot be; nothing is changed then.
        """
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
        for bits in (choice.bits_of(None), *choice.own_bits.values()):
            for tensor, width in zip(TENSORS, bits, strict=True):
                self._check_width(choice.method, width, tensor)
        for layer in (*choice.own_bits, choice.shown_layer):
            if layer not in self.layers:
                ends = f"{self.layers[0]} to {self.layers[-1]}"
                raise InputError(f"There is no layer {layer}: choose one from {ends}.")
        if not 0 <= choice.head < self.heads:
            raise InputError(f"There is no KV head {choice.head}: choose one from 0 to {self.heads - 1}.")
        return choice

    def watch(self, follow: Callable[[Any], None]) -> Callable[[], None]:
        """Call a function after every change, and give a function that ends this."""
        self.observe(follow, "choice")
        return lambda: self.unobserve(follow, "choice")

    def _of_method(self, method: str) -> dict[str, Any]:
        """The parts that change with a method."""
        if find_method(method).id not in self.methods:
            fit = " A method that has to be fitted needs calibration=vl.calibrate(...)."
            hint = fit if find_method(method).calibrated else ""
            raise InputError(f"{method!r} cannot be chosen here: choose one of {', '.join(self.methods)}.{hint}")
        now, widths = self.choice, self.fitting.widths(method)
        key_bits, value_bits = (nearest(widths, width) for width in now.bits_of(None))
        own = {layer: (nearest(widths, key), nearest(widths, value)) for layer, (key, value) in now.own_bits.items()}
        return {"key_bits": key_bits, "value_bits": value_bits, "own_bits": own}

    def _check_width(self, method: str, width: int, tensor: Tensor) -> None:
        find_method(method).check(width, tensor, {})
        widths = self.fitting.widths(method)
        if width not in widths:
            raise InputError(f"The calibration holds no {tensor} at {width} bits, only at {widths}: fit that too.")


def nearest(widths: Iterable[int], width: int) -> int:
    """The one of ``widths`` that is next to ``width``."""
    return min(widths, key=lambda each: abs(each - width))


class Chosen(t.TraitType[Any, Any]):
    """A part of a page's selection as a trait of the page: it is read there, set there, and kept nowhere else."""

    def __init__(self, part: str, *, read: str = "", help: str = "") -> None:  # noqa: A002 - traitlets' word
        super().__init__(help=help)
        self.part, self.read = part, read or part

    def get(self, obj: Any, cls: Any = None) -> Any:  # noqa: ANN401
        """Read it."""
        return getattr(obj.selection.choice, self.read)

    def set(self, obj: Any, value: Any) -> None:  # noqa: ANN401
        """Choose it; raises `InputError` if it cannot be."""
        obj.selection.choose(**{self.part: value})


class ChosenBits(Chosen):
    """Code bits of a page's keys or values.

    Parameters
    ----------
    tensor : ``"keys"`` or ``"values"``; empty for the one that the page shows.
    part : the layer that they are of: ``"layer"``, the picked one, which then has bits of its own; ``"shown_layer"``,
        unless it has no bits of its own; or empty for all layers.
    """

    def __init__(self, tensor: str, part: str = "", *, help: str = "") -> None:  # noqa: A002
        super().__init__(part, help=help)
        self.tensor = tensor

    def get(self, obj: Any, cls: Any = None) -> Any:  # noqa: ANN401
        """Read them."""
        choice = obj.selection.choice
        return choice.bits_of(getattr(choice, self.part) if self.part else None)[
            TENSORS.index(self.tensor or obj.tensor)
        ]

    def set(self, obj: Any, value: Any) -> None:  # noqa: ANN401
        """Choose them; raises `InputError` if the method does not have them."""
        width = INTEGER(str(self.name), value)
        with obj.selection.lock:
            choice = obj.selection.choice
            layer = getattr(choice, self.part) if self.part else None
            if self.part == "shown_layer" and layer not in choice.own_bits:
                layer = None
            key, other = choice.bits_of(layer)
            bits = (width, other) if (self.tensor or obj.tensor) == "keys" else (key, width)
            if layer is None:
                obj.selection.choose(key_bits=bits[0], value_bits=bits[1])
            else:
                obj.selection.choose(own_bits={**choice.own_bits, layer: bits})


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
        """Give it as Python's own."""
        return self.check(str(self.name), value)
