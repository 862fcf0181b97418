"""The prompt cache of a whole model, made compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from mlx.nn.layers.base import Module
from mlx_lm.models.cache import RotatingKVCache

from veloxlab.cache.layer import DEFAULT_CHUNK, DEFAULT_SINKS, DEFAULT_WINDOW, Chunk, CompressedKVCache
from veloxlab.cache.saved import seal
from veloxlab.checks import CALIBRATIONS, OPTION_VALUES, WORDS, check_fields, checked, whole
from veloxlab.codecs import Role, find_method
from veloxlab.codecs.method import Calibrated, layer_codec
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import attach
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import LayerFacts, exact_width, probe, slot_of, with_caches

Sliding = Literal["compressed", "exact"]

DEFAULT_BITS = 4
DEFAULT_SLIDING: Sliding = "compressed"


@dataclass(frozen=True)
class LayerSettings:
    """How one layer's cache is to be made: a method and code bits for keys and for values, and the methods' options.

    ``options`` are both sides', ``key_options`` and ``value_options`` those of one, such as the widths of its heads.
    """

    key_method: str
    key_bits: int
    value_method: str
    value_bits: int
    options: dict[str, object] = field(default_factory=dict)
    key_options: dict[str, object] = field(default_factory=dict)
    value_options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, key_method=WORDS, key_bits=whole(), value_method=WORDS, value_bits=whole())
        check_fields(self, options=OPTION_VALUES, key_options=OPTION_VALUES, value_options=OPTION_VALUES)

    @property
    def sides(self) -> tuple[tuple[Role, str, int, dict[str, object]], ...]:
        """Role, method, bits and options of keys and of values."""
        return (
            ("keys", self.key_method, self.key_bits, self.options | self.key_options),
            ("values", self.value_method, self.value_bits, self.options | self.value_options),
        )


def usual_bits(method: str, exact_bits: int, bits: int | None = None) -> int:
    """Code bits where ``bits`` is None: those of an exact value for ``"none"``, else `DEFAULT_BITS`."""
    if bits is not None:
        return bits
    return exact_bits if method == "none" else DEFAULT_BITS


def side_bits(
    method: str, exact_bits: int, bits: int | None = None, key_bits: int | None = None, value_bits: int | None = None
) -> dict[Role, int]:
    """Code bits of keys and of values: those of one side override ``bits``, and no number but None is a default."""
    both = usual_bits(method, exact_bits, bits)
    return {"keys": both if key_bits is None else key_bits, "values": both if value_bits is None else value_bits}


def cache_name(method: str, widths: Mapping[Role, int]) -> str:
    """What a cache of one method is called, such as ``"turboquant K4 V4"``."""
    return method if method == "none" else f"{method} K{widths['keys']} V{widths['values']}"


class LayerPlan(Protocol):
    """Settings for every layer of a model, such as a `veloxlab.Plan`."""

    @property
    def sinks(self) -> int: ...  # noqa: D102 - as for `make_cache`
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def chunk(self) -> Chunk: ...  # noqa: D102
    @property
    def sliding(self) -> Sliding: ...  # noqa: D102
    @property
    def calibrations(self) -> Mapping[str, str]:
        """Identities of the calibrations that the plan was made with, by method."""

    def settings_for(self, model: Module) -> Sequence[LayerSettings]:
        """One entry per entry of the prompt cache; raises `InputError` for another model's plan."""


class ModelCalibration(Calibrated, Protocol):
    """Codecs fitted to one model, such as a `veloxlab.Calibration`."""

    @property
    def method(self) -> str:
        """Id of the method whose codecs they are."""

    @property
    def identity(self) -> str:
        """What tells this calibration from others."""

    def check_model(self, model: Module) -> None:
        """Raise `InputError` unless the codecs were fitted to ``model``."""


@checked(calibration=CALIBRATIONS)
def make_cache(
    model: Module,
    method_or_plan: str | LayerPlan = "turboquant",
    *,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int | None = None,
    window: int | None = None,
    chunk: Chunk | None = None,
    sliding: Sliding | None = None,
    max_kv_size: int | None = None,
    calibration: ModelCalibration | Sequence[ModelCalibration] | None = None,
    **options: object,
) -> list[Any]:
    """Make a compressed prompt cache for ``model``: a list with one cache per layer, for ``prompt_cache=``.

    Layers that hold no keys and values (state-space, convolution), or latents (MLA), keep the model's own; so does all
    but one cache of a layer that has several. Sliding layers hold what they can see, compressed.

    Parameters
    ----------
    model : any mlx-lm model.
    method_or_plan : a method's id (`veloxlab.methods`), or a `veloxlab.Plan`, which says which bits each layer gets.
    bits, key_bits, value_bits : code bits per coordinate, 4 by default; the last two override the first.
    sinks, window : tokens kept exact, at the start and at the end; 4 and 64 by default, or the plan's.
    chunk : whether tokens of one call attend to one another ``"exact"`` or through their ``"codes"``; the former by
        default, or the plan's.
    sliding : whether layers with a sliding window are ``"compressed"``, or keep the model's own ``"exact"`` cache; the
        former by default, or the plan's.
    max_kv_size : tokens that layers without a window of their own are to hold at most, as mlx-lm's option of that name:
        the ``sinks`` and the newest ones, older ones are forgotten. None keeps all.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted; several, for a plan of several.
    options : the method's own, such as ``variant="prod"`` or ``rotation="haar"``.

    Raises
    ------
    InputError : unknown method or option, bits out of range, a plan or a calibration for another model, another
        calibration than the plan was made with, bits beside a plan.
    """
    from veloxlab.cache.plan import plan_of  # which imports this module

    method_or_plan = plan_of(method_or_plan)
    facts = probe(model)
    given = () if calibration is None else calibration if isinstance(calibration, Sequence) else (calibration,)
    for one in given:
        one.check_model(model)
    widths = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits}
    if isinstance(method_or_plan, str):
        settings = _uniform(model, method_or_plan, widths, options)
        usual = Exactness(DEFAULT_SINKS, DEFAULT_WINDOW, DEFAULT_CHUNK, DEFAULT_SLIDING)
    else:
        beside = [name for name, value in (widths | options).items() if value is not None]
        if beside:
            raise InputError(f"{beside[0]} was given beside a plan, which says that for each layer: change the plan.")
        plan = method_or_plan
        settings = plan.settings_for(model)
        _check_calibrations(plan, given)
        usual = Exactness(plan.sinks, plan.window, plan.chunk, plan.sliding)
    asked = {"sinks": sinks, "window": window, "chunk": chunk, "sliding": sliding}
    exact = replace(usual, **{name: value for name, value in asked.items() if value is not None})  # type: ignore[arg-type]
    if max_kv_size is not None and max_kv_size <= exact.sinks:
        raise InputError(f"max_kv_size={max_kv_size} leaves no room behind sinks={exact.sinks}: give more than that.")
    attach()
    name = name_of(model)
    caches = with_caches(
        model, lambda found: _compressed(found, settings[found.layer], exact, max_kv_size, name, calibration)
    )
    for found in facts:
        own = slot_of(caches, found)
        if not isinstance(own, CompressedKVCache):
            seal(own, name, found.layer, getattr(own, "reason", found.reason))
    return caches


def _check_calibrations(plan: LayerPlan, given: Sequence[ModelCalibration]) -> None:
    for one in given:
        wanted = plan.calibrations.get(one.method, one.identity)
        if one.identity != wanted:
            raise InputError(
                f"This plan was made with the calibration {wanted} of {one.method}, and {one.identity} was given: give "
                "that one, or make the plan again with this."
            )


def _uniform(
    model: Module, method: str, widths: Mapping[str, int | None], options: dict[str, object]
) -> Sequence[LayerSettings]:
    """The same settings for every layer."""
    sides = side_bits(method, exact_width(model), **widths)
    settings = LayerSettings(method, sides["keys"], method, sides["values"], options)
    return [settings] * (1 + max(found.layer for found in probe(model)))


@dataclass(frozen=True)
class Exactness:
    """Which tokens of a cache are kept exact; see `make_cache`."""

    sinks: int
    window: int
    chunk: Chunk
    sliding: Sliding


def _compressed(
    facts: LayerFacts,
    layer: LayerSettings,
    exact: Exactness,
    max_kv_size: int | None,
    model: str,
    calibration: ModelCalibration | Sequence[ModelCalibration] | None,
) -> Any:  # noqa: ANN401 - ours, or mlx-lm's own
    if facts.max_size is not None and exact.sliding == "exact":
        own: Any = RotatingKVCache(facts.max_size, facts.keep)
        own.reason = f"its window of {facts.max_size} tokens is left exact, as asked"
        return own
    key_codec, value_codec = (
        layer_codec(
            find_method(method), facts.layer, facts.dims[role], bits, role, options, _for_method(calibration, method)
        )
        for role, method, bits, options in layer.sides
    )
    return CompressedKVCache(
        key_codec,
        value_codec,
        sinks=exact.sinks if facts.max_size is None else facts.keep,
        window=exact.window,
        chunk=exact.chunk,
        layer=facts.layer,
        path=facts.path,
        reason=facts.reason,
        max_size=max_kv_size if facts.max_size is None else facts.max_size,
        lends=facts.lends,
        model=model,
    )


def _for_method(
    calibration: ModelCalibration | Sequence[ModelCalibration] | None, method: str
) -> ModelCalibration | None:
    """The calibration of ``method`` among several; one that was given alone is for all."""
    if not isinstance(calibration, Sequence):
        return calibration
    return next((one for one in calibration if one.method == method), None)
