"""Codecs as files: plain fields become JSON, arrays become tensors of a safetensors file. Nothing is pickled."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx

from veloxlab.codecs.codec import Codec
from veloxlab.codecs.rope import Rope

Plain = dict[str, Any]
Arrays = dict[str, mx.array]
T = TypeVar("T")
ROPE = "rope"  # the one field that is a dataclass itself


def to_parts(codec: Codec) -> tuple[Plain, Arrays]:
    """Split a codec into what JSON can hold and its arrays, both by field; those of its rope are named ``rope.…``."""
    return _split(codec, "")


def from_parts(unfitted: Codec, plain: Plain, arrays: Arrays) -> Codec:
    """Fill ``unfitted``, a codec of the same method and options, with what `to_parts` gave.

    Raises
    ------
    ValueError : a field is missing or unknown: this was saved by another version.
    """
    own = {name: value for name, value in (plain | arrays).items() if not name.startswith(f"{ROPE}.")}
    nested = {name.removeprefix(f"{ROPE}."): v for name, v in (plain | arrays).items() if name.startswith(f"{ROPE}.")}
    if nested:
        own[ROPE] = _filled(Rope(0), nested)
    return _filled(unfitted, own)


def _split(thing: object, prefix: str) -> tuple[Plain, Arrays]:
    plain: Plain = {}
    arrays: Arrays = {}
    assert is_dataclass(thing)
    for field in fields(thing):
        value = getattr(thing, field.name)
        if isinstance(value, mx.array):
            arrays[prefix + field.name] = value
        elif isinstance(value, Rope):
            inner = _split(value, f"{prefix}{field.name}.")
            plain, arrays = plain | inner[0], arrays | inner[1]
        else:
            plain[prefix + field.name] = value
    return plain, arrays


def _filled(thing: T, values: Plain) -> T:
    known = {field.name for field in fields(thing)}  # type: ignore[arg-type]
    if values.keys() != known:
        raise ValueError(f"its fields are {sorted(values)} and not {sorted(known)}")
    return replace(thing, **{name: _tuples(value) for name, value in values.items()})  # type: ignore[type-var]


def _tuples(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """JSON has lists where codecs have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
