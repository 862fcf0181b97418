"""What a search chooses from: whole caches in plain words, the bytes that each would hold, and the plan that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import held_tokens, layer_sizes
from veloxlab.cache.make import LayerSettings, ModelCalibration, make_cache
from veloxlab.cache.plan import Plan, model_hash
from veloxlab.checks import WORDS, checked, many, whole
from veloxlab.codecs import METHODS, find_method
from veloxlab.errors import InputError
from veloxlab.measure.memory import report
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import exact_width, probe, slots_of

USUAL_BITS = (2, 3, 4)
COMBINED = {
    "methods": many(WORDS),
    **dict.fromkeys(("bits", "key_bits", "value_bits"), many(whole())),
    **dict.fromkeys(("sinks", "window"), many(whole(0))),
    "protected": many(many(whole(), empty=True)),
}
"""Checks of what `candidates` combines."""


@dataclass(frozen=True)
class PlannedModel:
    """What a plan has to know of a model.

    Attributes
    ----------
    model, model_hash : its name, and the hash of its shapes.
    entries : length of its prompt cache.
    exact_bits : of an exact value.
    """

    model: str
    model_hash: str
    entries: int
    exact_bits: int

    @classmethod
    def of(cls, model: Module) -> PlannedModel:
        """The shape of ``model``; raises `InputError` if none of its layers can be compressed."""
        layer_sizes(model)
        return cls(name_of(model), model_hash(model), 1 + max(f.layer for f in probe(model)), exact_width(model))


@dataclass(frozen=True)
class Candidate:
    """One way to make a whole cache.

    Attributes
    ----------
    method : id.
    key_bits, value_bits : code bits per coordinate.
    sinks, window : tokens kept exact, at the start and at the end.
    protected : layers that are not compressed; negative numbers count from the last.
    """

    method: str
    key_bits: int
    value_bits: int
    sinks: int = 4
    window: int = 0
    protected: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """All of it in words."""
        parts = [f"{self.method} K{self.key_bits} V{self.value_bits}", f"{self.sinks} sinks", f"window {self.window}"]
        if self.protected:
            parts.append(f"exact {'layer' if len(self.protected) == 1 else 'layers'} {_words(self.protected)}")
        return ", ".join(parts)

    def within(self, shape: PlannedModel) -> Candidate:
        """The same with layers counted from 0, in their order; raises `InputError` if there is no such layer."""
        n = shape.entries
        if wrong := [layer for layer in self.protected if not -n <= layer < n]:
            raise InputError(f"There is no layer {wrong[0]} to protect: {shape.model} has layers 0 to {n - 1}.")
        return replace(self, protected=tuple(sorted({layer % n for layer in self.protected})))

    def plan(self, shape: PlannedModel, calibration: str | None = None) -> Plan:
        """The plan for a model; ``calibration`` is the identity of the one that its codecs come from."""
        coded = LayerSettings(self.method, self.key_bits, self.method, self.value_bits)
        exact = LayerSettings("none", shape.exact_bits, "none", shape.exact_bits)
        protected = self.within(shape).protected
        return Plan(
            shape.model_hash,
            tuple(exact if layer in protected else coded for layer in range(shape.entries)),
            self.sinks,
            self.window,
            name=self.name,
            model=shape.model,
            calibrations={} if calibration is None else {self.method: calibration},
        )


@checked(**COMBINED)
def candidates(
    methods: Sequence[str] | None = None,
    *,
    bits: Sequence[int] = USUAL_BITS,
    key_bits: Sequence[int] | None = None,
    value_bits: Sequence[int] | None = None,
    sinks: Sequence[int] = (4,),
    window: Sequence[int] = (0,),
    protected: Sequence[Sequence[int]] = ((),),
) -> tuple[Candidate, ...]:
    """All combinations, at those of the widths that a method has.

    Parameters
    ----------
    methods : ids; by default those that need no calibration, but for RateQuant, which at one width is TurboQuant.
    bits, key_bits, value_bits : code widths to try; the last two override the first.
    sinks, window : numbers of exact tokens to try.
    protected : sets of layers to leave exact to try, such as ``[(), (0, -1)]``.

    Raises
    ------
    InputError : an unknown method, one that has none of the widths, or nothing to combine.
    """
    names = [m.id for m in METHODS.values() if not (m.calibrated or m.per_head or m.id == "none")]
    found: list[Candidate] = []
    for name in dict.fromkeys(names if methods is None else methods):
        own = find_method(name).bits
        asked = {
            "key_bits": bits if key_bits is None else key_bits,
            "value_bits": bits if value_bits is None else value_bits,
        }
        keys, values = ([b for b in widths if b in own] for widths in asked.values())
        if not keys or not values:
            side = "value_bits" if keys else "key_bits"
            raise InputError(
                f"{name} has none of the widths {sorted(asked[side])} of {side}: choose among those of vl.methods()."
            )
        found += [
            Candidate(name, k, v, s, w, tuple(p)) for p, s, w, k, v in product(protected, sinks, window, keys, values)
        ]
    return tuple(dict.fromkeys(found))


def calibrated_widths(some: Sequence[Candidate]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """All widths that ``some`` have of each method that has to be calibrated."""
    widths: dict[str, set[int]] = {}
    for c in some:
        if find_method(c.method).calibrated:
            widths.setdefault(c.method, set()).update((c.key_bits, c.value_bits))
    return tuple((method, tuple(sorted(own))) for method, own in widths.items())


def bytes_per_token(model: Module, plan: Plan, context: int, calibration: ModelCalibration | None = None) -> float:
    """What a cache of ``plan`` holds after a text of ``context`` tokens that was read in one call, for each of them.

    Exact tokens, scales and the tables that layers share are counted; what layers without plain keys and values hold
    is not. It is counted from the codecs, and is what `veloxlab.report` then measures, or a little more for layers
    that slide.
    """
    cache = make_cache(model, plan, calibration=calibration)
    layers: dict[int, Any] = {slot.layer: slot for slot in slots_of(cache) if hasattr(slot, "key_codec")}
    total = float(report(cache).filter(path="shared")["held_bytes"].sum())
    for size in layer_sizes(model):
        slot = layers[size.layer]
        held = held_tokens(size, context, sinks=plan.sinks, window=plan.window, decoded=False)
        coded = sum(codec.bits_per_value * codec.head_dim / 8 for codec in (slot.key_codec, slot.value_codec))
        total += held.exact * size.exact_bytes + held.packed * size.kv_heads * coded
    return total / context


def _words(layers: Sequence[int]) -> str:
    *first, last = map(str, layers)
    return f"{', '.join(first)} and {last}" if first else last
