"""Checks of user input: a `Check` converts one kind of input, or refuses it in one sentence.

A `Check` accepts equivalent types (NumPy's numbers, any sequence) and returns Python's own. `checked` applies checks to
a function's arguments by name: ``bits`` or ``sinks`` mean the same in every function.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from numbers import Number, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from veloxlab.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
_REFUSALS = (TypeError, ValueError, OverflowError)
INF = float("inf")
_SHOWN = 60  # characters of a value in a message


def number_of_bits(bits: float | str) -> float:
    """Bits as an int if whole, else as a float, for methods that take fractions."""
    number = float(bits)
    return int(number) if number.is_integer() else number


_TOKENS = re.compile(r"\s*(\d[\d,]*)\s*(k?)\s*", re.IGNORECASE)


def number_of_tokens(words: str) -> int:
    """Read a number of tokens: ``"32768"``, ``"32,768"`` or ``"32k"``; raises `InputError` for other words."""
    found = _TOKENS.fullmatch(words)
    if not found:
        raise InputError(f"{words} is not a number of tokens: give 32768 or 32k.")
    return int(found[1].replace(",", "")) * (1024 if found[2] else 1)


@dataclass(frozen=True)
class Check:
    """One kind of input."""

    words: str  # what to give, for the sentence
    fits: Callable[[Any], Any] = lambda value: True  # or raises TypeError or ValueError if not
    convert: Callable[[Any], Any] = lambda value: value  # returns the value in the form that is used

    def read(self, value: Any) -> Any:  # noqa: ANN401
        """Convert ``value``; raises TypeError, ValueError or OverflowError if it is of another kind."""
        if not self.fits(value):
            raise ValueError
        return self.convert(value)

    def __call__(self, name: str, value: object) -> Any:  # noqa: ANN401
        """Convert ``value``; raises an `InputError` that names it and says what to give."""
        try:
            return self.read(value)
        except _REFUSALS:
            raise InputError(f"{name}{_shown(value)} cannot be used: give {self.words}.") from None


def whole(least: float = -INF, most: float = INF) -> Check:
    """An int of Python or NumPy, but not True or False."""
    limits = f", {least} or more" if most == INF else f" from {least} to {most}"
    words = f"a whole number{limits if least > -INF else ''}"
    return Check(words, lambda value: not isinstance(value, bool) and least <= value <= most, operator.index)


def number_of_tokens_up_to(most: int) -> Check:
    """A number of tokens, or its words."""
    number = whole(1, most)

    def convert(value: object) -> Any:  # noqa: ANN401
        return number.read(number_of_tokens(value) if isinstance(value, str) else value)

    return Check(f'{number.words}, or words such as "32k"', convert=convert)


def real(*, above: float = -INF, below: float = INF, least: float = -INF, most: float = INF) -> Check:
    """A finite number of Python or NumPy."""
    ends = {"above": above, "from": least, "below": below, "to": most}
    limits = " and".join(f" {word} {end:g}" for word, end in ends.items() if abs(end) < INF)

    def fits(value: Any) -> bool:  # noqa: ANN401
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and bool(above < value < below and least <= value <= most)

    return Check(f"a finite number{limits}", fits, float)


def choice(*words: str) -> Check:
    """One of the given words."""
    *first, last = map(repr, words)
    said = f"{', '.join(first)} or {last}" if first else last
    return Check(said, lambda value: isinstance(value, str) and value in words)


def many(each: Check, *, empty: bool = False) -> Check:
    """A list, a tuple, a range or the like, with at least one item unless ``empty`` is allowed; given as a tuple."""

    def convert(value: Iterable[Any]) -> tuple[Any, ...]:
        found = tuple(map(each.read, value))
        if not (found or empty):
            raise ValueError
        return found

    return Check(
        f"a list{'' if empty else ' of one or more'}, each {each.words}",
        lambda value: isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping),
        convert,
    )


def either(*checks: Check) -> Check:
    """The first of ``checks`` that accepts the value."""

    def convert(value: object) -> Any:  # noqa: ANN401
        for check in checks:
            with suppress(*_REFUSALS):
                return check.read(value)
        raise ValueError

    return Check(", or ".join(check.words for check in checks), convert=convert)


def maybe(check: Check) -> Check:
    """A check that also accepts None."""
    return either(check, Check("None", lambda value: value is None))


def instance(kind: type | tuple[type, ...], words: str) -> Check:
    """An object of a given class."""
    return Check(words, lambda value: isinstance(value, kind))


def having(words: str, *attributes: str) -> Check:
    """An object of any class that has some attributes."""
    return Check(words, lambda value: not isinstance(value, type) and all(hasattr(value, a) for a in attributes))


def measured(columns: Mapping[str, Any], by: str) -> Check:
    """A frame that has at least these columns."""
    words = f"the frame that {by} gave, with columns {', '.join(columns)}"
    return Check(words, lambda value: set(columns) <= set(getattr(value, "columns", ())))


def _is_path(value: Any) -> bool:  # noqa: ANN401
    text = os.fspath(value)
    return isinstance(text, str) and bool(text) and "\0" not in text


def _is_model(value: object) -> bool:
    from mlx.nn.layers.base import Module  # MLX is imported only to compute

    return isinstance(value, Module) and hasattr(value, "layers")


def plain(value: Any) -> Any:  # noqa: ANN401
    """Convert NumPy's numbers and arrays to Python's, in lists and dictionaries too."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


BITS = either(whole(), Check("a number of bits", real().fits, float))
FLAG = Check("True or False", lambda value: type(value).__name__ == "bool", bool)  # NumPy's has the same name
WORDS = instance(str, "a text in quotes")
PATH = Check("a path", _is_path)
FILE = Check("the path of a file, not of a folder", lambda p: _is_path(p) and not Path(p).is_dir())
MAPPING = Check("a dictionary", lambda value: isinstance(value, Mapping), dict)
TEXTS = Check(
    "a dictionary of texts",
    lambda value: isinstance(value, Mapping) and all(isinstance(x, str) for pair in value.items() for x in pair),
    dict,
)
OPTION_VALUES = Check("a dictionary of options", lambda value: isinstance(value, Mapping), plain)
FUNCTION = Check("a function", callable)
MODEL = Check("a language model, the first of the two that vl.load gives", _is_model)
TOKENIZER = Check(
    "a tokenizer, the second of the two that vl.load gives",
    lambda value: hasattr(value, "encode") and not isinstance(value, str),
)
CALIBRATION = having("the result of vl.calibrate", "codec")
CALIBRATIONS = either(CALIBRATION, many(CALIBRATION, empty=True))
CACHE = many(having("a layer's cache, as vl.make_cache makes them", "state"), empty=True)
PLAN = Check(
    "a method's id, a vl.Plan, or the pathlib.Path of one that was saved",
    lambda value: (
        isinstance(value, str | os.PathLike) or (hasattr(value, "settings_for") and not isinstance(value, type))
    ),
)
CACHE_MAKER = either(PLAN, FUNCTION)

ARGUMENTS: dict[str, Check] = {
    **dict.fromkeys(("batch", "context", "max_kv_size", "prompt", "sequences", "tokens", "upto", "windows"), whole(1)),
    **dict.fromkeys(("decoded", "seed", "sinks", "window"), whole(0)),
    **dict.fromkeys(("bits", "key_bits", "value_bits"), BITS),  # a method says what it takes
    **dict.fromkeys(("head", "layer"), whole()),
    **dict.fromkeys(("key_weight", "memory_gb"), real(above=0)),
    **dict.fromkeys(("method", "name", "space", "tensor", "text"), WORDS),
    **dict.fromkeys(("per_question", "per_sequence", "per_token"), FLAG),
    "calibration": CALIBRATION,
    "capture": having("the result of vl.capture", "layers", "tokens"),
    "chunk": choice("exact", "codes"),
    "folder": Check("the path of a folder", lambda p: _is_path(p) and (Path(p).is_dir() or not Path(p).exists())),
    "method_or_plan": PLAN,
    "methods": many(WORDS),
    "mode": choice("oneshot", "decode"),
    "model": MODEL,
    "path": PATH,
    "progress": FUNCTION,
    "sliding": choice("compressed", "exact"),
    "tokenizer": TOKENIZER,
}
"""The checks of arguments by name, unless a function has its own."""

OPTIONS: dict[str, Check] = {
    **dict.fromkeys(("bounds", "centred", "centroid", "hadamard", "smooth"), maybe(FLAG)),
    **dict.fromkeys(("outliers", "seed"), maybe(whole(0))),
    "damping": maybe(real(least=0)),
    **dict.fromkeys(("group", "words"), maybe(whole(1))),
    "outlier_bits": maybe(whole()),
}
"""Numbers and flags among the options of veloxlab's own methods; words are checked by the codecs."""


def checked(**own: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check a function's arguments by their names: by its ``own`` checks, else by `ARGUMENTS`.

    Extra keyword arguments with a known name are checked too; in others NumPy's numbers become Python's. None is
    accepted where it is the default. Arguments that do not fit the signature raise TypeError.
    """
    known, unknown = {**ARGUMENTS, **own}, Check("anything", convert=plain)

    def read(name: str, value: object, default: object) -> object:
        return None if value is default is None else known.get(name, unknown)(name, value)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        takes = signature(function)

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = takes.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            for name, value in given.arguments.items():
                parameter = takes.parameters[name]
                if parameter.kind is Parameter.VAR_KEYWORD:
                    given.arguments[name] = {n: read(n, v, None) for n, v in value.items()}
                else:
                    given.arguments[name] = read(name, value, parameter.default)
            return function(*given.args, **given.kwargs)

        return wrapper

    return decorate


def check_fields(made: object, **own: Check) -> None:
    """Check the fields of a new dataclass, also of a frozen one."""
    for name, check in own.items():
        object.__setattr__(made, name, check(name, getattr(made, name)))


def check_options(options: Mapping[str, object]) -> None:
    """Raise `InputError` unless numbers and flags among a method's options have the right type; None is the default."""
    for name in OPTIONS.keys() & options.keys():
        OPTIONS[name](name, options[name])


def _shown(value: object) -> str:
    """A value after its name in a sentence; only the type if the value may be long."""
    simple = (str, bytes, Number, Path, type(None))
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, simple) for item in items):
        return f" (of the type {type(value).__name__})"
    said = repr(value)
    return f"={said if len(said) <= _SHOWN else said[: _SHOWN - 1] + '…'}"
