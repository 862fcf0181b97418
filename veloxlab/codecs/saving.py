"""Codecs as files: plain fields become JSON, arrays become tensors of a safetensors file. Nothing is pickled."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any, TypeVar

import mlx.core as mx

from veloxlab.codecs import METHODS, find_method, registered
from veloxlab.codecs.base import Codec
from veloxlab.codecs.parts.rope import Rope
from veloxlab.errors import InputError

Plain = dict[str, Any]
Arrays = dict[str, mx.array]
T = TypeVar("T")
ROPE = "rope"  # the one field that is a dataclass itself
_RENAMED = {"role": "tensor"}  # names of fields in files of version 0.1, and today's


def to_parts(codec: Codec) -> tuple[Plain, Arrays]:
    """Split a codec into JSON values and arrays, both by field; arrays of its rope are named ``rope.…``."""
    values = _fields(codec)
    if isinstance(values.get(ROPE), Rope):
        values |= {f"{ROPE}.{name}": value for name, value in _fields(values.pop(ROPE)).items()}
    arrays = {name: value for name, value in values.items() if isinstance(value, mx.array)}
    return {name: value for name, value in values.items() if name not in arrays}, arrays


def from_parts(kind: type[T], plain: Plain, arrays: Arrays) -> T:
    """Make a codec of the class ``kind`` from the result of `to_parts`; `ValueError` if the fields differ."""
    values = {_RENAMED.get(name, name): value for name, value in (plain | arrays).items()}
    of_rope = {name: values.pop(name) for name in [*values] if name.startswith(f"{ROPE}.")}
    if of_rope:
        values[ROPE] = _filled(Rope, {name.removeprefix(f"{ROPE}."): value for name, value in of_rope.items()})
    return _filled(kind, values)


def method_of(codec: Codec) -> tuple[str, int]:
    """Id and version of the method of a codec. If no method has it, the version is 0, and it cannot be read again.

    Each of our methods has its own file; others list their classes.
    """
    name = type(codec).__module__.rpartition(".")[2]
    return registered(type(codec)) or (name, METHODS[name].version if name in METHODS else 0)


def same_kind(one: Codec, other: Codec) -> bool:
    """Whether two codecs have the same method and bits."""
    return type(one) is type(other) and one.bits_per_value == other.bits_per_value


def same_codec(one: Codec, other: Codec) -> bool:
    """Whether two codecs have the same class, options and learned arrays."""
    (plain, arrays), (other_plain, others) = to_parts(one), to_parts(other)
    same = same_kind(one, other) and plain == other_plain and arrays.keys() == others.keys()
    return same and all(mx.array_equal(arrays[name], others[name]).item() for name in arrays)


def find_class(name: str) -> type[Codec]:
    """The codec class of a name such as ``"turboquant.TurboQuant"``; raises `InputError` if no method here has it."""
    method, _, kind = name.partition(".")
    ours = METHODS.get(method)
    named = {each.__name__: each for each in ours.codecs} if ours else {}
    if ours and not named:
        named = vars(import_module(f"veloxlab.codecs.{method}"))
    found = named.get(kind)
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise InputError(
            f"No method here has a codec called {name!r}: register its method first, with vl.register(method)."
        )
    return found


def check_version(method: str, version: object) -> None:
    """Raise `ValueError` unless a file's ``version`` of a method is the current one."""
    here = find_method(method).version
    if version != here:
        raise ValueError(f"it has codes of {method} of version {version}, and here they are of version {here}")


def _fields(thing: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    return {field.name: getattr(thing, field.name) for field in fields(thing)}


def _filled(kind: type[T], values: Plain) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if values.keys() != known:
        raise ValueError(f"its fields are {sorted(values)} and not {sorted(known)}")
    return kind(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """JSON has lists where codecs have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
