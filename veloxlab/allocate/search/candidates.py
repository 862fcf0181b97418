"""What a search chooses from: whole caches, the bytes that each would hold, and its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from mlx.nn.layers.base import Module

from veloxlab.allocate.budget import held_tokens, layer_sizes
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.make import make_cache
from veloxlab.cache.plan import LayerSettings, Plan, model_hash
from veloxlab.codecs import METHODS, find_method
from veloxlab.errors import InputError
from veloxlab.measure.memory import report
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import exact_width, probe, slots_of

USUAL_BITS = (2, 3, 4)


@dataclass(frozen=True)
class PlannedModel:
    """What a plan has to know of a model: its name, hash of shapes, length of prompt cache, bits of exact values."""

    model: str
    model_hash: str
    entries: int
    exact_bits: int

    @classmethod
    def of(cls, model: Module) -> PlannedModel:
        """The facts of ``model``; raises `InputError` if none of its layers can be compressed."""
        layer_sizes(model)
        return cls(name_of(model), model_hash(model), 1 + max(f.layer for f in probe(model)), exact_width(model))


@dataclass(frozen=True)
class Candidate:
    """One way to make a whole cache.

    ``sinks`` and ``window`` are the tokens kept exact at the start and at the end; ``protected`` layers are not
    compressed, and negative numbers count from the last.
    """

    method: str
    key_bits: int
    value_bits: int
    sinks: int = 4
    window: int = 0
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "protected", tuple(self.protected))  # in files it is a list

    @property
    def name(self) -> str:
        """For people."""
        parts = [f"{self.method} K{self.key_bits} V{self.value_bits}", f"{self.sinks} sinks", f"window {self.window}"]
        if self.protected:
            *first, last = map(str, self.protected)
            parts.append(f"exact layers {', '.join(first)} and {last}" if first else f"exact layer {last}")
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

    By default the methods are those that need no calibration, but for RateQuant, which at one width is TurboQuant.
    Raises `InputError` for an unknown method, or one that has none of the widths.
    """
    names = [m.id for m in METHODS.values() if not (m.calibrated or m.per_head or m.id == "none")]
    asked = {"key_bits": key_bits or bits, "value_bits": value_bits or bits}
    found: list[Candidate] = []
    for name in names if methods is None else methods:
        own = {which: [b for b in widths if b in find_method(name).bits] for which, widths in asked.items()}
        if none := [which for which, widths in own.items() if not widths]:
            raise InputError(
                f"{name} has none of the widths {sorted(asked[none[0]])} of {none[0]}: choose among those of "
                "vl.methods()."
            )
        keys, values = own.values()
        combined = product(map(tuple, protected), sinks, window, keys, values)
        found += [Candidate(name, k, v, s, w, p) for p, s, w, k, v in combined]
    return tuple(dict.fromkeys(found))


def bytes_per_token(model: Module, plan: Plan, context: int, calibration: Calibration | None = None) -> float:
    """Bytes that a cache of ``plan`` holds after a text of ``context`` tokens, read in one call, for each of them.

    Exact tokens, scales and the tables that layers share are counted; what layers without plain keys and values hold
    is not. It is computed from the codecs, and is what `veloxlab.report` measures, or a little more for layers that
    slide.
    """
    cache = make_cache(model, plan, calibration=calibration)
    layers = {slot.layer: slot for slot in slots_of(cache) if hasattr(slot, "key_codec")}
    total = float(report(cache).filter(path="shared")["held_bytes"].sum())
    for size in layer_sizes(model):
        slot = layers[size.layer]
        held = held_tokens(size, context, sinks=plan.sinks, window=plan.window, decoded=False)
        coded = sum(codec.bits_per_value * codec.head_dim / 8 for codec in (slot.key_codec, slot.value_codec))
        total += held.exact * size.exact_bytes + held.packed * size.kv_heads * coded
    return total / context
