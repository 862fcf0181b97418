"""What users may hand in: each kind of input is read in one place, and refused in one sentence.

A `Check` takes what means the same (numpy's numbers, any list) and gives Python's own. `checked` applies checks to a
function's arguments by their names: ``bits`` or ``sinks`` mean the same in every function.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from numbers import Number, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from veloxlab.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Check:
    """One kind of input.

    Attributes
    ----------
    words : what to give, for the sentence.
    read : gives the value as it is used; raises TypeError or ValueError if it is of another kind.
    """

    words: str
    read: Callable[[Any], Any]

    def __call__(self, name: str, value: object) -> Any:  # noqa: ANN401 - of many kinds
        """Give what ``value`` means; raises `InputError` that names it, and says what to give."""
        try:
            return self.read(value)
        except InputError:
            raise
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{name}{_shown(value)} cannot be used: give {self.words}.") from None


def whole(least: int | None = None, most: int | None = None) -> Check:
    """A whole number of Python or numpy; True and False are none."""

    def read(value: Any) -> int:  # noqa: ANN401
        number = operator.index(value)
        return _inside(number, not isinstance(value, bool) and _between(number, least, most))

    if least is None or most is None:
        return Check("a whole number" if least is None else f"a whole number, {least} or more", read)
    return Check(f"a whole number from {least} to {most}", read)


def real(
    *, above: float | None = None, below: float | None = None, least: float | None = None, most: float | None = None
) -> Check:
    """A finite number of Python or numpy."""

    def read(value: Any) -> float:  # noqa: ANN401
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        number = float(value)
        within = (above is None or number > above) and (below is None or number < below)
        return _inside(number, math.isfinite(number) and within and _between(number, least, most))

    ends = {"above": above, "from": least, "below": below, "to": most}
    parts = [f"{word} {end:g}" for word, end in ends.items() if end is not None]
    return Check(" and ".join(["a finite number " + parts[0], *parts[1:]]) if parts else "a finite number", read)


def choice(*words: str) -> Check:
    """One of some words."""

    def read(value: Any) -> str:  # noqa: ANN401
        return str(_inside(value, isinstance(value, str) and value in words))

    *first, last = map(repr, words)
    return Check(f"{', '.join(first)} or {last}" if first else last, read)


def many(each: Check, *, empty: bool = False) -> Check:
    """A list, a tuple, a range or the like, with at least one item unless ``empty`` is allowed; given as a tuple."""

    def read(value: Any) -> tuple[Any, ...]:  # noqa: ANN401
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise TypeError
        found = tuple(each.read(item) for item in value)
        return tuple(_inside(found, empty or bool(found)))

    return Check(f"a list{'' if empty else ' of one or more'}, each {each.words}", read)


def either(*checks: Check) -> Check:
    """What the first of ``checks`` that can read it makes of it."""

    def read(value: object) -> Any:  # noqa: ANN401
        for check in checks:
            try:
                return check.read(value)
            except InputError:
                raise
            except (TypeError, ValueError, OverflowError):
                continue
        raise TypeError

    return Check(", or ".join(check.words for check in checks), read)


def maybe(check: Check) -> Check:
    """The same, or None."""
    return Check(f"{check.words}, or None", lambda value: None if value is None else check.read(value))


def instance(kind: type | tuple[type, ...], words: str) -> Check:
    """An object of a class."""
    return Check(words, lambda value: _inside(value, isinstance(value, kind)))


def having(words: str, *attributes: str) -> Check:
    """An object of any class that has some attributes."""
    return Check(
        words, lambda value: _inside(value, not isinstance(value, type) and all(hasattr(value, a) for a in attributes))
    )


def _read_flag(value: Any) -> bool:  # noqa: ANN401
    return bool(_inside(value, isinstance(value, bool) or type(value).__name__ == "bool"))  # numpy has its own


def _read_path(value: Any) -> str | Path:  # noqa: ANN401
    text = os.fspath(value)
    _inside(text, isinstance(text, str) and bool(text) and "\0" not in text)
    return text if isinstance(value, str) else Path(text)


def _read_file(value: Any) -> str | Path:  # noqa: ANN401
    return _inside(_read_path(value), not Path(value).is_dir())


def _read_folder(value: Any) -> str | Path:  # noqa: ANN401
    found = _read_path(value)
    return _inside(found, Path(value).is_dir() or not Path(value).exists())


def _read_model(value: Any) -> Any:  # noqa: ANN401
    from mlx.nn.layers.base import Module  # MLX is imported when something has to compute

    return _inside(value, isinstance(value, Module) and hasattr(value, "layers"))


def _read_plan(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, os.PathLike):
        from veloxlab.cache.plan import Plan  # which takes its arguments by this module

        return Plan.load(FILE("the plan's path", value))
    return _inside(value, isinstance(value, str) or (hasattr(value, "settings_for") and not isinstance(value, type)))


FLAG = Check("True or False", _read_flag)
WORDS = instance(str, "a text in quotes")
PATH = Check("a path", _read_path)
FILE = Check("the path of a file, not of a folder", _read_file)
FOLDER = Check("the path of a folder", _read_folder)
MAPPING = Check("a dictionary", lambda value: dict(_inside(value, isinstance(value, Mapping))))
FUNCTION = Check("a function", lambda value: _inside(value, callable(value)))
MODEL = Check("a language model, the first of the two that vl.load gives", _read_model)
TOKENIZER = Check(
    "a tokenizer, the second of the two that vl.load gives",
    lambda value: _inside(value, hasattr(value, "encode") and not isinstance(value, str)),
)
CAPTURE = having("what vl.capture gave", "layers", "tokens")
CALIBRATION = having("what vl.calibrate gave", "codec")
CALIBRATIONS = either(CALIBRATION, many(CALIBRATION, empty=True))
CACHE = many(having("a layer's cache, as vl.make_cache makes them", "state"), empty=True)
PLAN = Check("a method's id, a vl.Plan, or the pathlib.Path of one that was saved", _read_plan)
CACHE_MAKER = either(PLAN, FUNCTION)

_COUNT, _ONE_OR_MORE = whole(0), whole(1)
ARGUMENTS: dict[str, Check] = {
    "batch": _ONE_OR_MORE,
    "bits": whole(),  # which of them a method takes is the method's to say
    "calibration": CALIBRATION,
    "capture": CAPTURE,
    "chunk": choice("exact", "codes"),
    "context": _ONE_OR_MORE,
    "decoded": _COUNT,
    "folder": FOLDER,
    "head": whole(),
    "key_bits": whole(),
    "key_weight": real(above=0),
    "layer": whole(),
    "max_kv_size": _ONE_OR_MORE,
    "memory_gb": real(above=0),
    "method": WORDS,
    "method_or_plan": PLAN,
    "methods": many(WORDS),
    "mode": choice("oneshot", "decode"),
    "model": MODEL,
    "name": WORDS,
    "path": PATH,
    "per_sequence": FLAG,
    "per_token": FLAG,
    "progress": FUNCTION,
    "prompt": _ONE_OR_MORE,
    "seed": _COUNT,
    "sequences": _ONE_OR_MORE,
    "sinks": _COUNT,
    "sliding": choice("compressed", "exact"),
    "space": WORDS,
    "tensor": WORDS,
    "text": WORDS,
    "tokenizer": TOKENIZER,
    "tokens": _ONE_OR_MORE,
    "upto": _ONE_OR_MORE,
    "value_bits": whole(),
    "window": _COUNT,
    "windows": _ONE_OR_MORE,
}
"""What the names of arguments mean, where a function does not say otherwise."""

OPTIONS: dict[str, Check] = {
    "bounds": FLAG,
    "centred": FLAG,
    "centroid": FLAG,
    "damping": real(least=0),
    "group": _ONE_OR_MORE,
    "hadamard": FLAG,
    "outlier_bits": whole(),
    "outliers": _COUNT,
    "seed": _COUNT,
    "smooth": FLAG,
}
"""Numbers and flags among the options of veloxlab's own methods; words are checked by the codecs."""


def _read_options(value: Any) -> dict[str, Any]:  # noqa: ANN401
    return dict(plain(MAPPING.read(value)))


OPTION_VALUES = Check("a dictionary of options", _read_options)


def measured(columns: Mapping[str, Any], by: str) -> Check:
    """A frame that has at least these columns."""
    words = f"the frame that {by} gave, with columns {', '.join(columns)}"
    return Check(
        words, lambda value: _inside(value, set(columns) <= set(value.columns) if hasattr(value, "columns") else False)
    )


def checked(**own: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check a function's arguments by their names: by its ``own`` checks, else by `ARGUMENTS`.

    Extra keyword arguments are checked too where their name is known, and numpy's numbers in them become Python's.
    None stands where it is the default. What does not fit the signature is Python's own TypeError.
    """
    known = {**ARGUMENTS, **own}

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        takes = signature(function)
        extra = next((p.name for p in takes.parameters.values() if p.kind is Parameter.VAR_KEYWORD), None)

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = takes.bind(*args, **kwargs)
            except TypeError:
                given = None
            if given is None:
                return function(*args, **kwargs)  # which says what it takes
            for name, value in given.arguments.items():
                if name == extra:
                    given.arguments[name] = {n: _read(known, n, v, None) for n, v in value.items()}
                else:
                    given.arguments[name] = _read(known, name, value, takes.parameters[name].default)
            return function(*given.args, **given.kwargs)

        return wrapper

    return decorate


def check_fields(made: object, **own: Check) -> None:
    """Check the fields of a dataclass, also a frozen one, when it is made."""
    for name, check in own.items():
        object.__setattr__(made, name, check(name, getattr(made, name)))


def check_options(options: Mapping[str, object]) -> None:
    """Raise `InputError` unless the numbers and flags among a method's options are some; None is the default."""
    for name in OPTIONS.keys() & options.keys():
        maybe(OPTIONS[name])(name, options[name])


def plain(value: Any) -> Any:  # noqa: ANN401
    """The same with numpy's numbers and arrays as Python's, in lists and dictionaries too."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def _read(known: Mapping[str, Check], name: str, value: object, default: object) -> object:
    check = known.get(name)
    if value is None and default is None:
        return None
    return plain(value) if check is None else check(name, value)


def _between(number: float, least: float | None, most: float | None) -> bool:
    return (least is None or number >= least) and (most is None or number <= most)


def _inside(value: T, fits: bool) -> T:
    if not fits:
        raise ValueError
    return value


def _shown(value: object) -> str:
    """A value behind its name in a sentence; of what may be large, the kind alone."""
    simple = (str, bytes, Number, Path, type(None))
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, simple) for item in items):
        return f" (of the type {type(value).__name__})"
    said = repr(value)
    return f"={said if len(said) <= _SHOWN else said[: _SHOWN - 1] + '…'}"
