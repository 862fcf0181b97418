"""Checks of a chart's arguments: each has the type in the signature, and frames have rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import Parameter, signature
from typing import Any

import polars as pl

from veloxlab.checks import WORDS, Check, checked, choice, maybe, real, whole
from veloxlab.errors import InputError
from veloxlab.store import in_short

FRAME = Check("the Polars frame of a measurement", lambda value: isinstance(value, pl.DataFrame))
PAIR = Check(
    "two finite numbers, the lower one first",
    lambda value: not isinstance(value, dict) and len(value) == 2 and real().read(value[0]) < real().read(value[1]),
    lambda value: tuple(map(float, value)),
)
_CHECKS = {
    "pl.DataFrame": FRAME,
    "str": WORDS,
    "int": whole(),
    "float": real(),
    "columns.Domain": PAIR,
    "tuple[float, float]": PAIR,
    "Literal['bits', 'held_bytes']": choice("bits", "held_bytes"),
}
"""By annotations as written in signatures; ``| None`` after one allows None too."""


def _check(parameter: Parameter) -> Check:
    kind = parameter.annotation.removesuffix(" | None")
    return maybe(_CHECKS[kind]) if kind != parameter.annotation else _CHECKS[kind]


@cache
def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with checks: it raises `InputError` for wrong types, and for frames that it cannot read."""
    parameters = signature(function).parameters
    known = checked(**{name: _check(p) for name, p in parameters.items()})(function)
    first = next(iter(parameters))  # the data

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        frame = args[0] if args else kwargs.get(first)
        if first == "frame" and isinstance(frame, pl.DataFrame) and frame.columns and frame.is_empty():
            raise InputError(f"{function.__name__} needs at least one row: the frame is empty.")
        try:
            return known(*args, **kwargs)
        except pl.exceptions.PolarsError as error:
            said = f"{function.__name__} cannot read this frame ({in_short(error)})"
            raise InputError(f"{said}: give the frame that its docstring names.") from error

    return wrapper
