"""The prompt cache of a whole model: made compressed, read from a file, and checked against what is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from mlx.nn.layers.base import Module
from mlx_lm.models.cache import RotatingKVCache, load_prompt_cache

from veloxlab import cache_file
from veloxlab.cache import DEFAULT_CHUNK, DEFAULT_SINKS, DEFAULT_WINDOW, Chunk, CompressedKVCache
from veloxlab.codecs import Role, find_method
from veloxlab.codecs.method import Calibrated, layer_codec
from veloxlab.codecs.saving import described, method_of, same_codec, same_kind
from veloxlab.errors import InputError
from veloxlab.integrate import LayerFacts, attach, exact_width, probe, slot_of, slots_of, with_caches

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

    Layers that hold no keys and values (state-space, convolution), or latents (MLA), keep the model's own. Sliding
    layers hold what they can see, compressed.

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
    name = cache_file.models_here[id(model)]
    caches = with_caches(
        model, lambda found: _compressed(found, settings[found.layer], exact, max_kv_size, name, calibration)
    )
    for found in probe(model):
        if not found.compressible:
            slot_of(caches, found).reason = found.reason  # for reports
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


def load_cache(
    path: str | Path,
    model: Module,
    method_or_plan: str | LayerPlan | None = None,
    **settings: Any,
) -> list[Any]:
    """Read a prompt cache that mlx-lm's ``save_prompt_cache`` wrote, and check that it is one for ``model``.

    Parameters
    ----------
    path : the file.
    model : the model that is to continue.
    method_or_plan, settings : as for `make_cache`, if the cache has to be of that method, bits and calibration.

    Raises
    ------
    InputError : there is no such file, it is damaged, or what it holds is not for this model, or not as wanted.
    """
    probe(model)  # so that a cache made for it is known to be for a model that is here
    try:
        caches = load_prompt_cache(str(path))
    except InputError:
        raise
    except Exception as error:  # truncated, of another kind, or of a class that mlx-lm does not know
        reason = "there is no such file" if not Path(path).exists() else str(error)
        raise InputError(f"The prompt cache {path} cannot be read ({reason}): make it again from its text.") from error
    wanted = method_or_plan is not None or settings
    check_caches(model, caches, make_cache(model, method_or_plan or "turboquant", **settings) if wanted else None)
    return list(caches)


def check_caches(model: Module, caches: Sequence[Any], wanted: Sequence[Any] | None = None) -> None:
    """Raise `InputError` unless ``caches`` were made for ``model``, and hold what those ``wanted`` would."""
    probe(model)
    name = cache_file.models_here[id(model)]
    for found in _compressed_ones(caches):
        if found.model != name:
            raise InputError(
                f"This prompt cache was made for the model {found.model}, and this is {name}: load that model."
            )
    if wanted is None or not caches:
        return
    if [type(c) for c in caches] != [type(c) for c in wanted]:
        raise InputError("This prompt cache has layers of other kinds than what was asked for: make it again.")
    for found, asked in zip(_compressed_ones(caches), _compressed_ones(wanted), strict=True):
        for side in ("key_codec", "value_codec"):
            theirs, ours = getattr(found, side), getattr(asked, side)
            if not same_kind(theirs, ours):
                raise InputError(
                    f"This prompt cache holds {described(theirs)} in layer {found.layer}, and {described(ours)} was "
                    "asked for: ask for what it holds, or make it again."
                )
            if not (getattr(ours, "online", False) or same_codec(theirs, ours)):
                raise InputError(
                    f"This prompt cache was made with another calibration of {method_of(ours)}, or other options, than "
                    f"was asked for (layer {found.layer} differs): ask for those, or make the cache again."
                )


def _compressed_ones(caches: Sequence[Any]) -> list[CompressedKVCache]:
    return [slot for slot in slots_of(caches) if isinstance(slot, CompressedKVCache)]


@dataclass(frozen=True)
class Exactness:
    """Which tokens of a cache are kept exact; see `make_cache`."""

    sinks: int
    window: int
    chunk: Chunk
    sliding: Sliding

    def __post_init__(self) -> None:
        if self.sliding not in ("compressed", "exact"):
            raise InputError(f"sliding={self.sliding!r} is unknown: choose 'compressed' or 'exact'.")


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
