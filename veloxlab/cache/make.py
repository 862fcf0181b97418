"""The prompt cache of a whole model, made compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx.nn.layers.base import Module
from mlx_lm.models.cache import RotatingKVCache

from veloxlab.cache.calibration import Calibration, layer_codec
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.plan import Chunk, LayerSettings, Plan, Sliding, plan_of
from veloxlab.cache.saved import add_checksum
from veloxlab.checks import CALIBRATIONS, checked
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import attach
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import LayerFacts, probe, slot_of, with_caches


@checked(calibration=CALIBRATIONS)
def make_cache(
    model: Module,
    method_or_plan: str | Plan = "turboquant",
    *,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int | None = None,
    window: int | None = None,
    chunk: Chunk | None = None,
    sliding: Sliding | None = None,
    max_kv_size: int | None = None,
    calibration: Calibration | Sequence[Calibration] | None = None,
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
    plan = plan_of(method_or_plan)
    given = () if calibration is None else calibration if isinstance(calibration, Sequence) else (calibration,)
    for one in given:
        one.check_model(model)
    widths = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits}
    if isinstance(plan, str):
        plan = Plan.uniform(model, plan, **widths, **options)  # type: ignore[arg-type]
    else:
        _check_plan(plan, widths | options, given)
    asked = {"sinks": sinks, "window": window, "chunk": chunk, "sliding": sliding}
    plan = replace(plan, **{name: value for name, value in asked.items() if value is not None})
    if max_kv_size is not None and max_kv_size <= plan.sinks:
        raise InputError(f"max_kv_size={max_kv_size} leaves no room behind sinks={plan.sinks}: give more than that.")
    attach()
    name, settings = name_of(model), plan.settings_for(model)
    caches = with_caches(
        model, lambda found: _compressed(found, plan, settings[found.layer], max_kv_size, name, calibration)
    )
    for found in probe(model):
        own = slot_of(caches, found)
        if not isinstance(own, CompressedKVCache):
            add_checksum(own, name, found.layer, getattr(own, "reason", found.reason))
    return caches


def _compressed(
    facts: LayerFacts,
    plan: Plan,
    settings: LayerSettings,
    max_kv_size: int | None,
    model: str,
    calibration: Calibration | Sequence[Calibration] | None,
) -> Any:  # noqa: ANN401 - ours, or mlx-lm's own
    """The cache of one layer that can be compressed."""
    if facts.max_size is not None and plan.sliding == "exact":
        own: Any = RotatingKVCache(facts.max_size, facts.keep)
        own.reason = f"its window of {facts.max_size} tokens is left exact, as asked"
        return own
    codecs = (
        layer_codec(
            find_method(method), facts.layer, facts.dims[tensor], bits, tensor, options, _of(method, calibration)
        )
        for tensor, method, bits, options in settings.tensors
    )
    return CompressedKVCache(
        *codecs,
        sinks=plan.sinks if facts.max_size is None else facts.keep,
        window=plan.window,
        chunk=plan.chunk,
        layer=facts.layer,
        path=facts.path,
        reason=facts.reason,
        max_size=max_kv_size if facts.max_size is None else facts.max_size,
        lends=facts.lends,
        model=model,
    )


def _check_plan(plan: Plan, beside: dict[str, Any], calibrations: Sequence[Calibration]) -> None:
    """Raise `InputError` if bits or options stand ``beside`` a plan, or other calibrations than it was made with."""
    for name, value in beside.items():
        if value is not None:
            raise InputError(f"{name} was given beside a plan, which says that for each layer: change the plan.")
    for one in calibrations:
        wanted = plan.calibrations.get(one.method, one.identity)
        if one.identity != wanted:
            raise InputError(
                f"This plan was made with the calibration {wanted} of {one.method}, and {one.identity} was given: give "
                "that one, or make the plan again with this."
            )


def _of(method: str, calibration: Calibration | Sequence[Calibration] | None) -> Calibration | None:
    """The calibration of ``method`` among several; one that was given alone is for all."""
    if not isinstance(calibration, Sequence):
        return calibration
    return next((one for one in calibration if one.method == method), None)
