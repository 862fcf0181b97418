"""The prompt cache of a whole model: make one, or read one from a file and check it against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, load_prompt_cache, save_prompt_cache

from veloxlab.cache.batch import BatchCompressedKVCache
from veloxlab.cache.calibration import Calibration, layer_codec
from veloxlab.cache.chunked import ChunkedCompressedKVCache
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.plan import Chunk, LayerSettings, Plan, Sliding, plan_of
from veloxlab.cache.saved import add_checksum, checksummed
from veloxlab.checks import CACHE, CALIBRATIONS, FILE, TEXTS, checked
from veloxlab.codecs import METHODS, TENSORS, Codec, find_method, saving
from veloxlab.errors import InputError
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.hooks import attach
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.ropes import has_rope
from veloxlab.store import in_short, write_atomically

Fitted = Mapping[str, Calibration | None]  # by method


@checked(calibration=CALIBRATIONS)
def make_cache(
    model: Module,
    method_or_plan: str | Plan = "turboquant",
    *,
    bits: float | None = None,
    key_bits: float | None = None,
    value_bits: float | None = None,
    sinks: int | None = None,
    window: int | None = None,
    chunk: Chunk | None = None,
    sliding: Sliding | None = None,
    max_kv_size: int | None = None,
    calibration: Calibration | Sequence[Calibration] | None = None,
    **options: object,
) -> list[Any]:
    """Make a compressed prompt cache for ``model``: a list with one cache for each layer, for ``prompt_cache=``.

    Layers without keys and values (state-space, convolution) keep the model's own cache. Sliding layers hold the tokens
    that they can see, compressed. For latent attention (MLA) the latent is stored as keys, and the rotary part of the
    keys as values. Raises `InputError`: unknown method or option, bits out of range or together with a plan, a plan or
    calibration for another model.

    Parameters
    ----------
    model : any mlx-lm model, or the ``language_model`` of an mlx-vlm model. Batches of mlx-vlm make their caches with
        ``language_model.make_cache``: set that to a function that calls this one.
    method_or_plan : a method's id (`veloxlab.methods`), or a `veloxlab.Plan`, which has the bits of each layer.
    bits, key_bits, value_bits : code bits per coordinate, 4 by default; the last two override the first. Some methods
        take fractions. If a method plans the bits of a whole model, keys and values with equal bits share one budget.
    sinks, window : tokens kept exact, at the start and at the end; 4 and 64 by default. A plan has its own values of
        these two and the next two.
    chunk : whether tokens of one call attend to one another ``"exact"``, by default, or through their ``"codes"``.
    sliding : whether layers with a sliding window are ``"compressed"``, by default, or keep their ``"exact"`` cache.
    max_kv_size : the most tokens that layers without a sliding window hold, as mlx-lm's option of that name: the
        ``sinks`` and the newest ones; older ones are dropped. None keeps all.
    calibration : the result of `veloxlab.calibrate`, for a method that must be fitted; a list for a plan of several.
    options : the method's own, such as ``variant="prod"`` or ``rotation="haar"``.
    """
    if "method" in options:
        said = f"method={options['method']!r} is none of a method's options"
        raise InputError(f"{said}: give the method as method_or_plan, after the model.")
    plan = plan_of(method_or_plan)
    alone = None if isinstance(calibration, Sequence) else calibration  # one calibration is for all methods
    given = calibration if isinstance(calibration, Sequence) else [alone] if alone else []
    for one in given:
        one.check_model(model)
    widths = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits}
    if isinstance(plan, str):
        plan = Plan.uniform(model, plan, **widths, **options)  # type: ignore[arg-type]
        name = plan.model  # found once, because it takes a checksum of all weights
    else:
        _check_plan(plan, widths | options, given)
        name = name_of(model)
    asked = {"sinks": sinks, "window": window, "chunk": chunk, "sliding": sliding}
    plan = replace(plan, **{key: value for key, value in asked.items() if value is not None})
    if max_kv_size is not None and max_kv_size <= plan.sinks:
        raise InputError(f"max_kv_size={max_kv_size} leaves no room after sinks={plan.sinks}: give more than that.")
    attach()
    settings = plan.settings_for(model)
    fitted = dict.fromkeys(METHODS, alone) | {one.method: one for one in given}
    made = partial(_compressed, plan=plan, max_kv_size=max_kv_size, model=name, fitted=fitted)
    turns = bool(given) and has_rope(model)
    caches = probe.with_caches(model, lambda facts: made(facts, settings=settings[facts.layer], turns=turns))
    _mark_own(model, caches, name)
    return caches


def _mark_own(model: Module, caches: list[Any], name: str) -> None:
    """Add a checksum to the model's own caches in a compressed cache, so that all are saved with one."""
    for facts in probe.probe(model):
        own = probe.slot_of(caches, facts)
        if not isinstance(own, CompressedKVCache):
            asked = f"its window of {facts.max_size} tokens is left exact, as asked"
            add_checksum(own, name, facts.layer, asked if facts.compressible else facts.reason)


def _compressed(
    facts: probe.LayerFacts,
    *,
    plan: Plan,
    settings: LayerSettings,
    max_kv_size: int | None,
    model: str,
    fitted: Fitted,
    turns: bool,
) -> CompressedKVCache | None:
    """The compressed cache of a layer, or None if it keeps the model's own; ``turns``: whether RoPE rotates keys."""
    if facts.max_size is not None and plan.sliding == "exact":
        return None
    alone = (settings.key_method, settings.key_bits) != (settings.value_method, settings.value_bits)
    codecs = [
        layer_codec(
            *(find_method(method), facts.layer, facts.dims[tensor], bits, tensor, options, fitted.get(method)),
            alone=alone,
        )
        for tensor, method, bits, options in settings.tensors
    ]
    rotated = facts.path == "latents"  # the part of a latent's keys that RoPE rotates is stored as values
    calibration = fitted.get(settings.tensors[rotated][1])
    reach = codecs[rotated].reach(calibration.facts["tokens"]) if turns and calibration is not None else None
    kind = ChunkedCompressedKVCache if facts.native == ChunkedKVCache.__name__ else CompressedKVCache
    return kind(
        *codecs,
        sinks=plan.sinks if facts.max_size is None else facts.keep,
        window=plan.window,
        chunk=plan.chunk,
        layer=facts.layer,
        path=facts.path,
        reason=facts.reason,
        max_size=facts.max_size or max_kv_size,
        lends=facts.lends,
        model=model,
        reach=reach,
    )


def _check_plan(plan: Plan, beside: dict[str, Any], calibrations: Sequence[Calibration]) -> None:
    for name, value in beside.items():
        if value is not None:
            raise InputError(f"{name} was given together with a plan, which has it for each layer: change the plan.")
    for one in calibrations:
        wanted = plan.calibrations.get(one.method, one.identity)
        if one.identity != wanted:
            raise InputError(
                f"This plan was made with the calibration {wanted} of {one.method}, and {one.identity} was given: give "
                "the first, or make the plan again with the second."
            )


@checked(path=FILE, cache=CACHE, metadata=TEXTS)
def save_cache(path: str | Path, cache: Sequence[Any], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a prompt cache as mlx-lm's ``save_prompt_cache`` does, but atomically, and return its path.

    The file is a ``.safetensors`` file. mlx-lm's ``load_prompt_cache`` returns ``metadata``. Raises `InputError` if the
    file cannot be written, or the cache cannot be saved.
    """
    file = Path(path) if str(path).endswith(".safetensors") else Path(f"{path}.safetensors")  # as mlx-lm does
    save: Any = save_prompt_cache  # it hands a file on to MLX, which takes an open one too
    return write_atomically(file, lambda part: save(part, cache, metadata))


@checked(path=FILE, calibration=CALIBRATIONS)
def load_cache(path: str | Path, model: Module, method_or_plan: str | Plan | None = None, **settings: Any) -> list[Any]:
    """Read a prompt cache that `save_cache` or mlx-lm's own function wrote, and check that it is for ``model``.

    Each layer of a cache from `make_cache`, exact ones too, has the name of its model and a checksum. A cache from
    mlx-lm has neither, so its layers must have the number, kinds, shapes and dtypes of this model's. Give
    ``method_or_plan`` and ``settings`` as for `make_cache` to require this method, bits and calibration. Raises
    `InputError` if the file is missing, damaged, for another model, or not as required.
    """
    for own in probe.slots_of(probe.own_cache(model)):
        checksummed(type(own))  # makes the class, which mlx-lm looks up by its name
    attach()
    probe.probe(model)  # so that its name is known when caches are checked
    try:
        caches = list(load_prompt_cache(str(path)))
        mx.eval([cache.state for cache in caches])  # mlx-lm reads arrays lazily
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # truncated, of another kind, or of a class that mlx-lm does not know
        reason = in_short(error) if Path(path).exists() else "there is no such file"
        raise InputError(f"The prompt cache {path} cannot be read ({reason}): make it again from its text.") from error
    wanted = method_or_plan is not None or settings
    check_caches(model, caches, make_cache(model, method_or_plan or "turboquant", **settings) if wanted else None)
    return caches


def check_caches(model: Module, caches: Sequence[Any], wanted: Sequence[Any] | None = None) -> None:
    """Raise `InputError` unless all ``caches`` are for ``model``, with the codecs of those ``wanted``."""
    name = name_of(model)
    for part in sequences_of(caches):
        said = getattr(part, "model", None)
        if said not in (None, name):
            raise InputError(f"This prompt cache was made for the model {said}, and this is {name}: load that model.")
    misfit = _misfit(caches, probe.after_one_token(model), probe.probe(model))
    if misfit:
        raise InputError(
            f"This model ({name}) cannot continue this prompt cache, because {misfit}: load the model that it was "
            "made for, or make it again from its text."
        )
    if wanted is None:
        return
    for slot, asked in zip(probe.slots_of(caches), probe.slots_of(wanted), strict=True):
        for found in sequences_of([slot]):
            # a class with a checksum counts as mlx-lm's own class
            if getattr(found, "native", type(found)) is not getattr(asked, "native", type(asked)):
                raise InputError("This prompt cache has layers of other kinds than what was asked for: make it again.")
            for name in ("key_codec", "value_codec") if isinstance(found, CompressedKVCache) else ():
                _check_codec(getattr(found, name), getattr(asked, name), found.layer)


def _misfit(caches: Sequence[Any], own: Sequence[Any], facts: Sequence[probe.LayerFacts]) -> str | None:
    """Describe how ``caches`` differ from the model's ``own`` caches after one token; None if they fit."""
    if len(caches) != len(own):
        return f"it has {len(caches)} layers and the model has {len(own)}"
    lengths: list[object] = []
    for layer, (entry, like) in enumerate(zip(caches, own, strict=True)):
        for slot, number in zip(probe.slots_of([entry]), (f.layer for f in facts if f.entry == layer), strict=False):
            for part in sequences_of([slot]):
                if getattr(part, "layer", None) not in (None, number):
                    return f"layer {part.layer} is in the place of layer {number}"
        slots, likes = probe.slots_of([entry]), probe.slots_of([like])
        kinds, usual_kinds = (" and ".join(map(_kind, some)) for some in (slots, likes))
        if kinds != usual_kinds:
            return f"layer {layer} holds {kinds}, and the model's {usual_kinds}"
        for slot, expected in zip(slots, likes, strict=True):
            for found, usual in zip(_held(slot), _held(expected), strict=False):
                if found and usual and found != usual:
                    return f"layer {layer} holds {found}, and the model's {usual}"
            if getattr(expected, "offset", 0):  # a layer that stores no tokens of its own keeps its offset
                lengths.append(slot.offset.tolist() if isinstance(slot.offset, mx.array) else slot.offset)
                if lengths[-1] != lengths[0]:
                    return f"layer {layer} has read {lengths[-1]} tokens, and those before it {lengths[0]}"
    return None


def _check_codec(theirs: Codec, ours: Codec, layer: int) -> None:
    if not saving.same_kind(theirs, ours):
        held, asked = (f"{saving.method_of(c)[0]} at {c.bits_per_value:g} bits a value" for c in (theirs, ours))
        said = f"This prompt cache holds {held} in layer {layer}, and {asked} was asked for"
        raise InputError(f"{said}: ask for what it holds, or make it again.")
    if not (ours.online or saving.same_codec(theirs, ours)):
        raise InputError(
            f"This prompt cache was made with another calibration of {saving.method_of(ours)[0]}, or other options, "
            f"than was asked for (layer {layer} differs): ask for those, or make the cache again."
        )


def sequences_of(caches: Sequence[Any]) -> list[Any]:
    """All single caches of a prompt cache; a batch of ours gives those of its sequences."""
    slots = probe.slots_of(caches)
    return [part for slot in slots for part in (slot.rows if isinstance(slot, BatchCompressedKVCache) else [slot])]


def _kind(cache: Any) -> str:  # noqa: ANN401
    if hasattr(cache, "keys_and_values") or type(cache).__name__.endswith("KVCache"):  # mlx-vlm's lack the first
        return "keys and values"
    return "states" if _has_states(cache) else type(cache).__name__


def _has_states(cache: Any) -> bool:  # noqa: ANN401
    return type(cache).__name__.endswith(ArraysCache.__name__)  # mlx-vlm has one of its own


def _held(cache: Any) -> list[str | None]:  # noqa: ANN401
    """Describe the keys and values, or the states, in a cache of mlx-lm's; None for empty ones."""
    if _has_states(cache):  # states with fewer axes may be tokens, whose number grows
        return [None if x is None or x.ndim < 3 else f"a state of {x.shape[1:]}" for x in cache.cache]
    held: list[str | None] = []
    for tensor in TENSORS:
        x: Any = getattr(cache, tensor, None)
        packed = isinstance(x, list | tuple)  # mlx-lm's quantized: words, scales, biases
        x = x[-1] if packed else x
        if x is None:
            held.append(None)
        elif getattr(x, "ndim", 0) != 4:
            held.append(f"{tensor} that are none")
        else:
            width = x.shape[-1] * (cache.group_size if packed else 1)
            held.append(f"{tensor} of {x.shape[1]} heads, {width} wide, in {str(x.dtype).rpartition('.')[2]}")
    return held
