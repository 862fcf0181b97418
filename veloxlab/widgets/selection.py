"""The choice of method, bits, exact tokens, layer, head and token that all pages share."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import traitlets as t
from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.cache.counts import Windows
from veloxlab.cache.plan import Plan
from veloxlab.checks import ARGUMENTS, MAPPING, many, maybe, number_of_bits, whole
from veloxlab.codecs import METHODS, TENSORS, find_method
from veloxlab.errors import InputError
from veloxlab.measure import Capture
from veloxlab.measure.calibrate import calibrate
from veloxlab.progress import Progress, silent
from veloxlab.views.marks import bits_said

EXACT = "none"  # the method that compresses nothing
Bits = tuple[float, float]  # of keys and of values
NAMED = 2  # most layers with bits of their own that a name lists
MOST_SEED = 2**31 - 1  # greatest seed in the controls of a page
STEP = 0.25  # bits between widths, where a method allows fractions
CACHE = ("method", "key_bits", "value_bits", "sinks", "window")  # parts that describe a cache of equal layers
INTEGER = whole()
CHECKS = ARGUMENTS | {"layer": maybe(INTEGER), "own_bits": MAPPING}
CHECKS |= {"token": maybe(INTEGER), "ids": many(whole(0), empty=True)}


def pair_said(bits: Bits) -> str:
    """Bits of keys and of values as text, such as ``"K4 V3"``."""
    return f"K{bits[0]} V{bits[1]}"


@dataclass
class Fitting:
    """Calibrations of one model: each width of a method is fitted when it is first needed, and kept on disk.

    Without a model nothing can be fitted. The method of a ``given`` calibration has only its widths.
    """

    model: Module | None = None
    tokenizer: Any = None
    given: Calibration | None = None
    held: set[tuple[str, float]] = field(default_factory=set)  # methods and widths whose fit the user cancelled
    seed: int = 0  # of a fit, if no other seed is given
    _made: dict[tuple[str, int], Calibration] = field(default_factory=dict)  # by method and seed
    _fits: tuple[str, float] | None = None

    @property
    def methods(self) -> list[str]:
        """Ids of the available methods, without the exact one."""
        given = self.given.method if self.given else None
        fits = self.model is not None
        return [m.id for m in METHODS.values() if m.id != EXACT and (fits or not m.calibrated or m.id == given)]

    def widths(self, method: str) -> list[float]:
        """Available code bits of a method; in steps of a quarter where it allows fractions."""
        given, found = self._given(method), find_method(method)
        if found.fractional:
            least, most = found.bits[0], found.bits[-1]
            return [number_of_bits(least + STEP * i) for i in range(int((most - least) / STEP) + 1)]
        return list(found.bits if given is None else given.widths)

    def is_ready(self, method: str, width: float) -> bool:
        """Whether a method at a width can be used without a fit."""
        return not self._missing(method, [width], self.seed)

    def calibration(
        self, method: str, widths: Iterable[float], progress: Progress = silent, seed: int | None = None
    ) -> Calibration | None:
        """The calibration of a method at these widths, fitted now if missing; None for a method that needs none.

        Raises `InputError` if a fit is missing and there is no model, or if the user cancelled that fit.
        """
        seed = self.seed if seed is None else seed
        self._fits = None
        for width in self._missing(method, widths, seed):
            if (method, width) in self.held:
                raise InputError(f"The fit of {method} at {bits_said(width)} was cancelled: press Retry to fit it.")
            if self.model is None:
                way_out = "give calibration=vl.calibrate(model, tokenizer, ...)"
                raise InputError(f"{method} has to be fitted first: {way_out}.")
            self._fits = method, width
            fitted = calibrate(self.model, self.tokenizer, method, bits=width, seed=seed, progress=progress)
            before = self._made.get((method, seed))
            self._made[method, seed] = fitted if before is None else before.joined(fitted)
            self._fits = None
        return self._made.get((method, seed)) or self._given(method)

    def hold(self) -> None:
        """Do not start the last cancelled fit again until the user asks for it."""
        self.held |= {self._fits} if self._fits else set()

    def _given(self, method: str) -> Calibration | None:
        return self.given if self.given and self.given.method == method else None

    def _missing(self, method: str, widths: Iterable[float], seed: int) -> list[float]:
        made = self._made.get((method, seed))
        planned = find_method(method).planned and made is not None  # one calibration serves all widths
        if not find_method(method).calibrated or self._given(method) is not None or planned:
            return []
        return sorted({*widths} - {*(() if made is None else made.widths)})


@dataclass(frozen=True)
class Choice:
    """All settings at one moment."""

    method: str = "turboquant"
    key_bits: float = 4  # code bits of all layers without bits of their own
    value_bits: float = 4
    sinks: int = 4
    window: int = 64
    layer: int | None = None  # the picked layer; None for all
    head: int = 0
    token: int | None = None  # the picked token, by its position in a text; None for the token that lost most
    ids: tuple[int, ...] = ()  # token ids of that text; empty for the text of the capture
    own_bits: Mapping[int, Bits] = field(default_factory=dict)  # of single layers, by layer
    wished: Mapping[int | None, Bits] = field(default_factory=dict)  # bits that the method lacks; None: of all layers
    shown_layer: int = 0  # on pages of a single layer: the picked layer, or the last one
    seed: int = 0  # of the random parts of codes and calibrations

    @property
    def name(self) -> str:
        """A short name of the cache."""
        own = [f"layer {layer} {bits}" for layer, bits in self.exceptions.items()]
        changed = own if len(own) <= NAMED else [f"{len(own)} layers with others"]
        seed = [f"seed {self.seed}"] if self.seed else []
        return ", ".join([f"{self.method} {pair_said(self.pairs[0])}", *changed, *seed])

    @property
    def cache(self) -> tuple[Any, ...]:
        """The settings that decide the cache's content, as a key for results."""
        return (*(getattr(self, name) for name in CACHE), self.exceptions, self.seed)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method, without its bits."""
        return find_method(self.method).seeded(self.seed)

    @property
    def exceptions(self) -> dict[int, str]:
        """The layers with bits of their own, and these bits as text."""
        return {layer: pair_said(bits) for layer, bits in sorted(self.own_bits.items())}

    @property
    def note(self) -> str:
        """A sentence for chosen bits that the method lacks: which bits it uses for them."""
        became = [
            f"{'' if layer is None else f'in layer {layer} '}{pair_said(wish)} became {pair_said(self.bits_of(layer))}"
            for layer, wish in self.wished.items()
        ]
        return (
            f"{self.method} has fewer widths: {', '.join(became)}. They come back with a method that has them."
            if became
            else ""
        )

    @property
    def pairs(self) -> list[Bits]:
        """Bits of the layers without bits of their own, then the bits of each other layer."""
        return [(self.key_bits, self.value_bits), *self.own_bits.values()]

    @property
    def widths(self) -> list[float]:
        """All numbers of bits that occur."""
        return sorted({width for bits in self.pairs for width in bits})

    def lines(self, plan: str = "") -> list[str]:
        """Lines of Python that make the cache: from the expression ``plan``, if given, or from the settings."""
        said = "key_bits={}, value_bits={}"
        settings = f'"{self.method}", {said.format(*self.pairs[0])}, sinks={self.sinks}, window={self.window}'
        settings += "".join(f", {name}={value}" for name, value in self.options.items())
        first = []
        if self.own_bits and not plan:
            own = [f".with_layer({layer}, {said.format(*bits)})" for layer, bits in sorted(self.own_bits.items())]
            first, plan = [f"plan = vl.Plan.uniform(model, {settings})" + "".join(own)], "plan"
        made = plan or settings
        if not find_method(self.method).calibrated:
            return [*first, f"cache = vl.make_cache(model, {made})"]
        seed = f", seed={self.seed}" if self.seed else ""
        return [
            *first,
            f'calibration = vl.calibrate(model, tokenizer, "{self.method}", bits={self.widths}{seed})',
            f"cache = vl.make_cache(model, {made}, calibration=calibration)",
        ]

    def bits_of(self, layer: int | None) -> Bits:
        """Code bits of keys and values of one layer; with None, of the layers without bits of their own."""
        return self.own_bits.get(layer, self.pairs[0])  # type: ignore[arg-type]

    def coded(self, tokens: int) -> int:
        """How many of ``tokens`` tokens of a text are in codes."""
        windows = Windows.of(self.sinks, self.window, None)
        return max(0, tokens - self.sinks - self.window) // windows.block * windows.block

    def in_codes(self, tokens: int) -> str:
        """A sentence: how many of ``tokens`` tokens of a text are in codes."""
        packed = self.coded(tokens)
        if not self.sinks and not self.window:
            return f"All {tokens} tokens are in codes."
        return f"{packed} of {tokens} tokens ({packed / tokens:.0%}) are in codes; sinks and window are exact."

    def wish_of(self, layer: int | None) -> Bits:
        """The chosen bits of a layer, or with None of all; the method may lack them."""
        return self.wished.get(layer, self.bits_of(layer))

    def plan(self, model: Module) -> Plan:
        """The cache as a plan."""
        exact: dict[str, Any] = {"sinks": self.sinks, "window": self.window, **self.options}
        plan = Plan.uniform(model, self.method, key_bits=self.key_bits, value_bits=self.value_bits, **exact)
        for layer, (key, value) in self.own_bits.items():
            plan = plan.with_layer(layer, key_bits=key, value_bits=value)
        return plan


class Selection(t.HasTraits):
    """The choice that pages share, a trait that changes as a whole. Only this class checks its parts.

    ``fitting`` has the available methods and widths; ``methods`` are those that can be chosen. The first choice is
    ``usual`` with other ``parts``; its bits become the nearest bits of the method.
    """

    choice = t.Instance(Choice)
    widths = property(lambda self: self.fitting.widths(self.choice.method), doc="Available code bits of the method.")

    def __init__(
        self,
        fitting: Fitting,
        usual: Choice = Choice(),
        *,
        layers: Iterable[int] = (0,),
        heads: int = 1,
        tokens: int = 0,
        methods: Sequence[str] = (),
        **parts: Any,
    ) -> None:
        super().__init__()
        self.fitting, self.layers, self.heads, self.tokens = fitting, list(layers), heads, tokens
        self.methods = list(methods or fitting.methods)
        self.kept: dict[str, dict[Any, Any]] = {}  # results of measurements, by the names of pages
        self.lock = threading.RLock()  # held while the choice changes and its observers run
        self.choice = replace(usual, shown_layer=self.layers[0])
        self.choice = self.changed(**{"method": usual.method, **parts})

    @t.observe("choice")
    def _seed_chosen(self, change: dict[str, Any]) -> None:
        self.fitting.seed = change["new"].seed

    @classmethod
    def of(cls, capture: Capture, fitting: Fitting, **parts: Any) -> Selection:
        """A selection among the layers and heads of a capture."""
        heads = min(layer.keys.shape[1] for layer in capture.layers)
        layers = [layer.layer for layer in capture.layers]
        return cls(fitting, layers=layers, heads=heads, tokens=len(capture.tokens), **parts)

    def choose(self, **parts: Any) -> None:
        """Change parts of the choice, all at once; raises `InputError`, and changes nothing, if one is not valid."""
        with self.lock:
            choice = self.changed(**parts)
            if {"method", "key_bits", "value_bits", "own_bits"} & {*parts}:
                self.fitting.held.clear()  # a change of these settings asks for the fit again
            self.choice = choice

    def changed(self, **parts: Any) -> Choice:
        """The choice with other parts; raises `InputError` as `choose` does.

        Another method gets its widths nearest to the wished ones, unless ``parts`` has widths. A wish is kept until
        another number is chosen in its place.
        """
        asked = parts = {name: CHECKS[name](name, value) for name, value in parts.items()}
        if "method" in parts:
            parts = self._of_method(parts["method"]) | parts
        if parts.get("layer") is not None:
            parts["shown_layer"] = parts["layer"]
        choice = replace(self.choice, **parts)
        choice = replace(choice, wished=self._wished(asked, choice))
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
        given = self.fitting._given(choice.method)
        if "seed" in asked and given is not None and given.facts["seed"] != choice.seed:
            said = f"The calibration of {choice.method} that was given has seed {given.facts['seed']}"
            raise InputError(f"{said}: for another seed give calibration=vl.calibrate(..., seed={choice.seed}).")
        tokens = len(choice.ids) or self.tokens
        if choice.token is not None and not 0 <= choice.token < tokens:
            raise InputError(f"There is no token {choice.token}: the text has {tokens}, from 0.")
        return choice

    def _wished(self, asked: Mapping[str, Any], choice: Choice) -> dict[int | None, Bits]:
        before, wished = self.choice, dict[int | None, Bits]()
        for layer in (None, *choice.own_bits):
            given, old, wish = choice.bits_of(layer), before.bits_of(layer), before.wish_of(layer)
            new = [name in asked for name in ("key_bits", "value_bits")]
            if layer is not None:
                new = ["own_bits" in asked and one != other for one, other in zip(given, old, strict=True)]
            key, value = (g if is_new else w for g, w, is_new in zip(given, wish, new, strict=True))
            if (key, value) != given:
                wished[layer] = key, value
        return wished

    def _of_method(self, method: str) -> dict[str, Any]:
        if find_method(method).id not in self.methods:
            fit = " A method that has to be fitted needs calibration=vl.calibrate(...)."
            hint = fit if find_method(method).calibrated else ""
            raise InputError(f"{method!r} cannot be chosen here: choose one of {', '.join(self.methods)}.{hint}")
        widths, own_bits = self.fitting.widths(method), self.choice.own_bits
        (key_bits, value_bits), *own = [
            tuple(min(widths, key=lambda each: abs(each - width)) for width in self.choice.wish_of(layer))
            for layer in (None, *own_bits)
        ]
        return {"key_bits": key_bits, "value_bits": value_bits, "own_bits": dict(zip(own_bits, own, strict=True))}
