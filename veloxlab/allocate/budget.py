"""Allocation requests (a budget of bits, bytes, memory or loss, and bounds) and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self, get_args

from mlx.nn.layers.base import Module

from veloxlab.cache.counts import Windows
from veloxlab.cache.plan import LayerSettings, Plan, model_hash
from veloxlab.checks import FLAG, WORDS, Check, check_fields, choice, either, instance, many, maybe, real, whole
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import LayerFacts, exact_width, probe

MEGABYTE = 1_000_000
LEAST = 2  # bits of a head by default
Protection = Literal["widest", "exact"]


def layer_sizes(model: Module) -> tuple[LayerFacts, ...]:
    """Facts of the layers that a compressed cache can take; raises `InputError` if there are none."""
    facts = tuple(found for found in probe(model) if found.compressible)
    if not facts:
        raise InputError("No layer of this model keeps plain keys and values: there is nothing to allocate.")
    return facts


@dataclass(frozen=True)
class PlannedModel:
    """What a plan needs from a model: its name, hash of shapes, length of prompt cache, bits of exact values."""

    model: str
    model_hash: str
    entries: int
    exact_bits: int

    @classmethod
    def of(cls, model: Module) -> Self:
        """The facts of ``model``."""
        return cls(name_of(model), model_hash(model), 1 + max(f.layer for f in probe(model)), exact_width(model))

    def plan(self, layers: Mapping[int, LayerSettings], sinks: int, window: int, **said: Any) -> Plan:
        """A plan with these settings of layers, and exact ones for the others."""
        exact = LayerSettings("none", self.exact_bits, "none", self.exact_bits)
        every = tuple(layers.get(layer, exact) for layer in range(self.entries))
        return Plan(self.model_hash, every, sinks, window, model=self.model, **said)


@dataclass(frozen=True)
class _Amounts:
    """Numbers above 0; tokens are whole."""

    def __post_init__(self) -> None:
        check_fields(self, **{f.name: whole(1) if f.name == "tokens" else real(above=0) for f in fields(self)})


@dataclass(frozen=True)
class AverageBits(_Amounts):
    """True bits for each packed value on average, scales included: 3 code bits are 3.25 at a head dimension of 64."""

    bits: float


@dataclass(frozen=True)
class BytesPerToken(_Amounts):
    """Bytes of one packed token's keys and values, of all layers."""

    nbytes: float


@dataclass(frozen=True)
class TokensInMemory(_Amounts):
    """``tokens`` tokens in ``megabytes`` (10⁶ bytes): exact tokens, codes, scales and slack; tables do not count."""

    tokens: int
    megabytes: float


@dataclass(frozen=True)
class QualityFloor(_Amounts):
    """The fewest bytes with at most this ``predicted_loss``: nats a token, by gradients or by divergences."""

    predicted_loss: float


Budget = AverageBits | BytesPerToken | TokensInMemory | QualityFloor
_KINDS = "vl.allocate.AverageBits, vl.allocate.BytesPerToken, vl.allocate.TokensInMemory or vl.allocate.QualityFloor"
_BITS = Check("a number of true bits above 0", real(above=0).fits, AverageBits)
BUDGET = either(instance(get_args(Budget), _KINDS), _BITS)


class Limit(NamedTuple):
    """What a budget leaves for codes: bytes, or a predicted loss."""

    tokens: tuple[float, ...]  # packed ones of each layer, relative to the layer that holds most
    nbytes: float | None = None  # of the codes of all layers, for one token of that layer
    predicted_loss: float = 0.0  # the greatest that is allowed, where bytes are not limited

    @classmethod
    def of(cls, budget: Budget, sizes: Sequence[LayerFacts], sinks: int, window: int) -> Self:
        """What ``budget`` leaves for the codes of these layers; raises `InputError` if exact tokens take all of it."""
        alike = (1.0,) * len(sizes)
        match budget:
            case AverageBits(bits):
                return cls(alike, bits * sum(size.values_per_token for size in sizes) / 8)
            case BytesPerToken(nbytes):
                return cls(alike, nbytes)
            case QualityFloor(loss):
                return cls(alike, predicted_loss=loss)
            case TokensInMemory(tokens, megabytes):
                held = [Windows.of_layer(size, sinks, window).most_held(tokens) for size in sizes]
        exact = sum(one.exact * size.exact_bytes for one, size in zip(held, sizes, strict=True))
        left, most = megabytes * MEGABYTE - exact, max(one.packed for one in held)
        taken = f"{exact / MEGABYTE:.3g} MB"
        if not most:
            wrong = f"{tokens} tokens are all kept exact by {sinks} sinks and a window of {window}, in {taken}"
            raise InputError(f"{wrong}: there is nothing to allocate. Take more tokens or a smaller window.")
        if left <= 0:
            wrong = f"{megabytes:g} MB are less than the exact tokens take, {taken}"
            raise InputError(f"{wrong}: give more, or fewer sinks or a smaller window.")
        return cls(tuple(one.packed / most for one in held), left / most)


@dataclass(frozen=True)
class Bounds:
    """Limits of an allocation.

    A head gets from ``least_bits`` to ``most_bits`` code bits, of the widths that were measured. By default the least
    is 2, because losses at 1 bit are predicted too low. It is 1 if 2 bits for every head take almost the whole budget.
    If a method gives each coordinate its own width, the limits apply to the mean over a layer's keys or values, and by
    default there is no least. The ``protected_first`` and ``protected_last`` layers are not part of the allocation:
    they get ``most_bits`` (protection ``"widest"``) or stay exact (``"exact"``). With ``keys_over_values`` a layer's
    keys get at least as many bits as its values, on average over its heads. ``methods``: the only ones that are used;
    by default all that were measured.
    """

    least_bits: int | None = None
    most_bits: int = 6
    protected_first: int = 0
    protected_last: int = 0
    protection: Protection = "widest"
    keys_over_values: bool = False
    methods: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        ends = {"protected_first": whole(0), "protected_last": whole(0), "protection": choice(*get_args(Protection))}
        check_fields(self, least_bits=maybe(whole(1)), most_bits=whole(1), keys_over_values=FLAG, **ends)
        check_fields(self, methods=maybe(many(WORDS)))
        for method in self.methods or ():
            find_method(method)
        if (self.least_bits or 1) > self.most_bits:
            raise InputError(f"Bounds of {self.least_bits} to {self.most_bits} bits hold no width: give least ≤ most.")


BOUNDS = instance(Bounds, "vl.allocate.Bounds, such as vl.allocate.Bounds(least_bits=2, most_bits=4)")


@dataclass(frozen=True)
class Setting:
    """An allocation request: a budget, bounds, and the weight of keys' predicted losses relative to values'."""

    budget: Budget
    bounds: Bounds = field(default_factory=Bounds)
    key_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, budget=BUDGET, bounds=BOUNDS, key_weight=real(above=0))


@dataclass(frozen=True)
class Allocation:
    """A plan for `veloxlab.make_cache`, and what is predicted of it."""

    plan: Plan
    bytes_per_token: float  # of one packed token in all layers
    true_bits: float  # for each packed value, scales included
    key_bits: float  # code bits, mean over the heads
    value_bits: float
    predicted_loss: float  # a token; by gradients or divergences, in nats
    predicted_least: float | None  # a lower bound for plans of this budget; None with a `QualityFloor` or a weight
    uniform: Plan | None  # in the same bytes; None where even the least measured width takes more
    predicted_uniform_loss: float | None
    least_bits: int  # the least width that a head could get, for methods with a width for each head
    only_least: bool  # whether the budget is enough for the least widths only


class Spans(NamedTuple):
    """The least and the most that each kind of budget can ask for within some bounds, by the name of its amount."""

    bits: tuple[float, float]
    nbytes: tuple[float, float]
    megabytes: tuple[float, float]
    predicted_loss: tuple[float, float]

    def nearest(self, budget: Budget) -> Budget:
        """The budget, or the nearest one within the spans."""
        amount = fields(budget)[-1].name
        least, most = getattr(self, amount)
        return replace(budget, **{amount: min(max(getattr(budget, amount), least), most)})
