"""A prompt cache that comes from a file: read, and checked against the model that is to continue it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import ArraysCache, load_prompt_cache

from veloxlab.cache.batch import BatchCompressedKVCache
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.make import make_cache
from veloxlab.cache.plan import Plan
from veloxlab.checks import CALIBRATIONS, FILE, checked
from veloxlab.codecs.saving import described, method_of, same_codec, same_kind
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import attach
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import after_one_token, probe, slots_of

_AXES = 4  # of keys and values: batch, heads, tokens, width


@checked(path=FILE, calibration=CALIBRATIONS)
def load_cache(
    path: str | Path,
    model: Module,
    method_or_plan: str | Plan | None = None,
    **settings: Any,
) -> list[Any]:
    """Read a prompt cache that mlx-lm's ``save_prompt_cache`` wrote, and check that it is one for ``model``.

    All layers of a cache that `make_cache` made say which model they are for, exact ones too, and have a checksum. A
    cache that mlx-lm made says neither: then its layers have to be as many, and of the kinds, shapes and dtypes, as
    this model makes them.

    Parameters
    ----------
    path : the file.
    model : the model that is to continue.
    method_or_plan, settings : as for `make_cache`, if the cache has to be of that method, bits and calibration.

    Raises
    ------
    InputError : there is no such file, it is damaged, or what it holds is not for this model, or not as wanted.
    """
    attach()
    probe(model)  # so that a cache made for it is known to be for a model that is here
    try:
        caches = list(load_prompt_cache(str(path)))
        mx.eval([cache.state for cache in caches])  # mlx-lm reads arrays when they are needed
    except InputError:
        raise
    except Exception as error:  # truncated, of another kind, or of a class that mlx-lm does not know
        reason = "there is no such file" if not Path(path).exists() else str(error)
        raise InputError(f"The prompt cache {path} cannot be read ({reason}): make it again from its text.") from error
    wanted = method_or_plan is not None or settings
    check_caches(model, caches, make_cache(model, method_or_plan or "turboquant", **settings) if wanted else None)
    return caches


def check_caches(model: Module, caches: Sequence[Any], wanted: Sequence[Any] | None = None) -> None:
    """Raise `InputError` unless all ``caches`` are for ``model``, and hold what those ``wanted`` would."""
    name = name_of(model)
    for part in _parts(caches):
        said = getattr(part, "model", None)
        if said not in (None, name):
            raise InputError(f"This prompt cache was made for the model {said}, and this is {name}: load that model.")
    misfit = _misfit(caches, after_one_token(model))
    if misfit:
        raise InputError(
            f"This prompt cache is none that this model ({name}) can continue, as {misfit}: load the model that it was "
            "made for, or make it again from its text."
        )
    if wanted is not None:
        _check_wanted(caches, wanted)


def _misfit(caches: Sequence[Any], own: Sequence[Any]) -> str | None:
    """What tells ``caches`` from such as the model's ``own`` after one token would become, in words."""
    if len(caches) != len(own):
        return f"it has {len(caches)} layers and the model {len(own)}"
    lengths: list[object] = []
    for layer, (entry, like) in enumerate(zip(caches, own, strict=True)):
        for part in _parts([entry]):
            if getattr(part, "layer", None) not in (None, layer):
                return f"layer {part.layer} stands in the place of layer {layer}"
        slots, likes = slots_of([entry]), slots_of([like])
        kinds = [[_kind(slot) for slot in some] for some in (slots, likes)]
        if kinds[0] != kinds[1]:
            return f"layer {layer} holds {' and '.join(kinds[0])}, and the model's {' and '.join(kinds[1])}"
        for slot, expected in zip(slots, likes, strict=True):
            for found, usual in zip(_held(slot), _held(expected), strict=False):
                if found and usual and found != usual:
                    return f"layer {layer} holds {found}, and the model's {usual}"
            if getattr(expected, "offset", 0):  # a layer that stores nothing of its own stays where it was
                lengths.append(slot.offset.tolist() if isinstance(slot.offset, mx.array) else slot.offset)
                if lengths[-1] != lengths[0]:
                    return f"layer {layer} has read {lengths[-1]} tokens, and those before it {lengths[0]}"
    return None


def _check_wanted(caches: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Raise `InputError` unless ``caches``, which fit the model, hold what those ``wanted`` would."""
    for slot, asked in zip(slots_of(caches), slots_of(wanted), strict=True):
        for found in _parts([slot]):
            ours = isinstance(asked, CompressedKVCache)
            if ours and isinstance(found, CompressedKVCache):
                _check_codecs(found, asked)
            elif ours or _native(found) is not _native(asked):
                raise InputError("This prompt cache has layers of other kinds than what was asked for: make it again.")


def _check_codecs(found: CompressedKVCache, asked: CompressedKVCache) -> None:
    for side in ("key_codec", "value_codec"):
        theirs, ours = getattr(found, side), getattr(asked, side)
        if not same_kind(theirs, ours):
            raise InputError(
                f"This prompt cache holds {described(theirs)} in layer {found.layer}, and {described(ours)} was "
                "asked for: ask for what it holds, or make it again."
            )
        if not (ours.online or same_codec(theirs, ours)):
            raise InputError(
                f"This prompt cache was made with another calibration of {method_of(ours)}, or other options, than "
                f"was asked for (layer {found.layer} differs): ask for those, or make the cache again."
            )


def _parts(caches: Sequence[Any]) -> list[Any]:
    """Single caches of single sequences, where they are ours."""
    return [part for slot in slots_of(caches) for part in getattr(slot, "rows", [slot])]


def _native(cache: Any) -> type:  # noqa: ANN401
    """The class of a cache, or that of mlx-lm which it was before it had a checksum."""
    return getattr(cache, "native", type(cache))


def _kind(cache: Any) -> str:  # noqa: ANN401
    ours = isinstance(cache, CompressedKVCache | BatchCompressedKVCache)
    if ours or hasattr(cache, "keys"):
        return "keys and values"
    return "states" if isinstance(cache, ArraysCache) else type(cache).__name__


def _held(cache: Any) -> list[str | None]:  # noqa: ANN401
    """What a cache that mlx-lm made holds of keys and of values, or its states, in words; None for what is empty."""
    if isinstance(cache, ArraysCache):  # states of fewer axes may be past tokens, which become more
        return [None if x is None or x.ndim < 3 else f"a state of {x.shape[1:]}" for x in cache.cache]
    held: list[str | None] = []
    for side in ("keys", "values"):
        x: Any = getattr(cache, side, None)
        packed = isinstance(x, list | tuple)  # mlx-lm's quantized: words, scales, biases
        x = x[-1] if packed else x
        if x is None:
            held.append(None)
        elif getattr(x, "ndim", 0) != _AXES:
            held.append(f"{side} that are none")
        else:
            width = x.shape[-1] * (cache.group_size if packed else 1)
            held.append(f"{side} of {x.shape[1]} heads, {width} wide, in {str(x.dtype).rpartition('.')[2]}")
    return held
